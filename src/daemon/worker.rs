//! The worker does the work that needs no store, waits for `Activate`, takes over the mount, serves it, and closes the
//! store when the mount is gone.

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
use std::time::Duration;

use parking_lot::Mutex;

use super::callers::CallersClient;
use super::channel::{Channel, FromSupervisor, FromWorker, PROTOCOL, START_ENV, Start};
use super::keys::HelperSecrets;
use super::preload::spawn_preload;
use super::retention::Retention;
use super::upkeep::spawn_upkeep;
use super::{descriptors, handover, home, kernel, metrics_socket, page_socket};
use crate::bases::Bases;
use crate::bases::copies::Keeper;
use crate::bases::hydrate::Hydrations;
use crate::bases::prefetch::Prefetcher;
use crate::bases::sources::{HostSources, OpenCache};
use crate::cache::{Adoption, BlockCache};
use crate::control::metrics::listen::MetricsSocket;
use crate::control::notify::{self, Destination, Notifications};
use crate::control::page::{self, PageSocket};
use crate::control::report::{Report, reason};
use crate::control::wire::Confinement;
use crate::control::{self, Control};
use crate::delta::Delta;
use crate::disks::DiskJobs;
use crate::events::{Event, Events, HURRIED_DELIVERIES, LAST_DELIVERIES};
use crate::format::record::Superblock;
use crate::fuse::kernel::KernelNotifier;
use crate::fuse::session::FuseSession;
use crate::fuse::{self, Ownership, PlyFs};
use crate::io::{LiveArena, LiveDir, LiveStore, MapBounds, close_replaced_elsewhere, sys, unanswered};
use crate::peers;
use crate::sandbox::confine::{self, ActiveMeasures, Policy};
use crate::sandbox::notifier::NotifyHelper;
use crate::sandbox::opener::Opener;
use crate::sandbox::secrets::CredentialHelper;
use crate::serve::guard::{self, Guard};
use crate::serve::{self, Service};
use crate::source::http::{Credentials, Network, NoCredentials, Proxies};
use crate::source::{OpenHere, OpenImage};
use crate::store::pools::HostPools;
use crate::store::{PreloadedRecords, Store};
use crate::trace::{AutoRecord, Limits};

const NAME: &CStr = c"plyfs-worker";

/// The hidden command `plyfs worker`.
pub fn worker_main() -> ExitCode {
    let Ok(json) = std::env::var(START_ENV) else {
        eprintln!("plyfs: `plyfs worker` is started by the daemon only; run `plyfs serve` instead");
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
    fds.extend(start.page);
    fds.extend(start.export);
    let Ok(mut inherited) = sys::inherit_once(&fds) else { return ExitCode::FAILURE };
    let export = start.export.and_then(|_| inherited.pop());
    let page = start.page.and_then(|_| inherited.pop());
    let table = start.unanswered.and_then(|_| inherited.pop()).map(File::from);
    let live = start.live.and_then(|_| inherited.pop());
    let Ok([fuse, channel, listener, lock, cache]) = <[OwnedFd; 5]>::try_from(inherited) else {
        return ExitCode::FAILURE;
    };
    let channel = Arc::new(Channel(channel));
    let lock: Lock = Arc::new(Mutex::new(Some(lock)));
    end_at_panic(channel.clone());
    let descriptors = ServingDescriptors { fuse, listener, page, export, table, lock: lock.clone() };
    let work = |confined| {
        let prepared = prepare(&start, cache, confined)?;
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let sent =
            channel.send(&FromWorker::Prepared { version, hand_over: handover::FORMAT, answers: true });
        sent.map_err(|e| format!("cannot reach the supervisor: {e}"))?;
        loop {
            match channel.receive().map_err(|e| format!("cannot decode a message of the supervisor: {e}"))? {
                Some(FromSupervisor::Activate { report, fresh_mount }) => {
                    let activation = Activation { report, fresh_mount };
                    return serve(&start, activation, prepared, descriptors, &channel);
                }
                Some(
                    FromSupervisor::Report(_)
                    | FromSupervisor::Callers(_)
                    | FromSupervisor::Drain
                    | FromSupervisor::Pause
                    | FromSupervisor::Continue
                    | FromSupervisor::Ping,
                ) => {}
                Some(FromSupervisor::Finish) | None => return Ok(()),
            }
        }
    };
    match confine(&start, live).and_then(work) {
        Ok(()) => {
            release_store(&start, &lock, &channel);
            ExitCode::SUCCESS
        }
        Err(why) => {
            tracing::error!(error = why, "the worker ends");
            let _ = channel.send(&FromWorker::Failed(reason(&why)));
            ExitCode::FAILURE
        }
    }
}

fn no_thread(error: io::Error) -> String {
    format!("cannot start a thread: {error}")
}

/// Descriptors of the supervisor that only the serving worker uses.
struct ServingDescriptors {
    fuse: OwnedFd,
    listener: OwnedFd,
    /// The listening socket of the status page, when there is one.
    page: Option<OwnedFd>,
    /// The listening socket for other hosts, when there is one.
    export: Option<OwnedFd>,
    /// Where requests that are not answered are listed.
    table: Option<File>,
    lock: Lock,
}

/// The store's lock; `None` once this process no longer uses the store.
type Lock = Arc<Mutex<Option<OwnedFd>>>;

/// Releases the lock of the closed store. Another daemon may use the store from now on, even when a thread of this
/// process waits in the kernel for a file of a base and keeps the process from ending.
fn release_store(start: &Start, lock: &Lock, channel: &Channel) {
    drop(lock.lock().take());
    if start.hears_closed {
        let _ = channel.send(&FromWorker::Closed);
    }
}

/// Tells a supervisor of another version why this program cannot be its worker.
fn refuse(json: &str, error: Option<serde_json::Error>) -> ExitCode {
    let value: serde_json::Value = serde_json::from_str(json).unwrap_or_default();
    let protocol = &value["protocol"];
    let why = match error {
        Some(error) if *protocol == PROTOCOL => {
            format!("cannot decode the parameters of the supervisor: {error}")
        }
        _ => {
            format!(
                "the supervisor speaks protocol {protocol}, this plyfs speaks {PROTOCOL}; upgrade release by release"
            )
        }
    };
    let channel = value["channel"].as_i64().and_then(|fd| i32::try_from(fd).ok());
    if let Some(Ok(mut fds)) = channel.map(|fd| sys::inherit_once(&[fd]))
        && let Some(channel) = fds.pop()
    {
        let channel = Channel(channel);
        let _ = channel.send(&FromWorker::Failed(why.clone()));
        // The channel stays open until this process ends, because the supervisor kills a worker that closes it earlier.
        std::mem::forget(channel);
    }
    eprintln!("plyfs: {why}");
    ExitCode::FAILURE
}

/// Makes a panic that no request's guard catches end the worker ([`guard`]). The next worker takes over from sound
/// state.
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

/// The name of the live maps of a store. It identifies the store by its place too, so a copy of the store has another
/// name.
pub fn live_dir_name(superblock: &Superblock, store: &std::path::Path) -> io::Result<String> {
    let meta = std::fs::metadata(store)?;
    let uuid = hex::encode(&superblock.uuid[..4]);
    Ok(format!("plyfs-{uuid}-{}-{}", meta.dev(), meta.ino()))
}

/// The state of a standby worker before it is activated.
struct Prepared {
    cache: BlockCache,
    opener: Arc<dyn OpenImage>,
    pools: HostPools,
    live: LiveMapLocation,
    confinement: ActiveMeasures,
    /// The process's limit of descriptors.
    descriptor_limit: u64,
    /// The store's records as last read. They are read again periodically until the worker is activated.
    records: Arc<Mutex<PreloadedRecords>>,
    web: WebAccess,
    /// Where metrics are served.
    metrics: Option<MetricsSocket>,
    /// Most asynchronous requests that the kernel sends at a time.
    window: u16,
    kernel_release: String,
}

/// Where the live maps are.
enum LiveMapLocation {
    /// In the arena that the supervisor holds.
    Arena(File, MapBounds),
    /// In named files: the supervisor is of a version without an arena.
    Dir(PathBuf),
}

impl LiveMapLocation {
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

/// The parts that bases on the network need and that a confined worker could not create.
struct WebAccess {
    network: Network,
    credentials: Arc<dyn Credentials>,
    /// Reads the secrets of encrypted disks.
    secrets: HelperSecrets,
    /// Runs the operator's command for events.
    notifier: Option<NotifyHelper>,
    page: Option<PageSocket>,
}

/// The parameters of `Activate`.
struct Activation {
    report: Report,
    fresh_mount: bool,
}

/// The state of a worker that has given up its rights.
struct Confined {
    opener: Arc<dyn OpenImage>,
    /// The directories of pools, opened while the process had the right.
    pools: HostPools,
    live: LiveMapLocation,
    in_force: ActiveMeasures,
    web: WebAccess,
    metrics: Option<MetricsSocket>,
    window: u16,
    kernel_release: String,
}

/// Gives up the rights that serving does not need, before the process has another thread. Another worker serves
/// meanwhile, so this function and [`prepare`] change neither the store, nor the live maps, nor the shared cache.
fn confine(start: &Start, live: Option<OwnedFd>) -> Result<Confined, String> {
    let config = &start.config;
    let protection = sys::protect();
    if start.warn && !protection.locked {
        tracing::warn!(
            "memory is not locked, so disks may be slow under memory pressure; raise RLIMIT_MEMLOCK (LimitMEMLOCK= of \
             the service)"
        );
    }
    let superblock = Store::superblock(&config.store).map_err(|e| e.to_string())?;
    let live = match live {
        Some(arena) => LiveMapLocation::Arena(arena.into(), home::bounds(config)),
        None => LiveMapLocation::Dir(home::former_dir(config).map_err(|e| format!("the store: {e}"))?),
    };
    if start.probe {
        Store::probe(&config.store).map_err(|e| e.to_string())?;
        match &live {
            LiveMapLocation::Arena(arena, _) => {
                Delta::probe_arena(arena).map_err(|e| format!("live maps: {e}"))?
            }
            LiveMapLocation::Dir(dir) => {
                Delta::probe_live(dir).map_err(|e| format!("live maps in {}: {e}", dir.display()))?;
            }
        }
    }
    let live_dir = match &live {
        LiveMapLocation::Arena(..) => None,
        LiveMapLocation::Dir(dir) => {
            LiveDir::beside(dir).map_err(|e| format!("memory for live maps: {e}"))?;
            Some(dir.as_path())
        }
    };
    // The helpers are forked before the process has another thread, and before its memory has anything that they must
    // not see. They are also forked before the buffers that the kernel copies into exist: pages that two processes
    // share fault when they are written (D2).
    let opener: Arc<dyn OpenImage> = if config.security.capabilities || config.security.landlock {
        Arc::new(Opener::start(config).map_err(|e| format!("cannot start the opener: {e}"))?)
    } else {
        Arc::new(OpenHere)
    };
    let helper =
        CredentialHelper::start(config).map_err(|e| format!("cannot start the credential helper: {e}"))?;
    let helper = helper.map(Arc::new);
    let notifier = NotifyHelper::start(config).map_err(|e| format!("cannot start the notify helper: {e}"))?;
    let metrics = metrics_socket::bind(config);
    let web = WebAccess {
        network: match config.security.network {
            true => Network::prepare(&config.http, Proxies::from_variables(|name| std::env::var(name).ok())),
            false => Network::off(),
        },
        secrets: HelperSecrets(helper.clone()),
        credentials: match helper {
            Some(helper) => helper,
            None => Arc::new(NoCredentials),
        },
        notifier,
        page: start.page.is_none().then(|| page_socket::wait(config)).flatten(),
    };
    let window = fuse::kernel::window();
    let kernel_release = kernel::release();
    serve::cache_processor_count();
    let (pools, pool_dirs) = HostPools::hold(&config.store, &superblock.uuid);
    // The worker gives up its rights before it has another thread. A standby worker has only the final rights too.
    let in_force = confine::apply(&Policy {
        security: &config.security,
        store: &config.store,
        pools: &pool_dirs,
        live_dir,
        memory_locked: protection.locked,
        first: start.warn,
        listens: metrics.as_ref().and_then(MetricsSocket::descriptor),
    });
    Ok(Confined { opener, pools, live, in_force, web, metrics, window, kernel_release })
}

/// Does the preparation that takes time.
fn prepare(start: &Start, cache: OwnedFd, confined: Confined) -> Result<Prepared, String> {
    let config = &start.config;
    let Confined { opener, pools, live, in_force: confinement, web, metrics, window, kernel_release } =
        confined;
    let cache =
        BlockCache::prepare(cache, config.cache_memory).map_err(|e| format!("memory for the cache: {e}"))?;
    let records = spawn_preload(config.store.clone()).map_err(no_thread)?;
    let descriptor_limit = sys::descriptor_limit();
    Ok(Prepared {
        cache,
        opener,
        pools,
        live,
        confinement,
        descriptor_limit,
        records,
        web,
        metrics,
        window,
        kernel_release,
    })
}

/// The restrictions in force, in the form of `status`.
fn confinement_of(in_force: ActiveMeasures) -> Confinement {
    let ActiveMeasures { capabilities, landlock, seccomp, core_dumps, memory_locked } = in_force;
    Confinement { capabilities, landlock, seccomp, core_dumps, memory_locked: Some(memory_locked) }
}

/// Adopts the cache of the last worker. After several workers that ended soon, the cache starts empty, because its
/// contents may have caused their ends.
fn adopt(cache: &BlockCache, report: &Report) {
    let is_suspect = report.back_off_ms > 0;
    match if is_suspect { cache.adopt_nothing() } else { cache.adopt() } {
        Adoption::Empty | Adoption::Kept => {}
        Adoption::Dropped => tracing::info!(is_suspect, "the cache of the last worker is dropped"),
        Adoption::Unusable(error) => {
            tracing::error!(%error, "no memory for the cache; the worker serves without it")
        }
    }
}

fn serve(
    start: &Start,
    activation: Activation,
    prepared: Prepared,
    descriptors: ServingDescriptors,
    channel: &Arc<Channel>,
) -> Result<(), String> {
    let ServingDescriptors { fuse, listener, page, export, table, lock } = descriptors;
    let config = &start.config;
    let Prepared {
        cache,
        opener,
        pools,
        live,
        confinement,
        descriptor_limit,
        records,
        web,
        metrics,
        window,
        kernel_release,
    } = prepared;
    let WebAccess { network, credentials, secrets, notifier: notify_helper, page: waits } = web;
    let page = page.map(PageSocket::Bound).or(waits);
    let events = Events::new();
    events.emit(Event::worker_started(activation.report.cut_off.as_deref()));
    adopt(&cache, &activation.report);
    let live_dir = match &live {
        LiveMapLocation::Arena(..) => None,
        LiveMapLocation::Dir(dir) => Some(dir.clone()),
    };
    let (live, arena) = live.open().map_err(|e| format!("memory for live maps: {e}"))?;
    let live = |_: &Superblock| -> io::Result<Arc<dyn LiveStore>> { Ok(live) };
    let kept = OpenCache::open(config, &events).map_err(|e| format!("the cache of fetched blocks: {e}"))?;
    let sources = HostSources::new(opener, &config.http, &network, credentials, kept, events.clone());
    let sources = Arc::new(sources.map_err(no_thread)?);
    // This waits for a read of the records in progress, which takes no longer than reading them here.
    let known = std::mem::take(&mut *records.lock());
    drop(records);
    let (cache, prepared) = (Arc::new(cache), (known, &pools as _));
    let store = Store::open_with_pools(&config.store, live, cache, config.reserve, sources.clone(), prepared)
        .map_err(|e| e.to_string())?;
    store.read_secrets_with(Arc::new(secrets));
    let of_pools = POOL_DESCRIPTORS * store.pool_numbers().len() as u64;
    store.attach_at_most(descriptors::most_attached(descriptor_limit.saturating_sub(of_pools)));
    store.open_layers_at_most(descriptors::for_layers(descriptor_limit) as usize);
    store.keep_removed_for(config.trash.grace);
    store.disk_stats().limit_series(config.metrics.series);
    store.base_stats().limit_series(config.metrics.series);
    let store = Arc::new(store);
    let catalogue = store.clone();
    let bases = move || catalogue.bases().into_iter().map(|node| node.current()).collect();
    sources.settle_within(bases).map_err(no_thread)?;
    // Before the first read: the cache may have lost blocks that only a copy has.
    let keeper = Keeper::start(store.clone(), sources.clone()).map_err(no_thread)?;
    let limits = Limits {
        idle: Duration::from_secs(config.trace.idle_seconds),
        longest: Duration::from_secs(config.trace.longest_seconds),
        ..Limits::default()
    };
    let automatic = if config.trace.auto { AutoRecord::Yes } else { AutoRecord::No };
    let tracer = store.trace(limits, automatic, events.clone());
    // A prefetch is useless without a cache that keeps the fetched blocks.
    if config.trace.prefetch && config.cache_disk != Some(0) {
        let prefetcher = Prefetcher::new(&store);
        tracer.prefetch_with(move |base| prefetcher.play(base));
    }
    if activation.fresh_mount {
        // On a new mount no client can have a removed disk open.
        for node in store.unlinked() {
            if let Err(error) = store.purge(node.id()) {
                let disk = node.id();
                tracing::error!(%error, disk, "cannot delete a removed disk; its space stays in use");
            }
        }
    } else {
        store.bases().iter().for_each(|base| base.set_inherited(true));
    }
    let (uid, gid) = sys::effective_ids();
    let owner = Ownership { uid, gid, base_mode: config.base_mode, since_ns: start.since_ns };
    let inline = (config.fuse_threads / 2).max(1);
    let limits = serve::Limits::of_window(window);
    let clone = |fd: &OwnedFd| fd.try_clone().map_err(|e| format!("cannot duplicate /dev/fuse: {e}"));
    let notifier = Arc::new(KernelNotifier::new(clone(&fuse)?));
    close_replaced_elsewhere().map_err(no_thread)?;
    let service = Service::new(store.clone(), config.io_threads, inline, limits).map_err(no_thread)?;
    let frontend = service.add_frontend(notifier.clone());
    let callers = CallersClient::new(channel.clone());
    callers.set_supported(activation.report.answers_callers);
    let client = callers.clone();
    service.watch_callers(Box::new(move |question| client.query(question))).map_err(no_thread)?;
    if let Some(table) = table {
        unanswered::list_in(&table).map_err(|e| format!("memory for the list of requests: {e}"))?;
    }
    let fs = PlyFs::new(service.clone(), owner, frontend, start.offers);
    let serving = FuseSession::new(fs, &fuse, config.fuse_threads)
        .map_err(|e| format!("cannot take over the mount: {e}"))?;
    drop(fuse);

    let hydrations = Hydrations::new(store.clone(), sources.clone(), events.clone(), config.hydrate.rate);
    let report = Arc::new(Mutex::new(activation.report));
    let drain = Arc::new(tokio::sync::Notify::new());
    let bases = Bases::new(
        store.clone(),
        sources.clone(),
        hydrations.clone(),
        keeper,
        config.mount.clone(),
        config.hydrate.auto,
    );
    let disk_jobs = DiskJobs::new(store.clone());
    let retention = Retention::new(config, store.clone(), service.clone(), bases.clone(), events.clone());
    let notifications = Arc::<Notifications>::default();
    let web = config.notify.url.iter().map(|url| Destination::Web(sources.http().clone(), url.clone()));
    let command =
        notify_helper.map(|helper| Destination::Command(Box::new(move |input: &[u8]| helper.run(input))));
    notify::spawn(&config.notify, &events, web.chain(command).collect(), &notifications)
        .map_err(no_thread)?;
    let bus = events.clone();
    let control = Control {
        store: store.clone(),
        service: service.clone(),
        daemon: channel.clone(),
        config: config.clone(),
        arena,
        supervisor_pid: start.supervisor_pid,
        report: report.clone(),
        since_ns: start.since_ns,
        confinement: confinement_of(confinement),
        kernel: kernel::describe(start.offers, kernel_release),
        events,
        bases,
        disk_jobs: disk_jobs.clone(),
        clients: Arc::default(),
        notifications: notifications.clone(),
        // Without resend the supervisor pauses requests before this worker ends.
        last_deliveries: if start.offers.resend { LAST_DELIVERIES } else { HURRIED_DELIVERIES },
        serving_since_ns: sys::now_ns(),
        page_trouble: Arc::new(Mutex::new(PageSocket::trouble(page.as_ref()))),
        export_trouble: export.is_none().then(|| {
            "the address could not be bound; free it or change [export] http, and restart the daemon".into()
        }),
        metrics_trouble: Arc::new(Mutex::new(metrics.is_none().then(|| "see the daemon's log".into()))),
    };
    if let Some(socket) = metrics {
        socket.serve(control.clone()).map_err(no_thread)?;
    }
    if let Some(listener) = export
        && let Err(error) = peers::spawn(listener, store.clone(), sources.clone(), config.export.limit())
    {
        tracing::error!(%error, "cannot serve other hosts; disks are served without it");
    }
    let supervisor = channel.clone();
    let drained = move || _ = supervisor.send(&FromWorker::Drained);
    if let Some(socket) = page
        && let Err(error) = page::spawn(control.clone(), socket)
    {
        tracing::error!(%error, "cannot serve the status page; disks are served without it");
    }
    control::spawn(control, listener, drain.clone(), drained)
        .map_err(|e| format!("cannot serve the control socket: {e}"))?;
    spawn_supervisor_listener(SupervisorListener {
        service: service.clone(),
        store: store.clone(),
        live_dir: live_dir.clone(),
        channel: channel.clone(),
        callers,
        report,
        drain,
        events: bus.clone(),
        lock,
        hears_closed: start.hears_closed,
    })
    .map_err(no_thread)?;
    if !activation.fresh_mount {
        spawn_reaper(service).map_err(no_thread)?;
    }
    spawn_upkeep(store.clone()).map_err(no_thread)?;
    retention.spawn().map_err(no_thread)?;
    hydrations.resume();
    disk_jobs.resume();
    channel.send(&FromWorker::Ready).map_err(|e| format!("cannot reach the supervisor: {e}"))?;
    serving.run(&notifier).map_err(|e| format!("cannot read requests: {e}"))?;
    store.close().map_err(|e| e.to_string())?;
    sources.flush();
    bus.finish();
    // The directory is empty after a clean close. Otherwise it stays.
    let _ = live_dir.map(std::fs::remove_dir);
    Ok(())
}

/// Handles the messages of the supervisor, on a thread of its own. It takes no lock of the paths of requests, so its
/// answer to a ping proves that the process runs.
struct SupervisorListener {
    service: Service,
    store: Arc<Store>,
    live_dir: Option<PathBuf>,
    channel: Arc<Channel>,
    callers: Arc<CallersClient>,
    report: Arc<Mutex<Report>>,
    drain: Arc<tokio::sync::Notify>,
    events: Events,
    lock: Lock,
    hears_closed: bool,
}

impl SupervisorListener {
    fn run(self: &Arc<Self>) {
        loop {
            match self.channel.receive() {
                Ok(Some(FromSupervisor::Report(report))) => {
                    self.callers.set_supported(report.answers_callers);
                    *self.report.lock() = report;
                }
                Ok(Some(FromSupervisor::Callers(reply))) => self.callers.receive(reply),
                Ok(Some(FromSupervisor::Drain)) => self.drain.notify_one(),
                Ok(Some(FromSupervisor::Pause)) => self.pause(),
                Ok(Some(FromSupervisor::Continue)) => {
                    self.service.set_all_pass(false);
                    unanswered::go_on();
                }
                Ok(Some(FromSupervisor::Ping)) => {
                    let _ = self.channel.send(&FromWorker::Alive);
                }
                // On another thread, because this one must go on answering pings.
                Ok(Some(FromSupervisor::Finish)) => {
                    let listener = self.clone();
                    let finish = move || listener.finish();
                    if std::thread::Builder::new().name("closing".into()).spawn(finish).is_err() {
                        self.finish();
                    }
                }
                Ok(Some(FromSupervisor::Activate { .. })) => {
                    tracing::error!("the supervisor activated this worker twice; the message is ignored");
                }
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    tracing::error!(%error, "cannot decode a message of the supervisor; it is ignored");
                }
                // The supervisor has ended, and the kernel is about to kill this process (PDEATHSIG).
                Ok(None) | Err(_) => return,
            }
        }
    }

    /// Pauses on another thread: requests may take long to end.
    fn pause(&self) {
        let (channel, service) = (self.channel.clone(), self.service.clone());
        let pause = move || {
            service.set_all_pass(true);
            if unanswered::pause() {
                let _ = channel.send(&FromWorker::Paused);
            }
        };
        // Without a thread there is no pause, and the supervisor gives the upgrade up.
        if let Err(error) = std::thread::Builder::new().name("pausing".into()).spawn(pause) {
            tracing::error!(%error, "requests cannot be paused");
        }
    }

    /// Closes the store, although files are open, and ends this process.
    fn finish(&self) -> ! {
        self.service.quiesce();
        let code = match self.store.close() {
            Ok(()) => {
                self.events.finish();
                // The directory is empty after a clean close.
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

fn spawn_supervisor_listener(listener: SupervisorListener) -> io::Result<()> {
    let listener = Arc::new(listener);
    std::thread::Builder::new().name("supervisor".into()).spawn(move || listener.run()).map(drop)
}

/// Descriptors for each pool: its directory, its reserve.
const POOL_DESCRIPTORS: u64 = 3;

/// Purges, once, the removed disks whose last close no worker saw. From now on the kernel reports last closes to this
/// worker.
fn spawn_reaper(service: Service) -> io::Result<()> {
    std::thread::Builder::new().name("reaper".into()).spawn(move || service.reap()).map(drop)
}
