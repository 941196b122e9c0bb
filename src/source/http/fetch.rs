//! A range of one object, from whichever of its mirrors gives it: the fetch that goes on until the bytes are there.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::timeout;

use super::answer::{Asked, Failure};
use super::identity::HttpIdentity;
use super::limit::{Rate, Slots};
use super::mirror::{Ask, Mirror, Transfer};
use super::wait::{Stalls, Wait};
use super::{Http, RemoteOptions, failed, words};
use crate::source::{Deliver, Fetch, Purpose, RemoteSource, SourceError, Stall};

/// For a purpose for which nobody waits it is tried so often, and not for longer.
const TRIES: u32 = 4;
const TRIED_FOR: Duration = Duration::from_secs(30);

/// One object behind one or several URLs.
pub(super) struct Remote {
    http: Arc<Http>,
    identity: HttpIdentity,
    options: RemoteOptions,
    mirrors: Vec<Arc<Mirror>>,
    slots: Arc<Slots>,
    rate: Rate,
    stalls: Arc<Stalls>,
    /// What is wrong with a URL that was right when it was recorded.
    broken: Option<SourceError>,
}

impl Remote {
    pub fn new(http: Arc<Http>, urls: &[String], identity: HttpIdentity, options: RemoteOptions) -> Self {
        let (mut mirrors, mut broken) = (Vec::new(), None);
        for url in urls {
            match Mirror::new(url) {
                Ok(mirror) => mirrors.push(Arc::new(mirror)),
                Err(error) => broken = Some(error),
            }
        }
        let shown = mirrors.first().map_or_else(String::new, |mirror| mirror.shown.clone());
        Self {
            slots: Slots::new(options.max_requests.unwrap_or(u32::MAX).min(http.config.max_requests)),
            rate: Rate::new(options.max_rate),
            stalls: Stalls::new(shown),
            broken,
            http,
            identity,
            options,
            mirrors,
        }
    }

    /// The mirror to ask: the first that works; when none does, the one that may be asked soonest.
    fn pick(self: &Arc<Self>, refused: &[Option<Failure>]) -> Option<usize> {
        let usable =
            |number: &usize| refused[*number].is_none() && self.mirrors[*number].out.lock().is_none();
        let all: Vec<usize> = (0..self.mirrors.len()).filter(usable).collect();
        let down = |number: &usize| self.http.origin(&self.mirrors[*number].origin()).down_until();
        let works = all.iter().copied().find(|number| down(number).is_none());
        if works.is_some() {
            // Those that were to be asked before it: whether they are back is found out aside, not by a reader.
            let before = all.iter().take_while(|number| Some(**number) != works);
            for number in
                before.filter(|number| down(number).is_some_and(|at| at <= tokio::time::Instant::now()))
            {
                self.check(*number);
            }
        }
        works.or_else(|| all.into_iter().min_by_key(down))
    }

    /// Finds out whether a mirror works again.
    fn check(self: &Arc<Self>, number: usize) {
        let mirror = self.mirrors[number].clone();
        if mirror.checking.swap(true, Ordering::AcqRel) {
            return;
        }
        let this = self.clone();
        self.http.runtime.spawn(async move {
            let wait = Wait::new(None, None);
            let (mut at, mut deliver): (_, Deliver) = (0, Box::new(|_| {}));
            let job = Job { purpose: Purpose::Hydrate, fresh: false, wait: &wait };
            let once = this.transfer(&mirror, &mut at, 1, &job, &mut deliver);
            let done = timeout(this.http.answer_timeout(), once).await;
            if let Ok(Err(Failure::Another(why))) = done {
                this.put_out(number, &why);
            }
            mirror.checking.store(false, Ordering::Release);
        });
    }

    fn put_out(&self, number: usize, why: &str) {
        let mirror = &self.mirrors[number];
        let mut out = mirror.out.lock();
        if out.is_none() {
            tracing::error!(
                url = mirror.shown,
                why,
                "another object than the base's; this URL is not used any more"
            );
            *out = Some(why.to_owned());
        }
    }

    /// What to say when there is no mirror left to ask.
    fn conclude(&self, refused: Vec<Option<Failure>>) -> SourceError {
        let worst = |is: fn(&Failure) -> bool| {
            let mut all = self.mirrors.iter().zip(&refused);
            all.find_map(|(mirror, failure)| failure.as_ref().filter(|f| is(f)).map(|f| (mirror, f)))
        };
        let found = worst(|failure| matches!(failure, Failure::Denied { .. })).or_else(|| worst(|_| true));
        if let Some((mirror, failure)) = found {
            return failed(&mirror.shown, failure);
        }
        if let Some(error) = &self.broken
            && self.mirrors.is_empty()
        {
            return error.clone();
        }
        let why = self.mirrors.first().and_then(|mirror| mirror.out.lock().clone());
        failed(&self.shown(), &Failure::Another(why.unwrap_or_else(|| "it has no URL".into())))
    }

    async fn run(
        self: &Arc<Self>,
        range: Range<u64>,
        purpose: Purpose,
        deliver: &mut Deliver,
        wait: &Wait,
    ) -> Result<(), SourceError> {
        let (mut at, mut tries) = (range.start, 0);
        let mut refused: Vec<Option<Failure>> = vec![None; self.mirrors.len()];
        // Asked in another way once.
        let (mut fresh, mut elsewhere) = (vec![false; refused.len()], vec![false; refused.len()]);
        while at < range.end {
            let Some(number) = self.pick(&refused) else { return Err(self.conclude(refused)) };
            let (mirror, before) = (&self.mirrors[number], at);
            let job = Job { purpose, fresh: fresh[number], wait };
            let failure = match self.transfer(mirror, &mut at, range.end, &job, deliver).await {
                Ok(()) => continue,
                Err(failure) => failure,
            };
            self.http.count.retry();
            match failure {
                Failure::Again { ref why, .. } => {
                    tries = if at > before { 0 } else { tries + 1 };
                    tracing::debug!(url = mirror.shown, why, at, tries, ?purpose, "a request failed");
                    if purpose != Purpose::Demand && tries >= TRIES {
                        return Err(failed(&mirror.shown, &failure));
                    }
                    wait.failed(why);
                }
                // Through a redirector it may have been one that is behind; once.
                Failure::Another(_) if mirror.is_redirected() && !elsewhere[number] => {
                    elsewhere[number] = true;
                    mirror.forget_target();
                }
                Failure::Another(why) => self.put_out(number, &why),
                Failure::Precondition if !mirror.without_condition.swap(true, Ordering::Relaxed) => {
                    // What it describes in an answer to the plain request decides.
                }
                Failure::OutOfRange(_) if !fresh[number] => fresh[number] = true,
                Failure::Precondition
                | Failure::OutOfRange(_)
                | Failure::Denied { .. }
                | Failure::Protocol(_)
                | Failure::Moved { .. } => {
                    tracing::debug!(url = mirror.shown, ?failure, "a mirror does not give a range");
                    refused[number] = Some(failure);
                }
            }
        }
        Ok(())
    }

    /// One request and its bytes, from `at` on, which is moved.
    async fn transfer(
        &self,
        mirror: &Mirror,
        at: &mut u64,
        end: u64,
        job: &Job<'_>,
        deliver: &mut Deliver,
    ) -> Result<(), Failure> {
        self.http.usable().await?;
        let ask = Ask {
            asked: Asked { range: *at..end, pinned: Some((&self.identity, self.options.strictness)) },
            purpose: job.purpose,
            fresh: job.fresh,
            slots: &self.slots,
            wait: job.wait,
            anyway: false,
        };
        let transfer = mirror.ask(&self.http, &ask).await?;
        let url = transfer.url.clone();
        let before = *at;
        let mut give = |bytes: &[u8]| {
            deliver(bytes);
            *at += bytes.len() as u64;
        };
        let result = read(&self.http, Some(&self.rate), transfer, job.wait, &mut give).await;
        if result.is_err() && *at == before && mirror.is_redirected() {
            mirror.forget(&url);
        }
        result
    }
}

/// What a transfer is for.
struct Job<'a> {
    purpose: Purpose,
    fresh: bool,
    wait: &'a Wait,
}

/// Reads the body of an answer and passes on what was asked for.
pub(super) async fn read(
    http: &Http,
    rate: Option<&Rate>,
    transfer: Transfer,
    wait: &Wait,
    give: &mut (dyn FnMut(&[u8]) + Send),
) -> Result<(), Failure> {
    let Transfer { mut response, body, mut pass, slots: _held, .. } = transfer;
    let (mut skip, mut left) = (body.skip, body.take);
    // Of a body whose length was not announced nothing is believed before its end was seen.
    let mut held = Vec::new();
    loop {
        let chunk = match timeout(http.config.stall_timeout, response.chunk()).await {
            Ok(Ok(chunk)) => chunk,
            Ok(Err(error)) => {
                let why = format!("the transfer broke off, {left} bytes before the end: {}", words(&error));
                pass.failed(&why, None);
                return Err(Failure::again(why));
            }
            Err(_) => {
                let why = format!("it has sent nothing for {:?}", http.config.stall_timeout);
                pass.failed(&why, None);
                return Err(Failure::again(why));
            }
        };
        let Some(chunk) = chunk else {
            if left == 0 {
                break;
            }
            let why = format!("the transfer ended {left} bytes before its end");
            pass.failed(&why, None);
            return Err(Failure::again(why));
        };
        pass.worked();
        http.count.bytes(chunk.len());
        let skipped = usize::try_from(skip).unwrap_or(usize::MAX).min(chunk.len());
        skip -= skipped as u64;
        let rest = &chunk[skipped..];
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(rest.len());
        if wanted < rest.len() && !body.more {
            return Err(Failure::Protocol("it sends more bytes than the range has".into()));
        }
        if wanted > 0 {
            wait.progressed();
            left -= wanted as u64;
            if body.announced { give(&rest[..wanted]) } else { held.extend_from_slice(&rest[..wanted]) }
        }
        http.rate.took(chunk.len()).await;
        if let Some(rate) = rate {
            rate.took(chunk.len()).await;
        }
        if left == 0 && body.more {
            // The rest of the whole file is given up, and the connection with it.
            tracing::debug!(skipped = body.skip, "the server sent the whole file for a range");
            break;
        }
        if left == 0 && body.announced {
            // The end is here; asked once more only for the connection to be free.
            let _ = timeout(Duration::from_millis(100), response.chunk()).await;
            break;
        }
    }
    if !held.is_empty() {
        give(&held);
    }
    Ok(())
}

impl RemoteSource for Remote {
    fn size(&self) -> u64 {
        self.identity.size
    }

    fn shown(&self) -> String {
        self.mirrors.first().map_or_else(String::new, |mirror| mirror.shown.clone())
    }

    fn fetch(self: Arc<Self>, range: Range<u64>, purpose: Purpose, mut deliver: Deliver) -> Fetch {
        Box::pin(async move {
            let demand = purpose == Purpose::Demand;
            let limit = match self.options.deadline {
                Some(deadline) if demand => Some(deadline),
                Some(deadline) => Some(deadline.min(TRIED_FOR)),
                None if demand => None,
                None => Some(TRIED_FOR),
            };
            let wait = Wait::new(demand.then(|| self.stalls.clone()), limit);
            tokio::select! {
                done = self.run(range, purpose, &mut deliver, &wait) => done,
                () = wait.over() => {
                    let limit = limit.unwrap_or_default();
                    let why = format!("its server has not given it for {limit:?}");
                    let why = match wait.why() {
                        Some(last) => format!("{why} ({last})"),
                        None => why,
                    };
                    Err(failed(&self.shown(), &Failure::again(why)))
                }
            }
        })
    }

    fn stall(&self) -> Option<Stall> {
        self.stalls.longest()
    }
}
