//! Which blob of a registry it is: its digest, which the registry stores it under.

use super::http_identity::HttpIdentity;
use super::identity::{KeyParts, Verdict};
use crate::format::record::{BaseIdentity, Digest, Validator};

/// A disk in a blob.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OciIdentity {
    /// The digest of the blob, `sha256:` and 64 digits.
    pub digest: String,
    /// Bytes of the blob.
    pub blob: u64,
    /// Where in the blob the disk begins.
    pub offset: u64,
    /// Bytes of the disk.
    pub size: u64,
}

impl OciIdentity {
    /// Of a record; none when the record has an object of another kind.
    pub fn of(identity: &BaseIdentity) -> Option<Self> {
        let Validator::Oci { digest, blob, offset } = &identity.validator else { return None };
        Some(Self { digest: digest.clone(), blob: *blob, offset: *offset, size: identity.size })
    }

    /// The blob, as answers about it describe it. Its URL has the digest, so they need no validator.
    pub fn of_blob(&self) -> HttpIdentity {
        let version = Some(self.digest.clone());
        HttpIdentity { size: self.blob, etag: None, last_modified: None, version }
    }

    /// Whether all of the blob is the disk.
    pub fn is_all(&self) -> bool {
        self.offset == 0 && self.blob == self.size
    }

    /// The digest of the disk, where it is that of the blob.
    fn content(&self) -> Option<Digest> {
        let digits = self.digest.strip_prefix("sha256:").filter(|_| self.is_all())?;
        let mut bytes = [0; 32];
        hex::decode_to_slice(digits, &mut bytes).ok()?;
        Some(Digest::Sha256(bytes))
    }
}

impl From<OciIdentity> for BaseIdentity {
    fn from(artifact: OciIdentity) -> Self {
        let digest = artifact.content();
        let OciIdentity { digest: blob_digest, blob, offset, size } = artifact;
        Self { size, validator: Validator::Oci { digest: blob_digest, blob, offset }, digest }
    }
}

/// See [`compare`](super::compare); none when one of the objects is of another kind.
pub(super) fn compare(registered: &BaseIdentity, found: &BaseIdentity) -> Option<Verdict> {
    let (registered, found) = (OciIdentity::of(registered)?, OciIdentity::of(found)?);
    Some(if found.digest != registered.digest {
        Verdict::Another(format!("its blob is {}, not {}", found.digest, registered.digest))
    } else if found != registered {
        Verdict::Another("its disk is at another place of the blob".into())
    } else {
        Verdict::Same
    })
}

/// See [`key_parts`](super::key_parts).
pub(super) fn key_parts(digest: &str, offset: u64) -> KeyParts {
    let parts = vec![digest.as_bytes().to_vec(), offset.to_le_bytes().to_vec()];
    KeyParts { label: "oci", parts, is_strong: true, is_portable: true }
}
