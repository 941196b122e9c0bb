//! The URL of an artifact of a registry: `oci://REGISTRY[:PORT]/REPOSITORY[:TAG|@DIGEST]`. With `oci+http` the registry is
//! asked without TLS.

use reqwest::Url;

/// Longest name of a repository, and of a tag.
const LONGEST_NAME: usize = 255;
const LONGEST_TAG: usize = 128;

/// What of a repository is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Reference {
    /// May lead to another artifact tomorrow.
    Tag(String),
    /// `sha256:` and 64 digits.
    Digest(String),
}

/// A place in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    scheme: &'static str,
    /// Host, and port if one is given.
    registry: String,
    pub repository: String,
    pub reference: Reference,
}

/// Whether a text is a digest that plyfs can compare: SHA-256.
pub(super) fn is_digest(text: &str) -> bool {
    let hex =
        |hex: &str| hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
    text.strip_prefix("sha256:").is_some_and(hex)
}

fn is_repository(text: &str) -> bool {
    let part = |part: &str| {
        let inside = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"._-".contains(&b);
        let end = |b: Option<u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        part.bytes().all(inside) && end(part.bytes().next()) && end(part.bytes().last())
    };
    text.len() <= LONGEST_NAME && text.split('/').all(part)
}

fn is_tag(text: &str) -> bool {
    let first = text.bytes().next().is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_');
    first
        && text.len() <= LONGEST_TAG
        && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

impl Place {
    /// None for a URL of another kind; else the place, or what is wrong with it.
    pub fn parse(text: &str) -> Option<Result<Self, &'static str>> {
        let (scheme, rest) = text.split_once("://")?;
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "oci" => "https",
            "oci+http" => "http",
            _ => return None,
        };
        Some(Self::of(scheme, rest))
    }

    fn of(scheme: &'static str, rest: &str) -> Result<Self, &'static str> {
        let Some((registry, name)) = rest.split_once('/') else { return Err("it names no repository") };
        if registry.contains('@') {
            return Err("it has a user name; credentials are in [[http.credentials]]");
        }
        let url = Url::parse(&format!("{scheme}://{registry}/")).map_err(|_| "its registry is no host")?;
        if registry.is_empty() || url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err("its registry is no host");
        }
        let (name, reference) = match name.split_once('@') {
            Some((name, digest)) if is_digest(digest) => (name, Reference::Digest(digest.to_owned())),
            Some(_) => return Err("its digest is not sha256: and 64 small hexadecimal digits"),
            None => match name.rsplit_once(':') {
                Some((name, tag)) if is_tag(tag) => (name, Reference::Tag(tag.to_owned())),
                Some(_) => return Err("its tag has characters that no tag has"),
                None => (name, Reference::Tag("latest".to_owned())),
            },
        };
        // A tag beside a digest says nothing.
        let name = match &reference {
            Reference::Digest(_) => name.rsplit_once(':').map_or(name, |(name, _)| name),
            Reference::Tag(_) => name,
        };
        let (registry, repository) = match registry {
            // What docker means by it.
            "docker.io" | "index.docker.io" if name.contains('/') => {
                ("registry-1.docker.io", name.to_owned())
            }
            "docker.io" | "index.docker.io" => ("registry-1.docker.io", format!("library/{name}")),
            other => (other, name.to_owned()),
        };
        if !is_repository(&repository) {
            return Err("its repository has characters that no repository has");
        }
        Ok(Self { scheme, registry: registry.to_owned(), repository, reference })
    }

    /// The same repository, and an artifact of it that never changes.
    pub fn with(&self, digest: &str) -> String {
        let scheme = if self.scheme == "https" { "oci" } else { "oci+http" };
        format!("{scheme}://{}/{}@{digest}", self.registry, self.repository)
    }

    /// Where the registry has its manifests or blobs.
    fn url(&self, what: &str, name: &str) -> String {
        format!("{}://{}/v2/{}/{what}/{name}", self.scheme, self.registry, self.repository)
    }

    /// The URL of a blob.
    pub fn blob(&self, digest: &str) -> String {
        self.url("blobs", digest)
    }

    /// The URL of a manifest.
    pub fn manifest(&self, reference: &Reference) -> String {
        let (Reference::Tag(name) | Reference::Digest(name)) = reference;
        self.url("manifests", name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(text: &str) -> Place {
        Place::parse(text).unwrap().unwrap()
    }

    #[test]
    fn urls_of_artifacts_are_taken_apart() {
        let digest = format!("sha256:{}", "0a".repeat(32));
        let of = place("oci://quay.io/containerdisks/fedora:40");
        assert_eq!(of.manifest(&of.reference), "https://quay.io/v2/containerdisks/fedora/manifests/40");
        assert_eq!(of.with(&digest), format!("oci://quay.io/containerdisks/fedora@{digest}"));
        assert_eq!(place(&of.with(&digest)).reference, Reference::Digest(digest.clone()));
        assert_eq!(of.blob(&digest), format!("https://quay.io/v2/containerdisks/fedora/blobs/{digest}"));
        assert_eq!(place("oci+http://h:5000/a").reference, Reference::Tag("latest".into()));
        let of = place(&format!("oci+http://[::1]:5000/a/b:x@{digest}"));
        assert_eq!((of.repository.as_str(), &of.reference), ("a/b", &Reference::Digest(digest.clone())));
        assert_eq!(of.with(&digest), format!("oci+http://[::1]:5000/a/b@{digest}"));
        assert!(
            place("oci://docker.io/debian:12")
                .blob("x")
                .starts_with("https://registry-1.docker.io/v2/library/debian/")
        );
        assert_eq!(Place::parse("https://h/a"), None);
    }

    #[test]
    fn a_url_that_is_none_of_an_artifact_is_refused() {
        for (text, why) in [
            ("oci://h", "no repository"),
            ("oci:///a", "no host"),
            ("oci://h?x/a", "no host"),
            ("oci://user:secret@h/a", "user name"),
            ("oci://h/A", "characters"),
            ("oci://h/a//b", "characters"),
            ("oci://h/../a", "characters"),
            ("oci://h/a:b/c", "tag"),
            ("oci://h/a@sha256:12", "digest"),
            ("oci://h/a@sha512:12", "digest"),
            ("oci://h/a?x=1", "characters"),
        ] {
            let found = Place::parse(text).unwrap().unwrap_err();
            assert!(found.contains(why), "{text}: {found}");
        }
    }
}
