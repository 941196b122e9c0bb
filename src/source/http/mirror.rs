//! One URL of an object: where it leads, and one request to it.
//!
//! What must hold:
//! - One request follows a redirect (H5). Later requests go to the target, until the target refuses, fails, or its time
//!   is over. Then the next request goes to the URL again.
//! - Credentials of one origin are not sent to another; https never becomes http; no redirect leads from the public
//!   network into a private one, or to a metadata service (`address`).
//! - A failed request counts against the URL, wherever the URL led.

use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::header::{self, HeaderMap, HeaderValue};
use reqwest::{Method, Response, Url};
use tokio::time::{Instant, timeout};

use super::address::{Reach, Zone, host_not_public, not_public};
use super::answer::{Body, Evidence, Failure, RangeRequest, Sending, judge};
use super::authorise::{Authoriser, Found, Located, Pinned, Refusal, Remedy, Unsigned};
use super::gate::{Gate, Pass, jittered};
use super::limit::{Party, Slot, Slots};
use super::names::on_behalf_of;
use super::peer::ContentName;
use super::servers::Count;
use super::tls;
use super::url::{origin, server, take_user_info};
use super::wait::Wait;
use super::{Http, HttpIdentity, peer, shown, words};
use crate::source::{Parts, Purpose, SourceError};

const MAX_HOPS: usize = 10;
/// Most attempts of one request: each time that it finds the target invalid, another request may have found a new one.
const MAX_ROUNDS: usize = 6;
/// Most bytes of the body of a redirect or an error that are read, to keep the connection.
const MAX_DRAIN: u64 = 16 << 10;
/// Longest time for that.
const MAX_DRAIN_TIME: Duration = Duration::from_secs(1);
/// A request without an answer for this time gives its slot of all bases up.
pub(super) const SLOW: Duration = Duration::from_secs(1);
/// How long requests bypass caches on the way after one of them had another object.
const SUSPECT: Duration = Duration::from_secs(60);

/// Longest URL of a redirect, and how much of it a message shows.
const LONGEST_TARGET: usize = 16 << 10;
const LONGEST_SHOWN: usize = 200;

/// The shortest time between two log lines that a URL sends wrong bytes.
const TELL_EVERY: Duration = Duration::from_secs(10);

/// See the module.
pub(super) struct Mirror {
    url: Url,
    /// Of the kind of source, or of the user info of the URL.
    own: Option<Arc<dyn Authoriser>>,
    pub shown: String,
    /// The contents as a peer describes them; none: it is no peer.
    pub peer: Option<HttpIdentity>,
    /// Until when a peer is not asked.
    rests: Mutex<Option<Instant>>,
    /// Whether the URL works.
    pub gate: Arc<Gate>,
    place: Mutex<Place>,
    resolving: tokio::sync::Mutex<()>,
    /// Until when requests bypass caches on the way.
    suspect: Mutex<Option<Instant>>,
    /// Its server does not understand `If-Match`.
    pub without_condition: AtomicBool,
    /// The part that it sent with other bytes than its proof names.
    pub disproven: Mutex<Option<Parts>>,
    /// When the log said so last.
    told: Mutex<Option<Instant>>,
    /// Whether a task tries if the URL works again.
    pub checking: AtomicBool,
}

/// Where a URL leads.
#[derive(Clone)]
enum Place {
    Unknown,
    /// At the URL itself.
    Direct,
    At {
        target: Target,
        until: Option<Instant>,
    },
}

/// Where a request is sent.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Target {
    pub url: Url,
    pub reach: Reach,
}

/// Why an image of a Glance cannot be read block by block: its store gives no ranges.
pub const NO_RANGES: &str = "it is a Glance whose store has no random access to images";

/// One request.
pub(super) struct Dispatch<'a> {
    /// The registered image, of a Glance.
    pub image: Pinned<'a>,
    pub asked: RangeRequest<'a>,
    pub purpose: Purpose,
    /// Whether it bypasses caches on the way.
    pub fresh: bool,
    pub party: Party,
    pub slots: &'a Arc<Slots>,
    pub wait: &'a Wait,
    /// How long the first line of the answer may take.
    pub answer_within: Duration,
    /// The permission to use the URL; other requests may have failed since.
    pub pass: Option<&'a Pass>,
    /// Whether to send it although the server is known to be down.
    pub anyway: bool,
}

/// The slots of a request: one of its base, and one that all bases share.
pub(super) struct HeldSlots {
    pub _own: Slot,
    pub all: Slot,
}

impl HeldSlots {
    /// Gives the shared slot up: the request is so slow that it is no load for other bases. It keeps the slot of its
    /// base.
    pub fn give_way(&mut self) {
        self.all = Slot::none();
    }
}

/// An answer whose header lines are accepted; its body is still to be read.
pub(super) struct Transfer {
    pub response: Response,
    pub body: Body,
    pub slots: HeldSlots,
}

impl Mirror {
    pub fn new(located: Located) -> Self {
        let Located { url, shown, authoriser: own } = located;
        Self {
            url,
            own,
            shown,
            peer: None,
            rests: Mutex::default(),
            gate: Gate::new(),
            place: Mutex::new(Place::Unknown),
            resolving: tokio::sync::Mutex::new(()),
            suspect: Mutex::new(None),
            without_condition: AtomicBool::new(false),
            disproven: Mutex::default(),
            told: Mutex::default(),
            checking: AtomicBool::new(false),
        }
    }

    /// Of a peer that has the contents of `size` bytes under this name.
    pub fn of_peer(url: &str, contents: &ContentName, size: u64) -> Result<Self, SourceError> {
        let (located, identity) = peer::locate(url, contents, size)?;
        Ok(Self { peer: Some(identity), ..Self::new(located) })
    }

    /// When a peer that has asked for a pause may get a request.
    pub fn rested(&self) -> Option<Instant> {
        *self.rests.lock()
    }

    /// Sends a peer no request for a while.
    pub fn rest(&self, pause: Option<Duration>) {
        *self.rests.lock() = pause.map(|pause| Instant::now() + jittered(pause));
    }

    fn named(&self) -> Target {
        Target { url: self.url.clone(), reach: Reach::Anywhere }
    }

    /// The server that requests go to now, as far as that is known.
    pub fn origin(&self) -> String {
        origin(&self.known().map_or_else(|| self.url.clone(), |target| target.url))
    }

    /// The counters of the server of its URL.
    pub fn count(&self, http: &Http) -> Arc<Count> {
        http.count(&self.url)
    }

    fn known(&self) -> Option<Target> {
        match &*self.place.lock() {
            Place::Unknown => None,
            Place::Direct => Some(self.named()),
            Place::At { until: Some(until), .. } if *until <= Instant::now() => None,
            Place::At { target, .. } => Some(target.clone()),
        }
    }

    /// Forgets the target `found`, unless another request has replaced it.
    fn forget(&self, found: &Url) {
        let mut place = self.place.lock();
        if match &*place {
            Place::Unknown => false,
            Place::Direct => *found == self.url,
            Place::At { target, .. } => target.url == *found,
        } {
            *place = Place::Unknown;
        }
    }

    /// Forgets where the URL leads.
    pub fn forget_target(&self) {
        *self.place.lock() = Place::Unknown;
    }

    /// Bypasses caches for a while: another object answered, maybe from a cache or from one node of many.
    pub fn suspect_caches(&self) {
        self.forget_target();
        *self.suspect.lock() = Some(Instant::now() + SUSPECT);
    }

    /// Notes that it sent a part with other bytes than its proof names.
    pub fn sent_wrong(&self, part: Parts, why: &str) {
        *self.disproven.lock() = Some(part);
        let mut told = self.told.lock();
        if told.is_none_or(|told| told.elapsed() >= TELL_EVERY) {
            *told = Some(Instant::now());
            tracing::warn!(
                url = self.shown,
                why,
                "a server sends bytes that are not those of the image; they are not used"
            );
        }
    }

    /// Whether requests bypass caches on the way.
    pub fn passes_caches(&self) -> bool {
        self.suspect.lock().is_some_and(|until| Instant::now() < until)
    }

    /// Sends the request to where the URL leads, and returns an accepted answer.
    pub async fn ask(&self, http: &Http, ask: &Dispatch<'_>) -> Result<Transfer, Failure> {
        for _ in 0..MAX_ROUNDS {
            let Some(target) = self.known() else {
                // One request follows the redirects; the others wait for it here and then use its result.
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
                    tracing::debug!(url = self.shown, "the target of a redirect is not valid any more");
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
        Err(Failure::again("it redirects to another place each time"))
    }

    async fn resolve(&self, http: &Http, ask: &Dispatch<'_>) -> Result<Transfer, Failure> {
        let (mut target, mut fresh_for) = (self.named(), None::<Duration>);
        if let Some(finding) = self.own.as_ref().and_then(|own| own.find(http, ask.image)) {
            let Found { url, reach, fresh_for: fresh } = finding.await?;
            (target, fresh_for) = (Target { url, reach }, fresh);
        }
        let first = target.url.clone();
        // None until the URL itself has answered, whose address decides where redirects may lead.
        let mut from = None::<Reach>;
        for _ in 0..=MAX_HOPS {
            match self.once(http, &target, ask).await {
                Err(Failure::Moved { to, for_at_most, by }) => {
                    let from = *from.get_or_insert_with(|| lies_in(http, &first, by));
                    target = next_hop(http, &target.url, &to, from)?;
                    fresh_for = match (fresh_for, for_at_most) {
                        (Some(one), Some(other)) => Some(one.min(other)),
                        (one, other) => one.or(other),
                    };
                }
                Ok(transfer) => {
                    *self.place.lock() = if target.url == self.url {
                        Place::Direct
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

    /// Who authorises a request to `url`: the kind of source for its own servers, else the configuration.
    fn authoriser(&self, http: &Http, url: &Url) -> Option<Arc<dyn Authoriser>> {
        let own = self.own.clone().filter(|own| own.covers(url));
        own.or_else(|| http.keyring.find(url))
    }

    /// The header lines of a request, but for what authorises it.
    fn headers(&self, ask: &Dispatch<'_>) -> Result<HeaderMap, Failure> {
        let value = |text: &str| {
            HeaderValue::from_str(text).map_err(|_| Failure::Protocol("its ETag fits in no request".into()))
        };
        let Range { start, end } = ask.asked.range;
        let mut headers =
            HeaderMap::from_iter([(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"))]);
        if ask.asked.sending == Sending::Range {
            headers.insert(header::RANGE, value(&format!("bytes={start}-{}", end - 1))?);
        }
        if ask.asked.evidence == Evidence::Validators
            && let Some((pinned, super::Strictness::Strong)) = ask.asked.pinned
            && let Some(etag) = pinned.strong_etag()
            && !self.without_condition.load(Ordering::Relaxed)
        {
            headers.insert(header::IF_MATCH, value(etag)?);
        }
        if self.peer.is_some() {
            // A peer fetches nothing for others.
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("only-if-cached"));
        } else if ask.fresh || self.passes_caches() {
            headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        }
        Ok(headers)
    }

    /// Sends one request to one URL, and a second one after renewing refused credentials.
    async fn once(&self, http: &Http, target: &Target, ask: &Dispatch<'_>) -> Result<Transfer, Failure> {
        let url = &target.url;
        let mut renewed = false;
        loop {
            let authoriser = self.authoriser(http, url);
            let grant = match &authoriser {
                Some(authoriser) => Some(authoriser.lend(http, url).await?),
                None => None,
            };
            let (mut slots, mut pass) = http.enter(url, ask, &self.shown).await;
            if ask.pass.is_some_and(|pass| !pass.is_current()) {
                return Err(Failure::Overtaken);
            }
            let mut headers = self.headers(ask)?;
            if let Some(grant) = &grant {
                // Now, and not before its turn came: a signature has the time in it.
                let request = Unsigned { method: &Method::GET, url };
                let signed = grant.sign(&request)?;
                headers.extend(signed);
            }
            let (count, sent) = (http.count(url), Instant::now());
            let sending = http.clients.get(url, target.reach, &headers, &count);
            let answer = timeout(ask.answer_within, on_behalf_of(ask.party, sending));
            tokio::pin!(answer);
            let answer = match timeout(SLOW, &mut answer).await {
                Ok(answer) => answer,
                Err(_) => {
                    slots.give_way();
                    answer.await
                }
            };
            count.answer(sent.elapsed());
            let response = match answer {
                Ok(Ok(response)) => response,
                Ok(Err(error)) => {
                    if let Some(refused) = refused_address(&error) {
                        return Err(Failure::Protocol(format!(
                            "it redirects to {}: {refused}",
                            brief(url.as_str())
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
            peer_is_allowed(http, url, target.reach, &response).map_err(Failure::Protocol)?;
            let mut failure = match judge(response.status(), response.headers(), &ask.asked) {
                Ok(body) => return Ok(Transfer { response, body, slots }),
                Err(failure) => failure,
            };
            if let Failure::Moved { by: server, .. } = &mut failure {
                *server = by;
            }
            let (status, headers) = (response.status().as_u16(), response.headers().clone());
            let text = drain(response).await;
            drop(slots);
            if contains(&text, b"images randomly from this store") && matches!(failure, Failure::Protocol(_))
            {
                // A Glance answers 400.
                return Err(Failure::Protocol(NO_RANGES.into()));
            }
            if status == 204 && ask.asked.evidence == Evidence::ContentMd5 {
                let why = "Glance has lost the data of the image (204): its store does not have it any more";
                return Err(Failure::Protocol(why.into()));
            }
            let (Some(authoriser), Some(grant), false) =
                (authoriser, grant, matches!(failure, Failure::Moved { .. }))
            else {
                return Err(failure);
            };
            let refusal = Refusal { url, status, headers: &headers, text: &text, failure: &failure };
            match authoriser.refused(http, &*grant, refusal).await {
                Remedy::Renewed(_) if !renewed => renewed = true,
                Remedy::Renewed(failure) | Remedy::Fails(failure) => return Err(failure),
                Remedy::Elsewhere(to) => {
                    return Err(Failure::Moved { to: to.into(), for_at_most: None, by });
                }
            }
        }
    }
}

/// Where redirects of the first URL may lead, by the address of the server that answered. Behind a proxy, the host of the
/// URL decides.
fn lies_in(http: &Http, first: &Url, by: Option<IpAddr>) -> Reach {
    Reach::From(Zone::of(match by {
        Some(address) if !http.clients.is_proxied(first) => not_public(address),
        _ => host_not_public(first),
    }))
}

/// Checks the address of the connection, after the resolver has checked the name.
pub(super) fn peer_is_allowed(
    http: &Http,
    url: &Url,
    reach: Reach,
    response: &Response,
) -> Result<(), String> {
    let by = response.remote_addr().map(|address| address.ip());
    if !http.clients.is_proxied(url)
        && let Some(address) = by.filter(|address| !http.allow.has_address(*address))
        && let Some(range) = reach.refused(not_public(address))
    {
        return Err(format!(
            "it redirects to {}: that has the address {address} ({range}), where a redirect may not lead",
            brief(url.as_str())
        ));
    }
    Ok(())
}

/// The reason when a redirect's name has no address that it may lead to.
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

/// A URL that a server sent, for messages: each waiting read has one.
fn brief(url: &str) -> String {
    shown(url).chars().take(LONGEST_SHOWN).collect()
}

/// The target of a redirect, if it may lead there.
pub(super) fn next_hop(http: &Http, from: &Url, to: &str, reach: Reach) -> Result<Target, Failure> {
    let refuse = |why: &str| Err(Failure::Protocol(format!("it redirects to {}: {why}", brief(to))));
    if to.len() > LONGEST_TARGET {
        return refuse("that URL is longer than 16384 bytes");
    }
    let Ok(mut next) = from.join(to) else { return refuse("that is not a URL") };
    match (from.scheme(), next.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => return refuse("from https to http, where a third party could change it"),
        _ => return refuse("that is neither http nor https"),
    }
    if next.host_str().is_none_or(str::is_empty) {
        return refuse("it names no host");
    }
    // Credentials in a redirect are ignored.
    take_user_info(&mut next);
    next.set_fragment(None);
    let reach = if http.allow.has_host(&next) { Reach::Anywhere } else { reach };
    if let Some(range) = reach.refused(host_not_public(&next)) {
        let from = if reach == Reach::From(Zone::Public) { "the public network" } else { "another network" };
        let why = format!(
            "from {from} to an address that is not public ({range}); name it in [http] allow if it is right"
        );
        return refuse(&why);
    }
    Ok(Target { url: next, reach })
}

/// Reads a short body to its end, so that the connection can be used again. Returns its beginning.
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
