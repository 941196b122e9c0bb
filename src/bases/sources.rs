//! The open sources of bases: files of this host through the opener, all others through the cache of fetched blocks.
//!
//! What must hold: a base gets only bytes that were fetched for it or compared with its digest (`keys`,
//! `fetch::kept::contents`). Attaching sends no request, so a base can be attached while its server is down (D43).

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use tokio::runtime::{Builder, Handle, Runtime};

use super::copies::{Copies, CopyLimits, FileCopies, SpawnIn};
use super::keys::{keys_of, older_key};
use super::lane::Lane;
use super::lend::LentCounters;
use super::proofs::{OpenProofs, PAGES, ProofDisk, Relatives};
use super::whole::WholeImages;
use crate::config::{Config, HttpConfig};
use crate::events::{Event, Events, Kind, Reason, Traffic};
use crate::fetch::kept::{
    CacheObserver, Contents, DiskCache, EvictReason, FileKeys, Limits, OnDamage, Reach, SharedCopies,
    SourceKey, Ticker, default_free_floor,
};
use crate::fetch::{DemandBudget, Failing, FetchCache, LazySource, NoCache, TimedReads};
use crate::format::record::{BaseRecord, FileProof, ImageFile};
use crate::io::{HostMedium, Medium};
use crate::source::http::{Credentials, Http, HttpCounters, Network};
use crate::source::nbd::Nbd;
use crate::source::pages::ProvenPages;
use crate::source::{
    FileSource, Identity, OpenImage, ProvenFile, RemoteSource, Source, SourceError, SourceErrorKind, Spawn,
    Stall, StallKind, UrlState,
};
use crate::store::Sources;

/// Threads: those that drive requests, those that wait for the cache's disk, and those for credentials.
const THREADS: usize = 2;
const WRITERS: usize = 8;
const CACHE_READERS: usize = 16;
/// How long the start of a worker, and its end, wait for the cache's disk.
pub(super) const SETTLING: Duration = Duration::from_secs(1);
const LAST_FLUSH: Duration = Duration::from_secs(30);
const WAITING: usize = 256;

/// Runs network requests on the runtime, and work that waits for a disk in a lane.
#[derive(Clone)]
pub(super) struct OnRuntime {
    handle: Handle,
    lane: Arc<Lane>,
}

impl OnRuntime {
    /// With the lane for work that waits for a disk.
    pub fn new(handle: Handle, lane: Arc<Lane>) -> Self {
        Self { handle, lane }
    }
}

impl SpawnIn for Handle {
    fn of(&self, lane: Arc<Lane>) -> Arc<dyn Spawn> {
        Arc::new(OnRuntime::new(self.clone(), lane))
    }
}

impl Spawn for OnRuntime {
    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        drop(self.handle.spawn(future));
    }

    fn spawn_blocking(&self, job: Box<dyn FnOnce() + Send>) {
        self.lane.run(job);
    }
}

/// A source of one base, by number and own key. Bases with the same contents share only what is cached.
pub(super) type FileKey = (u64, SourceKey);

/// A file of a base that was used, kept until the base is removed.
struct FileState {
    contents: Arc<Contents>,
    source: Weak<LazySource>,
    /// The remote of `source`. Fetches under way may outlive `source`, and are told of changes through this.
    remote: Option<Weak<dyn RemoteSource>>,
}

/// The cache of fetched blocks, and the reporting of its state.
pub struct OpenCache {
    cache: Arc<DiskCache>,
    watcher: Arc<Watcher>,
    copies: CopyLimits,
    /// Drives the cache until it is dropped.
    _ticker: Ticker,
}

/// Reports evictions and failures of the cache.
struct Watcher {
    events: Events,
    /// The bases of a source, by its own key or the key of its digest.
    users: Mutex<HashMap<SourceKey, Vec<Arc<Traffic>>>>,
}

impl Watcher {
    /// Counts evictions of a source for a base; once, however often the base is attached.
    fn add(&self, key: SourceKey, traffic: &Arc<Traffic>) {
        let mut users = self.users.lock();
        let users = users.entry(key).or_default();
        if !users.iter().any(|user| Arc::ptr_eq(user, traffic)) {
            users.push(traffic.clone());
        }
    }

    fn forget(&self, traffic: &Arc<Traffic>) {
        self.users.lock().retain(|_, users| {
            users.retain(|user| !Arc::ptr_eq(user, traffic));
            !users.is_empty()
        });
    }
}

impl CacheObserver for Watcher {
    fn evicted(&self, key: &SourceKey, bytes: u64, reason: EvictReason) {
        let reason = match reason {
            EvictReason::Space => Reason::Space,
            EvictReason::Floor => Reason::Floor,
            EvictReason::Bases => Reason::Bases,
            EvictReason::Corrupt | EvictReason::ReadError => Reason::Corrupt,
            EvictReason::Asked => Reason::Asked,
            EvictReason::Changed => Reason::Stale,
        };
        for user in self.users.lock().get(key).into_iter().flatten() {
            user.add(reason, bytes);
        }
    }

    fn degraded(&self, why: Option<&str>) {
        let event = match why {
            Some(why) => {
                tracing::error!(
                    why,
                    "fetched blocks are not cached until the cause is gone; reads fetch them again"
                );
                Event::new(Kind::CacheDegraded).because(why.to_owned())
            }
            None => {
                tracing::info!("fetched blocks are cached again");
                Event::new(Kind::CacheRecovered)
            }
        };
        self.events.emit(event);
    }
}

impl OpenCache {
    /// Opens the cache in the store's directory. It takes nothing of the space that is reserved there.
    ///
    /// # Errors
    /// When the store cannot be opened, or no thread can be started.
    pub fn open(config: &Config, events: &Events) -> io::Result<Self> {
        let medium = HostMedium::new(&config.store)?;
        let total = medium.space()?.total;
        let limits = Limits {
            bytes: config.cache_disk,
            bases: config.cache_disk_bases,
            free_floor: config.cache_disk_free.unwrap_or_else(|| default_free_floor(total)),
        };
        let watcher = Arc::new(Watcher { events: events.clone(), users: Mutex::default() });
        let cache = DiskCache::prepare(Arc::new(medium), limits, watcher.clone(), OnDamage::Keep);
        let _ticker = cache.start()?;
        Ok(Self { cache, watcher, copies: CopyLimits::of(config), _ticker })
    }
}

/// The health of the servers of a base.
#[derive(Clone, Debug, Default)]
pub struct BaseHealth {
    /// Since when reads wait, and why.
    pub stall: Option<Stall>,
    /// Since when readers get errors, and the last error.
    pub failing: Option<Failing>,
    /// The URLs of its open sources.
    pub urls: Vec<UrlState>,
}

/// A base whose reads wait or fail.
#[derive(Clone)]
struct Reported {
    name: String,
    since: SystemTime,
    /// Whether an event said that it has changed.
    changed: bool,
}

/// See the module.
pub struct HostSources {
    opener: Arc<dyn OpenImage>,
    runtime: Runtime,
    http: Arc<Http>,
    nbd: Arc<Nbd>,
    kept: OpenCache,
    copies: Copies,
    events: Events,
    known: Mutex<HashMap<FileKey, FileState>>,
    /// Limits the requests of readers of all sources.
    demand: Arc<DemandBudget>,
    /// Writes to the cache.
    writers: Arc<Lane>,
    /// Reads of the cache that wait for its disk.
    timed_reads: Arc<TimedReads>,
    /// Pages of proofs, in memory and on the cache's disk.
    proven_pages: Arc<ProvenPages>,
    proof_disk: Arc<ProofDisk>,
    /// Bases that an event reported as waiting or failing, by number.
    troubled: Mutex<HashMap<u64, Reported>>,
    /// Numbers, ascending, of bases whose contents version 0.1.0 cached. They must not be lost.
    inherited: OnceLock<Vec<u64>>,
    /// The images that come as a whole.
    pub(super) wholes: WholeImages,
    pub(super) open_proofs: OpenProofs,
    pub(super) relatives: Arc<Relatives>,
    /// What other hosts were sent.
    lent: LentCounters,
}

impl HostSources {
    /// Starts the threads of the runtime.
    ///
    /// # Errors
    /// When they cannot be started.
    pub fn new(
        opener: Arc<dyn OpenImage>,
        config: &HttpConfig,
        network: &Network,
        credentials: Arc<dyn Credentials>,
        kept: OpenCache,
        events: Events,
    ) -> io::Result<Self> {
        let runtime = Builder::new_multi_thread()
            .worker_threads(THREADS)
            .max_blocking_threads(WAITING)
            .thread_name("net")
            .enable_all()
            .build()?;
        let http =
            Http::new(config, network, credentials, runtime.handle().clone()).map_err(io::Error::other)?;
        let handle = runtime.handle().clone();
        Ok(Self {
            nbd: Nbd::new(&http, &opener),
            opener,
            runtime,
            http,
            copies: Copies::new(kept.copies, Arc::new(handle.clone())),
            events,
            known: Mutex::default(),
            demand: Arc::default(),
            writers: Lane::new("cache-write", WRITERS),
            timed_reads: TimedReads::new(Arc::new(OnRuntime {
                lane: Lane::new("cache-read", CACHE_READERS),
                handle,
            })),
            proven_pages: Arc::new(ProvenPages::new(PAGES)),
            proof_disk: ProofDisk::new(kept.cache.clone()),
            relatives: Relatives::new(kept.cache.clone()),
            kept,
            troubled: Mutex::default(),
            inherited: OnceLock::new(),
            wholes: WholeImages::default(),
            open_proofs: OpenProofs::default(),
            lent: LentCounters::default(),
        })
    }

    pub(super) fn opener(&self) -> &Arc<dyn OpenImage> {
        &self.opener
    }

    /// The HTTP client.
    pub fn http(&self) -> &Arc<Http> {
        &self.http
    }

    /// The NBD client.
    pub(super) fn nbd(&self) -> &Arc<Nbd> {
        &self.nbd
    }

    pub(super) fn proven_pages(&self) -> &Arc<ProvenPages> {
        &self.proven_pages
    }

    pub(super) fn proof_disk(&self) -> &Arc<ProofDisk> {
        &self.proof_disk
    }

    /// The runtime of requests.
    pub fn handle(&self) -> &Handle {
        self.runtime.handle()
    }

    /// Counters of requests to servers, by host.
    pub fn servers(&self) -> Vec<(String, HttpCounters)> {
        self.http.servers()
    }

    /// Counters of what other hosts were sent.
    pub fn lent(&self) -> &LentCounters {
        &self.lent
    }

    /// The cache of fetched blocks.
    pub fn cache(&self) -> &Arc<DiskCache> {
        &self.kept.cache
    }

    /// Further copies of what the cache has.
    pub fn copies(&self) -> &Copies {
        &self.copies
    }

    /// Lets readers of a file of a base use the copies that the base is to have.
    pub(super) fn refresh_copies(&self, base: &BaseRecord, file: &ImageFile) -> Arc<FileCopies> {
        let wanted = base.options.copies.filter(|_| !base.options.refused);
        self.copies.refresh(base.id, &self.of(base, file), wanted)
    }

    /// Matches the cache that an earlier worker left with the present bases. Called once, before any base is attached.
    /// While the cache's disk does not answer, disks are served without the cache, and this is done when it does (D62).
    pub fn settle_within(
        self: &Arc<Self>,
        bases: impl Fn() -> Vec<BaseRecord> + Send + 'static,
    ) -> io::Result<()> {
        let this = self.clone();
        let settle = move |in_time: &AtomicBool| {
            this.cache().wait_for_load();
            this.settle(&bases(), in_time);
        };
        if !within(SETTLING, settle)? {
            tracing::error!(
                "the cache's disk does not answer; disks are served without the cache until it does; check that disk"
            );
        }
        Ok(())
    }

    /// `in_time`: no base was changed since `bases` were listed.
    fn settle(&self, bases: &[BaseRecord], in_time: &AtomicBool) {
        let cache = &self.kept.cache;
        let candidates = || -> Vec<u64> {
            let own = |base| BaseRecord::files(base).map(move |file| keys_of(base, file, false).own);
            let owned: HashSet<SourceKey> = bases.iter().flat_map(own).collect();
            let older = |file: &ImageFile| {
                let key = older_key(file);
                let kept = cache.find(&key).is_some() || cache.trouble(&key).is_some();
                kept && file.identity.digest.is_none() && !owned.contains(&key)
            };
            bases
                .iter()
                .filter(|base| base.options.retains() && base.files().any(older))
                .map(|base| base.id)
                .collect()
        };
        let inherited = cache.inherited(candidates).unwrap_or_else(|error| {
            tracing::error!(
                %error,
                "the list of bases with contents of version 0.1.0 cannot be read and is made again"
            );
            candidates()
        });
        let _ = self.inherited.set(inherited);
        let all = |base| BaseRecord::files(base).map(move |file| self.contents(base, file));
        let precious = bases.iter().filter(|base| base.options.retains()).flat_map(all);
        let keys = precious.flat_map(|contents| {
            let of = *contents.file_keys();
            [Some(of.own), of.digest].into_iter().flatten().map(move |key| (key, of.size))
        });
        cache.settle_damaged(&keys.collect::<Vec<_>>());
        let mut pinned = Vec::new();
        for base in bases {
            for contents in all(base) {
                contents.adopt_verified();
                if base.options.retains() {
                    contents.pin(true);
                    pinned.extend(contents.keys());
                }
            }
        }
        // A base may have been pinned since. The next worker unpins what no base retains.
        if !in_time.load(Ordering::Acquire) {
            return;
        }
        let proven =
            |base| BaseRecord::files(base).filter(|file| file.proof.is_some()).map(move |file| (base, file));
        cache.retain_proofs(
            &bases.iter().flat_map(proven).map(|(base, file)| self.of(base, file).own).collect(),
        );
        // Sources of removed bases, and of bases that are not pinned any more.
        let pinned: HashSet<SourceKey> = pinned.into_iter().collect();
        for source in cache.sources().into_iter().filter(|source| !pinned.contains(source.key())) {
            source.unpin();
        }
    }

    /// The cached contents of a file of a base, attached or not.
    pub fn contents(&self, base: &BaseRecord, file: &ImageFile) -> Arc<Contents> {
        let of = self.of(base, file);
        let mut known = self.known.lock();
        let known = known.entry((base.id, of.own)).or_insert_with(|| FileState {
            contents: self.kept.cache.contents(of),
            source: Weak::new(),
            remote: None,
        });
        known.contents.clone()
    }

    /// The open source of a file of a base, by its own key.
    pub(super) fn open_source(&self, base: u64, own: SourceKey) -> Option<Arc<LazySource>> {
        self.known.lock().get(&(base, own))?.source.upgrade()
    }

    /// The keys of a file of a base in the cache.
    pub(super) fn of(&self, base: &BaseRecord, file: &ImageFile) -> FileKeys {
        let inherited = self.inherited.get().is_some_and(|bases| bases.binary_search(&base.id).is_ok());
        keys_of(base, file, inherited)
    }

    /// Whether one of `others` retains contents that it shares with `base`.
    pub fn shares(&self, base: &BaseRecord, file: &ImageFile, others: &[BaseRecord]) -> SharedCopies {
        let of = self.of(base, file);
        let wanted = others.iter().filter(|other| other.options.retains()).any(|other| {
            let same = |file| {
                let other = self.of(other, file);
                other.own == of.own || (of.digest.is_some() && other.digest == of.digest)
            };
            other.files().any(same)
        });
        if wanted { SharedCopies::Keep } else { SharedCopies::Drop }
    }

    /// Whether one of `others` has the contents of a file, so that they stay when `base` is removed.
    pub fn is_shared(&self, base: &BaseRecord, file: &ImageFile, others: &[BaseRecord]) -> bool {
        let of = self.of(base, file);
        let mut theirs = others.iter().flat_map(|other| other.files().map(|file| self.of(other, file)));
        theirs.any(|other| other.own == of.own || (of.digest.is_some() && other.digest == of.digest))
    }

    /// Drops the cached contents of a file of a base, except those that `others` retain. Returns the bytes.
    pub fn evict(&self, base: &BaseRecord, file: &ImageFile, others: &[BaseRecord]) -> u64 {
        let of = self.of(base, file);
        let theirs: Vec<FileKeys> = others
            .iter()
            .filter(|other| other.options.retains())
            .flat_map(|other| other.files().map(|file| self.of(other, file)))
            .collect();
        if theirs.iter().any(|other| other.own == of.own) {
            return 0;
        }
        let verified = of.digest.is_some() && theirs.iter().any(|other| other.digest == of.digest);
        let shares = if verified { SharedCopies::Keep } else { SharedCopies::Drop };
        self.contents(base, file).evict(EvictReason::Asked, shares)
    }

    /// Bytes under way for a base go to their waiting readers and are not cached.
    pub fn forget_in_transit(&self, base: u64) {
        let known = self.known.lock();
        let sources: Vec<_> = known
            .iter()
            .filter(|((id, _), _)| *id == base)
            .filter_map(|(_, known)| known.source.upgrade())
            .collect();
        drop(known);
        sources.iter().for_each(|source| source.forget_in_transit());
    }

    /// Emits an event for each base that, since the last call, began to wait for its servers, has another object there,
    /// failed, or resumed. Called periodically.
    pub fn tick(&self) {
        let known: Vec<(u64, Arc<LazySource>)> = {
            let known = self.known.lock();
            known.iter().filter_map(|((id, _), known)| Some((*id, known.source.upgrade()?))).collect()
        };
        let mut troubled = self.troubled.lock();
        let mut still: HashMap<u64, Reported> = HashMap::new();
        for (id, source) in known {
            let name = source.base().to_owned();
            let failing = source.failing();
            if let Some(stall) = source.stall() {
                let before = still.get(&id).or_else(|| troubled.get(&id));
                let kind = match stall.kind {
                    StallKind::Changed if before.is_none_or(|before| !before.changed) => {
                        Some(Kind::BaseChanged)
                    }
                    StallKind::Waiting if before.is_none() => Some(Kind::BaseWaiting),
                    StallKind::Changed | StallKind::Waiting => None,
                };
                if let Some(kind) = kind {
                    let event = Event::of_base(kind, &name).because(stall.why.clone());
                    self.events.emit(event.since(stall.since));
                }
                let changed = stall.kind == StallKind::Changed || before.is_some_and(|before| before.changed);
                let since = before.map_or(stall.since, |before| before.since.min(stall.since));
                still.insert(id, Reported { name: name.clone(), since, changed });
            } else if let Some(failing) = &failing {
                // A base whose readers get errors has not resumed.
                let before = troubled.get(&id).cloned();
                let now = Reported { name: name.clone(), since: failing.since, changed: false };
                still.entry(id).or_insert_with(|| before.unwrap_or(now));
            }
            if let Some(error) = source.take_failure() {
                let kind = match error.kind() {
                    SourceErrorKind::Changed => Kind::BaseChanged,
                    _ => Kind::BaseError,
                };
                tracing::error!(base = name, %error, "readers of a base get an error");
                self.events.emit(Event::of_base(kind, &name).because(error.to_string()));
            }
        }
        for (id, Reported { name, since, .. }) in troubled.drain() {
            if !still.contains_key(&id) {
                self.events.emit(Event::of_base(Kind::BaseResumed, &name).since(since));
            }
        }
        *troubled = still;
    }

    /// Makes cached blocks durable, if the cache's disk answers.
    pub fn flush(&self) {
        let cache = self.cache().clone();
        let flush = move |_: &AtomicBool| {
            if let Err(error) = cache.flush() {
                tracing::warn!(
                    %error,
                    "the cache could not be flushed; the last blocks may have to be fetched again"
                );
            }
        };
        if !within(LAST_FLUSH, flush).unwrap_or(true) {
            tracing::error!("the cache's disk does not answer; the last blocks may have to be fetched again");
        }
    }

    /// The health of the servers of a base.
    pub fn health(&self, base: u64) -> BaseHealth {
        let known = self.known.lock();
        let known: Vec<_> = known.iter().filter(|((id, _), _)| *id == base).collect();
        let sources: Vec<_> = known.iter().filter_map(|(_, known)| known.source.upgrade()).collect();
        let stalls = sources.iter().filter_map(|source| source.stall());
        let failing = sources.iter().filter_map(|source| source.failing());
        let urls = known.iter().filter_map(|(_, known)| known.remote.as_ref()?.upgrade());
        BaseHealth {
            // Another object is worse than a longer wait.
            stall: stalls.min_by_key(|stall| (stall.kind != StallKind::Changed, stall.since)),
            failing: failing.min_by_key(|failing| failing.since),
            urls: urls.flat_map(|source| [source.urls(), source.proof_urls()].concat()).collect(),
        }
    }

    /// Whether the cached contents of a file begin with other bytes than `head`.
    ///
    /// # Errors
    /// As [`fetched`](Self::fetched).
    pub fn differs(&self, base: &BaseRecord, file: &ImageFile, head: &[u8]) -> Result<bool, SourceError> {
        let source = self.fetched(base, file)?;
        let mut kept = vec![0; head.len()];
        Ok(source.read_kept(&mut kept, 0) && kept != head)
    }

    /// Replaces the URLs of a file of a base. Waiting reads continue there.
    ///
    /// # Errors
    /// `Protocol`, when one of them is no URL.
    pub fn set_urls(&self, base: &BaseRecord, file: &ImageFile, urls: &[String]) -> Result<(), SourceError> {
        match self.remotes(base.id, Some(self.of(base, file).own)).first() {
            Some(source) => source.set_urls(urls),
            // A file that is not open is opened with its new URLs.
            None => Ok(()),
        }
    }

    /// With `true`, ends all present and later reads of a base that wait for its servers, until called with `false`.
    pub fn give_up(&self, base: u64, given_up: bool) {
        self.remotes(base, None).iter().for_each(|source| source.give_up(given_up));
    }

    /// The remotes of the open files of a base; with `key`, of one file.
    fn remotes(&self, base: u64, key: Option<SourceKey>) -> Vec<Arc<dyn RemoteSource>> {
        let known = self.known.lock();
        let wanted = |(id, own): &FileKey| *id == base && key.is_none_or(|key| key == *own);
        let known = known.iter().filter(|(name, _)| wanted(name));
        known.filter_map(|(_, known)| known.remote.as_ref()?.upgrade()).collect()
    }

    /// Forgets a removed base, and drops its cached contents that no other base has.
    pub fn forget(&self, base: &BaseRecord, others: &[BaseRecord]) {
        let _suspended = self.copies.suspend(base.id);
        for file in base.files() {
            let of = self.of(base, file);
            let contents = self.contents(base, file);
            self.known.lock().remove(&(base.id, of.own));
            let theirs: Vec<FileKeys> =
                others.iter().flat_map(|other| other.files().map(|file| self.of(other, file))).collect();
            if theirs.iter().any(|other| other.own == of.own) {
                continue;
            }
            self.cache().remove_proof(&of.own);
            let verified = of.digest.is_some() && theirs.iter().any(|other| other.digest == of.digest);
            contents.remove(if verified { SharedCopies::Keep } else { SharedCopies::Drop });
        }
        self.copies.forget(base.id);
        self.kept.watcher.forget(&self.traffic(base));
        self.troubled.lock().remove(&base.id);
        self.events.forget(base.id);
    }

    /// The source of a file of a base that is read through the cache. Sends no request.
    ///
    /// # Errors
    /// For a file of this host that cannot be opened or is another file, when the cache does not have all of it.
    pub fn fetched(&self, base: &BaseRecord, file: &ImageFile) -> Result<Arc<LazySource>, SourceError> {
        let remote = self.open_remote(base, file)?;
        remote.give_up(base.options.given_up);
        Ok(self.lazy(base, file, remote))
    }

    fn lazy(&self, base: &BaseRecord, file: &ImageFile, remote: Arc<dyn RemoteSource>) -> Arc<LazySource> {
        let contents = self.contents(base, file);
        let of = *contents.file_keys();
        if base.options.retains() {
            contents.pin(true);
        }
        // Its list follows the options of the base.
        let further = self.copies.of(base.id, of.own).further.clone();
        let traffic = self.traffic(base);
        for key in std::iter::once(of.own).chain(of.digest) {
            self.kept.watcher.add(key, &traffic);
        }
        let mut known = self.known.lock();
        let known = known.entry((base.id, of.own)).or_insert_with(|| FileState {
            contents: contents.clone(),
            source: Weak::new(),
            remote: None,
        });
        if let Some(source) = known.source.upgrade() {
            return source;
        }
        let keep: Arc<dyn FetchCache> = match self.kept.cache.stats().limit_bytes {
            0 => Arc::new(NoCache),
            _ => contents,
        };
        let spawn = Arc::new(OnRuntime { handle: self.runtime.handle().clone(), lane: self.writers.clone() });
        let identity = Identity::Contents { size: of.size, key: of.own.0 };
        let (demand, patience) = (self.demand.clone(), self.timed_reads.clone());
        known.remote = Some(Arc::downgrade(&remote));
        let source = Arc::new(LazySource::new(remote, keep, spawn, identity, traffic, demand, patience));
        source.read_also(further);
        known.source = Arc::downgrade(&source);
        source
    }
}

impl Sources for HostSources {
    fn file(&self, path: &Path) -> Result<FileSource, SourceError> {
        FileSource::open_with(&*self.opener, path)
    }

    fn proven(&self, file: FileSource, proof: Option<&FileProof>) -> Result<Arc<dyn Source>, SourceError> {
        ProvenFile::wrap(&*self.opener, file, proof)
    }

    fn kept(&self, base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        Ok(self.fetched(base, file)?)
    }

    fn kept_bytes(&self, base: &BaseRecord, file: &ImageFile) -> u64 {
        self.contents(base, file).cached_bytes(Reach::Proven)
    }

    fn traffic(&self, base: &BaseRecord) -> Arc<Traffic> {
        self.events.base(base.id, &base.name)
    }
}

/// Runs work that may hang on a thread of its own, and tells it whether the caller still waits. Returns whether it
/// ended in time.
pub(super) fn within(limit: Duration, work: impl FnOnce(&AtomicBool) + Send + 'static) -> io::Result<bool> {
    let in_time = Arc::new(AtomicBool::new(true));
    let (say, ended) = std::sync::mpsc::channel();
    let told = in_time.clone();
    std::thread::Builder::new().name("cache-end".into()).spawn(move || {
        work(&told);
        let _ = say.send(());
    })?;
    let ended = ended.recv_timeout(limit).is_ok();
    in_time.store(ended, Ordering::Release);
    Ok(ended)
}
