//! Which object of a web server it is: the validators that its server sends, and which of them must match (H2).

use super::identity::{KeyParts, Verdict};
use crate::format::record::{BaseIdentity, Strictness, Validator};

/// An object as its server described it when the base was added. Pinned: an object with another description is another
/// object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpIdentity {
    /// Bytes.
    pub size: u64,
    /// The entity tag with its quotes and, when it is weak, its `W/`.
    pub etag: Option<String>,
    /// The date as it was sent.
    pub last_modified: Option<String>,
    /// The id of the version, where the object is in a bucket that keeps versions. It proves no difference: in another
    /// bucket the same object has another version. Requests to a bucket name it.
    pub version: Option<String>,
}

pub(super) fn is_weak(etag: &str) -> bool {
    etag.starts_with("W/")
}

fn opaque(etag: &str) -> &str {
    etag.strip_prefix("W/").unwrap_or(etag)
}

impl HttpIdentity {
    /// Of a record; none when the record has an object of no web server.
    pub fn of(identity: &BaseIdentity) -> Option<Self> {
        let (etag, last_modified, version) = match &identity.validator {
            Validator::Http { etag, last_modified } => (etag, last_modified, &None),
            Validator::S3 { version, etag, last_modified } => (etag, last_modified, version),
            Validator::File { .. }
            | Validator::Device { .. }
            | Validator::Glance { .. }
            | Validator::Nbd { .. }
            | Validator::Oci { .. } => return None,
        };
        let [etag, last_modified, version] = [etag, last_modified, version].map(Clone::clone);
        Some(Self { size: identity.size, etag, last_modified, version })
    }

    /// The tag for `If-Match`, which compares strongly.
    pub(super) fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !is_weak(etag))
    }

    /// Whether an object with the description `found` is this one.
    pub fn compare(&self, strictness: Strictness, found: &Self) -> Verdict {
        if found.size != self.size {
            return Verdict::Another(format!("it has {} bytes, not {}", found.size, self.size));
        }
        let etags = self.etag.as_deref().zip(found.etag.as_deref());
        let dates = self.last_modified.as_deref().zip(found.last_modified.as_deref());
        let changed = |name: &str, (pinned, found): (&str, &str)| {
            Verdict::Another(format!("its {name} is {}, not {pinned}", printable(found)))
        };
        match strictness {
            Strictness::SizeOnly => Verdict::Same,
            Strictness::Strong if self.strong_etag().is_some() => match etags {
                Some((pinned, found)) if pinned == found => Verdict::Same,
                Some((pinned, found)) if pinned == opaque(found) => {
                    Verdict::Unproven("it came with a weak ETag".into())
                }
                Some(pair) => changed("ETag", pair),
                None => Verdict::Unproven("it came without the ETag".into()),
            },
            Strictness::Strong => match dates {
                Some((pinned, found)) if pinned == found => Verdict::Same,
                Some(pair) => changed("Last-Modified", pair),
                None => Verdict::Unproven("it came without Last-Modified".into()),
            },
            Strictness::Weak => match (etags, dates) {
                (Some((pinned, found)), _) if opaque(pinned) == opaque(found) => Verdict::Same,
                (_, Some((pinned, found))) if pinned == found => Verdict::Same,
                (Some(pair), _) => changed("ETag", pair),
                (None, Some(pair)) => changed("Last-Modified", pair),
                (None, None) => Verdict::Unproven("it came without ETag and Last-Modified".into()),
            },
        }
    }
}

#[cfg(feature = "daemon")]
impl HttpIdentity {
    /// For the record of an object of a web server.
    pub(super) fn of_web(self) -> BaseIdentity {
        let Self { size, etag, last_modified, .. } = self;
        BaseIdentity { size, validator: Validator::Http { etag, last_modified }, digest: None }
    }

    /// For the record of an object of a bucket.
    pub(super) fn of_bucket(self) -> BaseIdentity {
        let Self { size, etag, last_modified, version } = self;
        BaseIdentity { size, validator: Validator::S3 { version, etag, last_modified }, digest: None }
    }
}

/// See [`compare`](super::compare); none when one of the objects is of no web server.
pub(super) fn compare(
    registered: &BaseIdentity,
    found: &BaseIdentity,
    strictness: Strictness,
) -> Option<Verdict> {
    Some(HttpIdentity::of(registered)?.compare(strictness, &HttpIdentity::of(found)?))
}

/// See [`key_parts`](super::key_parts).
pub(super) fn key_parts(etag: Option<&str>, last_modified: Option<&str>) -> KeyParts {
    let part = |text: Option<&str>| text.unwrap_or_default().as_bytes().to_vec();
    KeyParts {
        label: "url",
        parts: vec![part(etag), part(last_modified)],
        is_strong: etag.map_or(last_modified.is_some(), |etag| !is_weak(etag)),
        is_portable: true,
    }
}

/// A server's words in a message: short, and on one line.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(80).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
