//! Makes the proof of an image file. Runs in the process of a command.
//!
//! What must hold: at the name of the proof lies the earlier file or a whole new proof, whatever ends the command, and
//! however many commands make it. The proof is that of one state of the image: an image that changes meanwhile is refused.

use std::fs::{self, File, Metadata, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::format::MAX_DISK_SIZE;
use crate::format::layout::staged;
use crate::format::proof::{Builder, HEADER_AREA, Hash, ProofHeader, SUFFIX};

/// Bytes of one read.
const PIECE: usize = 1 << 20;
const CHANGED: &str = "it changed meanwhile; seal it when it does not change any more";

/// A proof that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sealed {
    /// Where it is.
    pub proof: PathBuf,
    /// Bytes of the image, and of the proof.
    pub size: u64,
    pub proof_size: u64,
    /// The BLAKE3 hash of the image.
    pub root: Hash,
}

/// Why no proof was made. The message is complete.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    #[error("cannot read {}: {source}; check the path and the disk", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("cannot write the proof {}: {source}; name another place with --out FILE", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot seal {}: {why}", path.display())]
    Image { path: PathBuf, why: &'static str },
    #[error("cannot write the proof {}: a file that is no proof has that name; remove it, or name another with --out FILE", path.display())]
    Taken { path: PathBuf },
    #[error("cannot write the proof {}: another plyfs base seal is writing it; wait until that has ended, or name another place with --out FILE", path.display())]
    Busy { path: PathBuf },
    #[error("the command was interrupted")]
    Interrupted,
}

/// The name of the proof beside an image.
pub fn beside(image: &Path) -> PathBuf {
    let mut name = image.as_os_str().to_owned();
    name.push(SUFFIX);
    name.into()
}

/// A file that is removed again unless it is kept.
struct Staged<'a> {
    path: &'a Path,
    kept: bool,
}

impl Drop for Staged<'_> {
    fn drop(&mut self) {
        if !self.kept {
            // It has no meaning, and the next command replaces it.
            let _ = fs::remove_file(self.path);
        }
    }
}

/// Makes the proof of `image` at `out`, over an earlier proof there. `note` gets the bytes so far, and whether to go on is
/// its answer.
///
/// # Errors
/// When a file cannot be read or written, the image is none or changes meanwhile, `out` is something else than a proof,
/// another command writes it, and when `note` ends it.
pub fn seal(image: &Path, out: &Path, note: &mut dyn FnMut(u64) -> bool) -> Result<Sealed, SealError> {
    let read = |source| SealError::Read { path: image.to_owned(), source };
    let write = |source| SealError::Write { path: out.to_owned(), source };
    let unfit = |why| Err(SealError::Image { path: image.to_owned(), why });
    let open = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(image);
    let mut file = open.map_err(read)?;
    let before = file.metadata().map_err(read)?;
    match before.len() {
        _ if !before.is_file() => return unfit("it is not a regular file; give the file of an image"),
        0 => return unfit("it is empty; an image has at least one byte"),
        size if size > MAX_DISK_SIZE => return unfit("it is larger than 64 TiB"),
        _ => {}
    }
    may_replace(out)?;
    let name = out.file_name().map(|name| staged(&name.to_string_lossy())).unwrap_or_default();
    let staged_path = out.with_file_name(name);
    let to = alone(&staged_path).map_err(write)?.ok_or_else(|| SealError::Busy { path: out.to_owned() })?;
    // Removed before the file is closed, so while it is locked.
    let mut staged = Staged { path: &staged_path, kept: false };
    let mut builder = Builder::new(before.len());
    let mut piece = vec![0; PIECE];
    let mut done = 0;
    loop {
        let got = match file.read(&mut piece) {
            Ok(0) => break,
            Ok(got) => got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(read(error)),
        };
        builder.update(&piece[..got], &mut |offset, page| to.write_all_at(page, offset)).map_err(write)?;
        done += got as u64;
        // A file that grows faster than it is read has no end.
        if done > before.len() {
            return unfit(CHANGED);
        }
        if !note(done) {
            return Err(SealError::Interrupted);
        }
    }
    let after = file.metadata().map_err(read)?;
    let (Some(root), true) = (builder.root(), done == before.len() && is_unmodified(&before, &after)) else {
        return unfit(CHANGED);
    };
    let header = ProofHeader { size: before.len(), root };
    to.write_all_at(&header.encode(), 0).map_err(write)?;
    to.sync_all().map_err(write)?;
    fs::rename(&staged_path, out).map_err(write)?;
    staged.kept = true;
    let dir = out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(write)?;
    let proof_size = builder.layout().proof_size();
    Ok(Sealed { proof: out.to_owned(), size: before.len(), proof_size, root })
}

/// The file at `path`, made empty, for this command alone until it is closed; none while another command has it. The lock
/// ends with the command, so a file that one left behind keeps none out.
fn alone(path: &Path) -> io::Result<Option<File>> {
    loop {
        let file = OpenOptions::new().write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // The command that had it may have renamed or removed it meanwhile. Only the one with the lock does that.
        let place = |metadata: &Metadata| (metadata.dev(), metadata.ino());
        match fs::metadata(path) {
            Ok(there) if place(&there) == place(&file.metadata()?) => {
                file.set_len(0)?;
                return Ok(Some(file));
            }
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
}

fn is_unmodified(before: &Metadata, after: &Metadata) -> bool {
    let times = |metadata: &Metadata| (metadata.len(), metadata.mtime(), metadata.mtime_nsec());
    times(before) == times(after)
}

/// Refuses to replace a file that is no proof: it may be an image.
fn may_replace(out: &Path) -> Result<(), SealError> {
    let taken = || SealError::Taken { path: out.to_owned() };
    let write = |source| SealError::Write { path: out.to_owned(), source };
    let metadata = match fs::metadata(out) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(write(error)),
    };
    if !metadata.is_file() {
        return Err(taken());
    }
    let mut head = vec![0; HEADER_AREA as usize];
    let file = File::open(out).map_err(write)?;
    let read = file.read_at(&mut head, 0).map_err(write)?;
    ProofHeader::decode(&head[..read]).map(drop).map_err(|_| taken())
}

#[cfg(test)]
mod tests;
