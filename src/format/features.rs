//! What a disk's record has only where a feature is used (docs/format.md, "Features of a disk").
//!
//! Each is a field with a tag, in the order of the tags. A reader that does not know a tag must not serve the disk.

use super::codec::{FormatError, Reader, Writer};

/// Tag of [`Features::trash`].
const TRASH: u16 = 1;

/// A removed disk can be restored until a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trashed {
    /// When it was removed, nanoseconds since the epoch.
    pub removed_ns: i64,
    /// From when on its files may be removed.
    pub purge_ns: i64,
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Features {
    /// Of an unlinked disk: it is in the trash. Of a disk with a name: a rename is about to take the name.
    pub trash: Option<Trashed>,
}

/// Writes fields: how many, and each with its tag.
struct Fields(Vec<(u16, Vec<u8>)>);

impl Features {
    /// Whether a record of version 4 can express it.
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    fn fields(&self) -> Fields {
        let mut fields = Vec::new();
        if let Some(Trashed { removed_ns, purge_ns }) = self.trash {
            let mut w = Writer::new();
            w.i64(removed_ns).i64(purge_ns);
            fields.push((TRASH, w.finish()));
        }
        Fields(fields)
    }

    fn set(&mut self, tag: u16, r: &mut Reader<'_>) -> Result<(), FormatError> {
        match tag {
            TRASH => self.trash = Some(Trashed { removed_ns: r.i64()?, purge_ns: r.i64()? }),
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
