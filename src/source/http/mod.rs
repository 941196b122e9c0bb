//! Bases on web servers: HTTP/1.1 and HTTP/2, with and without TLS.
//!
//! The HTTP client is a library. This module makes a source of it: which answers can be trusted (`answer`), which
//! object they are about ([`HttpIdentity`], `identity`), when a failing URL or server is tried again (`gate`), where a
//! URL leads (`mirror`) and may lead (`address`, `names`), who authorises a request (`authorise`; the configuration's
//! credentials: `secrets`), and how much at once (`limit`). docs/design.md, "HTTP sources", has the decisions and the table
//! of failures. What must hold:
//! - Nothing here blocks a thread; all futures run in the runtime that [`Http::new`] was given.
//! - A byte is delivered only from an answer that proves to be about the pinned object and the range (H1, H2).
//! - Messages show URLs only through [`shown`], and have no secrets.

mod address;
mod answer;
mod authorise;
mod backlog;
mod clouds;
mod fetch;
mod gate;
mod glance;
mod identity;
mod limit;
mod mirror;
mod names;
mod network;
pub mod peer;
mod post;
mod proving;
mod registry;
mod secrets;
mod servers;
#[cfg(test)]
mod tests;
mod tls;
mod url;
mod wait;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::{Url, header};
use tokio::runtime::Handle;

pub use super::HttpIdentity;
use super::kind::Services;
use super::{GlanceIdentity, Purpose, SourceError, SourceErrorKind};
use crate::config::HttpConfig;
use crate::format::record::ImageData;
pub use crate::format::record::Strictness;
use address::AllowList;
pub(crate) use answer::Failure;
use answer::{Evidence, RangeRequest, Sending};
use authorise::Pinned;
pub(crate) use authorise::{Authoriser, Fixed, Grant, Job, Located, Refusal, Remedy, Unsigned};
pub use backlog::{Backlog, WholeSource};
pub(crate) use clouds::Clouds;
use fetch::BodyLimits;
pub use fetch::HttpSource;
pub(in crate::source) use fetch::TRIES;
pub(in crate::source) use gate::{Gate, Pass, jittered};
use glance::Refused;
pub use glance::{ProbedImage, check_image_url};
pub(in crate::source) use limit::{Party, Rate, Slot, Slots};
pub use mirror::NO_RANGES;
use mirror::{Dispatch, HeldSlots, Mirror};
use network::Clients;
pub use network::{Network, Proxies};
pub(in crate::source) use proving::Proving;
pub(in crate::source) use registry::locate as locate_artifact;
pub use registry::{ProbedArtifact, check_artifact_url};
use secrets::Keyring;
pub(crate) use secrets::Reading as SecretReading;
pub use secrets::{Credentials, NoCredentials, Secret, SecretName, Section};
pub use servers::HttpCounters;
use servers::{Count, Servers};
pub use url::{check_url, shown};
pub(crate) use url::{climbs, parse, percent_decode};
use wait::Patience;
pub(in crate::source) use wait::{Stalls, Wait};

/// Bytes of the first request.
const HEAD: u64 = 64 << 10;
/// Attempts of a probe, and the pause after the first of them.
const PROBE_TRIES: u32 = 3;
const PROBE_PAUSE: Duration = Duration::from_millis(300);
/// Most servers whose state is kept. The state of a server with requests under way is always kept.
const MOST_ORIGINS: usize = 256;

/// How one base uses its servers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RemoteOptions {
    /// Which validators must match.
    pub strictness: Strictness,
    /// How long after the first failure a read fails. None: it waits without end.
    pub deadline: Option<Duration>,
    /// Most requests at once.
    pub max_requests: Option<u32>,
    /// Most bytes per second.
    pub max_rate: Option<u64>,
    /// The name by which peers have the contents; none: peers are not asked.
    pub contents: Option<peer::ContentName>,
}

/// The result of the first request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probed {
    /// The identity to pin.
    pub identity: HttpIdentity,
    /// The first bytes of the object: 64 KiB, or all of a smaller object.
    pub head: Vec<u8>,
}

/// The state of each server, by scheme, host and port.
#[derive(Default)]
struct Origins {
    states: HashMap<String, (u64, Arc<Gate>)>,
    /// Counts uses.
    uses: u64,
}

impl Origins {
    fn get(&mut self, name: &str) -> Arc<Gate> {
        self.uses += 1;
        if let Some((used, gate)) = self.states.get_mut(name) {
            *used = self.uses;
            return gate.clone();
        }
        if self.states.len() >= MOST_ORIGINS {
            // Drop the half that was unused for longest, except those that a request holds.
            let mut uses: Vec<u64> = self.states.values().map(|(used, _)| *used).collect();
            let middle = uses.len() / 2;
            let (_, limit, _) = uses.select_nth_unstable(middle);
            let limit = *limit;
            self.states.retain(|_, (used, gate)| *used >= limit || Arc::strong_count(gate) > 1);
        }
        let gate = Gate::new();
        self.states.insert(name.to_owned(), (self.uses, gate.clone()));
        gate
    }
}

/// The HTTP client of this process: all its sources share the limits and the states of servers.
pub struct Http {
    clients: Clients,
    allow: AllowList,
    config: HttpConfig,
    slots: Arc<Slots>,
    rate: Rate,
    origins: Mutex<Origins>,
    keyring: Keyring,
    /// Of the kinds of sources.
    services: Services,
    runtime: Handle,
    problem: Option<String>,
    servers: Servers,
}

impl Http {
    /// A client that runs in `runtime`. `network` was read before the process gave up its rights.
    ///
    /// # Errors
    /// `Protocol`, when no HTTP client can be made.
    pub fn new(
        config: &HttpConfig,
        network: &Network,
        credentials: Arc<dyn Credentials>,
        runtime: Handle,
    ) -> Result<Arc<Self>, SourceError> {
        Ok(Arc::new(Self {
            clients: network.clients(config)?,
            allow: AllowList::new(&config.allow),
            slots: Slots::new(config.max_requests),
            rate: Rate::new(config.max_rate),
            origins: Mutex::default(),
            keyring: Keyring::new(config, &credentials),
            services: Services::new(config, &credentials),
            runtime,
            problem: network.problem().map(str::to_owned),
            servers: Servers::default(),
            config: config.clone(),
        }))
    }

    /// Learns the identity of an object by one ranged GET of its first bytes, from the first URL that answers. It sends
    /// requests to the other URLs at the same time: each that answers must have the same object.
    ///
    /// # Errors
    /// `Denied`, `Protocol` or `Unreachable`, of the first URL, when none answers; `Protocol` when two of them have
    /// different objects, or when their validators are not enough for `options.strictness`.
    pub async fn probe(
        self: &Arc<Self>,
        urls: &[String],
        options: &RemoteOptions,
    ) -> Result<Probed, SourceError> {
        let mirrors: Vec<_> =
            urls.iter().map(|url| self.services.locate(url, None)).collect::<Result<_, _>>()?;
        let mirrors = mirrors.into_iter().map(Mirror::new);
        let strictness = options.strictness;
        let limit = options.deadline;
        let asked: Vec<_> = mirrors
            .map(|mirror| {
                let (this, shown) = (self.clone(), mirror.shown.clone());
                let task = self.runtime.spawn(async move {
                    let probed = this.probe_one(&mirror, strictness, limit, None).await;
                    probed.map_err(|refused| refused.error)
                });
                (shown, AbortOnDrop(task))
            })
            .collect();
        let (mut first, mut refusals): (Option<(String, Probed)>, _) = (None, Vec::new());
        for (shown, mut task) in asked {
            let result = (&mut task.0)
                .await
                .unwrap_or_else(|_| Err(failed(&shown, &Failure::again("the request was cancelled"))));
            match (result, &first) {
                (Ok(probed), None) => first = Some((shown, probed)),
                (Ok(probed), Some((other, pinned))) => same(&shown, &probed, other, pinned, strictness)?,
                (Err(error), _) => refusals.push(error),
            }
        }
        if let Some((_, probed)) = first {
            for error in refusals {
                tracing::warn!(%error, "a URL of a new base is not usable now");
            }
            return Ok(probed);
        }
        // The caller tells it.
        let none = || failed("no URL", &Failure::Protocol("the source has no URL".into()));
        Err(refusals.into_iter().next().unwrap_or_else(none))
    }

    async fn probe_one(
        &self,
        mirror: &Mirror,
        strictness: Strictness,
        deadline: Option<Duration>,
        image: Pinned<'_>,
    ) -> Result<Probed, Refused> {
        let refuse = |failure: Failure| Refused { error: failed(&mirror.shown, &failure), failure };
        if let Some(problem) = &self.problem {
            return Err(refuse(Failure::advised(problem, CORRECT)));
        }
        let longest = self.answer_timeout() + self.config.stall_timeout;
        let patience = Patience::AfterFailure(deadline.map_or(longest, |deadline| deadline.min(longest)));
        let wait = Wait::new(None, patience, self.config.min_rate);
        let party = Party::new();
        let (mut tries, mut fresh) = (0, false);
        loop {
            tries += 1;
            let once = self.probe_once(mirror, &wait, party, fresh, image);
            let failure = tokio::select! {
                done = once => match done {
                    // The record of an image says which image it is.
                    Ok((probed, _)) if image.is_some() => return Ok(probed),
                    Ok((probed, date)) => {
                        return match identity::suffices(&probed.identity, strictness, date.as_deref()) {
                            Ok(()) => Ok(probed),
                            Err(why) => Err(Refused {
                                failure: Failure::Protocol(why.clone()),
                                error: insufficient(&mirror.shown, why),
                            }),
                        };
                    }
                    Err(failure) => failure,
                },
                () = wait.over() => return Err(refuse(Failure::again("it does not answer in time"))),
            };
            match &failure {
                Failure::Again { .. } if tries < PROBE_TRIES => {
                    wait.failed(&mirror.shown, &failure);
                    tokio::time::sleep(PROBE_PAUSE * tries).await;
                }
                Failure::OutOfRange(_) if !fresh => fresh = true,
                _ => return Err(refuse(failure)),
            }
        }
    }

    async fn probe_once(
        &self,
        mirror: &Mirror,
        wait: &Wait,
        party: Party,
        fresh: bool,
        image: Pinned<'_>,
    ) -> Result<(Probed, Option<String>), Failure> {
        let (evidence, sending) = image.map_or_else(Default::default, ways_of);
        let end = image.map_or(HEAD, |image| image.answer.size.min(HEAD));
        let ask = Dispatch {
            asked: RangeRequest { range: 0..end, pinned: None, evidence, sending, of_peer: false },
            image,
            purpose: Purpose::Demand,
            fresh,
            party,
            slots: &self.slots,
            wait,
            answer_within: self.answer_timeout(),
            pass: None,
            anyway: true,
        };
        let transfer = mirror.ask(self, &ask).await?;
        let identity = transfer.body.identity.clone();
        if i64::try_from(identity.size).is_err() {
            return Err(Failure::Protocol(format!("it says that it has {} bytes", identity.size)));
        }
        let date = answer::text(transfer.response.headers(), header::DATE).map(str::to_owned);
        let mut head = Vec::new();
        let window = self.config.stall_timeout;
        let reading = BodyLimits { wait: Some(wait), rate: None, window, pass: None, backlog: None };
        let mut keep = |bytes: &[u8]| {
            head.extend_from_slice(bytes);
            Ok(())
        };
        fetch::read(self, transfer, reading, &mut keep).await?;
        Ok((Probed { identity, head }, date))
    }

    /// Opens an object that was probed before, by this or another process. Sends no request.
    pub fn open(
        self: &Arc<Self>,
        urls: &[String],
        identity: HttpIdentity,
        options: RemoteOptions,
    ) -> Arc<HttpSource> {
        Arc::new(HttpSource::new(self.clone(), urls, identity, options, None))
    }

    /// As [`open`](Self::open), of an image of a Glance.
    pub fn open_image(
        self: &Arc<Self>,
        urls: &[String],
        image: GlanceIdentity,
        mut options: RemoteOptions,
    ) -> Arc<HttpSource> {
        if image.answer.etag.is_none() && image.answer.last_modified.is_none() {
            // Answers with its data say nothing; its record has been compared.
            options.strictness = Strictness::SizeOnly;
        }
        Arc::new(HttpSource::new(self.clone(), urls, image.answer.clone(), options, Some(image)))
    }

    /// Counters of each server since the start, by host.
    pub fn servers(&self) -> Vec<(String, HttpCounters)> {
        self.servers.all()
    }

    pub(in crate::source) fn config(&self) -> &HttpConfig {
        &self.config
    }

    pub(in crate::source) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The limit of all bases together.
    pub(in crate::source) fn rate(&self) -> &Rate {
        &self.rate
    }

    /// One of the slots of all bases together.
    pub(in crate::source) async fn slot(&self, party: Party, purpose: Purpose) -> Slot {
        self.slots.get(party, purpose).await
    }

    /// All addresses of a name, wherever they are.
    pub(in crate::source) async fn addresses(&self, name: &str) -> Result<Vec<IpAddr>, Failure> {
        let failed = |why: String| Failure::again(format!("its name cannot be resolved: {why}"));
        self.clients.names().lookup(name).await.map_err(failed)
    }

    /// The client that connects to any address, and to no proxy.
    pub(crate) fn direct_client(&self) -> reqwest::Client {
        self.clients.direct().clone()
    }

    fn count(&self, url: &Url) -> Arc<Count> {
        self.servers.of(url)
    }

    fn origin(&self, name: &str) -> Arc<Gate> {
        self.origins.lock().get(name)
    }

    /// The state of a server that had a request before.
    fn known_origin(&self, name: &str) -> Option<Arc<Gate>> {
        self.origins.lock().states.get(name).map(|(_, gate)| gate.clone())
    }

    /// Waits until a request is allowed: it has a slot, and its server is not known to be down. `shown` is the URL that
    /// led to `url`.
    async fn enter(&self, url: &Url, ask: &Dispatch<'_>, shown: &str) -> (HeldSlots, Pass) {
        let origin = self.origin(&url::origin(url));
        loop {
            let own = ask.slots.get(ask.party, ask.purpose).await;
            // Where both are the same, a second slot would wait for the first.
            let all = if Arc::ptr_eq(ask.slots, &self.slots) {
                Slot::none()
            } else {
                self.slots.get(ask.party, ask.purpose).await
            };
            let slots = HeldSlots { _own: own, all };
            if ask.anyway {
                return (slots, origin.enter_anyway());
            }
            match origin.enter() {
                Ok(pass) => return (slots, pass),
                Err(down) => {
                    // A request that waits for a server holds no slot.
                    drop(slots);
                    ask.wait.failed(shown, &down.why);
                    down.over().await;
                }
            }
        }
    }

    /// Fails, after a pause, while the configuration has a mistake: only a restart can correct it.
    pub(in crate::source) async fn usable(&self) -> Result<(), Failure> {
        let Some(problem) = &self.problem else { return Ok(()) };
        tokio::time::sleep(Duration::from_secs(1)).await;
        Err(Failure::advised(problem, CORRECT))
    }

    /// How long the first line of an answer may take.
    pub(in crate::source) fn answer_timeout(&self) -> Duration {
        self.config.connect_timeout.saturating_add(self.config.stall_timeout)
    }
}

/// What answers with the data of an image prove, and how its ranges are sent.
fn ways_of(image: &GlanceIdentity) -> (Evidence, Sending) {
    match image.data {
        ImageData::Ranges => (Evidence::ContentMd5, Sending::Range),
        ImageData::Whole => (Evidence::ContentMd5, Sending::Whole),
        ImageData::Location => (Evidence::Validators, Sending::Range),
    }
}

/// A task that ends when its waiter is dropped.
struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Fails when two mirrors of a new base have different objects.
fn same(
    shown: &str,
    probed: &Probed,
    other: &str,
    pinned: &Probed,
    strictness: Strictness,
) -> Result<(), SourceError> {
    let Probed { identity, head } = probed;
    let why = match pinned.identity.compare(strictness, identity).difference() {
        None if *head == pinned.head => return Ok(()),
        None => "it begins with other bytes".into(),
        Some(why) => why,
    };
    Err(SourceError::remote(
        SourceErrorKind::Protocol,
        "use",
        shown,
        format!("it is another object than {other}: {why}"),
        "all URLs of a base must have one object; if only their ETags differ, use a weaker check and give a digest",
    ))
}

fn insufficient(shown: &str, why: String) -> SourceError {
    let advice = "choose a weaker check for this base (weak, or size alone), and give a digest of the image";
    SourceError::remote(SourceErrorKind::Protocol, "use", shown, why, advice)
}

/// What ends a problem of the configuration.
const CORRECT: &str = "correct the configuration and restart the daemon";

/// The error that a reader gets for a failure.
pub(in crate::source) fn failed(shown: &str, failure: &Failure) -> SourceError {
    let remote = |kind, why: &str, advice| SourceError::remote(kind, "read", shown, why, advice);
    match failure {
        Failure::Again { why, advice, .. } => {
            remote(SourceErrorKind::Unreachable, why, advice.unwrap_or("check the server and the network"))
        }
        Failure::Denied { why, advice, .. } => {
            remote(SourceErrorKind::Denied, why, advice.unwrap_or("check the URL and the credentials"))
        }
        Failure::Another(why) => remote(
            SourceErrorKind::Changed,
            why,
            "a base must never change; restore the original image there, or add the new one as a new base",
        ),
        Failure::Precondition => remote(
            SourceErrorKind::Changed,
            "it is not the version that was added (412)",
            "a base must never change; restore the original image there, or add the new one as a new base",
        ),
        Failure::Protocol(why) | Failure::Disproven(why) | Failure::OutOfRange(why) => {
            remote(SourceErrorKind::Protocol, why, "check the server, or use another mirror")
        }
        Failure::Overtaken | Failure::Missing { .. } => {
            remote(SourceErrorKind::Unreachable, failure.why(), "check the server and the network")
        }
        Failure::Moved { .. } => remote(
            SourceErrorKind::Protocol,
            "it is somewhere else",
            "check the server, or use another mirror",
        ),
    }
}

/// The error of a fetch of a base that its operator gave up.
pub(in crate::source) fn given_up(shown: String) -> SourceError {
    SourceError::remote(
        SourceErrorKind::GivenUp,
        "read",
        shown,
        "its operator gave it up",
        "undo it with: plyfs base fail NAME --undo, or: plyfs base set NAME --source URL",
    )
}

/// The error of a fetch after its deadline, of the kind of the last failure.
fn too_late(shown: &str, limit: Duration, last: Option<Failure>) -> SourceError {
    let why = format!("its server has not sent it for {limit:?}");
    let Some(mut last) = last else { return failed(shown, &Failure::again(why)) };
    let text = format!("{why} ({})", last.why());
    match &mut last {
        Failure::Again { why, .. } | Failure::Denied { why, .. } => *why = text,
        Failure::Another(why)
        | Failure::Protocol(why)
        | Failure::Disproven(why)
        | Failure::OutOfRange(why) => {
            *why = text;
        }
        Failure::Precondition => last = Failure::Another(text),
        Failure::Overtaken | Failure::Missing { .. } => last = Failure::again(text),
        Failure::Moved { .. } => last = Failure::Protocol(text),
    }
    failed(shown, &last)
}

/// The text of a client's error, without the URL.
pub(crate) fn words(error: &reqwest::Error) -> String {
    let mut all = Vec::<String>::new();
    let mut next = std::error::Error::source(error);
    while let Some(error) = next {
        let text = error.to_string();
        if all.last().is_none_or(|last| !last.contains(&text)) {
            all.push(text);
        }
        next = error.source();
    }
    // The outer errors only say that the request failed; the inner errors have the cause.
    let inner = all.len().saturating_sub(2);
    let text = all[inner..].join(": ");
    match (text.is_empty(), error.is_timeout()) {
        (true, true) => "it timed out".into(),
        (true, false) => "the request failed".into(),
        (false, _) => text.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect(),
    }
}
