//! The frontends of a service: which of them uses a disk, and which of them a request belongs to.
//!
//! What must hold:
//! - A disk is unused when every frontend says so. One that cannot tell may use it, and so may the frontends of a
//!   service that has none yet.
//! - No two requests under way have one [`RequestId`]: each frontend counts its own.

use std::io;
use std::sync::Arc;

use parking_lot::RwLock;

/// What the service asks and tells a frontend. It calls these functions only on threads that hold no lock and serve no
/// request, so they may wait for the frontend's peer.
pub trait Frontend: Send + Sync {
    /// Drops what the frontend itself keeps of a disk that no caller has open.
    fn release(&self, disk: u64);

    /// Whether a caller may have the disk open.
    ///
    /// # Errors
    /// When the frontend cannot tell.
    fn may_use(&self, disk: u64) -> io::Result<bool>;

    /// As [`release`](Self::release), of a base's own file.
    fn release_base(&self, base: u64);

    /// As [`may_use`](Self::may_use), of a base's own file.
    ///
    /// # Errors
    /// When the frontend cannot tell.
    fn may_use_base(&self, base: u64) -> io::Result<bool>;

    /// The size of a disk changed, and not by a request of this frontend.
    fn resized(&self, disk: u64);
}

/// One of the frontends of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrontendId(pub(super) usize);

impl FrontendId {
    /// The request that the frontend gave this number.
    pub fn request(self, number: u64) -> RequestId {
        RequestId { frontend: self, number }
    }
}

/// A request under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct RequestId {
    pub(super) frontend: FrontendId,
    pub(super) number: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct Frontends(RwLock<Vec<Arc<dyn Frontend>>>);

impl Frontends {
    pub fn add(&self, frontend: Arc<dyn Frontend>) -> FrontendId {
        let mut all = self.0.write();
        all.push(frontend);
        FrontendId(all.len() - 1)
    }

    /// Of this moment: no lock is held while a frontend is asked.
    fn all(&self) -> Vec<Arc<dyn Frontend>> {
        self.0.read().clone()
    }

    /// Has all of them drop what they keep of a disk.
    pub fn release(&self, disk: u64) {
        self.all().iter().for_each(|frontend| frontend.release(disk));
    }

    /// Whether a caller of one of them may have a disk open.
    pub fn may_use(&self, disk: u64) -> bool {
        let all = self.all();
        all.is_empty() || all.iter().any(|frontend| frontend.may_use(disk).unwrap_or(true))
    }

    /// Whether a caller of one of them may have a base's own file open. They first drop what they keep of it.
    pub fn may_use_base(&self, base: u64) -> bool {
        let all = self.all();
        all.iter().for_each(|frontend| frontend.release_base(base));
        all.is_empty() || all.iter().any(|frontend| frontend.may_use_base(base).unwrap_or(true))
    }

    /// Tells all of them that the size of a disk changed.
    pub fn resized(&self, disk: u64) {
        self.all().iter().for_each(|frontend| frontend.resized(disk));
    }
}
