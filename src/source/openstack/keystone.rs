//! Keystone's answer to a token request: the token, its time, and where the services are.
//!
//! Source: the Identity API v3, "Password authentication with scoped authorization".

use std::fmt;
use std::time::Duration;

use reqwest::Url;
use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

use super::Cloud;
use crate::source::http::shown;
use crate::source::http_identity::printable;

/// A token, and where it is used. The credential helper sends it to the worker.
#[derive(Clone, Serialize, Deserialize)]
pub struct Session {
    /// For `X-Auth-Token`.
    pub token: String,
    /// How long the token was valid when it was issued.
    pub life: Duration,
    /// Glance, or why there is none.
    pub image: Result<Endpoint, String>,
    /// Swift, or why there is none.
    pub object_store: Result<Endpoint, String>,
}

impl fmt::Debug for Session {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.debug_struct("Session").field("life", &self.life).finish_non_exhaustive()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.token.zeroize();
    }
}

/// Where a service is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Without a slash at its end.
    pub url: String,
    /// Whether it may be at an address that is not public: the operator named it, or keystone itself has such an address.
    pub anywhere: bool,
}

#[derive(Deserialize)]
struct Answer {
    token: Token,
}

#[derive(Deserialize)]
struct Token {
    expires_at: String,
    issued_at: String,
    #[serde(default)]
    catalog: Vec<Service>,
}

#[derive(Deserialize)]
struct Service {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    endpoints: Vec<Place>,
}

#[derive(Deserialize)]
struct Place {
    interface: String,
    url: String,
    region_id: Option<String>,
    region: Option<String>,
}

impl Place {
    fn region(&self) -> &str {
        self.region_id.as_deref().or(self.region.as_deref()).unwrap_or_default()
    }
}

impl Session {
    /// Of keystone's answer. `token` is the header `X-Subject-Token`; `inside` says that keystone answered from an
    /// address that is not public.
    ///
    /// # Errors
    /// What the answer lacks.
    pub fn of_answer(cloud: &Cloud, token: &str, body: &[u8], inside: bool) -> Result<Self, String> {
        let answer: Answer = serde_json::from_slice(body)
            .map_err(|error| format!("keystone's answer is no token ({:?})", error.classify()))?;
        let Token { expires_at, issued_at, catalog } = answer.token;
        let time = |text: &str| {
            humantime::parse_rfc3339(text).map_err(|_| "keystone's answer has a time that is none".to_owned())
        };
        // Both are keystone's clock, so it does not matter how this host's clock differs.
        let life = time(&expires_at)?.duration_since(time(&issued_at)?).unwrap_or_default();
        if token.is_empty() || life.is_zero() {
            return Err("keystone's answer has a token that has ended already; check keystone's clock".into());
        }
        let find = |kind: &str, named: &Option<String>| match named {
            Some(url) => checked(cloud, url, true),
            None => of_catalog(cloud, &catalog, kind).and_then(|url| checked(cloud, &url, inside)),
        };
        Ok(Self {
            token: token.to_owned(),
            life,
            image: find("image", &cloud.image),
            object_store: find("object-store", &cloud.object_store),
        })
    }
}

fn of_catalog(cloud: &Cloud, catalog: &[Service], kind: &str) -> Result<String, String> {
    let of_kind: Vec<&Place> = catalog
        .iter()
        .filter(|service| service.kind == kind)
        .flat_map(|service| &service.endpoints)
        .filter(|place| place.interface == cloud.interface)
        .collect();
    let interface = &cloud.interface;
    if of_kind.is_empty() {
        return Err(format!("keystone's catalog has no service {kind} with the interface {interface}"));
    }
    let mut regions: Vec<&str> = of_kind.iter().map(|place| place.region()).collect();
    regions.sort_unstable();
    regions.dedup();
    let wanted = match &cloud.region {
        Some(region) => region.as_str(),
        None if regions.len() == 1 => regions[0],
        None => {
            let regions = printable(&regions.join(", "));
            return Err(format!(
                "keystone's catalog has the service {kind} in several regions ({regions}); set region_name"
            ));
        }
    };
    let found = of_kind.iter().find(|place| place.region() == wanted);
    found.map(|place| place.url.clone()).ok_or_else(|| {
        let (wanted, regions) = (printable(wanted), printable(&regions.join(", ")));
        format!("keystone's catalog has no service {kind} in region {wanted}; it has {regions}")
    })
}

/// An endpoint that a token may be sent to, as far as its URL tells. Its address is judged when it is connected to.
fn checked(cloud: &Cloud, text: &str, anywhere: bool) -> Result<Endpoint, String> {
    let shown = printable(&shown(text));
    let Ok(url) = Url::parse(text) else { return Err(format!("the endpoint {shown} is not a URL")) };
    match (cloud.tokens.scheme(), url.scheme()) {
        (_, "https") | ("http", "http") => {}
        ("https", "http") => {
            return Err(format!(
                "the endpoint {shown} is http and keystone is https: the token could be read on the way; correct the \
                 catalog, or give the https URL in clouds.yaml (image_endpoint_override, object_store_endpoint_override)"
            ));
        }
        _ => return Err(format!("the endpoint {shown} is neither http nor https")),
    }
    if url.host_str().is_none_or(str::is_empty) || !url.username().is_empty() || url.query().is_some() {
        return Err(format!("the endpoint {shown} is no plain URL of a host"));
    }
    Ok(Endpoint { url: url.as_str().trim_end_matches('/').to_owned(), anywhere })
}
