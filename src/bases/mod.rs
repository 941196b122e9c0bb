//! Operations on bases: add and remove, pin and evict, move to other URLs, and background work on a whole base. A
//! frontend of `plyfs base` uses this module and adds only its protocol.
//!
//! The store has the catalogue of bases and attaches them. This module opens their sources (`origin`, `sources`),
//! decides what the cache retains of them, and orders changes of both. What must hold:
//! - A caller that attaches, lists or shows a base waits for no server. Only [`Bases::prepare`] and
//!   [`Bases::prepare_move`] send requests. One that lists or shows bases waits for no file either (`examine`).
//! - A change of a base's options is in its record before anything is dropped or fetched for it, so that the next
//!   worker continues.
//! - Contents that two bases share are dropped only when neither retains them.

mod add;
pub mod copies;
mod copy;
mod examine;
pub mod hydrate;
pub mod jobs;
mod keep;
mod keys;
mod lane;
pub mod lend;
mod origin;
pub mod prefetch;
pub mod proofs;
mod servers;
pub mod sources;
mod state;
#[cfg(test)]
mod tests;
mod unused;
mod whole;

use std::path::PathBuf;
use std::sync::Arc;

pub use self::add::{Description, File, PreparedBase};
pub use self::examine::Finding;
pub use self::jobs::BaseJob;
pub use self::keep::{Evicted, LastCopy};
pub use self::origin::{Delivery, OfferedImage};
pub use self::servers::PreparedMove;
pub use self::state::{BaseState, Condition};
pub use self::unused::{UnusedBase, UnusedLimits};

use self::copies::Keeper;
use self::examine::Examiner;
use self::hydrate::{Hydrations, Progress};
use self::sources::HostSources;
use crate::store::Store;

/// See the module. Clones share one state.
#[derive(Clone)]
pub struct Bases {
    store: Arc<Store>,
    sources: Arc<HostSources>,
    hydrations: Hydrations,
    examiner: Arc<Examiner>,
    keeper: Keeper,
    /// Mount point of this daemon.
    mount: PathBuf,
    /// Whether a new base is hydrated at once.
    hydrates_new: bool,
}

impl Bases {
    /// For a store whose daemon mounts on `mount`. `hydrates_new`: whether a new base is hydrated at once.
    pub fn new(
        store: Arc<Store>,
        sources: Arc<HostSources>,
        hydrations: Hydrations,
        keeper: Keeper,
        mount: PathBuf,
        hydrates_new: bool,
    ) -> Self {
        Self { store, sources, hydrations, examiner: Examiner::new(), keeper, mount, hydrates_new }
    }

    /// The sources of bases.
    pub fn sources(&self) -> &Arc<HostSources> {
        &self.sources
    }

    /// Progress of the last background work on a base.
    pub fn progress(&self, base: u64) -> Option<Progress> {
        self.hydrations.progress(base)
    }
}
