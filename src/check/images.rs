//! Images in the store itself.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::PathBuf;

use super::{Check, CheckError};
use crate::format::layout::IMAGES;

impl Check<'_> {
    /// Invariant 11, of images that `plyfs disk commit` made: one that no base has is left by a command that did not come to
    /// its end, or by a removal.
    pub(super) fn images(&mut self, bases: &[String]) -> Result<(), CheckError> {
        let names = match self.medium.list(IMAGES) {
            Ok(names) => names,
            // The directory is created with the first image.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => {
                return Err(CheckError::Io { operation: "reading", path: self.store.join(IMAGES), error });
            }
        };
        let files = self.bases.values().flat_map(|base| base.files());
        let needed: BTreeSet<PathBuf> =
            files.filter_map(|file| fs::canonicalize(&file.source).ok()).collect();
        for name in names {
            let path = self.store.join(IMAGES).join(&name);
            if fs::canonicalize(&path).is_ok_and(|path| needed.contains(&path)) {
                continue;
            }
            if bases.len() == self.bases.len() {
                self.stray(IMAGES, &name, None, "no base has it");
            } else {
                let why = "no base that can be read has it; kept, because a damaged record may name it";
                self.find(11, format!("{IMAGES}/{name}"), why);
            }
        }
        Ok(())
    }
}
