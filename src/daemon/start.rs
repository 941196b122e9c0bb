//! What a daemon does before there is a mount: the store's directory, its lock, the control socket.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::{ServeError, system};
use crate::config::Config;
use crate::format::layout::{CONTROL_SOCKET, LOCK};
use crate::io::{HostMedium, sys};
use crate::store::{open_superblock, with_reserve_of};

/// How long a start waits for a lock that a dying worker still has (D1).
const LOCK_PATIENCE: Duration = Duration::from_secs(5);

fn store_error(config: &Config, why: impl Into<String>) -> ServeError {
    ServeError::Store { store: config.store.display().to_string(), why: why.into() }
}

/// Makes the directory when missing, takes the lock, and looks at the superblock.
pub fn open_store(config: &Config) -> Result<File, ServeError> {
    let store = &config.store;
    let said = |what: &str, e: std::io::Error| store_error(config, format!("{what}: {e}"));
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o711).create(store).map_err(|e| said("making the directory", e))?;
    if sys::is_fuse(store).map_err(|e| said("looking at the directory", e))? {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let ours = mounts.lines().any(|line| {
            let target = line.split(' ').nth(4).unwrap_or("/nowhere");
            line.contains(" fuse.plyfs ") && fs::canonicalize(store).is_ok_and(|s| s.starts_with(target))
        });
        if ours {
            return Err(store_error(
                config,
                "it lies on a mount of plyfs; choose a directory of a local filesystem",
            ));
        }
    }
    let lock = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(store.join(LOCK))
        .map_err(|e| said("opening its lock", e))?;
    let begun = Instant::now();
    while !sys::try_lock(&lock).map_err(|e| said("taking its lock", e))? {
        let pid = fs::read_to_string(store.join(LOCK)).unwrap_or_default().trim().to_owned();
        let alive = !pid.is_empty() && lives(&pid);
        if alive || begun.elapsed() > LOCK_PATIENCE {
            return Err(store_error(
                config,
                format!(
                    "another daemon (process {pid}) has it; stop that one first: plyfs stop --store {}",
                    store.display()
                ),
            ));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    // Not cut before: what it has of a full filesystem somebody else would take.
    let pid = sys::pid().to_string();
    let medium = HostMedium::new(store).map_err(|e| said("opening it", e))?;
    let write_pid = || lock.write_all_at(pid.as_bytes(), 0).and_then(|()| lock.set_len(pid.len() as u64));
    with_reserve_of(&medium, write_pid).map_err(|e| said("writing its lock", e))?;
    open_superblock(&medium).map_err(|e| store_error(config, e.to_string()))?;
    Ok(lock)
}

/// Whether a process is there and is more than the status that its parent has not asked for.
fn lives(pid: &str) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid).join("stat")).unwrap_or_default();
    let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

/// Binds the control socket; only root and this user may connect.
pub fn listen(store: &Path) -> Result<UnixListener, ServeError> {
    let path = store.join(CONTROL_SOCKET);
    // A socket's path may have 107 bytes; through the directory's descriptor any store will do.
    let dir = File::open(store).map_err(system("opening the store"))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}/{CONTROL_SOCKET}", dir.as_raw_fd()));
    // Private from its first moment; a mode that is set later would let others in before. One thread runs here.
    let mask = sys::set_umask(0o177);
    let bind = || {
        // The lock is ours, so whoever made it is gone.
        let _ = fs::remove_file(&path);
        UnixListener::bind(&short)
    };
    let medium = HostMedium::new(store);
    let listener = medium.and_then(|medium| with_reserve_of(&medium, bind));
    sys::set_umask(mask);
    listener.map_err(system("making the control socket"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;

    /// Guards D1.
    #[test]
    fn a_start_waits_until_the_last_worker_of_a_killed_daemon_has_let_go() {
        const DIES_FOR: Duration = Duration::from_millis(300);
        let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
        let flags = Overrides { store: Some(dir.path().join("store")), ..Overrides::default() };
        let config = Config::load(None, flags).expect("valid");
        let lock = open_store(&config).expect("a new store");
        let of_worker = lock.try_clone().expect("descriptors");
        drop(lock);
        // The supervisor is gone: no process has this number.
        fs::write(config.store.join("lock"), u32::MAX.to_string()).expect("written");
        let begun = Instant::now();
        let worker = std::thread::spawn(move || {
            std::thread::sleep(DIES_FOR);
            drop(of_worker);
        });
        let lock = open_store(&config).expect("the lock");
        assert!(begun.elapsed() >= DIES_FOR, "two have the store");
        worker.join().expect("no panic");
        // One that lives is not waited for.
        let why = open_store(&config).expect_err("it is taken").to_string();
        assert!(why.contains("another daemon"), "{why}");
        drop(lock);
    }
}
