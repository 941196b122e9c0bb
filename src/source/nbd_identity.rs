//! Which export of an NBD server it is: its size, and its name. The protocol has nothing stronger.

use super::identity::{KeyParts, Verdict};
use crate::format::record::{BaseIdentity, Strictness, Validator};

/// An export as its server described it when the base was added.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdIdentity {
    /// Bytes.
    pub size: u64,
    /// Its name; empty for the default export.
    pub export: String,
}

impl NbdIdentity {
    /// Of a record; none when the record has an object of another kind.
    pub fn of(identity: &BaseIdentity) -> Option<Self> {
        let Validator::Nbd { export } = &identity.validator else { return None };
        Some(Self { size: identity.size, export: export.clone() })
    }
}

impl From<NbdIdentity> for BaseIdentity {
    fn from(NbdIdentity { size, export }: NbdIdentity) -> Self {
        Self { size, validator: Validator::Nbd { export }, digest: None }
    }
}

/// See [`compare`](super::compare); none when one of the objects is of another kind. With a weaker check than the
/// strong one, the export may have another name.
pub(super) fn compare(
    registered: &BaseIdentity,
    found: &BaseIdentity,
    strictness: Strictness,
) -> Option<Verdict> {
    let (registered, found) = (NbdIdentity::of(registered)?, NbdIdentity::of(found)?);
    Some(if found.size != registered.size {
        Verdict::Another(format!("it has {} bytes, not {}", found.size, registered.size))
    } else if strictness == Strictness::Strong && found.export != registered.export {
        Verdict::Another(format!("it is export {:?}, not {:?}", found.export, registered.export))
    } else {
        Verdict::Same
    })
}

/// See [`key_parts`](super::key_parts).
pub(super) fn key_parts(export: &str) -> KeyParts {
    KeyParts { label: "nbd", parts: vec![export.as_bytes().to_vec()], is_strong: false, is_portable: true }
}
