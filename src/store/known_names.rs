//! The names that records had when they were last read, kept in a file, so that a record that cannot be read keeps its own
//! name from being given away and no other (D46).
//!
//! What must hold: an entry counts only for the very file that was read; inode and time of the last change tell, as in
//! [`super::preload`]. Without the list, or when the record changed after it was written, the name is unknown. So no change
//! of a name waits for the list, and a version that does not know it may change records.

use std::collections::HashMap;
use std::io;
use std::time::{Duration, Instant};

use super::Store;
use super::preload::MIN_AGE_NS;
use super::records::{ReadOutcome, RecordKind, read_disk, read_record};
use crate::format::layout::NAMES;
use crate::format::names::{LONGEST_NAME_LIST, NameEntry, decode, encode};
use crate::format::record::BaseRecord;
use crate::io::{Medium, Open, Stamp, read_whole, replace, sys};

/// How often records are looked at for changes.
const INTERVAL: Duration = Duration::from_secs(15);

/// The pause after a look at all records that took `took`.
fn pause_after(took: Duration) -> Duration {
    INTERVAL.max(took * 99)
}

/// What is known of a record that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KnownName {
    pub name: String,
    /// The disk's base.
    pub base: Option<u64>,
}

/// The list as it is in the file, and when it is compared with the records again.
#[derive(Debug)]
pub(super) struct NameList {
    /// In the order of [`key`]. A vector, because there is an entry for each of many disks.
    written: Option<Vec<NameEntry>>,
    next: Instant,
}

impl Default for NameList {
    fn default() -> Self {
        Self { written: None, next: Instant::now() + INTERVAL }
    }
}

/// The order of the list: disks, then bases, by number.
fn key(entry: &NameEntry) -> (bool, u64) {
    (entry.is_base, entry.number)
}

fn read(medium: &dyn Medium) -> Vec<NameEntry> {
    let bytes = medium.open(NAMES, Open::Existing).and_then(|file| read_whole(&*file, LONGEST_NAME_LIST));
    // A list that is missing or damaged says nothing.
    let mut entries = bytes.ok().and_then(|bytes| decode(&bytes).ok()).unwrap_or_default();
    entries.sort_by_key(key);
    entries.dedup_by_key(|entry| key(entry));
    entries
}

fn is_of(entry: &NameEntry, stamp: Stamp) -> bool {
    (entry.inode, entry.changed_ns, entry.len) == (stamp.inode, stamp.changed_ns, stamp.len)
}

/// What the list says of records that cannot be read.
pub(super) fn find(
    medium: &dyn Medium,
    unread: &[(RecordKind, u64)],
) -> HashMap<(RecordKind, u64), KnownName> {
    let list = if unread.is_empty() { Vec::new() } else { read(medium) };
    let known = |(kind, number): &(RecordKind, u64)| {
        let place = list.binary_search_by_key(&(*kind == RecordKind::Base, *number), key).ok()?;
        let entry = list.get(place)?;
        let stamp = medium.stamp(&kind.path(*number)).ok().flatten()?;
        let base = (entry.base != 0).then_some(entry.base);
        is_of(entry, stamp).then(|| ((*kind, *number), KnownName { name: entry.name.clone(), base }))
    };
    unread.iter().filter_map(known).collect()
}

/// What a record says now; `None` when it cannot be read.
fn read_entry(medium: &dyn Medium, kind: RecordKind, number: u64, stamp: Stamp) -> Option<NameEntry> {
    let (name, base) = match kind {
        RecordKind::Base => match read_record(medium, kind, number, BaseRecord::decode, |r| r.id) {
            ReadOutcome::Good(record) => (record.name, 0),
            _ => return None,
        },
        RecordKind::Disk => match read_disk(medium, number) {
            ReadOutcome::Good(record) => (record.name, record.backing.map_or(0, |backing| backing.base)),
            _ => return None,
        },
    };
    let Stamp { inode, changed_ns, len } = stamp;
    Some(NameEntry { is_base: kind == RecordKind::Base, number, inode, changed_ns, len, name, base })
}

/// The entries of all records whose last change is before `end`, and whether they differ from `before`. Reads the records
/// that changed since `before`.
fn collect(medium: &dyn Medium, before: Vec<NameEntry>, end: i64) -> io::Result<(Vec<NameEntry>, bool)> {
    let mut entries = Vec::with_capacity(before.len());
    let mut before = before.into_iter().peekable();
    let mut is_changed = false;
    for kind in [RecordKind::Disk, RecordKind::Base] {
        let mut numbers = kind.numbers(medium)?;
        numbers.sort_unstable();
        for number in numbers {
            let now = (kind == RecordKind::Base, number);
            while before.next_if(|entry| key(entry) < now).is_some() {
                is_changed = true;
            }
            let known = before.next_if(|entry| key(entry) == now);
            let was_known = known.is_some();
            let Ok(Some(stamp)) = medium.stamp(&kind.path(number)) else {
                is_changed |= was_known;
                continue;
            };
            if let Some(entry) = known.filter(|entry| is_of(entry, stamp)) {
                entries.push(entry);
                continue;
            }
            let entry = if stamp.changed_ns < end { read_entry(medium, kind, number, stamp) } else { None };
            is_changed |= was_known || entry.is_some();
            entries.extend(entry);
        }
    }
    is_changed |= before.next().is_some();
    Ok((entries, is_changed))
}

impl Store {
    /// Keeps the list of names up to date: about every 15 s, and so that it takes a hundredth of the time, however many
    /// records there are. To be called about once a second.
    pub fn note_names(&self) {
        if self.name_list.lock().next <= Instant::now() {
            self.write_names(sys::now_ns() - MIN_AGE_NS);
        }
    }

    /// Writes the list of names when a record changed, before `end`.
    pub(super) fn write_names(&self, end: i64) {
        let mut list = self.name_list.lock();
        let begun = Instant::now();
        let medium = &*self.medium;
        let before = list.written.take().unwrap_or_else(|| read(medium));
        let write = || -> io::Result<Vec<NameEntry>> {
            let (entries, is_changed) = collect(medium, before, end)?;
            if is_changed {
                replace(medium, ".", NAMES, &encode(&entries))?;
            }
            Ok(entries)
        };
        match write() {
            Ok(entries) => list.written = Some(entries),
            // It says what is right of the records that it has.
            Err(error) => {
                tracing::debug!(%error, "the list of names is not written; it is tried again");
            }
        }
        list.next = Instant::now() + pause_after(begun.elapsed());
    }
}
