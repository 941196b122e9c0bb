//! Where the bytes of an image are, as an operator writes it: the one place that tells a path from a URL.

use std::path::Path;

/// A path or a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location<'a> {
    /// A file of this host.
    File(&'a Path),
    /// Behind a network; whether it is a URL that can be a source is for who asks it.
    Url(&'a str),
}

impl<'a> Location<'a> {
    /// A URL is `scheme://...`, with a scheme as RFC 3986 has them; all else is a path.
    pub fn of(text: &'a str) -> Self {
        let is_scheme = |scheme: &str| {
            scheme.starts_with(|first: char| first.is_ascii_alphabetic())
                && scheme.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+.-".contains(&byte))
        };
        match text.split_once("://") {
            Some((scheme, _)) if is_scheme(scheme) => Self::Url(text),
            _ => Self::File(Path::new(text)),
        }
    }

    /// Whether it is behind a network.
    pub fn is_url(self) -> bool {
        matches!(self, Self::Url(_))
    }

    /// What its last part ends in says the format where none is given: the text without query and fragment.
    pub fn without_query(text: &'a str) -> &'a str {
        match Self::of(text) {
            Self::Url(url) => url.split(['?', '#']).next().unwrap_or(url),
            Self::File(_) => text,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_no_url() {
        for url in ["http://host/a.raw", "https://host", "s3+x://bucket/a", "HTTP://h"] {
            assert_eq!(Location::of(url), Location::Url(url));
        }
        for path in ["a.raw", "/a", "./http://x", "/srv/a://b", "a/b://c", "://x", "1http://x", "C:\\x", ""] {
            assert_eq!(Location::of(path), Location::File(Path::new(path)), "{path}");
        }
        assert_eq!(Location::without_query("http://h/a.qcow2?x=/b.raw#c"), "http://h/a.qcow2");
        assert_eq!(Location::without_query("/a?b.vmdk"), "/a?b.vmdk");
    }
}
