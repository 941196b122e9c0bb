//! Changes of a disk that one request makes together: attributes and size; and the reservation, discard and zeroing of
//! space.

use super::attempt::{Kind, PendingRequest};
use super::error::{Stop, fail, fail_disk};
use super::pool::Lane;
use super::{Call, Errno, Handle, Requester, Service, Target, guard, refuse};
use crate::disk::Grow;
use crate::format::record::MountRequest;
use crate::limits::Cost;
use crate::stats::Operation;
use crate::store::{Attributes, DiskNode};

/// New attributes of a disk. `None` leaves an attribute as it is.
#[derive(Debug, Clone, Copy)]
pub struct AttributeChange {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub modified_ns: Option<i64>,
}

impl AttributeChange {
    /// Applies the change, once for each request. A size that another client has set since stays when the request is
    /// sent again.
    fn apply(&self, node: &DiskNode, request: MountRequest) -> Result<(), Errno> {
        if let Some(size) = self.size {
            let done = node.change(|disk| disk.resize_for(size, request.token()));
            done.map_err(|e| fail(&e))?.map_err(|e| fail_disk(node, "resize", &e).errno())?;
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

/// What stat(2) tells of a base's own file. Times are nanoseconds since the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BaseAttributes {
    /// Bytes of the virtual disk.
    pub size: u64,
    /// Bytes that this host has of it.
    pub stored: u64,
    pub created_ns: i64,
    pub changed_ns: i64,
    pub modified_ns: i64,
}

/// A change of the space of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpaceChange {
    /// Reserves space, so that later writes find it.
    Reserve(Grow),
    /// The range reads as zeros, and its space is freed. The size stays.
    Discard,
    /// The range reads as zeros.
    Zero(Grow),
}

fn allocate(
    node: &DiskNode,
    what: SpaceChange,
    (offset, len): (u64, u64),
    handle: Handle,
) -> Result<(), Stop> {
    let epoch = handle.epoch();
    let done = node.change(|disk| match what {
        SpaceChange::Reserve(grow) => disk.allocate(offset, len, grow, epoch),
        SpaceChange::Discard => disk.zero(offset, len, epoch),
        SpaceChange::Zero(grow) => {
            disk.zero(offset, len, epoch).and_then(|()| disk.grow(offset.saturating_add(len), grow))
        }
    });
    done.map_err(|e| fail(&e))?.map_err(|e| fail_disk(node, "allocate", &e))
}

impl SpaceChange {
    fn operation(self) -> Operation {
        match self {
            Self::Reserve(_) => Operation::Reserve,
            Self::Discard => Operation::Discard,
            Self::Zero(_) => Operation::Zero,
        }
    }
}

impl Service {
    /// How many bytes of a range a disk has now; 0 while the disk is detached.
    fn inside(&self, disk: u64, (offset, len): (u64, u64)) -> u64 {
        let node = self.store.disk_by_id(disk);
        let size = node.and_then(|node| node.peek()).map_or(0, |disk| disk.size());
        len.min(size.saturating_sub(offset))
    }

    /// Changes attributes of a disk, and returns the new ones.
    pub fn change(
        &self,
        call: Call,
        requester: Requester,
        disk: u64,
        change: AttributeChange,
        answer: impl FnOnce(Result<Attributes, Errno>) + Send + 'static,
    ) {
        let target = Target::Disk(disk);
        if change.size.is_some() {
            self.copies.changes(disk, call.thread);
        }
        let answer = self.measured(target, Operation::Change, 0, answer);
        let apply = move |service: &Self| {
            guard::once(requester.resent, || {
                service.disk(disk).and_then(|node| change.apply(&node, requester.request))?;
                service.attributes_now(disk)
            })
        };
        if change.size.is_none() && !self.is_attached(target) {
            // The record can be changed even if the base cannot be opened.
            let (lane, service) = (self.attach_lane(target), self.clone());
            return self.runner.change_in(lane, answer, refuse, move |answer| answer(apply(&service)));
        }
        self.when_attached(call, target, answer, refuse, move |service, answer| {
            let (lane, runner, service) = (Lane::Disk(disk), &service.runner, service.clone());
            runner.change(lane, answer, refuse, move |answer| answer(apply(&service)));
        });
    }

    /// Returns the attributes of a base's own file. Waits for no file of the base.
    pub fn base_attributes(
        &self,
        base: u64,
        answer: impl FnOnce(Result<BaseAttributes, Errno>) + Send + 'static,
    ) {
        self.run(Lane::Node(base), move |service| answer(service.base_attributes_now(base)));
    }

    fn base_attributes_now(&self, base: u64) -> Result<BaseAttributes, Errno> {
        let node = self.base(base)?;
        let (modified_ns, changed_ns) = self.store.times_of_base(&node);
        let (size, created_ns) = (node.record().size(), node.record().created_ns);
        Ok(BaseAttributes { size, stored: node.stored_bytes(), created_ns, changed_ns, modified_ns })
    }

    /// Sets the modification time of a base's own file, the only attribute of it that a client can change, and returns
    /// the new attributes. `None` leaves it as it is: the access time is not kept.
    pub fn set_time_of_base(
        &self,
        base: u64,
        modified_ns: Option<i64>,
        answer: impl FnOnce(Result<BaseAttributes, Errno>) + Send + 'static,
    ) {
        let answer = self.measured(Target::Base(base), Operation::Change, 0, answer);
        let service = self.clone();
        // It waits for the store's disk.
        self.runner.change_in(Lane::Node(base), answer, refuse, move |answer| {
            answer(guard::guarded(|| {
                if let Some(at) = modified_ns {
                    service.store.set_time_of_base(&*service.base(base)?, at);
                }
                service.base_attributes_now(base)
            }));
        });
    }

    /// Reserves or frees the space of `range`, an offset and a length in bytes.
    pub fn allocate(
        &self,
        call: Call,
        disk: u64,
        what: SpaceChange,
        range: (u64, u64),
        handle: Handle,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let target = Target::Disk(disk);
        self.copies.changes(disk, call.thread);
        let answer = self.measured(target, what.operation(), self.inside(disk, range), answer);
        // It moves no bytes.
        let cost = Cost::Write(0);
        match self.store.disk_by_id(disk) {
            Some(node) if !self.passes(&node, cost) => {
                self.when_it_is_its_turn(
                    call,
                    &node,
                    (cost, 0),
                    answer,
                    refuse,
                    move |service, call, answer| {
                        service.change_space(call, disk, what, range, handle, answer);
                    },
                );
            }
            _ => self.change_space(call, disk, what, range, handle, answer),
        }
    }

    fn change_space(
        &self,
        call: Call,
        disk: u64,
        what: SpaceChange,
        range: (u64, u64),
        handle: Handle,
        answer: impl FnOnce(Result<(), Errno>) + Send + 'static,
    ) {
        let target = Target::Disk(disk);
        self.when_attached(call, target, answer, refuse, move |service, answer| {
            let (changer, reader) = (service.clone(), service.clone());
            let work = move || allocate(&*changer.disk(disk)?, what, range, handle);
            let attempt = PendingRequest::new(service.origin(call, target, 0), Kind::Changes, work, answer);
            let attempt = attempt.prepared_by(move || reader.read_ends(disk, range.0, range.1));
            attempt.submit(&service.runner, service.place(target));
        });
    }
}
