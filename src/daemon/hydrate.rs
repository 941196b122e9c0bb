//! Work on a whole base in the background: fetching all of it into the store, and comparing it with its digest.
//!
//! What must hold:
//! - A reader comes first: nothing is asked for while a reader's request is under way.
//! - It can end at any moment. What is to be hydrated is in the base's record, what is here is in the cache; the next
//!   worker goes on with what is missing.
//! - What does not have its digest is dropped as a whole, and the base is refused: nobody is given a byte of it again.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;
use sha2::{Digest as _, Sha256, Sha512};

use super::sources::HostSources;
use crate::base::lazy::LazySource;
use crate::cache::disk::{CACHE_BLOCK, CachedSource, EvictReason};
use crate::events::{Event, Events, Kind};
use crate::format::record::{BaseRecord, Digest, ImageFile, Validator};
use crate::source::{Arrival, Purpose, Source};
use crate::store::{BaseNode, Sources, Store, StoreError};

/// One request, bytes; and how many are under way at once.
const PIECE: u64 = 4 << 20;
const AT_ONCE: usize = 4;
/// How long it gives way at once, and how long it waits when nothing comes.
const GIVE_WAY: Duration = Duration::from_millis(5);
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How often it is fetched when what was kept turns out to be damaged.
const TRIES: u32 = 3;
/// Bytes that are compared at once.
const READ: u64 = 1 << 20;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum What {
    /// All of it is fetched, then compared.
    Hydrate,
    /// It is compared.
    Verify,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Bytes come.
    Fetching,
    /// Nothing comes; it goes on by itself.
    Waiting,
    /// What is here is compared with the digest.
    Verifying,
    /// It has ended well.
    Done,
    /// It has ended, and not well.
    Failed,
}

/// The last work on a base, for whoever asks. Keys of `base show`.
#[derive(Clone, Debug, Serialize)]
pub struct Progress {
    /// What.
    pub what: What,
    /// How far.
    pub state: State,
    /// Bytes that are here, or compared.
    pub bytes: u64,
    /// Of so many.
    pub total: u64,
    /// Bytes per second since it began, of those that came meanwhile.
    pub rate: u64,
    /// What came of the comparison; nothing without a digest.
    pub digest_matches: Option<bool>,
    /// Why it failed or waits.
    pub error: Option<String>,
}

struct Job {
    progress: Mutex<Progress>,
    began: Instant,
    first: u64,
}

impl Job {
    fn note(&self, state: State, bytes: u64) {
        let mut progress = self.progress.lock();
        (progress.state, progress.bytes) = (state, bytes);
        let seconds = self.began.elapsed().as_secs_f64().max(0.001);
        progress.rate = (bytes.saturating_sub(self.first) as f64 / seconds) as u64;
        if state == State::Fetching {
            progress.error = None;
        }
    }

    fn end(&self, result: Result<Option<bool>, String>) {
        let mut progress = self.progress.lock();
        match result {
            Ok(matches) => (progress.state, progress.digest_matches) = (State::Done, matches),
            Err(why) => (progress.state, progress.error) = (State::Failed, Some(why)),
        }
    }

    fn ended(&self) -> bool {
        matches!(self.progress.lock().state, State::Done | State::Failed)
    }
}

/// All work in the background. Clones are the same one.
#[derive(Clone)]
pub struct Hydrations {
    store: Arc<Store>,
    sources: Arc<HostSources>,
    events: Events,
    /// Bytes per second, unless somebody says another.
    rate: Option<u64>,
    jobs: Arc<Mutex<HashMap<u64, Arc<Job>>>>,
}

impl Hydrations {
    /// None yet; `rate` is the most bytes per second unless somebody says another.
    pub fn new(store: Arc<Store>, sources: Arc<HostSources>, events: Events, rate: Option<u64>) -> Self {
        Self { store, sources, events, rate, jobs: Arc::default() }
    }

    /// Goes on with what an earlier worker began.
    pub fn resume(&self) {
        for node in self.store.bases() {
            let record = node.record();
            let done = |file: &ImageFile| {
                let kept = self.sources.kept(file);
                kept.is_complete() && (file.identity.digest.is_none() || kept.is_verified())
            };
            if node.options().hydrate
                && !files(record).all(done)
                && let Err(error) = self.begin(&node, What::Hydrate, self.rate)
            {
                tracing::error!(%error, base = record.name, "it is not hydrated");
            }
        }
    }

    /// How the last work on a base went, or goes.
    pub fn progress(&self, base: u64) -> Option<Progress> {
        self.jobs.lock().get(&base).map(|job| job.progress.lock().clone())
    }

    /// Begins to fetch all of a base; `rate` is the most bytes per second. One that is being fetched goes on as it is.
    ///
    /// # Errors
    /// When that cannot be noted in its record, or there is no thread.
    pub fn hydrate(&self, node: &Arc<BaseNode>, rate: Option<u64>) -> Result<(), StoreError> {
        let total: u64 = files(node.record()).map(|file| file.identity.size).sum();
        let limit = self.sources.cache().stats().limit_bytes;
        if total > limit {
            let why = format!(
                "it has {total} bytes, and the cache on disk has room for {limit}; start the daemon with a larger \
                 --cache-disk"
            );
            return Err(StoreError::Invalid { object: format!("base {}", node.record().name), why });
        }
        node.attach()?;
        node.set_options(|options| options.hydrate = true)?;
        // Who attaches it from now on reads the copy, as far as there is one.
        node.detach();
        files(node.record()).for_each(|file| self.sources.kept(file).pin(true));
        self.begin(node, What::Hydrate, rate.or(self.rate))
    }

    /// Begins to compare what is here of a base with its digest.
    ///
    /// # Errors
    /// When there is no thread.
    pub fn verify(&self, node: &Arc<BaseNode>) -> Result<(), StoreError> {
        self.begin(node, What::Verify, None)
    }

    fn begin(&self, node: &Arc<BaseNode>, what: What, rate: Option<u64>) -> Result<(), StoreError> {
        let mut jobs = self.jobs.lock();
        if jobs.get(&node.id()).is_some_and(|job| !job.ended()) {
            return Ok(());
        }
        let total = files(node.record()).map(|file| file.identity.size).sum();
        let first = match what {
            What::Hydrate => files(node.record()).map(|file| self.sources.kept(file).cached_bytes()).sum(),
            What::Verify => 0,
        };
        let state = if what == What::Hydrate { State::Fetching } else { State::Verifying };
        let progress =
            Progress { what, state, bytes: first, total, rate: 0, digest_matches: None, error: None };
        let job = Arc::new(Job { progress: Mutex::new(progress), began: Instant::now(), first });
        let (this, node_, job_) = (self.clone(), node.clone(), job.clone());
        let run = move || {
            let result = match what {
                What::Hydrate => this.fetch_and_compare(&node_, &job_, rate),
                What::Verify => this.compare(&node_, &job_),
            };
            this.tell(&node_, what, &result);
            job_.end(result);
        };
        let thread = std::thread::Builder::new().name("hydrate".into()).stack_size(512 << 10).spawn(run);
        let object = format!("base {}", node.record().name);
        thread.map_err(|source| StoreError::Io { object, operation: "starting a thread", source })?;
        jobs.insert(node.id(), job);
        Ok(())
    }

    fn tell(&self, node: &BaseNode, what: What, result: &Result<Option<bool>, String>) {
        let name = &node.record().name;
        match result {
            Ok(matches) => {
                tracing::info!(base = name, ?what, ?matches, "all of a base is here");
                if what == What::Hydrate {
                    self.events.emit(Event::of_base(Kind::BaseHydrated, name).bytes(node.record().size()));
                }
            }
            Err(why) => {
                tracing::error!(base = name, ?what, why, "work on a base ended");
                self.events.emit(Event::of_base(Kind::BaseError, name).because(why.clone()));
            }
        }
    }

    fn gone(&self, node: &BaseNode) -> Result<(), String> {
        match self.store.base_by_id(node.id()) {
            Some(_) => Ok(()),
            None => Err("the base was removed".into()),
        }
    }

    /// A block that is found to be damaged when it is compared is fetched again.
    fn fetch_and_compare(
        &self,
        node: &Arc<BaseNode>,
        job: &Job,
        rate: Option<u64>,
    ) -> Result<Option<bool>, String> {
        let mut tries = 0;
        loop {
            self.fetch_all(node, job, rate)?;
            let result = self.compare(node, job);
            tries += 1;
            let another = job.progress.lock().digest_matches == Some(false);
            let complete = files(node.record()).all(|file| self.sources.kept(file).is_complete());
            if result.is_ok() || another || complete || tries == TRIES {
                return result;
            }
        }
    }

    fn fetch_all(&self, node: &Arc<BaseNode>, job: &Job, rate: Option<u64>) -> Result<(), String> {
        let record = node.current();
        let mut before = 0;
        for file in files(&record) {
            let source = self.sources.fetched(&record, file).map_err(|e| e.to_string())?;
            let kept = self.sources.kept(file);
            let mut pause = PAUSE;
            while !kept.is_complete() {
                let had = kept.cached_bytes();
                let note = |state| job.note(state, before + kept.cached_bytes());
                self.fetch_once(node, &source, &kept, rate, &note)?;
                if kept.is_complete() {
                    break;
                }
                if kept.cached_bytes() > had {
                    pause = PAUSE;
                    continue;
                }
                // The server is down, or the cache takes nothing.
                job.note(State::Waiting, before + had);
                let why = source.stall().map(|stall| stall.why).or(self.sources.cache().stats().degraded);
                job.progress.lock().error =
                    Some(why.unwrap_or_else(|| "what is fetched is not kept: the cache is too small".into()));
                std::thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
            before += kept.size();
        }
        job.note(State::Fetching, before);
        Ok(())
    }

    /// Once through what is missing.
    fn fetch_once(
        &self,
        node: &BaseNode,
        source: &LazySource,
        kept: &CachedSource,
        rate: Option<u64>,
        note: &dyn Fn(State),
    ) -> Result<(), String> {
        let mut under_way: VecDeque<Arrival> = VecDeque::new();
        let mut at = 0;
        let (began, mut asked) = (Instant::now(), 0u64);
        while let Some(first) = kept.next_missing(at) {
            self.gone(node)?;
            if !node.options().hydrate {
                return Err("it is not to be hydrated any more".into());
            }
            while source.is_busy() {
                std::thread::sleep(GIVE_WAY);
            }
            let count = kept.missing_run(first, PIECE / CACHE_BLOCK).max(1);
            if let Some(arrival) =
                source.prefetch(&[(first * CACHE_BLOCK, count * CACHE_BLOCK)], Purpose::Hydrate)
            {
                under_way.push_back(arrival);
            }
            at = first + count;
            asked += count * CACHE_BLOCK;
            while under_way.len() >= AT_ONCE {
                if let Some(arrival) = under_way.pop_front() {
                    arrival.wait();
                }
            }
            if let Some(rate) = rate {
                let due = Duration::from_secs_f64(asked as f64 / rate.max(1) as f64);
                std::thread::sleep(due.saturating_sub(began.elapsed()));
            }
            note(State::Fetching);
        }
        under_way.iter().for_each(Arrival::wait);
        // What came is written behind the readers.
        for _ in 0..100 {
            if source.is_settled() {
                break;
            }
            std::thread::sleep(GIVE_WAY * 2);
        }
        Ok(())
    }

    /// Reads everything that is here, and compares it with the digest when all of it is.
    fn compare(&self, node: &Arc<BaseNode>, job: &Job) -> Result<Option<bool>, String> {
        let record = node.record();
        let mut verdict = None;
        let mut before = 0;
        for file in files(record) {
            let far = node.options().hydrate || matches!(file.identity.validator, Validator::Http { .. });
            let note = |bytes| job.note(State::Verifying, before + bytes);
            verdict = match far {
                true => self.compare_kept(node, file, job, &note)?.or(verdict),
                false => self.compare_file(file, &note)?.or(verdict),
            };
            before += file.identity.size;
        }
        Ok(verdict)
    }

    fn compare_kept(
        &self,
        node: &BaseNode,
        file: &ImageFile,
        job: &Job,
        note: &dyn Fn(u64),
    ) -> Result<Option<bool>, String> {
        let kept = self.sources.kept(file);
        let mut sum = Sum::of(file.identity.digest.as_ref());
        let mut buffer = vec![0; READ as usize];
        let (mut block, mut whole) = (0, true);
        while block < kept.blocks() {
            self.gone(node)?;
            let bytes = (kept.size() - block * CACHE_BLOCK).min(READ) as usize;
            // Each block is compared with its own sum; one that does not match is dropped.
            let read = kept.read(block, &mut buffer[..bytes]) as u64;
            let got = ((read * CACHE_BLOCK) as usize).min(bytes);
            sum.update(&buffer[..got]);
            whole &= got == bytes;
            block += read.max(1);
            note((block * CACHE_BLOCK).min(kept.size()));
        }
        match (whole, sum.matches()) {
            (true, Some(true)) => {
                kept.set_verified(true);
                Ok(Some(true))
            }
            (true, Some(false)) => {
                kept.evict(EvictReason::Changed);
                if let Err(error) = node.refuse() {
                    tracing::error!(%error, "a base without its digest is refused until the next start only");
                }
                job.progress.lock().digest_matches = Some(false);
                let name = &node.record().name;
                let why =
                    "it does not have the digest that it was registered with; what was fetched is dropped";
                self.events.emit(Event::of_base(Kind::BaseChanged, name).because(why));
                Err(format!("{why}; check the digest and the server"))
            }
            (true, None) => Ok(None),
            (false, _) => {
                let (here, all) = (kept.cached_bytes(), kept.size());
                match node.options().hydrate {
                    true => {
                        Err(format!("{here} of {all} bytes are here and sound; check the disk of the store"))
                    }
                    false => Ok(None),
                }
            }
        }
    }

    fn compare_file(&self, file: &ImageFile, note: &dyn Fn(u64)) -> Result<Option<bool>, String> {
        let source = self.sources.file(std::path::Path::new(&file.source)).map_err(|e| e.to_string())?;
        if let Some(why) = crate::store::why_changed(file, source.identity()) {
            return Err(format!("{} changed since it was registered: {why}", file.source));
        }
        let mut sum = Sum::of(file.identity.digest.as_ref());
        let mut buffer = vec![0; READ as usize];
        let mut at = 0;
        while at < source.size() {
            let read = source.read_at(&mut buffer, at).map_err(|e| e.to_string())?;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).to_string());
            }
            sum.update(&buffer[..read]);
            at += read as u64;
            note(at);
        }
        match sum.matches() {
            Some(false) => {
                Err(format!("{} does not have its digest; put the original file back", file.source))
            }
            verdict => Ok(verdict),
        }
    }
}

/// The image and what is below it.
fn files(record: &BaseRecord) -> impl Iterator<Item = &ImageFile> {
    std::iter::once(&record.image).chain(&record.backing)
}

/// A digest that is being computed, when there is one to compare it with.
enum Sum<'a> {
    None,
    Sha256(Sha256, &'a [u8; 32]),
    Sha512(Sha512, &'a [u8; 64]),
}

impl<'a> Sum<'a> {
    fn of(wanted: Option<&'a Digest>) -> Self {
        match wanted {
            None => Self::None,
            Some(Digest::Sha256(digest)) => Self::Sha256(Sha256::new(), digest),
            Some(Digest::Sha512(digest)) => Self::Sha512(Sha512::new(), digest),
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::None => {}
            Self::Sha256(sum, _) => sum.update(bytes),
            Self::Sha512(sum, _) => sum.update(bytes),
        }
    }

    fn matches(self) -> Option<bool> {
        match self {
            Self::None => None,
            Self::Sha256(sum, digest) => Some(sum.finalize()[..] == digest[..]),
            Self::Sha512(sum, digest) => Some(sum.finalize()[..] == digest[..]),
        }
    }
}
