//! Clouds of OpenStack: their tokens, which authorise requests, and where their services are.
//!
//! What must hold:
//! - A token is got by the credential helper alone, which knows the password ([`Http::token`] runs there). A worker holds
//!   tokens, which end.
//! - A token goes to the services of its own cloud and to no other server, whatever records and redirects say (H6).
//! - A token is renewed before it ends (H13), while requests go on with the old one. It is renewed at once when a service refuses
//!   it. However many requests wait, keystone gets one.

#[cfg(test)]
mod tests;

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{StatusCode, Url};
use tokio::time::{Instant, timeout};

use super::address::{Reach, Zone, host_not_public, not_public};
use super::answer::{Failure, text};
use super::authorise::{Authoriser, Grant, Job, Refusal, Remedy, Unsigned};
use super::secrets::{Credentials, Reading, SecretName, Section};
use super::url::{origin, server};
use super::{Http, tls, words};
use crate::config::{CloudConfig, LocationKind};
use crate::source::openstack::{Cloud, Endpoint, Session};

/// How long keystone may take.
const TIMEOUT: Duration = Duration::from_secs(8);
/// Longest answer of keystone. A catalog of many regions has some 100 KiB.
const MAX_ANSWER: usize = 4 << 20;
/// Pause after a token could not be got, and the shortest time between two requests for tokens.
const AGAIN: Duration = Duration::from_secs(1);

/// A service of a cloud.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Service {
    Image,
    ObjectStore,
}

/// All clouds of the configuration.
pub(crate) struct Clouds(Vec<Arc<CloudTokens>>);

/// The tokens of one cloud.
pub(super) struct CloudTokens {
    name: String,
    number: usize,
    /// Where the data of images may be read besides Glance.
    pub locations: Vec<LocationKind>,
    reader: Arc<dyn Credentials>,
    reading: Reading,
    held: parking_lot::Mutex<Option<Held>>,
    /// Held while keystone is asked, and in the pause after it failed. A request with a valid token does not wait for it.
    asking: tokio::sync::Mutex<()>,
    /// The origins of the services, as the last session says.
    origins: parking_lot::Mutex<Vec<String>>,
    renewing: AtomicBool,
}

#[derive(Clone)]
struct Held {
    session: Arc<Session>,
    since: Instant,
    generation: u64,
}

impl Held {
    fn ends(&self) -> Instant {
        self.since + self.session.life
    }

    /// When a fifth of its time is left.
    fn renews(&self) -> Instant {
        self.since + self.session.life * 4 / 5
    }
}

/// A token for one request.
struct LentToken(Held);

impl Clouds {
    pub fn new(clouds: &[CloudConfig], reader: &Arc<dyn Credentials>) -> Self {
        let tokens = |(number, cloud): (usize, &CloudConfig)| {
            Arc::new(CloudTokens {
                name: cloud.name.clone(),
                number,
                locations: cloud.locations.clone(),
                reader: reader.clone(),
                reading: Reading::default(),
                held: parking_lot::Mutex::default(),
                asking: tokio::sync::Mutex::default(),
                origins: parking_lot::Mutex::default(),
                renewing: AtomicBool::new(false),
            })
        };
        Self(clouds.iter().enumerate().map(tokens).collect())
    }

    /// The cloud of this name; else why there is none.
    pub(super) fn find(&self, name: &str) -> Result<Arc<CloudTokens>, String> {
        self.0.iter().find(|cloud| cloud.name == name).cloned().ok_or_else(|| {
            let known: Vec<&str> = self.0.iter().map(|cloud| cloud.name.as_str()).collect();
            let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
            format!("the configuration has no cloud {name} (it has: {known}); name it in [[http.clouds]] and restart")
        })
    }
}

impl CloudTokens {
    /// Where a service of the cloud is, and where its address may lie.
    pub(super) async fn endpoint(
        self: &Arc<Self>,
        http: &Http,
        service: Service,
    ) -> Result<(String, Reach), Failure> {
        let held = self.current().await?;
        let found = match service {
            Service::Image => &held.session.image,
            Service::ObjectStore => &held.session.object_store,
        };
        let fail = |why: &str| Failure::again(format!("cloud {}: {why}", self.name));
        let Endpoint { url: text, anywhere } = found.as_ref().map_err(|why| fail(why))?;
        let url = Url::parse(text).map_err(|_| fail("its endpoint is not a URL"))?;
        let reach = match anywhere {
            _ if http.allow.has_host(&url) => Reach::Anywhere,
            // But no link-local address.
            true => Reach::From(Zone::Loopback),
            false => Reach::From(Zone::Public),
        };
        // Before the token is sent. A name is judged when it is resolved.
        match reach.refused(host_not_public(&url)) {
            None => Ok((text.clone(), reach)),
            Some(range) => Err(fail(&format!(
                "its catalog leads to {}, where keystone may not lead ({range}); name it in [http] allow if it is right",
                server(&url)
            ))),
        }
    }

    /// The session that is held, while it is valid.
    fn valid(self: &Arc<Self>) -> Option<Held> {
        let now = Instant::now();
        let held = self.held.lock().clone().filter(|held| now < held.ends())?;
        if now >= held.renews() && !self.renewing.swap(true, Ordering::AcqRel) {
            // Requests go on with the old token meanwhile.
            tokio::spawn(self.clone().renew_early(held.clone()));
        }
        Some(held)
    }

    /// A valid session: the one that is held, or a new one.
    async fn current(self: &Arc<Self>) -> Result<Held, Failure> {
        if let Some(held) = self.valid() {
            return Ok(held);
        }
        let _asking = self.asking.lock().await;
        if let Some(held) = self.valid() {
            return Ok(held);
        }
        let old = self.held.lock().clone();
        if let Some(old) = &old {
            // A token that ends at once.
            tokio::time::sleep_until(old.since + AGAIN).await;
        }
        match self.get(old.as_ref()).await {
            Ok(new) => Ok(self.held.lock().insert(new).clone()),
            Err(why) => {
                // All requests that need a token wait, so keystone is not asked more often.
                tokio::time::sleep(AGAIN).await;
                Err(Failure::again(format!("a token of cloud {}: {why}", self.name)))
            }
        }
    }

    async fn renew_early(self: Arc<Self>, old: Held) {
        {
            let _asking = self.asking.lock().await;
            if self.holds(&old) {
                match self.get(Some(&old)).await {
                    Ok(new) => *self.held.lock() = Some(new),
                    Err(why) => {
                        tracing::warn!(
                            cloud = self.name,
                            why,
                            "a token cannot be renewed; the old one is used"
                        );
                        tokio::time::sleep(AGAIN).await;
                    }
                }
            }
        }
        self.renewing.store(false, Ordering::Release);
    }

    /// Whether no other session came since.
    fn holds(&self, session: &Held) -> bool {
        self.held.lock().as_ref().is_none_or(|held| held.generation == session.generation)
    }

    /// Gets a new session in place of one that a service refused. Returns whether there is another token now.
    async fn renew(&self, refused: &Held) -> Result<bool, Failure> {
        let _asking = self.asking.lock().await;
        if !self.holds(refused) {
            return Ok(true);
        }
        if refused.since.elapsed() < AGAIN {
            // A token that is refused when it is new: another one would be refused too.
            return Ok(false);
        }
        match self.get(Some(refused)).await {
            Ok(new) => {
                *self.held.lock() = Some(new);
                Ok(true)
            }
            Err(why) => {
                // As in `current`.
                tokio::time::sleep(AGAIN).await;
                let name = &self.name;
                Err(Failure::again(format!(
                    "a token of cloud {name} was refused (401), and a new one: {why}"
                )))
            }
        }
    }

    async fn get(&self, old: Option<&Held>) -> Result<Held, String> {
        let name = SecretName { section: Section::Cloud, number: self.number };
        let (since, secret) = self.reading.get(&self.reader, name).await?;
        let session: Session =
            serde_json::from_slice(secret.bytes()).map_err(|_| "it is of another version".to_owned())?;
        let places = [&session.image, &session.object_store];
        let places = places.into_iter().flatten().filter_map(|endpoint| Url::parse(&endpoint.url).ok());
        *self.origins.lock() = places.map(|url| origin(&url)).collect();
        let generation = old.map_or(0, |old| old.generation) + 1;
        Ok(Held { session: Arc::new(session), since, generation })
    }
}

impl Grant for LentToken {
    fn sign(&self, _request: &Unsigned<'_>) -> Result<HeaderMap, Failure> {
        let mut value = HeaderValue::from_str(&self.0.session.token)
            .map_err(|_| Failure::again("keystone's token has characters that no header may have"))?;
        value.set_sensitive(true);
        Ok(HeaderMap::from_iter([(HeaderName::from_static("x-auth-token"), value)]))
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

/// The tokens of a cloud for requests to its services.
pub(super) struct CloudAuthoriser(pub Arc<CloudTokens>);

impl Authoriser for CloudAuthoriser {
    fn covers(&self, url: &Url) -> bool {
        self.0.origins.lock().contains(&origin(url))
    }

    fn lend<'a>(&'a self, _http: &'a Http, _url: &'a Url) -> Job<'a, Result<Box<dyn Grant>, Failure>> {
        Box::pin(async move { Ok(Box::new(LentToken(self.0.current().await?)) as Box<dyn Grant>) })
    }

    fn refused<'a>(&'a self, _http: &'a Http, grant: &'a dyn Grant, refusal: Refusal<'a>) -> Job<'a, Remedy> {
        Box::pin(async move {
            if let (401, Some(LentToken(held))) = (refusal.status, grant.as_any().downcast_ref::<LentToken>())
            {
                match self.0.renew(held).await {
                    Ok(true) => return Remedy::Renewed(refusal.failure.clone()),
                    Ok(false) => {}
                    Err(failure) => return Remedy::Fails(failure),
                }
            }
            Remedy::Fails(refusal.failure.clone())
        })
    }
}

impl Http {
    /// Asks keystone for a token. For the process that may know the password.
    ///
    /// # Errors
    /// The cause, without secrets.
    pub async fn token(&self, cloud: &Cloud) -> Result<Session, String> {
        if let Some(problem) = &self.problem {
            return Err(problem.clone());
        }
        let keystone = format!("keystone at {}", server(&cloud.tokens));
        match timeout(TIMEOUT, self.ask_keystone(cloud)).await {
            Ok(answer) => answer.map_err(|why| format!("{keystone}: {why}")),
            Err(_) => Err(format!("{keystone}: it does not answer within {TIMEOUT:?}")),
        }
    }

    async fn ask_keystone(&self, cloud: &Cloud) -> Result<Session, String> {
        let url = &cloud.tokens;
        let request = self.clients.choose(url, Reach::Anywhere).post(url.clone());
        let request =
            request.header(CONTENT_TYPE, "application/json").body(cloud.request.as_bytes().to_vec());
        let mut response = request.send().await.map_err(|error| match tls::problem(&error) {
            Some(problem) => format!("{}; {}", problem.why(&server(url)), problem.advice()),
            None => words(&error),
        })?;
        match response.status() {
            StatusCode::OK | StatusCode::CREATED => {}
            StatusCode::UNAUTHORIZED => {
                return Err(
                    "it refuses the user, password or secret of clouds.yaml (401); correct them".into()
                );
            }
            StatusCode::FORBIDDEN => {
                return Err("it forbids a token for this project or scope (403); correct clouds.yaml".into());
            }
            status if status.is_redirection() => {
                return Err(format!(
                    "it redirects ({}); give the URL where it leads as auth_url",
                    status.as_u16()
                ));
            }
            status => return Err(format!("it answers {status} to a request for a token")),
        }
        let inside = match response.remote_addr() {
            Some(address) if !self.clients.is_proxied(url) => not_public(address.ip()).is_some(),
            _ => host_not_public(url).is_some(),
        };
        let token = text(response.headers(), HeaderName::from_static("x-subject-token"))
            .unwrap_or_default()
            .to_owned();
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|error| words(&error))? {
            body.extend_from_slice(&chunk);
            if body.len() > MAX_ANSWER {
                return Err(format!("its answer has more than {MAX_ANSWER} bytes"));
            }
        }
        Session::of_answer(cloud, &token, &body, inside)
    }
}
