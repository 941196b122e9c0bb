//! Invariant 14: the persistent cache of fetched blocks.

use std::io;

use super::{Check, CheckError, Finding, Part, Repair, Step, VerifyBases};
use crate::fetch::kept::{self, Checksums, DIR};

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
        self.findings.extend(found.into_iter().map(|found| Finding {
            invariant: 14,
            object: found.file,
            message: found.message,
            repaired: found.repaired,
        }));
        Ok(())
    }
}
