//! Where a URL leads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use plyfs::source::SourceErrorKind::{Denied, Protocol};
use plyfs::source::http::{NoCredentials, Proxies};
use plyfs::source::{Purpose, RemoteSource};

use crate::harness::{Client, MIB, fails, quick, until};
use crate::server::{Object, Reply, Server, Tls};

struct Pair {
    object: Object,
    origin: Server,
    target: Server,
    client: Client,
}

/// A server that sends everybody to another one, with a signature that changes.
fn pair() -> Pair {
    let object = Object::new(MIB);
    let (origin, target) = (Server::start(Object::new(0)), Server::start(object.clone()));
    let to = target.url("/signed");
    let given = AtomicUsize::new(0);
    origin.on(move |_| Reply::redirect(format!("{to}?signature={}", given.fetch_add(1, Ordering::SeqCst))));
    Pair { object, origin, target, client: Client::new() }
}

/// A redirect followed again for every block took three quarters of the time; the signed target expired an hour later.
#[test]
fn a_target_is_used_until_it_is_over() {
    for status in [401, 403, 404, 410] {
        let Pair { object, origin, target, client } = pair();
        let source = client.open(&origin.url("/image"), &object);
        for at in 0..10 {
            assert!(
                client.read(&source, at..at + 100).unwrap() == object.bytes[at as usize..at as usize + 100]
            );
        }
        assert_eq!((origin.requests().len(), target.requests().len()), (1, 10));
        assert!(target.requests().iter().all(|request| request.target == "/signed?signature=0"));
        target.on(
            move |request| {
                if request.target.ends_with("=0") { Reply::status(status) } else { Reply::Object }
            },
        );
        assert!(client.read(&source, 5..10).unwrap() == object.bytes[5..10], "{status}");
        assert_eq!((origin.requests().len(), target.requests().len()), (2, 12));
        // When the new one is refused as well, the read waits.
        target.on(move |_| Reply::status(status));
        let waits = client.open_briefly(&origin.url("/image"), &object);
        fails(client.read(&waits, 5..10), Denied, &[&status.to_string(), "credentials"]);
        assert!(origin.requests().len() >= 3);
    }
}

#[test]
fn a_redirect_says_how_long_it_holds() {
    let Pair { object, origin, target, client } = pair();
    let to = target.url("/signed");
    origin.on(move |_| {
        let lines =
            vec![("Location".into(), to.clone()), ("Cache-Control".into(), "private, max-age=1".into())];
        Reply::Status(307, lines, b"moved".to_vec())
    });
    let source = client.open(&origin.url("/image"), &object);
    client.read(&source, 0..10).unwrap();
    client.read(&source, 0..10).unwrap();
    assert_eq!(origin.requests().len(), 1);
    until("the redirect is over", || {
        client.read(&source, 0..10).unwrap();
        origin.requests().len() == 2
    });
}

/// Guards H5.
#[test]
fn one_finds_out_where_a_url_leads() {
    let Pair { object, origin, target, client } = pair();
    let to = target.url("/signed");
    origin.on(move |_| Reply::After(Duration::from_millis(200), Box::new(Reply::redirect(&to))));
    let source = client.open(&origin.url("/image"), &object);
    let all: Vec<_> =
        (0..8).map(|at| client.start(&source, at * 10..at * 10 + 10, Purpose::Demand)).collect();
    for (at, reading) in all.into_iter().enumerate() {
        assert!(client.wait(reading.done).unwrap() == object.bytes[at * 10..at * 10 + 10]);
    }
    assert_eq!((origin.requests().len(), target.requests().len()), (1, 8));
}

#[test]
fn redirects_have_an_end() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let last = Arc::new(AtomicUsize::new(10));
    let hops = last.clone();
    server.on(move |request| {
        let at: usize = request.target.trim_start_matches('/').parse().unwrap();
        if at == hops.load(Ordering::SeqCst) { Reply::Object } else { Reply::redirect(format!("{}", at + 1)) }
    });
    // Relative ones.
    let source = client.open(&server.url("/0"), &object);
    assert!(client.read(&source, 0..100).unwrap() == object.bytes[..100]);
    last.store(11, Ordering::SeqCst);
    let source = client.open_briefly(&server.url("/0"), &object);
    server.forget_requests();
    fails(client.read(&source, 0..100), Protocol, &["more than 10 times"]);
    server.forget_requests();
    fails(client.probe(&server.url("/0")), Protocol, &["more than 10 times"]);
    assert_eq!(server.requests().len(), 11);
    server.on(|_| Reply::redirect("/0"));
    fails(client.probe(&server.url("/0")), Protocol, &["more than 10 times"]);
}

#[test]
fn redirects_lead_to_web_servers_only() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    for (to, why) in [
        ("file:///etc/passwd", "neither http nor https"),
        ("ftp://host/a", "neither http nor https"),
        ("http://[broken/", "not a URL"),
        ("", "more than 10 times"),
    ] {
        server.on(move |_| Reply::redirect(to));
        fails(client.probe(&server.url("/a")), Protocol, &[why]);
    }
}

/// Guards H6.
#[test]
fn https_never_becomes_http() {
    let object = Object::new(MIB);
    let tls = Tls::new(&[]);
    let (secure, plain) = (Server::start_tls(object.clone(), &tls), Server::start(object.clone()));
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &tls.ca_pem).unwrap();
    let client = Client::with(&plyfs::config::HttpConfig { ca_file: Some(file.path().into()), ..quick() });
    let to = plain.url("/a?secret=1");
    secure.on(move |_| Reply::redirect(&to));
    let why = fails(client.probe(&secure.url("/a")), Protocol, &["from https to http"]);
    assert!(!why.contains("secret"), "{why}");
    assert_eq!(plain.requests().len(), 0);
    // The other way is fine.
    let to = secure.url("/a");
    plain.on(move |_| Reply::redirect(&to));
    secure.on(|_| Reply::Object);
    client.probe(&plain.url("/a")).unwrap();
}

/// A target that is down is not asked for ever while the URL leads somewhere else by now.
#[test]
fn a_target_that_fails_is_looked_up_again() {
    let Pair { object, origin, mut target, client } = pair();
    let source = client.open(&origin.url("/image"), &object);
    client.read(&source, 0..10).unwrap();
    let other = Server::start(object.clone());
    let to = other.url("/signed");
    origin.on(move |_| Reply::redirect(&to));
    target.stop();
    assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10]);
    assert_eq!(other.requests().len(), 1);
}

/// What was meant for one server goes to no other: user and password in the URL.
#[test]
fn user_and_password_stay_with_their_server() {
    let Pair { object, origin, target, client } = pair();
    let seen = Arc::new(AtomicBool::new(false));
    let (to, noted) = (target.url("/signed"), seen.clone());
    origin.on(move |request| {
        let right = request.header("authorization") == Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        noted.store(right, Ordering::SeqCst);
        // A redirect cannot give us an identity either.
        Reply::redirect(to.replacen("http://", "http://eve:evil@", 1))
    });
    let url = origin.url("/image").replacen("http://", "http://Aladdin:open%20sesame@", 1);
    let source = client.open(&url, &object);
    assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10]);
    assert!(seen.load(Ordering::SeqCst));
    assert_eq!(target.requests()[0].header("authorization"), None);
    assert!(!source.shown().contains("Aladdin") && source.shown().contains("/image"), "{}", source.shown());
}

/// A server on the public network, as seen through a proxy, redirects to a service of this host: its answer would
/// become the base. Asked for directly, because the proxy is not for these.
/// Guards H9.
#[test]
fn a_redirect_from_the_public_network_does_not_lead_to_this_host() {
    let object = Object::new(MIB);
    let (proxy, inside) = (Server::start(object.clone()), Server::start(object.clone()));
    let proxies = Proxies {
        http: Some(proxy.url("")),
        https: None,
        none_for: Some("127.0.0.0/8,localhost,0.0.0.0/8,::1,169.254.0.0/16".into()),
    };
    let client_of = |allow: &[&str]| {
        let allow = allow.iter().map(|entry| (*entry).to_owned()).collect();
        let config = plyfs::config::HttpConfig { allow, ..quick() };
        Client::made_of(&config, proxies.clone(), Arc::new(NoCredentials))
    };
    let client = client_of(&[]);
    let port = inside.address().port();
    for host in [
        "127.0.0.1",
        "localhost",
        "LOCALHOST.",
        "deep.localhost",
        "0x7f.1",
        "2130706433",
        "0.0.0.0",
        "[::1]",
        "[::]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "169.254.169.254",
        "10.1.2.3",
        "172.31.0.1",
        "192.168.0.1",
        "100.64.0.1",
        "[fd00::1]",
        "[fe80::1]",
        "[ff02::1]",
    ] {
        proxy.on(move |_| Reply::redirect(format!("http://{host}:{port}/internal?secret=1")));
        let why = fails(client.probe("http://images.example/a"), Protocol, &["redirects to", "[http] allow"]);
        assert!(!why.contains("secret"), "{why}");
    }
    assert_eq!(inside.requests().len(), 0, "nothing was asked of the service");
    // A later read waits, in case the redirect is mended; and says why.
    proxy.on(|_| Reply::Object);
    let source = client.open("http://images.example/a", &object);
    client.read(&source, 0..10).unwrap();
    proxy.on(move |_| Reply::redirect(format!("http://127.0.0.1:{port}/internal")));
    let reading = client.start(&source, 0..10, Purpose::Demand);
    until("it waits", || source.stall().is_some_and(|stall| stall.why.contains("loopback")));
    assert_eq!(inside.requests().len(), 0);
    proxy.on(|_| Reply::Object);
    client.wait(reading.done).unwrap();
    // The operator may want it.
    proxy.on(move |_| Reply::redirect(format!("http://127.0.0.1:{port}/a")));
    for allow in ["127.0.0.1", "127.0.0.0/8"] {
        client_of(&[allow]).probe("http://images.example/a").unwrap();
    }
    proxy.on(move |_| Reply::redirect(format!("http://localhost:{port}/a")));
    for allow in ["localhost", ".localhost"] {
        client_of(&[allow]).probe("http://images.example/a").unwrap();
    }
    fails(client_of(&["10.0.0.0/8"]).probe("http://images.example/a"), Protocol, &["[http] allow"]);
}

/// A server that sends to another dead host each time made hundreds of requests a second, and memory grow.
#[test]
fn redirects_to_ever_new_dead_hosts_count_against_their_url() {
    let object = Object::new(MIB);
    let origin = Server::start(object.clone());
    origin.on(|request| {
        let number = request.number % 60_000;
        Reply::redirect(format!("http://127.1.{}.{}:1/a", number / 250, 1 + number % 250))
    });
    let client = Client::new();
    let source = client.open(&origin.url("/a"), &object);
    let begin = Instant::now();
    let mut reads = vec![client.start(&source, 0..1, Purpose::Demand)];
    origin.wait_for_requests(1);
    reads.extend((1..20).map(|at| client.start(&source, at..at + 1, Purpose::Demand)));
    // Those of the first moment; from then on one at a time, after pauses of 0.2, 0.4, 0.8 s and so on, less at most
    // a half: 7 in the first 5 s.
    until("five seconds pass", || begin.elapsed() >= Duration::from_secs(5));
    assert!(origin.requests().len() <= 16 + 7, "{} requests", origin.requests().len());
    assert!(source.stall().is_some());
    origin.on(|_| Reply::Object);
    for (at, reading) in reads.into_iter().enumerate() {
        assert!(client.wait(reading.done).unwrap() == object.bytes[at..at + 1]);
    }
}
