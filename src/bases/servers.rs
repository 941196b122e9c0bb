//! The servers of bases: moving a base to other URLs, and giving it up.

use std::sync::Arc;

use super::Bases;
use super::add::asked_by_digest;
use super::origin::{Delivery, OfferedImage, ProbedFile};
use crate::format::record::{BaseRecord, ImageFile};
use crate::source::{Kind, SourceError, SourceErrorKind, compare, shown};
use crate::store::{BaseNode, StoreError};

/// New URLs of a file of a base. The first one has the object that was registered.
pub struct PreparedMove {
    base: Arc<BaseNode>,
    record: BaseRecord,
    number: u8,
    file: ImageFile,
    urls: Vec<String>,
    head: Vec<u8>,
}

impl Bases {
    /// The active images of a cloud of the configuration.
    ///
    /// # Errors
    /// `Source` when the configuration has no such cloud, and when keystone or Glance refuses or cannot be reached.
    pub async fn images_of(&self, cloud: &str) -> Result<Vec<OfferedImage>, StoreError> {
        let wrap = |source| StoreError::Source { object: format!("cloud {cloud}"), source };
        self.sources.images_of(cloud).await.map_err(wrap)
    }

    /// Checks that a URL has the object of a file of a base (0 is the image, 1 the file below it). Without `mirrors`
    /// the file keeps its mirrors.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a file of this host or a number without a file; `Source` for a server that refuses,
    /// cannot be reached or has another object.
    pub async fn prepare_move(
        &self,
        name: &str,
        number: u8,
        source: String,
        mirrors: Option<Vec<String>>,
    ) -> Result<PreparedMove, StoreError> {
        let object = format!("base {name}");
        let base = self.store.base(name)?;
        let record = base.current();
        let Some(file) = record.files().nth(number.into()).cloned() else {
            return Err(StoreError::invalid(
                object,
                format!("it has {} files, counted from 0; give the number of one", 1 + record.backing.len()),
            ));
        };
        if file.is_local() {
            let why = "its source is a file of this host, which has no URL; add the URL as a new base";
            return Err(StoreError::invalid(object, why));
        }
        let mirrors = mirrors.unwrap_or_else(|| record.urls_of(&file).split_off(1));
        let has_digest = file.proof.is_some() || file.identity.digest.is_some();
        asked_by_digest(&object, &mirrors, has_digest)?;
        let urls: Vec<String> = std::iter::once(source).chain(mirrors).collect();
        // Only the new URL: a mirror may be down now, and is compared with the identity when it is read.
        let delivery = Delivery::of(&file.identity.validator);
        let Some(probed) = self.probe(&object, &urls[..1], &record.options, delivery).await? else {
            return Err(StoreError::invalid(
                object,
                format!("{} is not a URL; give one of the same image", shown(&urls[0])),
            ));
        };
        let ProbedFile { identity: found, head, url, .. } = probed;
        let urls: Vec<String> = std::iter::once(url).chain(urls.into_iter().skip(1)).collect();
        if let Some(why) = compare(&file.identity, &found, record.options.strictness).difference() {
            return Err(StoreError::Source { object, source: another(&urls[0], &why) });
        }
        Ok(PreparedMove { base, record, number, file, urls, head })
    }

    /// Moves a file of a base to other URLs, durably. Waiting reads continue there. A base that was given up is served
    /// again.
    ///
    /// # Errors
    /// `Source` for a mirror that is no URL, or an object that begins with other bytes than the cached ones; errors of
    /// the storage.
    pub fn move_to(&self, moving: PreparedMove) -> Result<Arc<BaseNode>, StoreError> {
        let PreparedMove { base, record, number, file, urls, head } = moving;
        let wrap = |source| StoreError::Source { object: format!("base {}", record.name), source };
        Kind::of_validator(&file.identity.validator).check(&urls).map_err(wrap)?;
        if self.sources.differs(&record, &file, &head).map_err(wrap)? {
            return Err(wrap(another(&urls[0], "it begins with other bytes")));
        }
        base.set_urls(number, urls.clone())?;
        self.sources.set_urls(&record, &file, &urls).map_err(wrap)?;
        self.sources.give_up(base.id(), false);
        Ok(base)
    }

    /// Gives a base up: reads that wait for its servers end with an error. With `false`, serves it again.
    ///
    /// # Errors
    /// `NotFound`; `Invalid` for a base without a server; errors of the storage.
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

pub(super) fn another(url: &str, why: &str) -> SourceError {
    let why = format!("it is another object than the base's: {why}");
    let advice = "give a URL of the same content, or add it as a new base";
    SourceError::remote(SourceErrorKind::Changed, "use", shown(url), why, advice)
}
