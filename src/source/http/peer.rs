//! Other hosts that run plyfs as mirrors: `plyfs://HOST:PORT`, the address of their `--export-http`.
//!
//! A peer has what its own disks have read. So it is asked first, and what it does not have is no failure. It names
//! contents by their digest, and its entity tag is that digest: the base needs a proof or a digest, and no validator.
//! What must hold (H14):
//! - A peer without the bytes (504, as for `only-if-cached`), without the base (404) or without time (503) costs one
//!   request: the read goes on at the next mirror at once, and neither the peer nor its URL is paused for other reads of
//!   what it may have.
//! - No answer of a peer makes a base `changed`, fails a read or holds it up for longer than 5 s.

use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{self, HeaderMap, HeaderName};
use tokio::time::Instant;

use super::answer::{Failure, text};
use super::{HttpIdentity, Located};
use crate::format::proof::{GROUP, Hash, SUFFIX, hex};
use crate::format::record::{Digest, ImageFile};
use crate::source::{SourceError, SourceErrorKind};

const SCHEME: &str = "plyfs://";
/// The header line of an answer without bytes: `FIRST-LAST`, the bytes from the requested ones on that are missing.
pub const MISSING: HeaderName = HeaderName::from_static("plyfs-missing");
/// How long a peer may take to answer, and to send nothing: other places have the bytes, too.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How long one read does not ask a peer again for bytes that it did not have.
const MISSED: Duration = Duration::from_secs(1);
/// How long a peer without the base is not asked, and the longest pause that one without time may ask for.
const WITHOUT: Duration = Duration::from_secs(10);
/// The least that is requested elsewhere because a peer does not have it: smaller requests take longer than their bytes.
const LEAST: u64 = 4 * GROUP;

/// The name of contents on every host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContentName {
    kind: &'static str,
    digest: String,
}

impl ContentName {
    /// Of the contents of a file: by the root of its proof, else by its digest. None when it has neither.
    pub fn of(file: &ImageFile) -> Option<Self> {
        let (kind, digest) = match (&file.proof, &file.identity.digest) {
            (Some(proof), _) => return Some(Self::of_root(&proof.root)),
            (None, Some(Digest::Sha256(digest))) => ("sha256", hex::encode(digest)),
            (None, Some(Digest::Sha512(digest))) => ("sha512", hex::encode(digest)),
            (None, None) => return None,
        };
        Some(Self { kind, digest })
    }

    /// Of contents with this BLAKE3 hash.
    pub fn of_root(root: &Hash) -> Self {
        Self { kind: "blake3", digest: hex(root) }
    }

    /// Of the proof with this root.
    pub fn of_proof(root: &Hash) -> Self {
        Self { kind: "blake3", digest: format!("{}{SUFFIX}", hex(root)) }
    }

    /// The path of a URL.
    pub fn path(&self) -> String {
        format!("/{}/{}", self.kind, self.digest)
    }

    /// The entity tag.
    pub fn tag(&self) -> String {
        format!("\"{}:{}\"", self.kind, self.digest)
    }
}

/// Whether a URL of a base is that of a peer.
pub fn is_peer(url: &str) -> bool {
    url.get(..SCHEME.len()).is_some_and(|scheme| scheme.eq_ignore_ascii_case(SCHEME))
}

/// Checks the URL of a peer: it is an address and nothing else.
///
/// # Errors
/// `Protocol`, with the mistake.
pub fn check_peer(url: &str) -> Result<(), SourceError> {
    let refuse = |why| {
        let advice = "write plyfs://HOST:PORT, the address of --export-http of that host";
        Err(SourceError::remote(SourceErrorKind::Protocol, "use", super::shown(url), why, advice))
    };
    let Ok(located) = web(url, "/") else { return refuse("it is not the URL of a peer") };
    let url = located.url;
    if located.authoriser.is_some() {
        return refuse("it has a user or a password, and a peer asks for none");
    }
    if url.port().is_none() {
        return refuse("it has no port, or that of web servers");
    }
    if url.path() != "/" || url.query().is_some() {
        return refuse("it has a path or a query, and a peer is asked by the digest of the base");
    }
    Ok(())
}

fn web(url: &str, path: &str) -> Result<Located, SourceError> {
    let rest = url.get(SCHEME.len()..).unwrap_or_default();
    Located::web(&format!("http://{}{path}", rest.trim_end_matches('/')))
}

/// Where a peer has contents, and how they look there.
pub(super) fn locate(
    url: &str,
    contents: &ContentName,
    size: u64,
) -> Result<(Located, HttpIdentity), SourceError> {
    let mut located = web(url, &contents.path())?;
    located.shown = super::shown(url);
    let etag = Some(contents.tag());
    Ok((located, HttpIdentity { size, etag, last_modified: None, version: None }))
}

/// Judges the answers that only a peer gives. None: it is an answer like those of other servers.
pub(super) fn judge(status: StatusCode, headers: &HeaderMap, at: u64, end: u64) -> Option<Failure> {
    match status.as_u16() {
        504 => {
            let missing = text(headers, MISSING).and_then(|range| range.split_once('-'));
            let until = missing.and_then(|(_, last)| last.trim().parse::<u64>().ok()?.checked_add(1));
            // Whole groups, and at least one, whatever it says.
            let until = until.unwrap_or(end).clamp(at.saturating_add(1), end);
            Some(Failure::Missing { until, rest: None })
        }
        404 | 410 => Some(Failure::Missing { until: end, rest: Some(WITHOUT) }),
        429 | 503 => {
            let after = text(headers, header::RETRY_AFTER).and_then(|text| text.trim().parse().ok());
            let rest = after.map_or(MISSED, Duration::from_secs).min(WITHOUT);
            Some(Failure::Missing { until: end, rest: Some(rest) })
        }
        301 | 302 | 303 | 307 | 308 => {
            Some(Failure::Protocol("it redirects, which a peer does not do".into()))
        }
        _ => None,
    }
}

/// A failure of a peer says nothing about the base.
pub(super) fn of_peer(failure: Failure) -> Failure {
    match failure {
        Failure::Another(_) | Failure::Precondition | Failure::OutOfRange(_) => {
            Failure::Protocol(format!("it has other contents under the digest: {}", failure.why()))
        }
        other => other,
    }
}

/// What one read knows of one peer: that bytes before `until` are missing there.
#[derive(Clone, Copy, Default)]
pub(super) struct Miss {
    until: u64,
    again: Option<Instant>,
}

impl Miss {
    pub fn new(until: u64) -> Self {
        Self { until, again: Some(Instant::now() + MISSED) }
    }

    /// When the peer may be asked for the byte at `at`; none: now.
    pub fn over(&self, at: u64) -> Option<Instant> {
        self.again.filter(|_| at < self.until)
    }

    /// Where a request to another server ends that begins at `at`, so that it does not fetch what this peer has.
    pub fn end(&self, at: u64, end: u64) -> u64 {
        match self.over(at) {
            Some(again) if again > Instant::now() => {
                let until = self.until.max(at.saturating_add(LEAST)).next_multiple_of(GROUP);
                until.min(end)
            }
            _ => end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use reqwest::header::HeaderValue;

    #[test]
    fn a_peer_is_an_address_and_nothing_else() {
        for url in ["plyfs://10.0.0.2:7070", "plyfs://host:7070/", "PLYFS://[::1]:7070"] {
            assert!(is_peer(url));
            check_peer(url).unwrap();
        }
        for (url, why) in [
            ("plyfs://host", "no port"),
            ("plyfs://host:80", "no port"),
            ("plyfs://host:7070/a", "path"),
            ("plyfs://host:7070?a", "path"),
            ("plyfs://u:secret@host:7070", "password"),
            ("plyfs://", "not the URL"),
            ("plyfs://ho st:7070", "not the URL"),
        ] {
            let error = check_peer(url).expect_err(url).to_string();
            assert!(error.contains(why) && error.contains("HOST:PORT"), "{error}");
            assert!(!error.contains("secret"), "{error}");
        }
        assert!(!is_peer("http://host:7070") && !is_peer("plyfs:/") && !is_peer("äääää"));
    }

    #[test]
    fn what_a_peer_says_of_missing_bytes_is_bounded() {
        let said = |status: u16, line: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(line) = line {
                headers.insert(MISSING, HeaderValue::from_str(line).unwrap());
            }
            judge(StatusCode::from_u16(status).unwrap(), &headers, 100, 1000)
        };
        let missing = |until, rest| Some(Failure::Missing { until, rest });
        assert_eq!(said(504, Some("100-499")), missing(500, None));
        for (line, until) in
            [("0-5", 101), ("100-18446744073709551615", 1000), ("100-99999", 1000), ("x-y", 1000), ("", 1000)]
        {
            assert_eq!(said(504, Some(line)), missing(until, None), "{line}");
        }
        assert_eq!(said(504, None), missing(1000, None));
        assert_eq!(said(404, None), missing(1000, Some(WITHOUT)));
        assert_eq!(said(503, None), missing(1000, Some(MISSED)));
        assert!(matches!(said(302, None), Some(Failure::Protocol(_))));
        assert_eq!((said(206, None), said(500, None)), (None, None));
    }

    #[test]
    fn other_servers_are_asked_for_what_a_peer_misses_and_not_for_more() {
        let miss = Miss::new(10 * GROUP);
        assert!(miss.over(0).is_some() && miss.over(10 * GROUP).is_none());
        assert_eq!(miss.end(0, 64 * GROUP), 10 * GROUP);
        // At least some groups, and whole ones.
        assert_eq!(miss.end(9 * GROUP, 64 * GROUP), 13 * GROUP);
        assert_eq!(Miss::new(5).end(0, 64 * GROUP), 4 * GROUP);
        assert_eq!(Miss::new(u64::MAX / 2).end(0, 64 * GROUP), 64 * GROUP);
        assert_eq!((miss.end(10 * GROUP, 64 * GROUP), Miss::default().end(0, 5)), (64 * GROUP, 5));
    }
}
