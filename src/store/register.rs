//! Registers a base in place: copies and converts nothing.
//!
//! What must hold: the operator alone says what a base is. The contents of a raw file are never interpreted: when the
//! operator named no format, and they begin as those of another format, the file is refused. A file that only an image
//! names is never opened.

use std::path::Path;
use std::sync::Arc;

use super::base::reader;
use super::records::RECORD_LIMIT;
use super::{BaseNode, Store, StoreError, check_name};
use crate::format::layout;
use crate::format::record::{
    BaseIdentity, BaseOptions, BaseRecord, Digest, FileProof, ImageFile, ImageFormat, Moved, Token,
};
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
    /// Whether the operator named the format. A file that is raw by default only must not begin as another format does.
    pub is_format_given: bool,
    /// Identity and first bytes, as its server sent them; `None` for a file of this host.
    pub probed: Option<(BaseIdentity, Vec<u8>)>,
    /// By what its contents are proven.
    pub proof: Option<FileProof>,
}

/// A new base.
#[derive(Clone)]
pub struct NewBase {
    /// Name.
    pub name: String,
    /// The image.
    pub image: NewFile,
    /// The files below it, the nearest first.
    pub backing: Vec<NewFile>,
    /// A base whose files lie below those.
    pub onto: Option<Arc<BaseNode>>,
    /// Digest of the image's file.
    pub digest: Option<Digest>,
    /// How the base is fetched and kept.
    pub options: BaseOptions,
    /// Token of the request, which the client may send again.
    pub token: Option<Token>,
}

impl NewBase {
    /// A raw file of this host.
    pub fn raw(name: &str, path: &str, digest: Option<Digest>) -> Self {
        let image = NewFile {
            source: path.into(),
            mirrors: Vec::new(),
            format: ImageFormat::Raw,
            is_format_given: true,
            probed: None,
            proof: None,
        };
        let (backing, options) = (Vec::new(), BaseOptions::default());
        Self { name: name.into(), image, backing, onto: None, digest, options, token: None }
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

    /// Checks that a base of that name could be registered. To be called before a server is asked.
    ///
    /// # Errors
    /// A bad name, a name that is taken.
    pub fn may_register(&self, name: &str) -> Result<(), StoreError> {
        check_name("base", name)?;
        self.unavailable.check_base_name(name)?;
        if self.names.read().base_names.contains_key(name) {
            return Err(StoreError::Exists { object: format!("base {name}") });
        }
        Ok(())
    }

    /// Registers a base, once. A base that has the name and was registered for the same token counts as registered.
    ///
    /// # Errors
    /// A bad name, a name that is taken, a file that cannot be read, an image that is refused.
    pub fn register(&self, new: NewBase) -> Result<Arc<BaseNode>, StoreError> {
        if let Some(made) = self.registered_by(&new.name, new.token) {
            return Ok(made);
        }
        self.may_register(&new.name)?;
        let object = format!("base {}", new.name);
        let onto = new.onto.as_ref().map(|base| base.current());
        let files = new.backing.len() + onto.as_ref().map_or(0, |record| record.files().count());
        if files > ImageFile::MAX_FILES {
            let why =
                format!("it has {files} backing files, and at most {} are possible", ImageFile::MAX_FILES);
            return Err(StoreError::invalid(object, why));
        }
        let chain = |below: bool| if below { Chain::OnBacking } else { Chain::Alone };
        let mut image = self.inspect_file(&object, new.image, chain(files > 0))?;
        image.identity.digest = new.digest;
        let given = new.backing.len();
        let backing = new.backing.into_iter().enumerate();
        let mut backing: Vec<ImageFile> = backing
            .map(|(index, file)| self.inspect_file(&object, file, chain(index + 1 < files)))
            .collect::<Result<_, _>>()?;
        let (mut options, mut moved) = (new.options, Vec::new());
        if let Some(onto) = onto {
            if onto.options.refused {
                let why = format!("base {} is refused, because it does not match its digest", onto.name);
                return Err(StoreError::invalid(object, why));
            }
            // Its servers answer as they did.
            let pinned = options.pinned;
            options = BaseOptions { pinned, hydrate: false, given_up: false, copies: None, ..onto.options };
            let place = |file: u8| file + 1 + given as u8;
            moved = onto.moved.iter().map(|m| Moved { file: place(m.file), urls: m.urls.clone() }).collect();
            backing.extend(onto.files().cloned());
        }
        // Opening files may hang, so they were inspected before the name is claimed.
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
            options,
            moved,
            token: new.token,
        };
        // Before the encoding, which takes no longer field.
        let places = record.files().flat_map(|file| file.proof.iter().flat_map(|proof| &proof.places));
        if places.map(String::len).sum::<usize>() as u64 > RECORD_LIMIT / 2 {
            return Err(StoreError::invalid(object, "the places of its proofs are too long together"));
        }
        let bytes = record.encode();
        if bytes.len() as u64 > RECORD_LIMIT {
            return Err(StoreError::invalid(object, "its paths and URLs are too long together; omit some"));
        }
        replace(&*self.medium, layout::BASES, &layout::base_record(record.id), &bytes)
            .map_err(StoreError::io(object, "writing its record"))?;
        let node = Arc::new(self.base_node(record));
        let mut names = self.names.write();
        names.base_names.insert(new.name, node.id());
        names.bases.insert(node.id(), node.clone());
        Ok(node)
    }

    /// The base of that name, if an earlier attempt of the same request registered it.
    pub fn registered_by(&self, name: &str, token: Option<Token>) -> Option<Arc<BaseNode>> {
        let base = self.base(name).ok()?;
        (token.is_some() && base.record().token == token).then_some(base)
    }

    /// Inspects a file of a base: its identity and, unless it is raw, its header. `chain`: whether the operator named a
    /// file below it.
    fn inspect_file(&self, object: &str, new: NewFile, chain: Chain) -> Result<ImageFile, StoreError> {
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
            return Err(invalid(format!(
                "it has too many mirrors; at most {} are possible",
                ImageFile::MAX_FILES
            )));
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
        if identity.validator.needs_a_format() && !new.is_format_given {
            return Err(invalid(format!(
                "{}: nothing of a block device says its format; pass --format raw, or qcow2 or vmdk when such an image \
                 was written onto it",
                new.source
            )));
        }
        let size = match reader(new.format) {
            None => match (!new.is_format_given).then(|| image::not_raw_by_default(&head)).flatten() {
                Some(refusal) => Err(refusal),
                None => image::inspect(image::Format::Raw, &[], identity.size, chain),
            },
            Some(format) => image::inspect(format, &head, identity.size, chain),
        };
        let disk_size =
            size.map_err(|error| invalid(format!("{}: {error}", display_source(&new.source))))?.size;

        if disk_size == 0 {
            return Err(invalid("its virtual disk has 0 bytes; give an image that is not empty".into()));
        }
        let NewFile { source, mirrors, format, proof, .. } = new;
        Ok(ImageFile { source, mirrors, format, disk_size, identity, proof })
    }
}

/// A path as it is; a URL may contain secrets and is not display_source.
fn display_source(source: &str) -> &str {
    if Location::of(source).is_url() { "its image" } else { source }
}
