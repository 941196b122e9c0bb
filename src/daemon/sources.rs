//! How the bytes of bases are got at: files of this host through the opener, everything else through the cache of fetched
//! blocks.

use std::path::Path;
use std::sync::Arc;

use crate::format::record::{BaseRecord, ImageFile};
use crate::source::{FileSource, OpenImage, Source, SourceError, SourceErrorKind};
use crate::store::Sources;

/// See the module.
pub struct HostSources {
    opener: Arc<dyn OpenImage>,
}

impl HostSources {
    /// `opener`: who may open files.
    pub fn new(opener: Arc<dyn OpenImage>) -> Self {
        Self { opener }
    }
}

impl Sources for HostSources {
    fn file(&self, path: &Path) -> Result<FileSource, SourceError> {
        FileSource::open_with(&*self.opener, path)
    }

    fn remote(&self, _base: &BaseRecord, _file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        let (why, advice) = ("there is no network here", "run `plyfs serve`");
        Err(SourceError::remote(SourceErrorKind::Unreachable, "open", "a URL", why, advice))
    }

    fn copied(&self, _base: &BaseRecord, file: &ImageFile) -> Result<Arc<dyn Source>, SourceError> {
        Ok(Arc::new(self.file(Path::new(&file.source))?))
    }
}
