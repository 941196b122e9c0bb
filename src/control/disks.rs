//! Disks.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;

use super::once::Key;
use super::wire::{CreateDisks, Disk, DiskState, Removed, Resize, rfc3339};
use super::{Answer, ApiError, Control, Name, blocking};
use crate::disk::DiskError;
use crate::format::MAX_DISK_SIZE;
use crate::io::sys;
use crate::store::{DiskNode, NewDisk, StoreError};

/// List the disks
///
/// A disk that is not in use is not opened for it: `error` has what is known.
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
/// All of them or none. No data moves, whatever their size. The disks are durable when the answer comes.
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
    // Of what the disks are, and not of their names: what is missing may be asked for with the same key.
    let token = key.token("disks", &(&new.base, &new.size));
    blocking(move || {
        let names: Vec<String> = new.name.into_iter().chain(new.names).collect();
        if names.is_empty() {
            return Err(ApiError::invalid("no name was given; give name or names"));
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
/// It is opened to find out how it is.
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
/// Its name is gone at once. What was written to it lives until its last close.
#[utoipa::path(
    delete,
    path = "/v1/disks/{name}",
    tag = "disks",
    operation_id = "remove_disk",
    responses((status = 200, description = "It has no name any more.", body = Removed))
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
/// What lies beyond a smaller size is gone: after growing again it reads zeros.
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
            return Err(ApiError::invalid(format!("{object}: the size {size} is above 64 TiB")));
        }
        let wrap = |source: DiskError| StoreError::Disk { object: object.clone(), source };
        node.attach()?.resize(size).map_err(wrap)?;
        c.service.resized(node.id());
        Ok(c.disk(&node))
    })
    .await
}

fn no_bytes(object: &str) -> ApiError {
    ApiError::invalid(format!("{object}: a disk of 0 bytes is of no use; give a size"))
}

impl Control {
    /// With what is wrong with it: it is attached to find out.
    fn disk(&self, node: &DiskNode) -> Disk {
        self.shown(node, node.problem())
    }

    /// One of many: those that are not used are not attached for it.
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

    /// Names of disks that refuse writes, of those in use.
    pub(super) fn refusing(&self, attached: &[Arc<DiskNode>]) -> Vec<String> {
        let refuses = |d: &&Arc<DiskNode>| d.peek().is_some_and(|d| d.delta().refuses_writes().is_some());
        attached.iter().filter(refuses).map(|d| d.name()).collect()
    }
}
