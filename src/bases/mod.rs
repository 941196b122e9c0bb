//! What is done with bases: adding and removing them, what is kept of them on this host, where their bytes come from, and
//! work on whole ones in the background. Everything that a frontend of `plyfs base` needs and that is not its own protocol.
//!
//! The store knows which bases there are and attaches them; this room knows where their files are (`sources`), what of
//! them is kept, and in which order both change. What must hold:
//! - A caller that attaches, lists or shows a base waits for no server. Only [`Bases::prepare`] and
//!   [`Bases::prepare_move`] ask one.
//! - What a base wants is noted in its record before anything is dropped or fetched for it: the next worker goes on.
//! - What two bases have in common goes only when neither wants it kept.

mod add;
mod copy;
pub mod hydrate;
mod keep;
mod keys;
mod lane;
pub mod prefetch;
mod servers;
pub mod sources;
mod state;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;

pub use self::add::{Description, File, Prepared};
pub use self::keep::{Evicted, LastCopy};
pub use self::servers::Moving;
pub use self::state::{BaseState, Condition};

use self::hydrate::{Hydrations, Progress};
use self::sources::HostSources;
use crate::store::Store;

/// See the module. Clones are the same one.
#[derive(Clone)]
pub struct Bases {
    store: Arc<Store>,
    sources: Arc<HostSources>,
    hydrations: Hydrations,
    /// The mount of this daemon.
    mount: PathBuf,
    /// Whether a new base is hydrated.
    hydrates_new: bool,
}

impl Bases {
    /// Of a store whose daemon mounts on `mount`; `hydrates_new` is whether a base that is added is hydrated at once.
    pub fn new(
        store: Arc<Store>,
        sources: Arc<HostSources>,
        hydrations: Hydrations,
        mount: PathBuf,
        hydrates_new: bool,
    ) -> Self {
        Self { store, sources, hydrations, mount, hydrates_new }
    }

    /// Where the bytes of bases come from.
    pub fn sources(&self) -> &Arc<HostSources> {
        &self.sources
    }

    /// How the last work on a whole base went, or goes.
    pub fn progress(&self, base: u64) -> Option<Progress> {
        self.hydrations.progress(base)
    }
}
