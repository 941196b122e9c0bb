//! The worker: prepares what needs no store, waits until it is its turn, takes over the mount, serves it, and closes
//! the store when the mount is gone.

use std::backtrace::Backtrace;
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::panic::PanicHookInfo;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::callers::Asker;
use super::channel::{Channel, FromSupervisor, FromWorker, PROTOCOL, START_ENV, Start};
use super::precedence::{self, Preferred};
use super::{handover, home, kernel};
use crate::bases::Bases;
use crate::bases::hydrate::Hydrations;
use crate::bases::prefetch::Prefetcher;
use crate::bases::sources::{HostSources, Kept};
use crate::cache::{Adoption, BlockCache};
use crate::control::report::{Report, reason};
use crate::control::wire::Confinement;
use crate::control::{self, Control};
use crate::delta::Delta;
use crate::events::{Event, Events, Kind};
use crate::format::record::Superblock;
use crate::fuse::kernel::KernelNotifier;
use crate::fuse::session::FuseSession;
use crate::fuse::{self, Ownership, PlyFs};
use crate::io::{LiveArena, LiveDir, LiveStore, MapBounds, sys, unanswered};
use crate::sandbox::confine::{self, InForce, Policy};
use crate::sandbox::opener::Opener;
use crate::sandbox::secrets::Keeper;
use crate::serve::guard::{self, Guard};
use crate::serve::{self, Service, purge};
use crate::source::http::{Credentials, Network, NoCredentials, Proxies};
use crate::source::{OpenHere, OpenImage};
use crate::store::{IDLE, OPEN_IDLE, PreloadedRecords, Store};
use crate::trace::{AutoRecord, Limits};

/// How often the store does what it does once in a while.
const UPKEEP: Duration = Duration::from_millis(500);
/// How soon a standby worker reads the store's records, and how often it looks for those that changed; the latter takes
/// at most a hundredth of its time.
const FIRST_PRELOAD: Duration = Duration::from_secs(1);
const PRELOAD: Duration = Duration::from_secs(15);
const NAME: &CStr = c"plyfs-worker";

/// The hidden command `plyfs worker`.
pub fn worker_main() -> ExitCode {
    let Ok(json) = std::env::var(START_ENV) else {
        eprintln!("plyfs: the worker is started by `plyfs serve`; run that instead");
        return ExitCode::from(2);
    };
    sys::set_process_name(NAME);
    sys::unblock_signals();
    let start = match serde_json::from_str::<Start>(&json) {
        Ok(start) if start.protocol == PROTOCOL => start,
        other => return refuse(&json, other.err()),
    };
    if sys::die_with_parent(start.supervisor_pid).is_err() {
        return ExitCode::FAILURE;
    }
    let mut fds = vec![start.fuse, start.channel, start.listener, start.lock, start.cache];
    fds.extend(start.live);
    fds.extend(start.unanswered);
    let Ok(mut inherited) = sys::inherit_once(&fds) else { return ExitCode::FAILURE };
    let table = start.unanswered.and_then(|_| inherited.pop()).map(File::from);
    let live = start.live.and_then(|_| inherited.pop());
    let Ok([fuse, channel, listener, lock, cache]) = <[OwnedFd; 5]>::try_from(inherited) else {
        return ExitCode::FAILURE;
    };
    let channel = Arc::new(Channel(channel));
    let lock: Lock = Arc::new(Mutex::new(Some(lock)));
    end_at_panic(channel.clone());
    let ends = Ends { fuse, listener, table, lock: lock.clone() };
    let work = |preferred: &Preferred, confined| {
        let prepared = prepare(&start, cache, confined)?;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let said =
            channel.send(&FromWorker::Prepared { version, hand_over: handover::FORMAT, answers: true });
        said.map_err(|e| format!("the supervisor is gone: {e}"))?;
        loop {
            match channel.receive().map_err(|e| format!("what the supervisor says is not understood: {e}"))? {
                Some(FromSupervisor::Activate { report, fresh_mount }) => {
                    let turn = Turn { report, fresh_mount };
                    return serve(&start, turn, prepared, ends, &channel, preferred);
                }
                Some(
                    FromSupervisor::Report(_)
                    | FromSupervisor::Callers(_)
                    | FromSupervisor::Drain
                    | FromSupervisor::Pause
                    | FromSupervisor::GoOn
                    | FromSupervisor::Ping,
                ) => {}
                Some(FromSupervisor::Finish) | None => return Ok(()),
            }
        }
    };
    let done = confine(&start, live).and_then(|confined| {
        precedence::beside(|preferred| work(preferred, confined)).map_err(|e| format!("threads: {e}"))?
    });
    match done {
        Ok(()) => {
            closed(&start, &lock, &channel);
            ExitCode::SUCCESS
        }
        Err(why) => {
            tracing::error!(error = why, "the worker ends");
            let _ = channel.send(&FromWorker::Failed(reason(&why)));
            ExitCode::FAILURE
        }
    }
}

/// What the supervisor lends to the worker that serves.
struct Ends {
    fuse: OwnedFd,
    listener: OwnedFd,
    /// Where requests that are not answered are listed.
    table: Option<File>,
    lock: Lock,
}

/// The store's lock, as long as this process uses the store.
type Lock = Arc<Mutex<Option<OwnedFd>>>;

/// The store is closed: another daemon may use it from now on, although a thread of this process may wait in the kernel
/// for a file of a base and keep it from ending.
fn closed(start: &Start, lock: &Lock, channel: &Channel) {
    drop(lock.lock().take());
    if start.hears_closed {
        let _ = channel.send(&FromWorker::Closed);
    }
}

/// Tells a supervisor of another version that this program is not for it.
fn refuse(json: &str, error: Option<serde_json::Error>) -> ExitCode {
    let value: serde_json::Value = serde_json::from_str(json).unwrap_or_default();
    let protocol = &value["protocol"];
    let why = match error {
        Some(error) if *protocol == PROTOCOL => {
            format!("what the supervisor says is not understood: {error}")
        }
        _ => {
            format!("the supervisor speaks protocol {protocol}, this plyfs {PROTOCOL}; upgrade step by step")
        }
    };
    let channel = value["channel"].as_i64().and_then(|fd| i32::try_from(fd).ok());
    if let Some(Ok(mut fds)) = channel.map(|fd| sys::inherit_once(&[fd]))
        && let Some(channel) = fds.pop()
    {
        let channel = Channel(channel);
        let _ = channel.send(&FromWorker::Failed(why.clone()));
        // It ends with this process: the supervisor kills one that closes it and lives.
        std::mem::forget(channel);
    }
    eprintln!("plyfs: {why}");
    ExitCode::FAILURE
}

/// A panic that no request's guard catches ends the worker ([`guard`]): the next one takes over from state that is sound.
fn end_at_panic(channel: Arc<Channel>) {
    std::panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
        let payload = info.payload();
        let text = payload.downcast_ref::<&str>().copied();
        let text = text.or_else(|| payload.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic");
        let place = info.location().map_or_else(String::new, |at| format!(" at {}:{}", at.file(), at.line()));
        tracing::error!(backtrace = %Backtrace::force_capture(), "panicked{place}: {text}");
        let guard = guard::current();
        if guard != Guard::Recovers {
            let _ = channel.send(&FromWorker::Failed(reason(&format!("it panicked{place}: {text}"))));
        }
        if guard == Guard::None {
            std::process::abort();
        }
    }));
}

/// A name for the live maps of a store: of this store in this place, not of a copy of it.
pub fn live_dir_name(superblock: &Superblock, store: &std::path::Path) -> io::Result<String> {
    let meta = std::fs::metadata(store)?;
    let uuid: String = superblock.uuid[..4].iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!("plyfs-{uuid}-{}-{}", meta.dev(), meta.ino()))
}

/// What a standby worker has done before it is needed.
struct Prepared {
    cache: BlockCache,
    opener: Arc<dyn OpenImage>,
    live: LivePlace,
    confinement: InForce,
    /// How many it may have.
    descriptors: u64,
    /// What it has read of the store's records; read again once in a while, until it is its turn.
    records: Arc<Mutex<PreloadedRecords>>,
    web: Web,
    /// Asynchronous requests that the kernel sends at most.
    window: u16,
    kernel_release: String,
}

/// Where the live maps are.
enum LivePlace {
    /// In the arena that the supervisor holds.
    Arena(File, MapBounds),
    /// In files by name: the supervisor is of a version without an arena.
    Dir(PathBuf),
}

impl LivePlace {
    fn open(self) -> io::Result<(Arc<dyn LiveStore>, Option<LiveArena>)> {
        match self {
            Self::Arena(file, bounds) => {
                let arena = LiveArena::open(file, bounds)?;
                Ok((Arc::new(arena.clone()), Some(arena)))
            }
            Self::Dir(dir) => Ok((Arc::new(LiveDir::new(&dir)?), None)),
        }
    }
}

/// What bases on the network need, and what could not be had any more once the worker is confined.
struct Web {
    network: Network,
    credentials: Arc<dyn Credentials>,
}

/// What a worker is told when it is its turn.
struct Turn {
    report: Report,
    fresh_mount: bool,
}

/// What is left when the worker has given up its rights.
struct Confined {
    opener: Arc<dyn OpenImage>,
    live: LivePlace,
    in_force: InForce,
    web: Web,
    window: u16,
    kernel_release: String,
}

/// Gives up what serving does not need, before there is another thread. Another worker serves meanwhile: nothing of the
/// store, the live maps or the shared cache is changed here and in [`prepare`].
fn confine(start: &Start, live: Option<OwnedFd>) -> Result<Confined, String> {
    let config = &start.config;
    let protection = sys::protect();
    if start.warn && !protection.locked {
        tracing::warn!("memory is not locked (RLIMIT_MEMLOCK); under memory pressure disks may be slow");
    }
    Store::superblock(&config.store).map_err(|e| e.to_string())?;
    let live = match live {
        Some(arena) => LivePlace::Arena(arena.into(), home::bounds(config)),
        None => LivePlace::Dir(home::former_dir(config).map_err(|e| format!("the store: {e}"))?),
    };
    if start.probe {
        Store::probe(&config.store).map_err(|e| e.to_string())?;
        match &live {
            LivePlace::Arena(arena, _) => Delta::probe_arena(arena).map_err(|e| format!("live maps: {e}"))?,
            LivePlace::Dir(dir) => {
                Delta::probe_live(dir).map_err(|e| format!("live maps in {}: {e}", dir.display()))?;
            }
        }
    }
    let live_dir = match &live {
        LivePlace::Arena(..) => None,
        LivePlace::Dir(dir) => {
            LiveDir::beside(dir).map_err(|e| format!("memory for live maps: {e}"))?;
            Some(dir.as_path())
        }
    };
    // Before there is another thread, before anything that is not the opener's business is in memory, and before the
    // buffers that the kernel copies into are made: pages that two processes share fault when they are written (D2).
    let opener: Arc<dyn OpenImage> = if config.security.capabilities || config.security.landlock {
        Arc::new(Opener::start(config).map_err(|e| format!("starting the opener: {e}"))?)
    } else {
        Arc::new(OpenHere)
    };
    let keeper = Keeper::start(config).map_err(|e| format!("starting the keeper of secrets: {e}"))?;
    let web = Web {
        network: Network::prepare(&config.http, Proxies::from_variables(|name| std::env::var(name).ok())),
        credentials: match keeper {
            Some(keeper) => Arc::new(keeper),
            None => Arc::new(NoCredentials),
        },
    };
    let window = fuse::kernel::window();
    let kernel_release = kernel::release();
    precedence::take();
    serve::cache_processor_count();
    // Rights go before there is another thread; the standby worker already has what it keeps.
    let in_force = confine::apply(&Policy {
        security: &config.security,
        store: &config.store,
        live_dir,
        memory_locked: protection.locked,
        first: start.warn,
    });
    Ok(Confined { opener, live, in_force, web, window, kernel_release })
}

/// Does what takes time.
fn prepare(start: &Start, cache: OwnedFd, confined: Confined) -> Result<Prepared, String> {
    let config = &start.config;
    let Confined { opener, live, in_force: confinement, web, window, kernel_release } = confined;
    let cache =
        BlockCache::prepare(cache, config.cache_memory).map_err(|e| format!("memory for the cache: {e}"))?;
    let records = spawn_preload(config.store.clone()).map_err(|e| format!("threads: {e}"))?;
    let descriptors = sys::descriptor_limit();
    Ok(Prepared { cache, opener, live, confinement, descriptors, records, web, window, kernel_release })
}

/// What is in force, as `status` shows it.
fn shown(in_force: InForce) -> Confinement {
    let InForce { capabilities, landlock, seccomp, core_dumps, memory_locked } = in_force;
    Confinement { capabilities, landlock, seccomp, core_dumps, memory_locked: Some(memory_locked) }
}

/// The cache's contents may be what killed the workers before: those that die young start with an empty one.
fn adopt(cache: &BlockCache, report: &Report) {
    let doubtful = report.back_off_ms > 0;
    match if doubtful { cache.adopt_nothing() } else { cache.adopt() } {
        Adoption::Empty | Adoption::Kept => {}
        Adoption::Dropped => tracing::info!(doubtful, "the cache of the worker before is not used"),
        Adoption::Unusable(error) => tracing::error!(%error, "there is no memory for the cache"),
    }
}

fn serve(
    start: &Start,
    turn: Turn,
    prepared: Prepared,
    ends: Ends,
    channel: &Arc<Channel>,
    preferred: &Preferred,
) -> Result<(), String> {
    let Ends { fuse, listener, table, lock } = ends;
    let config = &start.config;
    let Prepared { cache, opener, live, confinement, descriptors, records, web, window, kernel_release } =
        prepared;
    let Web { network, credentials } = web;
    let events = Events::new();
    events.emit(Event::new(Kind::WorkerStarted));
    adopt(&cache, &turn.report);
    let live_dir = match &live {
        LivePlace::Arena(..) => None,
        LivePlace::Dir(dir) => Some(dir.clone()),
    };
    let (live, arena) = live.open().map_err(|e| format!("memory for live maps: {e}"))?;
    let live = |_: &Superblock| -> io::Result<Arc<dyn LiveStore>> { Ok(live) };
    let kept = Kept::open(config, &events).map_err(|e| format!("the cache of fetched blocks: {e}"))?;
    let sources = HostSources::new(opener, &config.http, &network, credentials, kept, events.clone());
    let sources = Arc::new(sources.map_err(|e| format!("threads: {e}"))?);
    // Waits for a look that has begun, which is no more than it would have to do itself.
    let known = std::mem::take(&mut *records.lock());
    drop(records);
    let store =
        Store::open_prepared(&config.store, live, Arc::new(cache), config.reserve, sources.clone(), known)
            .map_err(|e| e.to_string())?;
    store.attach_at_most(most_attached(descriptors));
    let store = Arc::new(store);
    let of = store.clone();
    let bases = move || of.bases().into_iter().map(|node| node.current()).collect();
    sources.settle_within(bases).map_err(|e| format!("threads: {e}"))?;
    let limits = Limits {
        idle: Duration::from_secs(config.trace.idle_seconds),
        longest: Duration::from_secs(config.trace.longest_seconds),
        ..Limits::default()
    };
    let automatic = if config.trace.auto { AutoRecord::Yes } else { AutoRecord::No };
    let tracer = store.trace(limits, automatic, events.clone());
    // Without a cache that keeps what is fetched early there is nothing to gain.
    if config.trace.prefetch && config.cache_disk != Some(0) {
        let prefetcher = Prefetcher::new(&store);
        tracer.prefetch_with(move |base| prefetcher.play(base));
    }
    if turn.fresh_mount {
        // Nobody has anything open.
        for node in store.unlinked() {
            store.purge(node.id()).unwrap_or_else(|error| tracing::error!(%error, "cleaning up"));
        }
    }
    let (uid, gid) = sys::effective_ids();
    let owner = Ownership { uid, gid, base_mode: config.base_mode, since_ns: start.since_ns };
    let inline = (config.fuse_threads / 2).max(1);
    let limits = serve::Limits::of_window(window);
    let clone = |fd: &OwnedFd| fd.try_clone().map_err(|e| format!("descriptors: {e}"));
    let notifier = Arc::new(KernelNotifier::new(clone(&fuse)?));
    let service = Service::new(store.clone(), config.io_threads, inline, limits)
        .map_err(|e| format!("threads: {e}"))?;
    let asker = Asker::new(channel.clone());
    asker.supervisor_answers(turn.report.answers_callers);
    let asking = asker.clone();
    service
        .watch_callers(Box::new(move |question| asking.ask(question)))
        .map_err(|e| format!("threads: {e}"))?;
    if let Some(table) = table {
        unanswered::list_in(&table).map_err(|e| format!("memory for the list of requests: {e}"))?;
    }
    let fs = PlyFs::new(service.clone(), owner, notifier.clone(), start.offers);
    let serving =
        FuseSession::new(fs, &fuse, config.fuse_threads).map_err(|e| format!("taking over: {e}"))?;
    drop(fuse);

    let hydrations = Hydrations::new(store.clone(), sources.clone(), events.clone(), config.hydrate.rate);
    let report = Arc::new(Mutex::new(turn.report));
    let drain = Arc::new(tokio::sync::Notify::new());
    let bases = Bases::new(
        store.clone(),
        sources.clone(),
        hydrations.clone(),
        config.mount.clone(),
        config.hydrate.auto,
    );
    let control = Control {
        store: store.clone(),
        service: service.clone(),
        notifier: notifier.clone(),
        daemon: channel.clone(),
        config: config.clone(),
        arena,
        supervisor_pid: start.supervisor_pid,
        report: report.clone(),
        since_ns: start.since_ns,
        confinement: shown(confinement),
        protocol: start.offers,
        kernel_release,
        events,
        bases,
        serving_since_ns: sys::now_ns(),
    };
    let drained = channel.clone();
    let drained = move || _ = drained.send(&FromWorker::Drained);
    control::spawn(control, listener, drain.clone(), drained).map_err(|e| format!("control socket: {e}"))?;
    spawn_ear(Ear {
        service,
        store: store.clone(),
        live_dir: live_dir.clone(),
        channel: channel.clone(),
        asker,
        report,
        drain,
        lock,
        hears_closed: start.hears_closed,
    })
    .map_err(|e| format!("threads: {e}"))?;
    if !turn.fresh_mount {
        spawn_reaper(store.clone(), notifier.clone()).map_err(|e| format!("threads: {e}"))?;
    }
    spawn_upkeep(store.clone()).map_err(|e| format!("threads: {e}"))?;
    hydrations.resume();
    channel.send(&FromWorker::Ready).map_err(|e| format!("the supervisor is gone: {e}"))?;
    let served =
        preferred.run(move || serving.run(&notifier)).unwrap_or_else(|| Err(io::ErrorKind::Other.into()));
    served.map_err(|e| format!("reading requests: {e}"))?;
    store.close().map_err(|e| e.to_string())?;
    sources.flush();
    // Empty after a clean close; left when it is not.
    let _ = live_dir.map(std::fs::remove_dir);
    Ok(())
}

/// Listens to the supervisor.
struct Ear {
    service: Service,
    store: Arc<Store>,
    live_dir: Option<PathBuf>,
    channel: Arc<Channel>,
    asker: Arc<Asker>,
    report: Arc<Mutex<Report>>,
    drain: Arc<tokio::sync::Notify>,
    lock: Lock,
    hears_closed: bool,
}

impl Ear {
    fn listen(self: &Arc<Self>) {
        loop {
            match self.channel.receive() {
                Ok(Some(FromSupervisor::Report(report))) => {
                    self.asker.supervisor_answers(report.answers_callers);
                    *self.report.lock() = report;
                }
                Ok(Some(FromSupervisor::Callers(answered))) => self.asker.hear(answered),
                Ok(Some(FromSupervisor::Drain)) => self.drain.notify_one(),
                Ok(Some(FromSupervisor::Pause)) => self.pause(),
                Ok(Some(FromSupervisor::GoOn)) => unanswered::go_on(),
                Ok(Some(FromSupervisor::Ping)) => {
                    let _ = self.channel.send(&FromWorker::Alive);
                }
                // Elsewhere: this process answers as long as it runs.
                Ok(Some(FromSupervisor::Finish)) => {
                    let ear = self.clone();
                    let finish = move || ear.finish();
                    if std::thread::Builder::new().name("closing".into()).spawn(finish).is_err() {
                        self.finish();
                    }
                }
                Ok(Some(FromSupervisor::Activate { .. })) => tracing::error!("told to take over twice"),
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::error!(%error, "what the supervisor says is not understood");
                }
                // The supervisor has ended, and this process is about to.
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Requests may take long to end: elsewhere.
    fn pause(&self) {
        let channel = self.channel.clone();
        let pause = move || {
            if unanswered::pause() {
                let _ = channel.send(&FromWorker::Paused);
            }
        };
        // Without a thread it does not pause, and the supervisor gives the upgrade up.
        if let Err(error) = std::thread::Builder::new().name("pausing".into()).spawn(pause) {
            tracing::error!(%error, "requests cannot be paused");
        }
    }

    /// Closes the store although files are open, and ends this process.
    fn finish(&self) -> ! {
        self.service.quiesce();
        let code = match self.store.close() {
            Ok(()) => {
                // Empty after a clean close.
                let _ = self.live_dir.as_ref().map(std::fs::remove_dir);
                drop(self.lock.lock().take());
                if self.hears_closed {
                    let _ = self.channel.send(&FromWorker::Closed);
                }
                0
            }
            Err(error) => {
                let _ = self.channel.send(&FromWorker::Failed(reason(&error.to_string())));
                1
            }
        };
        std::process::exit(code)
    }
}

fn spawn_ear(ear: Ear) -> io::Result<()> {
    let ear = Arc::new(ear);
    std::thread::Builder::new().name("supervisor".into()).spawn(move || ear.listen()).map(drop)
}

/// Reads the store's records, and those that changed again and again, until what it has is taken: so a takeover reads few,
/// however many disks there are.
fn spawn_preload(store: PathBuf) -> io::Result<Arc<Mutex<PreloadedRecords>>> {
    let records = Arc::new(Mutex::new(PreloadedRecords::default()));
    let taken = Arc::downgrade(&records);
    let read = move || {
        let mut pause = FIRST_PRELOAD;
        loop {
            std::thread::sleep(pause);
            let begun = Instant::now();
            let Some(records) = taken.upgrade() else { return };
            let mut records = records.lock();
            // What cannot be read is said by the worker that serves.
            let Ok(read) = PreloadedRecords::read(&store, std::mem::take(&mut *records)) else { return };
            *records = read;
            pause = PRELOAD.max(begun.elapsed() * 100);
        }
    };
    std::thread::Builder::new().name("preload".into()).spawn(read)?;
    Ok(records)
}

/// Descriptors for all but disks: requests' own, bases, the cache, connections.
const OTHER_DESCRIPTORS: u64 = 128;
/// Of an attached disk: data file, map file, live map, and one more while a map file is replaced.
const DISK_DESCRIPTORS: u64 = 4;
/// Each has mappings too, of which the kernel lets a process have 65,530.
const MOST_ATTACHED: u64 = 8192;

fn most_attached(descriptors: u64) -> usize {
    let for_disks = descriptors.saturating_sub(OTHER_DESCRIPTORS.min(descriptors / 2)) / DISK_DESCRIPTORS;
    for_disks.clamp(4, MOST_ATTACHED) as usize
}

/// What a store does once in a while, and what may wait for its medium.
fn spawn_upkeep(store: Arc<Store>) -> io::Result<()> {
    let keep_up = move || {
        while !store.is_closing() {
            store.retry_unread();
            store.detach_idle(IDLE, OPEN_IDLE);
            store.tend_maps();
            std::thread::sleep(UPKEEP);
        }
    };
    std::thread::Builder::new().name("upkeep".into()).spawn(keep_up).map(drop)
}

/// Once: from now on the kernel tells this worker.
fn spawn_reaper(store: Arc<Store>, notifier: Arc<KernelNotifier>) -> io::Result<()> {
    let reap = move || purge::reap(&store, &*notifier);
    std::thread::Builder::new().name("reaper".into()).spawn(reap).map(drop)
}
