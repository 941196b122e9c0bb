//! Claims of names and bases by running changes of the catalogue.
//!
//! What must hold: a change claims all that it needs at once, and holds nothing while it waits for that, so claims
//! cannot deadlock. A change that has its claims waits for local storage only, never for the file of a base or a
//! network. Changes of different names never wait for each other (D45).

use std::collections::{HashMap, HashSet};

use parking_lot::{Condvar, Mutex};

#[derive(Debug, Default)]
struct Held {
    disks: HashSet<String>,
    bases: HashSet<String>,
    /// Number of running changes that need a base to stay, by its number.
    users: HashMap<u64, usize>,
    /// Bases that are being removed.
    going: HashSet<u64>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Claims {
    held: Mutex<Held>,
    freed: Condvar,
}

/// What one change claims.
#[derive(Debug, Default)]
struct Needs {
    disks: Vec<String>,
    base_name: Option<String>,
    /// Bases that must stay.
    users: Vec<u64>,
    /// A base that is removed.
    going: Option<u64>,
}

impl Needs {
    fn are_free(&self, held: &Held) -> bool {
        self.disks.iter().all(|name| !held.disks.contains(name))
            && self.base_name.iter().all(|name| !held.bases.contains(name))
            && self.users.iter().all(|base| !held.going.contains(base))
            && self.going.iter().all(|base| !held.users.contains_key(base) && !held.going.contains(base))
    }
}

/// The claims of a change, held until dropped.
#[derive(Debug)]
pub(super) struct Claim<'a> {
    claims: &'a Claims,
    needs: Needs,
}

impl Claims {
    fn claim(&self, needs: Needs) -> Claim<'_> {
        let mut held = self.held.lock();
        while !needs.are_free(&held) {
            self.freed.wait(&mut held);
        }
        held.disks.extend(needs.disks.iter().cloned());
        held.bases.extend(needs.base_name.iter().cloned());
        for base in &needs.users {
            *held.users.entry(*base).or_default() += 1;
        }
        held.going.extend(needs.going);
        drop(held);
        Claim { claims: self, needs }
    }

    /// Claims names of disks, and bases that must stay meanwhile. Neither list has duplicates.
    pub fn disks(&self, disks: Vec<String>, users: Vec<u64>) -> Claim<'_> {
        self.claim(Needs { disks, users, ..Needs::default() })
    }

    /// Claims that a base stays.
    pub fn user_of(&self, base: Option<u64>) -> Claim<'_> {
        self.disks(Vec::new(), base.into_iter().collect())
    }

    /// Claims the name of a new base.
    pub fn base_name(&self, name: &str) -> Claim<'_> {
        self.claim(Needs { base_name: Some(name.to_owned()), ..Needs::default() })
    }

    /// Claims the removal of a base: no running change needs it, and no new change gets it.
    pub fn removal(&self, name: &str, base: u64) -> Claim<'_> {
        self.claim(Needs { base_name: Some(name.to_owned()), going: Some(base), ..Needs::default() })
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        let mut held = self.claims.held.lock();
        for name in &self.needs.disks {
            held.disks.remove(name);
        }
        if let Some(name) = &self.needs.base_name {
            held.bases.remove(name);
        }
        for base in &self.needs.users {
            if let Some(count) = held.users.get_mut(base) {
                *count -= 1;
                if *count == 0 {
                    held.users.remove(base);
                }
            }
        }
        if let Some(base) = self.needs.going {
            held.going.remove(&base);
        }
        drop(held);
        self.claims.freed.notify_all();
    }
}
