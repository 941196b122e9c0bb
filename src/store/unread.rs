//! Records that are damaged or could not be read, and the names and bases that they may need.
//!
//! A damaged record may come back from a backup. Until it is back or removed, no disk or base takes its name: of two
//! disks with one name the later one has it, and the other one is purged. No base is removed that the disk may be on.
//!
//! A record that could not be read (no descriptors, no memory, an I/O error) may be sound. It is tried again, later
//! each time, and is served once it can be read. Until then no disk (or base) gets its name. When the list of names does
//! not have it ([`super::known_names`]), its name is unknown, and no disk (or base) gets any name.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use super::known_names::KnownName;
use super::records::{RECORD_LIMIT, ReadOutcome, RecordKind, read_disk, read_record};
use super::{BaseNode, DiskNode, InheritedLiveMap, Store, StoreError};
use crate::format::FormatError;
use crate::format::record::{BaseRecord, DiskRecord};
use crate::io::{Medium, Open, read_whole};

const FIRST_WAIT: Duration = Duration::from_millis(500);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// What a record that cannot be read does, or may do.
const HAS_NAME: (&str, &str) = ("has this name", "may have this name");

/// A record that could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnreadRecord {
    /// The file's path in the store.
    pub file: String,
    /// The error of the last attempt.
    pub error: String,
}

struct UnreadEntry {
    kind: RecordKind,
    number: u64,
    /// What is known of it; `None`: it may have any name, and any base.
    known: Option<KnownName>,
    error: String,
    next: Instant,
    wait: Duration,
}

/// Names of damaged records, and the position in the order of names that they have reached, as far as they can be read.
#[derive(Debug, Default)]
struct ReservedNames {
    disks: HashMap<String, String>,
    bases: HashMap<String, String>,
    disk_files: Vec<String>,
    /// Highest position in the order of names.
    last_seq: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct UnavailableRecords {
    damaged: RwLock<Vec<(String, FormatError)>>,
    reserved: RwLock<ReservedNames>,
    unread: Mutex<Vec<UnreadEntry>>,
}

impl UnavailableRecords {
    /// Adds a record whose bytes are not those of a record.
    pub fn add_damaged(&self, medium: &dyn Medium, file: &str, error: FormatError) {
        tracing::error!(file, %error, "a record is damaged; its disk or base is not served; restore the file, or see `plyfs check`");
        let mut reserved = self.reserved.write();
        let is_disk = file.starts_with("disks/");
        if is_disk {
            reserved.disk_files.push(file.to_owned());
        }
        let bytes = medium.open(file, Open::Existing).and_then(|f| read_whole(&*f, RECORD_LIMIT));
        // Number and name are at the same place in both kinds of record.
        if let Some(salvage) = bytes.ok().and_then(|bytes| DiskRecord::salvage(&bytes)) {
            if is_disk {
                reserved.last_seq = reserved.last_seq.max(salvage.name_seq.unwrap_or(0));
                reserved.disks.insert(salvage.name, file.to_owned());
            } else {
                reserved.bases.insert(salvage.name, file.to_owned());
            }
        }
        drop(reserved);
        self.damaged.write().push((file.to_owned(), error));
    }

    /// Adds a record whose bytes could not be read.
    pub fn add_unread(&self, kind: RecordKind, number: u64, error: &io::Error, known: Option<KnownName>) {
        let file = kind.path(number);
        let name = known.as_ref().map(|known| known.name.as_str());
        tracing::error!(file, name, %error, "a record cannot be read now; its disk or base is served as soon as a retry reads it");
        let (error, next) = (error.to_string(), Instant::now() + FIRST_WAIT);
        self.unread.lock().push(UnreadEntry { kind, number, known, error, next, wait: FIRST_WAIT });
    }

    pub fn damaged(&self) -> Vec<(String, FormatError)> {
        self.damaged.read().clone()
    }

    pub fn unread(&self) -> Vec<UnreadRecord> {
        let list = self.unread.lock();
        let record = |w: &UnreadEntry| UnreadRecord { file: w.kind.path(w.number), error: w.error.clone() };
        list.iter().map(record).collect()
    }

    /// Files of damaged and unread records. Files beside them may not be removed.
    pub fn files(&self) -> Vec<String> {
        let unread = self.unread.lock().iter().map(|w| w.kind.path(w.number)).collect::<Vec<_>>();
        self.damaged.read().iter().map(|(file, _)| file.clone()).chain(unread).collect()
    }

    /// Highest position in the order of names that a damaged record has.
    pub fn last_seq(&self) -> u64 {
        self.reserved.read().last_seq
    }

    /// Whether the record of a base is damaged or unread.
    pub fn has_unavailable_base(&self) -> bool {
        self.damaged.read().iter().any(|(file, _)| file.starts_with("bases/"))
            || self.unread.lock().iter().any(|w| w.kind == RecordKind::Base)
    }

    /// Whether the record of a disk is damaged or unread: it is unknown which layers the disk needs.
    pub fn has_unavailable_disk(&self) -> bool {
        !self.reserved.read().disk_files.is_empty()
            || self.unread.lock().iter().any(|w| w.kind == RecordKind::Disk)
    }

    /// Whether the record of a disk could not be read.
    pub fn has_unread_disk(&self, number: u64) -> bool {
        self.unread.lock().iter().any(|w| w.kind == RecordKind::Disk && w.number == number)
    }

    /// Refuses what a record that could not be read may need: one that `needs` it, or of which nothing is known.
    fn check_unread(
        &self,
        kind: RecordKind,
        object: String,
        needs: impl Fn(&KnownName) -> bool,
        (does, may): (&str, &str),
    ) -> Result<(), StoreError> {
        let list = self.unread.lock();
        let is_concerned = |w: &&UnreadEntry| w.kind == kind && w.known.as_ref().is_none_or(&needs);
        let Some(w) = list.iter().find(is_concerned) else { return Ok(()) };
        let (file, error) = (w.kind.path(w.number), &w.error);
        let what = if w.known.is_some() { does } else { may };
        Err(StoreError::Unread {
            object,
            why: format!(
                "the record {file} cannot be read now ({error}) and {what}; plyfs retries it: see `plyfs status`; if the \
                 record is lost for good, move that file out of the store"
            ),
        })
    }

    pub fn check_disk_name(&self, name: &str) -> Result<(), StoreError> {
        check_damaged("disk", name, self.reserved.read().disks.get(name))?;
        self.check_unread(RecordKind::Disk, format!("disk {name}"), |known| known.name == name, HAS_NAME)
    }

    pub fn check_base_name(&self, name: &str) -> Result<(), StoreError> {
        check_damaged("base", name, self.reserved.read().bases.get(name))?;
        self.check_unread(RecordKind::Base, format!("base {name}"), |known| known.name == name, HAS_NAME)
    }

    /// A disk whose record is damaged or unread may be on any base.
    pub fn check_base_removal(&self, name: &str, number: u64) -> Result<(), StoreError> {
        let object = format!("base {name}");
        let reserved = self.reserved.read();
        if !reserved.disk_files.is_empty() {
            let files = reserved.disk_files.iter().take(10).cloned().collect::<Vec<_>>().join(", ");
            let why = format!(
                "a disk whose record is damaged may need it; restore or remove {files} in the store, and start again"
            );
            return Err(StoreError::invalid(object, why));
        }
        let needs = |known: &KnownName| known.base == Some(number);
        self.check_unread(
            RecordKind::Disk,
            object,
            needs,
            ("its disk needs this base", "its disk may need this base"),
        )
    }

    /// Takes the records to try now: all that are due, or the one of `disk`.
    fn take_due(&self, disk: Option<u64>) -> Vec<(RecordKind, u64)> {
        let (now, mut list) = (Instant::now(), self.unread.lock());
        let is_due = |w: &UnreadEntry| match disk {
            Some(number) => w.kind == RecordKind::Disk && w.number == number,
            None => w.next <= now,
        };
        let due = list.iter_mut().filter(|w| is_due(w));
        due.map(|w| {
            w.wait = (w.wait * 2).min(LONGEST_WAIT);
            w.next = now + w.wait;
            (w.kind, w.number)
        })
        .collect()
    }

    fn note_failure(&self, kind: RecordKind, number: u64, error: &io::Error) {
        let mut list = self.unread.lock();
        if let Some(waiting) = list.iter_mut().find(|w| w.kind == kind && w.number == number) {
            waiting.error = error.to_string();
        }
    }

    fn remove_unread(&self, kind: RecordKind, number: u64) {
        self.unread.lock().retain(|w| w.kind != kind || w.number != number);
    }
}

fn check_damaged(noun: &str, name: &str, file: Option<&String>) -> Result<(), StoreError> {
    let Some(file) = file else { return Ok(()) };
    let why = format!(
        "the damaged record {file} may have this name; choose another name, or restore or remove that file in the \
         store and start again"
    );
    Err(StoreError::invalid(format!("{noun} {name}"), why))
}

impl Store {
    /// The damaged records: path of the file and error.
    pub fn damaged(&self) -> Vec<(String, FormatError)> {
        self.unavailable.damaged()
    }

    /// The records that could not be read and are tried again.
    pub fn unread(&self) -> Vec<UnreadRecord> {
        self.unavailable.unread()
    }

    /// Whether the records of all bases can be read.
    pub fn knows_all_bases(&self) -> bool {
        !self.unavailable.has_unavailable_base()
    }

    /// Tries the unread records that are due. To be called about once a second.
    pub fn retry_unread(&self) {
        self.retry(self.unavailable.take_due(None));
    }

    /// The disk of a number whose record could not be read, if it can be read now.
    pub(super) fn retry_disk(&self, number: u64) -> Option<Arc<DiskNode>> {
        if !self.unavailable.has_unread_disk(number) {
            return None;
        }
        self.retry(self.unavailable.take_due(Some(number)));
        self.names.read().disks.get(&number).cloned()
    }

    fn retry(&self, due: Vec<(RecordKind, u64)>) {
        for (kind, number) in due {
            let done = match kind {
                RecordKind::Disk => match read_disk(&*self.medium, number) {
                    ReadOutcome::Good(record) => self.admit_disk(record),
                    other => self.handle_failure(kind, number, other),
                },
                RecordKind::Base => {
                    match read_record(&*self.medium, kind, number, BaseRecord::decode, |record| record.id) {
                        ReadOutcome::Good(record) => {
                            self.admit_base(record);
                            Ok(())
                        }
                        other => self.handle_failure(kind, number, other),
                    }
                }
            };
            match done {
                Ok(()) => self.unavailable.remove_unread(kind, number),
                Err(error) => self.unavailable.note_failure(kind, number, &error),
            }
        }
    }

    fn handle_failure<T>(&self, kind: RecordKind, number: u64, outcome: ReadOutcome<T>) -> io::Result<()> {
        let file = kind.path(number);
        match outcome {
            ReadOutcome::Good(_) => {}
            ReadOutcome::Damaged(error) => self.unavailable.add_damaged(&*self.medium, &file, error),
            ReadOutcome::Unread(error) => return Err(error),
            ReadOutcome::Gone => {
                tracing::warn!(file, "a record that could not be read is gone; plyfs does not retry it")
            }
        }
        Ok(())
    }

    /// Serves a disk whose record can be read at last. Until now no disk got its name, so another disk has its name only if
    /// a rename was interrupted between its two records.
    fn admit_disk(&self, record: DiskRecord) -> io::Result<()> {
        tracing::info!(disk = record.name, number = record.id, "the record can be read again");
        let _claim = self.claims.disks(vec![record.name.clone()], Vec::new());
        self.next_seq.fetch_max(record.name_seq + 1, std::sync::atomic::Ordering::Relaxed);
        let (id, name, seq) = (record.id, record.name.clone(), record.name_seq);
        // An earlier worker may have left a live map.
        self.pools.learn(&record);
        self.pools.give_up_live_maps(&*self.live, record.lineage.deltas());
        let node = self.disk_node(record, InheritedLiveMap::Yes);
        let all = self.all_disks();
        let rivals: Vec<_> = all.into_iter().filter(|disk| disk.name() == name).collect();
        let is_later = |disk: &Arc<DiskNode>| disk.name_seq() > seq;
        let (later, earlier): (Vec<_>, Vec<_>) = rivals.into_iter().partition(is_later);
        let unlink = |disk: &DiskNode| match disk.is_unlinked() {
            true => Ok(()),
            false => disk.update(|record| record.unlinked = true).map_err(io::Error::other),
        };
        if !later.is_empty() {
            unlink(&node)?;
        }
        node.note_in_index();
        let mut names = self.names.write();
        names.disks.insert(id, node.clone());
        if !node.is_unlinked() {
            names.disk_names.insert(name, id);
        }
        drop(names);
        earlier.iter().try_for_each(|disk| unlink(disk))
    }

    fn admit_base(&self, record: BaseRecord) {
        tracing::info!(base = record.name, number = record.id, "the record can be read again");
        let _claim = self.claims.base_name(&record.name);
        let node = Arc::new(self.base_node(record));
        node.set_inherited(true);
        let mut names = self.names.write();
        names.base_names.insert(node.record().name.clone(), node.id());
        names.bases.insert(node.id(), node.clone());
        drop(names);
        // A disk that is made from here on finds the base by its number.
        self.all_disks().iter().for_each(|disk| disk.found_base(&node));
    }

    pub(super) fn base_node(&self, record: BaseRecord) -> BaseNode {
        let (cache, sources) = (self.cache.clone(), self.sources.clone());
        BaseNode::new(record, self.medium.clone(), cache, sources, self.base_stats.clone())
    }
}
