//! Adding and removing bases.

use std::sync::Arc;

use super::Bases;
use super::origin::{Delivery, ProbedFile};
use super::proofs::Wanted;
use crate::fetch::kept::{CACHE_BLOCK, Contents};
use crate::format::record::{BaseOptions, Digest, ImageFormat, Strictness, Token};
use crate::source::http::peer::is_peer;
use crate::source::{Kind, Location, shown};
use crate::store::{BaseNode, NewBase, NewFile, StoreError};

/// Longest deadline, seconds: a year.
const MAX_DEADLINE_S: u32 = 366 * 24 * 3600;
/// Most requests at a time that a base may have.
const MAX_REQUESTS: u32 = 256;
/// Lowest limit of bytes per second.
const MIN_RATE: u64 = 64 << 10;

/// A base as its operator describes it.
#[derive(Debug, Clone)]
pub struct Description {
    /// Name.
    pub name: String,
    /// The image.
    pub image: File,
    /// The files below it, the nearest first.
    pub backing: Vec<File>,
    /// Name of a base whose files lie below those.
    pub onto: Option<String>,
    /// Digest of the image's file.
    pub digest: Option<Digest>,
    /// What is known of the proof of the image's file.
    pub proof: Wanted,
    /// Which validators of a server's answer must still match.
    pub strictness: Strictness,
    /// Seconds after which a read that waits for the server fails; 0 or none: never.
    pub deadline_s: Option<u32>,
    /// Most requests at a time.
    pub max_requests: Option<u32>,
    /// Most bytes per second.
    pub max_rate: Option<u64>,
    /// Whether its blocks in the cache are never evicted for others.
    pub pinned: bool,
    /// How the bytes of the image come.
    pub delivery: Delivery,
    /// The token of a request that the client may send again.
    pub token: Option<Token>,
}

/// A file of a base as its operator describes it.
#[derive(Debug, Clone)]
pub struct File {
    /// Absolute path or URL.
    pub source: String,
    /// Other URLs of the same content.
    pub mirrors: Vec<String>,
    /// Format; none: as the end of its name says. The contents choose no format; a raw file that begins as another
    /// format does is refused.
    pub format: Option<ImageFormat>,
}

/// A new base after the requests to its servers: registering it waits at most for files.
pub enum PreparedBase {
    /// An earlier attempt of the same request registered it.
    Known(Arc<BaseNode>),
    /// It is to be registered; with the first bytes of the image, when a server sent them.
    New(Box<NewBase>, Option<Vec<u8>>, Wanted),
}

/// The given format, or else the one of the name's end.
fn format_of(file: &File) -> ImageFormat {
    let path = Location::without_query(&file.source);
    match file.format {
        Some(given) => given,
        None if path.ends_with(".qcow2") => ImageFormat::Qcow2,
        None if path.ends_with(".vmdk") => ImageFormat::Vmdk,
        None => ImageFormat::Raw,
    }
}

fn word(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
        ImageFormat::Vmdk => "vmdk",
    }
}

/// The proof of an image whose bytes come in this way.
///
/// # Errors
/// `Invalid` for a proof of an image that comes as a whole: nothing asks for its groups, and the digest covers all of it.
fn wanted_of(object: &str, wanted: &Wanted, delivery: Delivery) -> Result<Wanted, StoreError> {
    match delivery {
        Delivery::Ranges => Ok(wanted.clone()),
        Delivery::Whole if wanted.place.is_some() => {
            let why = "an image that is fetched as a whole is compared with its digest, and has no use for a proof; omit --proof or --download";
            Err(StoreError::invalid(object, why))
        }
        Delivery::Whole => Ok(Wanted { none: true, ..wanted.clone() }),
    }
}

/// Refuses peers of a file that they could not be asked for.
///
/// # Errors
/// `Invalid`.
pub(super) fn asked_by_digest(object: &str, mirrors: &[String], has_digest: bool) -> Result<(), StoreError> {
    match mirrors.iter().find(|mirror| is_peer(mirror)) {
        Some(peer) if !has_digest => {
            let why = format!(
                "{} is asked by the digest of the image, and this one has none; publish its proof beside it (`plyfs base \
                 seal`), or give --blake3 or --sha256",
                shown(peer)
            );
            Err(StoreError::invalid(object, why))
        }
        _ => Ok(()),
    }
}

impl Description {
    fn object(&self) -> String {
        format!("base {}", self.name)
    }

    fn options(&self) -> Result<BaseOptions, StoreError> {
        let invalid = |why: &str| Err(StoreError::invalid(self.object(), why));
        let deadline_s = self.deadline_s.unwrap_or(0);
        if deadline_s > MAX_DEADLINE_S {
            return invalid("deadline: it is at most 366 days; omit it to wait for ever");
        }
        if self.max_requests.is_some_and(|n| !(1..=MAX_REQUESTS).contains(&n)) {
            return invalid("max_requests: it is 1 to 256");
        }
        if self.max_rate.is_some_and(|n| n < MIN_RATE) {
            return invalid("max_rate: it is at least 64K per second");
        }
        Ok(BaseOptions {
            strictness: self.strictness,
            deadline_s,
            max_requests: self.max_requests.unwrap_or(0),
            max_rate: self.max_rate.unwrap_or(0),
            pinned: self.pinned,
            hydrate: false,
            refused: false,
            given_up: false,
            copies: None,
        })
    }
}

impl Bases {
    /// Gets the identity of each file of a new base from its servers. Sends no request when the base cannot be
    /// registered.
    ///
    /// # Errors
    /// `Invalid` or `Exists` for the name; `Invalid` for an option out of bounds; `Source` for a server that refuses or
    /// cannot be reached.
    pub async fn prepare(&self, new: Description) -> Result<PreparedBase, StoreError> {
        if let Some(base) = self.store.registered_by(&new.name, new.token) {
            return Ok(PreparedBase::Known(base));
        }
        let options = new.options()?;
        self.store.may_register(&new.name)?;
        let object = new.object();
        let onto = new.onto.as_deref().map(|name| self.store.base(name)).transpose()?;
        let Description { name, image, backing: below, digest, token, delivery, proof, .. } = new;
        let image = self.prepare_file(&object, image, &options, delivery, &proof).await?;
        // A digest that the record of the image states is as good as one that the operator gives.
        let stated = image.probed.as_ref().and_then(|(identity, _)| identity.digest.clone());
        if let (Some(given), Some(stated)) = (&digest, &stated)
            && std::mem::discriminant(given) == std::mem::discriminant(stated)
            && given != stated
        {
            let why = "the digest that is given is not the one of the image's record; correct it, or omit it";
            return Err(StoreError::invalid(object, why));
        }
        let digest = digest.or(stated);
        asked_by_digest(&object, &image.mirrors, image.proof.is_some() || digest.is_some())?;
        let head = image.probed.as_ref().map(|(_, head)| head.clone());
        let mut backing = Vec::with_capacity(below.len());
        for file in below {
            let below = proof.of_backing();
            let mut file = self.prepare_file(&object, file, &options, Delivery::Ranges, &below).await?;
            // A base has the digest of its image only.
            file.probed.iter_mut().for_each(|(identity, _)| identity.digest = None);
            asked_by_digest(&object, &file.mirrors, file.proof.is_some())?;
            backing.push(file);
        }
        let new = NewBase { name, image, backing, onto, digest, options, token };
        Ok(PreparedBase::New(Box::new(new), head, proof))
    }

    async fn prepare_file(
        &self,
        object: &str,
        file: File,
        options: &BaseOptions,
        delivery: Delivery,
        wanted: &Wanted,
    ) -> Result<NewFile, StoreError> {
        let urls: Vec<String> = std::iter::once(&file.source).chain(&file.mirrors).cloned().collect();
        let probed = self.probe(object, &urls, options, delivery).await?;
        let stated = probed.as_ref().and_then(|probed| probed.format);
        if let (Some(given), Some(stated)) = (file.format, stated)
            && given != stated
        {
            let why = format!(
                "{}: its record says that it is {}, not {}; omit --format",
                shown(&file.source),
                word(stated),
                word(given)
            );
            return Err(StoreError::invalid(object, why));
        }
        let format = stated.unwrap_or_else(|| format_of(&file));
        // A record that says raw is no proof: an image that begins as another format does is refused.
        let is_format_given = file.format.is_some() && stated.is_none();
        let proof = match &probed {
            // A file of this host is looked at when it is registered.
            None => None,
            Some(ProbedFile { identity, head, .. }) => {
                let wanted = wanted_of(object, wanted, delivery)?;
                let found = self.sources.find_proof(&urls, (identity.size, head), &wanted, options).await;
                found.map_err(|source| StoreError::Source { object: object.to_owned(), source })?
            }
        };
        let source = probed.as_ref().map_or(file.source, |probed| probed.url.clone());
        let probed = probed.map(|probed| (probed.identity, probed.head));
        Ok(NewFile { source, mirrors: file.mirrors, format, is_format_given, probed, proof })
    }

    /// Identity and first bytes from the server of the first URL; none for a path.
    pub(super) async fn probe(
        &self,
        object: &str,
        urls: &[String],
        options: &BaseOptions,
        delivery: Delivery,
    ) -> Result<Option<ProbedFile>, StoreError> {
        let wrap = |source| StoreError::Source { object: object.to_owned(), source };
        let [first, mirrors @ ..] = urls else { return Ok(None) };
        let kind = Kind::of(first).map_err(wrap)?;
        if !Location::of(first).is_url() && !mirrors.is_empty() {
            return Err(StoreError::invalid(
                object,
                "mirrors are of URLs; the source is a path, so omit them",
            ));
        }
        kind.check(urls).map_err(wrap)?;
        // A peer has a part of it at most, and under another name.
        let servers: Vec<String> = urls.iter().filter(|url| !is_peer(url)).cloned().collect();
        self.sources.probe(kind, &servers, options, delivery).await.map_err(wrap)
    }

    /// Registers a base, and begins to hydrate it where that is configured. May wait for its files.
    ///
    /// # Errors
    /// `Exists` for a name that was taken meanwhile, `Invalid` for a file that cannot be a base, errors of the storage.
    pub fn add(&self, prepared: PreparedBase) -> Result<Arc<BaseNode>, StoreError> {
        let (mut new, head, wanted) = match prepared {
            PreparedBase::Known(base) => return Ok(base),
            PreparedBase::New(new, head, wanted) => (new, head, wanted),
        };
        for file in std::iter::once(&new.image).chain(&new.backing) {
            self.refuse_own_mount(&new.name, &file.source)?;
        }
        if let Some(place) = &wanted.place {
            self.refuse_own_mount(&new.name, place)?;
        }
        let object = format!("base {}", new.name);
        let wrap = |source| StoreError::Source { object: object.clone(), source };
        let below = wanted.of_backing();
        let files = std::iter::once((&mut new.image, &wanted));
        for (file, wanted) in files.chain(new.backing.iter_mut().map(|file| (file, &below))) {
            if file.probed.is_none() {
                file.proof = self.find_proof_file(&file.source, wanted).map_err(wrap)?;
            }
        }
        let base = self.store.register(*new)?;
        if let Some(head) = head {
            keep_head(&self.sources.contents(base.record(), &base.record().image), &head);
        }
        if base.record().image.identity.validator.is_read_as_a_whole() {
            // Without the job that fetches it, no byte of it can be read.
            if let Err(error) = self.hydrations.hydrate(&base, None) {
                self.remove(&base.record().name)?;
                return Err(error);
            }
        } else if self.hydrates_new
            && let Err(error) = self.hydrations.hydrate(&base, None)
        {
            // It is registered all the same.
            tracing::warn!(%error, "a new base is not hydrated; start it with: plyfs base hydrate NAME");
        }
        Ok(base)
    }

    /// Refuses a file on this daemon's own mount: the base would wait for itself.
    fn refuse_own_mount(&self, name: &str, source: &str) -> Result<(), StoreError> {
        let Location::File(path) = Location::of(source) else { return Ok(()) };
        if !std::fs::canonicalize(path).is_ok_and(|path| path.starts_with(&self.mount)) {
            return Ok(());
        }
        let why = format!("{source} lies on this daemon's own mount; give a file of another filesystem");
        Err(StoreError::invalid(format!("base {name}"), why))
    }

    /// Removes a base that no disk needs, and its contents in the cache that no other base has.
    ///
    /// # Errors
    /// `NotFound`; `InUse` with the names of the disks that need it; errors of the storage.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let base = self.store.base(name)?;
        self.store.remove_base(name)?;
        self.hydrations.forget(base.id());
        self.examiner.forget(base.id());
        self.sources.forget(base.record(), &self.others(&base));
        Ok(())
    }
}

/// Keeps the bytes that came with the identity, so that they are not fetched again.
fn keep_head(kept: &Contents, head: &[u8]) {
    let block = CACHE_BLOCK as usize;
    let whole = if head.len() as u64 == kept.size() { head.len() } else { head.len() / block * block };
    if whole > 0 {
        kept.insert(0, &head[..whole]);
    }
}
