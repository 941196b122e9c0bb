//! Credentials, TLS, proxies and HTTP/2.

use std::collections::HashMap;
use std::io::{Read as _, Write};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use plyfs::config::{CredentialConfig, HttpConfig};
use plyfs::source::SourceErrorKind::{Denied, Unreachable};
use plyfs::source::http::{Credentials, NoCredentials, Proxies, Secret, SecretName, Section};
use plyfs::source::{Purpose, RemoteSource};

use crate::harness::{Client, MIB, fails, quick, until};
use crate::server::{Object, Reply, Server, Tls};

/// The secrets of a test, by the number of their `[[http.credential]]`; counts how often they are read.
#[derive(Default)]
struct TestSecrets {
    by_number: Mutex<HashMap<usize, String>>,
    reads: AtomicUsize,
}

impl TestSecrets {
    fn put(&self, number: usize, secret: &str) {
        self.by_number.lock().unwrap().insert(number, secret.into());
    }
}

impl Credentials for TestSecrets {
    fn get(&self, name: SecretName) -> Result<Secret, String> {
        assert_eq!(name.section, Section::Http);
        self.reads.fetch_add(1, Ordering::SeqCst);
        let secrets = self.by_number.lock().unwrap();
        secrets
            .get(&name.number)
            .map(|text| Secret::new(text.clone().into()))
            .ok_or_else(|| "no such file".into())
    }
}

fn bearer(url: String) -> CredentialConfig {
    CredentialConfig {
        url,
        bearer_file: Some("/secrets/token".into()),
        basic_file: None,
        header_file: None,
        command: None,
        renew: None,
    }
}

fn requires(token: &'static str) -> impl Fn(&crate::server::Request) -> Reply {
    move |request| match request.header("authorization") {
        Some(found) if found == format!("Bearer {token}") => Reply::Object,
        _ => Reply::status(401),
    }
}

#[test]
fn tokens_go_to_their_scope_and_are_renewed_when_refused() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let config = HttpConfig { credentials: vec![bearer(server.url("/private/"))], ..quick() };
    let secrets = Arc::new(TestSecrets::default());
    secrets.put(0, "first\n");
    let client = Client::with_parts(&config, Proxies::default(), secrets.clone());
    let source = client.open(&server.url("/private/a"), &object);
    server.on(requires("first"));
    for _ in 0..3 {
        assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10]);
    }
    assert_eq!(secrets.reads.load(Ordering::SeqCst), 1, "the secret is kept");
    // When the secret is refused, it is read again, once for all requests.
    secrets.put(0, "second");
    server.on(requires("second"));
    let reads: Vec<_> = (0..10).map(|at| client.start(&source, at..at + 10, Purpose::Demand)).collect();
    for (at, reading) in reads.into_iter().enumerate() {
        assert!(client.wait(reading.done).unwrap() == object.bytes[at..at + 10]);
    }
    assert_eq!(secrets.reads.load(Ordering::SeqCst), 2);
    // When the new one is refused too, reads wait for another, without a storm of requests.
    server.on(requires("third"));
    let before = (server.requests().len(), secrets.reads.load(Ordering::SeqCst));
    let brief = client.open_briefly(&server.url("/private/a"), &object);
    fails(client.read(&brief, 0..10), Denied, &["asks for credentials (401)"]);
    let now = (server.requests().len(), secrets.reads.load(Ordering::SeqCst));
    assert!(now.0 - before.0 <= now.1 - before.1, "one request for each time the secret was read");
    let reading = client.start(&source, 0..10, Purpose::Demand);
    until("a read waits", || source.stall().is_some_and(|stall| stall.why.contains("401")));
    secrets.by_number.lock().unwrap().clear();
    let asked = secrets.reads.load(Ordering::SeqCst);
    until("the secret is read while there is none", || secrets.reads.load(Ordering::SeqCst) > asked);
    secrets.put(0, "third");
    assert!(client.wait(reading.done).unwrap() == object.bytes[..10]);
    assert_eq!(source.stall(), None);
    // Other paths of the same server get no credentials.
    server.forget_requests();
    server.on(|_| Reply::Object);
    let other = client.open(&server.url("/public/a"), &object);
    client.read(&other, 0..10).unwrap();
    assert_eq!(server.requests()[0].header("authorization"), None);
}

/// Guards H6.
#[test]
fn credentials_are_not_sent_to_a_redirect_target() {
    let object = Object::new(MIB);
    let (origin, target) = (Server::start(object.clone()), Server::start(object.clone()));
    let config = HttpConfig { credentials: vec![bearer(origin.url("/"))], ..quick() };
    let secrets = Arc::new(TestSecrets::default());
    secrets.put(0, "secret-token");
    let client = Client::with_parts(&config, Proxies::default(), secrets);
    let to = target.url("/a");
    origin.on(move |_| Reply::redirect(&to));
    client.probe(&origin.url("/a")).unwrap();
    assert_eq!(origin.requests()[0].header("authorization"), Some("Bearer secret-token"));
    assert_eq!(target.requests()[0].header("authorization"), None);
}

#[test]
fn credentials_are_renewed_after_their_time() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let mut credential = bearer(server.url("/"));
    credential.renew = Some(Duration::from_millis(200));
    let secrets = Arc::new(TestSecrets::default());
    let config = HttpConfig { credentials: vec![credential], ..quick() };
    let client = Client::with_parts(&config, Proxies::default(), secrets.clone());
    let source = client.open(&server.url("/a"), &object);
    // No secret at first: the read waits.
    let reading = client.start(&source, 0..10, Purpose::Demand);
    until("a read waits", || source.stall().is_some_and(|stall| stall.why.contains("no such file")));
    assert_eq!(server.requests().len(), 0, "no request is sent without credentials");
    let (asked, since) = (secrets.reads.load(Ordering::SeqCst), Instant::now());
    std::thread::sleep(Duration::from_millis(300));
    let more = secrets.reads.load(Ordering::SeqCst) - asked;
    assert!(more as u64 <= since.elapsed().as_secs() + 1, "read {more} more times in 300 ms");
    secrets.put(0, "one");
    client.wait(reading.done).unwrap();
    secrets.put(0, "two");
    until("the new secret is used", || {
        client.read(&source, 0..10).unwrap();
        server.requests().last().unwrap().header("authorization") == Some("Bearer two")
    });
    // If it cannot be renewed, the old one stays in use.
    secrets.by_number.lock().unwrap().clear();
    let asked = secrets.reads.load(Ordering::SeqCst);
    until("the secret is read again", || {
        client.read(&source, 0..10).unwrap();
        secrets.reads.load(Ordering::SeqCst) > asked
    });
    assert_eq!(server.requests().last().unwrap().header("authorization"), Some("Bearer two"));
}

fn trusting(tls: &Tls) -> (HttpConfig, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &tls.ca_pem).unwrap();
    (HttpConfig { ca_file: Some(file.path().into()), ..quick() }, file)
}

#[test]
fn the_configured_authority_is_trusted_and_others_are_not() {
    let object = Object::new(3 * MIB);
    let tls = Tls::new(&[b"http/1.1"]);
    let server = Server::start_tls(object.clone(), &tls);
    let (config, _file) = trusting(&tls);
    let client = Client::with(&config);
    let source = client.open(&server.url("/a"), &object);
    assert!(client.read(&source, 0..3 * MIB as u64).unwrap() == *object.bytes);
    client.read(&source, 0..10).unwrap();
    assert_eq!(server.connections(), 1);
    fails(Client::new().probe(&server.url("/a")), Unreachable, &["is not trusted"]);
    let (other, _file) = trusting(&Tls::new(&[]));
    fails(Client::with(&other).probe(&server.url("/a")), Unreachable, &["certificate"]);
    // A host that the certificate does not name.
    let url = format!("https://127.0.0.2:{}/a", server.address().port());
    fails(client.probe(&url), Unreachable, &[""]);
}

#[test]
fn a_tls_handshake_that_hangs_times_out() {
    // Accepts connections and never answers.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("https://{}/a", listener.local_addr().unwrap());
    let client = Client::with(&HttpConfig { connect_timeout: Duration::from_millis(200), ..quick() });
    fails(client.probe(&url), Unreachable, &["time"]);
}

#[test]
fn an_invalid_ca_file_is_reported_by_each_use() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    for text in ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        let client = Client::with(&HttpConfig { ca_file: Some(file.path().into()), ..quick() });
        fails(client.probe(&server.url("/a")), Unreachable, &["ca_file", file.path().to_str().unwrap()]);
        let source = client.open(&server.url("/a"), &object);
        let reading = client.start(&source, 0..10, Purpose::Demand);
        until("a read waits", || source.stall().is_some_and(|stall| stall.why.contains("ca_file")));
        reading.task.abort();
    }
}

fn through(http: Option<String>, https: Option<String>, none_for: Option<&str>) -> Proxies {
    Proxies { http, https, none_for: none_for.map(str::to_owned) }
}

#[test]
fn http_requests_go_to_the_proxy_with_the_full_url() {
    let object = Object::new(MIB);
    let proxy = Server::start(object.clone());
    let url = proxy.url("").replacen("http://", "http://me:pass%3Aword@", 1);
    let client = Client::with_parts(
        &quick(),
        through(Some(url), None, Some("direct.invalid,10.0.0.0/8")),
        Arc::new(NoCredentials),
    );
    let source = client.open("http://images.invalid/a?b", &object);
    assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10]);
    let request = &proxy.requests()[0];
    assert_eq!(request.target, "http://images.invalid/a?b");
    assert_eq!(request.header("proxy-authorization"), Some("Basic bWU6cGFzczp3b3Jk"));
    fails(client.probe("http://direct.invalid/a"), Unreachable, &[""]);
    assert_eq!(proxy.requests().len(), 1, "excluded hosts bypass the proxy");
    proxy.on(|_| Reply::status(407));
    let source = client.open_briefly("http://images.invalid/a?b", &object);
    fails(client.read(&source, 0..10), Denied, &["proxy asks for credentials (407)"]);
}

#[test]
fn https_requests_go_through_a_connect_tunnel() {
    let object = Object::new(MIB);
    let tls = Tls::new(&[b"http/1.1"]);
    let server = Server::start_tls(object.clone(), &tls);
    let proxy = Server::start(Object::new(0));
    let to = server.address();
    proxy.on(move |_| Reply::Tunnel(to));
    let (config, _file) = trusting(&tls);
    let client =
        Client::with_parts(&config, through(None, Some(proxy.url("")), None), Arc::new(NoCredentials));
    let url = format!("https://localhost:{}/a", to.port());
    let source = client.open(&url, &object);
    let read = || assert!(client.read(&source, 0..200_000).unwrap() == object.bytes[..200_000]);
    read();
    // Two pieces of the first read may begin at the same moment.
    let connections = proxy.requests().len();
    assert!((1..=2).contains(&connections), "{connections}");
    (0..3).for_each(|_| read());
    let requests = proxy.requests();
    assert_eq!(requests.len(), connections, "connections are reused");
    assert_eq!(
        (requests[0].method.as_str(), &*requests[0].target),
        ("CONNECT", &*format!("localhost:{}", to.port()))
    );
    assert_eq!(requests[0].header("authorization"), None);
    proxy.on(|_| Reply::status(407));
    let client =
        Client::with_parts(&config, through(None, Some(proxy.url("")), None), Arc::new(NoCredentials));
    fails(client.probe(&url), Unreachable, &["proxy"]);
}

#[test]
fn proxies_are_taken_from_the_usual_environment_variables() {
    let read = |pairs: &'static [(&str, &str)]| {
        Proxies::from_variables(|name| {
            pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    };
    assert_eq!(read(&[]), Proxies::default());
    let found = read(&[("HTTPS_PROXY", "http://s:1"), ("http_proxy", "http://p:1"), ("NO_PROXY", "a,b")]);
    assert_eq!(found, through(Some("http://p:1".into()), Some("http://s:1".into()), Some("a,b")));
    let found =
        read(&[("ALL_PROXY", "http://all:1"), ("https_proxy", "http://s:1"), ("HTTPS_PROXY", "http://S:1")]);
    assert_eq!(found, through(Some("http://all:1".into()), Some("http://s:1".into()), None));
    assert_eq!(read(&[("http_proxy", " ")]), Proxies::default());
    let found = read(&[("http_proxy", "http://user:hidden@p:1")]);
    assert!(!format!("{found:?}").contains("hidden"));
    let client = Client::with_parts(
        &quick(),
        through(Some("socks5://u:hidden@p:1".into()), None, None),
        Arc::new(NoCredentials),
    );
    let why =
        fails(client.probe("http://h.invalid/a"), Unreachable, &["socks5://p:1", "neither http nor https"]);
    assert!(!why.contains("hidden"), "{why}");
}

#[test]
fn http2_sends_concurrent_requests_over_one_connection() {
    use http_body_util::Full;
    use hyper::body::Bytes;
    use hyper_util::rt::{TokioExecutor, TokioIo};

    let object = Object::new(4 * MIB);
    let tls = Tls::new(&[b"h2"]);
    let (config, _file) = trusting(&tls);
    let client = Client::with(&config);
    let connections = Arc::new(AtomicUsize::new(0));
    let (accepted, served) = (connections.clone(), object.clone());
    let acceptor = tokio_rustls::TlsAcceptor::from(tls.config.clone());
    let listener = client.wait(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    client.runtime.spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            accepted.fetch_add(1, Ordering::SeqCst);
            let (acceptor, object) = (acceptor.clone(), served.clone());
            tokio::spawn(async move {
                let stream = acceptor.accept(stream).await.unwrap();
                let service =
                    hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
                        let object = object.clone();
                        async move {
                            assert_eq!(request.version(), hyper::Version::HTTP_2);
                            let range = request.headers()["range"].to_str().unwrap().to_owned();
                            let (first, last) =
                                range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                            let (first, last): (usize, usize) =
                                (first.parse().unwrap(), last.parse().unwrap());
                            let last = last.min(object.bytes.len() - 1);
                            let body = Bytes::copy_from_slice(&object.bytes[first..=last]);
                            hyper::Response::builder()
                                .status(206)
                                .header(
                                    "content-range",
                                    format!("bytes {first}-{last}/{}", object.bytes.len()),
                                )
                                .header("etag", object.etag.clone().unwrap())
                                .body(Full::new(body))
                        }
                    });
                let http = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
                let _ = http.serve_connection(TokioIo::new(stream), service).await;
            });
        }
    });
    let url = format!("https://{address}/a");
    assert_eq!(client.probe(&url).unwrap().identity.size, 4 * MIB as u64);
    let source = client.open(&url, &object);
    let part = object.bytes.len() as u64 / 8;
    let reads: Vec<_> =
        (0..8).map(|at| client.start(&source, at * part..(at + 1) * part, Purpose::Demand)).collect();
    let mut all = Vec::new();
    for reading in reads {
        all.extend(client.wait(reading.done).unwrap());
    }
    assert!(all == *object.bytes);
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

/// What this thread logs, at every level.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }
    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Neither does `Debug` print one.
#[test]
fn logs_and_errors_contain_no_secrets() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let object = Object::new(MIB);
    let (server, other) = (Server::start(object.clone()), Server::start(object.clone()));
    let proxy = Server::start(object.clone());
    let mut output = Vec::new();
    tracing::subscriber::with_default(subscriber, || {
        let config = HttpConfig { credentials: vec![bearer(server.url("/b"))], ..quick() };
        let secrets = Arc::new(TestSecrets::default());
        secrets.put(0, "HIDDEN-token");
        let proxies = through(
            Some(proxy.url("").replacen("http://", "http://u:HIDDEN-proxy@", 1)),
            None,
            Some("127.0.0.1"),
        );
        // A single thread: the log is recorded for this thread only.
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let network = plyfs::source::http::Network::prepare(&config, proxies);
        output.push(format!("{network:?} {config:?}"));
        let http =
            plyfs::source::http::Http::new(&config, &network, secrets, runtime.handle().clone()).unwrap();
        let with_user = |url: String| url.replacen("http://", "http://user:HIDDEN-password@", 1);
        let urls = [
            with_user(server.url("/a?key=HIDDEN-query#HIDDEN-fragment")),
            server.url("/b?key=HIDDEN-query"),
            "http://images.invalid/c?key=HIDDEN-query".to_owned(),
            with_user(format!("http:///{}", server.address())),
            "http://user:HIDDEN-password@".into(),
            "user:HIDDEN-password@host/a".into(),
            "ftp://user:HIDDEN-password@host/a?HIDDEN".into(),
        ];
        let to = other.url("/t?signature=HIDDEN-signature").replacen("http://", "http://u:HIDDEN-target@", 1);
        let replies = [
            Reply::Object,
            Reply::status(401),
            Reply::status(403),
            Reply::status(500),
            Reply::status(418),
            Reply::Close,
            Reply::Stall(5),
            Reply::redirect(to),
            Reply::redirect("ftp://u:HIDDEN-target@host/a?HIDDEN-signature"),
            Reply::redirect("http://u:HIDDEN-target@[broken/a?HIDDEN-signature"),
        ];
        for reply in replies {
            for server in [&server, &other, &proxy] {
                let reply = reply.clone();
                server.on(
                    move |request| {
                        if request.target.starts_with("/t") { Reply::status(403) } else { reply.clone() }
                    },
                );
            }
            for url in &urls {
                output.push(plyfs::source::http::shown(url));
                let options = Default::default();
                if let Err(error) = runtime.block_on(http.probe(std::slice::from_ref(url), &options)) {
                    output.push(format!("{error} {error:?} {:?}", error.object()));
                }
                let options = plyfs::source::http::RemoteOptions {
                    deadline: Some(Duration::from_millis(300)),
                    ..Default::default()
                };
                let source = http.open(std::slice::from_ref(url), crate::harness::identity(&object), options);
                output.push(source.shown());
                if let Err(error) = runtime.block_on(source.clone().fetch(
                    0..10,
                    Purpose::Demand,
                    std::time::Instant::now(),
                    Box::new(|_| {}),
                )) {
                    output.push(format!("{error} {error:?}"));
                }
                output.push(format!("{:?}", source.stall()));
            }
        }
    });
    let log = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
    for line in ["a request failed", "reads of a base wait"] {
        assert!(log.contains(line), "not in the log: {line:?}: {log}");
    }
    for text in output.iter().chain([&log]) {
        for line in text.lines() {
            // That covers what the HTTP library logs at its own levels.
            assert!(!line.contains("HIDDEN"), "{line}");
        }
    }
    let sent = server
        .requests()
        .iter()
        .any(|request| request.header("authorization") == Some("Bearer HIDDEN-token"));
    assert!(sent, "the secrets were used");
}

/// Host and port of a server that answers a TLS handshake as one of HTTP without TLS does.
fn plain_http() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for mut connection in listener.incoming().flatten() {
            let _ = connection.read(&mut [0; 4096]);
            let _ = connection.write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n");
        }
    });
    address
}

/// Each message names the server, says what is wrong with its TLS, and what to do.
#[test]
fn tls_problems_are_told_apart_and_come_with_their_remedy() {
    let object = Object::new(MIB);
    let unknown = Server::start_tls(object.clone(), &Tls::new(&[]));
    let self_signed = Server::start_tls(object.clone(), &Tls::self_signed());
    let plain = plain_http();
    let client = Client::new();
    let server = |server: &Server| {
        let url = server.url("");
        url.split_once("://").unwrap().1.trim_end_matches('/').to_owned()
    };
    for (asked, said) in [
        (server(&unknown), ["the issuer of the certificate of", "is not trusted", "[http] ca_file"]),
        (server(&self_signed), ["self-signed", "an authority issued", "[http] ca_file"]),
        (plain, ["does not speak TLS", "check the port", "http://"]),
    ] {
        let url = format!("https://{asked}/a");
        let text = fails(client.probe(&url), Unreachable, &said);
        assert!(text.contains(&asked) && !text.contains("check the network"), "{text}");
        assert!(
            !text.contains("UnknownIssuer") && !text.contains("CaUsed") && !text.contains("Invalid"),
            "{text}"
        );
    }
}
