//! How the bytes of bases are got at: files of this host through the opener, everything else through the cache of fetched
//! blocks.
//!
//! What must hold: a base is given what was fetched for it, or what was compared with its digest (`keys`,
//! `fetch::kept::contents`); and nothing here asks a server, so that bases can be attached while theirs is down (D43).

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

use super::copy::CopiedFile;
use super::keys::{keys_of, older_key};
use super::lane::Lane;
use crate::config::{Config, HttpConfig};
use crate::events::{Event, Events, Kind, Reason, Traffic};
use crate::fetch::kept::{
    CacheObserver, Contents, DiskCache, EvictReason, FileKeys, Limits, OnDamage, Reach, SharedCopies,
    SourceKey, Ticker, default_free_floor,
};
use crate::fetch::{DemandBudget, Failing, FetchCache, LazySource, NoCache, TimedReads};
use crate::format::record::{self, BaseRecord, ImageFile, Validator};
use crate::io::{HostMedium, Medium};
use crate::source::http::{
    Credentials, Http, HttpIdentity, HttpSource, Network, RemoteOptions, Strictness, UrlState,
};
use crate::source::{
    FileSource, Identity, OpenImage, RemoteSource, Source, SourceError, SourceErrorKind, Spawn, Stall,
    StallKind,
};
use crate::store::{Sources, why_changed};

/// Threads that drive requests; those that wait for the cache's disk; those that read one file that is copied; and all
/// that wait, for credentials too.
const THREADS: usize = 2;
const WRITERS: usize = 8;
const READERS: usize = 4;
const CACHE_READERS: usize = 16;
/// How long the start of a worker, and its end, wait for the cache's disk.
const SETTLING: Duration = Duration::from_secs(1);
const LAST_FLUSH: Duration = Duration::from_secs(30);
const WAITING: usize = 256;

/// Where network requests run.
#[derive(Clone)]
struct OnRuntime {
    handle: Handle,
    lane: Arc<Lane>,
}

impl Spawn for OnRuntime {
    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        drop(self.handle.spawn(future));
    }

    fn spawn_blocking(&self, job: Box<dyn FnOnce() + Send>) {
        self.lane.run(job);
    }
}

/// Which source, and for which base: two bases of the same contents share what is kept, and nothing else.
type Name = (u64, SourceKey);

/// What is known of a file of a base, as long as the base is.
struct Known {
    contents: Arc<Contents>,
    source: Weak<LazySource>,
    /// What it reads from, when that is a server.
    http: Weak<HttpSource>,
}

/// The cache of fetched blocks, with what tells everybody how it is.
pub struct Kept {
    cache: Arc<DiskCache>,
    watcher: Arc<Watcher>,
    /// Ticks as long as it is there.
    _ticker: Ticker,
}

/// Tells of evictions and failures of the cache.
struct Watcher {
    events: Events,
    /// Which bases a source is of, by its own key or that of its contents.
    users: Mutex<HashMap<SourceKey, Vec<Arc<Traffic>>>>,
}

impl Watcher {
    /// A base is told of what happens to a source: once, however often it is attached.
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
                tracing::error!(why, "fetched blocks are not kept");
                Event::new(Kind::CacheDegraded).because(why.to_owned())
            }
            None => {
                tracing::info!("fetched blocks are kept again");
                Event::new(Kind::CacheRecovered)
            }
        };
        self.events.emit(event);
    }
}

impl Kept {
    /// In the store, on its filesystem but outside of what is reserved there.
    ///
    /// # Errors
    /// When the store cannot be opened, or there is no thread.
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
        Ok(Self { cache, watcher, _ticker })
    }
}

/// How the servers of a base are.
#[derive(Clone, Debug, Default)]
pub struct BaseHealth {
    /// Since when reads wait, and why.
    pub stall: Option<Stall>,
    /// Since when readers are told errors, and the last of them.
    pub failing: Option<Failing>,
    /// Its URLs, once it was read.
    pub urls: Vec<UrlState>,
}

/// A base whose reads wait or fail.
#[derive(Clone)]
struct Troubled {
    name: String,
    since: SystemTime,
    /// Whether it was said that it has changed.
    changed: bool,
}

/// See the module.
pub struct HostSources {
    opener: Arc<dyn OpenImage>,
    runtime: Runtime,
    http: Arc<Http>,
    kept: Kept,
    events: Events,
    known: Mutex<HashMap<Name, Known>>,
    /// What readers of all sources have under way.
    demand: Arc<DemandBudget>,
    /// What waits for the disk under the cache.
    writers: Arc<Lane>,
    /// Reads of the cache that have to wait for its disk.
    timed_reads: Arc<TimedReads>,
    /// Bases of which it was told that they wait or fail, by number.
    troubled: Mutex<HashMap<u64, Troubled>>,
    /// Numbers of bases of version 0.1.0 whose contents must not be lost, ascending.
    inherited: OnceLock<Vec<u64>>,
}

impl HostSources {
    /// Starts threads.
    ///
    /// # Errors
    /// When there are none to be had.
    pub fn new(
        opener: Arc<dyn OpenImage>,
        config: &HttpConfig,
        network: &Network,
        credentials: Arc<dyn Credentials>,
        kept: Kept,
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
            opener,
            runtime,
            http,
            kept,
            events,
            known: Mutex::default(),
            demand: Arc::default(),
            writers: Lane::new("cache-write", WRITERS),
            timed_reads: TimedReads::new(Arc::new(OnRuntime {
                lane: Lane::new("cache-read", CACHE_READERS),
                handle,
            })),
            troubled: Mutex::default(),
            inherited: OnceLock::new(),
        })
    }

    /// To ask servers.
    pub fn http(&self) -> &Arc<Http> {
        &self.http
    }

    /// Where to wait for them.
    pub fn handle(&self) -> &Handle {
        self.runtime.handle()
    }

    /// The cache of fetched blocks.
    pub fn cache(&self) -> &Arc<DiskCache> {
        &self.kept.cache
    }

    /// Settles what an earlier worker left, with the bases as they are. To be called once, before any is attached. When
    /// the cache's disk does not answer, disks are served without it, and the rest is done when it does (D62).
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
            tracing::error!("the cache's disk does not answer; disks are served without it until it does");
        }
        Ok(())
    }

    /// `in_time`: no base was changed since they were listed.
    fn settle(&self, bases: &[BaseRecord], in_time: &AtomicBool) {
        let cache = &self.kept.cache;
        let candidates = || -> Vec<u64> {
            let own = |base| files(base).map(move |file| keys_of(base, file, false).own);
            let owned: HashSet<SourceKey> = bases.iter().flat_map(own).collect();
            let older = |file: &ImageFile| {
                let key = older_key(file);
                let kept = cache.find(&key).is_some() || cache.trouble(&key).is_some();
                kept && file.identity.digest.is_none() && !owned.contains(&key)
            };
            bases.iter().filter(|base| wants(base) && files(base).any(older)).map(|base| base.id).collect()
        };
        let inherited = cache.inherited(candidates).unwrap_or_else(|error| {
            tracing::error!(%error, "the list of bases with contents of an older version cannot be read");
            candidates()
        });
        let _ = self.inherited.set(inherited);
        let all = |base| files(base).map(move |file| self.contents(base, file));
        let precious = bases.iter().filter(|base| wants(base)).flat_map(all);
        let keys = precious.flat_map(|contents| {
            let of = *contents.file_keys();
            [Some(of.own), of.digest].into_iter().flatten().map(move |key| (key, of.size))
        });
        cache.settle_damaged(&keys.collect::<Vec<_>>());
        let mut pinned = Vec::new();
        for base in bases {
            for contents in all(base) {
                contents.adopt_verified();
                if wants(base) {
                    contents.pin(true);
                    pinned.extend(contents.keys());
                }
            }
        }
        // It may want to be kept since; the next worker looks again.
        if !in_time.load(Ordering::Acquire) {
            return;
        }
        // Of bases that are gone, or that want nothing kept any more.
        let pinned: HashSet<SourceKey> = pinned.into_iter().collect();
        for source in cache.sources().into_iter().filter(|source| !pinned.contains(source.key())) {
            source.unpin();
        }
    }

    /// What is kept of a file of a base, attached or not.
    pub fn contents(&self, base: &BaseRecord, file: &ImageFile) -> Arc<Contents> {
        let of = self.of(base, file);
        let mut known = self.known.lock();
        let known = known.entry((base.id, of.own)).or_insert_with(|| Known {
            contents: self.kept.cache.contents(of),
            source: Weak::new(),
            http: Weak::new(),
        });
        known.contents.clone()
    }

    /// What a file of a base is called in the cache.
    fn of(&self, base: &BaseRecord, file: &ImageFile) -> FileKeys {
        let inherited = self.inherited.get().is_some_and(|bases| bases.binary_search(&base.id).is_ok());
        keys_of(base, file, inherited)
    }

    /// Whether others than `base` want kept what it has in common with them.
    pub fn shares(&self, base: &BaseRecord, file: &ImageFile, others: &[BaseRecord]) -> SharedCopies {
        let of = self.of(base, file);
        let wanted = others.iter().filter(|other| wants(other)).any(|other| {
            let same = |file| {
                let other = self.of(other, file);
                other.own == of.own || (of.digest.is_some() && other.digest == of.digest)
            };
            files(other).any(same)
        });
        if wanted { SharedCopies::Keep } else { SharedCopies::Drop }
    }

    /// Drops what is kept of a file of a base, but for what others want kept. Returns bytes.
    pub fn evict(&self, base: &BaseRecord, file: &ImageFile, others: &[BaseRecord]) -> u64 {
        let of = self.of(base, file);
        let theirs: Vec<FileKeys> = others
            .iter()
            .filter(|other| wants(other))
            .flat_map(|other| files(other).map(|file| self.of(other, file)))
            .collect();
        if theirs.iter().any(|other| other.own == of.own) {
            return 0;
        }
        let verified = of.digest.is_some() && theirs.iter().any(|other| other.digest == of.digest);
        let shares = if verified { SharedCopies::Keep } else { SharedCopies::Drop };
        self.contents(base, file).evict(EvictReason::Asked, shares)
    }

    /// What is under way for a base is given to those who wait for it, and not kept.
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

    /// Tells which bases began to wait for their servers since the last time, which have other objects there, which
    /// failed, and which work again. To be called now and then.
    pub fn tick(&self) {
        let known: Vec<(u64, Arc<LazySource>)> = {
            let known = self.known.lock();
            known.iter().filter_map(|((id, _), known)| Some((*id, known.source.upgrade()?))).collect()
        };
        let mut troubled = self.troubled.lock();
        let mut still: HashMap<u64, Troubled> = HashMap::new();
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
                still.insert(id, Troubled { name: name.clone(), since, changed });
            } else if let Some(failing) = &failing {
                // It has not resumed because its readers were told an error.
                let before = troubled.get(&id).cloned();
                let now = Troubled { name: name.clone(), since: failing.since, changed: false };
                still.entry(id).or_insert_with(|| before.unwrap_or(now));
            }
            if let Some(error) = source.take_failure() {
                let kind = match error.kind() {
                    SourceErrorKind::Changed => Kind::BaseChanged,
                    _ => Kind::BaseError,
                };
                tracing::error!(base = name, %error, "a base cannot be read");
                self.events.emit(Event::of_base(kind, &name).because(error.to_string()));
            }
        }
        for (id, Troubled { name, since, .. }) in troubled.drain() {
            if !still.contains_key(&id) {
                self.events.emit(Event::of_base(Kind::BaseResumed, &name).since(since));
            }
        }
        *troubled = still;
    }

    /// Makes what is kept durable, if the cache's disk answers.
    pub fn flush(&self) {
        let cache = self.cache().clone();
        let flush = move |_: &AtomicBool| {
            if let Err(error) = cache.flush() {
                tracing::warn!(%error, "what was fetched last may have to be fetched again");
            }
        };
        if !within(LAST_FLUSH, flush).unwrap_or(true) {
            tracing::error!(
                "the cache's disk does not answer; what was fetched last may have to be fetched again"
            );
        }
    }

    /// How the servers of a base are.
    pub fn health(&self, base: u64) -> BaseHealth {
        let known = self.known.lock();
        let known: Vec<_> = known.iter().filter(|((id, _), _)| *id == base).collect();
        let sources: Vec<_> = known.iter().filter_map(|(_, known)| known.source.upgrade()).collect();
        let stalls = sources.iter().filter_map(|source| source.stall());
        let failing = sources.iter().filter_map(|source| source.failing());
        let urls = known.iter().filter_map(|(_, known)| known.http.upgrade());
        BaseHealth {
            // Another object says more than a longer wait.
            stall: stalls.min_by_key(|stall| (stall.kind != StallKind::Changed, stall.since)),
            failing: failing.min_by_key(|failing| failing.since),
            urls: urls.flat_map(|source| source.urls()).collect(),
        }
    }

    /// Whether what is kept of a file begins with other bytes than `head`.
    pub fn differs(&self, base: &BaseRecord, file: &ImageFile, head: &[u8]) -> Result<bool, SourceError> {
        let source = self.fetched(base, file)?;
        let mut kept = vec![0; head.len()];
        Ok(source.read_kept(&mut kept, 0) && kept != head)
    }

    /// A file of a base is at these URLs from now on. Reads that wait go on there.
    ///
    /// # Errors
    /// `Protocol`, when one of them is no URL.
    pub fn set_urls(&self, base: &BaseRecord, file: &ImageFile, urls: &[String]) -> Result<(), SourceError> {
        match self.http_sources(base.id, Some(self.of(base, file).own)).first() {
            Some(source) => source.set_urls(urls),
            // Not open: it is opened there.
            None => Ok(()),
        }
    }

    /// Ends all reads of a base that wait for its servers, now and from now on; or no longer.
    pub fn give_up(&self, base: u64, given_up: bool) {
        self.http_sources(base, None).iter().for_each(|source| source.give_up(given_up));
    }

    fn http_sources(&self, base: u64, key: Option<SourceKey>) -> Vec<Arc<HttpSource>> {
        let known = self.known.lock();
        let wanted = |(id, own): &Name| *id == base && key.is_none_or(|key| key == *own);
        let known = known.iter().filter(|(name, _)| wanted(name));
        known.filter_map(|(_, known)| known.http.upgrade()).collect()
    }

    /// A base is gone. What is kept of it goes too, unless it is another's as well.
    pub fn forget(&self, base: &BaseRecord, others: &[BaseRecord]) {
        for file in files(base) {
            let of = self.of(base, file);
            let contents = self.contents(base, file);
            self.known.lock().remove(&(base.id, of.own));
            let theirs: Vec<FileKeys> =
                others.iter().flat_map(|other| files(other).map(|file| self.of(other, file))).collect();
            if theirs.iter().any(|other| other.own == of.own) {
                continue;
            }
            let verified = of.digest.is_some() && theirs.iter().any(|other| other.digest == of.digest);
            contents.remove(if verified { SharedCopies::Keep } else { SharedCopies::Drop });
        }
        self.kept.watcher.forget(&self.traffic(base));
        self.troubled.lock().remove(&base.id);
        self.events.forget(base.id);
    }

    /// The bytes of a file of a base, of which blocks are kept. Asks no server.
    ///
    /// # Errors
    /// Of a file of this host: when it cannot be opened or is another one, and not all of it is here.
    pub fn fetched(&self, base: &BaseRecord, file: &ImageFile) -> Result<Arc<LazySource>, SourceError> {
        let mut http = Weak::new();
        let remote: Arc<dyn RemoteSource> = match &file.identity.validator {
            Validator::Http { etag, last_modified } => {
                let identity = HttpIdentity {
                    size: file.identity.size,
                    etag: etag.clone(),
                    last_modified: last_modified.clone(),
                };
                let source = self.http.open(&base.urls_of(file), identity, options_of(&base.options));
                source.give_up(base.options.given_up);
                http = Arc::downgrade(&source);
                source
            }
            Validator::File { .. } => {
                let original = self.original(base, file)?;
                // Its filesystem may hang: it has threads of its own.
                let handle = self.runtime.handle().clone();
                let spawn = Arc::new(OnRuntime { lane: Lane::new("copy", READERS), handle });
                let (opener, wanted) = (self.opener.clone(), file.clone());
                let open = Box::new(move || open_original(&*opener, &wanted).ok().map(Arc::new));
                Arc::new(CopiedFile::new(&file.source, file.identity.size, original, open, spawn))
            }
        };
        Ok(self.lazy(base, file, remote, http))
    }

    /// The file of this host, which may be gone once all of it is here.
    fn original(&self, base: &BaseRecord, file: &ImageFile) -> Result<Option<Arc<FileSource>>, SourceError> {
        match open_original(&*self.opener, file) {
            Ok(source) => Ok(Some(Arc::new(source))),
            // Whether all of a large one is here is not known at once; what is not will be said by the read.
            Err(error) if self.may_be_complete(base, file) => {
                tracing::debug!(%error, "a base is served from its copy");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn may_be_complete(&self, base: &BaseRecord, file: &ImageFile) -> bool {
        let contents = self.contents(base, file);
        !contents.is_known() || contents.is_complete(Reach::Proven)
    }

    fn lazy(
        &self,
        base: &BaseRecord,
        file: &ImageFile,
        remote: Arc<dyn RemoteSource>,
        http: Weak<HttpSource>,
    ) -> Arc<LazySource> {
        let contents = self.contents(base, file);
        let of = *contents.file_keys();
        if base.options.pinned || base.options.hydrate {
            contents.pin(true);
        }
        let traffic = self.traffic(base);
        for key in std::iter::once(of.own).chain(of.digest) {
            self.kept.watcher.add(key, &traffic);
        }
        let mut known = self.known.lock();
        let known = known.entry((base.id, of.own)).or_insert_with(|| Known {
            contents: contents.clone(),
            source: Weak::new(),
            http: Weak::new(),
        });
        if let Some(source) = known.source.upgrade() {
            return source;
        }
        let keep: Arc<dyn FetchCache> = match self.kept.cache.stats().limit_bytes {
            0 => Arc::new(NoCache),
            _ => contents,
        };
        let spawn = Arc::new(OnRuntime { handle: self.runtime.handle().clone(), lane: self.writers.clone() });
        let identity = Identity::named(of.size, of.own.0);
        let (demand, patience) = (self.demand.clone(), self.timed_reads.clone());
        let source = Arc::new(LazySource::new(remote, keep, spawn, identity, traffic, demand, patience));
        known.http = http;
        known.source = Arc::downgrade(&source);
        source
    }
}

impl HostSources {
    /// A file of this host, when it is what was registered.
    ///
    /// # Errors
    /// When it cannot be opened; `Changed` when it is another one.
    pub fn original_of(&self, file: &ImageFile) -> Result<FileSource, SourceError> {
        open_original(&*self.opener, file)
    }
}

impl Sources for HostSources {
    fn file(&self, path: &Path) -> Result<FileSource, SourceError> {
        FileSource::open_with(&*self.opener, path)
    }

    fn kept(&self, base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        Ok(self.fetched(base, file)?)
    }

    fn traffic(&self, base: &BaseRecord) -> Arc<Traffic> {
        self.events.base(base.id, &base.name)
    }
}

/// Runs what may hang on a thread of its own, which is told whether it is still waited for. Whether it ended in time.
fn within(limit: Duration, work: impl FnOnce(&AtomicBool) + Send + 'static) -> io::Result<bool> {
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

/// A file of this host, when it is what was registered.
fn open_original(opener: &dyn OpenImage, file: &ImageFile) -> Result<FileSource, SourceError> {
    let source = FileSource::open_with(opener, Path::new(&file.source))?;
    match why_changed(file, source.identity()) {
        None => Ok(source),
        Some(why) => Err(SourceError::changed(&file.source, &why)),
    }
}

/// The image and what is below it.
fn files(base: &BaseRecord) -> impl Iterator<Item = &ImageFile> {
    base.files()
}

/// Whether what is kept of a base is to stay.
fn wants(base: &BaseRecord) -> bool {
    base.options.pinned || base.options.hydrate
}

/// How a base wants its servers to be asked.
pub fn options_of(options: &record::BaseOptions) -> RemoteOptions {
    RemoteOptions {
        strictness: match options.strictness {
            record::Strictness::Strong => Strictness::Strong,
            record::Strictness::Weak => Strictness::Weak,
            record::Strictness::SizeOnly => Strictness::SizeOnly,
        },
        deadline: (options.deadline_s > 0).then(|| Duration::from_secs(options.deadline_s.into())),
        max_requests: (options.max_requests > 0).then_some(options.max_requests),
        max_rate: (options.max_rate > 0).then_some(options.max_rate),
    }
}
