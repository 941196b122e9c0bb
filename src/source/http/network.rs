//! Trusted certificates and proxies of this host. They are read before the worker gives up its rights, and used after.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hyper_util::client::proxy::matcher::Matcher;
use reqwest::header::HeaderMap;
use reqwest::{Client, ClientBuilder, NoProxy, Proxy, Response, Url};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;

use super::address::{AllowList, Reach, Zone};
use super::names::{Names, ToAnywhere, Within};
use super::servers::Count;
use super::shown;
use crate::config::HttpConfig;
use crate::source::{SourceError, SourceErrorKind};

/// Proxies, as environment variables name them. Their URLs may contain passwords.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Proxies {
    /// For http.
    pub http: Option<String>,
    /// For https: by CONNECT.
    pub https: Option<String>,
    /// Hosts, domains, addresses and networks that are contacted directly, separated by commas.
    pub none_for: Option<String>,
}

impl Proxies {
    /// From the usual variables: `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`, also in capitals.
    pub fn from_variables(get: impl Fn(&str) -> Option<String>) -> Self {
        let one = |name: &str| {
            let found = get(name).or_else(|| get(&name.to_ascii_uppercase()));
            found.filter(|value| !value.trim().is_empty())
        };
        let all = one("all_proxy");
        Self {
            http: one("http_proxy").or_else(|| all.clone()),
            https: one("https_proxy").or(all),
            none_for: one("no_proxy"),
        }
    }
}

impl fmt::Debug for Proxies {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |url: &Option<String>| url.as_deref().map(shown);
        out.debug_struct("Proxies")
            .field("http", &shown(&self.http))
            .field("https", &shown(&self.https))
            .field("none_for", &self.none_for)
            .finish()
    }
}

/// Receive window of a stream of HTTP/2. At 10 ms and 1 Gbit/s, 1.2 MiB are in flight; the standard's default is 64
/// KiB.
const WINDOW: u32 = 4 << 20;
/// Receive window of a connection: slow streams of one base leave room for streams of another.
const MAX_CONNECTION_WINDOW: u32 = 256 << 20;
/// How often a request is sent at once whose connection ends before an answer comes.
const SENDS: u32 = 3;

/// The HTTP clients. Each has its own connections, so a request never uses a connection that it was not allowed to
/// make.
pub(super) struct Clients {
    /// Connects to any address.
    direct: Client,
    /// Connects to where a server in a [`Zone`] may lead, and to addresses of `[http] allow`.
    from: [Client; 4],
    /// Connects through a proxy, which resolves names and decides which addresses are allowed.
    proxied: Client,
    proxies: Matcher,
    names: Arc<Names>,
}

impl Clients {
    /// Resolves names.
    pub fn names(&self) -> &Arc<Names> {
        &self.names
    }

    pub fn direct(&self) -> &Client {
        &self.direct
    }

    pub fn choose(&self, url: &Url, reach: Reach) -> &Client {
        match reach {
            _ if self.is_proxied(url) => &self.proxied,
            Reach::Anywhere => &self.direct,
            Reach::From(zone) => &self.from[zone as usize],
        }
    }

    /// Sends a GET. When the connection ends before an answer comes, the request is sent again at once, up to [`SENDS`]
    /// times: the server may have ended a connection that was idle, or each one after its answer and without saying so, as
    /// a socket of uwsgi does.
    pub async fn get(
        &self,
        url: &Url,
        reach: Reach,
        headers: &HeaderMap,
        count: &Count,
    ) -> reqwest::Result<Response> {
        let client = self.choose(url, reach);
        let mut sent = 1;
        loop {
            count.request();
            match client.get(url.clone()).headers(headers.clone()).send().await {
                Err(error) if sent < SENDS && has_ended(&error) => {
                    count.retry();
                    sent += 1;
                }
                done => return done,
            }
        }
    }

    /// Whether requests for a URL go through a proxy.
    pub fn is_proxied(&self, url: &Url) -> bool {
        // A URL that is no URI cannot be fetched directly either.
        url.as_str().parse().is_ok_and(|uri| self.proxies.intercept(&uri).is_some())
    }
}

/// Whether a connection that was open has ended before an answer came.
fn has_ended(error: &reqwest::Error) -> bool {
    error.is_request() && !error.is_connect() && !error.is_timeout()
}

/// See the module.
#[derive(Debug)]
pub struct Network {
    roots: RootCertStore,
    proxies: Proxies,
    /// A mistake in the configuration, or that the network is off. Nothing is fetched then, and reads wait. plyfs uses no other route than the
    /// configured one, and the worker starts all the same: other disks need no network.
    problem: Option<String>,
}

impl Network {
    /// Reads the system's certificates and those of the configuration. Starts no thread.
    pub fn prepare(config: &HttpConfig, proxies: Proxies) -> Self {
        let mut roots = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        let (_, ignored) = roots.add_parsable_certificates(found.certs);
        tracing::debug!(certificates = roots.len(), ignored, "certificates of the system");
        for error in found.errors {
            tracing::debug!(%error, "certificates of the system");
        }
        let extra = config.ca_file.as_deref().map(|path| add(&mut roots, path));
        let problem = extra.and_then(Result::err);
        if roots.is_empty() {
            tracing::info!("the system has no certificates; https works only with [http] ca_file");
        }
        let mut network = Self { roots, proxies, problem };
        if network.problem.is_none() {
            network.problem = network.proxies().err();
        }
        if let Some(problem) = &network.problem {
            tracing::error!(
                problem,
                "bases on the network cannot be read; correct the configuration and restart the daemon"
            );
        }
        network
    }

    /// Of a worker that may make no connections.
    pub fn off() -> Self {
        let problem = Some("the network is off: [security] network is false".to_owned());
        Self { roots: RootCertStore::empty(), proxies: Proxies::default(), problem }
    }

    pub(super) fn problem(&self) -> Option<&str> {
        self.problem.as_deref()
    }

    fn proxies(&self) -> Result<Vec<Proxy>, String> {
        let not_for = || self.proxies.none_for.as_deref().and_then(NoProxy::from_string);
        let one = |url: &Option<String>, make: fn(&str) -> reqwest::Result<Proxy>| {
            let Some(url) = url else { return Ok(None) };
            let refuse = |why: &str| format!("the proxy {}: {why}", shown(url));
            // Without a scheme it is http, as for other programs.
            let scheme = url.split_once("://").map_or("http", |(scheme, _)| scheme);
            if !matches!(scheme, "http" | "https") {
                return Err(refuse("it is neither http nor https"));
            }
            make(url).map(|proxy| Some(proxy.no_proxy(not_for()))).map_err(|_| refuse("it is not a URL"))
        };
        let http = one(&self.proxies.http, |url| Proxy::http(url))?;
        let https = one(&self.proxies.https, |url| Proxy::https(url))?;
        Ok(http.into_iter().chain(https).collect())
    }

    /// Makes the clients. The runtime that makes requests makes and keeps their connections.
    pub(super) fn clients(&self, config: &HttpConfig) -> Result<Clients, SourceError> {
        let refuse = |what: &str, why: String| {
            SourceError::remote(
                SourceErrorKind::Protocol,
                "use",
                what,
                why,
                "see [http] of the configuration",
            )
        };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut tls = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| refuse("TLS", error.to_string()))?
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        tls.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        let names = Arc::new(Names::new());
        let allow = Arc::new(AllowList::new(&config.allow));
        let build = |builder: ClientBuilder| {
            builder.build().map_err(|error| refuse("the HTTP client", super::words(&error)))
        };
        let mut proxied = builder(config, &tls).dns_resolver(ToAnywhere(names.clone()));
        for proxy in self.proxies().unwrap_or_default() {
            proxied = proxied.proxy(proxy);
        }
        let from = |zone| {
            let resolver = Within(names.clone(), allow.clone(), Reach::From(zone));
            build(builder(config, &tls).dns_resolver(resolver))
        };
        let text = |url: &Option<String>| url.clone().unwrap_or_default();
        Ok(Clients {
            direct: build(builder(config, &tls).dns_resolver(ToAnywhere(names.clone())))?,
            // In the order of the zones.
            from: [from(Zone::Public)?, from(Zone::Private)?, from(Zone::Loopback)?, from(Zone::LinkLocal)?],
            proxied: build(proxied)?,
            proxies: Matcher::builder()
                .http(text(&self.proxies.http))
                .https(text(&self.proxies.https))
                .no(text(&self.proxies.none_for))
                .build(),
            names,
        })
    }
}

fn builder(config: &HttpConfig, tls: &rustls::ClientConfig) -> ClientBuilder {
    let connection_window = WINDOW.saturating_mul(config.max_requests).clamp(WINDOW, MAX_CONNECTION_WINDOW);
    Client::builder()
        .user_agent(&config.user_agent)
        .tls_backend_preconfigured(tls.clone())
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .no_proxy()
        .connect_timeout(config.connect_timeout)
        .pool_max_idle_per_host(config.max_requests as usize)
        .pool_idle_timeout(Duration::from_secs(60))
        .tcp_keepalive(Duration::from_secs(30))
        // Many requests share one connection. Only these pings detect that it is dead.
        .http2_keep_alive_interval(Duration::from_secs(10))
        .http2_keep_alive_timeout(config.stall_timeout.min(Duration::from_secs(20)))
        .http2_initial_stream_window_size(WINDOW)
        .http2_initial_connection_window_size(connection_window)
}

fn add(roots: &mut RootCertStore, path: &Path) -> Result<(), String> {
    let at = |why: &dyn fmt::Display| format!("[http] ca_file {}: {why}", path.display());
    let certificates = CertificateDer::pem_file_iter(path).map_err(|error| at(&error))?;
    let mut count = 0;
    for certificate in certificates {
        let certificate = certificate.map_err(|error| at(&error))?;
        roots.add(certificate).map_err(|error| at(&error))?;
        count += 1;
    }
    if count == 0 { Err(at(&"it has no certificate")) } else { Ok(()) }
}
