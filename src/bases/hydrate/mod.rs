//! Work on a whole base in the background: fetching all of it into the store, and comparing it with its digest.
//!
//! What must hold:
//! - A reader comes first: nothing is asked for while a reader's request is under way.
//! - It can end at any moment, and ends at once when it is cancelled (`job`). What is to be hydrated is in the base's
//!   record, what is here is in the cache; the next worker goes on with what is missing.
//! - Contents that differ from their digest are dropped as a whole, in memory too, and fetched once more from the base's
//!   own source. When that does not have the digest either, the base is refused: no client is given a byte of it until
//!   `base verify` finds the right bytes.

mod compare;
mod fetch;
mod job;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

pub use self::job::{Progress, State, What};

use self::compare::Verdict;
use self::job::{Job, Stopped};
use super::sources::HostSources;
use crate::events::{Event, Events, Kind};
use crate::fetch::kept::{EvictReason, Reach, SharedCopies};
use crate::format::record::ImageFile;
use crate::store::{BaseNode, Store, StoreError};

/// How often it is fetched when what was kept turns out to be damaged.
const TRIES: u32 = 3;
/// How often contents that differ from their digest are fetched.
const FETCHES: u32 = 2;
/// How often is looked whether it is known what is here.
const INDEXING: std::time::Duration = std::time::Duration::from_millis(20);

/// All work in the background. Clones are the same one.
#[derive(Clone)]
pub struct Hydrations {
    store: Arc<Store>,
    sources: Arc<HostSources>,
    events: Events,
    /// Bytes per second, unless another is given.
    rate: Option<u64>,
    jobs: Arc<Mutex<HashMap<u64, Arc<Job>>>>,
}

impl Hydrations {
    /// None yet; `rate` is the most bytes per second unless another is given.
    pub fn new(store: Arc<Store>, sources: Arc<HostSources>, events: Events, rate: Option<u64>) -> Self {
        Self { store, sources, events, rate, jobs: Arc::default() }
    }

    /// Goes on with what an earlier worker began, once it is known what is here. Does not wait.
    pub fn resume(&self) {
        let wanted = |node: &Arc<BaseNode>| node.options().hydrate && !node.options().refused;
        let bases: Vec<_> = self.store.bases().into_iter().filter(wanted).collect();
        if bases.is_empty() {
            return;
        }
        let this = self.clone();
        let run = move || {
            while !this.sources.cache().stats().indexed {
                std::thread::sleep(INDEXING);
            }
            this.resume_those(&bases);
        };
        if let Err(error) = std::thread::Builder::new().name("resume".into()).stack_size(512 << 10).spawn(run)
        {
            tracing::error!(%error, "no thread to go on hydrating with");
        }
    }

    fn resume_those(&self, bases: &[Arc<BaseNode>]) {
        for node in bases {
            let record = node.record();
            let done = |file: &ImageFile| {
                let contents = self.sources.contents(record, file);
                contents.is_complete(Reach::Proven)
                    && (file.identity.digest.is_none() || contents.is_verified())
            };
            let options = node.options();
            if options.hydrate
                && !options.refused
                && !record.files().all(done)
                && let Err(error) = self.begin(node, What::Hydrate, self.rate)
            {
                tracing::error!(%error, base = record.name, "it is not hydrated");
            }
        }
    }

    /// How the last work on a base went, or goes.
    pub fn progress(&self, base: u64) -> Option<Progress> {
        self.jobs.lock().get(&base).map(|job| job.progress())
    }

    /// Begins to fetch all of a base; `rate` is the most bytes per second. One that is being fetched goes on as it is.
    ///
    /// # Errors
    /// When that cannot be noted in its record, or there is no thread.
    pub fn hydrate(&self, node: &Arc<BaseNode>, rate: Option<u64>) -> Result<(), StoreError> {
        self.fits(node)?;
        node.attach()?;
        node.set_options(|options| options.hydrate = true)?;
        // Who attaches it from now on reads the copy, as far as there is one.
        node.detach();
        node.record().files().for_each(|file| self.sources.contents(node.record(), file).pin(true));
        self.begin(node, What::Hydrate, rate.or(self.rate))
    }

    fn fits(&self, node: &BaseNode) -> Result<(), StoreError> {
        let total: u64 = node.record().files().map(|file| file.identity.size).sum();
        let limit = self.sources.cache().stats().limit_bytes;
        if total <= limit {
            return Ok(());
        }
        let why = format!(
            "it has {total} bytes, and the cache on disk has room for {limit}; start the daemon with a larger \
             --cache-disk"
        );
        Err(StoreError::Invalid { object: format!("base {}", node.record().name), why })
    }

    /// Begins to compare what is here of a base with its digest. One that is refused is fetched for that.
    ///
    /// # Errors
    /// When it is being hydrated, or there is no thread.
    pub fn verify(&self, node: &Arc<BaseNode>) -> Result<(), StoreError> {
        if node.options().refused && node.record().files().any(|file| !file.is_local()) {
            self.fits(node)?;
        }
        if let Some(progress) = self.progress(node.id())
            && progress.what == What::Hydrate
            && !progress.has_ended()
        {
            let why = "it is being hydrated, which compares it at the end; see `plyfs base show`, or take it back \
                       with `plyfs base evict`";
            return Err(StoreError::invalid(format!("base {}", node.record().name), why));
        }
        self.begin(node, What::Verify, None)
    }

    /// Ends the work on a base, if there is any, and waits for its end.
    pub fn cancel(&self, base: u64, by: &'static str) {
        let job = self.jobs.lock().get(&base).cloned();
        if let Some(job) = job {
            job.cancel(by);
            job.join();
        }
    }

    /// The base is gone.
    pub fn forget(&self, base: u64) {
        self.cancel(base, "the base was removed");
        self.jobs.lock().remove(&base);
    }

    fn begin(&self, node: &Arc<BaseNode>, what: What, rate: Option<u64>) -> Result<(), StoreError> {
        let mut jobs = self.jobs.lock();
        if jobs.get(&node.id()).is_some_and(|job| !job.has_ended()) {
            return Ok(());
        }
        let record = node.record();
        let total = record.files().map(|file| file.identity.size).sum();
        let here = |file| self.sources.contents(record, file).cached_bytes(Reach::Any);
        let first = match what {
            What::Hydrate => record.files().map(here).sum(),
            What::Verify => 0,
        };
        let job = Job::new(what, first, total);
        let (this, node_, job_) = (self.clone(), node.clone(), job.clone());
        let run = move || {
            let work = std::panic::AssertUnwindSafe(|| this.work(&node_, &job_, what, rate));
            let result = std::panic::catch_unwind(work)
                .unwrap_or_else(|_| Err(Stopped::Failed("a bug of plyfs ended it; see the log".into())));
            this.tell(&node_, what, &result);
            job_.end(&result);
        };
        let thread = std::thread::Builder::new().name("hydrate".into()).stack_size(512 << 10).spawn(run);
        let object = format!("base {}", record.name);
        thread.map_err(|source| StoreError::Io { object, operation: "starting a thread", source })?;
        jobs.insert(node.id(), job);
        Ok(())
    }

    fn tell(&self, node: &BaseNode, what: What, result: &Result<Option<bool>, Stopped>) {
        let name = &node.record().name;
        match result {
            Ok(matches) => {
                tracing::info!(base = name, ?what, ?matches, "all of a base is here");
                if what == What::Hydrate {
                    self.events.emit(Event::of_base(Kind::BaseHydrated, name).bytes(node.record().size()));
                }
            }
            Err(Stopped::Cancelled(by)) => {
                tracing::info!(base = name, ?what, by, "work on a base was cancelled")
            }
            Err(Stopped::Failed(why)) => {
                tracing::error!(base = name, ?what, why, "work on a base ended");
                self.events.emit(Event::of_base(Kind::BaseError, name).because(why.clone()));
            }
        }
    }

    /// Whether it is the right one to go on with.
    fn go_on(&self, node: &BaseNode) -> Result<(), Stopped> {
        match self.store.base_by_id(node.id()) {
            Some(_) => Ok(()),
            None => Err(Stopped::Cancelled("the base was removed")),
        }
    }

    fn work(
        &self,
        node: &Arc<BaseNode>,
        job: &Arc<Job>,
        what: What,
        rate: Option<u64>,
    ) -> Result<Option<bool>, Stopped> {
        // A refused base has nothing here; whether its source has the right bytes by now takes them all.
        let mut fetches = what == What::Hydrate || node.options().refused;
        let (mut damaged, mut differed) = (0, 0);
        loop {
            if fetches {
                self.fetch_all(node, job, rate)?;
            }
            let verdict = self.compare(node, job)?;
            match verdict {
                Verdict::Matches | Verdict::Sound => {
                    if what == What::Hydrate {
                        self.keep()?;
                    }
                    self.accept(node);
                    return Ok((verdict == Verdict::Matches).then_some(true));
                }
                Verdict::Incomplete if !fetches => return Ok(None),
                Verdict::Incomplete => {
                    damaged += 1;
                    if damaged == TRIES {
                        let why = "not all of it is here and sound; check the disk of the store";
                        return Err(Stopped::Failed(why.into()));
                    }
                }
                Verdict::Differs => {
                    differed += u32::from(self.drop_differing(node));
                    if differed == FETCHES {
                        return Err(self.refuse(node, job));
                    }
                    // Whether it was its own source's fault shows when it is fetched once more.
                    fetches = true;
                }
            }
        }
    }

    /// Makes what was fetched durable: its operator may remove the original as soon as it is said to be here.
    fn keep(&self) -> Result<(), Stopped> {
        self.sources.cache().flush().map_err(|error| {
            Stopped::Failed(format!(
                "all of it was fetched, and what of it would survive a power cut is not known: {error}; put the disk of \
                 the store right and run `plyfs base hydrate` again"
            ))
        })
    }

    /// Drops what does not have its digest. Returns whether the base's own source had a part in it.
    fn drop_differing(&self, node: &BaseNode) -> bool {
        let (record, image) = (node.record(), &node.record().image);
        let contents = self.sources.contents(record, image);
        let unproven = contents.drop_unproven();
        if unproven > 0 {
            tracing::warn!(
                base = record.name,
                unproven,
                "what an earlier version kept under the digest does not have it"
            );
            return false;
        }
        let own = contents.has_own();
        // With nothing of its own it is the verified contents that went bad, for every base that has them.
        let bytes =
            contents.evict(EvictReason::Changed, if own { SharedCopies::Keep } else { SharedCopies::Drop });
        self.sources.forget_in_transit(node.id());
        node.purge();
        let why = "what was fetched does not have the digest that it was registered with; it is dropped";
        tracing::warn!(base = record.name, bytes, why, "contents of a base");
        self.events.emit(Event::of_base(Kind::BaseChanged, &record.name).because(why));
        own
    }

    fn refuse(&self, node: &BaseNode, job: &Job) -> Stopped {
        if let Err(error) = node.refuse() {
            tracing::error!(%error, "a base without its digest is refused until the next start only");
        }
        job.note_digest(Some(false));
        Stopped::Failed(
            "it does not have the digest that it was registered with, and was fetched twice; check the digest and the \
             server, then run `plyfs base verify`"
                .into(),
        )
    }

    /// A base that was refused has the right bytes.
    fn accept(&self, node: &BaseNode) {
        if !node.options().refused {
            return;
        }
        match node.accept() {
            Ok(()) => tracing::info!(base = node.record().name, "a base that was refused has its digest"),
            Err(error) => tracing::error!(%error, "a base that has its digest stays refused"),
        }
    }

    fn fetch_all(&self, node: &Arc<BaseNode>, job: &Arc<Job>, rate: Option<u64>) -> Result<(), Stopped> {
        let record = node.current();
        let degraded = || self.sources.cache().stats().degraded;
        let mut before = 0;
        for file in record.files().filter(|file| record.keeps(file)) {
            let contents = self.sources.contents(&record, file);
            if !contents.is_complete(Reach::Any) {
                let source = self.sources.fetched(&record, file).map_err(|e| e.to_string())?;
                let here = fetch::Kept { contents: &contents, degraded: &degraded };
                fetch::all(job, &*source, &here, (before, rate), &|| self.go_on(node))?;
            }
            before += contents.size();
        }
        job.note(State::Fetching, before);
        Ok(())
    }

    /// Reads everything that is here, and compares it with the digest when all of it is.
    fn compare(&self, node: &Arc<BaseNode>, job: &Job) -> Result<Verdict, Stopped> {
        let record = node.record();
        let mut verdict = Verdict::Sound;
        let mut before = 0;
        for file in record.files() {
            let note = |bytes| {
                job.note(State::Verifying, before + bytes);
                job.check()?;
                self.go_on(node)
            };
            let digest = file.identity.digest.as_ref();
            let found = match node.options().hydrate || !file.is_local() {
                true => compare::kept(&self.sources.contents(record, file), digest, &note)?,
                false => self.compare_file(file, &note)?,
            };
            verdict = match (found, verdict) {
                (Verdict::Sound, before) => before,
                (found, Verdict::Sound | Verdict::Matches) => found,
                (_, before) => before,
            };
            before += file.identity.size;
        }
        Ok(verdict)
    }

    fn compare_file(
        &self,
        file: &ImageFile,
        note: &dyn Fn(u64) -> Result<(), Stopped>,
    ) -> Result<Verdict, Stopped> {
        let source = self.sources.original_of(file).map_err(|e| e.to_string())?;
        match compare::file(&source, file.identity.digest.as_ref(), note)? {
            Verdict::Differs => Err(Stopped::Failed(format!(
                "{} does not have its digest; put the original file back",
                file.source
            ))),
            verdict => Ok(verdict),
        }
    }
}

impl Progress {
    /// Whether the work has ended.
    pub fn has_ended(&self) -> bool {
        matches!(self.state, State::Done | State::Failed | State::Cancelled)
    }
}
