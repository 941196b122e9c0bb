//! Traces of the store's bases: starts and stops the recording of disks.

use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};

use super::{BaseNode, Store, StoreError};
use crate::events::Events;
use crate::format::trace::Origin;
use crate::source::key_parts;
use crate::trace::{AutoRecord, Limits, SavedRecording, TraceStore, TracedBase, Tracer};

/// Set when a worker serves the store. A store that is only read records nothing.
pub(super) type Recording = Arc<OnceLock<Arc<Tracer>>>;

impl BaseNode {
    /// The base as the subject of a recording.
    pub fn subject(&self) -> TracedBase {
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
        TracedBase { base: record.id, name: record.name.clone(), size: record.size(), origin }
    }
}

impl Store {
    /// Starts the recording of boots. To be called before disks are used.
    pub fn trace(&self, limits: Limits, automatic: AutoRecord, events: Events) -> Arc<Tracer> {
        let store = TraceStore::new(self.medium.clone());
        let tracer = self.recording.get_or_init(|| Arc::new(Tracer::new(store, limits, automatic, events)));
        // A crash may have left traces of removed bases. The record of a missing base may come back.
        if !self.unavailable.has_unavailable_base() {
            for base in tracer.store().bases().unwrap_or_default() {
                if self.base_by_id(base).is_none()
                    && let Err(error) = tracer.remove(base)
                {
                    tracing::warn!(%error, base, "the trace of a removed base cannot be removed; the next start retries");
                }
            }
        }
        tracer.clone()
    }

    /// The recorder of boots, if boots are recorded.
    pub fn tracer(&self) -> Option<&Arc<Tracer>> {
        self.recording.get()
    }

    /// Records the disk's reads of its base, from now on, as the base's trace.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a disk without a base, or when its base is being recorded; errors of attaching.
    pub fn record_trace(&self, disk: &str) -> Result<Arc<BaseNode>, StoreError> {
        let node = self.disk(disk)?;
        let object = format!("disk {disk}");
        let base = node.base_id().and_then(|id| self.base_by_id(id)).ok_or_else(|| {
            StoreError::invalid(&object, "it has no base, and a trace is of a base; name a disk that has one")
        })?;
        node.attach()?;
        let tracer =
            self.tracer().ok_or_else(|| StoreError::invalid(&object, "this process records no traces"))?;
        tracer.record(node.tap(), base.subject()).map_err(|e| {
            StoreError::invalid(
                object,
                format!("{e}; stop that recording first: plyfs trace record DISK --stop"),
            )
        })?;
        Ok(base)
    }

    /// Ends the recording of a disk's reads, and saves it.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` when nothing is recorded or nothing was read; errors of the storage.
    pub fn end_trace(&self, disk: &str) -> Result<SavedRecording, StoreError> {
        use crate::trace::RecordError;
        let node = self.disk(disk)?;
        let object = format!("disk {disk}");
        let tracer =
            self.tracer().ok_or_else(|| StoreError::invalid(&object, "this process records no traces"))?;
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
