//! Attributes and times in the kernel's form, and answers that many requests share.

use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo, ReplyEmpty, TimeOrNow};

use super::{Node, Ownership};
use crate::format::lineage::SnapshotEntry;
use crate::io::sys;
use crate::serve::{self, BaseAttributes};
use crate::store::Attributes;

/// Answers a request whose only result is success.
pub fn answer(done: Result<(), serve::Errno>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno.into()),
    }
}

/// Nanoseconds since the epoch.
pub fn time_ns(time: TimeOrNow) -> i64 {
    match time {
        TimeOrNow::Now => sys::now_ns(),
        TimeOrNow::SpecificTime(at) => match at.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => -i64::try_from(before.duration().as_nanos()).unwrap_or(i64::MAX),
        },
    }
}

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

/// A directory: every user may enter it, and the owner may list it.
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

/// A snapshot: who may read the disk may read it. `owner`: user, group and permissions of the disk.
pub fn snapshot(node: Node, entry: &SnapshotEntry, owner: (u32, u32, u32)) -> FileAttr {
    let (uid, gid, mode) = owner;
    let at = entry.created_ns;
    let mut out = attr(node, FileType::RegularFile, mode & 0o444, (uid, gid), (at, at, at));
    out.size = entry.size;
    // Programs that look for holes only where blocks are missing copy all of it at once.
    out.blocks = entry.size.div_ceil(512);
    out
}

/// A base. Its blocks are what this host has of it, so that `du` and Nova count what it costs here.
pub fn base(node: Node, a: &BaseAttributes, owner: &Ownership) -> FileAttr {
    let times = (a.created_ns, a.changed_ns, a.modified_ns);
    let mut out = attr(node, FileType::RegularFile, owner.base_mode, (owner.uid, owner.gid), times);
    out.size = a.size;
    // Programs such as tar take a file without blocks for one hole, and do not read it.
    out.blocks = a.stored.div_ceil(512).max(u64::from(out.blksize / 512));
    out
}
