//! Routes on snapshots: take, list, remove, roll back.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};

use super::idempotency::Key;
use super::wire::{Disk, Layer, Removed, Rollback, Snapshot, TakeSnapshot, rfc3339};
use super::{Answer, ApiError, Control, Name, blocking};
use crate::format::lineage::SnapshotEntry;
use crate::store::DiskNode;

/// List the snapshots of a disk
#[utoipa::path(
    get,
    path = "/v1/disks/{name}/snapshots",
    tag = "disks",
    operation_id = "list_snapshots",
    responses((status = 200, description = "Snapshots in the order in which they were taken.", body = Vec<Snapshot>))
)]
pub(super) async fn list(State(c): State<Control>, Name(name): Name) -> Answer<Vec<Snapshot>> {
    blocking(move || {
        let node = c.store.disk(&name)?;
        Ok(node.lineage().snapshots.iter().map(|snapshot| c.snapshot(&node, snapshot)).collect())
    })
    .await
}

/// Take a snapshot of a disk
///
/// The snapshot has all writes that were completed before the request. It is durable before the answer is sent. The disk
/// stays in use; its writes wait for a moment.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/snapshots",
    tag = "disks",
    operation_id = "take_snapshot",
    params(Key),
    request_body = TakeSnapshot,
    responses((status = 200, description = "The snapshot.", body = Snapshot))
)]
pub(super) async fn take(
    State(c): State<Control>,
    Name(disk): Name,
    key: Key,
    body: Result<Json<TakeSnapshot>, JsonRejection>,
) -> Answer<Snapshot> {
    let Json(TakeSnapshot { name }) = body?;
    let token = key.token("snapshot", &(&disk, &name));
    blocking(move || {
        let snapshot = c.store.snapshot(&disk, &name, token)?;
        let node = c.store.disk(&disk)?;
        Ok(c.snapshot(&node, &snapshot))
    })
    .await
}

/// Remove a snapshot
///
/// The space that nothing else needs is free when the answer is sent. Disks that were made of the snapshot stay.
#[utoipa::path(
    delete,
    path = "/v1/disks/{name}/snapshots/{snapshot}",
    tag = "disks",
    operation_id = "remove_snapshot",
    responses((status = 200, description = "The snapshot is gone.", body = Removed))
)]
pub(super) async fn remove(
    State(c): State<Control>,
    path: Result<Path<(String, String)>, axum::extract::rejection::PathRejection>,
) -> Answer<Removed> {
    let Path((disk, name)) = path.map_err(|error| ApiError::invalid(error.body_text()))?;
    blocking(move || {
        c.store.remove_snapshot(&disk, &name)?;
        c.disk_jobs.tend(&disk);
        Ok(Removed { removed: vec![format!("{disk}@{name}")] })
    })
    .await
}

/// Return a disk to a snapshot
///
/// What was written since is lost. All snapshots stay. The daemon refuses it for a disk that a client has open, unless
/// `force` is set.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/rollback",
    tag = "disks",
    operation_id = "roll_back_disk",
    params(Key),
    request_body = Rollback,
    responses((status = 200, description = "The disk.", body = Disk))
)]
pub(super) async fn roll_back(
    State(c): State<Control>,
    Name(disk): Name,
    key: Key,
    body: Result<Json<Rollback>, JsonRejection>,
) -> Answer<Disk> {
    let Json(Rollback { snapshot, force }) = body?;
    let token = key.token("rollback", &(&disk, &snapshot));
    if !force {
        c.refuse_in_use(vec![c.store.disk(&disk)?]).await?;
    }
    blocking(move || {
        c.store.rollback(&disk, &snapshot, token)?;
        let node = c.store.disk(&disk)?;
        c.service.resized(node.id());
        Ok(c.disk(&node))
    })
    .await
}

impl Control {
    fn snapshot(&self, node: &DiskNode, snapshot: &SnapshotEntry) -> Snapshot {
        Snapshot {
            id: snapshot.number,
            disk: node.name(),
            name: snapshot.name.clone(),
            size: snapshot.size,
            only_bytes: self.store.bytes_of_snapshot_only(node, &snapshot.name),
            created: rfc3339(snapshot.created_ns),
        }
    }

    /// The layers below a disk and its snapshots.
    pub(super) fn layers(&self, node: &DiskNode) -> Vec<Layer> {
        let lineage = node.lineage();
        let uses = self.store.layer_uses(node);
        let layer = |(place, layer): (usize, &crate::format::lineage::LayerEntry)| Layer {
            id: layer.number,
            bytes: self.store.layer_bytes(layer.number),
            shared_by: uses.get(&layer.number).copied().unwrap_or(0),
            snapshots: {
                let on_it = lineage.snapshots.iter().filter(|snapshot| snapshot.layer == Some(place));
                on_it.map(|snapshot| snapshot.name.clone()).collect()
            },
        };
        lineage.layers.iter().enumerate().map(layer).collect()
    }
}
