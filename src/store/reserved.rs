//! What damaged records may still stand for.
//!
//! A record that cannot be read may come back from a backup. Until it is back or removed, nobody takes its name (the
//! later of two disks with one name has it, and the other is purged) and no base goes that its disk may be on.

use std::collections::HashMap;

use super::{RECORD_LIMIT, StoreError};
use crate::format::FormatError;
use crate::format::record::DiskRecord;
use crate::io::{Medium, Open, read_whole};

/// Names, and how far the order of names has come, as far as damaged records can still tell.
#[derive(Debug, Default)]
pub(super) struct Reserved {
    disks: HashMap<String, String>,
    bases: HashMap<String, String>,
    disk_files: Vec<String>,
    /// Highest place in the order of names.
    pub(super) last_seq: u64,
}

impl Reserved {
    pub(super) fn of(medium: &dyn Medium, damaged: &[(String, FormatError)]) -> Self {
        let mut out = Self::default();
        for (file, _) in damaged {
            let is_disk = file.starts_with("disks/");
            if is_disk {
                out.disk_files.push(file.clone());
            }
            let bytes = medium.open(file, Open::Existing).and_then(|f| read_whole(&*f, RECORD_LIMIT));
            // Number and name stand at the same place in both kinds of record.
            let Some(salvage) = bytes.ok().and_then(|bytes| DiskRecord::salvage(&bytes)) else { continue };
            if is_disk {
                out.last_seq = out.last_seq.max(salvage.name_seq.unwrap_or(0));
                out.disks.insert(salvage.name, file.clone());
            } else {
                out.bases.insert(salvage.name, file.clone());
            }
        }
        out
    }

    pub(super) fn check_disk_name(&self, name: &str) -> Result<(), StoreError> {
        check("disk", name, self.disks.get(name))
    }

    pub(super) fn check_base_name(&self, name: &str) -> Result<(), StoreError> {
        check("base", name, self.bases.get(name))
    }

    /// Any disk may be on any base.
    pub(super) fn check_base_removal(&self, name: &str) -> Result<(), StoreError> {
        if self.disk_files.is_empty() {
            return Ok(());
        }
        let files = self.disk_files.iter().take(10).cloned().collect::<Vec<_>>().join(", ");
        let why = format!(
            "a disk whose record is damaged may need it; restore or remove {files} in the store, and start again"
        );
        Err(StoreError::invalid(format!("base {name}"), why))
    }
}

fn check(noun: &str, name: &str, file: Option<&String>) -> Result<(), StoreError> {
    let Some(file) = file else { return Ok(()) };
    let why = format!(
        "the damaged record {file} may have this name; choose another name, or restore or remove that file in the \
         store and start again"
    );
    Err(StoreError::invalid(format!("{noun} {name}"), why))
}
