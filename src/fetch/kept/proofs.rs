//! Pages of proofs that came, beside the blocks that they prove (docs/format.md, "Kept proofs").
//!
//! What must hold: nothing depends on these files. Each page is proven again when it is read, so a page that is torn,
//! stale or missing costs a request. They have no checksum, and plyfs syncs none of them.

use std::collections::HashSet;
use std::io;

use super::files::{FileKind, file_kind};
use super::{DIR, DiskCache, SourceKey};
use crate::format::layout::PROOF_SUFFIX;
use crate::format::proof::{Layout, PageId, ProofHeader};
use crate::io::Open;

fn name(key: &SourceKey) -> String {
    format!("{DIR}/{key}{PROOF_SUFFIX}")
}

impl DiskCache {
    /// Reads one page of a proof, as far as the file has it. May wait for the disk.
    ///
    /// # Errors
    /// When there is no such file, or it cannot be read.
    pub fn read_proof(&self, key: &SourceKey, layout: &Layout, page: PageId) -> io::Result<Vec<u8>> {
        let file = self.shared.medium.open(&name(key), Open::ToRead)?;
        let (offset, length) = layout.place(page);
        let mut bytes = vec![0; length as usize];
        let read = file.read_at(&mut bytes, offset)?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Keeps pages of a proof that are proven. Keeps nothing while the cache is off or the filesystem is full. May wait
    /// for the disk.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn keep_proof(
        &self,
        key: &SourceKey,
        header: &ProofHeader,
        pages: &[(u64, impl AsRef<[u8]>)],
    ) -> io::Result<()> {
        let bytes: u64 = pages.iter().map(|(_, page)| page.as_ref().len() as u64).sum();
        if self.shared.limit == 0 || self.shared.below_floor(bytes) > 0 {
            return Ok(());
        }
        self.shared.medium.make_dir(DIR)?;
        let file = self.shared.medium.open(&name(key), Open::Create)?;
        if file.is_empty()? {
            file.write_at(&header.encode(), 0)?;
        }
        pages.iter().try_for_each(|(offset, page)| file.write_at(page.as_ref(), *offset))
    }

    /// Removes the proof that is kept under a key. May wait for the disk.
    pub fn remove_proof(&self, key: &SourceKey) {
        match self.shared.medium.remove(&name(key)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%error, %key, "a kept proof that no base needs cannot be removed");
            }
            _ => {}
        }
    }

    /// Removes the proofs under all other keys.
    pub fn retain_proofs(&self, wanted: &HashSet<SourceKey>) {
        let names = self.shared.medium.list(DIR).unwrap_or_default();
        let kept = names.iter().filter_map(|name| match file_kind(name) {
            Some(FileKind::Proof(key)) => Some(key),
            _ => None,
        });
        kept.filter(|key| !wanted.contains(key)).for_each(|key| self.remove_proof(&key));
    }
}
