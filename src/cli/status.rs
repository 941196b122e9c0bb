//! `plyfs status`: the daemon at a glance.

use std::time::Duration;

use serde_json::Value;

use super::Global;
use super::error::CliError;
use super::output::{lines, printable};
use crate::config::size::format_size;

const EXAMPLES: &str = "\
Examples:
  plyfs status
  plyfs --json status | jq .cache";

/// Show the daemon, its mount and caches, and how many bases and disks there are
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Status {}

impl Status {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let status = global.client()?.get_now("/v1/status", "cannot get the status")?;
        global.output().value(&status, human)
    }
}

pub(super) fn human(status: &Value) -> String {
    let text = |key: &str| match &status[key] {
        Value::Null => "-".to_owned(),
        Value::String(text) => printable(text),
        other => other.to_string(),
    };
    let cache = |key: &str| status["cache"][key].as_u64();
    let size = |key: &str| cache(key).map_or_else(|| "-".to_owned(), format_size);
    let count = |key: &str| cache(key).map_or_else(|| "-".to_owned(), |count| count.to_string());
    let uptime = status["uptime_seconds"].as_u64().unwrap_or(0);
    let mut pairs = vec![
        ("version", text("version")),
        ("uptime", humantime::format_duration(Duration::from_secs(uptime)).to_string()),
        ("store", text("store")),
        ("mount", text("mount")),
        ("supervisor", format!("pid {}", text("supervisor_pid"))),
        ("worker", format!("pid {}, starts {}{}", text("worker_pid"), text("worker_starts"), silent(status))),
        ("standby", standby(&status["standby"])),
        ("bases", text("bases")),
        ("disks", text("disks")),
    ];
    if let (Some(total), Some(available)) =
        (status["space"]["total_bytes"].as_u64(), status["space"]["available_bytes"].as_u64())
    {
        let full =
            if status["space"]["full"] == true { "; full: writes that need space are refused" } else { "" };
        pairs
            .push(("space", format!("{} of {} available{full}", format_size(available), format_size(total))));
    }
    let maps = &status["live_maps"];
    if let (Some(bytes), Some(limit)) = (maps["bytes"].as_u64(), maps["limit_bytes"].as_u64()) {
        let path = maps["path"].as_str().map_or_else(String::new, |path| format!(", {}", printable(path)));
        pairs.push(("live maps", format!("{} of {}{path}", format_size(bytes), format_size(limit))));
    }
    if let Some(problem) = maps["problem"].as_str() {
        pairs.push(("live maps problem", printable(problem)));
    }
    if let Some(disks) = status["disks_refusing_writes"].as_array().filter(|disks| !disks.is_empty()) {
        let names: Vec<_> = disks.iter().filter_map(Value::as_str).map(printable).collect();
        pairs.push(("refusing writes", format!("{}; a flush failed, open them again", names.join(", "))));
    }
    for record in status["damaged"].as_array().into_iter().flatten() {
        let word = |key: &str| record[key].as_str().map_or_else(|| "-".to_owned(), printable);
        pairs.push(("damaged", format!("{}: {}", word("file"), word("error"))));
    }
    for record in status["unread"].as_array().into_iter().flatten() {
        let word = |key: &str| record[key].as_str().map_or_else(|| "-".to_owned(), printable);
        pairs.push(("cannot be read", format!("{}: {}; tried again", word("file"), word("error"))));
    }
    for base in status["waiting"].as_array().into_iter().flatten() {
        let word = |key: &str| base[key].as_str().map_or_else(|| "-".to_owned(), printable);
        pairs.push(("waiting", format!("base {} since {}: {}", word("base"), word("since"), word("why"))));
    }
    let requests = |key: &str| status["requests"][key].as_u64().unwrap_or(0);
    if requests("waiting") + requests("refused") > 0 {
        let (waiting, refused) = (requests("waiting"), requests("refused"));
        let bytes = format_size(requests("waiting_bytes"));
        pairs.push((
            "requests",
            format!("{waiting} wait for bases and hold {bytes}; {refused} were refused, as too many waited"),
        ));
    }
    for base in status["failing"].as_array().into_iter().flatten() {
        let word = |key: &str| base[key].as_str().unwrap_or_default().to_owned();
        pairs.push(("failing", format!("base {} since {}: {}", word("base"), word("since"), word("why"))));
    }
    if let Some(end) = status["worker_ends"].as_array().and_then(|ends| ends.last()) {
        let word = |key: &str| end[key].as_str().map_or_else(|| "-".to_owned(), printable);
        pairs.push((
            "last worker end",
            format!("{} at {}, served {} ms", word("why"), word("at"), end["served_ms"]),
        ));
    }
    if let Some(state) = status["upgrade"]["state"].as_str() {
        let word = |key: &str| status["upgrade"][key].as_str().map_or_else(|| "-".to_owned(), printable);
        pairs.push((
            "upgrade",
            format!("{} at {}: {} to {}", printable(state), word("at"), word("from"), word("to")),
        ));
    }
    if status["cache"].is_object() {
        pairs.push(("cache memory", format!("{} of {}", size("memory_used"), size("memory_limit"))));
        pairs.push((
            "cache reads",
            format!("{} hits, {} misses{}", count("hits"), count("misses"), rate(status)),
        ));
        pairs.push((
            "cache blocks",
            format!("{} inserted, {} evicted", count("insertions"), count("evictions")),
        ));
        if status["cache"]["adopted_blocks"].is_u64() {
            let adopted = format!("{}, {} rejected", count("adopted_blocks"), count("adopted_rejected"));
            pairs.push(("cache blocks of earlier workers", adopted));
        }
    }
    let disk = &status["cache"]["disk"];
    if disk.is_object() {
        let size = |key: &str| disk[key].as_u64().map_or_else(|| "-".to_owned(), format_size);
        pairs.push(("cache disk", format!("{} of {}", size("used_bytes"), size("limit_bytes"))));
        let count = |key: &str| disk[key].as_u64().unwrap_or(0);
        let damaged = count("corrupt_blocks") + count("read_errors");
        if damaged > 0 {
            pairs.push((
                "cache disk damage",
                format!("{damaged} blocks, each is fetched again when it is read"),
            ));
        }
        if let Some(why) = disk["degraded"].as_str() {
            pairs.push(("cache disk problem", format!("{}; nothing more is kept", printable(why))));
        }
    }
    if status["confinement"].is_object() {
        pairs.push(("confinement", confinement(&status["confinement"])));
    }
    lines(pairs.into_iter())
}

/// The words for a worker that does not answer.
fn silent(status: &Value) -> String {
    let word = |key: &str| status[key].as_str().map(printable);
    match (word("worker_not_answering_since"), word("worker_not_answering_why")) {
        (Some(since), Some(why)) => {
            format!("; not answering since {since}: {why}; replace it with: plyfs upgrade")
        }
        _ => String::new(),
    }
}

fn standby(standby: &Value) -> String {
    match (standby["pid"].as_u64(), standby["prepared"].as_bool(), standby["problem"].as_str()) {
        (Some(pid), Some(true), _) => format!("pid {pid}, prepared"),
        (Some(pid), _, _) => format!("pid {pid}, preparing"),
        (None, _, Some(problem)) => format!("none: {}", printable(problem)),
        (None, _, None) => "none yet".to_owned(),
    }
}

/// What of least privilege is in force, on one line.
fn confinement(in_force: &Value) -> String {
    let text = |key: &str| in_force[key].as_str().map_or_else(|| "-".to_owned(), printable);
    let names = in_force["capabilities"].as_array().map(Vec::as_slice).unwrap_or_default();
    let names: Vec<String> = names.iter().filter_map(Value::as_str).map(printable).collect();
    let capabilities = if names.is_empty() { "none".to_owned() } else { names.join(" ") };
    let locked = match in_force["memory_locked"].as_bool() {
        Some(true) => "locked",
        Some(false) => "not locked",
        None => "-",
    };
    format!(
        "capabilities {capabilities}, landlock {}, seccomp {}, core dumps {}, memory {locked}",
        text("landlock"),
        text("seccomp"),
        text("core_dumps"),
    )
}

fn rate(status: &Value) -> String {
    let cache = &status["cache"];
    let (Some(hits), Some(misses)) = (cache["hits"].as_u64(), cache["misses"].as_u64()) else {
        return String::new();
    };
    let (hits, all) = (u128::from(hits), u128::from(hits) + u128::from(misses));
    if all == 0 {
        return String::new();
    }
    let per_mille = hits * 1000 / all;
    format!(" ({}.{} %)", per_mille / 10, per_mille % 10)
}
