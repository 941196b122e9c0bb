//! What a disk's record says about its delta, the sealed layers below it, and its snapshots.
//!
//! Layers form a tree: a snapshot, and the disk itself, stand on a layer, and each layer on the one below it or on the
//! base. What must hold: a layer stands on one that is listed before it, so that every chain ends.

use std::collections::HashSet;

use super::codec::{FormatError, Reader, Writer};
use super::record::{MapRoot, Token};
use super::rework::Rework;
use super::{MAX_DISK_SIZE, MAX_NUMBER, valid_name};

/// A position in [`Lineage::layers`].
pub type Place = usize;

/// Whether a layer may still change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seal {
    /// It was the delta of a disk when its sealing began. Its last changes may be in its live map only. No other record
    /// names it.
    Pending,
    /// It never changes again.
    Sealed,
}

/// A delta below a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerEntry {
    /// Number of its files, from the sequence of all numbers of the store.
    pub number: u64,
    /// The layer on which it stands; `None`: the base, or nothing.
    pub below: Option<Place>,
    /// Whether it may still change.
    pub seal: Seal,
    /// Bytes of the disk, at `map.floor` of the map file.
    pub size: u64,
    /// Bytes from the start that fall through to what lies below.
    pub overlap: u64,
    /// Last modification of its contents, nanoseconds since the epoch.
    pub modified_ns: i64,
    /// Its map file.
    pub map: MapRoot,
}

impl LayerEntry {
    /// Whether it may still change.
    pub fn is_pending(&self) -> bool {
        self.seal == Seal::Pending
    }
}

/// A snapshot of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotEntry {
    /// Number, from the sequence of all numbers of the store.
    pub number: u64,
    /// Name; unique among the snapshots of the disk.
    pub name: String,
    /// The layer that it shows; `None`: the base, or nothing.
    pub layer: Option<Place>,
    /// Bytes of the disk at that time.
    pub size: u64,
    /// Bytes from the start that fall through to `layer` or the base.
    pub overlap: u64,
    /// When it was taken, nanoseconds since the epoch.
    pub created_ns: i64,
    /// The request of a client that took it.
    pub token: Option<Token>,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lineage {
    /// Number of the files and of the live map of the disk's own delta.
    pub delta: u64,
    /// The layer on which the delta stands; `None`: the base, or nothing.
    pub below: Option<Place>,
    /// Each stands on one before it.
    pub layers: Vec<LayerEntry>,
    /// In the order in which they were taken.
    pub snapshots: Vec<SnapshotEntry>,
    /// Numbers of deltas that nothing needs any more and whose files are to be removed.
    pub dropped: Vec<u64>,
    /// The request of a client that rolled the disk back last.
    pub rolled_back: Option<Token>,
    /// Whether a copy showed what lies below: the overlap may grow in a map file.
    pub rises: bool,
    /// The layer that is being made. A field of its own in the record. Few disks have one, and it is large.
    pub rework: Option<Box<Rework>>,
}

impl Lineage {
    /// Of a disk that was never sealed: its delta has the number of the disk.
    pub fn of(disk: u64) -> Self {
        Self {
            delta: disk,
            below: None,
            layers: Vec::new(),
            snapshots: Vec::new(),
            dropped: Vec::new(),
            rolled_back: None,
            rises: false,
            rework: None,
        }
    }

    /// Whether a record of version 3 can express it.
    pub fn is_default(&self, disk: u64) -> bool {
        *self == Self::of(disk)
    }

    /// A layer and all below it, from the top.
    pub fn chain(&self, top: Option<Place>) -> impl Iterator<Item = &LayerEntry> {
        let entry = |place: Option<Place>| place.and_then(|place| self.layers.get(place));
        std::iter::successors(entry(top), move |layer| entry(layer.below))
    }

    /// The layer with a number.
    pub fn layer(&self, number: u64) -> Option<&LayerEntry> {
        self.layers.iter().find(|layer| layer.number == number)
    }

    /// As [`Lineage::layer`]. The one that is being made counts.
    pub fn layer_or_made(&self, number: u64) -> Option<&LayerEntry> {
        let made = self.rework.as_ref().map(|rework| &rework.layer);
        self.layer(number).or_else(|| made.filter(|layer| layer.number == number))
    }

    /// The snapshot with a name.
    pub fn snapshot(&self, name: &str) -> Option<&SnapshotEntry> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name)
    }

    /// How many layers and snapshots there are.
    pub fn entries(&self) -> usize {
        self.layers.len() + self.snapshots.len()
    }

    /// Bytes from the start that are read from the base, at most. `overlap`: that of the disk.
    pub fn base_bytes(&self, overlap: u64) -> u64 {
        let layers = self.layers.iter().map(|layer| (layer.below, layer.overlap));
        let snapshots = self.snapshots.iter().map(|snapshot| (snapshot.layer, snapshot.overlap));
        let all = layers.chain(snapshots).chain([(self.below, overlap)]);
        all.filter(|(below, _)| below.is_none()).map(|(_, overlap)| overlap).max().unwrap_or(0)
    }

    /// Numbers of all deltas whose files it names: those of the disk, of its layers, and of the layer that is being made.
    pub fn deltas(&self) -> impl Iterator<Item = u64> {
        let made = self.rework.iter().map(|rework| rework.layer.number);
        std::iter::once(self.delta).chain(self.layers.iter().map(|layer| layer.number)).chain(made)
    }

    /// The place of the layer with a number.
    pub fn place(&self, number: u64) -> Option<Place> {
        self.layers.iter().position(|layer| layer.number == number)
    }

    /// How many layers, snapshots and deltas stand on a layer.
    pub fn stand_on(&self, place: Place) -> usize {
        let layers = self.layers.iter().map(|layer| layer.below);
        let snapshots = self.snapshots.iter().map(|snapshot| snapshot.layer);
        layers.chain(snapshots).chain([self.below]).filter(|below| *below == Some(place)).count()
    }

    /// Adds a layer at a place of the list. What stands on `replaced` (`None`: on the base or nothing) stands on it then,
    /// but for the layer itself.
    pub fn insert(&mut self, at: Place, layer: LayerEntry, replaced: Option<Place>) {
        let moved = |place: Option<Place>| {
            if place == replaced { Some(at) } else { place.map(|place| place + usize::from(place >= at)) }
        };
        for entry in &mut self.layers {
            entry.below = moved(entry.below);
        }
        for snapshot in &mut self.snapshots {
            snapshot.layer = moved(snapshot.layer);
        }
        self.below = moved(self.below);
        self.layers.insert(at, layer);
    }

    /// Removes the layers on which neither the disk nor a snapshot stands. Returns their numbers.
    pub fn remove_unneeded(&mut self) -> Vec<u64> {
        let mut needed = vec![false; self.layers.len()];
        for top in self.snapshots.iter().map(|snapshot| snapshot.layer).chain([self.below]) {
            let mut at = top;
            while let Some(place) = at.filter(|place| !std::mem::replace(&mut needed[*place], true)) {
                at = self.layers[place].below;
            }
        }
        let mut places = Vec::with_capacity(needed.len());
        let mut next = 0;
        for is_needed in &needed {
            places.push(next);
            next += usize::from(*is_needed);
        }
        let mut removed = Vec::new();
        let layers = std::mem::take(&mut self.layers);
        for (layer, is_needed) in layers.into_iter().zip(&needed) {
            if *is_needed {
                self.layers.push(LayerEntry { below: layer.below.map(|below| places[below]), ..layer });
            } else {
                removed.push(layer.number);
            }
        }
        self.below = self.below.map(|below| places[below]);
        for snapshot in &mut self.snapshots {
            snapshot.layer = snapshot.layer.map(|layer| places[layer]);
        }
        removed
    }

    /// The lineage of a new disk with the delta `delta`, on the layer `top` of this one.
    pub fn fork(&self, delta: u64, top: Option<Place>) -> Self {
        let mut fork = Self { below: top, layers: self.layers.clone(), rises: self.rises, ..Self::of(delta) };
        fork.remove_unneeded();
        fork.rises &= !fork.layers.is_empty();
        fork
    }

    /// Adds the layers of `other` that are not listed yet. Returns the place of `top`, a layer of `other`.
    pub fn join(&mut self, other: &Self, top: Option<Place>) -> Option<Place> {
        self.rises |= other.rises;
        let mut places = Vec::with_capacity(other.layers.len());
        for layer in &other.layers {
            let known = self.layers.iter().position(|known| known.number == layer.number);
            places.push(known.unwrap_or_else(|| {
                self.layers
                    .push(LayerEntry { below: layer.below.map(|below| places[below]), ..layer.clone() });
                self.layers.len() - 1
            }));
        }
        top.map(|top| places[top])
    }

    pub(super) fn put(&self, w: &mut Writer) {
        let put_place = |w: &mut Writer, place: Option<Place>| {
            w.u16(place.map_or(0, |place| place as u16 + 1));
        };
        w.u64(self.delta);
        put_place(w, self.below);
        w.u16(self.layers.len() as u16);
        for layer in &self.layers {
            w.u64(layer.number);
            put_place(w, layer.below);
            w.u8((layer.seal == Seal::Sealed).into());
            w.u64(layer.size).u64(layer.overlap).i64(layer.modified_ns);
            w.u64(layer.map.generation).u64(layer.map.floor);
        }
        w.u16(self.snapshots.len() as u16);
        for snapshot in &self.snapshots {
            w.u64(snapshot.number).bytes(snapshot.name.as_bytes());
            put_place(w, snapshot.layer);
            w.u64(snapshot.size).u64(snapshot.overlap).i64(snapshot.created_ns);
            put_token(w, snapshot.token);
        }
        w.u16(self.dropped.len() as u16);
        for number in &self.dropped {
            w.u64(*number);
        }
        put_token(w, self.rolled_back);
        w.u8(self.rises.into());
    }

    pub(super) fn get(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        let delta = get_number(r)?;
        let below = r.u16()?;
        let mut layers: Vec<LayerEntry> = Vec::new();
        let mut numbers = HashSet::from([delta]);
        for place in 0..r.u16()? {
            let number = get_number(r)?;
            let below = get_place(r, usize::from(place))?;
            let seal = match r.u8()? {
                0 => Seal::Pending,
                1 => Seal::Sealed,
                other => return Err(r.bad(format!("seal flag is {other}"))),
            };
            let (size, overlap) = get_bounds(r)?;
            let modified_ns = r.i64()?;
            let map = MapRoot { generation: get_number(r)?, floor: r.u64()? };
            if !numbers.insert(number) {
                return Err(r.bad(format!("delta {number} is listed twice")));
            }
            layers.push(LayerEntry { number, below, seal, size, overlap, modified_ns, map });
        }
        let below = checked_place(r, below, layers.len())?;
        let mut snapshots: Vec<SnapshotEntry> = Vec::new();
        let (mut names, mut snapshot_numbers) = (HashSet::new(), HashSet::new());
        for _ in 0..r.u16()? {
            let number = get_number(r)?;
            let name = r.text()?;
            if !valid_name(&name) {
                return Err(r.bad(format!("{name:?} is not a name")));
            }
            let layer = get_place(r, layers.len())?;
            let (size, overlap) = get_bounds(r)?;
            let created_ns = r.i64()?;
            let token = get_token(r)?;
            if !names.insert(name.clone()) || !snapshot_numbers.insert(number) {
                return Err(r.bad(format!("snapshot {name} is listed twice")));
            }
            if layer.is_some_and(|layer| layers[layer].is_pending()) {
                return Err(r.bad(format!("snapshot {name} is on a layer that is not sealed")));
            }
            snapshots.push(SnapshotEntry { number, name, layer, size, overlap, created_ns, token });
        }
        let mut dropped = Vec::new();
        for _ in 0..r.u16()? {
            let number = get_number(r)?;
            if numbers.contains(&number) {
                return Err(r.bad(format!("delta {number} is both needed and dropped")));
            }
            dropped.push(number);
        }
        let rolled_back = get_token(r)?;
        let rises = match r.u8()? {
            0 => false,
            1 => true,
            other => return Err(r.bad(format!("the flag of a growing overlap is {other}"))),
        };
        Ok(Self { delta, below, layers, snapshots, dropped, rolled_back, rises, rework: None })
    }
}

fn checked_place(r: &Reader<'_>, place: u16, count: usize) -> Result<Option<Place>, FormatError> {
    match usize::from(place) {
        0 => Ok(None),
        place if place <= count => Ok(Some(place - 1)),
        place => Err(r.bad(format!("layer {place} of {count} is not there, or not listed before"))),
    }
}

fn put_token(w: &mut Writer, token: Option<Token>) {
    w.u8(token.is_some().into());
    if let Some(token) = token {
        token.put(w);
    }
}

fn get_token(r: &mut Reader<'_>) -> Result<Option<Token>, FormatError> {
    match r.u8()? {
        0 => Ok(None),
        1 => Ok(Some(Token::get(r)?)),
        other => Err(r.bad(format!("token flag is {other}"))),
    }
}

/// The place of a layer among the first `count`.
fn get_place(r: &mut Reader<'_>, count: usize) -> Result<Option<Place>, FormatError> {
    let place = r.u16()?;
    checked_place(r, place, count)
}

pub(super) fn get_number(r: &mut Reader<'_>) -> Result<u64, FormatError> {
    let number = r.u64()?;
    if number <= MAX_NUMBER { Ok(number) } else { Err(r.bad(format!("number {number} is above 2^62"))) }
}

pub(super) fn get_bounds(r: &mut Reader<'_>) -> Result<(u64, u64), FormatError> {
    let (size, overlap) = (r.u64()?, r.u64()?);
    if size > MAX_DISK_SIZE || overlap > size {
        return Err(r.bad(format!("size {size} with overlap {overlap} is not possible")));
    }
    Ok((size, overlap))
}
