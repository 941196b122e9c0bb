//! Translates between the kernel's requests and calls on disks; the only user of the FUSE crate.
//!
//! What must hold: nothing that may wait runs on a FUSE thread unless enough others are free ([`pool`]); a request
//! that is sent again after a crash of the worker has the result that the first try had; handles and inode numbers
//! mean the same to every worker.

mod change;
pub mod guard;
mod ino;
pub mod kernel;
pub mod pool;
mod reply;
pub mod session;
mod wait;

use std::cell::RefCell;
use std::ffi::OsStr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{
    BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, IoctlFlags, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    ReplyXattr, Request, TimeOrNow, WriteFlags,
};
use parking_lot::RwLock;

use change::{Change, allocate, time_ns};
use guard::guarded;
pub use ino::Node;
use kernel::{KernelNotifier, MAX_WRITE};
use pool::Pool;
use wait::{Attempt, Kind, Stop};

use crate::base::Arrival;
use crate::cache::Touch;
use crate::disk::Seek;
use crate::format::BLOCK;
use crate::format::record::MountRequest;
use crate::io::sys;
use crate::store::{BaseNode, DiskNode, NewDisk, Replace, Store, StoreError};

/// Attributes and names are asked for anew each time: they change by the control socket as well.
const TTL: Duration = Duration::ZERO;
const SUFFIX: &str = ".raw";
/// Set in the number of a request that is sent again.
const RESENT: u64 = 1 << 63;

thread_local! {
    static BUFFER: RefCell<Vec<u8>> = RefCell::new({
        let mut buffer = vec![0; MAX_WRITE as usize];
        sys::touch_pages(&mut buffer);
        buffer
    });
}

/// Who owns the directories and bases, and who may read bases.
#[derive(Debug, Clone, Copy)]
pub struct Ownership {
    /// Owner of the directories and bases.
    pub uid: u32,
    /// Their group.
    pub gid: u32,
    /// Permission bits of bases.
    pub base_mode: u32,
    /// When the mount was made, nanoseconds since the epoch.
    pub since_ns: i64,
}

/// The filesystem that the kernel sees.
#[derive(Clone)]
pub struct PlyFs {
    shared: Arc<Shared>,
}

struct Shared {
    store: Arc<Store>,
    pool: Pool,
    owner: Ownership,
    notifier: Arc<KernelNotifier>,
    /// Held shared by whatever changes a disk; taken for good when the daemon stops with files open.
    quiesce: RwLock<bool>,
}

fn os_error(errno: i32) -> Errno {
    Errno::from_i32(errno)
}

fn fail(error: &StoreError) -> Errno {
    let errno = error.errno();
    if errno == libc::EIO {
        reply::log_error(error);
    }
    os_error(errno)
}

fn fail_disk(node: &DiskNode, what: &'static str, error: &crate::disk::DiskError) -> Stop {
    if let Some(arrival) = error.arrival() {
        return Stop::Wait(arrival.clone());
    }
    let errno = error.errno();
    if errno == libc::EIO {
        reply::log_disk_error(&node.name(), what, error);
    }
    Stop::Errno(os_error(errno))
}

fn fail_base(error: &crate::base::BaseError) -> Stop {
    if let Some(arrival) = error.arrival() {
        return Stop::Wait(arrival.clone());
    }
    reply::log_error(error);
    Stop::Errno(Errno::EIO)
}

/// The name of a disk or base from the name of its file.
fn strip(name: &OsStr) -> Option<&str> {
    name.to_str()?.strip_suffix(SUFFIX)
}

fn answer(done: Result<(), Errno>, reply: ReplyEmpty) {
    match done {
        Ok(()) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}

fn epoch(fh: FileHandle) -> u64 {
    fh.0 & 0xffff
}

impl PlyFs {
    /// Serves `store`; `threads` threads may wait besides `inline` of the FUSE threads.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn new(
        store: Arc<Store>,
        owner: Ownership,
        notifier: Arc<KernelNotifier>,
        threads: usize,
        inline: usize,
    ) -> std::io::Result<Self> {
        let pool = Pool::new(threads, inline)?;
        Ok(Self { shared: Arc::new(Shared { store, pool, owner, notifier, quiesce: RwLock::new(false) }) })
    }

    /// Lets running changes end and refuses all later ones, so that the store can be closed under open files.
    pub fn quiesce(&self) {
        *self.shared.quiesce.write() = true;
    }

    fn store(&self) -> &Store {
        &self.shared.store
    }

    /// Runs what may wait; `job` gets the filesystem.
    fn run(&self, job: impl FnOnce(&PlyFs) + Send + 'static) {
        let fs = self.clone();
        self.shared.pool.run(move || job(&fs));
    }

    /// Runs what may wait and changes something.
    fn change<R: Send + 'static>(
        &self,
        reply: R,
        refuse: impl FnOnce(R, Errno) + Send + 'static,
        job: impl FnOnce(&PlyFs, R) + Send + 'static,
    ) {
        self.run(move |fs| {
            let stopped = fs.shared.quiesce.read();
            if *stopped {
                refuse(reply, Errno::EIO)
            } else {
                job(fs, reply)
            }
            if guard::is_doomed() {
                std::process::abort();
            }
        });
    }

    fn disk(&self, ino: INodeNo) -> Result<Arc<DiskNode>, Errno> {
        match Node::of(ino.0) {
            Some(Node::Disk(id)) => self.store().disk_by_id(id).ok_or(Errno::ESTALE),
            Some(Node::Base(_)) => Err(Errno::EROFS),
            Some(_) => Err(Errno::EISDIR),
            None => Err(Errno::ESTALE),
        }
    }

    fn base_node(&self, id: u64) -> Result<Arc<BaseNode>, Errno> {
        self.store().base_by_id(id).ok_or(Errno::ESTALE)
    }

    fn attributes(&self, node: Node) -> Result<fuser::FileAttr, Errno> {
        match node {
            Node::Root | Node::Disks | Node::Bases => Ok(reply::directory(node, &self.shared.owner)),
            Node::Disk(id) => {
                let disk = self.store().disk_by_id(id).ok_or(Errno::ESTALE)?;
                Ok(reply::disk(node, &disk.attributes()))
            }
            Node::Base(id) => Ok(reply::base(node, self.base_node(id)?.record(), &self.shared.owner)),
        }
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<Node, Errno> {
        match Node::of(parent.0) {
            Some(Node::Root) if name == "disks" => Ok(Node::Disks),
            Some(Node::Root) if name == "bases" => Ok(Node::Bases),
            Some(Node::Disks) => {
                let found = strip(name).and_then(|n| self.store().disk(n).ok());
                Ok(Node::Disk(found.ok_or(Errno::ENOENT)?.id()))
            }
            Some(Node::Bases) => {
                let found = strip(name).and_then(|n| self.store().base(n).ok());
                Ok(Node::Base(found.ok_or(Errno::ENOENT)?.id()))
            }
            _ => Err(Errno::ENOENT),
        }
    }

    /// The disk whose name the first try of a resent request changed. Its names may have been changed since by commands
    /// of the control socket, which do not wait for requests that are sent again.
    fn done_before(&self, req: &Asker) -> Option<Arc<DiskNode>> {
        if req.resent { self.store().done_by(req.request) } else { None }
    }

    /// Makes a blank disk of 0 bytes, as creat(2) does; finds the one that the first try of a resent request made.
    fn make(&self, req: &Asker, parent: INodeNo, name: &str, mode: u32) -> Result<Arc<DiskNode>, Errno> {
        if Node::of(parent.0) != Some(Node::Disks) {
            return Err(Errno::EPERM);
        }
        let name = name.strip_suffix(SUFFIX).ok_or(Errno::EINVAL)?;
        let new = NewDisk {
            name: name.into(),
            base: None,
            size: Some(0),
            mode: mode & 0o7777,
            uid: req.uid,
            gid: req.gid,
        };
        if let Some(made) = self.done_before(req) {
            return Ok(made);
        }
        match self.store().create_disks_for(&[new], Some(req.request)) {
            Ok(mut made) => made.pop().ok_or(Errno::EIO),
            Err(StoreError::Exists { .. }) if !req.exclusive => self.store().disk(name).map_err(|e| fail(&e)),
            Err(error) => Err(fail(&error)),
        }
    }

    /// NOFLUSH: the kernel would wait for the writes of others before it asks for a flush at close(2), which promises
    /// nothing. A process that only inherited a file, and closes it at exec, must not hang while no worker serves.
    fn open_flags() -> FopenFlags {
        FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES | FopenFlags::FOPEN_NOFLUSH
    }

    fn open_disk(node: &DiskNode) -> Result<FileHandle, Errno> {
        let disk = node.attach().map_err(|e| fail(&e))?;
        disk.delta().opened();
        Ok(FileHandle(disk.delta().error_epoch() & 0xffff))
    }

    fn write_now(
        node: &DiskNode,
        offset: u64,
        data: &[u8],
        fh: FileHandle,
        flags: OpenFlags,
    ) -> Result<(), Stop> {
        let disk = node.attach().map_err(|e| fail(&e))?;
        disk.write(offset, data, epoch(fh)).map_err(|e| fail_disk(node, "write", &e))?;
        if flags.0 & libc::O_DSYNC != 0 {
            disk.flush(epoch(fh)).map_err(|e| fail_disk(node, "flush", &e))?;
        }
        Ok(())
    }

    fn read_into(&self, node: Node, offset: u64, buffer: &mut [u8]) -> Result<usize, Stop> {
        match node {
            Node::Disk(id) => {
                let node = self.store().disk_by_id(id).ok_or(Errno::ESTALE)?;
                let disk = node.attach().map_err(|e| fail(&e))?;
                disk.read(offset, buffer).map_err(|e| fail_disk(&node, "read", &e))
            }
            Node::Base(id) => {
                let base = self.base_node(id)?.attach().map_err(|e| fail(&e))?.clone();
                let len = base.size().saturating_sub(offset).min(buffer.len() as u64) as usize;
                let done = base.read(offset, &mut buffer[..len], Touch::Repeat, 128 << 10);
                done.map(|()| len).map_err(|error| fail_base(&error))
            }
            _ => Err(Errno::EISDIR.into()),
        }
    }

    /// `held`: what earlier tries waited for.
    fn read_slowly(&self, node: Node, offset: u64, size: usize, reply: ReplyData, mut held: Vec<Arrival>) {
        let wait = BUFFER.with_borrow_mut(|buffer| {
            let buffer = RefCell::new(&mut buffer[..size]);
            let got = guarded(|| self.read_into(node, offset, &mut buffer.borrow_mut()));
            let buffer = buffer.into_inner();
            match got {
                Ok(len) => reply.data(&buffer[..len]),
                Err(Stop::Errno(errno)) => reply.error(errno),
                Err(Stop::Wait(arrival)) => return Some((arrival, reply)),
            }
            None
        });
        if let Some((arrival, reply)) = wait {
            held.push(arrival.clone());
            self.when(&arrival, move |fs| fs.read_slowly(node, offset, size, reply, held));
        }
    }
}

/// Who asks, and how.
#[derive(Debug, Clone, Copy)]
struct Asker {
    uid: u32,
    gid: u32,
    request: MountRequest,
    resent: bool,
    exclusive: bool,
}

impl PlyFs {
    fn asker(&self, req: &Request) -> Asker {
        let unique = req.unique().0;
        Asker {
            uid: req.uid(),
            gid: req.gid(),
            request: MountRequest { mount_ns: self.shared.owner.since_ns, unique: unique & !RESENT },
            resent: unique & RESENT != 0,
            exclusive: true,
        }
    }
}

impl Filesystem for PlyFs {
    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(parent, name) {
            Ok(node) => self.run(move |fs| match fs.attributes(node) {
                Ok(attr) => reply.entry(&TTL, &attr, Generation(0)),
                Err(errno) => reply.error(errno),
            }),
            Err(errno) => reply.error(errno),
        }
    }

    fn forget(&self, _req: &Request, ino: INodeNo, _nlookup: u64) {
        // The kernel has let go of the inode: a disk without a name is used by nobody any more.
        if let Ok(node) = self.disk(ino)
            && node.is_unlinked()
        {
            self.shared.pool.spawn({
                let fs = self.clone();
                move || {
                    // Another FORGET may have come late; only the kernel knows whether it has the inode now.
                    let gone = fs.shared.notifier.refresh(ino.0);
                    if matches!(gone, Ok(false))
                        && let Err(error) = fs.store().purge(node.id())
                    {
                        reply::log_error(&error);
                    }
                }
            });
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        self.run(move |fs| match Node::of(ino.0).ok_or(Errno::ESTALE).and_then(|n| fs.attributes(n)) {
            Ok(attr) => reply.attr(&TTL, &attr),
            Err(errno) => reply.error(errno),
        });
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
        self.change(reply, ReplyAttr::error, move |fs, reply| {
            let done = match Node::of(ino.0) {
                Some(node @ Node::Disk(_)) => guard::once(resent, || {
                    fs.disk(ino)
                        .and_then(|disk| change.apply(&disk, request))
                        .and_then(|()| fs.attributes(node))
                }),
                Some(Node::Base(_)) => Err(Errno::EROFS),
                _ => Err(Errno::EPERM),
            };
            match done {
                Ok(attr) => reply.attr(&TTL, &attr),
                Err(errno) => reply.error(errno),
            }
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
        self.change(reply, ReplyEntry::error, move |fs, reply| {
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
        self.change(reply, ReplyEmpty::error, move |fs, reply| {
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
        self.change(reply, ReplyEmpty::error, move |fs, reply| {
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

    fn open(&self, _req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.run(move |fs| {
            let opened = match Node::of(ino.0) {
                Some(Node::Disk(_)) => fs.disk(ino).and_then(|node| Self::open_disk(&node)),
                Some(Node::Base(_)) if flags.acc_mode() != OpenAccMode::O_RDONLY => Err(Errno::EROFS),
                Some(Node::Base(id)) => fs
                    .base_node(id)
                    .and_then(|node| node.attach().map_err(|e| fail(&e)))
                    .map(|_| FileHandle(0)),
                _ => Err(Errno::EISDIR),
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
        self.change(reply, ReplyCreate::error, move |fs, reply| {
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
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let size = size.min(MAX_WRITE) as usize;
        let Some(node) = Node::of(ino.0) else { return reply.error(Errno::ESTALE) };
        let fast = |reply: ReplyData| -> Option<ReplyData> {
            BUFFER.with_borrow_mut(|buffer| {
                let got = match node {
                    Node::Disk(id) => {
                        let disk = self.store().disk_by_id(id)?;
                        let buffer = RefCell::new(&mut buffer[..size]);
                        let read = || {
                            let disk = disk.attached();
                            Ok(disk.and_then(|disk| disk.read_now(offset, &mut buffer.borrow_mut())))
                        };
                        guarded::<_, Errno>(read).ok().flatten()
                    }
                    _ => None,
                };
                match got {
                    Some(len) => {
                        reply.data(&buffer[..len]);
                        None
                    }
                    None => Some(reply),
                }
            })
        };
        if let Some(reply) = fast(reply) {
            let (plain, fs) = (self.is_plain(node), self.clone());
            let job = move || fs.read_slowly(node, offset, size, reply, Vec::new());
            if plain { self.shared.pool.run(job) } else { self.shared.pool.spawn(job) }
        }
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let node = match self.disk(ino) {
            Ok(node) => node,
            Err(errno) => return reply.error(errno),
        };
        let len = data.len() as u32;
        let answer = move |done: Result<(), Errno>, reply: ReplyWrite| match done {
            Ok(()) => reply.written(len),
            Err(errno) => reply.error(errno),
        };
        // A partial block may need the base.
        let whole = (offset | u64::from(len)).is_multiple_of(BLOCK);
        let memory = self.store().never_waits() && whole && flags.0 & libc::O_DSYNC == 0;
        let plain = whole || node.attached().is_some_and(crate::disk::Disk::is_plain);
        let permit = if plain { self.shared.pool.try_inline() } else { None };
        let mut arrival = None;
        if memory || permit.is_some() {
            let stopped = self.shared.quiesce.read();
            if *stopped {
                return reply.error(Errno::EIO);
            }
            match guarded(|| Self::write_now(&node, offset, data, fh, flags)) {
                Ok(()) => return answer(Ok(()), reply),
                Err(Stop::Errno(errno)) => return answer(Err(errno), reply),
                Err(Stop::Wait(what)) => arrival = Some(what),
            }
        }
        let data = data.to_vec();
        let attempt = Attempt::new(
            Kind::Changes,
            move |_| Self::write_now(&node, offset, &data, fh, flags),
            move |done| answer(done, reply),
        );
        match arrival {
            Some(arrival) => attempt.wait(self, &arrival),
            None => self.attempt(false, attempt),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // close(2) promises nothing; the kernel need not ask again.
        reply.error(Errno::ENOSYS);
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.change(reply, ReplyEmpty::error, move |fs, reply| {
            let done: Result<(), Errno> = guarded(|| match Node::of(ino.0) {
                Some(Node::Disk(_)) => fs.disk(ino).and_then(|node| {
                    let disk = node.attach().map_err(|e| fail(&e))?;
                    disk.flush(epoch(fh)).map_err(|e| fail_disk(&node, "flush", &e).errno())
                }),
                _ => Ok(()),
            });
            answer(done, reply);
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
        self.run(move |fs| match fs.store().space() {
            Ok(s) => {
                reply.statfs(s.total / 4096, s.free / 4096, s.available / 4096, 0, 0, 4096, 132, 4096);
            }
            Err(error) => reply.error(os_error(error.raw_os_error().unwrap_or(libc::EIO))),
        });
    }

    fn fallocate(
        &self,
        _req: &Request,
        ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let plain = Node::of(ino.0).is_some_and(|node| self.is_plain(node));
        let work = move |fs: &PlyFs| allocate(&*fs.disk(ino)?, offset, length, mode, fh);
        self.attempt(plain, Attempt::new(Kind::Changes, work, move |done| answer(done, reply)));
    }

    fn lseek(&self, _: &Request, ino: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
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
                found.map_err(|error| fail_base(&error))
            }
            _ => Err(Errno::EINVAL.into()),
        };
        let answer = move |found: Result<Option<u64>, Errno>| match found {
            Ok(Some(at)) => reply.offset(at as i64),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(errno) => reply.error(errno),
        };
        self.attempt(self.is_plain(node), Attempt::new(Kind::Reads, work, answer));
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
