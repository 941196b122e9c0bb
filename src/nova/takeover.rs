//! The disks of the instances, for taking them over and for giving them back.
//!
//! What must hold (D111):
//! - A disk that a VM uses is not touched: QEMU locks its images, and while this process holds a lock on a disk
//!   ([`Held`]), no QEMU opens it.
//! - At each moment `disk` of an instance is the whole disk, in qcow2 or in plyfs: a rename replaces one by the other.
//! - `disk.info` never calls a qcow2 file raw: QEMU would give its bytes to the guest.
//! - An image of the cache that becomes a base keeps its inode, under a name that Nova does not know. Its entry becomes a
//!   link to the file of the base, so that Nova's changes of its times do not reach it.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::overlays::{backing_of, list};
use super::{CACHE, Entry, Instances, NameLock, TAKEN, about, owner_of};
use crate::io::record_lock::try_record_lock;

/// The file with the formats of the disks of an instance.
const INFO: &str = "disk.info";
/// Longest `disk.info`.
const LONGEST_INFO: u64 = 1 << 20;

/// A disk of an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Disk {
    /// A qcow2 file, and the backing file that it names.
    Qcow2(Option<String>),
    /// A link, and what it says.
    Link(PathBuf),
    /// Another file, such as a raw disk.
    Other,
}

/// The directory of an instance.
#[derive(Clone, Debug)]
pub struct Vm {
    /// Its name, the ID of the instance.
    pub name: String,
    dir: PathBuf,
}

/// What a backing file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Below {
    /// A file of the cache, by the name of its entry.
    Image(String),
    /// An entry of the cache that is a link, and what it says.
    Link(PathBuf),
}

/// A disk that no VM can open meanwhile.
#[derive(Debug)]
pub struct Held(File);

impl Held {
    /// User, group and permissions of the file.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn owner(&self) -> io::Result<(u32, u32, u32)> {
        let found = self.0.metadata()?;
        Ok((found.uid(), found.gid(), found.mode() & 0o777))
    }

    /// When the file was modified, seconds and nanoseconds since the epoch.
    ///
    /// # Errors
    /// When the file cannot be looked at.
    pub fn modified(&self) -> io::Result<(i64, i64)> {
        let found = self.0.metadata()?;
        Ok((found.mtime(), found.mtime_nsec()))
    }
}

impl Instances {
    /// The instances that have disks, by name.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn vms(&self) -> io::Result<Vec<Vm>> {
        let mut out = Vec::new();
        for entry in list(&self.dir)? {
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name == CACHE || name == super::LOCKS || name == TAKEN || !entry.path().is_dir() {
                continue;
            }
            let vm = Vm { name, dir: entry.path() };
            // One whose disks cannot be read is told of.
            if vm.disks().is_ok_and(|disks| disks.is_empty()) {
                continue;
            }
            out.push(vm);
        }
        out.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(out)
    }

    /// What the backing file of a disk of `vm` is.
    ///
    /// # Errors
    /// `InvalidInput` when it is no file of the cache; `NotFound` when it is gone.
    pub fn below(&self, vm: &Vm, backing: &str) -> io::Result<Below> {
        let refuse = || {
            let why = format!("its backing file \"{backing}\" is not in {CACHE}");
            io::Error::new(io::ErrorKind::InvalidInput, why)
        };
        let path = vm.dir.join(backing);
        let (Some(dir), Some(name)) = (path.parent(), path.file_name().and_then(|name| name.to_str())) else {
            return Err(refuse());
        };
        let is_in_cache =
            || Some(fs::canonicalize(dir).ok()? == fs::canonicalize(self.dir.join(CACHE)).ok()?);
        if is_in_cache() != Some(true) {
            return Err(refuse());
        }
        match fs::symlink_metadata(&path).map_err(about(&path))? {
            found if found.is_symlink() => Ok(Below::Link(fs::read_link(&path).map_err(about(&path))?)),
            found if found.is_file() => Ok(Below::Image(name.to_owned())),
            _ => Err(refuse()),
        }
    }

    /// Gives the file of an entry of the cache another name, where Nova does not find it, and returns that. The entry stays.
    ///
    /// # Errors
    /// When another file has that name, and errors of the filesystem.
    pub fn keep(&self, name: &str) -> io::Result<PathBuf> {
        let (from, dir) = (self.dir.join(CACHE).join(name), self.directory(TAKEN)?);
        let kept = dir.join(format!("{name}.raw"));
        match fs::hard_link(&from, &kept) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                let inode = |path: &Path| fs::symlink_metadata(path).map(|found| (found.dev(), found.ino()));
                if inode(&from).map_err(about(&from))? != inode(&kept).map_err(about(&kept))? {
                    let why =
                        "it exists, and is another file than that of the cache; look at both, and remove one";
                    return Err(about(&kept)(io::Error::new(io::ErrorKind::AlreadyExists, why)));
                }
            }
            linked => linked.map_err(about(&kept))?,
        }
        Ok(kept)
    }

    /// Makes the entry of a file that was [kept](Self::keep) a link to the file of its base.
    ///
    /// # Errors
    /// When the link cannot be made.
    pub fn link_kept(&self, _lock: &NameLock, name: &str, target: &Path) -> io::Result<()> {
        self.place_link(name, target)
    }

    /// The name of the entry of a kept file, when `path` is one.
    pub fn entry_of_kept(&self, path: &Path) -> Option<String> {
        let name = path.strip_prefix(self.dir.join(TAKEN)).ok()?.to_str()?;
        name.strip_suffix(".raw").filter(|name| !name.contains('/')).map(str::to_owned)
    }

    /// The names of the entries of all kept files.
    ///
    /// # Errors
    /// When their directory cannot be read.
    pub fn kept(&self) -> io::Result<Vec<String>> {
        let mut out: Vec<String> = list(&self.dir.join(TAKEN))?
            .iter()
            .filter_map(|entry| self.entry_of_kept(&entry.path()))
            .collect();
        out.sort();
        Ok(out)
    }

    /// Gives a kept file back to the cache, in place of the link to `target`. What is there besides stays, and then the
    /// kept file too. Returns whether it was given back.
    ///
    /// # Errors
    /// Errors of the filesystem.
    pub fn give_back(&self, _lock: &NameLock, name: &str, target: &Path) -> io::Result<bool> {
        let (place, kept) =
            (self.dir.join(CACHE).join(name), self.dir.join(TAKEN).join(format!("{name}.raw")));
        let found = match fs::symlink_metadata(&place) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Entry::Absent,
            Ok(found) if found.is_symlink() => Entry::Link(fs::read_link(&place).map_err(about(&place))?),
            found => found.map(|_| Entry::File).map_err(about(&place))?,
        };
        if found != Entry::Absent && found != Entry::Link(target.to_owned()) {
            return Ok(false);
        }
        fs::rename(&kept, &place).map_err(about(&place))?;
        Ok(true)
    }
}

impl Vm {
    /// The files of its disks, and what they are.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn disks(&self) -> io::Result<Vec<(String, Disk)>> {
        let mut out = Vec::new();
        for entry in list(&self.dir)? {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let is_disk = name == "disk" || name.starts_with("disk.");
            if !is_disk || name == INFO || [BEFORE, NEW, EXPORTED].iter().any(|end| name.ends_with(end)) {
                continue;
            }
            out.push((name, disk_at(&entry.path())?));
        }
        out.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(out)
    }

    /// The path of one of its disks.
    pub fn path(&self, disk: &str) -> PathBuf {
        self.dir.join(disk)
    }

    /// Where the qcow2 file of a disk is after it was taken over.
    pub fn before(&self, disk: &str) -> PathBuf {
        self.dir.join(format!("{disk}{BEFORE}"))
    }

    /// Where the qcow2 file of a disk is while it is given back.
    pub fn exported(&self, disk: &str) -> PathBuf {
        self.dir.join(format!("{disk}{EXPORTED}"))
    }

    /// Keeps VMs from opening a disk; `None` when one has it open.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub fn hold(&self, disk: &str) -> io::Result<Option<Held>> {
        hold(&self.path(disk))
    }

    /// Replaces a qcow2 file by a link to a disk of plyfs. The file is then at [`before`](Self::before).
    ///
    /// # Errors
    /// Errors of the filesystem; the disk is then as it was.
    pub fn replace_by_link(&self, _held: &Held, disk: &str, target: &Path) -> io::Result<()> {
        let (path, before, new) = (self.path(disk), self.before(disk), self.dir.join(format!("{disk}{NEW}")));
        for stale in [&before, &new] {
            match fs::remove_file(stale) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(about(stale)(error)),
                _ => {}
            }
        }
        fs::hard_link(&path, &before).map_err(about(&before))?;
        symlink(target, &new).map_err(about(&new))?;
        let (uid, gid) = owner_of(&self.dir)?;
        lchown(&new, Some(uid), Some(gid)).and_then(|()| fs::rename(&new, &path)).map_err(about(&path))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(about(&self.dir))
    }

    /// Replaces a link by the qcow2 file at [`exported`](Self::exported).
    ///
    /// # Errors
    /// Errors of the filesystem; the disk is then as it was.
    pub fn replace_by_file(&self, disk: &str) -> io::Result<()> {
        let path = self.path(disk);
        fs::rename(self.exported(disk), &path).map_err(about(&path))?;
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(about(&self.dir))
    }
}

/// Keeps VMs from opening the file of a disk; `None` when one has it open. Follows no link.
///
/// # Errors
/// When it cannot be opened.
pub fn hold(path: &Path) -> io::Result<Option<Held>> {
    let mut options = OpenOptions::new();
    let options = options.read(true).write(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK);
    let file = options.open(path).map_err(about(path))?;
    Ok(try_record_lock(&file).map_err(about(path))?.then_some(Held(file)))
}

/// Ends of the names of files that plyfs makes beside a disk.
const BEFORE: &str = ".before-plyfs";
const NEW: &str = ".new-plyfs";
const EXPORTED: &str = ".from-plyfs";

fn disk_at(path: &Path) -> io::Result<Disk> {
    let found = fs::symlink_metadata(path).map_err(about(path))?;
    if found.is_symlink() {
        return Ok(Disk::Link(fs::read_link(path).map_err(about(path))?));
    }
    let mut magic = [0; 4];
    let is_qcow2 = found.is_file() && {
        let file =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).map_err(about(path))?;
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut magic, 0).is_ok() && &magic == b"QFI\xfb"
    };
    if !is_qcow2 {
        return Ok(Disk::Other);
    }
    Ok(Disk::Qcow2(backing_of(path).map_err(about(path))?))
}

fn info(vm: &Vm) -> io::Result<(PathBuf, Map<String, Value>)> {
    let path = vm.dir.join(INFO);
    let found = match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((path, Map::new())),
        found => found.map_err(about(&path))?,
    };
    let bad = |why: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {why}", path.display()));
    if found.len() > LONGEST_INFO {
        return Err(bad("it is too long"));
    }
    let text = fs::read_to_string(&path).map_err(about(&path))?;
    if text.trim().is_empty() {
        return Ok((path, Map::new()));
    }
    let formats = serde_json::from_str(&text).map_err(|_| bad("it is no JSON object"))?;
    Ok((path, formats))
}

/// The format that `disk.info` gives a disk.
///
/// # Errors
/// When the file cannot be read.
pub fn format_in_info(vm: &Vm, disk: &str) -> io::Result<Option<String>> {
    let (_, formats) = info(vm)?;
    Ok(formats.get(vm.path(disk).to_str().unwrap_or_default()).and_then(Value::as_str).map(str::to_owned))
}

/// Gives a disk another format in `disk.info`, durably.
///
/// # Errors
/// When the file cannot be read or replaced; `InvalidInput` for a path that is not UTF-8.
pub fn set_format_in_info(vm: &Vm, disk: &str, format: &str) -> io::Result<()> {
    let (path, mut formats) = info(vm)?;
    let disk = vm.path(disk);
    let key =
        disk.to_str().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path is not UTF-8"))?;
    formats.insert(key.to_owned(), format.into());
    let new = vm.dir.join(format!("{INFO}{NEW}"));
    let (uid, gid) = owner_of(&vm.dir)?;
    let text = format!("{}\n", Value::Object(formats));
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(about(&new)(error)),
        _ => {}
    }
    let mut file = OpenOptions::new();
    let file = file.write(true).create_new(true).mode(0o644).open(&new).map_err(about(&new))?;
    std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).map_err(about(&new))?;
    io::Write::write_all(&mut &file, text.as_bytes()).and_then(|()| file.sync_all()).map_err(about(&new))?;
    fs::rename(&new, &path).map_err(about(&path))?;
    File::open(&vm.dir).and_then(|dir| dir.sync_all()).map_err(about(&vm.dir))
}
