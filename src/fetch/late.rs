//! Blocks that the cache's disk was too slow for: they are looked for in the cache again as long as readers wait for them.
//!
//! Why: their server was asked, and need not be there any more. A hydrated base may have its only copy in the cache. What
//! must hold: a block is looked for after its unit is in the table, so that it is not missed there; one thread at a time
//! looks for one source.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::transit::Found;
use super::{Reason, Shared};

/// See the module.
#[derive(Default)]
pub(super) struct Looking {
    blocks: BTreeSet<u64>,
    /// A thread looks for them.
    looking: bool,
}

impl Shared {
    /// Looks for blocks that are in transit.
    pub(super) fn look_for(self: &Arc<Self>, blocks: Vec<u64>) {
        if blocks.is_empty() {
            return;
        }
        {
            let mut late = self.late.lock();
            late.blocks.extend(blocks);
            if std::mem::replace(&mut late.looking, true) {
                return;
            }
        }
        let this = self.clone();
        self.patience.spawn(move || this.look());
    }

    fn look(&self) {
        let mut found = false;
        loop {
            let block = {
                let mut late = self.late.lock();
                match late.blocks.pop_first() {
                    Some(block) => block,
                    None => {
                        late.looking = false;
                        break;
                    }
                }
            };
            if self.is_coming(block) {
                found |= self.look_for_one(block);
            }
        }
        if found {
            self.cancel_needless();
        }
    }

    /// Whether a block is under way; it is not held.
    fn is_coming(&self, block: u64) -> bool {
        let unit = self.table.lock().transit.get(block);
        unit.is_some_and(|unit| matches!(unit.find(), Found::Coming))
    }

    fn look_for_one(&self, block: u64) -> bool {
        let mut bytes = vec![0; self.block_len(block)];
        if self.patience.counted(&*self.keep, |keep| keep.read(block, &mut bytes)) != 1 {
            return false;
        }
        let unit = self.table.lock().transit.get(block);
        let Some(unit) = unit.filter(|unit| matches!(unit.find(), Found::Coming)) else { return false };
        self.traffic.add(Reason::Disk, bytes.len() as u64);
        unit.arrived(bytes.into());
        true
    }
}
