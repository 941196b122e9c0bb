//! Whether an answer can be trusted to be the bytes that were asked for. Pure: status and header lines in, verdict out.
//!
//! What must hold: a body is used only when status, range, length, coding and identity all say that it is what was
//! asked for (H1). docs/design.md, "HTTP sources", has the table of what becomes of the others.

use std::net::IpAddr;
use std::ops::Range;
use std::time::{Duration, SystemTime};

use reqwest::StatusCode;
use reqwest::header::{self, HeaderMap, HeaderName};

use super::identity::{HttpIdentity, Said, Strictness, Verdict, printable, retry_after};

/// A whole file that is sent instead of a range is read up to its bytes when no more than this comes before them.
pub(super) const MAX_SKIP: u64 = 1 << 20;
/// A server that wants to be left alone for longer is asked again after this time, once: a guest may be waiting, and
/// what said that may be a proxy that is gone by now.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(10);

/// Where in the body the bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Body {
    /// Bytes before them, which are dropped.
    pub skip: u64,
    /// How many they are.
    pub take: u64,
    /// Whether the body may go on after them.
    pub more: bool,
    /// Whether its length was announced.
    pub announced: bool,
    /// Of which object they are.
    pub identity: HttpIdentity,
}

/// Why there are no bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It may work later; not before this time has passed, if the server said so.
    Again { why: String, after: Option<Duration>, advice: Option<&'static str> },
    /// The server does not give it to us.
    Denied { status: u16, why: String },
    /// It is another object.
    Another(String),
    /// The answer is none to what was asked.
    Protocol(String),
    /// The range is said to be outside of the object, which it is not.
    OutOfRange(String),
    /// The condition on the entity tag is said not to hold.
    Precondition,
    /// It was not asked: while the request waited for its turn, another one failed.
    Overtaken,
    /// It is somewhere else, says the server at this address; none when a proxy was asked.
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

    /// What to say of it.
    pub fn why(&self) -> &str {
        match self {
            Self::Again { why, .. } | Self::Denied { why, .. } => why,
            Self::Another(why) | Self::Protocol(why) | Self::OutOfRange(why) => why,
            Self::Precondition => "it is not the version any more that was added (412)",
            Self::Overtaken => "another request failed",
            Self::Moved { .. } => "it is somewhere else",
        }
    }

    /// How long the server wants to be left alone.
    pub fn after(&self) -> Option<Duration> {
        match self {
            Self::Again { after, .. } => *after,
            _ => None,
        }
    }

    /// Whether it is about another object than the base's.
    pub fn is_another(&self) -> bool {
        matches!(self, Self::Another(_) | Self::Precondition)
    }

    /// Whether a cache on the way, or one node of many, may be the only one that answers so.
    pub fn may_be_a_cache(&self) -> bool {
        matches!(self, Self::Another(_) | Self::Precondition | Self::OutOfRange(_))
    }
}

pub(super) fn text(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

fn number(headers: &HeaderMap, name: HeaderName) -> Option<u64> {
    text(headers, name)?.trim().parse().ok()
}

/// `bytes 0-99/1000`: first, last and total; a total that is not told is none.
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

/// The total of `bytes */1000`, with which a range is refused.
fn unsatisfied_total(text: &str) -> Option<u64> {
    text.trim().strip_prefix("bytes */")?.parse().ok()
}

/// What was asked for, and of which object; of none yet when it is the first request.
#[derive(Clone, Debug)]
pub(super) struct Asked<'a> {
    pub range: Range<u64>,
    pub pinned: Option<(&'a HttpIdentity, Strictness)>,
}

pub(super) fn judge(status: StatusCode, headers: &HeaderMap, asked: &Asked<'_>) -> Result<Body, Failure> {
    match status.as_u16() {
        206 => partial(headers, asked),
        200 => whole(headers, asked),
        204 => Err(Failure::Protocol("it answers 204, which is a body of nothing".into())),
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
    Err(Failure::Denied { status: status.as_u16(), why: format!("{why} ({})", status.as_u16()) })
}

/// How long a redirect says that it holds.
fn fresh_for(headers: &HeaderMap) -> Option<Duration> {
    let control = text(headers, header::CACHE_CONTROL)?;
    let seconds = control.split(',').find_map(|part| part.trim().strip_prefix("max-age="))?;
    // None at all would be a redirect for each request, which is what it is kept for.
    seconds.parse().ok().filter(|seconds| *seconds > 0).map(Duration::from_secs)
}

/// Compressed bytes are not the object's.
fn plain(headers: &HeaderMap) -> Result<(), Failure> {
    for coding in headers.get_all(header::CONTENT_ENCODING) {
        let coding = coding.to_str().unwrap_or("unreadable");
        if !coding.trim().eq_ignore_ascii_case("identity") {
            let coding = printable(coding);
            return Err(Failure::Protocol(format!(
                "it sends the body as {coding} although that was excluded (Content-Encoding)"
            )));
        }
    }
    Ok(())
}

fn identity(headers: &HeaderMap, size: u64) -> HttpIdentity {
    let owned = |name| text(headers, name).map(str::to_owned);
    HttpIdentity { size, etag: owned(header::ETAG), last_modified: owned(header::LAST_MODIFIED) }
}

fn verdict(found: &HttpIdentity, asked: &Asked<'_>) -> Verdict {
    let said =
        Said { size: found.size, etag: found.etag.as_deref(), last_modified: found.last_modified.as_deref() };
    asked.pinned.map_or(Verdict::Same, |(pinned, strictness)| pinned.compare(strictness, &said))
}

fn partial(headers: &HeaderMap, asked: &Asked<'_>) -> Result<Body, Failure> {
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
    let found = identity(headers, total);
    match verdict(&found, asked) {
        Verdict::Same => {}
        Verdict::Another(why) => return Err(Failure::Another(why)),
        Verdict::Unproven(why) => return protocol(format!("{why}, so it may be another version")),
    }
    let want = asked.range.start..asked.range.end.min(total);
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

/// The whole file, or something else altogether, in place of a range.
fn whole(headers: &HeaderMap, asked: &Asked<'_>) -> Result<Body, Failure> {
    plain(headers)?;
    let kind = text(headers, header::CONTENT_TYPE).map_or("no type".into(), printable);
    let Some(length) = number(headers, header::CONTENT_LENGTH) else {
        let why =
            format!("it answers a request for a range with status 200 and a body of any length ({kind})");
        return Err(Failure::Protocol(why));
    };
    let found = identity(headers, length);
    if verdict(&found, asked) != Verdict::Same {
        // An error page, a login, a holding page: not a new version of the image, which would have come as a range.
        return Err(Failure::again(format!(
            "it answers status 200 and something else ({kind}, {length} bytes)"
        )));
    }
    let ranges = "it answers a request for a range with the whole file (status 200)";
    match asked.pinned {
        // Small enough for the range to be the whole file.
        None if (1..=asked.range.end).contains(&length) && asked.range.start == 0 => {
            Ok(Body { skip: 0, take: length, more: false, announced: true, identity: found })
        }
        None => Err(Failure::Protocol(format!("{ranges}, {kind}"))),
        Some(_) if asked.range.start > MAX_SKIP => Err(Failure::Protocol(ranges.into())),
        Some(_) => Ok(Body {
            skip: asked.range.start,
            take: asked.range.end.min(length) - asked.range.start,
            more: true,
            announced: true,
            identity: found,
        }),
    }
}

fn out_of_range(headers: &HeaderMap, asked: &Asked<'_>) -> Failure {
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
