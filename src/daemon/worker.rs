//! The worker: takes over the mount, serves it, and closes the store when the mount is gone.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use super::api;
use super::channel::{Channel, FromSupervisor, FromWorker, START_ENV, Start};
use crate::cache::BlockCache;
use crate::format::record::Superblock;
use crate::fuse::kernel::KernelNotifier;
use crate::fuse::session::Serving;
use crate::fuse::{Node, Ownership, PlyFs};
use crate::io::{LiveDir, LiveStore, sys};
use crate::store::Store;

/// The hidden command `plyfs worker`.
pub fn worker_main() -> ExitCode {
    let start: Start = match std::env::var(START_ENV).map(|json| serde_json::from_str(&json)) {
        Ok(Ok(start)) => start,
        _ => {
            eprintln!("plyfs: the worker is started by `plyfs serve`; run that instead");
            return ExitCode::from(2);
        }
    };
    sys::unblock_signals();
    if sys::die_with_parent(start.supervisor_pid).is_err() {
        return ExitCode::FAILURE;
    }
    let fds = [start.fuse, start.channel, start.listener, start.lock];
    let Ok([fuse, channel, listener, lock]) = sys::inherit_once(fds) else {
        return ExitCode::FAILURE;
    };
    let channel = Arc::new(Channel(channel));
    match serve(&start, fuse, &channel, listener) {
        Ok(()) => {
            drop(lock);
            ExitCode::SUCCESS
        }
        Err(why) => {
            tracing::error!(error = why, "the worker ends");
            let _ = channel.send(&FromWorker::Failed(why));
            ExitCode::FAILURE
        }
    }
}

/// Where the live maps of a store are: of this store in this place, not of a copy of it.
pub fn live_dir_name(superblock: &Superblock, store: &std::path::Path) -> io::Result<String> {
    let meta = std::fs::metadata(store)?;
    let uuid: String = superblock.uuid[..4].iter().map(|b| format!("{b:02x}")).collect();
    Ok(format!("plyfs-{uuid}-{}-{}", meta.dev(), meta.ino()))
}

fn serve(start: &Start, fuse: OwnedFd, channel: &Arc<Channel>, listener: OwnedFd) -> Result<(), String> {
    let config = &start.config;
    let protection = sys::protect();
    if start.worker_starts == 1 && !protection.locked {
        tracing::warn!("memory is not locked (RLIMIT_MEMLOCK); under memory pressure disks may be slow");
    }
    let cache = BlockCache::new(config.cache_memory).map_err(|e| format!("memory for the cache: {e}"))?;
    let mut live_dir = PathBuf::new();
    let live = |superblock: &Superblock| -> io::Result<Arc<dyn LiveStore>> {
        let dir = config.runtime_dir.join(live_dir_name(superblock, &config.store)?);
        live_dir.clone_from(&dir);
        Ok(Arc::new(LiveDir::new(&dir)?))
    };
    let store =
        Store::open(&config.store, live, Arc::new(cache), config.reserve).map_err(|e| e.to_string())?;
    let store = Arc::new(store);
    if start.worker_starts == 1 {
        // A fresh mount: nobody has anything open.
        for node in store.unlinked() {
            store.purge(node.id()).unwrap_or_else(|error| tracing::error!(%error, "cleaning up"));
        }
    }
    let (uid, gid) = sys::effective_ids();
    let owner = Ownership { uid, gid, base_mode: config.base_mode, since_ns: start.since_ns };
    let inline = (config.fuse_threads / 2).max(1);
    let clone = |fd: &OwnedFd| fd.try_clone().map_err(|e| format!("descriptors: {e}"));
    let notifier = Arc::new(KernelNotifier::new(clone(&fuse)?));
    let fs = PlyFs::new(store.clone(), owner, notifier.clone(), config.io_threads, inline)
        .map_err(|e| format!("threads: {e}"))?;
    let serving =
        Serving::new(fs.clone(), &fuse, config.fuse_threads).map_err(|e| format!("taking over: {e}"))?;
    drop(fuse);

    let control = api::Control {
        store: store.clone(),
        notifier: notifier.clone(),
        channel: channel.clone(),
        config: config.clone(),
        supervisor_pid: start.supervisor_pid,
        worker_starts: start.worker_starts,
        since_ns: start.since_ns,
    };
    api::spawn(control, listener).map_err(|e| format!("control socket: {e}"))?;
    spawn_finisher(fs, store.clone(), channel.clone()).map_err(|e| format!("threads: {e}"))?;
    if start.worker_starts > 1 {
        spawn_reaper(store.clone(), notifier.clone()).map_err(|e| format!("threads: {e}"))?;
    }
    channel.send(&FromWorker::Ready).map_err(|e| format!("the supervisor is gone: {e}"))?;
    serving.run(&notifier).map_err(|e| format!("reading requests: {e}"))?;
    store.close().map_err(|e| e.to_string())?;
    // Empty after a clean close; left when it is not.
    let _ = std::fs::remove_dir(live_dir);
    Ok(())
}

/// Waits for the supervisor's word to end although files are open.
fn spawn_finisher(fs: PlyFs, store: Arc<Store>, channel: Arc<Channel>) -> io::Result<()> {
    let finish = move || {
        if let Ok(Some(FromSupervisor::Finish)) = channel.receive() {
            fs.quiesce();
            let code = match store.close() {
                Ok(()) => 0,
                Err(error) => {
                    let _ = channel.send(&FromWorker::Failed(error.to_string()));
                    1
                }
            };
            std::process::exit(code);
        }
    };
    std::thread::Builder::new().name("finisher".into()).spawn(finish).map(drop)
}

/// Removes disks that lost their name and their last user while no worker could be told.
fn spawn_reaper(store: Arc<Store>, notifier: Arc<KernelNotifier>) -> io::Result<()> {
    let reap = move || {
        for node in store.unlinked() {
            if matches!(notifier.refresh(Node::Disk(node.id()).ino()), Ok(false)) {
                store.purge(node.id()).unwrap_or_else(|error| tracing::error!(%error, "cleaning up"));
            }
        }
    };
    std::thread::Builder::new().name("reaper".into()).spawn(reap).map(drop)
}
