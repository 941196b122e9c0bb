//! Opens the file of an image: read-only, without waiting for a peer, and with O_DIRECT where that works.
//!
//! Opening is a trait, because the process that serves disks gives up the right to open files of the host and asks
//! another process. What must hold for each implementation: it opens only regular files and block devices that are not
//! empty; a device exclusively where it can (`device`).

use std::fs::{File, Metadata, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::aligned::{ALIGN, AlignedBuf};
use super::device::{self, Device, number_at, size_of};
use super::{SourceError, SourceErrorKind};

/// An image's file, open for reading.
#[derive(Debug)]
pub struct Opened {
    /// The file.
    pub file: File,
    /// Whether it was opened with O_DIRECT, and a direct read works.
    pub direct: bool,
    /// What it is, when it is a block device.
    pub device: Option<Device>,
}

/// Opens the files of images.
pub trait OpenImage: Send + Sync {
    /// Opens a regular file or a block device; symbolic links are followed. Does not wait on a FIFO or a device.
    ///
    /// # Errors
    /// `NotFound`, `NotAFile`, `Permission`, `Empty`, `InUse`, or `Io`.
    fn open(&self, path: &Path) -> Result<Opened, SourceError>;

    /// Connects to a socket of this host. May wait for its server.
    ///
    /// # Errors
    /// `Outside` where that is not allowed, `NotFound`, `Permission`, or `Io`.
    fn connect(&self, path: &Path) -> Result<UnixStream, SourceError> {
        Err(SourceError::new(SourceErrorKind::Outside, "connect to", path))
    }
}

/// Opens in this process.
#[derive(Debug, Clone, Copy)]
pub struct OpenHere;

impl OpenImage for OpenHere {
    fn open(&self, path: &Path) -> Result<Opened, SourceError> {
        let fail = |error| SourceError::from_io("open", path, error);
        // Before opening, because opening a device can have an effect; and after it, because the path may lead to
        // another file by then.
        usable(path, &std::fs::metadata(path).map_err(fail)?)?;
        let opened = match number_at(path) {
            Some(number) => device::open(path, number, |flags| open_file(path, flags))?,
            None => {
                let (file, direct) = open_file(path, 0).map_err(fail)?;
                Opened { file, direct, device: None }
            }
        };
        let Opened { file, device, .. } = &opened;
        size(path, file, device.as_ref())?;
        Ok(opened)
    }

    fn connect(&self, path: &Path) -> Result<UnixStream, SourceError> {
        UnixStream::connect(path).map_err(|error| SourceError::from_io("connect to", path, error))
    }
}

/// The metadata and bytes of an open file that can be an image.
///
/// # Errors
/// `NotAFile` when it is not of the kind that `device` says, `Empty`, or `Io`.
pub(super) fn size(
    path: &Path,
    file: &File,
    device: Option<&Device>,
) -> Result<(Metadata, u64), SourceError> {
    let fail = |error| SourceError::from_io("open", path, error);
    let metadata = file.metadata().map_err(fail)?;
    usable(path, &metadata)?;
    if metadata.is_file() == device.is_some() {
        return Err(SourceError::new(SourceErrorKind::NotAFile, "open", path));
    }
    let size = if device.is_some() { size_of(file).map_err(fail)? } else { metadata.len() };
    if size == 0 {
        return Err(SourceError::new(SourceErrorKind::Empty, "open", path));
    }
    Ok((metadata, size))
}

/// Refuses directories, character devices, FIFOs, sockets and empty files.
fn usable(path: &Path, metadata: &Metadata) -> Result<(), SourceError> {
    let kind = if metadata.file_type().is_block_device() {
        return Ok(());
    } else if !metadata.is_file() {
        SourceErrorKind::NotAFile
    } else if metadata.len() == 0 {
        SourceErrorKind::Empty
    } else {
        return Ok(());
    };
    Err(SourceError::new(kind, "open", path))
}

/// Opens without waiting, and with O_DIRECT if a direct read works: some filesystems accept the flag and refuse the
/// read.
fn open_file(path: &Path, flags: i32) -> io::Result<(File, bool)> {
    // O_CLOEXEC is set by the standard library.
    let flags = flags | libc::O_NONBLOCK | libc::O_NOCTTY;
    let open = |more| OpenOptions::new().read(true).custom_flags(flags | more).open(path);
    match open(libc::O_DIRECT) {
        Ok(file) => {
            let mut probe = AlignedBuf::new(ALIGN);
            match pread(&file, &mut probe, 0) {
                // It ends here: a device that it holds can be opened again.
                Err(error) if refuses_direct(&error) => drop(file),
                // Another failure is not about the flag: later reads report it with their offset.
                Ok(_) | Err(_) => return Ok((file, true)),
            }
        }
        Err(error) if refuses_direct(&error) => {}
        Err(error) => return Err(error),
    }
    Ok((open(0)?, false))
}

fn refuses_direct(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

pub(super) fn pread(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        match file.read_at(buf, offset) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
