//! What tells the object of one source from all others, and the answer to whether it is the one that was registered.

use super::file::FileIdentity;

/// What a source serves. Keeps its blocks in the memory cache apart from those of every other source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Identity {
    /// A file of this host.
    File(FileIdentity),
    /// Contents that are fetched, under their key in the cache of fetched blocks.
    Contents {
        /// Bytes.
        size: u64,
        /// The key, which no other contents have.
        key: [u8; 32],
    },
}

impl Identity {
    /// Bytes of the object.
    pub fn size(&self) -> u64 {
        match self {
            Self::File(file) => file.size,
            Self::Contents { size, .. } => *size,
        }
    }

    /// All of it, for the memory of this machine; no format for disks. No two identities have the same bytes, and none
    /// has the beginning of another's.
    pub fn to_bytes(&self) -> Vec<u8> {
        let words = |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
        match self {
            Self::File(FileIdentity { size, mtime_s, mtime_ns, device, inode }) => {
                words(&[*size, *mtime_s as u64, u64::from(*mtime_ns), *device, *inode])
            }
            // The first word of a file is its size, which is never so large.
            Self::Contents { size, key } => [words(&[u64::MAX, *size]), key.to_vec()].concat(),
        }
    }
}

/// Whether an object is the one that was registered.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// It is.
    Same,
    /// It is another one; how that shows.
    Another(String),
    /// It does not say; what is missing.
    Unproven(String),
}

impl Verdict {
    /// How the object differs, or why that cannot be told; none of the same one.
    pub fn difference(self) -> Option<String> {
        match self {
            Self::Same => None,
            Self::Another(why) | Self::Unproven(why) => Some(why),
        }
    }
}

/// What a validator contributes to the keys of the cache and to the origin of a trace.
///
/// The keys are on disk: another label or other parts for the same validator lose what a store has cached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeyParts {
    /// Of the kind.
    pub label: &'static str,
    /// All that the validator says, always as many.
    pub parts: Vec<Vec<u8>>,
    /// Whether the same parts at the same place are the same contents at any time.
    pub is_strong: bool,
    /// Whether the parts mean the same on every host.
    pub is_portable: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_identity_has_the_bytes_of_another_or_begins_with_them() {
        let file = FileIdentity { size: 5, mtime_s: 1, mtime_ns: 2, device: 3, inode: 4 };
        let mut key = [0; 32];
        key[15] = 1;
        let all = [
            Identity::File(file),
            Identity::File(FileIdentity { inode: 5, ..file }),
            Identity::File(FileIdentity { mtime_ns: 3, ..file }),
            Identity::Contents { size: 5, key: [0; 32] },
            // A key whose parts do not fit the fields of a file.
            Identity::Contents { size: 5, key },
            Identity::Contents { size: 6, key },
        ];
        let bytes: Vec<_> = all.iter().map(Identity::to_bytes).collect();
        for (at, one) in bytes.iter().enumerate() {
            for other in &bytes[at + 1..] {
                assert!(!one.starts_with(other) && !other.starts_with(one), "{one:?} {other:?}");
            }
        }
    }
}
