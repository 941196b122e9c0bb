//! When each base was needed last: by a disk, a snapshot, a disk in the trash, or a client that has its file open. And the
//! times that clients gave the files of bases: a client that sets one, as Nova does, uses the base in a way that plyfs does
//! not see.
//!
//! What must hold (D83): a base that was needed until now does not seem unused for longer than [`INTERVAL`], the time
//! between two writes of the list, whatever was lost. A base that the list does not have counts as needed when the store
//! was opened, unless it is younger than that time. A time that a client has set is in the list when the client is
//! answered, unless the store is full.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{BaseNode, Store};
use crate::format::layout::USED;
use crate::format::used::{LONGEST_LIST, TimesOfBase, UseList, UsedBase, decode, encode};
use crate::io::{Medium, Open, read_whole, replace, sys};

/// How often the list is written at most.
const INTERVAL: Duration = Duration::from_secs(600);

/// See the module.
#[derive(Debug)]
pub(super) struct Usage {
    opened_ns: i64,
    table: Mutex<Table>,
    /// Held while the list is written, so that the last list is the newest.
    writing: Mutex<()>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
struct Uses {
    used: HashMap<u64, i64>,
    /// Modification and change time that clients gave the files of bases.
    times: HashMap<u64, (i64, i64)>,
}

#[derive(Debug)]
struct Table {
    now: Uses,
    /// What the file has.
    written: Uses,
    /// `None` until the first note: a store that is only looked at writes no list.
    next: Option<Instant>,
}

impl Usage {
    pub fn read(medium: &dyn Medium) -> Self {
        let bytes = medium.open(USED, Open::Existing).and_then(|file| read_whole(&*file, LONGEST_LIST));
        // A list that is missing or damaged says nothing.
        let list = bytes.ok().and_then(|bytes| decode(&bytes).ok()).unwrap_or_default();
        let opened_ns = sys::now_ns();
        // A clock that was set back must not make a base young for ever.
        let used = list.used.iter().map(|UsedBase { base, used_ns }| (*base, (*used_ns).min(opened_ns)));
        let times = list.times.iter().map(|times| (times.base, (times.modified_ns, times.changed_ns)));
        let now = Uses { used: used.collect(), times: times.collect() };
        let table = Mutex::new(Table { written: now.clone(), now, next: None });
        Self { opened_ns, table, writing: Mutex::new(()) }
    }
}

impl Uses {
    fn list(&self) -> UseList {
        let used = self.used.iter().map(|(base, used_ns)| UsedBase { base: *base, used_ns: *used_ns });
        let of = |(base, (modified_ns, changed_ns)): (&u64, &(i64, i64))| TimesOfBase {
            base: *base,
            modified_ns: *modified_ns,
            changed_ns: *changed_ns,
        };
        let mut list = UseList { used: used.collect(), times: self.times.iter().map(of).collect() };
        list.used.sort_unstable_by_key(|entry| entry.base);
        list.times.sort_unstable_by_key(|entry| entry.base);
        list
    }
}

impl Store {
    /// When a base was needed last, nanoseconds since the epoch.
    pub fn last_used(&self, base: &BaseNode) -> i64 {
        let (created, opened) = (base.record().created_ns, self.usage.opened_ns);
        let noted = self.usage.table.lock().now.used.get(&base.id()).copied();
        // A base that was registered since the list was written is not in it.
        let is_new = opened.saturating_sub(created) < INTERVAL.as_nanos() as i64;
        noted.unwrap_or(if is_new { created } else { opened }).max(created)
    }

    /// Modification and change time of a base's own file: those that a client set last, else those of its image and of
    /// its registration. Nanoseconds since the epoch.
    pub fn times_of_base(&self, base: &BaseNode) -> (i64, i64) {
        let set = self.usage.table.lock().now.times.get(&base.id()).copied();
        set.unwrap_or_else(|| (base.record().modified_ns(), base.record().created_ns))
    }

    /// Sets the modification time of a base's own file, nanoseconds since the epoch. That counts as a use of the base at
    /// this time, but not in the future. May wait for the store's disk. When the list cannot be written, the time holds
    /// until the daemon's next worker.
    pub fn set_time_of_base(&self, base: &BaseNode, modified_ns: i64) {
        let now = sys::now_ns();
        let used = self.last_used(base).max(modified_ns.min(now));
        {
            let mut table = self.usage.table.lock();
            table.now.used.insert(base.id(), used);
            table.now.times.insert(base.id(), (modified_ns, now));
            table.next.get_or_insert_with(|| Instant::now() + INTERVAL);
        }
        self.write_uses();
    }

    /// Notes which bases are needed now, and writes the list from time to time. `is_open`: whether a client may have the
    /// base's own file open. To be called about once a minute.
    pub fn note_uses(&self, is_open: &dyn Fn(&BaseNode) -> bool) {
        let (now, users) = (sys::now_ns(), self.user_counts());
        let bases = self.bases();
        let used: Vec<u64> = bases
            .iter()
            .filter(|base| users.contains_key(&base.id()) || is_open(base))
            .map(|base| base.id())
            .collect();
        let others: Vec<(u64, i64)> = bases.iter().map(|base| (base.id(), self.last_used(base))).collect();
        let is_due = {
            let mut table = self.usage.table.lock();
            // A client may have set a time meanwhile.
            let newest =
                |(base, at): (u64, i64)| (base, table.now.used.get(&base).map_or(at, |now| at.max(*now)));
            let others: HashMap<u64, i64> = others.into_iter().map(newest).collect();
            table.now.times.retain(|base, _| others.contains_key(base));
            table.now.used = others;
            table.now.used.extend(used.into_iter().map(|base| (base, now)));
            let next = table.next.get_or_insert_with(|| Instant::now() + INTERVAL);
            *next <= Instant::now()
        };
        if is_due {
            self.write_uses();
        }
    }

    /// Writes the list when it changed, if uses were ever noted.
    pub(super) fn write_uses(&self) {
        let _writing = self.usage.writing.lock();
        let (uses, is_same) = {
            let mut table = self.usage.table.lock();
            if table.next.is_none() {
                return;
            }
            table.next = Some(Instant::now() + INTERVAL);
            (table.now.clone(), table.now == table.written)
        };
        if is_same {
            return;
        }
        match replace(&*self.medium, ".", USED, &encode(&uses.list())) {
            Ok(()) => self.usage.table.lock().written = uses,
            Err(error) => {
                tracing::debug!(%error, "the list of uses is not written; it is tried again");
            }
        }
    }
}
