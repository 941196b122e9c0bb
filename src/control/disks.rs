//! Routes on disks: create, list, show, resize, remove.
//!
//! What must hold: a request that destroys data that a client uses is refused until it is sent again with `force` or
//! `shrink`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;

use super::encryption::source_of;
use super::idempotency::Key;
use super::pool::JobKind;
use super::wire::{CreateDisks, Disk, DiskState, Removed, Resize, rfc3339};
use super::{Answer, ApiError, Cause, Control, Name, blocking, in_pool, limits, listing};
use crate::disk::DiskError;
use crate::format::MAX_DISK_SIZE;
use crate::io::sys;
use crate::store::{self, DiskNode, NewDisk, Origin, StoreError};

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
pub(super) async fn list(State(c): State<Control>) -> Result<Response, ApiError> {
    listing::disks(c).await
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
    let token = match (&new.from, &new.pool, new.limits.is_empty(), &new.encryption) {
        (None, None, true, None) => key.token("disks", &(&new.base, &new.size)),
        (Some(from), None, true, None) => key.token("clones", &(from, &new.size)),
        (None, pool, _, secret) => key.token("disks", &(&new.base, &new.size, pool, &new.limits, secret)),
        (Some(from), pool, _, secret) => key.token("clones", &(from, &new.size, pool, &new.limits, secret)),
    };
    let secret = new.encryption.as_ref().map(source_of).transpose()?;
    blocking(move || {
        let names: Vec<String> = new.name.into_iter().chain(new.names).collect();
        if names.is_empty() {
            return Err(ApiError::invalid("the request has no name of a disk; give name or names"));
        }
        if new.size == Some(0) {
            return Err(no_bytes(&format!("disk {}", names[0])));
        }
        let (uid, gid) = sys::effective_ids();
        let limits = limits::of_new(&new.limits);
        let wanted: Vec<NewDisk> = names
            .into_iter()
            .map(|name| NewDisk {
                name,
                base: new.base.clone(),
                size: new.size,
                mode: 0o600,
                uid,
                gid,
                limits,
            })
            .collect();
        let pool = new.pool.as_deref();
        let made = match (&new.from, token) {
            (Some(_), _) if new.base.is_some() => {
                return Err(ApiError::invalid("the request has base and from; give one of them"));
            }
            (Some(from), token) => {
                c.store.clone_disks_with((pool, secret.as_ref()), &Origin::parse(from), &wanted, token)?
            }
            (None, token) => c.store.create_disks_with((pool, secret.as_ref()), &wanted, token)?,
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
    blocking(move || {
        let node = c.store.disk_or_trashed(&name)?;
        Ok(Disk { layers: c.layers(&node), ..c.disk(&node) })
    })
    .await
}

/// Whether a removal may take a disk from its clients.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Removal {
    /// Remove the disk although a client has it open.
    #[serde(default)]
    force: bool,
    /// Remove its snapshots too. By default a disk with snapshots is not removed.
    #[serde(default)]
    snapshots: bool,
    /// Skip the trash: the data is gone at once.
    #[serde(default)]
    now: bool,
}

/// Remove a disk
///
/// The name is free at once. With `[trash] grace` the disk is in the trash then, and can be restored. The daemon refuses
/// the removal of a disk that a client has open, unless `force` is set; then the data of the disk is deleted at its last
/// close, or stays in the trash.
#[utoipa::path(
    delete,
    path = "/v1/disks/{name}",
    tag = "disks",
    operation_id = "remove_disk",
    params(Removal),
    responses((status = 200, description = "The disk has no name any more.", body = Removed))
)]
pub(super) async fn remove(
    State(c): State<Control>,
    Name(name): Name,
    query: Result<Query<Removal>, QueryRejection>,
) -> Answer<Removed> {
    let Query(Removal { force, snapshots, now }) = query?;
    let node = c.store.disk_or_trashed(&name)?;
    if !force {
        c.refuse_in_use(vec![node]).await?;
    }
    blocking(move || {
        let node = c.store.remove_disk(&name, store::Removal { snapshots, now })?;
        // A client that has it open keeps it until the last close, which its frontend reports.
        c.service.purge(node.id())?;
        Ok(Removed { removed: vec![name] })
    })
    .await
}

/// Change the size of a disk
///
/// A smaller size discards the data beyond it: those bytes read as zeros when the disk grows again. The daemon refuses it
/// unless `shrink` is set.
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
    let Json(Resize { size, shrink }) = body?;
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
        let now = node.attach()?.size();
        if size < now && !shrink {
            let (cause, users) = match c.usage(&node) {
                None => (Cause::Invalid, ""),
                Some(Usage::Open(_)) => (Cause::InUse, ", to the clients that have it open too"),
                Some(Usage::Unknown) => (Cause::MayBeInUse, ", to clients that may have it open too"),
            };
            let why = format!("{size} bytes is smaller than its {now} bytes: the data beyond is lost{users}");
            return Err(ApiError::new(
                cause,
                format!("{object}: {why}; set shrink (--shrink) if that is meant"),
            ));
        }
        node.change(|disk| disk.resize(size))?.map_err(wrap)?;
        c.service.resized(node.id());
        Ok(c.disk(&node))
    })
    .await
}

/// How long a request waits for the report of a close.
const CLOSING: Duration = Duration::from_millis(500);

/// That clients use a disk.
enum Usage {
    /// They have this many handles.
    Open(usize),
    /// They may have some that an earlier worker opened.
    Unknown,
}

fn no_bytes(object: &str) -> ApiError {
    ApiError::invalid(format!("{object}: the size is 0; give at least 1 byte"))
}

impl Control {
    /// A disk with its problems. The disk is attached, to find them.
    pub(super) fn disk(&self, node: &DiskNode) -> Disk {
        self.shown(node, node.problem())
    }

    /// A disk in a list, with its known problems. It is not attached for this.
    pub(super) fn listed(&self, node: &DiskNode) -> Disk {
        self.shown(node, node.known_problem())
    }

    fn shown(&self, node: &DiskNode, problem: Option<String>) -> Disk {
        let name = node.name();
        let a = node.attributes();
        let attached = node.peek();
        let (pool, needs_pools) = self.store.pools_of(node);
        let had_errors = attached.as_ref().is_some_and(|d| d.delta().error_epoch() > 0);
        Disk {
            id: node.id(),
            path: self.config.mount.join(format!("disks/{name}.raw")).display().to_string(),
            name,
            base: node.base_name(),
            size: a.size,
            delta_bytes: a.allocated,
            pool,
            needs_pools,
            snapshots: node.lineage().snapshots.len() as u64,
            layers: Vec::new(),
            map_bytes: attached.as_ref().map_or(0, |d| d.delta().map_memory()),
            mode: format!("{:04o}", a.mode),
            uid: a.uid,
            gid: a.gid,
            created: rfc3339(a.created_ns),
            modified: rfc3339(a.modified_ns),
            key: node.key_source().map(|source| source.to_string()),
            state: match &problem {
                Some(_) if node.is_locked() => DiskState::Locked,
                Some(_) => DiskState::Failed,
                None if had_errors => DiskState::HadErrors,
                None => DiskState::Ok,
            },
            error: problem,
            refuses_writes: attached.and_then(|d| d.delta().refuses_writes()),
            open_handles: node.open_handles().map(|count| count as u64),
            job: self.disk_jobs.running(node),
            limits: limits::shown(&node.limits()),
            quota_used: node.quota_used(),
            at_quota: node.limiter().quota_if_set().is_some_and(|quota| quota.is_reached()),
            throttled: node.limiter().pace.waiting() as u64,
        }
    }

    /// Refuses a request that would take these disks from a client that has them open.
    pub(super) async fn refuse_in_use(&self, disks: Vec<Arc<DiskNode>>) -> Result<(), ApiError> {
        let begun = Instant::now();
        loop {
            let (c, all) = (self.clone(), disks.clone());
            let look = move || {
                Ok(all.into_iter().filter_map(|disk| Some((c.usage(&disk)?, disk))).collect::<Vec<_>>())
            };
            let used = in_pool(JobKind::Query, look).await?;
            let Some((usage, first)) = used.first() else { return Ok(()) };
            // The kernel reports a close after close(2) has returned.
            if begun.elapsed() < CLOSING {
                tokio::time::sleep(CLOSING / 20).await;
                continue;
            }
            let name = first.name();
            let (cause, state) = match usage {
                Usage::Open(1) => (Cause::InUse, "a client has it open".to_owned()),
                Usage::Open(handles) => (Cause::InUse, format!("clients have it open, {handles} times")),
                Usage::Unknown => {
                    (Cause::MayBeInUse, "a client may have it open since an earlier worker".to_owned())
                }
            };
            let more = match used.len() - 1 {
                0 => String::new(),
                more => format!(", and {more} more disks are in use"),
            };
            let remedy = "close it first, or set force (--force)";
            return Err(ApiError::new(cause, format!("disk {name}: {state}{more}; {remedy}")));
        }
    }

    /// Whether clients have a disk open.
    fn usage(&self, disk: &DiskNode) -> Option<Usage> {
        match disk.open_handles() {
            Some(0) => None,
            Some(handles) => Some(Usage::Open(handles)),
            None => {
                let is_unused = self.service.is_unused(disk.id());
                (!is_unused).then_some(Usage::Unknown)
            }
        }
    }

    /// Names of the attached disks that refuse writes.
    pub(super) fn refusing(&self, attached: &[Arc<DiskNode>]) -> Vec<String> {
        let refuses = |d: &&Arc<DiskNode>| d.peek().is_some_and(|d| d.delta().refuses_writes().is_some());
        attached.iter().filter(refuses).map(|d| d.name()).collect()
    }
}
