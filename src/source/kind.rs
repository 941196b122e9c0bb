//! The kinds of sources: every question whose answer differs from kind to kind is asked here, and answered in the file
//! of the kind.
//!
//! A new kind adds a file beside this one, a variant of [`Kind`] and of [`Validator`], and an arm where
//! `bases/origin.rs` probes and opens. The compiler names the places. No other module matches on a kind
//! (`tests/layering.rs`). What must hold: [`compare`] alone decides whether an object is the one that was registered.

use super::identity::{KeyParts, Verdict};
use super::{device, file, glance_identity, http_identity, nbd_identity, oci_identity, s3};
use crate::format::record::{BaseIdentity, Strictness, Validator};

/// A kind of source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file of this host.
    File,
    /// A block device of this host.
    Device,
    /// An object of a web server.
    Http,
    /// An object of a bucket.
    S3,
    /// An image of a Glance.
    Glance,
    /// An export of an NBD server.
    Nbd,
    /// A blob of a registry.
    Oci,
}

impl Kind {
    /// Of what was registered.
    pub fn of_validator(validator: &Validator) -> Self {
        match validator {
            Validator::File { .. } => Self::File,
            Validator::Device { .. } => Self::Device,
            Validator::Http { .. } => Self::Http,
            Validator::S3 { .. } => Self::S3,
            Validator::Glance { .. } => Self::Glance,
            Validator::Nbd { .. } => Self::Nbd,
            Validator::Oci { .. } => Self::Oci,
        }
    }

    fn noun(self) -> &'static str {
        match self {
            Self::File => "a file of this host",
            Self::Device => "a block device of this host",
            Self::Http => "an object of a web server",
            Self::S3 => "an object of a bucket",
            Self::Glance => "an image of a Glance",
            Self::Nbd => "an export of an NBD server",
            Self::Oci => "a blob of a registry",
        }
    }
}

/// Whether `found` is the object that was registered. The digest is not compared: it takes all bytes to compute.
pub fn compare(registered: &BaseIdentity, found: &BaseIdentity, strictness: Strictness) -> Verdict {
    let verdict = match Kind::of_validator(&registered.validator) {
        Kind::File => file::compare(registered, found),
        Kind::Device => device::compare(registered, found),
        // A web server may have a copy of the object of a bucket, with the same validators.
        Kind::Http | Kind::S3 => http_identity::compare(registered, found, strictness),
        Kind::Glance => glance_identity::compare(registered, found, strictness),
        Kind::Nbd => nbd_identity::compare(registered, found, strictness),
        Kind::Oci => oci_identity::compare(registered, found),
    };
    verdict.unwrap_or_else(|| {
        let noun = |identity: &BaseIdentity| Kind::of_validator(&identity.validator).noun();
        Verdict::Another(format!("it is {}, not {}", noun(found), noun(registered)))
    })
}

/// What a validator contributes to keys.
pub fn key_parts(validator: &Validator) -> KeyParts {
    match validator {
        Validator::File { mtime_ns, inode } => file::key_parts(*mtime_ns, *inode),
        Validator::Device { number, names } => device::key_parts(*number, names),
        Validator::Http { etag, last_modified } => {
            http_identity::key_parts(etag.as_deref(), last_modified.as_deref())
        }
        Validator::S3 { version, etag, last_modified } => {
            s3::key_parts(version.as_deref(), etag.as_deref(), last_modified.as_deref())
        }
        Validator::Glance { id, hash, .. } => glance_identity::key_parts(id, hash),
        Validator::Nbd { export } => nbd_identity::key_parts(export),
        Validator::Oci { digest, offset, .. } => oci_identity::key_parts(digest, *offset),
    }
}

#[cfg(feature = "daemon")]
mod places {
    use std::sync::Arc;

    use super::{Kind, s3};
    use crate::config::HttpConfig;
    use crate::format::record::BaseIdentity;
    use crate::source::http::peer::{check_peer, is_peer};
    use crate::source::http::{self, Authoriser, Clouds, Credentials, Located};
    use crate::source::{HttpIdentity, Location, SourceError, SourceErrorKind, nbd};

    /// Schemes of URLs, and the kind that each is of.
    const SCHEMES: &[(&str, Kind)] = &[
        ("http", Kind::Http),
        ("https", Kind::Http),
        (s3::SCHEME, Kind::S3),
        ("glance", Kind::Glance),
        ("glance+http", Kind::Glance),
        ("glance+cloud", Kind::Glance),
        ("swift", Kind::Http),
        ("nbd", Kind::Nbd),
        ("nbd+unix", Kind::Nbd),
        ("oci", Kind::Oci),
        ("oci+http", Kind::Oci),
    ];

    /// What the kinds of sources that are fetched by HTTP have of the configuration.
    pub struct Services {
        s3: s3::Services,
        pub(in crate::source) clouds: Clouds,
    }

    impl Services {
        pub(in crate::source) fn new(config: &HttpConfig, reader: &Arc<dyn Credentials>) -> Self {
            Self { s3: s3::Services::new(config, reader), clouds: Clouds::new(&config.clouds, reader) }
        }

        /// Where a source is, and who authorises requests for it. `pinned` is its object, when that is known.
        pub(in crate::source) fn locate(
            &self,
            source: &str,
            pinned: Option<&HttpIdentity>,
        ) -> Result<Located, SourceError> {
            if let Some(located) = self.clouds.locate(source) {
                return located;
            }
            match Kind::of(source)? {
                Kind::S3 => self.s3.locate(source, pinned.and_then(|pinned| pinned.version.as_deref())),
                Kind::Oci => {
                    http::locate_artifact(source, pinned.and_then(|pinned| pinned.version.as_deref()))
                }
                Kind::Http | Kind::Glance | Kind::Nbd | Kind::File | Kind::Device => {
                    let mut located = Located::web(source)?;
                    if located.authoriser.is_none() {
                        located.authoriser =
                            s3::presigned(&located.url).map(|url| Arc::new(url) as Arc<dyn Authoriser>);
                    }
                    Ok(located)
                }
            }
        }
    }

    impl Kind {
        /// Of the path or URL of a new source. A path may turn out to be one of a device.
        ///
        /// # Errors
        /// `Protocol` for a URL whose scheme no kind has.
        pub fn of(source: &str) -> Result<Self, SourceError> {
            if is_peer(source) {
                let why = "another host has only what its disks have read";
                let advice = "give the server of the image as the source, and this as --mirror";
                return Err(SourceError::remote(
                    SourceErrorKind::Protocol,
                    "use",
                    shown(source),
                    why,
                    advice,
                ));
            }
            let Location::Url { scheme, .. } = Location::of(source) else { return Ok(Self::File) };
            let of_scheme = SCHEMES.iter().find(|(name, _)| name.eq_ignore_ascii_case(scheme));
            of_scheme.map(|(_, kind)| *kind).ok_or_else(|| {
                let known: Vec<&str> = SCHEMES.iter().map(|(name, _)| *name).collect();
                let why = format!("the scheme of a source is one of {}", known.join(", "));
                let advice = "write a URL such as https://images.example.org/debian.qcow2";
                SourceError::remote(SourceErrorKind::Protocol, "use", shown(source), why, advice)
            })
        }

        /// Whether `places` can be those of one source of this kind.
        ///
        /// # Errors
        /// `Protocol`, with what is wrong with one of them.
        pub fn check(self, places: &[String]) -> Result<(), SourceError> {
            let (peers, mut places): (Vec<_>, Vec<_>) = places.iter().partition(|place| is_peer(place));
            peers.into_iter().try_for_each(|url| check_peer(url))?;
            let mut places = places.drain(..);
            match self {
                Self::File | Self::Device => Ok(()),
                Self::Http | Self::S3 => places.try_for_each(|url| match Self::of(url)? {
                    Self::S3 => s3::check_url(url),
                    Self::Http | Self::Glance | Self::Nbd | Self::Oci | Self::File | Self::Device => {
                        http::check_url(url)
                    }
                }),
                Self::Glance => places.try_for_each(|url| http::check_image_url(url)),
                Self::Nbd => places.try_for_each(|url| nbd::check_url(url)),
                Self::Oci => places.try_for_each(|url| http::check_artifact_url(url)),
            }
        }

        /// Whether an object of this kind has a name that another object beside it can have with a suffix. An image of a
        /// Glance has an ID, and exports and blobs are no files.
        pub fn has_neighbours(self) -> bool {
            match self {
                Self::File | Self::Device | Self::Http | Self::S3 => true,
                Self::Glance | Self::Nbd | Self::Oci => false,
            }
        }

        /// The place of the object whose name is that of the object at `place`, which is of this kind, and `suffix`.
        pub fn neighbour(self, place: &str, suffix: &str) -> String {
            match self {
                Self::File | Self::Device => format!("{place}{suffix}"),
                // A key has any character but ?, and the version behind that is one of the object.
                Self::S3 => format!("{}{suffix}", place.split('?').next().unwrap_or(place)),
                Self::Http | Self::Glance | Self::Nbd | Self::Oci => {
                    let end = place.find(['?', '#']).unwrap_or(place.len());
                    let end_of_query = place.find('#').unwrap_or(place.len()).max(end);
                    format!("{}{suffix}{}", &place[..end], &place[end..end_of_query])
                }
            }
        }

        /// What a record has of an object that a server described by its validators.
        pub fn identity(self, found: HttpIdentity) -> BaseIdentity {
            match self {
                Self::S3 => found.of_bucket(),
                Self::Http | Self::Glance | Self::Nbd | Self::Oci | Self::File | Self::Device => {
                    found.of_web()
                }
            }
        }
    }

    /// The place of a source as it is shown to people: a path as it is, a URL without what may be secret.
    pub fn shown(source: &str) -> String {
        match Location::of(source) {
            Location::File(_) => source.to_owned(),
            Location::Url { scheme, .. } if scheme.eq_ignore_ascii_case("nbd+unix") => nbd::shown(source),
            Location::Url { .. } => http::shown(source),
        }
    }
}

#[cfg(feature = "daemon")]
pub(super) use places::Services;
#[cfg(feature = "daemon")]
pub use places::shown;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::record::ImageData;

    fn identity(size: u64, validator: Validator) -> BaseIdentity {
        BaseIdentity { size, validator, digest: None }
    }

    fn file(size: u64, mtime_ns: i64, inode: u64) -> BaseIdentity {
        identity(size, Validator::File { mtime_ns, inode })
    }

    fn http(size: u64, etag: &str) -> BaseIdentity {
        identity(size, Validator::Http { etag: Some(etag.into()), last_modified: None })
    }

    #[track_caller]
    fn differs(registered: &BaseIdentity, found: &BaseIdentity, how: &str) {
        for strictness in [Strictness::Strong, Strictness::Weak, Strictness::SizeOnly] {
            match compare(registered, found, strictness) {
                Verdict::Another(why) => assert!(why.contains(how), "{why}"),
                other => panic!("{other:?}"),
            }
        }
    }

    fn glance(size: u64, id: &str, hash: &str) -> BaseIdentity {
        let (id, hash) = (id.to_owned(), hash.to_owned());
        let etag = Some("\"m\"".to_owned());
        identity(size, Validator::Glance { id, hash, data: ImageData::Ranges, etag, last_modified: None })
    }

    #[test]
    fn an_image_is_the_one_with_the_digest_of_its_record() {
        let registered = glance(5, "a", "sha512:01");
        assert_eq!(compare(&registered, &glance(5, "a", "sha512:01"), Strictness::Strong), Verdict::Same);
        // The same image in another cloud.
        assert_eq!(compare(&registered, &glance(5, "b", "sha512:01"), Strictness::Strong), Verdict::Same);
        differs(&registered, &glance(5, "a", "sha512:02"), "os_hash_value is another");
        differs(&registered, &glance(6, "a", "sha512:01"), "6 bytes, not 5");
        let unproven = compare(&registered, &glance(5, "a", ""), Strictness::Strong);
        assert!(matches!(unproven, Verdict::Unproven(_)), "{unproven:?}");
        differs(&glance(5, "a", ""), &glance(5, "b", ""), "it is image b, not a");
        differs(&registered, &http(5, "\"m\""), "an object of a web server, not an image of a Glance");
    }

    #[test]
    fn an_object_of_another_kind_is_another_object_however_weak_the_check() {
        differs(&http(5, "\"a\""), &file(5, 1, 2), "a file of this host, not an object of a web server");
        differs(&file(5, 1, 2), &http(5, "\"a\""), "an object of a web server, not a file of this host");
    }

    #[test]
    fn objects_of_one_kind_are_compared_by_what_the_kind_has() {
        let registered = file(5, 1, 2);
        assert_eq!(compare(&registered, &registered, Strictness::Strong), Verdict::Same);
        differs(&registered, &file(6, 1, 2), "it has 6 bytes, not 5");
        differs(&registered, &file(5, 1, 3), "another file");
        differs(&registered, &file(5, 2, 2), "was modified");
        let registered = http(5, "\"a\"");
        assert_eq!(compare(&registered, &http(5, "\"a\""), Strictness::Strong), Verdict::Same);
        assert!(matches!(compare(&registered, &http(5, "\"b\""), Strictness::Strong), Verdict::Another(_)));
        assert_eq!(compare(&registered, &http(5, "\"b\""), Strictness::SizeOnly), Verdict::Same);
        differs(&registered, &http(6, "\"a\""), "it has 6 bytes, not 5");
    }

    /// Keys of the cache and origins of traces are on disk, made of these.
    #[test]
    fn the_parts_of_the_known_kinds_stay_what_they_are() {
        let parts = key_parts(&Validator::File { mtime_ns: 1, inode: 258 });
        assert_eq!((parts.label, parts.is_strong, parts.is_portable), ("file", false, false));
        assert_eq!(parts.parts, [[1, 0, 0, 0, 0, 0, 0, 0], [2, 1, 0, 0, 0, 0, 0, 0]]);
        let http = |etag: Option<&str>, last_modified: Option<&str>| {
            let (etag, last_modified) = (etag.map(Into::into), last_modified.map(Into::into));
            key_parts(&Validator::Http { etag, last_modified })
        };
        let parts = http(Some("\"a\""), Some("date"));
        assert_eq!((parts.label, parts.is_strong, parts.is_portable), ("url", true, true));
        assert_eq!(parts.parts, [b"\"a\"".as_slice(), b"date"]);
        let parts = http(None, Some("date"));
        assert_eq!((parts.parts, parts.is_strong), (vec![Vec::new(), b"date".to_vec()], true));
        assert!(!http(Some("W/\"a\""), Some("date")).is_strong && !http(None, None).is_strong);
        let parts = key_parts(&glance(5, "a", "sha512:01").validator);
        assert_eq!((parts.label, parts.is_strong, parts.is_portable), ("glance", true, true));
        assert_eq!(parts.parts, [b"a".as_slice(), b"sha512:01"]);
        assert!(!key_parts(&glance(5, "a", "").validator).is_strong);
    }

    #[cfg(feature = "daemon")]
    #[test]
    fn the_scheme_of_a_place_says_the_kind() {
        assert_eq!(Kind::of("/srv/a.raw").unwrap(), Kind::File);
        assert_eq!(Kind::of("HTTPS://h/a").unwrap(), Kind::Http);
        let error = Kind::of("ftp://user:secret@h/a?token").unwrap_err().to_string();
        assert!(
            error.contains("http, https, s3, glance")
                && !error.contains("secret")
                && !error.contains("token"),
            "{error}"
        );
    }
}
