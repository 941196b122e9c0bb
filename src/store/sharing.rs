//! Copies that share blocks: what a disk can show of a source instead of copying it.
//!
//! What must hold: a copy has bytes that its source had during the call, or during an earlier call of the same copy. A
//! source that was written since its last moment gets a new one, or is copied.

use std::sync::Arc;

use super::node::{Moment, NewGround};
use super::{BaseNode, DiskNode, Store, StoreError};
use crate::disk::Ground;
use crate::format::lineage::Lineage;

/// What is copied.
#[derive(Clone)]
pub enum CopySource {
    /// A disk as it is now.
    Disk(Arc<DiskNode>),
    /// A snapshot of a disk, by its number.
    Snapshot(Arc<DiskNode>, u64),
    /// A base.
    Base(Arc<BaseNode>),
}

/// A moment of a source that a disk stands on.
#[derive(Clone)]
pub struct Sharing {
    /// What the disk stands on.
    pub ground: Ground,
    /// Bytes of the source.
    pub size: u64,
    /// Bytes from the start that the ground has; the others are zeros.
    pub overlap: u64,
}

impl CopySource {
    fn base(&self) -> Option<Arc<BaseNode>> {
        match self {
            Self::Disk(node) | Self::Snapshot(node, _) => node.base(),
            Self::Base(base) => Some(base.clone()),
        }
    }

    fn disk(&self) -> Option<&DiskNode> {
        match self {
            Self::Disk(node) | Self::Snapshot(node, _) => Some(node),
            Self::Base(_) => None,
        }
    }

    /// Numbers of the objects that must stay while a disk comes to stand on the source.
    fn users(&self) -> Vec<u64> {
        let disk = match self {
            Self::Disk(node) | Self::Snapshot(node, _) => Some(node.id()),
            Self::Base(_) => None,
        };
        self.base().map(|base| base.id()).into_iter().chain(disk).collect()
    }
}

impl std::fmt::Display for CopySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Disk(node) => write!(f, "disk {}", node.name()),
            Self::Snapshot(node, number) => write!(f, "snapshot number {number} of disk {}", node.name()),
            Self::Base(base) => write!(f, "base {}", base.record().name),
        }
    }
}

impl Store {
    /// Finds what `to` can show of `source`: a moment on which it stands already, or on which it is put now because it
    /// shows nothing of what it stands on. `earlier`: what an earlier call of the same copy found. `None`: the bytes must
    /// be copied.
    ///
    /// # Errors
    /// A source or disk that cannot be attached; errors of the storage.
    pub fn share(
        &self,
        source: &CopySource,
        to: &Arc<DiskNode>,
        earlier: Option<&Sharing>,
    ) -> Result<Option<Sharing>, StoreError> {
        // Opening files may hang: nothing is claimed yet. The references keep the disks attached.
        let attached = to.attach()?;
        let _source = match source {
            CopySource::Disk(node) if Arc::ptr_eq(node, to) => return Ok(None),
            CopySource::Disk(node) => Some(node.attach()?),
            CopySource::Snapshot(..) | CopySource::Base(_) => None,
        };
        let _base = source.base().map(|base| base.attach()).transpose()?;
        if let Some(sharing) = stands_on(source, to, earlier) {
            return Ok(Some(sharing));
        }
        // The keys of layers do not go from one record to another.
        let is_encrypted = |node: &DiskNode| node.is_encrypted();
        if is_encrypted(to) || source.disk().is_some_and(is_encrypted) {
            return Ok(None);
        }
        if attached.delta().overlap() != 0 || to.is_unlinked() {
            return Ok(None);
        }
        drop(attached);
        let name = to.name();
        let _claim = self.claims.adoption(&name, to.id(), source.users());
        if self.check_present(&name, to).is_err() {
            return Ok(None);
        }
        if self.check_needs_are_known(|| format!("disk {name}")).is_err() && !to.lineage().layers.is_empty() {
            return Ok(None);
        }
        let Some((moment, ground)) = self.moment_of(source)? else { return Ok(None) };
        let unneeded = |numbers| self.to_drop(to, numbers);
        let adopted = to.adopt(&ground, || self.new_id(), unneeded, &self.dropping)?;
        let ground = to.peek().filter(|_| adopted).and_then(|disk| Ground::of(disk.below()));
        if ground.is_some() {
            tracing::info!(disk = name, "a copy shares the blocks of {source}");
        }
        Ok(ground.map(|ground| Sharing { ground, size: moment.size, overlap: moment.overlap }))
    }

    /// What the source shows now, and what a disk has to stand on to show it. The caller holds a claim.
    fn moment_of(&self, source: &CopySource) -> Result<Option<(Moment, NewGround)>, StoreError> {
        let found = match source {
            CopySource::Base(base) => {
                let size = base.record().size();
                let backing = base.backing();
                let (base, lineage) = (Some(base.clone()), Lineage::of(0));
                let ground = NewGround { backing: Some(backing), base, lineage, top: None };
                Some((Moment { layer: None, size, overlap: size }, ground))
            }
            CopySource::Snapshot(node, number) => {
                let lineage = node.lineage();
                let snapshot = lineage.snapshots.iter().find(|snapshot| snapshot.number == *number);
                snapshot.map(|entry| {
                    let moment = Moment { layer: entry.layer, size: entry.size, overlap: entry.overlap };
                    (moment, ground_of(node, moment))
                })
            }
            CopySource::Disk(node) => {
                let moment = node.seal(|| self.new_id())?;
                Some((moment, ground_of(node, moment)))
            }
        };
        Ok(found)
    }
}

fn ground_of(node: &DiskNode, moment: Moment) -> NewGround {
    let record = node.record();
    let lineage = record.lineage.fork(0, moment.layer);
    NewGround { backing: record.backing, base: node.base(), top: lineage.below, lineage }
}

/// What a disk shows of a source already.
fn stands_on(source: &CopySource, to: &DiskNode, earlier: Option<&Sharing>) -> Option<Sharing> {
    let (disk, record) = (to.peek()?, to.record());
    let ground = Ground::of(disk.below()).filter(|_| record.lineage.rises)?;
    if let Some(earlier) = earlier.filter(|earlier| earlier.ground.is(&ground)) {
        return Some(earlier.clone());
    }
    let base = record.backing.as_ref().map(|backing| backing.base);
    let (layer, size, overlap) = match source {
        CopySource::Base(node) if base == Some(node.id()) => {
            let size = node.record().size();
            (None, size, size)
        }
        CopySource::Snapshot(node, number) if base == node.base_id() => {
            let lineage = node.lineage();
            let snapshot = lineage.snapshots.iter().find(|snapshot| snapshot.number == *number)?;
            let layer = snapshot.layer.map(|place| lineage.layers[place].number);
            (layer, snapshot.size, snapshot.overlap)
        }
        CopySource::Disk(node) => {
            let source = node.peek()?;
            let now = Ground::of(source.below()).filter(|now| now.is(&ground))?;
            if !source.delta().is_untouched() {
                return None;
            }
            (now.layer, source.size(), source.delta().overlap())
        }
        _ => return None,
    };
    (layer == ground.layer).then_some(Sharing { ground, size, overlap })
}
