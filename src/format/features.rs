//! What a disk's record has only where a feature is used (docs/format.md, "Features of a disk").
//!
//! Each is a field with a tag, in the order of the tags. A reader that does not know a tag must not serve the disk.

use super::codec::{FormatError, Reader, Writer};
use super::encryption::{Encryption, WrappedKey};

const ENCRYPTION: u16 = 3;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Features {
    /// How the disk is encrypted, if it is.
    pub encryption: Option<Encryption>,
}

/// Writes fields: how many, and each with its tag.
struct Fields(Vec<(u16, Vec<u8>)>);

impl Features {
    /// Whether a record of version 4 can express it.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Adds the key of a new delta.
    pub fn add_key(&mut self, key: Option<WrappedKey>) {
        if let (Some(encryption), Some(key)) = (&mut self.encryption, key)
            && !encryption.is_shredded()
        {
            encryption.add(key);
        }
    }

    fn fields(&self) -> Fields {
        let encryption = self.encryption.as_ref().map(|known| (ENCRYPTION, known.encode()));
        Fields(encryption.into_iter().collect())
    }

    fn set(&mut self, tag: u16, r: &mut Reader<'_>) -> Result<(), FormatError> {
        match tag {
            ENCRYPTION => self.encryption = Some(Encryption::decode(r)?),
            _ => return Err(r.newer(format!("field {tag} is not known; use a newer plyfs"))),
        }
        Ok(())
    }

    pub(super) fn put(&self, w: &mut Writer) {
        let Fields(fields) = self.fields();
        w.u16(fields.len() as u16);
        for (tag, bytes) in fields {
            w.u16(tag).bytes(&bytes);
        }
    }

    pub(super) fn get(r: &mut Reader<'_>, structure: &'static str) -> Result<Self, FormatError> {
        let mut features = Self::default();
        let mut last = None;
        for _ in 0..r.u16()? {
            let tag = r.u16()?;
            if last.is_some_and(|last| tag <= last) {
                return Err(r.bad(format!("field {tag} is not behind one with a lower tag")));
            }
            last = Some(tag);
            let mut field = Reader::new(r.bytes()?, structure);
            features.set(tag, &mut field)?;
            field.end()?;
        }
        Ok(features)
    }
}
