//! Decodes each request of the kernel, passes it to `serve`, and encodes the answer.

use std::ffi::OsStr;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo,
    IoctlFlags, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::kernel::MAX_WRITE;
use super::reply::{answer, time_ns};
use super::{Node, PlyFs, SUFFIX, TTL, disk_of, handle_of, reply, strip, target_of};
use crate::disk::{Grow, Seek};
use crate::serve::{
    self, AttributeChange, BaseAttributes, CopyRequest, CreatedDisk, RefusedName, Requester, SpaceChange,
    Target, WriteRequest,
};
use crate::store::{Attributes, Replace};

/// The most bytes that the answer to one copy can count, in pages. The kernel asks for no more.
const MOST_COPIED: u64 = u32::MAX as u64 & !4095;

/// The change of space that a mode of fallocate(2) asks for; `None` for a mode that is not supported.
fn allocate_of(mode: i32) -> Option<SpaceChange> {
    let grow = if mode & libc::FALLOC_FL_KEEP_SIZE != 0 { Grow::No } else { Grow::Yes };
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 => Some(SpaceChange::Reserve(grow)),
        libc::FALLOC_FL_PUNCH_HOLE if mode == punch => Some(SpaceChange::Discard),
        libc::FALLOC_FL_ZERO_RANGE => Some(SpaceChange::Zero(grow)),
        _ => None,
    }
}

impl Filesystem for PlyFs {
    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let answer = move |done: Result<FileAttr, Errno>| match done {
            Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
            Err(errno) => reply.error(errno),
        };
        match self.find(parent, name) {
            Ok(node) => self.attributes_of(req, node, answer),
            Err(errno) => answer(Err(errno)),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, _nlookup: u64) {
        // The kernel does not use the inode any more.
        match Node::of(ino.0) {
            Some(Node::Disk(disk)) => self.service.forgotten(disk),
            Some(Node::Base(base)) => self.service.forgotten_base(base),
            _ => {}
        }
    }

    fn getattr(&self, req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        let answer = move |done: Result<FileAttr, Errno>| match done {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(errno) => reply.error(errno),
        };
        match Node::of(ino.0) {
            Some(node) => self.attributes_of(req, node, answer),
            None => answer(Err(Errno::ESTALE)),
        }
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = AttributeChange { mode, uid, gid, size, modified_ns: mtime.map(time_ns) };
        let (node, id) = match Node::of(ino.0) {
            Some(node @ Node::Disk(id)) => (node, id),
            // The kernel has checked that the caller may set times.
            Some(node @ Node::Base(id))
                if (change.modified_ns.is_some() || atime.is_some())
                    && (mode, uid, gid, size) == (None, None, None, None) =>
            {
                let owner = self.owner;
                let answer = move |done: Result<BaseAttributes, serve::Errno>| match done {
                    Ok(found) => reply.attr(&TTL, &reply::base(node, &found, &owner)),
                    Err(errno) => reply.error(errno.into()),
                };
                return self.service.set_time_of_base(id, change.modified_ns, answer);
            }
            Some(Node::Base(_) | Node::Snapshot(_)) => return reply.error(Errno::EROFS),
            _ => return reply.error(Errno::EPERM),
        };
        let answer = move |done: Result<Attributes, serve::Errno>| match done {
            Ok(found) => reply.attr(&TTL, &reply::disk(node, &found)),
            Err(errno) => reply.error(errno.into()),
        };
        self.service.change(self.call_of(req), self.requester(req), id, change, answer);
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        if mode & libc::S_IFMT != libc::S_IFREG {
            return reply.error(Errno::EPERM);
        }
        let name = match self.name_of_new(req, parent, name) {
            Ok(name) => name,
            Err(errno) => return reply.error(errno),
        };
        self.service.create(self.requester(req), name, mode, move |made| match made {
            Ok(CreatedDisk { disk, attributes }) => {
                reply.entry(&TTL, &reply::disk(Node::Disk(disk), &attributes), Generation(0));
            }
            Err(errno) => reply.error(errno.into()),
        });
    }

    fn mkdir(&self, req: &Request, _: INodeNo, name: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(self.refuse_name(req, RefusedName::Directory, name));
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        if Node::of(parent.0) != Some(Node::Disks) {
            return reply.error(Errno::EPERM);
        }
        // No disk has an empty name.
        let name = name.to_string_lossy().strip_suffix(SUFFIX).unwrap_or_default().to_owned();
        self.service.unlink(self.requester(req), name, |done| answer(done, reply));
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let in_disks = |ino: INodeNo| Node::of(ino.0) == Some(Node::Disks);
        if !in_disks(parent) || !in_disks(newparent) {
            return reply.error(Errno::EPERM);
        }
        let over = match flags.bits() {
            0 => Replace::Yes,
            bits if bits == libc::RENAME_NOREPLACE => Replace::No,
            _ => return reply.error(Errno::EINVAL),
        };
        let Some(from) = strip(name).map(str::to_owned) else { return reply.error(Errno::EINVAL) };
        let to = match self.name_of_new(req, newparent, newname) {
            Ok(to) => to,
            Err(errno) => return reply.error(errno),
        };
        self.service.rename(self.requester(req), from, to, over, |done| answer(done, reply));
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let target = match Node::of(ino.0) {
            Some(Node::Disk(id)) => Target::Disk(id),
            Some(Node::Base(_) | Node::Snapshot(_)) if flags.acc_mode() != OpenAccMode::O_RDONLY => {
                return reply.error(Errno::EROFS);
            }
            Some(Node::Base(id)) => Target::Base(id),
            Some(Node::Snapshot(number)) => Target::Snapshot(number),
            _ => return reply.error(Errno::EISDIR),
        };
        let (call, flags) = (self.call_of(req), self.open_flags());
        if let Target::Base(id) = target {
            self.opened.note(call.thread, id);
        }
        self.service.open(call, target, move |opened| match opened {
            Ok(handle) => reply.opened(FileHandle(handle.number()), flags),
            Err(errno) => reply.error(errno.into()),
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let exclusive = flags & libc::O_EXCL != 0;
        let name = match self.name_of_new(req, parent, name) {
            Ok(name) => name,
            Err(errno) => return reply.error(errno),
        };
        let requester = Requester { exclusive, ..self.requester(req) };
        let flags = self.open_flags();
        self.service.create_open(requester, name, mode, move |made| match made {
            Ok((CreatedDisk { disk, attributes }, handle)) => {
                let attr = reply::disk(Node::Disk(disk), &attributes);
                let fh = FileHandle(handle.number());
                reply.created(&TTL, &attr, Generation(0), fh, flags);
            }
            Err(errno) => reply.error(errno.into()),
        });
    }

    fn read(
        &self,
        req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let target = match target_of(ino) {
            Ok(target) => target,
            Err(errno) => return reply.error(errno),
        };
        let answer = move |done: Result<&[u8], serve::Errno>| match done {
            Ok(bytes) => reply.data(bytes),
            Err(errno) => reply.error(errno.into()),
        };
        self.service.read(self.call_of(req), target, offset, size.min(MAX_WRITE) as usize, answer);
    }

    fn write(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let disk = match disk_of(ino) {
            Ok(disk) => disk,
            Err(errno) => return reply.error(errno),
        };
        let written = WriteRequest { offset, handle: handle_of(fh), durable: flags.0 & libc::O_DSYNC != 0 };
        let len = data.len() as u32;
        self.service.write(self.call_of(req), disk, written, data, move |done| match done {
            Ok(()) => reply.written(len),
            Err(errno) => reply.error(errno.into()),
        });
    }

    fn release(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // The kernel keeps the inode until it has the answer, and may let go of it after that.
        reply.ok();
        match Node::of(ino.0) {
            Some(Node::Disk(disk)) => self.service.closed(disk),
            Some(Node::Base(base)) => self.service.closed_base(base),
            _ => {}
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // close(2) promises nothing. After this answer the kernel does not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, req: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let Some(Node::Disk(id)) = Node::of(ino.0) else { return reply.ok() };
        self.service.flush(self.call_of(req), id, handle_of(fh), |done| answer(done, reply));
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Names are durable when the call that made them returns.
        reply.ok();
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(dir @ (Node::Root | Node::Disks | Node::Bases | Node::Snapshots)) = Node::of(ino.0) else {
            return reply.error(Errno::ENOTDIR);
        };
        // The cookie of an entry is its number plus 2, so removals do not move other entries.
        let mut full = false;
        for (at, name) in [(1, "."), (2, "..")] {
            let node = if at == 1 { dir } else { Node::Root };
            full = full || (offset < at && reply.add(INodeNo(node.ino()), at, FileType::Directory, name));
        }
        let after = offset.saturating_sub(2);
        if !full {
            match dir {
                Node::Root => {
                    let dirs = [
                        (1, Node::Disks, "disks"),
                        (2, Node::Bases, "bases"),
                        (3, Node::Snapshots, "snapshots"),
                    ];
                    for (id, node, name) in dirs {
                        full = full
                            || (after < id
                                && reply.add(INodeNo(node.ino()), id + 2, FileType::Directory, name));
                    }
                }
                Node::Disks => {
                    let mut after = after;
                    while !full {
                        let disks = self.service.store().next_disks(after);
                        let Some(last) = disks.last() else { break };
                        after = last.id();
                        full = disks.iter().any(|disk| {
                            let (ino, name) = (Node::Disk(disk.id()).ino(), disk.name() + SUFFIX);
                            reply.add(INodeNo(ino), disk.id() + 2, FileType::RegularFile, name)
                        });
                    }
                }
                Node::Snapshots => {
                    self.service.store().each_snapshot_after(after, |disk, snapshot| {
                        let (id, name) = (snapshot.number, format!("{disk}@{}{SUFFIX}", snapshot.name));
                        !reply.add(INodeNo(Node::Snapshot(id).ino()), id + 2, FileType::RegularFile, name)
                    });
                }
                _ => {
                    for base in self.service.store().bases().iter().filter(|b| b.id() > after) {
                        let (id, name) = (base.id(), base.record().name.clone() + SUFFIX);
                        if reply.add(INodeNo(Node::Base(id).ino()), id + 2, FileType::RegularFile, name) {
                            break;
                        }
                    }
                }
            }
        }
        reply.ok();
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        self.service.space(move |found| match found {
            Ok(s) => {
                reply.statfs(s.total / 4096, s.free / 4096, s.available / 4096, 0, 0, 4096, 132, 4096);
            }
            Err(errno) => reply.error(errno.into()),
        });
    }

    fn fallocate(
        &self,
        req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let disk = match disk_of(ino) {
            Ok(disk) => disk,
            Err(errno) => return reply.error(errno),
        };
        let Some(what) = allocate_of(mode) else { return reply.error(Errno::EOPNOTSUPP) };
        let (call, range) = (self.call_of(req), (offset, length));
        self.service.allocate(call, disk, what, range, handle_of(fh), |done| answer(done, reply));
    }

    fn lseek(&self, req: &Request, ino: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(from) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let Ok(target) = target_of(ino) else { return reply.error(Errno::EINVAL) };
        self.service.seek(self.call_of(req), target, from, what, move |found| match found {
            Ok(Some(at)) => reply.offset(at as i64),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(errno) => reply.error(errno.into()),
        });
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        // After this answer the kernel stops asking before every write.
        reply.error(Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(Errno::ENOSYS);
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::ENOSYS);
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn copy_file_range(
        &self,
        req: &Request,
        ino: INodeNo,
        _: FileHandle,
        from: u64,
        to: INodeNo,
        fh: FileHandle,
        at: u64,
        len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (source, to) = match (target_of(ino), disk_of(to)) {
            (Ok(source), Ok(to)) => (source, to),
            (Err(errno), _) | (_, Err(errno)) => return reply.error(errno),
        };
        let cut = len.min(MOST_COPIED);
        let is_cut = len >= MOST_COPIED;
        let request = CopyRequest { source, from, to, at, len: cut, is_cut, handle: handle_of(fh) };
        self.service.copy(self.call_of(req), request, move |done| match done {
            Ok(bytes) => reply.written(bytes as u32),
            Err(errno) => reply.error(errno.into()),
        });
    }
}
