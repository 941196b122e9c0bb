//! When each base was needed last: by a disk, a snapshot, a disk in the trash, or a client that has its file open.
//!
//! What must hold (D83): a base that was needed until now does not seem unused for longer than [`INTERVAL`], the time
//! between two writes of the list, whatever was lost. A base that the list does not have counts as needed when the store
//! was opened, unless it is younger than that time.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{BaseNode, Store};
use crate::format::layout::USED;
use crate::format::used::{LONGEST_LIST, UsedBase, decode, encode};
use crate::io::{Medium, Open, read_whole, replace, sys};

/// How often the list is written at most.
const INTERVAL: Duration = Duration::from_secs(600);

/// See the module.
#[derive(Debug)]
pub(super) struct Usage {
    opened_ns: i64,
    table: Mutex<Table>,
}

#[derive(Debug)]
struct Table {
    used: HashMap<u64, i64>,
    /// What the file has.
    written: HashMap<u64, i64>,
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
        let used: HashMap<_, _> =
            list.iter().map(|UsedBase { base, used_ns }| (*base, (*used_ns).min(opened_ns))).collect();
        Self { opened_ns, table: Mutex::new(Table { written: used.clone(), used, next: None }) }
    }
}

impl Store {
    /// When a base was needed last, nanoseconds since the epoch.
    pub fn last_used(&self, base: &BaseNode) -> i64 {
        let (created, opened) = (base.record().created_ns, self.usage.opened_ns);
        let noted = self.usage.table.lock().used.get(&base.id()).copied();
        // A base that was registered since the list was written is not in it.
        let is_new = opened.saturating_sub(created) < INTERVAL.as_nanos() as i64;
        noted.unwrap_or(if is_new { created } else { opened }).max(created)
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
            table.used = others.into_iter().collect();
            table.used.extend(used.into_iter().map(|base| (base, now)));
            let next = table.next.get_or_insert_with(|| Instant::now() + INTERVAL);
            *next <= Instant::now()
        };
        if is_due {
            self.write_uses();
        }
    }

    /// Writes the list when it changed, if uses were ever noted.
    pub(super) fn write_uses(&self) {
        let (used, is_same) = {
            let mut table = self.usage.table.lock();
            if table.next.is_none() {
                return;
            }
            table.next = Some(Instant::now() + INTERVAL);
            (table.used.clone(), table.used == table.written)
        };
        if is_same {
            return;
        }
        let mut list: Vec<UsedBase> =
            used.iter().map(|(base, used_ns)| UsedBase { base: *base, used_ns: *used_ns }).collect();
        list.sort_unstable_by_key(|entry| entry.base);
        match replace(&*self.medium, ".", USED, &encode(&list)) {
            Ok(()) => self.usage.table.lock().written = used,
            Err(error) => {
                tracing::debug!(%error, "the list of uses is not written; it is tried again");
            }
        }
    }
}
