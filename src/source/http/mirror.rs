//! One URL of an object: where it leads, and one request to it.
//!
//! What must hold:
//! - A redirect is followed once, by one request (H5), and its target is asked from then on, until that says that it has
//!   nothing (any more), fails, or its time is over. Then the URL is asked again where it leads.
//! - Nothing that was meant for one origin goes to another; https never becomes http; nothing leads from the public
//!   network into a private one (`address`).
//! - A request that fails counts against the URL, wherever it led.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::header::{self, HeaderValue};
use reqwest::{Response, Url};
use tokio::time::{Instant, timeout};

use super::address::{Reach, host_not_public, not_public};
use super::answer::{Asked, Body, Failure, judge};
use super::gate::{Gate, Pass};
use super::limit::{Party, Slot, Slots};
use super::secrets::basic;
use super::tls;
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
/// A request that has no answer for so long does not count for those of other bases any more.
pub(super) const SLOW: Duration = Duration::from_secs(1);
/// How long the caches on the way are passed by after one of them had another object.
const SUSPECT: Duration = Duration::from_secs(60);

/// See the module.
pub(super) struct Mirror {
    url: Url,
    /// User and password that were part of the URL; for its origin only.
    user: Option<HeaderValue>,
    pub shown: String,
    /// Whether it works.
    pub gate: Arc<Gate>,
    place: Mutex<Place>,
    resolving: tokio::sync::Mutex<()>,
    /// Until when caches on the way are not to be trusted.
    suspect: Mutex<Option<Instant>>,
    /// Its server does not understand `If-Match`.
    pub without_condition: AtomicBool,
    /// Whether a task finds out if it is back.
    pub checking: AtomicBool,
}

/// Where the bytes are.
#[derive(Clone)]
enum Place {
    Unknown,
    /// At the URL itself.
    Here,
    At {
        target: Target,
        until: Option<Instant>,
    },
}

/// Whom a request is sent to.
#[derive(Clone, PartialEq, Eq)]
struct Target {
    url: Url,
    reach: Reach,
}

/// One request.
pub(super) struct Ask<'a> {
    pub asked: Asked<'a>,
    pub purpose: Purpose,
    /// Past all caches on the way.
    pub fresh: bool,
    pub party: Party,
    pub slots: &'a Arc<Slots>,
    pub wait: &'a Wait,
    /// How long it may take until the first line of the answer.
    pub answer_within: Duration,
    /// Leave to ask the URL, which may have failed for others since.
    pub pass: Option<&'a Pass>,
    /// Although the server is known to be down.
    pub anyway: bool,
}

/// The slots of a request: one of its base, one of all.
pub(super) struct HeldSlots {
    pub _own: Slot,
    pub all: Slot,
}

impl HeldSlots {
    /// It goes on so slowly that it is no load for others, who get its place. Its base keeps one place less.
    pub fn give_way(&mut self) {
        self.all = Slot::none();
    }
}

/// An answer that is right up to its body.
pub(super) struct Transfer {
    pub response: Response,
    pub body: Body,
    pub slots: HeldSlots,
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
            gate: Gate::new(),
            place: Mutex::new(Place::Unknown),
            resolving: tokio::sync::Mutex::new(()),
            suspect: Mutex::new(None),
            without_condition: AtomicBool::new(false),
            checking: AtomicBool::new(false),
        })
    }

    fn named(&self) -> Target {
        Target { url: self.url.clone(), reach: Reach::Anywhere }
    }

    /// Where requests go now, as far as it is known.
    pub fn origin(&self) -> String {
        origin(&self.known().map_or_else(|| self.url.clone(), |target| target.url))
    }

    fn known(&self) -> Option<Target> {
        match &*self.place.lock() {
            Place::Unknown => None,
            Place::Here => Some(self.named()),
            Place::At { until: Some(until), .. } if *until <= Instant::now() => None,
            Place::At { target, .. } => Some(target.clone()),
        }
    }

    /// It is not there any more, unless another request has found out already.
    fn forget(&self, found: &Url) {
        let mut place = self.place.lock();
        if match &*place {
            Place::Unknown => false,
            Place::Here => *found == self.url,
            Place::At { target, .. } => target.url == *found,
        } {
            *place = Place::Unknown;
        }
    }

    /// Where it led was the wrong place.
    pub fn forget_target(&self) {
        *self.place.lock() = Place::Unknown;
    }

    /// It had another object, maybe because of a cache on the way, or of one node of many.
    pub fn suspect_caches(&self) {
        self.forget_target();
        *self.suspect.lock() = Some(Instant::now() + SUSPECT);
    }

    /// Whether caches on the way are passed by.
    pub fn passes_caches(&self) -> bool {
        self.suspect.lock().is_some_and(|until| Instant::now() < until)
    }

    /// An answer to use, from wherever the URL leads.
    pub async fn ask(&self, http: &Http, ask: &Ask<'_>) -> Result<Transfer, Failure> {
        for _ in 0..MAX_ROUNDS {
            let Some(target) = self.known() else {
                // One finds out; the others then know, and do not wait for each other any more.
                let alone = self.resolving.lock().await;
                if self.known().is_some() {
                    drop(alone);
                    continue;
                }
                return self.resolve(http, ask).await;
            };
            match self.once(http, &target, ask).await {
                Err(Failure::Moved { .. }) => self.forget(&target.url),
                Err(Failure::Denied { status: 401 | 403 | 404 | 410, .. }) if target.url != self.url => {
                    tracing::debug!(url = self.shown, "the target of a redirect is over");
                    self.forget(&target.url);
                }
                Err(failure) => {
                    if target.url != self.url && failure != Failure::Overtaken {
                        self.forget(&target.url);
                    }
                    return Err(failure);
                }
                other => return other,
            }
        }
        Err(Failure::again("it leads to another place each time"))
    }

    async fn resolve(&self, http: &Http, ask: &Ask<'_>) -> Result<Transfer, Failure> {
        let (mut target, mut fresh_for) = (self.named(), None::<Duration>);
        // Until the URL itself has answered, which says where it lies.
        let mut from = None::<Reach>;
        for _ in 0..=MAX_HOPS {
            match self.once(http, &target, ask).await {
                Err(Failure::Moved { to, for_at_most, by }) => {
                    let from = *from.get_or_insert_with(|| self.lies_in(http, by));
                    target = next_hop(http, &target.url, &to, from)?;
                    fresh_for = match (fresh_for, for_at_most) {
                        (Some(one), Some(other)) => Some(one.min(other)),
                        (one, other) => one.or(other),
                    };
                }
                Ok(transfer) => {
                    *self.place.lock() = if target.url == self.url {
                        Place::Here
                    } else {
                        let to = shown(target.url.as_str());
                        tracing::debug!(url = self.shown, to, "a redirect is followed");
                        Place::At { target, until: fresh_for.map(|fresh| Instant::now() + fresh) }
                    };
                    return Ok(transfer);
                }
                failure => return failure,
            }
        }
        Err(Failure::Protocol(format!("it redirects more than {MAX_HOPS} times")))
    }

    /// Where redirects of the URL may lead, by the address of the server that answered for it. What a proxy was asked
    /// for is judged by its name.
    fn lies_in(&self, http: &Http, by: Option<IpAddr>) -> Reach {
        let inside = match by {
            Some(address) if !http.clients.is_proxied(&self.url) => not_public(address),
            _ => host_not_public(&self.url),
        };
        if inside.is_some() { Reach::Anywhere } else { Reach::Public }
    }

    /// One request to one URL; a second one when credentials have to be renewed.
    async fn once(&self, http: &Http, target: &Target, ask: &Ask<'_>) -> Result<Transfer, Failure> {
        let url = &target.url;
        let mut renewed = false;
        loop {
            let own = self.user.as_ref().filter(|_| origin(url) == origin(&self.url));
            let lent = if own.is_some() { None } else { http.keyring.lend(url).await? };
            let (mut slots, mut pass) = http.enter(url, ask, &self.shown).await;
            if ask.pass.is_some_and(|pass| !pass.is_current()) {
                return Err(Failure::Overtaken);
            }
            let mut request = http
                .clients
                .choose(url, target.reach)
                .get(url.clone())
                .header(header::ACCEPT_ENCODING, "identity")
                .header(
                    header::RANGE,
                    format!("bytes={}-{}", ask.asked.range.start, ask.asked.range.end - 1),
                );
            if let Some((pinned, super::Strictness::Strong)) = ask.asked.pinned
                && let Some(etag) = pinned.strong_etag()
                && !self.without_condition.load(Ordering::Relaxed)
            {
                request = request.header(header::IF_MATCH, etag);
            }
            if ask.fresh || self.passes_caches() {
                request = request.header(header::CACHE_CONTROL, "no-cache");
            }
            if let Some(user) = own {
                request = request.header(header::AUTHORIZATION, user.clone());
            } else if let Some(lent) = &lent {
                request = request.headers(lent.headers.clone());
            }
            http.count.request();
            let answer = timeout(ask.answer_within, request.send());
            tokio::pin!(answer);
            let answer = match timeout(SLOW, &mut answer).await {
                Ok(answer) => answer,
                Err(_) => {
                    slots.give_way();
                    answer.await
                }
            };
            let response = match answer {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => {
                    if let Some(refused) = refused_address(&error) {
                        return Err(Failure::Protocol(format!(
                            "it redirects to {}: {refused}",
                            shown(url.as_str())
                        )));
                    }
                    let failure = match tls::problem(&error) {
                        Some(problem) => Failure::advised(problem.why(&server(url)), problem.advice()),
                        None => Failure::again(words(&error)),
                    };
                    if error.is_connect() {
                        pass.failed(&failure);
                    }
                    return Err(failure);
                }
                Err(_) => {
                    return Err(Failure::again(format!("it does not answer within {:?}", ask.answer_within)));
                }
            };
            pass.worked();
            let by = response.remote_addr().map(|address| address.ip());
            if target.reach == Reach::Public
                && !http.clients.is_proxied(url)
                && let Some(address) = by.filter(|address| !http.allow.has_address(*address))
                && let Some(range) = not_public(address)
            {
                // The resolver has judged it already; this is the address that was connected to.
                let why = format!(
                    "it redirects to {}: {address} is no public address ({range})",
                    shown(url.as_str())
                );
                return Err(Failure::Protocol(why));
            }
            let mut failure = match judge(response.status(), response.headers(), &ask.asked) {
                Ok(body) => return Ok(Transfer { response, body, slots }),
                Err(failure) => failure,
            };
            if let Failure::Moved { by: server, .. } = &mut failure {
                *server = by;
            }
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

/// Why a redirect was not connected to, when its name has no address that it may lead to.
fn refused_address(error: &reqwest::Error) -> Option<String> {
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        if let Some(refused) = error.downcast_ref::<super::address::NotPublic>() {
            return Some(format!("{refused}; name it in [http] allow if it is right"));
        }
        next = error.source();
    }
    None
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

/// Where a redirect leads, if it may.
fn next_hop(http: &Http, from: &Url, to: &str, reach: Reach) -> Result<Target, Failure> {
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
    let reach = if http.allow.has_host(&next) { Reach::Anywhere } else { reach };
    if reach == Reach::Public
        && let Some(range) = host_not_public(&next)
    {
        let why = format!(
            "from the public network to an address that is not ({range}); name it in [http] allow if it is right"
        );
        return refuse(&why);
    }
    Ok(Target { url: next, reach })
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

/// Host and port of a URL, as messages show a server.
fn server(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port_or_known_default().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}
