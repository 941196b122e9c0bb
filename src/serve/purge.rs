//! The end of a disk without a name: its files go once no caller uses it.
//!
//! What must hold: a disk that a caller may have open is kept. Only the frontend knows that, so it is asked each time;
//! without an answer the disk is kept, and the next worker looks again ([`reap`]).

use std::io;
use std::sync::Arc;

use super::pool::Lane;
use super::{Service, Target, log};
use crate::store::{Store, StoreError};

/// A frontend that knows who uses a disk. It may ask only on threads that hold no lock and serve no request, and so are
/// these functions called.
pub trait Users: Send + Sync {
    /// Lets go of what the frontend itself keeps of a disk that no caller has open.
    fn let_go(&self, disk: u64);

    /// Whether a caller may have the disk open.
    ///
    /// # Errors
    /// When the frontend cannot tell.
    fn may_use(&self, disk: u64) -> io::Result<bool>;
}

/// Removes the files of a disk without a name when no caller can have it open.
///
/// # Errors
/// Those of [`Store::purge`].
pub fn purge_unused(store: &Store, users: &dyn Users, disk: u64) -> Result<(), StoreError> {
    if matches!(users.may_use(disk), Ok(false)) { store.purge(disk) } else { Ok(()) }
}

/// Removes disks that lost their name and their last user while no worker could be told.
pub fn reap(store: &Store, users: &dyn Users) {
    for node in store.unlinked() {
        // The worker that removed it may have died before it told the frontend, whose name would keep the disk.
        users.let_go(node.id());
        purge_unused(store, users, node.id()).unwrap_or_else(|error| tracing::error!(%error, "cleaning up"));
    }
}

impl Service {
    /// The frontend has let go of a disk: one without a name has no user any more, unless another came meanwhile.
    pub fn forgotten(&self, disk: u64, users: Arc<dyn Users>) {
        let Ok(node) = self.disk(disk) else { return };
        if !node.is_unlinked() {
            return;
        }
        let service = self.clone();
        self.runner.pool.spawn(Lane::Purge, move || {
            // It may have come late; only the frontend knows whether it has the disk now.
            if let Err(error) = purge_unused(&service.store, &*users, disk) {
                log::failed(Some(Target::Disk(disk)), &error);
            }
        });
    }
}
