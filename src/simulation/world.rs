//! One store on one simulated medium, with its model: runs operations, injects faults, and has every call of the
//! medium seen by the one who cuts.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::copies::Copies;
use super::cut::DEEPEST;
use super::model::{BaseModel, DiskModel, Mark, Model, Names, Survived};
use super::operation::{Op, any};
use super::{Campaign, Counts, cut};
use crate::cache::BlockCache;
use crate::disk::{Disk, Grow};
use crate::format::BLOCK;
use crate::io::sim::{Call, Event, Keep, Rng, SimLive, SimMedium, Stage};
use crate::sabotage::{Sabotage, simulate};
use crate::store::{NewDisk, Replace, Store, StoreError};

/// A fault that waits for its call.
#[derive(Debug, Default)]
pub(super) struct Trap {
    /// Calls until it springs.
    skip: Option<u64>,
    errno: i32,
    /// What failed.
    pub(super) sprung: Option<Call>,
}

/// What the hook needs.
pub(super) struct Watch {
    pub campaign: Arc<Campaign>,
    pub medium: SimMedium,
    pub live: Arc<SimLive>,
    pub model: Mutex<Model>,
    /// The operation that runs, for whoever has to send it again.
    pub running: Mutex<Option<Op>>,
    pub rng: Mutex<Rng>,
    pub(super) trap: Mutex<Trap>,
    /// Power went, and the store was not opened since: what it shows is not known yet.
    unsure: AtomicBool,
    /// 0 in the first life of a store; grows with every cut.
    pub depth: u32,
    /// Several threads run operations.
    pub crowded: bool,
}

impl Watch {
    /// Stops the hook: it keeps itself alive otherwise.
    fn release(&self) {
        self.medium.set_hook(None);
    }

    pub fn violated(&self, message: &str) -> String {
        let log = self.model.lock().log.clone();
        self.campaign.violated(&log, message);
        message.to_owned()
    }

    fn hook(self: &Arc<Self>, event: &Event<'_>) -> io::Result<()> {
        let stop = || io::Error::other("the campaign has stopped");
        if self.campaign.stopped() {
            return Err(stop());
        }
        cut::at(self, event);
        if self.campaign.trace && !matches!(event.call, Call::Read | Call::Open) {
            let line = format!("    {:?} {:?} {}", event.stage, event.call, event.name);
            self.model.lock().log.push(line);
        }
        if self.campaign.stopped() {
            return Err(stop());
        }
        if self.crowded && self.rng.lock().chance(20) {
            // Lets the others overtake here.
            std::thread::yield_now();
        }
        let may_fail = match event.call {
            Call::SyncData | Call::SyncDir | Call::Rename => true,
            Call::Write | Call::Create | Call::SetLen | Call::Punch | Call::Remove => true,
            Call::Open | Call::Read | Call::Allocate | Call::MakeDir => false,
        };
        let mut trap = self.trap.lock();
        if may_fail && event.stage == Stage::Before {
            match trap.skip {
                Some(0) => {
                    trap.skip = None;
                    trap.sprung = Some(event.call);
                    Counts::add(&self.campaign.counts.faults);
                    let space =
                        matches!(event.call, Call::Write | Call::Create | Call::SetLen | Call::Rename);
                    let errno = if space { trap.errno } else { libc::EIO };
                    return Err(io::Error::from_raw_os_error(errno));
                }
                Some(n) => trap.skip = Some(n - 1),
                None => {}
            }
        }
        Ok(())
    }
}

pub(super) struct World {
    pub(super) watch: Arc<Watch>,
    store: Option<Store>,
    pub(super) copies: Option<Arc<Copies>>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.watch.release();
    }
}

pub(super) fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}

impl World {
    fn watched(
        campaign: &Arc<Campaign>,
        medium: SimMedium,
        live: SimLive,
        model: Model,
        rng: Rng,
        (depth, crowded): (u32, bool),
    ) -> Self {
        let watch = Arc::new(Watch {
            campaign: campaign.clone(),
            medium: medium.clone(),
            live: Arc::new(live),
            model: Mutex::new(model),
            running: Mutex::default(),
            rng: Mutex::new(rng),
            trap: Mutex::default(),
            unsure: AtomicBool::new(false),
            depth,
            crowded,
        });
        let hook = watch.clone();
        medium.set_hook(Some(Arc::new(move |event: &Event<'_>| hook.hook(event))));
        Self { watch, store: None, copies: None }
    }

    /// A whole history, from an empty directory on.
    pub fn first_life(campaign: &Arc<Campaign>, seed: u64) -> Result<(), String> {
        let mut rng = Rng::new(seed);
        let medium = SimMedium::new(rng.number());
        let mut world =
            Self::watched(campaign, medium, SimLive::default(), Model::default(), rng.fork(), (0, false));
        world.open(Survived::Worker)?;
        let steps = 10 + rng.below(30);
        world.live_on(&mut rng, steps)
    }

    /// A life after a cut: opens, compares, cleans up, goes on for a while.
    pub fn later_life(
        watch: &Watch,
        mut model: Model,
        medium: SimMedium,
        live: SimLive,
        what: Survived,
        mut rng: Rng,
    ) {
        let running = watch.running.lock().clone();
        if watch.trap.lock().sprung.is_some() {
            // The operation that runs has met an error, and would have said so.
            model.doubt();
        }
        let depth = watch.depth + 1;
        let mut world = Self::watched(&watch.campaign, medium, live, model, rng.fork(), (depth, false));
        world
            .watch
            .unsure
            .store(what == Survived::Power || watch.unsure.load(Ordering::Acquire), Ordering::Release);
        let life = |world: &mut Self| -> Result<(), String> {
            if what == Survived::Power {
                cut::check(&world.watch, &mut rng)?;
            }
            world.open(what)?;
            if let (Survived::Worker, Some(op)) = (what, running) {
                world.send_again(op)?;
            }
            world.run(Op::Purge)?;
            if rng.chance(if depth == 1 { 20 } else { 40 }) {
                let steps = 1 + rng.below(6);
                world.live_on(&mut rng, steps)?;
            }
            Ok(())
        };
        if let Err(message) = life(&mut world) {
            world.watch.violated(&message);
        }
    }

    /// One disk that several threads use at once. Each has blocks of its own, so that it is known what was written
    /// last; the last thread has the end of the disk.
    pub fn crowd(campaign: &Arc<Campaign>, seed: u64, fault: Option<Sabotage>) -> Result<(), String> {
        const THREADS: u64 = 3;
        const BLOCKS: u64 = 48;
        let mut rng = Rng::new(seed);
        let medium = SimMedium::new(rng.number());
        let start = (SimLive::default(), Model::default());
        let mut world = Self::watched(campaign, medium, start.0, start.1, rng.fork(), (DEEPEST, true));
        world.open(Survived::Worker)?;
        world.run(Op::AddBase { name: "x".into(), source: 0 })?;
        let base = rng.chance(50).then(|| "x".to_owned());
        world.run(Op::Create { disks: vec![("a".into(), base, BLOCKS * BLOCK)] })?;
        world.run(Op::Flush { disk: "a".into() })?;
        // From here on it is cut.
        world.restart_as(0)?;
        let world = &world;
        let disk = "a".to_owned();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (mut rng, disk) = (rng.fork(), disk.clone());
                scope.spawn(move || {
                    let _switches = simulate(fault);
                    for _ in 0..12 {
                        let own = rng.below(BLOCKS / THREADS) * THREADS + thread;
                        let (at, stamp) = (own * BLOCK + rng.below(3) * 512, rng.number() as u8 | 1);
                        let op = match rng.below(8) {
                            0..3 if thread == THREADS - 1 => {
                                Op::Resize { disk: disk.clone(), to: BLOCKS * BLOCK + rng.below(70_000) }
                            }
                            3 | 4 if thread == THREADS - 1 => {
                                let at = BLOCKS * BLOCK + rng.below(70_000);
                                Op::Write { disk: disk.clone(), at, bytes: vec![stamp; 5000] }
                            }
                            0..4 => Op::Write { disk: disk.clone(), at, bytes: vec![stamp; 2048] },
                            4 => Op::Zero { disk: disk.clone(), at: own * BLOCK, len: BLOCK },
                            _ => Op::Flush { disk: disk.clone() },
                        };
                        let text = op.text();
                        world.watch.model.lock().log.push(format!("thread {thread}: {text}"));
                        Counts::add(&world.watch.campaign.counts.operations);
                        match world.step_shared(&op) {
                            Ok(Done::Well) => {}
                            _ if world.watch.campaign.stopped() => return,
                            Ok(Done::Failed(why)) => {
                                world.watch.violated(&format!("{text} failed: {why}"));
                            }
                            Err(why) => {
                                world.watch.violated(&why);
                            }
                        }
                    }
                });
            }
        });
        Ok(())
    }

    /// Opens the store again, as it is, at another depth.
    fn restart_as(&mut self, depth: u32) -> Result<(), String> {
        self.store = None;
        let watch = &self.watch;
        let model = watch.model.lock().clone();
        let live = watch.live.fork().map_err(text)?;
        let (campaign, medium, rng) = (watch.campaign.clone(), watch.medium.fork(), watch.rng.lock().fork());
        *self = Self::watched(&campaign, medium, live, model, rng, (depth, true));
        self.open(Survived::Worker)
    }

    fn open(&mut self, what: Survived) -> Result<(), String> {
        let watch = &self.watch;
        // A start that fails serves nobody: nothing is learned from it.
        watch.trap.lock().skip = None;
        let live = watch.live.clone();
        let gone = {
            let model = watch.model.lock();
            let others = model.alternatives.iter().map(Names::kept);
            others.fold(model.names.kept(), |kept, other| &kept & &other)
        };
        let copies = Copies::open(&watch.campaign, &watch.medium, gone);
        // Its own: what another life has in memory says nothing about what is on the medium.
        let memory = BlockCache::new(1 << 20).map_err(text)?;
        let medium = Arc::new(watch.medium.clone());
        let store = Store::open_on(medium, |_| Ok(live), Arc::new(memory), Some(0), copies.clone());
        let store = store.map_err(|e| watch.violated(&format!("the store cannot be opened: {e}")))?;
        // Not under the lock: attaching a disk calls the medium.
        let model = watch.model.lock().clone();
        let what = if watch.unsure.load(Ordering::Acquire) { Survived::Power } else { what };
        let now = model.compare(what, &store).map_err(|e| watch.violated(&e))?;
        let mut model = watch.model.lock();
        model.alternatives.clear();
        model.names = now.names;
        drop(model);
        watch.unsure.store(false, Ordering::Release);
        self.store = Some(store);
        self.copies = Some(copies);
        Ok(())
    }

    fn live_on(&mut self, rng: &mut Rng, steps: u64) -> Result<(), String> {
        for _ in 0..steps {
            let op = any(rng, &self.watch.model.lock().names);
            if rng.chance(8) {
                let mut trap = self.watch.trap.lock();
                trap.skip = Some(rng.below(7));
                trap.errno = *rng.pick(&[libc::EIO, libc::ENOSPC]);
            }
            self.run(op)?;
            if self.watch.campaign.stopped() {
                return Err("stopped".into());
            }
        }
        // What is left after a clean end is clean.
        self.run(Op::Close)?;
        let mut rng = rng.fork();
        cut::check_stopped(&self.watch, &mut rng)
    }

    /// As the kernel does with a request that a dead worker did not answer.
    fn send_again(&mut self, op: Op) -> Result<(), String> {
        let done = {
            let names = &self.watch.model.lock().names;
            let has = |name: &String| names.disks.contains_key(name);
            match &op {
                Op::Create { disks } => disks.iter().any(|(name, ..)| has(name)),
                Op::Rename { from, .. } => !has(from),
                Op::Unlink { disk } => !has(disk),
                Op::AddBase { name, .. } => names.bases.contains_key(name),
                Op::RemoveBase { name } => !names.bases.contains_key(name),
                Op::Pin { base, .. } | Op::Hydrate { base } | Op::Unhydrate { base } => {
                    !names.bases.contains_key(base)
                }
                Op::Evict { base } | Op::Refuse { base } | Op::Accept { base } => {
                    !names.bases.contains_key(base)
                }
                Op::Purge | Op::Detach | Op::Close | Op::WorkerDies | Op::PowerCut => true,
                Op::Write { disk, .. } | Op::Zero { disk, .. } | Op::Grow { disk, .. } => !has(disk),
                Op::Resize { disk, .. } | Op::Flush { disk } | Op::Mode { disk, .. } => !has(disk),
            }
        };
        if done { Ok(()) } else { self.run(op) }
    }

    pub(super) fn store(&self) -> &Store {
        self.store.as_ref().expect("open")
    }

    /// Runs an operation, and brings the model along.
    fn run(&mut self, op: Op) -> Result<(), String> {
        Counts::add(&self.watch.campaign.counts.operations);
        self.watch.model.lock().log.push(op.text());
        *self.watch.running.lock() = Some(op.clone());
        let result = self.step(&op);
        *self.watch.running.lock() = None;
        let sprung = {
            let mut trap = self.watch.trap.lock();
            trap.skip = None;
            trap.sprung.take()
        };
        let result = result.map_err(|e| self.watch.violated(&e))?;
        if let Some(call) = sprung {
            self.watch.model.lock().log.push(format!("  a {call:?} failed: {result:?}"));
        }
        match (result, sprung) {
            (Done::Failed(why), None) => Err(self.watch.violated(&format!("{} failed: {why}", op.text()))),
            // What comes back after a cut is what was there; what was not kept is not promised.
            (Done::Well, Some(_)) if matches!(op, Op::Evict { .. } | Op::Pin { .. } | Op::Hydrate { .. }) => {
                Ok(())
            }
            (Done::Well, Some(call @ (Call::SyncData | Call::SyncDir))) => {
                Err(self.watch.violated(&format!("{}: the error of a {call:?} got lost", op.text())))
            }
            (Done::Failed(_), Some(_)) if op.changes_names() => {
                // Nobody knows which names the medium has, until the store is opened again.
                let power = self.watch.rng.lock().chance(50);
                self.restart(if power { Survived::Power } else { Survived::Worker })
            }
            _ => Ok(()),
        }
    }

    /// The worker or the power goes, and the store is opened again.
    fn restart(&mut self, what: Survived) -> Result<(), String> {
        self.store = None;
        match what {
            Survived::Worker => {
                Counts::add(&self.watch.campaign.counts.workers);
                self.open(what)
            }
            Survived::Power => {
                Counts::add(&self.watch.campaign.counts.cuts);
                let mut rng = self.watch.rng.lock().fork();
                let keep = Keep::any(&mut rng);
                let medium = self.watch.medium.crash(&mut rng, keep);
                let model = self.watch.model.lock().clone();
                let campaign = self.watch.campaign.clone();
                self.watch.release();
                let depth = self.watch.depth;
                *self = Self::watched(&campaign, medium, SimLive::default(), model, rng, (depth, false));
                self.watch.unsure.store(true, Ordering::Release);
                self.open(what)
            }
        }
    }

    fn disk<T>(&self, name: &str, act: impl FnOnce(&Disk) -> T) -> Result<T, String> {
        let node = self.store().disk(name).map_err(text)?;
        let disk = node.attach().map_err(text)?;
        Ok(act(&disk))
    }

    fn model<T>(&self, name: &str, act: impl FnOnce(&mut DiskModel) -> T) -> T {
        act(self.watch.model.lock().names.disk(name))
    }

    /// Does it. An error of this function is a violation; a failed operation is `Done::Failed`.
    fn step(&mut self, op: &Op) -> Result<Done, String> {
        match op {
            Op::Close => self.close(),
            Op::WorkerDies => self.restart(Survived::Worker).map(|()| Done::Well),
            Op::PowerCut => self.restart(Survived::Power).map(|()| Done::Well),
            Op::Purge => {
                for node in self.store().unlinked() {
                    if let Err(e) = self.store().purge(node.id()) {
                        return Ok(Done::Failed(e.to_string()));
                    }
                }
                Ok(Done::Well)
            }
            Op::Detach => Ok(self.detach()),
            Op::Accept { base } => self.accept(base),
            Op::Pin { base, .. } | Op::Hydrate { base } | Op::Unhydrate { base } => {
                self.change_base(op, base)
            }
            Op::Evict { base } | Op::Refuse { base } => self.change_base(op, base),
            other => self.step_shared(other),
        }
    }

    /// Detaches every disk that may be, which flushes it.
    fn detach(&self) -> Done {
        let attached = self.store().attached().into_iter().filter(|node| !node.is_unlinked());
        let before: Vec<_> = attached
            .map(|node| {
                let epoch = node.peek().map_or(0, |disk| disk.delta().error_epoch());
                let mark = self.model(&node.name(), |m| m.mark());
                (node, epoch, mark)
            })
            .collect();
        self.store().detach_idle(Duration::ZERO, Duration::ZERO);
        self.store().tend_maps();
        let mut failed = Vec::new();
        for (node, epoch, mark) in before {
            match node.peek() {
                None => self.model(&node.name(), |m| m.flushed(&mark)),
                Some(_) if epoch != 0 => {}
                Some(disk) => {
                    if disk.delta().error_epoch() != epoch {
                        self.model(&node.name(), DiskModel::doubt);
                    }
                    failed.push(node.name());
                }
            }
        }
        if failed.is_empty() { Done::Well } else { Done::Failed(format!("{failed:?} stay attached")) }
    }

    /// What several threads may do at once.
    fn step_shared(&self, op: &Op) -> Result<Done, String> {
        match op {
            Op::Write { disk, at, bytes } => self.write(disk, *at, bytes.len() as u64, Some(bytes)),
            Op::Zero { disk, at, len } => {
                let size = self.model(disk, |m| m.size());
                let end = (at + len).min(size);
                if *at >= end {
                    return Ok(Done::of(self.disk(disk, |d| d.zero(*at, *len, d.delta().error_epoch()))?));
                }
                // As asked for, which may be more than there is.
                self.model(disk, |m| m.begin_write(*at, end - at, None));
                let done = Done::of(self.disk(disk, |d| d.zero(*at, *len, d.delta().error_epoch()))?);
                self.written(disk, *at, end - at, done)
            }
            Op::Grow { disk, to } => {
                let to = (*to).max(self.model(disk, |m| m.size()));
                self.model(disk, |m| m.begin_size(to));
                let done = Done::of(self.disk(disk, |d| d.grow(to, Grow::Yes))?);
                match &done {
                    Done::Well => self.model(disk, DiskModel::finish_size),
                    Done::Failed(_) => self.with_disk(disk, DiskModel::fail_resize)?,
                }
                Ok(done)
            }
            Op::Resize { disk, to } => {
                self.model(disk, |m| m.begin_size(*to));
                let (epoch, done, after) = self.disk(disk, |d| {
                    let epoch = d.delta().error_epoch();
                    (epoch, Done::of(d.resize(*to)), d.delta().error_epoch())
                })?;
                match &done {
                    Done::Well => self.model(disk, DiskModel::finish_resize),
                    Done::Failed(_) => self.with_disk(disk, DiskModel::fail_resize)?,
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
                    (epoch, Done::of(d.flush(epoch)), d.delta().error_epoch())
                })?;
                if epoch != after {
                    self.model(disk, DiskModel::doubt);
                    if self.disk(disk, |d| d.flush(epoch).is_ok() || d.write(0, b"x", epoch).is_ok())? {
                        return Err(format!("disk {disk}: a handle is good after a sync failed"));
                    }
                }
                if let Done::Well = done {
                    self.model(disk, |m| m.flushed(&mark));
                }
                Ok(done)
            }
            Op::Mode { disk, mode } => {
                self.model(disk, |m| m.begin_mode(*mode));
                let node = self.store().disk(disk).map_err(text)?;
                let done = Done::of(node.update(|record| record.mode = *mode));
                if let Done::Well = done {
                    self.model(disk, DiskModel::finish_mode);
                }
                Ok(done)
            }
            names => Ok(self.change_names(names)),
        }
    }

    fn with_disk(
        &self,
        name: &str,
        act: impl FnOnce(&mut DiskModel, &Disk) -> Result<(), String>,
    ) -> Result<(), String> {
        // A copy, because the disk's calls meet the hook, which wants the model.
        let mut model = DiskModel::clone(&self.watch.model.lock().names.disks[name]);
        self.disk(name, |disk| act(&mut model, disk))??;
        self.model(name, |m| *m = model);
        Ok(())
    }

    fn write(&self, disk: &str, at: u64, len: u64, bytes: Option<&[u8]>) -> Result<Done, String> {
        self.model(disk, |m| m.begin_write(at, len, bytes));
        let bytes = bytes.unwrap_or_default();
        let done = Done::of(self.disk(disk, |d| d.write(at, bytes, d.delta().error_epoch()))?);
        self.written(disk, at, len, done)
    }

    fn written(&self, disk: &str, at: u64, len: u64, done: Done) -> Result<Done, String> {
        match &done {
            Done::Well => self.model(disk, |m| m.finish_write(at, len)),
            Done::Failed(_) => self.with_disk(disk, |m, d| m.fail_write(at, len, d))?,
        }
        Ok(done)
    }

    /// Flushes everything and starts again.
    fn close(&mut self) -> Result<Done, String> {
        let marks: Vec<(String, Mark)> =
            self.watch.model.lock().names.disks.iter().map(|(n, d)| (n.clone(), d.mark())).collect();
        let done =
            Done::of(self.store().close().map_err(text).and_then(|()| self.copies().flush().map_err(text)));
        let mut model = self.watch.model.lock();
        for (name, mark) in marks {
            match &done {
                Done::Well => model.names.disk(&name).flushed(&mark),
                // Which disk's sync failed is not known here.
                Done::Failed(_) => model.names.disk(&name).doubt(),
            }
        }
        drop(model);
        self.store = None;
        self.open(Survived::Worker)?;
        Ok(done)
    }

    fn change_names(&self, op: &Op) -> Done {
        let before = self.watch.model.lock().names.clone();
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
                            .map(|b| (b, self.watch.campaign.bases[before.bases[b].source].bytes.as_slice()));
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
                    })
                    .collect();
                self.watch.model.lock().alternatives = between;
                self.store().create_disks(&wanted).map(drop)
            }
            Op::Rename { from, to } => {
                if let Some(disk) = after.disks.remove(from) {
                    after.disks.insert(to.clone(), disk);
                }
                self.watch.model.lock().alternatives = vec![after.clone()];
                self.store().rename(from, to, Replace::Yes).map(drop)
            }
            Op::Unlink { disk } => {
                after.disks.remove(disk);
                self.watch.model.lock().alternatives = vec![after.clone()];
                self.store().unlink(disk).map(drop)
            }
            Op::AddBase { name, source } => {
                after.bases.insert(name.clone(), BaseModel::of(*source));
                self.watch.model.lock().alternatives = vec![after.clone()];
                let path = self.watch.campaign.bases[*source].path.display().to_string();
                self.store().add_base(name, &path, None).map(drop)
            }
            Op::RemoveBase { name } => {
                let source = before.bases[name].source;
                after.bases.remove(name);
                self.watch.model.lock().alternatives = vec![after.clone()];
                let removed = self.store().remove_base(name);
                if removed.is_ok() && after.bases.values().all(|base| base.source != source) {
                    self.copies().put_back(source);
                    // What of it fails leaves copies that nothing reads.
                    let trap = std::mem::take(&mut *self.watch.trap.lock());
                    self.copies().forget(source);
                    *self.watch.trap.lock() = trap;
                }
                removed
            }
            other => unreachable!("{other:?} changes no names"),
        };
        if matches!(&result, Err(StoreError::InUse { .. })) && !self.store().unlinked().is_empty() {
            // A disk without a name needs it until it is purged.
            self.watch.model.lock().alternatives.clear();
            return Done::Well;
        }
        let done = Done::of(result);
        if let Done::Well = done {
            let mut model = self.watch.model.lock();
            model.names = after;
            model.alternatives.clear();
        }
        done
    }
}

impl Op {
    /// Whether a failed one leaves it open which names there are.
    fn changes_names(&self) -> bool {
        matches!(
            self,
            Self::Create { .. }
                | Self::Rename { .. }
                | Self::Unlink { .. }
                | Self::AddBase { .. }
                | Self::RemoveBase { .. }
                | Self::Mode { .. }
                | Self::Purge
                | Self::Pin { .. }
                | Self::Hydrate { .. }
                | Self::Unhydrate { .. }
                | Self::Refuse { .. }
                | Self::Accept { .. }
        )
    }
}

/// How an operation ended.
#[derive(Debug)]
pub(super) enum Done {
    Well,
    Failed(String),
}

impl Done {
    pub(super) fn of<T, E: std::fmt::Display>(result: Result<T, E>) -> Self {
        match result {
            Ok(_) => Self::Well,
            Err(e) => Self::Failed(e.to_string()),
        }
    }
}
