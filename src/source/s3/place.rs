//! Where an object of a bucket is: `s3://BUCKET/KEY`, and the URL that requests for it go to.

use reqwest::Url;

use crate::config::{S3Config, S3Style, is_of_bucket};
use crate::source::http::{percent_decode, shown};
use crate::source::{SourceError, SourceErrorKind};

/// The region of a bucket of which nothing else is known.
pub(super) const FIRST_REGION: &str = "us-east-1";
/// Longest key, by the rules of S3.
const LONGEST_KEY: usize = 1024;
const ADVICE: &str = "write a URL such as s3://BUCKET/images/debian.qcow2";

/// An object as its operator names it. The key is as `aws s3 ls` prints it: plyfs encodes it for the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Object {
    pub bucket: String,
    pub key: String,
    /// The version that the URL names.
    pub version: Option<String>,
}

/// See [`Kind::check`](crate::source::Kind::check).
pub(in crate::source) fn check_url(text: &str) -> Result<(), SourceError> {
    Object::parse(text).map(drop)
}

impl Object {
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        let refuse = |why: &str| {
            let object: String = shown(text).chars().take(200).collect();
            Err(SourceError::remote(SourceErrorKind::Protocol, "use", object, why, ADVICE))
        };
        let Some((_, rest)) = text.split_once("://") else { return refuse("it is not a URL") };
        let (rest, query) = rest.split_once('?').map_or((rest, None), |(rest, query)| (rest, Some(query)));
        let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
        if bucket.contains('@') {
            return refuse("it has a user; keys belong to [[http.s3]] of the configuration");
        }
        if !(1..=255).contains(&bucket.len()) || !bucket.bytes().all(is_of_bucket) {
            return refuse("it names no bucket");
        }
        if key.is_empty() || key.ends_with('/') {
            return refuse("it names no object of the bucket");
        }
        if key.len() > LONGEST_KEY || key.chars().any(char::is_control) {
            return refuse("its key is longer than 1024 bytes, or has control characters");
        }
        if key.split('/').any(|part| part == "." || part == "..") {
            return refuse("its key has . or .. between slashes, which no URL can have");
        }
        let version = match query {
            None => None,
            Some(query) => match query.strip_prefix("versionId=") {
                Some(version) if is_version(version) => Some(version.to_owned()),
                _ => {
                    return refuse(
                        "its query is not of the form ?versionId=ID; endpoint and keys belong to [[http.s3]]",
                    );
                }
            },
        };
        Ok(Self { bucket: bucket.into(), key: key.into(), version })
    }
}

/// Whether it can be the id of a version. `null` is the object of a bucket that has no versions, which is replaced as any
/// other object.
pub(super) fn is_version(text: &str) -> bool {
    let is_of_version = |byte: u8| byte.is_ascii_alphanumeric() || b".-_~+/=:".contains(&byte);
    (1..=1024).contains(&text.len()) && text != "null" && text.bytes().all(is_of_version)
}

/// The service that has a bucket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Service {
    /// None: Amazon.
    endpoint: Option<Url>,
    style: Option<S3Style>,
}

impl Service {
    /// Of the configuration, which refuses an endpoint that is no URL.
    pub fn new(config: Option<&S3Config>) -> Result<Self, SourceError> {
        let endpoint = config.and_then(|config| config.endpoint.as_deref());
        let endpoint = endpoint.map(crate::source::http::parse).transpose()?;
        Ok(Self { endpoint, style: config.and_then(|config| config.style) })
    }

    /// Whether it is Amazon's own.
    pub fn is_amazon(&self) -> bool {
        self.endpoint.is_none()
    }

    /// The URL of an object in a region.
    pub fn url(&self, object: &Object, version: Option<&str>, region: &str) -> Result<Url, SourceError> {
        let bucket = &object.bucket;
        let refuse = |why: &str| {
            let object: String = format!("s3://{bucket}/{}", object.key).chars().take(200).collect();
            SourceError::remote(SourceErrorKind::Protocol, "use", object, why, ADVICE)
        };
        let mut url = match &self.endpoint {
            Some(url) => url.clone(),
            None => Url::parse(&format!("https://{}", amazon_host(region)))
                .map_err(|_| refuse("its region is no part of a host's name"))?,
        };
        let host = url.host_str().unwrap_or_default().to_owned();
        let style = self.style.unwrap_or(match self.endpoint {
            Some(_) => S3Style::Path,
            // A certificate for *.s3.REGION.amazonaws.com does not cover a name with dots.
            None if bucket.contains('.') => S3Style::Path,
            None => S3Style::Virtual,
        });
        let beginning = match style {
            S3Style::Path => format!("/{bucket}"),
            S3Style::Virtual => {
                url.set_host(Some(&format!("{bucket}.{host}"))).map_err(|_| {
                    refuse("its bucket cannot be a part of a host's name; set style = \"path\"")
                })?;
                String::new()
            }
        };
        url.set_path(&format!("{beginning}/{}", encode(&object.key)));
        url.set_query(
            version.map(|version| format!("versionId={}", encode(version).replace('/', "%2F"))).as_deref(),
        );
        Ok(url)
    }

    /// The region of a URL at which keys for `bucket` may sign; none where they may not. `region` is that of the bucket as
    /// far as it is known.
    pub fn region_of(&self, bucket: &str, url: &Url, region: &str) -> Option<String> {
        let is_below =
            |path: &str| path.strip_prefix('/')?.strip_prefix(bucket)?.starts_with('/').then_some(());
        let host = url.host_str()?;
        // No key has it, and a server may decode the slashes and leave the bucket.
        if percent_decode(url.path()).split('/').any(|part| part == "..") {
            return None;
        }
        if let Some(endpoint) = &self.endpoint {
            let same = endpoint.scheme() == url.scheme()
                && endpoint.port_or_known_default() == url.port_or_known_default();
            let inside = match endpoint.host_str()? {
                own if own == host => is_below(url.path()).is_some(),
                own => host.strip_suffix(own).and_then(|name| name.strip_suffix('.')) == Some(bucket),
            };
            return (same && inside).then(|| region.to_owned());
        }
        if url.scheme() != "https" || url.port_or_known_default() != Some(443) {
            return None;
        }
        let name = host.strip_suffix(".amazonaws.com").or_else(|| host.strip_suffix(".amazonaws.com.cn"))?;
        let service = match name.strip_prefix(bucket).and_then(|rest| rest.strip_prefix('.')) {
            Some(service) => service,
            None => {
                is_below(url.path())?;
                name
            }
        };
        match service {
            "s3" => Some(FIRST_REGION.to_owned()),
            _ => {
                let of = service.strip_prefix("s3.").or_else(|| service.strip_prefix("s3-"))?;
                let of = of.strip_prefix("dualstack.").unwrap_or(of);
                (crate::config::is_region(of)).then(|| of.to_owned())
            }
        }
    }
}

fn amazon_host(region: &str) -> String {
    let china = if region.starts_with("cn-") { ".cn" } else { "" };
    format!("s3.{region}.amazonaws.com{china}")
}

/// Encodes all but the unreserved characters of RFC 3986 and the slash, as the signature does.
fn encode(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                out.push(byte.into())
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}
