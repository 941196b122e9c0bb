//! The end of a disk without a name: its files go once no caller uses it.
//!
//! What must hold: a disk that a caller of any frontend may have open is kept. Only the frontends know that, so the
//! service asks all of them each time. Without an answer the disk is kept, and the next worker asks again
//! ([`Service::reap`]).

use std::sync::Arc;

use super::pool::Lane;
use super::{Service, Target, log};
use crate::store::{BaseNode, DiskNode, StoreError};

impl Service {
    /// Removes the files of a disk that lost its name, when no caller can have it open. May wait for the frontends.
    ///
    /// # Errors
    /// Those of [`Store::purge`](crate::store::Store::purge).
    pub fn purge(&self, disk: u64) -> Result<(), StoreError> {
        self.frontends.release(disk);
        self.purge_unused(disk)
    }

    /// Whether no caller of any frontend can have a disk open. The frontends first drop what they keep of it. May wait
    /// for them.
    pub fn is_unused(&self, disk: u64) -> bool {
        self.frontends.release(disk);
        !self.frontends.may_use(disk)
    }

    fn purge_unused(&self, disk: u64) -> Result<(), StoreError> {
        if self.frontends.may_use(disk) { Ok(()) } else { self.store.purge(disk) }
    }

    /// Removes disks that lost their name and their last user while no worker could be told.
    pub fn reap(&self) {
        for node in self.store.unlinked() {
            // The worker that removed it may have died before it told the frontends, which keep names for disks.
            self.purge(node.id()).unwrap_or_else(|error| tracing::error!(%error, "cleaning up"));
        }
    }

    /// Whether a caller may have a base's own file open. May wait for the frontends.
    pub fn may_have_open(&self, base: &BaseNode) -> bool {
        match base.open_handles() {
            Some(handles) => handles > 0,
            None => self.frontends.may_use_base(base.id()),
        }
    }

    /// A frontend has let go of a base's own file: no caller has it open, whatever an earlier worker opened.
    pub fn forgotten_base(&self, base: u64) {
        if let Ok(node) = self.base(base) {
            node.set_inherited(false);
        }
    }

    /// Removes the data of a trashed disk, for good. A caller that has the disk open keeps it until the last close.
    ///
    /// # Errors
    /// Those of [`Store::discard`](crate::store::Store::discard) and [`Store::purge`](crate::store::Store::purge).
    pub fn purge_trashed(&self, disk: u64) -> Result<(), StoreError> {
        self.store.discard(disk)?;
        self.purge(disk)
    }

    /// Removes the data of the first trashed disk whose time is over and that no caller can have open. Returns it. One at
    /// a time, so that the removal of many does not keep the storage from the guests.
    ///
    /// # Errors
    /// As [`purge_trashed`](Self::purge_trashed).
    pub fn purge_expired(&self, now_ns: i64) -> Result<Option<Arc<DiskNode>>, StoreError> {
        let expired = self.store.expired(now_ns).into_iter();
        let mut nodes = expired.filter_map(|disk| self.store.disk_by_id(disk));
        // Nothing without a name is opened again: what this worker counts is enough, whatever the kernel keeps of it.
        let is_closed = |node: &Arc<DiskNode>| node.open_handles() == Some(0) || self.is_unused(node.id());
        let Some(node) = nodes.find(is_closed) else { return Ok(None) };
        self.purge_trashed(node.id())?;
        Ok(Some(node))
    }

    /// A frontend has let go of a disk: one without a name is purged, unless another caller has opened it meanwhile.
    pub fn forgotten(&self, disk: u64) {
        let Ok(node) = self.disk(disk) else { return };
        // The message may be late; the frontends know whether a caller has the disk now.
        self.purge_with(&node, Self::purge_unused);
    }

    /// A handle of a disk was closed. When the control socket has removed the disk, the frontends may still keep its name,
    /// and would let go of it at the next lookup only.
    pub(super) fn purge_later(&self, node: &DiskNode) {
        if node.open_handles().is_none_or(|open| open == 0) {
            self.purge_with(node, Self::purge);
        }
    }

    fn purge_with(
        &self,
        node: &DiskNode,
        purge: impl FnOnce(&Self, u64) -> Result<(), StoreError> + Send + 'static,
    ) {
        if !node.is_unlinked() {
            return;
        }
        let (service, disk) = (self.clone(), node.id());
        self.runner.pool.spawn(Lane::Purge(self.store.pool_of(node)), move || {
            if let Err(error) = purge(&service, disk) {
                log::failed(Some(Target::Disk(disk)), &error);
            }
        });
    }
}
