//! Routes on what a disk stands on: flatten, rebase, compact.

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;

use super::wire::{Change as ChangeBody, Disk, Rebase};
use super::{Answer, ApiError, Control, Name, blocking};
use crate::store::Change;

/// Make a disk independent of its base
///
/// A job copies the blocks of the base that the disk and its snapshots show, while the disk stays in use and shows the same
/// bytes. `job` of the answer is its identifier; null when the disk has no base. A request while the job is under way
/// changes its `rate`.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/flatten",
    tag = "disks",
    operation_id = "flatten_disk",
    request_body = ChangeBody,
    responses((status = 200, description = "The disk.", body = Disk))
)]
pub(super) async fn flatten(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<ChangeBody>, JsonRejection>,
) -> Answer<Disk> {
    let Json(ChangeBody { rate }) = body?;
    blocking(move || c.begin_change(&name, &Change::Flatten, rate)).await
}

/// Put a disk on another base
///
/// A job compares what the disk shows with the new base, and keeps the blocks that differ, while the disk stays in use and
/// shows the same bytes. `job` of the answer is its identifier; null when the disk stands on that base already. With `unsafe`
/// nothing is compared and there is no job: what was never written shows the new base. The daemon refuses that for a disk
/// that a client has open, unless `force` is set. The new base is at least as large as the present one.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/rebase",
    tag = "disks",
    operation_id = "rebase_disk",
    request_body = Rebase,
    responses((status = 200, description = "The disk.", body = Disk))
)]
pub(super) async fn rebase(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<Rebase>, JsonRejection>,
) -> Answer<Disk> {
    let Json(Rebase { base, rate, is_unsafe, force }) = body?;
    if is_unsafe && !force {
        c.refuse_in_use(vec![c.store.disk(&name)?]).await?;
    }
    blocking(move || {
        if !is_unsafe {
            return c.begin_change(&name, &Change::Rebase(base), rate);
        }
        if rate.is_some() {
            return Err(ApiError::invalid("rate: nothing is copied with unsafe; leave one of them out"));
        }
        c.store.rebase_unsafe(&name, &base)?;
        let node = c.store.disk(&name)?;
        c.service.resized(node.id());
        Ok(c.disk(&node))
    })
    .await
}

/// Merge the layers of a disk
///
/// A job copies layers between which no snapshot and no clone tells any more into one: the space of blocks that a later
/// layer hides comes back. `job` of the answer is its identifier; null when there are no such layers.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/compact",
    tag = "disks",
    operation_id = "compact_disk",
    request_body = ChangeBody,
    responses((status = 200, description = "The disk.", body = Disk))
)]
pub(super) async fn compact(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<ChangeBody>, JsonRejection>,
) -> Answer<Disk> {
    let Json(ChangeBody { rate }) = body?;
    blocking(move || c.begin_change(&name, &Change::Compact, rate)).await
}

impl Control {
    fn begin_change(&self, disk: &str, change: &Change, rate: Option<u64>) -> Result<Disk, ApiError> {
        if rate == Some(0) {
            return Err(ApiError::invalid(
                "rate: 0 bytes per second would never end; leave it out for no limit",
            ));
        }
        let job = self.disk_jobs.begin(disk, change, rate.unwrap_or(0))?;
        let node = self.store.disk(disk)?;
        Ok(Disk { job: job.map(|job| job.id()), ..self.disk(&node) })
    }
}
