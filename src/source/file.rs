//! A base in a file on this host, or in a block device (`device`).
//!
//! Reads bypass the page cache (O_DIRECT) where the filesystem allows it: the block cache keeps the blocks, and two
//! copies would waste memory. What must hold:
//! - The file is never written, and reads are positional: they use no shared file offset.
//! - **A read returns no byte before a check after the read found the file unchanged.** The kernel sets the
//!   modification time of a write before its bytes can be seen, so bytes of a file that is modified in place are not
//!   served. A change is final: restoring the old time does not help. A device has no such time: its size is checked.
//! - A file that is replaced by a rename is still served: the old file stays open.

use std::cell::Cell;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::aligned::{ALIGN, AlignedBuf};
use super::device::{Device, Opening, open_claimed, size_of};
use super::open::{OpenHere, OpenImage, pread, size};
use super::patience::may_wait_for;
use super::{Identity, KeyParts, Provenance, Source, SourceError, SourceErrorKind, Verdict, note};
use crate::format::record::{BaseIdentity, Validator};

/// Most bytes of one unaligned step.
const BOUNCE: usize = 256 * 1024;

thread_local! {
    static BOUNCE_BUFFER: Cell<Option<AlignedBuf>> = const { Cell::new(None) };
}

/// The metadata by which a file is identified.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// Bytes.
    pub size: u64,
    /// Modification time, whole seconds since 1970.
    pub mtime_s: i64,
    /// Modification time, nanoseconds within the second.
    pub mtime_ns: u32,
    /// Device number of the filesystem.
    pub device: u64,
    /// Inode number on that filesystem.
    pub inode: u64,
}

impl FileIdentity {
    /// Of the file with this metadata.
    pub fn of(metadata: &Metadata) -> Self {
        Self {
            size: metadata.len(),
            mtime_s: metadata.mtime(),
            mtime_ns: u32::try_from(metadata.mtime_nsec()).unwrap_or(0),
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    /// Of a device, for the memory of this machine. A device that went away and came back is another one.
    fn of_device(device: &Device, size: u64) -> Self {
        let mtime_s = device.sequence.cast_signed();
        Self { size, mtime_s, mtime_ns: 0, device: device.number, inode: u64::MAX }
    }

    /// Whether an open file has the same contents as at `self`, as far as metadata tells. One descriptor is one file,
    /// so the inode number is not compared.
    fn is_unmodified(&self, now: &Self) -> bool {
        (self.size, self.mtime_s, self.mtime_ns) == (now.size, now.mtime_s, now.mtime_ns)
    }
}

impl From<FileIdentity> for BaseIdentity {
    fn from(file: FileIdentity) -> Self {
        // The record has 64 bits of nanoseconds, which end in 2262. Later times wrap, and still differ from each other.
        let mtime_ns = file.mtime_s.wrapping_mul(1_000_000_000).wrapping_add(i64::from(file.mtime_ns));
        Self { size: file.size, validator: Validator::File { mtime_ns, inode: file.inode }, digest: None }
    }
}

/// See [`compare`](super::compare); none when one of the objects is of another kind.
pub(super) fn compare(registered: &BaseIdentity, found: &BaseIdentity) -> Option<Verdict> {
    let (Validator::File { mtime_ns: then, inode }, Validator::File { mtime_ns: now, inode: found_inode }) =
        (&registered.validator, &found.validator)
    else {
        return None;
    };
    Some(if found.size != registered.size {
        Verdict::Another(format!("it has {} bytes, not {}", found.size, registered.size))
    } else if found_inode != inode {
        Verdict::Another("it is another file than the one registered".into())
    } else if now != then {
        Verdict::Another("it was modified".into())
    } else {
        Verdict::Same
    })
}

/// See [`key_parts`](super::key_parts).
pub(super) fn key_parts(mtime_ns: i64, inode: u64) -> KeyParts {
    let parts = vec![mtime_ns.to_le_bytes().to_vec(), inode.to_le_bytes().to_vec()];
    KeyParts { label: "file", parts, is_strong: false, is_portable: false }
}

/// A regular file or a block device, opened for reading.
#[derive(Debug)]
pub struct FileSource {
    /// Of a device: shared by all its sources.
    file: Arc<File>,
    device: Option<Device>,
    path: PathBuf,
    found: FileIdentity,
    identity: Identity,
    direct: bool,
    changed: AtomicBool,
    allocated: u64,
}

impl FileSource {
    /// Opens a regular file, or a block device exclusively; symbolic links are followed. Does not wait on a FIFO. Waits
    /// for 3 s for a device that another process holds.
    ///
    /// # Errors
    /// `NotFound`, `NotAFile`, `Permission`, `Empty`, `InUse`, or `Io`.
    pub fn open(path: &Path) -> Result<Self, SourceError> {
        Self::open_with(&OpenHere, path)
    }

    /// As [`open`](Self::open), through `opener`.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_with(opener: &dyn OpenImage, path: &Path) -> Result<Self, SourceError> {
        let (file, Opening { direct, device }) = open_claimed(opener, path)?;
        let (metadata, size) = size(path, &file, device.as_ref())?;
        let found = match &device {
            Some(device) => FileIdentity::of_device(device, size),
            None => FileIdentity::of(&metadata),
        };
        let (identity, changed) = (Identity::File(found), AtomicBool::new(false));
        let allocated = if device.is_some() { size } else { metadata.blocks() * 512 };
        Ok(Self { file, device, path: path.to_owned(), found, identity, direct, changed, allocated })
    }

    /// Bytes that the file occupied when it was opened.
    pub fn allocated(&self) -> u64 {
        self.allocated
    }

    /// The identity of the file that was opened, as in a record.
    pub fn found(&self) -> BaseIdentity {
        match &self.device {
            Some(device) => device.identity(self.found.size),
            None => self.found.into(),
        }
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether reads bypass the page cache.
    pub fn is_direct(&self) -> bool {
        self.direct
    }

    fn changed(&self) -> SourceError {
        SourceError::new(SourceErrorKind::Changed, "read", &self.path)
    }

    fn refuse_changed(&self) -> Result<(), SourceError> {
        if self.changed.load(Ordering::Acquire) { Err(self.changed()) } else { Ok(()) }
    }

    fn failed(&self, error: io::Error) -> SourceError {
        SourceError::from_io("read", &self.path, error)
    }

    /// One step of a read: returns at least one byte, except at the end.
    fn read_some(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let aligned = offset.is_multiple_of(ALIGN as u64)
            && buf.len().is_multiple_of(ALIGN)
            && buf.as_ptr().addr().is_multiple_of(ALIGN);
        if !self.direct || aligned {
            return pread(&self.file, buf, offset);
        }
        let skip = (offset % ALIGN as u64) as usize;
        let want = buf.len().min(BOUNCE - skip);
        let span = (skip + want).next_multiple_of(ALIGN);
        let mut bounce = BOUNCE_BUFFER.take().unwrap_or_else(|| AlignedBuf::new(BOUNCE));
        let read = pread(&self.file, &mut bounce[..span], offset - skip as u64);
        let copied = read.map(|read| {
            let copied = read.saturating_sub(skip).min(want);
            buf[..copied].copy_from_slice(&bounce[skip..skip + copied]);
            copied
        });
        BOUNCE_BUFFER.set(Some(bounce));
        copied
    }

    /// `lseek` for data or holes. None: there is none up to the end.
    fn seek(&self, offset: u64, whence: libc::c_int) -> Result<Option<u64>, SourceError> {
        let Ok(from) = libc::off_t::try_from(offset) else { return Ok(None) };
        // SAFETY: the descriptor is open as long as `self.file`; lseek touches no memory of ours. It moves
        // the shared offset of the open file, which nothing here reads from.
        let found = unsafe { libc::lseek(self.file.as_raw_fd(), from, whence) };
        let result = u64::try_from(found).map_err(|_| io::Error::last_os_error());
        self.check()?;
        match result {
            Ok(found) => Ok(Some(found)),
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
            // The filesystem cannot find holes.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                Ok(Some(if whence == libc::SEEK_DATA { offset } else { self.found.size }))
            }
            Err(error) => Err(self.failed(error)),
        }
    }
}

impl Source for FileSource {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        self.refuse_changed()?;
        may_wait_for(&self.path)?;
        let left = self.found.size.saturating_sub(offset);
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let mut done = 0;
        while done < want {
            // The whole rest of `buf`, also past the end of the file: so an aligned read stays aligned.
            match self.read_some(&mut buf[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(error) => {
                    self.check()?;
                    return Err(self.failed(error));
                }
            }
        }
        self.check()?;
        if done < want {
            let early = io::Error::new(io::ErrorKind::UnexpectedEof, "the file ended early");
            return Err(self.failed(early));
        }
        note(Provenance::Fetched);
        Ok(want)
    }

    fn size(&self) -> u64 {
        self.found.size
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>, SourceError> {
        self.refuse_changed()?;
        if offset >= self.found.size {
            return Ok(None);
        }
        may_wait_for(&self.path)?;
        self.seek(offset, libc::SEEK_DATA)
    }

    fn next_hole(&self, offset: u64) -> Result<u64, SourceError> {
        self.refuse_changed()?;
        if offset >= self.found.size {
            return Ok(self.found.size);
        }
        may_wait_for(&self.path)?;
        Ok(self.seek(offset, libc::SEEK_HOLE)?.unwrap_or(self.found.size))
    }

    fn check(&self) -> Result<(), SourceError> {
        self.refuse_changed()?;
        let is_unmodified = match self.device {
            Some(_) => size_of(&self.file).map(|size| size == self.found.size),
            None => self.file.metadata().map(|now| self.found.is_unmodified(&FileIdentity::of(&now))),
        };
        if is_unmodified.map_err(|error| self.failed(error))? {
            return Ok(());
        }
        if !self.changed.swap(true, Ordering::AcqRel) {
            let path = self.path.display();
            tracing::error!(
                %path,
                "the file of a base was changed in place and is not served any more; put the original file back"
            );
        }
        Err(self.changed())
    }
}
