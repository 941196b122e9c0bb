//! Requests that this process has read from the FUSE device and not answered, in memory that the supervisor shares.
//!
//! A kernel before Linux 6.9 cannot send a request again that a dead worker had read. So the supervisor has to know which
//! requests these are, to end them (D64), and an upgrade has to be able to wait until there are none (D65). All
//! calls of read(2) and writev(2) on the device come here, from [`interrupts`](super::interrupts). What must hold:
//! - A request is listed from the moment at which it was read until it is answered. One that is listed after its answer
//!   does no harm: numbers of requests are never used twice.
//! - A request that is not listed, as the process was killed between read(2) and the note or the table is full, is counted
//!   as long as the process lives. Afterwards the kernel ends it with the last copy of the process's descriptor.
//! - While reading is paused, no request is read, and none that was read is lost: a thread that got one passes it on.
//!
//! Source: linux/include/uapi/linux/fuse.h, `fuse_in_header` and `fuse_out_header`; linux/fs/fuse/dev.c,
//! `fuse_dev_do_read`, `fuse_dev_release`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::mapping::map_shared;
use super::sys;

/// Places of the table: twice the kernel's largest window of asynchronous requests.
const PLACES: usize = 1 << 17;
/// Behind the places, on a page of its own: the highest number that was read.
const HIGHEST: usize = PLACES;
const WORDS: usize = PLACES + 512;
const BYTES: usize = WORDS * 8;
/// A worker that is killed may have read requests without a note: threads that wait in read(2) at that moment are given what
/// comes next. Their numbers are so close to the highest one that was noted.
const NEAR: u64 = 2048;
/// So many places are tried for one request.
const TRIES: usize = 64;
/// Between the numbers of two requests.
const STEP: u64 = 2;

const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const IN_HEADER: usize = 40;
const OUT_HEADER: usize = 16;

/// `_IOR(229, 0, uint32_t)`.
const FUSE_DEV_IOC_CLONE: libc::Ioctl = 0x8004_e500_u32 as libc::Ioctl;

/// Wakes threads that wait in read(2) of the device.
const WAKE: i32 = libc::SIGUSR1;
/// Between two tries to wake them.
const NUDGE: Duration = Duration::from_millis(1);

/// Memory for a table; empty.
///
/// # Errors
/// When there is no memory.
pub fn memory() -> io::Result<File> {
    let file = sys::memory_file()?;
    file.set_len(BYTES as u64)?;
    Ok(file)
}

/// Notes in the table of a worker that has read no request the highest number that the worker before it noted.
///
/// # Errors
/// When the memory cannot be written.
pub fn begin_at(memory: &File, highest: u64) -> io::Result<()> {
    memory.write_all_at(&highest.to_ne_bytes(), HIGHEST as u64 * 8)
}

/// The requests that a dead worker may have read and not answered, from its table.
#[derive(Debug, PartialEq, Eq)]
pub struct Left {
    /// Numbers of requests, those that it can have read without a note among them.
    pub requests: Vec<u64>,
    /// The highest one that was noted.
    pub highest: u64,
}

/// Reads a table.
///
/// # Errors
/// When the memory cannot be read.
pub fn left(memory: &File) -> io::Result<Left> {
    let mut bytes = vec![0; BYTES];
    memory.read_exact_at(&mut bytes, 0)?;
    let words = bytes.chunks_exact(8).filter_map(|chunk| chunk.try_into().ok().map(u64::from_ne_bytes));
    let words: Vec<u64> = words.collect();
    let mut requests: Vec<u64> = words[..PLACES].iter().copied().filter(|unique| *unique != 0).collect();
    let highest = words[HIGHEST];
    if highest != 0 {
        let first = highest.saturating_sub(NEAR * STEP).max(highest % STEP + STEP);
        requests.extend((first..=highest + NEAR * STEP).step_by(STEP as usize));
    }
    requests.sort_unstable();
    requests.dedup();
    Ok(Left { requests, highest })
}

/// Another descriptor of a mount's connection, with a list of its own of the requests that were read from it. When its
/// last copy is closed, the kernel ends the requests that are on that list.
///
/// # Errors
/// When the device cannot be opened, or the connection has ended.
pub fn clone_device(device: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let new = File::options().read(true).write(true).custom_flags(libc::O_CLOEXEC).open("/dev/fuse")?;
    let number = device.as_raw_fd() as u32;
    // SAFETY: the kernel reads one number, which outlives the call.
    sys::check(unsafe { libc::ioctl(new.as_raw_fd(), FUSE_DEV_IOC_CLONE, &number) }.into())?;
    Ok(new.into())
}

/// A table in shared memory. It is never unmapped: threads of the FUSE crate use it until the process ends.
struct Table {
    places: &'static [AtomicU64],
    highest: &'static AtomicU64,
    /// Requests that were read and not answered, those without a place among them.
    count: AtomicU64,
}

impl Table {
    fn map(memory: &File) -> io::Result<Self> {
        if memory.metadata()?.len() < BYTES as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let at = map_shared(memory.as_fd(), 0, BYTES)?;
        // SAFETY: the mapping has that many words, is aligned to a page, and is never unmapped; other processes change it
        // by atomic operations, or read it when this process has ended.
        let words = unsafe { std::slice::from_raw_parts(at.cast::<AtomicU64>(), WORDS) };
        let (places, rest) = words.split_at(PLACES);
        // In memory before the first request.
        places.iter().step_by(512).for_each(|place| place.store(0, Ordering::Relaxed));
        Ok(Self { places, highest: &rest[0], count: AtomicU64::new(0) })
    }

    /// The places that a request may have, the best one first.
    fn places_of(&self, unique: u64) -> impl Iterator<Item = &AtomicU64> {
        let first = (unique / STEP) as usize;
        (first..first.wrapping_add(TRIES)).map(|at| &self.places[at % PLACES])
    }

    fn was_read(&self, unique: u64) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.highest.fetch_max(unique, Ordering::SeqCst);
        for place in self.places_of(unique) {
            if place.compare_exchange(0, unique, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
                return;
            }
        }
    }

    fn was_answered(&self, unique: u64) {
        for place in self.places_of(unique) {
            if place.compare_exchange(unique, 0, Ordering::SeqCst, Ordering::Relaxed).is_ok() {
                break;
            }
        }
        self.count.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A thread that reads requests.
struct Reader {
    thread: i64,
    reading: AtomicBool,
}

struct Pause {
    wanted: bool,
}

static TABLE: OnceLock<Table> = OnceLock::new();
static PAUSED: AtomicBool = AtomicBool::new(false);
static PAUSE: Mutex<Pause> = Mutex::new(Pause { wanted: false });
static GOES_ON: Condvar = Condvar::new();
static READERS: Mutex<Vec<Arc<Reader>>> = Mutex::new(Vec::new());

thread_local! {
    static READER: Arc<Reader> = {
        // SAFETY: asks for a number.
        let thread = unsafe { libc::syscall(libc::SYS_gettid) };
        let reader = Arc::new(Reader { thread, reading: AtomicBool::new(false) });
        READERS.lock().push(reader.clone());
        reader
    };
}

/// From now on the requests that are read and answered are listed in `memory`. Once in the life of a process, before
/// it reads requests.
///
/// # Errors
/// When the memory cannot be mapped.
pub fn list_in(memory: &File) -> io::Result<()> {
    let table = Table::map(memory)?;
    extern "C" fn nothing(_: i32) {}
    // SAFETY: the struct is plain numbers, zero is a value of it; the handler does nothing. Without SA_RESTART, so that
    // read(2) of the device returns.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        sys::check(libc::sigaction(WAKE, &action, std::ptr::null_mut()).into())?;
    }
    TABLE.set(table).map_err(|_| io::ErrorKind::AlreadyExists.into())
}

/// Requests that were read and not answered; `None` when nothing is listed.
pub fn count() -> Option<u64> {
    TABLE.get().map(|table| table.count.load(Ordering::SeqCst))
}

/// read(2) of the device by `read`, when requests are listed.
pub(super) fn read_listed(buffer: *const u8, mut read: impl FnMut() -> isize) -> isize {
    let Some(table) = TABLE.get() else { return read() };
    READER.with(|reader| {
        loop {
            // First the word, then the look: a pause does the two in the other order, so one sees the other.
            reader.reading.store(true, Ordering::SeqCst);
            if !PAUSED.load(Ordering::SeqCst) {
                break;
            }
            reader.reading.store(false, Ordering::SeqCst);
            let mut pause = PAUSE.lock();
            while pause.wanted {
                GOES_ON.wait(&mut pause);
            }
        }
        let got = read();
        if got >= IN_HEADER as isize {
            // SAFETY: the kernel has just written that many bytes there.
            let header = unsafe { std::slice::from_raw_parts(buffer, IN_HEADER) };
            if let Some(unique) = wants_answer(header) {
                table.was_read(unique);
            }
        }
        reader.reading.store(false, Ordering::SeqCst);
        got
    })
}

/// writev(2) to the device by `write`, when requests are listed. `start`: what is written begins so.
pub(super) fn write_listed(start: &[u8], write: impl FnOnce() -> isize) -> isize {
    let unique = TABLE.get().and_then(|table| Some((table, answered(start)?)));
    let done = write();
    if let Some((table, unique)) = unique {
        table.was_answered(unique);
    }
    done
}

/// The number of a request that has to be answered.
fn wants_answer(header: &[u8]) -> Option<u64> {
    let opcode = u32::from_ne_bytes(header.get(4..8)?.try_into().ok()?);
    let unique = u64::from_ne_bytes(header.get(8..16)?.try_into().ok()?);
    (unique != 0 && !matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT)).then_some(unique)
}

/// The number of the request that is answered; notifications have none.
fn answered(start: &[u8]) -> Option<u64> {
    let unique = u64::from_ne_bytes(start.get(8..OUT_HEADER)?.try_into().ok()?);
    (unique != 0).then_some(unique)
}

/// Stops reading requests, and waits until all that were read are answered. False when [`go_on`] was called meanwhile, or
/// when calls do not come here. True at once when nothing is listed: then the kernel sends requests again.
pub fn pause() -> bool {
    let Some(table) = TABLE.get() else { return true };
    if !super::interrupts::is_linked() {
        return false;
    }
    {
        let mut pause = PAUSE.lock();
        pause.wanted = true;
        PAUSED.store(true, Ordering::SeqCst);
    }
    loop {
        let mut any = false;
        for reader in READERS.lock().iter() {
            if reader.reading.load(Ordering::SeqCst) {
                any = true;
                // SAFETY: a signal to a thread of this process; its handler does nothing. No memory is involved.
                unsafe { libc::syscall(libc::SYS_tgkill, i64::from(sys::pid()), reader.thread, WAKE) };
            }
        }
        // In this order: a reader counts what it got before it says that it does not read.
        if !any && table.count.load(Ordering::SeqCst) == 0 {
            return PAUSE.lock().wanted;
        }
        if !PAUSE.lock().wanted {
            return false;
        }
        std::thread::sleep(NUDGE);
    }
}

/// Reads requests again.
pub fn go_on() {
    let mut pause = PAUSE.lock();
    pause.wanted = false;
    PAUSED.store(false, Ordering::SeqCst);
    GOES_ON.notify_all();
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> (File, Table) {
        let memory = memory().expect("memory");
        let table = Table::map(&memory).expect("mapped");
        (memory, table)
    }

    fn near(highest: u64) -> Vec<u64> {
        (2..).step_by(2).take_while(|unique| *unique <= highest + NEAR * STEP).collect()
    }

    /// Guards D64.
    #[test]
    fn a_request_is_listed_until_it_is_answered() {
        let (memory, table) = table();
        assert_eq!(left(&memory).expect("readable"), Left { requests: Vec::new(), highest: 0 });
        // One that waits for long, and so many others that its place is wanted again.
        table.was_read(4);
        let last = 4 + STEP * PLACES as u64 * 2;
        for unique in (6..=last).step_by(STEP as usize) {
            table.was_read(unique);
            if unique != last {
                table.was_answered(unique);
            }
        }
        let found = left(&memory).expect("readable");
        assert_eq!(found.highest, last);
        assert!(found.requests.contains(&4) && found.requests.contains(&last));
        assert!(found.requests.contains(&(last + STEP)), "it may have been read without a note");
        assert_eq!(found.requests.len() as u64, 1 + 2 * NEAR + 1);
        assert_eq!(table.count.load(Ordering::SeqCst), 2);
        table.was_answered(4);
        table.was_answered(last);
        assert_eq!(table.count.load(Ordering::SeqCst), 0);
        assert!(!left(&memory).expect("readable").requests.contains(&4));
    }

    #[test]
    fn a_worker_that_noted_nothing_read_what_came_after_the_one_before() {
        let (memory, _) = table();
        begin_at(&memory, 100).expect("writable");
        assert_eq!(left(&memory).expect("readable"), Left { requests: near(100), highest: 100 });
    }

    #[test]
    fn a_table_that_is_full_counts_on() {
        let (memory, table) = table();
        for number in 1..=PLACES as u64 + 1 {
            table.was_read(number * STEP);
        }
        assert_eq!(table.count.load(Ordering::SeqCst), PLACES as u64 + 1);
        // That of the same place: it was not listed.
        table.was_answered((PLACES as u64 + 1) * STEP);
        let found = left(&memory).expect("readable").requests;
        assert!((1..=PLACES as u64).all(|number| found.binary_search(&(number * STEP)).is_ok()));
        assert_eq!(table.count.load(Ordering::SeqCst), PLACES as u64);
    }

    #[test]
    fn what_wants_no_answer_is_not_listed() {
        let header = |opcode: u32, unique: u64| {
            let mut bytes = [40_u32.to_ne_bytes(), opcode.to_ne_bytes()].concat();
            bytes.extend(unique.to_ne_bytes());
            bytes.resize(IN_HEADER, 0);
            bytes
        };
        assert_eq!(wants_answer(&header(15, 8)), Some(8));
        assert_eq!(wants_answer(&header(FORGET, 8)), None);
        assert_eq!(wants_answer(&header(BATCH_FORGET, 8)), None);
        assert_eq!(wants_answer(&header(INTERRUPT, 8)), None);
        assert_eq!(answered(&header(0, 8)[..16]), Some(8));
        assert_eq!(answered(&header(9, 0)[..16]), None, "a notification");
        assert_eq!(answered(&[0; 15]), None);
    }
}
