//! Images of a Glance: what their records say, and where their data is read.
//!
//! The URL of an image is no place of bytes (H12). Its record is asked first, which says whether the data can be read and
//! which data that is; then the data is read by the one HTTP source. What must hold:
//! - The record is compared with the registered image before its data is requested, and again when the data was refused or
//!   [`FRESH`] has passed. An image that is not active gives no bytes; Glance's own word is the reason.
//! - Each answer with data proves that it has the registered image: by the Content-MD5 of Glance, which is the whole
//!   image's, or by the validators of another place (H1).
//! - Another place comes from a record, so it is judged as a redirect is (H9), and only where the operator allows its
//!   kind. It gets no token, unless it is the Swift of the same cloud.

mod list;

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::HeaderMap;
use reqwest::{StatusCode, Url};
use tokio::time::timeout;

use super::address::{Reach, Zone, host_not_public};
use super::answer::{Failure, RangeRequest, judge};
use super::authorise::{Authoriser, Found, Grant, Job, Located, Pinned, Refusal, Remedy, Unsigned};
use super::clouds::{CloudAuthoriser, Clouds, Service};
use super::mirror::{Mirror, NO_RANGES, peer_is_allowed};
use super::{Http, RemoteOptions, failed, insufficient, shown, words};
use crate::config::LocationKind;
use crate::format::record::{BaseIdentity, ImageData, ImageFormat, Strictness};
use crate::source::openstack::{ImagePlace, ImageRecord, Matches, ObjectPlace, Whereabouts};
use crate::source::{GlanceIdentity, HttpIdentity, SourceError, SourceErrorKind};

/// How long a record is believed.
const FRESH: Duration = Duration::from_secs(600);
/// Longest record, or list of records.
const MAX_RECORD: usize = 1 << 20;

/// An image of a new base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbedImage {
    /// What to register; the digest is that of the record.
    pub identity: BaseIdentity,
    /// The first bytes.
    pub head: Vec<u8>,
    /// The format that the record states.
    pub format: ImageFormat,
    /// The URL of the image by its ID.
    pub url: String,
}

/// Where an image is, and with which tokens.
struct Image {
    place: ImagePlace,
    tokens: Option<CloudAuthoriser>,
}

/// Where an object of a Swift is.
struct SwiftObject {
    path: String,
    tokens: CloudAuthoriser,
}

/// Checks that a URL can be that of an image.
///
/// # Errors
/// `Protocol`, with the mistake.
pub fn check_image_url(text: &str) -> Result<(), SourceError> {
    image_place(text).map(drop)
}

fn refuse(text: &str, why: impl Into<String>) -> SourceError {
    let advice = "write glance://HOST/ID, or an image's name or ID with --cloud";
    SourceError::remote(SourceErrorKind::Protocol, "use", shown(text), why, advice)
}

fn image_place(text: &str) -> Result<ImagePlace, SourceError> {
    let none = || Err("it is no URL of an image".to_owned());
    ImagePlace::parse(text).unwrap_or_else(none).map_err(|why| refuse(text, why))
}

impl Clouds {
    /// Where an image, or an object of a Swift, leads; none for other URLs.
    pub fn locate(&self, text: &str) -> Option<Result<Located, SourceError>> {
        let authoriser = match (ImagePlace::parse(text), ObjectPlace::parse(text)) {
            (Some(place), _) => place.and_then(|place| {
                let tokens = match &place.glance {
                    Whereabouts::At(_) => None,
                    Whereabouts::Of(cloud) => Some(CloudAuthoriser(self.find(cloud)?)),
                };
                Ok(Arc::new(Image { place, tokens }) as Arc<dyn Authoriser>)
            }),
            (None, Some(place)) => place.and_then(|ObjectPlace { cloud, path }| {
                let tokens = CloudAuthoriser(self.find(&cloud)?);
                Ok(Arc::new(SwiftObject { path, tokens }) as Arc<dyn Authoriser>)
            }),
            (None, None) => return None,
        };
        Some(authoriser.map_err(|why| refuse(text, why)).and_then(|authoriser| {
            let url = Url::parse(text).map_err(|_| refuse(text, "it is not a URL"))?;
            Ok(Located { shown: shown(text), url, authoriser: Some(authoriser) })
        }))
    }
}

impl Http {
    /// Learns what an image is from its record, and gets its first bytes: from the first URL that answers. Other URLs
    /// that answer must have the same image. With `whole`, the data is to be read as a whole.
    ///
    /// # Errors
    /// `Denied`, `Protocol` or `Unreachable`, of the first URL, when none answers; `Protocol` when two of them have
    /// different images, or when the record is not enough for `options.strictness`.
    pub async fn probe_image(
        self: &Arc<Self>,
        urls: &[String],
        options: &RemoteOptions,
        whole: bool,
    ) -> Result<ProbedImage, SourceError> {
        let (mut first, mut refusal) = (None::<ProbedImage>, None);
        for url in urls {
            match (self.probe_one_image(url, options, whole).await, &first) {
                (Ok(probed), None) => first = Some(probed),
                (Ok(probed), Some(pinned)) => {
                    let found = super::super::compare(&pinned.identity, &probed.identity, options.strictness);
                    if let Some(why) = found.difference() {
                        return Err(refuse(
                            url,
                            format!("it is another image than {}: {why}", shown(&pinned.url)),
                        ));
                    }
                }
                (Err(error), _) => {
                    tracing::warn!(%error, "a URL of a new base is not usable now");
                    refusal = refusal.or(Some(error));
                }
            }
        }
        first.ok_or_else(|| refusal.unwrap_or_else(|| refuse("no URL", "the source has no URL")))
    }

    async fn probe_one_image(
        self: &Arc<Self>,
        text: &str,
        options: &RemoteOptions,
        whole: bool,
    ) -> Result<ProbedImage, SourceError> {
        let fail = |failure: &Failure| failed(&shown(text), failure);
        let place = image_place(text)?;
        let tokens = match &place.glance {
            Whereabouts::At(_) => None,
            Whereabouts::Of(cloud) => {
                Some(self.services.clouds.find(cloud).map_err(|why| refuse(text, why))?)
            }
        };
        let image = Image { place, tokens: tokens.map(CloudAuthoriser) };
        if let Some(problem) = &self.problem {
            return Err(fail(&Failure::advised(problem, super::CORRECT)));
        }
        let asked = image.identify(self);
        // A token, a search by name and a record.
        let time = self.answer_timeout() * 3;
        let late = || Err(Failure::again(format!("it does not answer within {time:?}")));
        let record =
            timeout(time, asked).await.unwrap_or_else(|_| late()).map_err(|failure| fail(&failure))?;
        let url = image.place.url_of(&record.id);
        let format = record.format().map_err(|why| refuse(&url, why))?;
        let size = record.size.filter(|size| *size > 0 && i64::try_from(*size).is_ok());
        let size = size.ok_or_else(|| refuse(&url, "its record has no size"))?;
        let hash = hash_of(&record);
        if hash.is_empty() && options.strictness == Strictness::Strong {
            return Err(insufficient(&shown(&url), "its record has no os_hash_value".into()));
        }
        let answer = HttpIdentity { size, etag: None, last_modified: None, version: None };
        let data = if whole { ImageData::Whole } else { ImageData::Ranges };
        let mut pinned = GlanceIdentity { id: record.id.clone(), hash, data, answer };
        let mirror = Mirror::new(self.services.locate(&url, None)?);
        let mut probed = self.probe_one(&mirror, options.strictness, options.deadline, Some(&pinned)).await;
        if let Err(Refused { failure: Failure::Protocol(why), .. }) = &probed
            && *why == NO_RANGES
        {
            if !image.allows_a_place_of(&record) {
                let advice = "add it with --download: plyfs then fetches all of it once, in the background";
                return Err(SourceError::remote(
                    SourceErrorKind::Protocol,
                    "read",
                    shown(&url),
                    NO_RANGES,
                    advice,
                ));
            }
            pinned.data = ImageData::Location;
            mirror.forget_target();
            probed = self.probe_one(&mirror, options.strictness, options.deadline, Some(&pinned)).await;
        }
        let (found, head) =
            probed.map(|probed| (probed.identity, probed.head)).map_err(|refused| refused.error)?;
        if found.size != size {
            return Err(refuse(
                &url,
                format!("its record says {size} bytes, and its data has {}", found.size),
            ));
        }
        let md5 = record.checksum.as_deref().map(|md5| format!("\"{}\"", md5.to_ascii_lowercase()));
        if let (Some(md5), Some(etag), true) = (&md5, &found.etag, pinned.data != ImageData::Location)
            && md5 != etag
        {
            return Err(refuse(&url, "its data has another Content-MD5 than its record says"));
        }
        pinned.answer = found;
        let digest = record.digest();
        Ok(ProbedImage { identity: BaseIdentity { digest, ..pinned.into() }, head, format, url })
    }
}

/// A probe that failed, and the failure that it ended with.
pub(super) struct Refused {
    pub failure: Failure,
    pub error: SourceError,
}

/// `os_hash_algo:os_hash_value`; empty when the record lacks one of them.
fn hash_of(record: &ImageRecord) -> String {
    let both = record.os_hash_algo.as_deref().zip(record.os_hash_value.as_deref());
    both.map_or_else(String::new, |(algo, value)| format!("{algo}:{}", value.to_ascii_lowercase()))
}

impl Image {
    /// Glance's URL, and where its address may lie.
    async fn endpoint(&self, http: &Http) -> Result<(String, Reach), Failure> {
        match (&self.place.glance, &self.tokens) {
            (Whereabouts::At(url), _) => Ok((url.clone(), Reach::Anywhere)),
            (Whereabouts::Of(_), Some(tokens)) => {
                let (url, reach) = tokens.0.endpoint(http, Service::Image).await?;
                // Up to the version, which catalogs have or lack.
                Ok((url.strip_suffix("/v2").unwrap_or(&url).to_owned(), reach))
            }
            (Whereabouts::Of(cloud), None) => Err(Failure::again(format!("there is no cloud {cloud}"))),
        }
    }

    /// The record of the image, which may be named.
    async fn identify(&self, http: &Http) -> Result<ImageRecord, Failure> {
        let (glance, reach) = self.endpoint(http).await?;
        let record = match self.place.is_by_id() {
            true => self.record(http, &glance, reach).await?,
            false => {
                let mut url = parse(&format!("{glance}/v2/images"))?;
                url.query_pairs_mut().append_pair("name", &self.place.image);
                let (status, headers, body) = self.get(http, &url, reach).await?;
                if status != StatusCode::OK {
                    return Err(refused("the list of images", status, &headers));
                }
                let matches = Matches::parse(&body).map_err(Failure::Protocol)?;
                matches.only(&self.place.image).map_err(|why| Failure::Denied {
                    status: 404,
                    why,
                    advice: None,
                })?
            }
        };
        match record.unreadable() {
            Some(why) => Err(Failure::Denied { status: 403, why, advice: None }),
            None => Ok(record),
        }
    }

    async fn record(&self, http: &Http, glance: &str, reach: Reach) -> Result<ImageRecord, Failure> {
        let url = parse(&format!("{glance}/v2/images/{}", self.place.image))?;
        let (status, headers, body) = self.get(http, &url, reach).await?;
        match status {
            StatusCode::OK => {}
            StatusCode::NOT_FOUND => {
                let why = format!(
                    "Glance has no image {} that this project may see (404): it was deleted, or is another project's",
                    self.place.image
                );
                return Err(Failure::Denied { status: 404, why, advice: None });
            }
            _ => return Err(refused("the record of the image", status, &headers)),
        }
        let record = ImageRecord::parse(&body).map_err(Failure::Protocol)?;
        if !record.id.eq_ignore_ascii_case(&self.place.image) {
            return Err(Failure::Protocol("Glance answers with the record of another image".into()));
        }
        Ok(record)
    }

    /// A small answer of Glance.
    async fn get(
        &self,
        http: &Http,
        url: &Url,
        reach: Reach,
    ) -> Result<(StatusCode, HeaderMap, Vec<u8>), Failure> {
        let mut renewed = false;
        loop {
            let configured;
            let authoriser: Option<&dyn Authoriser> = if self.covers(url) {
                Some(self)
            } else {
                configured = http.keyring.find(url);
                configured.as_deref()
            };
            let grant = match authoriser {
                Some(authoriser) => Some(authoriser.lend(http, url).await?),
                None => None,
            };
            let mut headers = HeaderMap::new();
            if let Some(grant) = &grant {
                let request = Unsigned { method: &reqwest::Method::GET, url };
                headers = grant.sign(&request)?;
            }
            let count = http.count(url);
            let sending = http.clients.get(url, reach, &headers, &count);
            let sent = timeout(http.answer_timeout(), sending).await;
            let late = |_| Failure::again(format!("it does not answer within {:?}", http.answer_timeout()));
            let mut response = sent.map_err(late)?.map_err(|error| match super::tls::problem(&error) {
                Some(problem) => Failure::advised(problem.why(&super::url::server(url)), problem.advice()),
                None => Failure::again(words(&error)),
            })?;
            peer_is_allowed(http, url, reach, &response).map_err(Failure::Protocol)?;
            let (status, answered, mut body) = (response.status(), response.headers().clone(), Vec::new());
            let reading = async {
                while let Some(chunk) =
                    response.chunk().await.map_err(|error| Failure::again(words(&error)))?
                {
                    count.bytes(chunk.len());
                    body.extend_from_slice(&chunk);
                    if body.len() > MAX_RECORD {
                        return Err(Failure::Protocol("Glance answers with more than a record".into()));
                    }
                }
                Ok::<(), Failure>(())
            };
            timeout(http.answer_timeout(), reading).await.unwrap_or_else(|elapsed| Err(late(elapsed)))?;
            if let (Some(authoriser), Some(grant), StatusCode::UNAUTHORIZED, false) =
                (authoriser, &grant, status, renewed)
            {
                let failure = refused("it", status, &answered);
                let refusal =
                    Refusal { url, status: 401, headers: &answered, text: &body, failure: &failure };
                match authoriser.refused(http, &**grant, refusal).await {
                    Remedy::Renewed(_) => {
                        renewed = true;
                        continue;
                    }
                    Remedy::Fails(failure) => return Err(failure),
                    Remedy::Elsewhere(_) => {}
                }
            }
            return Ok((status, answered, body));
        }
    }

    fn allows(&self, kind: LocationKind) -> bool {
        self.tokens.as_ref().is_some_and(|tokens| tokens.0.locations.contains(&kind))
    }

    /// Whether the data may be read at a place that the record names.
    fn allows_a_place_of(&self, record: &ImageRecord) -> bool {
        record.places().iter().any(|place| self.is_allowed(place).is_some())
    }

    /// The kind of a place, when the operator allows it.
    fn is_allowed(&self, place: &str) -> Option<LocationKind> {
        let scheme = place.split_once("://")?.0;
        let kind = match scheme {
            "http" | "https" => LocationKind::Http,
            "swift" | "swift+http" | "swift+https" | "swift+config" => LocationKind::Swift,
            // A file of Glance's host, or a store that plyfs does not read.
            _ => return None,
        };
        self.allows(kind).then_some(kind)
    }

    /// The first place of the record that the operator allows.
    async fn other_place(
        &self,
        http: &Http,
        glance: &str,
        record: &ImageRecord,
    ) -> Result<(Url, Reach), Failure> {
        let found =
            record.places().into_iter().find_map(|place| Some((place.to_owned(), self.is_allowed(place)?)));
        match (found, &self.tokens) {
            (Some((place, LocationKind::Swift)), Some(tokens)) => {
                let (swift, reach) = tokens.0.endpoint(http, Service::ObjectStore).await?;
                // The last two parts are container and object, whatever keystone or account stands before them.
                let mut parts = place.rsplit('/');
                let (object, container) =
                    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
                let path = format!("{container}/{object}");
                if !matches!(ObjectPlace::parse(&format!("swift://cloud/{path}")), Some(Ok(_))) {
                    return Err(Failure::Protocol(
                        "its record names a place in Swift that is no object".into(),
                    ));
                }
                Ok((parse(&format!("{swift}/{path}"))?, reach))
            }
            (Some((place, LocationKind::Http)), _) => {
                let mut url = parse(&place)?;
                super::url::take_user_info(&mut url);
                url.set_fragment(None);
                if glance.starts_with("https:") && url.scheme() == "http" {
                    let why =
                        "its record leads from https to http, where a third party could change the data";
                    return Err(Failure::Protocol(why.into()));
                }
                Ok((url, Reach::From(Zone::Public)))
            }
            _ => Err(Failure::Protocol(
                "its record names no place that [[http.clouds]] locations allows".into(),
            )),
        }
    }

    async fn find(&self, http: &Http, pinned: Option<&GlanceIdentity>) -> Result<Found, Failure> {
        let (glance, reach) = self.endpoint(http).await?;
        // A mirror may name the image by its name.
        let record = self.identify(http).await?;
        if let Some(pinned) = pinned {
            let found = pinned.compare(record.size.unwrap_or(0), &record.id, &hash_of(&record));
            if let Some(why) = found.difference() {
                return Err(Failure::Another(why));
            }
        }
        let (url, reach) = match pinned.map(|pinned| pinned.data) {
            Some(ImageData::Location) => {
                let (url, reach) = self.other_place(http, &glance, &record).await?;
                (url.clone(), allowed_reach(http, &parse(&glance)?, &url, reach)?)
            }
            _ => (parse(&format!("{glance}/v2/images/{}/file", record.id))?, reach),
        };
        Ok(Found { url, reach, fresh_for: Some(FRESH) })
    }
}

/// Where a place of a record may lie: where Glance may redirect to, by the host of its URL.
fn allowed_reach(http: &Http, glance: &Url, url: &Url, reach: Reach) -> Result<Reach, Failure> {
    let reach = match reach {
        _ if http.allow.has_host(url) => Reach::Anywhere,
        Reach::From(Zone::Public) => Reach::From(Zone::of(host_not_public(glance))),
        reach => reach,
    };
    match reach.refused(host_not_public(url)) {
        None => Ok(reach),
        Some(range) => Err(Failure::Protocol(format!(
            "its record leads to {}, where Glance may not lead ({range}); name it in [http] allow if it is right",
            shown(url.as_str())
        ))),
    }
}

fn parse(text: &str) -> Result<Url, Failure> {
    Url::parse(text).map_err(|_| Failure::Protocol(format!("{} is not a URL", shown(text))))
}

/// The failure of an answer other than 200 of Glance.
pub(super) fn refused(what: &str, status: StatusCode, headers: &HeaderMap) -> Failure {
    let asked = RangeRequest { range: 0..1, ..RangeRequest::default() };
    match judge(status, headers, &asked) {
        Err(Failure::Denied { status, why, advice }) => {
            Failure::Denied { status, why: format!("{what}: {why}"), advice }
        }
        Err(Failure::Moved { .. }) => {
            Failure::Protocol(format!("{what} is redirected; give the URL where it leads"))
        }
        Err(failure) => failure,
        Ok(_) => Failure::Protocol(format!("{what} comes with status {}", status.as_u16())),
    }
}

impl Authoriser for Image {
    fn covers(&self, url: &Url) -> bool {
        self.tokens.as_ref().is_some_and(|tokens| tokens.covers(url))
    }

    fn lend<'a>(&'a self, http: &'a Http, url: &'a Url) -> Job<'a, Result<Box<dyn Grant>, Failure>> {
        match &self.tokens {
            Some(tokens) => tokens.lend(http, url),
            None => Box::pin(async { Ok(Box::new(NoGrant) as Box<dyn Grant>) }),
        }
    }

    fn refused<'a>(&'a self, http: &'a Http, grant: &'a dyn Grant, refusal: Refusal<'a>) -> Job<'a, Remedy> {
        match &self.tokens {
            Some(tokens) => tokens.refused(http, grant, refusal),
            None => Box::pin(async move { Remedy::Fails(refusal.failure.clone()) }),
        }
    }

    fn find<'a>(&'a self, http: &'a Http, pinned: Pinned<'a>) -> Option<Job<'a, Result<Found, Failure>>> {
        Some(Box::pin(self.find(http, pinned)))
    }
}

impl Authoriser for SwiftObject {
    fn covers(&self, url: &Url) -> bool {
        self.tokens.covers(url)
    }

    fn lend<'a>(&'a self, http: &'a Http, url: &'a Url) -> Job<'a, Result<Box<dyn Grant>, Failure>> {
        self.tokens.lend(http, url)
    }

    fn refused<'a>(&'a self, http: &'a Http, grant: &'a dyn Grant, refusal: Refusal<'a>) -> Job<'a, Remedy> {
        self.tokens.refused(http, grant, refusal)
    }

    fn find<'a>(&'a self, http: &'a Http, _pinned: Pinned<'a>) -> Option<Job<'a, Result<Found, Failure>>> {
        Some(Box::pin(async move {
            let (swift, reach) = self.tokens.0.endpoint(http, Service::ObjectStore).await?;
            Ok(Found { url: parse(&format!("{swift}/{}", self.path))?, reach, fresh_for: None })
        }))
    }
}

/// Of a Glance whose credentials the configuration has, or that needs none.
struct NoGrant;

impl Grant for NoGrant {
    fn sign(&self, _request: &Unsigned<'_>) -> Result<HeaderMap, Failure> {
        Ok(HeaderMap::new())
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}
