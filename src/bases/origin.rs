//! Where the bytes of a file come from: probing and opening a source of each kind.
//!
//! This is the only place of the room that tells kinds of sources apart. All else goes by [`RemoteSource`], by
//! [`ImageFile::is_local`] and by [`compare`]. What must hold: nothing here waits for a server except
//! [`HostSources::probe`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::copy::CopiedFile;
use super::lane::Lane;
use super::proofs::{KeptPages, ProofPages, ProvenRemote, places_of};
use super::sources::{HostSources, OnRuntime};
use super::whole::WholeImage;
use crate::fetch::kept::{Reach, SourceKey};
use crate::format::proof::{Layout, ProofHeader};
use crate::format::record::{
    BaseIdentity, BaseOptions, BaseRecord, FileProof, ImageFile, ImageFormat, Strictness, Validator,
};
use crate::source::http::peer::ContentName;
use crate::source::http::{HttpIdentity, HttpSource, Probed, ProbedArtifact, ProbedImage, RemoteOptions};
use crate::source::openstack::{ImagePlace, ImageRecord, Whereabouts};
use crate::source::{
    FileSource, GlanceIdentity, Kind, Location, NbdIdentity, OciIdentity, OpenImage, RemoteSource, Section,
    Source, SourceError, SourceErrorKind, compare, proven_key, shown,
};

/// Threads that read one file that is copied.
const READERS: usize = 4;

/// What the servers of a new source said.
pub struct ProbedFile {
    /// Which object they have.
    pub identity: BaseIdentity,
    /// Its first bytes.
    pub head: Vec<u8>,
    /// Its format, where the kind of source states it.
    pub format: Option<ImageFormat>,
    /// The first URL, in a form that means the same object for ever.
    pub url: String,
}

/// An image of a cloud, which may become a base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfferedImage {
    /// Its ID.
    pub id: String,
    /// Its name, any text.
    pub name: Option<String>,
    /// Bytes.
    pub size: Option<u64>,
    /// As its record says.
    pub disk_format: Option<String>,
    /// As its record says.
    pub container_format: Option<String>,
    /// The source of a base of it.
    pub url: String,
    /// Why it cannot be a base.
    pub unusable: Option<String>,
}

/// How the bytes of a source come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Delivery {
    /// By ranges, as they are needed.
    #[default]
    Ranges,
    /// All of them at once, into the store.
    Whole,
}

impl Delivery {
    /// Of a source that is registered.
    pub(super) fn of(validator: &Validator) -> Self {
        if validator.is_read_as_a_whole() { Self::Whole } else { Self::Ranges }
    }
}

impl HostSources {
    /// Asks the servers of a new source which object they have. Returns none for a file or device of this host, which
    /// is looked at when it is registered.
    ///
    /// # Errors
    /// `Denied`, `Protocol` or `Unreachable` when no server has it, or two have different objects.
    pub async fn probe(
        &self,
        kind: Kind,
        urls: &[String],
        options: &BaseOptions,
        delivery: Delivery,
    ) -> Result<Option<ProbedFile>, SourceError> {
        let first = urls.first().cloned().unwrap_or_default();
        let (http, asked, options) = (self.http().clone(), urls.to_vec(), options_of(options));
        let cancelled = |_| {
            let (why, advice) = ("the request was cancelled", "try again");
            SourceError::remote(SourceErrorKind::Unreachable, "read", shown(&first), why, advice)
        };
        if delivery == Delivery::Whole && kind != Kind::Glance {
            let why = "only an image of a Glance can be fetched as a whole";
            let advice = "omit --download; plyfs base hydrate fetches all of another source";
            return Err(SourceError::remote(SourceErrorKind::Protocol, "use", shown(&first), why, advice));
        }
        match kind {
            Kind::File | Kind::Device => Ok(None),
            Kind::Http | Kind::S3 => {
                let probed = self.handle().spawn(async move { http.probe(&asked, &options).await });
                let Probed { identity, head } = probed.await.map_err(cancelled)??;
                Ok(Some(ProbedFile { identity: kind.identity(identity), head, format: None, url: first }))
            }
            Kind::Nbd => {
                let nbd = self.nbd().clone();
                let probed = self.handle().spawn(async move { nbd.probe(&asked, &options).await });
                let (identity, head) = probed.await.map_err(cancelled)??;
                Ok(Some(ProbedFile { identity: identity.into(), head, format: None, url: first }))
            }
            Kind::Oci => {
                let probed = self.handle().spawn(async move { http.probe_artifact(&asked, &options).await });
                let ProbedArtifact { identity, head, url } = probed.await.map_err(cancelled)??;
                Ok(Some(ProbedFile { identity, head, format: None, url }))
            }
            Kind::Glance => {
                let whole = delivery == Delivery::Whole;
                let probed =
                    self.handle().spawn(async move { http.probe_image(&asked, &options, whole).await });
                let ProbedImage { identity, head, format, url } = probed.await.map_err(cancelled)??;
                Ok(Some(ProbedFile { identity, head, format: Some(format), url }))
            }
        }
    }

    /// The records of the active images of a cloud, and what each would be as a base.
    ///
    /// # Errors
    /// `Denied`, `Protocol` or `Unreachable`.
    pub async fn images_of(&self, cloud: &str) -> Result<Vec<OfferedImage>, SourceError> {
        let (http, asked) = (self.http().clone(), cloud.to_owned());
        let listed = self.handle().spawn(async move { http.list_images(&asked).await });
        let cancelled = |_| {
            let (why, advice) = ("the request was cancelled", "try again");
            SourceError::remote(SourceErrorKind::Unreachable, "read", cloud, why, advice)
        };
        let place = Whereabouts::Of(cloud.to_owned());
        let glance = ImagePlace { glance: place, image: String::new() };
        let offered = |record: ImageRecord| OfferedImage {
            url: glance.url_of(&record.id),
            unusable: record.unusable(),
            id: record.id,
            name: record.name,
            size: record.size,
            disk_format: record.disk_format,
            container_format: record.container_format,
        };
        Ok(listed.await.map_err(cancelled)??.into_iter().map(offered).collect())
    }

    /// The source that a file of a base is fetched from, proven where the file has a proof. Asks no server.
    ///
    /// # Errors
    /// Of a file of this host: when it cannot be opened or is another one, and not all of it is in the cache.
    pub(super) fn open_remote(
        &self,
        base: &BaseRecord,
        file: &ImageFile,
    ) -> Result<Arc<dyn RemoteSource>, SourceError> {
        let remote = self.open_unproven(base, file)?;
        let Some(proof) = file.proof.as_ref().filter(|proof| !proof.places.is_empty()) else {
            return Ok(remote);
        };
        let size = file.identity.size;
        let pages = self.proof_pages(&base.urls_of(file), size, proof, &base.options);
        self.open_proofs.add(SourceKey(proven_key(&proof.root, size)), &pages);
        let proven = ProvenRemote::new(remote, pages, proof.places.clone());
        Ok(Arc::new(proven.with_relatives(self.relatives.clone())))
    }

    /// Bytes of bases that came from what the host has of other bases, since the start of the worker.
    pub fn relative_bytes(&self) -> u64 {
        self.relatives.bytes()
    }

    /// The pages of the proof of a file that is read at `urls`. Asks no server.
    pub(super) fn proof_pages(
        &self,
        urls: &[String],
        size: u64,
        proof: &FileProof,
        options: &BaseOptions,
    ) -> Arc<ProofPages> {
        let header = ProofHeader { size, root: proof.root };
        let proof_size = Layout::of(size).proof_size();
        let remote: Arc<dyn RemoteSource> = match proof.places.first() {
            Some(path) if !Location::of(path).is_url() => {
                let spawn = Arc::new(OnRuntime::new(self.handle().clone(), Lane::new("proof", 1)));
                let (opener, file) = (self.opener().clone(), PathBuf::from(path));
                let open = Box::new(move || {
                    let found = FileSource::open_with(&*opener, &file).ok()?;
                    (found.size() == proof_size).then(|| Arc::new(found))
                });
                Arc::new(CopiedFile::new(path, proof_size, None, open, spawn))
            }
            _ => {
                // Its bytes prove themselves: no validator is needed.
                let identity =
                    HttpIdentity { size: proof_size, etag: None, last_modified: None, version: None };
                let contents = Some(ContentName::of_proof(&proof.root));
                let options =
                    RemoteOptions { strictness: Strictness::SizeOnly, contents, ..options_of(options) };
                self.http().open(&places_of(urls, &proof.places), identity, options)
            }
        };
        let kept = KeptPages::new(self.proof_disk(), SourceKey(proven_key(&proof.root, size)), header);
        ProofPages::new((proof.root, size), self.proven_pages().clone(), Some(kept), remote)
    }

    fn open_unproven(
        &self,
        base: &BaseRecord,
        file: &ImageFile,
    ) -> Result<Arc<dyn RemoteSource>, SourceError> {
        let size = file.identity.size;
        if let Some(image) = self.image(base, file) {
            return Ok(match file.identity.validator.is_read_as_a_whole() {
                true => self.whole(base, file, image),
                false => image,
            });
        }
        if let Some(export) = NbdIdentity::of(&file.identity) {
            return Ok(self.nbd().open(&base.urls_of(file), &export, options_of(&base.options)));
        }
        if let Some(artifact) = OciIdentity::of(&file.identity) {
            let blob = self.http().open_artifact(&base.urls_of(file), &artifact, options_of(&base.options));
            let range = artifact.offset..artifact.offset.saturating_add(artifact.size);
            return Ok(if artifact.is_all() { blob } else { Arc::new(Section::new(blob, range)) });
        }
        Ok(match HttpIdentity::of(&file.identity) {
            // Of a web server or a bucket.
            Some(identity) => self.http().open(&base.urls_of(file), identity, options_for(base, file)),
            // A file or device of this host.
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

    /// An image of a Glance; none when the file is of another kind.
    fn image(&self, base: &BaseRecord, file: &ImageFile) -> Option<Arc<HttpSource>> {
        let identity = GlanceIdentity::of(&file.identity)?;
        Some(self.http().open_image(&base.urls_of(file), identity, options_for(base, file)))
    }

    /// An image that comes as a whole: one for all its readers and for the job that fetches it.
    fn whole(&self, base: &BaseRecord, file: &ImageFile, source: Arc<HttpSource>) -> Arc<WholeImage> {
        let contents = self.contents(base, file);
        self.wholes.get(base.id, contents.file_keys().own, || {
            // Its reads wait for the cache's disk.
            let spawn = Arc::new(OnRuntime::new(self.handle().clone(), Lane::new("whole", READERS)));
            WholeImage::new(source, contents.clone(), spawn, options_of(&base.options).deadline)
        })
    }

    /// The image of a file that comes as a whole; none of another file. Asks no server.
    pub(super) fn whole_image(&self, base: &BaseRecord, file: &ImageFile) -> Option<Arc<WholeImage>> {
        if !file.identity.validator.is_read_as_a_whole() {
            return None;
        }
        Some(self.whole(base, file, self.image(base, file)?))
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
pub(super) fn options_of(options: &BaseOptions) -> RemoteOptions {
    RemoteOptions {
        strictness: options.strictness,
        deadline: (options.deadline_s > 0).then(|| Duration::from_secs(options.deadline_s.into())),
        max_requests: (options.max_requests > 0).then_some(options.max_requests),
        max_rate: (options.max_rate > 0).then_some(options.max_rate),
        contents: None,
    }
}

/// How the servers of a file of a base are asked, its peers too. An image that comes as a whole comes from one server.
fn options_for(base: &BaseRecord, file: &ImageFile) -> RemoteOptions {
    let by_ranges = !file.identity.validator.is_read_as_a_whole();
    RemoteOptions {
        contents: by_ranges.then(|| ContentName::of(file)).flatten(),
        ..options_of(&base.options)
    }
}
