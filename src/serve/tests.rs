//! Requests of a frontend that is not a mount, on a store whose base is behind a network: what they wait for, how they
//! end, and that no other request ends with them.

mod copying;
mod counting;
mod inline;
mod pacing;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use parking_lot::Mutex;
use tempfile::TempDir;

use super::callers::{Findings, Process, Question};
use super::{
    Call, CreatedDisk, Errno, Frontend, FrontendId, Handle, Limits, Requester, Service, SpaceChange, Target,
    WriteRequest, guard,
};
use crate::cache::BlockCache;
use crate::disk::{Grow, Seek};
use crate::events::{Events, Traffic};
use crate::format::record::{
    BaseIdentity, BaseOptions, BaseRecord, ImageFile, ImageFormat, MountRequest, Validator,
};
use crate::io::LiveDir;
use crate::source::{Completer, Completion, FileSource, Identity, Source, SourceError};
use crate::store::{NewBase, NewDisk, NewFile, Replace, Sources, Store};

const SOON: Duration = Duration::from_secs(30);
const SIZE: usize = 1 << 20;

/// How the server answers a read.
enum Response {
    /// It sends the bytes later.
    Late { completion: Completion, _arrives: Completer },
    /// The bytes are here.
    Here,
    /// The lookup panics.
    Broken,
}

/// A source behind a network.
struct Server {
    identity: Identity,
    response: Mutex<Response>,
    asked: Mutex<Sender<()>>,
    tries: AtomicU64,
}

fn byte(at: usize) -> u8 {
    (at / 512) as u8 ^ (at as u8).wrapping_mul(31) | 1
}

fn bytes(from: usize, len: usize) -> Vec<u8> {
    (from..from + len).map(byte).collect()
}

impl Server {
    /// Makes the bytes available, and wakes the waiting requests.
    fn sends(&self) {
        let before = std::mem::replace(&mut *self.response.lock(), Response::Here);
        // Dropped without the lock: the woken requests ask again.
        drop(before);
    }

    fn breaks(&self) {
        *self.response.lock() = Response::Broken;
    }
}

impl Source for Server {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        self.tries.fetch_add(1, Ordering::Relaxed);
        let _ = self.asked.lock().send(());
        let waits = match &*self.response.lock() {
            Response::Late { completion, .. } => Some(completion.clone()),
            Response::Here => None,
            Response::Broken => panic!("a bug"),
        };
        if let Some(completion) = waits {
            return Err(SourceError::not_here("http://server/image", completion));
        }
        let len = buf.len().min(SIZE.saturating_sub(offset as usize));
        buf[..len].copy_from_slice(&bytes(offset as usize, len));
        Ok(len)
    }

    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>, SourceError> {
        Ok((offset < SIZE as u64).then_some(offset))
    }

    fn next_hole(&self, _offset: u64) -> Result<u64, SourceError> {
        Ok(SIZE as u64)
    }

    fn check(&self) -> Result<(), SourceError> {
        Ok(())
    }

    fn is_remote(&self) -> bool {
        true
    }
}

struct Network(Arc<Server>);

impl Sources for Network {
    fn file(&self, path: &Path) -> Result<FileSource, SourceError> {
        FileSource::open(path)
    }

    fn kept(&self, _: &BaseRecord, _: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        Ok(self.0.clone())
    }

    fn traffic(&self, base: &BaseRecord) -> Arc<Traffic> {
        Events::new().base(base.id, &base.name)
    }
}

type Answered<T> = Receiver<Result<T, i32>>;

/// A frontend and its store: two disks on one base, and one blank disk.
struct Fixture {
    _dir: TempDir,
    server: Arc<Server>,
    asked: Receiver<()>,
    service: Service,
    disks: Vec<u64>,
    base: u64,
    /// The number of the next request without a number of its own.
    next: AtomicU64,
}

const BLANK: usize = 2;

impl Fixture {
    fn new() -> Self {
        Self::with_limits(Limits::of_window(1000))
    }

    fn with_limits(limits: Limits) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::create_dir(dir.path().join("store")).unwrap();
        let (sender, asked) = channel();
        let (arrives, completion) = Completion::new();
        let server = Arc::new(Server {
            identity: Identity::Contents { size: SIZE as u64, key: [7; 32] },
            response: Mutex::new(Response::Late { completion, _arrives: arrives }),
            asked: Mutex::new(sender),
            tries: AtomicU64::new(0),
        });
        let live = dir.path().join("live");
        let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
        let sources = Arc::new(Network(server.clone()));
        let root = dir.path().join("store");
        let store =
            Store::open_with(&root, |_| Ok(Arc::new(LiveDir::new(&live)?)), cache, None, sources).unwrap();
        let validator = Validator::Http { etag: Some("\"1\"".into()), last_modified: None };
        let identity = BaseIdentity { size: SIZE as u64, validator, digest: None };
        let image = NewFile {
            source: "http://server/image".into(),
            mirrors: Vec::new(),
            format: ImageFormat::Raw,
            is_format_given: true,
            probed: Some((identity, bytes(0, 4096))),
            proof: None,
        };
        let new = NewBase {
            name: "b".into(),
            image,
            backing: Vec::new(),
            onto: None,
            digest: None,
            options: BaseOptions::default(),
            token: None,
        };
        let base = store.register(new).unwrap().id();
        let disk = |name: &str, base: Option<&str>| NewDisk {
            name: name.into(),
            base: base.map(Into::into),
            size: base.is_none().then_some(SIZE as u64),
            mode: 0o600,
            uid: 0,
            gid: 0,
            limits: Default::default(),
        };
        let new = [disk("one", Some("b")), disk("two", Some("b")), disk("blank", None)];
        let disks = store.create_disks(&new).unwrap().iter().map(|node| node.id()).collect();
        let service = Service::new(Arc::new(store), 2, 1, limits).unwrap();
        Self { _dir: dir, server, asked, service, disks, base, next: AtomicU64::new(1000) }
    }

    fn disk(&self, n: usize) -> Target {
        Target::Disk(self.disks[n])
    }

    fn any_call(&self) -> Call {
        call(self.next.fetch_add(1, Ordering::Relaxed))
    }

    fn read(&self, call: Call, target: Target, offset: u64, size: usize) -> Answered<Vec<u8>> {
        let (sender, answered) = channel();
        self.service.read(call, target, offset, size, move |done: Result<&[u8], Errno>| {
            let _ = sender.send(done.map(<[u8]>::to_vec).map_err(i32::from));
        });
        answered
    }

    fn write(&self, n: usize, offset: u64, data: &[u8]) -> Answered<()> {
        self.write_with(Handle::new(0), n, offset, data)
    }

    fn write_with(&self, handle: Handle, n: usize, offset: u64, data: &[u8]) -> Answered<()> {
        let (sender, answered) = channel();
        let written = WriteRequest { offset, handle, durable: false };
        let answer = move |done: Result<(), Errno>| _ = sender.send(done.map_err(i32::from));
        self.service.write(self.any_call(), self.disks[n], written, data, answer);
        answered
    }

    fn flush(&self, n: usize) -> Answered<()> {
        let (sender, answered) = channel();
        let answer = move |done: Result<(), Errno>| _ = sender.send(done.map_err(i32::from));
        self.service.flush(self.any_call(), self.disks[n], Handle::new(0), answer);
        answered
    }

    fn create(&self, requester: Requester, name: &str) -> Answered<u64> {
        let (sender, answered) = channel();
        let answer = move |made: Result<CreatedDisk, Errno>| {
            let _ = sender.send(made.map(|made| made.disk).map_err(i32::from));
        };
        self.service.create(requester, name.into(), 0o600, answer);
        answered
    }

    /// Waits until the server was asked, which a waiting request has done.
    #[track_caller]
    fn until_asked(&self) {
        self.asked.recv_timeout(SOON).expect("the server is asked");
    }

    /// Waits until this many requests wait.
    #[track_caller]
    fn until_waiting(&self, requests: usize) {
        let end = std::time::Instant::now() + SOON;
        while self.service.waiters().requests != requests {
            assert!(std::time::Instant::now() < end, "{:?}", self.service.waiters());
            std::thread::yield_now();
        }
    }

    /// Checks that waiting requests do not block other disks.
    #[track_caller]
    fn others_are_served(&self) {
        let blank = self.disk(BLANK);
        assert_eq!(done(&self.write(BLANK, 8192, b"served")), Ok(()));
        assert_eq!(done(&self.read(self.any_call(), blank, 8192, 6)), Ok(b"served".to_vec()));
        assert_eq!(done(&self.flush(BLANK)), Ok(()));
    }
}

/// A request of the only frontend.
fn call(number: u64) -> Call {
    Call { request: FrontendId(0).request(number), thread: 0 }
}

fn requester(unique: u64, resent: bool) -> Requester {
    let request = MountRequest { mount_ns: 1, unique };
    Requester { uid: 0, gid: 0, request, resent, exclusive: true }
}

#[track_caller]
fn done<T>(answered: &Answered<T>) -> Result<T, i32> {
    let done = answered.recv_timeout(SOON).expect("an answer");
    let again = answered.recv_timeout(Duration::ZERO);
    assert!(matches!(again, Err(RecvTimeoutError::Disconnected | RecvTimeoutError::Timeout)), "a second one");
    done
}

#[track_caller]
fn waits<T>(answered: &Answered<T>) {
    assert!(answered.try_recv().is_err(), "it was answered");
}

#[test]
fn a_read_that_waits_for_a_base_is_run_again_when_it_arrives() {
    let fixture = Fixture::new();
    let base = Target::Base(fixture.base);
    let reads = [
        (fixture.read(call(10), fixture.disk(0), 4000, 200), bytes(4000, 200)),
        (fixture.read(call(11), fixture.disk(1), 0, 8192), bytes(0, 8192)),
        (fixture.read(call(12), base, SIZE as u64 - 100, 4096), bytes(SIZE - 100, 100)),
    ];
    (0..3).for_each(|_| fixture.until_asked());
    fixture.until_waiting(3);
    reads.iter().for_each(|(answered, _)| waits(answered));
    fixture.others_are_served();
    fixture.server.sends();
    for (answered, expected) in &reads {
        assert_eq!(done(answered).as_ref(), Ok(expected));
    }
    // One of the requests that need the same block may find it in memory.
    assert!(fixture.server.tries.load(Ordering::Relaxed) >= 5, "they ask again");
    fixture.until_waiting(0);
    // Answered from memory, on this thread.
    let again = fixture.read(call(13), fixture.disk(0), 4000, 200);
    assert_eq!(again.try_recv(), Ok(Ok(bytes(4000, 200))));
}

#[test]
fn a_write_waits_for_the_bytes_of_the_base_that_its_ends_need() {
    let fixture = Fixture::new();
    let data = vec![0xee; 3 * 4096];
    let written = fixture.write(0, 100, &data);
    fixture.until_asked();
    fixture.until_waiting(1);
    waits(&written);
    assert_eq!(fixture.service.waiters().bytes, 4096, "only the ends are held");
    // Whole blocks need no bytes of the base.
    let middle = fixture.read(call(20), fixture.disk(0), 4096, 8192);
    assert_eq!(done(&middle), Ok(vec![0xee; 8192]));
    fixture.others_are_served();
    fixture.server.sends();
    assert_eq!(done(&written), Ok(()));
    let mut expected = bytes(0, 4 * 4096);
    expected[100..100 + data.len()].fill(0xee);
    assert_eq!(done(&fixture.read(call(21), fixture.disk(0), 0, 4 * 4096)), Ok(expected));
    fixture.until_waiting(0);
}

#[test]
fn a_discard_waits_for_its_ends_as_a_write_does() {
    let fixture = Fixture::new();
    let (sender, answered) = channel();
    let answer = move |done: Result<(), Errno>| _ = sender.send(done.map_err(i32::from));
    let (disk, what) = (fixture.disks[0], SpaceChange::Zero(Grow::No));
    fixture.service.allocate(call(30), disk, what, (100, 4096), Handle::new(0), answer);
    fixture.until_asked();
    waits(&answered);
    fixture.server.sends();
    assert_eq!(done(&answered), Ok(()));
    let mut expected = bytes(0, 8192);
    expected[100..4196].fill(0);
    assert_eq!(done(&fixture.read(call(31), fixture.disk(0), 0, 8192)), Ok(expected));
}

#[test]
fn seeking_goes_through_delta_and_base() {
    let fixture = Fixture::new();
    fixture.server.sends();
    let seek = |target, from, what| {
        let (sender, answered) = channel();
        let answer = move |found: Result<Option<u64>, Errno>| _ = sender.send(found.map_err(i32::from));
        fixture.service.seek(call(40), target, from, what, answer);
        done(&answered)
    };
    assert_eq!(done(&fixture.write(BLANK, 8192, &[1; 4096])), Ok(()));
    assert_eq!(seek(fixture.disk(BLANK), 0, Seek::Data), Ok(Some(8192)));
    assert_eq!(seek(fixture.disk(BLANK), 8192, Seek::Hole), Ok(Some(12288)));
    assert_eq!(seek(fixture.disk(BLANK), 12288, Seek::Data), Ok(None));
    assert_eq!(seek(Target::Base(fixture.base), 0, Seek::Hole), Ok(Some(SIZE as u64)));
    assert_eq!(seek(Target::Disk(999), 0, Seek::Data), Err(libc::ESTALE));
}

#[test]
fn after_quiesce_changes_are_refused_and_reads_are_not() {
    let fixture = Fixture::new();
    let waiting = fixture.write(0, 100, b"late");
    fixture.until_asked();
    fixture.until_waiting(1);
    assert_eq!(done(&fixture.write(BLANK, 0, b"before")), Ok(()));
    // A change that waits for a base does not run, so quiesce does not wait for it.
    fixture.service.quiesce();
    waits(&waiting);
    assert_eq!(done(&fixture.write(BLANK, 0, b"after!")), Err(libc::EIO));
    assert_eq!(done(&fixture.write(BLANK, 0, &[1; 4096])), Err(libc::EIO));
    assert_eq!(done(&fixture.flush(BLANK)), Err(libc::EIO));
    assert_eq!(done(&fixture.create(requester(1, false), "new")), Err(libc::EIO));
    assert_eq!(done(&fixture.read(call(50), fixture.disk(BLANK), 0, 6)), Ok(b"before".to_vec()));
    fixture.server.sends();
    assert_eq!(done(&waiting), Err(libc::EIO));
    assert_eq!(done(&fixture.read(call(51), fixture.disk(0), 100, 4)), Ok(bytes(100, 4)));
}

#[test]
fn a_panic_in_the_work_of_a_request_is_its_io_error_and_nothing_else() {
    let fixture = Fixture::new();
    fixture.server.breaks();
    let before = guard::panics();
    assert_eq!(done(&fixture.read(call(60), fixture.disk(0), 0, 4096)), Err(libc::EIO));
    assert_eq!(done(&fixture.write(0, 100, b"part")), Err(libc::EIO));
    assert!(guard::panics() >= before + 4, "each was tried twice");
    fixture.others_are_served();
    fixture.until_waiting(0);
    // The same disk works too, once the cause is gone.
    fixture.server.sends();
    assert_eq!(done(&fixture.read(call(61), fixture.disk(0), 0, 4096)), Ok(bytes(0, 4096)));
    assert_eq!(done(&fixture.write(0, 100, b"part")), Ok(()));
}

#[test]
fn an_interrupt_ends_a_read_that_waits_and_no_other() {
    let fixture = Fixture::new();
    let interrupted = fixture.read(call(70), fixture.disk(0), 0, 4096);
    let other = fixture.read(call(71), fixture.disk(0), 0, 4096);
    fixture.until_waiting(2);
    fixture.service.interrupt(call(70).request);
    assert_eq!(done(&interrupted), Err(libc::EINTR));
    waits(&other);
    assert_eq!(fixture.service.waiters().interrupted, 1);
    fixture.until_waiting(1);
    fixture.server.sends();
    assert_eq!(done(&other), Ok(bytes(0, 4096)));
}

#[test]
fn the_requests_of_a_killed_caller_end_and_those_of_others_wait_on() {
    const KILLED: Process = Process { id: 10, start: 5 };
    const OTHER: Process = Process { id: 20, start: 5 };
    let fixture = Fixture::new();
    let is_killed = Arc::new(AtomicBool::new(false));
    let seen = is_killed.clone();
    let lookup = move |question: &Question| {
        let process = |thread: &u32| (*thread, if *thread == 11 { KILLED } else { OTHER });
        let threads = question.threads.iter().map(process).collect();
        let ends = |process: &&Process| **process == KILLED && seen.load(Ordering::Relaxed);
        Some(Findings { threads, ending: question.processes.iter().filter(ends).copied().collect() })
    };
    fixture.service.watch_callers(Box::new(lookup)).unwrap();
    let killed = fixture.read(Call { thread: 11, ..call(80) }, fixture.disk(0), 0, 4096);
    let other = fixture.read(Call { thread: 21, ..call(81) }, fixture.disk(0), 0, 4096);
    fixture.until_waiting(2);
    is_killed.store(true, Ordering::Relaxed);
    assert_eq!(done(&killed), Err(libc::EINTR));
    waits(&other);
    fixture.server.sends();
    assert_eq!(done(&other), Ok(bytes(0, 4096)));
}

#[test]
fn requests_above_the_bound_of_one_disk_are_refused_and_others_wait() {
    let limits = Limits { requests: 10, of_disk: 2, bytes: 1 << 20, bytes_of_disk: 1 << 20, floor: 2 };
    let fixture = Fixture::with_limits(limits);
    let waiting =
        [fixture.read(call(90), fixture.disk(0), 0, 512), fixture.read(call(91), fixture.disk(0), 0, 512)];
    // Before they ask the server they wait for their disk to be attached.
    fixture.until_asked();
    fixture.until_asked();
    fixture.until_waiting(2);
    assert_eq!(done(&fixture.read(call(92), fixture.disk(0), 0, 512)), Err(libc::EIO));
    assert_eq!(fixture.service.waiters().refused, 1);
    let neighbour = fixture.read(call(93), fixture.disk(1), 0, 512);
    fixture.until_waiting(3);
    fixture.server.sends();
    for answered in waiting.iter().chain([&neighbour]) {
        assert_eq!(done(answered), Ok(bytes(0, 512)));
    }
}

#[test]
fn a_handle_of_another_epoch_is_refused() {
    let fixture = Fixture::new();
    let (sender, answered) = channel();
    let answer = move |opened: Result<Handle, Errno>| _ = sender.send(opened.map_err(i32::from));
    fixture.service.open(call(100), fixture.disk(BLANK), answer);
    let handle = done(&answered).expect("it opens");
    assert_eq!(Handle::new(handle.number()), handle);
    assert_eq!(done(&fixture.write_with(handle, BLANK, 0, b"new")), Ok(()));
    let stale = Handle::new(handle.number() + 1);
    assert_eq!(done(&fixture.write_with(stale, BLANK, 0, b"old")), Err(libc::EIO));
    assert_eq!(done(&fixture.read(call(101), fixture.disk(BLANK), 0, 3)), Ok(b"new".to_vec()));
    fixture.service.closed(fixture.disks[BLANK]);
}

#[test]
fn a_creation_that_is_sent_again_finds_the_disk_of_the_first_try() {
    let fixture = Fixture::new();
    let made = done(&fixture.create(requester(7, false), "new")).expect("it is made");
    assert_eq!(done(&fixture.create(requester(8, false), "new")), Err(libc::EEXIST));
    assert_eq!(done(&fixture.create(requester(7, true), "new")), Ok(made));
    let rename = |request, resent| {
        let (sender, answered) = channel();
        let answer = move |done: Result<(), Errno>| _ = sender.send(done.map_err(i32::from));
        let over = Replace::No;
        fixture.service.rename(requester(request, resent), "new".into(), "other".into(), over, answer);
        done(&answered)
    };
    assert_eq!(rename(9, false), Ok(()));
    assert_eq!(rename(9, true), Ok(()));
    assert_eq!(rename(10, false), Err(libc::ENOENT));
}

/// A frontend whose callers may have a disk open.
struct Openers(AtomicBool);

impl Openers {
    fn new(may_use: bool) -> Arc<Self> {
        Arc::new(Self(AtomicBool::new(may_use)))
    }
}

impl Frontend for Openers {
    fn release(&self, _disk: u64) {}

    fn may_use(&self, _disk: u64) -> io::Result<bool> {
        Ok(self.0.load(Ordering::Relaxed))
    }

    fn release_base(&self, _base: u64) {}

    fn may_use_base(&self, _base: u64) -> io::Result<bool> {
        Ok(self.0.load(Ordering::Relaxed))
    }

    fn resized(&self, _disk: u64) {}
}

impl Fixture {
    fn unlink_blank(&self) {
        let (sender, answered) = channel();
        let answer = move |done: Result<(), Errno>| _ = sender.send(done.map_err(i32::from));
        self.service.unlink(requester(11, false), "blank".into(), answer);
        assert_eq!(done(&answered), Ok(()));
    }

    /// Whether the disk is there after all ways in which it may be purged.
    fn is_kept(&self, disk: u64) -> bool {
        self.service.forgotten(disk);
        self.service.reap();
        self.service.store().disk_by_id(disk).is_some()
    }
}

#[test]
fn a_disk_without_a_name_goes_with_its_last_user() {
    let fixture = Fixture::new();
    let disk = fixture.disks[BLANK];
    let users = Openers::new(true);
    fixture.service.add_frontend(users.clone());
    assert!(fixture.is_kept(disk), "it has a name");
    fixture.unlink_blank();
    assert!(fixture.is_kept(disk), "a caller has it open");
    assert_eq!(done(&fixture.write(BLANK, 0, b"mine")), Ok(()));
    users.0.store(false, Ordering::Relaxed);
    assert!(!fixture.is_kept(disk));
    assert_eq!(done(&fixture.read(call(110), fixture.disk(BLANK), 0, 4)), Err(libc::ESTALE));
}

#[test]
fn a_disk_that_a_caller_of_another_frontend_has_open_is_not_purged() {
    let fixture = Fixture::new();
    let disk = fixture.disks[BLANK];
    let (first, second) = (Openers::new(false), Openers::new(true));
    fixture.service.add_frontend(first);
    fixture.service.add_frontend(second.clone());
    fixture.unlink_blank();
    assert!(fixture.is_kept(disk), "a caller of the second frontend has it open");
    second.0.store(false, Ordering::Relaxed);
    assert!(!fixture.is_kept(disk));
}

#[test]
fn no_disk_is_purged_before_a_frontend_says_that_it_is_unused() {
    let fixture = Fixture::new();
    let disk = fixture.disks[BLANK];
    fixture.unlink_blank();
    assert!(fixture.is_kept(disk), "there is no frontend yet");
    fixture.service.add_frontend(Openers::new(false));
    assert!(!fixture.is_kept(disk));
}
