//! Which images the disks of instances stand on, as the headers of their qcow2 files say.
//!
//! What must hold: a disk that cannot be looked at is an error, because an image that it may need must stay.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{CACHE, Instances, LOCKS, about, cache_name};

/// Bytes of the header up to the length of the backing file's name.
const HEAD: usize = 20;
const MAGIC: &[u8] = b"QFI\xfb";
/// Longest name of a backing file that QEMU accepts.
const LONGEST_NAME: u32 = 1023;

/// A qcow2 file on top of another file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// The file.
    pub path: PathBuf,
    /// What it names as its backing file.
    pub backing: String,
}

impl Overlay {
    /// Whether it stands on an image of Nova's cache, or on the file `base` itself, as far as names tell. It says yes too
    /// of a copy of the image that an old Nova made in its cache.
    pub fn stands_on(&self, image: &str, base: &Path) -> bool {
        let base = base.file_name().and_then(|name| name.to_str());
        self.backing.contains(&cache_name(image)) || base.is_some_and(|base| self.backing.contains(base))
    }
}

impl Instances {
    /// All overlays of the instances and of the cache. Disks whose files are links to files below `mount` are none.
    ///
    /// # Errors
    /// When a directory or a disk cannot be read.
    pub fn overlays(&self, mount: &Path) -> io::Result<Vec<Overlay>> {
        let mut out = Vec::new();
        for entry in list(&self.dir)? {
            let name = entry.file_name();
            if name == LOCKS || !fs::metadata(entry.path()).is_ok_and(|found| found.is_dir()) {
                continue;
            }
            for file in list(&entry.path())? {
                if name == CACHE || file.file_name().as_encoded_bytes().starts_with(b"disk") {
                    out.extend(overlay(&file.path(), mount)?);
                }
            }
        }
        Ok(out)
    }
}

/// The entries of a directory; none when it is gone.
pub(super) fn list(dir: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(dir).and_then(Iterator::collect) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        listed => listed.map_err(about(dir)),
    }
}

/// The overlay of this path; none when it is another file, or gone.
fn overlay(path: &Path, mount: &Path) -> io::Result<Option<Overlay>> {
    if let Ok(target) = fs::read_link(path)
        && path.parent().unwrap_or(path).join(target).starts_with(mount)
    {
        // Reading a disk or a base may wait for a server.
        return Ok(None);
    }
    match backing_of(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        found => {
            let found = found.map_err(about(path))?;
            Ok(found.map(|backing| Overlay { path: path.to_owned(), backing }))
        }
    }
}

/// The backing file that a qcow2 file names; none of another file, and of one that stands on nothing.
///
/// # Errors
/// When it cannot be read; `InvalidData` for a name that no qcow2 file may have.
pub(super) fn backing_of(path: &Path) -> io::Result<Option<String>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut head = [0; HEAD];
    match file.read_exact_at(&mut head, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let (at, length) = (u64::from_be_bytes(part(&head, 8)), u32::from_be_bytes(part(&head, 16)));
    if !head.starts_with(MAGIC) || at == 0 || length == 0 {
        return Ok(None);
    }
    if length > LONGEST_NAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the name of its backing file is too long"));
    }
    read_name(&file, at, length).map(Some)
}

fn read_name(file: &File, at: u64, length: u32) -> io::Result<String> {
    let mut name = vec![0; length as usize];
    file.read_exact_at(&mut name, at)?;
    Ok(String::from_utf8_lossy(&name).into_owned())
}

fn part<const N: usize>(head: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&head[at..at + N]);
    out
}
