//! Routes on disks: create, list, show, resize, remove.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;

use super::idempotency::Key;
use super::wire::{CreateDisks, Disk, DiskState, Removed, Resize, rfc3339};
use super::{Answer, ApiError, Control, Name, blocking};
use crate::disk::DiskError;
use crate::format::MAX_DISK_SIZE;
use crate::io::sys;
use crate::store::{DiskNode, NewDisk, StoreError};

/// List the disks
///
/// The daemon does not open a disk that is not in use for this; `error` has the problems that are known.
#[utoipa::path(
    get,
    path = "/v1/disks",
    tag = "disks",
    operation_id = "list_disks",
    responses((status = 200, description = "Disks in the order of their numbers.", body = Vec<Disk>))
)]
pub(super) async fn list(State(c): State<Control>) -> Answer<Vec<Disk>> {
    blocking(move || Ok(c.store.disks_after(0).iter().map(|d| c.listed(d)).collect())).await
}

/// Create disks
///
/// The daemon creates all of the disks or none. No data moves, whatever their size. The disks are durable before the
/// answer is sent.
#[utoipa::path(
    post,
    path = "/v1/disks",
    tag = "disks",
    operation_id = "create_disks",
    params(Key),
    request_body = CreateDisks,
    responses((status = 200, description = "The disks, in the order of their names in the request.", body = Vec<Disk>))
)]
pub(super) async fn create(
    State(c): State<Control>,
    key: Key,
    body: Result<Json<CreateDisks>, JsonRejection>,
) -> Answer<Vec<Disk>> {
    let Json(new) = body?;
    // The token does not depend on the names: a client may request the disks that are missing with the same key.
    let token = key.token("disks", &(&new.base, &new.size));
    blocking(move || {
        let names: Vec<String> = new.name.into_iter().chain(new.names).collect();
        if names.is_empty() {
            return Err(ApiError::invalid("the request has no name of a disk; give name or names"));
        }
        if new.size == Some(0) {
            return Err(no_bytes(&format!("disk {}", names[0])));
        }
        let (uid, gid) = sys::effective_ids();
        let wanted: Vec<NewDisk> = names
            .into_iter()
            .map(|name| NewDisk { name, base: new.base.clone(), size: new.size, mode: 0o600, uid, gid })
            .collect();
        let made = match token {
            Some(token) => c.store.create_disks_once(&wanted, token)?,
            None => c.store.create_disks(&wanted)?,
        };
        Ok(made.iter().map(|d| c.listed(d)).collect())
    })
    .await
}

/// Show a disk
///
/// The daemon opens the disk to check it.
#[utoipa::path(
    get,
    path = "/v1/disks/{name}",
    tag = "disks",
    operation_id = "show_disk",
    responses((status = 200, description = "The disk.", body = Disk))
)]
pub(super) async fn show(State(c): State<Control>, Name(name): Name) -> Answer<Disk> {
    blocking(move || Ok(c.disk(&*c.store.disk(&name)?))).await
}

/// Remove a disk
///
/// The name is free at once. The data of the disk is deleted at its last close.
#[utoipa::path(
    delete,
    path = "/v1/disks/{name}",
    tag = "disks",
    operation_id = "remove_disk",
    responses((status = 200, description = "The disk has no name any more.", body = Removed))
)]
pub(super) async fn remove(State(c): State<Control>, Name(name): Name) -> Answer<Removed> {
    blocking(move || {
        let node = c.store.unlink(&name)?;
        // A client that has it open keeps it until the last close, which its frontend reports.
        c.service.purge(node.id())?;
        Ok(Removed { removed: vec![name] })
    })
    .await
}

/// Change the size of a disk
///
/// A smaller size discards the data beyond it: those bytes read as zeros when the disk grows again.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/resize",
    tag = "disks",
    operation_id = "resize_disk",
    request_body = Resize,
    responses((status = 200, description = "The disk with its new size.", body = Disk))
)]
pub(super) async fn resize(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<Resize>, JsonRejection>,
) -> Answer<Disk> {
    let Json(Resize { size }) = body?;
    blocking(move || {
        let node = c.store.disk(&name)?;
        let object = format!("disk {name}");
        if size == 0 {
            return Err(no_bytes(&object));
        }
        if size > MAX_DISK_SIZE {
            return Err(ApiError::invalid(format!(
                "{object}: the size {size} is above 64 TiB; give a smaller one"
            )));
        }
        let wrap = |source: DiskError| StoreError::Disk { object: object.clone(), source };
        node.attach()?.resize(size).map_err(wrap)?;
        c.service.resized(node.id());
        Ok(c.disk(&node))
    })
    .await
}

fn no_bytes(object: &str) -> ApiError {
    ApiError::invalid(format!("{object}: the size is 0; give at least 1 byte"))
}

impl Control {
    /// A disk with its problems. The disk is attached, to find them.
    fn disk(&self, node: &DiskNode) -> Disk {
        self.shown(node, node.problem())
    }

    /// A disk in a list, with its known problems. It is not attached for this.
    fn listed(&self, node: &DiskNode) -> Disk {
        self.shown(node, node.known_problem())
    }

    fn shown(&self, node: &DiskNode, problem: Option<String>) -> Disk {
        let name = node.name();
        let a = node.attributes();
        let attached = node.peek();
        let had_errors = attached.as_ref().is_some_and(|d| d.delta().error_epoch() > 0);
        Disk {
            id: node.id(),
            path: self.config.mount.join(format!("disks/{name}.raw")).display().to_string(),
            name,
            base: node.base_name(),
            size: a.size,
            delta_bytes: a.allocated,
            map_bytes: attached.as_ref().map_or(0, |d| d.delta().map_memory()),
            mode: format!("{:04o}", a.mode),
            uid: a.uid,
            gid: a.gid,
            created: rfc3339(a.created_ns),
            modified: rfc3339(a.modified_ns),
            state: match &problem {
                Some(_) => DiskState::Failed,
                None if had_errors => DiskState::HadErrors,
                None => DiskState::Ok,
            },
            error: problem,
            refuses_writes: attached.and_then(|d| d.delta().refuses_writes()),
        }
    }

    /// Names of the attached disks that refuse writes.
    pub(super) fn refusing(&self, attached: &[Arc<DiskNode>]) -> Vec<String> {
        let refuses = |d: &&Arc<DiskNode>| d.peek().is_some_and(|d| d.delta().refuses_writes().is_some());
        attached.iter().filter(refuses).map(|d| d.name()).collect()
    }
}
