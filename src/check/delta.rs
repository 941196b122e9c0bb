//! The map file and the data file of one disk.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::Check;
use crate::format::BLOCK;
use crate::format::journal::{Expected, Journal, ReadError};
use crate::format::layout::{data_path, map_path};
use crate::format::record::DiskRecord;

impl Check<'_> {
    /// Invariants 8 to 10, of the delta of a disk and of its layers. A layer that several disks need is checked once.
    pub(super) fn check_deltas(&mut self, id: u64, record: &DiskRecord, seen: &mut BTreeSet<u64>) {
        let of_disk = Expected {
            disk: record.lineage.delta,
            generation: record.map.generation,
            floor: record.map.floor,
            size: record.size,
            overlap: record.overlap,
            modified_ns: record.modified_ns,
        };
        self.check_delta(id, record, &of_disk);
        let made = record.lineage.rework.iter().map(|rework| &rework.layer);
        for layer in record.lineage.layers.iter().chain(made) {
            let of_layer = Expected {
                disk: layer.number,
                generation: layer.map.generation,
                floor: layer.map.floor,
                size: layer.size,
                overlap: layer.overlap,
                modified_ns: layer.modified_ns,
            };
            if seen.insert(layer.number) {
                self.check_delta(id, record, &of_layer);
            }
        }
    }

    fn is_broken(&mut self, disk: u64, delta: u64) {
        self.broken.insert(disk);
        self.broken_deltas.insert(delta);
    }

    fn check_delta(&mut self, id: u64, record: &DiskRecord, expected: &Expected) {
        if expected.generation == 0 {
            // The disk was never flushed, so no data in the data file was ever acknowledged.
            return;
        }
        let object = format!("disk {}", record.name);
        let number = expected.disk;
        if self.pools.trouble(number).is_some() {
            // The pool has its finding. What is in it stays.
            return self.is_broken(id, number);
        }
        let file = map_path(number, expected.generation);
        self.maps += 1;
        let read = || {
            let map = self.open(&file).map_err(ReadError::Source)?;
            let len = map.metadata().map_err(ReadError::Source)?.len();
            Journal::read(|buf, at| read_at(&map, buf, at), len, expected)
        };
        let journal = read().map_err(|error| match error {
            ReadError::Format(error) => error.to_string(),
            ReadError::Source(error) => format!("it cannot be read: {error}"),
        });
        let journal = match journal {
            Ok(journal) => journal,
            Err(why) => {
                self.is_broken(id, number);
                return self.find(8, object, format!("{file}: {why}; restore the disk from a backup"));
            }
        };
        self.torn += u64::from(journal.torn);
        if journal.records == 0 {
            self.is_broken(id, number);
            self.find(9, object.clone(), format!("{file}: it has no record; restore the disk from a backup"));
        }
        if let Some(raised) = journal.raised.filter(|_| !record.lineage.rises) {
            self.is_broken(id, number);
            let message = format!(
                "{file}: record {} raises the bytes that the disk reads from the base to {}, from {}; restore the disk \
                 from a backup",
                raised.seq, raised.overlap, raised.before
            );
            self.find(9, object.clone(), message);
        }
        let end = journal.data_end();
        // A live map has a newer state of the disk, perhaps after a shrink.
        if end == 0 || self.live_unknown || self.live.contains(&number) {
            return;
        }
        self.data_files += 1;
        let file = data_path(number);
        let needs = (end - 1) * BLOCK;
        let why = match self.open(&file).and_then(|f| f.metadata()) {
            Ok(meta) if meta.len() > needs => return,
            Ok(meta) => format!("it has {} bytes, but its map has data at {needs}", meta.len()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                format!("it is missing, but its map has data up to {needs}")
            }
            Err(e) => format!("it cannot be read: {e}"),
        };
        self.is_broken(id, number);
        self.find(10, object, format!("{file}: {why}; restore the disk from a backup"));
    }
}

/// Fills `buf` from `offset`; fewer bytes only at the end of the file.
fn read_at(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}
