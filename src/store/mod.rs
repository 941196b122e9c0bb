//! The catalogue of a store: which bases and disks there are, their records, and how they are attached.
//!
//! What must hold: a name change, a creation and a removal are durable when they return, each by one rename of one
//! record; of two records with one name the one with the higher `name_seq` has it (D14); numbers are never used twice.
//!
//! Locks, in order: claims of names and bases (`claims`; held through local syncs), a disk's `attach` and `opening`, the
//! replacement of a record, `superblock`, `names` and the record in memory (never held through a system call).

mod attached;
mod base;
mod change;
mod claims;
mod closing;
mod error;
mod node;
mod preload;
mod recording;
mod records;
mod register;
mod reserve;
#[cfg(test)]
mod tests;
mod unread;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::iter;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use attached::Attachments;
pub use attached::{IDLE, OPEN_IDLE};
pub use base::{BaseNode, Sources};
use claims::Claims;
pub use error::{StoreError, StoreErrorKind};
pub use node::{Attributes, DiskNode};
use node::{Ground, LiveLeft};
pub use preload::Preloaded;
use recording::Recording;
pub use records::open_superblock;
use records::{RecordKind, read_all};
pub use register::{NewBase, NewFile};
pub use reserve::{Reserve, ReserveState, with_reserve_of};
use unread::Missing;
pub use unread::UnreadRecord;

use crate::cache::BlockCache;
use crate::format::journal::{HEADER, MapHeader};
use crate::format::record::{BaseRecord, DiskRecord, Superblock};
use crate::format::{Kind, MAX_NUMBER, layout, valid_name};
use crate::io::{HostMedium, LiveStore, Medium, Open, Space, replace};
use crate::sabotage::{Sabotage, limit, sabotaged};
use crate::source::OpenHere;

/// Numbers taken from the superblock at once.
const ID_STEP: u64 = 4096;

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
    claims: Claims,
    names: RwLock<Names>,
    missing: Missing,
    recording: Recording,
    attachments: Arc<Attachments>,
    /// It is being closed.
    closing: AtomicBool,
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

impl Store {
    /// Reads the superblock, which has to be there.
    ///
    /// # Errors
    /// When there is none, or it is damaged or newer.
    pub fn superblock(root: &Path) -> Result<Superblock, StoreError> {
        let object = || format!("store {}", root.display());
        let medium = HostMedium::new(root).map_err(StoreError::io(object(), "opening it"))?;
        if medium.open(layout::SUPERBLOCK, Open::Existing).is_err() {
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
        let bases = read_all(&medium, RecordKind::Base, Default::default(), BaseRecord::decode, |r| r.id)
            .map_err(fail())?;
        let disks = read_all(&medium, RecordKind::Disk, Default::default(), DiskRecord::decode, |r| r.id)
            .map_err(fail())?;
        let mut damaged: Vec<_> = bases.damaged.into_iter().chain(disks.damaged).collect();
        let disks = disks.good;
        for disk in disks.iter().filter(|d| d.map.generation != 0) {
            let name = layout::map_path(disk.id, disk.map.generation);
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
        Self::open_prepared(root, live, cache, reserve, sources, Preloaded::default())
    }

    /// As [`Store::open_with`], by a worker that has read records before.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_prepared(
        root: &Path,
        live: impl FnOnce(&Superblock) -> io::Result<Arc<dyn LiveStore>>,
        cache: Arc<BlockCache>,
        reserve: Option<u64>,
        sources: Arc<dyn Sources>,
        known: Preloaded,
    ) -> Result<Self, StoreError> {
        let object = format!("store {}", root.display());
        let medium = HostMedium::new(root).map_err(StoreError::io(object, "opening it"))?;
        Self::open_knowing(Arc::new(medium), live, cache, reserve, sources, known)
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
        Self::open_knowing(medium, live, cache, reserve, sources, Preloaded::default())
    }

    fn open_knowing(
        medium: Arc<dyn Medium>,
        live: impl FnOnce(&Superblock) -> io::Result<Arc<dyn LiveStore>>,
        cache: Arc<BlockCache>,
        reserve: Option<u64>,
        sources: Arc<dyn Sources>,
        known: Preloaded,
    ) -> Result<Self, StoreError> {
        let root = medium.root();
        let object = || format!("store {}", root.display());
        let superblock = open_superblock(&*medium)?;
        // A worker that died may have renamed a record and not made that durable. What is read here is acted on,
        // and told to clients whose request is sent again: it has to be what a power cut leaves.
        for dir in iter::once(".").chain(layout::DIRS) {
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
        let bases =
            read_all(&*medium, RecordKind::Base, known.bases, BaseRecord::decode, |r| r.id).map_err(fail())?;
        let disks =
            read_all(&*medium, RecordKind::Disk, known.disks, DiskRecord::decode, |r| r.id).map_err(fail())?;
        let missing = Missing::default();
        for (file, error) in bases.damaged.into_iter().chain(disks.damaged) {
            missing.add_damaged(&*medium, &file, error);
        }
        let unread = |kind, list: Vec<(u64, io::Error)>| {
            list.iter().for_each(|(number, error)| missing.add_unread(kind, *number, error));
        };
        unread(RecordKind::Base, bases.unread);
        unread(RecordKind::Disk, disks.unread);
        records::sweep(&*medium, &missing.files());
        let (bases, mut disks) = (bases.good, disks.good);
        let mut names = Names::default();
        let recording = Recording::default();
        for record in bases {
            names.base_names.insert(record.name.clone(), record.id);
            let node = BaseNode::new(record, medium.clone(), cache.clone(), sources.clone());
            names.bases.insert(node.id(), Arc::new(node));
        }
        // Those whose live map has the word: all, when that cannot be said.
        let left = live.disks().inspect_err(|error| tracing::warn!(%error, "live maps cannot be listed"));
        let left = left.ok().map(|left| left.into_iter().collect::<HashSet<_>>());
        let ground = Ground {
            medium: medium.clone(),
            live: live.clone(),
            recording: recording.clone(),
            attachments: Arc::default(),
        };
        disks.sort_by_key(|d| d.name_seq);
        let last_seq = disks.last().map_or(0, |d| d.name_seq);
        for record in disks {
            let (id, name) = (record.id, record.name.clone());
            let base = record.backing.as_ref().and_then(|b| names.bases.get(&b.base).cloned());
            let has_live = left.as_ref().is_none_or(|left| left.contains(&id));
            let live_left = if has_live { LiveLeft::Yes } else { LiveLeft::No };
            let node = DiskNode::new(record, base, &ground, live_left);
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
            next_seq: AtomicU64::new(last_seq.max(missing.last_seq()) + 1),
            claims: Claims::default(),
            names: RwLock::new(names),
            missing,
            recording,
            attachments: ground.attachments,
            closing: AtomicBool::new(false),
        })
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
        self.new_ids(1)
    }

    /// The first of `count` numbers in a row.
    fn new_ids(&self, count: u64) -> Result<u64, StoreError> {
        let mut superblock = self.superblock.lock();
        let id = self.next_id.load(Ordering::Relaxed);
        if id + count > superblock.next_id {
            let mut next = superblock.clone();
            next.next_id = id + count.max(limit(ID_STEP, 2));
            if next.next_id > MAX_NUMBER {
                return Err(StoreError::invalid(
                    "store",
                    "its numbers are used up; move its disks to a new store",
                ));
            }
            if !sabotaged(Sabotage::NumbersNotReserved) {
                replace(&*self.medium, ".", layout::SUPERBLOCK, &next.encode())
                    .map_err(StoreError::io("store", "reserving numbers"))?;
            }
            *superblock = next;
        }
        self.next_id.store(id + count, Ordering::Relaxed);
        Ok(id)
    }

    fn disk_node(&self, record: DiskRecord, live_left: LiveLeft) -> Arc<DiskNode> {
        let base = record.backing.as_ref().and_then(|b| self.base_by_id(b.base));
        let ground = Ground {
            medium: self.medium.clone(),
            live: self.live.clone(),
            recording: self.recording.clone(),
            attachments: self.attachments.clone(),
        };
        DiskNode::new(record, base, &ground, live_left)
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
        let found = self.names.read().disks.get(&id).cloned();
        found.or_else(|| self.retry_disk(id))
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

    /// Whether [`Store::close`] has begun.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
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
