//! Reads the records of a store from its medium.
//!
//! What must hold: a record is damaged when its bytes are wrong. A record whose bytes cannot be read is *unread*: it
//! may be sound, and is tried again (D46).

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use crate::format::layout::{
    BASE_SUFFIX, BASES, DIRS, DISK_SUFFIX, DISKS, LOCK, NAMES, STAGED_SUFFIX, SUPERBLOCK, USED, base_path,
    disk_path, number,
};
use crate::format::record::{BaseIdentity, DiskRecord, Superblock};
use crate::format::{FormatError, Kind};
use crate::io::{Medium, Open, Stamp, read_whole, replace, sys};

use super::StoreError;
use super::preload::KnownRecords;

pub(super) const RECORD_LIMIT: u64 = 64 << 10;
/// Bytes that new layers and snapshots leave free in a record, for what later changes add to it: a longer name, the notes
/// of requests, numbers of dropped deltas. So a full record can always be renamed, rolled back and removed.
pub(super) const RECORD_ROOM: u64 = 512;

/// The kind of a record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum RecordKind {
    /// `bases/N.base`.
    Base,
    /// `disks/N.disk`.
    Disk,
}

impl RecordKind {
    pub fn dir(self) -> &'static str {
        match self {
            Self::Base => BASES,
            Self::Disk => DISKS,
        }
    }

    fn suffix(self) -> &'static str {
        match self {
            Self::Base => BASE_SUFFIX,
            Self::Disk => DISK_SUFFIX,
        }
    }

    /// Numbers of the records of this kind.
    pub fn numbers(self, medium: &dyn Medium) -> io::Result<Vec<u64>> {
        let names = medium.list(self.dir())?;
        Ok(names.iter().filter_map(|name| number(name.strip_suffix(self.suffix())?)).collect())
    }

    /// Whether a file is a record that was not finished.
    fn is_unfinished(self, name: &str) -> bool {
        name.strip_suffix(STAGED_SUFFIX).is_some_and(|record| record.ends_with(self.suffix()))
    }

    /// Paths of the records of this kind that were not finished.
    pub fn unfinished(self, medium: &dyn Medium) -> Vec<String> {
        let names = medium.list(self.dir()).unwrap_or_default().into_iter();
        names.filter(|name| self.is_unfinished(name)).map(|name| format!("{}/{name}", self.dir())).collect()
    }

    /// The file's name in the store.
    pub fn path(self, number: u64) -> String {
        match self {
            Self::Base => base_path(number),
            Self::Disk => disk_path(number),
        }
    }
}

/// The result of reading a record.
#[derive(Debug)]
pub(super) enum ReadOutcome<T> {
    Good(T),
    /// Its bytes are not those of such a record.
    Damaged(FormatError),
    /// Its bytes could not be read.
    Unread(io::Error),
    /// There is no such file.
    Gone,
}

/// Whether an error of open(2) or read(2) tells what the file is, rather than that it could not be read.
fn means_damage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EISDIR | libc::ELOOP | libc::ENXIO))
        || error.kind() == io::ErrorKind::InvalidData
}

/// Reads the record of `number`.
pub(super) fn read_record<T>(
    medium: &dyn Medium,
    kind: RecordKind,
    number: u64,
    decode: impl Fn(&[u8]) -> Result<T, FormatError>,
    id: impl Fn(&T) -> u64,
) -> ReadOutcome<T> {
    let damaged = |kind, detail| ReadOutcome::Damaged(FormatError { kind, structure: "record", detail });
    let file = medium.open(&kind.path(number), Open::Existing);
    match file.and_then(|file| read_whole(&*file, RECORD_LIMIT)) {
        Ok(bytes) => match decode(&bytes) {
            Ok(record) if id(&record) == number => ReadOutcome::Good(record),
            Ok(record) => damaged(Kind::Value, format!("it is the record of number {}", id(&record))),
            Err(error) => ReadOutcome::Damaged(error),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => ReadOutcome::Gone,
        Err(error) if means_damage(&error) => damaged(Kind::Truncated, error.to_string()),
        Err(error) => ReadOutcome::Unread(error),
    }
}

/// Has the records of all disks on one base share the base's identity: a store may list 100,000 disks.
#[derive(Debug, Default)]
pub(super) struct Identities(RefCell<HashMap<u64, Arc<BaseIdentity>>>);

impl Identities {
    /// As [`DiskRecord::decode`].
    pub fn decode(&self, bytes: &[u8]) -> Result<DiskRecord, FormatError> {
        let mut record = DiskRecord::decode(bytes)?;
        if let Some(backing) = &mut record.backing {
            let mut known = self.0.borrow_mut();
            let known = known.entry(backing.base).or_insert_with(|| backing.identity.clone());
            if *known == backing.identity {
                backing.identity = known.clone();
            }
        }
        Ok(record)
    }
}

/// All records of one kind.
#[derive(Debug)]
pub(super) struct Records<T> {
    /// Paths of unfinished records.
    pub unfinished: Vec<String>,
    pub good: Vec<T>,
    pub damaged: Vec<(String, FormatError)>,
    pub unread: Vec<(u64, io::Error)>,
}

/// The result of reading the records of one kind.
#[derive(Debug)]
pub(super) struct ReadRecords<T> {
    /// Paths of unfinished records.
    pub unfinished: Vec<String>,
    /// Sound records, each with the stamp that its file had before it was read.
    pub stamped: Vec<(u64, Box<(Stamp, T)>)>,
    /// Sound records, on a medium without stamps.
    pub plain: Vec<T>,
    pub damaged: Vec<(String, FormatError)>,
    pub unread: Vec<(u64, io::Error)>,
}

/// Reads all records of one kind, except those in `known` whose files did not change.
pub(super) fn read_all<T>(
    medium: &dyn Medium,
    kind: RecordKind,
    known: KnownRecords<T>,
    decode: impl Fn(&[u8]) -> Result<T, FormatError>,
    id: impl Fn(&T) -> u64,
) -> io::Result<Records<T>> {
    let ReadRecords { unfinished, stamped, mut plain, damaged, unread } =
        read_records(medium, kind, known, decode, id)?;
    plain.extend(stamped.into_iter().map(|(_, read)| read.1));
    Ok(Records { unfinished, good: plain, damaged, unread })
}

/// As [`read_all`], with the stamps of the files.
pub(super) fn read_records<T>(
    medium: &dyn Medium,
    kind: RecordKind,
    mut known: KnownRecords<T>,
    decode: impl Fn(&[u8]) -> Result<T, FormatError>,
    id: impl Fn(&T) -> u64,
) -> io::Result<ReadRecords<T>> {
    let (unfinished, stamped, plain) = (Vec::new(), Vec::new(), Vec::new());
    let mut out = ReadRecords { unfinished, stamped, plain, damaged: Vec::new(), unread: Vec::new() };
    for (name, stamp) in medium.list_stamped(kind.dir())? {
        if kind.is_unfinished(&name) {
            out.unfinished.push(format!("{}/{name}", kind.dir()));
        }
        let Some(text) = name.strip_suffix(kind.suffix()) else { continue };
        let Ok(number) = text.parse::<u64>() else { continue };
        if text != number.to_string() {
            let detail = "its name is not that of a number".to_owned();
            let error = FormatError { kind: Kind::Value, structure: "record", detail };
            out.damaged.push((format!("{}/{name}", kind.dir()), error));
            continue;
        }
        if let (Some(stamp), Some(read)) = (stamp, known.remove(&number))
            && stamp == read.0
        {
            out.stamped.push((number, read));
            continue;
        }
        match read_record(medium, kind, number, &decode, &id) {
            ReadOutcome::Good(record) => match stamp {
                Some(stamp) => out.stamped.push((number, Box::new((stamp, record)))),
                None => out.plain.push(record),
            },
            ReadOutcome::Damaged(error) => out.damaged.push((kind.path(number), error)),
            ReadOutcome::Unread(error) => out.unread.push((number, error)),
            ReadOutcome::Gone => {}
        }
    }
    Ok(out)
}

/// Removes the unfinished records that killed workers and failing storage left, which are at `paths`, and the unfinished
/// files of the store itself. Otherwise each leaves one, and `plyfs check` calls the store unclean. The file beside a record in
/// `kept`, which is damaged or unread, stays: it may be the last copy. A file that cannot be removed does no harm.
pub(super) fn remove_unfinished(medium: &dyn Medium, mut paths: Vec<String>, kept: &[String]) {
    let of_the_store = [SUPERBLOCK, NAMES, USED, LOCK].map(|name| format!("{name}{STAGED_SUFFIX}"));
    let names = medium.list(".").unwrap_or_default().into_iter();
    paths.extend(names.filter(|name| of_the_store.contains(name)).map(|name| format!("./{name}")));
    for path in paths {
        if path.strip_suffix(STAGED_SUFFIX).is_some_and(|record| kept.iter().any(|kept| kept == record)) {
            continue;
        }
        if let Err(error) = medium.remove(&path) {
            tracing::warn!(%error, file = path, "an unfinished record cannot be removed; it does no harm, and the next start tries again");
        }
    }
}

/// Reads the record of a disk.
pub(super) fn read_disk(medium: &dyn Medium, number: u64) -> ReadOutcome<DiskRecord> {
    read_record(medium, RecordKind::Disk, number, DiskRecord::decode, |record| record.id)
}

/// Reads the superblock. In an empty directory, creates the store.
///
/// # Errors
/// When the directory contains other files, or a store of a newer version.
pub fn open_superblock(medium: &dyn Medium) -> Result<Superblock, StoreError> {
    let object = format!("store {}", medium.root().display());
    match medium.open(SUPERBLOCK, Open::Existing) {
        Ok(file) => {
            let bytes = read_whole(&*file, RECORD_LIMIT).map_err(StoreError::io(object, "reading it"))?;
            Superblock::decode(&bytes).map_err(|source| StoreError::Damaged {
                file: medium.root().join(SUPERBLOCK).display().to_string(),
                source,
            })
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let make = || {
                let mut uuid = [0; 16];
                getrandom::fill(&mut uuid).map_err(|e| io::Error::other(e.to_string()))?;
                let superblock = Superblock { uuid, created_ns: sys::now_ns(), next_id: 1 };
                for dir in DIRS {
                    medium.make_dir(dir)?;
                }
                // The superblock implies that the directories exist.
                medium.sync_dir(".")?;
                replace(medium, ".", SUPERBLOCK, &superblock.encode())?;
                Ok(superblock)
            };
            for dir in DIRS {
                if medium.list(dir).is_ok_and(|names| !names.is_empty()) {
                    return Err(StoreError::invalid(
                        object,
                        format!(
                            "has {dir}/ but no {SUPERBLOCK}; restore that file, or use an empty directory"
                        ),
                    ));
                }
            }
            make().map_err(StoreError::io(object, "creating it"))
        }
        Err(e) => Err(StoreError::io(object, "opening it")(e)),
    }
}
