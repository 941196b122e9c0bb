//! The store's lock: flock(2) of the file `lock`, held by an open file description that the supervisor and its workers
//! share. So it is free when the last of them has let go (D1), and two daemons never serve one store.
//!
//! A killed worker may not let go for as long as a thread of it waits in the kernel for the cache's disk, in a call or when
//! its files are closed. The next worker does not wait for such a thread ([`leftover`]), and neither does the next daemon:
//! when the supervisor is gone and nothing but such threads can hold the lock, a start puts a new lock file in the place of
//! the old one (D78). What must hold:
//! - A lock counts only while `lock` names its file, so each start looks at the name after it has the lock.
//! - Only one start replaces the file at a time, and only the file that it found held: it holds a lock of the directory
//!   meanwhile. The new file is locked, and has the new daemon's number, before it has the name.
//! - A start that cannot see all processes of the killed daemon replaces nothing. It sees them when they are of its own pid
//!   namespace and it may read which files each process has open. A process whose open files hold no such lock, and that
//!   holds it all the same, is exiting: it never runs the program again.
//!
//! Source: proc(5), "fdinfo": a descriptor whose open file description holds a lock shows it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use super::leftover;
use super::outcome::{Outcome, pid_namespace};
use crate::format::layout::{LOCK, staged};
use crate::io::{HostMedium, sys};
use crate::store::with_reserve_of;

/// How long a start waits for a lock that a dying worker still holds (D1).
const TIMEOUT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);
/// Between two looks at the holders. Killed workers usually end before the first one.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);

/// The answer to a start that wants the lock.
#[derive(Debug)]
pub enum Taken {
    /// The lock.
    Held(File),
    /// The process that has it, as the lock file says.
    By(String),
}

/// Takes the lock of a store.
///
/// # Errors
/// When the file cannot be made or locked.
pub fn take(store: &Path) -> io::Result<Taken> {
    take_unless(store, leftover::is_harmless)
}

fn take_unless(store: &Path, is_harmless: impl Fn(u32) -> bool) -> io::Result<Taken> {
    let (path, begun) = (store.join(LOCK), Instant::now());
    let (mut look_at, mut seen) = (begun + LOOK_INTERVAL, Vec::new());
    loop {
        let lock = open(&path)?;
        if sys::try_lock(&lock)? {
            if sys::is_named(&lock, &path)? {
                return Ok(Taken::Held(lock));
            }
            continue;
        }
        let pid = fs::read_to_string(&path).unwrap_or_default().trim().to_owned();
        if !pid.is_empty() && lives(&pid) {
            return Ok(Taken::By(pid));
        }
        if Instant::now() >= look_at {
            look_at = Instant::now() + LOOK_INTERVAL;
            let left = left_of_daemon(store, &lock, &is_harmless).unwrap_or_default();
            // Seen twice: a process that a dying holder started just before the first look shows in the second.
            let are_known = !left.is_empty() && left == seen;
            seen = left;
            if are_known {
                tracing::warn!(
                    processes = ?seen,
                    "processes of a killed daemon keep the store's lock: they wait in the kernel for the cache's disk; \
                     they are left behind, and the lock file is replaced"
                );
                if let Some(lock) = replace(store, &lock)? {
                    return Ok(Taken::Held(lock));
                }
            }
        }
        if begun.elapsed() > TIMEOUT {
            return Ok(Taken::By(pid));
        }
        std::thread::sleep(PAUSE);
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    options.open(path)
}

/// Puts a new file, which is locked, in the place of `old`. `None` when another start has done so, or is doing so.
fn replace(store: &Path, old: &File) -> io::Result<Option<File>> {
    let (path, beside) = (store.join(LOCK), store.join(staged(LOCK)));
    let dir = File::open(store)?;
    if !sys::try_lock(&dir)? || !sys::is_named(old, &path)? {
        return Ok(None);
    }
    // No other start has the name: it needs the lock of the directory.
    match fs::remove_file(&beside) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let lock = open(&beside)?;
    if !sys::try_lock(&lock)? {
        return Ok(None);
    }
    with_reserve_of(&HostMedium::new(store)?, || {
        lock.write_all_at(sys::pid().to_string().as_bytes(), 0)?;
        fs::rename(&beside, &path)
    })?;
    Ok(Some(lock))
}

/// The processes that are left of the killed daemon of a store, none of which runs the program again: those that hold its
/// lock, and workers that are exiting. `None` when one may run, or when there may be more.
fn left_of_daemon(store: &Path, lock: &File, is_harmless: impl Fn(u32) -> bool) -> Option<Vec<u32>> {
    let daemon = Outcome::read(store)?;
    if daemon.end.is_some() || daemon.pid_namespace == 0 || daemon.pid_namespace != pid_namespace() {
        return None;
    }
    let meta = lock.metadata().ok()?;
    let file = format!(" {:02x}:{:02x}:{} ", libc::major(meta.dev()), libc::minor(meta.dev()), meta.ino());
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").ok()? {
        let Some(pid) = entry.ok()?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        if pid == sys::pid() {
            continue;
        }
        match holds(pid, &file) {
            Some(true) if is_harmless(pid) => found.push(pid),
            Some(true) => return None,
            Some(false) if is_unfinished_worker(pid) && is_harmless(pid) => found.push(pid),
            Some(false) => {}
            // The first process of all, which may be hidden even from root, holds the lock as a supervisor only. Then it
            // has been found to live.
            None if pid == 1 => {}
            None => return None,
        }
    }
    found.sort_unstable();
    Some(found)
}

/// Whether a process is a worker that has threads which did not end, its first one or others.
fn is_unfinished_worker(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let Some((_, state)) = stat.split_once(" (plyfs-worker) ") else { return false };
    let threads = || fs::read_dir(format!("/proc/{pid}/task")).map_or(0, Iterator::count);
    !state.starts_with('Z') || threads() > 1
}

/// What a look at something of a process in /proc says: nothing when it has ended, `None` when it is not shown.
fn unless_ended<T>(result: io::Result<T>) -> Option<Option<T>> {
    match result {
        Ok(value) => Some(Some(value)),
        Err(e) if e.kind() == io::ErrorKind::NotFound || e.raw_os_error() == Some(libc::ESRCH) => Some(None),
        Err(_) => None,
    }
}

/// Whether a descriptor of a process holds the lock of `file`, which is written as in /proc.
fn holds(pid: u32, file: &str) -> Option<bool> {
    let Some(tasks) = unless_ended(fs::read_dir(format!("/proc/{pid}/task")))? else { return Some(false) };
    for task in tasks {
        let Some(task) = unless_ended(task)? else { continue };
        let Some(descriptors) = unless_ended(fs::read_dir(task.path().join("fd")))? else { continue };
        let mut any = false;
        for descriptor in descriptors {
            let Some(descriptor) = unless_ended(descriptor)? else { continue };
            any = true;
            // Asks nothing of the file itself, whose filesystem may hang.
            let Some(target) = unless_ended(fs::read_link(descriptor.path()))? else { continue };
            if !target.to_string_lossy().contains(LOCK) {
                continue;
            }
            let info = task.path().join("fdinfo").join(descriptor.file_name());
            let Some(info) = unless_ended(fs::read_to_string(info))? else { continue };
            let is_held =
                |line: &str| line.starts_with("lock:") && line.contains(" FLOCK ") && line.contains(file);
            if info.lines().any(is_held) {
                return Some(true);
            }
        }
        // The threads of a process share their descriptors, but one that has ended has none.
        if any {
            return Some(false);
        }
    }
    Some(false)
}

/// Whether a process exists and is not a zombie.
fn lives(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;
    use crate::format::layout::OUTCOME;

    /// A process that holds the lock of a store, as a worker does when its supervisor is gone.
    struct Holder(Child);

    impl Holder {
        fn new(store: &Path) -> Self {
            let Ok(Taken::Held(lock)) = take(store) else { panic!("the lock is free") };
            let child = Command::new("sleep").arg("600").stdin(Stdio::from(lock)).spawn().expect("a process");
            // No process has this number.
            fs::write(store.join(LOCK), u32::MAX.to_string()).expect("written");
            Outcome::begin(store, 7);
            Self(child)
        }
    }

    impl Drop for Holder {
        fn drop(&mut self) {
            let _ = self.0.kill().and_then(|()| self.0.wait());
        }
    }

    fn held(taken: io::Result<Taken>) -> File {
        match taken.expect("no error") {
            Taken::Held(lock) => lock,
            Taken::By(pid) => panic!("{pid} has it"),
        }
    }

    /// Guards D1, D78.
    #[test]
    fn a_lock_that_only_a_worker_in_the_kernel_holds_is_replaced_and_no_other() {
        if sys::effective_ids().0 != 0 {
            println!("SKIP: only root sees the descriptors of a worker");
            return;
        }
        let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
        let holder = Holder::new(dir.path());
        let pid = holder.0.id();
        let left = || {
            let lock = open(&dir.path().join(LOCK)).expect("a file");
            left_of_daemon(dir.path(), &lock, |other| other == pid)
        };
        assert_eq!(left(), Some(vec![pid]));
        // It may run again: the start waits, and then refuses.
        assert!(matches!(take(dir.path()), Ok(Taken::By(_))));
        // A daemon whose processes this one may not see.
        let record = Outcome::read(dir.path()).expect("a record");
        let other = Outcome { pid_namespace: 1, ..record.clone() };
        let write = |outcome: &Outcome| {
            let bytes = serde_json::to_vec(outcome).expect("a record");
            fs::write(dir.path().join(OUTCOME), bytes).expect("written");
        };
        write(&other);
        assert_eq!(left(), None);
        write(&record);
        let lock = held(take_unless(dir.path(), |other| other == pid));
        // From now on this lock counts, and not that of the file before.
        fs::write(dir.path().join(LOCK), sys::pid().to_string()).expect("written");
        assert!(matches!(take_unless(dir.path(), |_| true), Ok(Taken::By(_))));
        drop(holder);
        assert!(matches!(take_unless(dir.path(), |_| true), Ok(Taken::By(_))));
        drop(lock);
        drop(held(take(dir.path())));
    }

    /// Guards D78.
    #[test]
    fn of_many_starts_that_find_the_same_leftover_one_has_the_lock() {
        if sys::effective_ids().0 != 0 {
            println!("SKIP: only root sees the descriptors of a worker");
            return;
        }
        for _ in 0..5 {
            let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
            let path = dir.path().join(LOCK);
            let holder = Holder::new(dir.path());
            let old = open(&path).expect("a file");
            let results: Vec<Option<File>> = std::thread::scope(|scope| {
                let starts: Vec<_> =
                    (0..8).map(|_| scope.spawn(|| replace(dir.path(), &old).expect("no error"))).collect();
                starts.into_iter().map(|start| start.join().expect("no panic")).collect()
            });
            assert_eq!(results.iter().flatten().count(), 1);
            assert!(results.iter().flatten().all(|lock| sys::is_named(lock, &path).expect("a file")));
            // A start that had the old file open, and locks it when its holder ends, has nothing.
            drop(holder);
            assert!(sys::try_lock(&old).expect("no error"));
            assert!(!sys::is_named(&old, &path).expect("a file"));
        }
    }
}
