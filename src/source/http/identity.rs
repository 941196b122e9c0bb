//! Which object it is: what a server says of it, and how much of that has to be the same (H2).

use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

/// An object as its server described it when the base was added. Pinned: whatever describes itself in another way
/// later is another object.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct HttpIdentity {
    /// Bytes.
    pub size: u64,
    /// The entity tag with its quotes and, when it is weak, its `W/`.
    pub etag: Option<String>,
    /// The date as it was sent.
    pub last_modified: Option<String>,
}

/// How much of an identity has to be the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Strictness {
    /// Size, and a validator that changes with every byte: the strong entity tag; or, of a server that sends no tag
    /// at all, the time of modification, if that was over when it was asked (RFC 9110, 8.8.2.2).
    #[default]
    Strong,
    /// Size, and one of: the entity tag, weak or not, or the time of modification. For mirrors and nodes whose tags
    /// differ, and servers that make them weak.
    Weak,
    /// Size alone. Only a digest of the image can tell the rest.
    SizeOnly,
}

/// What an answer says of the object.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Said<'a> {
    pub size: u64,
    pub etag: Option<&'a str>,
    pub last_modified: Option<&'a str>,
}

/// Whether an answer is about the pinned object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Same,
    /// It is about another one; how that shows.
    Another(String),
    /// It does not say; what is missing.
    Unproven(String),
}

fn is_weak(etag: &str) -> bool {
    etag.starts_with("W/")
}

fn opaque(etag: &str) -> &str {
    etag.strip_prefix("W/").unwrap_or(etag)
}

impl HttpIdentity {
    /// The tag for `If-Match`, which compares strongly.
    pub(super) fn strong_etag(&self) -> Option<&str> {
        self.etag.as_deref().filter(|etag| !is_weak(etag))
    }

    /// Whether the object can be told from others well enough; else why not. `date` is when the answer was made.
    pub(super) fn suffices(&self, strictness: Strictness, date: Option<&str>) -> Result<(), String> {
        match strictness {
            Strictness::SizeOnly => Ok(()),
            Strictness::Weak if self.etag.is_some() || self.last_modified.is_some() => Ok(()),
            Strictness::Weak => Err("its server sends neither ETag nor Last-Modified".into()),
            Strictness::Strong => match (&self.etag, &self.last_modified) {
                (Some(etag), _) if !is_weak(etag) => Ok(()),
                (Some(_), _) => Err("its server sends a weak ETag".into()),
                (None, Some(modified)) if was_over(modified, date) => Ok(()),
                (None, Some(_)) => {
                    Err("its server sends no ETag, and a Last-Modified that is not over yet".into())
                }
                (None, None) => Err("its server sends neither ETag nor Last-Modified".into()),
            },
        }
    }

    /// Whether what a server says of an object fits this one; else how it differs.
    ///
    /// # Errors
    /// In words.
    pub fn fits(&self, strictness: Strictness, found: &Self) -> Result<(), String> {
        let (etag, last_modified) = (found.etag.as_deref(), found.last_modified.as_deref());
        match self.compare(strictness, &Said { size: found.size, etag, last_modified }) {
            Verdict::Same => Ok(()),
            Verdict::Another(why) | Verdict::Unproven(why) => Err(why),
        }
    }

    pub(super) fn compare(&self, strictness: Strictness, said: &Said<'_>) -> Verdict {
        if said.size != self.size {
            return Verdict::Another(format!("it has {} bytes, not {}", said.size, self.size));
        }
        let etags = self.etag.as_deref().zip(said.etag);
        let dates = self.last_modified.as_deref().zip(said.last_modified);
        let changed = |what: &str, (pinned, said): (&str, &str)| {
            Verdict::Another(format!("its {what} is {}, not {pinned}", printable(said)))
        };
        match strictness {
            Strictness::SizeOnly => Verdict::Same,
            Strictness::Strong if self.strong_etag().is_some() => match etags {
                Some((pinned, said)) if pinned == said => Verdict::Same,
                Some((pinned, said)) if pinned == opaque(said) => {
                    Verdict::Unproven("it came with a weak ETag".into())
                }
                Some(pair) => changed("ETag", pair),
                None => Verdict::Unproven("it came without the ETag".into()),
            },
            Strictness::Strong => match dates {
                Some((pinned, said)) if pinned == said => Verdict::Same,
                Some(pair) => changed("Last-Modified", pair),
                None => Verdict::Unproven("it came without Last-Modified".into()),
            },
            Strictness::Weak => match (etags, dates) {
                (Some((pinned, said)), _) if opaque(pinned) == opaque(said) => Verdict::Same,
                (_, Some((pinned, said))) if pinned == said => Verdict::Same,
                (Some(pair), _) => changed("ETag", pair),
                (None, Some(pair)) => changed("Last-Modified", pair),
                (None, None) => Verdict::Unproven("it came without ETag and Last-Modified".into()),
            },
        }
    }
}

/// Whether something modified then could not be modified again within the same second and keep its date.
fn was_over(modified: &str, date: Option<&str>) -> bool {
    let parse = |text: &str| httpdate::parse_http_date(text).ok();
    let Some((modified, date)) = parse(modified).zip(date.and_then(parse)) else { return false };
    date.duration_since(modified).is_ok_and(|age| age >= Duration::from_secs(1))
}

/// How long a server wants to be left alone: seconds or a date.
pub(super) fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    httpdate::parse_http_date(text).ok().map(|date| date.duration_since(now).unwrap_or_default())
}

/// A server's words in a message: short, and on one line.
pub(super) fn printable(text: &str) -> String {
    text.chars().take(80).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}
