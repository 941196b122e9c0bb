//! The catalogue of a store: its bases and disks, their records, and how they are attached.
//!
//! What must hold: a creation, a change of a name and a removal are durable when they return, each by one rename of one
//! record. Of two records with one name, the one with the higher `name_seq` has the name (D14). Numbers are never
//! reused.
//!
//! Locks, in order: claims of names and bases (`claims`, held through local syncs); a disk's `attach`, then `opening`;
//! the replacement of a record; `superblock`; `names`, then the record in memory, then the index (none is held through a
//! system call).

mod attached;
mod base;
mod change;
mod children;
mod claims;
mod closing;
mod encryption;
mod error;
mod family;
mod images;
mod index;
mod known_names;
mod node;
pub mod pools;
mod preload;
mod quotas;
mod recording;
mod records;
mod register;
mod reserve;
mod rework;
mod sharing;
mod snapshots;
#[cfg(test)]
mod tests;
mod trash;
mod unread;
mod usage;

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
pub use children::{BaseChild, ChildKind, DiskChild};
use claims::Claims;
pub use error::{StoreError, StoreErrorKind};
pub use family::Origin;
use index::{Has, Index};
use known_names::NameList;
pub use node::{Attributes, DiskNode, Making, Secrets, Step};
use node::{InheritedLiveMap, NodeContext, SecretReader};
use pools::{HostPools, NoPools, OpenPools, Pools, Router};
pub use preload::PreloadedRecords;
use recording::Recording;
pub use records::open_superblock;
use records::{Identities, RecordKind, read_all};
pub use register::{NewBase, NewFile};
pub use reserve::{Reserve, ReserveState, with_reserve_of};
pub use rework::Change;
pub use sharing::{CopySource, Sharing};
use snapshots::Snapshots;
use trash::Trash;
pub use trash::{Removal, TrashedDisk};
use unread::UnavailableRecords;
pub use unread::UnreadRecord;
use usage::Usage;

use crate::cache::BlockCache;
use crate::format::journal::{HEADER, MapHeader};
use crate::format::limits::Limits;
use crate::format::pools::PoolEntry;
use crate::format::record::{BaseRecord, DiskRecord, Superblock};
use crate::format::{Kind, MAX_NUMBER, layout, valid_name};
use crate::io::{HostMedium, LiveStore, Medium, Open, Space, replace};
use crate::layers::Layers;
pub use crate::layers::MemorySums;
use crate::mutant::{Mutant, limit};
use crate::source::OpenHere;
use crate::stats::Registry;

/// Numbers that are reserved in the superblock at a time.
const ID_STEP: u64 = 4096;

/// An open store.
pub struct Store {
    medium: Arc<dyn Medium>,
    reserve: Arc<Reserve>,
    pools: Arc<Pools>,
    live: Arc<dyn LiveStore>,
    cache: Arc<BlockCache>,
    sources: Arc<dyn Sources>,
    superblock: Mutex<Superblock>,
    next_id: AtomicU64,
    next_seq: AtomicU64,
    claims: Claims,
    names: RwLock<Names>,
    unavailable: UnavailableRecords,
    name_list: Mutex<NameList>,
    recording: Recording,
    attachments: Arc<Attachments>,
    layers: Arc<Layers>,
    secrets: SecretReader,
    context: Arc<NodeContext>,
    /// Held while it is decided which layers nothing needs any more.
    dropping: Mutex<()>,
    snapshots: Snapshots,
    counted: Mutex<quotas::Counted>,
    trash: Trash,
    usage: Usage,
    disk_stats: Registry,
    base_stats: Registry,
    /// [`Store::close`] has begun.
    closing: AtomicBool,
}

#[derive(Default)]
struct Names {
    disks: BTreeMap<u64, Arc<DiskNode>>,
    bases: BTreeMap<u64, Arc<BaseNode>>,
    disk_names: HashMap<String, u64>,
    base_names: HashMap<String, u64>,
}

/// Disks that are listed, or taken from the list, at a time: every request of a guest looks its disk up in it.
const AT_A_TIME: usize = 256;

/// The properties of a new disk.
#[derive(Debug, Clone, Default)]
pub struct NewDisk {
    /// Name.
    pub name: String,
    /// Name of the base; `None` for a blank disk.
    pub base: Option<String>,
    /// Bytes. `None`: the size of the base.
    pub size: Option<u64>,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Limits.
    pub limits: Limits,
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
    /// Reads the superblock, which must exist.
    ///
    /// # Errors
    /// When it is missing, damaged, or of a newer version.
    pub fn superblock(root: &Path) -> Result<Superblock, StoreError> {
        let object = || format!("store {}", root.display());
        let medium = HostMedium::new(root).map_err(StoreError::io(object(), "opening it"))?;
        if medium.open(layout::SUPERBLOCK, Open::Existing).is_err() {
            return Err(StoreError::invalid(object(), "it has no superblock"));
        }
        open_superblock(&medium)
    }

    /// Reads the superblock and every record, and changes nothing. Another process may be serving the store.
    ///
    /// # Errors
    /// When a record is of a newer version.
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
        // Of a pool that cannot be opened now, the worker that serves says so.
        let entries = pools::read_list(&medium).unwrap_or_default();
        let opener = HostPools::default();
        let open = |entry: &PoolEntry| Some((entry.number, opener.open(entry, &superblock.uuid).ok()?));
        let media: HashMap<u64, Arc<dyn Medium>> = entries.iter().filter_map(open).collect();
        for disk in disks.iter().filter(|d| d.map.generation != 0) {
            let name = layout::map_path(disk.lineage.delta, disk.map.generation);
            let home = disk.features.pools.iter().find(|(delta, _)| *delta == disk.lineage.delta);
            let medium: &dyn Medium = match home.map(|(_, pool)| media.get(pool)) {
                None => &medium,
                Some(Some(medium)) => &**medium,
                Some(None) => continue,
            };
            // A missing map file was replaced or removed just now.
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

    /// Opens the store at `root`. The caller holds its lock. `reserve` is the number of bytes that are kept back for
    /// metadata, see [`Reserve::over`].
    ///
    /// # Errors
    /// When the superblock is damaged or the store is of a newer version. A damaged record is no error:
    /// [`Store::damaged`] has it.
    pub fn open(
        root: &Path,
        live: impl FnOnce(&Superblock) -> io::Result<Arc<dyn LiveStore>>,
        cache: Arc<BlockCache>,
        reserve: Option<u64>,
    ) -> Result<Self, StoreError> {
        Self::open_with(root, live, cache, reserve, Arc::new(OpenHere))
    }

    /// As [`Store::open`]; `sources` opens the files of bases.
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
        Self::open_prepared(root, live, cache, reserve, sources, PreloadedRecords::default())
    }

    /// As [`Store::open_with`], for a worker that has read records ahead.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_prepared(
        root: &Path,
        live: impl FnOnce(&Superblock) -> io::Result<Arc<dyn LiveStore>>,
        cache: Arc<BlockCache>,
        reserve: Option<u64>,
        sources: Arc<dyn Sources>,
        known: PreloadedRecords,
    ) -> Result<Self, StoreError> {
        Self::open_with_pools(root, live, cache, reserve, sources, (known, &HostPools::default()))
    }

    /// As [`Store::open_prepared`]; `opener` opens the directories of pools.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_with_pools(
        root: &Path,
        live: impl FnOnce(&Superblock) -> io::Result<Arc<dyn LiveStore>>,
        cache: Arc<BlockCache>,
        reserve: Option<u64>,
        sources: Arc<dyn Sources>,
        prepared: (PreloadedRecords, &dyn OpenPools),
    ) -> Result<Self, StoreError> {
        let object = format!("store {}", root.display());
        let medium = HostMedium::new(root).map_err(StoreError::io(object, "opening it"))?;
        Self::open_knowing(Arc::new(medium), live, cache, reserve, sources, prepared)
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
        Self::open_on_pools(medium, live, cache, reserve, sources, &NoPools)
    }

    /// As [`Store::open_on`]; `opener` opens the pools.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_on_pools(
        medium: Arc<dyn Medium>,
        live: impl FnOnce(&Superblock) -> io::Result<Arc<dyn LiveStore>>,
        cache: Arc<BlockCache>,
        reserve: Option<u64>,
        sources: Arc<dyn Sources>,
        opener: &dyn OpenPools,
    ) -> Result<Self, StoreError> {
        Self::open_knowing(medium, live, cache, reserve, sources, (PreloadedRecords::default(), opener))
    }

    fn open_knowing(
        medium: Arc<dyn Medium>,
        live: impl FnOnce(&Superblock) -> io::Result<Arc<dyn LiveStore>>,
        cache: Arc<BlockCache>,
        reserve: Option<u64>,
        sources: Arc<dyn Sources>,
        (known, opener): (PreloadedRecords, &dyn OpenPools),
    ) -> Result<Self, StoreError> {
        let root = medium.root();
        let object = || format!("store {}", root.display());
        let superblock = open_superblock(&*medium)?;
        // A worker that died may have renamed a record without making that durable. This worker acts on the records,
        // and answers resent requests by them, so a power cut must leave what is read here.
        for dir in iter::once(".").chain(layout::DIRS) {
            if !Mutant::NamesNotSynced.is_active() {
                medium.sync_dir(dir).map_err(StoreError::io(object(), "syncing its directories"))?;
            }
        }
        let wanted = reserve;
        let reserve =
            Reserve::over(medium, wanted).map_err(StoreError::io(object(), "keeping space back"))?;
        let reserve = Arc::new(reserve);
        let pools = Pools::open(reserve.clone(), &superblock.uuid, opener, wanted);
        let medium: Arc<dyn Medium> = Arc::new(Router(pools.clone()));
        let live = live(&superblock).map_err(StoreError::io(object(), "opening the memory of live maps"))?;
        let fail = || StoreError::io(object(), "reading the records");
        let bases =
            read_all(&*medium, RecordKind::Base, known.bases, BaseRecord::decode, |r| r.id).map_err(fail())?;
        let identities = Identities::default();
        let decode = |bytes: &[u8]| identities.decode(bytes);
        let disks = read_all(&*medium, RecordKind::Disk, known.disks, decode, |r| r.id).map_err(fail())?;
        let unavailable = UnavailableRecords::default();
        for (file, error) in bases.damaged.into_iter().chain(disks.damaged) {
            unavailable.add_damaged(&*medium, &file, error);
        }
        let unread = bases.unread.into_iter().map(|(number, error)| (RecordKind::Base, number, error));
        let disks_unread = disks.unread.into_iter().map(|(number, error)| (RecordKind::Disk, number, error));
        let unread: Vec<_> = unread.chain(disks_unread).collect();
        let numbers: Vec<_> = unread.iter().map(|(kind, number, _)| (*kind, *number)).collect();
        let mut known = known_names::find(&*medium, &numbers);
        for (kind, number, error) in &unread {
            unavailable.add_unread(*kind, *number, error, known.remove(&(*kind, *number)));
        }
        let unfinished = [bases.unfinished, disks.unfinished].concat();
        records::remove_unfinished(&*medium, unfinished, &unavailable.files());
        let usage = Usage::read(&*medium);
        let (bases, disks) = (bases.good, disks.good);
        let mut names = Names::default();
        let recording = Recording::default();
        let (disk_stats, base_stats) = (Registry::default(), Registry::default());
        for record in bases {
            names.base_names.insert(record.name.clone(), record.id);
            let node =
                BaseNode::new(record, medium.clone(), cache.clone(), sources.clone(), base_stats.clone());
            names.bases.insert(node.id(), Arc::new(node));
        }
        // The disks whose live map is authoritative: all, when live maps cannot be listed.
        let left = live.disks().inspect_err(
            |error| tracing::warn!(%error, "live maps cannot be listed; each disk is checked for one"),
        );
        let left = left.ok().map(|left| left.into_iter().collect::<HashSet<_>>());
        let context = Arc::new(NodeContext {
            medium: medium.clone(),
            live: live.clone(),
            recording: recording.clone(),
            attachments: Arc::default(),
            layers: Arc::default(),
            pools: pools.clone(),
            secrets: Arc::default(),
            stats: disk_stats.clone(),
            index: Index::default(),
        });
        disks.iter().for_each(|record| pools.learn(record));
        let all = disks.iter().flat_map(|record| record.lineage.deltas());
        let is_left = |delta: &u64| left.as_ref().is_none_or(|left| left.contains(delta));
        pools.give_up_live_maps(&*live, all.filter(is_left));
        // The places are sorted, and not the records, which are large.
        let mut order: Vec<usize> = (0..disks.len()).collect();
        order.sort_by_key(|place| disks[*place].name_seq);
        let last_seq = order.last().map_or(0, |place| disks[*place].name_seq);
        names.disk_names.reserve(disks.len());
        let mut disks: Vec<Option<DiskRecord>> = disks.into_iter().map(Some).collect();
        for record in order.into_iter().filter_map(|place| disks[place].take()) {
            let (id, name) = (record.id, record.name.clone());
            let base = record.backing.as_ref().and_then(|b| names.bases.get(&b.base).cloned());
            let has_live =
                left.as_ref().is_none_or(|left| record.lineage.deltas().any(|n| left.contains(&n)));
            for layer in record.lineage.layers.iter().filter(|layer| !layer.is_pending() && has_live) {
                // The worker died before it removed the live map, of which the map file has everything.
                live.remove(layer.number).map_err(StoreError::io(object(), "removing a live map"))?;
            }
            let inherited_live_map = if has_live { InheritedLiveMap::Yes } else { InheritedLiveMap::No };
            let node = DiskNode::new(record, base, &context, inherited_live_map);
            node.note_in_index();
            names.disks.insert(id, node);
            // The highest `name_seq` decides, even if that disk is unlinked by now.
            if let Some(loser) = names.disk_names.insert(name, id).and_then(|loser| names.disks.get(&loser))
                && !loser.is_unlinked()
            {
                // A crash came between the rename of one disk and the unlinking of the disk that it replaced.
                loser.update(|record| record.unlinked = true)?;
            }
        }
        let Names { disks, disk_names, .. } = &mut names;
        for unlinked in context.index.numbers(Has::NoName).iter().filter_map(|number| disks.get(number)) {
            let name = unlinked.name();
            if disk_names.get(&name) == Some(&unlinked.id()) {
                disk_names.remove(&name);
            }
        }
        let next_id = superblock.next_id;
        let store = Self {
            medium,
            reserve,
            pools,
            live,
            cache,
            sources,
            superblock: Mutex::new(superblock),
            next_id: AtomicU64::new(next_id),
            next_seq: AtomicU64::new(last_seq.max(unavailable.last_seq()) + 1),
            claims: Claims::default(),
            names: RwLock::new(names),
            unavailable,
            name_list: Mutex::default(),
            recording,
            attachments: context.attachments.clone(),
            layers: context.layers.clone(),
            secrets: context.secrets.clone(),
            context,
            dropping: Mutex::new(()),
            snapshots: Snapshots::default(),
            counted: Mutex::default(),
            trash: Trash::default(),
            usage,
            disk_stats,
            base_stats,
            closing: AtomicBool::new(false),
        };
        store.count_quotas();
        Ok(store)
    }

    /// The memory cache.
    pub fn cache(&self) -> &BlockCache {
        &self.cache
    }

    /// The memory of the indexes of layers.
    pub fn index_memory(&self) -> MemorySums {
        self.layers.memory()
    }

    /// The counters of the disks.
    pub fn disk_stats(&self) -> &Registry {
        &self.disk_stats
    }

    /// The counters of the bases.
    pub fn base_stats(&self) -> &Registry {
        &self.base_stats
    }

    /// Space of the filesystem that holds the store.
    pub fn space(&self) -> io::Result<Space> {
        self.medium.space()
    }

    /// The space kept back for metadata.
    pub fn reserve(&self) -> ReserveState {
        self.reserve.state()
    }

    /// Whether the store is in memory, so that writes never wait.
    pub fn never_waits(&self) -> bool {
        self.pools.never_wait()
    }

    /// A number that nothing in the store has or had.
    ///
    /// # Errors
    /// Errors of the storage.
    pub fn new_number(&self) -> Result<u64, StoreError> {
        self.new_id()
    }

    fn new_id(&self) -> Result<u64, StoreError> {
        self.new_ids(1)
    }

    /// Takes `count` consecutive numbers, and returns the first.
    fn new_ids(&self, count: u64) -> Result<u64, StoreError> {
        let mut superblock = self.superblock.lock();
        let id = self.next_id.load(Ordering::Relaxed);
        if id + count > superblock.next_id {
            let mut next = superblock.clone();
            next.next_id = id + count.max(limit(ID_STEP, 2));
            if next.next_id > MAX_NUMBER {
                return Err(StoreError::invalid(
                    "store",
                    "its disk numbers are used up; move its disks to a new store",
                ));
            }
            if !Mutant::DiskNumberNotReserved.is_active() {
                replace(&*self.medium, ".", layout::SUPERBLOCK, &next.encode())
                    .map_err(StoreError::io("store", "reserving numbers"))?;
            }
            *superblock = next;
        }
        self.next_id.store(id + count, Ordering::Relaxed);
        Ok(id)
    }

    fn disk_node(&self, record: DiskRecord, inherited_live_map: InheritedLiveMap) -> Arc<DiskNode> {
        let base = record.backing.as_ref().and_then(|b| self.base_by_id(b.base));
        DiskNode::new(record, base, &self.context, inherited_live_map)
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

    /// A disk by number, also an unlinked one.
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

    /// All linked disks with a number above `after`, by number. Lookups and changes go on in between.
    pub fn disks_after(&self, after: u64) -> Vec<Arc<DiskNode>> {
        let mut all: Vec<Arc<DiskNode>> = Vec::new();
        loop {
            let part = self.next_disks(all.last().map_or(after, |disk| disk.id()));
            if part.is_empty() {
                return all;
            }
            all.extend(part);
        }
    }

    /// All disks by number, those without a name too. Lookups and changes go on in between.
    fn all_disks(&self) -> Vec<Arc<DiskNode>> {
        let mut all: Vec<Arc<DiskNode>> = Vec::new();
        loop {
            let names = self.names.read();
            let before = all.len();
            let from = all.last().map_or(0, |disk| disk.id() + 1);
            all.extend(names.disks.range(from..).map(|(_, disk)| disk).take(AT_A_TIME).cloned());
            if all.len() == before {
                return all;
            }
        }
    }

    /// Some of the linked disks with a number above `after`, by number: the next ones. None when there are no more.
    pub fn next_disks(&self, after: u64) -> Vec<Arc<DiskNode>> {
        let names = self.names.read();
        let linked = names.disks.range(after + 1..).map(|(_, d)| d).filter(|d| !d.is_unlinked());
        linked.take(AT_A_TIME).cloned().collect()
    }

    /// All unlinked disks that live until their last close: those that are not in the trash.
    pub fn unlinked(&self) -> Vec<Arc<DiskNode>> {
        let is_to_go = |disk: &Arc<DiskNode>| disk.is_unlinked() && disk.trashed().is_none();
        self.disks_with(Has::NoName).into_iter().filter(is_to_go).collect()
    }

    /// All bases, by number.
    pub fn bases(&self) -> Vec<Arc<BaseNode>> {
        self.names.read().bases.values().cloned().collect()
    }

    /// The disks on each base, by the base's number, as messages name them. A disk in the trash is one.
    pub fn users(&self) -> HashMap<u64, Vec<String>> {
        let mut out: HashMap<u64, Vec<String>> = HashMap::new();
        // A record's lock may be held through a sync, so it is not taken under `names`.
        let disks = self.all_disks();
        for disk in disks {
            for base in disk.bases() {
                out.entry(base).or_default().push(disk.described());
            }
        }
        out
    }

    /// Whether [`Store::close`] has begun.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }
}

/// Whether a rename may replace a disk that has the new name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    /// As rename(2).
    Yes,
    /// As with RENAME_NOREPLACE.
    No,
}
