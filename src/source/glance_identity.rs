//! Which image of a Glance it is: the record's digest where there is one, else its ID.

use super::http_identity::HttpIdentity;
use super::identity::{KeyParts, Verdict};
use crate::format::record::{BaseIdentity, ImageData, Strictness, Validator};

/// An image as its record described it when the base was added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GlanceIdentity {
    /// The ID of its record.
    pub id: String,
    /// `os_hash_algo` and `os_hash_value` with a colon between them; empty when the record has none.
    pub hash: String,
    /// How its data is read.
    pub data: ImageData,
    /// What answers with its data must repeat.
    pub answer: HttpIdentity,
}

impl GlanceIdentity {
    /// Of a record; none when the record has an object of another kind.
    pub fn of(identity: &BaseIdentity) -> Option<Self> {
        let Validator::Glance { id, hash, data, etag, last_modified } = &identity.validator else {
            return None;
        };
        let (etag, last_modified) = (etag.clone(), last_modified.clone());
        let answer = HttpIdentity { size: identity.size, etag, last_modified, version: None };
        Some(Self { id: id.clone(), hash: hash.clone(), data: *data, answer })
    }

    /// Whether a record with this size and digest is of the same image.
    pub fn compare(&self, size: u64, id: &str, hash: &str) -> Verdict {
        let Self { id: pinned, hash: digest, answer, .. } = self;
        if size != answer.size {
            return Verdict::Another(format!("its record says {size} bytes, not {}", answer.size));
        }
        match (digest.is_empty(), hash.is_empty()) {
            (false, false) if digest == hash => Verdict::Same,
            (false, false) => Verdict::Another("its os_hash_value is another one".into()),
            (false, true) => Verdict::Unproven("its record has no os_hash_value any more".into()),
            (true, _) if pinned == id => Verdict::Same,
            (true, _) => Verdict::Another(format!("it is image {id}, not {pinned}")),
        }
    }
}

impl From<GlanceIdentity> for BaseIdentity {
    fn from(image: GlanceIdentity) -> Self {
        let GlanceIdentity { id, hash, data, answer: HttpIdentity { size, etag, last_modified, .. } } = image;
        Self { size, validator: Validator::Glance { id, hash, data, etag, last_modified }, digest: None }
    }
}

/// See [`compare`](super::compare); none when one of the objects is of another kind.
pub(super) fn compare(
    registered: &BaseIdentity,
    found: &BaseIdentity,
    strictness: Strictness,
) -> Option<Verdict> {
    let (registered, found) = (GlanceIdentity::of(registered)?, GlanceIdentity::of(found)?);
    Some(match registered.compare(found.answer.size, &found.id, &found.hash) {
        Verdict::Same if registered.data != found.data => {
            Verdict::Another("its data is read in another way; add it as a new base".into())
        }
        Verdict::Same if registered.answer.etag.is_some() => {
            registered.answer.compare(strictness, &found.answer)
        }
        verdict => verdict,
    })
}

/// See [`key_parts`](super::key_parts).
pub(super) fn key_parts(id: &str, hash: &str) -> KeyParts {
    KeyParts {
        label: "glance",
        parts: vec![id.as_bytes().to_vec(), hash.as_bytes().to_vec()],
        is_strong: !hash.is_empty(),
        is_portable: true,
    }
}
