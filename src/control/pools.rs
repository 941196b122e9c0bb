//! Routes on pools: add, list, show, attach, remove.
//!
//! What must hold: a worker uses the pools that were there when it started. So a change of the pools ends with a takeover
//! by another worker of the same version, as in an upgrade.

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use serde::Deserialize;
use utoipa::IntoParams;

use super::wire::{AddPool, Pool, PoolChange, PoolState, Removed};
use super::{Answer, Control, Name, blocking};
use crate::store::pools::{Lost, PoolView};

/// List the pools
#[utoipa::path(
    get,
    path = "/v1/pools",
    tag = "pools",
    operation_id = "list_pools",
    responses((status = 200, description = "The pools; the first one is the directory of the store.", body = Vec<Pool>))
)]
pub(super) async fn list(State(c): State<Control>) -> Answer<Vec<Pool>> {
    blocking(move || {
        let short = |pool| Pool { disks: Vec::new(), layers_of: Vec::new(), ..c.pool(pool) };
        Ok(c.store.pools().into_iter().map(short).collect())
    })
    .await
}

/// Show a pool
#[utoipa::path(
    get,
    path = "/v1/pools/{name}",
    tag = "pools",
    operation_id = "show_pool",
    responses((status = 200, description = "The pool.", body = Pool))
)]
pub(super) async fn show(State(c): State<Control>, Name(name): Name) -> Answer<Pool> {
    blocking(move || Ok(c.pool(c.store.pool(&name)?))).await
}

/// Add a pool
///
/// The directory has to be prepared with `plyfs pool add`, which also sends this request. Another worker takes over, and
/// uses the pool.
#[utoipa::path(
    post,
    path = "/v1/pools",
    tag = "pools",
    operation_id = "add_pool",
    request_body = AddPool,
    responses((status = 200, description = "The pool is listed, and a takeover has begun.", body = PoolChange))
)]
pub(super) async fn add(
    State(c): State<Control>,
    body: Result<Json<AddPool>, JsonRejection>,
) -> Answer<PoolChange> {
    let Json(AddPool { name, dir }) = body?;
    blocking(move || {
        c.store.add_pool(&name, &dir, &c.config.mount)?;
        Ok(PoolChange { name, upgrade: c.begin_takeover()? })
    })
    .await
}

/// Use a pool that came back
///
/// Another worker takes over, and uses the pools that are there then. Disks pause for some milliseconds.
#[utoipa::path(
    post,
    path = "/v1/pools/{name}/attach",
    tag = "pools",
    operation_id = "attach_pool",
    responses((status = 200, description = "A takeover has begun.", body = PoolChange))
)]
pub(super) async fn attach(State(c): State<Control>, Name(name): Name) -> Answer<PoolChange> {
    blocking(move || {
        c.store.pool(&name)?;
        Ok(PoolChange { name, upgrade: c.begin_takeover()? })
    })
    .await
}

/// How a pool is removed.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Removal {
    /// Its drive never comes back: forget what removed disks have there.
    #[serde(default)]
    lost: bool,
}

/// Remove a pool
///
/// The daemon refuses the removal of a pool in which a disk has a delta or a layer.
#[utoipa::path(
    delete,
    path = "/v1/pools/{name}",
    tag = "pools",
    operation_id = "remove_pool",
    params(Removal),
    responses((status = 200, description = "The pool is not listed any more.", body = Removed))
)]
pub(super) async fn remove(
    State(c): State<Control>,
    Name(name): Name,
    query: Result<Query<Removal>, QueryRejection>,
) -> Answer<Removed> {
    let Query(Removal { lost }) = query?;
    blocking(move || {
        let number = c.store.pool(&name)?.number;
        c.store.remove_pool(&name, if lost { Lost::Yes } else { Lost::No })?;
        c.bases.leave_pool(number);
        // So that no process keeps its filesystem busy. When a takeover is under way, that one does it.
        let _ = c.begin_takeover();
        Ok(Removed { removed: vec![name] })
    })
    .await
}

impl Control {
    fn pool(&self, view: PoolView) -> Pool {
        let (own, layers): (Vec<_>, Vec<_>) =
            self.store.pool_uses(view.number).into_iter().partition(|used| used.has_delta);
        let names =
            |uses: Vec<crate::store::pools::PoolUse>| uses.into_iter().map(|used| used.disk).collect();
        Pool {
            name: view.name,
            dir: view.dir,
            state: match (&view.trouble, view.reserve) {
                (Some(_), _) => PoolState::Unavailable,
                (None, Some(reserve)) if reserve.full => PoolState::Full,
                (None, _) => PoolState::Ok,
            },
            error: view.trouble,
            total_bytes: view.space.map(|space| space.total),
            available_bytes: view.space.map(|space| space.available),
            reserve_held_bytes: view.reserve.map(|reserve| reserve.held),
            disk_count: (own.len() + layers.len()) as u64,
            disks: names(own),
            layers_of: names(layers),
        }
    }
}
