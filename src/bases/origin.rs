//! Where the bytes of a file come from: probing and opening a source of each kind.
//!
//! This is the only place of the room that tells kinds of sources apart. All else goes by [`RemoteSource`], by
//! [`ImageFile::is_local`] and by [`compare`]. What must hold: nothing here waits for a server except
//! [`HostSources::probe`].

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::copy::CopiedFile;
use super::lane::Lane;
use super::sources::{HostSources, OnRuntime};
use crate::fetch::kept::Reach;
use crate::format::record::{BaseIdentity, BaseOptions, BaseRecord, ImageFile};
use crate::source::http::{HttpIdentity, RemoteOptions};
use crate::source::{
    FileSource, Kind, OpenImage, RemoteSource, SourceError, SourceErrorKind, compare, shown,
};

/// Threads that read one file that is copied.
const READERS: usize = 4;

impl HostSources {
    /// Asks the servers of a new source which object they have. Returns its identity and first bytes; none of a file of
    /// this host, which is looked at when it is registered.
    ///
    /// # Errors
    /// `Denied`, `Protocol` or `Unreachable` when no server has it, or two have different objects.
    pub async fn probe(
        &self,
        kind: Kind,
        urls: &[String],
        options: &BaseOptions,
    ) -> Result<Option<(BaseIdentity, Vec<u8>)>, SourceError> {
        match kind {
            Kind::File => Ok(None),
            Kind::Http | Kind::S3 => {
                let (http, asked, options) = (self.http().clone(), urls.to_vec(), options_of(options));
                let probed = self.handle().spawn(async move { http.probe(&asked, &options).await });
                let probed = probed.await.map_err(|_| {
                    let url = urls.first().map_or_else(String::new, |url| shown(url));
                    let (why, advice) = ("the request was cancelled", "try again");
                    SourceError::remote(SourceErrorKind::Unreachable, "read", url, why, advice)
                })??;
                Ok(Some((kind.identity(probed.identity), probed.head)))
            }
        }
    }

    /// The source that a file of a base is fetched from. Asks no server.
    ///
    /// # Errors
    /// Of a file of this host: when it cannot be opened or is another one, and not all of it is in the cache.
    pub(super) fn open_remote(
        &self,
        base: &BaseRecord,
        file: &ImageFile,
    ) -> Result<Arc<dyn RemoteSource>, SourceError> {
        let size = file.identity.size;
        Ok(match HttpIdentity::of(&file.identity) {
            // Of a web server or a bucket.
            Some(identity) => self.http().open(&base.urls_of(file), identity, options_of(&base.options)),
            // A file of this host.
            None => {
                let original = self.original(base, file)?;
                // Its filesystem may hang: it has threads of its own.
                let spawn = Arc::new(OnRuntime::new(self.handle().clone(), Lane::new("copy", READERS)));
                let (opener, wanted) = (self.opener().clone(), file.clone());
                let open = Box::new(move || open_original(&*opener, &wanted).ok().map(Arc::new));
                Arc::new(CopiedFile::new(&file.source, size, original, open, spawn))
            }
        })
    }

    /// The file of this host, which may be gone once all of it is in the cache.
    fn original(&self, base: &BaseRecord, file: &ImageFile) -> Result<Option<Arc<FileSource>>, SourceError> {
        match self.original_of(file) {
            Ok(source) => Ok(Some(Arc::new(source))),
            // Whether the cache has all of a large file is not known at once. A read reports what is missing.
            Err(error) if self.may_be_complete(base, file) => {
                tracing::debug!(%error, "a base is served from its copy");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    fn may_be_complete(&self, base: &BaseRecord, file: &ImageFile) -> bool {
        let contents = self.contents(base, file);
        !contents.is_known()
            || contents.is_complete(Reach::Proven)
            || self.copies().may_have(base.id, contents.file_keys().own)
    }

    /// A file of this host, when it is what was registered.
    ///
    /// # Errors
    /// When it cannot be opened; `Changed` when it is another one.
    pub fn original_of(&self, file: &ImageFile) -> Result<FileSource, SourceError> {
        open_original(&**self.opener(), file)
    }
}

/// A file of this host, when it is what was registered.
fn open_original(opener: &dyn OpenImage, file: &ImageFile) -> Result<FileSource, SourceError> {
    let source = FileSource::open_with(opener, Path::new(&file.source))?;
    match compare(&file.identity, &source.found(), Default::default()).difference() {
        None => Ok(source),
        Some(why) => Err(SourceError::changed(&file.source, &why)),
    }
}

/// How a base's servers are asked.
fn options_of(options: &BaseOptions) -> RemoteOptions {
    RemoteOptions {
        strictness: options.strictness,
        deadline: (options.deadline_s > 0).then(|| Duration::from_secs(options.deadline_s.into())),
        max_requests: (options.max_requests > 0).then_some(options.max_requests),
        max_rate: (options.max_rate > 0).then_some(options.max_rate),
    }
}
