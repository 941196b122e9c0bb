//! Credentials by URL: reading them, renewing them, and sending them only where they belong.
//!
//! What must hold:
//! - A secret is sent only to URLs in its scope, whatever redirects say (H6). No error, log line or `Debug` shows it.
//! - A secret is read when a request needs it first, when its time is over, and when a server refuses it. It is read
//!   once, however many requests wait for it. Requests go on with a secret whose time is over while it is read: the
//!   server decides.

#[cfg(test)]
mod tests;

use std::any::Any;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine as _};
use parking_lot::Mutex;
use reqwest::Url;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use zeroize::Zeroizing;

use super::Http;
use super::answer::Failure;
use super::authorise::{Authoriser, Grant, Job, Refusal, Remedy, Unsigned};
use super::url::{climbs, origin};
use crate::config::{CredentialSource, HttpConfig};

/// Pause after credentials could not be read.
const AGAIN: Duration = Duration::from_secs(1);
/// How long a request waits for a secret; longer than a program or keystone may take. A filesystem may hang for ever.
const LONGEST: Duration = Duration::from_secs(15);
/// How long a secret is of use that came after the request for it had given up.
const USEFUL: Duration = Duration::from_secs(30);

/// Secret bytes. They are never shown, and wiped when they are dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// The bytes, to be sent and never shown.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Secret(..)")
    }
}

/// Which part of the configuration names a secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Section {
    /// `[[http.credentials]]`.
    Http,
    /// `[[http.s3]]`.
    S3,
    /// `[[http.clouds]]`: a token, as [`Session`](crate::source::openstack::Session) in JSON.
    Cloud,
}

/// A secret that the configuration names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecretName {
    /// The part that names it.
    pub section: Section,
    /// Which entry of that part, counted from 0.
    pub number: usize,
}

/// Reads the secrets of the configuration.
pub trait Credentials: Send + Sync {
    /// The contents of the file of the entry, or the output of its command. May take some seconds; called on a thread
    /// that may wait.
    ///
    /// # Errors
    /// The cause, without secrets.
    fn get(&self, name: SecretName) -> Result<Secret, String>;
}

/// For a process without credentials.
#[derive(Clone, Copy, Debug)]
pub struct NoCredentials;

impl Credentials for NoCredentials {
    fn get(&self, _name: SecretName) -> Result<Secret, String> {
        Err("this process has no credentials".into())
    }
}

/// The reading of one secret, on a thread that may wait.
///
/// What must hold: it goes on when the request that began it gives up, and the next request takes over. Else a secret that
/// takes longer than a read may wait would never come, and each request would begin another reading.
#[derive(Default)]
pub(crate) struct Reading(tokio::sync::Mutex<Option<UnderWay>>);

struct UnderWay {
    since: Instant,
    task: JoinHandle<Result<Secret, String>>,
}

impl UnderWay {
    fn begin(reader: &Arc<dyn Credentials>, name: SecretName) -> Self {
        let reader = reader.clone();
        Self { since: Instant::now(), task: tokio::task::spawn_blocking(move || reader.get(name)) }
    }

    /// Whether a request may use it that did not begin it.
    fn is_of_use(&self) -> bool {
        !self.task.is_finished() || self.since.elapsed() < USEFUL
    }
}

impl Reading {
    /// The secret, and since when it is being read.
    pub async fn get(
        &self,
        reader: &Arc<dyn Credentials>,
        name: SecretName,
    ) -> Result<(Instant, Secret), String> {
        let mut under_way = self.0.lock().await;
        loop {
            let earlier = under_way.take_if(|earlier| earlier.is_of_use());
            let had_ended = earlier.as_ref().is_some_and(|earlier| earlier.task.is_finished());
            let now = under_way.insert(earlier.unwrap_or_else(|| UnderWay::begin(reader, name)));
            let since = now.since;
            let read = match timeout(LONGEST, &mut now.task).await {
                Ok(read) => read.unwrap_or_else(|_| Err("reading them panicked".into())),
                // It goes on: another one would hang, too.
                Err(_) => {
                    return Err(format!(
                        "they have not come for {LONGEST:?}; check the filesystem of their file"
                    ));
                }
            };
            *under_way = None;
            match read {
                // The failure that an earlier request did not wait for.
                Err(_) if had_ended => {}
                read => return read.map(|secret| (since, secret)),
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Bearer,
    Basic,
    Headers,
    /// A token, or header lines.
    Either,
}

/// All credentials of the configuration.
pub(super) struct Keyring(Vec<Arc<Configured>>);

/// A key, for requests to URLs in its scope.
struct Configured(Arc<Key>);

struct Key {
    reader: Arc<dyn Credentials>,
    number: usize,
    scope: Url,
    kind: Kind,
    renew: Option<Duration>,
    reading: Reading,
    held: Mutex<Option<CachedHeaders>>,
    /// Held while they are read, and in the pause after that failed. A request that has some does not wait for it.
    turn: tokio::sync::Mutex<()>,
    /// Whether a task reads new ones while requests use the old ones.
    renewing: AtomicBool,
}

#[derive(Clone)]
struct CachedHeaders {
    headers: HeaderMap,
    since: Instant,
    generation: u64,
}

/// Header lines for one request, with the generation of their credentials.
struct LentHeaders {
    headers: HeaderMap,
    generation: u64,
}

impl Keyring {
    /// Of the configuration, which refuses a scope that is no URL; such a scope would cover no URL.
    pub fn new(config: &HttpConfig, reader: &Arc<dyn Credentials>) -> Self {
        let keys = config.credentials.iter().enumerate().map(|(number, credential)| {
            let kind = match credential.source() {
                Some(CredentialSource::Bearer(_)) => Kind::Bearer,
                Some(CredentialSource::Basic(_)) => Kind::Basic,
                Some(CredentialSource::Headers(_)) => Kind::Headers,
                Some(CredentialSource::Command(_)) | None => Kind::Either,
            };
            let scope = Url::parse(&credential.url).unwrap_or_else(|_| nowhere());
            let (held, turn, renewing) =
                (Mutex::default(), tokio::sync::Mutex::default(), AtomicBool::new(false));
            let (reader, reading, renew) = (reader.clone(), Reading::default(), credential.renew);
            let key = Key { reader, number, scope, kind, renew, reading, held, turn, renewing };
            Arc::new(Configured(Arc::new(key)))
        });
        Self(keys.collect())
    }

    /// The authoriser with the longest scope that covers a URL.
    pub fn find(&self, url: &Url) -> Option<Arc<dyn Authoriser>> {
        let fitting = self.0.iter().filter(|key| key.covers(url));
        let longest = fitting.max_by_key(|key| key.0.scope.path().len())?;
        Some(longest.clone())
    }
}

impl Grant for LentHeaders {
    fn sign(&self, _request: &Unsigned<'_>) -> Result<HeaderMap, Failure> {
        Ok(self.headers.clone())
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

impl Authoriser for Configured {
    fn covers(&self, url: &Url) -> bool {
        covers(&self.0.scope, url)
    }

    fn lend<'a>(&'a self, _http: &'a Http, _url: &'a Url) -> Job<'a, Result<Box<dyn Grant>, Failure>> {
        Box::pin(async move {
            let CachedHeaders { headers, generation, .. } = self.0.current().await?;
            Ok(Box::new(LentHeaders { headers, generation }) as Box<dyn Grant>)
        })
    }

    fn refused<'a>(&'a self, _http: &'a Http, grant: &'a dyn Grant, refusal: Refusal<'a>) -> Job<'a, Remedy> {
        Box::pin(async move {
            let failure = refusal.failure.clone();
            let lent = grant.as_any().downcast_ref::<LentHeaders>();
            let Some(lent) = lent.filter(|_| matches!(refusal.status, 401 | 403)) else {
                return Remedy::Fails(failure);
            };
            if self.0.renew(lent).await { Remedy::Renewed(failure) } else { Remedy::Fails(failure) }
        })
    }
}

impl Key {
    /// The header lines: those that are held, or new ones.
    async fn current(self: &Arc<Self>) -> Result<CachedHeaders, Failure> {
        if let Some(held) = self.usable() {
            return Ok(held);
        }
        let _turn = self.turn.lock().await;
        if let Some(held) = self.usable() {
            return Ok(held);
        }
        match self.read(0).await {
            Ok(new) => Ok(self.held.lock().insert(new).clone()),
            Err(why) => {
                // All requests that need them wait, so they are not read more often.
                tokio::time::sleep(AGAIN).await;
                Err(Failure::again(format!("credentials for {}: {why}", self.scope)))
            }
        }
    }

    fn is_due(&self, held: &CachedHeaders) -> bool {
        self.renew.is_some_and(|renew| held.since.elapsed() >= renew)
    }

    /// The header lines that are held. When their time is over, a task reads new ones, and requests go on with these
    /// meanwhile.
    fn usable(self: &Arc<Self>) -> Option<CachedHeaders> {
        let held = self.held.lock().clone()?;
        if self.is_due(&held) && !self.renewing.swap(true, Ordering::AcqRel) {
            tokio::spawn(self.clone().renew_early());
        }
        Some(held)
    }

    async fn renew_early(self: Arc<Self>) {
        {
            let _turn = self.turn.lock().await;
            let due = self.held.lock().clone().filter(|held| self.is_due(held));
            if let Some(old) = due {
                let read = self.read(old.generation).await;
                let mut held = self.held.lock();
                match read {
                    Ok(new) => *held = Some(new),
                    // The old ones may still be valid; the server decides.
                    Err(why) => {
                        tracing::warn!(url = %self.scope, why, "credentials cannot be renewed; the old ones are used");
                        *held = Some(CachedHeaders { since: Instant::now(), ..old });
                    }
                }
            }
        }
        self.renewing.store(false, Ordering::Release);
    }

    /// Reads credentials again that a server refused. Returns whether they differ now.
    async fn renew(&self, lent: &LentHeaders) -> bool {
        let _turn = self.turn.lock().await;
        if self.held.lock().as_ref().is_some_and(|held| held.generation != lent.generation) {
            return true;
        }
        match self.read(lent.generation).await {
            Ok(new) => {
                let differ = new.headers != lent.headers;
                *self.held.lock() = Some(new);
                differ
            }
            Err(why) => {
                tracing::warn!(url = %self.scope, why, "credentials that were refused cannot be renewed");
                false
            }
        }
    }

    async fn read(&self, generation: u64) -> Result<CachedHeaders, String> {
        let name = SecretName { section: Section::Http, number: self.number };
        let (_, secret) = self.reading.get(&self.reader, name).await?;
        let headers = headers(self.kind, &secret)?;
        // Not since it was begun: a program may take longer than `renew`.
        Ok(CachedHeaders { headers, since: Instant::now(), generation: generation + 1 })
    }
}

fn nowhere() -> Url {
    // No source has this scheme.
    Url::parse("none:").unwrap_or_else(|_| unreachable!("a constant"))
}

/// Whether a URL lies in a scope, by whole segments of the path.
fn covers(scope: &Url, url: &Url) -> bool {
    let Some(rest) = url.path().strip_prefix(scope.path()) else { return false };
    origin(scope) == origin(url)
        && (rest.is_empty() || scope.path().ends_with('/') || rest.starts_with('/'))
        // A server may decode a slash and leave the scope through the parent directory.
        && !climbs(url.path())
}

/// Header lines that describe the request. Credentials must not set them.
const RESERVED: [&str; 18] = [
    "accept-encoding",
    "connection",
    "content-encoding",
    "content-length",
    "content-type",
    "expect",
    "host",
    "if-match",
    "if-modified-since",
    "if-none-match",
    "if-range",
    "if-unmodified-since",
    "keep-alive",
    "range",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

fn headers(kind: Kind, secret: &Secret) -> Result<HeaderMap, String> {
    let text = std::str::from_utf8(secret.bytes()).map_err(|_| "they are not text")?;
    let mut headers = HeaderMap::new();
    let mut set = |name: HeaderName, value: &str| -> Result<(), String> {
        let mut value =
            HeaderValue::from_str(value).map_err(|_| "they have characters that no header may have")?;
        value.set_sensitive(true);
        headers.append(name, value);
        Ok(())
    };
    let trimmed = text.trim();
    if trimmed.is_empty() {
        return Err("they are empty".into());
    }
    let one_line = !trimmed.contains(['\r', '\n']);
    match kind {
        Kind::Bearer | Kind::Basic if !one_line => return Err("they are more than one line".into()),
        Kind::Bearer => set(AUTHORIZATION, &Zeroizing::new(format!("Bearer {trimmed}")))?,
        Kind::Basic => match trimmed.split_once(':') {
            Some((user, password)) => set(AUTHORIZATION, &basic(user, password))?,
            None => return Err("they are not of the form user:password".into()),
        },
        // A token has no colons and no blanks (RFC 6750).
        Kind::Either if one_line && !trimmed.contains([':', ' ', '\t']) => {
            set(AUTHORIZATION, &Zeroizing::new(format!("Bearer {trimmed}")))?;
        }
        Kind::Headers | Kind::Either => {
            for line in trimmed.lines().map(str::trim).filter(|line| !line.is_empty()) {
                let pair = line.split_once(':').map(|(name, value)| (name.trim(), value.trim()));
                let Some((name, value)) = pair else {
                    return Err("a line is not of the form Name: value".into());
                };
                let Ok(name) = HeaderName::from_bytes(name.as_bytes()) else {
                    return Err("a line has no valid name of a header".into());
                };
                if RESERVED.contains(&name.as_str()) {
                    return Err(format!("they must not set the header {name}"));
                }
                set(name, value)?;
            }
        }
    }
    Ok(headers)
}

/// The value of a header line, RFC 7617.
pub(super) fn basic(user: &str, password: &str) -> Zeroizing<String> {
    let pair = Zeroizing::new(format!("{user}:{password}"));
    // All of it at once: a string that grows leaves copies behind.
    let mut value = Zeroizing::new(String::with_capacity("Basic ".len() + pair.len().div_ceil(3) * 4));
    value.push_str("Basic ");
    BASE64_STANDARD.encode_string(pair.as_bytes(), &mut value);
    value
}
