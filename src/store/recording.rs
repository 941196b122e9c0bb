//! Traces of the store's bases: which disk's reads are recorded.

use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};

use super::{BaseNode, Store, StoreError};
use crate::events::Events;
use crate::format::trace::Origin;
use crate::source::key_parts;
use crate::trace::{Automatic, Limits, Recorded, Subject, TraceStore, Tracer};

/// Set once somebody serves; a store that is only looked at records nothing.
pub(super) type Recording = Arc<OnceLock<Arc<Tracer>>>;

impl BaseNode {
    /// It, as a recording knows it.
    pub fn subject(&self) -> Subject {
        let record = self.record();
        let identity = &record.image.identity;
        let parts = key_parts(&identity.validator);
        let origin = match &identity.digest {
            Some(digest) => Origin::Digest(digest.clone()),
            None if parts.is_portable => {
                let mut sum = Sha256::new();
                for part in &parts.parts {
                    sum.update((part.len() as u64).to_le_bytes());
                    sum.update(part);
                }
                Origin::Validator(sum.finalize().into())
            }
            // What this host says of the file holds on no other.
            None => Origin::Unknown,
        };
        Subject { base: record.id, name: record.name.clone(), size: record.size(), origin }
    }
}

impl Store {
    /// From now on boots are recorded. To be called before disks are used.
    pub fn trace(&self, limits: Limits, automatic: Automatic, events: Events) -> Arc<Tracer> {
        let store = TraceStore::new(self.medium.clone());
        let tracer = self.recording.get_or_init(|| Arc::new(Tracer::new(store, limits, automatic, events)));
        // Traces of bases that a crash kept from being removed with them. A record that is missing may come back.
        if !self.missing.lacks_base() {
            for base in tracer.store().bases().unwrap_or_default() {
                if self.base_by_id(base).is_none()
                    && let Err(error) = tracer.remove(base)
                {
                    tracing::warn!(%error, base, "the trace of a base that is gone cannot be removed");
                }
            }
        }
        tracer.clone()
    }

    /// Whoever records boots, when somebody does.
    pub fn tracer(&self) -> Option<&Arc<Tracer>> {
        self.recording.get()
    }

    /// Records what a disk reads of its base, from now on, as the base's trace.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a disk without a base, or when its base is being recorded; what attaching says.
    pub fn record_trace(&self, disk: &str) -> Result<Arc<BaseNode>, StoreError> {
        let node = self.disk(disk)?;
        let object = format!("disk {disk}");
        let base = node.base_id().and_then(|id| self.base_by_id(id)).ok_or_else(|| {
            StoreError::invalid(&object, "it has no base, and a trace is of a base; name a disk that has one")
        })?;
        node.attach()?;
        let tracer = self.tracer().ok_or_else(|| StoreError::invalid(&object, "nothing is recorded here"))?;
        tracer.record(node.tap(), base.subject()).map_err(|e| {
            StoreError::invalid(object, format!("{e}; end that one first: plyfs trace record DISK --stop"))
        })?;
        Ok(base)
    }

    /// Ends the recording of a disk's reads, and keeps it.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when nothing is recorded or nothing was read; what the storage says.
    pub fn end_trace(&self, disk: &str) -> Result<Recorded, StoreError> {
        use crate::trace::RecordError;
        let node = self.disk(disk)?;
        let object = format!("disk {disk}");
        let tracer = self.tracer().ok_or_else(|| StoreError::invalid(&object, "nothing is recorded here"))?;
        tracer.stop(node.id()).map_err(|error| match error {
            RecordError::Io(source) => StoreError::io(object, "saving the trace")(source),
            RecordError::Empty => StoreError::invalid(
                object,
                "nothing was read from its base since the recording began; boot it, then stop the recording",
            ),
            RecordError::None | RecordError::UnderWay { .. } => StoreError::invalid(
                object,
                "its reads are not being recorded; a recording ends by itself when nothing new was read for a while: \
                 plyfs base trace ls",
            ),
        })
    }
}
