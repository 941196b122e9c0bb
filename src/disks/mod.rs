//! Long operations on disks in the background: `flatten`, `rebase` and `compact`.
//!
//! What must hold:
//! - The disk is served as always, and shows the same bytes, before, during and after (D94).
//! - The record of the disk says what is under way, so the next worker goes on (D95). A job that fails or is cancelled drops
//!   what it has copied.
//! - A job leaves space to the guests: it waits while less than a tenth of the filesystem is free.
//! - A job waits for what may heal: a base that cannot be opened, a drive that fails, a key that is not here. It keeps what
//!   it has copied; its state says what it waits for, and an operator may cancel it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::disk::DiskError;
use crate::io::priority;
use crate::jobs::{Job, Paced, Progress, Start, State, Stopped, Table, What};
use crate::store::pools::DEFAULT_POOL;
use crate::store::{Change, DiskNode, Making, Store, StoreError};

/// A part of the filesystem's bytes that a job leaves free: one of so many.
const FREE_PART: u64 = 10;
/// Bytes and time between two flushes of a layer that is being made.
const FLUSH_BYTES: u64 = 256 << 20;
const FLUSH_EVERY: Duration = Duration::from_secs(10);
/// The pause before a job looks again for space.
const SPACE_PAUSE: Duration = Duration::from_secs(2);
/// Layers that a merge makes one before it begins by itself, and its most bytes per second.
const MERGED_FROM: usize = 32;
const MERGE_RATE: u64 = 128 << 20;
/// The longest pause before a job tries again what failed.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// What cancels a job, as the job reports it.
const CANCELLED: &str = "an operator cancelled it";
const STOPPING: &str = "the daemon stops; the next one goes on";

/// A job and its disk.
#[derive(Clone, Debug)]
pub struct DiskJob {
    /// Name of the disk.
    pub disk: String,
    /// Its progress.
    pub progress: Progress,
}

/// Why a part of the work did not end well.
enum Broken {
    /// The job ends.
    Stopped(Stopped),
    /// It may work later.
    Waits(String),
}

impl From<Stopped> for Broken {
    fn from(stopped: Stopped) -> Self {
        Self::Stopped(stopped)
    }
}

impl From<StoreError> for Broken {
    fn from(error: StoreError) -> Self {
        match error {
            // What it was to copy, or the base that it was for, is not there any more.
            StoreError::Invalid { .. } => Self::Stopped(Stopped::Failed(error.to_string())),
            _ => Self::Waits(error.to_string()),
        }
    }
}

impl DiskJob {
    /// Its identifier: its kind and its disk, such as `flatten-vm1`.
    pub fn id(&self) -> String {
        id(self.progress.what, &self.disk)
    }
}

fn id(what: What, disk: &str) -> String {
    format!("{}-{disk}", what.name())
}

fn no_job(id: &str) -> StoreError {
    StoreError::NotFound { object: format!("job {id}"), noun: "job" }
}

fn what_of(name: &str) -> Option<What> {
    What::ON_DISKS.into_iter().find(|what| what.name() == name)
}

/// See the module. Clones share one state.
#[derive(Clone)]
pub struct DiskJobs {
    store: Arc<Store>,
    jobs: Arc<Mutex<Table>>,
}

impl DiskJobs {
    /// Without any job yet.
    pub fn new(store: Arc<Store>) -> Self {
        Self { store, jobs: Arc::default() }
    }

    /// Goes on with what an earlier worker began. Does not wait.
    pub fn resume(&self) {
        for node in self.store.reworked() {
            if let Err(error) = self.start(&node, true) {
                tracing::error!(%error, disk = node.name(), "a change of a disk does not go on; begin it again");
            }
        }
    }

    /// Begins a change of a disk, at most `rate` bytes per second (0: without a limit). One that is under way takes the new
    /// limit. `None`: there is nothing to do.
    ///
    /// # Errors
    /// As [`Store::begin_rework`]; when no thread can be started.
    pub fn begin(&self, disk: &str, change: &Change, rate: u64) -> Result<Option<DiskJob>, StoreError> {
        if !self.store.begin_rework(disk, change, rate)? {
            return Ok(None);
        }
        let node = self.store.disk(disk)?;
        self.start(&node, false)?;
        let job = self.jobs.lock().last(node.id()).cloned();
        if let Some(job) = job.as_ref().filter(|job| job.rate().unwrap_or(0) != rate) {
            job.set_rate(rate);
        }
        Ok(job.map(|job| DiskJob { disk: disk.to_owned(), progress: job.progress() }))
    }

    /// Merges layers of a disk that has many of them: each snapshot that comes and goes leaves one, and the record of the disk
    /// has to hold them all. Does not wait for the merge.
    pub fn tend(&self, disk: &str) {
        let Ok(node) = self.store.disk(disk) else { return };
        if node.rework().is_some() || self.store.layers_to_merge(&node) < MERGED_FROM {
            return;
        }
        if let Err(error) = self.begin(disk, &Change::Compact, MERGE_RATE) {
            tracing::warn!(%error, "the layers of a disk are not merged; `plyfs disk compact` does it");
        }
    }

    /// All jobs of this worker: of each disk the last one of each kind, in the order in which they began.
    pub fn jobs(&self) -> Vec<DiskJob> {
        let numbers = self.jobs.lock().numbers();
        let named = numbers.into_iter().filter_map(|number| self.store.disk_by_id(number));
        let disks: Vec<_> = named.filter(|node| !node.is_unlinked()).collect();
        let table = self.jobs.lock();
        let of = |node: &Arc<DiskNode>| {
            What::ON_DISKS.map(|what| {
                let progress = table.of(node.id(), what)?.progress();
                Some(DiskJob { disk: node.name(), progress })
            })
        };
        let mut jobs: Vec<_> = disks.iter().flat_map(of).flatten().collect();
        jobs.sort_by_key(|job| job.progress.began);
        jobs
    }

    /// Identifier of the job that is under way on a disk.
    pub fn running(&self, node: &DiskNode) -> Option<String> {
        let job = self.jobs.lock().running(node.id()).cloned();
        job.map(|job| id(job.what(), &node.name()))
    }

    /// Whether an identifier is that of a job on a disk, whether there is one or not.
    pub fn is_of_disk(id: &str) -> bool {
        id.split_once('-').is_some_and(|(kind, _)| what_of(kind).is_some())
    }

    fn find(&self, id: &str) -> Result<(Arc<DiskNode>, Arc<Job>), StoreError> {
        let (kind, disk) = id.split_once('-').ok_or_else(|| no_job(id))?;
        let what = what_of(kind).ok_or_else(|| no_job(id))?;
        let node = self.store.disk(disk).map_err(|error| match error {
            StoreError::NotFound { .. } => no_job(id),
            error => error,
        })?;
        let job = self.jobs.lock().of(node.id(), what).cloned().ok_or_else(|| no_job(id))?;
        Ok((node, job))
    }

    /// The job of this identifier.
    ///
    /// # Errors
    /// `NotFound`.
    pub fn job(&self, id: &str) -> Result<DiskJob, StoreError> {
        let (node, job) = self.find(id)?;
        Ok(DiskJob { disk: node.name(), progress: job.progress() })
    }

    /// Cancels a job, and waits for its end: what it has copied is dropped. A job that has ended is not changed.
    ///
    /// # Errors
    /// `NotFound`; errors of the storage.
    pub fn cancel(&self, id: &str) -> Result<DiskJob, StoreError> {
        let (_, job) = self.find(id)?;
        job.cancel(CANCELLED);
        job.join();
        self.job(id)
    }

    /// Starts the job of the layer that is being made for a disk, unless it runs.
    fn start(&self, node: &Arc<DiskNode>, resumed: bool) -> Result<(), StoreError> {
        let mut jobs = self.jobs.lock();
        while let Some(running) = jobs.running(node.id()).cloned() {
            if !running.is_cancelled() {
                return Ok(());
            }
            drop(jobs);
            running.join();
            jobs = self.jobs.lock();
        }
        let Some(rework) = node.rework() else { return Ok(()) };
        let what = what_of(Change::of(&rework.purpose)).unwrap_or(What::Compact);
        let start = Start { rate: Some(rework.rate).filter(|rate| *rate > 0), resumed, repeats: false };
        let job = Job::new(what, rework.done, rework.layer.size, start);
        let (this, node_, job_) = (self.clone(), node.clone(), job.clone());
        let run = move || {
            priority::background();
            let work = std::panic::AssertUnwindSafe(|| this.work(&node_, &job_));
            let result = std::panic::catch_unwind(work).unwrap_or_else(|_| {
                Err(Stopped::Failed("a bug of plyfs ended it; report it with the log".into()))
            });
            let result = result.map(|()| None);
            tell(&node_, what, &result);
            job_.end(&result);
        };
        let thread = std::thread::Builder::new().name("disk-job".into()).stack_size(512 << 10).spawn(run);
        let object = format!("disk {}", node.name());
        thread.map_err(|source| StoreError::Io { object, operation: "starting a thread", source })?;
        jobs.insert(node.id(), job);
        Ok(())
    }

    /// Whether the next worker goes on with what this one leaves.
    fn is_left(&self, node: &DiskNode) -> bool {
        self.store.is_closing() || node.is_unlinked()
    }

    fn work(&self, node: &Arc<DiskNode>, job: &Arc<Job>) -> Result<(), Stopped> {
        let pool = self.store.rework_pool(node).filter(|_| job.what() == What::Move).map(|(pool, _)| pool);
        let (mut pause, mut said) = (SPACE_PAUSE, String::new());
        let mut is_made = false;
        let failed = loop {
            let done = match is_made {
                false => self.make(node, job).map(|()| true),
                true => self.next_layer(node, job, pool.as_deref()),
            };
            match done {
                Ok(false) => return Ok(()),
                Ok(true) => {
                    (is_made, pause) = (!is_made, SPACE_PAUSE);
                    continue;
                }
                Err(Broken::Stopped(stopped)) => break stopped,
                Err(Broken::Waits(_)) if self.is_left(node) => break Stopped::Cancelled(STOPPING),
                Err(Broken::Waits(why)) => {
                    if why != said {
                        tracing::warn!(
                            disk = node.name(),
                            why,
                            "the work on a disk waits, and is tried again"
                        );
                    }
                    job.note_waiting(node.rework().map_or(0, |rework| rework.done), why.clone());
                    said = why;
                    if let Err(stopped) = job.pause(pause) {
                        break stopped;
                    }
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        };
        if self.store.is_closing() {
            return Err(Stopped::Cancelled(STOPPING));
        }
        if node.is_unlinked() {
            return Err(Stopped::Cancelled("the disk was removed"));
        }
        match self.store.drop_rework(node) {
            Ok(()) => Err(failed),
            Err(error) => {
                let why = format!(
                    "what it has copied cannot be dropped, and the next start goes on with it: {error}"
                );
                Err(Stopped::Failed(why))
            }
        }
    }

    fn make(&self, node: &Arc<DiskNode>, job: &Arc<Job>) -> Result<(), Broken> {
        let making = self.store.open_rework(node)?;
        let mut at = node.rework().map_or(0, |rework| rework.done);
        let (mut since, mut asked) = (Instant::now(), 0);
        let (mut flushed, mut unflushed) = (Instant::now(), 0);
        while at < making.size() {
            self.go_on(node, job)?;
            self.wait_for_space(node, job, at)?;
            match making.step(at) {
                Ok(step) => {
                    unflushed += step.read;
                    asked += step.read;
                    at = step.next;
                    job.note(State::Copying, at);
                }
                Err(error) => {
                    self.wait(node, job, at, &error)?;
                    continue;
                }
            }
            if unflushed >= FLUSH_BYTES || flushed.elapsed() >= FLUSH_EVERY {
                self.keep(node, job, &making, at)?;
                (flushed, unflushed) = (Instant::now(), 0);
            }
            if job.pace(asked, since)? == Paced::Changed {
                (since, asked) = (Instant::now(), 0);
            }
        }
        self.go_on(node, job)?;
        if self.store.finish_rework(node, making)? {
            return Ok(());
        }
        Err(Stopped::Cancelled("the layers that it copied are gone, by a rollback; begin it again").into())
    }

    /// Begins the next layer of a move to a pool. False when all is there.
    fn next_layer(&self, node: &DiskNode, job: &Job, pool: Option<&str>) -> Result<bool, Broken> {
        let Some(pool) = pool else { return Ok(false) };
        self.go_on(node, job)?;
        let change = Change::Move(pool.to_owned());
        Ok(self.store.begin_rework(&node.name(), &change, job.rate().unwrap_or(0))?)
    }

    fn go_on(&self, node: &DiskNode, job: &Job) -> Result<(), Stopped> {
        job.check()?;
        if self.store.is_closing() {
            return Err(Stopped::Cancelled(STOPPING));
        }
        if node.is_unlinked() {
            return Err(Stopped::Cancelled("the disk was removed"));
        }
        Ok(())
    }

    /// Makes what was copied durable, and notes it.
    fn keep(&self, node: &DiskNode, job: &Arc<Job>, making: &Making, at: u64) -> Result<(), Broken> {
        let rate = job.rate().unwrap_or(0);
        while let Err(error) = making.flush() {
            // A full store heals; the layer keeps what it has.
            self.wait(node, job, at, &error)?;
        }
        Ok(node.note_rework(at, rate)?)
    }

    fn wait_for_space(&self, node: &DiskNode, job: &Job, at: u64) -> Result<(), Stopped> {
        loop {
            let Some((pool, space)) = self.store.rework_pool(node) else { return Ok(()) };
            if space.free >= space.total / FREE_PART {
                return Ok(());
            }
            let place = if pool == DEFAULT_POOL { "the store".to_owned() } else { format!("pool {pool}") };
            let why = format!("less than a tenth of {place}'s filesystem is free; free some space");
            job.note_waiting(at, why);
            job.pause(SPACE_PAUSE)?;
            self.go_on(node, job)?;
        }
    }

    /// Waits for what a part of the work lacks.
    fn wait(&self, node: &DiskNode, job: &Arc<Job>, at: u64, error: &DiskError) -> Result<(), Broken> {
        if let Some(completion) = error.completion() {
            let waits = || {
                let why = "bytes of the base are not here yet; see `plyfs base ls`";
                job.note_waiting(at, why.into());
            };
            return Ok(job.wait(completion, waits)?);
        }
        if error.errno() == libc::ENOSPC {
            job.note_waiting(at, error.to_string());
            job.pause(SPACE_PAUSE)?;
            return Ok(self.go_on(node, job)?);
        }
        Err(Broken::Waits(error.to_string()))
    }
}

fn tell(node: &DiskNode, what: What, result: &Result<Option<bool>, Stopped>) {
    let disk = node.name();
    match result {
        Ok(_) => tracing::info!(disk, ?what, "the work on a disk is done"),
        Err(Stopped::Cancelled(by)) => tracing::info!(disk, ?what, by, "the work on a disk was cancelled"),
        Err(Stopped::Failed(why)) => {
            tracing::error!(disk, ?what, why, "the work on a disk failed; the disk is as before");
        }
    }
}
