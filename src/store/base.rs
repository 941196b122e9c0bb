//! A registered base, and the file behind it once somebody needs it.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use super::StoreError;
use crate::base::Base;
use crate::cache::BlockCache;
use crate::format::record::BaseRecord;
use crate::source::{FileSource, OpenImage, Source};

/// One base of a store.
pub struct BaseNode {
    record: BaseRecord,
    cache: Arc<BlockCache>,
    opener: Arc<dyn OpenImage>,
    attached: Mutex<Option<Arc<Base>>>,
}

impl BaseNode {
    pub(super) fn new(record: BaseRecord, cache: Arc<BlockCache>, opener: Arc<dyn OpenImage>) -> Self {
        Self { record, cache, opener, attached: Mutex::new(None) }
    }

    /// Its number.
    pub fn id(&self) -> u64 {
        self.record.id
    }

    /// What was registered.
    pub fn record(&self) -> &BaseRecord {
        &self.record
    }

    /// Bytes of it in the memory cache.
    pub fn cached_bytes(&self) -> u64 {
        self.attached.lock().as_ref().map_or(0, |b| b.cached_bytes())
    }

    /// What is wrong with it, if anything; looks at the file.
    pub fn problem(&self) -> Option<String> {
        match self.attach() {
            Ok(base) => base.check().err().map(|e| e.to_string()),
            Err(e) => Some(e.to_string()),
        }
    }

    /// Opens the source, when it is still what was registered.
    ///
    /// # Errors
    /// `Source` when it cannot be opened, `BaseChanged` when it is another file or was written to.
    pub fn attach(&self) -> Result<Arc<Base>, StoreError> {
        let mut attached = self.attached.lock();
        if let Some(base) = attached.as_ref() {
            return Ok(base.clone());
        }
        let object = format!("base {}", self.record.name);
        let source = FileSource::open_with(&*self.opener, Path::new(&self.record.source))
            .map_err(|source| StoreError::Source { object: object.clone(), source })?;
        let (now, then) = (*source.identity(), &self.record.identity);
        let mtime_ns = now.mtime_s * 1_000_000_000 + i64::from(now.mtime_ns);
        if (now.size, mtime_ns, now.inode) != (then.size, then.mtime_ns, then.inode) {
            let why = if now.size != then.size {
                format!("it has {} bytes and had {}", now.size, then.size)
            } else if now.inode != then.inode {
                "it is another file than the one registered".into()
            } else {
                "it was modified".into()
            };
            return Err(StoreError::BaseChanged {
                object,
                why: format!(
                    "{} changed since it was registered: {why}; put the original file back, its disks are useless \
                     on any other",
                    self.record.source
                ),
            });
        }
        let base = Arc::new(Base::new(
            self.record.id,
            self.record.name.clone(),
            Arc::new(source),
            self.cache.clone(),
        ));
        *attached = Some(base.clone());
        Ok(base)
    }
}
