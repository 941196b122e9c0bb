//! Translates between the kernel's requests and [`serve`]; the only user of the FUSE crate.
//!
//! What must hold: this module never waits, and does not decide what a request does. Handles and inode numbers mean the
//! same to every worker (D3).

mod filesystem;
mod ino;
pub mod kernel;
mod opened;
pub mod promises;
mod reply;
pub mod session;

use std::ffi::OsStr;
use std::time::Duration;

use fuser::{Errno, FileAttr, FileHandle, FopenFlags, INodeNo, Request};

use opened::OpenedBases;
use promises::{Promise, Protocol};

use crate::format::record::MountRequest;
use crate::format::valid_name;
use crate::serve::{self, BaseAttributes, Call, FrontendId, Handle, RefusedName, Requester, Service, Target};
pub use ino::Node;

/// The kernel asks for attributes and names each time, because the control socket changes them too.
const TTL: Duration = Duration::ZERO;
const SUFFIX: &str = ".raw";
/// Bit in the number of a request that is sent again.
const RESENT: u64 = 1 << 63;

/// Owner and permissions of the directories and bases.
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
pub struct PlyFs {
    service: Service,
    owner: Ownership,
    frontend: FrontendId,
    protocol: Protocol,
    opened: OpenedBases,
}

/// The name of a disk or base, from the name of its file.
fn strip(name: &OsStr) -> Option<&str> {
    name.to_str()?.strip_suffix(SUFFIX)
}

fn handle_of(fh: FileHandle) -> Handle {
    Handle::new(fh.0)
}

/// The disk or base of an inode.
fn target_of(ino: INodeNo) -> Result<Target, Errno> {
    match Node::of(ino.0) {
        Some(Node::Disk(id)) => Ok(Target::Disk(id)),
        Some(Node::Base(id)) => Ok(Target::Base(id)),
        Some(Node::Snapshot(number)) => Ok(Target::Snapshot(number)),
        Some(Node::Root | Node::Disks | Node::Bases | Node::Snapshots) => Err(Errno::EISDIR),
        None => Err(Errno::ESTALE),
    }
}

/// The disk of an inode, for a change.
fn disk_of(ino: INodeNo) -> Result<u64, Errno> {
    match target_of(ino)? {
        Target::Disk(id) => Ok(id),
        Target::Base(_) | Target::Snapshot(_) => Err(Errno::EROFS),
    }
}

impl PlyFs {
    /// Serves the disks and bases of `service`, as the frontend that was added to it.
    pub fn new(service: Service, owner: Ownership, frontend: FrontendId, protocol: Protocol) -> Self {
        Self { service, owner, frontend, protocol, opened: OpenedBases::default() }
    }

    /// A request that is sent again may be old: its thread may be gone, and the number another's.
    fn call_of(&self, req: &Request) -> Call {
        let unique = req.unique().0;
        let thread = if unique & RESENT == 0 { req.pid() } else { 0 };
        Call { request: self.frontend.request(unique), thread }
    }

    /// Finds the attributes of `node` for stat(2).
    fn attributes_of(
        &self,
        req: &Request,
        node: Node,
        answer: impl FnOnce(Result<FileAttr, Errno>) + Send + 'static,
    ) {
        match node {
            Node::Root | Node::Disks | Node::Bases | Node::Snapshots => {
                answer(Ok(reply::directory(node, &self.owner)))
            }
            Node::Disk(id) => self.service.attributes(self.call_of(req), id, move |found| {
                answer(found.map(|found| reply::disk(node, &found)).map_err(Errno::from));
            }),
            Node::Base(id) => {
                let owner = self.owner;
                let is_opened = self.opened.take(self.call_of(req).thread, id);
                self.service.base_attributes(id, move |found| {
                    let found = found.map(|found| BaseAttributes {
                        stored: if is_opened { found.stored.max(found.size) } else { found.stored },
                        ..found
                    });
                    answer(found.map(|found| reply::base(node, &found, &owner)).map_err(Errno::from));
                });
            }
            Node::Snapshot(number) => {
                let found = self.service.store().snapshot_by_number(number).ok_or(Errno::ESTALE);
                answer(found.map(|(disk, snapshot)| reply::snapshot(node, &snapshot, disk.owner())));
            }
        }
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<Node, Errno> {
        let store = self.service.store();
        match Node::of(parent.0) {
            Some(Node::Root) if name == "disks" => Ok(Node::Disks),
            Some(Node::Root) if name == "bases" => Ok(Node::Bases),
            Some(Node::Root) if name == "snapshots" => Ok(Node::Snapshots),
            Some(Node::Disks) => {
                let found = strip(name).and_then(|n| store.disk(n).ok());
                Ok(Node::Disk(found.ok_or(Errno::ENOENT)?.id()))
            }
            Some(Node::Bases) => {
                let found = strip(name).and_then(|n| store.base(n).ok());
                Ok(Node::Base(found.ok_or(Errno::ENOENT)?.id()))
            }
            Some(Node::Snapshots) => {
                let names = strip(name).and_then(|name| name.split_once('@'));
                let found = names.and_then(|(disk, snapshot)| store.snapshot_of(disk, snapshot));
                Ok(Node::Snapshot(found.ok_or(Errno::ENOENT)?.1.number))
            }
            _ => Err(Errno::ENOENT),
        }
    }

    /// The name of a new disk, from its directory and file name.
    fn name_of_new(&self, req: &Request, parent: INodeNo, name: &OsStr) -> Result<String, Errno> {
        if Node::of(parent.0) != Some(Node::Disks) {
            return Err(self.refuse_name(req, RefusedName::Elsewhere, name));
        }
        match strip(name).filter(|name| valid_name(name)) {
            Some(name) => Ok(name.to_owned()),
            None => Err(self.refuse_name(req, RefusedName::Disk, name)),
        }
    }

    /// The error of a name that cannot be made. The log says what to do instead.
    fn refuse_name(&self, req: &Request, wanted: RefusedName, name: &OsStr) -> Errno {
        self.service.refused_name(wanted, &name.to_string_lossy(), req.uid());
        match wanted {
            RefusedName::Disk => Errno::EINVAL,
            RefusedName::Directory | RefusedName::Elsewhere => Errno::EPERM,
        }
    }

    /// NOFLUSH: without it the kernel waits for all writes in flight before it asks for a flush at close(2), which
    /// promises nothing. A process that inherited a file and closes it at exec must not hang while no worker serves.
    fn open_flags(&self) -> FopenFlags {
        let missing = self.protocol.missing();
        let unless = |promise, flag| if missing.contains(&promise) { FopenFlags::empty() } else { flag };
        let parallel = FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
        let parallel = if self.protocol.may_write_in_parallel() { parallel } else { FopenFlags::empty() };
        FopenFlags::FOPEN_DIRECT_IO | parallel | unless(Promise::Close, FopenFlags::FOPEN_NOFLUSH)
    }

    fn requester(&self, req: &Request) -> Requester {
        let unique = req.unique().0;
        Requester {
            uid: req.uid(),
            gid: req.gid(),
            request: MountRequest { mount_ns: self.owner.since_ns, unique: unique & !RESENT },
            resent: unique & RESENT != 0,
            exclusive: true,
        }
    }
}

impl From<serve::Errno> for Errno {
    fn from(errno: serve::Errno) -> Self {
        Self::from_i32(errno.into())
    }
}
