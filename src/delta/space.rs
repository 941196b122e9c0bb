//! The space that a delta takes of its disk's quota: its blocks with data.
//!
//! The map alone is counted, because filesystems differ in what they report as allocated. What must hold (D84): blocks
//! are counted under the lock of their range, before they become `Data`; overwriting and freeing them is never refused.
//! Without a quota a write pays one relaxed load, and nothing is counted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::{Delta, DeltaError, WriteSpace};
use crate::format::BLOCK;
use crate::io::MediumFile;
use crate::limits::Quota;

/// Bytes that the zeros of discards, which end within blocks of what lies below, may take beyond a quota.
const FOR_DISCARDS: u64 = 1 << 20;

/// See the module.
#[derive(Default)]
pub(super) struct Space {
    quota: OnceLock<Arc<Quota>>,
    /// Changes only while the whole range is locked.
    is_counted: AtomicBool,
    /// The delta is a layer, and is not counted here any more.
    has_left: AtomicBool,
    bytes: AtomicU64,
}

impl Space {
    fn counted(&self) -> Option<&Quota> {
        if self.is_counted.load(Ordering::Acquire) { self.quota.get().map(|quota| &**quota) } else { None }
    }

    /// Counts space that is free again.
    pub fn give(&self, bytes: u64) {
        if let Some(quota) = self.counted().filter(|_| bytes > 0) {
            self.bytes.fetch_sub(bytes, Ordering::AcqRel);
            quota.give(bytes);
        }
    }

    fn leave(&self) -> u64 {
        let bytes = self.bytes.swap(0, Ordering::AcqRel);
        if let Some(quota) = self.counted() {
            quota.give(bytes);
        }
        self.is_counted.store(false, Ordering::Release);
        bytes
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        self.leave();
    }
}

/// New space that a write takes. It is given back unless the write succeeds.
pub(super) struct Room<'a> {
    space: &'a Space,
    bytes: u64,
}

impl Room<'_> {
    pub fn keep(mut self) {
        self.bytes = 0;
    }
}

impl Drop for Room<'_> {
    fn drop(&mut self) {
        self.space.give(self.bytes);
    }
}

fn no_room() -> DeltaError {
    let source = std::io::Error::from_raw_os_error(libc::ENOSPC);
    DeltaError::Io { operation: "taking more space than the disk's quota has left", source }
}

impl Delta {
    /// Counts the delta against a quota, once there is one. To be called once, before the first use.
    pub fn charge_to(&self, quota: &Arc<Quota>) {
        let _ = self.space.quota.set(quota.clone());
        self.count_if_wanted();
    }

    /// Counts the delta, if its disk has a quota and it is not counted yet. Waits for running writes then.
    pub fn count_if_wanted(&self) {
        let space = &self.space;
        let Some(quota) = space.quota.get().filter(|quota| quota.is_set()) else { return };
        if space.is_counted.load(Ordering::Acquire) || space.has_left.load(Ordering::Acquire) {
            return;
        }
        let _range = self.ranges.lock(0, u64::MAX);
        if !space.is_counted.load(Ordering::Acquire) && !space.has_left.load(Ordering::Acquire) {
            let bytes = self.map.count_data(0, u64::MAX) * BLOCK;
            space.bytes.store(bytes, Ordering::Release);
            quota.add(bytes);
            space.is_counted.store(true, Ordering::Release);
        }
    }

    /// The delta is a layer now, which nothing changes. Returns its bytes, which count as those of a layer from now on.
    pub fn leave_quota(&self) -> u64 {
        self.count_if_wanted();
        let _range = self.ranges.lock(0, u64::MAX);
        self.space.has_left.store(true, Ordering::Release);
        self.space.leave()
    }

    /// Bytes of the blocks `first..end` with data, while that counts. The caller holds their range.
    pub(super) fn data_bytes(&self, first: u64, end: u64) -> u64 {
        self.space.counted().map_or(0, |_| self.map.count_data(first, end) * BLOCK)
    }

    /// The blocks `first..end` are about to have no data. The caller holds their range.
    pub(super) fn leaves_space(&self, first: u64, end: u64) {
        self.space.give(self.data_bytes(first, end));
    }

    /// Takes the space that a write of the blocks `first..end` needs. The caller holds their range.
    pub(super) fn room_for(&self, first: u64, end: u64, space: WriteSpace) -> Result<Room<'_>, DeltaError> {
        let taken = |bytes| Room { space: &self.space, bytes };
        let Some(quota) = self.space.counted() else { return Ok(taken(0)) };
        let needed = (end - first) * BLOCK - self.data_bytes(first, end);
        let beyond = match space {
            WriteSpace::Free => 0,
            WriteSpace::Reserved => FOR_DISCARDS,
        };
        if needed == 0 {
            return Ok(taken(0));
        }
        if !quota.take(needed, beyond) {
            return Err(no_room());
        }
        self.space.bytes.fetch_add(needed, Ordering::AcqRel);
        Ok(taken(needed))
    }

    /// Refuses a reservation for which the quota has no room, with all that the data file takes.
    pub(super) fn check_reservation(
        &self,
        data: &dyn MediumFile,
        offset: u64,
        len: u64,
    ) -> Result<(), DeltaError> {
        self.count_if_wanted();
        let Some(quota) = self.space.counted() else { return Ok(()) };
        let end = offset.saturating_add(len).div_ceil(BLOCK);
        let needed = (end - offset / BLOCK) * BLOCK - self.data_bytes(offset / BLOCK, end);
        let allocated = data.allocated().map_err(DeltaError::io("reserving space"))?;
        // What was reserved before counts too.
        let reserved = allocated.saturating_sub(self.space.bytes.load(Ordering::Acquire));
        if needed == 0 || data.has_space(offset, len).unwrap_or(false) {
            return Ok(());
        }
        if !quota.take(needed.saturating_add(reserved), 0) {
            return Err(no_room());
        }
        quota.give(needed.saturating_add(reserved));
        Ok(())
    }

    /// What is counted and what there is, when they differ. No other thread uses the delta.
    #[cfg(any(test, feature = "simulation"))]
    pub fn miscount(&self) -> Option<(u64, u64)> {
        self.space.counted()?;
        let (counted, there) =
            (self.space.bytes.load(Ordering::Acquire), self.map.count_data(0, u64::MAX) * BLOCK);
        (counted != there).then_some((counted, there))
    }
}
