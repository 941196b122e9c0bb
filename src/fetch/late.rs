//! Late blocks: the drive of a place did not read them in time. A thread reads them from there while readers wait for
//! them.
//!
//! Why: the request goes to their server as well, but the server may be gone. The place may have the only copy of a
//! hydrated base. What must hold: the search for a block starts after its unit is in the table, so that its readers find
//! the result there. One thread at a time searches one place for one source.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::place::{LateRange, Place};
use super::transit::Found;
use super::{Reason, Shared};

/// See the module.
#[derive(Default)]
pub(super) struct LateBlocks {
    blocks: BTreeSet<u64>,
    /// A thread of the place's drive searches for them.
    searching: bool,
}

impl Shared {
    /// Searches places for blocks that are in transit.
    pub(super) fn search_late(self: &Arc<Self>, ranges: Vec<LateRange>) {
        for LateRange { place, first, blocks } in ranges {
            {
                let mut late = place.late.lock();
                late.blocks.extend(first..first + blocks);
                if std::mem::replace(&mut late.searching, true) {
                    continue;
                }
            }
            let (this, searched) = (self.clone(), place.clone());
            place.timed_reads.spawn(move || this.search(&searched));
        }
    }

    fn search(&self, place: &Place) {
        let mut found = false;
        loop {
            let block = {
                let mut late = place.late.lock();
                match late.blocks.pop_first() {
                    Some(block) => block,
                    None => {
                        late.searching = false;
                        break;
                    }
                }
            };
            if self.is_pending(block) {
                found |= self.search_one(place, block);
            }
        }
        if found {
            self.cancel_needless();
        }
    }

    /// Whether a block is in transit and has not come. Does not hold it afterwards.
    fn is_pending(&self, block: u64) -> bool {
        let unit = self.table.lock().transit.get(block);
        unit.is_some_and(|unit| matches!(unit.find(), Found::Pending))
    }

    fn search_one(&self, place: &Place, block: u64) -> bool {
        let mut bytes = vec![0; self.block_len(block)];
        if place.timed_reads.counted(&*place.keep, |keep| keep.read(block, &mut bytes)) != 1 {
            return false;
        }
        let unit = self.table.lock().transit.get(block);
        let Some(unit) = unit.filter(|unit| matches!(unit.find(), Found::Pending)) else { return false };
        self.traffic.add(Reason::Disk, bytes.len() as u64);
        unit.complete(bytes.into());
        true
    }
}
