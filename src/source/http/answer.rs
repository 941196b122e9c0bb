//! Decides from status and header lines whether the body of an answer has the requested bytes. It does no I/O.
//!
//! What must hold: a body is used only when status, range, length, coding and identity all prove that it has the
//! requested bytes (H1). docs/design.md, "HTTP sources", has the table of all other answers.

use std::net::IpAddr;
use std::ops::Range;
use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::{self, HeaderMap, HeaderName};

use super::identity::retry_after;
use super::{HttpIdentity, Strictness, peer};
use crate::source::Verdict;
use crate::source::http_identity::printable;

/// The version of an object of a bucket.
const VERSION: HeaderName = HeaderName::from_static("x-amz-version-id");
/// When a server sends the whole file instead of a range, at most so many bytes before the range are skipped.
pub(super) const MAX_SKIP: u64 = 1 << 20;
/// Longest Retry-After that is respected: a guest may wait, and a proxy that sent it may be gone.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);

/// Longest time for which a redirect is believed, whatever its server says: clocks end.
const MAX_FRESH: Duration = Duration::from_secs(24 * 3600);

/// Where in a body the requested bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Body {
    /// Bytes before them, which are dropped.
    pub skip: u64,
    /// Number of requested bytes.
    pub take: u64,
    /// Whether the body may continue after them.
    pub more: bool,
    /// Whether the answer has the length of the body.
    pub announced: bool,
    /// The object that the answer is about.
    pub identity: HttpIdentity,
}

/// Why an answer, or its absence, gives no bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The request may succeed later; not before `after` has passed, if the server sent Retry-After.
    Again { why: String, after: Option<Duration>, advice: Option<&'static str> },
    /// The server refuses to send the object.
    Denied { status: u16, why: String, advice: Option<&'static str> },
    /// The answer is about another object.
    Another(String),
    /// The answer does not fit the request.
    Protocol(String),
    /// The bytes of the answer are not those that their proof names.
    Disproven(String),
    /// The server says that the range is outside of the object, which it is not.
    OutOfRange(String),
    /// A peer does not have the bytes before `until`. It is not asked for others before `rest` has passed.
    Missing { until: u64, rest: Option<Duration> },
    /// The server says that the condition on the entity tag does not hold.
    Precondition,
    /// The request was not sent: another request failed while it waited.
    Overtaken,
    /// The server at address `by` redirects; `by` is none when a proxy answered.
    Moved { to: String, for_at_most: Option<Duration>, by: Option<IpAddr> },
}

impl Failure {
    pub fn again(why: impl Into<String>) -> Self {
        Self::Again { why: why.into(), after: None, advice: None }
    }

    /// As [`Failure::again`], with the remedy.
    pub fn advised(why: impl Into<String>, advice: &'static str) -> Self {
        Self::Again { why: why.into(), after: None, advice: Some(advice) }
    }

    /// The cause, for messages.
    pub fn why(&self) -> &str {
        match self {
            Self::Again { why, .. } | Self::Denied { why, .. } => why,
            Self::Another(why) | Self::Protocol(why) | Self::Disproven(why) | Self::OutOfRange(why) => why,
            Self::Precondition => "it is not the version that was added (412)",
            Self::Missing { .. } => "it does not have the bytes",
            Self::Overtaken => "another request failed",
            Self::Moved { .. } => "it is somewhere else",
        }
    }

    /// How long the server asks not to be sent requests.
    pub fn after(&self) -> Option<Duration> {
        match self {
            Self::Again { after, .. } => *after,
            _ => None,
        }
    }

    /// Whether the answer is about another object than the base's.
    pub fn is_another(&self) -> bool {
        matches!(self, Self::Another(_) | Self::Precondition)
    }

    /// Whether the cause may be a cache on the way, or one node of many, so that a fresh request may succeed.
    pub fn may_be_a_cache(&self) -> bool {
        matches!(self, Self::Another(_) | Self::Precondition | Self::OutOfRange(_) | Self::Disproven(_))
    }
}

pub(super) fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn number(headers: &HeaderMap, name: HeaderName) -> Option<u64> {
    text(headers, name)?.trim().parse().ok()
}

/// Parses `bytes 0-99/1000` into first, last and total; the total `*` is none.
fn content_range(text: &str) -> Option<(u64, u64, Option<u64>)> {
    let digits = |text: &str| -> Option<u64> {
        text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
    };
    let (range, total) = text.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let total = if total == "*" { None } else { Some(digits(total)?) };
    let (first, last) = (digits(first)?, digits(last)?);
    (first <= last && total.is_none_or(|total| last < total)).then_some((first, last, total))
}

/// The total of `bytes */1000`, the Content-Range of a refused range.
fn unsatisfied_total(text: &str) -> Option<u64> {
    text.trim().strip_prefix("bytes */")?.parse().ok()
}

/// What an answer says about the object that it is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Evidence {
    /// ETag and Last-Modified.
    #[default]
    Validators,
    /// Content-MD5. A Glance sends that of the whole image with each range, in hexadecimal digits.
    ContentMd5,
}

/// How a server sends a range.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Sending {
    /// Alone.
    #[default]
    Range,
    /// With all that is before and behind it: the request asks for no range.
    Whole,
}

/// The requested range, and the pinned object; no object for the first request.
#[derive(Clone, Debug, Default)]
pub(super) struct RangeRequest<'a> {
    pub evidence: Evidence,
    pub sending: Sending,
    pub range: Range<u64>,
    pub pinned: Option<(&'a HttpIdentity, Strictness)>,
    /// Whether the server is a peer, which may not have all of it.
    pub of_peer: bool,
}

pub(super) fn judge(
    status: StatusCode,
    headers: &HeaderMap,
    asked: &RangeRequest<'_>,
) -> Result<Body, Failure> {
    let Range { start, end } = asked.range;
    if let Some(failure) = asked.of_peer.then(|| peer::judge(status, headers, start, end)).flatten() {
        return Err(failure);
    }
    match status.as_u16() {
        // The parts of a whole image would be held in memory where their length is not announced.
        206 if asked.sending == Sending::Whole => {
            Err(Failure::Protocol("it answers 206 (a part) to a request without a range".into()))
        }
        206 => partial(headers, asked),
        200 => whole(headers, asked),
        204 => Err(Failure::Protocol("it answers 204 (no content)".into())),
        301 | 302 | 303 | 307 | 308 => match text(headers, header::LOCATION) {
            Some(to) => Err(Failure::Moved { to: to.into(), for_at_most: fresh_for(headers), by: None }),
            None => Err(Failure::Protocol(format!("it answers {} without saying where to", status.as_u16()))),
        },
        304 => Err(Failure::Protocol("it answers 304 (not modified), which was not asked".into())),
        401 => denied(status, "it asks for credentials"),
        403 => denied(status, "it forbids it"),
        404 => denied(status, "it has nothing there"),
        407 => denied(status, "the proxy asks for credentials"),
        410 => denied(status, "it has nothing there any more"),
        412 => Err(Failure::Precondition),
        416 => Err(out_of_range(headers, asked)),
        408 | 425 | 429 | 500..=599 => Err(Failure::Again {
            why: format!("it answers {status}"),
            after: text(headers, header::RETRY_AFTER)
                .and_then(|value| retry_after(value, SystemTime::now()))
                .map(|after| after.min(MAX_RETRY_AFTER)),
            advice: None,
        }),
        _ => Err(Failure::Protocol(format!("it answers {status} to a request for a range"))),
    }
}

fn denied(status: StatusCode, why: &str) -> Result<Body, Failure> {
    Err(Failure::Denied {
        status: status.as_u16(),
        why: format!("{why} ({})", status.as_u16()),
        advice: None,
    })
}

/// How long a redirect is valid.
fn fresh_for(headers: &HeaderMap) -> Option<Duration> {
    let control = text(headers, header::CACHE_CONTROL)?;
    let seconds = control.split(',').find_map(|part| part.trim().strip_prefix("max-age="))?;
    // A redirect with max-age=0 is kept too: otherwise each request would be redirected.
    let seconds = seconds.parse().ok().filter(|seconds| *seconds > 0);
    seconds.map(|seconds| Duration::from_secs(seconds).min(MAX_FRESH))
}

/// Fails for a coded body: its bytes are not the object's.
fn plain(headers: &HeaderMap) -> Result<(), Failure> {
    for coding in headers.get_all(header::CONTENT_ENCODING) {
        let coding = coding.to_str().unwrap_or("unreadable");
        if !coding.trim().eq_ignore_ascii_case("identity") {
            let coding = printable(coding);
            return Err(Failure::Protocol(format!(
                "it sends the body as {coding} although the request excludes that (Content-Encoding)"
            )));
        }
    }
    Ok(())
}

fn identity(headers: &HeaderMap, size: u64, evidence: Evidence) -> HttpIdentity {
    let owned = |name| text(headers, name).map(str::to_owned);
    let (etag, last_modified, version) = match evidence {
        Evidence::Validators => (
            owned(header::ETAG),
            owned(header::LAST_MODIFIED),
            // Of a bucket without versions it is "null".
            owned(VERSION).filter(|version| version != "null"),
        ),
        Evidence::ContentMd5 => {
            let md5 = text(headers, HeaderName::from_static("content-md5"))
                .map(|md5| format!("\"{}\"", md5.trim().to_ascii_lowercase()));
            (md5, None, None)
        }
    };
    HttpIdentity { size, etag, last_modified, version }
}

fn verdict(found: &HttpIdentity, asked: &RangeRequest<'_>) -> Verdict {
    let Some((pinned, strictness)) = asked.pinned else { return Verdict::Same };
    let verdict = pinned.compare(strictness, found);
    match (verdict, asked.evidence) {
        (Verdict::Another(why), Evidence::ContentMd5) => Verdict::Another(why.replace("ETag", "Content-MD5")),
        (Verdict::Unproven(why), Evidence::ContentMd5) => {
            Verdict::Unproven(why.replace("ETag", "Content-MD5"))
        }
        (verdict, _) => verdict,
    }
}

fn partial(headers: &HeaderMap, asked: &RangeRequest<'_>) -> Result<Body, Failure> {
    let protocol = |why: String| Err(Failure::Protocol(why));
    plain(headers)?;
    if let Some(kind) = text(headers, header::CONTENT_TYPE)
        && kind.trim_start().to_ascii_lowercase().starts_with("multipart/byteranges")
    {
        return protocol("it sends several parts (multipart/byteranges) for one range".into());
    }
    let Some(line) = text(headers, header::CONTENT_RANGE) else {
        return protocol("it answers 206 without Content-Range".into());
    };
    let Some((first, last, total)) = content_range(line) else {
        return protocol(format!("its Content-Range is none: {}", printable(line)));
    };
    let Some(total) = total else {
        return protocol("its Content-Range does not say how large the whole is".into());
    };
    let found = identity(headers, total, asked.evidence);
    match verdict(&found, asked) {
        Verdict::Same => {}
        Verdict::Another(why) => return Err(Failure::Another(why)),
        Verdict::Unproven(why) => return protocol(format!("{why}, so it may be another version")),
    }
    let mut want = asked.range.start..asked.range.end.min(total);
    if asked.of_peer && last < want.end {
        // It sends what it has.
        want.end = last + 1;
    }
    if (first, last + 1) != (want.start, want.end) {
        let (from, to) = (want.start, want.end - 1);
        return protocol(format!("it sends bytes {first} to {last}, asked for were {from} to {to}"));
    }
    let take = want.end - want.start;
    let length = number(headers, header::CONTENT_LENGTH);
    if let Some(length) = length
        && length != take
    {
        return protocol(format!("it sends {length} bytes for a range of {take}"));
    }
    Ok(Body { skip: 0, take, more: false, announced: length.is_some(), identity: found })
}

/// A whole file, or an unrelated page, in place of a range.
fn whole(headers: &HeaderMap, asked: &RangeRequest<'_>) -> Result<Body, Failure> {
    plain(headers)?;
    let kind = text(headers, header::CONTENT_TYPE).map_or("no type".into(), printable);
    let Some(length) = number(headers, header::CONTENT_LENGTH) else {
        let why =
            format!("it answers a request for a range with status 200 and a body of any length ({kind})");
        return Err(Failure::Protocol(why));
    };
    let found = identity(headers, length, asked.evidence);
    match (verdict(&found, asked), asked.sending) {
        (Verdict::Another(why), Sending::Whole) => return Err(Failure::Another(why)),
        (Verdict::Unproven(why), Sending::Whole) => return Err(Failure::Protocol(why)),
        _ => {}
    }
    if verdict(&found, asked) != Verdict::Same {
        // An error page, a login or a holding page. A new version of the image would have come as a range.
        return Err(Failure::again(format!(
            "it answers status 200 and something else ({kind}, {length} bytes)"
        )));
    }
    let ranges = "it answers a request for a range with the whole file (status 200)";
    match asked.pinned {
        None if asked.sending == Sending::Whole && length > 0 && asked.range.start == 0 => {
            let take = asked.range.end.min(length);
            Ok(Body { skip: 0, take, more: true, announced: true, identity: found })
        }
        // The range is the whole of a small file.
        None if (1..=asked.range.end).contains(&length) && asked.range.start == 0 => {
            Ok(Body { skip: 0, take: length, more: false, announced: true, identity: found })
        }
        None => Err(Failure::Protocol(format!("{ranges}, {kind}"))),
        Some(_) if asked.range.start > MAX_SKIP && asked.sending == Sending::Range => {
            Err(Failure::Protocol(ranges.into()))
        }
        Some(_) => Ok(Body {
            skip: asked.range.start,
            take: asked.range.end.min(length) - asked.range.start,
            more: true,
            announced: true,
            identity: found,
        }),
    }
}

fn out_of_range(headers: &HeaderMap, asked: &RangeRequest<'_>) -> Failure {
    let total = text(headers, header::CONTENT_RANGE).and_then(unsatisfied_total);
    match (total, asked.pinned) {
        (Some(0), None) => Failure::Protocol("it is empty there".into()),
        (Some(total), Some((pinned, _))) if total != pinned.size => {
            Failure::Another(format!("it has {total} bytes, not {}", pinned.size))
        }
        _ => {
            let Range { start, end } = asked.range;
            Failure::OutOfRange(format!("it says that bytes {start} to {} are outside (416)", end - 1))
        }
    }
}
