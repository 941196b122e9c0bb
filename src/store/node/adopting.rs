//! Puts a disk that shows nothing of what lies below it on other layers and another base, which a copy then shows.
//!
//! What must hold: what the disk shows does not change. A request that began before reads through what was below then
//! (D81).

use std::sync::Arc;

use parking_lot::Mutex;

use super::{DiskNode, StoreError, removed};
use crate::delta::DeltaSpec;
use crate::disk::{Below, Disk};
use crate::format::lineage::{Lineage, Place};
use crate::format::record::{Backing, DiskRecord, MapRoot};
use crate::layers::Chain;
use crate::store::BaseNode;

/// What a disk comes to stand on.
pub(in crate::store) struct NewGround {
    pub backing: Option<Backing>,
    pub base: Option<Arc<BaseNode>>,
    /// The layers, and the one at the top.
    pub lineage: Lineage,
    pub top: Option<Place>,
}

/// Why a disk was not put on new ground.
enum Stays {
    /// It shows something.
    InUse,
    Failed(StoreError),
}

impl From<StoreError> for Stays {
    fn from(error: StoreError) -> Self {
        Self::Failed(error)
    }
}

impl DiskNode {
    /// Puts the disk on other ground, if it shows nothing of what it stands on. Returns whether it did. `new_number`
    /// gives the number of a new delta; for `unneeded` and `dropping` see [`DiskNode::drop_layers`].
    ///
    /// # Errors
    /// Errors of the storage. The disk is then as before.
    pub(in crate::store) fn adopt(
        &self,
        ground: &NewGround,
        new_number: impl FnOnce() -> Result<u64, StoreError>,
        unneeded: impl FnOnce(Vec<u64>) -> Vec<u64>,
        dropping: &Mutex<()>,
    ) -> Result<bool, StoreError> {
        let disk = self.attach()?;
        // A base's files may hang: nothing is locked yet.
        let base = ground.base.as_ref().map(|base| base.attach()).transpose()?;
        let _sealing = self.sealing.lock();
        self.settle()?;
        let disk = self.peek().unwrap_or(disk);
        let adopted = disk.seal(|| {
            let _opening = self.opening.lock();
            if self.is_retired() {
                return Err(
                    StoreError::io(format!("disk {}", self.name()), "copying to it")(removed()).into()
                );
            }
            let below = disk.below();
            if disk.delta().overlap() != 0 || !below.pending.is_empty() {
                return Err(Stays::InUse);
            }
            // Requests that run may still read through what is below. It must not show bytes of its own to them when the
            // overlap grows.
            let keeps_delta = below.base.is_none() && below.chain.is_none();
            if !keeps_delta && disk.size() > 0 {
                return Err(Stays::InUse);
            }
            // Snapshots are read over the base of the record, and a layer that is being made belongs to it.
            let record = self.record();
            if record.lineage.rework.is_some()
                || record.backing != ground.backing && !record.lineage.snapshots.is_empty()
            {
                return Err(Stays::InUse);
            }
            let delta = if keeps_delta {
                disk.delta().clone()
            } else {
                let (modified_ns, root) = (disk.delta().modified_ns(), MapRoot::default());
                let number = new_number()?;
                self.shared.pools.place(number, self.shared.pools.home(disk.delta().number()));
                let spec = DeltaSpec { disk: number, size: 0, overlap: 0, rises: true, modified_ns, root };
                let delta = self.open_delta(spec)?;
                delta.inherit(disk.delta());
                delta
            };
            let change = |record: &mut DiskRecord| {
                record.backing.clone_from(&ground.backing);
                let lineage = &mut record.lineage;
                lineage.below = lineage.join(&ground.lineage, ground.top);
                lineage.rises = true;
                if !keeps_delta {
                    let old = std::mem::replace(&mut lineage.delta, delta.number());
                    lineage.dropped.push(old);
                    (record.size, record.overlap, record.map) = (0, 0, MapRoot::default());
                    record.size_is_current = true;
                }
            };
            let recorded = self.ground(change, unneeded, dropping);
            let chain = match recorded {
                Ok(chain) => chain,
                Err(error) => {
                    // A power cut may leave either record. The next flush writes that of the disk as it is.
                    disk.delta().write_map_anew();
                    if !keeps_delta {
                        let _ = self.remove_live_map(delta.number());
                    }
                    return Err(error.into());
                }
            };
            *self.base.write() = ground.base.clone();
            if !keeps_delta {
                self.rare().rolled_back.lock().push(Arc::downgrade(&disk));
            }
            let below = Below { chain, base, pending: Vec::new() };
            *self.disk.write() = Some(Arc::new(Disk::over(delta, below).with_tap(self.tap().clone())));
            Ok(())
        });
        match adopted {
            Ok(()) => Ok(true),
            Err(Stays::InUse) => Ok(false),
            Err(Stays::Failed(error)) => Err(error),
        }
    }

    /// Writes the record, and opens the chain that it names.
    fn ground(
        &self,
        change: impl Fn(&mut DiskRecord),
        unneeded: impl FnOnce(Vec<u64>) -> Vec<u64>,
        dropping: &Mutex<()>,
    ) -> Result<Option<Arc<Chain>>, StoreError> {
        let mut next = self.record();
        change(&mut next);
        let chain = self.chain(&next, next.lineage.below)?;
        let _dropping = dropping.lock();
        self.update(|record| {
            change(record);
            let removed = record.lineage.remove_unneeded();
            record.lineage.dropped.extend(unneeded(removed));
        })?;
        Ok(chain)
    }
}
