//! Some disks of a history are encrypted: their contents must follow the same model.

use std::sync::Arc;

use zeroize::Zeroizing;

use crate::format::encryption::KeySource;
use crate::store::{DiskNode, NewDisk, Origin, Secrets, Store, StoreError};

/// Knows one secret.
struct OneSecret;

impl Secrets for OneSecret {
    fn secret(&self, _source: &KeySource) -> Result<Zeroizing<Vec<u8>>, String> {
        Ok(Zeroizing::new(b"a secret of the simulation, 32 bytes or more".to_vec()))
    }
}

fn source() -> KeySource {
    KeySource::Command("one".into())
}

/// Whether a disk that is made with this name is encrypted: every other one.
fn is_encrypted(name: &str) -> bool {
    name.bytes().fold(0, |sum: u8, byte| sum.wrapping_add(byte)).is_multiple_of(2)
}

/// To be called when a store is open.
pub(super) fn prepare(store: &Store) {
    store.read_secrets_with(Arc::new(OneSecret));
}

/// Creates disks, all or none: all encrypted when the first one is to be.
pub(super) fn create(store: &Store, wanted: &[NewDisk]) -> Result<Vec<Arc<DiskNode>>, StoreError> {
    match wanted.first() {
        Some(first) if is_encrypted(&first.name) => store.create_encrypted(wanted, &source(), None),
        _ => store.create_disks(wanted),
    }
}

/// Makes a clone. That of an encrypted disk must be encrypted.
pub(super) fn clone(store: &Store, origin: &Origin, new: NewDisk) -> Result<Vec<Arc<DiskNode>>, StoreError> {
    if is_encrypted(&new.name) || store.disk(&origin.disk).is_ok_and(|disk| disk.is_encrypted()) {
        return store.clone_encrypted(origin, &[new], &source(), None);
    }
    store.clone_disks(origin, &[new], None)
}
