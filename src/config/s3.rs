//! `[[http.s3]]`: services with the interface of Amazon S3, and the keys for them.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::http::{DAY, absolute, optional_duration};
use super::{ConfigError, invalid};

const KEY: &str = "http.s3";

/// How an object of some buckets is requested. The keys themselves are never in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S3Config {
    /// `bucket`: the bucket, or the beginning of names of buckets and `*`. The longest one that fits applies.
    pub bucket: String,
    /// `endpoint`: the URL of the service. Default: Amazon's of the region.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// `region`: the region in signatures. Default: `us-east-1`, and what the service says.
    #[serde(default)]
    pub region: Option<String>,
    /// `style`: where a URL has the bucket. Default: `path` of an endpoint, `virtual` of Amazon's.
    #[serde(default)]
    pub style: Option<S3Style>,
    /// `keys_file`: a file as `~/.aws/credentials`, or JSON as `keys_command` prints it.
    #[serde(default)]
    pub keys_file: Option<PathBuf>,
    /// `profile`: the section of `keys_file`. Default: `default`.
    #[serde(default)]
    pub profile: Option<String>,
    /// `keys_command`: a program (absolute path) and its arguments, which prints keys as `credential_process` of the
    /// AWS CLI does.
    #[serde(default)]
    pub keys_command: Option<Vec<String>>,
    /// `keys_environment`: whether the keys are in `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY` and
    /// `AWS_SESSION_TOKEN` of the daemon's environment. Default: false.
    #[serde(default)]
    pub keys_environment: bool,
    /// `keys_instance`: the URL of the metadata service of this machine, which may be asked for the keys of its role.
    #[serde(default)]
    pub keys_instance: Option<String>,
    /// `renew`: how long keys are used before they are read again. Default: until they run out, or a server refuses
    /// them. Bounds: 1 s to 1 day.
    #[serde(default, deserialize_with = "optional_duration")]
    pub renew: Option<Duration>,
}

/// Where a URL has the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum S3Style {
    /// First in the path.
    Path,
    /// First in the name of the host.
    Virtual,
}

impl S3Style {
    /// The words of the configuration, in the order of the variants.
    pub const WORDS: [&'static str; 2] = ["path", "virtual"];
}

/// Where keys come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum S3Keys<'a> {
    /// A file.
    File(&'a Path),
    /// The output of a program.
    Command(&'a [String]),
    /// Variables of the daemon.
    Environment,
    /// The metadata service at this URL.
    Instance(&'a str),
    /// None: requests are not signed.
    Anonymous,
}

impl S3Config {
    /// Where its keys come from; `None` when it names several places, which is not valid.
    pub fn keys(&self) -> Option<S3Keys<'_>> {
        let Self { keys_file, keys_command, keys_environment, keys_instance, .. } = self;
        match (keys_file, keys_command, keys_environment, keys_instance) {
            (Some(path), None, false, None) => Some(S3Keys::File(path)),
            (None, Some(command), false, None) => Some(S3Keys::Command(command)),
            (None, None, true, None) => Some(S3Keys::Environment),
            (None, None, false, Some(url)) => Some(S3Keys::Instance(url)),
            (None, None, false, None) => Some(S3Keys::Anonymous),
            _ => None,
        }
    }

    /// How well it fits a bucket: the length of what it names; none when it does not fit.
    pub fn fits(&self, bucket: &str) -> Option<usize> {
        match self.bucket.strip_suffix('*') {
            Some(beginning) => bucket.starts_with(beginning).then_some(beginning.len()),
            // A whole name fits better than all beginnings of it.
            None => (self.bucket == bucket).then_some(usize::MAX),
        }
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        let bucket = &self.bucket;
        let refuse = |message: String| Err(invalid(KEY, message));
        let name = bucket.strip_suffix('*').unwrap_or(bucket);
        if bucket.is_empty() || bucket.len() > 255 || !name.bytes().all(is_of_bucket) {
            return refuse(format!(
                "bucket {bucket:?} is not valid; give the name of a bucket, or its beginning and *"
            ));
        }
        for (key, url) in [("endpoint", &self.endpoint), ("keys_instance", &self.keys_instance)] {
            if let Some(url) = url
                && !is_origin(url)
            {
                // The message does not show the text, because it may contain a secret.
                return refuse(format!(
                    "{key} of {bucket} is not valid; give http:// or https://, a host and a port: no user, path or query"
                ));
            }
        }
        if let Some(region) = &self.region
            && !is_region(region)
        {
            return refuse(format!("region of {bucket} is not valid; give one such as eu-central-1"));
        }
        match self.keys() {
            None => {
                return refuse(format!(
                    "{bucket} has several of keys_file, keys_command, keys_environment and keys_instance; give at most one"
                ));
            }
            Some(S3Keys::File(path)) => absolute(KEY, path)?,
            Some(S3Keys::Command(command)) => {
                let is_absolute = command.first().is_some_and(|program| program.starts_with('/'));
                if !is_absolute || command.iter().any(|word| word.contains('\0')) {
                    return refuse(format!(
                        "keys_command of {bucket} does not begin with the absolute path of a program, or has a NUL; correct it"
                    ));
                }
            }
            Some(S3Keys::Environment | S3Keys::Instance(_) | S3Keys::Anonymous) => {}
        }
        if self.profile.is_some() && self.keys_file.is_none() {
            return refuse(format!("profile of {bucket} is a section of keys_file; give that too"));
        }
        match self.renew {
            Some(renew) if !(Duration::from_secs(1)..=DAY).contains(&renew) => {
                refuse(format!("renew of {bucket} is out of bounds; give 1s to 1d"))
            }
            _ => Ok(()),
        }
    }
}

/// Whether a byte may be in the name of a bucket. Old buckets of Amazon, and those of other services, have capitals and
/// underscores.
pub fn is_of_bucket(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b".-_".contains(&byte)
}

/// Whether it can be the name of a region.
pub fn is_region(text: &str) -> bool {
    let is_of_region = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
    (1..=64).contains(&text.len()) && text.bytes().all(is_of_region)
}

/// Whether it is scheme, host and port of a web server.
fn is_origin(url: &str) -> bool {
    let rest = url.strip_prefix("http://").or_else(|| url.strip_prefix("https://"));
    rest.map(|rest| rest.strip_suffix('/').unwrap_or(rest)).is_some_and(|host| {
        !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-_:[]".contains(&byte))
    })
}
