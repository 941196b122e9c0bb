//! The places of live maps, where the next worker finds them again.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{LiveFile, sys};

/// One live file for each disk. A file is found under its disk's number only when it is complete.
pub trait LiveStore: Send + Sync {
    /// The complete file of a disk, if there is one.
    fn existing(&self, disk: u64) -> io::Result<Option<LiveFile>>;
    /// A new, empty file; found by [`LiveStore::existing`] after [`LiveStore::publish`].
    fn fresh(&self, disk: u64) -> io::Result<LiveFile>;
    /// Marks the fresh file as complete.
    fn publish(&self, disk: u64) -> io::Result<()>;
    /// Gives the fresh file up, which is not complete; no error when there is none.
    fn abandon(&self, disk: u64) -> io::Result<()>;
    /// Numbers of the disks that have a complete file.
    fn disks(&self) -> io::Result<Vec<u64>>;
    /// Removes the file of a disk; no error when there is none.
    fn remove(&self, disk: u64) -> io::Result<()>;
}

/// Files in a directory on tmpfs.
#[derive(Debug)]
pub struct LiveDir {
    dir: PathBuf,
}

impl LiveDir {
    /// Uses `dir`, and creates it when it is missing. Only this user may enter it.
    ///
    /// # Errors
    /// `PermissionDenied` when another user owns it or may enter it, `Unsupported` when it is not on tmpfs.
    pub fn new(dir: &Path) -> io::Result<Self> {
        let live = Self::beside(dir)?;
        live.sweep();
        Ok(live)
    }

    /// As [`LiveDir::new`], but changes nothing in the directory: another worker may use it.
    ///
    /// # Errors
    /// As [`LiveDir::new`].
    pub fn beside(dir: &Path) -> io::Result<Self> {
        match DirBuilder::new().mode(0o700).create(dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let meta = fs::symlink_metadata(dir)?;
        if !meta.is_dir() || meta.uid() != sys::effective_ids().0 || meta.mode() & 0o077 != 0 {
            return Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!("{} belongs to another user, or other users may enter it; remove it", dir.display()),
            ));
        }
        if !sys::is_memory_filesystem(dir)? {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                format!("{} is not on tmpfs; set [runtime] dir to one that is", dir.display()),
            ));
        }
        Ok(Self { dir: dir.to_path_buf() })
    }

    /// Removes the files that an earlier worker did not complete. No other process creates live maps here, and no worker
    /// looks for incomplete ones.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let unfinished = entry.path().extension().is_some_and(|extension| extension == "tmp");
            // A file that stays costs memory only.
            let _ = if unfinished { fs::remove_file(entry.path()) } else { Ok(()) };
        }
    }

    fn open(&self, name: &str, create: bool) -> io::Result<File> {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(create).truncate(create).mode(0o600);
        options.custom_flags(libc::O_NOFOLLOW).open(self.dir.join(name))
    }
}

impl LiveStore for LiveDir {
    fn existing(&self, disk: u64) -> io::Result<Option<LiveFile>> {
        match self.open(&format!("{disk}.live"), false) {
            Ok(file) => LiveFile::new(file).map(Some),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
    fn fresh(&self, disk: u64) -> io::Result<LiveFile> {
        LiveFile::new(self.open(&format!("{disk}.tmp"), true)?)
    }
    fn publish(&self, disk: u64) -> io::Result<()> {
        fs::rename(self.dir.join(format!("{disk}.tmp")), self.dir.join(format!("{disk}.live")))
    }
    fn abandon(&self, disk: u64) -> io::Result<()> {
        match fs::remove_file(self.dir.join(format!("{disk}.tmp"))) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
    fn disks(&self) -> io::Result<Vec<u64>> {
        let mut disks = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            disks.extend(name.to_str().and_then(|name| name.strip_suffix(".live")?.parse::<u64>().ok()));
        }
        Ok(disks)
    }
    fn remove(&self, disk: u64) -> io::Result<()> {
        match fs::remove_file(self.dir.join(format!("{disk}.live"))) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}
