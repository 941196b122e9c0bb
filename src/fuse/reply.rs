//! Attributes as the kernel wants them, and log lines that a guest can cause, at a bounded rate.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo};
use parking_lot::Mutex;

use super::{Node, Ownership, Waiters};
use crate::format::record::{BaseRecord, Validator};
use crate::io::sys;
use crate::store::Attributes;

fn time(ns: i64) -> SystemTime {
    let distance = Duration::from_nanos(ns.unsigned_abs());
    if ns < 0 { SystemTime::UNIX_EPOCH - distance } else { SystemTime::UNIX_EPOCH + distance }
}

fn attr(node: Node, kind: FileType, perm: u32, owner: (u32, u32), times: (i64, i64, i64)) -> FileAttr {
    let (created, changed, modified) = times;
    FileAttr {
        ino: INodeNo(node.ino()),
        size: 0,
        blocks: 0,
        atime: time(modified),
        mtime: time(modified),
        ctime: time(changed),
        crtime: time(created),
        kind,
        perm: perm as u16,
        nlink: 1,
        uid: owner.0,
        gid: owner.1,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// One of the directories: entered by anybody, listed by the owner.
pub fn directory(node: Node, owner: &Ownership) -> FileAttr {
    let at = owner.since_ns;
    let mut out = attr(node, FileType::Directory, 0o711, (owner.uid, owner.gid), (at, at, at));
    out.nlink = 2;
    out
}

/// A disk.
pub fn disk(node: Node, a: &Attributes) -> FileAttr {
    let times = (a.created_ns, a.changed_ns, a.modified_ns);
    let mut out = attr(node, FileType::RegularFile, a.mode, (a.uid, a.gid), times);
    out.size = a.size;
    out.blocks = a.allocated.div_ceil(512);
    out.nlink = u32::from(a.linked);
    out
}

/// A base.
pub fn base(node: Node, record: &BaseRecord, owner: &Ownership) -> FileAttr {
    let modified_ns = match record.image.identity.validator {
        Validator::File { mtime_ns, .. } => mtime_ns,
        Validator::Http { .. } => record.created_ns,
    };
    let times = (record.created_ns, record.created_ns, modified_ns);
    let mut out = attr(node, FileType::RegularFile, owner.base_mode, (owner.uid, owner.gid), times);
    out.size = record.size();
    out.blocks = record.size().div_ceil(512);
    out
}

/// One line in 100 ms for each disk or base, so that one that fails all the time hides no other.
const INTERVAL_NS: i64 = 100_000_000;
/// Disks and bases that are kept apart.
const APART: usize = 1024;

fn may_log(ino: u64) -> bool {
    static LAST: Mutex<BTreeMap<u64, i64>> = Mutex::new(BTreeMap::new());
    let now = sys::now_ns();
    let mut last = LAST.lock();
    if last.get(&ino).is_some_and(|last| now - last <= INTERVAL_NS) {
        return false;
    }
    if last.len() >= APART {
        last.retain(|_, last| now - *last <= INTERVAL_NS);
    }
    // So many that fail at a time share what is left.
    last.len() < APART && last.insert(ino, now).is_none_or(|last| now - last > INTERVAL_NS)
}

/// Logs why a request on the disk or base with that inode number ended in an I/O error.
pub fn log_error(ino: u64, error: &dyn Display) {
    if may_log(ino) {
        tracing::error!(%error, "a request failed");
    }
}

/// Logs why a request on a disk ended in an I/O error.
pub fn log_disk_error(ino: u64, disk: &str, operation: &str, error: &dyn Display) {
    if may_log(ino) {
        tracing::error!(disk, operation, %error, "a request failed");
    }
}

/// Logs that a request was refused because too many wait.
pub fn log_refused(ino: u64, waiters: Waiters) {
    if may_log(ino) {
        let (kind, number) = match Node::of(ino) {
            Some(Node::Disk(id)) => ("disk", id),
            Some(Node::Base(id)) => ("base", id),
            _ => ("inode", ino),
        };
        let Waiters { requests, bytes, refused, .. } = waiters;
        tracing::error!(
            kind,
            number,
            waiting = requests,
            bytes,
            refused,
            "a request ends with EIO: too many of its disk wait for the base; see the base's state in `plyfs status`"
        );
    }
}
