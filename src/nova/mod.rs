//! The directory of instances of a Nova host: its cache of images, and the disks that stand on them.
//!
//! Nova finds the image of a VM as `_base/<SHA-1 of the image's ID>`, and downloads it only when nothing is there. A link
//! from there to the file of a base is an image that Nova never downloads. A command runs this in its own process. What
//! must hold (D110):
//! - An entry of `_base` changes only under Nova's own lock of its name ([`NameLock`]).
//! - Only links to files of bases are made, replaced or removed. What Nova downloaded, and what an operator made, stays.
//! - Nova sees a whole link or none: a link appears by a rename.
//! - What is made belongs to the owner of its directory: Nova runs as a user of its own. No link of that user is
//!   followed where a file is opened to be written or given away.

pub mod contents;
mod lock;
mod overlays;
mod takeover;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha1::{Digest, Sha1};

pub use lock::NameLock;
pub use overlays::Overlay;
pub use takeover::{Below, Disk, Held, Vm, format_in_info, hold, set_format_in_info};

/// Nova's cache of images.
const CACHE: &str = "_base";
/// Where the files of images are that became bases, in the directory of instances: Nova changes the times of those in its
/// cache, and removes them.
const TAKEN: &str = "plyfs-bases";
/// Nova's lock files.
const LOCKS: &str = "locks";

/// What Nova's cache has under the name of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// Nothing: Nova would download the image.
    Absent,
    /// A link, and what it says. It may lead nowhere.
    Link(PathBuf),
    /// A file that Nova downloaded.
    File,
}

/// See the module.
#[derive(Clone, Debug)]
pub struct Instances {
    dir: PathBuf,
    owner: (u32, u32),
}

/// The name that Nova gives an image in its cache: SHA-1 of the ID, in hexadecimal digits.
pub fn cache_name(image: &str) -> String {
    hex::encode(Sha1::digest(image.as_bytes()))
}

fn about(path: &Path) -> impl FnOnce(io::Error) -> io::Error + '_ {
    move |error| io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

impl Instances {
    /// Of an existing directory, `instances_path` of nova.conf.
    ///
    /// # Errors
    /// When there is no such directory.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let found = fs::metadata(dir).map_err(about(dir))?;
        if !found.is_dir() {
            return Err(about(dir)(io::Error::from_raw_os_error(libc::ENOTDIR)));
        }
        Ok(Self { dir: dir.to_owned(), owner: (found.uid(), found.gid()) })
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where Nova looks for an image.
    pub fn place_of(&self, image: &str) -> PathBuf {
        self.dir.join(CACHE).join(cache_name(image))
    }

    /// Where an entry of the cache is, by its name.
    pub fn place_of_name(&self, name: &str) -> PathBuf {
        self.dir.join(CACHE).join(name)
    }

    /// What Nova's cache has of an image. Follows no link.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn entry(&self, image: &str) -> io::Result<Entry> {
        let path = self.place_of(image);
        match fs::symlink_metadata(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Entry::Absent),
            Err(error) => Err(about(&path)(error)),
            Ok(found) if found.is_symlink() => fs::read_link(&path).map(Entry::Link).map_err(about(&path)),
            Ok(_) => Ok(Entry::File),
        }
    }

    /// Nova's lock of an image; `None` when Nova holds it for longer than `patience`.
    ///
    /// # Errors
    /// When its file cannot be made or opened.
    pub fn lock(&self, image: &str, patience: Duration) -> io::Result<Option<NameLock>> {
        self.lock_name(&cache_name(image), patience)
    }

    /// As [`lock`](Self::lock), of an entry by its name.
    ///
    /// # Errors
    /// When its file cannot be made or opened.
    pub fn lock_name(&self, name: &str, patience: Duration) -> io::Result<Option<NameLock>> {
        let locks = self.directory(LOCKS)?;
        let path = locks.join(format!("nova-{name}"));
        NameLock::take(&path, owner_of(&locks)?, patience).map_err(about(&path))
    }

    /// Makes the entry of an image a link to `target`, unless there is a file that Nova downloaded, or a link to
    /// anything but a base of this image. Returns the entry that is there then.
    ///
    /// # Errors
    /// When the link cannot be made; the entry is then as before.
    pub fn link(&self, _lock: &NameLock, image: &str, target: &Path) -> io::Result<Entry> {
        let made = Entry::Link(target.to_owned());
        match self.entry(image)? {
            found if found == made => return Ok(found),
            Entry::Link(other) if is_of_base(&other, target) => {}
            Entry::Absent => {}
            found => return Ok(found),
        }
        self.place_link(&cache_name(image), target)?;
        Ok(made)
    }

    /// Makes an entry of the cache a link, in place of what is there. For a caller that has the lock of its name.
    fn place_link(&self, name: &str, target: &Path) -> io::Result<()> {
        let cache = self.directory(CACHE)?;
        // The manager of Nova's cache takes no file of such a name for an image.
        let new = cache.join(format!(".{name}.plyfs"));
        match fs::remove_file(&new) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(about(&new)(error)),
            _ => {}
        }
        symlink(target, &new).map_err(about(&new))?;
        let (uid, gid) = owner_of(&cache)?;
        let place = cache.join(name);
        let placed = lchown(&new, Some(uid), Some(gid)).and_then(|()| fs::rename(&new, &place));
        if placed.is_err() {
            let _ = fs::remove_file(&new);
        }
        placed.map_err(about(&place))
    }

    /// Removes the entry of an image when it is a link to `target`. Returns whether it was.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn unlink(&self, _lock: &NameLock, image: &str, target: &Path) -> io::Result<bool> {
        let path = self.place_of(image);
        match self.entry(image)? {
            Entry::Link(found) if found == target => {
                fs::remove_file(&path).map_err(about(&path))?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// The links of the cache to files of the directory `bases`, each with the name of its entry.
    ///
    /// # Errors
    /// When the cache cannot be read.
    pub fn links(&self, bases: &Path) -> io::Result<Vec<(String, PathBuf)>> {
        let mut out = Vec::new();
        for entry in overlays::list(&self.dir.join(CACHE))? {
            let (name, target) = (entry.file_name().into_string(), fs::read_link(entry.path()));
            if let (Ok(name), Ok(target)) = (name, target)
                && target.parent() == Some(bases)
            {
                out.push((name, target));
            }
        }
        Ok(out)
    }

    /// A directory of Nova's, which is made when it is missing.
    fn directory(&self, name: &str) -> io::Result<PathBuf> {
        let path = self.dir.join(name);
        match fs::create_dir(&path) {
            Ok(()) => lchown(&path, Some(self.owner.0), Some(self.owner.1)).map_err(about(&path))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(about(&path)(error)),
        }
        Ok(path)
    }
}

fn owner_of(path: &Path) -> io::Result<(u32, u32)> {
    let found = fs::metadata(path).map_err(about(path))?;
    Ok((found.uid(), found.gid()))
}

/// Whether a link leads to the base of the same image, in another mount: its file has the same name.
fn is_of_base(found: &Path, target: &Path) -> bool {
    let directory = |path: &Path| path.parent().and_then(Path::file_name).map(ToOwned::to_owned);
    found.file_name() == target.file_name() && directory(found) == directory(target)
}
