//! Changes of a disk that come as one request with many parts: setattr(2) and fallocate(2).

use std::time::SystemTime;

use fuser::{Errno, FileHandle, TimeOrNow};

use super::wait::Stop;
use super::{epoch, fail, fail_disk};
use crate::disk::Grow;
use crate::format::record::MountRequest;
use crate::io::sys;
use crate::store::DiskNode;

pub(super) fn time_ns(time: TimeOrNow) -> i64 {
    match time {
        TimeOrNow::Now => sys::now_ns(),
        TimeOrNow::SpecificTime(at) => match at.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_nanos()).unwrap_or(i64::MAX),
            Err(before) => -i64::try_from(before.duration().as_nanos()).unwrap_or(i64::MAX),
        },
    }
}

/// What setattr(2) changes; `None` stays.
#[derive(Debug, Clone, Copy)]
pub(super) struct Change {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub modified_ns: Option<i64>,
}

impl Change {
    /// Once for each request: when it is sent again, and the size was changed since by another client, that stays.
    pub(super) fn apply(&self, node: &DiskNode, request: MountRequest) -> Result<(), Errno> {
        if let Some(size) = self.size {
            let disk = node.attach().map_err(|e| fail(&e))?;
            disk.resize_for(size, request.token()).map_err(|e| fail_disk(node, "resize", &e).errno())?;
        }
        if self.mode.is_some() || self.uid.is_some() || self.gid.is_some() || self.modified_ns.is_some() {
            if let (Some(at), Ok(disk)) = (self.modified_ns, node.attach()) {
                disk.delta().set_modified_ns(at);
            }
            let update = node.update(|record| {
                record.mode = self.mode.map_or(record.mode, |m| m & 0o7777);
                record.uid = self.uid.unwrap_or(record.uid);
                record.gid = self.gid.unwrap_or(record.gid);
                record.modified_ns = self.modified_ns.unwrap_or(record.modified_ns);
            });
            update.map_err(|e| fail(&e))?;
        }
        Ok(())
    }
}

pub(super) fn allocate(
    node: &DiskNode,
    offset: u64,
    len: u64,
    mode: i32,
    fh: FileHandle,
) -> Result<(), Stop> {
    let disk = node.attach().map_err(|e| fail(&e))?;
    let grow = if mode & libc::FALLOC_FL_KEEP_SIZE != 0 { Grow::No } else { Grow::Yes };
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let done = match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 => disk.allocate(offset, len, grow, epoch(fh)),
        libc::FALLOC_FL_PUNCH_HOLE if mode == punch => disk.zero(offset, len, epoch(fh)),
        libc::FALLOC_FL_ZERO_RANGE => {
            disk.zero(offset, len, epoch(fh)).and_then(|()| disk.grow(offset.saturating_add(len), grow))
        }
        _ => return Err(Errno::EOPNOTSUPP.into()),
    };
    done.map_err(|e| fail_disk(node, "allocate", &e))
}
