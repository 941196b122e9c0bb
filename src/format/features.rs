//! What a disk's record has only where a feature is used (docs/format.md, "Features of a disk").
//!
//! Each is a field with a tag, in the order of the tags. A reader that does not know a tag must not serve the disk.

use super::codec::{FormatError, Reader, Writer};
use super::lineage::Lineage;
use super::rework::Rework;

/// Tags of the fields.
const REWORK: u16 = 5;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Features {}

/// Writes fields: how many, and each with its tag.
struct Fields(Vec<(u16, Vec<u8>)>);

impl Features {
    /// Whether a record of version 4 can express it.
    pub fn is_default(&self, lineage: &Lineage) -> bool {
        *self == Self::default() && lineage.rework.is_none()
    }

    fn fields(&self, lineage: &Lineage) -> Fields {
        let rework = lineage.rework.iter().map(|rework| (REWORK, rework.encode()));
        Fields(rework.collect())
    }

    fn set(&mut self, lineage: &mut Lineage, tag: u16, r: &mut Reader<'_>) -> Result<(), FormatError> {
        let Self {} = self;
        match tag {
            REWORK => lineage.rework = Some(Rework::get(r)?),
            _ => return Err(r.newer(format!("field {tag} is not known; use a newer plyfs"))),
        }
        Ok(())
    }

    pub(super) fn put(&self, w: &mut Writer, lineage: &Lineage) {
        let Fields(fields) = self.fields(lineage);
        w.u16(fields.len() as u16);
        for (tag, bytes) in fields {
            w.u16(tag).bytes(&bytes);
        }
    }

    pub(super) fn get(
        r: &mut Reader<'_>,
        lineage: &mut Lineage,
        structure: &'static str,
    ) -> Result<Self, FormatError> {
        let mut features = Self::default();
        let mut last = None;
        for _ in 0..r.u16()? {
            let tag = r.u16()?;
            if last.is_some_and(|last| tag <= last) {
                return Err(r.bad(format!("field {tag} is not behind one with a lower tag")));
            }
            last = Some(tag);
            let mut field = Reader::new(r.bytes()?, structure);
            features.set(lineage, tag, &mut field)?;
            field.end()?;
        }
        Ok(features)
    }
}
