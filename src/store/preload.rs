//! Records that a standby worker reads while another worker serves, so that its takeover reads only the records that
//! changed.
//!
//! What must hold: a preloaded record is used only when its file is the one that was read. Inode and time of the last
//! change tell. They count only if that time was in the past by a margin when the file was read: two changes within one
//! tick of the kernel's clock look alike.

use std::collections::HashMap;
use std::io;
use std::path::Path;

use super::StoreError;
use super::records::{Identities, RecordKind, read_records};
use crate::format::record::{BaseRecord, DiskRecord};
use crate::io::{HostMedium, Medium, Stamp, sys};

/// How old the last change of a file is at least when it is read. The clocks of filesystems tick some hundred times a
/// second.
pub(super) const MIN_AGE_NS: i64 = 2_000_000_000;

/// Records of one kind, by number. Boxed, so that the table, which has free places, is small.
pub(super) type KnownRecords<T> = HashMap<u64, Box<(Stamp, T)>>;

/// See the module.
#[derive(Debug, Default)]
pub struct PreloadedRecords {
    pub(super) bases: KnownRecords<BaseRecord>,
    pub(super) disks: KnownRecords<DiskRecord>,
}

impl PreloadedRecords {
    /// Reads those records of the store at `root` that changed since `before`. Changes nothing: another worker may be
    /// serving the store.
    ///
    /// # Errors
    /// When the directories cannot be listed.
    pub fn read(root: &Path, before: Self) -> Result<Self, StoreError> {
        let object = || format!("store {}", root.display());
        let medium = HostMedium::new(root).map_err(StoreError::io(object(), "opening it"))?;
        Self::read_from(&medium, before, MIN_AGE_NS).map_err(StoreError::io(object(), "reading the records"))
    }

    /// `min_age_ns`: how old the last change of a file is at least.
    pub(super) fn read_from(medium: &dyn Medium, before: Self, min_age_ns: i64) -> io::Result<Self> {
        let end = sys::now_ns() - min_age_ns;
        let bases = read_records(medium, RecordKind::Base, before.bases, BaseRecord::decode, |r| r.id)?;
        let identities = Identities::default();
        let decode = |bytes: &[u8]| identities.decode(bytes);
        let disks = read_records(medium, RecordKind::Disk, before.disks, decode, |r| r.id)?;
        Ok(Self { bases: older_than(bases.stamped, end), disks: older_than(disks.stamped, end) })
    }

    /// How many records it has.
    pub fn len(&self) -> usize {
        self.bases.len() + self.disks.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

fn older_than<T>(stamped: Vec<(u64, Box<(Stamp, T)>)>, end: i64) -> KnownRecords<T> {
    stamped.into_iter().filter(|(_, read)| read.0.changed_ns < end).collect()
}
