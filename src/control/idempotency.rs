//! Creations that are carried out once, however often a client sends the request.
//!
//! A client whose connection breaks does not know whether the daemon created the object. It sends a key with the
//! request (the header `Idempotency-Key`), and the same key when it sends the request again. What must hold: the record
//! of the new object contains a hash of the key and of the request, and the same write makes both durable. So of two
//! clients that race for a name exactly one succeeds, even when a worker dies in between.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde::Serialize;
use sha2::{Digest, Sha256};
use utoipa::IntoParams;

use super::ApiError;
use super::wire::IDEMPOTENCY_KEY;
use crate::format::record::Token;

/// Most bytes of a key.
const LONGEST: usize = 255;

/// The key that a client sent, if it sent one.
#[derive(Default, IntoParams)]
#[into_params(parameter_in = Header)]
pub(super) struct Key {
    /// Chosen by the client at random, 1 to 255 bytes of printable ASCII. A creation with the key and the content of an
    /// earlier one gets the answer of that one; the daemon creates what is missing of it.
    #[param(
        rename = "Idempotency-Key",
        value_type = String,
        required = false,
        min_length = 1,
        max_length = 255,
        pattern = "^[!-~]+$"
    )]
    key: Option<String>,
}

impl Key {
    /// The hash of the key, the kind of the object and the content of the request.
    pub(super) fn token(&self, kind: &str, request: &impl Serialize) -> Option<Token> {
        let key = self.key.as_ref()?;
        // Options and numbers always encode.
        let request = serde_json::to_vec(request).unwrap_or_default();
        let mut sum = Sha256::new();
        for part in [kind.as_bytes(), key.as_bytes(), &request] {
            sum.update((part.len() as u64).to_le_bytes());
            sum.update(part);
        }
        let hash: [u8; 32] = sum.finalize().into();
        Some(Token::of_hash(std::array::from_fn(|i| hash[i])))
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Key {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let Some(value) = parts.headers.get(IDEMPOTENCY_KEY) else { return Ok(Self::default()) };
        let key = value.to_str().ok().filter(|key| (1..=LONGEST).contains(&key.len()));
        let key = key.filter(|key| key.bytes().all(|byte| byte.is_ascii_graphic()));
        match key {
            Some(key) => Ok(Self { key: Some(key.to_owned()) }),
            None => Err(ApiError::invalid(format!(
                "the key in {IDEMPOTENCY_KEY} is not valid; give 1 to {LONGEST} bytes of printable ASCII without blanks"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_depends_on_the_key_the_kind_and_the_whole_request() {
        let key = |key: &str| Key { key: Some(key.to_owned()) };
        let one = key("a").token("disks", &("b", 1));
        assert_eq!(key("a").token("disks", &("b", 1)), one);
        assert!(one.is_some());
        for other in [
            key("b").token("disks", &("b", 1)),
            key("a").token("base", &("b", 1)),
            key("a").token("disks", &("b", 2)),
            Key::default().token("disks", &("b", 1)),
        ] {
            assert_ne!(other, one);
        }
    }
}
