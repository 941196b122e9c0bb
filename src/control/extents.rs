//! The route for changed extents: what differs between two moments of a disk.
//!
//! What must hold: an answer takes bounded time and memory, whatever the size of the disk; a client asks for the rest
//! with another request. No data is read.

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use serde::Deserialize;
use utoipa::IntoParams;

use super::pool::JobKind;
use super::wire::{DiskExtent, DiskExtents, ExtentContent};
use super::{Answer, ApiError, Control, Name, in_pool};
use crate::disk::changes::{Change, Content};
use crate::store::StoreError;

/// Extents of an answer, when the request names no number.
const LIMIT: u32 = 1000;
const MOST: u32 = 10_000;

/// Selects two moments of a disk, and a part of what differs.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Between {
    /// Name of the snapshot from which the disk differs. By default its base, or nothing.
    since: Option<String>,
    /// Name of the snapshot that differs. By default the disk as it is when the request is carried out.
    until: Option<String>,
    /// Bytes before this one are left out: `next` of the answer before.
    start: Option<u64>,
    /// The most extents, 1 to 10000. By default 1000.
    #[param(minimum = 1, maximum = 10000)]
    limit: Option<u32>,
}

/// List what differs between two moments of a disk
///
/// Found from the maps of layers: no data is read, and an extent may have the same bytes as before. The daemon refuses a
/// snapshot on which the later moment does not stand, because the disk was rolled back. An answer has a part of the
/// extents; `next` is the start of the next part, and an answer may have no extents and a `next`.
#[utoipa::path(
    get,
    path = "/v1/disks/{name}/extents",
    tag = "disks",
    operation_id = "list_extents",
    params(Between),
    responses((status = 200, description = "A part of the extents.", body = DiskExtents))
)]
pub(super) async fn changed(
    State(c): State<Control>,
    Name(disk): Name,
    query: Result<Query<Between>, QueryRejection>,
) -> Answer<DiskExtents> {
    let Query(Between { since, until, start, limit }) = query?;
    let limit = limit.unwrap_or(LIMIT);
    if !(1..=MOST).contains(&limit) {
        return Err(ApiError::invalid(format!("limit is {limit}; give 1 to {MOST}")));
    }
    in_pool(JobKind::Map, move || {
        let node = c.store.disk(&disk)?;
        // Attaching the disk opens its base.
        if until.is_none()
            && node.peek().is_none()
            && let Some(base) = node.base_name().and_then(|base| c.store.base(&base).ok())
        {
            c.refuse_hanging(&base)?;
        }
        let base = node.base_name();
        let changes = node.changes(since.as_deref(), until.as_deref(), start.unwrap_or(0), limit as usize)?;
        if node.base_name() != base {
            let why = "it was put on another base meanwhile; try again";
            return Err(StoreError::invalid(format!("disk {}", node.name()), why).into());
        }
        Ok(DiskExtents {
            disk: node.name(),
            base,
            since,
            until,
            size: changes.size,
            extents: changes.list.iter().map(extent).collect(),
            next: changes.next,
        })
    })
    .await
    .map(Json)
}

fn extent(change: &Change) -> DiskExtent {
    let content = match change.content {
        Content::Data => ExtentContent::Data,
        Content::Zero => ExtentContent::Zero,
        Content::Base => ExtentContent::Base,
    };
    DiskExtent { offset: change.offset, length: change.len, content }
}
