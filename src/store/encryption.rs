//! Encrypted disks: creation, clones, another secret, and shredding.
//!
//! What must hold: a disk that is to be encrypted is never made without its keys. A clone gets the keys of the layers on
//! which it stands and no others, so that shredding its origin takes all that only the origin wrote (D87).

use std::sync::Arc;

use super::change::refuse_with_snapshots;
use super::node::NewEncryption;
use super::{DiskNode, NewDisk, Origin, Secrets, Store, StoreError};
use crate::format::encryption::KeySource;
use crate::format::record::Token;

impl Store {
    /// Sets what reads secrets. Once; a later call changes nothing.
    pub fn read_secrets_with(&self, secrets: Arc<dyn Secrets>) {
        let _ = self.secrets.set(secrets);
    }

    /// As [`Store::create_disks_once`] and, without a token, [`Store::create_disks`]; the disks are encrypted with `key`.
    ///
    /// # Errors
    /// Also when the secret cannot be read.
    pub fn create_encrypted(
        &self,
        wanted: &[NewDisk],
        key: &KeySource,
        token: Option<Token>,
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        self.create_disks_with((None, Some(key)), wanted, token)
    }

    /// As [`Store::clone_disks`]; the disks are encrypted with `key`. Layers of an origin that is not encrypted stay as
    /// they are.
    ///
    /// # Errors
    /// Also when a secret cannot be read.
    pub fn clone_encrypted(
        &self,
        origin: &Origin,
        wanted: &[NewDisk],
        key: &KeySource,
        token: Option<Token>,
    ) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        self.clone_disks_with((None, Some(key)), origin, wanted, token)
    }

    /// The encryption of `count` new disks, without keys. Reads the secret once.
    pub(super) fn new_encryption(
        &self,
        key: Option<&KeySource>,
        count: usize,
        object: &str,
    ) -> Result<Vec<Option<NewEncryption>>, StoreError> {
        let Some(key) = key.filter(|_| count > 0) else { return Ok((0..count).map(|_| None).collect()) };
        NewEncryption::several(&self.secrets, key, count, object)
            .map(|all| all.into_iter().map(Some).collect())
    }

    /// Reads the secret of a disk again, and opens the disk.
    ///
    /// # Errors
    /// [`StoreError::Locked`]; those of [`DiskNode::attach`].
    pub fn unlock(&self, name: &str) -> Result<Arc<DiskNode>, StoreError> {
        let node = self.disk(name)?;
        node.try_unlock()?;
        node.attach()?;
        Ok(node)
    }

    /// Wraps the keys of a disk under another secret.
    ///
    /// # Errors
    /// An unknown disk, or one that is not encrypted; a secret that cannot be read; errors of the storage. The disk then
    /// has its old secret.
    pub fn rekey(&self, name: &str, key: &KeySource) -> Result<Arc<DiskNode>, StoreError> {
        let node = self.disk(name)?;
        // Read before anything is claimed: it may take long.
        node.unlock()?;
        let _claim = self.claims.lineage(name, node.id());
        self.check_present(name, &node)?;
        node.rekey(key)?;
        Ok(node)
    }

    /// Forgets the keys of a disk, durably, and removes its name. Its data cannot be read from then on, but by clients that
    /// have it open now. The caller removes the files, as after [`Store::unlink`].
    ///
    /// # Errors
    /// An unknown disk, one that is not encrypted, or one with snapshots unless they go `with_snapshots`; errors of the
    /// storage.
    pub fn shred(&self, name: &str, with_snapshots: bool) -> Result<Arc<DiskNode>, StoreError> {
        let node = self.disk(name)?;
        let _claim = self.claims.lineage(name, node.id());
        self.check_present(name, &node)?;
        if !node.is_encrypted() {
            let why = "it is not encrypted, so it has no keys to forget; remove it with `plyfs disk rm`";
            return Err(StoreError::invalid(format!("disk {name}"), why));
        }
        if !with_snapshots {
            refuse_with_snapshots(&node)?;
        }
        node.update(|record| {
            record.unlinked = true;
            record.lineage.snapshots.clear();
            if let Some(encryption) = &mut record.features.encryption {
                encryption.keys.clear();
            }
        })?;
        self.names.write().disk_names.remove(name);
        Ok(node)
    }
}
