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
use crate::base::lazy::{Keep, KeepNothing, LazySource};
use crate::cache::disk::{
    CachedSource, DiskCache, EvictReason, Limits, SourceKey, Ticker, Watch, default_free_floor,
};
use crate::config::{Config, HttpConfig};
use crate::events::{Event, Events, Kind, Reason, Traffic};
use crate::format::record::{self, BaseRecord, Digest, ImageFile, Validator};
use crate::io::{HostMedium, Medium};
use crate::source::http::{Credentials, Http, HttpIdentity, Network, RemoteOptions, Strictness};
use crate::source::{
    FileSource, Identity, OpenImage, RemoteSource, Source, SourceError, SourceErrorKind, Spawn, Stall,
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

/// See the module.
pub struct HostSources {
    opener: Arc<dyn OpenImage>,
    runtime: Runtime,
    http: Arc<Http>,
    kept: Kept,
    events: Events,
    known: Mutex<HashMap<Name, Known>>,
    /// Bases that were told to wait, by number: their names, and since when.
    waiting: Mutex<HashMap<u64, (String, SystemTime)>>,
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
        Ok(Self { opener, runtime, http, kept, events, known: Mutex::default(), waiting: Mutex::default() })
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

    /// Tells which bases began to wait for their servers since the last time, which do not wait any more, and which
    /// failed. To be called now and then.
    pub fn tick(&self) {
        let known: Vec<(u64, Arc<LazySource>)> = {
            let known = self.known.lock();
            known.iter().filter_map(|((id, _), known)| Some((*id, known.source.upgrade()?))).collect()
        };
        let mut waiting = self.waiting.lock();
        let mut still = HashMap::new();
        for (id, source) in known {
            let name = source.base().to_owned();
            if let Some(stall) = source.stall() {
                if !waiting.contains_key(&id) && !still.contains_key(&id) {
                    let event = Event::of_base(Kind::BaseWaiting, &name).because(stall.why.clone());
                    self.events.emit(event.since(stall.since));
                }
                still.insert(id, (name.clone(), stall.since));
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
        for (id, (name, since)) in waiting.drain() {
            if !still.contains_key(&id) {
                self.events.emit(Event::of_base(Kind::BaseResumed, &name).since(since));
            }
        }
        *waiting = still;
    }

    /// Makes what is kept durable.
    pub fn flush(&self) {
        if let Err(error) = self.kept.cache.flush() {
            tracing::warn!(%error, "what was fetched last may have to be fetched again");
        }
    }

    /// Since when reads of a base wait for a server.
    pub fn stall(&self, base: u64) -> Option<Stall> {
        let known = self.known.lock();
        let sources = known.iter().filter(|((id, _), _)| *id == base);
        sources.filter_map(|(_, known)| known.source.upgrade()?.stall()).min_by_key(|stall| stall.since)
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
        let remote: Arc<dyn RemoteSource> = match &file.identity.validator {
            Validator::Http { etag, last_modified } => {
                let identity = HttpIdentity {
                    size: file.identity.size,
                    etag: etag.clone(),
                    last_modified: last_modified.clone(),
                };
                let urls: Vec<String> = std::iter::once(&file.source).chain(&file.mirrors).cloned().collect();
                self.http.open(&urls, identity, options_of(&base.options))
            }
            Validator::File { .. } => {
                let original = self.original(file)?;
                let spawn = Arc::new(OnRuntime(self.runtime.handle().clone()));
                Arc::new(CopiedFile::new(&file.source, file.identity.size, original, spawn))
            }
        };
        Ok(self.lazy(base, file, remote))
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

    fn lazy(&self, base: &BaseRecord, file: &ImageFile, remote: Arc<dyn RemoteSource>) -> Arc<LazySource> {
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
        let source = Arc::new(LazySource::new(remote, keep, spawn, identity, traffic));
        known.insert(name, Known { source: Arc::downgrade(&source), _kept: kept });
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
