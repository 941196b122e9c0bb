//! One store on one simulated medium, with its model. Runs operations, plans faults, and lets the hook see every call of
//! the medium.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::copies::Copies;
use super::flushing::{self, Flushing};
use super::hook::{HookState, PlannedFault};
use super::model::{BaseModel, DiskModel, FlushMark, Interruption, Model, Names};
use super::operation::{Op, Stand, any, share_of_layers};
use super::{Campaign, Counts, cut, encryption};
use crate::cache::BlockCache;
use crate::disk::{Disk, Grow};
use crate::io::sim::{Call, Event, Keep, Rng, SimLive, SimMedium};
use crate::store::{DiskNode, NewDisk, Origin, Removal, Replace, Store, StoreError};

pub(super) struct SimStore {
    pub(super) hook: Arc<HookState>,
    store: Option<Store>,
    pub(super) copies: Option<Arc<Copies>>,
}

impl Drop for SimStore {
    fn drop(&mut self) {
        self.hook.release();
    }
}

pub(super) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl SimStore {
    pub(super) fn watched(
        campaign: &Arc<Campaign>,
        medium: SimMedium,
        live: SimLive,
        model: Model,
        rng: Rng,
        (depth, concurrent): (u32, bool),
    ) -> Self {
        let hook = Arc::new(HookState {
            campaign: campaign.clone(),
            medium: medium.clone(),
            live: Arc::new(live),
            model: Mutex::new(model),
            running: Mutex::default(),
            rng: Mutex::new(rng),
            fault: Mutex::default(),
            unsure: AtomicBool::new(false),
            depth,
            concurrent,
        });
        let shared = hook.clone();
        medium.set_hook(Some(Arc::new(move |event: &Event<'_>| shared.at(event))));
        Self { hook, store: None, copies: None }
    }

    /// Runs a whole history, from an empty directory on.
    pub fn first_life(campaign: &Arc<Campaign>, seed: u64) -> Result<(), String> {
        let mut rng = Rng::new(seed);
        let medium = SimMedium::new(rng.number());
        // By the seed, so that the other histories are those of a store without a trash.
        let keeps_removed = matches!(seed % 7, 0 | 5 | 6);
        let names = Names { keeps_removed, flushing: Flushing::of(seed), ..Names::default() };
        let model = Model { names, ..Model::default() };
        let mut world = Self::watched(campaign, medium, SimLive::default(), model, rng.fork(), (0, false));
        world.open(Interruption::WorkerDeath)?;
        let steps = 10 + rng.below(30);
        world.live_on(&mut rng, steps)
    }

    /// Runs the store after a cut: opens it, compares it with the model, purges, and goes on for a while.
    pub fn later_life(
        hook: &HookState,
        mut model: Model,
        medium: SimMedium,
        live: SimLive,
        what: Interruption,
        mut rng: Rng,
    ) {
        let running = hook.running.lock().clone();
        if hook.fault.lock().hit.is_some() {
            // The running operation met an error that it had no time to report.
            model.doubt();
        }
        let depth = hook.depth + 1;
        let mut world = Self::watched(&hook.campaign, medium, live, model, rng.fork(), (depth, false));
        world
            .hook
            .unsure
            .store(what == Interruption::PowerCut || hook.unsure.load(Ordering::Acquire), Ordering::Release);
        let life = |world: &mut Self| -> Result<(), String> {
            if what == Interruption::PowerCut {
                cut::check(&world.hook, &mut rng)?;
            }
            world.open(what)?;
            if let (Interruption::WorkerDeath, Some(op)) = (what, running) {
                world.after_death(op, &mut rng)?;
            }
            world.run(Op::Purge)?;
            if rng.chance(if depth == 1 { 20 } else { 40 }) {
                let steps = 1 + rng.below(6);
                world.live_on(&mut rng, steps)?;
            }
            Ok(())
        };
        if let Err(message) = life(&mut world) {
            world.hook.violated(&message);
        }
    }

    /// Opens the unchanged store again, at another depth.
    pub(super) fn restart_as(&mut self, depth: u32) -> Result<(), String> {
        self.store = None;
        let hook = &self.hook;
        let model = hook.model.lock().clone();
        let live = hook.live.fork().map_err(text)?;
        let (campaign, medium, rng) = (hook.campaign.clone(), hook.medium.fork(), hook.rng.lock().fork());
        *self = Self::watched(&campaign, medium, live, model, rng, (depth, true));
        self.open(Interruption::WorkerDeath)
    }

    pub(super) fn open(&mut self, what: Interruption) -> Result<(), String> {
        let hook = &self.hook;
        // A start that fails serves no client, so a fault in it would prove nothing.
        hook.fault.lock().skip = None;
        let live = hook.live.clone();
        let gone = {
            let model = hook.model.lock();
            let others = model.alternatives.iter().map(Names::kept);
            others.fold(model.names.kept(), |kept, other| &kept & &other)
        };
        let copies = Copies::open(&hook.campaign, &hook.medium, gone);
        // A cache of its own: blocks in memory would hide what is on the medium.
        let memory = BlockCache::new(1 << 20).map_err(text)?;
        let medium = Arc::new(hook.medium.clone());
        let store = Store::open_on(medium, |_| Ok(live), Arc::new(memory), Some(0), copies.clone());
        let store = store.map_err(|e| hook.violated(&format!("the store cannot be opened: {e}")))?;
        encryption::prepare(&store);
        // Without the lock, because attaching a disk calls the medium.
        let model = hook.model.lock().clone();
        if model.names.keeps_removed {
            store.keep_removed_for(Duration::MAX);
        }
        let what = if hook.unsure.load(Ordering::Acquire) { Interruption::PowerCut } else { what };
        let now = model.compare(what, &store).map_err(|e| hook.violated(&e))?;
        let mut model = hook.model.lock();
        model.alternatives.clear();
        model.names = now.names;
        drop(model);
        hook.unsure.store(false, Ordering::Release);
        self.store = Some(store);
        self.copies = Some(copies);
        Ok(())
    }

    fn live_on(&mut self, rng: &mut Rng, steps: u64) -> Result<(), String> {
        let share = share_of_layers(rng);
        for _ in 0..steps {
            let op = any(rng, &self.hook.model.lock().names, share);
            // The first calls of a hydration are those of its record.
            let again = matches!(op, Op::Hydrate { .. }).then(|| op.clone());
            let (percent, calls) = if again.is_some() { (40, 30) } else { (8, 7) };
            if rng.chance(percent) {
                let (skip, errno) = (Some(rng.below(calls)), *rng.pick(&[libc::EIO, libc::ENOSPC]));
                *self.hook.fault.lock() = PlannedFault { skip, errno, hit: None };
            }
            self.run(op)?;
            // An operator asks again for what may have failed.
            again.filter(|_| rng.chance(50)).map_or(Ok(()), |op| self.run(op))?;
            let often = self.hook.model.lock().names.flushing != Flushing::Never && rng.chance(25);
            let more = if often { flushing::some(rng, &self.hook.model.lock().names) } else { Vec::new() };
            more.into_iter().try_for_each(|op| self.run(op))?;
            if self.hook.campaign.stopped() {
                return Err("stopped".into());
            }
        }
        // After a clean stop the check finds nothing.
        self.run(Op::Close)?;
        let mut rng = rng.fork();
        cut::check_stopped(&self.hook, &mut rng)
    }

    /// Goes on after the death of a worker that ran `op`. The kernel sends a request again; a client of the API may have
    /// died too. Then a sealing is left as it was, and a flush by a user of the disk includes what is pending.
    fn after_death(&mut self, op: Op, rng: &mut Rng) -> Result<(), String> {
        let disk = match &op {
            Op::Snapshot { disk, .. } | Op::Clone { from: disk, .. } if rng.chance(50) => disk.clone(),
            _ => return self.send_again(op),
        };
        if self.hook.model.lock().names.disks.contains_key(&disk) {
            self.run(Op::Flush { disk })?;
            if rng.chance(50) {
                self.run(Op::PowerCut)?;
            }
        }
        Ok(())
    }

    /// Runs an operation again that a dead worker did not complete, as the kernel sends a request again.
    fn send_again(&mut self, op: Op) -> Result<(), String> {
        let done = {
            let names = &self.hook.model.lock().names;
            let has = |name: &String| names.disks.contains_key(name);
            match &op {
                Op::Create { disks } => disks.iter().any(|(name, ..)| has(name)),
                Op::Rename { from, .. } => !has(from),
                Op::Unlink { disk } | Op::Remove { disk, .. } => !has(disk),
                Op::Restore { index, to } => has(to) || *index >= names.trash.len(),
                Op::Discard { left, .. } => names.trash.len() <= *left,
                Op::AddBase { name, .. } => names.bases.contains_key(name),
                Op::RemoveBase { name } => !names.bases.contains_key(name),
                Op::Pin { base, .. } | Op::Hydrate { base } | Op::Unhydrate { base } => {
                    !names.bases.contains_key(base)
                }
                Op::Evict { base } | Op::Refuse { base } | Op::Accept { base } => {
                    !names.bases.contains_key(base)
                }
                Op::Clone { from, snapshot, to } => {
                    let missing = |name: &String| !names.disks[from].snapshots.contains_key(name);
                    has(to) || !has(from) || snapshot.as_ref().is_some_and(missing)
                }
                Op::Copy { to, from, .. } => !has(to) || !self.has_source(from, names),
                Op::Snapshot { disk, name } => !has(disk) || names.disks[disk].snapshots.contains_key(name),
                Op::RemoveSnapshot { disk, name } | Op::Rollback { disk, name } => {
                    !has(disk) || !names.disks[disk].snapshots.contains_key(name)
                }
                Op::Rework { disk, on } => {
                    let missing = matches!(on, Stand::On(base) if !names.bases.contains_key(base));
                    !has(disk) || missing
                }
                Op::TendLayers | Op::Purge | Op::Detach | Op::Close | Op::WorkerDies | Op::PowerCut => true,
                Op::Write { disk, .. } | Op::Zero { disk, .. } | Op::Grow { disk, .. } => !has(disk),
                Op::Resize { disk, .. } | Op::Flush { disk } | Op::Mode { disk, .. } => !has(disk),
                Op::Limit { disk, .. } => !has(disk),
            }
        };
        if done { Ok(()) } else { self.run(op) }
    }

    pub(super) fn store(&self) -> &Store {
        self.store.as_ref().expect("open")
    }

    /// Runs an operation and updates the model.
    pub(super) fn run(&mut self, op: Op) -> Result<(), String> {
        Counts::add(&self.hook.campaign.counts.operations);
        self.hook.model.lock().log.push(op.text());
        *self.hook.running.lock() = Some(op.clone());
        let result = self.step(&op).and_then(|done| self.check_counts().map(|()| done));
        *self.hook.running.lock() = None;
        let hit = {
            let mut fault = self.hook.fault.lock();
            fault.skip = None;
            fault.hit.take()
        };
        let result = result.map_err(|e| self.hook.violated(&e))?;
        if let Some(call) = hit {
            self.hook.model.lock().log.push(format!("  a {call:?} failed: {result:?}"));
        }
        match (result, hit) {
            (Outcome::Failed(why), None) => Err(self.hook.violated(&format!("{} failed: {why}", op.text()))),
            // These operations promise nothing about blocks that could not be cached, and try again what failed.
            (Outcome::Done, Some(_))
                if matches!(op, Op::Evict { .. } | Op::Pin { .. } | Op::Hydrate { .. } | Op::TendLayers) =>
            {
                Ok(())
            }
            (Outcome::Done, Some(call @ (Call::SyncData | Call::SyncDir))) => {
                Err(self.hook.violated(&format!("{}: the error of a {call:?} was not reported", op.text())))
            }
            (Outcome::Failed(_), Some(_)) if op.changes_names() => {
                // Which names the medium has is unknown until the store is opened again.
                let power = self.hook.rng.lock().chance(50);
                self.restart(if power { Interruption::PowerCut } else { Interruption::WorkerDeath })
            }
            _ => Ok(()),
        }
    }

    /// Simulates an interruption, and opens the store again.
    fn restart(&mut self, what: Interruption) -> Result<(), String> {
        self.store = None;
        match what {
            Interruption::WorkerDeath => {
                Counts::add(&self.hook.campaign.counts.workers);
                self.open(what)
            }
            Interruption::PowerCut => {
                Counts::add(&self.hook.campaign.counts.cuts);
                let mut rng = self.hook.rng.lock().fork();
                let keep = Keep::any(&mut rng);
                let medium = self.hook.medium.crash(&mut rng, keep);
                let model = self.hook.model.lock().clone();
                let campaign = self.hook.campaign.clone();
                self.hook.release();
                let depth = self.hook.depth;
                *self = Self::watched(&campaign, medium, SimLive::default(), model, rng, (depth, false));
                self.hook.unsure.store(true, Ordering::Release);
                self.open(what)
            }
        }
    }

    pub(super) fn disk<T>(&self, name: &str, act: impl FnOnce(&Disk) -> T) -> Result<T, String> {
        let node = self.store().disk(name).map_err(text)?;
        let disk = node.attach().map_err(text)?;
        Ok(act(&disk))
    }

    pub(super) fn model<T>(&self, name: &str, act: impl FnOnce(&mut DiskModel) -> T) -> T {
        act(self.hook.model.lock().names.disk(name))
    }

    /// Runs one operation. An error of this function is a violation; a failed operation is `Outcome::Failed`.
    fn step(&mut self, op: &Op) -> Result<Outcome, String> {
        match op {
            Op::Close => self.close(),
            Op::WorkerDies => self.restart(Interruption::WorkerDeath).map(|()| Outcome::Done),
            Op::PowerCut => self.restart(Interruption::PowerCut).map(|()| Outcome::Done),
            Op::Purge => {
                for node in self.store().unlinked() {
                    if let Err(e) = self.store().purge(node.id()) {
                        return Ok(Outcome::Failed(e.to_string()));
                    }
                }
                Ok(Outcome::Done)
            }
            Op::Detach => Ok(self.detach()),
            Op::TendLayers => Ok(self.tend_layers()),
            Op::Accept { base } => self.accept(base),
            Op::Pin { base, .. } | Op::Hydrate { base } | Op::Unhydrate { base } => {
                self.change_base(op, base)
            }
            Op::Evict { base } | Op::Refuse { base } => self.change_base(op, base),
            other => self.step_shared(other),
        }
    }

    /// Completes what is pending. An error is tried again; what a failed sync lost is reported to the next flush.
    fn tend_layers(&self) -> Outcome {
        let epochs = |node: &Arc<DiskNode>| node.peek().map(|disk| disk.delta().error_epoch());
        let before: Vec<_> = self.store().attached().into_iter().map(|node| (epochs(&node), node)).collect();
        self.store().tend_layers();
        for (epoch, node) in &before {
            if epochs(node) != *epoch {
                let _ = self.model_of(node, DiskModel::doubt);
            }
        }
        Outcome::Done
    }

    /// Detaches every idle disk, which flushes it.
    fn detach(&self) -> Outcome {
        let attached = self.store().attached().into_iter();
        let before: Vec<_> = attached
            .filter_map(|node| {
                let epoch = node.peek().map_or(0, |disk| disk.delta().error_epoch());
                let mark = self.model_of(&node, |m| m.mark())?;
                Some((node, epoch, mark))
            })
            .collect();
        self.store().detach_idle(Duration::ZERO, Duration::ZERO);
        self.store().tend_maps();
        let (mut failed, mut refusing) = (Vec::new(), Vec::new());
        for (node, epoch, mark) in before {
            match node.peek() {
                None => _ = self.model_of(&node, |m| m.flushed(&mark)),
                Some(_) if epoch != 0 => refusing.push(node.name()),
                Some(disk) => {
                    if disk.delta().error_epoch() != epoch {
                        let _ = self.model_of(&node, DiskModel::doubt);
                    }
                    failed.push(node.name());
                }
            }
        }
        // A disk whose sync failed before stays in any case. It may be the one that met this fault.
        if self.hook.fault.lock().hit.is_some() {
            failed.append(&mut refusing);
        }
        if failed.is_empty() { Outcome::Done } else { Outcome::Failed(format!("{failed:?} stay attached")) }
    }

    /// Runs an operation that several threads may run at once.
    pub(super) fn step_shared(&self, op: &Op) -> Result<Outcome, String> {
        match op {
            Op::Write { disk, at, bytes } => self.write(disk, *at, bytes.len() as u64, Some(bytes)),
            Op::Zero { disk, at, len } => {
                let size = self.model(disk, |m| m.size());
                let end = (at + len).min(size);
                if *at >= end {
                    return Ok(Outcome::of(self.disk(disk, |d| d.zero(*at, *len, d.delta().error_epoch()))?));
                }
                // The length is passed unchanged, and may reach beyond the end.
                self.model(disk, |m| m.begin_write(*at, end - at, None));
                let done = Outcome::of(self.disk(disk, |d| d.zero(*at, *len, d.delta().error_epoch()))?);
                self.written(disk, *at, end - at, done)
            }
            Op::Grow { disk, to } => {
                let to = (*to).max(self.model(disk, |m| m.size()));
                self.model(disk, |m| m.begin_size(to));
                let done = Outcome::of(self.disk(disk, |d| d.grow(to, Grow::Yes))?);
                match &done {
                    Outcome::Done => self.model(disk, DiskModel::finish_size),
                    Outcome::Failed(_) => self.with_disk(disk, DiskModel::fail_resize)?,
                }
                Ok(done)
            }
            Op::Resize { disk, to } => {
                self.model(disk, |m| m.begin_size(*to));
                let (epoch, done, after) = self.disk(disk, |d| {
                    let epoch = d.delta().error_epoch();
                    (epoch, Outcome::of(d.resize(*to)), d.delta().error_epoch())
                })?;
                match &done {
                    Outcome::Done => self.model(disk, DiskModel::finish_resize),
                    Outcome::Failed(_) => self.with_disk(disk, DiskModel::fail_resize)?,
                }
                if epoch != after {
                    self.model(disk, DiskModel::doubt);
                }
                Ok(done)
            }
            Op::Flush { disk } => {
                let mark = self.model(disk, |m| m.mark());
                let (epoch, done, after) = self.disk(disk, |d| {
                    let epoch = d.delta().error_epoch();
                    (epoch, Outcome::of(d.flush(epoch)), d.delta().error_epoch())
                })?;
                if epoch != after {
                    self.model(disk, DiskModel::doubt);
                    if self.disk(disk, |d| d.flush(epoch).is_ok() || d.write(0, b"x", epoch).is_ok())? {
                        return Err(format!("disk {disk}: a handle still works after a failed sync"));
                    }
                }
                if let Outcome::Done = done {
                    self.model(disk, |m| m.flushed(&mark));
                }
                Ok(done)
            }
            Op::Mode { disk, mode } => {
                self.model(disk, |m| m.begin_mode(*mode));
                let node = self.store().disk(disk).map_err(text)?;
                let done = Outcome::of(node.update(|record| record.mode = *mode));
                if let Outcome::Done = done {
                    self.model(disk, DiskModel::finish_mode);
                }
                Ok(done)
            }
            Op::Limit { disk, quota } => self.limit(disk, *quota),
            Op::Snapshot { disk, .. } | Op::Clone { from: disk, .. } | Op::Rollback { disk, .. } => {
                // What sealing flushes is durable, and what it fails to flush may be lost.
                let mark = self.model(disk, |m| m.mark());
                let epoch = self.disk(disk, |d| {
                    d.delta().opened();
                    d.delta().error_epoch()
                })?;
                let done = self.change_names(op);
                let after = self.disk(disk, |d| d.delta().error_epoch())?;
                match done {
                    Outcome::Done if !matches!(op, Op::Rollback { .. }) => {
                        if let Op::Clone { snapshot: None, .. } | Op::Snapshot { .. } = op {
                            self.model(disk, |m| m.flushed(&mark));
                        }
                    }
                    Outcome::Failed(_) if epoch != after => {
                        self.model(disk, DiskModel::doubt);
                        self.hook.model.lock().doubt();
                    }
                    _ => {}
                }
                Ok(done)
            }
            Op::Rework { disk, on } => self.rework(disk, on),
            Op::Copy { from, to, fresh, at, len } => self.copy(from, to, *fresh, (*at, *len)),
            names => Ok(self.change_names(names)),
        }
    }

    fn with_disk(
        &self,
        name: &str,
        act: impl FnOnce(&mut DiskModel, &Disk) -> Result<(), String>,
    ) -> Result<(), String> {
        // A copy, because the disk's calls run the hook, which locks the model.
        let mut model = DiskModel::clone(&self.hook.model.lock().names.disks[name]);
        self.disk(name, |disk| act(&mut model, disk))??;
        self.model(name, |m| *m = model);
        Ok(())
    }

    fn write(&self, disk: &str, at: u64, len: u64, bytes: Option<&[u8]>) -> Result<Outcome, String> {
        self.model(disk, |m| m.begin_write(at, len, bytes));
        let bytes = bytes.unwrap_or_default();
        let done = Outcome::of(self.disk(disk, |d| d.write(at, bytes, d.delta().error_epoch()))?);
        self.written(disk, at, len, done)
    }

    pub(super) fn written(&self, disk: &str, at: u64, len: u64, done: Outcome) -> Result<Outcome, String> {
        match &done {
            Outcome::Done => self.model(disk, |m| m.finish_write(at, len)),
            Outcome::Failed(_) => self.with_disk(disk, |m, d| m.fail_write(at, len, d))?,
        }
        Ok(done)
    }

    /// Stops the store cleanly, and opens it again.
    fn close(&mut self) -> Result<Outcome, String> {
        let (marks, in_trash): (Vec<(String, FlushMark)>, Vec<FlushMark>) = {
            let names = &self.hook.model.lock().names;
            let marks = names.disks.iter().map(|(name, disk)| (name.clone(), disk.mark())).collect();
            (marks, names.trash.iter().map(|(_, disk)| disk.mark()).collect())
        };
        let done = Outcome::of(
            self.store().close().map_err(text).and_then(|()| self.copies().flush().map_err(text)),
        );
        let mut model = self.hook.model.lock();
        for (name, mark) in marks {
            match &done {
                Outcome::Done => model.names.disk(&name).flushed(&mark),
                // Which disk's sync failed is unknown here.
                Outcome::Failed(_) => model.names.disk(&name).doubt(),
            }
        }
        for ((_, disk), mark) in model.names.trash.iter_mut().zip(in_trash) {
            match &done {
                Outcome::Done => Arc::make_mut(disk).flushed(&mark),
                Outcome::Failed(_) => Arc::make_mut(disk).doubt(),
            }
        }
        drop(model);
        self.store = None;
        self.open(Interruption::WorkerDeath)?;
        Ok(done)
    }

    fn change_names(&self, op: &Op) -> Outcome {
        let before = self.hook.model.lock().names.clone();
        let mut after = before.clone();
        let mut between = Vec::new();
        let result = match op {
            Op::Create { disks } => {
                for set in 1u32..1 << disks.len() {
                    let mut some = before.clone();
                    for (_, (name, base, size)) in disks.iter().enumerate().filter(|(n, _)| set >> n & 1 == 1)
                    {
                        let bytes = base
                            .as_deref()
                            .map(|b| (b, self.hook.campaign.bases[before.bases[b].source].bytes.as_slice()));
                        some.disks.insert(name.clone(), Arc::new(DiskModel::new(*size, 0o600, bytes)));
                    }
                    after = some.clone();
                    between.push(some);
                }
                let wanted: Vec<NewDisk> = disks
                    .iter()
                    .map(|(name, base, size)| NewDisk {
                        name: name.clone(),
                        base: base.clone(),
                        size: Some(*size),
                        mode: 0o600,
                        uid: 0,
                        gid: 0,
                        limits: Default::default(),
                    })
                    .collect();
                self.hook.model.lock().alternatives = between;
                encryption::create(self.store(), &wanted).map(drop)
            }
            Op::Rename { from, to } => {
                if let Some(disk) = after.disks.remove(from) {
                    after.remove(to, false);
                    after.disks.insert(to.clone(), disk);
                }
                self.hook.model.lock().alternatives = vec![after.clone()];
                self.store().rename(from, to, Replace::Yes).map(drop)
            }
            Op::Unlink { disk } => {
                after.remove(disk, false);
                self.hook.model.lock().alternatives = vec![after.clone()];
                self.store().unlink(disk).map(drop)
            }
            Op::Remove { disk, now } => {
                after.remove(disk, *now);
                self.hook.model.lock().alternatives = vec![after.clone()];
                self.store().remove_disk(disk, Removal { snapshots: true, now: *now }).map(drop)
            }
            Op::Restore { index, to } => self.restore_trashed(*index, to, &mut after),
            Op::Discard { index, .. } => self.discard_trashed(*index, &mut after),
            Op::Snapshot { disk, name } => {
                let model = after.disk(disk);
                let frozen = Arc::new(model.freeze());
                model.snapshots.insert(name.clone(), frozen);
                self.hook.model.lock().alternatives = vec![after.clone()];
                self.store().snapshot(disk, name, None).map(drop)
            }
            Op::RemoveSnapshot { disk, name } => {
                after.disk(disk).snapshots.remove(name);
                self.hook.model.lock().alternatives = vec![after.clone()];
                self.store().remove_snapshot(disk, name)
            }
            Op::Rollback { disk, name } => {
                let model = after.disk(disk);
                *model = model.rolled_back(&model.snapshots[name].clone());
                self.hook.model.lock().alternatives = vec![after.clone()];
                self.store().rollback(disk, name, None)
            }
            Op::Clone { from, snapshot, to } => {
                let origin = &before.disks[from];
                let frozen = match snapshot {
                    Some(name) => origin.snapshots[name].clone(),
                    None => Arc::new(origin.freeze()),
                };
                after.disks.insert(to.clone(), Arc::new(origin.thaw(&frozen, 0o600)));
                self.hook.model.lock().alternatives = vec![after.clone()];
                let origin = Origin { disk: from.clone(), snapshot: snapshot.clone() };
                let new = NewDisk {
                    name: to.clone(),
                    base: None,
                    size: None,
                    mode: 0o600,
                    uid: 0,
                    gid: 0,
                    limits: Default::default(),
                };
                encryption::clone(self.store(), &origin, new).map(drop)
            }
            Op::AddBase { name, source } => {
                after.bases.insert(name.clone(), BaseModel::of(*source));
                self.hook.model.lock().alternatives = vec![after.clone()];
                let path = self.hook.campaign.bases[*source].path.display().to_string();
                self.store().add_base(name, &path, None).map(drop)
            }
            Op::RemoveBase { name } => {
                let source = before.bases[name].source;
                after.bases.remove(name);
                self.hook.model.lock().alternatives = vec![after.clone()];
                let removed = self.store().remove_base(name);
                if removed.is_ok() && after.bases.values().all(|base| base.source != source) {
                    self.copies().put_back(source);
                    // Without faults: a failure would only leave blocks that nothing reads.
                    let fault = std::mem::take(&mut *self.hook.fault.lock());
                    self.copies().forget(source);
                    *self.hook.fault.lock() = fault;
                }
                removed
            }
            other => unreachable!("{other:?} changes no names"),
        };
        let has_snapshots = |name: &String| before.disks.get(name).is_some_and(|d| !d.snapshots.is_empty());
        let is_refused = match op {
            // An unlinked disk needs the base until it is purged, and one that is to be put on it does.
            Op::RemoveBase { name } => {
                let unlinked = !self.store().unlinked().is_empty();
                unlinked || !self.store().reworked().is_empty() || before.trash_needs(name)
            }
            Op::Unlink { disk } | Op::Rename { to: disk, .. } => has_snapshots(disk),
            _ => false,
        };
        let is_taken = |to: &String| before.disks.contains_key(to);
        let is_refused = match &result {
            Err(StoreError::InUse { .. }) => is_refused,
            Err(StoreError::Taken { .. }) => matches!(op, Op::Restore { to, .. } if is_taken(to)),
            _ => false,
        };
        if is_refused {
            self.hook.model.lock().alternatives.clear();
            return Outcome::Done;
        }
        let done = Outcome::of(result);
        if let Outcome::Done = done {
            let mut model = self.hook.model.lock();
            model.names = after;
            model.alternatives.clear();
        }
        done
    }
}

/// The result of an operation.
#[derive(Debug)]
pub(super) enum Outcome {
    Done,
    Failed(String),
}

impl Outcome {
    pub(super) fn of<T, E: std::fmt::Display>(result: Result<T, E>) -> Self {
        match result {
            Ok(_) => Self::Done,
            Err(e) => Self::Failed(e.to_string()),
        }
    }
}
