//! What an answer of a server says about time: whether an object can be told from its next version, and when to ask
//! again.

use std::time::{Duration, SystemTime};

use super::{HttpIdentity, Strictness};
use crate::source::http_identity::is_weak;

/// Whether the object can be told from others well enough; else why not. `date` is when the answer was made.
///
/// # Errors
/// In words.
pub(super) fn suffices(
    identity: &HttpIdentity,
    strictness: Strictness,
    date: Option<&str>,
) -> Result<(), String> {
    match strictness {
        Strictness::SizeOnly => Ok(()),
        Strictness::Weak if identity.etag.is_some() || identity.last_modified.is_some() => Ok(()),
        Strictness::Weak => Err("its server sends neither ETag nor Last-Modified".into()),
        Strictness::Strong => match (&identity.etag, &identity.last_modified) {
            (Some(etag), _) if !is_weak(etag) => Ok(()),
            (Some(_), _) => Err("its server sends a weak ETag".into()),
            (None, Some(modified)) if is_settled(modified, date) => Ok(()),
            (None, Some(_)) => {
                Err("its server sends no ETag, and a Last-Modified less than a second older than Date".into())
            }
            (None, None) => Err("its server sends neither ETag nor Last-Modified".into()),
        },
    }
}

/// Whether a Last-Modified is old enough: an object that is modified again within the same second keeps its date.
fn is_settled(modified: &str, date: Option<&str>) -> bool {
    let parse = |text: &str| httpdate::parse_http_date(text).ok();
    let Some((modified, date)) = parse(modified).zip(date.and_then(parse)) else { return false };
    date.duration_since(modified).is_ok_and(|age| age >= Duration::from_secs(1))
}

/// How long a server asks not to be sent requests: seconds or a date.
pub(super) fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    httpdate::parse_http_date(text).ok().map(|date| date.duration_since(now).unwrap_or_default())
}
