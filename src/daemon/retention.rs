//! Removes what its time is over of: disks in the trash, and bases that nothing needs.
//!
//! What must hold: one disk or base a second, so that many of them do not keep the storage from the guests. A failure is
//! logged, and tried again later.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::bases::{Bases, UnusedLimits};
use crate::config::Config;
use crate::events::Events;
use crate::io::{priority, sys};
use crate::serve::Service;
use crate::store::{BaseNode, Store};

const TICK: Duration = Duration::from_secs(1);
/// Ticks between two looks at which bases are in use, and how much the trash takes.
const LOOK: u64 = 10;
/// Ticks after a failure.
const AFTER_FAILURE: u64 = 60;

/// See the module.
pub(super) struct Retention {
    store: Arc<Store>,
    service: Service,
    bases: Bases,
    events: Events,
    limits: UnusedLimits,
}

impl Retention {
    /// With the limits of the configuration.
    pub fn new(config: &Config, store: Arc<Store>, service: Service, bases: Bases, events: Events) -> Self {
        let limits = UnusedLimits { age: config.bases.unused_age, bytes: config.bases.unused_limit };
        Self { store, service, bases, events, limits }
    }

    /// Begins the work, on a thread of its own.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn spawn(self) -> io::Result<()> {
        std::thread::Builder::new().name("retention".into()).spawn(move || self.run()).map(drop)
    }

    fn run(&self) {
        priority::background();
        let (mut tick, mut rest) = (0, 0);
        let mut has_surplus = false;
        while !self.store.is_closing() {
            if tick % LOOK == 0 {
                self.store.note_uses(&|base: &BaseNode| self.service.may_have_open(base));
                drop(self.store.trash());
                // Not in the first moment: clients of an earlier worker look names up again.
                has_surplus |= tick > 0 && self.limits != UnusedLimits::default();
            }
            if tick >= rest {
                let purged = self.purge_one();
                let removed = if has_surplus { self.remove_one() } else { Ok(false) };
                match purged.and(removed) {
                    Ok(again) => has_surplus &= again,
                    Err(()) => rest = tick + AFTER_FAILURE,
                }
            }
            std::thread::sleep(TICK);
            tick += 1;
        }
    }

    fn purge_one(&self) -> Result<(), ()> {
        match self.service.purge_expired(sys::now_ns()) {
            Ok(None) => Ok(()),
            Ok(Some(node)) => {
                let (disk, number) = (node.name(), node.id());
                tracing::info!(disk, number, "the time of a disk in the trash is over; its data is removed");
                Ok(())
            }
            Err(error) => {
                tracing::warn!(%error, "a disk in the trash whose time is over cannot be removed; it is tried again");
                Err(())
            }
        }
    }

    /// Whether there may be another one.
    fn remove_one(&self) -> Result<bool, ()> {
        let is_open = |base: &BaseNode| self.service.may_have_open(base);
        let removed = self.bases.remove_surplus(self.limits, sys::now_ns(), &is_open, &self.events);
        removed.map(|base| base.is_some()).map_err(|error| {
            tracing::warn!(%error, "an unused base cannot be removed; it is tried again");
        })
    }
}
