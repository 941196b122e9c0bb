//! Fetches a range of one object from any of its mirrors, and retries until the bytes are complete (H3).

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant as Time};

use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout};

use super::answer::{Failure, RangeRequest};
use super::gate::{Pass, jittered};
use super::limit::{Party, Rate, Slots};
use super::mirror::{Dispatch, Mirror, SLOW, Transfer};
use super::peer::{ContentName, Miss, PATIENCE, is_peer, of_peer};
use super::proving::Proving;
use super::wait::{Patience, Stalls, Wait};
use super::{Backlog, Http, HttpIdentity, RemoteOptions, Strictness, failed, given_up, ways_of, words};
use crate::source::{
    Deliver, Fetch, GlanceIdentity, ProofOfRange, Purpose, RemoteSource, SourceError, Stall, UrlState,
};

/// Attempts of a fetch for which no reader waits.
pub(in crate::source) const TRIES: u32 = 4;
/// Pause between two attempts of one fetch at one URL, doubled from the first to the last. The URL may work for others.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(2);
/// A server works when a transfer has delivered so many bytes.
const PROOF: u64 = 16 << 10;
/// A request below this rate, in bytes per second, gives its slot of all bases up.
const LOAD: u64 = 64 << 10;

/// The URLs of an object, and whether its operator gave it up.
#[derive(Clone)]
struct Place {
    mirrors: Vec<Arc<Mirror>>,
    /// The mistake in a URL that an earlier version accepted.
    broken: Option<SourceError>,
    given_up: bool,
}

impl Place {
    /// Peers come first, in the order of `urls`.
    fn new(http: &Http, urls: &[String], pinned: &HttpIdentity, contents: Option<&ContentName>) -> Self {
        let (mut mirrors, mut broken) = (Vec::new(), None);
        for url in urls {
            let mirror = match (is_peer(url), contents) {
                (false, _) => http.services.locate(url, Some(pinned)).map(Mirror::new),
                (true, Some(contents)) => Mirror::of_peer(url, contents, pinned.size),
                (true, None) => continue,
            };
            match mirror {
                Ok(mirror) => mirrors.push(Arc::new(mirror)),
                Err(error) => broken = Some(error),
            }
        }
        mirrors.sort_by_key(|mirror| mirror.peer.is_none());
        Self { mirrors, broken, given_up: false }
    }

    fn shown(&self) -> String {
        let first = self.mirrors.iter().find(|mirror| mirror.peer.is_none());
        first.map_or_else(String::new, |mirror| mirror.shown.clone())
    }
}

/// One object behind one or several URLs, which may be replaced while it is read.
pub struct HttpSource {
    http: Arc<Http>,
    identity: HttpIdentity,
    options: RemoteOptions,
    place: watch::Sender<Arc<Place>>,
    party: Party,
    slots: Arc<Slots>,
    rate: Rate,
    stalls: Arc<Stalls>,
    /// Of an image of a Glance.
    image: Option<GlanceIdentity>,
    /// What the taker of a whole image has not taken yet.
    backlog: Mutex<Option<Arc<Backlog>>>,
}

impl HttpSource {
    pub(super) fn new(
        http: Arc<Http>,
        urls: &[String],
        identity: HttpIdentity,
        options: RemoteOptions,
        image: Option<GlanceIdentity>,
    ) -> Self {
        Self {
            image,
            backlog: Mutex::new(None),
            slots: Slots::new(options.max_requests.unwrap_or(u32::MAX).min(http.config.max_requests)),
            rate: Rate::new(options.max_rate),
            stalls: Stalls::new(),
            party: Party::new(),
            place: watch::Sender::new(Arc::new(Place::new(
                &http,
                urls,
                &identity,
                options.contents.as_ref(),
            ))),
            http,
            identity,
            options,
        }
    }

    /// Lets later transfers wait for the taker of their bytes.
    pub(super) fn wait_for(&self, backlog: &Arc<Backlog>) {
        *self.backlog.lock() = Some(backlog.clone());
    }

    /// When a failing mirror may get a request; none when it works.
    fn ready(&self, mirror: &Mirror, own: Option<Instant>) -> Option<Instant> {
        let own = own.filter(|at| *at > Instant::now());
        let origin = self.http.known_origin(&mirror.origin()).and_then(|origin| origin.ready());
        let rested = mirror.rested().filter(|at| *at > Instant::now());
        mirror.gate.ready().max(origin).max(own).max(rested)
    }

    /// The mirror to use: the first that works; when none works, the one that may get a request first. The second value
    /// is when to use another mirror, if this one may not get a request by then.
    fn pick(self: &Arc<Self>, place: &Place, own: &[Pause], at: u64) -> Option<(usize, Option<Instant>)> {
        let own = own.iter().map(|own| own.until.max(own.miss.over(at)));
        let ready: Vec<Option<Instant>> =
            place.mirrors.iter().zip(own).map(|(mirror, own)| self.ready(mirror, own)).collect();
        let works = ready.iter().position(Option::is_none);
        if let Some(works) = works {
            // Whether the mirrors before it work again, a separate task tries, and no reader.
            for (mirror, at) in place.mirrors[..works].iter().zip(&ready) {
                if at.is_some_and(|at| at <= Instant::now()) {
                    self.check(mirror);
                }
            }
        }
        let number = works.or_else(|| (0..ready.len()).min_by_key(|number| ready[*number]))?;
        let others = ready.iter().enumerate().filter(|(other, _)| *other != number);
        Some((number, others.filter_map(|(_, at)| *at).min()))
    }

    /// Tries whether a mirror works again.
    fn check(self: &Arc<Self>, mirror: &Arc<Mirror>) {
        if mirror.checking.swap(true, Ordering::AcqRel) {
            return;
        }
        let (this, mirror) = (self.clone(), mirror.clone());
        self.http.runtime.spawn(async move {
            if let Ok(mut pass) = mirror.gate.enter() {
                let wait = Wait::new(None, Patience::Endless, this.http.config.min_rate);
                let mut deliver: Deliver = Box::new(|_| {});
                // So many bytes prove that it works. One that sent wrong bytes has to send the right ones there.
                let wrong = mirror.disproven.lock().clone();
                let mut proving = wrong.clone().map(|parts| Proving::known(parts.range(), parts));
                let range = wrong.map_or(0..PROOF.min(this.identity.size), |parts| parts.range());
                let mut at = range.start;
                let times = this.times(&wait, 1, &mirror);
                let (purpose, proving) = (Purpose::Hydrate, proving.as_mut());
                let mut job = AttemptLimits { purpose, wait: &wait, pass: &mut pass, times, proving };
                let once = this.attempt(&mirror, &mut at, range.end, &mut job, &mut deliver);
                match timeout(this.http.answer_timeout(), once).await {
                    Ok(Ok(())) => *mirror.disproven.lock() = None,
                    Ok(Err(Failure::Missing { .. })) if mirror.disproven.lock().is_none() => pass.worked(),
                    Ok(Err(failure)) => pass.failed(&failure),
                    Err(_) => pass.failed(&Failure::again("it does not answer in time")),
                }
            }
            mirror.checking.store(false, Ordering::Release);
        });
    }

    /// How long one of `mirrors` may take. Each of them gets a request before a deadline.
    fn times(&self, wait: &Wait, mirrors: usize, mirror: &Mirror) -> Times {
        let config = &self.http.config;
        let share = wait.limit().filter(|_| mirrors > 1).map(|limit| limit / (mirrors as u32 + 1));
        let of_peer = |share: Option<Duration>| share.unwrap_or(PATIENCE).min(PATIENCE);
        let share = if mirror.peer.is_some() { Some(of_peer(share)) } else { share };
        let least = |time: Duration| share.map_or(time, |share| time.min(share));
        Times { answer: least(self.http.answer_timeout()), window: least(config.stall_timeout) }
    }

    async fn fetch_within_deadline(
        self: Arc<Self>,
        range: Range<u64>,
        purpose: Purpose,
        since: Time,
        mut deliver: Deliver,
        proof: Option<ProofOfRange>,
    ) -> Result<(), SourceError> {
        let (deadline, min_rate) = (self.options.deadline, self.http.config.min_rate);
        let wait = Wait::of_fetch(purpose, since, deadline, &self.stalls, min_rate);
        let proving = proof.map(|proof| Proving::begin(&self.http.runtime, range.clone(), proof));
        tokio::select! {
            // In this order: a read that has all its bytes succeeds, also at the deadline.
            biased;
            done = self.run(range, purpose, &mut deliver, &wait, proving) => done,
            () = wait.over() => Err(wait.too_late(&self.shown())),
        }
    }

    async fn run(
        self: &Arc<Self>,
        range: Range<u64>,
        purpose: Purpose,
        deliver: &mut Deliver,
        wait: &Wait,
        mut proving: Option<Proving>,
    ) -> Result<(), SourceError> {
        let (mut at, mut tries) = (range.start, 0);
        let mut changes = self.place.subscribe();
        while at < range.end {
            let place = changes.borrow_and_update().clone();
            if place.given_up {
                return Err(given_up(place.shown()));
            }
            let (tries, proving) = (&mut tries, proving.as_mut());
            let asking = self
                .ask_one_after_the_other(&place, &mut at, range.end, purpose, tries, deliver, wait, proving);
            tokio::select! {
                done = asking => return done,
                // It does not fail: the sender is part of this source.
                _ = changes.changed() => {}
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments)]
    async fn ask_one_after_the_other(
        self: &Arc<Self>,
        place: &Place,
        at: &mut u64,
        end: u64,
        purpose: Purpose,
        tries: &mut u32,
        deliver: &mut Deliver,
        wait: &Wait,
        mut proving: Option<&mut Proving>,
    ) -> Result<(), SourceError> {
        let mut pauses = vec![Pause::default(); place.mirrors.len()];
        while *at < end {
            let Some((number, other_ready)) = self.pick(place, &pauses, *at) else {
                let none = || failed("no URL", &Failure::Protocol("the source has no URL".into()));
                return Err(place.broken.clone().unwrap_or_else(none));
            };
            let (mirror, before) = (&place.mirrors[number], *at);
            let mut pass = match mirror.gate.enter() {
                Ok(pass) => pass,
                Err(down) => {
                    if mirror.peer.is_none() {
                        wait.failed(&mirror.shown, &down.why);
                    }
                    match other_ready {
                        None => down.over().await,
                        Some(ready) => tokio::select! {
                            () = down.over() => {}
                            () = sleep_until(ready) => {}
                        },
                    }
                    continue;
                }
            };
            if let Some(until) = pauses[number].until.max(pauses[number].miss.over(*at)) {
                sleep_until(until).await;
            }
            let times = self.times(wait, place.mirrors.len(), mirror);
            let end = pauses.iter().fold(end, |end, pause| pause.miss.end(*at, end));
            let proving_now = proving.as_deref_mut();
            let mut job = AttemptLimits { purpose, wait, pass: &mut pass, times, proving: proving_now };
            let failure = match self.attempt(mirror, at, end, &mut job, deliver).await {
                Err(failure) => failure,
                Ok(()) if *at > before => continue,
                Ok(()) => Failure::Protocol("it sends less than one group".into()),
            };
            if let Some(error) = proving.as_mut().and_then(|proving| proving.lost()) {
                return Err(error);
            }
            if failure == Failure::Overtaken {
                continue;
            }
            if let Failure::Missing { until, rest } = failure {
                mirror.count(&self.http).miss();
                mirror.rest(rest);
                pauses[number].miss = Miss::new(until);
                if mirror.disproven.lock().is_none() {
                    pass.worked();
                }
                continue;
            }
            mirror.count(&self.http).retry();
            let (url, why) = (&mirror.shown, failure.why());
            tracing::debug!(url, why, at, tries, ?purpose, "a request failed");
            pauses[number].failed(*at > before);
            if mirror.peer.is_some() {
                // The servers are asked all the same.
                pass.failed(&failure);
                continue;
            }
            wait.failed(&mirror.shown, &failure);
            let slow = matches!(failure, Failure::Again { .. }) && *at - before < self.http.config.min_rate;
            *tries = if *at > before && !slow { 0 } else { *tries + 1 };
            pass.failed(&failure);
            if purpose != Purpose::Demand && *tries >= TRIES {
                return Err(failed(&mirror.shown, &failure));
            }
        }
        Ok(())
    }

    /// One request and its bytes, from `at` on; moves `at`. A failure that may come from a cache, from the condition or
    /// from one of several nodes is retried once, past all caches.
    async fn attempt(
        &self,
        mirror: &Mirror,
        at: &mut u64,
        end: u64,
        job: &mut AttemptLimits<'_>,
        deliver: &mut Deliver,
    ) -> Result<(), Failure> {
        let mut fresh = false;
        loop {
            let result = self.transfer(mirror, at, end, job, deliver).await;
            if let Err(Failure::Another(_) | Failure::Disproven(_)) = &result {
                mirror.count(&self.http).wrong();
            }
            match if mirror.peer.is_some() { result.map_err(of_peer) } else { result } {
                // The answer to a request without the condition decides.
                Err(Failure::Precondition) if !mirror.without_condition.swap(true, Ordering::Relaxed) => {}
                Err(failure) if failure.may_be_a_cache() && !fresh => {
                    fresh = true;
                    mirror.suspect_caches();
                }
                Err(Failure::Another(why)) => {
                    tracing::warn!(
                        url = mirror.shown,
                        why,
                        "the server has another object than the base's; it is not used"
                    );
                    return Err(Failure::Another(why));
                }
                other => return other,
            }
            mirror.count(&self.http).retry();
        }
    }

    async fn transfer(
        &self,
        mirror: &Mirror,
        at: &mut u64,
        end: u64,
        job: &mut AttemptLimits<'_>,
        deliver: &mut Deliver,
    ) -> Result<(), Failure> {
        self.http.usable().await?;
        let of_peer = mirror.peer.is_some();
        let image = self.image.as_ref().filter(|_| !of_peer);
        let (evidence, sending) = image.map_or_else(Default::default, ways_of);
        let own = (&self.identity, self.options.strictness);
        let pinned = Some(mirror.peer.as_ref().map_or(own, |identity| (identity, Strictness::Strong)));
        let ask = Dispatch {
            asked: RangeRequest { range: *at..end, pinned, evidence, sending, of_peer },
            image,
            purpose: job.purpose,
            fresh: false,
            party: self.party,
            slots: &self.slots,
            wait: job.wait,
            answer_within: job.times.answer,
            pass: Some(&*job.pass),
            anyway: false,
        };
        let transfer = mirror.ask(&self.http, &ask).await?;
        let before = *at;
        let backlog = self.backlog.lock().clone();
        let backlog = backlog.as_deref();
        let (rate, window) = (Some(&self.rate), job.times.window);
        let result = match &mut job.proving {
            Some(proving) => {
                proving.restart();
                let (pass, wait) = (&mut *job.pass, job.wait);
                // Only proven bytes are progress: a server that sends others does not work.
                let mut note = |proven: usize, now: u64| {
                    *at = now;
                    if proven > 0 {
                        wait.progressed(proven);
                        pass.worked();
                    }
                };
                let mut give = |bytes: &[u8]| {
                    let proven = proving.take(bytes, &mut **deliver);
                    note(*proven.as_ref().unwrap_or(&0), proving.at());
                    proven.map(drop)
                };
                let reading = BodyLimits { wait: None, rate, window, pass: None, backlog };
                let read = read(&self.http, transfer, reading, &mut give).await;
                // Whole parts of a transfer that broke count, too. The request holds no slot by now.
                let settled = match &read {
                    Err(Failure::Disproven(_)) => Ok(0),
                    _ => proving.settle(&mut **deliver).await,
                };
                note(*settled.as_ref().unwrap_or(&0), proving.at());
                let result = settled.map(drop).and(read);
                if let (Err(Failure::Disproven(why)), Some(part)) = (&result, proving.disproven()) {
                    mirror.sent_wrong(part, why);
                }
                result
            }
            None => {
                let mut give = |bytes: &[u8]| {
                    deliver(bytes);
                    *at += bytes.len() as u64;
                    Ok(())
                };
                let pass = Some(&mut *job.pass);
                let reading = BodyLimits { wait: Some(job.wait), rate, window, pass, backlog };
                read(&self.http, transfer, reading, &mut give).await
            }
        };
        if result.is_err() && *at == before {
            mirror.forget_target();
        }
        result
    }
}

/// When a fetch may use one URL again.
#[derive(Clone, Copy, Default)]
struct Pause {
    failures: u32,
    until: Option<Instant>,
    /// What a peer does not have.
    miss: Miss,
}

impl Pause {
    fn failed(&mut self, progressed: bool) {
        self.failures = if progressed { 1 } else { self.failures.saturating_add(1) };
        let pause = FIRST_PAUSE.saturating_mul(1 << (self.failures - 1).min(10)).min(LAST_PAUSE);
        self.until = Some(Instant::now() + jittered(pause));
    }
}

/// How long a server may take.
#[derive(Clone, Copy)]
struct Times {
    /// Until its answer begins.
    answer: Duration,
    /// The time over which the minimum rate is averaged.
    window: Duration,
}

/// The parameters of one attempt.
struct AttemptLimits<'a> {
    purpose: Purpose,
    wait: &'a Wait,
    pass: &'a mut Pass,
    times: Times,
    /// By what the bytes are proven, where they are.
    proving: Option<&'a mut Proving>,
}

/// Measures how fast a body comes.
struct Pace {
    window: Duration,
    at_least: u64,
    waited: Duration,
    bytes: u64,
    /// Bytes of all windows.
    total: u64,
}

impl Pace {
    fn new(window: Duration, per_second: u64) -> Self {
        let at_least = (window.as_secs_f64() * per_second as f64) as u64;
        Self { window, at_least: at_least.max(1), waited: Duration::ZERO, bytes: 0, total: 0 }
    }

    /// The rest of the window.
    fn left(&self) -> Duration {
        self.window.saturating_sub(self.waited)
    }

    /// Whether the transfer is so slow that it is no load for the network.
    fn is_light(&self) -> bool {
        self.waited >= SLOW && (self.bytes as f64) < LOAD as f64 * self.waited.as_secs_f64()
    }

    /// Notes that `bytes` came after `waited`. Fails with the cause when the transfer is too slow.
    fn came(&mut self, bytes: usize, waited: Duration) -> Result<(), String> {
        self.waited += waited;
        self.bytes += bytes as u64;
        self.total += bytes as u64;
        if self.waited < self.window {
            return Ok(());
        }
        let (window, bytes) = (self.window, self.bytes);
        if bytes == 0 {
            return Err(format!("it has sent nothing for {window:?}"));
        }
        if bytes < self.at_least {
            let least = self.at_least;
            return Err(format!(
                "it is too slow: {bytes} bytes in {window:?}, at least {least} are asked for"
            ));
        }
        (self.waited, self.bytes) = (Duration::ZERO, 0);
        Ok(())
    }
}

/// The limits of reading a body.
pub(super) struct BodyLimits<'a> {
    /// Is told of the bytes that come.
    pub wait: Option<&'a Wait>,
    pub rate: Option<&'a Rate>,
    /// The time over which the minimum rate is averaged.
    pub window: Duration,
    /// Is told when the URL works.
    pub pass: Option<&'a mut Pass>,
    /// What the taker of the bytes has not taken yet.
    pub backlog: Option<&'a Backlog>,
}

/// Reads the body of an answer and delivers the requested bytes.
pub(super) async fn read(
    http: &Http,
    transfer: Transfer,
    reading: BodyLimits<'_>,
    give: &mut (dyn FnMut(&[u8]) -> Result<(), Failure> + Send),
) -> Result<(), Failure> {
    let BodyLimits { wait, rate, window, mut pass, backlog } = reading;
    let Transfer { mut response, body, mut slots } = transfer;
    let (mut skip, mut left) = (body.skip, body.take);
    let count = http.count(response.url());
    // A body of unknown length is delivered only when its end has come.
    let mut held = Vec::new();
    let mut pace = Pace::new(window, http.config.min_rate);
    loop {
        let (begin, patience) = (Instant::now(), pace.left());
        let next = {
            let next = timeout(patience, response.chunk());
            tokio::pin!(next);
            match timeout(SLOW, &mut next).await {
                Ok(next) => next,
                Err(_) => {
                    slots.give_way();
                    next.await
                }
            }
        };
        let chunk = match next {
            Ok(Ok(chunk)) => chunk,
            Ok(Err(error)) => {
                let why = format!("the transfer broke off, {left} bytes before the end: {}", words(&error));
                return Err(Failure::again(why));
            }
            Err(_) => {
                pace.came(0, patience).map_err(Failure::again)?;
                continue;
            }
        };
        let Some(chunk) = chunk else {
            if left == 0 {
                break;
            }
            return Err(Failure::again(format!("the transfer ended {left} bytes before its end")));
        };
        count.bytes(chunk.len());
        let slow = pace.came(chunk.len(), begin.elapsed());
        if pace.is_light() {
            slots.give_way();
        }
        let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
        skip -= skipped as u64;
        let rest = &chunk[skipped..];
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
        if wanted < rest.len() && !body.more {
            return Err(Failure::Protocol("it sends more bytes than the range has".into()));
        }
        if wanted > 0 {
            if let Some(wait) = wait {
                wait.progressed(wanted);
            }
            left -= wanted as u64;
            if body.announced { give(&rest[..wanted])? } else { held.extend_from_slice(&rest[..wanted]) }
        }
        if (left == 0 || pace.total >= PROOF)
            && let Some(pass) = pass.take()
        {
            pass.worked();
        }
        if left > 0 {
            slow.map_err(Failure::again)?;
        }
        http.rate.took(chunk.len()).await;
        if let Some(rate) = rate {
            rate.took(chunk.len()).await;
        }
        if let Some(backlog) = backlog {
            backlog.has_room().await;
        }
        if left == 0 && body.more {
            // The rest of the file is not read, so the connection cannot be used again.
            tracing::debug!(skipped = body.skip, "the server sent the whole file for a range");
            break;
        }
        if left == 0 && body.announced {
            // All bytes are here. Reading the end of the body frees the connection.
            let _ = timeout(Duration::from_millis(100), response.chunk()).await;
            break;
        }
    }
    if held.is_empty() { Ok(()) } else { give(&held) }
}

impl RemoteSource for HttpSource {
    fn size(&self) -> u64 {
        self.identity.size
    }

    fn shown(&self) -> String {
        self.place.borrow().shown()
    }

    fn fetch(self: Arc<Self>, range: Range<u64>, purpose: Purpose, since: Time, deliver: Deliver) -> Fetch {
        Box::pin(self.fetch_within_deadline(range, purpose, since, deliver, None))
    }

    fn fetch_proven(
        self: Arc<Self>,
        range: Range<u64>,
        purpose: Purpose,
        since: Time,
        deliver: Deliver,
        proof: ProofOfRange,
    ) -> Fetch {
        Box::pin(self.fetch_within_deadline(range, purpose, since, deliver, Some(proof)))
    }

    fn stall(&self) -> Option<Stall> {
        self.stalls.longest()
    }

    fn set_urls(&self, urls: &[String]) -> Result<(), SourceError> {
        let place = Place::new(&self.http, urls, &self.identity, self.options.contents.as_ref());
        if let Some(error) = place.broken {
            return Err(error);
        }
        self.place.send_modify(|now| *now = Arc::new(Place { given_up: now.given_up, ..place }));
        Ok(())
    }

    fn give_up(&self, given_up: bool) {
        self.place.send_if_modified(|now| {
            let differs = now.given_up != given_up;
            *now = Arc::new(Place { given_up, ..Place::clone(now) });
            differs
        });
    }

    fn urls(&self) -> Vec<UrlState> {
        let place = self.place.borrow().clone();
        let state = |mirror: &Arc<Mirror>| {
            let origin = self.http.known_origin(&mirror.origin());
            let trouble = mirror.gate.trouble().or_else(|| origin?.trouble());
            UrlState {
                url: mirror.shown.clone(),
                trouble: trouble.map(|failure| failure.why().to_owned()),
                is_peer: mirror.peer.is_some(),
            }
        };
        place.mirrors.iter().map(state).collect()
    }
}
