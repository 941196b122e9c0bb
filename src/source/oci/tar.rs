//! Finds the disk in the tar layer of a container disk (KubeVirt): the first regular file of the directory `disk`.
//!
//! What must hold: nothing of the archive is believed beyond its own bounds. The disk is a range of the blob, and no name in
//! the archive is a path that plyfs opens.

use std::io::{self, Cursor};
use std::ops::Range;

use tar::{Archive, EntryType};

const SPARSE: &str = "its disk is a sparse file of tar; build it without --sparse";

/// The range of the disk in an archive of `size` bytes that begins with `head`.
///
/// # Errors
/// Why there is none, and the remedy.
pub(crate) fn disk(head: &[u8], size: u64) -> Result<Range<u64>, String> {
    let far =
        || format!("no file of its directory disk begins in the first {} KiB of its layer", head.len() >> 10);
    let mut archive = Archive::new(Cursor::new(head));
    let no_archive = |error: io::Error| format!("its layer is not a tar archive: {error}");
    let mut is_first = true;
    for entry in archive.entries().map_err(no_archive)? {
        // What does not fit in `head` is an error too.
        let mut entry = entry.map_err(|error| if is_first { no_archive(error) } else { far() })?;
        is_first = false;
        let (kind, bytes, start) = (entry.header().entry_type(), entry.size(), entry.raw_file_position());
        let end = start.checked_add(bytes).filter(|end| *end <= size);
        let end = end.ok_or("its layer ends before a file that it has")?;
        let is_sparse = kind == EntryType::GNUSparse || has_sparse_keys(&mut entry);
        let name = entry.path_bytes();
        let name = name.strip_prefix(b"./").unwrap_or(&name);
        if !name.strip_prefix(b"/").unwrap_or(name).starts_with(b"disk/") {
            continue;
        }
        match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse if is_sparse => {
                return Err(SPARSE.into());
            }
            EntryType::Regular | EntryType::Continuous if bytes == 0 => {
                return Err("its disk is empty".into());
            }
            EntryType::Regular | EntryType::Continuous => return Ok(start..end),
            _ => {}
        }
    }
    if (head.len() as u64) < size {
        return Err(far());
    }
    Err("its layer has no file in the directory disk, where a container disk has it".into())
}

/// Whether a header in front of the file says that it is stored without its holes.
fn has_sparse_keys(entry: &mut tar::Entry<'_, Cursor<&[u8]>>) -> bool {
    let Ok(Some(mut extensions)) = entry.pax_extensions() else { return false };
    extensions
        .any(|extension| extension.is_ok_and(|extension| extension.key_bytes().starts_with(b"GNU.sparse")))
}
