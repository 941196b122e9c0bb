//! The place of an image as an operator writes it. This module alone tells a path from a URL.

use std::path::Path;

/// A path or a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location<'a> {
    /// A file of this host.
    File(&'a Path),
    /// Behind a network. [`Kind`](super::Kind) says which schemes a source may have.
    Url {
        /// As it was written; upper and lower case are equal.
        scheme: &'a str,
        /// The whole URL.
        url: &'a str,
    },
}

impl<'a> Location<'a> {
    /// Of a text: `scheme://...` with a scheme of RFC 3986 is a URL, all else is a path.
    pub fn of(text: &'a str) -> Self {
        let is_scheme = |scheme: &str| {
            scheme.starts_with(|first: char| first.is_ascii_alphabetic())
                && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+.-".contains(&byte))
        };
        match text.split_once("://") {
            Some((scheme, _)) if is_scheme(scheme) => Self::Url { scheme, url: text },
            _ => Self::File(Path::new(text)),
        }
    }

    /// Whether it is a URL.
    pub fn is_url(self) -> bool {
        matches!(self, Self::Url { .. })
    }

    /// The text without query and fragment, whose end says the format when the operator gives none.
    pub fn without_query(text: &'a str) -> &'a str {
        match Self::of(text) {
            Self::Url { url, .. } => url.split(['?', '#']).next().unwrap_or(url),
            Self::File(_) => text,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_not_taken_for_a_url() {
        for (scheme, url) in [
            ("http", "http://host/a.raw"),
            ("https", "https://host"),
            ("s3+x", "s3+x://b/a"),
            ("HTTP", "HTTP://h"),
        ] {
            assert_eq!(Location::of(url), Location::Url { scheme, url });
        }
        for path in ["a.raw", "/a", "./http://x", "/srv/a://b", "a/b://c", "://x", "1http://x", "C:\\x", ""] {
            assert_eq!(Location::of(path), Location::File(Path::new(path)), "{path}");
        }
        assert_eq!(Location::without_query("http://h/a.qcow2?x=/b.raw#c"), "http://h/a.qcow2");
        assert_eq!(Location::without_query("/a?b.vmdk"), "/a?b.vmdk");
    }
}
