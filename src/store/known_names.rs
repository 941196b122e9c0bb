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
    written: Option<HashMap<(bool, u64), NameEntry>>,
    next: Instant,
}

impl Default for NameList {
    fn default() -> Self {
        Self { written: None, next: Instant::now() + INTERVAL }
    }
}

fn read(medium: &dyn Medium) -> HashMap<(bool, u64), NameEntry> {
    let bytes = medium.open(NAMES, Open::Existing).and_then(|file| read_whole(&*file, LONGEST_NAME_LIST));
    // A list that is missing or damaged says nothing.
    let entries = bytes.ok().and_then(|bytes| decode(&bytes).ok()).unwrap_or_default();
    entries.into_iter().map(|entry| ((entry.is_base, entry.number), entry)).collect()
}

fn is_of(entry: &NameEntry, stamp: Stamp) -> bool {
    (entry.inode, entry.changed_ns, entry.len) == (stamp.inode, stamp.changed_ns, stamp.len)
}

/// What the list says of records that cannot be read.
pub(super) fn find(
    medium: &dyn Medium,
    unread: &[(RecordKind, u64)],
) -> HashMap<(RecordKind, u64), KnownName> {
    let list = if unread.is_empty() { HashMap::new() } else { read(medium) };
    let known = |(kind, number): &(RecordKind, u64)| {
        let entry = list.get(&(*kind == RecordKind::Base, *number))?;
        let stamp = medium.stamp(&kind.path(*number)).ok().flatten()?;
        let base = (entry.base != 0).then_some(entry.base);
        is_of(entry, stamp).then(|| ((*kind, *number), KnownName { name: entry.name.clone(), base }))
    };
    unread.iter().filter_map(known).collect()
}

/// The entries of all records whose last change is before `end`. Reads those that changed since `before`.
fn collect(
    medium: &dyn Medium,
    before: &HashMap<(bool, u64), NameEntry>,
    end: i64,
) -> io::Result<HashMap<(bool, u64), NameEntry>> {
    let mut entries = HashMap::new();
    for kind in [RecordKind::Base, RecordKind::Disk] {
        for number in kind.numbers(medium)? {
            let key = (kind == RecordKind::Base, number);
            let Ok(Some(stamp)) = medium.stamp(&kind.path(number)) else { continue };
            if let Some(entry) = before.get(&key).filter(|entry| is_of(entry, stamp)) {
                entries.insert(key, entry.clone());
                continue;
            }
            if stamp.changed_ns >= end {
                continue;
            }
            let read = match kind {
                RecordKind::Base => match read_record(medium, kind, number, BaseRecord::decode, |r| r.id) {
                    ReadOutcome::Good(record) => Some((record.name, 0)),
                    _ => None,
                },
                RecordKind::Disk => match read_disk(medium, number) {
                    ReadOutcome::Good(record) => {
                        Some((record.name, record.backing.map_or(0, |backing| backing.base)))
                    }
                    _ => None,
                },
            };
            if let Some((name, base)) = read {
                let Stamp { inode, changed_ns, len } = stamp;
                entries.insert(key, NameEntry { is_base: key.0, number, inode, changed_ns, len, name, base });
            }
        }
    }
    Ok(entries)
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
        let write = || -> io::Result<Option<HashMap<(bool, u64), NameEntry>>> {
            let entries = collect(medium, &before, end)?;
            if entries == before {
                return Ok(None);
            }
            let mut sorted: Vec<NameEntry> = entries.values().cloned().collect();
            sorted.sort_unstable_by_key(|entry| (entry.is_base, entry.number));
            replace(medium, ".", NAMES, &encode(&sorted))?;
            Ok(Some(entries))
        };
        match write() {
            Ok(None) => list.written = Some(before),
            Ok(Some(entries)) => list.written = Some(entries),
            // It says what is right of the records that it has.
            Err(error) => {
                tracing::debug!(%error, "the list of names is not written; it is tried again");
            }
        }
        list.next = Instant::now() + pause_after(begun.elapsed());
    }
}
