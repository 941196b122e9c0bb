//! A disk of the store: its record, and the attached disk once somebody uses it.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::{Mutex, RwLock};

use super::attached::Attachments;
use super::recording::Recording;
use super::{BaseNode, StoreError};
use crate::delta::{Delta, DeltaError, DeltaSpec, Footing, RootStore};
use crate::disk::Disk;
use crate::format::layout;
use crate::format::record::{DiskRecord, MapRoot, Request};
use crate::io::{LiveStore, Medium, Open, replace, sys};
use crate::trace::Tap;

/// One disk of a store.
pub struct DiskNode {
    id: u64,
    base_id: Option<u64>,
    keeper: Arc<RecordKeeper>,
    /// Empty when there is none, and as long as its record cannot be read.
    base: OnceLock<Arc<BaseNode>>,
    medium: Arc<dyn Medium>,
    live: Arc<dyn LiveStore>,
    attach: Mutex<()>,
    /// Held while its files are opened, not while its base's is, for which nobody who removes a disk is to wait.
    opening: Mutex<()>,
    /// Held while what it has in the store is removed.
    pub(super) purging: Mutex<()>,
    /// Locked for moments only.
    disk: RwLock<Option<Arc<Disk>>>,
    /// An earlier worker left a live map, which has the word.
    live_left: AtomicBool,
    /// What stat(2) says while it is detached, once somebody asked.
    rest: Mutex<Option<Rest>>,
    /// Why it could not be attached the last time.
    failure: Mutex<Option<String>>,
    /// When it was used last, by the clock of `attachments`.
    used: AtomicU64,
    /// Handles that this worker has opened.
    opened: AtomicUsize,
    /// An earlier worker may have opened it.
    inherited: AtomicBool,
    attachments: Arc<Attachments>,
    me: Weak<DiskNode>,
    /// Its reads may be recorded; said once.
    traced: AtomicBool,
    unlinked: AtomicBool,
    recording: Recording,
    tap: Arc<Tap>,
}

/// What stat(2) says of a disk.
#[derive(Debug, Clone)]
pub struct Attributes {
    /// Bytes.
    pub size: u64,
    /// Bytes that it takes in the store.
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
    /// Whether it has a name.
    pub linked: bool,
}

/// Whether an earlier worker left a live map of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LiveLeft {
    Yes,
    No,
}

/// What its files say of a disk that is detached.
#[derive(Debug, Clone, Copy)]
struct Rest {
    size: u64,
    allocated: u64,
}

/// What all disks of a store stand on.
#[derive(Clone)]
pub(super) struct Ground {
    pub medium: Arc<dyn Medium>,
    pub live: Arc<dyn LiveStore>,
    pub recording: Recording,
    pub attachments: Arc<Attachments>,
}

/// Writes the record of one disk, for whoever changes a part of it.
struct RecordKeeper {
    medium: Arc<dyn Medium>,
    /// As it is durable; never locked through a system call, so that nobody who asks waits for a sync.
    record: Mutex<DiskRecord>,
    /// Held while the record is replaced.
    replacing: Mutex<()>,
    /// The disk's files are being removed, or are gone; set with `replacing` held.
    retired: AtomicBool,
}

fn removed() -> io::Error {
    io::Error::new(io::ErrorKind::NotFound, "the disk was removed")
}

impl RecordKeeper {
    fn update(&self, change: impl FnOnce(&mut DiskRecord)) -> io::Result<()> {
        let _replacing = self.replacing.lock();
        if self.retired.load(Ordering::Acquire) {
            return Err(removed());
        }
        let mut next = self.record.lock().clone();
        change(&mut next);
        replace(&*self.medium, layout::DISKS, &layout::disk_record(next.id), &next.encode())?;
        *self.record.lock() = next;
        Ok(())
    }
}

impl RootStore for RecordKeeper {
    fn commit(&self, root: MapRoot, modified_ns: i64) -> io::Result<()> {
        self.update(|record| {
            record.map = root;
            record.modified_ns = modified_ns;
            record.size_is_current = false;
        })
    }

    fn commit_sized(&self, root: MapRoot, modified_ns: i64, size: u64) -> io::Result<()> {
        self.update(|record| {
            record.map = root;
            record.modified_ns = modified_ns;
            // Of a disk that was cut below what it shows of its base the record keeps what it was made with: nothing
            // may show more.
            record.size_is_current = size >= record.overlap;
            if record.size_is_current {
                record.size = size;
            }
        })
    }
}

impl DiskNode {
    /// `live_left`: an earlier worker left a live map of it.
    pub(super) fn new(
        record: DiskRecord,
        base: Option<Arc<BaseNode>>,
        ground: &Ground,
        live_left: LiveLeft,
    ) -> Arc<Self> {
        let id = record.id;
        let Ground { medium, live, recording, attachments } = ground.clone();
        let live_left = live_left == LiveLeft::Yes;
        Arc::new_cyclic(|me| Self {
            id,
            base_id: record.backing.as_ref().map(|b| b.base),
            unlinked: AtomicBool::new(record.unlinked),
            keeper: Arc::new(RecordKeeper {
                medium: medium.clone(),
                record: Mutex::new(record),
                replacing: Mutex::new(()),
                retired: AtomicBool::new(false),
            }),
            base: base.map_or_else(OnceLock::new, OnceLock::from),
            medium,
            live,
            attach: Mutex::new(()),
            opening: Mutex::new(()),
            purging: Mutex::new(()),
            disk: RwLock::new(None),
            live_left: AtomicBool::new(live_left),
            rest: Mutex::new(None),
            failure: Mutex::new(None),
            used: AtomicU64::new(0),
            opened: AtomicUsize::new(0),
            inherited: AtomicBool::new(live_left),
            attachments,
            me: me.clone(),
            traced: AtomicBool::new(false),
            tap: Arc::new(Tap::new(id)),
            recording,
        })
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Its name, or the last one it had.
    pub fn name(&self) -> String {
        self.keeper.record.lock().name.clone()
    }

    /// Its place in the order of names.
    pub(super) fn name_seq(&self) -> u64 {
        self.keeper.record.lock().name_seq
    }

    /// Whether a request made it, or gave or took its name, after any other did.
    pub(super) fn was_changed_by(&self, request: Option<Request>) -> bool {
        request.is_some() && self.keeper.record.lock().request == request
    }

    /// The bytes of its record.
    pub(super) fn encode(&self) -> Vec<u8> {
        self.keeper.record.lock().encode()
    }

    /// The record of its base can be read at last.
    pub(super) fn found_base(&self, base: &Arc<BaseNode>) {
        if self.base_id == Some(base.id()) {
            let _ = self.base.set(base.clone());
        }
    }

    /// Its base's number.
    pub fn base_id(&self) -> Option<u64> {
        self.base_id
    }

    /// Its base's name, when the base's record could be read.
    pub fn base_name(&self) -> Option<String> {
        self.base.get().map(|b| b.record().name.clone())
    }

    /// Whether it has lost its name.
    pub fn is_unlinked(&self) -> bool {
        self.unlinked.load(Ordering::Acquire)
    }

    /// From here on no file of it is made: not by a caller that found it by its name before it was removed, either. Its own are
    /// closed, so that their space is free when they are removed.
    pub(super) fn retire(&self) {
        let _opening = self.opening.lock();
        {
            let _replacing = self.keeper.replacing.lock();
            self.keeper.retired.store(true, Ordering::Release);
        }
        if let Some(disk) = self.disk.write().take() {
            disk.delta().retire();
        }
        self.attachments.remove(self.id);
    }

    pub(super) fn set_unlinked_in_memory(&self) {
        self.unlinked.store(true, Ordering::Release);
    }

    /// Changes the record durably.
    ///
    /// # Errors
    /// Errors of the storage; nothing has changed then.
    pub fn update(&self, change: impl FnOnce(&mut DiskRecord)) -> Result<(), StoreError> {
        let object = format!("disk {}", self.name());
        let stamped = |record: &mut DiskRecord| {
            change(record);
            record.changed_ns = sys::now_ns();
        };
        self.keeper.update(stamped).map_err(StoreError::io(object, "writing its record"))?;
        let unlinked = self.keeper.record.lock().unlinked;
        self.unlinked.fetch_or(unlinked, Ordering::AcqRel);
        Ok(())
    }

    /// Generation of its map file.
    pub(super) fn generation(&self) -> u64 {
        self.keeper.record.lock().map.generation
    }

    /// Whether the map file that its record names is sound: read in full, when that was not done. Writes nothing: a map
    /// written here would take the number of a stray.
    pub(super) fn has_sound_map(&self) -> bool {
        if self.peek().is_some() {
            return true;
        }
        let record = self.keeper.record.lock().clone();
        Delta::check_files(&Self::spec(&record), &self.footing()).is_ok()
    }

    /// Where its reads of the base are recorded.
    pub(super) fn tap(&self) -> &Arc<Tap> {
        &self.tap
    }

    /// The attached disk, if it is attached: waits for nothing.
    pub fn attached(&self) -> Option<Arc<Disk>> {
        let disk = self.peek();
        if disk.is_some() {
            self.touch();
        }
        disk
    }

    /// As [`DiskNode::attached`], for one who only looks.
    pub fn peek(&self) -> Option<Arc<Disk>> {
        self.disk.read().clone()
    }

    fn touch(&self) {
        let now = self.attachments.now();
        // Not written to by each request of several threads.
        if self.used.load(Ordering::Relaxed) != now {
            self.used.store(now, Ordering::Relaxed);
        }
    }

    /// When it was used last.
    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// A client has opened it.
    pub fn opened(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
    }

    /// A client has closed it, which may have opened it under an earlier worker.
    pub fn closed(&self) {
        let less = |opened: usize| opened.checked_sub(1);
        let _ = self.opened.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Whether no client has it open, as far as this worker knows; false when an earlier one may know of one.
    pub(super) fn is_known_closed(&self) -> bool {
        self.opened.load(Ordering::Relaxed) == 0 && !self.inherited.load(Ordering::Relaxed)
    }

    /// The disk, attached when it was not. Who holds it keeps it from being detached.
    ///
    /// # Errors
    /// A base that changed or is missing, a damaged map: named, and nothing is served.
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
        let record = self.keeper.record.lock().clone();
        let object = format!("disk {}", record.name);
        self.check_base(&record)?;
        let base = self.base.get().map(|base| base.attach()).transpose()?;
        let _opening = self.opening.lock();
        if self.keeper.retired.load(Ordering::Acquire) {
            return Err(StoreError::io(object, "attaching it")(removed()));
        }
        // As it is now that nobody else opens its files.
        let record = self.keeper.record.lock().clone();
        let delta = self.open_delta(&record)?;
        let disk = Arc::new(Disk::new(delta, base).tapped(self.tap.clone()));
        self.touch();
        *self.disk.write() = Some(disk.clone());
        *self.rest.lock() = None;
        self.live_left.store(false, Ordering::Release);
        self.attachments.add(self.id, self.me.clone());
        if let (Some(tracer), Some(base)) = (self.recording.get(), self.base.get())
            && !self.traced.swap(true, Ordering::AcqRel)
        {
            let written = record.map.generation != 0 || disk.allocated().is_ok_and(|bytes| bytes > 0);
            tracer.attached(&self.tap, written, &base.subject());
        }
        Ok(disk)
    }

    /// Whether its base is the one that it was made on. Looks at records only.
    fn check_base(&self, record: &DiskRecord) -> Result<(), StoreError> {
        let object = || format!("disk {}", record.name);
        match (&record.backing, self.base.get()) {
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

    /// Flushes it, closes its files and gives its live map back, unless it is in use or a flush has failed. Waits for
    /// local storage, never for another who attaches or detaches it. Whether it is detached.
    pub(super) fn detach(&self) -> bool {
        let Some(_attach) = self.attach.try_lock() else { return false };
        let Some(disk) = self.peek() else { return true };
        // Handles that were opened before a failure are refused by what only the live map knows (D48).
        if self.is_unlinked() || disk.delta().error_epoch() != 0 {
            return false;
        }
        // What takes long is done while it is served.
        if disk.delta().flush().is_err() {
            return false;
        }
        let Some(_opening) = self.opening.try_lock() else { return false };
        {
            let mut slot = self.disk.write();
            // The slot's and the one here.
            if Arc::strong_count(&disk) > 2 || self.keeper.retired.load(Ordering::Acquire) {
                return false;
            }
            *slot = None;
        }
        if let Err(error) = disk.delta().close() {
            tracing::warn!(disk = self.name(), %error, "an idle disk cannot be closed and stays attached");
            *self.disk.write() = Some(disk);
            return false;
        }
        let rest = disk.allocated().ok().map(|allocated| Rest { size: disk.size(), allocated });
        *self.rest.lock() = rest;
        self.inherited.store(false, Ordering::Relaxed);
        self.attachments.remove(self.id);
        true
    }

    /// What the files of a detached disk say; none when that takes more than a look.
    fn at_rest(&self, record: &DiskRecord) -> Option<Rest> {
        if self.live_left.load(Ordering::Acquire) {
            return None;
        }
        if let Some(rest) = *self.rest.lock() {
            return Some(rest);
        }
        // Its files stay as they are as long as it is not attached.
        let _attach = self.attach.try_lock()?;
        if self.peek().is_some() {
            return None;
        }
        let mut allocated = self.medium.allocated(&layout::data_path(self.id)).ok()?.unwrap_or(0);
        if record.map.generation != 0 {
            if !record.size_is_current {
                return None;
            }
            let map = layout::map_path(self.id, record.map.generation);
            let file = self.medium.open(&map, Open::Existing).ok()?;
            // A record that follows may have another size, and one that is damaged is named when it is attached.
            let mut next = [0; 8];
            let got = file.read_at(&mut next, record.map.floor).ok()?;
            if file.len().ok()? < record.map.floor || next[..got].iter().any(|byte| *byte != 0) {
                return None;
            }
            allocated += file.allocated().ok()?;
        }
        let rest = Rest { size: record.size, allocated };
        *self.rest.lock() = Some(rest);
        Some(rest)
    }

    fn spec(record: &DiskRecord) -> DeltaSpec {
        DeltaSpec {
            disk: record.id,
            size: record.size,
            overlap: record.overlap,
            modified_ns: record.modified_ns,
            root: record.map,
        }
    }

    fn footing(&self) -> Footing {
        Footing { medium: self.medium.clone(), live: self.live.clone(), roots: self.keeper.clone() }
    }

    fn open_delta(&self, record: &DiskRecord) -> Result<Delta, StoreError> {
        Delta::open(Self::spec(record), self.footing())
            .map_err(|e| StoreError::Disk { object: format!("disk {}", record.name), source: e.into() })
    }

    /// What stat(2) says. The disk is attached when its record and the length of its files alone may not know.
    pub fn attributes(&self) -> Attributes {
        let record = self.keeper.record.lock().clone();
        let rest = if self.peek().is_some() { None } else { self.at_rest(&record) };
        // A disk that cannot be attached still has a name and a size to show.
        let disk = match (rest, self.peek()) {
            (_, Some(disk)) => Some(disk),
            (Some(_), None) => None,
            (None, None) => self.attach().ok(),
        };
        let disk = disk.as_deref();
        let rest = rest.unwrap_or(Rest { size: record.size, allocated: 0 });
        Attributes {
            size: disk.map_or(rest.size, Disk::size),
            allocated: disk.map_or(rest.allocated, |d| d.allocated().unwrap_or(0)),
            mode: record.mode,
            uid: record.uid,
            gid: record.gid,
            created_ns: record.created_ns,
            changed_ns: record.changed_ns.max(disk.map_or(0, |d| d.delta().modified_ns())),
            modified_ns: disk.map_or(record.modified_ns, |d| d.delta().modified_ns()),
            linked: !self.is_unlinked(),
        }
    }

    /// Why it cannot be attached, if so; attaches it to find out.
    pub fn problem(&self) -> Option<String> {
        self.attach().err().map(|e| e.to_string())
    }

    /// Why it cannot be attached, as far as that is known: nothing is attached.
    pub fn known_problem(&self) -> Option<String> {
        let record = self.keeper.record.lock().clone();
        self.check_base(&record).err().map(|e| e.to_string()).or_else(|| self.failure.lock().clone())
    }

    /// The mount whose requests may be sent again has ended. A note that stays means nothing to another mount. The token of
    /// a client stays: the client may ask the next daemon.
    fn forget_request(&self) {
        let noted = matches!(self.keeper.record.lock().request, Some(Request::Mount(_)));
        let forget = |record: &mut DiskRecord| record.request = None;
        if noted && let Err(error) = self.keeper.update(forget) {
            tracing::warn!(disk = self.name(), %error, "its record keeps the note of a request");
        }
    }

    fn has_live_map(&self) -> Result<bool, StoreError> {
        let live = self.live.existing(self.id);
        let failed = StoreError::io(format!("disk {}", self.name()), "looking for its live map");
        live.map_err(failed).map(|live| live.is_some())
    }

    /// Flushes and closes. A disk that an earlier worker served and this one did not is opened for it, without
    /// its base, which a flush does not need.
    pub(super) fn close(&self) -> Result<(), StoreError> {
        let failed =
            |e: DeltaError| StoreError::Disk { object: format!("disk {}", self.name()), source: e.into() };
        // Not `attach`, under which its base's file may hang.
        let _opening = self.opening.lock();
        if let Some(disk) = self.peek() {
            disk.delta().close().map_err(failed)?;
            self.forget_request();
            return Ok(());
        }
        if self.live_left.load(Ordering::Acquire) && self.has_live_map()? {
            let record = self.keeper.record.lock().clone();
            self.open_delta(&record)?.close().map_err(failed)?;
        }
        self.forget_request();
        Ok(())
    }
}
