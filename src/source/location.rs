//! Where the bytes of an image are, as an operator writes it: the one place that tells a path from a URL.

use std::path::Path;

/// A path or a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location<'a> {
    /// A file of this host.
    File(&'a Path),
    /// Behind a network. Which kinds of sources there are, [`Kind`](super::Kind) knows.
    Url {
        /// As it was written: a scheme has no case.
        scheme: &'a str,
        /// All of it.
        url: &'a str,
    },
}

impl<'a> Location<'a> {
    /// A URL is `scheme://...`, with a scheme as RFC 3986 has them; all else is a path.
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

    /// Whether it is behind a network.
    pub fn is_url(self) -> bool {
        matches!(self, Self::Url { .. })
    }

    /// What its last part ends in says the format where none is given: the text without query and fragment.
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
    fn a_path_is_no_url() {
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
