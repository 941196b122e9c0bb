//! Names that cannot be made in the mount: a line of the log says what to do instead.
//!
//! A program that writes a temporary file beside the file that it replaces gets an error number, and often shows the
//! number alone. The pattern of the name tells which program it was.
//!
//! What must hold: a user cannot fill the log. Each kind of name has one line in [`INTERVAL`].

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Service;
use crate::format::valid_name;

/// Shortest time between two lines about one kind of name.
const INTERVAL: Duration = Duration::from_secs(600);

/// What the caller wanted to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefusedName {
    /// A file in `disks/`, or a disk of this name.
    Disk,
    /// A directory.
    Directory,
    /// A file outside of `disks/`.
    Elsewhere,
}

/// A kind of name, which has its own remedy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Rsync,
    Sed,
    /// Begins with the name of a disk.
    OfDisk,
    Image,
    Other,
    Directory,
    Elsewhere,
}

/// Ends of the names of images in formats that a disk never has.
const IMAGES: [&str; 8] = [".qcow2", ".vmdk", ".vdi", ".vhd", ".vhdx", ".img", ".iso", ".ova"];

/// What `mkstemp` and its relatives append, without the dot that some put before it.
fn ends_at_random(name: &str) -> Option<&str> {
    let at = name.len().checked_sub(6).filter(|at| name.is_char_boundary(*at))?;
    let (begin, random) = name.split_at(at);
    random.bytes().all(|byte| byte.is_ascii_alphanumeric()).then_some(begin)
}

impl Kind {
    fn of(wanted: RefusedName, name: &str, is_disk: impl Fn(&str) -> bool) -> Self {
        match wanted {
            RefusedName::Directory => return Self::Directory,
            RefusedName::Elsewhere => return Self::Elsewhere,
            RefusedName::Disk => {}
        }
        let temporary = ends_at_random(name);
        if name.starts_with('.') && temporary.is_some_and(|begin| begin.len() > 1 && begin.ends_with('.')) {
            return Self::Rsync;
        }
        if temporary == Some("sed") {
            return Self::Sed;
        }
        if IMAGES.iter().any(|end| name.ends_with(end)) {
            return Self::Image;
        }
        let mut stems = name.match_indices('.').map(|(at, _)| &name[..at]);
        if stems.any(|stem| valid_name(stem) && is_disk(stem)) {
            return Self::OfDisk;
        }
        Self::Other
    }

    /// The cause and the remedy.
    fn advice(self) -> &'static str {
        match self {
            Self::Rsync => {
                "only disks, named NAME.raw, can be made in disks/, and rsync makes a temporary file first; use rsync \
                 --inplace"
            }
            Self::Sed => {
                "only disks, named NAME.raw, can be made in disks/, and sed -i makes a temporary file first; write \
                 into the disk, such as with dd conv=notrunc"
            }
            Self::OfDisk => {
                "only disks, named NAME.raw, can be made in disks/; give the snapshot, backup or temporary file of a \
                 disk a path outside of the mount, such as with virsh snapshot-create-as --diskspec vda,file=PATH"
            }
            Self::Image => {
                "only disks, named NAME.raw, can be made in disks/; to start disks from an image: plyfs base add NAME \
                 FILE; to copy it into a disk: qemu-img convert -O raw FILE NAME.raw"
            }
            Self::Other => {
                "only disks, named NAME.raw, can be made in disks/; give the disk such a name, or make the file in \
                 another directory"
            }
            Self::Directory => "the mount has no other directories; make the directory elsewhere",
            Self::Elsewhere => {
                "files can be made in disks/ only; to register an image: plyfs base add NAME FILE-OR-URL"
            }
        }
    }
}

/// When each kind was last logged.
static LOGGED: Mutex<Vec<(Kind, Instant)>> = Mutex::new(Vec::new());

fn may_log(logged: &mut Vec<(Kind, Instant)>, kind: Kind, now: Instant) -> bool {
    logged.retain(|(_, at)| now.saturating_duration_since(*at) < INTERVAL);
    let is_due = logged.iter().all(|(other, _)| *other != kind);
    if is_due {
        logged.push((kind, now));
    }
    is_due
}

impl Service {
    /// Notes that a name was refused. `name` is that of the file, `uid` that of the caller.
    pub fn refused_name(&self, wanted: RefusedName, name: &str, uid: u32) {
        let kind = Kind::of(wanted, name, |disk| self.store.disk(disk).is_ok());
        if may_log(&mut LOGGED.lock(), kind, Instant::now()) {
            let advice = kind.advice();
            tracing::warn!(name, uid, "a name in the mount is refused: {advice}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(name: &str) -> Kind {
        Kind::of(RefusedName::Disk, name, |disk| disk == "vm1" || disk == "web.1")
    }

    #[test]
    fn the_pattern_of_a_name_tells_what_made_it() {
        for (name, expected) in [
            (".vm1.raw.Ab12Cd", Kind::Rsync),
            (".new.raw.zzzzzz", Kind::Rsync),
            ("sedQ1w2E3", Kind::Sed),
            ("vm1.snapshot-1", Kind::OfDisk),
            ("vm1.raw.1638471234", Kind::OfDisk),
            ("web.1.backup", Kind::OfDisk),
            ("vm1.qcow2", Kind::Image),
            ("debian.iso", Kind::Image),
            ("vm2.snapshot", Kind::Other),
            ("ééé", Kind::Other),
            ("", Kind::Other),
            (".Ab12Cd", Kind::Other),
        ] {
            assert_eq!(kind(name), expected, "{name}");
        }
        assert_eq!(Kind::of(RefusedName::Directory, "images", |_| false), Kind::Directory);
        assert_eq!(Kind::of(RefusedName::Elsewhere, "a.raw", |_| false), Kind::Elsewhere);
    }

    #[test]
    fn each_kind_is_logged_once_in_an_interval() {
        let (mut logged, start) = (Vec::new(), Instant::now());
        assert!(may_log(&mut logged, Kind::Sed, start));
        assert!(may_log(&mut logged, Kind::Rsync, start), "another kind");
        assert!(!may_log(&mut logged, Kind::Sed, start + INTERVAL / 2));
        assert!(may_log(&mut logged, Kind::Sed, start + INTERVAL));
        assert_eq!(logged.len(), 1, "old entries do not stay");
    }
}
