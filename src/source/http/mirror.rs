//! One URL of an object: where it leads, and one request to it.
//!
//! What must hold:
//! - A redirect is followed once, by one request, and its target is asked from then on, until that says that it has
//!   nothing (any more), fails, or its time is over. Then the URL is asked again where it leads.
//! - Nothing that was meant for one origin goes to another; https never becomes http.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::header::{self, HeaderValue};
use reqwest::{Response, Url};
use tokio::time::{Instant, timeout};

use super::answer::{Asked, Body, Failure, judge};
use super::limit::{Slot, Slots};
use super::origin::Pass;
use super::secrets::basic;
use super::url::{self, origin, take_user_info};
use super::wait::Wait;
use super::{Http, shown, words};
use crate::source::{Purpose, SourceError};

const MAX_HOPS: usize = 10;
/// Others may find out where it leads as fast as this one finds that it is over; not for ever.
const MAX_ROUNDS: usize = 6;
/// The body of a redirect or an error is read up to here, to keep the connection.
const MAX_DRAIN: u64 = 16 << 10;
/// And for as long.
const MAX_DRAIN_TIME: Duration = Duration::from_secs(1);

/// See the module.
pub(super) struct Mirror {
    url: Url,
    /// User and password that were part of the URL; for its origin only.
    user: Option<HeaderValue>,
    pub shown: String,
    place: Mutex<Place>,
    resolving: tokio::sync::Mutex<()>,
    /// Why it is not asked any more.
    pub out: Mutex<Option<String>>,
    /// Its server does not understand `If-Match`.
    pub without_condition: AtomicBool,
    /// Whether somebody finds out if it is back.
    pub checking: AtomicBool,
}

/// Where the bytes are.
#[derive(Clone)]
enum Place {
    Unknown,
    /// At the URL itself.
    Here,
    At {
        url: Url,
        until: Option<Instant>,
    },
}

/// One request.
pub(super) struct Ask<'a> {
    pub asked: Asked<'a>,
    pub purpose: Purpose,
    /// Past all caches on the way.
    pub fresh: bool,
    pub slots: &'a Arc<Slots>,
    pub wait: &'a Wait,
    /// Although the server is known to be down.
    pub anyway: bool,
}

/// An answer that is right up to its body.
pub(super) struct Transfer {
    pub response: Response,
    pub body: Body,
    pub pass: Pass,
    /// Where it comes from.
    pub url: Url,
    pub slots: [Slot; 2],
}

impl Mirror {
    pub fn new(text: &str) -> Result<Self, SourceError> {
        let mut url = url::parse(text)?;
        let user = take_user_info(&mut url).and_then(|(user, password)| {
            let mut value = HeaderValue::from_str(&basic(&user, &password)).ok()?;
            value.set_sensitive(true);
            Some(value)
        });
        url.set_fragment(None);
        Ok(Self {
            shown: shown(url.as_str()),
            url,
            user,
            place: Mutex::new(Place::Unknown),
            resolving: tokio::sync::Mutex::new(()),
            out: Mutex::new(None),
            without_condition: AtomicBool::new(false),
            checking: AtomicBool::new(false),
        })
    }

    /// Where requests go now, as far as it is known.
    pub fn origin(&self) -> String {
        origin(&self.known().unwrap_or_else(|| self.url.clone()))
    }

    pub fn is_redirected(&self) -> bool {
        self.known().is_some_and(|url| url != self.url)
    }

    fn known(&self) -> Option<Url> {
        match &*self.place.lock() {
            Place::Unknown => None,
            Place::Here => Some(self.url.clone()),
            Place::At { until: Some(until), .. } if *until <= Instant::now() => None,
            Place::At { url, .. } => Some(url.clone()),
        }
    }

    /// It is not there any more, unless somebody has found out already.
    pub fn forget(&self, found: &Url) {
        let mut place = self.place.lock();
        if match &*place {
            Place::Unknown => false,
            Place::Here => *found == self.url,
            Place::At { url, .. } => url == found,
        } {
            *place = Place::Unknown;
        }
    }

    /// Where it led was the wrong place.
    pub fn forget_target(&self) {
        *self.place.lock() = Place::Unknown;
    }

    /// An answer to use, from wherever the URL leads.
    pub async fn ask(&self, http: &Http, ask: &Ask<'_>) -> Result<Transfer, Failure> {
        for _ in 0..MAX_ROUNDS {
            let Some(url) = self.known() else {
                // One finds out; the others then know, and do not wait for each other any more.
                let alone = self.resolving.lock().await;
                if self.known().is_some() {
                    drop(alone);
                    continue;
                }
                return self.resolve(http, ask).await;
            };
            match self.once(http, &url, ask).await {
                Err(Failure::Moved { .. }) => self.forget(&url),
                Err(Failure::Denied { status: 401 | 403 | 404 | 410, .. }) if url != self.url => {
                    tracing::debug!(url = self.shown, "the target of a redirect is over");
                    self.forget(&url);
                }
                Err(again @ Failure::Again { .. }) => {
                    if url != self.url {
                        self.forget(&url);
                    }
                    return Err(again);
                }
                other => return other,
            }
        }
        Err(Failure::again("it leads to another place each time"))
    }

    async fn resolve(&self, http: &Http, ask: &Ask<'_>) -> Result<Transfer, Failure> {
        let (mut url, mut fresh_for) = (self.url.clone(), None::<Duration>);
        for _ in 0..=MAX_HOPS {
            match self.once(http, &url, ask).await {
                Err(Failure::Moved { to, for_at_most }) => {
                    url = next_hop(&url, &to)?;
                    fresh_for = match (fresh_for, for_at_most) {
                        (Some(one), Some(other)) => Some(one.min(other)),
                        (one, other) => one.or(other),
                    };
                }
                Ok(transfer) => {
                    *self.place.lock() = if url == self.url {
                        Place::Here
                    } else {
                        tracing::debug!(url = self.shown, to = shown(url.as_str()), "a redirect is followed");
                        Place::At { url, until: fresh_for.map(|fresh| Instant::now() + fresh) }
                    };
                    return Ok(transfer);
                }
                failure => return failure,
            }
        }
        Err(Failure::Protocol(format!("it redirects more than {MAX_HOPS} times")))
    }

    /// One request to one URL; a second one when credentials have to be renewed.
    async fn once(&self, http: &Http, url: &Url, ask: &Ask<'_>) -> Result<Transfer, Failure> {
        let mut renewed = false;
        loop {
            let own = self.user.as_ref().filter(|_| origin(url) == origin(&self.url));
            let lent = if own.is_some() { None } else { http.keyring.lend(url).await? };
            let (slots, mut pass) = http.enter(url, ask).await;
            let mut request =
                http.client.get(url.clone()).header(header::ACCEPT_ENCODING, "identity").header(
                    header::RANGE,
                    format!("bytes={}-{}", ask.asked.range.start, ask.asked.range.end - 1),
                );
            if let Some((pinned, super::Strictness::Strong)) = ask.asked.pinned
                && let Some(etag) = pinned.strong_etag()
                && !self.without_condition.load(Ordering::Relaxed)
            {
                request = request.header(header::IF_MATCH, etag);
            }
            if ask.fresh {
                request = request.header(header::CACHE_CONTROL, "no-cache");
            }
            if let Some(user) = own {
                request = request.header(header::AUTHORIZATION, user.clone());
            } else if let Some(lent) = &lent {
                request = request.headers(lent.headers.clone());
            }
            http.count.request();
            let response = match timeout(http.answer_timeout(), request.send()).await {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => {
                    let why = words(&error);
                    pass.failed(&why, None);
                    return Err(Failure::again(why));
                }
                Err(_) => {
                    let why = format!("it does not answer within {:?}", http.answer_timeout());
                    pass.failed(&why, None);
                    return Err(Failure::again(why));
                }
            };
            let failure = match judge(response.status(), response.headers(), &ask.asked) {
                Ok(body) => return Ok(Transfer { response, body, pass, url: url.clone(), slots }),
                Err(failure) => failure,
            };
            if let Failure::Again { why, after } = &failure {
                pass.failed(why, *after);
                drain(response).await;
                return Err(failure);
            }
            pass.worked();
            let text = drain(response).await;
            drop(slots);
            match (&failure, &lent) {
                (Failure::Denied { status: 401 | 403, .. }, Some(lent)) if !renewed => {
                    renewed = true;
                    if !http.keyring.renew(lent).await {
                        return Err(failure);
                    }
                }
                (Failure::Protocol(_), _) if contains(&text, b"images randomly from this store") => {
                    // Glance, whose answer is a 400.
                    let why = "it is a Glance whose store has no random access to images";
                    return Err(Failure::Protocol(why.into()));
                }
                _ => return Err(failure),
            }
        }
    }
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Where a redirect leads, if it may.
fn next_hop(from: &Url, to: &str) -> Result<Url, Failure> {
    let refuse = |why: &str| Err(Failure::Protocol(format!("it redirects to {}: {why}", shown(to))));
    let Ok(mut next) = from.join(to) else { return refuse("that is not a URL") };
    match (from.scheme(), next.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return refuse("from https to http, where anybody could change it"),
        _ => return refuse("that is neither http nor https"),
    }
    if next.host_str().is_none_or(str::is_empty) {
        return refuse("it names no host");
    }
    // A server does not tell us who we are.
    take_user_info(&mut next);
    next.set_fragment(None);
    Ok(next)
}

/// Reads a short body to its end, so that the connection can be used again; returns the start of it.
async fn drain(mut response: Response) -> Vec<u8> {
    let mut text = Vec::new();
    if response.content_length().is_some_and(|length| length > MAX_DRAIN) {
        return text;
    }
    let all = async {
        while let Ok(Some(chunk)) = response.chunk().await {
            text.extend_from_slice(&chunk);
            if text.len() as u64 > MAX_DRAIN {
                return;
            }
        }
    };
    let _ = timeout(MAX_DRAIN_TIME, all).await;
    text
}
