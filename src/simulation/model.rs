//! What the contract allows a store to be: after a power cut, after the death of a worker, and now.
//!
//! Of each block, each size and each mode the model keeps every value since the last one that is certain to be
//! durable. A power cut may show any of these; the death of a worker only the last acknowledged one, or one of an
//! operation that was running. Names have alternatives while an operation on them runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::disk::Disk;
use crate::format::BLOCK;
use crate::store::Store;

/// Contents of a block; `None` is zeros.
pub(super) type Content = Option<Arc<[u8]>>;

/// Values in the order in which they were written.
#[derive(Debug, Clone)]
pub(super) struct Versions<T> {
    /// The first is durable; all others are newer.
    list: Vec<T>,
    /// How many there were before the first.
    before: u64,
    /// Number of the last one that was acknowledged.
    acked: u64,
    /// Up to this number a sync has failed: no later sync proves anything about them.
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
    /// Version `number` was synced.
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
    fn after(&self, what: Survived) -> &[T] {
        match what {
            Survived::Power => &self.list,
            Survived::Worker => &self.list[(self.acked - self.before) as usize..],
        }
    }
}

/// What went away before the store is opened again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Survived {
    /// Power: what was not synced, and memory.
    Power,
    /// The worker: nothing that was acknowledged.
    Worker,
}

#[derive(Debug, Clone)]
pub(super) struct DiskModel {
    pub size: Versions<u64>,
    blocks: Vec<Versions<Content>>,
    mode: Versions<u32>,
    /// Name of its base.
    pub base: Option<String>,
    /// Power went while its base was refused: what is left of it will be seen when the base is accepted again.
    unseen: bool,
}

fn content(bytes: &[u8]) -> Content {
    bytes.iter().any(|b| *b != 0).then(|| {
        let mut block = vec![0; BLOCK as usize];
        block[..bytes.len()].copy_from_slice(bytes);
        block.into()
    })
}

/// Whether a block, as far as the disk goes, reads like this.
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
            mode: Versions::of(mode),
            base: base.map(|(name, _)| name.to_owned()),
            unseen: false,
        }
    }

    pub fn size(&self) -> u64 {
        *self.size.current()
    }

    /// Bytes from now on; `finish` or `fail` follows.
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

    /// The write failed; each block is what `disk` says it is, which is the old one or the new one.
    pub fn fail_write(&mut self, at: u64, len: u64, disk: &Disk) -> Result<(), String> {
        if self.size.last() != self.size.acked {
            let size = disk.size();
            if !self.size.after(Survived::Worker).contains(&size) {
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
            // What of the new bytes is past the end of the disk is not there.
            if !slot.after(Survived::Worker).iter().any(|value| shows(value, &bytes)) {
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

    /// The size is durable; what was cut off is zeros for good.
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
                // The numbers go on: a flush that runs knows them.
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
        self.mode.begin(mode);
    }

    pub fn finish_mode(&mut self) {
        self.mode.acknowledge();
        self.mode.durable(self.mode.acked);
    }

    /// What a flush that begins now will make durable.
    pub fn mark(&self) -> Mark {
        Mark { size: self.size.acked, blocks: self.blocks.iter().map(|b| b.acked).collect() }
    }

    pub fn flushed(&mut self, mark: &Mark) {
        if self.unseen {
            return;
        }
        self.size.durable(mark.size);
        for (slot, number) in self.blocks.iter_mut().zip(&mark.blocks) {
            slot.durable(*number);
        }
    }

    /// A sync failed: what was in flight may be lost for good.
    pub fn doubt(&mut self) {
        self.size.doubt();
        self.blocks.iter_mut().for_each(Versions::doubt);
    }

    /// Compares with a disk of an opened store, and becomes what that is.
    pub fn compare(&self, name: &str, what: Survived, disk: &Disk, mode: u32) -> Result<Self, String> {
        let what = if self.unseen { Survived::Power } else { what };
        let size = disk.size();
        if !self.size.after(what).contains(&size) {
            return Err(format!("disk {name}: its size is {size}, allowed are {:?}", self.size.after(what)));
        }
        if !self.mode.after(what).contains(&mode) {
            return Err(format!(
                "disk {name}: its mode is {mode:o}, allowed are {:?}",
                self.mode.after(what)
            ));
        }
        let mut bytes = vec![0xee; size as usize];
        let got = disk.read(0, &mut bytes).map_err(|e| format!("disk {name}: it cannot be read: {e}"))?;
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
                Survived::Power => *slot = Versions::of(content(read)),
                Survived::Worker => slot.acked += at as u64,
            }
        }
        let mut now = Self { blocks, unseen: false, ..self.clone() };
        match what {
            Survived::Power => {
                now.blocks.truncate(blocks_of(size));
                (now.size, now.mode) = (Versions::of(size), Versions::of(mode));
            }
            Survived::Worker => {
                // What the dead worker had begun may reach the medium yet, or not.
                let shrunk = size < self.size();
                now.size.failed(size);
                if shrunk {
                    // A shrink that had begun was completed, durably, by whoever opened the disk.
                    now.finish_resize();
                }
                now.mode.failed(mode);
            }
        }
        Ok(now)
    }
}

/// Where a block differs from what it may be.
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

/// Numbers of the versions that were acknowledged when a flush began.
#[derive(Debug, Clone)]
pub(super) struct Mark {
    size: u64,
    blocks: Vec<u64>,
}

/// A base, and what its operator and its digest made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BaseModel {
    /// Which of the campaign's files it is of.
    pub source: usize,
    pub pinned: bool,
    pub hydrate: bool,
    pub refused: bool,
    /// All of it was said to be in the store.
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
}

impl Names {
    /// Whether nothing of the disk's base is given away.
    pub fn is_refused(&self, disk: &DiskModel) -> bool {
        disk.base.as_ref().and_then(|base| self.bases.get(base)).is_some_and(|base| base.refused)
    }

    /// The campaign's files of which all was said to be in the store.
    pub fn kept(&self) -> BTreeSet<usize> {
        self.bases.values().filter(|base| base.kept).map(|base| base.source).collect()
    }

    pub fn disk(&mut self, name: &str) -> &mut DiskModel {
        Arc::make_mut(self.disks.get_mut(name).expect("the disk is in the model"))
    }
}

/// A store.
#[derive(Debug, Clone, Default)]
pub(super) struct Model {
    pub names: Names,
    /// What the names may be as well, while an operation on them runs or after it failed.
    pub alternatives: Vec<Names>,
    /// What was done, for the message.
    pub log: Vec<String>,
}

impl Model {
    /// As [`DiskModel::doubt`], of all disks.
    pub fn doubt(&mut self) {
        for names in std::iter::once(&mut self.names).chain(&mut self.alternatives) {
            names.disks.values_mut().for_each(|disk| Arc::make_mut(disk).doubt());
        }
    }

    /// Compares an opened store with what is allowed, and becomes what it is.
    pub fn compare(&self, what: Survived, store: &Store) -> Result<Self, String> {
        if let Some((file, error)) = store.damaged().first() {
            return Err(format!("{file} is damaged: {error}"));
        }
        let nodes = store.disks_after(0);
        let mut reasons = Vec::new();
        for names in std::iter::once(&self.names).chain(&self.alternatives) {
            match Self::compare_names(names, what, store, &nodes) {
                Ok(names) => return Ok(Self { names, alternatives: Vec::new(), log: self.log.clone() }),
                Err(reason) => reasons.push(reason),
            }
        }
        reasons.dedup();
        Err(reasons.join("; or: "))
    }

    fn compare_names(
        names: &Names,
        what: Survived,
        store: &Store,
        nodes: &[Arc<crate::store::DiskNode>],
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
        let mut now = names.clone();
        for node in nodes {
            let name = node.name();
            // What is said of it without attaching it is what it is.
            let listed = node.attributes();
            if names.is_refused(&names.disks[&name]) {
                // One that was attached before goes on, without what it needs of the base.
                if node.peek().is_none() && node.attach().is_ok() {
                    return Err(format!("disk {name} is served, on a base that is refused"));
                }
                now.disk(&name).unseen |= what == Survived::Power;
                continue;
            }
            let disk = node.attach().map_err(|e| format!("disk {name} cannot be used: {e}"))?;
            if listed.size != disk.size() {
                return Err(format!("disk {name} is listed with {} bytes, has {}", listed.size, disk.size()));
            }
            let model = &names.disks[&name];
            let compared = model.compare(&name, what, &disk, listed.mode)?;
            now.disks.insert(name, Arc::new(compared));
        }
        Ok(now)
    }
}
