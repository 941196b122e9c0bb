//! Builds records of bounded size: the memory of a flush does not grow with the disk.

use std::io;
use std::sync::Arc;

use crate::format::journal::{MapHeader, Record, Run};
use crate::format::layout::map_path;
use crate::io::{Medium, MediumFile, Open};
use crate::mutant::limit;

/// Bytes of memory that the runs of a record take at most. Encoding takes twice that for a moment.
const LARGEST: u64 = 2 << 20;
/// Bytes of memory of a run besides its words, with the overhead of the allocator.
const RUN: u64 = 72;

/// The words of one record.
#[derive(Debug, Default)]
pub(super) struct RecordBuilder {
    runs: Vec<Run>,
    memory: u64,
}

impl RecordBuilder {
    /// Words whose values a flush holds at a time.
    pub(super) const WORDS: usize = 64 << 10;

    /// Adds a word. Its index is above those of all words added before.
    pub(super) fn add(&mut self, word: u64, value: u64) {
        self.memory += 8;
        match self.runs.last_mut() {
            Some(run) if run.first + run.words.len() as u64 == word => run.words.push(value),
            _ => {
                self.memory += RUN;
                self.runs.push(Run { first: word, words: vec![value] });
            }
        }
    }

    pub(super) fn is_full(&self) -> bool {
        self.memory >= limit(LARGEST, 80)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub(super) fn into_runs(self) -> Vec<Run> {
        self.runs
    }
}

/// A map file that is being written, and that no record names yet. Dropping it removes the file, unless it was kept.
pub(super) struct NewMapFile {
    medium: Arc<dyn Medium>,
    pub(super) header: MapHeader,
    file: Option<Arc<dyn MediumFile>>,
    kept: bool,
    /// Bytes of the file.
    pub(super) len: u64,
    pub(super) next_seq: u64,
    /// Modification time in the last record.
    pub(super) modified_ns: i64,
}

impl NewMapFile {
    pub(super) fn start(medium: Arc<dyn Medium>, header: MapHeader) -> io::Result<Self> {
        let file = medium.open(&map_path(header.disk, header.generation), Open::Create);
        let mut new = Self { medium, header, file: None, kept: false, len: 0, next_seq: 1, modified_ns: 0 };
        let file = new.file.insert(file?);
        file.set_len(0)?;
        let head = header.encode();
        file.write_at(&head, 0)?;
        new.len = head.len() as u64;
        Ok(new)
    }

    /// Appends a record without a sync: the file counts as a whole or not at all.
    pub(super) fn append(&mut self, record: &Record) -> io::Result<()> {
        let bytes = record.encode(self.header.nonce, self.next_seq);
        let file = self.file.as_ref().ok_or(io::ErrorKind::NotFound)?;
        file.write_at(&bytes, self.len)?;
        self.len += bytes.len() as u64;
        self.next_seq += 1;
        self.modified_ns = record.modified_ns;
        Ok(())
    }

    /// Keeps the file, and returns it: from here on a disk's record may name it.
    pub(super) fn keep(&mut self) -> io::Result<Arc<dyn MediumFile>> {
        self.kept = true;
        self.file.take().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Drop for NewMapFile {
    fn drop(&mut self) {
        if !self.kept {
            // The file may take the space whose lack made it fail.
            let _ = self.medium.remove(&map_path(self.header.disk, self.header.generation));
        }
    }
}
