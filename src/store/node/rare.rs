//! What a disk has only while it needs it.
//!
//! A store may list 100,000 disks that are not in use. So the state of changes of layers, of keys and of failures is made
//! at its first use. What must hold: as long as it is not made, every reader acts as on the initial state.

use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::DiskNode;
use super::backoff::Backoff;
use super::keys::Keyring;
use super::rework::Alive;
use crate::delta::Delta;
use crate::disk::Disk;

/// See the module.
#[derive(Default)]
pub(in crate::store) struct Rare {
    pub(super) keyring: Keyring,
    /// Of a sealing that fails.
    pub(super) sealing_retry: Backoff,
    /// Of a sync of what was carried.
    pub(in crate::store) settling_retry: Backoff,
    /// Of the removal of what is dropped.
    pub(in crate::store) removal_retry: Backoff,
    /// Sealed deltas whose live maps running requests may still use.
    pub(super) retiring: Mutex<Vec<Arc<Delta>>>,
    /// Whether the files of the layer that is being made may be written.
    pub(super) making: Mutex<Option<Alive>>,
    /// What the slot had before rollbacks. Running requests may still read it.
    pub(super) rolled_back: Mutex<Vec<Weak<Disk>>>,
    /// Why the last attach failed.
    pub(super) failure: Mutex<Option<String>>,
}

impl DiskNode {
    /// To change it.
    pub(in crate::store) fn rare(&self) -> &Rare {
        self.rare.get_or_init(Box::default)
    }

    /// To look at it; `None` means the initial state.
    pub(in crate::store) fn known_rare(&self) -> Option<&Rare> {
        self.rare.get().map(|rare| &**rare)
    }

    /// Notes why the last attach failed, or that it did not.
    pub(super) fn note_failure(&self, why: Option<String>) {
        if why.is_some() || self.known_rare().is_some() {
            *self.rare().failure.lock() = why;
        }
    }
}
