//! What is kept of a base: pinning, evicting, hydrating and comparing it.

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;

use super::wire::{Base, Evicted, Hydrate, Pin};
use super::{Answer, Control, Name, blocking};

/// Pin a base, or no longer
///
/// What is fetched of a pinned base is not evicted to make room for others.
#[utoipa::path(
    post,
    path = "/v1/bases/{name}/pin",
    tag = "bases",
    operation_id = "pin_base",
    request_body = Pin,
    responses((status = 200, description = "The base.", body = Base))
)]
pub(super) async fn pin(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<Pin>, JsonRejection>,
) -> Answer<Base> {
    let Json(Pin { pinned }) = body?;
    blocking(move || Ok(c.base(&*c.bases.pin(&name, pinned)?))).await
}

/// Drop what was fetched of a base
///
/// It is fetched again when it is read. Ends a hydration.
#[utoipa::path(
    post,
    path = "/v1/bases/{name}/evict",
    tag = "bases",
    operation_id = "evict_base",
    responses((status = 200, description = "What was dropped.", body = Evicted))
)]
pub(super) async fn evict(State(c): State<Control>, Name(name): Name) -> Answer<Evicted> {
    blocking(move || {
        let evicted = c.bases.evict(&name)?;
        Ok(Evicted { name, evicted_bytes: evicted.dropped, shared_bytes: evicted.shared })
    })
    .await
}

/// Fetch all of a base
///
/// Begins, and goes on in the background and after a restart. One that is under way goes on as it is.
#[utoipa::path(
    post,
    path = "/v1/bases/{name}/hydrate",
    tag = "bases",
    operation_id = "hydrate_base",
    request_body = Hydrate,
    responses((status = 200, description = "The base; `work` says how far it is.", body = Base))
)]
pub(super) async fn hydrate(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<Hydrate>, JsonRejection>,
) -> Answer<Base> {
    let Json(Hydrate { rate }) = body?;
    blocking(move || Ok(c.base(&*c.bases.hydrate(&name, rate)?))).await
}

/// Compare a base with its digest
///
/// Begins, and goes on in the background.
#[utoipa::path(
    post,
    path = "/v1/bases/{name}/verify",
    tag = "bases",
    operation_id = "verify_base",
    responses((status = 200, description = "The base; `work` says how far it is.", body = Base))
)]
pub(super) async fn verify(State(c): State<Control>, Name(name): Name) -> Answer<Base> {
    blocking(move || Ok(c.base(&*c.bases.verify(&name)?))).await
}
