//! Whether the next worker may take over although a killed worker has not ended, because the cache's disk hangs.
//!
//! Why: a thread that waits in the kernel for that disk, in a call or when its files are closed, does not end, and so
//! its process cannot be reaped. The next worker must not wait for that, because only the cache is on that disk. What
//! must hold: the only threads left of the worker are exiting, or wait for the cache's disk and never run the program
//! again. Such a thread may still write to the cache, where a checksum verifies each block.
//!
//! Source: proc(5), proc_pid_stat(5); include/linux/sched.h, `PF_EXITING`. Killing a process puts SIGKILL among the
//! pending signals of each of its threads.

use std::fs;
use std::path::Path;

/// The prefix of the names of threads that only read and write the cache's files.
pub const CACHE_THREADS: &str = "cache-";

const PF_EXITING: u64 = 0x4;
const SIGKILL_BIT: u64 = 1 << (libc::SIGKILL - 1);

/// Whether all threads that are left of a process are exiting or wait for the cache's disk.
pub fn is_harmless(pid: u32) -> bool {
    let process = Path::new("/proc").join(pid.to_string());
    let Ok(threads) = fs::read_dir(process.join("task")) else { return false };
    for thread in threads {
        let Ok(thread) = thread.map(|entry| entry.path()) else { return false };
        let Ok(stat) = fs::read_to_string(thread.join("stat")) else {
            // The thread has ended meanwhile.
            continue;
        };
        if is_harmless_thread(&stat, || fs::read_to_string(thread.join("status")).ok()) != Some(true) {
            return false;
        }
    }
    true
}

/// Whether a thread with this `stat` in /proc never runs the program again, and only exits or waits for the cache's
/// disk. `None` when /proc does not tell.
fn is_harmless_thread(stat: &str, status: impl FnOnce() -> Option<String>) -> Option<bool> {
    let (head, rest) = stat.rsplit_once(") ")?;
    let name = head.split_once('(')?.1;
    // The first field after the name is the third of proc(5).
    let flags: u64 = rest.split_ascii_whitespace().nth(9 - 3)?.parse().ok()?;
    if flags & PF_EXITING != 0 {
        return Some(true);
    }
    let status = status()?;
    let pending = status.lines().find_map(|line| line.strip_prefix("SigPnd:"))?;
    let is_killed = u64::from_str_radix(pending.trim(), 16).ok()? & SIGKILL_BIT != 0;
    Some(is_killed && name.starts_with(CACHE_THREADS))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thread(name: &str, flags: u64, pending: &str) -> Option<bool> {
        let stat = format!("7 ({name}) D 1 2 3 4 5 {flags} 0 0 0");
        is_harmless_thread(&stat, || {
            Some(format!("Name:\t{name}\nSigPnd:\t{pending}\nShdPnd:\t0000000000000100\n"))
        })
    }

    #[test]
    fn a_thread_that_may_run_again_is_not_harmless() {
        const KILLED: &str = "0000000000000100";
        assert_eq!(thread("io-3", 0x40_0004, KILLED), Some(true), "it is exiting");
        assert_eq!(thread("cache-write", 0x40_0000, KILLED), Some(true));
        assert_eq!(thread("cache-write", 0x40_0000, "0000000000000000"), Some(false), "it was not killed");
        assert_eq!(thread("io-3", 0x40_0000, KILLED), Some(false), "it may write to a disk");
        assert_eq!(thread("io) cache-x", 0x40_0000, KILLED), Some(false), "a name may contain any bytes");
        assert_eq!(thread("cache-write", 0x40_0000, "?"), None);
    }

    #[test]
    fn a_process_that_runs_is_not_harmless() {
        assert!(!is_harmless(std::process::id()));
        assert!(!is_harmless(u32::MAX));
    }
}
