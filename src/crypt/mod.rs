//! Encryption of data files: AES-256-XTS of whole blocks, keys of deltas, and the keys that wrap them.
//!
//! What must hold: no byte of a guest's data is in the data file of an encrypted delta but as ciphertext, and a block
//! that was never written is not decrypted (D86). A key is in memory only, or wrapped under a key that follows from the
//! operator's secret. A wrong secret is noticed; it never gives other bytes (D87). No `Debug` and no error shows a key.

mod file;
#[cfg(test)]
mod tests;
mod xts;

use std::fmt;
use std::sync::Arc;

use aes::Aes256;
use aes_kw::{KeyInit, KwAes256};
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::{Zeroize, Zeroizing};

pub use file::EncryptedFile;
use xts::Xts;

pub use crate::format::encryption::{SALT, WRAPPED};
use crate::io::MediumFile;

/// Bytes of the key of a delta: two keys of AES-256.
const KEY: usize = WRAPPED - 8;
/// The least bytes of a secret.
const LEAST_SECRET: usize = 32;
/// The least different bytes of a secret.
const LEAST_DIFFERENT: usize = 5;

/// Why keys cannot be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The secret is too short.
    #[error(
        "the secret has less than 32 bytes; it must be random: make one with `head -c 32 /dev/urandom | base64`"
    )]
    Short,
    /// The secret repeats a few bytes.
    #[error(
        "the secret is not random: it repeats a few bytes; make one with `head -c 32 /dev/urandom | base64`"
    )]
    NotRandom,
    /// It is not the secret under which the key was wrapped.
    #[error(
        "the secret is not the one of this disk, or the record's keys are damaged; give the right secret"
    )]
    Wrong,
}

/// The key of one delta.
pub struct DataKey {
    bytes: Zeroizing<[u8; KEY]>,
    xts: Xts,
}

impl fmt::Debug for DataKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DataKey(..)")
    }
}

impl DataKey {
    /// A new random key.
    ///
    /// # Errors
    /// When the kernel has no random bytes.
    pub fn random() -> std::io::Result<Self> {
        let mut bytes = Zeroizing::new([0; KEY]);
        getrandom::fill(&mut *bytes).map_err(no_random)?;
        Ok(Self::of(bytes))
    }

    fn of(bytes: Zeroizing<[u8; KEY]>) -> Self {
        let xts = Xts::new(&bytes);
        Self { bytes, xts }
    }
}

fn no_random(error: getrandom::Error) -> std::io::Error {
    std::io::Error::other(error.to_string())
}

/// Random bytes for a salt.
///
/// # Errors
/// When the kernel has no random bytes.
pub fn random_salt() -> std::io::Result<[u8; SALT]> {
    let mut salt = [0; SALT];
    getrandom::fill(&mut salt).map_err(no_random)?;
    Ok(salt)
}

/// What wraps the keys of the deltas of a disk. It follows from the operator's secret and a salt.
pub struct WrappingKey(Hkdf<Sha256>);

impl fmt::Debug for WrappingKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WrappingKey(..)")
    }
}

impl WrappingKey {
    /// From a secret as a file or a command has it. A newline at the end of a longer secret is not a part of it.
    ///
    /// # Errors
    /// A secret that is not random: there is no protection against guessing.
    pub fn derive(secret: &[u8], salt: &[u8; SALT]) -> Result<Self, KeyError> {
        let secret = match secret.strip_suffix(b"\n").map(|rest| rest.strip_suffix(b"\r").unwrap_or(rest)) {
            Some(rest) if rest.len() >= LEAST_SECRET => rest,
            _ => secret,
        };
        if secret.len() < LEAST_SECRET {
            return Err(KeyError::Short);
        }
        let mut seen = [false; 256];
        secret.iter().for_each(|byte| seen[usize::from(*byte)] = true);
        let different = seen.iter().filter(|seen| **seen).count();
        seen.zeroize();
        if different < LEAST_DIFFERENT {
            return Err(KeyError::NotRandom);
        }
        Ok(Self(Hkdf::new(Some(salt), secret)))
    }

    /// Each delta has a wrapping key of its own: a wrapped key is no use in the place of another.
    fn of_delta(&self, number: u64) -> KwAes256 {
        let mut key = Zeroizing::new([0; 32]);
        let info = number.to_le_bytes();
        let expanded = self.0.expand_multi_info(&[b"plyfs 1 key of delta", &info], &mut *key);
        debug_assert!(expanded.is_ok(), "32 bytes are less than HKDF can give");
        KwAes256::new(&(*key).into())
    }

    /// Wraps the key of a delta.
    pub fn wrap(&self, number: u64, key: &DataKey) -> [u8; WRAPPED] {
        let mut wrapped = [0; WRAPPED];
        let done = self.of_delta(number).wrap_key(&*key.bytes, &mut wrapped);
        debug_assert!(done.is_ok(), "the lengths are those of the standard");
        wrapped
    }

    /// Unwraps the key of a delta.
    ///
    /// # Errors
    /// [`KeyError::Wrong`].
    pub fn unwrap(&self, number: u64, wrapped: &[u8; WRAPPED]) -> Result<DataKey, KeyError> {
        let mut bytes = Zeroizing::new([0; KEY]);
        match self.of_delta(number).unwrap_key(wrapped, &mut *bytes) {
            Ok(_) => Ok(DataKey::of(bytes)),
            Err(_) => Err(KeyError::Wrong),
        }
    }
}

/// How the bytes of a data file are stored.
#[derive(Debug, Clone, Default)]
pub enum Cipher {
    /// As they are.
    #[default]
    Plain,
    /// Encrypted with a key.
    Key(Arc<DataKey>),
    /// Encrypted with a key that is not here. The file can be synced and cut, but not be read or written.
    Locked,
}

impl Cipher {
    /// A data file as its users see it.
    pub fn over(&self, file: Arc<dyn MediumFile>) -> Arc<dyn MediumFile> {
        match self {
            Self::Plain => file,
            Self::Key(key) => Arc::new(EncryptedFile::new(file, Some(key.clone()))),
            Self::Locked => Arc::new(EncryptedFile::new(file, None)),
        }
    }
}

/// AES, for [`Xts`].
type Aes = Aes256;
