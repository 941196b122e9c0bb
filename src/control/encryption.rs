//! Routes on encrypted disks: unlock, another secret, shred.
//!
//! What must hold: no request and no answer has a secret or a key, only where a secret is (D87).

use axum::Json;
use axum::extract::State;
use axum::extract::rejection::JsonRejection;

use super::wire::{Disk, KeyReference, Removed, Shred};
use super::{Answer, ApiError, Control, Name, blocking};
use crate::format::encryption::KeySource;

/// Try the secret of an encrypted disk again
///
/// A disk is locked while its secret cannot be read or is wrong. The daemon also tries when a client opens the disk.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/unlock",
    tag = "disks",
    operation_id = "unlock_disk",
    responses((status = 200, description = "The disk, which is not locked.", body = Disk))
)]
pub(super) async fn unlock(State(c): State<Control>, Name(name): Name) -> Answer<Disk> {
    blocking(move || {
        let node = c.store.unlock(&name)?;
        Ok(c.disk(&node))
    })
    .await
}

/// Give an encrypted disk another secret
///
/// The daemon reads both secrets. No data is written. The old secret opens the disk no more; clones keep theirs.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/rekey",
    tag = "disks",
    operation_id = "rekey_disk",
    request_body = KeyReference,
    responses((status = 200, description = "The disk.", body = Disk))
)]
pub(super) async fn rekey(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<KeyReference>, JsonRejection>,
) -> Answer<Disk> {
    let Json(key) = body?;
    let source = source_of(&key)?;
    blocking(move || {
        let node = c.store.rekey(&name, &source)?;
        Ok(c.disk(&node))
    })
    .await
}

/// Forget the keys of an encrypted disk, and remove it
///
/// The keys are gone from the store when the answer is sent. The daemon refuses the shredding of a disk that a client has
/// open, unless `force` is set; such a client keeps the disk until its last close. Clones keep what they share.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/shred",
    tag = "disks",
    operation_id = "shred_disk",
    request_body = Shred,
    responses((status = 200, description = "The disk has no name and no keys any more.", body = Removed))
)]
pub(super) async fn shred(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Json<Shred>, JsonRejection>,
) -> Answer<Removed> {
    let Json(Shred { force, snapshots }) = body?;
    if !force {
        c.refuse_in_use(vec![c.store.disk(&name)?]).await?;
    }
    blocking(move || {
        let node = c.store.shred(&name, snapshots)?;
        c.service.purge(node.id())?;
        Ok(Removed { removed: vec![name] })
    })
    .await
}

/// The secret that a request names.
pub(super) fn source_of(key: &KeyReference) -> Result<KeySource, ApiError> {
    let source = match key {
        KeyReference { key_file: Some(path), key_command: None } => KeySource::File(path.clone()),
        KeyReference { key_file: None, key_command: Some(name) } => KeySource::Command(name.clone()),
        _ => {
            let why =
                "an encrypted disk needs key_file or key_command (--key-file, --key-command), and not both";
            return Err(ApiError::invalid(why));
        }
    };
    match source.problem() {
        Some(problem) => Err(ApiError::invalid(format!("the {source} of a secret is not valid: {problem}"))),
        None => Ok(source),
    }
}
