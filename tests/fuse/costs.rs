//! How many system calls one request costs the worker, through a real mount. Bounds keep it so. Allocations and copies are
//! counted in tests/costs/.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::harness::TestDaemon;
use crate::strace::Strace;

const MIB: usize = 1 << 20;
/// Of each kind; enough that what happens once does not count.
const REQUESTS: u64 = 500;
const LARGE_REQUESTS: u64 = 20;
/// Calls that do not belong to a request: each thread waits in one when strace is attached, which counts.
const ONCE: u64 = 12;
/// As [`ONCE`], of threads that wait for another one.
const ONCE_WAITS: u64 = 48;
/// One of so many requests makes one call more: the map or the heap grows.
const GROWS: u64 = 20;

/// Memory that a direct read or write can use.
#[repr(align(4096))]
struct Aligned([u8; MIB]);

/// The system calls of the threads that serve requests, by name, while `work` runs. `None` without strace.
fn calls(daemon: &TestDaemon, work: impl Fn()) -> Option<BTreeMap<String, u64>> {
    let dir = tempfile::tempdir_in(daemon.dir.path()).unwrap();
    let worker = daemon.worker();
    // A file for each thread, so that the lines are whole.
    let strace = Strace::attach(worker, &["-ff", "-o", dir.path().join("calls").to_str().unwrap()])?;
    work();
    drop(strace);
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir.path()).unwrap() {
        let path = entry.unwrap().path();
        let thread = path.extension().unwrap().to_str().unwrap().to_owned();
        let name = fs::read_to_string(format!("/proc/{worker}/task/{thread}/comm")).unwrap_or_default();
        // Others have work of their own: the supervisor's messages, upkeep.
        if !(name.starts_with("fuser-") || name.starts_with("io-")) {
            continue;
        }
        count(&path, &mut found);
    }
    Some(found)
}

fn count(path: &Path, found: &mut BTreeMap<String, u64>) {
    for line in fs::read_to_string(path).unwrap().lines() {
        if let Some((call, _)) = line.split_once('(').filter(|(call, _)| call.bytes().all(is_of_name)) {
            *found.entry(call.to_owned()).or_default() += 1;
        }
    }
}

fn is_of_name(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// The most calls for each request: in all but waiting, and of waiting for another thread.
#[derive(Clone, Copy)]
struct Bound {
    calls: u64,
    waits: u64,
}

impl Bound {
    /// A request that the thread that reads it also answers.
    const fn here(calls: u64) -> Self {
        Self { calls, waits: 0 }
    }

    /// A request that may be handed to another thread. How often that and the next one wait depends on when they wake.
    const fn anywhere(calls: u64) -> Self {
        Self { calls, waits: 8 }
    }

    /// The error when there were more.
    fn hold(self, what: &str, found: &BTreeMap<String, u64>, requests: u64) -> Option<String> {
        let waits: u64 = ["futex", "sched_yield"].iter().filter_map(|name| found.get(*name)).sum();
        let calls = found.values().sum::<u64>() - waits;
        let each = |calls: u64| calls as f64 / requests as f64;
        println!("{what}: {:.2} calls and {:.2} waits for each request: {found:?}", each(calls), each(waits));
        // A trace that saw nothing would keep any bound: each request is read and answered.
        assert!(
            calls >= 2 * requests,
            "{what}: the trace has {calls} calls of {requests} requests: {found:?}"
        );
        let calls_bound = requests * self.calls + requests / GROWS + ONCE;
        let waits_bound = requests * self.waits + ONCE_WAITS;
        (calls > calls_bound || waits > waits_bound).then(|| {
            format!(
                "{what}: {calls} calls, at most {calls_bound}, and {waits} waits, at most {waits_bound}, of {requests} \
                 requests: {found:?}"
            )
        })
    }
}

fn opened(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

fn counts(daemon: &TestDaemon, medium: &str) -> Option<Vec<String>> {
    let size = 32 * MIB;
    daemon.base(size);
    let disk = opened(&daemon.create("d", true, size as u64));
    let memory = std::cell::RefCell::new(Box::new(Aligned([0x6e; MIB])));
    let blocks = (size / 4096) as u64;
    let scattered = |n: u64| n * 10_007 % blocks * 4096;
    // Of the first half of the disk, each once.
    let place = |n: u64| n * 10_007 % (blocks / 2) * 4096;
    let read = |at: u64, len: usize| disk.read_exact_at(&mut memory.borrow_mut().0[..len], at).unwrap();
    let write = |at: u64, len: usize| disk.write_all_at(&memory.borrow().0[..len], at).unwrap();
    // All of the base comes to memory.
    (0..(size / MIB) as u64).for_each(|n| read(n * MIB as u64, MIB));
    (0..blocks).for_each(|n| read(scattered(n), 4096));

    let mut wrong = Vec::new();
    let mut check = |what: &str, requests: u64, bound: Bound, request: &dyn Fn(u64)| {
        let found = calls(daemon, || (0..requests).for_each(request))?;
        wrong.extend(bound.hold(&format!("{medium}: {what}"), &found, requests));
        Some(())
    };
    // The request's own read and answer, and the call on the data file.
    check("4 KiB read, hot", REQUESTS, Bound::here(2), &|n| read(scattered(n), 4096))?;
    check("1 MiB read, hot", LARGE_REQUESTS, Bound::anywhere(2), &|n| read(n % 16 * MIB as u64, MIB))?;
    // tmpfs never waits, and refuses RWF_NOWAIT, so that a read of it is made twice.
    let memory = medium == "memory";
    let written = if memory { Bound::here(3) } else { Bound::anywhere(3) };
    let read_back = Bound::anywhere(if memory { 4 } else { 3 });
    check("4 KiB write, first touch", REQUESTS, written, &|n| write(place(n), 4096))?;
    check("4 KiB write, again", REQUESTS, written, &|n| write(place(n), 4096))?;
    let half = (size / 2) as u64;
    check("1 MiB write, first touch", 16, written, &|n| write(half + n * MIB as u64, MIB))?;
    check("4 KiB read of what was written", REQUESTS, read_back, &|n| read(place(n), 4096))?;
    Some(wrong)
}

#[test]
fn a_request_makes_no_more_system_calls_than_it_needs() {
    let mut wrong = Vec::new();
    for (daemon, medium) in [(TestDaemon::in_memory(), "memory"), (TestDaemon::on_disk(), "disk")] {
        let Some(found) = counts(&daemon, medium) else { return };
        wrong.extend(found);
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
