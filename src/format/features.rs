//! What a disk's record has only where a feature is used (docs/format.md, "Features of a disk").
//!
//! Each is a field with a tag, in the order of the tags. A reader that does not know a tag must not serve the disk.

use super::MAX_NUMBER;
use super::codec::{FormatError, Reader, Writer};
use super::encryption::{Encryption, WrappedKey};
use super::limits::Limits;
use super::lineage::Lineage;
use super::rework::Rework;

/// Tags of the fields.
const LIMITS: u16 = 2;
const ENCRYPTION: u16 = 3;
const POOLS: u16 = 4;
const REWORK: u16 = 5;

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
    /// The limits of the disk, if it has some. Boxed, as the encryption is: a store lists many disks, and few have any.
    pub limits: Option<Box<Limits>>,
    /// How the disk is encrypted, if it is.
    pub encryption: Option<Box<Encryption>>,
    /// Of each delta that lies in another pool than the default one: its number, and the number of its pool. By number.
    pub pools: Vec<(u64, u64)>,
}

/// Writes fields, in the order of their tags: how many, and each with its tag.
pub(super) fn put_fields(w: &mut Writer, fields: Vec<(u16, Vec<u8>)>) {
    w.u16(fields.len() as u16);
    for (tag, bytes) in fields {
        w.u16(tag).bytes(&bytes);
    }
}

/// Reads fields. `set` gets each tag, and must read the whole field.
pub(super) fn get_fields(
    r: &mut Reader<'_>,
    structure: &'static str,
    set: &mut dyn FnMut(u16, &mut Reader<'_>) -> Result<(), FormatError>,
) -> Result<(), FormatError> {
    let mut last = None;
    for _ in 0..r.u16()? {
        let tag = r.u16()?;
        if last.is_some_and(|last| tag <= last) {
            return Err(r.bad(format!("field {tag} is not behind one with a lower tag")));
        }
        last = Some(tag);
        let mut field = Reader::new(r.bytes()?, structure);
        set(tag, &mut field)?;
        field.end()?;
    }
    Ok(())
}

impl Features {
    /// Of a disk with deltas in pools.
    pub fn in_pools(pools: Vec<(u64, u64)>) -> Self {
        Self { pools, ..Self::default() }
    }

    /// Whether a record of version 4 can express it.
    pub fn is_default(&self, lineage: &Lineage) -> bool {
        *self == Self::default() && lineage.rework.is_none()
    }

    /// The limits of the disk, which may be none.
    pub fn limits(&self) -> Limits {
        self.limits.as_deref().copied().unwrap_or_default()
    }

    /// Adds the key of a new delta.
    pub fn add_key(&mut self, key: Option<WrappedKey>) {
        if let (Some(encryption), Some(key)) = (&mut self.encryption, key)
            && !encryption.is_shredded()
        {
            encryption.add(key);
        }
    }

    fn fields(&self, lineage: &Lineage) -> Vec<(u16, Vec<u8>)> {
        let mut fields = Vec::new();
        if let Some(Trashed { removed_ns, purge_ns }) = self.trash {
            let mut w = Writer::new();
            w.i64(removed_ns).i64(purge_ns);
            fields.push((TRASH, w.finish()));
        }
        if let Some(limits) = &self.limits {
            let mut w = Writer::new();
            limits.put(&mut w);
            fields.push((LIMITS, w.finish()));
        }
        fields.extend(self.encryption.as_ref().map(|known| (ENCRYPTION, known.encode())));
        if !self.pools.is_empty() {
            let mut w = Writer::new();
            w.u16(self.pools.len() as u16);
            for (delta, pool) in &self.pools {
                w.u64(*delta).u64(*pool);
            }
            fields.push((POOLS, w.finish()));
        }
        fields.extend(lineage.rework.iter().map(|rework| (REWORK, rework.encode())));
        fields
    }

    fn set(&mut self, lineage: &mut Lineage, tag: u16, r: &mut Reader<'_>) -> Result<(), FormatError> {
        match tag {
            TRASH => self.trash = Some(Trashed { removed_ns: r.i64()?, purge_ns: r.i64()? }),
            LIMITS => self.limits = Limits::get(r)?.boxed(),
            ENCRYPTION => self.encryption = Some(Box::new(Encryption::decode(r)?)),
            POOLS => self.pools = get_pools(r)?,
            REWORK => lineage.rework = Some(Box::new(Rework::get(r)?)),
            _ => return Err(r.newer(format!("field {tag} is not known; use a newer plyfs"))),
        }
        Ok(())
    }

    pub(super) fn put(&self, w: &mut Writer, lineage: &Lineage) {
        put_fields(w, self.fields(lineage));
    }

    pub(super) fn get(
        r: &mut Reader<'_>,
        lineage: &mut Lineage,
        structure: &'static str,
    ) -> Result<Self, FormatError> {
        let mut features = Self::default();
        get_fields(r, structure, &mut |tag, field| features.set(lineage, tag, field))?;
        Ok(features)
    }
}

fn get_pools(r: &mut Reader<'_>) -> Result<Vec<(u64, u64)>, FormatError> {
    let mut pools: Vec<(u64, u64)> = Vec::new();
    for _ in 0..r.u16()? {
        let (delta, pool) = (r.u64()?, r.u64()?);
        if delta > MAX_NUMBER || pool == 0 || pool > MAX_NUMBER {
            return Err(r.bad(format!("delta {delta} in pool {pool} is not possible")));
        }
        if pools.last().is_some_and(|(last, _)| delta <= *last) {
            return Err(r.bad(format!("delta {delta} is not behind one with a lower number")));
        }
        pools.push((delta, pool));
    }
    if pools.is_empty() {
        return Err(r.bad("the list of pools is empty".to_owned()));
    }
    Ok(pools)
}
