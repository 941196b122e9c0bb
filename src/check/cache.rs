//! Invariant 14: the persistent cache of fetched blocks, and its copies in pools.

use std::io;
use std::path::Path;

use super::{Check, CheckError, Finding, Part, Repair, Step, VerifyBases};
use crate::fetch::kept::{self, CacheFinding, Checksums, DIR};

impl Check<'_> {
    /// Reads the bytes of cached blocks only when bases are verified, too, because it may take as long.
    pub(super) fn cache(&mut self) -> Result<(), CheckError> {
        let sums = if self.verify == VerifyBases::Yes { Checksums::Compare } else { Checksums::Skip };
        let repair = match self.repair {
            Repair::Yes => kept::Repair::Yes,
            Repair::No => kept::Repair::No,
        };
        let part = if sums == Checksums::Compare { Part::CachedBytes } else { Part::Cache };
        let note = |done, total| (self.watch)(Step { part, done, total });
        let found = kept::check_watched(self.medium, sums, repair, &note).map_err(|error: io::Error| {
            CheckError::Io { operation: "reading", path: self.store.join(DIR), error }
        })?;
        self.findings.extend(found.into_iter().map(|found| finding(found, None)));
        let pools: Vec<_> = self.pools.usable().collect();
        for (dir, medium) in pools {
            let found = kept::check_watched(&*medium, sums, repair, &note);
            match found {
                Ok(found) => {
                    self.findings.extend(found.into_iter().map(|found| finding(found, Some(&dir))));
                }
                Err(error) => {
                    let message = format!("it cannot be read: {error}; repair the drive and check again");
                    self.find(14, dir.join(DIR).display().to_string(), message);
                }
            }
        }
        Ok(())
    }
}

/// A finding in the cache of the store, or in the copies in the directory of a pool.
fn finding(found: CacheFinding, dir: Option<&Path>) -> Finding {
    let CacheFinding { file, message, repaired } = found;
    let object = match dir {
        Some(dir) => dir.join(file).display().to_string(),
        None => file,
    };
    Finding { invariant: 14, object, message, repaired }
}
