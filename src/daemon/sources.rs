//! How the bytes of bases are got at: files of this host through the opener, everything else through the cache of fetched
//! blocks.
//!
//! What must hold: whatever has one identity has one place in the cache, however many bases are made of it; and nothing
//! here asks a server, so that bases can be attached while theirs is down.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};
use tokio::runtime::{Builder, Handle, Runtime};

use super::copy::CopiedFile;
use crate::base::lazy::{DemandBudget, Failing, Keep, KeepNothing, LazySource};
use crate::cache::disk::{
    CachedSource, DiskCache, EvictReason, Limits, SourceKey, Ticker, Watch, default_free_floor,
};
use crate::config::{Config, HttpConfig};
use crate::events::{Event, Events, Kind, Reason, Traffic};
use crate::format::record::{self, BaseRecord, Digest, ImageFile, Validator};
use crate::io::{HostMedium, Medium};
use crate::source::http::{
    Credentials, Http, HttpIdentity, HttpSource, Network, RemoteOptions, Strictness, UrlState,
};
use crate::source::{
    FileSource, Identity, OpenImage, RemoteSource, Source, SourceError, SourceErrorKind, Spawn, Stall,
    StallKind,
};
use crate::store::{Sources, why_changed};

/// Threads that drive requests, and those that wait for the cache's disk.
const THREADS: usize = 2;
const WRITERS: usize = 8;

/// Where network requests run.
#[derive(Clone)]
struct OnRuntime(Handle);

impl Spawn for OnRuntime {
    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        drop(self.0.spawn(future));
    }

    fn spawn_blocking(&self, job: Box<dyn FnOnce() + Send>) {
        drop(self.0.spawn_blocking(job));
    }
}

/// Which source, and for which base: two bases of the same contents share what is kept, and nothing else.
type Name = (u64, SourceKey);

/// `kept` stays attached while the base is known.
struct Known {
    source: Weak<LazySource>,
    /// What it reads from, when that is a server.
    http: Weak<HttpSource>,
    _kept: Arc<CachedSource>,
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
    /// Which bases a source is of.
    users: Mutex<HashMap<SourceKey, Vec<Arc<Traffic>>>>,
}

impl Watch for Watcher {
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
        let cache = DiskCache::open(Arc::new(medium), limits, watcher.clone());
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
    /// Bases of which it was told that they wait or fail, by number.
    troubled: Mutex<HashMap<u64, Troubled>>,
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
            .max_blocking_threads(WRITERS)
            .thread_name("net")
            .enable_all()
            .build()?;
        let http =
            Http::new(config, network, credentials, runtime.handle().clone()).map_err(io::Error::other)?;
        Ok(Self {
            opener,
            runtime,
            http,
            kept,
            events,
            known: Mutex::default(),
            demand: Arc::default(),
            troubled: Mutex::default(),
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

    /// What is kept of a file of a base, whether or not anybody has it attached.
    pub fn kept(&self, file: &ImageFile) -> Arc<CachedSource> {
        self.kept.cache.attach(key_of(file), file.identity.size)
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

    /// Makes what is kept durable.
    pub fn flush(&self) {
        if let Err(error) = self.kept.cache.flush() {
            tracing::warn!(%error, "what was fetched last may have to be fetched again");
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
        match self.http_sources(base.id, Some(key_of(file))).first() {
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
    pub fn forget(&self, base: &BaseRecord, others: &[&BaseRecord]) {
        let mut known = self.known.lock();
        let gone = known.extract_if(|(id, _), _| *id == base.id);
        let traffic = self.traffic(base);
        for ((_, key), _) in gone {
            if let Some(users) = self.kept.watcher.users.lock().get_mut(&key) {
                users.retain(|user| !Arc::ptr_eq(user, &traffic));
            }
        }
        drop(known);
        let files = |base: &BaseRecord| -> Vec<SourceKey> {
            std::iter::once(&base.image).chain(&base.backing).map(key_of).collect()
        };
        let kept: Vec<SourceKey> = others.iter().flat_map(|other| files(other)).collect();
        for key in files(base).into_iter().filter(|key| !kept.contains(key)) {
            self.kept.cache.remove(&key);
        }
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
                let original = self.original(file)?;
                let spawn = Arc::new(OnRuntime(self.runtime.handle().clone()));
                Arc::new(CopiedFile::new(&file.source, file.identity.size, original, spawn))
            }
        };
        Ok(self.lazy(base, file, remote, http))
    }

    /// The file of this host, which may be gone once all of it is here.
    fn original(&self, file: &ImageFile) -> Result<Option<Arc<FileSource>>, SourceError> {
        let opened = self.file(Path::new(&file.source)).and_then(|source| {
            match why_changed(file, source.identity()) {
                None => Ok(source),
                Some(why) => Err(SourceError::changed(&file.source, &why)),
            }
        });
        match opened {
            Ok(source) => Ok(Some(Arc::new(source))),
            Err(error) if self.kept(file).is_complete() => {
                tracing::debug!(%error, "a base is served from its copy");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn lazy(
        &self,
        base: &BaseRecord,
        file: &ImageFile,
        remote: Arc<dyn RemoteSource>,
        http: Weak<HttpSource>,
    ) -> Arc<LazySource> {
        let key = key_of(file);
        let mut known = self.known.lock();
        let name = (base.id, key);
        if let Some(source) = known.get(&name).and_then(|known| known.source.upgrade()) {
            return source;
        }
        let kept = self.kept.cache.attach(key, file.identity.size);
        if base.options.pinned || base.options.hydrate {
            kept.pin(true);
        }
        let keep: Arc<dyn Keep> = match self.kept.cache.stats().limit_bytes {
            0 => Arc::new(KeepNothing),
            _ => kept.clone(),
        };
        let traffic = self.traffic(base);
        self.kept.watcher.users.lock().entry(key).or_default().push(traffic.clone());
        let spawn = Arc::new(OnRuntime(self.runtime.handle().clone()));
        let identity = Identity::named(file.identity.size, key.0);
        let source = Arc::new(LazySource::new(remote, keep, spawn, identity, traffic, self.demand.clone()));
        known.insert(name, Known { source: Arc::downgrade(&source), http, _kept: kept });
        source
    }
}

impl Sources for HostSources {
    fn file(&self, path: &Path) -> Result<FileSource, SourceError> {
        FileSource::open_with(&*self.opener, path)
    }

    fn remote(&self, base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        Ok(self.fetched(base, file)?)
    }

    fn copied(&self, base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        Ok(self.fetched(base, file)?)
    }

    fn traffic(&self, base: &BaseRecord) -> Arc<Traffic> {
        self.events.base(base.id, &base.name)
    }
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

/// What two files have in common that have the same contents: the digest that the operator vouches for, with the size;
/// else where they come from and what tells when that changes.
pub fn key_of(file: &ImageFile) -> SourceKey {
    let mut sum = Sha256::new();
    let mut part = |bytes: &[u8]| {
        sum.update((bytes.len() as u64).to_le_bytes());
        sum.update(bytes);
    };
    let text = |text: &Option<String>| text.clone().unwrap_or_default();
    match (&file.identity.digest, &file.identity.validator) {
        (Some(Digest::Sha256(digest)), _) => {
            part(b"sha256");
            part(digest);
        }
        (Some(Digest::Sha512(digest)), _) => {
            part(b"sha512");
            part(digest);
        }
        (None, Validator::Http { etag, last_modified }) => {
            part(b"url");
            part(file.source.as_bytes());
            part(text(etag).as_bytes());
            part(text(last_modified).as_bytes());
        }
        (None, Validator::File { mtime_ns, inode }) => {
            part(b"file");
            part(file.source.as_bytes());
            part(&mtime_ns.to_le_bytes());
            part(&inode.to_le_bytes());
        }
    }
    part(&file.identity.size.to_le_bytes());
    SourceKey(sum.finalize().into())
}
