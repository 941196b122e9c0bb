//! A disk of the store: its record, and the attached disk while it is in use.

mod adopting;
mod backoff;
mod family;
mod keys;
mod limits;
mod record;
mod rework;
mod sealing;
mod survey;
mod trash;

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use parking_lot::{Mutex, RwLock};

pub(super) use adopting::NewGround;
use backoff::Backoff;
use keys::Keyring;
pub use keys::Secrets;
pub(super) use keys::{NewEncryption, SecretReader};
use record::{DeltaRoots, RecordWriter, removed};
pub(super) use rework::NextBase;
pub use rework::{Making, Step};
pub(super) use sealing::Moment;

use super::attached::Attachments;
use super::pools::Pools;
use super::recording::Recording;
use super::{BaseNode, StoreError};
use crate::delta::{Delta, DeltaIo, DeltaSpec};
use crate::disk::{Disk, DiskError};
use crate::format::layout;
use crate::format::lineage::{LayerEntry, Lineage};
use crate::format::record::{DiskRecord, Request};
use crate::io::{LiveStore, Medium, Open, sys};
use crate::layers::Layers;
use crate::limits::Limiter;
use crate::stats::{Counters, Registry};
use crate::trace::Tap;

/// One disk of a store.
pub struct DiskNode {
    id: u64,
    writer: Arc<RecordWriter>,
    /// Empty when the disk has no base, and while the base's record cannot be read.
    base: RwLock<Option<Arc<BaseNode>>>,
    medium: Arc<dyn Medium>,
    live: Arc<dyn LiveStore>,
    layers: Arc<Layers>,
    pools: Arc<Pools>,
    keyring: Keyring,
    /// Held while the delta is sealed, and while layers are dropped.
    sealing: Mutex<()>,
    /// Of a sealing that fails.
    sealing_retry: Backoff,
    /// Of a sync of what was carried.
    pub(super) settling_retry: Backoff,
    /// Of the removal of what is dropped.
    pub(super) removal_retry: Backoff,
    /// Sealed deltas whose live maps running requests may still use.
    retiring: Mutex<Vec<Arc<Delta>>>,
    /// Whether the files of the layer that is being made may be written.
    making: Mutex<Option<rework::Alive>>,
    /// What the slot had before rollbacks. Running requests may still read it.
    rolled_back: Mutex<Vec<Weak<Disk>>>,
    attach: Mutex<()>,
    /// Held while the disk's files are opened, but not while its base is: the removal of a disk must not wait for the
    /// base.
    opening: Mutex<()>,
    /// Held while the disk's files are removed.
    pub(super) purging: Mutex<()>,
    /// Never held through a system call.
    disk: RwLock<Option<Arc<Disk>>>,
    /// An earlier worker left a live map, which is authoritative.
    inherited_live_map: AtomicBool,
    /// Result of stat(2) while the disk is detached, once a caller asked.
    detached_stat: Mutex<Option<DetachedStat>>,
    /// Why the last attach failed.
    failure: Mutex<Option<String>>,
    /// Time of the last use, by the clock of `attachments`.
    used: AtomicU64,
    /// Number of handles that this worker has opened.
    opened: AtomicUsize,
    /// An earlier worker may have opened handles.
    inherited: AtomicBool,
    attachments: Arc<Attachments>,
    me: Weak<DiskNode>,
    /// The tracer knows the disk; it is told once.
    traced: AtomicBool,
    unlinked: AtomicBool,
    recording: Recording,
    tap: Arc<Tap>,
    /// Made at the first request: most disks of a large store are not in use.
    counters: OnceLock<Arc<Counters>>,
    stats: Registry,
    limiter: Limiter,
    /// Held while limits change.
    limiting: Mutex<()>,
}

/// The attributes of a disk for stat(2).
#[derive(Debug, Clone)]
pub struct Attributes {
    /// Bytes.
    pub size: u64,
    /// Bytes that the disk takes in the store.
    pub allocated: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Nanoseconds since the epoch.
    pub created_ns: i64,
    /// Last change of the attributes.
    pub changed_ns: i64,
    /// Last change of the contents.
    pub modified_ns: i64,
    /// Whether the disk has a name.
    pub linked: bool,
}

/// Whether an earlier worker left a live map of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InheritedLiveMap {
    Yes,
    No,
}

/// Size and space of a detached disk, from its files.
#[derive(Debug, Clone, Copy)]
struct DetachedStat {
    size: u64,
    allocated: u64,
}

/// What all disks of a store share.
#[derive(Clone)]
pub(super) struct NodeContext {
    pub medium: Arc<dyn Medium>,
    pub live: Arc<dyn LiveStore>,
    pub recording: Recording,
    pub attachments: Arc<Attachments>,
    pub layers: Arc<Layers>,
    pub pools: Arc<Pools>,
    pub secrets: SecretReader,
    pub stats: Registry,
}

impl DiskNode {
    /// `inherited_live_map`: whether an earlier worker left a live map of the disk.
    pub(super) fn new(
        record: DiskRecord,
        base: Option<Arc<BaseNode>>,
        context: &NodeContext,
        inherited_live_map: InheritedLiveMap,
    ) -> Arc<Self> {
        let id = record.id;
        let NodeContext { medium, live, recording, attachments, layers, pools, secrets, stats } =
            context.clone();
        pools.learn(&record);
        let inherited_live_map = inherited_live_map == InheritedLiveMap::Yes;
        Arc::new_cyclic(|me| Self {
            id,
            unlinked: AtomicBool::new(record.unlinked),
            limiter: Limiter::of(&record.features.limits),
            limiting: Mutex::new(()),
            writer: Arc::new(RecordWriter::new(medium.clone(), record, pools.clone())),
            base: RwLock::new(base),
            medium,
            live,
            layers,
            pools,
            keyring: Keyring::new(secrets),
            sealing: Mutex::new(()),
            sealing_retry: Backoff::default(),
            settling_retry: Backoff::default(),
            removal_retry: Backoff::default(),
            retiring: Mutex::default(),
            making: Mutex::default(),
            rolled_back: Mutex::default(),
            attach: Mutex::new(()),
            opening: Mutex::new(()),
            purging: Mutex::new(()),
            disk: RwLock::new(None),
            inherited_live_map: AtomicBool::new(inherited_live_map),
            detached_stat: Mutex::new(None),
            failure: Mutex::new(None),
            used: AtomicU64::new(0),
            opened: AtomicUsize::new(0),
            inherited: AtomicBool::new(inherited_live_map),
            attachments,
            me: me.clone(),
            traced: AtomicBool::new(false),
            tap: Arc::new(Tap::new(id)),
            recording,
            counters: OnceLock::new(),
            stats,
        })
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its name, or the last one it had.
    pub fn name(&self) -> String {
        self.writer.record.lock().name.clone()
    }

    /// Its position in the order of names.
    pub(super) fn name_seq(&self) -> u64 {
        self.writer.record.lock().name_seq
    }

    /// Whether `request` was the last one that created, named or unlinked the disk.
    pub(super) fn was_changed_by(&self, request: Option<Request>) -> bool {
        request.is_some() && self.writer.record.lock().request == request
    }

    /// The bytes of its record.
    pub(super) fn encode(&self) -> Vec<u8> {
        self.writer.record.lock().encode()
    }

    /// Sets the base, whose record can be read at last.
    pub(super) fn found_base(&self, base: &Arc<BaseNode>) {
        if self.base_id() == Some(base.id()) {
            self.base.write().get_or_insert_with(|| base.clone());
        }
    }

    /// Its base's number.
    pub fn base_id(&self) -> Option<u64> {
        self.writer.record.lock().backing.as_ref().map(|backing| backing.base)
    }

    /// Its base's name, when the base's record could be read.
    pub fn base_name(&self) -> Option<String> {
        self.base().map(|base| base.record().name.clone())
    }

    /// Whether the disk is unlinked.
    pub fn is_unlinked(&self) -> bool {
        self.unlinked.load(Ordering::Acquire)
    }

    /// Closes the disk's files before their removal, so that their space is freed. From here on no file of the disk is
    /// created, not even by a caller that found the disk by its name before.
    pub(super) fn retire(&self) {
        let _sealing = self.sealing.lock();
        let _opening = self.opening.lock();
        {
            let _replacing = self.writer.replacing.lock();
            self.writer.retired.store(true, Ordering::Release);
        }
        if let Some(disk) = self.disk.write().take() {
            disk.below().pending.iter().for_each(|delta| delta.retire());
            disk.delta().retire();
        }
        self.end_making();
        self.attachments.remove(self.id);
    }

    pub(super) fn set_unlinked_in_memory(&self) {
        self.unlinked.store(true, Ordering::Release);
    }

    /// Runs a call that changes the disk. When the delta is sealed meanwhile, the call runs again, with the new one.
    ///
    /// # Errors
    /// As [`DiskNode::attach`]; the inner ones are those of the call.
    pub fn change<T>(
        &self,
        call: impl Fn(&Disk) -> Result<T, DiskError>,
    ) -> Result<Result<T, DiskError>, StoreError> {
        loop {
            match call(&*self.attach()?) {
                Err(DiskError::Sealed) => {}
                done => return Ok(done),
            }
        }
    }

    /// Changes the record, durably.
    ///
    /// # Errors
    /// Errors of the storage; nothing has changed then.
    pub fn update(&self, change: impl FnOnce(&mut DiskRecord)) -> Result<(), StoreError> {
        let object = format!("disk {}", self.name());
        let stamped = |record: &mut DiskRecord| {
            change(record);
            record.changed_ns = sys::now_ns();
        };
        self.writer.update(stamped).map_err(StoreError::io(object, "writing its record"))?;
        let record = self.writer.record.lock();
        // Under the lock: a restored disk has its name again.
        self.unlinked.fetch_or(record.unlinked, Ordering::AcqRel);
        Ok(())
    }

    /// Its record.
    pub(super) fn record(&self) -> DiskRecord {
        self.writer.record.lock().clone()
    }

    /// Its base, when the base's record could be read.
    pub(super) fn base(&self) -> Option<Arc<BaseNode>> {
        self.base.read().clone()
    }

    /// Whether its files are being removed, or are gone.
    pub(super) fn is_retired(&self) -> bool {
        self.writer.retired.load(Ordering::Acquire)
    }

    /// Generation of the map file of one of its deltas.
    pub(super) fn generation(&self, delta: u64) -> u64 {
        let record = self.writer.record.lock();
        record.lineage.layer_or_made(delta).map_or(record.map.generation, |layer| layer.map.generation)
    }

    /// Whether the map file that the record names for one of its deltas is sound. Reads all of it, unless the disk is
    /// attached. Writes nothing: a new map file would take the number of a stray.
    pub(super) fn has_sound_map(&self, delta: u64) -> bool {
        if self.peek().is_some() {
            return true;
        }
        let record = self.writer.record.lock().clone();
        let layer = record.lineage.layer_or_made(delta);
        let spec =
            layer.map_or_else(|| Self::spec(&record), |layer| Self::layer_spec(&record.lineage, layer));
        Delta::check_files(&spec, &*self.pools.medium(delta)).is_ok()
    }

    /// The tap that records reads of the base.
    pub(super) fn tap(&self) -> &Arc<Tap> {
        &self.tap
    }

    /// Its counters.
    pub fn counters(&self) -> &Arc<Counters> {
        self.counters.get_or_init(|| Arc::new(self.stats.add(self.id)))
    }

    /// The attached disk, if any. Does not wait. Counts as a use.
    pub fn attached(&self) -> Option<Arc<Disk>> {
        let disk = self.peek();
        if disk.is_some() {
            self.touch();
        }
        disk
    }

    /// As [`DiskNode::attached`], without counting as a use.
    pub fn peek(&self) -> Option<Arc<Disk>> {
        self.disk.read().clone()
    }

    fn touch(&self) {
        let now = self.attachments.now();
        // Avoids a write by each request of several threads.
        if self.used.load(Ordering::Relaxed) != now {
            self.used.store(now, Ordering::Relaxed);
        }
    }

    /// Time of the last use.
    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Notes that a client opened the disk.
    pub fn opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that a client closed the disk. The client may have opened it under an earlier worker.
    pub fn closed(&self) {
        let less = |opened: usize| opened.checked_sub(1);
        let _ = self.opened.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// How many handles clients have open; `None` when an earlier worker may have opened some.
    pub fn open_handles(&self) -> Option<usize> {
        (!self.inherited.load(Ordering::Relaxed)).then(|| self.opened.load(Ordering::Relaxed))
    }

    /// Whether no client has the disk open. False when an earlier worker may have opened handles.
    pub(super) fn is_known_closed(&self) -> bool {
        self.open_handles() == Some(0)
    }

    /// Attaches the disk unless it is attached. A caller that holds the result prevents a detach.
    ///
    /// # Errors
    /// When the base changed or is missing, or the map is damaged. The error names it, and nothing is served.
    pub fn attach(&self) -> Result<Arc<Disk>, StoreError> {
        if let Some(disk) = self.attached() {
            return Ok(disk);
        }
        self.attachments.make_room();
        let _attach = self.attach.lock();
        if let Some(disk) = self.attached() {
            return Ok(disk);
        }
        let attached = self.attach_alone();
        *self.failure.lock() = attached.as_ref().err().map(ToString::to_string);
        attached
    }

    fn attach_alone(&self) -> Result<Arc<Disk>, StoreError> {
        let record = self.writer.record.lock().clone();
        let object = format!("disk {}", record.name);
        self.check_base(&record)?;
        self.check_pools(&record)?;
        let base = self.base().map(|base| base.attach()).transpose()?;
        // The secret's file or command may hang, as the base's file may.
        self.unlock()?;
        let _opening = self.opening.lock();
        if self.writer.retired.load(Ordering::Acquire) {
            return Err(StoreError::io(object, "attaching it")(removed()));
        }
        // Read again: no other thread opens the files now.
        let record = self.writer.record.lock().clone();
        let disk = Arc::new(self.open_disk(&record, base)?.with_tap(self.tap.clone()));
        self.touch();
        *self.disk.write() = Some(disk.clone());
        *self.detached_stat.lock() = None;
        self.inherited_live_map.store(false, Ordering::Release);
        self.attachments.add(self.id, self.me.clone());
        if let (Some(tracer), Some(base)) = (self.recording.get(), self.base())
            && !self.traced.swap(true, Ordering::AcqRel)
        {
            let written = record.map.generation != 0 || disk.allocated().is_ok_and(|bytes| bytes > 0);
            tracer.attached(&self.tap, written, &base.subject());
        }
        Ok(disk)
    }

    /// Checks that the pools of the delta and of the layers below it can be used.
    fn check_pools(&self, record: &DiskRecord) -> Result<(), StoreError> {
        let below = record.lineage.chain(record.lineage.below).map(|layer| layer.number);
        match self.pools.trouble_of(std::iter::once(record.lineage.delta).chain(below)) {
            None => Ok(()),
            Some(why) => Err(StoreError::PoolGone { object: format!("disk {}", record.name), why }),
        }
    }

    /// Checks that the base is the one on which the disk was created. Compares records only.
    fn check_base(&self, record: &DiskRecord) -> Result<(), StoreError> {
        let object = || format!("disk {}", record.name);
        match (&record.backing, self.base()) {
            (None, _) => Ok(()),
            (Some(backing), Some(base)) if base.record().image.identity == backing.identity => Ok(()),
            (Some(_), Some(base)) => Err(StoreError::BaseChanged {
                object: object(),
                why: format!("it was made on another version of base {}", base.record().name),
            }),
            (Some(backing), None) => Err(StoreError::BaseChanged {
                object: object(),
                why: format!(
                    "the record of its base, number {}, is missing or damaged; restore {}",
                    backing.base,
                    layout::base_path(backing.base)
                ),
            }),
        }
    }

    /// Flushes the disk, closes its files and frees its live map, unless it is in use or a flush has failed. Waits for
    /// local storage, never for another attach or detach. Returns whether the disk is detached.
    pub(super) fn detach(&self) -> bool {
        let Some(_attach) = self.attach.try_lock() else { return false };
        // What is about to be removed is neither sealed nor flushed for this.
        if self.is_unlinked() && self.trashed().is_none() {
            return false;
        }
        // A sealing that an earlier worker began goes on first.
        self.tend_layers(Instant::now());
        let Some(disk) = self.peek() else { return true };
        // Only the live map knows which handles were opened before a failure and are refused (D48).
        if disk.delta().error_epoch() != 0 {
            return false;
        }
        if !disk.below().pending.is_empty() || !self.retire_layers() {
            return false;
        }
        // The long part runs while the disk is served.
        if disk.delta().flush().is_err() {
            return false;
        }
        let Some(_opening) = self.opening.try_lock() else { return false };
        {
            let mut slot = self.disk.write();
            // One reference in the slot, and one here.
            if Arc::strong_count(&disk) > 2 || self.writer.retired.load(Ordering::Acquire) {
                return false;
            }
            *slot = None;
        }
        if let Err(error) = disk.delta().close() {
            tracing::warn!(disk = self.name(), %error, "an idle disk cannot be closed; it stays attached");
            *self.disk.write() = Some(disk);
            return false;
        }
        let detached_stat =
            disk.allocated().ok().map(|allocated| DetachedStat { size: disk.size(), allocated });
        *self.detached_stat.lock() = detached_stat;
        self.inherited.store(false, Ordering::Relaxed);
        self.attachments.remove(self.id);
        true
    }

    /// Size and space of a detached disk, from its record and files; `None` when that needs an attach.
    fn stat_detached(&self, record: &DiskRecord) -> Option<DetachedStat> {
        if self.inherited_live_map.load(Ordering::Acquire) {
            return None;
        }
        if let Some(detached_stat) = *self.detached_stat.lock() {
            return Some(detached_stat);
        }
        // The files do not change while the disk is not attached.
        let _attach = self.attach.try_lock()?;
        if self.peek().is_some() {
            return None;
        }
        if record.lineage.layers.iter().any(LayerEntry::is_pending) {
            return None;
        }
        let delta = record.lineage.delta;
        let mut allocated = self.medium.allocated(&layout::data_path(delta)).ok()?.unwrap_or(0);
        if record.map.generation != 0 {
            if !record.size_is_current {
                return None;
            }
            let map = layout::map_path(delta, record.map.generation);
            let file = self.medium.open(&map, Open::Existing).ok()?;
            // A later map record may have another size, and attaching reports a damaged one.
            let mut next = [0; 8];
            let got = file.read_at(&mut next, record.map.floor).ok()?;
            if file.len().ok()? < record.map.floor || next[..got].iter().any(|byte| *byte != 0) {
                return None;
            }
            allocated += file.allocated().ok()?;
        }
        let detached_stat = DetachedStat { size: record.size, allocated };
        *self.detached_stat.lock() = Some(detached_stat);
        Some(detached_stat)
    }

    fn spec(record: &DiskRecord) -> DeltaSpec {
        DeltaSpec {
            disk: record.lineage.delta,
            size: record.size,
            overlap: record.overlap,
            rises: record.lineage.rises,
            modified_ns: record.modified_ns,
            root: record.map,
        }
    }

    fn layer_spec(lineage: &Lineage, layer: &LayerEntry) -> DeltaSpec {
        DeltaSpec {
            disk: layer.number,
            size: layer.size,
            overlap: layer.overlap,
            rises: lineage.rises,
            modified_ns: layer.modified_ns,
            root: layer.map,
        }
    }

    /// Opens one of its deltas for writing.
    fn open_delta(&self, spec: DeltaSpec) -> Result<Arc<Delta>, StoreError> {
        let delta = self.open_uncounted(spec)?;
        delta.charge_to(&self.limiter.quota);
        Ok(delta)
    }

    /// As [`DiskNode::open_delta`]. What is written there counts against no quota.
    fn open_uncounted(&self, spec: DeltaSpec) -> Result<Arc<Delta>, StoreError> {
        let roots = DeltaRoots { writer: self.writer.clone(), delta: spec.disk, overlap: spec.overlap };
        let medium = self.pools.medium(spec.disk);
        let delta_io = DeltaIo { medium, live: self.live.clone(), roots: Arc::new(roots) };
        let cipher = self.cipher(&self.writer.record.lock(), spec.disk);
        Delta::open_with(spec, delta_io, cipher).map(Arc::new).map_err(|error| self.failed(error))
    }

    fn failed(&self, error: impl Into<DiskError>) -> StoreError {
        StoreError::Disk { object: format!("disk {}", self.name()), source: error.into() }
    }

    /// The attributes for stat(2). Attaches the disk only if its record and the lengths of its files do not suffice.
    pub fn attributes(&self) -> Attributes {
        let record = self.writer.record.lock().clone();
        let detached_stat = if self.peek().is_some() { None } else { self.stat_detached(&record) };
        // A disk that cannot be attached still has a name and a size.
        let disk = match (detached_stat, self.peek()) {
            (_, Some(disk)) => Some(disk),
            (Some(_), None) => None,
            (None, None) => self.attach().ok(),
        };
        let disk = disk.as_deref();
        let detached_stat = detached_stat.unwrap_or(DetachedStat { size: record.size, allocated: 0 });
        Attributes {
            size: disk.map_or(detached_stat.size, Disk::size),
            allocated: disk.map_or(detached_stat.allocated, |d| d.allocated().unwrap_or(0)),
            mode: record.mode,
            uid: record.uid,
            gid: record.gid,
            created_ns: record.created_ns,
            changed_ns: record.changed_ns.max(disk.map_or(0, |d| d.delta().modified_ns())),
            modified_ns: disk.map_or(record.modified_ns, |d| d.delta().modified_ns()),
            linked: !self.is_unlinked(),
        }
    }

    /// Why the disk cannot be attached, if so. Attaches it to find out.
    pub fn problem(&self) -> Option<String> {
        self.attach().err().map(|e| e.to_string())
    }

    /// Why the disk cannot be attached, as far as that is known. Attaches nothing.
    pub fn known_problem(&self) -> Option<String> {
        let record = self.writer.record.lock().clone();
        let checked = self.check_base(&record).and_then(|()| self.check_pools(&record));
        checked.err().map(|e| e.to_string()).or_else(|| self.failure.lock().clone())
    }

    /// Removes the note of a mount's request: the mount has ended, and the note means nothing to another mount. The
    /// token of a client stays: the client may ask the next daemon.
    fn forget_request(&self) {
        let noted = matches!(self.writer.record.lock().request, Some(Request::Mount(_)));
        let forget = |record: &mut DiskRecord| record.request = None;
        if noted && let Err(error) = self.writer.update(forget) {
            tracing::warn!(disk = self.name(), %error, "the note of a request stays in the disk's record, which an older plyfs then cannot read");
        }
    }

    fn has_live_map(&self) -> Result<bool, StoreError> {
        for delta in self.lineage().deltas() {
            let live = self.live.existing(delta);
            let failed = StoreError::io(format!("disk {}", self.name()), "looking for its live map");
            if live.map_err(failed)?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Removes the live maps of the disk when its pool is gone: they claim bytes that no drive has (D89). Returns whether the
    /// pool of its delta, or of a layer that is being sealed, cannot be used.
    pub(super) fn give_up_live_maps(&self) -> bool {
        let lineage = self.lineage();
        let pending = lineage.layers.iter().filter(|layer| layer.is_pending()).map(|layer| layer.number);
        let own: Vec<u64> = std::iter::once(lineage.delta).chain(pending).collect();
        let Some(why) = self.pools.trouble_of(own.iter().copied()) else { return false };
        tracing::warn!(disk = self.name(), why, "a disk in a pool that is not available is not closed");
        for delta in own.into_iter().filter(|delta| self.pools.is_gone(*delta)) {
            // Logged; it stays for the next start, which ignores it.
            let _ = self.remove_live_map(delta);
        }
        true
    }

    /// Flushes and closes the disk. A disk that an earlier worker served and this one did not is opened for it, without
    /// its base, which a flush does not need.
    pub(super) fn close(&self) -> Result<(), StoreError> {
        let _sealing = self.sealing.lock();
        // `attach` is not taken: its holder may hang on the base's file.
        let _opening = self.opening.lock();
        let disk = match self.peek() {
            Some(disk) => Some(disk),
            None if self.inherited_live_map.load(Ordering::Acquire) && self.give_up_live_maps() => None,
            None if self.inherited_live_map.load(Ordering::Acquire) && self.has_live_map()? => {
                let record = self.writer.record.lock().clone();
                Some(Arc::new(self.open_without_index(&record)?))
            }
            None => None,
        };
        self.close_inherited_rework()?;
        if let Some(disk) = disk {
            self.close_layers(&disk)?;
            disk.delta().close().map_err(|error| self.failed(error))?;
        }
        self.forget_request();
        self.forget_trash();
        Ok(())
    }
}
