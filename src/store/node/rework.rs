//! Makes a layer in the background that takes the place of what it copies: of layers that it merges, or of the base.
//!
//! The steps, each of which a crash may follow (docs/format.md, "A layer that is being made"):
//! 1. The record names the layer, on which nothing stands.
//! 2. Bytes are copied into it. From time to time it is flushed, and the record says how far it is.
//! 3. It is closed: everything is in its files.
//! 4. One replacement of the record puts it into the list, and drops what it takes the place of.
//!
//! What must hold: the disk and each of its snapshots show the same bytes before and after step 4 (D94). So requests that
//! run meanwhile may read through either. While a layer is made, the disk is not put on other ground.

use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use super::{DiskNode, StoreError, removed};
use crate::base::Base;
use crate::delta::{Delta, DeltaError, Edges};
use crate::disk::{Below, Disk, DiskError, Frozen, Seek};
use crate::format::BLOCK;
use crate::format::lineage::{LayerEntry, Lineage, Seal};
use crate::format::record::DiskRecord;
use crate::format::rework::{Purpose, Rework};
use crate::layers::{Chain, Part};
use crate::mutant::{Mutant, limit};
use crate::store::BaseNode;

/// Bytes that are read, compared and written at a time.
const PIECE: u64 = 1 << 20;

fn piece() -> u64 {
    limit(PIECE, 16 << 10)
}

/// Whether the files of a layer that is being made may be written. Held shared by each write; never while a base is read.
pub(super) type Alive = Arc<RwLock<bool>>;

/// A layer that is being made.
pub struct Making {
    delta: Arc<Delta>,
    alive: Alive,
    source: Source,
    size: u64,
    overlap: u64,
}

/// What is copied.
enum Source {
    /// The bytes of some layers of a chain.
    Merge { layers: Vec<u64>, chain: Arc<Chain>, all: Frozen },
    /// The bytes in which what the disk shows differs from another base.
    Difference { old: Frozen, new: Frozen },
}

/// What became of the bytes of a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// Where the next part begins.
    pub next: u64,
    /// Bytes that were read for it, for a limit on the rate.
    pub read: u64,
}

/// What a block of the new layer must have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wanted {
    Nothing,
    Zero,
    Data,
}

impl Making {
    /// Bytes of the layer's disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Copies the next part, from byte `at` on, a multiple of the block's size.
    ///
    /// # Errors
    /// Bytes of a base that must be fetched first ([`DiskError::completion`]): the call is made again then. Errors of the
    /// storage.
    pub fn step(&self, at: u64) -> Result<Step, DiskError> {
        match &self.source {
            Source::Merge { layers, chain, all } => self.merge(layers, chain, all, at),
            Source::Difference { old, new } => self.difference(old, new, at),
        }
    }

    /// Makes what was copied durable.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn flush(&self) -> Result<(), DiskError> {
        self.with_delta(Delta::flush)
    }

    /// Runs a call that writes files of the layer.
    fn with_delta(&self, call: impl FnOnce(&Delta) -> Result<(), DeltaError>) -> Result<(), DiskError> {
        let alive = self.alive.read();
        if !*alive {
            return Err(DeltaError::io("copying layers")(removed()).into());
        }
        Ok(call(&self.delta)?)
    }

    fn merge(&self, layers: &[u64], chain: &Chain, all: &Frozen, at: u64) -> Result<Step, DiskError> {
        let longest = self.size.min(at + piece());
        let (wanted, mut end) = self.part(layers, chain, at, longest)?;
        if !end.is_multiple_of(BLOCK) && end < self.size {
            end = end / BLOCK * BLOCK;
            if end <= at {
                return self.merge_mixed(layers, chain, all, at);
            }
        }
        self.put(wanted, at, end, |buf, at| read_all(all, buf, at))
    }

    /// A block of which parts lie in different layers, because a disk ended in it or its overlap did.
    fn merge_mixed(&self, layers: &[u64], chain: &Chain, all: &Frozen, at: u64) -> Result<Step, DiskError> {
        let end = self.size.min(at + BLOCK);
        let (mut from, mut wanted) = (at, Wanted::Nothing);
        while from < end {
            let (part, stop) = self.part(layers, chain, from, end)?;
            if part == Wanted::Data {
                wanted = part;
            }
            from = stop;
        }
        self.put(wanted, at, end, |buf, at| read_all(all, buf, at))
    }

    fn part(&self, layers: &[u64], chain: &Chain, at: u64, end: u64) -> Result<(Wanted, u64), DiskError> {
        let (part, stop) = chain.extent(at, end)?;
        let wanted = match part {
            Part::Zero => Wanted::Zero,
            Part::Layer(file) if layers.contains(&file.number()) => Wanted::Data,
            Part::Layer(_) | Part::Below => Wanted::Nothing,
        };
        Ok((wanted, stop))
    }

    fn difference(&self, old: &Frozen, new: &Frozen, at: u64) -> Result<Step, DiskError> {
        let next = |view: &Frozen| Ok::<_, DiskError>(view.seek(at, Seek::Data)?.unwrap_or(u64::MAX));
        let data = next(old)?.min(next(new)?);
        if data >= self.size {
            return Ok(Step { next: self.size, read: 0 });
        }
        let at = at.max(data / BLOCK * BLOCK);
        let end = self.size.min(at + piece());
        let (mut theirs, mut ours) = (vec![0; (end - at) as usize], vec![0; (end - at) as usize]);
        read_all(new, &mut theirs, at)?;
        read_all(old, &mut ours, at)?;
        let wanted: Vec<Wanted> = ours
            .chunks(BLOCK as usize)
            .zip(theirs.chunks(BLOCK as usize))
            .map(|(ours, theirs)| match ours == theirs {
                true => Wanted::Nothing,
                false if ours.iter().all(|byte| *byte == 0) => Wanted::Zero,
                false => Wanted::Data,
            })
            .collect();
        let mut from = at;
        for run in wanted.chunk_by(|a, b| a == b) {
            let stop = (from + run.len() as u64 * BLOCK).min(end);
            self.put(run[0], from, stop, |buf, from| {
                let first = (from - at) as usize;
                buf.copy_from_slice(&ours[first..first + buf.len()]);
                Ok(())
            })?;
            from = stop;
        }
        Ok(Step { next: end, read: end - at })
    }

    /// Puts a run of blocks into the layer. The end is that of a block, or of the disk.
    fn put(
        &self,
        wanted: Wanted,
        at: u64,
        end: u64,
        read: impl FnOnce(&mut [u8], u64) -> Result<(), DiskError>,
    ) -> Result<Step, DiskError> {
        let mut copied = 0;
        match wanted {
            Wanted::Nothing => {}
            Wanted::Zero if at < self.overlap => {
                self.with_delta(|delta| delta.zero_blocks(at / BLOCK, end.div_ceil(BLOCK)))?;
            }
            Wanted::Zero => {}
            Wanted::Data => {
                let mut bytes = vec![0; (end - at) as usize];
                read(&mut bytes, at)?;
                self.with_delta(|delta| delta.write(at, &bytes, &Edges::default()))?;
                copied = end - at;
            }
        }
        Ok(Step { next: end, read: copied })
    }
}

/// Fills `buf`; zeros behind the end of the view.
fn read_all(view: &Frozen, buf: &mut [u8], at: u64) -> Result<(), DiskError> {
    let len = view.size().saturating_sub(at).min(buf.len() as u64) as usize;
    view.read(at, &mut buf[..len], 0)?;
    buf[len..].fill(0);
    Ok(())
}

impl Lineage {
    /// The numbers of the layers that a merge takes the place of, the highest first. `None` when they do not lie one above
    /// the other any more, or something else stands on one of them but the highest.
    pub(in crate::store) fn run(&self, first: u64, last: u64) -> Option<Vec<u64>> {
        let mut numbers = Vec::new();
        let mut at = self.place(last);
        while let Some(place) = at {
            let layer = &self.layers[place];
            if layer.is_pending() || (layer.number != last && self.stand_on(place) != 1) {
                return None;
            }
            numbers.push(layer.number);
            if layer.number == first {
                return Some(numbers);
            }
            at = layer.below;
        }
        None
    }

    /// Whether the disk and all snapshots stand on a layer.
    fn all_stand_on(&self, number: u64) -> bool {
        let tops = self.snapshots.iter().map(|snapshot| snapshot.layer).chain([self.below]);
        tops.into_iter().all(|top| self.chain(top).any(|layer| layer.number == number))
    }

    /// Puts the complete layer in the place of what it copies. False when that is not there any more.
    fn put_made(&mut self, rework: &Rework) -> bool {
        let layer = LayerEntry { seal: Seal::Sealed, ..rework.layer.clone() };
        match rework.purpose {
            Purpose::Merge { first, last } => {
                let (Some(_), Some(lowest), Some(highest)) =
                    (self.run(first, last), self.place(first), self.place(last))
                else {
                    return false;
                };
                let below = self.layers[lowest].below;
                self.insert(highest + 1, LayerEntry { below, ..layer }, Some(highest));
            }
            Purpose::Rebase { top: None, .. } => self.insert(0, LayerEntry { below: None, ..layer }, None),
            Purpose::Rebase { top: Some(top), .. } => {
                let Some(place) = self.place(top).filter(|_| self.all_stand_on(top)) else { return false };
                self.insert(place + 1, LayerEntry { below: None, ..layer }, Some(place));
            }
        }
        true
    }
}

/// The base that a disk comes to stand on, or none.
pub(in crate::store) struct NextBase(pub Option<(Arc<BaseNode>, Arc<Base>)>);

impl DiskNode {
    /// The layer that is being made for the disk.
    pub fn rework(&self) -> Option<Rework> {
        self.writer.record.lock().lineage.rework.as_deref().cloned()
    }

    /// Bytes from the start that fall through all of these sealed layers, as their map files have it. The record has what
    /// fell through when they were made: a cut left less, and a copy that shows what lies below left more.
    ///
    /// # Errors
    /// A map file that cannot be read.
    pub(in crate::store) fn overlap_of(&self, lineage: &Lineage, layers: &[u64]) -> Result<u64, StoreError> {
        let mut least = u64::MAX;
        for layer in lineage.layers.iter().filter(|layer| layers.contains(&layer.number)) {
            let medium = self.shared.pools.medium(layer.number);
            let survey = Delta::survey_durable(&Self::layer_spec(lineage, layer), &*medium);
            least = least.min(survey.map_err(|error| self.failed(error))?.overlap);
        }
        Ok(least)
    }

    /// Step 1.
    ///
    /// # Errors
    /// Errors of the storage.
    pub(in crate::store) fn begin_rework(&self, rework: Rework) -> Result<(), StoreError> {
        // No key is exchanged meanwhile.
        let _sealing = self.sealing.lock();
        let key = self.new_key(rework.layer.number)?;
        self.update(|record| {
            record.lineage.rework = Some(Box::new(rework));
            record.features.add_key(key);
        })
    }

    /// Notes how far the layer is, durably, or another limit on the rate.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn note_rework(&self, done: u64, rate: u64) -> Result<(), StoreError> {
        self.update(|record| {
            if let Some(rework) = &mut record.lineage.rework {
                (rework.done, rework.rate) = (done, rate);
            }
        })
    }

    /// Opens the layer that is being made, and what it copies.
    ///
    /// # Errors
    /// There is none; a base or a layer that cannot be opened.
    pub(in crate::store) fn open_rework(&self, new_base: Option<Arc<Base>>) -> Result<Making, StoreError> {
        let record = self.record();
        let object = || format!("disk {}", record.name);
        let Some(rework) = &record.lineage.rework else {
            return Err(StoreError::invalid(object(), "no layer is being made for it"));
        };
        self.check_base(&record)?;
        let base = self.base().map(|base| base.attach()).transpose()?;
        self.unlock()?;
        let (size, overlap) = (rework.layer.size, rework.layer.overlap);
        let lineage = &record.lineage;
        let gone = || StoreError::invalid(object(), "the layers that were to be copied are gone");
        let source = match &rework.purpose {
            Purpose::Merge { first, last } => {
                let layers = lineage.run(*first, *last).ok_or_else(gone)?;
                let top = lineage.layer(*last).ok_or_else(gone)?.size;
                if (size, overlap) != (top, self.overlap_of(lineage, &layers)?.min(top)) {
                    // An earlier version began it with the overlap of the record. What it has copied does not tell what
                    // is hidden.
                    let why = "the layer that is being made for it has another size or overlap than those that it is to \
                               replace; begin the job again";
                    return Err(StoreError::invalid(object(), why));
                }
                let chain = self.chain(&record, lineage.place(*last))?.ok_or_else(gone)?;
                let below = Below { chain: Some(chain.clone()), base, pending: Vec::new() };
                Source::Merge { layers, chain, all: Frozen::new(below, size, size) }
            }
            Purpose::Rebase { top, .. } => {
                let place = top.map(|top| lineage.place(top).ok_or_else(gone)).transpose()?;
                let below = Below { chain: self.chain(&record, place)?, base, pending: Vec::new() };
                let new = Frozen::new(Below::only(new_base), overlap, overlap);
                Source::Difference { old: Frozen::new(below, size, size), new }
            }
        };
        let _opening = self.opening.lock();
        if self.is_retired() {
            return Err(StoreError::io(object(), "copying its layers")(removed()));
        }
        let delta = self.open_uncounted(Self::layer_spec(lineage, &rework.layer))?;
        let alive = Alive::new(RwLock::new(true));
        *self.rare().making.lock() = Some(alive.clone());
        Ok(Making { delta, alive, source, size, overlap })
    }

    /// Closes the layer that is being made, for a later worker or for the last step: its files have everything.
    ///
    /// # Errors
    /// Errors of the storage.
    pub(in crate::store) fn close_rework(&self, making: &Making) -> Result<(), StoreError> {
        if !Mutant::MadeNotClosed.is_active() {
            making.with_delta(Delta::close).map_err(|error| self.failed(error))?;
        }
        self.end_making();
        Ok(())
    }

    /// From here on no file of the layer that is being made is written.
    pub(super) fn end_making(&self) {
        if let Some(alive) = self.known_rare().and_then(|rare| rare.making.lock().take()) {
            *alive.write() = false;
        }
    }

    /// Closes the layer that an earlier worker was making, when its live map has more than its files.
    pub(super) fn close_inherited_rework(&self) -> Result<(), StoreError> {
        self.end_making();
        let record = self.record();
        let Some(rework) = &record.lineage.rework else { return Ok(()) };
        if self.shared.pools.trouble_of([rework.layer.number]).is_some() {
            if self.shared.pools.is_gone(rework.layer.number) {
                // Logged. The record says how far the files are.
                let _ = self.remove_live_map(rework.layer.number);
            }
            return Ok(());
        }
        let live = self.shared.live.existing(rework.layer.number);
        let failed = StoreError::io(format!("disk {}", self.name()), "looking for a live map");
        if live.map_err(failed)?.is_none() {
            return Ok(());
        }
        let delta = self.open_uncounted(Self::layer_spec(&record.lineage, &rework.layer))?;
        delta.close().map_err(|error| self.failed(error))
    }

    /// Step 4. `follow` says, from what the disk stands on then, which layer is made next; the same record has it, so that no
    /// crash ends the work in between. Returns what was served before, when the disk is attached. `None` when what the layer copies is not there
    /// any more: nothing has changed. For `unneeded` and `dropping` see [`DiskNode::drop_layers`].
    ///
    /// # Errors
    /// Errors of the storage. The disk is then as before.
    pub(in crate::store) fn finish_rework(
        &self,
        base: NextBase,
        unneeded: impl FnOnce(Vec<u64>) -> Vec<u64>,
        dropping: &Mutex<()>,
        follow: impl FnOnce(&Lineage) -> Option<Rework>,
    ) -> Result<Option<Weak<Disk>>, StoreError> {
        let attached = self.attach()?;
        let _sealing = self.sealing.lock();
        self.settle()?;
        let disk = self.peek().unwrap_or_else(|| attached.clone());
        drop(attached);
        let change = |record: &mut DiskRecord| {
            let Some(rework) = record.lineage.rework.take() else { return false };
            if !record.lineage.put_made(&rework) {
                return false;
            }
            if let Purpose::Rebase { to, .. } = rework.purpose
                && !Mutant::BaseNotReplaced.is_active()
            {
                record.backing = to;
            }
            true
        };
        let mut next = self.record();
        let is_rebase = matches!(
            next.lineage.rework.as_ref().map(|rework| &rework.purpose),
            Some(Purpose::Rebase { .. })
        );
        if !change(&mut next) {
            return Ok(None);
        }
        let chain = self.chain(&next, next.lineage.below)?;
        let below = match (is_rebase, &base.0) {
            (true, Some((_, base))) => Some(base.clone()),
            (true, None) => None,
            (false, _) => disk.below().base.clone(),
        };
        let _opening = self.opening.lock();
        if self.is_retired() {
            let error = StoreError::io(format!("disk {}", self.name()), "replacing its layers");
            return Err(error(removed()));
        }
        let _dropping = dropping.lock();
        next.lineage.remove_unneeded();
        let follow = follow(&next.lineage)
            .map(|rework| Ok::<_, StoreError>((self.new_key(rework.layer.number)?, rework)))
            .transpose()?;
        self.update(|record| {
            change(record);
            let removed = record.lineage.remove_unneeded();
            record.lineage.dropped.extend(unneeded(removed));
            if let Some((key, rework)) = follow {
                record.lineage.rework = Some(Box::new(rework));
                record.features.add_key(key);
            }
        })?;
        if is_rebase {
            *self.base.write() = base.0.map(|(node, _)| node);
        }
        let below = Below { chain, base: below, pending: Vec::new() };
        self.rare().rolled_back.lock().push(Arc::downgrade(&disk));
        let over = disk.over_same(below);
        // The trace of another base is not that of this disk.
        let over = if is_rebase { over.without_tap() } else { over };
        *self.disk.write() = Some(Arc::new(over));
        Ok(Some(Arc::downgrade(&disk)))
    }

    /// Drops the layer that is being made.
    ///
    /// # Errors
    /// Errors of the storage; the next start goes on with it.
    pub(in crate::store) fn drop_rework(&self) -> Result<(), StoreError> {
        self.end_making();
        if self.rework().is_none() {
            return Ok(());
        }
        self.update(|record| {
            if let Some(rework) = record.lineage.rework.take() {
                record.lineage.dropped.push(rework.layer.number);
            }
        })
    }

    /// Puts a disk that is not in use on another base, whose bytes need not be the same. Blocks that were written stay.
    ///
    /// # Errors
    /// `InUse`; errors of the storage. The disk is then as before.
    pub(in crate::store) fn set_base(&self, base: &Arc<BaseNode>) -> Result<(), StoreError> {
        let in_use =
            || StoreError::InUse { object: format!("disk {}", self.name()), users: "a request".into() };
        if !self.detach() {
            return Err(in_use());
        }
        let _attach = self.attach.lock();
        let _opening = self.opening.lock();
        if self.peek().is_some() {
            return Err(in_use());
        }
        let backing = base.backing();
        self.update(|record| record.backing = Some(backing))?;
        *self.base.write() = Some(base.clone());
        self.note_failure(None);
        Ok(())
    }
}
