//! What happened between two looks at the daemon's counters.
//!
//! What must hold: the counters of a worker begin at 0. When another worker serves, all that its counters say happened
//! since the last look, and a frame says so.

use std::collections::HashMap;
use std::time::{Instant, SystemTime};

use serde::Serialize;
use serde_json::{Value, json};

use crate::cli::output::{Column, Kind};
use crate::control::wire::{Base, BaseState, Counters, Disk, DiskState, OperationStats, Stats, Total};

pub(super) const DISKS: [Column; 15] = [
    ("NAME", "name", Kind::Text),
    ("OPS/S", "operations_per_second", Kind::Number),
    ("RD/S", "reads_per_second", Kind::Number),
    ("WR/S", "writes_per_second", Kind::Number),
    ("READ/S", "read_bytes_per_second", Kind::Size),
    ("WRITE/S", "write_bytes_per_second", Kind::Size),
    ("RD LAT", "read_latency_us", Kind::Micros),
    ("WR LAT", "write_latency_us", Kind::Micros),
    ("HIT%", "hit_percent", Kind::Number),
    ("DELTA", "delta_bytes", Kind::Size),
    ("GROWTH/S", "delta_growth_per_second", Kind::Size),
    ("WAIT/S", "waits_per_second", Kind::Number),
    ("ERR/S", "errors_per_second", Kind::Number),
    ("BASE", "base", Kind::Text),
    ("STATE", "state", Kind::Text),
];

pub(super) const BASES: [Column; 10] = [
    ("NAME", "name", Kind::Text),
    ("STATE", "state", Kind::Text),
    ("DISKS", "disks", Kind::Number),
    ("HIT/S", "hit_bytes_per_second", Kind::Size),
    ("FETCH/S", "fetched_bytes_per_second", Kind::Size),
    ("EVICT/S", "evicted_bytes_per_second", Kind::Size),
    ("HIT%", "hit_percent", Kind::Number),
    ("WAIT/S", "waits_per_second", Kind::Number),
    ("CACHED", "cached_bytes", Kind::Size),
    ("SOURCE", "source", Kind::Text),
];

pub(super) const SERVERS: [Column; 4] = [
    ("BASE", "base", Kind::Text),
    ("URL", "url", Kind::Text),
    ("WAITING", "waiting_since", Kind::Time),
    ("TROUBLE", "trouble", Kind::Text),
];

/// One look at the daemon.
pub(super) struct Sample {
    pub at: Instant,
    pub time: SystemTime,
    pub stats: Stats,
    pub disks: Vec<Disk>,
    pub bases: Vec<Base>,
}

/// What happened between two looks.
#[derive(Clone, Debug, Default, Serialize)]
pub(super) struct Frame {
    /// The time of the later look.
    pub at: String,
    /// Seconds between both.
    pub seconds: f64,
    /// Process of the worker.
    pub worker: u32,
    /// Whether another worker served at the earlier look. Its last operations are not counted.
    pub worker_changed: bool,
    /// All disks together.
    pub total: Value,
    pub disks: Vec<Value>,
    pub bases: Vec<Value>,
    pub servers: Vec<Value>,
}

impl Frame {
    /// What happened from `before` to `now`.
    pub(super) fn between(before: &Sample, now: &Sample) -> Self {
        let seconds = now.at.duration_since(before.at).as_secs_f64().max(0.001);
        let worker_changed = before.stats.worker != now.stats.worker || before.stats.since != now.stats.since;
        let none = Stats::default();
        let earlier = if worker_changed { &none } else { &before.stats };
        let change = Change { seconds };
        let mut total = change.of_counters(&earlier.all_disks, &now.stats.all_disks);
        let sum = |key: &str, rows: &[Value]| rows.iter().filter_map(|row| row[key].as_i64()).sum::<i64>();
        let disks = disks(before, now, earlier, &change);
        total["disks"] = json!(disks.len());
        total["delta_bytes"] = json!(sum("delta_bytes", &disks));
        total["delta_growth_per_second"] = json!(sum("delta_growth_per_second", &disks));
        Self {
            at: humantime::format_rfc3339_millis(now.time).to_string(),
            seconds: round(seconds, 1000.0),
            worker: now.stats.worker,
            worker_changed,
            total,
            disks,
            bases: bases(now, earlier, &change),
            servers: now.bases.iter().flat_map(servers).collect(),
        }
    }
}

fn disks(before: &Sample, now: &Sample, earlier: &Stats, change: &Change) -> Vec<Value> {
    let counted: HashMap<u64, &Counters> =
        now.stats.disks.iter().map(|disk| (disk.id, &disk.counters)).collect();
    let former: HashMap<u64, &Counters> =
        earlier.disks.iter().map(|disk| (disk.id, &disk.counters)).collect();
    let sizes: HashMap<u64, u64> = before.disks.iter().map(|disk| (disk.id, disk.delta_bytes)).collect();
    let states: HashMap<&str, BaseState> =
        now.bases.iter().map(|base| (base.name.as_str(), base.state)).collect();
    let none = Counters::default();
    let row = |disk: &Disk| {
        let (from, to) =
            (former.get(&disk.id).copied().unwrap_or(&none), counted.get(&disk.id).copied().unwrap_or(&none));
        let mut row = change.of_counters(from, to);
        let delta = sizes.get(&disk.id).copied().unwrap_or(disk.delta_bytes);
        row["name"] = json!(disk.name);
        row["base"] = json!(disk.base);
        row["delta_bytes"] = json!(disk.delta_bytes);
        row["delta_growth_per_second"] = json!(change.growth(delta, disk.delta_bytes));
        row["state"] = json!(state(disk, disk.base.as_deref().and_then(|base| states.get(base).copied())));
        row
    };
    now.disks.iter().map(row).collect()
}

/// The state of a disk. Where the disk itself works, that of its base.
fn state(disk: &Disk, base: Option<BaseState>) -> &'static str {
    match (disk.state, base) {
        (DiskState::Failed, _) => "failed",
        (DiskState::Locked, _) => "locked",
        (DiskState::HadErrors, _) => "had_errors",
        (DiskState::Ok, None | Some(BaseState::Ok)) => "ok",
        (DiskState::Ok, Some(BaseState::Refused)) => "base refused",
        (DiskState::Ok, Some(BaseState::Failed)) => "base failed",
        (DiskState::Ok, Some(BaseState::GivenUp)) => "base given_up",
        (DiskState::Ok, Some(BaseState::Changed)) => "base changed",
        (DiskState::Ok, Some(BaseState::Failing)) => "base failing",
        (DiskState::Ok, Some(BaseState::Waiting)) => "base waiting",
    }
}

fn bases(now: &Sample, earlier: &Stats, change: &Change) -> Vec<Value> {
    let counted: HashMap<u64, _> = now.stats.bases.iter().map(|base| (base.id, base)).collect();
    let former: HashMap<u64, _> = earlier.bases.iter().map(|base| (base.id, base)).collect();
    let none = crate::control::wire::BaseStats::default();
    let row = |base: &Base| {
        let (from, to) =
            (former.get(&base.id).copied().unwrap_or(&none), counted.get(&base.id).copied().unwrap_or(&none));
        let bytes = |all: &std::collections::BTreeMap<String, Total>| {
            all.values().map(|total| total.bytes).sum::<u64>()
        };
        let [hit, fetched, evicted] = [
            bytes(&to.traffic.hit).saturating_sub(bytes(&from.traffic.hit)),
            bytes(&to.traffic.miss).saturating_sub(bytes(&from.traffic.miss)),
            bytes(&to.traffic.evict).saturating_sub(bytes(&from.traffic.evict)),
        ];
        json!({
            "name": base.name,
            "state": base.state,
            "disks": base.disks,
            "hit_bytes_per_second": change.whole(hit),
            "fetched_bytes_per_second": change.whole(fetched),
            "evicted_bytes_per_second": change.whole(evicted),
            "hit_percent": percent(hit, fetched),
            "waits_per_second": change.rate(to.counters.waits.saturating_sub(from.counters.waits)),
            "cached_bytes": base.cached_bytes,
            "source": base.source,
        })
    };
    now.bases.iter().map(row).collect()
}

fn servers(base: &Base) -> impl Iterator<Item = Value> + '_ {
    base.servers.iter().map(|server| {
        json!({
            "base": base.name,
            "url": server.url,
            "waiting_since": base.waiting_since,
            "trouble": server.trouble,
        })
    })
}

/// Makes rates of differences.
struct Change {
    seconds: f64,
}

impl Change {
    /// Per second, with one decimal.
    fn rate(&self, count: u64) -> f64 {
        round(count as f64 / self.seconds, 10.0)
    }

    /// Per second, as a whole number.
    fn whole(&self, count: u64) -> u64 {
        (count as f64 / self.seconds) as u64
    }

    fn growth(&self, before: u64, now: u64) -> i64 {
        ((now as f64 - before as f64) / self.seconds) as i64
    }

    fn of_counters(&self, before: &Counters, now: &Counters) -> Value {
        let none = OperationStats::default();
        let of = |counters: &Counters, name: &str| counters.operations.get(name).unwrap_or(&none).clone();
        let ended = |name: &str| Ended::between(&of(before, name), &of(now, name));
        let (reads, writes) = (ended("read"), ended("write"));
        let others: Vec<Ended> =
            ["discard", "zero", "reserve", "flush", "seek"].into_iter().map(ended).collect();
        let all = || [&reads, &writes].into_iter().chain(&others);
        let bytes =
            |counters: &Counters, origin: &str| counters.read_from.get(origin).map_or(0, |total| total.bytes);
        let from = |origin: &str| bytes(now, origin).saturating_sub(bytes(before, origin));
        let waits = now.waits.saturating_sub(before.waits);
        let waited_us = now.waited_ns.saturating_sub(before.waited_ns) / 1000;
        json!({
            "operations_per_second": self.rate(all().map(|ended| ended.count).sum()),
            "reads_per_second": self.rate(reads.count),
            "writes_per_second": self.rate(writes.count),
            "read_bytes_per_second": self.whole(reads.bytes),
            "write_bytes_per_second": self.whole(writes.bytes),
            "read_latency_us": reads.latency_us(),
            "write_latency_us": writes.latency_us(),
            "hit_percent": percent(from("memory") + from("disk"), from("fetched")),
            "waits_per_second": self.rate(waits),
            "wait_us": waited_us.checked_div(waits),
            "errors_per_second": self.rate(all().map(|ended| ended.errors).sum()),
        })
    }
}

/// The requests of one kind that ended between two looks.
struct Ended {
    count: u64,
    bytes: u64,
    errors: u64,
    latency_ns: u64,
}

impl Ended {
    fn between(before: &OperationStats, now: &OperationStats) -> Self {
        Self {
            count: now.count.saturating_sub(before.count),
            bytes: now.bytes.saturating_sub(before.bytes),
            errors: now.errors.saturating_sub(before.errors),
            latency_ns: now.latency_ns.saturating_sub(before.latency_ns),
        }
    }

    /// The average in microseconds.
    fn latency_us(&self) -> Option<u64> {
        (self.latency_ns / 1000).checked_div(self.count)
    }
}

/// The share of `hit` with one decimal; none without a byte.
fn percent(hit: u64, miss: u64) -> Option<f64> {
    let all = hit + miss;
    (all > 0).then(|| round(hit as f64 * 100.0 / all as f64, 10.0))
}

fn round(number: f64, steps: f64) -> f64 {
    (number * steps).round() / steps
}
