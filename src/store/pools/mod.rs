//! Pools: directories, each perhaps on a drive of its own, that have the data files and the maps of deltas.
//!
//! The directory of the store is the pool `default`. It has all records, names and the list of pools, so a disk whose
//! pool is gone keeps its name. What must hold: a directory is used as a pool only when its identity is that of the pool
//! (D88). A delta lies in one pool for life; the records of the disks that need it say in which one. A pool that is
//! gone, full or failing concerns only the disks that have deltas in it (D89).
//!
//! The set of pools of a worker never changes: a confined worker cannot open directories that it did not know when it
//! started. The next worker opens what was added or came back.

mod absent;
mod catalogue;
mod host;
mod router;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use absent::AbsentMedium;
pub use catalogue::{Lost, PoolDir, PoolUse, PoolView};
pub use host::{HostPools, is_inside, make_identity};
pub use router::Router;

use super::StoreError;
use super::reserve::Reserve;
use crate::format::layout::{DELTAS, POOLS};
use crate::format::lineage::Lineage;
pub use crate::format::pools::DEFAULT_POOL;
use crate::format::pools::{self, LONGEST_POOL_LIST, PoolEntry};
use crate::format::record::DiskRecord;
use crate::io::{LiveHeader, LiveStore, Medium, Open, Space, read_whole};

/// The number of the pool that is the directory of the store.
pub const DEFAULT: u64 = 0;
/// How long a pool may take to be ready when a worker starts.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why a pool cannot be used.
#[derive(Debug, Clone)]
pub struct Trouble {
    /// Cause and remedy.
    pub why: String,
    /// Its drive is not there or fails: what the kernel had in memory for it is lost.
    pub is_gone: bool,
}

/// Opens the directories of pools.
pub trait OpenPools: Send + Sync {
    /// Opens the directory of a pool of the store with the number `store`, and checks its identity.
    ///
    /// # Errors
    /// When it is not there, or is not that pool.
    fn open(&self, pool: &PoolEntry, store: &[u8; 16]) -> Result<Arc<dyn Medium>, Trouble>;
    /// Whether a call of the directory may hang.
    fn may_hang(&self) -> bool {
        true
    }
}

/// For a store that has no pools but its own directory.
pub struct NoPools;

impl OpenPools for NoPools {
    fn open(&self, _: &PoolEntry, _: &[u8; 16]) -> Result<Arc<dyn Medium>, Trouble> {
        Err(Trouble { why: "this process opens no pools".into(), is_gone: false })
    }
    fn may_hang(&self) -> bool {
        false
    }
}

/// A pool other than the default one.
struct Pool {
    entry: PoolEntry,
    medium: Arc<dyn Medium>,
    /// Its directory without the reserve, when it can be used.
    dir: Option<Arc<dyn Medium>>,
    reserve: Option<Arc<Reserve>>,
    trouble: Option<Trouble>,
    /// What removed disks have there is being forgotten.
    is_lost: bool,
}

/// See the module.
pub struct Pools {
    default: Arc<Reserve>,
    /// The list of pools, when it can be read.
    listed: Result<(), String>,
    pools: RwLock<BTreeMap<u64, Arc<Pool>>>,
    /// The pool of each delta that is not in the default one.
    of: RwLock<HashMap<u64, u64>>,
    /// Whether writes of all pools never wait. Asked by each write.
    never_wait: bool,
    /// Held shared while a disk is placed in a pool, and exclusively while a pool is removed, which only tries: no caller
    /// waits behind it.
    pub(super) placing: RwLock<()>,
    /// Held while the list of pools is replaced.
    listing: Mutex<()>,
}

/// Reads the list of pools; empty when there is none.
///
/// # Errors
/// When it cannot be read or is damaged.
pub fn read_list(medium: &dyn Medium) -> Result<Vec<PoolEntry>, String> {
    let file = match medium.open(POOLS, Open::ToRead) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(|error| error.to_string())?,
    };
    let bytes = read_whole(&*file, LONGEST_POOL_LIST).map_err(|error| error.to_string())?;
    pools::decode(&bytes).map_err(|error| error.to_string())
}

/// Makes a pool ready: names that a dead worker made become durable, and its reserve is filled up.
fn make_ready(medium: Arc<dyn Medium>, reserve: Option<u64>) -> Result<Arc<Reserve>, Trouble> {
    let ready = medium.sync_dir(DELTAS).and_then(|()| Reserve::over(medium, reserve));
    ready.map(Arc::new).map_err(|error| Trouble::of("its drive fails", &error))
}

impl Trouble {
    /// An error of the storage. One that has to do with this process only does not mean that the drive is gone.
    pub(super) fn of(what: &str, error: &io::Error) -> Self {
        const OURS: [i32; 6] =
            [libc::EMFILE, libc::ENFILE, libc::ENOMEM, libc::EINTR, libc::EACCES, libc::EPERM];
        let is_gone = error.raw_os_error().is_none_or(|errno| !OURS.contains(&errno));
        Self { why: format!("{what}: {error}"), is_gone }
    }
}

impl Pool {
    fn open(entry: PoolEntry, store: &[u8; 16], opener: &dyn OpenPools, reserve: Option<u64>) -> Self {
        let opened = opener.open(&entry, store);
        let dir = opened.as_ref().ok().cloned();
        let ready = opened.and_then(|medium| {
            if !opener.may_hang() {
                return make_ready(medium, reserve);
            }
            // A drive that hangs must not keep the others from being served.
            let (done, result) = mpsc::sync_channel(1);
            let make = move || drop(done.send(make_ready(medium, reserve)));
            let started = std::thread::Builder::new().name("pool".into()).spawn(make);
            started.map_err(|error| Trouble::of("no thread for it", &error))?;
            let late = || Trouble {
                why: format!("its drive has not answered for {} s", PATIENCE.as_secs()),
                is_gone: false,
            };
            result.recv_timeout(PATIENCE).map_err(|_| late()).flatten()
        });
        match ready {
            Ok(reserve) => {
                let medium: Arc<dyn Medium> = reserve.clone();
                Self { entry, medium, dir, reserve: Some(reserve), trouble: None, is_lost: false }
            }
            Err(trouble) => {
                let (pool, dir, why) = (&entry.name, &entry.dir, &trouble.why);
                tracing::error!(
                    pool,
                    dir,
                    why,
                    "a pool cannot be used; its disks are not served, all others are"
                );
                let medium = Arc::new(AbsentMedium::new(&entry, &trouble.why));
                Self { entry, medium, dir: None, reserve: None, trouble: Some(trouble), is_lost: false }
            }
        }
    }
}

impl Pools {
    /// Opens the pools of a store. A pool that cannot be used is no error.
    pub(super) fn open(
        default: Arc<Reserve>,
        store: &[u8; 16],
        opener: &dyn OpenPools,
        reserve: Option<u64>,
    ) -> Arc<Self> {
        let (entries, listed) = match read_list(&*default) {
            Ok(entries) => (entries, Ok(())),
            Err(why) => {
                tracing::error!(
                    why,
                    "the list of pools cannot be read; disks in pools are not served; restore the file `pools` of the store"
                );
                (Vec::new(), Err(why))
            }
        };
        let open = |entry: PoolEntry| (entry.number, Arc::new(Pool::open(entry, store, opener, reserve)));
        let pools: BTreeMap<u64, Arc<Pool>> = entries.into_iter().map(open).collect();
        let never_wait = default.never_waits() && pools.values().all(|pool| pool.medium.never_waits());
        Arc::new(Self {
            default,
            listed,
            never_wait,
            pools: RwLock::new(pools),
            of: RwLock::default(),
            placing: RwLock::new(()),
            listing: Mutex::new(()),
        })
    }

    /// Notes in which pools the deltas of a record lie.
    pub(super) fn learn(&self, record: &DiskRecord) {
        if !record.features.pools.is_empty() {
            self.of.write().extend(record.features.pools.iter().copied());
        }
    }

    /// Puts a new delta, which has no files yet, in a pool.
    pub(super) fn place(&self, delta: u64, pool: u64) {
        if pool != DEFAULT {
            self.of.write().insert(delta, pool);
        }
    }

    /// The number of the pool in which a delta lies.
    pub fn home(&self, delta: u64) -> u64 {
        self.of.read().get(&delta).copied().unwrap_or(DEFAULT)
    }

    fn pool(&self, number: u64) -> Option<Arc<Pool>> {
        self.pools.read().get(&number).cloned()
    }

    /// The medium with the files of a delta. When its pool cannot be used, all calls fail.
    pub fn medium(&self, delta: u64) -> Arc<dyn Medium> {
        match self.home(delta) {
            DEFAULT => self.default.clone(),
            number => match self.pool(number) {
                Some(pool) => pool.medium.clone(),
                None => Arc::new(AbsentMedium::unlisted(number)),
            },
        }
    }

    /// All pools that can be used, the default one first: number and medium.
    pub(super) fn usable(&self) -> Vec<(u64, Arc<dyn Medium>)> {
        let default: Arc<dyn Medium> = self.default.clone();
        let pools = self.pools.read();
        let others = pools.iter().filter(|(_, pool)| pool.trouble.is_none());
        std::iter::once((DEFAULT, default))
            .chain(others.map(|(number, pool)| (*number, pool.medium.clone())))
            .collect()
    }

    /// Why a pool cannot be used.
    fn trouble(&self, number: u64) -> Option<Trouble> {
        if number == DEFAULT {
            return None;
        }
        match self.pool(number) {
            Some(pool) => {
                let PoolEntry { name, dir, .. } = &pool.entry;
                pool.trouble.clone().map(|trouble| Trouble {
                    why: format!(
                        "pool {name} is not available: {dir}: {}; when it is back: plyfs pool attach {name}",
                        trouble.why
                    ),
                    ..trouble
                })
            }
            None => Some(Trouble { why: unlisted(number), is_gone: false }),
        }
    }

    /// Whether the drive with a delta is not there or fails.
    pub(super) fn is_gone(&self, delta: u64) -> bool {
        self.trouble(self.home(delta)).is_some_and(|trouble| trouble.is_gone)
    }

    /// Why one of these deltas cannot be used, as far as its pool is the cause.
    pub fn trouble_of(&self, deltas: impl IntoIterator<Item = u64>) -> Option<String> {
        let mut deltas = deltas.into_iter();
        deltas.find_map(|delta| self.trouble(self.home(delta))).map(|trouble| trouble.why)
    }

    /// The pools of the deltas that a lineage names, as a record lists them.
    pub(super) fn listed_in(&self, lineage: &Lineage) -> Vec<(u64, u64)> {
        let of = self.of.read();
        if of.is_empty() {
            return Vec::new();
        }
        let all = lineage.deltas().chain(lineage.dropped.iter().copied());
        let mut found: Vec<_> = all.filter_map(|delta| Some((delta, *of.get(&delta)?))).collect();
        found.sort_unstable();
        found.dedup();
        found
    }

    /// Name of a pool.
    pub fn name(&self, number: u64) -> String {
        match self.pool(number) {
            _ if number == DEFAULT => DEFAULT_POOL.to_owned(),
            Some(pool) => pool.entry.name.clone(),
            None => format!("number {number}"),
        }
    }

    /// Marks the live maps of deltas whose pool is gone. What the kernel had in memory for the drive is lost, so these maps
    /// claim bytes that no drive has: when the pool is back, its disks are as after a power cut (D89).
    pub(super) fn give_up_live_maps(&self, live: &dyn LiveStore, deltas: impl Iterator<Item = u64>) {
        for delta in deltas.filter(|delta| self.is_gone(*delta)) {
            match live.existing(delta) {
                Ok(Some(map)) => {
                    for word in [LiveHeader::Device, LiveHeader::Inode] {
                        map.header(word).store(u64::MAX, std::sync::atomic::Ordering::Release);
                    }
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, delta, "the live map of a disk in a pool that is gone"),
            }
        }
    }

    /// Whether writes of all pools never wait.
    pub(super) fn never_wait(&self) -> bool {
        self.never_wait
    }

    fn space(&self, pool: &Pool) -> Option<Space> {
        pool.reserve.as_ref()?.space().ok()
    }

    /// The number of a pool in which a new disk is to lie; `None`: the default one.
    ///
    /// # Errors
    /// There is no such pool, or it cannot be used.
    pub(super) fn to_place_in(&self, name: Option<&str>) -> Result<u64, StoreError> {
        let Some(name) = name.filter(|name| *name != DEFAULT_POOL) else { return Ok(DEFAULT) };
        let found = self.pools.read().iter().find(|(_, pool)| pool.entry.name == name).map(|(n, _)| *n);
        let number = found.ok_or_else(|| no_pool(name))?;
        self.check_usable(number)?;
        Ok(number)
    }

    /// Refuses to put a delta in a pool that cannot be used.
    pub(super) fn check_usable(&self, number: u64) -> Result<(), StoreError> {
        let is_lost = self.pool(number).is_some_and(|pool| pool.is_lost);
        match self.trouble(number) {
            None if is_lost => Err(no_pool(&self.name(number))),
            None => Ok(()),
            Some(trouble) => {
                Err(StoreError::PoolGone { object: format!("pool {}", self.name(number)), why: trouble.why })
            }
        }
    }
}

pub(super) fn no_pool(name: &str) -> StoreError {
    StoreError::NotFound { object: format!("pool {name}"), noun: "pool" }
}

fn unlisted(number: u64) -> String {
    format!("pool number {number} is not in the list of pools; restore the file `pools` of the store")
}
