//! The offline check of the cache's directory. Repair means removal, because a damaged block is no copy of anything.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::files::{self, FileKind, Opened, blocks_name, chunks_of, file_kind, sums_name};
use super::{CACHE_BLOCK, DIR, SourceKey};
use crate::format::cache::{
    HEADER_AREA, SLOT, SLOT_BLOCKS, SUMS_AT, block_sum, decode_inherited, decode_slot, slot_place,
};
use crate::format::layout::INHERITED;
use crate::io::{Medium, Open, read_whole};

/// Whether a check may change the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// It only reads.
    No,
    /// It removes what is damaged.
    Yes,
}

/// Whether a check compares the bytes with their checksums, which reads all cached blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksums {
    /// It checks only the structure.
    Skip,
    /// It reads and compares all blocks.
    Compare,
}

/// A violation of docs/format.md in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheFinding {
    /// File of the store.
    pub file: String,
    /// What is wrong.
    pub message: String,
    /// Whether it was removed.
    pub repaired: bool,
}

/// Checks the cache of a store that is not in use.
///
/// # Errors
/// When the directory cannot be read. A missing directory is no finding.
pub fn check(medium: &dyn Medium, sums: Checksums, repair: Repair) -> io::Result<Vec<CacheFinding>> {
    check_watched(medium, sums, repair, &|_, _| ())
}

/// As [`check`]. `note` gets how much is done, and how much there is: bytes of cached
/// blocks that are compared, or else files.
///
/// # Errors
/// As [`check`].
pub fn check_watched(
    medium: &dyn Medium,
    sums: Checksums,
    repair: Repair,
    note: &dyn Fn(u64, u64),
) -> io::Result<Vec<CacheFinding>> {
    let names = match medium.list(DIR) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut check = Check { medium, sums, repair, note, done: 0, total: 0, findings: Vec::new() };
    let (mut blocks, mut with_sums) = (BTreeSet::new(), BTreeSet::new());
    for name in names {
        match file_kind(&name) {
            Some(FileKind::Blocks(key)) => blocks.insert(key),
            Some(FileKind::Sums(key)) => with_sums.insert(key),
            Some(FileKind::Inherited) => check.inherited(),
            // Each of its pages is proven when it is read, so nothing in it can be damage.
            Some(FileKind::Proof(_)) => true,
            None => {
                let message = "plyfs creates no file of this name; move it elsewhere".to_owned();
                check.findings.push(CacheFinding { file: format!("{DIR}/{name}"), message, repaired: false });
                true
            }
        };
    }
    for key in blocks.difference(&with_sums) {
        check.remove_source(key, blocks_name(key), "the file with the checksums of these blocks is missing");
    }
    for key in with_sums.difference(&blocks) {
        check.remove_source(key, sums_name(key), "the file with the blocks of these checksums is missing");
    }
    let sources: Vec<_> = with_sums.intersection(&blocks).collect();
    check.total = match sums {
        Checksums::Skip => sources.len() as u64,
        Checksums::Compare => sources.iter().map(|key| check.most_bytes(key)).sum(),
    };
    for key in sources {
        let before = check.done;
        let result = check.source(key);
        check.done = before + if sums == Checksums::Skip { 1 } else { check.most_bytes(key) };
        note(check.done, check.total);
        match result {
            Ok(()) => {}
            // An I/O error does not show that the file is damaged. It may be the only copy of a hydrated base.
            Err(error) if error.raw_os_error().is_some() => {
                let message = format!("it cannot be read now: {error}; repair the disk and check again");
                check.findings.push(CacheFinding { file: sums_name(key), message, repaired: false });
            }
            Err(error) => check.remove_source(key, sums_name(key), &error.to_string()),
        }
    }
    Ok(check.findings)
}

struct Check<'a> {
    medium: &'a dyn Medium,
    sums: Checksums,
    repair: Repair,
    note: &'a dyn Fn(u64, u64),
    done: u64,
    total: u64,
    findings: Vec<CacheFinding>,
}

/// Bytes of the blocks of one slot.
const SLOT_BYTES: u64 = SLOT_BLOCKS * CACHE_BLOCK;

impl Check<'_> {
    /// The most bytes of a source that may be cached, as the length of its file of checksums tells.
    fn most_bytes(&self, key: &SourceKey) -> u64 {
        let file = self.medium.open(&sums_name(key), Open::ToRead);
        let len = file.and_then(|file| file.len()).unwrap_or(0);
        len.saturating_sub(HEADER_AREA) / SLOT * SLOT_BYTES
    }

    fn find(&mut self, file: String, message: &str, mend: impl FnOnce(&dyn Medium) -> io::Result<()>) {
        let mut finding = CacheFinding { file, message: message.to_owned(), repaired: false };
        if self.repair == Repair::Yes {
            match mend(self.medium) {
                Ok(()) => finding.repaired = true,
                Err(e) => finding.message.push_str(&format!("; the repair failed: {e}")),
            }
        }
        self.findings.push(finding);
    }

    fn remove_source(&mut self, key: &SourceKey, file: String, why: &str) {
        self.find(file, &format!("{why}; no cached block of this source can be used"), |medium| {
            files::remove(medium, key)?;
            medium.sync_dir(DIR)
        });
    }

    /// Checks the list of inherited bases. It cannot be repaired, because nothing else records which bases were on it.
    fn inherited(&mut self) -> bool {
        let name = format!("{DIR}/{INHERITED}");
        let read = || {
            let file = self.medium.open(&name, Open::ToRead)?;
            let bytes = read_whole(&*file, 65_536)?;
            decode_inherited(&bytes).map_err(io::Error::other)
        };
        if let Err(error) = read() {
            let message = format!("{error}; remove it when no base without a digest is hydrated or pinned");
            self.findings.push(CacheFinding { file: name, message, repaired: false });
        }
        true
    }

    /// Checks one source. An error concerns the whole source.
    fn source(&mut self, key: &SourceKey) -> io::Result<()> {
        let how = if self.repair == Repair::Yes { Open::Existing } else { Open::ToRead };
        let files = Opened::open(self.medium, key, how)?;
        let decoded = files.header()?.map_err(io::Error::other)?;
        let mut header = decoded.header;
        if header.key != key.0 {
            return Err(io::Error::other("its header belongs to another source"));
        }
        if let Some(damaged) = decoded.damaged {
            let why = format!("one of the two copies of its header is damaged: {damaged}");
            self.find(sums_name(key), &why, |_| files.write_header(&mut header));
        }
        let (blocks, chunks) = (header.size.div_ceil(CACHE_BLOCK), chunks_of(header.size));
        let slots = files.sums.len()?.saturating_sub(HEADER_AREA) / SLOT;
        if slots > 2 * chunks + 64 {
            return Err(io::Error::other(format!("{slots} slots for {chunks} chunks")));
        }
        let mut owners: BTreeMap<u64, u32> = BTreeMap::new();
        let (mut bytes, mut block_bytes) = (vec![0; SLOT as usize], vec![0; CACHE_BLOCK as usize]);
        for no in 0..slots as u32 {
            if files.sums.read_at(&mut bytes, slot_place(no))? < bytes.len() {
                break;
            }
            let slot = decode_slot(&key.0, no, &bytes).map_err(io::Error::other)?;
            if slot.sums.iter().all(|sum| *sum == 0) {
                continue;
            }
            if self.sums == Checksums::Compare {
                self.done += SLOT_BYTES;
                (self.note)(self.done, self.total);
            }
            let wrong = match slot.chunk {
                None => Some("is damaged".to_owned()),
                Some(chunk) if chunk >= chunks => Some(format!("names chunk {chunk} of {chunks}")),
                Some(chunk) => {
                    owners.insert(chunk, no).map(|other| format!("and slot {other} name the same chunk"))
                }
            };
            if let Some(wrong) = wrong {
                let zeros = vec![0; SLOT as usize];
                self.find(sums_name(key), &format!("slot {no} {wrong}"), |_| {
                    files.sums.write_at(&zeros, slot_place(no))
                });
                continue;
            }
            let first = slot.chunk.unwrap_or(0) * SLOT_BLOCKS;
            for (at, sum) in slot.sums.iter().enumerate().filter(|(_, sum)| **sum != 0) {
                let block = first + at as u64;
                let wrong = if block >= blocks {
                    Some("lies beyond the end of its source".to_owned())
                } else if self.sums == Checksums::Compare {
                    let len = CACHE_BLOCK.min(header.size - block * CACHE_BLOCK) as usize;
                    let buf = &mut block_bytes[..len];
                    match files.blocks.read_at(buf, block * CACHE_BLOCK) {
                        Ok(got) if got == len && block_sum(&key.0, block, buf) == *sum => None,
                        Ok(_) => Some("does not match its checksum".to_owned()),
                        // A block of a pinned source may be the only copy, and may be readable later.
                        Err(e) if header.pinned => {
                            let message = format!("block {block} cannot be read now: {e}; plyfs keeps it");
                            let file = blocks_name(key);
                            self.findings.push(CacheFinding { file, message, repaired: false });
                            None
                        }
                        Err(e) => Some(format!("cannot be read: {e}")),
                    }
                } else {
                    None
                };
                if let Some(wrong) = wrong {
                    let place = slot_place(no) + SUMS_AT + at as u64 * 8;
                    self.find(blocks_name(key), &format!("block {block} {wrong}"), |_| {
                        files.sums.write_at(&[0; 8], place)?;
                        files.blocks.punch(block * CACHE_BLOCK, CACHE_BLOCK)
                    });
                }
            }
        }
        if self.repair == Repair::Yes {
            files.sums.sync_data()?;
        }
        Ok(())
    }
}
