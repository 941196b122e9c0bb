//! Which bases have their contents under the key that version 0.1.0 made for them.
//!
//! That version gave contents without a digest a key that a later object at the same place may have, too. What a base was
//! to keep for good at the first start of a later version must not be lost for that, so these bases go on with the old
//! key; all others, and every base that comes later, have one of their own. The list is written once, when there is one.

use std::io;

use super::{DIR, DiskCache};
use crate::format::cache::{MAX_INHERITED, decode_inherited, encode_inherited};
use crate::format::layout::INHERITED;
use crate::io::{Open, read_whole, replace};

/// Bytes that the list may have.
const LIMIT: u64 = 65_536;

impl DiskCache {
    /// Numbers of the bases on the list, ascending. As long as there is no list, `candidates` are those.
    ///
    /// # Errors
    /// When the list cannot be read or written. One that is damaged is an error as well: nothing is guessed.
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
