//! A file of this host with a proof: each group is proven when it is read (D103).
//!
//! The proof is a file of this host too, and is read where it lies. What must hold:
//! - A read returns no byte of a group that is not what the proof says.
//! - A hole is a range like any other. A file that lost data, as a copy without its holes does, reads as zeros there, and
//!   these zeros are not proven.

use std::path::Path;
use std::sync::Arc;

use super::aligned::AlignedBuf;
use super::pages::{Page, ProvenPages, hash_in};
use super::{
    Disproven, FileSource, Identity, OpenImage, Source, SourceError, SourceErrorKind, disproven, proven_key,
};
use crate::format::proof::{GROUP, Hash, Layout, PageId, ProofHeader};
use crate::format::record::FileProof;

/// Most bytes that are read at once for a range that does not lie on groups.
const BOUNCE: u64 = 256 * 1024;
/// Pages of one file in memory: 1 MiB, for half a GiB of the image.
const PAGES: usize = 512;

/// A proof in a file of this host.
pub struct ProofFile {
    file: FileSource,
    header: ProofHeader,
    layout: Layout,
    pages: ProvenPages,
}

impl ProofFile {
    /// Opens the proof of a file with `size` bytes.
    ///
    /// # Errors
    /// When it cannot be opened, or has another size than the proof of such a file.
    pub fn open(opener: &dyn OpenImage, path: &Path, root: Hash, size: u64) -> Result<Self, SourceError> {
        let file = FileSource::open_with(opener, path)?;
        let header = ProofHeader { size, root };
        let this = Self { header, layout: Layout::of(size), pages: ProvenPages::new(PAGES), file };
        let (found, wanted) = (this.file.size(), this.layout.proof_size());
        if found != wanted {
            let why = format!("it has {found} bytes, and the proof of this image has {wanted}");
            return Err(this.unusable(path, &why));
        }
        Ok(this)
    }

    fn unusable(&self, path: &Path, why: &str) -> SourceError {
        let advice = "put the right proof there, or make it again with: plyfs base seal IMAGE";
        SourceError::remote(SourceErrorKind::Protocol, "use", path.display().to_string(), why, advice)
    }

    /// A page with this hash.
    fn page(&self, page: PageId, hash: &Hash) -> Result<Page, SourceError> {
        if let Some(found) = self.pages.get(&self.header, page) {
            return Ok(found);
        }
        let (offset, length) = self.layout.place(page);
        let mut bytes = vec![0; length as usize];
        let read = self.file.read_at(&mut bytes, offset)?;
        if !self.layout.page_has(page, &bytes[..read], hash) {
            let why = format!("its bytes {offset} to {} do not belong to it", offset + length - 1);
            return Err(self.unusable(self.file.path(), &why));
        }
        let bytes: Page = bytes.into();
        self.pages.add(&self.header, page, bytes.clone());
        Ok(bytes)
    }

    /// The hash of a group.
    fn hash_of(&self, group: u64) -> Result<Hash, SourceError> {
        let Some((lowest, place)) = self.layout.page_of(group) else { return Ok(self.header.root) };
        if let Some(found) = self.pages.get(&self.header, lowest) {
            return Ok(hash_in(&found, place));
        }
        // From the highest page down; at most six, as the image is at most 64 TiB.
        let mut path = vec![lowest];
        while let Some(last) = path.last().copied().filter(|last| !self.layout.is_top(*last)) {
            path.push(last.parent().0);
        }
        let mut hash = self.header.root;
        for (number, page) in path.iter().enumerate().rev() {
            let found = self.page(*page, &hash)?;
            let at = number.checked_sub(1).map_or(place, |below| path[below].parent().1);
            hash = hash_in(&found, at);
        }
        Ok(hash)
    }

    /// Whether `bytes`, which are whole groups from `offset` on, are those of the image.
    ///
    /// # Errors
    /// When the proof cannot be read, or is not that of the root.
    pub fn find_wrong(&self, offset: u64, bytes: &[u8]) -> Result<Option<Disproven>, SourceError> {
        for (group, bytes) in (offset / GROUP..).zip(bytes.chunks(GROUP as usize)) {
            let hash = self.hash_of(group)?;
            if !self.layout.group_has(group, bytes, &hash) {
                let start = group * GROUP;
                return Ok(Some(Disproven { range: start..start + bytes.len() as u64 }));
            }
        }
        Ok(None)
    }
}

/// See the module.
pub struct ProvenFile {
    file: FileSource,
    path: String,
    proof: ProofFile,
    /// Not that of the file: the memory cache may have unproven bytes of it, for a base without a proof.
    identity: Identity,
}

impl ProvenFile {
    /// A file that was opened, with the proof that its record names; `file` itself when it names none.
    ///
    /// # Errors
    /// When the proof cannot be opened.
    pub fn wrap(
        opener: &dyn OpenImage,
        file: FileSource,
        proof: Option<&FileProof>,
    ) -> Result<Arc<dyn Source>, SourceError> {
        let place = proof.and_then(|proof| Some((proof.root, proof.places.first()?)));
        let Some((root, place)) = place else { return Ok(Arc::new(file)) };
        let proof = ProofFile::open(opener, Path::new(place), root, file.size())?;
        let identity = Identity::Contents { size: file.size(), key: proven_key(&root, file.size()) };
        Ok(Arc::new(Self { path: file.path().display().to_string(), file, proof, identity }))
    }

    fn read_groups(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        let read = self.file.read_at(buf, offset)?;
        match self.proof.find_wrong(offset, &buf[..read])? {
            None => Ok(read),
            Some(wrong) => Err(disproven(&self.path, &wrong)),
        }
    }
}

impl Source for ProvenFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        let size = self.size();
        let left = size.saturating_sub(offset);
        let want = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        let end = offset + want as u64;
        let whole = offset.is_multiple_of(GROUP) && (end.is_multiple_of(GROUP) || end == size);
        if whole {
            // Of the end of the file, the whole of `buf`: an aligned read stays aligned.
            let buf = if end == size { buf } else { &mut buf[..want] };
            return if want == 0 { Ok(0) } else { self.read_groups(buf, offset) };
        }
        let mut bounce = AlignedBuf::new(BOUNCE as usize);
        let mut done = 0;
        while done < want {
            let at = offset + done as u64;
            let start = at / GROUP * GROUP;
            let span = (end.next_multiple_of(GROUP) - start).min(BOUNCE) as usize;
            let read = self.read_groups(&mut bounce[..span], start)?;
            let skip = (at - start) as usize;
            let part = read.saturating_sub(skip).min(want - done);
            if part == 0 {
                break;
            }
            buf[done..done + part].copy_from_slice(&bounce[skip..skip + part]);
            done += part;
        }
        Ok(done)
    }

    fn size(&self) -> u64 {
        self.file.size()
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>, SourceError> {
        self.file.check()?;
        Ok((offset < self.size()).then_some(offset))
    }

    fn next_hole(&self, offset: u64) -> Result<u64, SourceError> {
        self.file.check()?;
        Ok(self.size().max(offset))
    }

    fn check(&self) -> Result<(), SourceError> {
        self.file.check()
    }
}
