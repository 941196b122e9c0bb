//! `plyfs check`: verifies every durable structure of a store without a running daemon.
//!
//! The numbers of the invariants are those of docs/format.md. What must hold: without `repair` the check writes nothing
//! but a missing lock file. With it, the check changes only what needs no guess. It never changes a disk that has a live
//! map, and never removes what may be the last copy of a client's data.

mod cache;
mod delta;
mod digest;
mod images;
mod live;
mod pools;
mod strays;
#[cfg(test)]
mod tests;
mod trace;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

pub use digest::VerifyBases;
use serde::Serialize;
use thiserror::Error;

use crate::format::layout::{
    BASE_SUFFIX, BASES, DELTAS, DISK_SUFFIX, DISKS, LOCK, SUPERBLOCK, base_path, disk_path, disk_record,
    number,
};
use crate::format::record::{BaseRecord, DiskRecord, ImageFile, Strictness, Superblock};
use crate::format::{FormatError, Kind, MAX_NUMBER};
use crate::io::{HostMedium, Medium, replace, sys};
use crate::source::{FileIdentity, compare, look};

const RECORD_LIMIT: u64 = 64 << 10;
/// The step in which the store reserves numbers in the superblock.
const ID_STEP: u64 = 4096;

/// A violation of docs/format.md.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Number of the invariant in docs/format.md.
    pub invariant: u32,
    /// `disk NAME`, `base NAME`, or a file of the store.
    pub object: String,
    /// What is wrong and, when it is not repairable, what to do.
    pub message: String,
    /// Whether it was repaired.
    pub repaired: bool,
}

/// The result of a check.
#[derive(Debug, Default, Serialize)]
pub struct Report {
    /// In the order of the check.
    pub findings: Vec<Finding>,
    /// How many structures of each kind were checked, and facts that are no damage.
    pub checked: Vec<(String, u64)>,
}

/// Why a store could not be checked at all.
#[derive(Debug, Error)]
pub enum CheckError {
    /// The path does not lead to a store.
    #[error("{} is no store: {why}; check --store", store.display())]
    NoStore {
        /// The path.
        store: PathBuf,
        /// What is there instead.
        why: String,
    },
    /// A daemon has the lock.
    #[error(
        "a daemon is running on store {}; stop it first: plyfs stop --store {}",
        store.display(), store.display()
    )]
    Running {
        /// The path.
        store: PathBuf,
    },
    /// A newer plyfs wrote it.
    #[error("store {}: {error}", store.display())]
    Newer {
        /// The path.
        store: PathBuf,
        /// What is newer.
        error: FormatError,
    },
    /// An error of the storage.
    #[error("{operation} {}: {error}; check the disk, and run as the store's owner", path.display())]
    Io {
        /// The operation that failed.
        operation: &'static str,
        /// Its file or directory.
        path: PathBuf,
        /// The error of the storage.
        error: io::Error,
    },
}

/// Checks the store at `store`, with live maps at their default place.
///
/// # Errors
/// No store, a store in use, a newer store, or one that cannot be read at all. Damage is a finding, not an error.
pub fn run(store: &Path, repair: bool) -> Result<Report, CheckError> {
    let repair = if repair { Repair::Yes } else { Repair::No };
    run_with_runtime_dir(store, Path::new("/dev/shm"), repair)
}

/// What is wrong with a file of a base, as far as its metadata tell. What lies behind a network is not asked for.
fn why_changed(file: &ImageFile) -> Option<String> {
    if !file.is_local() {
        return None;
    }
    match look(Path::new(&file.source)) {
        Some(Ok(now)) => return compare(&file.identity, &now, Strictness::default()).difference(),
        Some(Err(error)) => return Some(error.to_string()),
        None => {}
    }
    match fs::metadata(&file.source) {
        Err(e) => Some(format!("it cannot be examined: {e}")),
        Ok(now) if !now.is_file() => Some("it is not a regular file or block device".into()),
        Ok(now) => {
            compare(&file.identity, &FileIdentity::of(&now).into(), Strictness::default()).difference()
        }
    }
}

/// Whether a check may change the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Repair {
    /// It only reads.
    No,
    /// It repairs what needs no guess.
    Yes,
}

/// As [`run`], for live maps below another directory.
///
/// # Errors
/// As [`run`].
pub fn run_with_runtime_dir(store: &Path, runtime_dir: &Path, repair: Repair) -> Result<Report, CheckError> {
    run_verifying(store, runtime_dir, repair, VerifyBases::No)
}

/// As [`run_with_runtime_dir`], and compares the digests of bases on request.
///
/// # Errors
/// As [`run`].
pub fn run_verifying(
    store: &Path,
    runtime_dir: &Path,
    repair: Repair,
    verify: VerifyBases,
) -> Result<Report, CheckError> {
    run_watched(store, runtime_dir, repair, verify, &|_| ())
}

/// As [`run_verifying`], and tells `watch` how far it is.
///
/// # Errors
/// As [`run`].
pub fn run_watched(
    store: &Path,
    runtime_dir: &Path,
    repair: Repair,
    verify: VerifyBases,
    watch: &dyn Fn(Step),
) -> Result<Report, CheckError> {
    let no_store = |why: String| CheckError::NoStore { store: store.into(), why };
    match fs::symlink_metadata(store.join(SUPERBLOCK)) {
        Ok(meta) if meta.is_file() => {}
        Ok(_) => return Err(no_store(format!("its {SUPERBLOCK} is not a regular file"))),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Err(no_store(format!("there is no {SUPERBLOCK} in it")));
        }
        Err(error) => return Err(CheckError::Io { operation: "opening", path: store.into(), error }),
    }
    let _lock = lock(store)?;
    let medium = HostMedium::new(store).map_err(|error| CheckError::Io {
        operation: "opening",
        path: store.into(),
        error,
    })?;
    run_through_watched(store, runtime_dir, repair, verify, &medium, watch)
}

/// As [`run_with_runtime_dir`], for a caller that has the lock. Repairs are written through `medium`.
///
/// # Errors
/// As [`run`].
pub fn run_through(
    store: &Path,
    runtime_dir: &Path,
    repair: Repair,
    verify: VerifyBases,
    medium: &dyn Medium,
) -> Result<Report, CheckError> {
    run_through_watched(store, runtime_dir, repair, verify, medium, &|_| ())
}

fn run_through_watched(
    store: &Path,
    runtime_dir: &Path,
    repair: Repair,
    verify: VerifyBases,
    medium: &dyn Medium,
    watch: &dyn Fn(Step),
) -> Result<Report, CheckError> {
    let mut check = Check {
        store,
        watch,
        medium,
        repair,
        live: BTreeSet::new(),
        live_unknown: false,
        broken: BTreeSet::new(),
        broken_deltas: BTreeSet::new(),
        losers: BTreeSet::new(),
        bases: BTreeMap::new(),
        disks: BTreeMap::new(),
        pools: pools::Pools::default(),
        findings: Vec::new(),
        torn: 0,
        maps: 0,
        data_files: 0,
        verify,
        digests: 0,
        without_digest: 0,
    };
    check.all(runtime_dir)
}

fn lock(store: &Path) -> Result<File, CheckError> {
    let path = store.join(LOCK);
    let fail = |error| CheckError::Io { operation: "locking", path: path.clone(), error };
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
    let file = match options.open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            options.write(true).create(true).mode(0o600).open(&path).map_err(fail)?
        }
        other => other.map_err(fail)?,
    };
    if sys::try_lock_named(&file, &path).map_err(fail)? {
        Ok(file)
    } else {
        Err(CheckError::Running { store: store.into() })
    }
}

/// The parts of a check that may take long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The maps of disks; counts disks.
    Disks,
    /// The digests of bases; counts bytes.
    Digests,
    /// The structure of the cache of fetched blocks; counts files.
    Cache,
    /// The cached blocks and their checksums; counts bytes.
    CachedBytes,
}

/// How far a check is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    /// The part that is under way.
    pub part: Part,
    /// How much of it is done.
    pub done: u64,
    /// How much there is.
    pub total: u64,
}

struct Check<'a> {
    store: &'a Path,
    watch: &'a dyn Fn(Step),
    medium: &'a dyn Medium,
    repair: Repair,
    /// Deltas that have a live map.
    live: BTreeSet<u64>,
    /// The store's record names live maps of this boot, but they cannot be read.
    live_unknown: bool,
    /// Numbers of disks whose record or map cannot be read: none of their files are removed.
    broken: BTreeSet<u64>,
    /// Deltas with a finding of 8, 9 or 10. Several disks may need one.
    broken_deltas: BTreeSet<u64>,
    /// Disks that lost their name in this repair. The next start or the next check removes their files.
    losers: BTreeSet<u64>,
    /// By the number in the file's name.
    bases: BTreeMap<u64, BaseRecord>,
    disks: BTreeMap<u64, DiskRecord>,
    pools: pools::Pools,
    findings: Vec<Finding>,
    torn: u64,
    maps: u64,
    data_files: u64,
    verify: VerifyBases,
    /// Bases whose digest is right, and bases without a digest.
    digests: u64,
    without_digest: u64,
}

impl Check<'_> {
    fn all(&mut self, runtime_dir: &Path) -> Result<Report, CheckError> {
        let superblock = self.superblock()?;
        self.find_live_maps(runtime_dir, superblock.as_ref());
        let bases = self.list(BASES)?;
        let disks = self.list(DISKS)?;
        let deltas = self.list(DELTAS)?;
        self.bases = self.records(BASES, BASE_SUFFIX, &bases, BaseRecord::decode, |r| r.id);
        let base_files = self.bases.len() as u64;
        self.disks = self.records(DISKS, DISK_SUFFIX, &disks, DiskRecord::decode, |r| r.id);
        let disk_files = self.disks.len() as u64;
        self.find_pools(superblock.as_ref());
        let of_pools: Vec<String> = self.pools.files().cloned().collect();
        let numbers: Vec<String> = of_pools.iter().cloned().chain(self.pools.numbers()).collect();
        if let Some(superblock) = &superblock {
            self.next_number(superblock, [&bases, &disks, &deltas, &numbers]);
        }
        self.names();
        self.backings();
        self.sources();
        let total = self.disks.len() as u64;
        let mut seen = BTreeSet::new();
        for (done, (id, record)) in (1..).zip(self.disks.clone()) {
            // No client reads a removed disk again.
            if !record.is_removed() {
                self.check_deltas(id, &record, &mut seen);
            }
            (self.watch)(Step { part: Part::Disks, done, total });
        }
        self.strays(superblock.is_some(), &bases, &disks, &deltas)?;
        self.strays_in_pools();
        let traces = self.traces(&bases)?;
        let deltas: Vec<String> = deltas.into_iter().chain(of_pools).collect();
        self.images(&bases)?;
        self.unlinked(&deltas);
        self.dropped(&deltas);
        self.cache()?;
        let mut checked = vec![
            ("superblock".to_owned(), 1),
            ("bases".to_owned(), base_files),
            ("disks".to_owned(), disk_files),
            ("map files".to_owned(), self.maps),
            ("data files".to_owned(), self.data_files),
        ];
        if traces > 0 {
            checked.push(("traces".to_owned(), traces));
        }
        if self.verify == VerifyBases::Yes {
            checked.push(("digests verified".to_owned(), self.digests));
            checked.push(("bases without a digest".to_owned(), self.without_digest));
        }
        if self.torn > 0 {
            checked.push(("map files with a torn flush that was never acknowledged".to_owned(), self.torn));
        }
        if !self.live.is_empty() {
            checked
                .push(("live maps that the next plyfs serve takes over".to_owned(), self.live.len() as u64));
        }
        Ok(Report { findings: std::mem::take(&mut self.findings), checked })
    }

    fn find(&mut self, invariant: u32, object: impl Into<String>, message: impl Into<String>) {
        self.findings.push(Finding {
            invariant,
            object: object.into(),
            message: message.into(),
            repaired: false,
        });
    }

    /// Adds a finding, and repairs it if the check may. `disk` is the disk that the repair changes.
    fn repairable(
        &mut self,
        invariant: u32,
        object: impl Into<String>,
        message: impl Into<String>,
        disk: Option<u64>,
        repair: impl FnOnce(&dyn Medium) -> io::Result<()>,
    ) -> bool {
        let mut message = message.into();
        let mut repaired = false;
        if disk.is_some_and(|id| self.live_unknown || self.has_live_map(id)) {
            message.push_str(
                "; not repaired, because the disk has a live map: run plyfs serve, stop it, and check again",
            );
        } else if self.repair == Repair::Yes {
            match repair(&pools::Routed { store: self.medium, pools: &self.pools }) {
                Ok(()) => repaired = true,
                Err(e) => message.push_str(&format!("; the repair failed: {e}")),
            }
        }
        self.findings.push(Finding { invariant, object: object.into(), message, repaired });
        repaired
    }

    /// Whether the record of a disk is missing in `disks`: it is unknown which layers that disk needs.
    fn has_unknown_needs(&self) -> bool {
        self.broken.iter().any(|id| !self.disks.contains_key(id))
    }

    /// Whether there is a live map of a delta, or of one of the deltas of a disk.
    fn has_live_map(&self, id: u64) -> bool {
        let of_disk = |record: &DiskRecord| record.lineage.deltas().any(|delta| self.live.contains(&delta));
        self.live.contains(&id) || self.disks.get(&id).is_some_and(of_disk)
    }

    /// The bytes of a file of the store.
    fn read(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let file = self.open(name)?;
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > limit {
            return Err(io::Error::other(format!(
                "it has more than {limit} bytes, the most that it may have"
            )));
        }
        Ok(bytes)
    }

    fn open(&self, name: &str) -> io::Result<File> {
        let dir = self.pools.dir_of(name)?;
        pools::open_file(dir.as_deref().unwrap_or(self.store).join(name))
    }

    /// The names in a directory of the store, sorted.
    fn list(&mut self, dir: &'static str) -> Result<Vec<String>, CheckError> {
        match self.medium.list(dir) {
            Ok(mut names) => {
                names.sort_unstable();
                Ok(names)
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.find(1, format!("{dir}/"), "the directory is missing; restore it from a backup");
                Ok(Vec::new())
            }
            Err(error) => Err(CheckError::Io { operation: "reading", path: self.store.join(dir), error }),
        }
    }

    fn superblock(&mut self) -> Result<Option<Superblock>, CheckError> {
        let bytes = self.read(SUPERBLOCK, RECORD_LIMIT).map_err(|error| CheckError::Io {
            operation: "reading",
            path: self.store.join(SUPERBLOCK),
            error,
        })?;
        match Superblock::decode(&bytes) {
            Ok(superblock) => Ok(Some(superblock)),
            Err(error) if error.kind == Kind::Newer => {
                Err(CheckError::Newer { store: self.store.into(), error })
            }
            Err(error) => {
                self.find(1, SUPERBLOCK, format!("{error}; restore it from a backup"));
                Ok(None)
            }
        }
    }

    /// Invariants 3 and 4.
    fn records<T>(
        &mut self,
        dir: &str,
        suffix: &str,
        names: &[String],
        decode: impl Fn(&[u8]) -> Result<T, FormatError>,
        id: impl Fn(&T) -> u64,
    ) -> BTreeMap<u64, T> {
        let mut out = BTreeMap::new();
        for name in names {
            let Some(wanted) = name.strip_suffix(suffix).and_then(number) else { continue };
            let file = format!("{dir}/{name}");
            let decoded = match self.read(&file, RECORD_LIMIT) {
                Ok(bytes) => decode(&bytes).map_err(|e| e.to_string()),
                Err(e) => Err(format!("it cannot be read: {e}")),
            };
            match decoded {
                Ok(record) if id(&record) == wanted => {
                    out.insert(wanted, record);
                    continue;
                }
                Ok(record) => {
                    let message =
                        format!("it has the record of number {}; restore both from a backup", id(&record));
                    self.find(4, file, message);
                }
                Err(why) => self.find(3, file, format!("{why}; restore it from a backup")),
            }
            if dir == DISKS {
                self.broken.insert(wanted);
            }
        }
        out
    }

    /// Invariant 2.
    fn next_number(&mut self, superblock: &Superblock, names: [&[String]; 4]) {
        // Any file whose name begins with a number uses the number.
        let used = names.into_iter().flatten().filter_map(|name| number(name.split('.').next()?)).max();
        let Some(used) = used.filter(|used| *used >= superblock.next_id) else { return };
        let message = format!("the next free number is {}, but number {used} is in use", superblock.next_id);
        let Some(next_id) = used.checked_add(ID_STEP).filter(|next| *next <= MAX_NUMBER) else {
            self.find(2, SUPERBLOCK, message);
            return;
        };
        let next = Superblock { next_id, ..superblock.clone() };
        self.repairable(2, SUPERBLOCK, message, None, |medium| {
            replace(medium, ".", SUPERBLOCK, &next.encode())
        });
    }

    /// Invariant 5.
    fn names(&mut self) {
        let mut base_names: HashMap<String, u64> = HashMap::new();
        for (id, record) in self.bases.clone() {
            if let Some(other) = base_names.insert(record.name.clone(), id) {
                let message =
                    format!("numbers {other} and {id} have the same name; remove one of bases/N.base");
                self.find(5, format!("base {}", record.name), message);
            }
        }
        // Among the records with one name, the one with the highest sequence number owns the name, even when its disk
        // has lost the name since.
        let mut order: Vec<(u64, u64)> =
            self.disks.iter().map(|(id, record)| (record.name_seq, *id)).collect();
        order.sort_unstable_by(|a, b| b.cmp(a));
        let mut owners: HashMap<String, (u64, u64)> = HashMap::new();
        for (seq, id) in order {
            let Some(record) = self.disks.get(&id).cloned() else { continue };
            let object = format!("disk {}", record.name);
            match owners.get(&record.name) {
                None => {
                    owners.insert(record.name, (seq, id));
                }
                Some(_) if record.unlinked => {}
                Some((owner_seq, owner)) if *owner_seq == seq => {
                    let message = format!(
                        "numbers {owner} and {id} have the same name and no order; copy one of disks/N.disk \
                         elsewhere and remove it"
                    );
                    self.find(5, object, message);
                }
                Some((_, owner)) => {
                    let message = format!("number {id} still has the name, but number {owner} replaced it");
                    let loser = DiskRecord { unlinked: true, ..record };
                    let done = self.repairable(5, object, message, Some(id), |medium| {
                        replace(medium, DISKS, &disk_record(id), &loser.encode())
                    });
                    if done {
                        self.losers.insert(id);
                        self.disks.insert(id, loser);
                    }
                }
            }
        }
    }

    /// Invariant 6.
    fn backings(&mut self) {
        for (id, record) in self.disks.clone() {
            let Some(backing) = record.backing.as_ref().filter(|_| !record.is_removed()) else { continue };
            let object = format!("disk {}", record.name);
            let why = match self.bases.get(&backing.base) {
                None => format!(
                    "number {id} needs base number {}, whose record is missing or damaged; restore {}",
                    backing.base,
                    base_path(backing.base)
                ),
                Some(base) if base.image.identity != *backing.identity => {
                    format!(
                        "number {id} was created on another version of base {}; restore that version",
                        base.name
                    )
                }
                Some(base) if record.lineage.base_bytes(record.overlap) > base.size() => format!(
                    "number {id} reads {} bytes from base {}, which has only {}; restore {}",
                    record.lineage.base_bytes(record.overlap),
                    base.name,
                    base.size(),
                    disk_path(id)
                ),
                Some(_) => continue,
            };
            self.find(6, object, why);
        }
    }

    /// Invariant 7. Remote sources are not checked.
    fn sources(&mut self) {
        for record in self.bases.clone().into_values() {
            let object = format!("base {}", record.name);
            let mut sound = true;
            // The original of a hydrated base may be removed.
            for file in record.files().filter(|_| !record.options.hydrate) {
                if let Some(why) = why_changed(file) {
                    sound = false;
                    let message = format!("its source {}: {why}; put the original file back", file.source);
                    self.find(7, object.clone(), message);
                }
            }
            if sound && !record.keeps(&record.image) && self.verify == VerifyBases::Yes {
                self.verify_digest(&record);
            }
        }
    }
}
