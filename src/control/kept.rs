//! Routes on the data of a base in the store: pin, evict, hydrate, verify.

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::{BytesRejection, JsonRejection};

use super::wire::{Base, Evict, Evicted, Hydrate, Pin};
use super::{Answer, ApiError, Control, Name, blocking};
use crate::bases::LastCopy;

/// Pin a base, or unpin it
///
/// The fetched data of a pinned base is not evicted to make room for others. With `copies`, the daemon keeps further
/// copies of it in pools, and reads them when the store's own drive does not deliver it. The request does not wait until
/// they are made; `further_copies` of the base tells how far they are.
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
    let Json(Pin { pinned, copies }) = body?;
    blocking(move || Ok(c.base(&c.bases.pin(&name, pinned, copies)?))).await
}

/// Drop the fetched data of a base
///
/// A later read fetches it again. A hydration of the base ends. For a hydrated base the daemon first asks its servers,
/// and refuses when none of them has the image any more, unless `force` is set.
#[utoipa::path(
    post,
    path = "/v1/bases/{name}/evict",
    tag = "bases",
    operation_id = "evict_base",
    request_body = Option<Evict>,
    responses((status = 200, description = "The dropped bytes.", body = Evicted))
)]
pub(super) async fn evict(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Bytes, BytesRejection>,
) -> Answer<Evicted> {
    let body = body?;
    let Evict { force } = match body.is_empty() {
        true => Evict::default(),
        false => serde_json::from_slice(&body).map_err(|e| ApiError::invalid(e.to_string()))?,
    };
    let last_copy = if force { LastCopy::Drop } else { LastCopy::Keep };
    if last_copy == LastCopy::Keep {
        c.bases.ask_for_originals(&name).await?;
    }
    blocking(move || {
        let evicted = c.bases.evict(&name, last_copy)?;
        Ok(Evicted { name, evicted_bytes: evicted.dropped, shared_bytes: evicted.shared })
    })
    .await
}

/// Fetch all of a base
///
/// The request only begins the hydration, a job that continues in the background and after a restart. A hydration that
/// is under way continues, and takes the rate if one is given. A verification that is under way ends: the hydration
/// compares the base, too.
#[utoipa::path(
    post,
    path = "/v1/bases/{name}/hydrate",
    tag = "bases",
    operation_id = "hydrate_base",
    request_body = Hydrate,
    responses((status = 200, description = "The base; `work` has the progress.", body = Base))
)]
pub(super) async fn hydrate(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<Hydrate>, JsonRejection>,
) -> Answer<Base> {
    let Json(Hydrate { rate }) = body?;
    blocking(move || Ok(c.base(&c.bases.hydrate(&name, rate)?))).await
}

/// Compare a base with its digest
///
/// The request only begins the comparison, a job that continues in the background. Refused while the base is being
/// hydrated: a hydration compares it at its end.
#[utoipa::path(
    post,
    path = "/v1/bases/{name}/verify",
    tag = "bases",
    operation_id = "verify_base",
    responses((status = 200, description = "The base; `work` has the progress.", body = Base))
)]
pub(super) async fn verify(State(c): State<Control>, Name(name): Name) -> Answer<Base> {
    blocking(move || Ok(c.base(&c.bases.verify(&name)?))).await
}
