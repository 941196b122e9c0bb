//! What one request costs through a real mount: heap allocations, and copies of data in the daemon's memory. Bounds keep
//! it so. System calls are counted in tests/fuse/costs.rs.
//!
//! The server runs in this process, so that its allocator and its memcpy can be counted (`counted`). All threads count:
//! those of the FUSE crate, of `serve`, and the client's, which allocates and copies nothing.
#![cfg(all(feature = "daemon", target_arch = "x86_64", target_env = "gnu"))]
#![allow(clippy::unwrap_used)]

mod counted;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Arc;
use std::thread::JoinHandle;

use counted::Counts;
use plyfs::cache::BlockCache;
use plyfs::format::record::{BaseOptions, ImageFormat, Superblock};
use plyfs::fuse::kernel::{self, KernelNotifier};
use plyfs::fuse::session::FuseSession;
use plyfs::fuse::{Ownership, PlyFs};
use plyfs::io::sys::{self, Detach};
use plyfs::io::{ArenaIdentity, LiveArena, LiveStore, MapBounds};
use plyfs::serve::{Limits, Service};
use plyfs::store::{NewBase, NewDisk, NewFile, Store};

const MIB: usize = 1 << 20;
const SIZE: usize = 64 * MIB;
/// Of each kind; enough that what happens once does not count.
const REQUESTS: u64 = 2000;
const LARGE_REQUESTS: u64 = 50;

/// A mounted store with one disk on one base. The mount ends with it.
struct Fixture {
    dir: tempfile::TempDir,
    serving: Option<JoinHandle<io::Result<()>>>,
}

impl Fixture {
    /// The store is below `parent`.
    fn new(parent: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("plyfs-costs-").tempdir_in(parent).unwrap();
        let base = dir.path().join("base.img");
        std::fs::write(&base, vec![0xb5; SIZE]).unwrap();
        std::fs::create_dir(dir.path().join("store")).unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let arena = sys::memory_file().unwrap();
        LiveArena::format(&arena, &ArenaIdentity { id: 1, device: 1, inode: 1 }).unwrap();
        let root = dir.path().join("store");
        let cache = Arc::new(BlockCache::new(2 * SIZE as u64).unwrap());
        let live = |_: &Superblock| -> io::Result<Arc<dyn LiveStore>> {
            Ok(Arc::new(LiveArena::open(arena, MapBounds::NONE)?))
        };
        let store = Arc::new(Store::open(&root, live, cache, None).unwrap());
        let image = NewFile {
            source: base.to_str().unwrap().into(),
            mirrors: Vec::new(),
            format: ImageFormat::Raw,
            is_format_given: true,
            probed: None,
            proof: None,
        };
        let options = BaseOptions::default();
        let name = "base".into();
        store
            .register(NewBase {
                name,
                image,
                backing: Vec::new(),
                onto: None,
                digest: None,
                options,
                token: None,
            })
            .unwrap();
        let new = NewDisk {
            name: "disk".into(),
            base: Some("base".into()),
            size: None,
            mode: 0o600,
            uid: 0,
            gid: 0,
            limits: Default::default(),
        };
        store.create_disks(&[new]).unwrap();
        let mut fixture = Self { dir, serving: None };
        fixture.mount(store).unwrap();
        fixture
    }

    /// Mounts, and serves as a worker does.
    fn mount(&mut self, store: Arc<Store>) -> io::Result<()> {
        let fuse: OwnedFd = File::options().read(true).write(true).open("/dev/fuse")?.into();
        let options =
            format!("fd={},rootmode=40755,user_id=0,group_id=0,default_permissions", fuse.as_raw_fd());
        sys::mount_fuse(&self.mount_point(), &options)?;
        let protocol = kernel::answer_init(fuse.as_fd())?;
        let (threads, io_threads) = (4, 32);
        let service = Service::new(store, io_threads, threads / 2, Limits::of_window(kernel::window()))?;
        let notifier = Arc::new(KernelNotifier::new(fuse.try_clone()?));
        let frontend = service.add_frontend(notifier.clone());
        let owner = Ownership { uid: 0, gid: 0, base_mode: 0o400, since_ns: 1 };
        let session = FuseSession::new(PlyFs::new(service, owner, frontend, protocol), &fuse, threads)?;
        drop(fuse);
        self.serving = Some(std::thread::spawn(move || session.run(&notifier)));
        Ok(())
    }

    fn mount_point(&self) -> std::path::PathBuf {
        self.dir.path().join("mnt")
    }

    /// The disk, without the page cache.
    fn disk(&self) -> File {
        let path = self.mount_point().join("disks/disk.raw");
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
    }
}

impl Drop for Fixture {
    fn drop(&mut self) {
        let _ = sys::unmount(&self.mount_point(), Detach::Yes);
        if let Some(serving) = self.serving.take() {
            let _ = serving.join();
        }
    }
}

/// Memory that a direct read or write can use.
struct Buffer {
    memory: Vec<u8>,
    at: usize,
    len: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        let memory = vec![0xd7; len + 4096];
        let at = memory.as_ptr().align_offset(4096);
        Self { memory, at, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.at..self.at + self.len]
    }
}

/// What each of `requests` requests costs, of a kind that `request` makes; it gets their numbers.
fn cost(requests: u64, mut request: impl FnMut(u64)) -> Counts {
    let before = Counts::now();
    (0..requests).for_each(&mut request);
    Counts::now().since(before)
}

/// The most of one kind of request, for each one.
struct Bounds {
    work: &'static str,
    allocations: f64,
    /// In multiples of the request's length.
    copies: f64,
}

impl Bounds {
    /// The error when a count is above its bound.
    fn hold(&self, medium: &str, (requests, len): (u64, usize), found: Counts) -> Result<(), String> {
        let allocations = found.allocations as f64 / requests as f64;
        let copies = found.copied as f64 / (requests as f64 * len as f64);
        println!("{medium}: {}: {allocations:.3} allocations, {copies:.3} copies; {found:?}", self.work);
        let what = |name: &str, found: f64, bound: f64| {
            format!("{medium}: {}: {found:.3} {name} for each request, at most {bound}", self.work)
        };
        match () {
            () if allocations > self.allocations => Err(what("allocations", allocations, self.allocations)),
            () if copies > self.copies => Err(what("copies of the data", copies, self.copies)),
            () => Ok(()),
        }
    }
}

fn is_root() -> bool {
    let root = sys::effective_ids().0 == 0;
    if !root {
        assert!(std::env::var_os("CI").is_none(), "this test needs root");
        println!("SKIP: this test mounts, which needs root");
    }
    root
}

/// A single test, because others beside it would allocate too.
#[test]
fn a_request_allocates_and_copies_no_more_than_it_needs() {
    if !is_root() {
        return;
    }
    assert_counters_count();
    let mut wrong = Vec::new();
    for parent in ["/dev/shm", "/var/tmp"] {
        wrong.extend(counts_below(parent));
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// Otherwise all bounds would hold without meaning.
fn assert_counters_count() {
    let before = Counts::now();
    let long = std::hint::black_box(vec![1u8; 3 * 4096]);
    let copy = std::hint::black_box(long.clone());
    let found = Counts::now().since(before);
    assert_eq!((found.allocations, found.copied), (2, 3 * 4096), "{found:?}");
    drop(copy);
}

fn counts_below(parent: &str) -> Vec<String> {
    // No write of a client that waits for each answer is handed to another thread, with a copy of its bytes: the thread that
    // made the one before may wait again when it answers.
    let memory = parent == "/dev/shm";
    let write = |work| Bounds { work, allocations: 0.0, copies: 0.0 };
    // tmpfs refuses RWF_NOWAIT, so there such a read is prepared as one that may wait.
    let allocations = if memory { 4.0 } else { 1.0 };
    let read_back = Bounds { work: "4 KiB read of what was written", allocations, copies: 0.0 };
    let fixture = Fixture::new(parent);
    let disk = fixture.disk();
    let (mut block, mut large) = (Buffer::new(4096), Buffer::new(MIB));
    let mut wrong = Vec::new();
    let blocks = (SIZE / 4096) as u64;
    // Once around a disk of a power of two of blocks, in no order that readahead knows.
    let scattered = |n: u64| n * 10_007 % blocks * 4096;
    let half = (SIZE / MIB / 2) as u64;
    let mut check = |bounds: Bounds, requests: u64, len: usize, found: Counts| {
        wrong.extend(bounds.hold(parent, (requests, len), found).err());
    };

    // All of the base comes to memory, and every thread has its buffers.
    for at in 0..(SIZE / MIB) as u64 {
        disk.read_exact_at(large.bytes(), at * MIB as u64).unwrap();
    }
    (0..blocks).for_each(|n| disk.read_exact_at(block.bytes(), scattered(n)).unwrap());

    let found = cost(REQUESTS, |n| disk.read_exact_at(block.bytes(), scattered(n)).unwrap());
    check(Bounds { work: "4 KiB read, hot", allocations: 0.0, copies: 1.0 }, REQUESTS, 4096, found);
    let found = cost(LARGE_REQUESTS, |n| disk.read_exact_at(large.bytes(), n % half * MIB as u64).unwrap());
    check(Bounds { work: "1 MiB read, hot", allocations: 5.5, copies: 1.0 }, LARGE_REQUESTS, MIB, found);

    // The first half of the disk by small writes, the second by large ones.
    let (first, second) = (blocks / 2, (SIZE / 2) as u64);
    let place = |n: u64| n * 10_007 % first * 4096;
    (0..64).for_each(|n| disk.write_all_at(block.bytes(), place(n)).unwrap());
    let found = cost(REQUESTS, |n| disk.write_all_at(block.bytes(), place(64 + n)).unwrap());
    check(write("4 KiB write, first touch"), REQUESTS, 4096, found);
    let found = cost(REQUESTS, |n| disk.write_all_at(block.bytes(), place(64 + n)).unwrap());
    check(write("4 KiB write, again"), REQUESTS, 4096, found);

    disk.write_all_at(large.bytes(), second).unwrap();
    let large_requests = half - 1;
    let found =
        cost(large_requests, |n| disk.write_all_at(large.bytes(), second + (n + 1) * MIB as u64).unwrap());
    check(write("1 MiB write, first touch"), large_requests, MIB, found);
    let found = cost(REQUESTS, |n| disk.read_exact_at(block.bytes(), place(64 + n)).unwrap());
    check(read_back, REQUESTS, 4096, found);
    wrong
}
