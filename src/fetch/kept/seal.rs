//! The note that the blocks of a source were compared with a digest.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::source::CachedSource;
use super::{DIR, SourceKey};

/// A source that refuses inserts while this is held.
pub struct Frozen {
    pub(super) source: Arc<CachedSource>,
}

impl Frozen {
    /// Whether any block is present.
    pub fn has_blocks(&self) -> bool {
        self.source.index.lock().blocks() > 0
    }

    /// Notes durably that all present blocks were compared with the digest of `contents`, alone or together with other
    /// sources. Every base of these contents may read them then. Returns whether that was noted.
    pub fn seal(&self, contents: SourceKey) -> bool {
        let source = &self.source;
        if !source.has_files() {
            return false;
        }
        // The note must not outlive any block that it is about, nor stand beside an older file of the same name.
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
            source.shared.verified_changed();
        }
        noted
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.source.frozen.fetch_sub(1, Ordering::Relaxed);
    }
}
