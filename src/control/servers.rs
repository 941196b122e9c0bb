//! Routes on the servers of bases: set other URLs, give a base up. And the bases that wait or fail, for `status`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;

use super::wire::{Base, Fail, SetUrls, Trouble, rfc3339_millis};
use super::{Answer, Control, Name, blocking};
use crate::store::BaseNode;

/// Give other URLs of the same image
///
/// The daemon asks the new URL first, which must have the registered object. Disks stay open; waiting reads continue
/// there.
#[utoipa::path(
    post,
    path = "/v1/bases/{name}/set",
    tag = "bases",
    operation_id = "set_base",
    request_body = SetUrls,
    responses((status = 200, description = "The base.", body = Base))
)]
pub(super) async fn set(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<SetUrls>, JsonRejection>,
) -> Answer<Base> {
    let Json(SetUrls { source, mirrors, file }) = body?;
    let moving = c.bases.prepare_move(&name, file, source, mirrors).await?;
    blocking(move || Ok(c.base(&c.bases.move_to(moving)?))).await
}

/// Give a base up, or undo it
///
/// Reads of a base that is given up fail when they would wait for its servers, present and future ones.
#[utoipa::path(
    post,
    path = "/v1/bases/{name}/fail",
    tag = "bases",
    operation_id = "fail_base",
    request_body = Fail,
    responses((status = 200, description = "The base.", body = Base))
)]
pub(super) async fn fail(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<Fail>, JsonRejection>,
) -> Answer<Base> {
    let Json(Fail { given_up }) = body?;
    blocking(move || Ok(c.base(&c.bases.give_up(&name, given_up)?))).await
}

impl Control {
    /// Bases whose reads wait for a server or a file.
    pub(super) fn waiting(&self) -> Vec<Trouble> {
        let waits = |base: &Arc<BaseNode>| {
            let stall = self.bases.stall(base.id())?;
            let base = base.record().name.clone();
            Some(Trouble { base, since: rfc3339_millis(stall.since), why: stall.why })
        };
        self.store.bases().iter().filter_map(waits).collect()
    }

    /// Bases whose readers got an error, and no bytes since.
    pub(super) fn failing(&self) -> Vec<Trouble> {
        let fails = |base: &Arc<BaseNode>| {
            let failing = self.bases.sources().health(base.id()).failing?;
            let (base, why) = (base.record().name.clone(), failing.error.to_string());
            Some(Trouble { base, since: rfc3339_millis(failing.since), why })
        };
        self.store.bases().iter().filter_map(fails).collect()
    }
}
