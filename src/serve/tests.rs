//! Requests of a frontend that is no mount, on a store whose base lies behind a network: what they wait for, how they
//! end, and that nothing else ends with them.

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
    Allocate, Asker, Call, Created, Errno, Frontend, FrontendId, Handle, Limits, Service, Target, Written,
    guard,
};
use crate::cache::BlockCache;
use crate::disk::{Grow, Seek};
use crate::events::{Events, Traffic};
use crate::format::record::{
    BaseIdentity, BaseOptions, BaseRecord, ImageFile, ImageFormat, MountRequest, Validator,
};
use crate::io::LiveDir;
use crate::source::{Arrival, Arrived, FileSource, Identity, Source, SourceError};
use crate::store::{NewBase, NewDisk, NewFile, Replace, Sources, Store};

const SOON: Duration = Duration::from_secs(30);
const SIZE: usize = 1 << 20;

/// What a server does that is asked for bytes.
enum Mood {
    /// It sends them later.
    Late { arrival: Arrival, _arrives: Arrived },
    /// They are here.
    Here,
    /// Looking for them panics.
    Broken,
}

/// A source behind a network.
struct Server {
    identity: Identity,
    mood: Mutex<Mood>,
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
    /// The bytes come, and those that wait for them go on.
    fn sends(&self) {
        let before = std::mem::replace(&mut *self.mood.lock(), Mood::Here);
        // Without the lock: those that wait ask again.
        drop(before);
    }

    fn breaks(&self) {
        *self.mood.lock() = Mood::Broken;
    }
}

impl Source for Server {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        self.tries.fetch_add(1, Ordering::Relaxed);
        let _ = self.asked.lock().send(());
        let waits = match &*self.mood.lock() {
            Mood::Late { arrival, .. } => Some(arrival.clone()),
            Mood::Here => None,
            Mood::Broken => panic!("a bug"),
        };
        if let Some(arrival) = waits {
            return Err(SourceError::not_here("http://server/image", arrival));
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

/// A frontend with a store of its own: two disks on one base, and one without.
struct House {
    _dir: TempDir,
    server: Arc<Server>,
    asked: Receiver<()>,
    service: Service,
    disks: Vec<u64>,
    base: u64,
    /// The number of the next request that no test names.
    next: AtomicU64,
}

const BLANK: usize = 2;

impl House {
    fn new() -> Self {
        Self::with_limits(Limits::of_window(1000))
    }

    fn with_limits(limits: Limits) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::create_dir(dir.path().join("store")).unwrap();
        let (says, asked) = channel();
        let (arrives, arrival) = Arrival::new();
        let server = Arc::new(Server {
            identity: Identity::Contents { size: SIZE as u64, key: [7; 32] },
            mood: Mutex::new(Mood::Late { arrival, _arrives: arrives }),
            asked: Mutex::new(says),
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
            probed: Some((identity, bytes(0, 4096))),
        };
        let new = NewBase {
            name: "b".into(),
            image,
            backing: Vec::new(),
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
        let (says, answered) = channel();
        self.service.read(call, target, offset, size, move |done: Result<&[u8], Errno>| {
            let _ = says.send(done.map(<[u8]>::to_vec).map_err(i32::from));
        });
        answered
    }

    fn write(&self, n: usize, offset: u64, data: &[u8]) -> Answered<()> {
        self.write_with(Handle::new(0), n, offset, data)
    }

    fn write_with(&self, handle: Handle, n: usize, offset: u64, data: &[u8]) -> Answered<()> {
        let (says, answered) = channel();
        let written = Written { offset, handle, durable: false };
        let answer = move |done: Result<(), Errno>| _ = says.send(done.map_err(i32::from));
        self.service.write(self.any_call(), self.disks[n], written, data, answer);
        answered
    }

    fn flush(&self, n: usize) -> Answered<()> {
        let (says, answered) = channel();
        let answer = move |done: Result<(), Errno>| _ = says.send(done.map_err(i32::from));
        self.service.flush(self.any_call(), self.disks[n], Handle::new(0), answer);
        answered
    }

    fn create(&self, asker: Asker, name: &str) -> Answered<u64> {
        let (says, answered) = channel();
        let answer = move |made: Result<Created, Errno>| {
            let _ = says.send(made.map(|made| made.disk).map_err(i32::from));
        };
        self.service.create(asker, name.into(), 0o600, answer);
        answered
    }

    /// Until the server was asked, which a request that waits for it has done.
    #[track_caller]
    fn until_asked(&self) {
        self.asked.recv_timeout(SOON).expect("the server is asked");
    }

    /// Until so many requests wait.
    #[track_caller]
    fn until_waiting(&self, requests: usize) {
        let end = std::time::Instant::now() + SOON;
        while self.service.waiters().requests != requests {
            assert!(std::time::Instant::now() < end, "{:?}", self.service.waiters());
            std::thread::yield_now();
        }
    }

    /// What waits keeps no other disk from being served.
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

fn asker(unique: u64, resent: bool) -> Asker {
    let request = MountRequest { mount_ns: 1, unique };
    Asker { uid: 0, gid: 0, request, resent, exclusive: true }
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
    let house = House::new();
    let base = Target::Base(house.base);
    let reads = [
        (house.read(call(10), house.disk(0), 4000, 200), bytes(4000, 200)),
        (house.read(call(11), house.disk(1), 0, 8192), bytes(0, 8192)),
        (house.read(call(12), base, SIZE as u64 - 100, 4096), bytes(SIZE - 100, 100)),
    ];
    (0..3).for_each(|_| house.until_asked());
    house.until_waiting(3);
    reads.iter().for_each(|(answered, _)| waits(answered));
    house.others_are_served();
    house.server.sends();
    for (answered, expected) in &reads {
        assert_eq!(done(answered).as_ref(), Ok(expected));
    }
    // One of those that need the same block may find it in memory.
    assert!(house.server.tries.load(Ordering::Relaxed) >= 5, "they ask again");
    house.until_waiting(0);
    // From memory, on this thread.
    let again = house.read(call(13), house.disk(0), 4000, 200);
    assert_eq!(again.try_recv(), Ok(Ok(bytes(4000, 200))));
}

#[test]
fn a_write_waits_for_what_its_ends_need_of_the_base() {
    let house = House::new();
    let data = vec![0xee; 3 * 4096];
    let written = house.write(0, 100, &data);
    house.until_asked();
    house.until_waiting(1);
    waits(&written);
    assert_eq!(house.service.waiters().bytes, 4096, "only the ends are held");
    // Whole blocks need nothing of the base.
    let middle = house.read(call(20), house.disk(0), 4096, 8192);
    assert_eq!(done(&middle), Ok(vec![0xee; 8192]));
    house.others_are_served();
    house.server.sends();
    assert_eq!(done(&written), Ok(()));
    let mut expected = bytes(0, 4 * 4096);
    expected[100..100 + data.len()].fill(0xee);
    assert_eq!(done(&house.read(call(21), house.disk(0), 0, 4 * 4096)), Ok(expected));
    house.until_waiting(0);
}

#[test]
fn a_discard_waits_for_its_ends_as_a_write_does() {
    let house = House::new();
    let (says, answered) = channel();
    let answer = move |done: Result<(), Errno>| _ = says.send(done.map_err(i32::from));
    let (disk, what) = (house.disks[0], Allocate::Zero(Grow::No));
    house.service.allocate(call(30), disk, what, (100, 4096), Handle::new(0), answer);
    house.until_asked();
    waits(&answered);
    house.server.sends();
    assert_eq!(done(&answered), Ok(()));
    let mut expected = bytes(0, 8192);
    expected[100..4196].fill(0);
    assert_eq!(done(&house.read(call(31), house.disk(0), 0, 8192)), Ok(expected));
}

#[test]
fn seeking_goes_through_delta_and_base() {
    let house = House::new();
    house.server.sends();
    let seek = |target, from, what| {
        let (says, answered) = channel();
        let answer = move |found: Result<Option<u64>, Errno>| _ = says.send(found.map_err(i32::from));
        house.service.seek(call(40), target, from, what, answer);
        done(&answered)
    };
    assert_eq!(done(&house.write(BLANK, 8192, &[1; 4096])), Ok(()));
    assert_eq!(seek(house.disk(BLANK), 0, Seek::Data), Ok(Some(8192)));
    assert_eq!(seek(house.disk(BLANK), 8192, Seek::Hole), Ok(Some(12288)));
    assert_eq!(seek(house.disk(BLANK), 12288, Seek::Data), Ok(None));
    assert_eq!(seek(Target::Base(house.base), 0, Seek::Hole), Ok(Some(SIZE as u64)));
    assert_eq!(seek(Target::Disk(999), 0, Seek::Data), Err(libc::ESTALE));
}

#[test]
fn after_the_end_has_begun_changes_are_refused_and_reads_are_not() {
    let house = House::new();
    let waiting = house.write(0, 100, b"late");
    house.until_asked();
    house.until_waiting(1);
    assert_eq!(done(&house.write(BLANK, 0, b"before")), Ok(()));
    // A change that waits for a base is not under way: the end does not wait for it.
    house.service.quiesce();
    waits(&waiting);
    assert_eq!(done(&house.write(BLANK, 0, b"after!")), Err(libc::EIO));
    assert_eq!(done(&house.write(BLANK, 0, &[1; 4096])), Err(libc::EIO));
    assert_eq!(done(&house.flush(BLANK)), Err(libc::EIO));
    assert_eq!(done(&house.create(asker(1, false), "new")), Err(libc::EIO));
    assert_eq!(done(&house.read(call(50), house.disk(BLANK), 0, 6)), Ok(b"before".to_vec()));
    house.server.sends();
    assert_eq!(done(&waiting), Err(libc::EIO));
    assert_eq!(done(&house.read(call(51), house.disk(0), 100, 4)), Ok(bytes(100, 4)));
}

#[test]
fn a_panic_in_the_work_of_a_request_is_its_io_error_and_nothing_else() {
    let house = House::new();
    house.server.breaks();
    let before = guard::panics();
    assert_eq!(done(&house.read(call(60), house.disk(0), 0, 4096)), Err(libc::EIO));
    assert_eq!(done(&house.write(0, 100, b"part")), Err(libc::EIO));
    assert!(guard::panics() >= before + 4, "each was tried twice");
    house.others_are_served();
    house.until_waiting(0);
    // Also of the same disk, once the cause is gone.
    house.server.sends();
    assert_eq!(done(&house.read(call(61), house.disk(0), 0, 4096)), Ok(bytes(0, 4096)));
    assert_eq!(done(&house.write(0, 100, b"part")), Ok(()));
}

#[test]
fn an_interrupt_ends_a_read_that_waits_and_no_other() {
    let house = House::new();
    let interrupted = house.read(call(70), house.disk(0), 0, 4096);
    let other = house.read(call(71), house.disk(0), 0, 4096);
    house.until_waiting(2);
    house.service.interrupt(call(70).request);
    assert_eq!(done(&interrupted), Err(libc::EINTR));
    waits(&other);
    assert_eq!(house.service.waiters().interrupted, 1);
    house.until_waiting(1);
    house.server.sends();
    assert_eq!(done(&other), Ok(bytes(0, 4096)));
}

#[test]
fn the_requests_of_a_killed_caller_end_and_those_of_others_wait_on() {
    const MORTAL: Process = Process { id: 10, start: 5 };
    const OTHER: Process = Process { id: 20, start: 5 };
    let house = House::new();
    let is_killed = Arc::new(AtomicBool::new(false));
    let seen = is_killed.clone();
    let lookup = move |question: &Question| {
        let process = |thread: &u32| (*thread, if *thread == 11 { MORTAL } else { OTHER });
        let threads = question.threads.iter().map(process).collect();
        let ends = |process: &&Process| **process == MORTAL && seen.load(Ordering::Relaxed);
        Some(Findings { threads, ending: question.processes.iter().filter(ends).copied().collect() })
    };
    house.service.watch_callers(Box::new(lookup)).unwrap();
    let killed = house.read(Call { thread: 11, ..call(80) }, house.disk(0), 0, 4096);
    let other = house.read(Call { thread: 21, ..call(81) }, house.disk(0), 0, 4096);
    house.until_waiting(2);
    is_killed.store(true, Ordering::Relaxed);
    assert_eq!(done(&killed), Err(libc::EINTR));
    waits(&other);
    house.server.sends();
    assert_eq!(done(&other), Ok(bytes(0, 4096)));
}

#[test]
fn what_is_too_much_of_one_disk_is_refused_and_others_wait_their_turn() {
    let limits = Limits { requests: 10, of_disk: 2, bytes: 1 << 20, bytes_of_disk: 1 << 20, floor: 2 };
    let house = House::with_limits(limits);
    let waiting = [house.read(call(90), house.disk(0), 0, 512), house.read(call(91), house.disk(0), 0, 512)];
    // Before they ask they wait for their disk to be attached.
    house.until_asked();
    house.until_asked();
    house.until_waiting(2);
    assert_eq!(done(&house.read(call(92), house.disk(0), 0, 512)), Err(libc::EIO));
    assert_eq!(house.service.waiters().refused, 1);
    let neighbour = house.read(call(93), house.disk(1), 0, 512);
    house.until_waiting(3);
    house.server.sends();
    for answered in waiting.iter().chain([&neighbour]) {
        assert_eq!(done(answered), Ok(bytes(0, 512)));
    }
}

#[test]
fn a_handle_of_another_epoch_is_refused() {
    let house = House::new();
    let (says, answered) = channel();
    let answer = move |opened: Result<Handle, Errno>| _ = says.send(opened.map_err(i32::from));
    house.service.open(call(100), house.disk(BLANK), answer);
    let handle = done(&answered).expect("it opens");
    assert_eq!(Handle::new(handle.number()), handle);
    assert_eq!(done(&house.write_with(handle, BLANK, 0, b"new")), Ok(()));
    let stale = Handle::new(handle.number() + 1);
    assert_eq!(done(&house.write_with(stale, BLANK, 0, b"old")), Err(libc::EIO));
    assert_eq!(done(&house.read(call(101), house.disk(BLANK), 0, 3)), Ok(b"new".to_vec()));
    house.service.closed(house.disks[BLANK]);
}

#[test]
fn a_creation_that_is_sent_again_finds_the_disk_of_the_first_try() {
    let house = House::new();
    let made = done(&house.create(asker(7, false), "new")).expect("it is made");
    assert_eq!(done(&house.create(asker(8, false), "new")), Err(libc::EEXIST));
    assert_eq!(done(&house.create(asker(7, true), "new")), Ok(made));
    let rename = |request, resent| {
        let (says, answered) = channel();
        let answer = move |done: Result<(), Errno>| _ = says.send(done.map_err(i32::from));
        let over = Replace::No;
        house.service.rename(asker(request, resent), "new".into(), "other".into(), over, answer);
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

    fn resized(&self, _disk: u64) {}
}

impl House {
    fn unlink_blank(&self) {
        let (says, answered) = channel();
        let answer = move |done: Result<(), Errno>| _ = says.send(done.map_err(i32::from));
        self.service.unlink(asker(11, false), "blank".into(), answer);
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
    let house = House::new();
    let disk = house.disks[BLANK];
    let users = Openers::new(true);
    house.service.add_frontend(users.clone());
    assert!(house.is_kept(disk), "it has a name");
    house.unlink_blank();
    assert!(house.is_kept(disk), "a caller has it open");
    assert_eq!(done(&house.write(BLANK, 0, b"mine")), Ok(()));
    users.0.store(false, Ordering::Relaxed);
    assert!(!house.is_kept(disk));
    assert_eq!(done(&house.read(call(110), house.disk(BLANK), 0, 4)), Err(libc::ESTALE));
}

#[test]
fn a_disk_that_a_caller_of_another_frontend_has_open_is_not_purged() {
    let house = House::new();
    let disk = house.disks[BLANK];
    let (first, second) = (Openers::new(false), Openers::new(true));
    house.service.add_frontend(first);
    house.service.add_frontend(second.clone());
    house.unlink_blank();
    assert!(house.is_kept(disk), "a caller of the second frontend has it open");
    second.0.store(false, Ordering::Relaxed);
    assert!(!house.is_kept(disk));
}

#[test]
fn no_disk_is_purged_before_a_frontend_says_that_it_is_unused() {
    let house = House::new();
    let disk = house.disks[BLANK];
    house.unlink_blank();
    assert!(house.is_kept(disk), "there is no frontend yet");
    house.service.add_frontend(Openers::new(false));
    assert!(!house.is_kept(disk));
}
