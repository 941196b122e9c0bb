//! The route on counters of requests.

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::State;

use super::wire::{BaseStats, Counters, DiskStats, LatencyBucket, OperationStats, Stats, Total, rfc3339};
use super::{Answer, Control, events, quick};
use crate::events::Traffic;
use crate::io::sys;
use crate::stats::{Operation, OperationSums, Origin, Sums, bound_us};

/// Show counters of requests
///
/// Operations, bytes, latencies and errors of each disk and base, and where reads were answered from. Answered from
/// memory, even while other requests hang. The counters begin at 0 with each worker: `since` and `worker` tell.
#[utoipa::path(
    get,
    path = "/v1/stats",
    tag = "daemon",
    operation_id = "stats",
    responses((status = 200, description = "The counters.", body = Stats))
)]
pub(super) async fn stats(State(c): State<Control>) -> Answer<Stats> {
    quick(move || Ok(c.stats())).await
}

impl Control {
    fn stats(&self) -> Stats {
        let disks = self.store.disk_stats().all();
        let (all_disks, _) = self.store.disk_stats().totals();
        let disks = disks.iter().filter_map(|counted| {
            let node = self.store.disk_by_id(counted.id).filter(|node| !node.is_unlinked())?;
            let (name, base) = (node.name(), node.base_name());
            Some(DiskStats { id: counted.id, name, base, counters: counters_of(&counted.sums) })
        });
        let traffic: HashMap<u64, Arc<Traffic>> = self.events.bases().into_iter().collect();
        let bases = self.store.bases().into_iter().map(|node| BaseStats {
            id: node.id(),
            name: node.record().name.clone(),
            counters: counters_of(&node.counters().sums()),
            traffic: traffic.get(&node.id()).map(|traffic| events::traffic_of(traffic)).unwrap_or_default(),
        });
        Stats {
            since: rfc3339(self.serving_since_ns),
            worker: sys::pid(),
            all_disks: counters_of(&all_disks),
            disks: disks.collect(),
            bases: bases.collect(),
        }
    }
}

fn counters_of(sums: &Sums) -> Counters {
    let operations = Operation::ALL.into_iter().filter_map(|operation| {
        let sums = sums.operation(operation);
        (sums.count() > 0).then(|| (operation.name().to_owned(), operation_of(sums)))
    });
    let read_from = Origin::ALL.into_iter().filter_map(|origin| {
        let total = sums.origin(origin);
        let shown = Total { count: total.count, bytes: total.bytes };
        (total.count > 0).then(|| (origin.name().to_owned(), shown))
    });
    Counters {
        operations: operations.collect(),
        read_from: read_from.collect(),
        waits: sums.waits,
        waited_ns: sums.waited_ns,
        refused: sums.refused,
        throttled: sums.throttled,
        throttled_ns: sums.throttled_ns,
    }
}

fn operation_of(sums: &OperationSums) -> OperationStats {
    let buckets = sums.latency.iter().enumerate().filter(|(_, count)| **count > 0);
    OperationStats {
        count: sums.count(),
        bytes: sums.bytes,
        errors: sums.errors,
        interrupted: sums.interrupted,
        latency_ns: sums.latency_ns,
        latency: buckets
            .map(|(bucket, count)| LatencyBucket { up_to_us: bound_us(bucket), count: *count })
            .collect(),
    }
}
