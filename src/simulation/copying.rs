//! Copies from one disk to another, which share blocks where they can. Each step is a change of its own for the model.

use std::sync::Arc;

use super::model::{DiskModel, FrozenModel, Names};
use super::operation::{From, Op};
use super::sim_store::{Outcome, SimStore, text};
use crate::disk::{Grow, Shown};
use crate::store::{CopySource, Sharing};

impl SimStore {
    pub(super) fn has_source(&self, from: &From, names: &Names) -> bool {
        match from {
            From::Disk(disk) => names.disks.contains_key(disk),
            From::Snapshot(disk, name) => {
                names.disks.get(disk).is_some_and(|disk| disk.snapshots.contains_key(name))
            }
            From::Base(base) => names.bases.contains_key(base),
        }
    }

    fn source(&self, from: &From) -> Result<(CopySource, Arc<FrozenModel>), String> {
        let names = self.hook.model.lock().names.clone();
        Ok(match from {
            From::Disk(disk) => {
                let node = self.store().disk(disk).map_err(text)?;
                (CopySource::Disk(node), Arc::new(names.disks[disk].freeze()))
            }
            From::Snapshot(disk, name) => {
                let (node, entry) = self.store().snapshot_of(disk, name).ok_or("the snapshot is gone")?;
                (CopySource::Snapshot(node, entry.number), names.disks[disk].snapshots[name].clone())
            }
            From::Base(base) => {
                let node = self.store().base(base).map_err(text)?;
                let bytes = &self.hook.campaign.bases[names.bases[base].source].bytes;
                (CopySource::Base(node), Arc::new(FrozenModel::of_bytes(bytes)))
            }
        })
    }

    /// Copies a range, cut at the end of the source.
    pub(super) fn copy(
        &self,
        from: &From,
        to: &str,
        fresh: bool,
        (at, len): (u64, u64),
    ) -> Result<Outcome, String> {
        if fresh {
            let cut = self.step_shared(&Op::Resize { disk: to.to_owned(), to: 0 })?;
            if let Outcome::Failed(_) = cut {
                return Ok(cut);
            }
        }
        let (source, bytes) = self.source(from)?;
        let end = (at + len).min(bytes.size());
        let shared = self.share(from, &source, to)?;
        let sharing = match shared {
            Ok(sharing) => sharing,
            Err(failed) => return Ok(failed),
        };
        let mut at = at;
        while at < end {
            let stop = match &sharing {
                Some(sharing) if at < sharing.overlap => {
                    let stop = end.min(sharing.overlap);
                    self.disk(to, |disk| disk.delta().extent(at, stop).1)?
                }
                _ => end,
            };
            let part = bytes.bytes(at, stop);
            self.model(to, |model| model.begin_write(at, stop - at, Some(&part)));
            let done = self.disk(to, |disk| {
                let epoch = disk.delta().error_epoch();
                if let Some(sharing) = &sharing {
                    if at >= sharing.overlap {
                        let grown = disk.grow(stop, Grow::Yes);
                        return Outcome::of(grown.and_then(|()| disk.zero(at, stop - at, epoch)));
                    }
                    match disk.show((at, stop), &sharing.ground, epoch) {
                        Ok(Shown::Shows(shown)) if shown == stop => return Outcome::Done,
                        Ok(_) => {}
                        Err(error) => return Outcome::Failed(error.to_string()),
                    }
                }
                Outcome::of(disk.write(at, &part, epoch))
            })?;
            let written = self.written(to, at, stop - at, done)?;
            if let Outcome::Failed(_) = written {
                return Ok(written);
            }
            at = stop;
        }
        Ok(Outcome::Done)
    }

    /// Puts the disk on what the source has, if it can.
    fn share(
        &self,
        from: &From,
        source: &CopySource,
        to: &str,
    ) -> Result<Result<Option<Sharing>, Outcome>, String> {
        let node = self.store().disk(to).map_err(text)?;
        let origin = match from {
            From::Disk(disk) => Some(disk),
            From::Snapshot(..) | From::Base(_) => None,
        };
        // What sealing flushes is durable, and what it fails to flush may be lost.
        let before = match origin {
            Some(disk) => {
                let mark = self.model(disk, |m| m.mark());
                let epoch = self.disk(disk, |d| {
                    d.delta().opened();
                    d.delta().error_epoch()
                })?;
                Some((disk, mark, epoch))
            }
            None => None,
        };
        let base = {
            let names = &self.hook.model.lock().names;
            match from {
                From::Disk(disk) | From::Snapshot(disk, _) => names.disks[disk].base.clone(),
                From::Base(base) => Some(base.clone()),
            }
        };
        {
            let mut model = self.hook.model.lock();
            let mut after = model.names.clone();
            after.disk(to).base = base;
            model.alternatives = vec![after];
        }
        let is_fresh = node.peek().is_none_or(|disk| disk.delta().overlap() == 0);
        let done = self.store().share(source, &node, None);
        let base = node.base_name();
        {
            let mut model = self.hook.model.lock();
            model.names.disk(to).base = base;
            if done.is_ok() {
                model.alternatives.clear();
            }
        }
        if let Some((disk, mark, epoch)) = before {
            let after = self.disk(disk, |d| d.delta().error_epoch())?;
            match &done {
                // It was sealed for this.
                Ok(Some(_)) if is_fresh => self.model(disk, |m| m.flushed(&mark)),
                Err(_) if epoch != after => {
                    self.model(disk, DiskModel::doubt);
                    self.hook.model.lock().doubt();
                }
                _ => {}
            }
        }
        Ok(done.map_err(|error| Outcome::Failed(error.to_string())))
    }
}
