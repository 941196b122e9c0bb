//! Reads the secrets of encrypted disks through the credential helper: a confined worker reads no files of the host.

use std::sync::Arc;

use zeroize::Zeroizing;

use crate::format::encryption::KeySource;
use crate::sandbox::secrets::{CredentialHelper, KeyRequest};
use crate::store::Secrets;

/// See the module.
pub struct HelperSecrets(pub Option<Arc<CredentialHelper>>);

impl Secrets for HelperSecrets {
    fn secret(&self, source: &KeySource) -> Result<Zeroizing<Vec<u8>>, String> {
        let Some(helper) = &self.0 else {
            return Err(
                "the daemon reads no secrets of disks; set [encryption] key_dirs or key_command".into()
            );
        };
        let secret = helper.key(match source {
            KeySource::File(path) => KeyRequest::File(path),
            KeySource::Command(name) => KeyRequest::Command(name),
        })?;
        Ok(Zeroizing::new(secret.bytes().to_vec()))
    }
}
