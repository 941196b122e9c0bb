//! The catalogue of a store: which bases and disks there are, their records, and how they are attached.
//!
//! What must hold: a name change, a creation and a removal are durable when they return, each by one rename of one
//! record; of two records with one name the one with the higher `name_seq` has it; numbers are never used twice.
//!
//! Locks, in order: `change` (held through local syncs), a disk's `attach` and `opening`, the replacement of a record,
//! `names` and the record in memory (never held through a system call).

mod base;
mod error;
mod node;
mod recording;
mod register;
mod reserve;
mod reserved;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

pub use base::{BaseNode, Sources, why_changed};
pub use error::StoreError;
pub use node::{Attributes, DiskNode};
use recording::Recording;
pub use register::{NewBase, NewFile};
pub use reserve::{Reserve, ReserveState, with_reserve_of};
use reserved::Reserved;

use crate::cache::BlockCache;
use crate::delta::Delta;
use crate::format::journal::{HEADER, MapHeader};
use crate::format::record::{Backing, BaseRecord, DiskRecord, MapRoot, Superblock};
use crate::format::{FormatError, Kind, MAX_DISK_SIZE, MAX_NUMBER, valid_name};
use crate::io::{HostMedium, LiveStore, Medium, Open, Space, read_whole, replace, stage, sys};
use crate::sabotage::{Sabotage, limit, sabotaged};
use crate::source::OpenHere;

const RECORD_LIMIT: u64 = 64 << 10;
/// Numbers taken from the superblock at once.
const ID_STEP: u64 = 4096;
const SUPERBLOCK: &str = "plyfs.store";

/// An open store.
pub struct Store {
    medium: Arc<dyn Medium>,
    reserve: Arc<Reserve>,
    live: Arc<dyn LiveStore>,
    cache: Arc<BlockCache>,
    sources: Arc<dyn Sources>,
    superblock: Mutex<Superblock>,
    next_id: AtomicU64,
    next_seq: AtomicU64,
    change: Mutex<()>,
    names: RwLock<Names>,
    damaged: Vec<(String, FormatError)>,
    reserved: Reserved,
    recording: Recording,
}

#[derive(Default)]
struct Names {
    disks: BTreeMap<u64, Arc<DiskNode>>,
    bases: BTreeMap<u64, Arc<BaseNode>>,
    disk_names: HashMap<String, u64>,
    base_names: HashMap<String, u64>,
}

/// What a new disk is to be.
#[derive(Debug, Clone)]
pub struct NewDisk {
    /// Name.
    pub name: String,
    /// The base, or a blank disk.
    pub base: Option<String>,
    /// Bytes; the base's size when not given.
    pub size: Option<u64>,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

fn check_name(noun: &str, name: &str) -> Result<(), StoreError> {
    if valid_name(name) {
        return Ok(());
    }
    Err(StoreError::invalid(
        format!("{noun} name {name:?}"),
        "a name has 1 to 128 letters, digits, dots, underscores and hyphens, and begins with a letter or digit",
    ))
}

/// Decoded records, and the names of files that could not be decoded.
type Decoded<T> = (Vec<T>, Vec<(String, FormatError)>);

fn decode_all<T>(
    medium: &dyn Medium,
    dir: &str,
    suffix: &str,
    decode: impl Fn(&[u8]) -> Result<T, FormatError>,
    id: impl Fn(&T) -> u64,
) -> io::Result<Decoded<T>> {
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for name in medium.list(dir)? {
        let Some(number) = name.strip_suffix(suffix) else { continue };
        let Ok(number) = number.parse::<u64>() else { continue };
        let path = format!("{dir}/{name}");
        let bytes = medium.open(&path, Open::Existing).and_then(|file| read_whole(&*file, RECORD_LIMIT));
        let decoded = match bytes {
            Ok(bytes) => decode(&bytes).and_then(|record| {
                let is = id(&record);
                let named = path == format!("{dir}/{is}{suffix}") && is == number;
                let detail = || format!("it is the record of number {is}");
                if named {
                    Ok(record)
                } else {
                    Err(FormatError { kind: Kind::Value, structure: "record", detail: detail() })
                }
            }),
            Err(e) => Err(FormatError { kind: Kind::Truncated, structure: "record", detail: e.to_string() }),
        };
        match decoded {
            Ok(record) => good.push(record),
            Err(e) => bad.push((path, e)),
        }
    }
    Ok((good, bad))
}

/// Removes records that a killed worker was still writing, which have no meaning: else a worker that dies a hundred
/// times leaves a hundred of them, and `plyfs check` calls the store unclean. What is beside a damaged record stays; it
/// may be the last copy. A failure keeps a file that is in nobody's way.
fn sweep(medium: &dyn Medium, damaged: &[(String, FormatError)]) {
    for (dir, suffix) in [(".", SUPERBLOCK), ("bases", ".base"), ("disks", ".disk")] {
        for name in medium.list(dir).unwrap_or_default() {
            let Some(record) = name.strip_suffix(".tmp").filter(|record| record.ends_with(suffix)) else {
                continue;
            };
            let path = format!("{dir}/{record}");
            if damaged.iter().any(|(file, _)| *file == path) {
                continue;
            }
            if let Err(error) = medium.remove(&format!("{dir}/{name}")) {
                tracing::warn!(%error, file = format!("{dir}/{name}"), "cannot remove what an unclean stop left");
            }
        }
    }
}

/// Reads or, in an empty directory, makes the superblock.
///
/// # Errors
/// When the directory holds something else, or a store of a newer version.
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
                for dir in ["bases", "disks", "deltas"] {
                    medium.make_dir(dir)?;
                }
                // The superblock says that the directories are there.
                medium.sync_dir(".")?;
                replace(medium, ".", SUPERBLOCK, &superblock.encode())?;
                Ok(superblock)
            };
            for dir in ["bases", "disks", "deltas"] {
                if medium.list(dir).is_ok_and(|names| !names.is_empty()) {
                    return Err(StoreError::invalid(
                        object,
                        format!(
                            "has {dir}/ but no {SUPERBLOCK}; restore that file, or use an empty directory"
                        ),
                    ));
                }
            }
            make().map_err(StoreError::io(object, "making it"))
        }
        Err(e) => Err(StoreError::io(object, "opening it")(e)),
    }
}

impl Store {
    /// Reads the superblock, which has to be there.
    ///
    /// # Errors
    /// When there is none, or it is damaged or newer.
    pub fn superblock(root: &Path) -> Result<Superblock, StoreError> {
        let object = || format!("store {}", root.display());
        let medium = HostMedium::new(root).map_err(StoreError::io(object(), "opening it"))?;
        if medium.open(SUPERBLOCK, Open::Existing).is_err() {
            return Err(StoreError::invalid(object(), "it has no superblock"));
        }
        open_superblock(&medium)
    }

    /// Reads the superblock and every record without changing anything, also while another process serves the store.
    ///
    /// # Errors
    /// When there is something that this version does not understand because it is newer.
    pub fn probe(root: &Path) -> Result<Superblock, StoreError> {
        let object = || format!("store {}", root.display());
        let superblock = Self::superblock(root)?;
        let medium = HostMedium::new(root).map_err(StoreError::io(object(), "opening it"))?;
        let fail = || StoreError::io(object(), "reading the records");
        let (_, mut damaged) =
            decode_all(&medium, "bases", ".base", BaseRecord::decode, |r| r.id).map_err(fail())?;
        let (disks, bad) =
            decode_all(&medium, "disks", ".disk", DiskRecord::decode, |r| r.id).map_err(fail())?;
        damaged.extend(bad);
        for disk in disks.iter().filter(|d| d.map.generation != 0) {
            let name = crate::delta::map_name(disk.id, disk.map.generation);
            // One that is gone was replaced or removed in this moment.
            let Ok(file) = medium.open(&name, Open::Existing) else { continue };
            let mut header = vec![0; HEADER];
            let read =
                file.read_at(&mut header, 0).map_err(StoreError::io(object(), "reading a map file"))?;
            if let Err(error) = MapHeader::decode(&header[..read]) {
                damaged.push((name, error));
            }
        }
        match damaged.into_iter().find(|(_, error)| error.kind == Kind::Newer) {
            Some((file, source)) => {
                Err(StoreError::Damaged { file: root.join(file).display().to_string(), source })
            }
            None => Ok(superblock),
        }
    }

    /// Opens the store at `root`; whoever calls has its lock. `reserve` is how many bytes are kept back for
    /// metadata, see [`Reserve::over`].
    ///
    /// # Errors
    /// A store that is damaged as a whole, or newer. A damaged record is no error: it is in [`Store::damaged`].
    pub fn open(
        root: &Path,
        live: impl FnOnce(&Superblock) -> io::Result<Arc<dyn LiveStore>>,
        cache: Arc<BlockCache>,
        reserve: Option<u64>,
    ) -> Result<Self, StoreError> {
        Self::open_with(root, live, cache, reserve, Arc::new(OpenHere))
    }

    /// As [`Store::open`], with somebody else who opens the files of bases.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with(
        root: &Path,
        live: impl FnOnce(&Superblock) -> io::Result<Arc<dyn LiveStore>>,
        cache: Arc<BlockCache>,
        reserve: Option<u64>,
        sources: Arc<dyn Sources>,
    ) -> Result<Self, StoreError> {
        let object = format!("store {}", root.display());
        let medium = HostMedium::new(root).map_err(StoreError::io(object, "opening it"))?;
        Self::open_on(Arc::new(medium), live, cache, reserve, sources)
    }

    /// As [`Store::open_with`], on any medium.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_on(
        medium: Arc<dyn Medium>,
        live: impl FnOnce(&Superblock) -> io::Result<Arc<dyn LiveStore>>,
        cache: Arc<BlockCache>,
        reserve: Option<u64>,
        sources: Arc<dyn Sources>,
    ) -> Result<Self, StoreError> {
        let root = medium.root();
        let object = || format!("store {}", root.display());
        let superblock = open_superblock(&*medium)?;
        // A worker that died may have renamed a record and not made that durable. What is read here is acted on,
        // and told to clients whose request is sent again: it has to be what a power cut leaves.
        for dir in [".", "bases", "disks", "deltas"] {
            if !sabotaged(Sabotage::NamesNotSettled) {
                medium.sync_dir(dir).map_err(StoreError::io(object(), "syncing its directories"))?;
            }
        }
        let reserve =
            Reserve::over(medium, reserve).map_err(StoreError::io(object(), "keeping space back"))?;
        let reserve = Arc::new(reserve);
        let medium = reserve.clone();
        let live = live(&superblock).map_err(StoreError::io(object(), "memory for live maps"))?;
        let fail = || StoreError::io(object(), "reading the records");
        let (bases, mut damaged) =
            decode_all(&*medium, "bases", ".base", BaseRecord::decode, |r| r.id).map_err(fail())?;
        let (mut disks, bad) =
            decode_all(&*medium, "disks", ".disk", DiskRecord::decode, |r| r.id).map_err(fail())?;
        damaged.extend(bad);
        sweep(&*medium, &damaged);
        for (file, error) in &damaged {
            tracing::error!(file, %error, "a record is damaged; what it stands for is not served");
        }
        let reserved = Reserved::of(&*medium, &damaged);
        let mut names = Names::default();
        let recording = Recording::default();
        for record in bases {
            names.base_names.insert(record.name.clone(), record.id);
            let node = BaseNode::new(record, medium.clone(), cache.clone(), sources.clone());
            names.bases.insert(node.id(), Arc::new(node));
        }
        disks.sort_by_key(|d| d.name_seq);
        let last_seq = disks.last().map_or(0, |d| d.name_seq);
        for record in disks {
            let (id, name) = (record.id, record.name.clone());
            let base = record.backing.as_ref().and_then(|b| names.bases.get(&b.base).cloned());
            let node = Arc::new(DiskNode::new(record, base, medium.clone(), live.clone(), recording.clone()));
            names.disks.insert(id, node);
            // The highest number decides, also when that disk is unlinked by now.
            if let Some(loser) = names.disk_names.insert(name, id).and_then(|loser| names.disks.get(&loser))
                && !loser.is_unlinked()
            {
                // A crash came between the rename of one disk and the removal of the one it replaced.
                loser.update(|record| record.unlinked = true)?;
            }
        }
        let Names { disks, disk_names, .. } = &mut names;
        disk_names.retain(|_, id| disks.get(id).is_some_and(|d| !d.is_unlinked()));
        let next_id = superblock.next_id;
        Ok(Self {
            medium,
            reserve,
            live,
            cache,
            sources,
            superblock: Mutex::new(superblock),
            next_id: AtomicU64::new(next_id),
            next_seq: AtomicU64::new(last_seq.max(reserved.last_seq) + 1),
            change: Mutex::new(()),
            names: RwLock::new(names),
            damaged,
            reserved,
            recording,
        })
    }

    /// Records that could not be read, with the file's name.
    pub fn damaged(&self) -> &[(String, FormatError)] {
        &self.damaged
    }

    /// The memory cache.
    pub fn cache(&self) -> &BlockCache {
        &self.cache
    }

    /// Space of the filesystem that holds the store.
    pub fn space(&self) -> io::Result<Space> {
        self.medium.space()
    }

    /// The space kept back for metadata.
    pub fn reserve(&self) -> ReserveState {
        self.reserve.state()
    }

    /// Whether writes never wait, because the store lies in memory.
    pub fn never_waits(&self) -> bool {
        self.medium.never_waits()
    }

    fn new_id(&self) -> Result<u64, StoreError> {
        let mut superblock = self.superblock.lock();
        let id = self.next_id.load(Ordering::Relaxed);
        if id >= superblock.next_id {
            let mut next = superblock.clone();
            next.next_id = id + limit(ID_STEP, 2);
            if next.next_id > MAX_NUMBER {
                return Err(StoreError::invalid(
                    "store",
                    "its numbers are used up; move its disks to a new store",
                ));
            }
            if !sabotaged(Sabotage::NumbersNotReserved) {
                replace(&*self.medium, ".", SUPERBLOCK, &next.encode())
                    .map_err(StoreError::io("store", "reserving numbers"))?;
            }
            *superblock = next;
        }
        self.next_id.store(id + 1, Ordering::Relaxed);
        Ok(id)
    }

    /// A disk by name.
    pub fn disk(&self, name: &str) -> Result<Arc<DiskNode>, StoreError> {
        let names = self.names.read();
        names
            .disk_names
            .get(name)
            .and_then(|id| names.disks.get(id))
            .cloned()
            .ok_or_else(|| StoreError::NotFound { object: format!("disk {name}"), noun: "disk" })
    }

    /// A disk by number; also one that is unlinked.
    pub fn disk_by_id(&self, id: u64) -> Option<Arc<DiskNode>> {
        self.names.read().disks.get(&id).cloned()
    }

    /// A base by name.
    pub fn base(&self, name: &str) -> Result<Arc<BaseNode>, StoreError> {
        let names = self.names.read();
        names
            .base_names
            .get(name)
            .and_then(|id| names.bases.get(id))
            .cloned()
            .ok_or_else(|| StoreError::NotFound { object: format!("base {name}"), noun: "base" })
    }

    /// A base by number.
    pub fn base_by_id(&self, id: u64) -> Option<Arc<BaseNode>> {
        self.names.read().bases.get(&id).cloned()
    }

    /// All disks that have a name, by number, from `after` (exclusive) on.
    pub fn disks_after(&self, after: u64) -> Vec<Arc<DiskNode>> {
        let names = self.names.read();
        names.disks.range(after + 1..).map(|(_, d)| d).filter(|d| !d.is_unlinked()).cloned().collect()
    }

    /// All disks without a name, which live until their last close.
    pub fn unlinked(&self) -> Vec<Arc<DiskNode>> {
        self.names.read().disks.values().filter(|d| d.is_unlinked()).cloned().collect()
    }

    /// All bases, by number.
    pub fn bases(&self) -> Vec<Arc<BaseNode>> {
        self.names.read().bases.values().cloned().collect()
    }

    /// Names of the disks that need each base, by the base's number.
    pub fn users(&self) -> HashMap<u64, Vec<String>> {
        let mut out: HashMap<u64, Vec<String>> = HashMap::new();
        // A record's lock may be held through a sync: not taken under `names`.
        let disks: Vec<_> = self.names.read().disks.values().cloned().collect();
        for disk in disks {
            if let Some(base) = disk.base_id() {
                out.entry(base).or_default().push(disk.name());
            }
        }
        out
    }

    /// Forgets a base; the file it was registered from is not touched.
    ///
    /// # Errors
    /// `InUse` with the names of the disks that need it.
    pub fn remove_base(&self, name: &str) -> Result<(), StoreError> {
        let _change = self.change.lock();
        let base = self.base(name)?;
        let object = format!("base {name}");
        if let Some(mut users) = self.users().remove(&base.id()) {
            let more = users.len().saturating_sub(10);
            users.truncate(10);
            let mut users = format!("disk {}", users.join(", disk "));
            if more > 0 {
                users.push_str(&format!(" and {more} more"));
            }
            return Err(StoreError::InUse { object, users });
        }
        self.reserved.check_base_removal(name)?;
        let remove = || {
            self.medium.remove(&format!("bases/{}.base", base.id()))?;
            self.medium.sync_dir("bases")
        };
        remove().map_err(StoreError::io(object, "removing its record"))?;
        if let Some(Err(error)) = self.tracer().map(|tracer| tracer.remove(base.id())) {
            // The next start tries again.
            tracing::warn!(base = name, %error, "its trace cannot be removed");
        }
        let mut names = self.names.write();
        names.base_names.remove(name);
        names.bases.remove(&base.id());
        Ok(())
    }

    /// Makes disks, all or none, with one sync for all of them.
    ///
    /// # Errors
    /// A bad or taken name, an unknown base, a size that is 0, too large or smaller than the base.
    pub fn create_disks(&self, wanted: &[NewDisk]) -> Result<Vec<Arc<DiskNode>>, StoreError> {
        let _change = self.change.lock();
        let mut made = Vec::with_capacity(wanted.len());
        let mut taken = std::collections::HashSet::new();
        for new in wanted {
            check_name("disk", &new.name)?;
            self.reserved.check_disk_name(&new.name)?;
            let object = format!("disk {}", new.name);
            if !taken.insert(&new.name) || self.names.read().disk_names.contains_key(&new.name) {
                return Err(StoreError::Exists { object });
            }
            let base = new.base.as_deref().map(|b| self.base(b)).transpose()?;
            if let Some(base) = &base {
                base.attach()?;
            }
            let floor = base.as_ref().map_or(0, |b| b.record().size());
            let size = match new.size.or(base.as_ref().map(|b| b.record().size())) {
                Some(size) => size,
                None => return Err(StoreError::invalid(object, "a blank disk needs a size; give --size")),
            };
            if size < floor {
                return Err(StoreError::invalid(
                    object,
                    format!(
                        "the size {size} is smaller than its base, which has {floor} bytes; give at least that"
                    ),
                ));
            }
            if size > MAX_DISK_SIZE {
                return Err(StoreError::invalid(object, format!("the size {size} is above 64 TiB")));
            }
            made.push((new, base, size));
        }
        let mut nodes = Vec::with_capacity(made.len());
        let write = |nodes: &mut Vec<Arc<DiskNode>>| {
            for (new, base, size) in made {
                let now = sys::now_ns();
                let record = DiskRecord {
                    id: self.new_id()?,
                    name: new.name.clone(),
                    name_seq: self.next_seq.fetch_add(1, Ordering::Relaxed),
                    unlinked: false,
                    backing: base
                        .as_ref()
                        .map(|b| Backing { base: b.id(), identity: b.record().image.identity.clone() }),
                    size,
                    overlap: base.as_ref().map_or(0, |b| b.record().size()),
                    mode: new.mode & 0o7777,
                    uid: new.uid,
                    gid: new.gid,
                    created_ns: now,
                    changed_ns: now,
                    modified_ns: now,
                    map: MapRoot::default(),
                };
                let (id, object) = (record.id, format!("disk {}", new.name));
                let bytes = record.encode();
                let (medium, live) = (self.medium.clone(), self.live.clone());
                nodes.push(Arc::new(DiskNode::new(record, base, medium, live, self.recording.clone())));
                stage(&*self.medium, "disks", &format!("{id}.disk"), &bytes)
                    .map_err(StoreError::io(object, "writing its record"))?;
            }
            self.medium.sync_dir("disks").map_err(StoreError::io("new disks", "syncing their records"))
        };
        if let Err(error) = write(&mut nodes) {
            for node in nodes {
                let _ = self.medium.remove(&format!("disks/{}.disk", node.id()));
                let _ = self.medium.remove(&format!("disks/{}.disk.tmp", node.id()));
            }
            return Err(error);
        }
        let mut names = self.names.write();
        for node in &nodes {
            names.disk_names.insert(node.name(), node.id());
            names.disks.insert(node.id(), node.clone());
        }
        Ok(nodes)
    }

    /// Takes a disk's name away. Its contents live until [`Store::purge`].
    ///
    /// # Errors
    /// `NotFound`; what the storage says.
    pub fn unlink(&self, name: &str) -> Result<Arc<DiskNode>, StoreError> {
        let _change = self.change.lock();
        let node = self.disk(name)?;
        node.update(|record| record.unlinked = true)?;
        self.names.write().disk_names.remove(name);
        Ok(node)
    }

    /// Gives a disk another name; a disk that has the new name loses it and is returned.
    ///
    /// # Errors
    /// `NotFound`; a bad name; `Exists` when the new name may not be replaced.
    pub fn rename(&self, from: &str, to: &str, over: Replace) -> Result<Option<Arc<DiskNode>>, StoreError> {
        check_name("disk", to)?;
        self.reserved.check_disk_name(to)?;
        let _change = self.change.lock();
        let node = self.disk(from)?;
        let loser = self.disk(to).ok();
        if loser.is_some() && over == Replace::No {
            return Err(StoreError::Exists { object: format!("disk {to}") });
        }
        if from == to {
            return Ok(None);
        }
        let seq = self.next_seq.fetch_add(1, Ordering::Relaxed);
        // This one write is the commit: with the higher number the name is this disk's.
        node.update(|record| {
            record.name = to.into();
            record.name_seq = seq;
        })?;
        {
            let mut names = self.names.write();
            names.disk_names.remove(from);
            names.disk_names.insert(to.into(), node.id());
        }
        if let Some(loser) = &loser {
            loser.set_unlinked_in_memory();
            loser.update(|record| record.unlinked = true)?;
        }
        Ok(loser)
    }

    /// Removes what an unlinked disk has in the store. Nobody has it open any more.
    ///
    /// # Errors
    /// What the storage says; the next start of the daemon tries again.
    pub fn purge(&self, id: u64) -> Result<(), StoreError> {
        let _change = self.change.lock();
        let Some(node) = self.disk_by_id(id).filter(|d| d.is_unlinked()) else { return Ok(()) };
        let object = format!("removed disk {}", node.name());
        self.names.write().disks.remove(&id);
        node.retire();
        let purge = || {
            if sabotaged(Sabotage::RecordPurgedFirst) {
                self.medium.remove(&format!("disks/{id}.disk"))?;
                self.medium.sync_dir("disks")?;
            }
            // The record goes last: as long as it is there, the next start knows what to remove.
            Delta::purge(&*self.medium, &*self.live, id)?;
            match self.medium.remove(&format!("disks/{id}.disk")) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
                _ => self.medium.sync_dir("disks"),
            }
        };
        purge().map_err(StoreError::io(object, "removing its files"))
    }

    /// Flushes and closes every disk. The store is not used afterwards.
    ///
    /// # Errors
    /// The first disk that could not be closed; the others are closed.
    pub fn close(&self) -> Result<(), StoreError> {
        if let Some(tracer) = self.tracer() {
            tracer.close();
        }
        let disks: Vec<_> = self.names.read().disks.values().cloned().collect();
        let mut result = Ok(());
        for disk in disks {
            // Nobody can have it open any more. A worker may have died between its last close and its removal.
            let closed = if disk.is_unlinked() { self.purge(disk.id()) } else { disk.close() };
            if let Err(error) = closed {
                tracing::error!(%error, "closing a disk failed");
                result = result.and(Err(error));
            }
        }
        result
    }
}

/// Whether a rename may take a name from another disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// As rename(2).
    Yes,
    /// As with RENAME_NOREPLACE.
    No,
}
