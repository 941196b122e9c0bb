//! Keys of one entry of `[[http.s3]]`: reading them, and renewing them before they run out.
//!
//! What must hold: keys are read when a request needs them first, before they run out, after `renew`, and when a service
//! refuses them; once, however many requests wait for that. Requests go on with keys that have not run out while others are
//! read. Keys that cannot be renewed are used on: the service decides.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use parking_lot::Mutex;
use reqsign_aws_v4::{Credential, IMDSv2CredentialProvider};
use reqsign_core::time::Timestamp;
use reqsign_core::{Context, HttpSend, ProvideCredential};
use serde::Deserialize;
use tokio::time::Instant;

use crate::config::{S3Config, S3Keys};
use crate::source::http::{Credentials, Failure, Http, Secret, SecretName, SecretReading, Section};

/// Pause after keys could not be read: while there are none, and while there are old ones.
const AGAIN: Duration = Duration::from_secs(1);
const LATER: Duration = Duration::from_secs(10);
/// Keys are renewed so long before they run out, or a tenth of their time before, if that is shorter.
const BEFORE_END: Duration = Duration::from_secs(300);
/// How long the metadata service may take.
const INSTANCE_TIME: Duration = Duration::from_secs(5);

/// See the module.
pub(super) struct Keys {
    /// The buckets, for messages.
    name: String,
    source: Source,
    renew: Option<Duration>,
    held: Mutex<Option<Held>>,
    /// Held while keys are read, and in the pause after that failed. A request with keys that have not run out does not
    /// wait for it.
    reading: tokio::sync::Mutex<()>,
    /// Whether a task reads new keys while requests use the old ones.
    renewing: AtomicBool,
}

enum Source {
    /// The credential helper reads them.
    Helper { reader: Arc<dyn Credentials>, reading: SecretReading, number: usize, profile: String },
    /// The metadata service of this machine, at this URL.
    Instance(String),
}

#[derive(Clone)]
struct Held {
    keys: Lent,
    /// When to read them again.
    until: Option<Instant>,
    /// When they run out, where they say so.
    ends: Option<Instant>,
}

impl Held {
    fn is_due(&self) -> bool {
        self.until.is_some_and(|until| until <= Instant::now())
    }
}

/// Keys, with their generation.
#[derive(Clone)]
pub(super) struct Lent {
    pub keys: Arc<Credential>,
    generation: u64,
}

impl Keys {
    /// Of entry `number` of the configuration; none when its buckets are public.
    pub fn new(config: &S3Config, number: usize, reader: &Arc<dyn Credentials>) -> Option<Self> {
        let source = match config.keys()? {
            S3Keys::Anonymous => return None,
            S3Keys::Instance(url) => Source::Instance(url.trim_end_matches('/').to_owned()),
            S3Keys::File(_) | S3Keys::Command(_) | S3Keys::Environment => Source::Helper {
                reader: reader.clone(),
                reading: SecretReading::default(),
                number,
                profile: config.profile.clone().unwrap_or_else(|| "default".into()),
            },
        };
        let (name, renew) = (config.bucket.clone(), config.renew);
        let (held, reading) = (Mutex::default(), tokio::sync::Mutex::default());
        Some(Self { name, source, renew, held, reading, renewing: AtomicBool::new(false) })
    }

    /// The keys: those that are held, or new ones.
    pub async fn current(self: &Arc<Self>, http: &Http) -> Result<Lent, Failure> {
        if let Some(keys) = self.usable(http) {
            return Ok(keys);
        }
        let _reading = self.reading.lock().await;
        match self.read_if_due(&http.direct_client()).await {
            Ok(keys) => Ok(keys),
            Err(why) => {
                // All requests that need them wait, so they are not read more often.
                tokio::time::sleep(AGAIN).await;
                Err(Failure::again(format!("keys for buckets {}: {why}", self.name)))
            }
        }
    }

    /// The keys that are held, unless they ran out. When they are to be read again, a task does that, and requests go on
    /// with these meanwhile.
    fn usable(self: &Arc<Self>, http: &Http) -> Option<Lent> {
        let held = self.held.lock().clone()?;
        if held.is_due() {
            if held.ends.is_some_and(|ends| ends <= Instant::now()) {
                return None;
            }
            if !self.renewing.swap(true, Ordering::AcqRel) {
                tokio::spawn(self.clone().renew_early(http.direct_client()));
            }
        }
        Some(held.keys)
    }

    async fn renew_early(self: Arc<Self>, client: reqwest::Client) {
        {
            let _reading = self.reading.lock().await;
            // There are keys, so a failure is in the log, and these are used on.
            let _ = self.read_if_due(&client).await;
        }
        self.renewing.store(false, Ordering::Release);
    }

    /// New keys, or those that are held when they are not due, or no new ones can be read.
    async fn read_if_due(&self, client: &reqwest::Client) -> Result<Lent, String> {
        let old = self.held.lock().clone();
        if let Some(old) = old.as_ref().filter(|old| !old.is_due()) {
            return Ok(old.keys.clone());
        }
        let generation = old.as_ref().map_or(0, |old| old.keys.generation) + 1;
        match (self.read(client, generation).await, old) {
            (Ok(new), _) => Ok(self.held.lock().insert(new).keys.clone()),
            (Err(why), Some(mut old)) => {
                tracing::warn!(buckets = self.name, why, "keys cannot be renewed; the old ones are used");
                old.until = Some(Instant::now() + LATER);
                Ok(self.held.lock().insert(old).keys.clone())
            }
            (Err(why), None) => Err(why),
        }
    }

    /// Reads keys again that a service refused. Returns whether they differ now.
    pub async fn renew(&self, http: &Http, refused: &Lent) -> bool {
        let _reading = self.reading.lock().await;
        if self.held.lock().as_ref().is_some_and(|held| held.keys.generation != refused.generation) {
            return true;
        }
        match self.read(&http.direct_client(), refused.generation + 1).await {
            Ok(new) => {
                let (now, then) = (&new.keys.keys, &refused.keys);
                let differ = now.access_key_id != then.access_key_id
                    || now.secret_access_key != then.secret_access_key
                    || now.session_token != then.session_token;
                *self.held.lock() = Some(new);
                differ
            }
            Err(why) => {
                tracing::warn!(buckets = self.name, why, "keys that were refused cannot be renewed");
                false
            }
        }
    }

    async fn read(&self, client: &reqwest::Client, generation: u64) -> Result<Held, String> {
        let keys = match &self.source {
            Source::Helper { reader, reading, number, profile } => {
                let name = SecretName { section: Section::S3, number: *number };
                parse(&reading.get(reader, name).await?.1, profile)?
            }
            Source::Instance(url) => {
                // A new one each time: it keeps the token of its session for hours, which a machine that was restored or
                // moved has no use for.
                let provider = IMDSv2CredentialProvider::new().with_endpoint(url.as_str());
                let context = Context::new().with_http_send(Direct(client.clone()));
                let found = tokio::time::timeout(INSTANCE_TIME, provider.provide_credential(&context)).await;
                let text = "the metadata service of this machine";
                found
                    .map_err(|_| format!("{text} does not answer within {INSTANCE_TIME:?}"))?
                    .map_err(|error| format!("{text}: {}", brief(&error)))?
                    .ok_or_else(|| format!("{text} has none; give the machine a role"))?
            }
        };
        let now = SystemTime::now();
        let end = keys.expires_in.map(|end| end.as_system_time());
        let until = [self.renew, end.map(|end| renew_after(end, now))].into_iter().flatten().min();
        let until = until.and_then(|after| Instant::now().checked_add(after));
        let lasts = end.map(|end| end.duration_since(now).unwrap_or_default());
        let ends = lasts.and_then(|lasts| Instant::now().checked_add(lasts));
        // Whether keys are valid, the service decides.
        let keys = Arc::new(Credential { expires_in: None, ..keys });
        Ok(Held { keys: Lent { keys, generation }, until, ends })
    }
}

/// When keys that end at `end` are read again.
pub(super) fn renew_after(end: SystemTime, now: SystemTime) -> Duration {
    let lasts = end.duration_since(now).unwrap_or_default();
    lasts.saturating_sub(BEFORE_END.min(lasts / 10)).max(AGAIN)
}

/// The connections of the metadata service: without a proxy, which would ask its own machine.
#[derive(Debug)]
struct Direct(reqwest::Client);

impl HttpSend for Direct {
    async fn http_send(&self, request: http::Request<Bytes>) -> reqsign_core::Result<http::Response<Bytes>> {
        let failed =
            |error: reqwest::Error| reqsign_core::Error::unexpected(crate::source::http::words(&error));
        let (parts, body) = request.into_parts();
        let url = parts.uri.to_string();
        let sent = self.0.request(parts.method, url).headers(parts.headers).body(body).send();
        let mut response = sent.await.map_err(failed)?;
        let (status, mut bytes) = (response.status(), Vec::new());
        while let Some(chunk) = response.chunk().await.map_err(failed)? {
            if bytes.len() + chunk.len() > LONGEST {
                return Err(reqsign_core::Error::unexpected("the answer is too long"));
            }
            bytes.extend_from_slice(&chunk);
        }
        let answer = http::Response::builder().status(status).body(Bytes::from(bytes));
        answer.map_err(|_| reqsign_core::Error::unexpected("the answer is not HTTP"))
    }
}

/// The message of an error, which may repeat an answer.
fn brief(error: &reqsign_core::Error) -> String {
    error.to_string().chars().take(LONGEST_MESSAGE).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

const LONGEST_MESSAGE: usize = 300;

/// Most bytes of an answer of the metadata service.
const LONGEST: usize = 64 << 10;

/// What `credential_process` prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Printed {
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
    expiration: Option<String>,
}

/// Keys in one of the two forms of the AWS CLI: JSON, or sections with `name = value`.
pub(super) fn parse(secret: &Secret, profile: &str) -> Result<Credential, String> {
    let text = std::str::from_utf8(secret.bytes()).map_err(|_| "they are not text")?;
    let keys = if text.trim_start().starts_with('{') {
        // An error of the parser may repeat a part of the text.
        let printed: Printed = serde_json::from_str(text).map_err(
            |_| "they are no JSON with AccessKeyId and SecretAccessKey, as credential_process prints it",
        )?;
        let end = printed.expiration.map(|end| end.parse::<Timestamp>()).transpose();
        Credential {
            access_key_id: printed.access_key_id,
            secret_access_key: printed.secret_access_key,
            session_token: printed.session_token.filter(|token| !token.is_empty()),
            expires_in: end.map_err(|_| "their Expiration is no time such as 2026-01-31T12:00:00Z")?,
        }
    } else {
        of_section(text, profile)?
    };
    let is_token = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic());
    if !is_token(&keys.access_key_id)
        || !is_token(&keys.secret_access_key)
        || !keys.session_token.as_deref().is_none_or(is_token)
    {
        return Err("they are empty, or have white space or characters that are not ASCII".into());
    }
    Ok(keys)
}

fn of_section(text: &str, profile: &str) -> Result<Credential, String> {
    let (mut section, mut keys, mut found) = (None, Credential::default(), false);
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with(['#', ';'])) {
        if let Some(name) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            section = Some(name.trim());
            continue;
        }
        // Lines before all sections are of the default one.
        if section.unwrap_or("default") != profile {
            continue;
        }
        found = true;
        let Some((name, value)) = line.split_once('=') else {
            return Err("a line is not of the form name = value".into());
        };
        let value = value.trim().to_owned();
        match name.trim().to_ascii_lowercase().as_str() {
            "aws_access_key_id" => keys.access_key_id = value,
            "aws_secret_access_key" => keys.secret_access_key = value,
            "aws_session_token" => keys.session_token = Some(value).filter(|token| !token.is_empty()),
            _ => {}
        }
    }
    if !found {
        return Err(format!("they have no section [{profile}]"));
    }
    Ok(keys)
}
