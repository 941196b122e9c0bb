//! URLs of sources: which are valid, and how messages show them.

use reqwest::Url;

use crate::source::openstack::ObjectPlace;
use crate::source::{SourceError, SourceErrorKind};

/// Longest valid URL in bytes.
const MAX_URL: usize = 4096;

/// A URL as messages show it: without user info, query and fragment, which may have secrets. All logged and displayed
/// URLs go through it. Of a text that is no URL, it drops the same parts, and control characters.
pub fn shown(url: &str) -> String {
    if let Ok(mut parsed) = Url::parse(url)
        && parsed.has_host()
    {
        // These fail only for URLs without a host.
        let _ = parsed.set_username("");
        let _ = parsed.set_password(None);
        parsed.set_query(None);
        parsed.set_fragment(None);
        return parsed.into();
    }
    let end = url.find(['?', '#']).unwrap_or(url.len());
    let text = match url[..end].rsplit_once('@') {
        Some((_, rest)) => rest,
        // The ? may be one of a password, or the @ one of a query: only the scheme is no secret.
        None if url[end..].contains('@') => &url[..url[..end].find("://").map_or(0, |at| at + 3)],
        None => &url[..end],
    };
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

/// Checks that a URL can be a source: it is http or https, names a host, has no control characters and is not too long.
///
/// # Errors
/// `Protocol`, with the mistake.
pub fn check_url(url: &str) -> Result<(), SourceError> {
    match ObjectPlace::parse(url) {
        None => parse(url).map(drop),
        Some(place) => place.map(drop).map_err(|why| {
            let advice = "write swift://CLOUD/CONTAINER/OBJECT";
            SourceError::remote(SourceErrorKind::Protocol, "use", shown(url), why, advice)
        }),
    }
}

pub(crate) fn parse(text: &str) -> Result<Url, SourceError> {
    let refuse = |why: &str| {
        let mut shown = shown(text);
        if let Some((at, _)) = shown.char_indices().nth(200) {
            shown.truncate(at);
            shown.push_str("...");
        }
        let advice = "write a URL such as https://images.example.org/debian.qcow2";
        Err(SourceError::remote(SourceErrorKind::Protocol, "use", shown, why, advice))
    };
    if text.len() > MAX_URL {
        return refuse("it is longer than 4096 bytes");
    }
    // The parser would drop some of them silently.
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return refuse("it has white space or control characters");
    }
    let Ok(url) = Url::parse(text) else { return refuse("it is not a URL") };
    if !matches!(url.scheme(), "http" | "https") {
        return refuse("it is neither http nor https");
    }
    if url.host_str().is_none_or(str::is_empty) {
        return refuse("it names no host");
    }
    Ok(url)
}

/// Whether a path leads to a parent directory once it is decoded. The parser resolves `..` between slashes; a server may
/// decode a slash or a backslash, too.
pub(crate) fn climbs(path: &str) -> bool {
    percent_decode(path).split(['/', '\\']).any(|part| part == "..")
}

/// Scheme, host and port of the server that a request goes to.
pub(super) fn origin(url: &Url) -> String {
    let port = url.port_or_known_default().unwrap_or(0);
    format!("{}://{}:{port}", url.scheme(), url.host_str().unwrap_or_default())
}

/// Host and port of a URL, as messages show a server.
pub(super) fn server(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port_or_known_default().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

/// Takes user name and password out of a URL.
pub(super) fn take_user_info(url: &mut Url) -> Option<(String, String)> {
    if url.username().is_empty() && url.password().is_none() {
        return None;
    }
    let user = percent_decode(url.username());
    let password = percent_decode(url.password().unwrap_or_default());
    // They fail for URLs without a host only.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    Some((user, password))
}

/// The text without its percent signs; what is no UTF-8 is replaced.
pub(crate) fn percent_decode(text: &str) -> String {
    percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned()
}
