//! What the record of a base has about the proofs of its files (docs/format.md, "Base record").

use super::codec::{FormatError, Reader, Writer};
use super::proof::Hash;
use super::record::ImageFile;

/// By what the contents of a file are proven.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileProof {
    /// The BLAKE3 hash of the file.
    pub root: Hash,
    /// Where its proof is, paths or URLs, the first one first. Empty: there is none, and only the whole can be compared.
    pub places: Vec<String>,
}

/// The most places of a proof: one beside each URL of the file, and those that were named later.
pub const MAX_PLACES: usize = 1 + ImageFile::MAX_FILES;

pub(super) fn put_proofs<'a>(files: impl Iterator<Item = &'a ImageFile>) -> Vec<u8> {
    let proven: Vec<_> = (0u8..).zip(files).filter_map(|(n, file)| Some((n, file.proof.as_ref()?))).collect();
    let mut w = Writer::new();
    w.u8(proven.len() as u8);
    for (number, proof) in proven {
        w.u8(number).raw(&proof.root).u8(proof.places.len() as u8);
        for place in &proof.places {
            w.bytes(place.as_bytes());
        }
    }
    w.finish()
}

pub(super) fn get_proofs<'a>(
    r: &mut Reader<'_>,
    files: impl Iterator<Item = &'a mut ImageFile>,
) -> Result<(), FormatError> {
    let mut files = (0u8..).zip(files);
    let count = r.u8()?;
    if count == 0 {
        return Err(r.bad("the list of proofs is empty".to_owned()));
    }
    for _ in 0..count {
        let wanted = r.u8()?;
        // In ascending order: a file that was passed does not come again.
        let Some((_, file)) = files.by_ref().find(|(number, _)| *number == wanted) else {
            return Err(r.bad(format!("file {wanted} has a proof, and is out of order or not there")));
        };
        let mut root = [0; 32];
        root.copy_from_slice(r.raw(32)?);
        let places = r.u8()?;
        if usize::from(places) > MAX_PLACES {
            return Err(r.bad(format!("{places} places of a proof, at most {MAX_PLACES} can be")));
        }
        let places = (0..places).map(|_| r.text()).collect::<Result<_, _>>()?;
        file.proof = Some(FileProof { root, places });
    }
    Ok(())
}
