//! The first steps of a daemon, before it mounts: the store's directory, its lock, the control socket.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use super::lock::{self, Taken};
use super::{ServeError, system};
use crate::config::Config;
use crate::format::layout::CONTROL_SOCKET;
use crate::io::{HostMedium, sys};
use crate::store::{open_superblock, with_reserve_of};

fn store_error(config: &Config, why: impl Into<String>) -> ServeError {
    ServeError::Store { store: config.store.display().to_string(), why: why.into() }
}

/// Creates the directory when it is missing, takes the lock, and checks the superblock.
pub fn open_store(config: &Config) -> Result<File, ServeError> {
    let store = &config.store;
    let failed = |what: &str, e: std::io::Error| store_error(config, format!("{what}: {e}"));
    // Without a slash at the end, with which a file does not exist.
    let whole: PathBuf = store.components().collect();
    if let Some(file) = whole.ancestors().find(|path| path.exists()).filter(|path| !path.is_dir()) {
        let why = format!("{} is a file, not a directory; give a directory with --store", file.display());
        return Err(store_error(config, why));
    }
    let mut builder = fs::DirBuilder::new();
    builder
        .recursive(true)
        .mode(0o711)
        .create(store)
        .map_err(|e| failed("cannot create the directory", e))?;
    if sys::is_fuse(store).map_err(|e| failed("cannot access the directory", e))? {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        let ours = mounts.lines().any(|line| {
            let target = line.split(' ').nth(4).unwrap_or("/nowhere");
            line.contains(" fuse.plyfs ") && fs::canonicalize(store).is_ok_and(|s| s.starts_with(target))
        });
        if ours {
            return Err(store_error(
                config,
                "it lies on a mount of plyfs; choose a directory on a local filesystem",
            ));
        }
    }
    let lock = match lock::take(store).map_err(|e| failed("cannot take its lock", e))? {
        Taken::Held(lock) => lock,
        Taken::By(pid) => {
            return Err(store_error(
                config,
                format!(
                    "another daemon (process {pid}) serves it; stop that one first: plyfs stop --store {}",
                    store.display()
                ),
            ));
        }
    };
    // The file is not truncated first: on a full filesystem another writer could take its space.
    let pid = sys::pid().to_string();
    let medium = HostMedium::new(store).map_err(|e| failed("cannot open it", e))?;
    let write_pid = || lock.write_all_at(pid.as_bytes(), 0).and_then(|()| lock.set_len(pid.len() as u64));
    with_reserve_of(&medium, write_pid).map_err(|e| failed("cannot write its lock", e))?;
    open_superblock(&medium).map_err(|e| store_error(config, e.to_string()))?;
    Ok(lock)
}

/// Binds the control socket; only root and this user may connect.
pub fn listen(store: &Path) -> Result<UnixListener, ServeError> {
    let path = store.join(CONTROL_SOCKET);
    // The path of a socket may have 107 bytes. A path through the directory's descriptor is short enough for any store.
    let dir = File::open(store).map_err(system("opening the store"))?;
    let short = PathBuf::from(format!("/proc/self/fd/{}/{CONTROL_SOCKET}", dir.as_raw_fd()));
    // The umask makes the socket private from the start; with a later chmod, other users could connect before it. The
    // umask belongs to the process, and only one thread runs here.
    let mask = sys::set_umask(0o177);
    let bind = || {
        // This process holds the lock, so the daemon that created the old socket is gone.
        let _ = fs::remove_file(&path);
        UnixListener::bind(&short)
    };
    let medium = HostMedium::new(store);
    let listener = medium.and_then(|medium| with_reserve_of(&medium, bind));
    sys::set_umask(mask);
    listener.map_err(system("creating the control socket"))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;
    use crate::config::Overrides;

    /// Guards D1.
    #[test]
    fn a_start_waits_until_the_last_worker_of_a_killed_daemon_releases_the_lock() {
        const DEATH_TAKES: Duration = Duration::from_millis(300);
        let dir = tempfile::tempdir_in("/var/tmp").expect("directory");
        let flags = Overrides { store: Some(dir.path().join("store")), ..Overrides::default() };
        let config = Config::load(None, flags).expect("valid");
        let lock = open_store(&config).expect("a new store");
        let worker_lock = lock.try_clone().expect("descriptors");
        drop(lock);
        // The supervisor is gone: no process has this number.
        fs::write(config.store.join("lock"), u32::MAX.to_string()).expect("written");
        let begun = Instant::now();
        let worker = std::thread::spawn(move || {
            std::thread::sleep(DEATH_TAKES);
            drop(worker_lock);
        });
        let lock = open_store(&config).expect("the lock");
        assert!(begun.elapsed() >= DEATH_TAKES, "two processes use the store");
        worker.join().expect("no panic");
        // A start does not wait for a daemon that is alive.
        let why = open_store(&config).expect_err("it is taken").to_string();
        assert!(why.contains("another daemon"), "{why}");
        drop(lock);
    }
}
