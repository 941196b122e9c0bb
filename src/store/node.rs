//! A disk of the store: its record, and the attached disk once somebody uses it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::recording::Recording;
use super::{BaseNode, StoreError};
use crate::delta::{Delta, DeltaError, DeltaSpec, Footing, RootStore};
use crate::disk::Disk;
use crate::format::record::{DiskRecord, MapRoot, MountRequest};
use crate::io::{LiveStore, Medium, replace, sys};
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
    disk: OnceLock<Disk>,
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
        replace(&*self.medium, "disks", &format!("{}.disk", next.id), &next.encode())?;
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
    pub(super) fn new(
        record: DiskRecord,
        base: Option<Arc<BaseNode>>,
        medium: Arc<dyn Medium>,
        live: Arc<dyn LiveStore>,
        recording: Recording,
    ) -> Self {
        let id = record.id;
        Self {
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
            disk: OnceLock::new(),
            tap: Arc::new(Tap::new(id)),
            recording,
        }
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
    pub(super) fn was_changed_by(&self, request: MountRequest) -> bool {
        self.keeper.record.lock().request == Some(request)
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

    /// From here on nobody makes a file of it: not who found it by its name before it was removed, either.
    pub(super) fn retire(&self) {
        let _opening = self.opening.lock();
        {
            let _replacing = self.keeper.replacing.lock();
            self.keeper.retired.store(true, Ordering::Release);
        }
        if let Some(disk) = self.disk.get() {
            disk.delta().retire();
        }
    }

    pub(super) fn set_unlinked_in_memory(&self) {
        self.unlinked.store(true, Ordering::Release);
    }

    /// Changes the record durably.
    ///
    /// # Errors
    /// What the storage says; nothing has changed then.
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

    /// Where its reads of the base are recorded.
    pub(super) fn tap(&self) -> &Arc<Tap> {
        &self.tap
    }

    /// The attached disk, if it is attached: costs nothing.
    pub fn attached(&self) -> Option<&Disk> {
        self.disk.get()
    }

    /// The disk, attached when it was not.
    ///
    /// # Errors
    /// A base that changed or is missing, a damaged map: named, and nothing is served.
    pub fn attach(&self) -> Result<&Disk, StoreError> {
        if let Some(disk) = self.disk.get() {
            return Ok(disk);
        }
        let _attach = self.attach.lock();
        if let Some(disk) = self.disk.get() {
            return Ok(disk);
        }
        let record = self.keeper.record.lock().clone();
        let object = format!("disk {}", record.name);
        let base = match (&record.backing, self.base.get()) {
            (None, _) => None,
            (Some(backing), Some(base)) if base.record().image.identity == backing.identity => {
                Some(base.attach()?)
            }
            (Some(_), Some(base)) => {
                return Err(StoreError::BaseChanged {
                    object,
                    why: format!("it was made on another version of base {}", base.record().name),
                });
            }
            (Some(backing), None) => {
                return Err(StoreError::BaseChanged {
                    object,
                    why: format!(
                        "the record of its base, number {}, is missing or damaged; restore bases/{}.base",
                        backing.base, backing.base
                    ),
                });
            }
        };
        let _opening = self.opening.lock();
        if self.keeper.retired.load(Ordering::Acquire) {
            return Err(StoreError::io(object, "attaching it")(removed()));
        }
        let delta = self.open_delta(&record)?;
        let disk = self.disk.get_or_init(|| Disk::new(delta, base).tapped(self.tap.clone()));
        if let (Some(tracer), Some(base)) = (self.recording.get(), self.base.get()) {
            let written = record.map.generation != 0 || disk.allocated().is_ok_and(|bytes| bytes > 0);
            tracer.attached(&self.tap, written, &base.subject());
        }
        Ok(disk)
    }

    fn open_delta(&self, record: &DiskRecord) -> Result<Delta, StoreError> {
        let spec = DeltaSpec {
            disk: self.id,
            size: record.size,
            overlap: record.overlap,
            modified_ns: record.modified_ns,
            root: record.map,
        };
        let footing =
            Footing { medium: self.medium.clone(), live: self.live.clone(), roots: self.keeper.clone() };
        Delta::open(spec, footing)
            .map_err(|e| StoreError::Disk { object: format!("disk {}", record.name), source: e.into() })
    }

    /// What stat(2) says. The disk is attached when its record alone may not know.
    pub fn attributes(&self) -> Attributes {
        let record = self.keeper.record.lock().clone();
        // A disk that cannot be attached still has a name and a size to show.
        let disk = self.attach().ok();
        Attributes {
            size: disk.map_or(record.size, Disk::size),
            allocated: disk.and_then(|d| d.allocated().ok()).unwrap_or(0),
            mode: record.mode,
            uid: record.uid,
            gid: record.gid,
            created_ns: record.created_ns,
            changed_ns: record.changed_ns.max(disk.map_or(0, |d| d.delta().modified_ns())),
            modified_ns: disk.map_or(record.modified_ns, |d| d.delta().modified_ns()),
            linked: !self.is_unlinked(),
        }
    }

    /// Why it cannot be attached, if so.
    pub fn problem(&self) -> Option<String> {
        self.attach().err().map(|e| e.to_string())
    }

    /// The mount whose requests may be sent again has ended. A note that stays means nothing to another mount.
    fn forget_request(&self) {
        let noted = self.keeper.record.lock().request.is_some();
        let forget = |record: &mut DiskRecord| record.request = None;
        if noted && let Err(error) = self.keeper.update(forget) {
            tracing::warn!(disk = self.name(), %error, "its record keeps the note of a request");
        }
    }

    /// Flushes and closes. A disk that an earlier worker served and this one did not is opened for it, without
    /// its base, which a flush does not need.
    pub(super) fn close(&self) -> Result<(), StoreError> {
        let failed =
            |e: DeltaError| StoreError::Disk { object: format!("disk {}", self.name()), source: e.into() };
        if let Some(disk) = self.disk.get() {
            disk.delta().close().map_err(failed)?;
            self.forget_request();
            return Ok(());
        }
        let live = self.live.existing(self.id);
        let live =
            live.map_err(StoreError::io(format!("disk {}", self.name()), "looking for its live map"))?;
        if live.is_some() {
            let record = self.keeper.record.lock().clone();
            self.open_delta(&record)?.close().map_err(failed)?;
        }
        self.forget_request();
        Ok(())
    }
}
