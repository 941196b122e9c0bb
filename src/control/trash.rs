//! Routes on the trash, on what stands on bases and layers, and on unused bases.

use std::collections::HashMap;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{Path, Query, State};
use serde::Deserialize;
use utoipa::IntoParams;

use super::wire::{
    self, BaseChild, Disk, DiskChild, PruneBases, PrunedBase, PrunedBases, Removed, RestoreDisk, TrashedDisk,
    rfc3339,
};
use super::{Answer, ApiError, Control, Name, blocking};
use crate::io::sys;
use crate::store::{self, BaseNode, ChildKind, Origin};

impl From<ChildKind> for wire::ChildKind {
    fn from(kind: ChildKind) -> Self {
        match kind {
            ChildKind::Disk => Self::Disk,
            ChildKind::Snapshot => Self::Snapshot,
            ChildKind::Trashed => Self::Trashed,
            ChildKind::Removed => Self::Removed,
        }
    }
}

fn number(path: Result<Path<u64>, PathRejection>) -> Result<u64, ApiError> {
    match path {
        Ok(Path(number)) => Ok(number),
        Err(error) => Err(ApiError::invalid(error.body_text())),
    }
}

/// List the trash
#[utoipa::path(
    get,
    path = "/v1/trash",
    tag = "disks",
    operation_id = "list_trash",
    responses((status = 200, description = "Those first that were removed first.", body = Vec<TrashedDisk>))
)]
pub(super) async fn list(State(c): State<Control>) -> Answer<Vec<TrashedDisk>> {
    blocking(move || {
        let shown = |store::TrashedDisk { node, trashed, bytes }: &store::TrashedDisk| TrashedDisk {
            id: node.id(),
            name: node.name(),
            base: node.base_name(),
            size: node.attributes().size,
            bytes: *bytes,
            snapshots: node.lineage().snapshots.len() as u64,
            removed: rfc3339(trashed.removed_ns),
            purge_after: rfc3339(trashed.purge_ns),
            open_handles: node.open_handles().map(|count| count as u64),
        };
        Ok(c.store.trash().iter().map(shown).collect())
    })
    .await
}

/// Restore a disk from the trash
///
/// It has its name again, or a new one, and its snapshots. The daemon refuses a name that another disk has.
#[utoipa::path(
    post,
    path = "/v1/trash/{id}/restore",
    tag = "disks",
    operation_id = "restore_disk",
    request_body = RestoreDisk,
    responses((status = 200, description = "The disk.", body = Disk))
)]
pub(super) async fn restore(
    State(c): State<Control>,
    path: Result<Path<u64>, PathRejection>,
    body: Result<Json<RestoreDisk>, JsonRejection>,
) -> Answer<Disk> {
    let number = number(path)?;
    let Json(RestoreDisk { name }) = body?;
    blocking(move || {
        let node = c.store.restore(number, name.as_deref())?;
        c.disk_jobs.resume();
        Ok(c.listed(&node))
    })
    .await
}

/// Purge a disk from the trash
///
/// Its data is gone when the answer is sent, or, while a client has the disk open, at the last close. Layers that another
/// disk needs stay.
#[utoipa::path(
    delete,
    path = "/v1/trash/{id}",
    tag = "disks",
    operation_id = "purge_disk",
    responses((status = 200, description = "The disk cannot be restored any more.", body = Removed))
)]
pub(super) async fn purge(
    State(c): State<Control>,
    path: Result<Path<u64>, PathRejection>,
) -> Answer<Removed> {
    let number = number(path)?;
    blocking(move || {
        let name = c.store.disk_by_id(number).map(|node| node.name());
        c.service.purge_trashed(number)?;
        Ok(Removed { removed: name.into_iter().collect() })
    })
    .await
}

/// List what stands on a base
///
/// Its disks, their snapshots, and its disks in the trash: what keeps the base from being removed.
#[utoipa::path(
    get,
    path = "/v1/bases/{name}/children",
    tag = "bases",
    operation_id = "list_base_children",
    responses((status = 200, description = "Disks, each before its snapshots.", body = Vec<BaseChild>))
)]
pub(super) async fn of_base(State(c): State<Control>, Name(name): Name) -> Answer<Vec<BaseChild>> {
    blocking(move || {
        let base = c.store.base(&name)?;
        let shown = |child: store::BaseChild| {
            let store::BaseChild { name, number, kind } = child;
            BaseChild { name, id: number, kind: kind.into() }
        };
        Ok(c.store.base_children(base.id()).into_iter().map(shown).collect())
    })
    .await
}

/// Selects what is shared.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Of {
    /// Name of a snapshot of the disk. By default all layers that the disk made.
    snapshot: Option<String>,
}

/// List the disks that share the layers of a disk
///
/// Its clones and theirs, and copies that share its blocks, in the trash too. Found from the records of all disks.
#[utoipa::path(
    get,
    path = "/v1/disks/{name}/children",
    tag = "disks",
    operation_id = "list_disk_children",
    params(Of),
    responses((status = 200, description = "Disks in the order of their numbers.", body = Vec<DiskChild>))
)]
pub(super) async fn of_disk(
    State(c): State<Control>,
    Name(disk): Name,
    query: Result<Query<Of>, QueryRejection>,
) -> Answer<Vec<DiskChild>> {
    let Query(Of { snapshot }) = query?;
    blocking(move || {
        let shown = |child: store::DiskChild| {
            let store::DiskChild { name, number, kind, on, layers } = child;
            let bytes = layers.iter().map(|layer| c.store.layer_bytes(*layer)).sum();
            DiskChild { name, id: number, kind: kind.into(), on, layers: layers.len() as u64, bytes }
        };
        let children = c.store.disk_children(&Origin { disk, snapshot })?;
        Ok(children.into_iter().map(shown).collect())
    })
    .await
}

/// Remove unused bases
///
/// Those that no disk, snapshot, disk in the trash, client or job needs, and that are not pinned. The images themselves do
/// not change.
#[utoipa::path(
    post,
    path = "/v1/prune",
    tag = "bases",
    operation_id = "prune_bases",
    request_body = PruneBases,
    responses((status = 200, description = "The bases that are removed, or would be.", body = PrunedBases))
)]
pub(super) async fn prune(
    State(c): State<Control>,
    body: Result<Json<PruneBases>, JsonRejection>,
) -> Answer<PrunedBases> {
    let Json(PruneBases { dry_run, older_than_seconds }) = body?;
    blocking(move || {
        let service = c.service.clone();
        let unused = c.bases.unused(&|base: &BaseNode| service.may_have_open(base));
        let age = Duration::from_secs(older_than_seconds.unwrap_or(0));
        let youngest = sys::now_ns().saturating_sub(i64::try_from(age.as_nanos()).unwrap_or(i64::MAX));
        let mut pruned = PrunedBases { dry_run, ..PrunedBases::default() };
        for unused in unused.iter().filter(|unused| unused.used_ns <= youngest) {
            let removed = match dry_run {
                true => Ok(()),
                false => c.bases.remove_unused(unused, "an operator pruned the unused bases", &c.events),
            };
            pruned.bytes += if removed.is_ok() { unused.bytes } else { 0 };
            pruned.bases.push(PrunedBase {
                name: unused.base.record().name.clone(),
                bytes: unused.bytes,
                last_used: rfc3339(unused.used_ns),
                error: removed.err().map(|error| error.to_string()),
            });
        }
        Ok(pruned)
    })
    .await
}

impl Control {
    /// How many disks in the trash each base has, by its number, and their bytes.
    pub(super) fn trash_of_bases(&self) -> HashMap<u64, (u64, u64)> {
        let mut out: HashMap<u64, (u64, u64)> = HashMap::new();
        for disk in self.store.trash() {
            if let Some(base) = disk.node.base_id() {
                let (disks, bytes) = out.entry(base).or_default();
                *disks += 1;
                *bytes += disk.bytes;
            }
        }
        out
    }
}
