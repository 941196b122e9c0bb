//! Translates between the kernel's requests and calls on disks; the only user of the FUSE crate.
//!
//! What must hold: nothing that may wait runs on a FUSE thread unless enough others are free (`pool`), and nothing
//! that waits for the files of a base ever does (`wait`); a request that is sent again after a crash of the worker has
//! the result that the first try had (D4); handles and inode numbers mean the same to every worker (D3).

pub mod callers;
mod change;
mod data;
mod filesystem;
mod gate;
pub mod guard;
mod ino;
pub mod kernel;
mod pool;
mod reply;
pub mod session;
mod wait;
mod waiting;

use std::ffi::OsStr;
use std::sync::Arc;
use std::time::Duration;

use fuser::{Errno, FileAttr, FileHandle, FopenFlags, INodeNo, ReplyEmpty, Request};

use gate::Gate;
use guard::guarded;
pub use ino::Node;
use kernel::KernelNotifier;
use pool::{Lane, Pool};
use wait::{Attempt, Files, Kind, Origin, Stop};
use waiting::{Call, Waiting};
pub use waiting::{Limits, Waiters};

use crate::format::record::MountRequest;
use crate::store::{BaseNode, DiskNode, NewDisk, Store, StoreError};

/// Attributes and names are asked for anew each time: they change by the control socket as well.
const TTL: Duration = Duration::ZERO;
const SUFFIX: &str = ".raw";
/// Set in the number of a request that is sent again.
const RESENT: u64 = 1 << 63;
/// How long an end with files open waits for changes that are under way. They wait for the store's disk only.
const LAST_CHANGES: Duration = Duration::from_secs(60);

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
    /// Passed by each change of a disk; closed for good when the daemon stops with files open.
    gate: Gate,
    waiting: Arc<Waiting>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.waiting.close();
    }
}

/// Where work runs first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// On this thread, if it may wait for the store.
    Here,
    /// In the disk's lane: it may have to decode.
    Lane,
    /// In the base's lane: it needs its files.
    Base,
}

fn os_error(errno: i32) -> Errno {
    Errno::from_i32(errno)
}

fn fail(error: &StoreError) -> Errno {
    let errno = error.errno();
    if errno == libc::EIO {
        reply::log_error(0, error);
    }
    os_error(errno)
}

fn fail_disk(node: &DiskNode, what: &'static str, error: &crate::disk::DiskError) -> Stop {
    if let Some(arrival) = error.arrival() {
        return Stop::Wait(arrival.clone());
    }
    let errno = error.errno();
    if errno == libc::EIO {
        reply::log_disk_error(Node::Disk(node.id()).ino(), &node.name(), what, error);
    }
    Stop::Errno(os_error(errno))
}

fn fail_base(base: u64, error: &crate::base::BaseError) -> Stop {
    if let Some(arrival) = error.arrival() {
        return Stop::Wait(arrival.clone());
    }
    reply::log_error(Node::Base(base).ino(), error);
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

/// A request that is sent again may be old: its thread may be gone, and the number another's.
fn call_of(req: &Request) -> Call {
    let unique = req.unique().0;
    Call { unique, thread: if unique & RESENT == 0 { req.pid() } else { 0 } }
}

fn epoch(fh: FileHandle) -> u64 {
    fh.0 & 0xffff
}

impl PlyFs {
    /// Serves `store`; `threads` threads may wait besides `inline` of the FUSE threads, and requests as `limits` say.
    ///
    /// # Errors
    /// When threads cannot be started.
    pub fn new(
        store: Arc<Store>,
        owner: Ownership,
        notifier: Arc<KernelNotifier>,
        threads: usize,
        inline: usize,
        limits: Limits,
    ) -> std::io::Result<Self> {
        let pool = Pool::new(threads, inline)?;
        let waiting = Waiting::new(limits)?;
        let gate = Gate::default();
        Ok(Self { shared: Arc::new(Shared { store, pool, owner, notifier, gate, waiting }) })
    }

    /// Lets running changes end and refuses all later ones, so that the store can be closed under open files.
    pub fn quiesce(&self) {
        let left = self.shared.gate.close(LAST_CHANGES);
        if left > 0 {
            tracing::error!(
                left,
                "changes that were not acknowledged do not end; the store is closed without them"
            );
        }
    }

    /// Requests that wait for the bytes of bases.
    pub fn waiters(&self) -> Waiters {
        self.shared.waiting.counts()
    }

    /// The kernel says that the caller of a request got a signal.
    fn interrupt(&self, unique: u64) {
        self.shared.waiting.interrupt(unique);
    }

    /// Ends what waits of processes that are ending, which `lookup` finds out.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn watch_callers(&self, lookup: callers::Lookup) -> std::io::Result<()> {
        self.shared.waiting.watch(lookup)
    }

    fn store(&self) -> &Store {
        &self.shared.store
    }

    /// Runs what waits for the store only; `job` gets the filesystem.
    fn run(&self, lane: Lane, job: impl FnOnce(&PlyFs) + Send + 'static) {
        let fs = self.clone();
        self.shared.pool.run(lane, move || job(&fs));
    }

    /// Runs what waits for the store only and changes something.
    fn change<R: Send + 'static>(
        &self,
        lane: Lane,
        reply: R,
        refuse: impl FnOnce(R, Errno) + Send + 'static,
        job: impl FnOnce(&PlyFs, R) + Send + 'static,
    ) {
        self.run(lane, move |fs| {
            match fs.shared.gate.enter() {
                Some(_inside) => job(fs, reply),
                None => refuse(reply, Errno::EIO),
            }
            if guard::is_doomed() {
                std::process::abort();
            }
        });
    }

    /// Changes names: never on a FUSE thread, as one change of names waits for another.
    fn change_names<R: Send + 'static>(
        &self,
        reply: R,
        refuse: impl FnOnce(R, Errno) + Send + 'static,
        job: impl FnOnce(&PlyFs, R) + Send + 'static,
    ) {
        self.change_in(Lane::Names, reply, refuse, job);
    }

    /// As [`change`](Self::change), never on a FUSE thread.
    fn change_in<R: Send + 'static>(
        &self,
        lane: Lane,
        reply: R,
        refuse: impl FnOnce(R, Errno) + Send + 'static,
        job: impl FnOnce(&PlyFs, R) + Send + 'static,
    ) {
        let fs = self.clone();
        self.shared.pool.spawn(lane, move || {
            match fs.shared.gate.enter() {
                Some(_inside) => job(&fs, reply),
                None => refuse(reply, Errno::EIO),
            }
            if guard::is_doomed() {
                std::process::abort();
            }
        });
    }

    /// Finds what stat(2) says of `node`. Those of a disk that is not attached may take as long as opening it does.
    fn attributes_of(
        &self,
        req: &Request,
        node: Node,
        answer: impl FnOnce(Result<FileAttr, Errno>) + Send + 'static,
    ) {
        let lane = match node {
            Node::Disk(id) if self.is_attached(node) => Lane::Node(id),
            Node::Disk(_) => {
                let find = move |fs: &PlyFs| fs.attributes(node).map_err(Stop::from);
                let attempt = Attempt::new(self.origin(call_of(req), node, 0), Kind::Reads, find, answer);
                return Arc::new(attempt).spawn_in(self, self.attach_lane(node));
            }
            _ => return answer(self.attributes(node)),
        };
        self.run(lane, move |fs| answer(fs.attributes(node)));
    }

    /// Of whom a request on a disk or base is.
    fn origin(&self, call: Call, node: Node, bytes: usize) -> Origin {
        let (base, lane) = match node {
            Node::Disk(id) => (self.store().disk_by_id(id).and_then(|n| n.base_id()), Lane::Disk(id)),
            Node::Base(id) => (Some(id), Lane::Base(id)),
            Node::Root | Node::Disks | Node::Bases => (None, Lane::Space),
        };
        Origin { call, ino: node.ino(), base, lane, bytes, moves: bytes }
    }

    fn is_attached(&self, node: Node) -> bool {
        match node {
            Node::Disk(id) => self.store().disk_by_id(id).is_none_or(|node| node.attached().is_some()),
            Node::Base(id) => self.store().base_by_id(id).is_none_or(|node| node.attached().is_some()),
            Node::Root | Node::Disks | Node::Bases => true,
        }
    }

    /// The lane for what has to open the files of `node` first.
    fn attach_lane(&self, node: Node) -> Lane {
        match (node, self.origin(Call::default(), node, 0).base) {
            (_, Some(base)) => Lane::Attach(base),
            (Node::Disk(id), None) => Lane::Node(id),
            _ => Lane::Space,
        }
    }

    /// Goes on once the files of `node` are open, which may take as long as its base's filesystem does. A signal ends
    /// the waiting.
    fn when_attached<R: Send + 'static>(
        &self,
        call: Call,
        node: Node,
        reply: R,
        refuse: impl FnOnce(R, Errno) + Send + 'static,
        then: impl FnOnce(&PlyFs, R) + Send + 'static,
    ) {
        if self.is_attached(node) {
            return then(self, reply);
        }
        let attach = move |fs: &PlyFs| {
            match node {
                Node::Disk(id) => fs.store().disk_by_id(id).map(|node| node.attach().map(drop)),
                Node::Base(id) => fs.store().base_by_id(id).map(|node| node.attach().map(drop)),
                _ => None,
            }
            .transpose()
            .map(drop)
            .map_err(|e| Stop::from(fail(&e)))
        };
        let fs = self.clone();
        let answer = move |done: Result<(), Errno>| match done {
            Ok(()) => then(&fs, reply),
            Err(errno) => refuse(reply, errno),
        };
        let attempt = Attempt::new(self.origin(call, node, 0), Kind::Reads, attach, answer);
        Arc::new(attempt).spawn_in(self, self.attach_lane(node));
    }

    /// Where work on an attached file may run.
    fn place(&self, node: Node) -> Place {
        match node {
            Node::Disk(id) => {
                let node = self.store().disk_by_id(id);
                let is_plain = node.is_none_or(|node| node.peek().is_none_or(|disk| disk.is_plain()));
                if is_plain { Place::Here } else { Place::Lane }
            }
            _ => Place::Base,
        }
    }

    /// Runs an attempt on an attached file where it may wait for what it needs.
    fn submit<T: Send + 'static>(&self, attempt: Attempt<T>, place: Place) {
        let attempt = Arc::new(attempt);
        match place {
            Place::Base => attempt.spawn_in_base(self),
            Place::Lane => attempt.spawn(self, Files::Barred),
            Place::Here => match self.shared.pool.try_inline_for(attempt.lane(), attempt.moves()) {
                Some(_permit) => attempt.run(self, Files::Barred),
                None => attempt.spawn(self, Files::Barred),
            },
        }
    }

    /// Hands an attempt with `bytes` of a write over to its disk's lane. It runs here when too many bytes wait there.
    fn submit_later<T: Send + 'static>(&self, attempt: Arc<Attempt<T>>, bytes: usize) {
        let (fs, lane) = (self.clone(), attempt.lane());
        let job = Box::new(move || attempt.run(&fs, Files::Barred));
        if let Some(job) = self.shared.pool.spawn_bounded(lane, bytes, job) {
            job();
        }
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

    /// Of an attached disk.
    fn open_disk(node: &DiskNode) -> Result<FileHandle, Errno> {
        let disk = node.attach().map_err(|e| fail(&e))?;
        disk.delta().opened();
        node.opened();
        Ok(FileHandle(disk.delta().error_epoch() & 0xffff))
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
