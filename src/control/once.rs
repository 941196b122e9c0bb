//! Creations that are done once, however often they are asked for.
//!
//! A client that loses the connection does not know whether its creation was done. It sends a key with it (the header
//! `Idempotency-Key`), and the same key when it asks again. What must hold: the object that was made keeps a hash of the key
//! and of what was asked for in its record, made durable by the same write; so of two clients that want one name exactly one
//! succeeds, whichever worker dies in between.

use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use serde::Serialize;
use sha2::{Digest, Sha256};
use utoipa::IntoParams;

use super::ApiError;
use super::wire::IDEMPOTENCY_KEY;
use crate::format::record::Token;

/// Longest key, bytes.
const LONGEST: usize = 255;

/// The key that a client sent, if it sent one.
#[derive(Default, IntoParams)]
#[into_params(parameter_in = Header)]
pub(super) struct Key {
    /// Chosen by the client at random, 1 to 255 bytes of printable ASCII. A creation with the key of an earlier one that asked
    /// for the same is answered as that one was; what is missing of it is made.
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
    /// Stands for the key, the kind of the object and what was asked for.
    pub(super) fn token(&self, kind: &str, wanted: &impl Serialize) -> Option<Token> {
        let key = self.key.as_ref()?;
        // Options and numbers always encode.
        let wanted = serde_json::to_vec(wanted).unwrap_or_default();
        let mut sum = Sha256::new();
        for part in [kind.as_bytes(), key.as_bytes(), &wanted] {
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
                "{IDEMPOTENCY_KEY}: a key is 1 to {LONGEST} bytes of printable ASCII without blanks"
            ))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_of_the_key_and_of_all_that_was_asked_for() {
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
