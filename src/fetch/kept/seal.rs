//! Noting that contents were compared with their digest.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::source::CachedSource;
use super::{DIR, SourceKey};

/// A source into which nothing comes.
pub struct Frozen {
    pub(super) source: Arc<CachedSource>,
}

impl Frozen {
    /// Whether anything is here.
    pub fn has_blocks(&self) -> bool {
        self.source.index.lock().blocks() > 0
    }

    /// Notes durably that all that is here was compared, as a whole or as a part of it, with what `contents` stands for.
    /// It may then be read for every base of these contents. Returns whether that is so.
    pub fn seal(&self, contents: SourceKey) -> bool {
        let source = &self.source;
        if !source.has_files() {
            return false;
        }
        // The note must not outlive a part of what it is about, nor stand beside an older file of the same name.
        if let Err(error) = source.sync().and_then(|()| source.shared.medium.sync_dir(DIR)) {
            source.shared.write_failed("syncing the cache", &error);
            return false;
        }
        let complete = source.is_complete();
        let noted = source
            .change_header(|header| (header.contents, header.verified) = (Some(contents.0), complete), false);
        if noted {
            source.index.lock().contents = Some(contents);
            source.verified.store(complete, Ordering::Relaxed);
            source.shared.lineup();
        }
        noted
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.source.frozen.fetch_sub(1, Ordering::Relaxed);
    }
}
