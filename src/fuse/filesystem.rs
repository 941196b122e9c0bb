//! The kernel's requests, one by one: decoded, sent to where they may wait, answered.

use std::ffi::OsStr;
use std::time::SystemTime;

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType, Filesystem, Generation, INodeNo,
    IoctlFlags, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};

use super::change::{Change, allocate, time_ns};
use super::data::{Written, read_ends};
use super::guard::{self, guarded};
use super::pool::Lane;
use super::wait::{Attempt, Kind};
use super::{
    Asker, Node, PlyFs, SUFFIX, TTL, answer, call_of, epoch, fail, fail_base, fail_disk, os_error, reply,
    strip,
};
use crate::disk::Seek;
use crate::store::{Replace, StoreError};

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
        // The kernel has let go of the inode: a disk without a name has no user any more.
        if let Ok(node) = self.disk(ino)
            && node.is_unlinked()
        {
            self.shared.pool.spawn(Lane::Purge, {
                let fs = self.clone();
                move || {
                    // Another FORGET may have come late; only the kernel knows whether it has the inode now.
                    let gone = fs.shared.notifier.refresh(ino.0);
                    if matches!(gone, Ok(false))
                        && let Err(error) = fs.store().purge(node.id())
                    {
                        reply::log_error(ino.0, &error);
                    }
                }
            });
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
        _atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        _fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let change = Change { mode, uid, gid, size, modified_ns: mtime.map(time_ns) };
        let Asker { resent, request, .. } = self.asker(req);
        let call = call_of(req);
        let (node, id) = match Node::of(ino.0) {
            Some(node @ Node::Disk(id)) => (node, id),
            Some(Node::Base(_)) => return reply.error(Errno::EROFS),
            _ => return reply.error(Errno::EPERM),
        };
        let apply = move |fs: &PlyFs, reply: ReplyAttr| {
            let done = guard::once(resent, || {
                fs.disk(ino).and_then(|disk| change.apply(&disk, request)).and_then(|()| fs.attributes(node))
            });
            match done {
                Ok(attr) => reply.attr(&TTL, &attr),
                Err(errno) => reply.error(errno),
            }
        };
        if size.is_none() && !self.is_attached(node) {
            // The record of a disk whose base cannot be opened can be changed all the same.
            return self.change_in(self.attach_lane(node), reply, ReplyAttr::error, apply);
        }
        self.when_attached(call, node, reply, ReplyAttr::error, move |fs, reply| {
            fs.change(Lane::Disk(id), reply, ReplyAttr::error, apply);
        });
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
        let (asker, name) = (self.asker(req), name.to_string_lossy().into_owned());
        self.change_names(reply, ReplyEntry::error, move |fs, reply| {
            let made = guard::once(asker.resent, || fs.make(&asker, parent, &name, mode))
                .and_then(|d| fs.attributes(Node::Disk(d.id())));
            match made {
                Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (asker, name) = (self.asker(req), name.to_string_lossy().into_owned());
        if Node::of(parent.0) != Some(Node::Disks) {
            return reply.error(Errno::EPERM);
        }
        self.change_names(reply, ReplyEmpty::error, move |fs, reply| {
            let unlink = || {
                if fs.done_before(&asker).is_some() {
                    return Ok(());
                }
                let name = name.strip_suffix(SUFFIX).unwrap_or_default();
                match fs.store().unlink_for(name, Some(asker.request)) {
                    Ok(_) => Ok(()),
                    // Of a worker of a version that did not note its requests.
                    Err(StoreError::NotFound { .. }) if asker.resent => Ok(()),
                    Err(error) => Err(fail(&error)),
                }
            };
            answer(guard::once(asker.resent, unlink), reply);
        });
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
        let asker = self.asker(req);
        let in_disks = |ino: INodeNo| Node::of(ino.0) == Some(Node::Disks);
        if !in_disks(parent) || !in_disks(newparent) {
            return reply.error(Errno::EPERM);
        }
        let over = match flags.bits() {
            0 => Replace::Yes,
            bits if bits == libc::RENAME_NOREPLACE => Replace::No,
            _ => return reply.error(Errno::EINVAL),
        };
        let (Some(from), Some(to)) = (strip(name), strip(newname)) else { return reply.error(Errno::EINVAL) };
        let (from, to) = (from.to_owned(), to.to_owned());
        self.change_names(reply, ReplyEmpty::error, move |fs, reply| {
            let rename = || {
                if fs.done_before(&asker).is_some() {
                    return Ok(());
                }
                match fs.store().rename_for(&from, &to, over, Some(asker.request)) {
                    Ok(_) => Ok(()),
                    // Of a worker of a version that did not note its requests.
                    Err(StoreError::NotFound { .. }) if asker.resent && fs.store().disk(&to).is_ok() => {
                        Ok(())
                    }
                    Err(error) => Err(fail(&error)),
                }
            };
            answer(guard::once(asker.resent, rename), reply);
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let node = match Node::of(ino.0) {
            Some(node @ Node::Disk(_)) => node,
            Some(Node::Base(_)) if flags.acc_mode() != OpenAccMode::O_RDONLY => {
                return reply.error(Errno::EROFS);
            }
            Some(node @ Node::Base(_)) => node,
            _ => return reply.error(Errno::EISDIR),
        };
        self.when_attached(call_of(req), node, reply, ReplyOpen::error, move |fs, reply| {
            let opened = match node {
                Node::Disk(_) => fs.disk(ino).and_then(|node| Self::open_disk(&node)),
                _ => Ok(FileHandle(0)),
            };
            match opened {
                Ok(fh) => reply.opened(fh, Self::open_flags()),
                Err(errno) => reply.error(errno),
            }
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
        let (asker, name) = (Asker { exclusive, ..self.asker(req) }, name.to_string_lossy().into_owned());
        self.change_names(reply, ReplyCreate::error, move |fs, reply| {
            let made = guard::once(asker.resent, || fs.make(&asker, parent, &name, mode)).and_then(|node| {
                let fh = Self::open_disk(&node)?;
                Ok((fs.attributes(Node::Disk(node.id()))?, fh))
            });
            match made {
                Ok((attr, fh)) => reply.created(&TTL, &attr, Generation(0), fh, Self::open_flags()),
                Err(errno) => reply.error(errno),
            }
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
        match Node::of(ino.0) {
            Some(node) => self.read_file(call_of(req), node, offset, size, reply),
            None => reply.error(Errno::ESTALE),
        }
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
        self.write_file(call_of(req), ino, Written { offset, fh, flags }, data, reply);
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
        if let Ok(node) = self.disk(ino) {
            node.closed();
        }
        reply.ok();
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // close(2) promises nothing; the kernel need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, req: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let Some(node @ Node::Disk(id)) = Node::of(ino.0) else { return reply.ok() };
        self.when_attached(call_of(req), node, reply, ReplyEmpty::error, move |fs, reply| {
            // It waits for the disk in any case, and encoding a large map takes a processor for seconds.
            fs.change_in(Lane::Sync(id), reply, ReplyEmpty::error, move |fs, reply| {
                let done: Result<(), Errno> = guarded(|| {
                    let node = fs.disk(ino)?;
                    let disk = node.attach().map_err(|e| fail(&e))?;
                    disk.flush(epoch(fh)).map_err(|e| fail_disk(&node, "flush", &e).errno())
                });
                answer(done, reply);
            });
        });
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Names are durable when the call that made them returns.
        reply.ok();
    }

    fn readdir(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let Some(dir @ (Node::Root | Node::Disks | Node::Bases)) = Node::of(ino.0) else {
            return reply.error(Errno::ENOTDIR);
        };
        // The cookie of an entry is its number plus 2, so that removals move nothing.
        let mut full = false;
        for (at, name) in [(1, "."), (2, "..")] {
            let node = if at == 1 { dir } else { Node::Root };
            full = full || (offset < at && reply.add(INodeNo(node.ino()), at, FileType::Directory, name));
        }
        let after = offset.saturating_sub(2);
        if !full {
            match dir {
                Node::Root => {
                    for (id, node, name) in [(1, Node::Disks, "disks"), (2, Node::Bases, "bases")] {
                        full = full
                            || (after < id
                                && reply.add(INodeNo(node.ino()), id + 2, FileType::Directory, name));
                    }
                }
                Node::Disks => {
                    for disk in self.store().disks_after(after) {
                        let (id, name) = (disk.id(), disk.name() + SUFFIX);
                        if reply.add(INodeNo(Node::Disk(id).ino()), id + 2, FileType::RegularFile, name) {
                            break;
                        }
                    }
                }
                _ => {
                    for base in self.store().bases().iter().filter(|b| b.id() > after) {
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
        self.run(Lane::Space, move |fs| match fs.store().space() {
            Ok(s) => {
                reply.statfs(s.total / 4096, s.free / 4096, s.available / 4096, 0, 0, 4096, 132, 4096);
            }
            Err(error) => reply.error(os_error(error.raw_os_error().unwrap_or(libc::EIO))),
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
        let node = match self.disk(ino) {
            Ok(node) => Node::Disk(node.id()),
            Err(errno) => return reply.error(errno),
        };
        let call = call_of(req);
        self.when_attached(call, node, reply, ReplyEmpty::error, move |fs, reply| {
            let work = move |fs: &PlyFs| allocate(&*fs.disk(ino)?, offset, length, mode, fh);
            let origin = fs.origin(call, node, 0);
            let attempt = Attempt::new(origin, Kind::Changes, work, move |done| answer(done, reply));
            fs.submit(attempt.prepared_by(move |fs| read_ends(fs, ino, offset, length)), fs.place(node));
        });
    }

    fn lseek(&self, req: &Request, ino: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let what = match whence {
            libc::SEEK_DATA => Seek::Data,
            libc::SEEK_HOLE => Seek::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(from) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        let Some(node) = Node::of(ino.0) else { return reply.error(Errno::EINVAL) };
        let work = move |fs: &PlyFs| match node {
            Node::Disk(_) => {
                let node = fs.disk(ino)?;
                let disk = node.attach().map_err(|e| fail(&e))?;
                disk.seek(from, what).map_err(|e| fail_disk(&node, "seek", &e))
            }
            Node::Base(id) => {
                let base = fs.base_node(id)?.attach().map_err(|e| fail(&e))?;
                let found = match what {
                    _ if from >= base.size() => Ok(None),
                    Seek::Data => base.next_data(from),
                    Seek::Hole => base.next_hole(from).map(Some),
                };
                found.map_err(|error| fail_base(id, &error))
            }
            _ => Err(Errno::EINVAL.into()),
        };
        let call = call_of(req);
        self.when_attached(call, node, reply, ReplyLseek::error, move |fs, reply| {
            let answer = move |found: Result<Option<u64>, Errno>| match found {
                Ok(Some(at)) => reply.offset(at as i64),
                Ok(None) => reply.error(Errno::ENXIO),
                Err(errno) => reply.error(errno),
            };
            fs.submit(Attempt::new(fs.origin(call, node, 0), Kind::Reads, work, answer), fs.place(node));
        });
    }

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        // Once; then the kernel stops asking before every write.
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
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        // The kernel copies by reading and writing then.
        reply.error(Errno::ENOSYS);
    }
}
