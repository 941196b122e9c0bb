//! `plyfs status`: the state of the daemon.

use std::time::Duration;

use super::Global;
use super::client::read;
use super::error::CliError;
use super::output::printable;
use super::table::lines;
use crate::config::size::format_size;
use crate::control::wire::{
    self, Cache, Confinement, DamagedFile, DiskCache, Listener, MissingPromise, Standby, Trouble,
};

const EXAMPLES: &str = "\
Examples:
  plyfs status
  plyfs --json status | jq .cache";

/// Show the daemon, its mount and caches, its problems, and the number of bases and disks
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Status {}

impl Status {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let action = "cannot get the status";
        let answer = global.client()?.get_now("/v1/status", action)?;
        let status = read(&answer, action)?;
        global.output().value(&answer, |_| human(&status))
    }
}

type Pair = (&'static str, String);

pub(super) fn human(status: &wire::Status) -> String {
    let number = |number: Option<u64>| number.map_or_else(|| "-".to_owned(), |number| number.to_string());
    let pid = |pid: Option<u32>| number(pid.map(u64::from));
    let uptime = Duration::from_secs(u64::try_from(status.uptime_seconds).unwrap_or(0));
    let worker = format!("pid {}, starts {}", pid(status.worker_pid), status.worker_starts);
    let mut pairs = vec![
        ("version", text(&status.version)),
        ("uptime", humantime::format_duration(uptime).to_string()),
        ("store", text(&status.store)),
        ("mount", text(&status.mount)),
        ("supervisor", format!("pid {}", pid(status.supervisor_pid))),
        ("worker", worker + &not_answering(status)),
        ("standby", standby(&status.standby)),
        ("bases", number(status.bases)),
        ("disks", number(status.disks)),
    ];
    if let (Some(total), Some(available)) = (status.space.total_bytes, status.space.available_bytes) {
        let full = if status.space.full { "; full: writes that need space are refused" } else { "" };
        pairs
            .push(("space", format!("{} of {} available{full}", format_size(available), format_size(total))));
    }
    if status.trashed_disks > 0 {
        let (disks, bytes) = (status.trashed_disks, format_size(status.trashed_bytes));
        pairs.push(("trash", format!("{disks} disks, {bytes}; plyfs trash purge frees it")));
    }
    let maps = &status.live_maps;
    if let (Some(bytes), Some(limit)) = (maps.bytes, maps.limit_bytes) {
        let path = maps.path.as_deref().map_or_else(String::new, |path| format!(", {}", printable(path)));
        pairs.push(("live maps", format!("{} of {}{path}", format_size(bytes), format_size(limit))));
    }
    if let Some(problem) = &maps.problem {
        pairs.push(("live maps problem", printable(problem)));
    }
    let indexes = &status.layer_indexes;
    if indexes.unwritten_bytes > 0 {
        let (bytes, limit) =
            (format_size(indexes.unwritten_bytes), format_size(indexes.unwritten_limit_bytes));
        pairs.push((
            "layer indexes",
            format!("{bytes} of {limit} in memory, because they cannot be written to the store"),
        ));
    }
    problems(status, &mut pairs);
    if let Some(end) = status.worker_ends.last() {
        let (why, at) = (text(&end.why), text(&end.at));
        pairs.push(("last worker end", format!("{why} at {at}, served {} ms", end.served_ms)));
    }
    if let Some(upgrade) = &status.upgrade {
        let to = upgrade.to.as_deref().map_or_else(|| "-".to_owned(), printable);
        let (state, at, from) = (upgrade.state.name(), text(&upgrade.at), text(&upgrade.from));
        pairs.push(("upgrade", format!("{state} at {at}: {from} to {to}")));
    }
    pairs.extend(status.page.iter().map(|page| ("page", listener(page))));
    pairs.extend(status.export.iter().map(|export| ("export", listener(export))));
    pairs.extend(status.metrics.iter().map(|metrics| ("metrics", listener(metrics))));
    if let Some(cache) = &status.cache {
        caches(cache, &mut pairs);
    }
    if let Some(in_force) = &status.confinement {
        pairs.push(("confinement", confinement(in_force)));
    }
    if let Some(kernel) = &status.kernel {
        pairs.push(("kernel", format!("Linux {}, FUSE {}", text(&kernel.release), text(&kernel.fuse))));
        pairs.extend(kernel.missing.iter().map(|lacks| ("kernel lacks", missing(lacks))));
    }
    lines(pairs.into_iter())
}

fn listener(listener: &Listener) -> String {
    let listen = text(&listener.listen);
    listener
        .trouble
        .as_ref()
        .map_or_else(|| listen.clone(), |why| format!("not served at {listen}: {}", text(why)))
}

/// The problems that need the operator's attention.
fn problems(status: &wire::Status, pairs: &mut Vec<Pair>) {
    if !status.unavailable_pools.is_empty() {
        let names: Vec<_> = status.unavailable_pools.iter().map(|name| printable(name)).collect();
        pairs.push(("pools not available", format!("{}; see plyfs pool show", names.join(", "))));
    }
    if !status.disks_refusing_writes.is_empty() {
        let names: Vec<_> = status.disks_refusing_writes.iter().map(|name| printable(name)).collect();
        pairs.push(("refusing writes", format!("{}; a flush failed, reopen them", names.join(", "))));
    }
    if !status.disks_at_quota.is_empty() {
        let names: Vec<_> = status.disks_at_quota.iter().map(|name| printable(name)).collect();
        let remedy = "raise the quota (plyfs disk limit), or free space in the guest";
        pairs.push(("at quota", format!("{}; {remedy}", names.join(", "))));
    }
    for DamagedFile { file, error } in &status.damaged {
        pairs.push(("damaged", format!("{}: {}", text(file), text(error))));
    }
    for DamagedFile { file, error } in &status.unread {
        pairs.push(("cannot be read", format!("{}: {}; the daemon tries again", text(file), text(error))));
    }
    let trouble = |Trouble { base, since, why }: &Trouble| {
        format!("base {} since {}: {}", text(base), text(since), text(why))
    };
    pairs.extend(status.waiting.iter().map(|base| ("waiting", trouble(base))));
    let requests = &status.requests;
    if requests.waiting + requests.refused > 0 {
        let (waiting, refused) = (requests.waiting, requests.refused);
        let bytes = format_size(requests.waiting_bytes);
        pairs.push((
            "requests",
            format!("{waiting} wait for bases and hold {bytes}; {refused} refused because too many waited"),
        ));
    }
    pairs.extend(status.failing.iter().map(|base| ("failing", trouble(base))));
}

fn caches(cache: &Cache, pairs: &mut Vec<Pair>) {
    let (used, limit) = (format_size(cache.memory_used), format_size(cache.memory_limit));
    pairs.push(("cache memory", format!("{used} of {limit}")));
    let (hits, misses) = (cache.hits, cache.misses);
    pairs.push(("cache reads", format!("{hits} hits, {misses} misses{}", rate(hits, misses))));
    let (insertions, evictions) = (cache.insertions, cache.evictions);
    pairs.push(("cache blocks", format!("{insertions} inserted, {evictions} evicted")));
    let (adopted, rejected) = (cache.adopted_blocks, cache.adopted_rejected);
    pairs.push(("cache blocks of earlier workers", format!("{adopted}, {rejected} rejected")));
    let Some(DiskCache { used_bytes, limit_bytes, corrupt_blocks, read_errors, degraded, .. }) = &cache.disk
    else {
        return;
    };
    pairs.push(("cache disk", format!("{} of {}", format_size(*used_bytes), format_size(*limit_bytes))));
    let damaged = corrupt_blocks + read_errors;
    if damaged > 0 {
        pairs.push(("cache disk damage", format!("{damaged} blocks; the next read fetches each again")));
    }
    if let Some(why) = degraded {
        pairs.push(("cache disk problem", format!("{}; no new blocks are kept", printable(why))));
    }
}

/// The text, or a dash when it is empty.
fn text(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { printable(text) }
}

/// The text about a worker that does not answer; empty when it does.
fn not_answering(status: &wire::Status) -> String {
    match (&status.worker_not_answering_since, &status.worker_not_answering_why) {
        (Some(since), Some(why)) => {
            let (since, why) = (printable(since), printable(why));
            format!("; not answering since {since}: {why}; replace it with: plyfs upgrade")
        }
        _ => String::new(),
    }
}

fn standby(standby: &Standby) -> String {
    match (standby.pid, &standby.problem) {
        (Some(pid), _) if standby.prepared => format!("pid {pid}, prepared"),
        (Some(pid), _) => format!("pid {pid}, preparing"),
        (None, Some(problem)) => format!("none: {}", printable(problem)),
        (None, None) => "none yet".to_owned(),
    }
}

/// The restrictions in force on the worker, on one line.
fn confinement(in_force: &Confinement) -> String {
    let names: Vec<String> = in_force.capabilities.iter().map(|name| printable(name)).collect();
    let capabilities = if names.is_empty() { "none".to_owned() } else { names.join(" ") };
    let locked = match in_force.memory_locked {
        Some(true) => "locked",
        Some(false) => "not locked",
        None => "-",
    };
    format!(
        "capabilities {capabilities}, landlock {}, seccomp {}, core dumps {}, memory {locked}",
        text(&in_force.landlock),
        text(&in_force.seccomp),
        text(&in_force.core_dumps),
    )
}

/// A promise that the kernel does not allow.
fn missing(lacks: &MissingPromise) -> String {
    let (promise, since, instead) = (text(&lacks.promise), text(&lacks.since), text(&lacks.instead));
    format!("{promise} (Linux {since}): {instead}")
}

fn rate(hits: u64, misses: u64) -> String {
    let (hits, all) = (u128::from(hits), u128::from(hits) + u128::from(misses));
    if all == 0 {
        return String::new();
    }
    let per_mille = hits * 1000 / all;
    format!(" ({}.{} %)", per_mille / 10, per_mille % 10)
}
