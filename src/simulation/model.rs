//! The model: which states of a store the contract allows now, after a power cut, and after the death of a worker.
//!
//! For each block, size and mode the model keeps every value since the last one that is certainly durable. After a power
//! cut the store may show any of these. After the death of a worker it may show only the last acknowledged value, or that
//! of an operation that was running. While an operation on names runs, the model has alternatives for them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::flushing::Flushing;
use crate::disk::{Disk, Frozen};
use crate::format::BLOCK;
use crate::store::{DiskNode, Store};

/// Contents of a block; `None` is zeros.
pub(super) type Content = Option<Arc<[u8]>>;

/// Values in the order in which they were written.
#[derive(Debug, Clone)]
pub(super) struct Versions<T> {
    /// The first is durable; all others are newer.
    list: Vec<T>,
    /// The number of versions before the first.
    before: u64,
    /// The number of the last acknowledged version.
    acked: u64,
    /// A sync failed for the versions up to this number. No later sync makes them certainly durable.
    doubtful: u64,
}

impl<T: Clone> Versions<T> {
    fn of(value: T) -> Self {
        Self { list: vec![value], before: 0, acked: 0, doubtful: 0 }
    }
    fn current(&self) -> &T {
        &self.list[(self.acked - self.before) as usize]
    }
    fn last(&self) -> u64 {
        self.before + self.list.len() as u64 - 1
    }
    fn begin(&mut self, value: T) {
        self.list.push(value);
    }
    fn acknowledge(&mut self) {
        self.acked = self.last();
    }
    fn failed(&mut self, current: T) {
        self.list.push(current);
        self.acked = self.last();
    }
    /// Notes that version `number` was synced.
    fn durable(&mut self, number: u64) {
        if number > self.before && number <= self.acked && (self.doubtful == 0 || number > self.doubtful) {
            self.list.drain(..(number - self.before) as usize);
            self.before = number;
        }
    }
    fn doubt(&mut self) {
        if self.list.len() > 1 {
            self.doubtful = self.last();
        }
    }
    fn after(&self, what: Interruption) -> &[T] {
        match what {
            Interruption::PowerCut => &self.list,
            Interruption::WorkerDeath => &self.list[(self.acked - self.before) as usize..],
        }
    }
}

/// What happened before the store is opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interruption {
    /// A power cut: memory and unsynced data are lost.
    PowerCut,
    /// The death of the worker: no acknowledged data is lost.
    WorkerDeath,
}

#[derive(Debug, Clone)]
pub(super) struct DiskModel {
    pub size: Versions<u64>,
    blocks: Vec<Versions<Content>>,
    /// Mode and quota.
    mode: Versions<(u32, Option<u64>)>,
    /// The name of its base.
    pub base: Option<String>,
    pub snapshots: BTreeMap<String, Arc<FrozenModel>>,
    /// Power was cut while the base was refused. The disk can be compared only when the base is accepted again.
    unchecked: bool,
}

/// What a snapshot shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct FrozenModel {
    size: u64,
    blocks: Vec<Content>,
}

impl FrozenModel {
    /// All bytes of a base.
    pub fn of_bytes(bytes: &[u8]) -> Self {
        Self { size: bytes.len() as u64, blocks: bytes.chunks(BLOCK as usize).map(content).collect() }
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its bytes from `at` to `end`.
    pub fn bytes(&self, at: u64, end: u64) -> Vec<u8> {
        let byte = |at: u64| {
            let block = self.blocks.get((at / BLOCK) as usize).and_then(Option::as_ref);
            block.map_or(0, |block| block[(at % BLOCK) as usize])
        };
        (at..end).map(byte).collect()
    }

    /// Compares with what the store shows.
    fn compare(&self, name: &str, frozen: &Frozen) -> Result<(), String> {
        if frozen.size() != self.size {
            return Err(format!("snapshot {name}: its size is {}, should be {}", frozen.size(), self.size));
        }
        let mut bytes = vec![0xee; self.size as usize];
        frozen.read(0, &mut bytes, 0).map_err(|e| format!("snapshot {name}: it cannot be read: {e}"))?;
        for (no, read) in bytes.chunks(BLOCK as usize).enumerate() {
            let value = self.blocks.get(no).cloned().flatten();
            if !shows(&value, read) {
                return Err(format!("snapshot {name}: block {no} {}", describe(read, &[value])));
            }
        }
        Ok(())
    }
}

fn content(bytes: &[u8]) -> Content {
    bytes.iter().any(|b| *b != 0).then(|| {
        let mut block = vec![0; BLOCK as usize];
        block[..bytes.len()].copy_from_slice(bytes);
        block.into()
    })
}

/// Whether the bytes read of a block, up to the end of the disk, are those of `value`.
fn shows(value: &Content, read: &[u8]) -> bool {
    match value {
        Some(value) => value[..read.len()] == *read,
        None => read.iter().all(|b| *b == 0),
    }
}

fn blocks_of(bytes: u64) -> usize {
    bytes.div_ceil(BLOCK) as usize
}

impl DiskModel {
    pub fn new(size: u64, mode: u32, base: Option<(&str, &[u8])>) -> Self {
        let bytes = base.map_or(&[][..], |(_, bytes)| bytes);
        let mut blocks: Vec<_> = bytes.chunks(BLOCK as usize).map(|b| Versions::of(content(b))).collect();
        blocks.resize(blocks_of(size), Versions::of(None));
        Self {
            size: Versions::of(size),
            blocks,
            mode: Versions::of((mode, None)),
            base: base.map(|(name, _)| name.to_owned()),
            snapshots: BTreeMap::new(),
            unchecked: false,
        }
    }

    /// What it shows now.
    pub fn freeze(&self) -> FrozenModel {
        let size = self.size();
        // The model keeps bytes beyond the end that no reader sees, and a later growth shows as zeros.
        let cut = |(no, block): (usize, &Versions<Content>)| {
            let keep = size.saturating_sub(no as u64 * BLOCK).min(BLOCK) as usize;
            block.current().as_ref().and_then(|bytes| content(&bytes[..keep]))
        };
        FrozenModel { size, blocks: self.blocks.iter().enumerate().map(cut).collect() }
    }

    /// A clone of a disk that shows `frozen`.
    pub fn thaw(&self, frozen: &FrozenModel, mode: u32) -> Self {
        let mut blocks: Vec<_> = frozen.blocks.iter().cloned().map(Versions::of).collect();
        blocks.resize(blocks_of(frozen.size), Versions::of(None));
        Self {
            size: Versions::of(frozen.size),
            blocks,
            mode: Versions::of((mode, None)),
            base: self.base.clone(),
            snapshots: BTreeMap::new(),
            unchecked: false,
        }
    }

    /// The disk after a rollback.
    pub fn rolled_back(&self, frozen: &FrozenModel) -> Self {
        Self { mode: self.mode.clone(), snapshots: self.snapshots.clone(), ..self.thaw(frozen, 0) }
    }

    pub fn size(&self) -> u64 {
        *self.size.current()
    }

    /// Begins a write; `finish_write` or `fail_write` follows.
    pub fn begin_write(&mut self, at: u64, len: u64, bytes: Option<&[u8]>) {
        let end = at + len;
        if end > self.size() {
            self.begin_size(end);
        }
        for block in at / BLOCK..end.div_ceil(BLOCK) {
            let start = block * BLOCK;
            let (from, to) = (start.max(at), (start + BLOCK).min(end));
            let slot = &mut self.blocks[block as usize];
            let mut new = slot.current().as_ref().map_or_else(|| vec![0; BLOCK as usize], |c| c.to_vec());
            let part = &mut new[(from - start) as usize..(to - start) as usize];
            match bytes {
                Some(bytes) => part.copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]),
                None => part.fill(0),
            }
            slot.begin(content(&new));
        }
    }

    pub fn finish_write(&mut self, at: u64, len: u64) {
        if at + len > self.size() {
            self.size.acknowledge();
        }
        for block in at / BLOCK..(at + len).div_ceil(BLOCK) {
            self.blocks[block as usize].acknowledge();
        }
    }

    /// The write failed. Takes each block from `disk`; it must be the old or the new one.
    pub fn fail_write(&mut self, at: u64, len: u64, disk: &Disk) -> Result<(), String> {
        if self.size.last() != self.size.acked {
            let size = disk.size();
            if !self.size.after(Interruption::WorkerDeath).contains(&size) {
                return Err(format!("the size is {size} after a failed write"));
            }
            self.size.failed(size);
        }
        for block in at / BLOCK..(at + len).div_ceil(BLOCK) {
            let size = self.size();
            let slot = &mut self.blocks[block as usize];
            if block * BLOCK >= size {
                let now = slot.current().clone();
                slot.failed(now);
                continue;
            }
            let mut bytes = vec![0; (size - block * BLOCK).min(BLOCK) as usize];
            disk.read(block * BLOCK, &mut bytes).map_err(|e| format!("reading after a failed write: {e}"))?;
            // New bytes beyond the end of the disk do not exist.
            if !slot.after(Interruption::WorkerDeath).iter().any(|value| shows(value, &bytes)) {
                return Err(format!("block {block} is neither old nor new after a failed write"));
            }
            slot.failed(content(&bytes));
        }
        Ok(())
    }

    pub fn begin_size(&mut self, size: u64) {
        self.size.begin(size);
        let blocks = blocks_of(size).max(self.blocks.len());
        self.blocks.resize(blocks, Versions::of(None));
    }

    pub fn finish_size(&mut self) {
        self.size.acknowledge();
    }

    /// The resize is durable: bytes beyond a smaller size read zeros from now on.
    pub fn finish_resize(&mut self) {
        self.size.acknowledge();
        self.size.doubtful = 0;
        self.size.durable(self.size.acked);
        let size = self.size();
        for (no, slot) in self.blocks.iter_mut().enumerate().skip((size / BLOCK) as usize) {
            let keep = size.saturating_sub(no as u64 * BLOCK).min(BLOCK) as usize;
            for value in &mut slot.list {
                *value = value.take().and_then(|bytes| content(&bytes[..keep]));
            }
            if keep == 0 {
                // Keep counting the versions, because a running flush has their numbers.
                let last = slot.last();
                *slot = Versions { before: last, acked: last, ..Versions::of(None) };
            }
        }
    }

    pub fn fail_resize(&mut self, disk: &Disk) -> Result<(), String> {
        let (now, was) = (disk.size(), self.size());
        self.size.failed(was);
        if now == was { Ok(()) } else { Err(format!("a failed resize changed the size from {was} to {now}")) }
    }

    pub fn begin_mode(&mut self, mode: u32) {
        let (_, quota) = *self.mode.current();
        self.mode.begin((mode, quota));
    }

    pub fn begin_quota(&mut self, quota: Option<u64>) {
        let (mode, _) = *self.mode.current();
        self.mode.begin((mode, quota));
    }

    pub fn finish_mode(&mut self) {
        self.mode.acknowledge();
        self.mode.durable(self.mode.acked);
    }

    /// The versions that a flush that begins now will make durable.
    pub fn mark(&self) -> FlushMark {
        FlushMark { size: self.size.acked, blocks: self.blocks.iter().map(|b| b.acked).collect() }
    }

    pub fn flushed(&mut self, mark: &FlushMark) {
        if self.unchecked {
            return;
        }
        self.size.durable(mark.size);
        for (slot, number) in self.blocks.iter_mut().zip(&mark.blocks) {
            slot.durable(*number);
        }
    }

    /// A sync failed: unsynced versions may be lost for good.
    pub fn doubt(&mut self) {
        self.size.doubt();
        self.blocks.iter_mut().for_each(Versions::doubt);
    }

    /// Compares with a disk of an opened store. Returns the model of the disk's actual state.
    pub fn compare(
        &self,
        name: &str,
        what: Interruption,
        disk: &Disk,
        mode: (u32, Option<u64>),
    ) -> Result<Self, String> {
        let what = if self.unchecked { Interruption::PowerCut } else { what };
        let size = disk.size();
        if !self.size.after(what).contains(&size) {
            return Err(format!("disk {name}: its size is {size}, allowed are {:?}", self.size.after(what)));
        }
        if !self.mode.after(what).contains(&mode) {
            return Err(format!(
                "disk {name}: its mode and quota are {mode:?}, allowed are {:?}",
                self.mode.after(what)
            ));
        }
        let mut bytes = vec![0xee; size as usize];
        let read = disk.read(0, &mut bytes).map_err(|e| format!("disk {name}: it cannot be read: {e}"))?;
        let got = read.bytes() as usize;
        if got as u64 != size {
            return Err(format!("disk {name}: {got} of {size} bytes were read"));
        }
        let mut blocks = self.blocks.clone();
        for (no, read) in bytes.chunks(BLOCK as usize).enumerate() {
            let same = |value: &Content| shows(value, read);
            let slot = &mut blocks[no];
            let Some(at) = slot.after(what).iter().rposition(same) else {
                let what = describe(read, slot.after(what));
                return Err(format!("disk {name}: block {no} {what}"));
            };
            match what {
                Interruption::PowerCut => *slot = Versions::of(content(read)),
                Interruption::WorkerDeath => slot.acked += at as u64,
            }
        }
        let mut now = Self { blocks, unchecked: false, ..self.clone() };
        match what {
            Interruption::PowerCut => {
                now.blocks.truncate(blocks_of(size));
                (now.size, now.mode) = (Versions::of(size), Versions::of(mode));
            }
            Interruption::WorkerDeath => {
                // Writes of the dead worker that were under way may or may not reach the medium.
                let shrunk = size < self.size();
                now.size.failed(size);
                if shrunk {
                    // Opening the disk completed the shrink durably.
                    now.finish_resize();
                }
                now.mode.failed(mode);
            }
        }
        Ok(now)
    }
}

/// Describes how a block differs from its allowed contents.
fn describe(read: &[u8], allowed: &[Content]) -> String {
    let show = |bytes: &[u8]| format!("{:02x?}", &bytes[..bytes.len().min(8)]);
    let differ: Vec<String> = allowed
        .iter()
        .map(|value| match value {
            None => "zeros".to_owned(),
            Some(value) => {
                let at = value.iter().zip(read).position(|(a, b)| a != b).unwrap_or(0);
                format!("{} (differs at byte {at})", show(value))
            }
        })
        .collect();
    let read = if read.iter().all(|b| *b == 0) { "zeros".into() } else { show(read) };
    format!("is {read}, allowed are {}", differ.join(", "))
}

/// The numbers of the versions that were acknowledged when a flush began.
#[derive(Debug, Clone)]
pub(super) struct FlushMark {
    size: u64,
    blocks: Vec<u64>,
}

/// A base with its options and state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BaseModel {
    /// The index of its file in the campaign.
    pub source: usize,
    pub pinned: bool,
    pub hydrate: bool,
    pub refused: bool,
    /// Hydration reported that all of it is in the store.
    pub kept: bool,
}

impl BaseModel {
    pub fn of(source: usize) -> Self {
        Self { source, pinned: false, hydrate: false, refused: false, kept: false }
    }
}

/// Names of disks and bases.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    pub disks: BTreeMap<String, Arc<DiskModel>>,
    pub bases: BTreeMap<String, BaseModel>,
    /// Disks in the trash, with the names that they had, in the order of their removal.
    pub trash: Vec<(String, Arc<DiskModel>)>,
    /// Whether removed disks go to the trash.
    pub keeps_removed: bool,
    /// Parts of the history that flush after every few writes.
    pub flushing: Flushing,
}

impl Names {
    /// Whether the disk's base is refused.
    pub fn is_refused(&self, disk: &DiskModel) -> bool {
        disk.base.as_ref().and_then(|base| self.bases.get(base)).is_some_and(|base| base.refused)
    }

    /// The campaign's files that are completely in the store according to a hydration.
    pub fn kept(&self) -> BTreeSet<usize> {
        self.bases.values().filter(|base| base.kept).map(|base| base.source).collect()
    }

    pub fn disk(&mut self, name: &str) -> &mut DiskModel {
        Arc::make_mut(self.disks.get_mut(name).expect("the disk is in the model"))
    }

    /// Takes the name from a disk, if there is one of that name. `now`: whether it skips the trash.
    pub fn remove(&mut self, name: &str, now: bool) {
        if let Some(disk) = self.disks.remove(name).filter(|_| self.keeps_removed && !now) {
            self.trash.push((name.to_owned(), disk));
        }
    }

    /// Whether a disk in the trash needs the base.
    pub fn trash_needs(&self, base: &str) -> bool {
        self.trash.iter().any(|(_, disk)| disk.base.as_deref() == Some(base))
    }
}

/// The model of a store.
#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    pub names: Names,
    /// Other allowed names, while an operation on them runs or after it failed.
    pub alternatives: Vec<Names>,
    /// The operations so far, for the message.
    pub log: Vec<String>,
}

impl Model {
    /// As [`DiskModel::doubt`], for all disks.
    pub fn doubt(&mut self) {
        for names in std::iter::once(&mut self.names).chain(&mut self.alternatives) {
            let trashed = names.trash.iter_mut().map(|(_, disk)| disk);
            names.disks.values_mut().chain(trashed).for_each(|disk| Arc::make_mut(disk).doubt());
        }
    }

    /// Compares an opened store with the allowed states. Returns the model of its actual state.
    pub fn compare(&self, what: Interruption, store: &Store) -> Result<Self, String> {
        if let Some((file, error)) = store.damaged().first() {
            return Err(format!("{file} is damaged: {error}"));
        }
        let nodes = store.disks_after(0);
        let mut reasons = Vec::new();
        for names in std::iter::once(&self.names).chain(&self.alternatives) {
            match Self::compare_names(names, what, store, &nodes) {
                Ok(names) => return Ok(Self { names, alternatives: Vec::new(), ..self.clone() }),
                Err(reason) => reasons.push(reason),
            }
        }
        reasons.dedup();
        Err(reasons.join("; or: "))
    }

    fn compare_names(
        names: &Names,
        what: Interruption,
        store: &Store,
        nodes: &[Arc<DiskNode>],
    ) -> Result<Names, String> {
        let mut found: Vec<String> = nodes.iter().map(|node| node.name()).collect();
        found.sort();
        if !found.iter().eq(names.disks.keys()) {
            return Err(format!("disks are {found:?}, should be {:?}", names.disks.keys()));
        }
        let bases: BTreeMap<String, _> =
            store.bases().iter().map(|b| (b.record().name.clone(), b.options())).collect();
        if !bases.keys().eq(names.bases.keys()) {
            return Err(format!("bases are {:?}, should be {:?}", bases.keys(), names.bases.keys()));
        }
        for (name, options) in &bases {
            let model = &names.bases[name];
            let is = (options.pinned, options.hydrate, options.refused);
            if is != (model.pinned, model.hydrate, model.refused) {
                return Err(format!(
                    "base {name}: pinned, hydrate, refused are {is:?}, should be of {model:?}"
                ));
            }
        }
        let trashed = by_name(store.trashed());
        let mut wanted: Vec<&(String, Arc<DiskModel>)> = names.trash.iter().collect();
        wanted.sort_by_key(|(name, _)| name);
        if !trashed.iter().map(|node| node.name()).eq(wanted.iter().map(|(name, _)| name.clone())) {
            let found: Vec<String> = trashed.iter().map(|node| node.name()).collect();
            let wanted: Vec<&String> = wanted.iter().map(|(name, _)| name).collect();
            return Err(format!("disks in the trash are {found:?}, should be {wanted:?}"));
        }
        let mut now = Names { trash: Vec::new(), ..names.clone() };
        for node in nodes {
            let name = node.name();
            let disk = compare_disk(names, what, node, &names.disks[&name])?;
            now.disks.insert(name, disk);
        }
        let mut compared = BTreeMap::new();
        for (node, (name, model)) in trashed.iter().zip(wanted) {
            let disk =
                compare_disk(names, what, node, model).map_err(|why| format!("in the trash: {why}"))?;
            compared.entry(name).or_insert_with(Vec::new).push(disk);
        }
        // Those of one name keep their order.
        for (name, _) in &names.trash {
            let disk = compared.get_mut(name).expect("compared").remove(0);
            now.trash.push((name.clone(), disk));
        }
        Ok(now)
    }
}

/// Trashed disks in the order of their names, those of one name in the order of their removal.
fn by_name(mut nodes: Vec<Arc<DiskNode>>) -> Vec<Arc<DiskNode>> {
    nodes.sort_by_key(|node| node.name());
    nodes
}

/// Compares a disk of an opened store with its model. Returns the model of its actual state.
fn compare_disk(
    names: &Names,
    what: Interruption,
    node: &DiskNode,
    model: &Arc<DiskModel>,
) -> Result<Arc<DiskModel>, String> {
    let name = node.name();
    if node.base_name() != model.base {
        return Err(format!("disk {name}: its base is {:?}, should be {:?}", node.base_name(), model.base));
    }
    // The attributes without attaching the disk must be those of the attached disk.
    let listed = node.attributes();
    if names.is_refused(model) {
        // A disk that was attached before stays attached, but cannot read the base.
        if node.peek().is_none() && node.attach().is_ok() {
            return Err(format!("disk {name} is served although its base is refused"));
        }
        let mut now = model.clone();
        Arc::make_mut(&mut now).unchecked |= what == Interruption::PowerCut;
        return Ok(now);
    }
    let disk = node.attach().map_err(|e| format!("disk {name} cannot be used: {e}"))?;
    if listed.size != disk.size() {
        return Err(format!("disk {name} is listed with {} bytes, has {}", listed.size, disk.size()));
    }
    let snapshots: Vec<_> = node.lineage().snapshots;
    let mut found: Vec<&String> = snapshots.iter().map(|snapshot| &snapshot.name).collect();
    found.sort();
    if !found.iter().copied().eq(model.snapshots.keys()) {
        let wanted = model.snapshots.keys();
        return Err(format!("disk {name}: its snapshots are {found:?}, should be {wanted:?}"));
    }
    for snapshot in &snapshots {
        let frozen = &model.snapshots[&snapshot.name];
        let name = format!("{name}@{}", snapshot.name);
        let opened = node.open_snapshot(snapshot.number).transpose().expect("it is in the record");
        frozen.compare(&name, &opened.map_err(|e| format!("snapshot {name} cannot be used: {e}"))?)?;
    }
    let kept = (listed.mode, node.limits().quota);
    model.compare(&name, what, &disk, kept).map(Arc::new)
}
