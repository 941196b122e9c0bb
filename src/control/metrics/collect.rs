//! The values of all metrics now, from the counters of this worker.

use std::collections::{BTreeMap, HashMap, HashSet};

use super::exposition::{Value, Values, seconds};
use super::table::*;
use crate::control::Control;
use crate::events::{Kind, Reason, Total};
use crate::serve::{CopiedBytes, Waiters, guard};
use crate::stats::{Operation, Origin, Series, Sums};

/// Nanoseconds since the epoch as seconds.
fn time(ns: i64) -> Value {
    Value::Number(ns as f64 / 1e9)
}

impl Control {
    /// The values of all metrics.
    pub(super) fn metrics(&self) -> Values {
        let mut values = Values::default();
        self.add_daemon(&mut values);
        self.add_requests(&mut values);
        self.add_copies(&mut values);
        self.add_disks(&mut values);
        self.add_bases(&mut values);
        self.add_caches(&mut values);
        for (server, count) in self.bases.sources().servers() {
            values.add(&SERVER_REQUESTS, [&server], count.requests);
            values.add(&SERVER_RETRIES, [&server], count.retries);
            values.add(&SERVER_BYTES, [&server], count.bytes);
            values.add(&SERVER_WAIT, [&server], Value::Number(seconds(count.answers_ns)));
            values.add(&SERVER_MISSES, [&server], count.misses);
            values.add(&SERVER_WRONG, [&server], count.wrong);
        }
        values.add(&RELATIVE_BYTES, [], self.bases.sources().relative_bytes());
        let [requests, missed, refused, bytes] = self.bases.sources().lent().all();
        let sent = requests.saturating_sub(missed + refused);
        for (result, count) in [("sent", sent), ("missed", missed), ("refused", refused)] {
            values.add(&EXPORT_REQUESTS, [result], count);
        }
        values.add(&EXPORT_BYTES, [], bytes);
        values
    }

    fn add_daemon(&self, values: &mut Values) {
        let report = self.report.lock().clone();
        values.add(&BUILD, [env!("CARGO_PKG_VERSION")], 1);
        values.add(&MOUNTED, [], time(self.since_ns));
        values.add(&WORKER_STARTED, [], time(self.serving_since_ns));
        values.add(&WORKER_STARTS, [], report.worker_starts);
        values.add(&STANDBY, [], report.standby.prepared);
        values.add(&PANICS, [], guard::panics());
        let space = self.space();
        let known = [(&STORE_SIZE, space.total_bytes), (&STORE_AVAILABLE, space.available_bytes)];
        for (metric, bytes) in known {
            if let Some(bytes) = bytes {
                values.add(metric, [], bytes);
            }
        }
        values.add(&STORE_FULL, [], space.full);
        for pool in self.store.pools() {
            values.add(&POOL_UP, [&pool.name], pool.trouble.is_none());
            if let Some(space) = pool.space {
                values.add(&POOL_SIZE, [&pool.name], space.total);
                values.add(&POOL_AVAILABLE, [&pool.name], space.available);
            }
            if let Some(reserve) = pool.reserve {
                values.add(&POOL_FULL, [&pool.name], reserve.full);
            }
        }
        let maps = self.live_maps(&report);
        for (metric, bytes) in [(&LIVE_MAPS, maps.bytes), (&LIVE_MAPS_LIMIT, maps.limit_bytes)] {
            if let Some(bytes) = bytes {
                values.add(metric, [], bytes);
            }
        }
        let indexes = self.layer_indexes();
        values.add(&LAYER_INDEXES, [], indexes.bytes);
        values.add(&LAYER_INDEXES_UNWRITTEN, [], indexes.unwritten_bytes);
        let bus = self.events.state();
        for kind in Kind::ALL {
            values.add(&EVENTS, [kind.name()], bus.of_kind[kind as usize]);
        }
        values.add(&EVENTS_LOST, [], bus.lost);
        let (delivered, dropped) = self.notifications.counts();
        values.add(&NOTIFICATIONS, ["delivered"], delivered);
        values.add(&NOTIFICATIONS, ["dropped"], dropped);
    }

    fn add_requests(&self, values: &mut Values) {
        let (mut all, _) = self.store.disk_stats().totals();
        all.join(&self.store.base_stats().totals().0);
        for operation in Operation::ALL {
            let sums = all.operation(operation);
            values.add(&REQUEST_DURATION, [operation.name()], sums);
            values.add(&REQUEST_ERRORS, [operation.name()], sums.errors);
        }
        let Waiters { requests, bytes, refused, interrupted, throttled, .. } = self.service.waiters();
        values.add(&REQUESTS_THROTTLED, [], throttled as u64);
        values.add(&REQUESTS_WAITING, [], requests as u64);
        values.add(&WAITING_BYTES, [], bytes as u64);
        values.add(&REQUESTS_REFUSED, [], refused);
        values.add(&REQUESTS_INTERRUPTED, [], interrupted);
    }

    fn add_copies(&self, values: &mut Values) {
        let CopiedBytes { shared, zeroed, moved } = self.service.copied_bytes();
        for (how, bytes) in [("shared", shared), ("zeros", zeroed), ("moved", moved)] {
            values.add(&COPIED, [how], bytes);
        }
    }

    fn add_disks(&self, values: &mut Values) {
        let attached = self.store.attached();
        values.add(&DISKS, [], self.store.disk_count() as u64);
        values.add(&DISKS_TRASHED, [], self.store.trashed().len() as u64);
        values.add(&TRASH, [], self.store.trash_bytes());
        values.add(&DISKS_ATTACHED, [], attached.len() as u64);
        values.add(&DISKS_REFUSING, [], self.refusing(&attached).len() as u64);
        values.add(&DISKS_AT_QUOTA, [], self.store.disks_at_quota().len() as u64);
        values.add(&QUOTA_REFUSALS, [], self.store.quota_refusals());
        values.add(&LIMITS_EXCEEDED, [], self.store.limits_exceeded());
        let registry = self.store.disk_stats();
        // Two disks have one name for a moment when one replaces the other.
        let mut names = HashSet::new();
        for counted in registry.own() {
            let node = self.store.disk_by_id(counted.id).filter(|node| !node.is_unlinked());
            if let Some(name) = node.map(|node| node.name())
                && names.insert(name.clone())
            {
                add_disk(values, &name, &counted.sums);
            }
        }
        let (_, others) = registry.totals();
        if others != Sums::default() {
            add_disk(values, OTHER, &others);
        }
    }

    fn add_bases(&self, values: &mut Values) {
        let bases = self.store.bases();
        values.add(&BASES, [], bases.len() as u64);
        values.add(&BASES_WAITING, [], self.waiting().len() as u64);
        values.add(&BASES_FAILING, [], self.failing().len() as u64);
        // A base has counters once they are asked for.
        bases.iter().for_each(|node| drop(node.counters().clone()));
        let names: HashMap<u64, String> =
            bases.iter().map(|node| (node.id(), node.record().name.clone())).collect();
        let traffic: BTreeMap<u64, _> = self.events.bases().into_iter().collect();
        let registry = self.store.base_stats();
        for counted in registry.all() {
            let traffic = traffic.get(&counted.id);
            match counted.series {
                Series::Own => {
                    let Some(name) = names.get(&counted.id) else { continue };
                    add_base(values, name, &counted.sums);
                    let total = |reason| traffic.map_or_else(Total::default, |traffic| traffic.total(reason));
                    add_traffic(values, name, total);
                }
                Series::Other => traffic.into_iter().for_each(|traffic| traffic.sum_up()),
            }
        }
        let ((_, others), traffic) = (registry.totals(), self.events.summed_up());
        let has_traffic = Reason::ALL.into_iter().any(|reason| traffic[reason as usize].count > 0);
        if others != Sums::default() || has_traffic {
            add_base(values, OTHER, &others);
            add_traffic(values, OTHER, |reason| traffic[reason as usize]);
        }
    }

    fn add_caches(&self, values: &mut Values) {
        let memory = self.store.cache().stats();
        values.add(&MEMORY_CACHE_HITS, [], memory.hits);
        values.add(&MEMORY_CACHE_MISSES, [], memory.misses);
        values.add(&MEMORY_CACHE_EVICTIONS, [], memory.evictions);
        values.add(&MEMORY_CACHE_USED, [], memory.memory_used);
        values.add(&MEMORY_CACHE_LIMIT, [], memory.memory_limit);
        let disk = self.bases.sources().cache().stats();
        values.add(&DISK_CACHE_HITS, [], disk.hits);
        values.add(&DISK_CACHE_MISSES, [], disk.misses);
        values.add(&DISK_CACHE_EVICTIONS, [], disk.evictions);
        values.add(&DISK_CACHE_USED, [], disk.used_bytes);
        values.add(&DISK_CACHE_LIMIT, [], disk.limit_bytes);
        values.add(&DISK_CACHE_ERRORS, ["read"], disk.read_errors);
        values.add(&DISK_CACHE_ERRORS, ["write"], disk.write_errors);
        values.add(&DISK_CACHE_CORRUPT, [], disk.corrupt_blocks);
        values.add(&DISK_CACHE_DEGRADED, [], disk.degraded.is_some());
        for (pool, copies) in self.bases.sources().copies().stats() {
            values.add(&COPIES_USED, [pool.as_str()], copies.used_bytes);
            values.add(&COPIES_DEGRADED, [pool.as_str()], copies.degraded.is_some());
        }
    }
}

fn add_disk(values: &mut Values, disk: &str, sums: &Sums) {
    let mut errors = 0;
    for operation in Operation::ALL {
        let (name, sums) = (operation.name(), sums.operation(operation));
        values.add(&DISK_OPERATIONS, [disk, name], sums.count());
        values.add(&DISK_OPERATION_TIME, [disk, name], Value::Number(seconds(sums.latency_ns)));
        if operation.moves_bytes() {
            values.add(&DISK_OPERATION_BYTES, [disk, name], sums.bytes);
        }
        errors += sums.errors;
    }
    values.add(&DISK_ERRORS, [disk], errors);
    values.add(&DISK_WAITS, [disk], sums.waits);
    values.add(&DISK_WAIT_TIME, [disk], Value::Number(seconds(sums.waited_ns)));
    values.add(&DISK_THROTTLED, [disk], sums.throttled);
    values.add(&DISK_THROTTLED_TIME, [disk], Value::Number(seconds(sums.throttled_ns)));
    for origin in Origin::ALL {
        values.add(&DISK_READ_FROM, [disk, origin.name()], sums.origin(origin).bytes);
    }
}

fn add_base(values: &mut Values, base: &str, sums: &Sums) {
    for operation in [Operation::Read, Operation::Open, Operation::Seek] {
        let (name, sums) = (operation.name(), sums.operation(operation));
        values.add(&BASE_OPERATIONS, [base, name], sums.count());
        if operation.moves_bytes() {
            values.add(&BASE_OPERATION_BYTES, [base, name], sums.bytes);
        }
    }
    values.add(&BASE_WAITS, [base], sums.waits);
    values.add(&BASE_WAIT_TIME, [base], Value::Number(seconds(sums.waited_ns)));
}

fn add_traffic(values: &mut Values, base: &str, total: impl Fn(Reason) -> Total) {
    for reason in Reason::ALL {
        let (name, Total { count, bytes }) = (reason.name(), total(reason));
        match reason.kind() {
            Kind::BaseHit => {
                values.add(&BASE_HITS, [base, name], count);
                values.add(&BASE_HIT_BYTES, [base, name], bytes);
            }
            Kind::BaseMiss => {
                values.add(&BASE_FETCHES, [base, name], count);
                values.add(&BASE_FETCHED_BYTES, [base, name], bytes);
            }
            _ => values.add(&BASE_EVICTED_BYTES, [base, name], bytes),
        }
    }
}
