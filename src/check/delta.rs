//! The map file and the data file of one disk.

use std::collections::BTreeMap;
use std::io;

use super::Check;
use crate::format::BLOCK;
use crate::format::journal::{Journal, WORD_BLOCKS};
use crate::format::record::DiskRecord;

const LARGEST_MAP_FILE: u64 = 8 << 30;
const PAGE: u64 = 512;
/// The lower bit of each block: the state `Data`.
const EVEN: u64 = 0x5555_5555_5555_5555;

/// The words of a map, in pages so that an empty stretch costs nothing.
#[derive(Default)]
struct Words(BTreeMap<u64, Vec<u64>>);

impl Words {
    fn set(&mut self, word: u64, value: u64) {
        let (page, at) = (word / PAGE, (word % PAGE) as usize);
        if value != 0 || self.0.contains_key(&page) {
            self.0.entry(page).or_insert_with(|| vec![0; PAGE as usize])[at] = value;
        }
    }

    fn clear_from(&mut self, block: u64) {
        let word = block / WORD_BLOCKS;
        self.0.split_off(&(word / PAGE + 1));
        if let Some(page) = self.0.get_mut(&(word / PAGE)) {
            let at = (word % PAGE) as usize;
            page[at] &= (1 << (2 * (block % WORD_BLOCKS))) - 1;
            page[at + 1..].fill(0);
        }
    }

    /// One behind the last block in the data file; 0 when there is none.
    fn data_end(&self) -> u64 {
        for (page, words) in self.0.iter().rev() {
            if let Some(at) = words.iter().rposition(|w| w & EVEN != 0) {
                let pair = u64::from((63 - (words[at] & EVEN).leading_zeros()) / 2);
                return (page * PAGE + at as u64) * WORD_BLOCKS + pair + 1;
            }
        }
        0
    }
}

impl Check<'_> {
    /// Invariants 8 to 10.
    pub(super) fn check_delta(&mut self, id: u64, record: &DiskRecord) {
        let root = record.map;
        if root.generation == 0 {
            // Nothing was ever flushed: whatever the data file has, nobody was told that it is there.
            return;
        }
        let object = format!("disk {}", record.name);
        let file = format!("deltas/{id}.{}.map", root.generation);
        self.maps += 1;
        let journal = match self.read(&file, LARGEST_MAP_FILE) {
            Ok(bytes) => Journal::decode(&bytes, id, root.generation, root.floor).map_err(|e| e.to_string()),
            Err(e) => Err(format!("it cannot be read: {e}")),
        };
        let journal = match journal {
            Ok(journal) => journal,
            Err(why) => {
                self.broken.insert(id);
                return self.find(8, object, format!("{file}: {why}; restore the disk from a backup"));
            }
        };
        self.torn += u64::from(journal.torn);
        let (mut words, mut size, mut overlap) = (Words::default(), record.size, record.overlap);
        if journal.records.is_empty() {
            self.broken.insert(id);
            self.find(9, object.clone(), format!("{file}: it has no record; restore the disk from a backup"));
        }
        for (seq, next) in (1u64..).zip(&journal.records) {
            if next.overlap > overlap {
                self.broken.insert(id);
                let message = format!(
                    "{file}: record {seq} reads {} bytes through to the base, before it were {overlap}; restore \
                     the disk from a backup",
                    next.overlap
                );
                self.find(9, object.clone(), message);
            }
            for run in &next.runs {
                for (word, value) in (run.first..).zip(&run.words) {
                    words.set(word, *value);
                }
            }
            if next.size < size || !next.runs.is_empty() {
                words.clear_from(next.size.div_ceil(BLOCK));
            }
            (size, overlap) = (next.size, next.overlap);
        }
        let end = words.data_end();
        if end > size.div_ceil(BLOCK) {
            self.broken.insert(id);
            let message = format!("{file}: block {} has data, the disk ends at byte {size}", end - 1);
            self.find(9, object.clone(), message);
        }
        // A live map has later news of the disk, a shrink too.
        if end == 0 || self.live.contains(&id) {
            return;
        }
        self.data_files += 1;
        let file = format!("deltas/{id}.data");
        let needs = (end - 1) * BLOCK;
        let why = match self.open(&file).and_then(|f| f.metadata()) {
            Ok(meta) if meta.len() > needs => return,
            Ok(meta) => format!("it has {} bytes, its map says that there is data at {needs}", meta.len()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                format!("it is missing, its map says that there is data up to {needs}")
            }
            Err(e) => format!("it cannot be read: {e}"),
        };
        self.broken.insert(id);
        self.find(10, object, format!("{file}: {why}; restore the disk from a backup"));
    }
}
