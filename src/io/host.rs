//! The medium of a running daemon: a directory of the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, OnceLock};

use super::{Medium, MediumFile, Open, Space, Stamp, sys};

/// A directory of the host's filesystems.
#[derive(Debug, Clone)]
pub struct HostMedium {
    root: PathBuf,
    /// The path of a directory that is held open; otherwise `root`.
    base: PathBuf,
    in_memory: bool,
    _held: Option<Arc<OwnedFd>>,
}

impl HostMedium {
    /// Uses the directory `root`, which must exist.
    pub fn new(root: &Path) -> io::Result<Self> {
        let in_memory = sys::is_memory_filesystem(root)?;
        Ok(Self { root: root.to_path_buf(), base: root.to_path_buf(), in_memory, _held: None })
    }

    /// Uses a directory that is open, whatever is mounted at its path meanwhile. `root`: its path, for messages.
    pub fn held(dir: OwnedFd, root: &Path) -> io::Result<Self> {
        // The path of a descriptor of this process leads to the directory itself.
        let base = PathBuf::from(format!("/proc/self/fd/{}/.", dir.as_raw_fd()));
        let in_memory = sys::is_memory_filesystem(&base)?;
        Ok(Self { root: root.to_path_buf(), base, in_memory, _held: Some(Arc::new(dir)) })
    }
}

/// Most files that wait to be closed. More are closed by the caller.
const CLOSING: usize = 64;

/// Where files go that another thread closes.
static CLOSER: OnceLock<SyncSender<File>> = OnceLock::new();

/// From now on, a thread of its own closes the files that a rename replaces. A process that forks later must not call it.
///
/// # Errors
/// When there is no thread. Such files are then closed by those who rename.
pub fn close_replaced_elsewhere() -> io::Result<()> {
    let (sender, files) = sync_channel::<File>(CLOSING);
    std::thread::Builder::new().name("closer".into()).spawn(move || files.into_iter().for_each(drop))?;
    // A second call ends its thread.
    let _ = CLOSER.set(sender);
    Ok(())
}

fn close_later(file: File) {
    if let Some(closer) = CLOSER.get() {
        // One that comes back is closed here.
        let _ = closer.try_send(file);
    }
}

fn stamp_of(meta: &fs::Metadata) -> Stamp {
    let changed_ns = meta.ctime().wrapping_mul(1_000_000_000).wrapping_add(meta.ctime_nsec());
    Stamp { inode: meta.ino(), changed_ns, len: meta.len() }
}

impl Medium for HostMedium {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        let mut options = OpenOptions::new();
        options.read(true).write(how != Open::ToRead).create(how == Open::Create);
        options.mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_NOATIME);
        let path = self.base.join(name);
        let file = match options.open(&path) {
            // Only the owner of a file may use O_NOATIME.
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => {
                options.custom_flags(libc::O_NOFOLLOW).open(&path)?
            }
            other => other?,
        };
        Ok(Arc::new(HostFile(file)))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let to = self.base.join(to);
        // Where the new name replaces a file, its inode goes with the last user. Freeing it can wait for a commit of the
        // filesystem's journal: another thread does that.
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        let replaced = OpenOptions::new().read(true).custom_flags(flags).open(&to).ok();
        let done = fs::rename(self.base.join(from), to);
        if let Some(replaced) = replaced {
            close_later(replaced);
        }
        done
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        fs::remove_file(self.base.join(name))
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        File::open(self.base.join(dir))?.sync_all()
    }
    fn stamp(&self, name: &str) -> io::Result<Option<Stamp>> {
        Ok(Some(stamp_of(&fs::symlink_metadata(self.base.join(name))?)))
    }
    fn allocated(&self, name: &str) -> io::Result<Option<u64>> {
        match fs::symlink_metadata(self.base.join(name)) {
            Ok(meta) => Ok(Some(meta.blocks() * 512)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        fs::read_dir(self.base.join(dir))?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect()
    }
    fn list_stamped(&self, dir: &str) -> io::Result<Vec<(String, Option<Stamp>)>> {
        let with_stamp = |entry: fs::DirEntry| {
            // By the descriptor of the directory: its path is not walked for each of many files.
            let stamp = entry.metadata().ok().map(|meta| stamp_of(&meta));
            (entry.file_name().to_string_lossy().into_owned(), stamp)
        };
        fs::read_dir(self.base.join(dir))?.map(|entry| Ok(with_stamp(entry?))).collect()
    }
    fn make_dir(&self, dir: &str) -> io::Result<()> {
        match fs::DirBuilder::new().mode(0o700).create(self.base.join(dir)) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    }
    fn never_waits(&self) -> bool {
        self.in_memory
    }
    fn space(&self) -> io::Result<Space> {
        sys::space(&self.base)
    }
    fn root(&self) -> PathBuf {
        self.root.clone()
    }
}

#[derive(Debug)]
struct HostFile(File);

impl MediumFile for HostFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buf.len() {
            match self.0.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(done)
    }
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        sys::read_cached(self.0.as_fd(), buf, offset)
    }
    fn is_in_memory(&self, offset: u64, len: u64) -> bool {
        sys::is_cached(self.0.as_fd(), offset, len)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_all_at(buf, offset)
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn check_written_back(&self) -> io::Result<()> {
        sys::check_written_back(self.0.as_fd())
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        sys::next_data(self.0.as_fd(), offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        sys::fallocate(self.0.as_fd(), libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, offset, len)
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        sys::fallocate(self.0.as_fd(), libc::FALLOC_FL_KEEP_SIZE, offset, len)
    }
    fn allocated(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.blocks() * 512)
    }
    fn has_space(&self, offset: u64, len: u64) -> io::Result<bool> {
        sys::has_space(self.0.as_fd(), offset, len)
    }
    fn identity(&self) -> io::Result<(u64, u64)> {
        let meta = self.0.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }
}
