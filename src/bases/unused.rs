//! Bases that nothing needs: which there are, what their removal frees, and which go.
//!
//! What must hold (D83): a base that goes is needed by no record, is not pinned, and no client has its file open; no job
//! runs on it. The store checks the records again when it removes the base, under the base's claim.

use std::sync::Arc;
use std::time::Duration;

use super::Bases;
use super::hydrate::What;
use crate::events::{Event, Events, Kind};
use crate::fetch::kept::Reach;
use crate::format::record::ImageFile;
use crate::store::{BaseNode, StoreError};

/// A base that nothing needs.
#[derive(Clone)]
pub struct UnusedBase {
    /// The base.
    pub base: Arc<BaseNode>,
    /// When it was needed last, nanoseconds since the epoch.
    pub used_ns: i64,
    /// Bytes of the store that its removal frees.
    pub bytes: u64,
}

/// How long unused bases are kept, and how many.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnusedLimits {
    /// A base goes that nothing needed for this long.
    pub age: Option<Duration>,
    /// Bytes that unused bases may take in the store.
    pub bytes: Option<u64>,
}

impl UnusedBase {
    fn age(&self, now_ns: i64) -> Duration {
        Duration::from_nanos(u64::try_from(now_ns.saturating_sub(self.used_ns)).unwrap_or(0))
    }
}

/// Those of these bases that go, the least recently used first, each with the reason. `unused` is in that order.
fn surplus(unused: &[UnusedBase], limits: UnusedLimits, now_ns: i64) -> Vec<(usize, String)> {
    let mut left: u64 = unused.iter().map(|base| base.bytes).sum();
    let mut out = Vec::new();
    for (at, base) in unused.iter().enumerate() {
        let age = base.age(now_ns);
        let reason = match limits {
            UnusedLimits { age: Some(limit), .. } if age >= limit => {
                format!("nothing has needed it for {}", crate::config::keys::time(limit))
            }
            // What takes nothing in the store frees nothing there.
            UnusedLimits { bytes: Some(limit), .. } if left > limit && base.bytes > 0 => {
                "unused bases take more than they may, and it is the least recently used".to_owned()
            }
            _ => continue,
        };
        left -= base.bytes;
        out.push((at, reason));
    }
    out
}

impl Bases {
    /// The bases that nothing needs and that are not pinned, the least recently used first. `is_open`: whether a client
    /// may have the base's own file open.
    pub fn unused(&self, is_open: &dyn Fn(&BaseNode) -> bool) -> Vec<UnusedBase> {
        let users = self.store.user_counts();
        let is_unused = |base: &&Arc<BaseNode>| {
            !users.contains_key(&base.id())
                && !base.options().pinned
                && !self.is_worked_on(base)
                && !is_open(base)
        };
        let bases = self.store.bases();
        let mut unused: Vec<UnusedBase> = bases
            .iter()
            .filter(is_unused)
            .map(|base| UnusedBase {
                used_ns: self.store.last_used(base),
                bytes: self.removable_bytes(base),
                base: base.clone(),
            })
            .collect();
        unused.sort_by_key(|unused| (unused.used_ns, unused.base.id()));
        unused
    }

    /// Whether a job on the base is under way.
    fn is_worked_on(&self, base: &BaseNode) -> bool {
        let is_under_way =
            |what| self.hydrations.progress_of(base, what).is_some_and(|progress| progress.ended.is_none());
        What::ON_BASES.into_iter().any(is_under_way)
    }

    /// Bytes in the cache on disk that no other base keeps.
    fn removable_bytes(&self, base: &BaseNode) -> u64 {
        let others = self.others(base);
        let goes = |file: &&ImageFile| !self.sources.is_shared(base.record(), file, &others);
        let bytes = |file| self.sources.contents(base.record(), file).cached_bytes(Reach::Proven);
        self.kept_files(base).filter(goes).map(bytes).sum()
    }

    /// Removes a base that was found unused, unless it is needed by now.
    ///
    /// # Errors
    /// As [`Bases::remove`].
    pub fn remove_unused(
        &self,
        unused: &UnusedBase,
        reason: &str,
        events: &Events,
    ) -> Result<(), StoreError> {
        let name = &unused.base.record().name;
        self.remove(name)?;
        tracing::info!(base = name, bytes = unused.bytes, reason, "an unused base is removed");
        events.emit(Event::of_base(Kind::BaseRemoved, name).bytes(unused.bytes).because(reason.to_owned()));
        Ok(())
    }

    /// Removes the first base, the least recently used, that goes by these limits. To be called about once a minute, until
    /// it returns `None`.
    ///
    /// # Errors
    /// As [`Bases::remove`].
    pub fn remove_surplus(
        &self,
        limits: UnusedLimits,
        now_ns: i64,
        is_open: &dyn Fn(&BaseNode) -> bool,
        events: &Events,
    ) -> Result<Option<Arc<BaseNode>>, StoreError> {
        let mut unused = self.unused(is_open);
        let Some((at, reason)) = surplus(&unused, limits, now_ns).into_iter().next() else { return Ok(None) };
        let first = unused.swap_remove(at);
        self.remove_unused(&first, &reason, events)?;
        Ok(Some(first.base))
    }
}
