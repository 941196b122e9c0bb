//! `[http]`: sources on the network.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};

use super::allow::AllowEntry;
use super::file::Size;
use super::openstack::CloudConfig;
use super::s3::{S3Config, S3Keys};
use super::size::format_size;
use super::{ConfigError, invalid};

/// The upper bound of each duration.
pub(super) const DAY: Duration = Duration::from_secs(86_400);

/// The settings of requests to servers. The limits of a single base are in its record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct HttpConfig {
    /// `[http] ca_file`: certificates in PEM that are trusted besides the system's. A worker reads the file when it
    /// starts. Default: none. Bounds: an absolute path, UTF-8.
    pub ca_file: Option<PathBuf>,
    /// `[http] max_requests`: most requests in flight, of all bases together. Default: 16. Bounds: 1 to 256.
    pub max_requests: u32,
    /// `[http] max_rate`: most bytes per second, of all bases together. Default: no limit. Bounds: at least 64 KiB.
    #[serde(deserialize_with = "size")]
    pub max_rate: Option<u64>,
    /// `[http] connect_timeout`: how long a connection may take, TLS and proxy included. Default: 10 s.
    /// Bounds: 100 ms to 1 day.
    #[serde(deserialize_with = "duration")]
    pub connect_timeout: Duration,
    /// `[http] stall_timeout`: how long a server may send nothing before the request is abandoned and sent again.
    /// Default: 30 s. Bounds: 100 ms to 1 day.
    #[serde(deserialize_with = "duration")]
    pub stall_timeout: Duration,
    /// `[http] min_rate`: fewest bytes per second of a server's answer, on average over `stall_timeout`. A slower
    /// request is abandoned and sent again, to a mirror first. Default: 4 KiB. Bounds: 1 byte to 1 GiB.
    #[serde(deserialize_with = "some_size")]
    pub min_rate: u64,
    /// `[http] allow`: targets to which redirects may lead although their addresses are not public: a host, a domain
    /// with all domains below it (`.example.org`), an address, a network (`10.0.0.0/8`). Redirects of a server that has
    /// such an address itself need no entry. Default: none. Bounds: at most 64.
    pub allow: Vec<String>,
    /// `[http] user_agent`: the header `User-Agent`. Default: `plyfs/VERSION`. Bounds: printable ASCII, 1 to 200 bytes.
    pub user_agent: String,
    /// `[[http.credentials]]`: the credentials of plyfs, by URL. Default: none. Bounds: at most 64.
    pub credentials: Vec<CredentialConfig>,
    /// `[[http.s3]]`: services with the interface of Amazon S3, by bucket. Default: none. Bounds: at most 64.
    pub s3: Vec<S3Config>,
    /// `[[http.clouds]]`: the clouds of clouds.yaml that bases may be of. Default: none. Bounds: at most 16.
    pub clouds: Vec<CloudConfig>,
}

impl Default for HttpConfig {
    fn default() -> Self {
        Self {
            ca_file: None,
            max_requests: 16,
            max_rate: None,
            connect_timeout: Duration::from_secs(10),
            stall_timeout: Duration::from_secs(30),
            min_rate: 4 << 10,
            allow: Vec::new(),
            user_agent: concat!("plyfs/", env!("CARGO_PKG_VERSION")).into(),
            credentials: Vec::new(),
            s3: Vec::new(),
            clouds: Vec::new(),
        }
    }
}

/// Where the credentials for some URLs are. The secrets themselves are never in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CredentialConfig {
    /// `url`: the scope. Scheme, host and port must be equal, and whole segments of this path must be a prefix of the
    /// path. The longest matching scope applies.
    pub url: String,
    /// `bearer_file`: a file with a token, for `Authorization: Bearer`.
    #[serde(default)]
    pub bearer_file: Option<PathBuf>,
    /// `basic_file`: a file with `user:password`.
    #[serde(default)]
    pub basic_file: Option<PathBuf>,
    /// `header_file`: a file with header lines, `Name: value`.
    #[serde(default)]
    pub header_file: Option<PathBuf>,
    /// `command`: a program (absolute path) and its arguments. It prints a token or header lines. It runs with the
    /// rights of the daemon and an environment of its own, for at most 10 s.
    #[serde(default)]
    pub command: Option<Vec<String>>,
    /// `renew`: how long a credential is used before it is read again. Default: until a server refuses it.
    /// Bounds: 1 s to 1 day.
    #[serde(default, deserialize_with = "optional_duration")]
    pub renew: Option<Duration>,
}

/// Where a secret comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CredentialSource<'a> {
    /// A token in a file.
    Bearer(&'a std::path::Path),
    /// User and password in a file.
    Basic(&'a std::path::Path),
    /// Header lines in a file.
    Headers(&'a std::path::Path),
    /// The output of a program.
    Command(&'a [String]),
}

impl CredentialConfig {
    /// The source; `None` when the configuration has none or several, which is not valid.
    pub fn source(&self) -> Option<CredentialSource<'_>> {
        let Self { bearer_file, basic_file, header_file, command, .. } = self;
        match (bearer_file, basic_file, header_file, command) {
            (Some(path), None, None, None) => Some(CredentialSource::Bearer(path)),
            (None, Some(path), None, None) => Some(CredentialSource::Basic(path)),
            (None, None, Some(path), None) => Some(CredentialSource::Headers(path)),
            (None, None, None, Some(command)) => Some(CredentialSource::Command(command)),
            _ => None,
        }
    }
}

impl HttpConfig {
    /// Whether it names secrets that another process must read for the worker.
    pub fn reads_secrets(&self) -> bool {
        let is_read =
            |entry: &S3Config| !matches!(entry.keys(), Some(S3Keys::Instance(_) | S3Keys::Anonymous));
        !self.credentials.is_empty() || !self.clouds.is_empty() || self.s3.iter().any(is_read)
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if let Some(path) = &self.ca_file {
            absolute("http.ca_file", path)?;
        }
        if !(1..=256).contains(&self.max_requests) {
            let count = self.max_requests;
            return Err(invalid("http.max_requests", format!("{count} is out of bounds; give 1 to 256")));
        }
        if let Some(rate) = self.max_rate
            && !((64 << 10)..=super::size::MAX_SIZE).contains(&rate)
        {
            let rate = format_size(rate);
            return Err(invalid("http.max_rate", format!("{rate} is out of bounds; give at least 64K")));
        }
        for (key, value) in
            [("http.connect_timeout", self.connect_timeout), ("http.stall_timeout", self.stall_timeout)]
        {
            if !(Duration::from_millis(100)..=DAY).contains(&value) {
                return Err(invalid(key, format!("{value:?} is out of bounds; give 100ms to 1d")));
            }
        }
        if !(1..=1 << 30).contains(&self.min_rate) {
            let rate = format_size(self.min_rate);
            return Err(invalid("http.min_rate", format!("{rate} is out of bounds; give 1 byte to 1G")));
        }
        if self.allow.len() > 64 {
            return Err(invalid("http.allow", "it has more than 64 entries; remove some".into()));
        }
        if let Some(entry) = self.allow.iter().find(|entry| AllowEntry::parse(entry).is_none()) {
            let message = format!(
                "{entry:?} is not valid; give a host, .domain, an address, or a network such as 10.0.0.0/8"
            );
            return Err(invalid("http.allow", message));
        }
        let agent = &self.user_agent;
        if !(1..=200).contains(&agent.len()) || !agent.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            let message = "it is not valid; give 1 to 200 bytes of printable ASCII".into();
            return Err(invalid("http.user_agent", message));
        }
        if self.credentials.len() > 64 {
            return Err(invalid("http.credentials", "there are more than 64; remove some".into()));
        }
        self.credentials.iter().try_for_each(CredentialConfig::validate)?;
        if self.s3.len() > 64 {
            return Err(invalid("http.s3", "there are more than 64; remove some".into()));
        }
        self.s3.iter().try_for_each(S3Config::validate)?;
        super::openstack::validate(&self.clouds)
    }
}

impl CredentialConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |message: String| Err(invalid("http.credentials", message));
        let Some(rest) = ["http://", "https://"].into_iter().find_map(|scheme| self.url.strip_prefix(scheme))
        else {
            // The message does not show the text, because it may contain a secret.
            return refuse("url does not begin with http:// or https://; give such a URL".into());
        };
        if rest.is_empty()
            || rest.starts_with('/')
            || rest.contains(['@', '?', '#', '\\'])
            || rest.chars().any(|c| c.is_control() || c.is_whitespace())
        {
            return refuse(
                "url is not valid; give scheme, host, port and path: no user, query, fragment or white space"
                    .into(),
            );
        }
        let url = &self.url;
        match self.source() {
            None => {
                return refuse(format!(
                    "{url} needs one of bearer_file, basic_file, header_file and command; give exactly one"
                ));
            }
            Some(CredentialSource::Command(command)) => {
                if !command.first().is_some_and(|program| program.starts_with('/')) {
                    return refuse(format!(
                        "command of {url} does not begin with the absolute path of a program; give one"
                    ));
                }
                if command.iter().any(|word| word.contains('\0')) {
                    return refuse(format!("command of {url} contains a NUL; remove it"));
                }
            }
            Some(
                CredentialSource::Bearer(path)
                | CredentialSource::Basic(path)
                | CredentialSource::Headers(path),
            ) => absolute("http.credentials", path)?,
        }
        match self.renew {
            Some(renew) if !(Duration::from_secs(1)..=DAY).contains(&renew) => {
                refuse(format!("renew of {url} is out of bounds; give 1s to 1d"))
            }
            _ => Ok(()),
        }
    }
}

pub(super) fn absolute(key: &'static str, path: &std::path::Path) -> Result<(), ConfigError> {
    if path.is_absolute() && path.to_str().is_some_and(|text| !text.contains('\0')) {
        return Ok(());
    }
    Err(invalid(key, format!("{path:?} is not an absolute path in UTF-8; give one")))
}

pub(super) fn size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(Option::<Size>::deserialize(deserializer)?.map(|size| size.0))
}

pub(super) fn some_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    Ok(Size::deserialize(deserializer)?.0)
}

/// The two encodings of a duration: text in the file, and serde's own encoding in the JSON between processes.
#[derive(Deserialize)]
#[serde(untagged)]
enum EncodedDuration {
    Text(String),
    Json(Duration),
}

impl EncodedDuration {
    fn read<E: serde::de::Error>(self) -> Result<Duration, E> {
        match self {
            Self::Json(duration) => Ok(duration),
            Self::Text(text) => parse_duration(&text).ok_or_else(|| {
                E::custom(format!("{text:?} is not a time; give one such as 500ms, 30s, 10m, 2h or 1d"))
            }),
        }
    }
}

pub(super) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    EncodedDuration::deserialize(deserializer)?.read()
}

pub(super) fn optional_duration<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Duration>, D::Error> {
    Option::<EncodedDuration>::deserialize(deserializer)?.map(EncodedDuration::read).transpose()
}

/// Parses a duration: a whole number and one of `ms`, `s`, `m`, `h` and `d`.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let seconds = |each: u64| number.checked_mul(each).map(Duration::from_secs);
    match unit {
        "ms" => Some(Duration::from_millis(number)),
        "s" => seconds(1),
        "m" => seconds(60),
        "h" => seconds(3600),
        "d" => seconds(86_400),
        _ => None,
    }
}
