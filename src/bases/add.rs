//! Adding and removing bases.

use std::sync::Arc;

use super::Bases;
use super::sources::options_of;
use crate::fetch::kept::{CACHE_BLOCK, Contents};
use crate::format::record::{BaseIdentity, BaseOptions, Digest, ImageFormat, Strictness, Token, Validator};
use crate::source::Location;
use crate::source::http::check_url;
use crate::store::{BaseNode, NewBase, NewFile, StoreError};

/// Longest of a deadline, seconds: a year.
const MAX_DEADLINE_S: u32 = 366 * 24 * 3600;
/// Most requests at a time.
const MAX_REQUESTS: u32 = 256;
/// Least bytes per second.
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
    /// Of the file of the image.
    pub digest: Option<Digest>,
    /// Which validators of a server's answer must still match.
    pub strictness: Strictness,
    /// Seconds after which a read that waits for the server fails; 0 or none: never.
    pub deadline_s: Option<u32>,
    /// Requests at a time.
    pub max_requests: Option<u32>,
    /// Bytes per second.
    pub max_rate: Option<u64>,
    /// Whether what is fetched of it is never evicted for others.
    pub pinned: bool,
    /// The request of a client that may ask again.
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

/// A base whose servers were asked: what is left may wait for files only.
pub enum Prepared {
    /// An earlier try of the same request has registered it.
    Known(Arc<BaseNode>),
    /// To be registered; with the first bytes of the image, when they came from a server.
    New(Box<NewBase>, Option<Vec<u8>>),
}

/// The format that was given, or else the one that the name says.
fn format_of(file: &File) -> ImageFormat {
    let path = Location::without_query(&file.source);
    match file.format {
        Some(given) => given,
        None if path.ends_with(".qcow2") => ImageFormat::Qcow2,
        None if path.ends_with(".vmdk") => ImageFormat::Vmdk,
        None => ImageFormat::Raw,
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
        })
    }
}

impl Bases {
    /// Asks the servers of a new base for the identity of its files, and no server when it cannot be registered anyway.
    ///
    /// # Errors
    /// A bad or taken name, options out of bounds, a server that refuses or cannot be reached.
    pub async fn prepare(&self, new: Description) -> Result<Prepared, StoreError> {
        if let Some(base) = self.store.registered_by(&new.name, new.token) {
            return Ok(Prepared::Known(base));
        }
        let options = new.options()?;
        self.store.may_register(&new.name)?;
        let object = new.object();
        let Description { name, image, backing: below, digest, token, .. } = new;
        let image = self.look_at(&object, image, &options).await?;
        let head = image.probed.as_ref().map(|(_, head)| head.clone());
        let mut backing = Vec::with_capacity(below.len());
        for file in below {
            backing.push(self.look_at(&object, file, &options).await?);
        }
        Ok(Prepared::New(Box::new(NewBase { name, image, backing, digest, options, token }), head))
    }

    async fn look_at(&self, object: &str, file: File, options: &BaseOptions) -> Result<NewFile, StoreError> {
        let format = format_of(&file);
        let urls: Vec<String> = std::iter::once(&file.source).chain(&file.mirrors).cloned().collect();
        let probed = self.probe(object, &urls, options).await?;
        let is_format_given = file.format.is_some();
        Ok(NewFile { source: file.source, mirrors: file.mirrors, format, is_format_given, probed })
    }

    /// A URL's identity and first bytes, from its server; nothing for a path.
    pub(super) async fn probe(
        &self,
        object: &str,
        urls: &[String],
        options: &BaseOptions,
    ) -> Result<Option<(BaseIdentity, Vec<u8>)>, StoreError> {
        let wrap = |source| StoreError::Source { object: object.to_owned(), source };
        let [first, mirrors @ ..] = urls else { return Ok(None) };
        if !Location::of(first).is_url() {
            return match mirrors {
                [] => Ok(None),
                _ => Err(StoreError::invalid(object, "mirrors are of URLs; the source is a path")),
            };
        }
        urls.iter().try_for_each(|url| check_url(url)).map_err(wrap)?;
        let (http, urls, options) = (self.sources.http().clone(), urls.to_vec(), options_of(options));
        let asked = self.sources.handle().spawn(async move { http.probe(&urls, &options).await });
        let probed =
            asked.await.map_err(|_| StoreError::invalid(object, "asking its server was given up"))?;
        let probed = probed.map_err(wrap)?;
        let validator =
            Validator::Http { etag: probed.identity.etag, last_modified: probed.identity.last_modified };
        Ok(Some((BaseIdentity { size: probed.identity.size, validator, digest: None }, probed.head)))
    }

    /// Registers a base, and begins to hydrate it where that is configured. May wait for its files.
    ///
    /// # Errors
    /// A name that was taken meanwhile, a file that cannot be a base, what the storage says.
    pub fn add(&self, prepared: Prepared) -> Result<Arc<BaseNode>, StoreError> {
        let (new, head) = match prepared {
            Prepared::Known(base) => return Ok(base),
            Prepared::New(new, head) => (new, head),
        };
        for file in std::iter::once(&new.image).chain(&new.backing) {
            self.refuse_own_mount(&new.name, &file.source)?;
        }
        let base = self.store.register(*new)?;
        if let Some(head) = head {
            keep_head(&self.sources.contents(base.record(), &base.record().image), &head);
        }
        if self.hydrates_new
            && let Err(error) = self.hydrations.hydrate(&base, None)
        {
            // It is a base all the same.
            tracing::warn!(%error, "a new base is not hydrated");
        }
        Ok(base)
    }

    /// A base on the mount of this daemon would wait for itself.
    fn refuse_own_mount(&self, name: &str, source: &str) -> Result<(), StoreError> {
        let Location::File(path) = Location::of(source) else { return Ok(()) };
        if !std::fs::canonicalize(path).is_ok_and(|path| path.starts_with(&self.mount)) {
            return Ok(());
        }
        let why = format!("{source} lies on this daemon's own mount; give a file of another filesystem");
        Err(StoreError::invalid(format!("base {name}"), why))
    }

    /// Removes a base that no disk needs, with what is kept of it and is no other's.
    ///
    /// # Errors
    /// `NotFound`; `InUse` with the names of the disks that need it; what the storage says.
    pub fn remove(&self, name: &str) -> Result<(), StoreError> {
        let base = self.store.base(name)?;
        self.store.remove_base(name)?;
        self.hydrations.forget(base.id());
        self.sources.forget(base.record(), &self.others(&base));
        Ok(())
    }
}

/// What was asked for to learn the identity need not be asked for again.
fn keep_head(kept: &Contents, head: &[u8]) {
    let block = CACHE_BLOCK as usize;
    let whole = if head.len() as u64 == kept.size() { head.len() } else { head.len() / block * block };
    if whole > 0 {
        kept.insert(0, &head[..whole]);
    }
}
