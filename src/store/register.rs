//! Registering a base: nothing is copied, nothing is converted.
//!
//! What must hold: a base is what its operator says it is. A raw file is never looked into, and no file is opened that
//! only an image names.

use std::path::Path;
use std::sync::Arc;

use super::base::reader;
use super::records::RECORD_LIMIT;
use super::{BaseNode, Store, StoreError, check_name};
use crate::format::layout;
use crate::format::record::{BaseIdentity, BaseOptions, BaseRecord, Digest, ImageFile, ImageFormat, Token};
use crate::image::{self, Chain, HEAD};
use crate::io::{replace, sys};
use crate::source::{Location, Source, SourceError};

/// Longest path or URL, bytes.
const MAX_SOURCE: usize = 4096;

/// A file of a new base.
#[derive(Debug, Clone)]
pub struct NewFile {
    /// Absolute path, or URL.
    pub source: String,
    /// URLs of the same content.
    pub mirrors: Vec<String>,
    /// Format.
    pub format: ImageFormat,
    /// What its server said of it, and its first bytes; none for a file of this host.
    pub probed: Option<(BaseIdentity, Vec<u8>)>,
}

/// A new base.
#[derive(Debug, Clone)]
pub struct NewBase {
    /// Name.
    pub name: String,
    /// The image.
    pub image: NewFile,
    /// The files below it, the nearest first.
    pub backing: Vec<NewFile>,
    /// Of the image's file.
    pub digest: Option<Digest>,
    /// How it is fetched and kept.
    pub options: BaseOptions,
    /// The request that a client may send again.
    pub token: Option<Token>,
}

impl NewBase {
    /// A raw file of this host.
    pub fn raw(name: &str, path: &str, digest: Option<Digest>) -> Self {
        let image =
            NewFile { source: path.into(), mirrors: Vec::new(), format: ImageFormat::Raw, probed: None };
        let (backing, options) = (Vec::new(), BaseOptions::default());
        Self { name: name.into(), image, backing, digest, options, token: None }
    }
}

impl Store {
    /// Registers a raw file of this host as a base, in place.
    ///
    /// # Errors
    /// As [`Store::register`].
    pub fn add_base(
        &self,
        name: &str,
        source: &str,
        digest: Option<Digest>,
    ) -> Result<Arc<BaseNode>, StoreError> {
        self.register(NewBase::raw(name, source, digest))
    }

    /// Whether a base of that name could be registered, to be asked before a server is.
    ///
    /// # Errors
    /// A bad name, a name that is taken.
    pub fn may_register(&self, name: &str) -> Result<(), StoreError> {
        check_name("base", name)?;
        self.missing.check_base_name(name)?;
        if self.names.read().base_names.contains_key(name) {
            return Err(StoreError::Exists { object: format!("base {name}") });
        }
        Ok(())
    }

    /// Registers a base, once: one that has the name and was registered for the same token is taken for it.
    ///
    /// # Errors
    /// A bad name, a name that is taken, a file that cannot be read, an image that is refused.
    pub fn register(&self, new: NewBase) -> Result<Arc<BaseNode>, StoreError> {
        if let Some(made) = self.registered_by(&new.name, new.token) {
            return Ok(made);
        }
        self.may_register(&new.name)?;
        let object = format!("base {}", new.name);
        if new.backing.len() > ImageFile::MAX_FILES {
            let why = format!("{} backing files, at most {} can be", new.backing.len(), ImageFile::MAX_FILES);
            return Err(StoreError::invalid(object, why));
        }
        let chain = |below: bool| if below { Chain::OnBacking } else { Chain::Alone };
        let mut image = self.look_at(&object, new.image, chain(!new.backing.is_empty()))?;
        image.identity.digest = new.digest;
        let below = new.backing.len();
        let backing = new.backing.into_iter().enumerate();
        let backing: Vec<ImageFile> = backing
            .map(|(index, file)| self.look_at(&object, file, chain(index + 1 < below)))
            .collect::<Result<_, _>>()?;
        // Files may hang: they were looked at before the name is claimed.
        let _claim = self.claims.base_name(&new.name);
        if let Some(made) = self.registered_by(&new.name, new.token) {
            return Ok(made);
        }
        self.may_register(&new.name)?;
        let record = BaseRecord {
            id: self.new_id()?,
            name: new.name.clone(),
            image,
            backing,
            created_ns: sys::now_ns(),
            options: new.options,
            moved: Vec::new(),
            token: new.token,
        };
        let bytes = record.encode();
        if bytes.len() as u64 > RECORD_LIMIT {
            return Err(StoreError::invalid(
                object,
                "its paths and URLs are too long in all; leave some away",
            ));
        }
        replace(&*self.medium, layout::BASES, &layout::base_record(record.id), &bytes)
            .map_err(StoreError::io(object, "writing its record"))?;
        let node = BaseNode::new(record, self.medium.clone(), self.cache.clone(), self.sources.clone());
        let node = Arc::new(node);
        let mut names = self.names.write();
        names.base_names.insert(new.name, node.id());
        names.bases.insert(node.id(), node.clone());
        Ok(node)
    }

    /// The base of that name, when an earlier try of the same request has registered it.
    pub fn registered_by(&self, name: &str, token: Option<Token>) -> Option<Arc<BaseNode>> {
        let base = self.base(name).ok()?;
        (token.is_some() && base.record().token == token).then_some(base)
    }

    /// Looks at a file of a base: what it is, and what its head says when it is not raw. `chain`: whether its operator
    /// named a file that is below it.
    fn look_at(&self, object: &str, new: NewFile, chain: Chain) -> Result<ImageFile, StoreError> {
        let invalid = |why: String| StoreError::invalid(object, why);
        let fail = |source: SourceError| StoreError::Source { object: object.to_owned(), source };
        for source in std::iter::once(&new.source).chain(&new.mirrors) {
            if source.len() > MAX_SOURCE || source.contains('\0') {
                return Err(invalid(format!(
                    "the path or URL is longer than {MAX_SOURCE} bytes or has a zero byte"
                )));
            }
        }
        if new.mirrors.len() > ImageFile::MAX_FILES {
            return Err(invalid(format!("at most {} mirrors can be", ImageFile::MAX_FILES)));
        }
        let (identity, head) = match new.probed {
            Some(probed) => probed,
            None => {
                let path = Path::new(&new.source);
                if !path.is_absolute() {
                    return Err(invalid(format!("the path {:?} is not absolute", new.source)));
                }
                let source = self.sources.file(path).map_err(fail)?;
                let mut head = vec![0; HEAD.min(source.size()) as usize];
                let read = source.read_at(&mut head, 0).map_err(fail)?;
                head.truncate(read);
                (source.found(), head)
            }
        };
        let size = match reader(new.format) {
            None => match image::compressed_as_a_whole(image::Format::Raw, &new.source, &head) {
                Some(refusal) => Err(refusal),
                None => image::inspect(image::Format::Raw, &[], identity.size, chain),
            },
            Some(format) => image::inspect(format, &head, identity.size, chain),
        };
        let disk_size = size.map_err(|error| invalid(format!("{}: {error}", shown(&new.source))))?.size;

        if disk_size == 0 {
            return Err(invalid("its virtual disk has 0 bytes; an image has at least one".into()));
        }
        let NewFile { source, mirrors, format, .. } = new;
        Ok(ImageFile { source, mirrors, format, disk_size, identity })
    }
}

/// A path, or a URL without what may be secret.
fn shown(source: &str) -> &str {
    if Location::of(source).is_url() { "its image" } else { source }
}
