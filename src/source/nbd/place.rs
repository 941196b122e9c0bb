//! The URL of an export: `nbd://HOST[:PORT]/EXPORT`, or `nbd+unix:///EXPORT?socket=PATH`. The form is that of the NBD
//! project's doc/uri.md; its parameters for TLS are refused.

use std::path::PathBuf;

use reqwest::Url;

use crate::source::http::percent_decode;
use crate::source::{SourceError, SourceErrorKind};

/// The registered port.
const PORT: u16 = 10809;
/// Longest name of an export, of the protocol.
const LONGEST_NAME: usize = 4096;

/// Where a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Server {
    /// A name or an address, and a port.
    Host(String, u16),
    /// A socket of this host.
    Socket(PathBuf),
}

/// An export of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub server: Server,
    /// Empty for the default export.
    pub export: String,
    /// As messages show it.
    pub shown: String,
}

impl Place {
    /// # Errors
    /// `Protocol`, with what is wrong with the URL.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        parts(text).map_err(|why| {
            let advice = "write nbd://HOST/EXPORT or nbd+unix:///EXPORT?socket=/run/SOCKET";
            SourceError::remote(SourceErrorKind::Protocol, "use", shown(text), why, advice)
        })
    }
}

/// A URL of an export as messages show it: without user info, and without other parameters than the socket.
pub fn shown(text: &str) -> String {
    match parts(text) {
        Ok(place) => place.shown,
        Err(_) => crate::source::http::shown(text),
    }
}

fn parts(text: &str) -> Result<Place, &'static str> {
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err("it has white space or control characters");
    }
    let url = Url::parse(text).map_err(|_| "it is not a URL")?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err("it has a user name, and the protocol has none");
    }
    if url.fragment().is_some() {
        return Err("it has a part behind #");
    }
    let path = url.path();
    let export = percent_decode(path.strip_prefix('/').unwrap_or(path));
    if export.len() > LONGEST_NAME || export.contains('\0') {
        return Err("the name of the export is longer than 4096 bytes or has a zero byte");
    }
    let host = url.host_str().filter(|host| !host.is_empty());
    let mut socket = None;
    for (name, value) in url.query_pairs() {
        match &*name {
            "socket" if socket.is_none() => socket = Some(value.into_owned()),
            _ => return Err("the only parameter is socket, once"),
        }
    }
    match (url.scheme(), host, socket) {
        ("nbd", Some(host), None) => {
            let host = percent_decode(host);
            let port = url.port().unwrap_or(PORT);
            let shown = format!("nbd://{host}:{port}{path}");
            Ok(Place { server: Server::Host(host, port), export, shown })
        }
        ("nbd", None, _) => Err("it names no host"),
        ("nbd", Some(_), Some(_)) => Err("a socket is of nbd+unix"),
        ("nbd+unix", None, Some(socket)) if socket.starts_with('/') => {
            let shown = format!("nbd+unix://{path}?socket={socket}");
            Ok(Place { server: Server::Socket(socket.into()), export, shown })
        }
        ("nbd+unix", Some(_), _) => Err("it names a host; write three slashes"),
        ("nbd+unix", None, _) => Err("it names no absolute path of a socket"),
        _ => Err("it is neither nbd nor nbd+unix"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_exports_are_taken_apart() {
        let of = |text: &str| Place::parse(text).unwrap();
        let host = |host: &str, port| Server::Host(host.into(), port);
        let place = of("nbd://images.example.org/debian%2012");
        assert_eq!((place.server, &*place.export), (host("images.example.org", 10809), "debian 12"));
        assert_eq!(place.shown, "nbd://images.example.org:10809/debian%2012");
        assert_eq!(of("nbd://[::1]:7/a/b").server, host("[::1]", 7));
        assert_eq!(of("NBD://h").export, "");
        let place = of("nbd+unix:///e?socket=/run/nbd.sock");
        assert_eq!((place.server, &*place.export), (Server::Socket("/run/nbd.sock".into()), "e"));
        assert_eq!(place.shown, "nbd+unix:///e?socket=/run/nbd.sock");
        assert_eq!(of("nbd+unix:///?socket=/s").export, "");
    }

    #[test]
    fn a_url_that_is_none_of_an_export_is_refused_without_its_secrets() {
        for (text, why) in [
            ("nbd:///e", "no host"),
            ("nbd://h/e?socket=/s", "of nbd+unix"),
            ("nbd://h/e?tls-psk-file=/s", "only parameter"),
            ("nbd://user:secret@h/e", "user name"),
            ("nbd://h/e#x", "behind #"),
            ("nbd+unix:///e", "no absolute path"),
            ("nbd+unix:///e?socket=s", "no absolute path"),
            ("nbd+unix://h/e?socket=/s", "three slashes"),
            ("nbd://h/a%00b", "zero byte"),
            ("nbd://h/a b", "white space"),
            ("nbds://h/e", "neither nbd nor"),
        ] {
            let error = Place::parse(text).unwrap_err().to_string();
            assert!(error.contains(why) && !error.contains("secret"), "{text}: {error}");
        }
    }
}
