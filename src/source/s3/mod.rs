//! Bases in buckets: `s3://BUCKET/KEY`, of Amazon S3 and of services with its interface.
//!
//! An object of a bucket is fetched by the one HTTP source. This kind adds where an object is (`place`), signatures and
//! the keys for them (`authoriser`, `keys`), what the errors of such services mean (`errors`), and versions. A bucket
//! with versions keeps the registered version after the object is replaced: plyfs asks for that version (H11).
//!
//! What must hold:
//! - Keys sign requests for the buckets that they are configured for, at the service that is configured, and for Amazon at
//!   its own hosts: never at another host, whatever a redirect says (H6).
//! - No key, signature or token is in a message, a record or a URL.

#[cfg(feature = "daemon")]
mod authoriser;
#[cfg(feature = "daemon")]
mod errors;
#[cfg(feature = "daemon")]
mod keys;
#[cfg(feature = "daemon")]
mod place;
#[cfg(feature = "daemon")]
mod presigned;
#[cfg(all(test, feature = "daemon"))]
mod tests;

#[cfg(feature = "daemon")]
pub(super) use authoriser::Services;
#[cfg(feature = "daemon")]
pub(super) use place::check_url;
#[cfg(feature = "daemon")]
pub(super) use presigned::of as presigned;

use super::http_identity::is_weak;
use super::identity::KeyParts;

/// The scheme of URLs.
#[cfg(feature = "daemon")]
pub(super) const SCHEME: &str = "s3";

/// See [`key_parts`](super::key_parts).
pub(super) fn key_parts(version: Option<&str>, etag: Option<&str>, last_modified: Option<&str>) -> KeyParts {
    let part = |text: Option<&str>| text.unwrap_or_default().as_bytes().to_vec();
    KeyParts {
        label: "s3",
        parts: vec![part(version), part(etag), part(last_modified)],
        is_strong: etag.map_or(last_modified.is_some(), |etag| !is_weak(etag)),
        is_portable: true,
    }
}
