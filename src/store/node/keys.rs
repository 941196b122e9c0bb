//! The keys of an encrypted disk: unwrapped when the disk is attached, and kept in memory by the worker.
//!
//! What must hold: a delta of an encrypted disk is opened with its key or as locked, never as if it were plain (D86). The
//! record has a key before anything is written with it. A wrong secret opens nothing (D87).

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use zeroize::Zeroizing;

use super::{DiskNode, StoreError};
use crate::crypt::{Cipher, DataKey, KeyError, SALT, WrappingKey, random_salt};
use crate::format::encryption::{Encryption, KeySource, WrappedKey};
use crate::format::record::DiskRecord;

/// After a secret could not be had, the next attempt within this time is refused with the same answer, so that clients
/// that open a locked disk again and again do not wait each time.
const AGAIN: Duration = Duration::from_secs(3);

/// How long clients wait for the secret of a disk that they used under an earlier worker, before they see an error.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 0 } else { 10 });
/// The pause between attempts meanwhile.
const PAUSE: Duration = Duration::from_millis(500);

/// Reads the secrets of operators.
pub trait Secrets: Send + Sync {
    /// The secret at `source`. May take some seconds.
    ///
    /// # Errors
    /// The cause, without secrets.
    fn secret(&self, source: &KeySource) -> Result<Zeroizing<Vec<u8>>, String>;
}

/// What reads secrets, once it is known.
pub(in crate::store) type SecretReader = Arc<OnceLock<Arc<dyn Secrets>>>;

/// The unwrapped keys of a disk.
pub(super) struct Ring {
    wrapping: WrappingKey,
    keys: HashMap<u64, Arc<DataKey>>,
}

impl Ring {
    fn wrapped(&self, delta: u64, key: &DataKey) -> WrappedKey {
        WrappedKey { delta, wrapped: self.wrapping.wrap(delta, key) }
    }
}

/// That a secret could not be had.
struct Failure {
    /// The first time since it could.
    first: Instant,
    /// The last time.
    last: Instant,
    why: String,
}

/// The keys of one disk, as far as they are known.
#[derive(Default)]
pub(super) struct Keyring {
    ring: Mutex<Option<Ring>>,
    /// Held while a secret is read.
    reading: Mutex<Option<Failure>>,
}

/// Reads a secret.
fn read(reader: &SecretReader, source: &KeySource) -> Result<Zeroizing<Vec<u8>>, String> {
    let reader = reader.get().ok_or("this process reads no secrets")?;
    reader.secret(source).map_err(|why| format!("{source}: {why}"))
}

/// Reads a secret and derives from it.
fn derive(reader: &SecretReader, source: &KeySource, salt: &[u8; SALT]) -> Result<WrappingKey, String> {
    let secret = read(reader, source)?;
    WrappingKey::derive(&secret, salt).map_err(|why| format!("{source}: {why}"))
}

/// The keys of a record.
fn unwrap_all(reader: &SecretReader, known: &Encryption) -> Result<Ring, String> {
    let wrapping = derive(reader, &known.source, &known.salt)?;
    let unwrap = |key: &WrappedKey| Ok((key.delta, Arc::new(wrapping.unwrap(key.delta, &key.wrapped)?)));
    let keys: Result<_, KeyError> = known.keys.iter().map(unwrap).collect();
    let keys = keys.map_err(|why| format!("{}: {why}", known.source))?;
    Ok(Ring { wrapping, keys })
}

/// The encryption of a new disk: its record's part, and its ring.
pub(in crate::store) struct NewEncryption {
    record: Encryption,
    ring: Ring,
}

impl NewEncryption {
    /// # Errors
    /// When the secret cannot be read, or is not random.
    pub(in crate::store) fn several(
        reader: &SecretReader,
        source: &KeySource,
        count: usize,
        object: &str,
    ) -> Result<Vec<Self>, StoreError> {
        if let Some(problem) = source.problem() {
            return Err(StoreError::invalid(object, format!("the {source} cannot be used: {problem}")));
        }
        let secret = read(reader, source).map_err(|why| StoreError::invalid(object, why))?;
        let each = |_| {
            let salt = random_salt().map_err(StoreError::io(object, "making a key"))?;
            let wrapping = WrappingKey::derive(&secret, &salt);
            let wrapping = wrapping.map_err(|why| StoreError::invalid(object, format!("{source}: {why}")))?;
            let record = Encryption { source: source.clone(), salt, keys: Vec::new() };
            Ok(Self { record, ring: Ring { wrapping, keys: HashMap::new() } })
        };
        (0..count).map(each).collect()
    }

    /// Adds a new key of a delta.
    pub(in crate::store) fn add_new(&mut self, delta: u64, object: &str) -> Result<(), StoreError> {
        let key = DataKey::random().map_err(StoreError::io(object, "making a key"))?;
        self.add(delta, Arc::new(key));
        Ok(())
    }

    /// Adds the known key of a delta.
    pub(in crate::store) fn add(&mut self, delta: u64, key: Arc<DataKey>) {
        self.record.add(self.ring.wrapped(delta, &key));
        self.ring.keys.insert(delta, key);
    }

    /// The part of the record.
    pub(in crate::store) fn record(&self) -> Encryption {
        self.record.clone()
    }
}

impl DiskNode {
    /// Whether its record says that it is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.writer.record.lock().features.encryption.is_some()
    }

    /// Where its secret is, when it is encrypted.
    pub fn key_source(&self) -> Option<KeySource> {
        self.writer.record.lock().features.encryption.as_ref().map(|known| known.source.clone())
    }

    /// Whether it is encrypted and its keys are not here.
    pub fn is_locked(&self) -> bool {
        self.is_encrypted() && self.rare().keyring.ring.lock().is_none()
    }

    fn locked(&self, why: impl Into<String>) -> StoreError {
        StoreError::Locked { object: format!("disk {}", self.name()), why: why.into() }
    }

    /// Reads the secret again, although an earlier attempt failed just now.
    ///
    /// # Errors
    /// [`StoreError::Locked`].
    pub fn try_unlock(&self) -> Result<(), StoreError> {
        *self.rare().keyring.reading.lock() = None;
        self.unlock()
    }

    /// Unwraps the keys of the record, unless they are here. Waits for the reading of the secret.
    ///
    /// # Errors
    /// [`StoreError::Locked`] when the secret cannot be read or is wrong.
    pub(in crate::store) fn unlock(&self) -> Result<(), StoreError> {
        if !self.is_locked() {
            return Ok(());
        }
        let mut reading = self.rare().keyring.reading.lock();
        let record = self.writer.record.lock().features.encryption.clone();
        let Some(known) = record.filter(|_| self.rare().keyring.ring.lock().is_none()) else { return Ok(()) };
        if known.is_shredded() {
            return Err(self.locked("it was shredded: its keys are gone, and its data with them"));
        }
        let first = match &*reading {
            Some(failure) if failure.last.elapsed() < AGAIN => return Err(self.locked(failure.why.clone())),
            Some(failure) => failure.first,
            None => Instant::now(),
        };
        // Clients that used the disk under an earlier worker wait rather than fail.
        let in_use = self.inherited_live_map.load(Ordering::Acquire);
        let end = first + if in_use { PATIENCE } else { Duration::ZERO };
        let unwrapped = loop {
            match unwrap_all(&self.shared.secrets, &known) {
                Err(_) if Instant::now() < end => std::thread::sleep(PAUSE),
                done => break done,
            }
        };
        match unwrapped {
            Ok(ring) => {
                *reading = None;
                *self.rare().keyring.ring.lock() = Some(ring);
                Ok(())
            }
            Err(why) => {
                *reading = Some(Failure { first, last: Instant::now(), why: why.clone() });
                Err(self.locked(why))
            }
        }
    }

    /// How the bytes of one of its deltas are stored.
    pub(super) fn cipher(&self, record: &DiskRecord, delta: u64) -> Cipher {
        let Some(known) = &record.features.encryption else { return Cipher::Plain };
        let ring = self.rare().keyring.ring.lock();
        match ring.as_ref().and_then(|ring| ring.keys.get(&delta)) {
            Some(key) => Cipher::Key(key.clone()),
            None if known.key(delta).is_some() || known.is_shredded() || delta == record.lineage.delta => {
                Cipher::Locked
            }
            None => Cipher::Plain,
        }
    }

    /// Makes the key of a new delta, when the disk is encrypted. Returns what its record must have before the delta is
    /// written. The disk is attached.
    pub(super) fn new_key(&self, delta: u64) -> Result<Option<WrappedKey>, StoreError> {
        if !self.is_encrypted() {
            return Ok(None);
        }
        let failed = StoreError::io(format!("disk {}", self.name()), "making a key");
        let key = Arc::new(DataKey::random().map_err(failed)?);
        let mut ring = self.rare().keyring.ring.lock();
        let wrapped = ring.as_mut().map(|ring| {
            let wrapped = ring.wrapped(delta, &key);
            ring.keys.insert(delta, key);
            wrapped
        });
        // The lock of the record comes before that of the ring.
        drop(ring);
        wrapped.map(Some).ok_or_else(|| self.locked("its keys are not here"))
    }

    /// The keys of these deltas that are encrypted.
    ///
    /// # Errors
    /// [`StoreError::Locked`].
    pub(in crate::store) fn keys_of(
        &self,
        deltas: impl Iterator<Item = u64>,
    ) -> Result<Vec<(u64, Arc<DataKey>)>, StoreError> {
        self.unlock()?;
        let Some(rare) = self.known_rare() else { return Ok(Vec::new()) };
        let ring = rare.keyring.ring.lock();
        let key = |delta| Some((delta, ring.as_ref()?.keys.get(&delta)?.clone()));
        Ok(deltas.filter_map(key).collect())
    }

    /// Gives a new node the keys of its record.
    pub(in crate::store) fn set_keys(&self, new: NewEncryption) {
        *self.rare().keyring.ring.lock() = Some(new.ring);
    }

    /// Wraps all keys under another secret, durably, in one replacement of the record. No data is written.
    ///
    /// # Errors
    /// When a secret cannot be read; a disk that is not encrypted; errors of the storage.
    pub(in crate::store) fn rekey(&self, source: &KeySource) -> Result<(), StoreError> {
        let object = format!("disk {}", self.name());
        if !self.is_encrypted() {
            return Err(StoreError::invalid(
                object,
                "it is not encrypted; import its contents into a disk that is",
            ));
        }
        let mut new = NewEncryption::several(&self.shared.secrets, source, 1, &object)?;
        let Some(mut new) = new.pop() else { return Ok(()) };
        // No key is added meanwhile.
        let _sealing = self.sealing.lock();
        self.unlock()?;
        if let Some(ring) = &*self.rare().keyring.ring.lock() {
            ring.keys.iter().for_each(|(delta, key)| new.add(*delta, key.clone()));
        }
        let needed = self.writer.record.lock().features.encryption.clone();
        let is_needed =
            |key: &WrappedKey| needed.as_ref().is_some_and(|needed| needed.key(key.delta).is_some());
        let mut record = new.record();
        record.keys.retain(is_needed);
        self.update(|disk| disk.features.encryption = Some(Box::new(record)))?;
        self.set_keys(new);
        *self.rare().keyring.reading.lock() = None;
        Ok(())
    }
}
