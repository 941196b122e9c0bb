//! Registries of OCI artifacts: their tokens, and which blob a tag leads to.
//!
//! What must hold:
//! - A tag is resolved once, when a base is added. What is registered is the digest of a blob, whose bytes are the same for
//!   ever; the manifest is compared with the digest that led to it.
//! - A registry names where its tokens are. That place is judged as the target of a redirect is (H9), and gets the
//!   credentials that the configuration has for it, and no others. A token goes to the registry alone (H6): the stores that
//!   registries redirect to get none.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, Response, StatusCode, Url};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use tokio::time::{Instant, timeout};

use super::address::{Reach, Zone, host_not_public, not_public};
use super::answer::Failure;
use super::authorise::{Authoriser, Grant, Job, Located, Refusal, Remedy, Unsigned};
use super::glance::refused;
use super::mirror::{Mirror, next_hop, peer_is_allowed};
use super::url::{origin, server};
use super::{Http, HttpSource, RemoteOptions, failed, shown, words};
use crate::format::record::{BaseIdentity, Strictness};
use crate::source::oci::{ACCEPTED, Disk, Manifest, Place, Reference, disk};
use crate::source::{HttpIdentity, OciIdentity, SourceError, SourceErrorKind};

/// Longest manifest, of the specification, and longest answer with a token.
const MAX_ANSWER: usize = 4 << 20;
/// How long a token holds whose end is not said.
const LIFE: u64 = 60;
/// The shortest time between two requests for tokens.
const AGAIN: Duration = Duration::from_secs(1);

/// An artifact of a new base.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbedArtifact {
    /// What to register.
    pub identity: BaseIdentity,
    /// The first bytes.
    pub head: Vec<u8>,
    /// Its URL, by the digest of its manifest.
    pub url: String,
}

/// Checks that a URL can be that of an artifact.
///
/// # Errors
/// `Protocol`, with the mistake.
pub fn check_artifact_url(text: &str) -> Result<(), SourceError> {
    place_of(text).map(drop)
}

fn refuse(text: &str, why: impl Into<String>) -> SourceError {
    let advice = "write oci://REGISTRY/REPOSITORY:TAG or oci://REGISTRY/REPOSITORY@sha256:DIGEST";
    SourceError::remote(SourceErrorKind::Protocol, "use", shown(text), why, advice)
}

fn place_of(text: &str) -> Result<Place, SourceError> {
    Place::parse(text).unwrap_or(Err("it is no URL of an artifact")).map_err(|why| refuse(text, why))
}

/// Where the blob of an artifact is. `digest` is that of the blob, when it is known.
pub(in crate::source) fn locate(text: &str, digest: Option<&str>) -> Result<Located, SourceError> {
    let place = place_of(text)?;
    let url = match digest {
        Some(digest) => place.blob(digest),
        None => place.manifest(&place.reference),
    };
    let url = Url::parse(&url).map_err(|_| refuse(text, "it is not a URL"))?;
    let authoriser = Some(Registry::new(&place, &url) as Arc<dyn Authoriser>);
    Ok(Located { shown: shown(text), url, authoriser })
}

/// The tokens for one repository of a registry.
struct Registry {
    origin: String,
    repository: String,
    held: tokio::sync::Mutex<Option<Held>>,
}

#[derive(Clone)]
struct Held {
    value: HeaderValue,
    since: Instant,
    life: Duration,
    generation: u64,
}

/// What a request is sent with. Generation 0: without a token.
struct Lent {
    headers: HeaderMap,
    generation: u64,
}

impl Grant for Lent {
    fn sign(&self, _request: &Unsigned<'_>) -> Result<HeaderMap, Failure> {
        Ok(self.headers.clone())
    }

    fn as_any(&self) -> &(dyn Any + Send + Sync) {
        self
    }
}

/// Where a registry is; one with any public address is public.
async fn zone_of(http: &Http, registry: &Url) -> Zone {
    let range = host_not_public(registry);
    if range.is_some() || http.clients.is_proxied(registry) {
        return Zone::of(range);
    }
    let all = http.addresses(registry.host_str().unwrap_or_default()).await.unwrap_or_default();
    let mut zones = all.into_iter().map(|address| Zone::of(not_public(address)));
    let first = zones.next().unwrap_or(Zone::Public);
    if zones.any(|zone| zone == Zone::Public) { Zone::Public } else { first }
}

/// The header lines that the configuration has for a URL.
async fn configured(http: &Http, url: &Url) -> Result<HeaderMap, Failure> {
    match http.keyring.find(url) {
        Some(authoriser) => {
            let grant = authoriser.lend(http, url).await?;
            grant.sign(&Unsigned { method: &Method::GET, url })
        }
        None => Ok(HeaderMap::new()),
    }
}

#[derive(Deserialize)]
struct TokenText {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Registry {
    fn new(place: &Place, url: &Url) -> Arc<Self> {
        let (origin, repository) = (origin(url), place.repository.clone());
        Arc::new(Self { origin, repository, held: tokio::sync::Mutex::default() })
    }

    /// Gets a token from where the registry says.
    async fn token(
        &self,
        http: &Http,
        registry: &Url,
        challenge: &Challenge,
    ) -> Result<(HeaderValue, u64), Failure> {
        let from = Reach::From(zone_of(http, registry).await);
        let target = next_hop(http, registry, &challenge.realm, from)?;
        let (mut url, reach) = (target.url, target.reach);
        if let Some(service) = &challenge.service {
            url.query_pairs_mut().append_pair("service", service);
        }
        url.query_pairs_mut().append_pair("scope", &format!("repository:{}:pull", self.repository));
        let headers = configured(http, &url).await?;
        let response = send(http, &url, reach, headers).await?;
        let status = response.status();
        let place = server(&url);
        let body = body(http, response).await?;
        match status {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                return Err(Failure::Denied {
                    status: status.as_u16(),
                    why: format!("{place} gives no token for it ({})", status.as_u16()),
                    advice: Some(CREDENTIALS),
                });
            }
            status => {
                return Err(Failure::again(format!("{place} answers {status} to a request for a token")));
            }
        }
        let none = || Failure::Protocol(format!("{place} answers without a token"));
        let text: TokenText = serde_json::from_slice(&body).map_err(|_| none())?;
        let token = text.token.or(text.access_token).filter(|token| !token.is_empty()).ok_or_else(none)?;
        let mut value = HeaderValue::from_str(&format!("Bearer {token}")).map_err(|_| none())?;
        value.set_sensitive(true);
        Ok((value, text.expires_in.unwrap_or(LIFE).max(1)))
    }

    /// Gets a token in place of the one with this generation, or of none. Returns whether there is another one now.
    async fn renew(
        &self,
        http: &Http,
        url: &Url,
        challenge: &Challenge,
        refused: u64,
    ) -> Result<bool, Failure> {
        let mut held = self.held.lock().await;
        let (generation, is_new) =
            held.as_ref().map_or((0, false), |held| (held.generation, held.since.elapsed() < AGAIN));
        if generation != refused {
            return Ok(true);
        }
        if is_new {
            return Ok(false);
        }
        match self.token(http, url, challenge).await {
            Ok((value, life)) => {
                let (since, life) = (Instant::now(), Duration::from_secs(life));
                *held = Some(Held { value, since, life, generation: generation + 1 });
                Ok(true)
            }
            Err(failure) => {
                // With the lock held: all requests that need a token wait, so there are not more of these.
                tokio::time::sleep(AGAIN).await;
                Err(failure)
            }
        }
    }

    /// The manifest that a reference leads to, and its digest.
    async fn manifest(
        &self,
        http: &Http,
        place: &Place,
        reference: &Reference,
    ) -> Result<(Vec<u8>, String), Failure> {
        let url = Url::parse(&place.manifest(reference))
            .map_err(|_| Failure::Protocol("it is not a URL".into()))?;
        let mut renewed = false;
        loop {
            let grant = self.lend(http, &url).await?;
            let mut headers = grant.sign(&Unsigned { method: &Method::GET, url: &url })?;
            headers.insert(ACCEPT, HeaderValue::from_static(ACCEPTED));
            let response = send(http, &url, Reach::Anywhere, headers).await?;
            let (status, answered) = (response.status(), response.headers().clone());
            let text = body(http, response).await?;
            if status == StatusCode::OK {
                let digest = format!("sha256:{}", hex::encode(Sha256::digest(&text)));
                return match reference {
                    Reference::Digest(wanted) if *wanted != digest => Err(Failure::Protocol(format!(
                        "the registry answers with a manifest whose digest is {digest}, not {wanted}"
                    ))),
                    _ => Ok((text, digest)),
                };
            }
            let failure = match status {
                StatusCode::NOT_FOUND => Failure::Denied {
                    status: 404,
                    why: "the registry has no such tag, digest or repository (404)".into(),
                    advice: Some("check the name"),
                },
                _ => refused("the manifest", status, &answered),
            };
            let refusal = Refusal {
                url: &url,
                status: status.as_u16(),
                headers: &answered,
                text: &text,
                failure: &failure,
            };
            match self.refused(http, &*grant, refusal).await {
                Remedy::Renewed(_) if !renewed => renewed = true,
                Remedy::Renewed(failure) | Remedy::Fails(failure) => return Err(failure),
                Remedy::Elsewhere(_) => return Err(failure),
            }
        }
    }

    /// The blob of the disk, and the digest of the manifest that the reference led to.
    async fn disk(&self, http: &Http, place: &Place) -> Result<(Disk, String), Failure> {
        let (text, first) = self.manifest(http, place, &place.reference).await?;
        let text = match Manifest::parse(&text).map_err(Failure::Protocol)? {
            Manifest::Disk(disk) => return Ok((disk, first)),
            Manifest::Other(digest) => self.manifest(http, place, &Reference::Digest(digest)).await?.0,
        };
        match Manifest::parse(&text).map_err(Failure::Protocol)? {
            Manifest::Disk(disk) => Ok((disk, first)),
            Manifest::Other(_) => Err(Failure::Protocol("its index leads to another index".into())),
        }
    }
}

/// The remedy where a registry wants to know who asks.
const CREDENTIALS: &str = "check the name; for a private repository, name its credentials in [[http.credentials]], for the \
     registry or for the server of its tokens";

async fn send(http: &Http, url: &Url, reach: Reach, headers: HeaderMap) -> Result<Response, Failure> {
    let count = http.count(url);
    let sending = http.clients.get(url, reach, &headers, &count);
    let late = |_| Failure::again(format!("it does not answer within {:?}", http.answer_timeout()));
    let response = timeout(http.answer_timeout(), sending).await.map_err(late)?;
    let response = response.map_err(|error| match super::tls::problem(&error) {
        Some(problem) => Failure::advised(problem.why(&server(url)), problem.advice()),
        None => Failure::again(words(&error)),
    })?;
    peer_is_allowed(http, url, reach, &response).map_err(Failure::Protocol)?;
    Ok(response)
}

/// The whole body of a small answer.
async fn body(http: &Http, mut response: Response) -> Result<Vec<u8>, Failure> {
    let mut all = Vec::new();
    let reading = async {
        while let Some(chunk) = response.chunk().await.map_err(|error| Failure::again(words(&error)))? {
            all.extend_from_slice(&chunk);
            if all.len() > MAX_ANSWER {
                return Err(Failure::Protocol(format!("it answers with more than {MAX_ANSWER} bytes")));
            }
        }
        Ok(())
    };
    let late = |_| Err(Failure::again("its answer does not end"));
    timeout(http.answer_timeout(), reading).await.unwrap_or_else(late)?;
    Ok(all)
}

/// What a registry demands, RFC 6750 and the token specification of distribution.
#[derive(Debug, Default, PartialEq, Eq)]
struct Challenge {
    realm: String,
    service: Option<String>,
}

impl Challenge {
    /// Of the header lines of a 401; none when no token is demanded.
    fn of(headers: &HeaderMap) -> Option<Self> {
        headers.get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok()).find_map(Self::parse)
    }

    fn parse(text: &str) -> Option<Self> {
        let (scheme, mut rest) = text.trim().split_once(' ')?;
        if !scheme.eq_ignore_ascii_case("bearer") {
            return None;
        }
        let mut found = Self::default();
        loop {
            rest = rest.trim_start_matches([' ', ',']);
            let Some((name, value)) = rest.split_once('=') else { break };
            let (value, left) = match value.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => value.split_once(',').unwrap_or((value, "")),
            };
            match name.trim() {
                "realm" => value.clone_into(&mut found.realm),
                "service" => found.service = Some(value.to_owned()),
                _ => {}
            }
            rest = left;
        }
        (!found.realm.is_empty()).then_some(found)
    }
}

impl Authoriser for Registry {
    fn covers(&self, url: &Url) -> bool {
        origin(url) == self.origin
    }

    fn lend<'a>(&'a self, http: &'a Http, url: &'a Url) -> Job<'a, Result<Box<dyn Grant>, Failure>> {
        Box::pin(async move {
            let held = self.held.lock().await.clone();
            let lent = match held.filter(|held| held.since.elapsed() < held.life * 4 / 5) {
                Some(Held { value, generation, .. }) => {
                    Lent { headers: HeaderMap::from_iter([(AUTHORIZATION, value)]), generation }
                }
                None => {
                    // What it demands says its refusal. One without tokens takes the configured credentials.
                    let generation = self.held.lock().await.as_ref().map_or(0, |held| held.generation);
                    Lent { headers: configured(http, url).await?, generation }
                }
            };
            Ok(Box::new(lent) as Box<dyn Grant>)
        })
    }

    fn refused<'a>(&'a self, http: &'a Http, grant: &'a dyn Grant, refusal: Refusal<'a>) -> Job<'a, Remedy> {
        Box::pin(async move {
            let denied = || Failure::Denied {
                status: 401,
                why: "the registry wants to know who asks (401): the repository is private, or not there"
                    .into(),
                advice: Some(CREDENTIALS),
            };
            if refusal.status != 401 {
                return Remedy::Fails(refusal.failure.clone());
            }
            let generation = grant.as_any().downcast_ref::<Lent>().map_or(0, |lent| lent.generation);
            let Some(challenge) = Challenge::of(refusal.headers) else { return Remedy::Fails(denied()) };
            match self.renew(http, refusal.url, &challenge, generation).await {
                Ok(true) => Remedy::Renewed(denied()),
                Ok(false) => Remedy::Fails(denied()),
                Err(failure) => Remedy::Fails(failure),
            }
        })
    }
}

impl Http {
    /// Learns which blob an artifact is, and gets its first bytes: from the first URL that answers. Other URLs that answer
    /// must have the same blob.
    ///
    /// # Errors
    /// `Denied`, `Protocol` or `Unreachable`, of the first URL, when none answers; `Protocol` when two of them have
    /// different blobs.
    pub async fn probe_artifact(
        self: &Arc<Self>,
        urls: &[String],
        options: &RemoteOptions,
    ) -> Result<ProbedArtifact, SourceError> {
        let (mut first, mut refusal) = (None::<ProbedArtifact>, None);
        for url in urls {
            match (self.probe_one_artifact(url, options).await, &first) {
                (Ok(probed), None) => first = Some(probed),
                (Ok(probed), Some(pinned)) => {
                    let found =
                        crate::source::compare(&pinned.identity, &probed.identity, options.strictness);
                    if let Some(why) = found.difference() {
                        return Err(refuse(
                            url,
                            format!("it is another artifact than {}: {why}", shown(&pinned.url)),
                        ));
                    }
                }
                (Err(error), _) => {
                    tracing::warn!(%error, "a URL of a new base is not usable now");
                    refusal = refusal.or(Some(error));
                }
            }
        }
        first.ok_or_else(|| refusal.unwrap_or_else(|| refuse("no URL", "the source has no URL")))
    }

    async fn probe_one_artifact(
        self: &Arc<Self>,
        text: &str,
        options: &RemoteOptions,
    ) -> Result<ProbedArtifact, SourceError> {
        let fail = |failure: &Failure| failed(&shown(text), failure);
        let place = place_of(text)?;
        if let Some(problem) = &self.problem {
            return Err(fail(&Failure::advised(problem, super::CORRECT)));
        }
        let root =
            Url::parse(&place.manifest(&place.reference)).map_err(|_| refuse(text, "it is not a URL"))?;
        let registry = Registry::new(&place, &root);
        // Two manifests, a token, and what a token needs.
        let time = self.answer_timeout() * 3;
        let late = |_| Err(Failure::again(format!("it does not answer within {time:?}")));
        let asked = timeout(time, registry.disk(self, &place)).await.unwrap_or_else(late);
        let (Disk { digest, size: blob, is_tar }, manifest) = asked.map_err(|failure| fail(&failure))?;
        let url = place.with(&manifest);
        let mirror = Mirror::new(locate(&url, Some(&digest))?);
        let probed = self.probe_one(&mirror, Strictness::SizeOnly, options.deadline, None).await;
        let super::Probed { identity: found, mut head } = probed.map_err(|refused| refused.error)?;
        if found.size != blob {
            let why = format!("its manifest says {blob} bytes, and the blob has {}", found.size);
            return Err(refuse(text, why));
        }
        let range = match is_tar {
            true => disk(&head, blob).map_err(|why| refuse(text, why))?,
            false => 0..blob,
        };
        head.drain(..(range.start as usize).min(head.len()));
        head.truncate(usize::try_from(range.end - range.start).unwrap_or(usize::MAX));
        let (offset, size) = (range.start, range.end - range.start);
        Ok(ProbedArtifact { identity: OciIdentity { digest, blob, offset, size }.into(), head, url })
    }

    /// As [`open`](Self::open), of the blob of an artifact.
    pub fn open_artifact(
        self: &Arc<Self>,
        urls: &[String],
        artifact: &OciIdentity,
        options: RemoteOptions,
    ) -> Arc<HttpSource> {
        let options = RemoteOptions { strictness: Strictness::SizeOnly, ..options };
        let identity: HttpIdentity = artifact.of_blob();
        self.open(urls, identity, options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_challenge_of_a_registry_is_taken_apart() {
        let of = |text: &str| Challenge::parse(text).map(|found| (found.realm, found.service));
        let docker = "Bearer realm=\"https://auth.docker.io/token\",service=\"registry.docker.io\",scope=\"a:b,c:pull\"";
        assert_eq!(
            of(docker),
            Some(("https://auth.docker.io/token".into(), Some("registry.docker.io".into())))
        );
        assert_eq!(of("bearer scope=x, realm=https://h/t"), Some(("https://h/t".into(), None)));
        for none in ["Basic realm=\"x\"", "Bearer", "Bearer realm=\"x", "Bearer service=\"x\"", ""] {
            assert_eq!(of(none), None, "{none}");
        }
    }
}
