//! One export behind one or several URLs.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant as Time};

use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::Nbd;
use super::connection::Connection;
use super::place::Place;
use crate::source::http::{
    Failure, Gate, Party, Pass, Proving, Rate, RemoteOptions, Slots, Stalls, TRIES, Wait, failed, given_up,
    jittered,
};
use crate::source::{Deliver, Fetch, ProofOfRange, Purpose, RemoteSource, SourceError, Stall, UrlState};

/// Bytes of one request, and requests of one fetch in flight.
const PIECE: u64 = 256 << 10;
const AHEAD: usize = 4;
/// When a read fails sooner than this after it was sent, its connection had ended before.
const AT_ONCE: Duration = Duration::from_millis(500);
/// Pause of one fetch between two attempts that the gate would let through.
const PAUSE: Duration = Duration::from_millis(100);

/// One URL, its state, and the connection to it.
struct Target {
    place: Place,
    gate: Arc<Gate>,
    connection: tokio::sync::Mutex<Option<Arc<Connection>>>,
}

/// The URLs, and whether the operator gave the base up.
#[derive(Clone, Default)]
struct Targets {
    all: Vec<Arc<Target>>,
    /// The mistake in a URL that another version accepted.
    broken: Option<SourceError>,
    given_up: bool,
}

impl Targets {
    fn new(urls: &[String]) -> Self {
        let mut targets = Self::default();
        for url in urls {
            match Place::parse(url) {
                Ok(place) => {
                    let (gate, connection) = (Gate::new(), tokio::sync::Mutex::default());
                    targets.all.push(Arc::new(Target { place, gate, connection }));
                }
                Err(error) => targets.broken = Some(error),
            }
        }
        targets
    }

    fn shown(&self) -> String {
        self.all.first().map_or_else(String::new, |target| target.place.shown.clone())
    }

    /// The first URL that works, or else the one that may be tried first.
    fn pick(&self) -> Option<&Arc<Target>> {
        self.all.iter().min_by_key(|target| target.gate.ready())
    }
}

/// See the module.
pub struct NbdSource {
    nbd: Arc<Nbd>,
    size: u64,
    options: RemoteOptions,
    targets: watch::Sender<Arc<Targets>>,
    party: Party,
    slots: Arc<Slots>,
    rate: Rate,
    stalls: Arc<Stalls>,
}

impl NbdSource {
    pub(super) fn new(nbd: Arc<Nbd>, urls: &[String], size: u64, options: RemoteOptions) -> Self {
        let most = nbd.http.config().max_requests;
        Self {
            slots: Slots::new(options.max_requests.unwrap_or(u32::MAX).min(most)),
            rate: Rate::new(options.max_rate),
            stalls: Stalls::new(),
            party: Party::new(),
            targets: watch::Sender::new(Arc::new(Targets::new(urls))),
            nbd,
            size,
            options,
        }
    }

    async fn fetch_within_deadline(
        self: Arc<Self>,
        range: Range<u64>,
        purpose: Purpose,
        since: Time,
        mut deliver: Deliver,
        proof: Option<ProofOfRange>,
    ) -> Result<(), SourceError> {
        let (deadline, min_rate) = (self.options.deadline, self.nbd.http.config().min_rate);
        let wait = Wait::of_fetch(purpose, since, deadline, &self.stalls, min_rate);
        let proving = proof.map(|proof| Proving::begin(self.nbd.http.runtime(), range.clone(), proof));
        let job = Job { end: range.end, purpose, wait: &wait, deliver: &mut deliver, proving };
        tokio::select! {
            biased;
            done = self.run(range.start, job) => done,
            () = wait.over() => Err(wait.too_late(&self.shown())),
        }
    }

    async fn run(&self, mut at: u64, mut job: Job<'_>) -> Result<(), SourceError> {
        let mut tries = 0;
        let mut changes = self.targets.subscribe();
        while at < job.end {
            let targets = changes.borrow_and_update().clone();
            if targets.given_up {
                return Err(given_up(targets.shown()));
            }
            let asking = self.ask(&targets, &mut at, &mut tries, &mut job);
            tokio::select! {
                done = asking => return done,
                // It does not fail: the sender is part of this source.
                _ = changes.changed() => {}
            }
        }
        Ok(())
    }

    async fn ask(
        &self,
        targets: &Targets,
        at: &mut u64,
        tries: &mut u32,
        job: &mut Job<'_>,
    ) -> Result<(), SourceError> {
        let (wait, purpose) = (job.wait, job.purpose);
        while *at < job.end {
            let Some(target) = targets.pick() else {
                let none = || failed("no URL", &Failure::Protocol("the source has no URL".into()));
                return Err(targets.broken.clone().unwrap_or_else(none));
            };
            let mut pass = match target.gate.enter() {
                Ok(pass) => pass,
                Err(down) => {
                    wait.failed(&target.place.shown, &down.why);
                    down.over().await;
                    continue;
                }
            };
            let before = *at;
            let Err(failure) = self.attempt(target, at, &mut pass, job).await else { continue };
            if let Some(error) = job.proving.as_mut().and_then(Proving::lost) {
                return Err(error);
            }
            if failure == Failure::Overtaken {
                continue;
            }
            tracing::debug!(
                url = target.place.shown,
                why = failure.why(),
                at,
                tries,
                ?purpose,
                "a read failed"
            );
            wait.failed(&target.place.shown, &failure);
            *tries = if *at > before { 0 } else { *tries + 1 };
            pass.failed(&failure);
            if purpose != Purpose::Demand && *tries >= TRIES {
                return Err(failed(&target.place.shown, &failure));
            }
            sleep(jittered(PAUSE)).await;
        }
        Ok(())
    }

    /// Reads from `at` on over one connection; moves `at`.
    async fn attempt(
        &self,
        target: &Target,
        at: &mut u64,
        pass: &mut Pass,
        job: &mut Job<'_>,
    ) -> Result<(), Failure> {
        if let Some(proving) = &mut job.proving {
            proving.restart();
        }
        let read = self.transfer(target, at, pass, job).await;
        let Some(proving) = &mut job.proving else { return read };
        // Whole parts of a transfer that broke count, too. The request holds no slot by now.
        let settled = match &read {
            Err(Failure::Disproven(_)) => Ok(0),
            _ => proving.settle(&mut **job.deliver).await,
        };
        *at = proving.at();
        if settled.as_ref().is_ok_and(|proven| *proven > 0) {
            pass.worked();
        }
        settled.map(drop).and(read)
    }

    async fn transfer(
        &self,
        target: &Target,
        at: &mut u64,
        pass: &mut Pass,
        job: &mut Job<'_>,
    ) -> Result<(), Failure> {
        let (http, purpose) = (&self.nbd.http, job.purpose);
        let _slots = (self.slots.get(self.party, purpose).await, http.slot(self.party, purpose).await);
        let (mut connection, mut is_old) = self.connection(target, pass).await?;
        let sent = Instant::now();
        let (mut begun, mut ahead) = (*at, VecDeque::with_capacity(AHEAD));
        loop {
            while ahead.len() < AHEAD && begun < job.end {
                let piece = begun..job.end.min(begun + PIECE);
                begun = piece.end;
                ahead.push_back(self.begin(&connection, piece));
            }
            let Some(mut next) = ahead.pop_front() else { return Ok(()) };
            match (&mut next.0).await.unwrap_or_else(|_| Err(Failure::again("the read was cancelled"))) {
                Ok(bytes) => {
                    is_old = false;
                    job.take(&bytes, at, pass)?;
                    http.rate().took(bytes.len()).await;
                    self.rate.took(bytes.len()).await;
                }
                // A connection that was idle may have ended meanwhile, which says nothing about the server.
                Err(_) if is_old && !connection.works() && sent.elapsed() < AT_ONCE => {
                    ahead.clear();
                    (connection, is_old) = self.connection(target, pass).await?;
                    begun = *at;
                }
                Err(failure) => return Err(failure),
            }
        }
    }

    /// Begins to read a piece, which has to come at the minimum rate.
    fn begin(&self, connection: &Arc<Connection>, range: Range<u64>) -> Piece {
        let config = self.nbd.http.config();
        let slowest = Duration::from_secs_f64((range.end - range.start) as f64 / config.min_rate as f64);
        let limit = config.stall_timeout.saturating_add(slowest);
        let connection = connection.clone();
        Piece(self.nbd.http.runtime().spawn(async move {
            match timeout(limit, piece(&connection, range)).await {
                Ok(done) => done,
                Err(_) => {
                    // Other reads over it would wait as long.
                    let why = Failure::again(format!("it has not answered a read for {limit:?}"));
                    connection.end(why.clone());
                    Err(why)
                }
            }
        }))
    }

    /// The connection to a URL, and whether it was there before.
    async fn connection(&self, target: &Target, pass: &Pass) -> Result<(Arc<Connection>, bool), Failure> {
        let mut kept = target.connection.lock().await;
        if let Some(connection) = kept.as_ref().filter(|connection| connection.works()) {
            return Ok((connection.clone(), true));
        }
        // Another fetch tried meanwhile: this one waits as long as that one.
        if !pass.is_current() {
            return Err(Failure::Overtaken);
        }
        // A server with one client at a time needs the old one to end first.
        *kept = None;
        let connection = Arc::new(self.nbd.connect(&target.place).await?);
        let size = connection.export.size;
        if size != self.size {
            return Err(Failure::Another(format!("it has {size} bytes, not {}", self.size)));
        }
        *kept = Some(connection.clone());
        Ok((connection, false))
    }
}

/// One fetch.
struct Job<'a> {
    end: u64,
    purpose: Purpose,
    wait: &'a Wait,
    deliver: &'a mut Deliver,
    /// By what the bytes are proven, where they are.
    proving: Option<Proving>,
}

impl Job<'_> {
    /// Delivers bytes; moves `at`. Only proven bytes are progress, where they are proven.
    fn take(&mut self, bytes: &[u8], at: &mut u64, pass: &mut Pass) -> Result<(), Failure> {
        let got = match &mut self.proving {
            Some(proving) => {
                let proven = proving.take(bytes, &mut **self.deliver)?;
                *at = proving.at();
                proven
            }
            None => {
                (self.deliver)(bytes);
                *at += bytes.len() as u64;
                bytes.len()
            }
        };
        if got > 0 {
            self.wait.progressed(got);
            pass.worked();
        }
        Ok(())
    }
}

/// A read under way, which ends when it is dropped.
struct Piece(tokio::task::JoinHandle<Result<Vec<u8>, Failure>>);

impl Drop for Piece {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Reads a range, which may begin and end within a block of the export.
///
/// # Errors
/// As [`Connection::read`].
pub(super) async fn piece(connection: &Connection, range: Range<u64>) -> Result<Vec<u8>, Failure> {
    let export = connection.export;
    let block = u64::from(export.block);
    let start = range.start / block * block;
    let end = range.end.next_multiple_of(block);
    if end > export.size {
        let why = format!("its server says that it has {} bytes, and that a block has {block}", export.size);
        return Err(Failure::Protocol(why));
    }
    let length = u32::try_from(end - start).map_err(|_| Failure::Protocol("a read is too long".into()))?;
    if length == 0 {
        return Ok(Vec::new());
    }
    let mut bytes = connection.read(start, length).await?;
    bytes.truncate((range.end - start) as usize);
    bytes.drain(..(range.start - start) as usize);
    Ok(bytes)
}

impl RemoteSource for NbdSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn shown(&self) -> String {
        self.targets.borrow().shown()
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
        let targets = Targets::new(urls);
        if let Some(error) = targets.broken {
            return Err(error);
        }
        self.targets.send_modify(|now| *now = Arc::new(Targets { given_up: now.given_up, ..targets }));
        Ok(())
    }

    fn give_up(&self, given_up: bool) {
        self.targets.send_if_modified(|now| {
            let differs = now.given_up != given_up;
            *now = Arc::new(Targets { given_up, ..Targets::clone(now) });
            differs
        });
    }

    fn urls(&self) -> Vec<UrlState> {
        let targets = self.targets.borrow().clone();
        let state = |target: &Arc<Target>| UrlState {
            url: target.place.shown.clone(),
            trouble: target.gate.trouble().map(|failure| failure.why().to_owned()),
            is_peer: false,
        };
        targets.all.iter().map(state).collect()
    }
}
