//! Seals the delta of a disk: it becomes a layer that never changes, and the disk goes on with a new delta above it.
//!
//! The steps, each of which a crash may follow (docs/format.md, "Sealing"):
//! 1. The record lists the delta as a *pending* layer, and names the new delta. The disk still writes to the old one.
//! 2. Calls that change the disk are held for a moment, and go to the new delta from then on.
//! 3. The old delta is flushed, for the last time, and its index is made.
//! 4. The record says that the layer is sealed.
//!
//! What must hold: a flush of the disk also flushes a pending layer (D79). Nothing but the record of its disk names a
//! pending layer. The live map of a layer is removed when no request reads through it.

use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;

use super::{DiskNode, StoreError, removed};
use crate::base::Base;
use crate::delta::{Delta, DeltaSpec};
use crate::disk::{Below, Disk, Frozen};
use crate::format::lineage::{LayerEntry, Lineage, Place, Seal, SnapshotEntry};
use crate::format::record::{DiskRecord, MapRoot, Token};
use crate::io::sys;
use crate::layers::{Chain, LayerError};
use crate::mutant::limit;

/// What a disk shows at one moment: the layer on which a snapshot or a clone of it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::store) struct Moment {
    /// In the lineage of the disk; `None`: the base, or nothing.
    pub layer: Option<Place>,
    /// Bytes of the disk.
    pub size: u64,
    /// Bytes from the start that fall through to the layer or the base.
    pub overlap: u64,
}

impl DiskNode {
    /// Opens the disk of a record: its delta, what is pending below it, and the chain of sealed layers.
    pub(super) fn open_disk(&self, record: &DiskRecord, base: Option<Arc<Base>>) -> Result<Disk, StoreError> {
        let chain = self.chain(record, record.lineage.below)?;
        self.open_stack(record, Below { chain, base, pending: Vec::new() })
    }

    /// As [`DiskNode::open_disk`], for a flush: what lies below the pending layers is not read.
    pub(super) fn open_without_index(&self, record: &DiskRecord) -> Result<Disk, StoreError> {
        self.open_stack(record, Below::default())
    }

    fn open_stack(&self, record: &DiskRecord, mut below: Below) -> Result<Disk, StoreError> {
        let lineage = &record.lineage;
        for layer in lineage.chain(lineage.below).take_while(|layer| layer.is_pending()) {
            below.pending.push(self.open_delta(Self::layer_spec(lineage, layer))?);
        }
        let mut spec = Self::spec(record);
        // The new delta was not written yet: its size is the one that the old delta has at last.
        if let Some(pending) = below.pending.first().filter(|_| spec.root.generation == 0) {
            (spec.size, spec.overlap) = (pending.size(), pending.size());
        }
        let delta = self.open_delta(spec)?;
        if let Some(pending) = below.pending.first() {
            delta.catch_up(pending);
        }
        Ok(Disk::over(delta, below))
    }

    /// The sealed layers from `top` on.
    pub(super) fn chain(
        &self,
        record: &DiskRecord,
        top: Option<Place>,
    ) -> Result<Option<Arc<Chain>>, StoreError> {
        let sealed = record.lineage.chain(top).skip_while(|layer| layer.is_pending());
        let mut specs: Vec<DeltaSpec> =
            sealed.map(|layer| Self::layer_spec(&record.lineage, layer)).collect();
        specs.reverse();
        // What is opened here is shared: it must have its key.
        self.unlock()?;
        let cipher = |delta| self.cipher(record, delta);
        self.shared
            .layers
            .chain_with(specs, self.shared.medium.clone(), &cipher)
            .map_err(|error: LayerError| self.failed(error))
    }

    /// Opens a snapshot; `None` when there is none of that number.
    ///
    /// # Errors
    /// As [`DiskNode::attach`].
    pub(crate) fn open_snapshot(&self, number: u64) -> Result<Option<Frozen>, StoreError> {
        loop {
            let record = self.record();
            let opened = self.open_snapshot_of(&record, number);
            // Its layers may have been replaced meanwhile, and its base.
            let now = self.record();
            if (&now.backing, &now.lineage.layers) == (&record.backing, &record.lineage.layers) {
                return opened;
            }
        }
    }

    fn open_snapshot_of(&self, record: &DiskRecord, number: u64) -> Result<Option<Frozen>, StoreError> {
        let lineage = &record.lineage;
        let Some(snapshot) = lineage.snapshots.iter().find(|snapshot| snapshot.number == number) else {
            return Ok(None);
        };
        self.check_base(record)?;
        let base = self.base().map(|base| base.attach()).transpose()?;
        let below = Below { chain: self.chain(record, snapshot.layer)?, base, pending: Vec::new() };
        Ok(Some(Frozen::new(below, snapshot.size, snapshot.overlap)))
    }

    /// Seals what the disk shows now, durably. A disk that was not written since it was made or sealed needs no new
    /// layer. `new_number` gives the number of the new delta.
    ///
    /// # Errors
    /// After a failed flush the disk refuses this as it refuses writes. It is also refused while indexes that cannot be
    /// written take too much memory (D93). Errors of the storage. The disk is served as before.
    pub(in crate::store) fn seal(
        &self,
        new_number: impl FnOnce() -> Result<u64, StoreError>,
    ) -> Result<Moment, StoreError> {
        self.seal_in(None, new_number)
    }

    /// As [`DiskNode::seal`], with the new delta in a pool, and also when the disk was not written.
    ///
    /// # Errors
    /// As [`DiskNode::seal`].
    pub(in crate::store) fn seal_into(
        &self,
        pool: u64,
        new_number: impl FnOnce() -> Result<u64, StoreError>,
    ) -> Result<Moment, StoreError> {
        self.seal_in(Some(pool), new_number)
    }

    fn seal_in(
        &self,
        pool: Option<u64>,
        new_number: impl FnOnce() -> Result<u64, StoreError>,
    ) -> Result<Moment, StoreError> {
        let disk = self.attach()?;
        let _sealing = self.sealing.lock();
        self.settle()?;
        let disk = self.peek().unwrap_or(disk);
        if let Some(why) = disk.delta().refuses_writes() {
            let object = format!("disk {}", self.name());
            return Err(StoreError::invalid(
                object,
                format!("it refuses writes ({why}); open it again first"),
            ));
        }
        if pool.is_none() && disk.delta().is_untouched() {
            let layer = self.writer.record.lock().lineage.below;
            return Ok(Moment { layer, size: disk.size(), overlap: disk.delta().overlap() });
        }
        if !self.shared.layers.has_room() {
            let limit = self.shared.layers.memory().limit >> 20;
            let why = format!(
                "the indexes of layers cannot be written to the store, and those in memory take more than {limit} MiB \
                 already; free space in the store (see `plyfs status` and the daemon's log), and repeat"
            );
            return Err(StoreError::invalid(format!("disk {}", self.name()), why));
        }
        // The long part of the flush runs while the disk is served. Nothing depends on it, and a simulation goes without.
        if limit(1, 0) == 1 {
            disk.delta().flush().map_err(|error| self.failed(error))?;
        }
        let number = new_number()?;
        self.shared
            .pools
            .place(number, pool.unwrap_or_else(|| self.shared.pools.home(disk.delta().number())));
        self.begin_sealing(number)?;
        let size = match disk.seal(|| self.put_above(&disk)) {
            Ok(size) => size,
            Err(error) => {
                if let Err(error) = self.undo_sealing(disk.delta()) {
                    tracing::warn!(disk = self.name(), %error, "the record of a sealing that failed stays for now; the next change of the layers, or the next start, clears it up");
                }
                return Err(error);
            }
        };
        drop(disk);
        self.settle()?;
        let layer = self.writer.record.lock().lineage.below;
        Ok(Moment { layer, size, overlap: size })
    }

    /// Step 1.
    fn begin_sealing(&self, number: u64) -> Result<(), StoreError> {
        let key = self.new_key(number)?;
        self.update(|record| {
            record.features.add_key(key);
            let lineage = &mut record.lineage;
            lineage.layers.push(LayerEntry {
                number: lineage.delta,
                below: lineage.below,
                seal: Seal::Pending,
                size: record.size,
                overlap: record.overlap,
                modified_ns: record.modified_ns,
                map: record.map,
            });
            lineage.below = Some(lineage.layers.len() - 1);
            lineage.delta = number;
            record.map = MapRoot::default();
        })
    }

    /// The new delta cannot be used: the disk goes on with `delta`. The record says what is right in either case, so an
    /// error here only leaves a layer that the next start completes. But no other layer may come above it before that.
    fn undo_sealing(&self, delta: &Delta) -> Result<(), StoreError> {
        let unused = self.writer.record.lock().lineage.delta;
        self.update(|record| {
            if let Some(layer) = record.lineage.layers.pop_if(|layer| layer.number == delta.number()) {
                record.lineage.delta = layer.number;
                record.lineage.below = layer.below;
                record.map = layer.map;
                record.modified_ns = layer.modified_ns;
                (record.size, record.overlap) = (layer.size, layer.overlap);
                record.size_is_current = false;
            }
        })?;
        if unused != delta.number() {
            // Logged; it takes a little memory until the machine restarts.
            let _ = self.remove_live_map(unused);
        }
        Ok(())
    }

    /// Step 2, while no call changes the disk: puts a new delta above that of `disk`. Returns the bytes of the disk.
    fn put_above(&self, disk: &Disk) -> Result<u64, StoreError> {
        let _opening = self.opening.lock();
        if self.is_retired() {
            return Err(StoreError::io(format!("disk {}", self.name()), "sealing it")(removed()));
        }
        let sealed = disk.delta();
        let spec = {
            let record = self.writer.record.lock();
            DeltaSpec { size: sealed.size(), overlap: sealed.size(), ..Self::spec(&record) }
        };
        let delta = self.open_delta(spec)?;
        delta.inherit(sealed);
        let mut below = disk.below().clone();
        below.pending.insert(0, sealed.clone());
        let above = Disk::over(delta, below).with_tap(self.tap().clone());
        *self.disk.write() = Some(Arc::new(above));
        Ok(sealed.size())
    }

    /// Steps 3 and 4, for a sealing that was begun by this worker or an earlier one. The caller holds `sealing`.
    pub(super) fn settle(&self) -> Result<(), StoreError> {
        if let Some(disk) = self.peek()
            && self.writer.record.lock().lineage.delta != disk.delta().number()
        {
            self.undo_sealing(disk.delta())?;
        }
        while let Some(disk) = self.peek()
            && let Some(delta) = disk.below().pending.last().cloned()
        {
            self.seal_layer(&delta)?;
            let record = self.writer.record.lock().clone();
            let place = record.lineage.layers.iter().position(|layer| layer.number == delta.number());
            let chain = self.chain(&record, place)?;
            let mut below = Below { chain, ..disk.below().clone() };
            below.pending.pop();
            self.limiter.quota().sealed(delta.leave_quota());
            // The delta is shared: calls that run meanwhile may use either disk.
            let _opening = self.opening.lock();
            *self.disk.write() = Some(Arc::new(disk.over_same(below)));
            self.rare().retiring.lock().push(delta);
        }
        self.retire_layers();
        Ok(())
    }

    /// Steps 3 and 4 for one layer, without its index.
    fn seal_layer(&self, delta: &Delta) -> Result<(), StoreError> {
        let before = delta.error_epoch();
        let sealed = delta.seal();
        if let Some(disk) = self.peek() {
            disk.delta().fail_with(delta, before);
        }
        let spec = sealed.map_err(|error| self.failed(error))?;
        if self.writer.record.lock().lineage.layer(spec.disk).is_some_and(|layer| !layer.is_pending()) {
            // An earlier attempt came that far, and found no index.
            return Ok(());
        }
        self.update(|record| {
            let is_above = record.lineage.below.is_some_and(|top| {
                record.lineage.layers[top].number == spec.disk && record.map.generation == 0
            });
            if let Some(layer) = record.lineage.layers.iter_mut().find(|layer| layer.number == spec.disk) {
                layer.seal = Seal::Sealed;
                (layer.map, layer.modified_ns) = (spec.root, spec.modified_ns);
                // As in the record of a disk, the size of one that was cut below its overlap stays as it was.
                layer.size = if spec.size >= layer.overlap { spec.size } else { layer.size };
            }
            if is_above {
                (record.size, record.overlap, record.modified_ns) = (spec.size, spec.size, spec.modified_ns);
                record.size_is_current = true;
            }
        })
    }

    /// Removes the live maps of sealed layers that no request reads through. Returns whether all are removed.
    pub(super) fn retire_layers(&self) -> bool {
        let Some(rare) = self.known_rare() else { return true };
        let mut retiring = rare.retiring.lock();
        retiring.retain(|delta| {
            // New references are only made of the disk in the slot, which has none of them.
            let is_used = Arc::strong_count(delta) > 1;
            is_used || self.remove_live_map(delta.number()).is_err()
        });
        retiring.is_empty()
    }

    pub(super) fn remove_live_map(&self, delta: u64) -> std::io::Result<()> {
        self.shared.live.remove(delta).inspect_err(|error| {
            tracing::warn!(disk = self.name(), delta, %error, "the live map of a sealed layer stays for now");
        })
    }

    /// Goes on with a sealing that an earlier worker began or that failed, and removes live maps that are not used any
    /// more. After a failure the next attempts wait ever longer. May wait for the store.
    pub(in crate::store) fn tend_layers(&self, now: Instant) {
        let has_pending = self.peek().is_some_and(|disk| !disk.below().pending.is_empty());
        if !has_pending {
            let Some(rare) = self.known_rare() else { return };
            rare.sealing_retry.succeeded();
            if rare.retiring.lock().is_empty() {
                return;
            }
        }
        let retry = &self.rare().sealing_retry;
        if !retry.is_due(now) {
            return;
        }
        let Some(_sealing) = self.sealing.try_lock() else { return };
        match self.settle() {
            Ok(()) => retry.succeeded(),
            Err(error) => {
                let pause = retry.failed(now).as_secs();
                tracing::warn!(disk = self.name(), %error, "a sealing cannot be completed; it is tried again in {pause} s");
            }
        }
    }

    /// Seals what is pending below a disk that is being closed, and removes the live maps of layers.
    pub(super) fn close_layers(&self, disk: &Disk) -> Result<(), StoreError> {
        for delta in disk.below().pending.iter().rev() {
            self.seal_layer(delta)?;
            self.rare().retiring.lock().push(delta.clone());
        }
        // No request runs any more.
        let Some(rare) = self.known_rare() else { return Ok(()) };
        for delta in rare.retiring.lock().drain(..) {
            let removed = self.shared.live.remove(delta.number());
            removed.map_err(StoreError::io(format!("disk {}", self.name()), "removing a live map"))?;
        }
        Ok(())
    }

    /// Changes what the disk needs. `unneeded` chooses, of the layers that the disk does not need any more, those that no
    /// other disk needs: the record lists them as dropped, until their files are removed. `dropping` is held from the
    /// choice until the record has it, and not while this disk is waited for.
    pub(in crate::store) fn drop_layers(
        &self,
        change: impl FnOnce(&mut Lineage),
        unneeded: impl FnOnce(Vec<u64>) -> Vec<u64>,
        dropping: &Mutex<()>,
    ) -> Result<(), StoreError> {
        let _sealing = self.sealing.lock();
        self.settle()?;
        let _dropping = dropping.lock();
        self.update(|record| {
            change(&mut record.lineage);
            let removed = record.lineage.remove_unneeded();
            record.lineage.dropped.extend(unneeded(removed));
        })
    }

    /// Puts the disk back on a snapshot, with a new delta. Returns what was served before. For `unneeded` and `dropping`
    /// see [`DiskNode::drop_layers`].
    pub(in crate::store) fn roll_back(
        &self,
        snapshot: &SnapshotEntry,
        (number, token): (u64, Option<Token>),
        unneeded: impl FnOnce(Vec<u64>) -> Vec<u64>,
        dropping: &Mutex<()>,
    ) -> Result<Weak<Disk>, StoreError> {
        let _sealing = self.sealing.lock();
        self.settle()?;
        let disk = self.attach()?;
        self.shared.pools.place(number, self.shared.pools.home(disk.delta().number()));
        let key = self.new_key(number)?;
        // All that can fail comes before the record, which drops what the disk has now.
        let chain = self.chain(&self.record(), snapshot.layer)?;
        disk.seal(|| {
            let _opening = self.opening.lock();
            if self.is_retired() {
                return Err(StoreError::io(format!("disk {}", self.name()), "rolling it back")(removed()));
            }
            let now = sys::now_ns();
            // Opening a delta looks at the record.
            let rises = self.writer.record.lock().lineage.rises;
            let delta = self.open_delta(DeltaSpec {
                disk: number,
                size: snapshot.size,
                overlap: snapshot.overlap,
                rises,
                modified_ns: now,
                root: MapRoot::default(),
            })?;
            delta.inherit(disk.delta());
            delta.set_modified_ns(now);
            let _dropping = dropping.lock();
            let recorded = self.update(|record| {
                record.features.add_key(key);
                let lineage = &mut record.lineage;
                let old = std::mem::replace(&mut lineage.delta, number);
                lineage.below = snapshot.layer;
                lineage.rolled_back = token;
                let removed = lineage.remove_unneeded();
                lineage.dropped.extend(unneeded(removed).into_iter().chain([old]));
                (record.size, record.overlap, record.map) =
                    (snapshot.size, snapshot.overlap, MapRoot::default());
                record.size_is_current = true;
                record.modified_ns = now;
            });
            if let Err(error) = recorded {
                // A power cut may leave either record. The next flush writes that of the disk as it is.
                disk.delta().write_map_anew();
                let _ = self.remove_live_map(number);
                return Err(error);
            }
            let below = Below { chain, base: disk.below().base.clone(), pending: Vec::new() };
            let back = Disk::over(delta, below).with_tap(self.tap().clone());
            self.rare().rolled_back.lock().push(Arc::downgrade(&disk));
            *self.disk.write() = Some(Arc::new(back));
            Ok(())
        })?;
        Ok(Arc::downgrade(&disk))
    }

    /// Whether no request reads what a rollback dropped.
    pub(in crate::store) fn is_quiet(&self) -> bool {
        let Some(rare) = self.known_rare() else { return true };
        let mut rolled_back = rare.rolled_back.lock();
        rolled_back.retain(|disk| disk.strong_count() > 0);
        rolled_back.is_empty()
    }

    /// Whether its record lists deltas whose files are to be removed.
    pub(in crate::store) fn has_dropped(&self) -> bool {
        !self.writer.record.lock().lineage.dropped.is_empty()
    }
}
