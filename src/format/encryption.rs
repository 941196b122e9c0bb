//! What a disk's record says about its encryption: where the operator's secret is, and the wrapped keys of its deltas
//! (docs/format.md, "Encryption"). The record never has a secret or a key that is not wrapped (D87).

use super::MAX_NUMBER;
use super::codec::{FormatError, Reader, Writer};

/// Bytes of a salt.
pub const SALT: usize = 32;
/// Bytes of a wrapped key: the two keys of AES-256 of a delta, and 8 bytes that prove the wrapping key.
pub const WRAPPED: usize = 72;
/// Most bytes of a path or a name of a secret.
pub const LONGEST_REFERENCE: usize = 4096;

/// Where the operator's secret is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// In a file of this host, at an absolute path.
    File(String),
    /// The configured command prints it; this is its last argument.
    Command(String),
}

impl KeySource {
    /// Why it cannot be used, if so.
    pub fn problem(&self) -> Option<&'static str> {
        let text = match self {
            Self::File(text) | Self::Command(text) => text,
        };
        if text.is_empty() || text.len() > LONGEST_REFERENCE || text.chars().any(char::is_control) {
            return Some("it has 1 to 4096 bytes, and no control characters");
        }
        match self {
            Self::File(path) if !path.starts_with('/') => {
                Some("the path is not absolute; give an absolute one")
            }
            Self::Command(name) if name.starts_with('-') => {
                Some("it begins with a hyphen; choose another name")
            }
            _ => None,
        }
    }
}

impl std::fmt::Display for KeySource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => write!(f, "file {path}"),
            Self::Command(name) => write!(f, "command {name}"),
        }
    }
}

/// The key of one delta, wrapped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedKey {
    /// Number of the delta.
    pub delta: u64,
    /// By AES-256-KW, under a key that follows from the secret, the salt and the number.
    pub wrapped: [u8; WRAPPED],
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encryption {
    /// Where the secret is.
    pub source: KeySource,
    /// Random; new with each secret.
    pub salt: [u8; SALT],
    /// By the number of the delta, ascending. A layer without a key is not encrypted. Without any key the disk was
    /// shredded.
    pub keys: Vec<WrappedKey>,
}

impl Encryption {
    /// Whether its keys were forgotten.
    pub fn is_shredded(&self) -> bool {
        self.keys.is_empty()
    }

    /// The key of a delta.
    pub fn key(&self, delta: u64) -> Option<&WrappedKey> {
        self.keys.iter().find(|key| key.delta == delta)
    }

    /// Adds the key of a delta, in place of an earlier one.
    pub fn add(&mut self, key: WrappedKey) {
        self.keys.retain(|other| other.delta != key.delta);
        let place = self.keys.partition_point(|other| other.delta < key.delta);
        self.keys.insert(place, key);
    }

    pub(super) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        let (kind, text) = match &self.source {
            KeySource::File(path) => (0, path),
            KeySource::Command(name) => (1, name),
        };
        w.u8(1).u8(kind).bytes(text.as_bytes()).raw(&self.salt).u16(self.keys.len() as u16);
        for key in &self.keys {
            w.u64(key.delta).raw(&key.wrapped);
        }
        w.finish()
    }

    pub(super) fn decode(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        match r.u8()? {
            1 => {}
            other => return Err(r.newer(format!("encryption {other} is not known; use a newer plyfs"))),
        }
        let kind = r.u8()?;
        let text = r.text()?;
        let source = match kind {
            0 => KeySource::File(text),
            1 => KeySource::Command(text),
            other => {
                return Err(r.newer(format!("source {other} of a secret is not known; use a newer plyfs")));
            }
        };
        if let Some(problem) = source.problem() {
            return Err(r.bad(format!("the source of a secret is not valid: {problem}")));
        }
        let mut salt = [0; SALT];
        salt.copy_from_slice(r.raw(SALT)?);
        let mut keys: Vec<WrappedKey> = Vec::new();
        for _ in 0..r.u16()? {
            let delta = r.u64()?;
            if delta > MAX_NUMBER || keys.last().is_some_and(|last| last.delta >= delta) {
                return Err(
                    r.bad(format!("the key of delta {delta} is out of order, or its number above 2^62"))
                );
            }
            let mut wrapped = [0; WRAPPED];
            wrapped.copy_from_slice(r.raw(WRAPPED)?);
            keys.push(WrappedKey { delta, wrapped });
        }
        Ok(Self { source, salt, keys })
    }
}
