//! The list of inherited bases: bases whose contents are under the key that version 0.1.0 gave them.
//!
//! For contents without a digest, that version used a key that a later object at the same location may have, too. The
//! blocks of bases that were pinned or hydrated at the first start of a later version must not be lost. So these bases go
//! on with the old key; all others, and every later base, have a key of their own. The list is written once.

use std::io;

use super::{DIR, DiskCache};
use crate::format::cache::{MAX_INHERITED, decode_inherited, encode_inherited};
use crate::format::layout::INHERITED;
use crate::io::{Open, read_whole, replace};

/// The largest list, bytes.
const LIMIT: u64 = 65_536;

impl DiskCache {
    /// Numbers of the bases on the list, ascending. While there is no list, the first call writes one with `candidates`.
    ///
    /// # Errors
    /// When the list cannot be read or written, or is damaged.
    pub fn inherited(&self, candidates: impl FnOnce() -> Vec<u64>) -> io::Result<Vec<u64>> {
        let medium = &*self.shared.medium;
        let name = format!("{DIR}/{INHERITED}");
        match medium.open(&name, Open::Existing) {
            Ok(file) => {
                let bytes = read_whole(&*file, LIMIT)?;
                return decode_inherited(&bytes)
                    .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        let mut bases = candidates();
        bases.sort_unstable();
        bases.truncate(MAX_INHERITED);
        if bases.is_empty() {
            return Ok(bases);
        }
        medium.make_dir(DIR)?;
        replace(medium, DIR, INHERITED, &encode_inherited(&bases))?;
        Ok(bases)
    }
}
