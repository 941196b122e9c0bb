//! Which disks and snapshots stand on a base, and which disks share the layers of a disk.
//!
//! What must hold: all of it follows from the records, each time it is asked. Nothing is counted.

use std::collections::HashMap;
use std::sync::Arc;

use super::{DiskNode, Origin, Store, StoreError};
use crate::format::lineage::Lineage;

/// What stands on a base or a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChildKind {
    /// A disk.
    Disk,
    /// A snapshot of a disk.
    Snapshot,
    /// A disk in the trash, with its snapshots.
    Trashed,
    /// A removed disk that a client has open.
    Removed,
}

/// A disk or snapshot on a base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseChild {
    /// `DISK` or `DISK@SNAPSHOT`.
    pub name: String,
    /// Number of the disk or snapshot.
    pub number: u64,
    /// What it is.
    pub kind: ChildKind,
}

/// A disk that shares layers of another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskChild {
    /// Its name.
    pub name: String,
    /// Its number.
    pub number: u64,
    /// What it is.
    pub kind: ChildKind,
    /// Names of the snapshots of the other disk that show the layer on which it stands.
    pub on: Vec<String>,
    /// Numbers of the layers that both need.
    pub layers: Vec<u64>,
}

fn kind_of(node: &DiskNode) -> ChildKind {
    match node.trashed() {
        Some(_) => ChildKind::Trashed,
        None if node.is_unlinked() => ChildKind::Removed,
        None => ChildKind::Disk,
    }
}

impl Store {
    fn present_disks(&self) -> Vec<Arc<DiskNode>> {
        self.all_disks().into_iter().filter(|node| !node.is_retired()).collect()
    }

    /// What stands on a base: disks with their snapshots, disks in the trash, and removed disks that are open.
    pub fn base_children(&self, base: u64) -> Vec<BaseChild> {
        let mut found = Vec::new();
        for node in self.present_disks().into_iter().filter(|node| node.base_id() == Some(base)) {
            let (name, kind) = (node.name(), kind_of(&node));
            found.push(BaseChild { name: name.clone(), number: node.id(), kind });
            node.each_snapshot(|snapshot| {
                if kind == ChildKind::Disk {
                    let name = format!("{name}@{}", snapshot.name);
                    found.push(BaseChild { name, number: snapshot.number, kind: ChildKind::Snapshot });
                }
            });
        }
        found
    }

    /// The other disks that stand on layers which a disk made, or on the layer that one of its snapshots shows: its clones
    /// and theirs, and copies that share its blocks.
    ///
    /// A number tells which disk made a layer: a disk has a lower number than each layer that it made, and a clone has a
    /// higher one than each layer that it took over.
    ///
    /// # Errors
    /// An unknown disk or snapshot.
    pub fn disk_children(&self, origin: &Origin) -> Result<Vec<DiskChild>, StoreError> {
        let node = self.disk(&origin.disk)?;
        let lineage = node.lineage();
        let shown = match &origin.snapshot {
            None => None,
            Some(name) => {
                let snapshot = lineage.snapshot(name).ok_or_else(|| StoreError::NotFound {
                    object: format!("snapshot {origin}"),
                    noun: "snapshot",
                })?;
                // A snapshot of nothing but the base has no layer that a clone could share.
                let Some(place) = snapshot.layer else { return Ok(Vec::new()) };
                Some(lineage.layers[place].number)
            }
        };
        let heights = heights(&lineage);
        let mut found = Vec::new();
        for other in self.present_disks().into_iter().filter(|other| other.id() != node.id()) {
            let mut layers: Vec<u64> = Vec::new();
            other.each_delta(|delta| layers.extend(heights.contains_key(&delta).then_some(delta)));
            layers.sort_unstable_by_key(|layer| heights[layer]);
            let Some(top) = layers.last().copied() else { continue };
            let is_child = match shown {
                Some(shown) => top == shown && (shown >= node.id() || shown < other.id()),
                None => top >= node.id(),
            };
            if !is_child {
                continue;
            }
            let shows_top = |layer: Option<usize>| layer.is_some_and(|at| lineage.layers[at].number == top);
            let on = lineage.snapshots.iter().filter(|snapshot| shows_top(snapshot.layer));
            found.push(DiskChild {
                name: other.name(),
                number: other.id(),
                kind: kind_of(&other),
                on: on.map(|snapshot| snapshot.name.clone()).collect(),
                layers,
            });
        }
        Ok(found)
    }
}

/// How many layers lie below each layer, by its number.
fn heights(lineage: &Lineage) -> HashMap<u64, usize> {
    let height = |place: usize| lineage.chain(Some(place)).count();
    lineage.layers.iter().enumerate().map(|(place, layer)| (layer.number, height(place))).collect()
}
