//! The hook that every call of the simulated medium runs: it cuts power, kills workers and injects faults.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::Mutex;

use super::model::Model;
use super::operation::Op;
use super::{Campaign, Counts, cut};
use crate::format::journal::{Expected, Journal, MapHeader};
use crate::format::record::DiskRecord;
use crate::io::sim::{Call, Event, Rng, SimLive, SimMedium, Stage};

/// A fault that the hook injects into a later call.
#[derive(Debug, Default)]
pub(super) struct PlannedFault {
    /// Calls until the fault; `None` when none is planned.
    pub(super) skip: Option<u64>,
    pub(super) errno: i32,
    /// The call that failed.
    pub(super) hit: Option<Call>,
}

/// The state of the hook of one store.
pub(super) struct HookState {
    pub campaign: Arc<Campaign>,
    pub medium: SimMedium,
    pub live: Arc<SimLive>,
    pub model: Mutex<Model>,
    /// The operation that runs. The next worker gets it again after a worker's death.
    pub running: Mutex<Option<Op>>,
    pub rng: Mutex<Rng>,
    pub(super) fault: Mutex<PlannedFault>,
    /// Power was cut, and the store was not opened since: the model does not know its state yet.
    pub(super) unsure: AtomicBool,
    /// The number of cuts of this store so far.
    pub depth: u32,
    /// Whether several threads run operations.
    pub concurrent: bool,
}

impl HookState {
    /// Removes the hook, which would otherwise keep itself alive.
    pub fn release(&self) {
        self.medium.set_hook(None);
    }

    pub fn violated(&self, message: &str) -> String {
        let log = self.model.lock().log.clone();
        self.campaign.violated(&log, message);
        message.to_owned()
    }

    /// What the file of an event has now, when that says more than its name.
    fn contents(&self, event: &Event<'_>) -> String {
        let shows = match event.call {
            Call::Rename => event.name.ends_with(".disk"),
            Call::SyncData => event.name.ends_with(".map"),
            _ => false,
        };
        if !shows || event.stage == Stage::Before {
            return String::new();
        }
        let files = self.medium.files();
        let Some(bytes) = files.into_iter().find(|(name, ..)| name == event.name).and_then(|found| found.2)
        else {
            return String::new();
        };
        if event.call == Call::Rename {
            let shown = |record: DiskRecord| {
                format!(": backing {:?}, {:?}", record.backing.map(|b| b.base), record.lineage)
            };
            return DiskRecord::decode(&bytes).map(shown).unwrap_or_default();
        }
        let Ok(header) = MapHeader::decode(&bytes) else { return String::new() };
        let (disk, generation) = (header.disk, header.generation);
        let expected = Expected { disk, generation, floor: 0, size: 0, overlap: 0, modified_ns: 0 };
        let shown = |map: Journal| {
            let (size, overlap, carried) = (map.size, map.overlap, map.carried.len());
            format!(
                ": size {size}, overlap {overlap}, carried {carried}, data up to block {}",
                map.map.data_end()
            )
        };
        Journal::decode(&bytes, &expected).map(shown).unwrap_or_default()
    }

    /// Runs at every call of the medium.
    pub fn at(self: &Arc<Self>, event: &Event<'_>) -> io::Result<()> {
        let stop = || io::Error::other("the campaign has stopped");
        if self.campaign.stopped() {
            return Err(stop());
        }
        cut::at(self, event);
        if self.campaign.trace && !matches!(event.call, Call::Read | Call::Open) {
            let line = format!("    {:?} {:?} {}", event.stage, event.call, event.name);
            self.model.lock().log.push(line + &self.contents(event));
        }
        if self.campaign.stopped() {
            return Err(stop());
        }
        if self.concurrent && self.rng.lock().chance(20) {
            // Let other threads run here.
            std::thread::yield_now();
        }
        let may_fail = match event.call {
            Call::SyncData | Call::SyncDir | Call::Rename => true,
            Call::Write | Call::Create | Call::SetLen | Call::Punch | Call::Remove => true,
            Call::Open | Call::Read | Call::Allocate | Call::MakeDir => false,
        };
        let mut fault = self.fault.lock();
        if may_fail && event.stage == Stage::Before {
            match fault.skip {
                Some(0) => {
                    fault.skip = None;
                    fault.hit = Some(event.call);
                    Counts::add(&self.campaign.counts.faults);
                    let space =
                        matches!(event.call, Call::Write | Call::Create | Call::SetLen | Call::Rename);
                    let errno = if space { fault.errno } else { libc::EIO };
                    return Err(io::Error::from_raw_os_error(errno));
                }
                Some(n) => fault.skip = Some(n - 1),
                None => {}
            }
        }
        Ok(())
    }
}
