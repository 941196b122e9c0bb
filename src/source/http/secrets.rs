//! Who we are: credentials by URL, where they come from, and that they go nowhere else.
//!
//! What must hold:
//! - A secret is sent to URLs in its scope only, whatever redirects say (H6). It is in no error, no log and no `Debug`.
//! - It is asked for when it is needed first, when its time is over, and when a server refuses it; once, however many
//!   requests wait for it.

#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Url;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::answer::Failure;
use super::url::origin;
use crate::config::{CredentialSource, HttpConfig};

/// Pause after credentials could not be read.
const AGAIN: Duration = Duration::from_secs(1);

/// Bytes that nobody may see. Wiped when they are dropped.
#[derive(Clone)]
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// To be passed on, not to be shown.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Secret(..)")
    }
}

/// Somebody who can read the credentials of the configuration.
pub trait Credentials: Send + Sync {
    /// What the file of `[[http.credentials]]` number `number`, from 0, contains, or its command prints. May take some
    /// seconds; called on a thread that may wait.
    ///
    /// # Errors
    /// Why not, without anything secret.
    fn get(&self, number: usize) -> Result<Secret, String>;
}

/// Where there are none.
#[derive(Clone, Copy, Debug)]
pub struct NoCredentials;

impl Credentials for NoCredentials {
    fn get(&self, _number: usize) -> Result<Secret, String> {
        Err("this process has no credentials".into())
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
pub(super) struct Keyring {
    reader: Arc<dyn Credentials>,
    keys: Vec<Key>,
}

struct Key {
    scope: Url,
    kind: Kind,
    renew: Option<Duration>,
    held: tokio::sync::Mutex<Option<Held>>,
}

#[derive(Clone)]
struct Held {
    headers: HeaderMap,
    since: Instant,
    generation: u64,
}

/// Header lines for one request, and which edition of which credentials they are.
pub(super) struct Lent {
    pub headers: HeaderMap,
    number: usize,
    generation: u64,
}

impl Keyring {
    /// A scope that is no URL is a mistake that the configuration does not let through; nothing is sent to it.
    pub fn new(config: &HttpConfig, reader: Arc<dyn Credentials>) -> Self {
        let keys = config.credentials.iter().map(|credential| {
            let kind = match credential.source() {
                Some(CredentialSource::Bearer(_)) => Kind::Bearer,
                Some(CredentialSource::Basic(_)) => Kind::Basic,
                Some(CredentialSource::Headers(_)) => Kind::Headers,
                Some(CredentialSource::Command(_)) | None => Kind::Either,
            };
            let scope = Url::parse(&credential.url).unwrap_or_else(|_| nowhere());
            Key { scope, kind, renew: credential.renew, held: tokio::sync::Mutex::new(None) }
        });
        Self { reader, keys: keys.collect() }
    }

    fn number_for(&self, url: &Url) -> Option<usize> {
        let fitting = self.keys.iter().enumerate().filter(|(_, key)| covers(&key.scope, url));
        fitting.max_by_key(|(_, key)| key.scope.path().len()).map(|(number, _)| number)
    }

    /// What to send to this URL, if anything.
    pub async fn lend(&self, url: &Url) -> Result<Option<Lent>, Failure> {
        let Some(number) = self.number_for(url) else { return Ok(None) };
        let key = &self.keys[number];
        let mut held = key.held.lock().await;
        let fresh = |held: &Held| key.renew.is_none_or(|renew| held.since.elapsed() < renew);
        if !held.as_ref().is_some_and(fresh) {
            match self.read(number, held.as_ref().map_or(0, |held| held.generation)).await {
                Ok(new) => *held = Some(new),
                // What there is may still be good; the server knows.
                Err(why) if held.is_some() => {
                    tracing::warn!(url = %key.scope, why, "credentials cannot be renewed; the old ones are used");
                    if let Some(held) = held.as_mut() {
                        held.since = Instant::now();
                    }
                }
                Err(why) => {
                    // With the lock: all who need them wait for this one, and nobody asks faster.
                    tokio::time::sleep(AGAIN).await;
                    return Err(Failure::again(format!("credentials for {}: {why}", key.scope)));
                }
            }
        }
        Ok(held.as_ref().map(|Held { headers, generation, .. }| Lent {
            headers: headers.clone(),
            number,
            generation: *generation,
        }))
    }

    /// A server refused them. Whether there are others now.
    pub async fn renew(&self, lent: &Lent) -> bool {
        let key = &self.keys[lent.number];
        let mut held = key.held.lock().await;
        if held.as_ref().is_some_and(|held| held.generation != lent.generation) {
            return true;
        }
        match self.read(lent.number, lent.generation).await {
            Ok(new) => {
                let differ = new.headers != lent.headers;
                *held = Some(new);
                differ
            }
            Err(why) => {
                tracing::warn!(url = %key.scope, why, "credentials that were refused cannot be renewed");
                false
            }
        }
    }

    async fn read(&self, number: usize, generation: u64) -> Result<Held, String> {
        let reader = self.reader.clone();
        let secret = tokio::task::spawn_blocking(move || reader.get(number))
            .await
            .unwrap_or_else(|_| Err("reading them panicked".into()))?;
        let headers = headers(self.keys[number].kind, &secret)?;
        Ok(Held { headers, since: Instant::now(), generation: generation + 1 })
    }
}

fn nowhere() -> Url {
    // A scheme of no source.
    Url::parse("none:").unwrap_or_else(|_| unreachable!("a constant"))
}

/// Whether a URL lies in a scope, by whole segments of the path.
fn covers(scope: &Url, url: &Url) -> bool {
    let Some(rest) = url.path().strip_prefix(scope.path()) else { return false };
    origin(scope) == origin(url)
        && (rest.is_empty() || scope.path().ends_with('/') || rest.starts_with('/'))
        // A server may take an encoded slash for a slash, and go up.
        && !url.path().to_ascii_lowercase().contains("..%2f")
}

/// Header lines that say what is asked for are not for credentials to change.
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
            HeaderValue::from_str(value).map_err(|_| "they have characters that no header can have")?;
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
        // A token has neither colons nor blanks (RFC 6750).
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
                    return Err("a name of a header is none".into());
                };
                if RESERVED.contains(&name.as_str()) {
                    return Err(format!("the header {name} is not theirs to set"));
                }
                set(name, value)?;
            }
        }
    }
    Ok(headers)
}

pub(super) fn basic(user: &str, password: &str) -> Zeroizing<String> {
    let pair = Zeroizing::new(format!("{user}:{password}"));
    Zeroizing::new(format!("Basic {}", *base64(pair.as_bytes())))
}

/// RFC 4648.
fn base64(bytes: &[u8]) -> Zeroizing<String> {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut out = Zeroizing::new(String::with_capacity(bytes.len().div_ceil(3) * 4));
    for group in bytes.chunks(3) {
        let word = group.iter().fold(0, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let index = (word >> (18 - 6 * digit) & 63) as usize;
            out.push(if digit <= group.len() { char::from(DIGITS[index]) } else { '=' });
        }
    }
    out
}
