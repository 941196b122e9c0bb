//! Which processes have files of a mount open, as far as this user may see: commands that destroy data in use name them.
//!
//! The search asks the mount nothing, so a worker that hangs does not hang it. It reads links in /proc: an open file
//! (`/proc/PID/fd`) is told from a file of the same name elsewhere by the mount that the process opened it on
//! (`/proc/PID/fdinfo`), a mapped file (`/proc/PID/maps`) by its device. Loop devices have no process.
//!
//! Source: proc_pid_fd(5), proc_pid_fdinfo(5), proc_pid_mountinfo(5), proc_pid_maps(5).

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use super::output::printable;
use crate::config::host;

/// Processes that a message names.
const NAMED: usize = 8;
/// What the kernel adds to the path of a file without a name.
const DELETED: &[u8] = b" (deleted)";

/// A FUSE mount of plyfs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    pub point: PathBuf,
    /// `MAJOR:MINOR`.
    device: String,
    /// Only one user can enter it.
    is_private: bool,
    /// The user that mounted it.
    pub owner: Option<u32>,
}

/// A process that has a file open.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Holder {
    /// `None` for a loop device.
    pub pid: Option<u32>,
    /// The name of the process, or of the loop device.
    pub command: String,
}

/// The holders of files, by the path of the file below the mount point (`disks/vm1.raw`).
pub(super) type Holders = BTreeMap<PathBuf, Vec<Holder>>;

/// The mounts of plyfs that this process sees.
pub(super) fn mounts() -> Vec<Mount> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    table.split(|byte| *byte == b'\n').filter_map(mount).collect()
}

/// Whether this user sees every process that can have a file of a mount open. Only root and the daemon's own user get as
/// far as to ask.
pub(super) fn are_all_seen(point: &Path) -> bool {
    host::is_root()
        || mounts().iter().rfind(|mount| mount.point == point).is_some_and(|mount| mount.is_private)
}

/// A line of `mountinfo`, when it is of plyfs.
fn mount(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let device = String::from_utf8(words.nth(2)?.to_vec()).ok()?;
    let point = unescape(words.nth(1)?);
    // Optional fields end with a dash; the type follows.
    let kind = words.skip_while(|word| *word != b"-").nth(1)?;
    let is_private = !line.windows(11).any(|part| part == b"allow_other");
    let owner =
        line.split(|byte| matches!(byte, b' ' | b',')).find_map(|word| word.strip_prefix(b"user_id="));
    let owner = owner.and_then(|uid| std::str::from_utf8(uid).ok()?.parse().ok());
    (kind == b"fuse.plyfs").then(|| Mount {
        point: PathBuf::from(OsString::from_vec(point)),
        device,
        is_private,
        owner,
    })
}

/// Undoes the escapes of `mountinfo`: blanks, tabs, newlines and backslashes are a backslash and three octal digits.
pub(super) fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) = (first, tail) {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

/// The holders of all disks and bases of the mount on `point`. None when nothing is mounted there.
pub(super) fn of_mount(point: &Path) -> Holders {
    // The table has real paths. The mount point itself is not looked at, because its daemon may hang.
    let parent = point.parent().and_then(|parent| parent.canonicalize().ok());
    let real = parent.zip(point.file_name()).map(|(parent, name)| parent.join(name));
    let point = real.as_deref().unwrap_or(point);
    let Some(mount) = mounts().into_iter().rfind(|mount| mount.point == point) else { return Holders::new() };
    let mut found: BTreeMap<PathBuf, BTreeSet<u32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        for file in opened(pid, &mount).into_iter().chain(mapped(pid, &mount)) {
            found.entry(file).or_default().insert(pid);
        }
    }
    let command = |pid| {
        let name = fs::read(format!("/proc/{pid}/comm")).unwrap_or_default();
        printable(String::from_utf8_lossy(name.trim_ascii_end()).as_ref())
    };
    let holder = |pid| Holder { pid: Some(pid), command: command(pid) };
    let mut holders: Holders =
        found.into_iter().map(|(file, pids)| (file, pids.into_iter().map(holder).collect())).collect();
    for (file, device) in loops(point) {
        holders.entry(file).or_default().push(Holder { pid: None, command: device });
    }
    holders
}

/// The file of a mount that a path leads to: its last two parts.
fn file_of(path: &[u8]) -> Option<PathBuf> {
    let path = Path::new(OsStr::from_bytes(path.strip_suffix(DELETED).unwrap_or(path)));
    let dir = path.parent()?.file_name()?;
    let is_ours = (dir == "disks" || dir == "bases") && path.extension().is_some_and(|end| end == "raw");
    is_ours.then(|| Path::new(dir).join(path.file_name().unwrap_or_default()))
}

/// The files of the mount that a process has open.
fn opened(pid: u32, mount: &Mount) -> BTreeSet<PathBuf> {
    let mut files = BTreeSet::new();
    let mut table = None;
    for fd in fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten() {
        let Ok(link) = fs::read_link(fd.path()) else { continue };
        let Some(file) = file_of(link.as_os_str().as_bytes()) else { continue };
        let info = fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().to_string_lossy()));
        let id = info.ok().and_then(|info| {
            info.lines().find_map(|line| Some(line.strip_prefix("mnt_id:")?.trim().to_owned()))
        });
        // A process may have a mount namespace of its own.
        let table = table
            .get_or_insert_with(|| fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default());
        if id.is_some_and(|id| has_device(table, &id, &mount.device)) {
            files.insert(file);
        }
    }
    files
}

/// Whether the mount of that number is of that device.
fn has_device(table: &str, id: &str, device: &str) -> bool {
    table.lines().any(|line| {
        let mut words = line.split(' ');
        words.next() == Some(id) && words.nth(1) == Some(device)
    })
}

/// The files of the mount that a process has mapped.
fn mapped(pid: u32, mount: &Mount) -> BTreeSet<PathBuf> {
    let maps = fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
    let of = |line: &[u8]| {
        // Range, rights, offset, device, inode, path; the path is aligned with blanks.
        let mut words = line.splitn(6, |byte| *byte == b' ');
        let device = words.nth(3)?;
        (decimal(device)? == mount.device).then(|| file_of(words.nth(1)?.trim_ascii_start())).flatten()
    };
    maps.split(|byte| *byte == b'\n').filter_map(of).collect()
}

/// `maps` has device numbers in hexadecimal, `mountinfo` in decimal.
fn decimal(device: &[u8]) -> Option<String> {
    let (major, minor) = std::str::from_utf8(device).ok()?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    Some(format!("{}:{}", number(major)?, number(minor)?))
}

/// Loop devices on files of the mount, each with its file.
fn loops(point: &Path) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(path) = fs::read(device.path().join("loop/backing_file")) else { continue };
        let path = path.trim_ascii_end();
        if Path::new(OsStr::from_bytes(path)).starts_with(point)
            && let Some(file) = file_of(path)
        {
            found.push((file, format!("/dev/{}", device.file_name().to_string_lossy())));
        }
    }
    found
}

/// Holders as a message names them.
pub(super) fn names(holders: &[Holder]) -> String {
    let one = |holder: &Holder| match holder.pid {
        Some(pid) => format!("{} (pid {pid})", holder.command),
        None => holder.command.clone(),
    };
    let more = holders.len().saturating_sub(NAMED);
    let named = holders.iter().take(NAMED).map(one).collect::<Vec<_>>().join(", ");
    if more > 0 { format!("{named} and {more} more") } else { named }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_mount_are_told_by_their_last_parts() {
        let of = |path: &str| file_of(path.as_bytes());
        assert_eq!(of("/mnt/vm/disks/vm1.raw"), Some("disks/vm1.raw".into()));
        assert_eq!(of("/mnt/vm/disks/vm1.raw (deleted)"), Some("disks/vm1.raw".into()));
        assert_eq!(of("/bases/debian.raw"), Some("bases/debian.raw".into()), "in another namespace");
        for other in ["/mnt/vm/disks", "/mnt/vm/disks/vm1", "/images/debian.raw", "socket:[7]", ""] {
            assert_eq!(of(other), None, "{other}");
        }
    }

    #[test]
    fn devices_and_mounts_are_parsed() {
        assert_eq!(decimal(b"00:3a").as_deref(), Some("0:58"));
        assert_eq!(decimal(b"x"), None);
        let line =
            b"41 22 0:40 / /srv/a\\040b/mnt rw,nosuid shared:7 - fuse.plyfs plyfs rw,user_id=7,group_id=8";
        let (point, device) = ("/srv/a b/mnt".into(), "0:40".into());
        let expected = Mount { point, device, is_private: true, owner: Some(7) };
        assert_eq!(mount(line), Some(expected));
        assert_eq!(mount(b"42 22 0:41 / /srv rw - tmpfs tmpfs rw"), None);
        let table = "41 22 0:40 / /mnt rw - fuse.plyfs plyfs rw\n42 22 0:41 / /srv rw - tmpfs tmpfs rw\n";
        assert!(has_device(table, "41", "0:40") && !has_device(table, "42", "0:40"));
    }

    #[test]
    fn a_message_names_some_of_many_holders() {
        let holder = |pid| Holder { pid: Some(pid), command: "qemu".into() };
        let all: Vec<Holder> = (1..=10).map(holder).collect();
        assert_eq!(names(&all[..2]), "qemu (pid 1), qemu (pid 2)");
        assert!(names(&all).ends_with("qemu (pid 8) and 2 more"));
    }
}
