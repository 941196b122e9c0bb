//! What a worker is as a process: it dies with its supervisor, its memory is locked, and the threads that take requests
//! have precedence.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use crate::harness::{TestDaemon, signal, until};

fn proc(pid: i32) -> PathBuf {
    PathBuf::from("/proc").join(pid.to_string())
}

/// The field of proc_pid_stat(5) of a thread or a process; the first is 1.
fn stat(of: &std::path::Path, field: usize) -> Option<i64> {
    let stat = fs::read_to_string(of.join("stat")).ok()?;
    let (_, rest) = stat.rsplit_once(") ")?;
    rest.split_ascii_whitespace().nth(field - 3)?.parse().ok()
}

fn is_root() -> bool {
    std::os::unix::fs::MetadataExt::uid(&fs::metadata("/proc/self").unwrap()) == 0
}

/// Guards D1.
#[test]
fn a_worker_that_is_stopped_dies_with_its_supervisor() {
    let mut daemon = TestDaemon::on_disk();
    daemon.create("d", false, 4096);
    let (worker, standby) = daemon.prepared();
    // Neither can notice that its channel has ended.
    signal(worker, libc::SIGSTOP);
    signal(standby, libc::SIGSTOP);
    daemon.kill_supervisor();
    for pid in [worker, standby] {
        until("the end of a worker", || {
            let status = fs::read_to_string(proc(pid).join("status")).unwrap_or_default();
            (status.is_empty() || status.contains("State:\tZ")).then_some(())
        });
    }
    daemon.start();
    fs::write(daemon.disk("d"), [7; 4096]).unwrap();
}

/// Guards D2.
#[test]
fn memory_of_a_worker_is_locked() {
    if !is_root() {
        return eprintln!("not root: memory is not locked beyond RLIMIT_MEMLOCK");
    }
    let daemon = TestDaemon::on_disk();
    daemon.create("d", false, 4096);
    let status = fs::read_to_string(proc(daemon.worker()).join("status")).unwrap();
    let kib = |key: &str| -> u64 {
        let value = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
        value.trim().trim_end_matches(" kB").parse().unwrap()
    };
    // All that can be: mappings of devices and of the kernel cannot.
    assert!(kib("VmLck:") > kib("VmSize:") / 2 && kib("VmSwap:") == 0, "{status}");
}

/// Guards D59.
#[test]
fn all_threads_of_an_idle_worker_have_the_daemons_nice_value() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let mut wrapper = Command::new("nice");
    wrapper.args(["-n", "3"]);
    daemon.start_under(wrapper);
    daemon.create("d", false, 4096);
    fs::write(daemon.disk("d"), vec![1; 1 << 20]).unwrap();
    let own = stat(&proc(daemon.supervisor()), 19).unwrap();
    assert_eq!(own, 3);
    let mut threads = 0;
    for thread in fs::read_dir(proc(daemon.worker()).join("task")).unwrap() {
        let thread = thread.unwrap().path();
        let (Ok(name), Some(nice)) = (fs::read_to_string(thread.join("comm")), stat(&thread, 19)) else {
            continue;
        };
        assert_eq!(nice, own, "{name}");
        threads += 1;
    }
    assert!(threads > 4, "{threads}");
}
