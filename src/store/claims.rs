//! Claims of names and bases by running changes of the catalogue.
//!
//! What must hold: a change claims all that it set at once, and holds nothing while it waits for that, so claims
//! cannot deadlock. A change that has its claims waits for local storage only, never for the file of a base or a
//! network. Changes of different names never wait for each other (D45).

use std::collections::{HashMap, HashSet};

use parking_lot::{Condvar, Mutex};

#[derive(Debug, Default)]
struct ClaimTable {
    disks: HashSet<String>,
    bases: HashSet<String>,
    /// Number of running changes that need a base, or a disk of which they make clones, to stay, by its number.
    users: HashMap<u64, usize>,
    /// Bases and disks that are being removed, and disks whose layers are being changed.
    removing: HashSet<u64>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Claims {
    table: Mutex<ClaimTable>,
    freed: Condvar,
}

/// What one change claims.
#[derive(Debug, Default)]
struct ClaimSet {
    disks: Vec<String>,
    base_name: Option<String>,
    /// Bases and disks that must stay.
    users: Vec<u64>,
    /// A base or disk that is removed, or whose layers change.
    removing: Option<u64>,
}

impl ClaimSet {
    fn is_free(&self, table: &ClaimTable) -> bool {
        self.disks.iter().all(|name| !table.disks.contains(name))
            && self.base_name.iter().all(|name| !table.bases.contains(name))
            && self.users.iter().all(|base| !table.removing.contains(base))
            && self
                .removing
                .iter()
                .all(|base| !table.users.contains_key(base) && !table.removing.contains(base))
    }
}

/// The claims of a change, table until dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    set: ClaimSet,
}

impl Claims {
    fn claim(&self, set: ClaimSet) -> Claim<'_> {
        let mut table = self.table.lock();
        while !set.is_free(&table) {
            self.freed.wait(&mut table);
        }
        table.disks.extend(set.disks.iter().cloned());
        table.bases.extend(set.base_name.iter().cloned());
        for base in &set.users {
            *table.users.entry(*base).or_default() += 1;
        }
        table.removing.extend(set.removing);
        drop(table);
        Claim { claims: self, set }
    }

    /// Claims names of disks, and bases that must stay meanwhile. Neither list has duplicates.
    pub fn disks(&self, disks: Vec<String>, users: Vec<u64>) -> Claim<'_> {
        self.claim(ClaimSet { disks, users, ..ClaimSet::default() })
    }

    /// Claims the removal of a disk that has no name any more: its base stays, and no clone of the disk is being made.
    pub fn purge(&self, disk: u64, base: Option<u64>) -> Claim<'_> {
        let users = base.into_iter().collect();
        self.claim(ClaimSet { users, removing: Some(disk), ..ClaimSet::default() })
    }

    /// Claims the layers and snapshots of a disk: no clone of it is being made.
    pub fn lineage(&self, name: &str, disk: u64) -> Claim<'_> {
        let disks = vec![name.to_owned()];
        self.claim(ClaimSet { disks, removing: Some(disk), ..ClaimSet::default() })
    }

    /// Claims the layers of a disk that comes to stand on what `users` have: these stay.
    pub fn adoption(&self, name: &str, disk: u64, users: Vec<u64>) -> Claim<'_> {
        self.claim(ClaimSet {
            disks: vec![name.to_owned()],
            users,
            removing: Some(disk),
            ..ClaimSet::default()
        })
    }

    /// Claims the name of a new base.
    pub fn base_name(&self, name: &str) -> Claim<'_> {
        self.claim(ClaimSet { base_name: Some(name.to_owned()), ..ClaimSet::default() })
    }

    /// Claims the removal of a base: no running change set it, and no new change gets it.
    pub fn removal(&self, name: &str, base: u64) -> Claim<'_> {
        self.claim(ClaimSet { base_name: Some(name.to_owned()), removing: Some(base), ..ClaimSet::default() })
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut table = self.claims.table.lock();
        for name in &self.set.disks {
            table.disks.remove(name);
        }
        if let Some(name) = &self.set.base_name {
            table.bases.remove(name);
        }
        for base in &self.set.users {
            if let Some(count) = table.users.get_mut(base) {
                *count -= 1;
                if *count == 0 {
                    table.users.remove(base);
                }
            }
        }
        if let Some(base) = self.set.removing {
            table.removing.remove(&base);
        }
        drop(table);
        self.claims.freed.notify_all();
    }
}
