//! Background work on a whole base: fetching all of it into the store, and comparing it with its digest.
//!
//! What must hold:
//! - A reader comes first: this work starts no request while a reader's request is under way.
//! - The work can end at any moment, and ends at once when it is cancelled (`job`). The base's record says that it is
//!   to be hydrated, and the cache has what is done; the next worker continues (D73).
//! - A job is known by its kind and its base, so a hydration that the next worker continues is the same job (`table`).
//! - Contents that differ from their digest are dropped as a whole, also in memory, and fetched once more from the
//!   base's own source. When these differ too, the base is refused: no client gets a byte of it until `base verify`
//!   finds the right contents.
//! - Contents that one of two digests of a base names are never dropped for the other one: they may be right, and the last
//!   copy of another base.

mod compare;
mod fetch;
#[cfg(test)]
mod tests;
mod whole;

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

pub use crate::jobs::{Progress, State, What};

use self::compare::{Digests, Verdict};
use super::copies::dropping;
use super::sources::HostSources;
use crate::events::{Event, Events, Kind};
use crate::fetch::kept::{Contents, EvictReason, Reach, SharedCopies};
use crate::format::record::ImageFile;
use crate::io::priority;
use crate::jobs::{Job, Start, Stopped, Table};
use crate::source::ProofFile;
use crate::store::{BaseNode, Store, StoreError};

/// Attempts to fetch a base whose cached blocks are damaged.
const TRIES: u32 = 3;
/// Attempts to fetch a base whose contents differ from its digest.
const FETCHES: u32 = 2;
/// Pause between two checks whether the cache has indexed its contents.
const INDEXING: std::time::Duration = std::time::Duration::from_millis(20);

/// Why a verification ends when a hydration of its base begins.
const SUPERSEDED: &str = "a hydration of the base began, which compares it at its end";

/// Why a base is refused.
const DIFFERED: &str = "it was fetched twice and differs from the digest that it was registered with; check the digest \
                        and the server, then run `plyfs base verify`";
const CONTRADICTS: &str = "it has the BLAKE3 hash that it was registered with, and not the SHA-256 or SHA-512 digest, so \
                           one of the two is of another image; add it as a new base with the right ones";

/// All background work. Clones share one state.
#[derive(Clone)]
pub struct Hydrations {
    store: Arc<Store>,
    sources: Arc<HostSources>,
    events: Events,
    /// Default limit in bytes per second.
    rate: Option<u64>,
    jobs: Arc<Mutex<Table>>,
    /// When this worker opened the store.
    since: SystemTime,
}

impl Hydrations {
    /// Without any work yet. `rate` is the default limit in bytes per second.
    pub fn new(store: Arc<Store>, sources: Arc<HostSources>, events: Events, rate: Option<u64>) -> Self {
        Self { store, sources, events, rate, jobs: Arc::default(), since: SystemTime::now() }
    }

    /// Continues hydrations of an earlier worker, once the cache has indexed its contents. Does not wait.
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
            tracing::error!(
                %error,
                "no thread can be started, so hydrations do not continue; run: plyfs base hydrate NAME"
            );
        }
    }

    fn resume_those(&self, bases: &[Arc<BaseNode>]) {
        for node in bases {
            let options = node.options();
            if !options.hydrate || options.refused || self.is_hydrated(node) {
                continue;
            }
            let start = Start { rate: self.rate, resumed: true, repeats: false };
            if let Err(error) = self.begin(node, What::Hydrate, start) {
                tracing::error!(%error, base = node.record().name, "a base is not hydrated");
            } else if !node.options().hydrate {
                // It was cancelled or evicted after the check above.
                self.cancel(node.id(), "the hydration was cancelled");
            }
        }
    }

    /// Whether all of a base is cached, and compared with its digest.
    fn is_hydrated(&self, node: &BaseNode) -> bool {
        let record = node.record();
        record.files().all(|file| {
            let contents = self.sources.contents(record, file);
            let has_digest = file.identity.digest.is_some() || file.proof.is_some();
            contents.is_complete(Reach::Proven) && (!has_digest || contents.is_verified())
        })
    }

    /// Progress of the last work on a base.
    pub fn progress(&self, base: u64) -> Option<Progress> {
        self.jobs.lock().last(base).map(|job| job.progress())
    }

    /// Progress of the last job of this kind on a base. A hydration that this worker is to continue counts, too.
    pub fn progress_of(&self, node: &BaseNode, what: What) -> Option<Progress> {
        let job = self.jobs.lock().of(node.id(), what).cloned();
        match job {
            Some(job) => Some(job.progress()),
            None if what == What::Hydrate => self.to_be_resumed(node),
            None => None,
        }
    }

    /// A hydration of an earlier worker that waits until the cache has indexed its contents.
    fn to_be_resumed(&self, node: &BaseNode) -> Option<Progress> {
        let (record, options) = (node.record(), node.options());
        if !options.hydrate || options.refused || self.sources.cache().stats().indexed {
            return None;
        }
        let contents = || record.files().map(|file| self.sources.contents(record, file));
        if contents().all(|contents| contents.is_complete_now(Reach::Proven) == Some(true)) {
            return None;
        }
        Some(Progress {
            what: What::Hydrate,
            state: State::Waiting,
            bytes: contents().map(|contents| contents.cached_bytes(Reach::Any)).sum(),
            total: record.files().map(|file| file.identity.size).sum(),
            rate: 0,
            digest_matches: None,
            error: Some("this worker first finds out which blocks the store has".into()),
            began: self.since,
            ended: None,
            resumed: true,
        })
    }

    /// Begins to fetch all of a base, at most `rate` bytes per second. A fetch under way takes a new rate. A
    /// verification under way ends: the hydration compares the base, too.
    ///
    /// # Errors
    /// When the cache is too small, its record cannot be written, or no thread can be started.
    pub fn hydrate(&self, node: &Arc<BaseNode>, rate: Option<u64>) -> Result<(), StoreError> {
        self.fits(node)?;
        node.attach()?;
        let was_wanted = node.options().hydrate;
        let repeats = was_wanted && self.is_hydrated(node);
        let resumed = was_wanted && !repeats && self.jobs.lock().of(node.id(), What::Hydrate).is_none();
        node.set_options(|options| options.hydrate = true)?;
        // From now on, disks that attach it read the copy, as far as there is one.
        node.detach();
        node.record().files().for_each(|file| self.sources.contents(node.record(), file).pin(true));
        self.begin(node, What::Hydrate, Start { rate: rate.or(self.rate), resumed, repeats })?;
        if let (Some(rate), Some(job)) = (rate, self.jobs.lock().running(node.id())) {
            job.set_rate(rate);
        }
        Ok(())
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

    /// Begins to compare the cached contents of a base with its digest. A refused base is fetched for that.
    ///
    /// # Errors
    /// When it is being hydrated, or no thread can be started.
    pub fn verify(&self, node: &Arc<BaseNode>) -> Result<(), StoreError> {
        if node.options().refused && node.record().files().any(|file| !file.is_local()) {
            self.fits(node)?;
        }
        self.begin(node, What::Verify, Start::default())
    }

    /// Cancels the work on a base, if there is any, and waits for its end.
    pub fn cancel(&self, base: u64, by: &'static str) {
        let job = self.jobs.lock().last(base).cloned();
        if let Some(job) = job {
            job.cancel(by);
            job.join();
        }
    }

    /// Whether a hydration of the base is under way that leaves it hydrated when it is cancelled.
    pub fn repeats(&self, base: u64) -> bool {
        self.jobs.lock().running(base).is_some_and(|job| job.repeats())
    }

    /// Begins a hydration that was requested while an earlier one was being cancelled.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn begin_again(&self, node: &Arc<BaseNode>) -> Result<(), StoreError> {
        self.begin(node, What::Hydrate, Start { rate: self.rate, ..Start::default() })
    }

    /// Ends and forgets the work on a removed base.
    pub fn forget(&self, base: u64) {
        self.cancel(base, "the base was removed");
        self.jobs.lock().remove(base);
    }

    /// Begins a job. One of the same kind that is under way continues instead. A hydration takes the place of a
    /// verification.
    fn begin(&self, node: &Arc<BaseNode>, what: What, start: Start) -> Result<(), StoreError> {
        let mut jobs = self.jobs.lock();
        while let Some(running) = jobs.running(node.id()).cloned() {
            match (running.what(), what) {
                _ if running.is_cancelled() => {}
                (What::Verify, What::Hydrate) => running.cancel(SUPERSEDED),
                (What::Hydrate, What::Verify) => return Err(being_hydrated(node)),
                _ => return Ok(()),
            }
            drop(jobs);
            running.join();
            jobs = self.jobs.lock();
        }
        let record = node.record();
        let total = record.files().map(|file| file.identity.size).sum();
        let here = |file| self.sources.contents(record, file).cached_bytes(Reach::Any);
        let first = match what {
            What::Hydrate => record.files().map(here).sum(),
            _ => 0,
        };
        let job = Job::new(what, first, total, start);
        let (this, node_, job_) = (self.clone(), node.clone(), job.clone());
        let run = move || {
            // Digests of whole images take a processor for minutes.
            priority::background();
            let work = std::panic::AssertUnwindSafe(|| this.work(&node_, &job_, what));
            let result = std::panic::catch_unwind(work).unwrap_or_else(|_| {
                Err(Stopped::Failed("a bug of plyfs ended it; report it with the log".into()))
            });
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
                tracing::info!(base = name, ?what, ?matches, "the work on a base is done");
                if what == What::Hydrate {
                    self.events.emit(Event::of_base(Kind::BaseHydrated, name).bytes(node.record().size()));
                }
            }
            Err(Stopped::Cancelled(by)) => {
                tracing::info!(base = name, ?what, by, "the work on a base was cancelled")
            }
            Err(Stopped::Failed(why)) => {
                tracing::error!(base = name, ?what, why, "the work on a base failed");
                self.events.emit(Event::of_base(Kind::BaseError, name).because(why.clone()));
            }
        }
    }

    /// Fails when the base was removed.
    fn go_on(&self, node: &BaseNode) -> Result<(), Stopped> {
        match self.store.base_by_id(node.id()) {
            Some(_) => Ok(()),
            None => Err(Stopped::Cancelled("the base was removed")),
        }
    }

    fn work(&self, node: &Arc<BaseNode>, job: &Arc<Job>, what: What) -> Result<Option<bool>, Stopped> {
        // A refused base has nothing cached: all of it is fetched to find out whether its source is right by now.
        let mut fetches = what == What::Hydrate || node.options().refused;
        let (mut damaged, mut differed) = (0, 0);
        loop {
            if fetches {
                self.fetch_all(node, job)?;
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
                        let why = "the cache does not keep all of it intact; check the disk of the store";
                        return Err(Stopped::Failed(why.into()));
                    }
                }
                // Fetching it again would bring the same bytes, and other bases may share these.
                Verdict::Contradicts => return Err(self.refuse(node, job, CONTRADICTS)),
                Verdict::Differs => {
                    differed += u32::from(self.drop_differing(node));
                    if differed == FETCHES {
                        return Err(self.refuse(node, job, DIFFERED));
                    }
                    // A second fetch shows whether its own source was the cause.
                    fetches = true;
                }
            }
        }
    }

    /// Makes fetched blocks durable: the operator may remove the original as soon as the hydration is done.
    fn keep(&self) -> Result<(), Stopped> {
        self.sources.cache().flush().map_err(|error| {
            Stopped::Failed(format!(
                "all of it was fetched, but the cache could not be flushed: {error}; repair the disk of the store and \
                 run `plyfs base hydrate` again"
            ))
        })
    }

    /// Drops contents that differ from the digest. Returns whether some of them came from the base's own source.
    fn drop_differing(&self, node: &Arc<BaseNode>) -> bool {
        let (record, image) = (node.record(), &node.record().image);
        let contents = self.sources.contents(record, image);
        let readers = self.readers_of(node, &contents);
        // A block of the copies may be one that differs.
        let (dropped, noted) =
            dropping(&self.store, &self.sources, &readers, || self.drop_contents(node, &readers, &contents));
        if let Err(error) = noted {
            tracing::error!(%error, base = record.name, "the copies of a base that differs from its digest are used again by the next worker, unless its record can be written before");
        }
        dropped
    }

    /// The bases that read what [`drop_contents`](Self::drop_contents) drops: this one, and those that share it.
    fn readers_of(&self, node: &Arc<BaseNode>, contents: &Contents) -> Vec<Arc<BaseNode>> {
        let (of, own) = (*contents.file_keys(), contents.has_own());
        let shares = |other: &Arc<BaseNode>| {
            let record = other.record();
            record.files().any(|file| {
                let theirs = self.sources.of(record, file);
                theirs.own == of.own || (!own && of.digest.is_some() && theirs.digest == of.digest)
            })
        };
        let others = self.store.bases().into_iter().filter(|other| other.id() != node.id() && shares(other));
        std::iter::once(node.clone()).chain(others).collect()
    }

    fn drop_contents(&self, node: &BaseNode, readers: &[Arc<BaseNode>], contents: &Contents) -> bool {
        let record = node.record();
        let unproven = contents.drop_unproven();
        if unproven > 0 {
            tracing::warn!(
                base = record.name,
                unproven,
                "contents that an earlier version cached under a digest differ from it; they are dropped"
            );
            return false;
        }
        let own = contents.has_own();
        // Without contents of its own, the verified contents are bad, for each base that shares them.
        let bytes =
            contents.evict(EvictReason::Changed, if own { SharedCopies::Keep } else { SharedCopies::Drop });
        for reader in readers {
            self.sources.forget_in_transit(reader.id());
            reader.purge();
        }
        let why = "the fetched contents differ from the digest that it was registered with; they are dropped";
        tracing::warn!(base = record.name, bytes, why, "the contents of a base are fetched again");
        self.events.emit(Event::of_base(Kind::BaseChanged, &record.name).because(why));
        own
    }

    fn refuse(&self, node: &BaseNode, job: &Job, why: &str) -> Stopped {
        if let Err(error) = node.refuse() {
            tracing::error!(
                %error,
                "a base is refused only until the next start, because its record cannot be written"
            );
        }
        job.note_digest(Some(false));
        Stopped::Failed(why.into())
    }

    /// Serves a refused base again, whose contents are right now.
    fn accept(&self, node: &BaseNode) {
        if !node.options().refused {
            return;
        }
        match node.accept() {
            Ok(()) => tracing::info!(
                base = node.record().name,
                "a base that was refused matches its digest, and is served again"
            ),
            Err(error) => {
                tracing::error!(%error, "a base matches its digest, but stays refused: its record cannot be written")
            }
        }
    }

    fn fetch_all(&self, node: &Arc<BaseNode>, job: &Arc<Job>) -> Result<(), Stopped> {
        let record = node.current();
        let mut before = 0;
        for file in record.files().filter(|file| record.keeps(file)) {
            let contents = self.sources.contents(&record, file);
            if !contents.is_complete(Reach::Any) {
                let source = self.sources.fetched(&record, file).map_err(|e| e.to_string())?;
                let here = fetch::CachedFile { contents: &contents, cache: self.sources.cache() };
                let go_on = || self.go_on(node);
                match self.sources.whole_image(&record, file) {
                    None => fetch::all(job, &*source, &here, before, &go_on)?,
                    Some(image) => {
                        let (image, runtime) = (&*image, self.sources.handle());
                        let whole = whole::Whole { image, contents: &contents, here: &here, runtime, before };
                        whole::all(job, &whole, &go_on)?;
                    }
                }
            }
            before += contents.size();
        }
        job.note(State::Fetching, before);
        Ok(())
    }

    /// Reads all cached contents, and compares them with the digest when they are complete.
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
            let found = match node.options().keeps(file) {
                true => compare::kept(&self.sources.contents(record, file), Digests::of(file), &note)?,
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
        let place = file.proof.as_ref().and_then(|proof| Some((proof.root, proof.places.first()?)));
        if let Some((root, place)) = place {
            let opener = &**self.sources.opener();
            let proof = ProofFile::open(opener, Path::new(place), root, file.identity.size)
                .map_err(|e| e.to_string())?;
            if let Some(why) = compare::file_with_proof(&source, &proof, note)? {
                return Err(Stopped::Failed(format!("{}: {why}; put the original file back", file.source)));
            }
            if file.identity.digest.is_none() {
                return Ok(Verdict::Matches);
            }
        }
        match compare::file(&source, Digests::of(file), note)? {
            Verdict::Differs => Err(Stopped::Failed(format!(
                "{} differs from its digest; put the original file back",
                file.source
            ))),
            Verdict::Contradicts => Err(Stopped::Failed(CONTRADICTS.into())),
            verdict => Ok(verdict),
        }
    }
}

/// The refusal of a verification.
fn being_hydrated(node: &BaseNode) -> StoreError {
    let name = &node.record().name;
    let why = format!(
        "it is being hydrated, which compares it at the end; wait with `plyfs base hydrate {name}`, or end that with \
         `plyfs job cancel hydrate-{name}` and verify what is here"
    );
    StoreError::invalid(format!("base {name}"), why)
}
