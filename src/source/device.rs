//! A base in a block device of this host: a disk, a partition, an LVM volume.
//!
//! A device has no modification time, so a write to it cannot be noticed. What must hold instead:
//! - A device is opened exclusively (O_EXCL): while it is mounted, part of another device, or held by another process, it
//!   is refused; and while a base has it open, none of these can begin (D106). The kernel refuses no plain writer: a
//!   program that opens the device without O_EXCL can change it.
//! - All sources of one process share one such claim, which ends with the last of them.
//! - A device is identified by a name that it keeps across a reboot, and by its size. Where the kernel knows no such
//!   name, by its number.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::open::{OpenImage, Opened};
use super::{KeyParts, SourceError, SourceErrorKind, Verdict};
use crate::format::record::{BaseIdentity, Validator};

/// How long the end of an unknown holder is waited for. The worker before this one may hold the device for a moment more.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(100);
/// Most names of a device, and most bytes of one.
const MOST_NAMES: usize = 16;
const LONGEST_NAME: usize = 400;
/// Most devices between a device and the files below it.
const DEEPEST: usize = 16;

/// What is known of an open device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Its number: major in the upper 32 bits, minor in the lower ones.
    pub number: u64,
    /// The names that it keeps, the most specific one first.
    pub names: Vec<String>,
    /// The kernel's count of disks when this one appeared; 0 when the kernel has none.
    pub sequence: u64,
    /// Whether the descriptor holds the device exclusively.
    pub is_exclusive: bool,
}

/// Where the kernel and udev describe devices.
#[derive(Clone, Debug)]
pub(super) struct Host {
    sys: PathBuf,
    proc: PathBuf,
    udev: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self { sys: "/sys".into(), proc: "/proc/self/mountinfo".into(), udev: "/run/udev/data".into() }
    }
}

/// The number of a device, from its metadata.
fn number_of(rdev: u64) -> u64 {
    u64::from(libc::major(rdev)) << 32 | u64::from(libc::minor(rdev))
}

/// The number of the block device at a path; none of another file.
pub(super) fn number_at(path: &Path) -> Option<u64> {
    let metadata = fs::metadata(path).ok()?;
    metadata.file_type().is_block_device().then(|| number_of(metadata.rdev()))
}

/// Bytes of an open device.
pub(super) fn size_of(mut file: &File) -> io::Result<u64> {
    // Moves the shared offset of the open file, which nothing reads from.
    file.seek(SeekFrom::End(0))
}

/// A file of a directory of the kernel: one line without spaces at its ends. None when it is not there or empty.
fn line(path: PathBuf) -> Option<String> {
    let text = String::from_utf8_lossy(&fs::read(path).ok()?).trim_matches(['\n', ' ', '\0']).to_owned();
    (!text.is_empty() && text.len() <= LONGEST_NAME && !text.contains('\n')).then_some(text)
}

impl Host {
    fn dir(&self, number: u64) -> PathBuf {
        self.sys.join(format!("dev/block/{}:{}", number >> 32, number & 0xffff_ffff))
    }

    /// The directory of the whole disk that a partition is on, and its number there.
    fn whole(&self, number: u64) -> Option<(PathBuf, String)> {
        let dir = self.dir(number);
        let partition = line(dir.join("partition"))?;
        Some((fs::canonicalize(dir).ok()?.parent()?.to_owned(), partition))
    }

    /// See [`Device::names`].
    pub fn names(&self, number: u64) -> Vec<String> {
        let dir = self.dir(number);
        let (disk, part) = match self.whole(number) {
            Some((whole, partition)) => (whole, format!("-part{partition}")),
            None => (dir.clone(), String::new()),
        };
        let mut names = Vec::new();
        for (what, place) in [
            ("dm-uuid", "dm/uuid"),
            ("md-uuid", "md/uuid"),
            ("wwid", "wwid"),
            ("wwid", "device/wwid"),
            ("serial", "serial"),
            ("serial", "device/serial"),
        ] {
            names.extend(line(disk.join(place)).map(|name| format!("{what}:{name}{part}")));
        }
        if let Some(file) = line(disk.join("loop/backing_file")) {
            let offset = line(disk.join("loop/offset")).unwrap_or_default();
            names.push(format!("file:{file}@{offset}{part}"));
        }
        let database = self.udev.join(format!("b{}:{}", number >> 32, number & 0xffff_ffff));
        let links = fs::read_to_string(database).unwrap_or_default();
        let mut links: Vec<&str> =
            links.lines().filter_map(|line| line.strip_prefix("S:disk/by-id/")).collect();
        links.sort_unstable();
        names.extend(
            links.into_iter().filter(|link| link.len() <= LONGEST_NAME).map(|link| format!("by-id:{link}")),
        );
        names.truncate(MOST_NAMES);
        names
    }

    /// See [`Device::sequence`].
    pub fn sequence(&self, number: u64) -> u64 {
        let dir = self.whole(number).map_or_else(|| self.dir(number), |(whole, _)| whole);
        line(dir.join("diskseq")).and_then(|text| text.parse().ok()).unwrap_or(0)
    }

    /// Bytes of a device, without opening it.
    fn size(&self, number: u64) -> Option<u64> {
        line(self.dir(number).join("size"))?.parse::<u64>().ok()?.checked_mul(512)
    }

    /// What holds a device, as far as this process can see it.
    pub fn holder(&self, number: u64) -> Option<String> {
        self.mounted(number)
            .or_else(|| self.part_of(&self.dir(number)))
            .or_else(|| self.by_partition(number))
            .or_else(|| {
                self.part_of(&self.whole(number)?.0).map(|why| format!("its whole disk is in use: {why}"))
            })
    }

    fn mounted(&self, number: u64) -> Option<String> {
        let mounts = fs::read_to_string(&self.proc).ok()?;
        let wanted = format!("{}:{}", number >> 32, number & 0xffff_ffff);
        mounts.lines().find_map(|mount| {
            let fields: Vec<&str> = mount.split(' ').collect();
            let (at, end) = (fields.get(4)?, fields.iter().position(|field| *field == "-")?);
            // Some filesystems have a number of their own and name the device.
            let of_name = || fields.get(end + 2).filter(|name| name.starts_with("/dev/")).map(Path::new);
            let is_it =
                fields.get(2) == Some(&wanted.as_str()) || of_name().and_then(number_at) == Some(number);
            is_it.then(|| format!("it is mounted on {at}"))
        })
    }

    /// Of which other device the one with this directory is a part.
    fn part_of(&self, dir: &Path) -> Option<String> {
        let holder = fs::read_dir(dir.join("holders")).ok()?.flatten().next()?;
        let name = line(holder.path().join("dm/name")).map_or_else(String::new, |name| format!(" ({name})"));
        Some(format!("it is a part of {}{name}", holder.file_name().display()))
    }

    fn by_partition(&self, number: u64) -> Option<String> {
        let dir = self.dir(number);
        fs::read_dir(&dir).ok()?.flatten().find_map(|entry| {
            line(entry.path().join("partition"))?;
            let dev = line(entry.path().join("dev"))?;
            let (major, minor) = dev.split_once(':')?;
            let part = major.parse::<u64>().ok()? << 32 | minor.parse::<u64>().ok()?;
            let why = self.mounted(part).or_else(|| self.part_of(&entry.path()))?;
            Some(format!("its partition {} is in use: {why}", entry.file_name().display()))
        })
    }

    /// The files that a device, or the devices below it, are made of.
    pub fn backing_files(&self, number: u64) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let start = self.whole(number).map_or_else(|| self.dir(number), |(whole, _)| whole);
        let mut left = vec![(start, 0)];
        while let Some((dir, depth)) = left.pop() {
            files.extend(line(dir.join("loop/backing_file")).map(PathBuf::from));
            if depth < DEEPEST {
                let below = fs::read_dir(dir.join("slaves")).into_iter().flatten().flatten();
                left.extend(below.filter_map(|entry| {
                    let dir = fs::canonicalize(entry.path()).ok()?;
                    let whole = dir.parent().filter(|_| dir.join("partition").exists()).map(Path::to_owned);
                    Some((whole.unwrap_or(dir), depth + 1))
                }));
            }
        }
        files
    }

    fn device(&self, number: u64, is_exclusive: bool) -> Device {
        Device { number, names: self.names(number), sequence: self.sequence(number), is_exclusive }
    }
}

/// Whether a device lies on a file below `dir`. Opens nothing.
pub fn lies_below(path: &Path, dir: &Path) -> bool {
    let Some(number) = number_at(path) else { return false };
    Host::default().backing_files(number).iter().any(|file| file.starts_with(dir))
}

/// Opens a device exclusively. One that an unknown holder has is opened plainly: that may be this process.
///
/// # Errors
/// `InUse` when it is known that something else holds it.
pub(super) fn open(
    path: &Path,
    number: u64,
    open: impl Fn(i32) -> io::Result<(File, bool)>,
) -> Result<Opened, SourceError> {
    let fail = |error| SourceError::from_io("open", path, error);
    let host = Host::default();
    match open(libc::O_EXCL) {
        Ok((file, direct)) => Ok(Opened { file, direct, device: Some(host.device(number, true)) }),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            if let Some(why) = host.holder(number) {
                return Err(SourceError::in_use(path, &why));
            }
            let (file, direct) = open(0).map_err(fail)?;
            Ok(Opened { file, direct, device: Some(host.device(number, false)) })
        }
        Err(error) => Err(fail(error)),
    }
}

/// The exclusive descriptors of this process, by the numbers of their devices.
static CLAIMS: Mutex<BTreeMap<u64, Weak<File>>> = Mutex::new(BTreeMap::new());

/// Opens a file through `opener`. The descriptor of a device is the one that holds it exclusively.
///
/// # Errors
/// Of the opener; `InUse` of a device that another process holds.
pub(super) fn open_claimed(opener: &dyn OpenImage, path: &Path) -> Result<(Arc<File>, Opening), SourceError> {
    let until = Instant::now() + PATIENCE;
    loop {
        let Opened { file, direct, device } = opener.open(path)?;
        let Some(device) = device else { return Ok((Arc::new(file), Opening { direct, device: None })) };
        let mut claims = CLAIMS.lock();
        claims.retain(|_, claim| claim.strong_count() > 0);
        if device.is_exclusive {
            let file = Arc::new(file);
            claims.insert(device.number, Arc::downgrade(&file));
            return Ok((file, Opening { direct, device: Some(device) }));
        }
        let claimed = claims.get(&device.number).and_then(Weak::upgrade);
        drop(claims);
        match claimed {
            Some(file) => return Ok((file, Opening { direct, device: Some(device) })),
            None if Instant::now() < until => std::thread::sleep(PAUSE),
            None => {
                let why = format!("another process holds it; find it with: fuser -v {}", path.display());
                return Err(SourceError::in_use(path, &why));
            }
        }
    }
}

/// How a file was opened.
#[derive(Debug)]
pub(super) struct Opening {
    pub direct: bool,
    pub device: Option<Device>,
}

impl Device {
    /// For the record.
    pub(super) fn identity(&self, size: u64) -> BaseIdentity {
        let validator = Validator::Device { number: self.number, names: self.names.clone() };
        BaseIdentity { size, validator, digest: None }
    }
}

/// The identity of the device at a path, without opening it; none of a file that is no device.
///
/// # Errors
/// `Io` when the kernel does not say its size.
pub fn look(path: &Path) -> Option<Result<BaseIdentity, SourceError>> {
    let number = number_at(path)?;
    let host = Host::default();
    let unknown = || {
        let error = io::Error::new(io::ErrorKind::NotFound, "the kernel does not say its size");
        SourceError::from_io("examine", path, error)
    };
    Some(host.size(number).map(|size| host.device(number, false).identity(size)).ok_or_else(unknown))
}

/// See [`compare`](super::compare); none when one of the objects is of another kind.
pub(super) fn compare(registered: &BaseIdentity, found: &BaseIdentity) -> Option<Verdict> {
    let (Validator::Device { number, names }, Validator::Device { number: now, names: found_names }) =
        (&registered.validator, &found.validator)
    else {
        return None;
    };
    Some(match names.first() {
        _ if found.size != registered.size => {
            Verdict::Another(format!("it has {} bytes, not {}", found.size, registered.size))
        }
        Some(name) if found_names.contains(name) => Verdict::Same,
        Some(name) => {
            let is = found_names.first().map_or("has no name that it keeps", |name| name);
            Verdict::Another(format!(
                "it is another device than the one registered: it is not {name}, but {is}"
            ))
        }
        None if now == number => Verdict::Same,
        None => Verdict::Another(format!(
            "it is another device than the one registered: it is {}:{}, not {}:{}",
            now >> 32,
            now & 0xffff_ffff,
            number >> 32,
            number & 0xffff_ffff
        )),
    })
}

/// See [`key_parts`](super::key_parts).
pub(super) fn key_parts(number: u64, names: &[String]) -> KeyParts {
    let parts = vec![number.to_le_bytes().to_vec(), names.join("\n").into_bytes()];
    KeyParts { label: "device", parts, is_strong: false, is_portable: false }
}

impl SourceError {
    /// Of a device that something else holds.
    pub fn in_use(path: &Path, why: &str) -> Self {
        let advice = "a base must not change: unmount it or end what holds it, and keep it for plyfs";
        Self::remote(SourceErrorKind::InUse, "open", path.display().to_string(), why, advice)
    }

    /// Cause of a failure, where the kind alone does not say it.
    pub fn why(&self) -> Option<&str> {
        self.0.detail.as_ref().map(|(why, _)| why.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NUMBER: u64 = 253 << 32 | 3;

    /// A tree of the kernel's files with one device.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Host) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let at = |name: &str| dir.path().join(name);
        let host = Host { sys: at("sys"), proc: at("mountinfo"), udev: at("udev") };
        (dir, host)
    }

    fn device(size: u64, number: u64, names: &[&str]) -> BaseIdentity {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        Device { number, names, sequence: 0, is_exclusive: true }.identity(size)
    }

    #[test]
    fn a_volume_is_known_by_what_stays_after_a_reboot() {
        let (_dir, host) = host(&[
            ("sys/dev/block/253:3/dm/uuid", "LVM-abcDEF\n"),
            ("sys/dev/block/253:3/diskseq", "17\n"),
            (
                "udev/b253:3",
                "S:disk/by-id/dm-uuid-LVM-abcDEF\nS:disk/by-id/dm-name-vg-golden\nE:X=1\nS:vg/golden\n",
            ),
        ]);
        let names = host.names(NUMBER);
        assert_eq!(names, ["dm-uuid:LVM-abcDEF", "by-id:dm-name-vg-golden", "by-id:dm-uuid-LVM-abcDEF"]);
        assert_eq!(host.sequence(NUMBER), 17);
        let registered = device(512, NUMBER, &["dm-uuid:LVM-abcDEF"]);
        // Another number after a reboot, and another volume in its place.
        let found = host.device(NUMBER + 1, true).identity(512);
        assert!(matches!(compare(&registered, &found), Some(Verdict::Another(_))), "its names are not there");
        let moved = device(512, NUMBER + 1, &["dm-uuid:LVM-abcDEF", "by-id:x"]);
        assert_eq!(compare(&registered, &moved), Some(Verdict::Same));
        let other = compare(&registered, &device(512, NUMBER, &["dm-uuid:LVM-xyz"])).unwrap();
        assert!(other.difference().unwrap().contains("not dm-uuid:LVM-abcDEF, but dm-uuid:LVM-xyz"));
        let larger = compare(&registered, &device(1024, NUMBER, &["dm-uuid:LVM-abcDEF"])).unwrap();
        assert!(larger.difference().unwrap().contains("it has 1024 bytes, not 512"));
    }

    #[test]
    fn a_device_without_a_name_is_known_by_its_number() {
        let registered = device(512, NUMBER, &[]);
        assert_eq!(compare(&registered, &device(512, NUMBER, &["serial:x"])), Some(Verdict::Same));
        let other = compare(&registered, &device(512, NUMBER + 1, &[])).unwrap().difference().unwrap();
        assert!(other.contains("it is 253:4, not 253:3"), "{other}");
    }

    #[test]
    fn the_message_says_what_holds_a_device() {
        let (_dir, host) = host(&[
            (
                "mountinfo",
                "36 27 253:3 / /mnt/a\\040b rw - ext4 /dev/x rw\n40 27 0:40 / /b rw - btrfs /nodev rw\n",
            ),
            ("sys/dev/block/253:4/holders/dm-7/dm/name", "vg-snap\n"),
            ("sys/dev/block/8:0/sda1/partition", "1\n"),
            ("sys/dev/block/8:0/sda1/dev", "253:3\n"),
        ]);
        assert_eq!(host.holder(NUMBER).unwrap(), "it is mounted on /mnt/a\\040b");
        assert_eq!(host.holder(NUMBER + 1).unwrap(), "it is a part of dm-7 (vg-snap)");
        let why = host.holder(8 << 32).unwrap();
        assert_eq!(why, "its partition sda1 is in use: it is mounted on /mnt/a\\040b");
        assert_eq!(host.holder(NUMBER + 2), None);
    }

    #[test]
    fn the_files_below_a_device_are_found_through_other_devices() {
        let (dir, host) = host(&[
            ("sys/devices/loop0/loop/backing_file", "/mnt/disks/a.raw\n"),
            ("sys/dev/block/253:3/slaves/none", ""),
        ]);
        fs::remove_file(dir.path().join("sys/dev/block/253:3/slaves/none")).unwrap();
        let below = dir.path().join("sys/devices/loop0");
        std::os::unix::fs::symlink(below, dir.path().join("sys/dev/block/253:3/slaves/loop0")).unwrap();
        assert_eq!(host.backing_files(NUMBER), [Path::new("/mnt/disks/a.raw")]);
    }
}
