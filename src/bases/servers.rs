//! The servers of bases: where a base is from now on, and that it is given up.

use std::sync::Arc;

use super::Bases;
use super::sources::options_of;
use crate::format::record::{BaseIdentity, BaseOptions, BaseRecord, ImageFile, Validator};
use crate::source::http::{HttpIdentity, check_url, shown};
use crate::source::{SourceError, SourceErrorKind};
use crate::store::{BaseNode, StoreError};

/// Other URLs of a file of a base, whose first has the object that was registered.
pub struct Moving {
    base: Arc<BaseNode>,
    record: BaseRecord,
    number: u8,
    file: ImageFile,
    urls: Vec<String>,
    head: Vec<u8>,
}

impl Bases {
    /// Asks whether a URL has the object of a file of a base (0 is the image, 1 the file below it). Without `mirrors` those
    /// that it has stay.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a file of this host or one that is not there; a server that refuses, cannot be reached or
    /// has another object.
    pub async fn prepare_move(
        &self,
        name: &str,
        number: u8,
        source: String,
        mirrors: Option<Vec<String>>,
    ) -> Result<Moving, StoreError> {
        let object = format!("base {name}");
        let base = self.store.base(name)?;
        let record = base.current();
        let Some(file) = record.files().nth(number.into()).cloned() else {
            return Err(StoreError::invalid(object, format!("it has {} files", 1 + record.backing.len())));
        };
        let Validator::Http { etag, last_modified } = file.identity.validator.clone() else {
            let why = "its source is a file of this host, which has no URL; add the URL as a new base";
            return Err(StoreError::invalid(object, why));
        };
        let mirrors = mirrors.unwrap_or_else(|| record.urls_of(&file).split_off(1));
        let urls: Vec<String> = std::iter::once(source).chain(mirrors).collect();
        // The new URL alone: mirrors that are away are no hindrance, and are held to the identity when they are read.
        let Some((found, head)) = self.probe(&object, &urls[..1], &record.options).await? else {
            return Err(StoreError::invalid(object, format!("{} is not a URL", shown(&urls[0]))));
        };
        let pinned = HttpIdentity { size: file.identity.size, etag, last_modified };
        same(&pinned, &found, &record.options, &urls[0])
            .map_err(|source| StoreError::Source { object, source })?;
        Ok(Moving { base, record, number, file, urls, head })
    }

    /// Reads of a file of a base go to other URLs, from now on and durably. A base that was given up is served again.
    ///
    /// # Errors
    /// A mirror that is no URL; an object that begins with other bytes than those that are kept; what the storage says.
    pub fn move_to(&self, moving: Moving) -> Result<Arc<BaseNode>, StoreError> {
        let Moving { base, record, number, file, urls, head } = moving;
        let wrap = |source| StoreError::Source { object: format!("base {}", record.name), source };
        urls.iter().try_for_each(|url| check_url(url)).map_err(wrap)?;
        if self.sources.differs(&record, &file, &head).map_err(wrap)? {
            return Err(wrap(another(&urls[0], "it begins with other bytes")));
        }
        base.set_urls(number, urls.clone())?;
        self.sources.set_urls(&record, &file, &urls).map_err(wrap)?;
        self.sources.give_up(base.id(), false);
        Ok(base)
    }

    /// Gives a base up, or no longer: what waits for its servers ends with an error.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a base without a server; what the storage says.
    pub fn give_up(&self, name: &str, given_up: bool) -> Result<Arc<BaseNode>, StoreError> {
        let base = self.store.base(name)?;
        if base.record().files().all(ImageFile::is_local) {
            let why = "its source is a file of this host; reads of it wait for no server";
            return Err(StoreError::invalid(format!("base {name}"), why));
        }
        base.set_options(|options| options.given_up = given_up)?;
        self.sources.give_up(base.id(), given_up);
        Ok(base)
    }
}

pub(super) fn same(
    pinned: &HttpIdentity,
    found: &BaseIdentity,
    options: &BaseOptions,
    url: &str,
) -> Result<(), SourceError> {
    let Validator::Http { etag, last_modified } = &found.validator else { return Ok(()) };
    let found = HttpIdentity { size: found.size, etag: etag.clone(), last_modified: last_modified.clone() };
    let strictness = options_of(options).strictness;
    pinned.fits(strictness, &found).map_err(|why| another(url, &why))
}

fn another(url: &str, why: &str) -> SourceError {
    let why = format!("it is another object than the base's: {why}");
    let advice = "give a URL of the same content, or add it as a new base";
    SourceError::remote(SourceErrorKind::Changed, "use", shown(url), why, advice)
}
