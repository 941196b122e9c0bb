//! Who authorises requests. A kind of source, or the configuration, has an [`Authoriser`]; the HTTP source asks it anew
//! for each hop of a request.
//!
//! Two steps, because a request may wait for its turn between them: [`Authoriser::lend`] gets credentials, and may wait
//! for a helper process or a server; [`Grant::sign`] makes header lines of them for one request, at the moment when it is
//! sent. What must hold:
//! - An authoriser is asked about URLs that it [covers](Authoriser::covers) only, so it decides where its secrets go (H6).
//! - It decides what a refusal means. A refusal never ends a read: the HTTP source sends the request again, with pauses,
//!   until the deadline of the base (H3). Only a new base fails at once.
//! - Header lines that it returns are marked as sensitive, and no message of it has a secret.

use std::any::Any;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue};
use reqwest::{Method, Url};

use super::Http;
use super::address::Reach;
use super::answer::Failure;
use super::secrets::basic;
use super::url::{origin, take_user_info};
use crate::source::{GlanceIdentity, SourceError};

/// Work that may wait.
pub(crate) type Job<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A request that is to be authorised.
pub(crate) struct Unsigned<'a> {
    pub method: &'a Method,
    pub url: &'a Url,
}

/// The answer to a request that brought no bytes. A redirect with a `Location` is none.
pub(crate) struct Refusal<'a> {
    /// Where the request went.
    pub url: &'a Url,
    pub status: u16,
    pub headers: &'a HeaderMap,
    /// The beginning of the body; empty when the body is large.
    pub text: &'a [u8],
    /// What the answer means without an authoriser.
    pub failure: &'a Failure,
}

/// What a refusal means.
pub(crate) enum Remedy {
    /// There are other credentials now: the request is sent again at once. The HTTP source believes it once per request;
    /// the second time, the request fails with this.
    Renewed(Failure),
    /// The object is at this URL: as a redirect to it.
    Elsewhere(Url),
    /// The request fails with this. It is sent again later.
    Fails(Failure),
}

/// Where the bytes of an object are now.
pub(crate) struct Found {
    pub url: Url,
    /// Where its address may lie.
    pub(super) reach: Reach,
    /// How long this holds; none: until a request fails.
    pub fresh_for: Option<Duration>,
}

/// The image that was registered; none while it is probed, and of other kinds.
pub(crate) type Pinned<'a> = Option<&'a GlanceIdentity>;

/// Authorises requests to the servers of one scope.
pub(crate) trait Authoriser: Send + Sync {
    /// Whether its credentials may go to this URL, which may be the target of a redirect.
    fn covers(&self, url: &Url) -> bool;

    /// Gets credentials for a request to `url`, which it covers: those that it holds, while they are valid; else new ones.
    /// One request gets them, and the others wait for it. After a failure it pauses before it returns, so that waiting
    /// readers do not become a storm.
    ///
    /// Fails with the cause, without secrets; `Failure::Again` for what may pass.
    fn lend<'a>(&'a self, http: &'a Http, url: &'a Url) -> Job<'a, Result<Box<dyn Grant>, Failure>>;

    /// Finds out where the bytes are, for a kind whose URL is no place of bytes; none: they are at the URL. Asked before
    /// the first request, and again when a request failed there.
    fn find<'a>(&'a self, _http: &'a Http, _pinned: Pinned<'a>) -> Option<Job<'a, Result<Found, Failure>>> {
        None
    }

    /// Says what a refusal of a request with `grant` means, and renews the credentials where that may help.
    fn refused<'a>(&'a self, http: &'a Http, grant: &'a dyn Grant, refusal: Refusal<'a>) -> Job<'a, Remedy>;
}

/// Credentials for one request.
pub(crate) trait Grant: Send + Sync {
    /// The header lines that authorise the request. Waits for nothing.
    fn sign(&self, request: &Unsigned<'_>) -> Result<HeaderMap, Failure>;

    /// Itself, for the authoriser that made it.
    fn as_any(&self) -> &(dyn Any + Send + Sync);
}

/// Where a source is, as the HTTP source needs it.
pub(crate) struct Located {
    /// An http or https URL, without user info and fragment.
    pub url: Url,
    /// As messages show it.
    pub shown: String,
    /// Of the kind, or of the user info of the URL; the configuration's where it covers nothing.
    pub authoriser: Option<Arc<dyn Authoriser>>,
}

impl Located {
    /// Of an http or https URL.
    pub fn web(text: &str) -> Result<Self, SourceError> {
        let mut url = super::url::parse(text)?;
        let user = take_user_info(&mut url).and_then(|(user, password)| {
            let mut value = HeaderValue::from_str(&basic(&user, &password)).ok()?;
            value.set_sensitive(true);
            Some(value)
        });
        url.set_fragment(None);
        let authoriser = user.map(|value| {
            let headers = HeaderMap::from_iter([(AUTHORIZATION, value)]);
            Arc::new(UserInfo { origin: origin(&url), headers }) as Arc<dyn Authoriser>
        });
        Ok(Self { shown: super::shown(url.as_str()), url, authoriser })
    }
}

/// User and password of a URL; sent only to its origin.
struct UserInfo {
    origin: String,
    headers: HeaderMap,
}

/// Header lines that are the same for each request.
pub(crate) struct Fixed(pub HeaderMap);

impl Grant for Fixed {
    fn sign(&self, _request: &Unsigned<'_>) -> Result<HeaderMap, Failure> {
        Ok(self.0.clone())
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

impl Authoriser for UserInfo {
    fn covers(&self, url: &Url) -> bool {
        origin(url) == self.origin
    }

    fn lend<'a>(&'a self, _http: &'a Http, _url: &'a Url) -> Job<'a, Result<Box<dyn Grant>, Failure>> {
        let grant: Box<dyn Grant> = Box::new(Fixed(self.headers.clone()));
        Box::pin(async move { Ok(grant) })
    }

    fn refused<'a>(
        &'a self,
        _http: &'a Http,
        _grant: &'a dyn Grant,
        refusal: Refusal<'a>,
    ) -> Job<'a, Remedy> {
        Box::pin(async move { Remedy::Fails(refusal.failure.clone()) })
    }
}
