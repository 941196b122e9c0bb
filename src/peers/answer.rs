//! The answer to one request of another host.
//!
//! What must hold: a body has bytes that [`Lender`]s gave, of the range that its header line says, and its entity tag is
//! the name of the contents. All of it is in memory before the first line is sent, so nothing that happens to the cache
//! later breaks an answer off.

use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use http_body_util::Full;
use hyper::header::{self, HeaderName, HeaderValue};
use hyper::{HeaderMap, Method, Request, Response, StatusCode};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use super::Exporter;
use super::share::Place;
use crate::bases::lend::{Lender, Lending};
use crate::bases::proofs::ProofPages;
use crate::fetch::CACHE_BLOCK;
use crate::source::Completion;
use crate::source::http::peer::MISSING;

/// Most bytes of an answer.
const MOST: u64 = 512 << 10;
/// How long a request waits for blocks that are in transit.
const WAIT: Duration = Duration::from_secs(2);
/// The longest pause for the limit of bytes per second. A request that would have to wait longer is refused.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Most blocks that an answer says are missing.
const MOST_MISSING: u64 = (4 << 20) / CACHE_BLOCK;

/// The bytes of an answer, and its place among the answers, until the client took it.
struct Body(Vec<u8>, #[allow(dead_code)] Place);

impl AsRef<[u8]> for Body {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// What a URL names.
enum Lent {
    Contents(Arc<[Lender]>),
    Proof(Arc<ProofPages>),
}

impl Lent {
    /// What the path names, and its size.
    fn find(exporter: &Exporter, path: &str) -> Option<(Self, u64)> {
        let bases = exporter.store.bases();
        if let Some((pages, size)) = exporter.sources.lent_proof(&bases, path) {
            return Some((Self::Proof(pages), size));
        }
        let lenders = exporter.sources.lenders(&bases, path);
        // A digest that an operator gave may be claimed of a file of another size.
        let size = lenders.first()?.size();
        let lenders = lenders.into_iter().filter(|lender| lender.size() == size).collect();
        Some((Self::Contents(lenders), size))
    }
}

type Answer = Response<Full<Bytes>>;

fn plain(status: StatusCode, text: &'static str) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from_static(text.as_bytes())));
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    answer
}

fn set(answer: &mut Answer, name: HeaderName, value: &str) {
    // The values are numbers and digests.
    if let Ok(value) = HeaderValue::from_str(value) {
        answer.headers_mut().insert(name, value);
    }
}

/// What a request asks for.
#[derive(Debug, PartialEq, Eq)]
enum Wanted {
    /// These bytes.
    Bytes(Range<u64>),
    /// No range.
    Whole,
    /// A range outside of the contents.
    Outside,
    /// Several ranges, or none that can be understood.
    Unclear,
}

impl Wanted {
    fn of(headers: &HeaderMap, size: u64) -> Self {
        let Some(line) = headers.get(header::RANGE) else { return Self::Whole };
        let Some((first, last)) = line
            .to_str()
            .ok()
            .and_then(|line| line.trim().strip_prefix("bytes="))
            .and_then(|range| range.split_once('-'))
        else {
            return Self::Unclear;
        };
        let number = |text: &str| text.bytes().all(|b| b.is_ascii_digit()).then(|| text.parse::<u64>().ok());
        let range = match (first, last) {
            ("", "") => return Self::Unclear,
            ("", last) => number(last).flatten().map(|count| size.saturating_sub(count)..size),
            (first, "") => number(first).flatten().map(|first| first..size),
            (first, last) => {
                let both = number(first).flatten().zip(number(last).flatten());
                both.filter(|(first, last)| first <= last)
                    .map(|(first, last)| first..last.saturating_add(1).min(size))
            }
        };
        match range {
            None => Self::Unclear,
            Some(range) if range.start >= size || range.is_empty() => Self::Outside,
            Some(range) => Self::Bytes(range),
        }
    }
}

/// Answers a request, and counts it.
pub(super) async fn answer<B>(request: Request<B>, from: IpAddr, exporter: Arc<Exporter>) -> Answer {
    let (answer, lending) = respond(&request, from, &exporter).await;
    exporter.sources.lent().count(lending);
    answer
}

async fn respond<B>(request: &Request<B>, from: IpAddr, exporter: &Arc<Exporter>) -> (Answer, Lending) {
    let refuse = |status, text| (plain(status, text), Lending::Refused);
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let (mut answer, lending) = refuse(StatusCode::METHOD_NOT_ALLOWED, "only GET and HEAD\n");
        set(&mut answer, header::ALLOW, "GET, HEAD");
        return (answer, lending);
    }
    let path = request.uri().path();
    let Some((lent, size)) = Lent::find(exporter, path) else {
        return (plain(StatusCode::NOT_FOUND, "no base here has these contents\n"), Lending::Missed);
    };
    // The path is that of a name, so it has two parts.
    let tag = path.trim_start_matches('/').replacen('/', ":", 1);
    let tag = format!("\"{tag}\"");
    let named = |name| request.headers().get(name).and_then(|value| value.to_str().ok()).map(str::trim);
    let fits = |condition: &str| condition == "*" || condition.split(',').any(|one| one.trim() == tag);
    if named(header::IF_MATCH).is_some_and(|condition| !fits(condition))
        || named(header::IF_RANGE).is_some_and(|condition| condition != tag)
    {
        return refuse(StatusCode::PRECONDITION_FAILED, "the entity tag is that of the URL\n");
    }
    let range = match Wanted::of(request.headers(), size) {
        _ if *request.method() == Method::HEAD => {
            let mut answer = plain(StatusCode::OK, "");
            describe(&mut answer, &tag);
            set(&mut answer, header::CONTENT_LENGTH, &size.to_string());
            return (answer, Lending::Sent(0));
        }
        Wanted::Bytes(range) => range,
        Wanted::Whole => {
            return refuse(StatusCode::BAD_REQUEST, "ask for a range of bytes (Range: bytes=FIRST-LAST)\n");
        }
        Wanted::Unclear => {
            return refuse(StatusCode::RANGE_NOT_SATISFIABLE, "ask for one range of bytes\n");
        }
        Wanted::Outside => {
            let (mut answer, lending) =
                refuse(StatusCode::RANGE_NOT_SATISFIABLE, "the contents end before it\n");
            set(&mut answer, header::CONTENT_RANGE, &format!("bytes */{size}"));
            return (answer, lending);
        }
    };
    let found = match &lent {
        Lent::Contents(lenders) => lend(exporter, from, lenders, &range).await,
        Lent::Proof(pages) => match exporter.answers.take(from) {
            Some(place) => Some((pages.lend(range.start..range.end.min(range.start + MOST)).await, place)),
            None => None,
        },
    };
    match found {
        Some((bytes, place)) if !bytes.is_empty() => {
            if !exporter.pace(bytes.len()).await {
                return busy();
            }
            let (first, last) = (range.start, range.start + bytes.len() as u64 - 1);
            let sent = Lending::Sent(bytes.len() as u64);
            let mut answer = Response::new(Full::new(Bytes::from_owner(Body(bytes, place))));
            *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
            describe(&mut answer, &tag);
            set(&mut answer, header::CONTENT_RANGE, &format!("bytes {first}-{last}/{size}"));
            (answer, sent)
        }
        Some((_, place)) => (missing(exporter, lent, range, size, place).await, Lending::Missed),
        None => busy(),
    }
}

fn describe(answer: &mut Answer, tag: &str) {
    set(answer, header::ETAG, tag);
    set(answer, header::ACCEPT_RANGES, "bytes");
    set(answer, header::CONTENT_TYPE, "application/octet-stream");
    set(answer, header::CACHE_CONTROL, "public, max-age=31536000, immutable");
}

fn busy() -> (Answer, Lending) {
    let mut answer = plain(StatusCode::SERVICE_UNAVAILABLE, "this host has no time for others now\n");
    set(&mut answer, header::RETRY_AFTER, "1");
    (answer, Lending::Refused)
}

/// The bytes from the start of a range on that are here, with a place for them; waits for those that are in transit. None
/// when there is no place, or the work for it could not be done.
async fn lend(
    exporter: &Exporter,
    from: IpAddr,
    lenders: &Arc<[Lender]>,
    range: &Range<u64>,
) -> Option<(Vec<u8>, Place)> {
    let until = Instant::now() + WAIT;
    let mut coming = None::<Completion>;
    loop {
        // A request that waits for blocks holds no place. A read that the disk holds up does, although its client may
        // have gone.
        let place = exporter.answers.take(from)?;
        let (theirs, wanted) = (lenders.clone(), range.clone());
        let found = exporter.disk.spawn_blocking(move || (read(&theirs, &wanted), place)).await.ok()?;
        let waited = coming.is_some();
        if !found.0.is_empty() || (waited && Instant::now() >= until) {
            return Some(found);
        }
        let first = range.start / CACHE_BLOCK;
        let most = range.end.min(range.start + MOST) - first * CACHE_BLOCK;
        let Some(next) = lenders.iter().find_map(|lender| lender.coming(first, most)) else {
            return Some(found);
        };
        drop(found);
        let (come, comes) = oneshot::channel();
        next.then(move || _ = come.send(()));
        // What came is read while this holds it.
        coming = Some(next);
        if timeout_at(until, comes).await.is_err() {
            return Some((Vec::new(), exporter.answers.take(from)?));
        }
    }
}

/// The bytes from the start of a range on that are here.
fn read(lenders: &[Lender], range: &Range<u64>) -> Vec<u8> {
    let first = range.start / CACHE_BLOCK;
    let skipped = (range.start - first * CACHE_BLOCK) as usize;
    let end = range.end.min(range.start + MOST);
    for lender in lenders {
        let whole = end.next_multiple_of(CACHE_BLOCK).min(lender.size()) - first * CACHE_BLOCK;
        let mut bytes = vec![0; whole as usize];
        let here = lender.read(first, &mut bytes);
        bytes.truncate(here.min((end - first * CACHE_BLOCK) as usize));
        if bytes.len() > skipped {
            bytes.drain(..skipped);
            return bytes;
        }
    }
    Vec::new()
}

/// Says which bytes are missing, as a cache does that may not ask the server (504).
async fn missing(exporter: &Exporter, lent: Lent, range: Range<u64>, size: u64, place: Place) -> Answer {
    let mut answer = plain(StatusCode::GATEWAY_TIMEOUT, "these bytes are not here\n");
    let Lent::Contents(lenders) = lent else { return answer };
    let first = range.start / CACHE_BLOCK;
    let asked = (range.end.div_ceil(CACHE_BLOCK) - first).min(MOST_MISSING);
    let count = move || {
        let missing = lenders.iter().map(|lender| lender.missing(first, asked)).min();
        drop(place);
        missing
    };
    let blocks = exporter.disk.spawn_blocking(count).await.ok().flatten().unwrap_or(asked).max(1);
    let last = ((first + blocks) * CACHE_BLOCK).min(size) - 1;
    set(&mut answer, MISSING, &format!("{}-{last}", range.start));
    answer
}

impl Exporter {
    /// Waits until the limit of bytes per second allows an answer. Returns whether it does.
    async fn pace(&self, bytes: usize) -> bool {
        let Some(rate) = self.rate else { return true };
        let now = Instant::now();
        let at = {
            let mut free = self.free_at.lock();
            let at = (*free).max(now);
            if at - now > LONGEST_PAUSE {
                return false;
            }
            *free = at + Duration::from_secs_f64(bytes as f64 / rate as f64);
            at
        };
        tokio::time::sleep_until(at).await;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_range_of_bytes_is_understood() {
        let of = |line: &str| {
            let headers = HeaderMap::from_iter([(header::RANGE, HeaderValue::from_str(line).unwrap())]);
            Wanted::of(&headers, 100)
        };
        assert_eq!(of("bytes=0-0"), Wanted::Bytes(0..1));
        assert_eq!(of("bytes=10-99999"), Wanted::Bytes(10..100));
        assert_eq!(of("bytes=10-18446744073709551615"), Wanted::Bytes(10..100));
        assert_eq!(of("bytes=90-"), Wanted::Bytes(90..100));
        assert_eq!(of("bytes=-30"), Wanted::Bytes(70..100));
        assert_eq!(of("bytes=-300"), Wanted::Bytes(0..100));
        for line in ["bytes=100-", "bytes=100-200", "bytes=-0"] {
            assert_eq!(of(line), Wanted::Outside, "{line}");
        }
        for line in [
            "bytes=5-4",
            "bytes=0-1,5-6",
            "bytes=-",
            "bytes=+1-2",
            "bytes=a-b",
            "bytes=18446744073709551616-",
            "items=0-1",
            "",
        ] {
            assert_eq!(of(line), Wanted::Unclear, "{line}");
        }
        assert_eq!(Wanted::of(&HeaderMap::new(), 100), Wanted::Whole);
    }
}
