//! Where the map file has blocks that the data file may lose.
//!
//! A flush that carries a block waits for the map file alone. The kernel writes the block to the data file when it likes.
//! When the medium refuses it, the kernel considers it written, drops it from memory sooner or later, and the data file shows
//! older bytes.
//!
//! What must hold: what is written again after that is, of each block, what a flush carried or newer (D122). So for each
//! carried block it is known whether it was written since, and the checksum of what it then had. A worker that takes over
//! has no checksums. But a writer of a carried block also marks its word dirty, so the block of a word that is durable is
//! what the map file carries.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::{Delta, DeltaError};
use crate::format::BLOCK;
use crate::format::journal::{Journal, State};
use crate::io::MediumFile;
use crate::mutant::Mutant;

/// What a block of the data file has, unless that has lost it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Newest {
    /// What the map file carries.
    Carried,
    /// What was written later: the checksum of its stored bytes; `None` when they could not be read.
    Written(Option<u32>),
}

/// A block in the map file.
#[derive(Debug, Clone, Copy)]
struct Place {
    at: u64,
    newest: Newest,
}

#[derive(Default)]
struct Places {
    /// The map file.
    file: Option<Arc<dyn MediumFile>>,
    blocks: BTreeMap<u64, Place>,
    /// Blocks of the record that is being written.
    next: BTreeMap<u64, Newest>,
}

/// See the module. The holder of a block's range notes its changes.
#[derive(Default)]
pub(super) struct KeptBlocks {
    /// Whether there are any. Set under the lock of a block's range, before that block is carried.
    any: AtomicBool,
    places: Mutex<Places>,
}

impl KeptBlocks {
    /// A block is about to be read for a record. The caller holds its range.
    pub fn begin(&self, block: u64) {
        self.any.store(true, Ordering::Release);
        self.places.lock().next.insert(block, Newest::Carried);
    }

    /// The record is durable: `at` says where in the file its blocks lie.
    pub fn keep(&self, file: &Arc<dyn MediumFile>, at: impl Iterator<Item = (u64, u64)>) {
        let mut places = self.places.lock();
        let next = std::mem::take(&mut places.next);
        for (block, at) in at {
            match next.get(&block) {
                Some(newest) => _ = places.blocks.insert(block, Place { at, newest: *newest }),
                // Discarded meanwhile.
                None => _ = places.blocks.remove(&block),
            }
        }
        places.file = Some(file.clone());
    }

    /// No record has the blocks of [`KeptBlocks::begin`]. What earlier records have stays.
    pub fn give_up(&self) {
        self.places.lock().next.clear();
    }

    /// The data file was synced, and a record says so: nothing of the map file is needed.
    pub fn settle(&self) {
        *self.places.lock() = Places::default();
        self.any.store(false, Ordering::Release);
    }

    /// Blocks were written. `sum` gives the checksum of a block. The caller holds their range.
    fn written(&self, range: Range<u64>, sum: impl Fn(u64) -> Option<u32>) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        let mut places = self.places.lock();
        let Places { blocks, next, .. } = &mut *places;
        let kept = blocks.range_mut(range.clone()).map(|(block, place)| (block, &mut place.newest));
        for (block, newest) in kept.chain(next.range_mut(range)) {
            *newest = Newest::Written(sum(*block));
        }
    }

    /// Blocks have no bytes any more. The caller holds their range.
    pub fn forget(&self, range: Range<u64>) {
        if self.any.load(Ordering::Acquire) {
            let mut places = self.places.lock();
            places.blocks.retain(|block, _| !range.contains(block));
            places.next.retain(|block, _| !range.contains(block));
        }
    }

    fn place(&self, block: u64) -> Option<(Arc<dyn MediumFile>, Place)> {
        let places = self.places.lock();
        Some((places.file.clone()?, *places.blocks.get(&block)?))
    }

    /// All blocks, with the file and where they lie in it.
    fn all(&self) -> Vec<(Arc<dyn MediumFile>, u64, u64)> {
        let places = self.places.lock();
        let Some(file) = &places.file else { return Vec::new() };
        places.blocks.iter().map(|(block, place)| (file.clone(), *block, place.at)).collect()
    }

    /// The data file has again what the map file carries of a block. The caller holds its range.
    fn placed(&self, block: u64) {
        if let Some(place) = self.places.lock().blocks.get_mut(&block) {
            place.newest = Newest::Carried;
        }
    }
}

/// The checksum of a stored block.
fn sum(stored: &dyn MediumFile, block: u64) -> Option<u32> {
    let mut bytes = [0; BLOCK as usize];
    let got = stored.read_at(&mut bytes, block * BLOCK).ok()?;
    Some(crc32c::crc32c(&bytes[..got]))
}

impl Delta {
    /// Notes that blocks `first..end` were written: after their bytes, and before their words. The caller holds their
    /// range and has set `unsynced`.
    pub(super) fn note_written(&self, (first, end): (u64, u64), data: &dyn MediumFile) {
        self.kept.written(first..end, |block| {
            // For the next worker, and before the caller learns that it is written. The record of the word would hide this
            // fault.
            if !Mutant::CarriedNotSettled.is_active() {
                self.map.mark_dirty(block);
            }
            let stored = data.stored();
            sum(stored.as_deref().unwrap_or(data), block)
        });
        self.written.note(first, end);
    }

    /// Notes the carried blocks that a start put into the data file. No other thread uses the delta yet.
    pub(super) fn keep_placed(&self, journal: Option<&Journal<()>>) {
        let commit = self.commit.lock();
        let (Some(journal), Some(file)) = (journal, &commit.file) else { return };
        let carried = journal.carried.iter().map(|(block, at)| (*block, *at));
        // In the map of a start, all words are durable.
        let placed = carried.filter(|(b, _)| self.map.state(*b) == State::Data && self.map.is_durable(*b));
        let placed: Vec<_> = placed.collect();
        placed.iter().for_each(|(block, _)| self.kept.begin(*block));
        self.kept.keep(file, placed.into_iter());
    }

    /// Puts back what the data file has lost of carried blocks since an earlier worker: its filesystem may have been
    /// unmounted meanwhile. No other thread uses the delta yet.
    ///
    /// # Errors
    /// Errors of the storage. Another call continues.
    pub(super) fn put_back_carried(&self, journal: Option<&Journal<()>>) -> Result<(), DeltaError> {
        self.keep_placed(journal);
        let Some(data) = self.data.read().clone() else { return Ok(()) };
        let put_back = || -> io::Result<()> {
            let stored = data.stored();
            let stored = stored.as_deref().unwrap_or(&*data);
            let (mut copy, mut shown) = (vec![0; BLOCK as usize], vec![0; BLOCK as usize]);
            for (file, block, at) in self.kept.all() {
                if file.read_at(&mut copy, at)? < copy.len() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let got = stored.read_at(&mut shown, block * BLOCK);
                if got.is_ok_and(|got| got == shown.len()) && shown == copy {
                    continue;
                }
                tracing::warn!(
                    disk = self.spec.disk,
                    block,
                    "the data file has lost a block; it is taken from the map file"
                );
                data.write_stored(&copy, block * BLOCK)?;
            }
            Ok(())
        };
        put_back().map_err(DeltaError::io("writing carried blocks to the data file"))
    }

    /// Writes a carried block again, which a failed sync may have lost: as it is, or as it was carried when the data file
    /// has lost it. The caller holds its range.
    ///
    /// # Errors
    /// Errors of the storage.
    pub(super) fn redo_carried(&self, data: &dyn MediumFile, block: u64) -> io::Result<()> {
        // Discarded since.
        if self.map.state(block) != State::Data {
            return Ok(());
        }
        let mut bytes = vec![0; BLOCK as usize];
        let stored = data.stored();
        let shown = stored.as_deref().unwrap_or(data).read_at(&mut bytes, block * BLOCK);
        let kept = self.kept.place(block).filter(|(_, place)| match (place.newest, &shown) {
            (Newest::Carried, _) => true,
            (Newest::Written(Some(sum)), Ok(got)) => crc32c::crc32c(&bytes[..*got]) != sum,
            (Newest::Written(sum), Err(_)) => sum.is_some(),
            (Newest::Written(None), Ok(_)) => false,
        });
        let Some((file, place)) = kept else {
            let got = shown?;
            return data.write_stored(&bytes[..got], block * BLOCK);
        };
        if file.read_at(&mut bytes, place.at)? < bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if place.newest != Newest::Carried {
            tracing::warn!(
                disk = self.spec.disk,
                block,
                "the storage lost a write that no flush has made durable; the block is as it was flushed before"
            );
        }
        data.write_stored(&bytes, block * BLOCK)?;
        self.kept.placed(block);
        Ok(())
    }
}
