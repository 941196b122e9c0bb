//! Nova's lock of one name, between processes.
//!
//! Nova takes it by Python's fasteners: a record lock of fcntl(2) on a file that stays, until the manager of its cache
//! removes the file together with the image. A lock on a file that has lost its name excludes nobody, so the name is
//! compared once the lock is held.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::io::record_lock::{try_record_lock, unlock_record};
use crate::io::sys;

const PAUSE: Duration = Duration::from_millis(20);

/// The lock. It is given back when this is dropped.
#[derive(Debug)]
pub struct NameLock {
    file: File,
}

impl Drop for NameLock {
    fn drop(&mut self) {
        // It has no error that matters: the lock ends with the process.
        let _ = unlock_record(&self.file);
    }
}

impl NameLock {
    /// Waits for the lock for at most `patience`, and makes its file for `owner` when it is missing.
    pub(super) fn take(path: &Path, owner: (u32, u32), patience: Duration) -> io::Result<Option<Self>> {
        let until = Instant::now() + patience;
        loop {
            let file = open(path, owner)?;
            if try_record_lock(&file)? {
                if sys::is_named(&file, path)? {
                    return Ok(Some(Self { file }));
                }
                // It was removed meanwhile; the next one is the lock.
                continue;
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            std::thread::sleep(PAUSE);
        }
    }
}

fn open(path: &Path, (uid, gid): (u32, u32)) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.append(true).mode(0o644).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = loop {
        match options.clone().create_new(true).open(path) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => break made?,
        }
        match options.open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            opened => break opened?,
        }
    };
    let found = file.metadata()?;
    if !found.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    // This process may have ended between the making and the giving away of an earlier one. Nova could not open it.
    let is_own = found.uid() == sys::effective_ids().0 && found.len() == 0 && found.nlink() == 1;
    if is_own && (found.uid(), found.gid()) != (uid, gid) {
        fchown(&file, Some(uid), Some(gid))?;
    }
    Ok(file)
}
