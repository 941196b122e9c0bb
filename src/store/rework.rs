//! Background changes of what a disk stands on: `compact` merges layers, `flatten` and `rebase` put the disk on no base or
//! on another one. The disk stays in use, and shows the same bytes throughout (D94).

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::index::Has;
use super::node::{Making, Moment, NextBase};
use super::{DiskNode, Store, StoreError};
use crate::base::Base;
use crate::format::lineage::{LayerEntry, Lineage, Seal};
use crate::format::record::MapRoot;
use crate::format::rework::{Purpose, Rework};
use crate::io::{Space, sys};
use crate::store::BaseNode;

/// How long a change waits for requests that still read what it replaced. After that, a later tick removes the files.
const PATIENCE: Duration = Duration::from_secs(2);

/// What is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// The disk needs no base any more.
    Flatten,
    /// The disk stands on the base of this name.
    Rebase(String),
    /// Layers between which nothing tells any more become one.
    Compact,
    /// The disk, its snapshots and the layers that it needs lie in the pool of this name.
    Move(String),
}

impl Change {
    const MOVE: &'static str = "move";

    /// That of a layer that is being made.
    pub fn of(purpose: &Purpose) -> &'static str {
        match purpose {
            // A merge takes the place of two layers at least.
            Purpose::Merge { first, last } if first == last => Self::MOVE,
            Purpose::Merge { .. } => "compact",
            Purpose::Rebase { to: None, .. } => "flatten",
            Purpose::Rebase { to: Some(_), .. } => "rebase",
        }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Flatten => "flatten",
            Self::Rebase(_) => "rebase",
            Self::Compact => "compact",
            Self::Move(_) => Self::MOVE,
        }
    }
}

impl Store {
    /// Begins a change. False when there is nothing to do. One that is under way goes on, with the new limit on the rate.
    ///
    /// # Errors
    /// An unknown disk or base; a base that is smaller than the disk's; another change under way; errors of the storage.
    pub fn begin_rework(&self, disk: &str, change: &Change, rate: u64) -> Result<bool, StoreError> {
        let node = self.disk(disk)?;
        let object = || format!("disk {disk}");
        // Opening files may hang: nothing is claimed yet. The references keep both attached.
        let attached = node.attach()?;
        let base = match change {
            Change::Rebase(name) => {
                let base = self.base(name)?;
                base.attach()?;
                Some(base)
            }
            Change::Flatten | Change::Compact | Change::Move(_) => None,
        };
        // What is made for a disk lies in the pool of the disk.
        let pool = match change {
            Change::Move(name) => self.pools.to_place_in(Some(name.as_str()))?,
            Change::Flatten | Change::Rebase(_) | Change::Compact => self.pool_of(&node),
        };
        let _claim = self.claims.adoption(disk, node.id(), base.iter().map(|base| base.id()).collect());
        self.check_present(disk, &node)?;
        let to = base.as_ref().map(|base| base.backing());
        if let Some(rework) = node.rework() {
            let same = Change::of(&rework.purpose) == change.name()
                && !matches!(&rework.purpose, Purpose::Rebase { to: other, .. } if *other != to)
                && (change.name() != Change::MOVE || self.pools.home(rework.layer.number) == pool);
            if same {
                node.note_rework(rework.done, rate)?;
                return Ok(true);
            }
            let job = format!("{}-{disk}", Change::of(&rework.purpose));
            let why = format!(
                "the job {job} is under way; wait for its end, or end it with `plyfs job cancel {job}`"
            );
            return Err(StoreError::invalid(object(), why));
        }
        self.check_needs_are_known(object)?;
        let now = node.base();
        if matches!(change, Change::Flatten | Change::Rebase(_)) && node.record().backing == to {
            return Ok(false);
        }
        if let Some(base) = &base {
            check_large_enough(disk, now.as_ref(), base)?;
        }
        let shown = attached.delta().overlap();
        drop(attached);
        // Until the record names the pool, the pool is not removed.
        let _placing = self.pools.placing.read();
        self.pools.check_usable(pool)?;
        let (purpose, size, overlap) = match change {
            Change::Compact => {
                let lineage = node.lineage();
                let Some((first, last)) = self.run_to_merge(&node, &lineage) else { return Ok(false) };
                let run = lineage.run(first, last).unwrap_or_default();
                let size = lineage.layer(last).map_or(0, |layer| layer.size);
                let overlap = node.overlap_of(&lineage, &run)?.min(size);
                (Purpose::Merge { first, last }, size, overlap)
            }
            Change::Move(_) => {
                if self.pool_of(&node) != pool {
                    node.seal_into(pool, || self.new_id())?;
                }
                let lineage = node.lineage();
                let Some(layer) = self.next_to_move(&lineage, pool) else { return Ok(false) };
                let overlap = node.overlap_of(&lineage, &[layer.number])?.min(layer.size);
                let number = self.new_id()?;
                self.pools.place(number, pool);
                node.begin_rework(made_of(layer, number, overlap, rate))?;
                return Ok(true);
            }
            Change::Flatten | Change::Rebase(_) => {
                let top = if node.lineage().snapshots.is_empty() {
                    let Moment { layer, .. } = node.seal(|| self.new_id())?;
                    layer.map(|place| node.lineage().layers[place].clone())
                } else {
                    None
                };
                let record = node.record();
                // A copy may show more of the base later.
                let rises = record.lineage.rises;
                let of_base = now.as_ref().map_or(0, |base| base.record().size());
                let size = match &top {
                    Some(layer) => layer.size,
                    None if rises => of_base,
                    None => record.lineage.base_bytes(shown.max(record.overlap)).min(of_base),
                };
                let below = base.as_ref().map_or(0, |base| base.record().size());
                (Purpose::Rebase { to, top: top.map(|layer| layer.number) }, size, size.min(below))
            }
        };
        let number = self.new_id()?;
        self.pools.place(number, pool);
        node.begin_rework(Rework { purpose, layer: pending(number, size, overlap), done: 0, rate })?;
        Ok(true)
    }

    /// The layer of a disk that a move to a pool copies next.
    fn next_to_move<'a>(&self, lineage: &'a Lineage, pool: u64) -> Option<&'a LayerEntry> {
        lineage.layers.iter().find(|layer| self.pools.home(layer.number) != pool)
    }

    /// The layer that a move copies after the one that is being made, and the overlap that its map file has.
    fn overlap_of_next(&self, node: &DiskNode, pool: u64) -> Option<(u64, u64)> {
        let lineage = node.lineage();
        let Purpose::Merge { last, .. } = &lineage.rework.as_ref()?.purpose else { return None };
        let mut layers = lineage.layers.iter().filter(|layer| layer.number != *last);
        let next = layers.find(|layer| self.pools.home(layer.number) != pool)?;
        Some((next.number, node.overlap_of(&lineage, &[next.number]).ok()?))
    }

    /// Name of the pool in which the layer lies that is being made for a disk, and space of the filesystem there.
    pub fn rework_pool(&self, node: &DiskNode) -> Option<(String, Space)> {
        let number = node.rework()?.layer.number;
        let space = self.pools.medium(number).space().ok()?;
        Some((self.pools.name(self.pools.home(number)), space))
    }

    /// How many layers of a disk a merge would make one.
    pub fn layers_to_merge(&self, node: &DiskNode) -> usize {
        let lineage = node.lineage();
        let run = self.run_to_merge(node, &lineage);
        run.and_then(|(first, last)| lineage.run(first, last)).map_or(0, |run| run.len())
    }

    /// The longest run of layers between which nothing tells: only the next layer stands on each of them but the highest,
    /// and no other disk needs one. Its lowest and its highest.
    fn run_to_merge(&self, node: &DiskNode, lineage: &Lineage) -> Option<(u64, u64)> {
        let numbers = lineage.layers.iter().map(|layer| layer.number).collect();
        let _dropping = self.dropping.lock();
        let own = self.needed_by_none(node, numbers);
        let mut longest: Option<(usize, u64, u64)> = None;
        for (place, layer) in lineage.layers.iter().enumerate() {
            let (mut at, mut first, mut len) = (place, layer.number, 0);
            while own.contains(&lineage.layers[at].number) && !lineage.layers[at].is_pending() {
                (first, len) = (lineage.layers[at].number, len + 1);
                match lineage.layers[at].below {
                    Some(below) if lineage.stand_on(below) == 1 => at = below,
                    _ => break,
                }
            }
            if len > longest.map_or(1, |(longest, ..)| longest) {
                longest = Some((len, first, layer.number));
            }
        }
        longest.map(|(_, first, last)| (first, last))
    }

    fn new_base(&self, node: &DiskNode) -> Result<NextBase, StoreError> {
        let Some(Rework { purpose: Purpose::Rebase { to: Some(backing), .. }, .. }) = node.rework() else {
            return Ok(NextBase(None));
        };
        let object = format!("disk {}", node.name());
        let base =
            self.base_by_id(backing.base).filter(|base| base.record().image.identity == *backing.identity);
        let base = base.ok_or_else(|| {
            StoreError::invalid(object, "the base that it was to be put on is gone, or is another one now")
        })?;
        let attached = base.attach()?;
        Ok(NextBase(Some((base, attached))))
    }

    /// Opens the layer that is being made for a disk.
    ///
    /// # Errors
    /// There is none; a base or a layer that cannot be opened.
    pub fn open_rework(&self, node: &DiskNode) -> Result<Making, StoreError> {
        let base: Option<Arc<Base>> = self.new_base(node)?.0.map(|(_, base)| base);
        node.open_rework(base)
    }

    /// Closes the layer that is being made for a disk: its files have everything that was copied.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn pause_rework(&self, node: &DiskNode, making: Making) -> Result<(), StoreError> {
        node.close_rework(&making)
    }

    /// Ends a change whose layer is complete: from now on the disk stands on it. False when the layers that it copied are
    /// not there any more, so that it is of no use.
    ///
    /// # Errors
    /// Errors of the storage. The disk is then as before.
    pub fn finish_rework(&self, node: &Arc<DiskNode>, making: Making) -> Result<bool, StoreError> {
        node.close_rework(&making)?;
        drop(making);
        let base = self.new_base(node)?;
        // A move goes on with the next layer.
        let moves = node.rework().filter(|rework| Change::of(&rework.purpose) == Change::MOVE);
        let moves = moves.map(|rework| (self.pools.home(rework.layer.number), rework.rate));
        let users = base.0.iter().map(|(base, _)| base.id()).collect();
        let _attached = node.attach()?;
        let name = node.name();
        // A drive that is read may hang: nothing is claimed or locked yet.
        let overlap_of_next = moves.and_then(|(pool, _)| self.overlap_of_next(node, pool));
        let done = {
            let _claim = self.claims.adoption(&name, node.id(), users);
            let unneeded = |numbers| self.to_drop(node, numbers);
            let number = moves.map(|_| self.new_id()).transpose()?;
            let follow = |lineage: &Lineage| {
                let ((pool, rate), number) = (moves?, number?);
                let next = self.next_to_move(lineage, pool)?;
                // Otherwise the job begins the layer, or the command has to be given again.
                let overlap = overlap_of_next.filter(|(number, _)| *number == next.number)?.1.min(next.size);
                self.pools.place(number, pool);
                Some(made_of(next, number, overlap, rate))
            };
            node.finish_rework(base, unneeded, &self.dropping, follow)?
        };
        drop(_attached);
        let Some(old) = done else {
            self.drop_rework(node)?;
            return Ok(false);
        };
        node.each_snapshot(|snapshot| self.snapshots.removed(snapshot.number));
        let end = Instant::now() + PATIENCE;
        while old.strong_count() > 0 && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(1));
        }
        let _claim = self.claims.lineage(&name, node.id());
        if let Err(error) = self.remove_dropped(node) {
            tracing::warn!(%error, "old layers stay for now; their files are removed later");
        }
        Ok(true)
    }

    /// Gives a change up. The layer that was being made goes.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn drop_rework(&self, node: &Arc<DiskNode>) -> Result<(), StoreError> {
        let _claim = self.claims.lineage(&node.name(), node.id());
        node.drop_rework()?;
        self.remove_dropped(node)
    }

    /// Puts a disk that is not in use on another base without comparing any bytes: what was never written shows the new
    /// base.
    ///
    /// # Errors
    /// `InUse`; an unknown disk or base; a base that is smaller than the disk's; errors of the storage.
    pub fn rebase_unsafe(&self, disk: &str, base: &str) -> Result<(), StoreError> {
        let (node, base) = (self.disk(disk)?, self.base(base)?);
        let _claim = self.claims.adoption(disk, node.id(), vec![base.id()]);
        self.check_present(disk, &node)?;
        let object = || format!("disk {disk}");
        if let Some(rework) = node.rework() {
            let job = format!("{}-{disk}", Change::of(&rework.purpose));
            return Err(StoreError::invalid(object(), format!("the job {job} is under way; end it first")));
        }
        let record = node.record();
        if record.backing.is_none() {
            let why = "it has no base, so nothing of a base shows in it; leave --unsafe out";
            return Err(StoreError::invalid(object(), why));
        }
        check_large_enough(disk, node.base().as_ref(), &base)?;
        let needs = record.lineage.base_bytes(record.overlap);
        if base.record().size() < needs {
            let why =
                format!("it shows {needs} bytes of its base, and base {} has fewer", base.record().name);
            return Err(StoreError::invalid(object(), why));
        }
        node.set_base(&base)?;
        node.each_snapshot(|snapshot| self.snapshots.removed(snapshot.number));
        Ok(())
    }

    /// The disks for which a layer is being made.
    pub fn reworked(&self) -> Vec<Arc<DiskNode>> {
        let named = self.disks_with(Has::Lineage).into_iter().filter(|node| !node.is_unlinked());
        named.filter(|node| node.rework().is_some()).collect()
    }
}

/// The making of a copy of a layer with another number, and with the overlap that its map file has.
fn made_of(layer: &LayerEntry, number: u64, overlap: u64, rate: u64) -> Rework {
    let purpose = Purpose::Merge { first: layer.number, last: layer.number };
    Rework { purpose, layer: pending(number, layer.size, overlap), done: 0, rate }
}

/// A layer that is to be made.
fn pending(number: u64, size: u64, overlap: u64) -> LayerEntry {
    LayerEntry {
        number,
        below: None,
        seal: Seal::Pending,
        size,
        overlap,
        modified_ns: sys::now_ns(),
        map: MapRoot::default(),
    }
}

fn check_large_enough(disk: &str, now: Option<&Arc<BaseNode>>, base: &BaseNode) -> Result<(), StoreError> {
    let (new, old) = (base.record().size(), now.map_or(0, |base| base.record().size()));
    if new >= old {
        return Ok(());
    }
    let why = format!(
        "base {} has {new} bytes, fewer than the {old} of its present base; choose one that is as large, or use `plyfs disk \
         flatten {disk}`",
        base.record().name
    );
    Err(StoreError::invalid(format!("disk {disk}"), why))
}
