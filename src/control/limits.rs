//! The route on limits of disks, and the events of disks at their quotas.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;

use super::wire::{self, Disk, SetLimits};
use super::{Answer, Control, Name, blocking};
use crate::events::{Event, Kind};
use crate::format::limits::Limits;

/// Change the limits of a disk
///
/// The limits hold at once, also for requests that wait, and are durable before the answer is sent.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/limits",
    tag = "disks",
    operation_id = "limit_disk",
    request_body = SetLimits,
    responses((status = 200, description = "The disk with its new limits.", body = Disk))
)]
pub(super) async fn set(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<SetLimits>, JsonRejection>,
) -> Answer<Disk> {
    let Json(new) = body?;
    blocking(move || {
        let node = c.store.disk(&name)?;
        node.change_limits(|limits| apply(&new, limits))?;
        c.store.count_quotas();
        c.service.limits_changed(node.id());
        Ok(c.listed(&node))
    })
    .await
}

/// Changes what a request names.
fn apply(new: &SetLimits, limits: &mut Limits) {
    let Limits { quota, iops, bandwidth, burst_ms } = limits;
    let all = [
        (new.quota, quota),
        (new.iops, &mut iops.all),
        (new.read_iops, &mut iops.read),
        (new.write_iops, &mut iops.write),
        (new.bandwidth, &mut bandwidth.all),
        (new.read_bandwidth, &mut bandwidth.read),
        (new.write_bandwidth, &mut bandwidth.write),
    ];
    for (new, limit) in all {
        *limit = new.unwrap_or(*limit);
    }
    *burst_ms = new.burst_ms.unwrap_or(*burst_ms);
}

/// The limits of a new disk.
pub(super) fn of_new(new: &SetLimits) -> Limits {
    let mut limits = Limits::default();
    apply(new, &mut limits);
    limits
}

/// The limits in an answer.
pub(super) fn shown(limits: &Limits) -> wire::Limits {
    let Limits { quota, iops, bandwidth, burst_ms } = *limits;
    wire::Limits {
        quota,
        iops: iops.all,
        read_iops: iops.read,
        write_iops: iops.write,
        bandwidth: bandwidth.all,
        read_bandwidth: bandwidth.read,
        write_bandwidth: bandwidth.write,
        burst_ms,
    }
}

/// How often disks are looked at.
const TICK: Duration = Duration::from_secs(1);

/// Emits an event when a disk has no room in its quota, and when it has room again; for ever.
pub(super) async fn tick(c: Control) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut told: BTreeMap<u64, String> = BTreeMap::new();
    loop {
        interval.tick().await;
        let full = c.store.disks_at_quota().into_iter().map(|disk| (disk.id(), disk));
        let full: BTreeMap<_, _> = full.collect();
        for disk in told.iter().filter(|(id, _)| !full.contains_key(id)).map(|(_, name)| name) {
            c.events.emit(Event::of_disk(Kind::DiskRoom, disk));
        }
        told.retain(|id, _| full.contains_key(id));
        for (id, disk) in full.iter().filter(|(id, _)| !told.contains_key(*id)).collect::<Vec<_>>() {
            let name = disk.name();
            tracing::warn!(
                disk = name,
                "the disk is at its quota: writes that need space are refused until its quota is raised or some of its space is free"
            );
            let quota = disk.limits().quota.unwrap_or(0);
            c.events.emit(Event::of_disk(Kind::DiskFull, &name).bytes(quota));
            told.insert(*id, name);
        }
    }
}
