//! Redirects.

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

/// A server that redirects every request to another one, with a new signature each time.
fn pair() -> Pair {
    let object = Object::new(MIB);
    let (origin, target) = (Server::start(Object::new(0)), Server::start(object.clone()));
    let to = target.url("/signed");
    let signatures = AtomicUsize::new(0);
    origin.on(move |_| {
        Reply::redirect(format!("{to}?signature={}", signatures.fetch_add(1, Ordering::SeqCst)))
    });
    Pair { object, origin, target, client: Client::new() }
}

/// Following the redirect again for every block took three quarters of the time; the signed target expired after an
/// hour.
#[test]
fn a_redirect_target_is_reused_until_it_is_refused() {
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
        // If the new target is refused as well, the read waits.
        target.on(move |_| Reply::status(status));
        let waits = client.open_briefly(&origin.url("/image"), &object);
        fails(client.read(&waits, 5..10), Denied, &[&status.to_string(), "credentials"]);
        assert!(origin.requests().len() >= 3);
    }
}

#[test]
fn the_max_age_of_a_redirect_is_respected() {
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
    until("the redirect has expired", || {
        client.read(&source, 0..10).unwrap();
        origin.requests().len() == 2
    });
}

/// Guards H5.
#[test]
fn only_one_request_at_a_time_resolves_a_redirect() {
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
fn more_than_10_redirects_are_an_error() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let last = Arc::new(AtomicUsize::new(10));
    let hops = last.clone();
    server.on(move |request| {
        let at: usize = request.target.trim_start_matches('/').parse().unwrap();
        if at == hops.load(Ordering::SeqCst) { Reply::Object } else { Reply::redirect(format!("{}", at + 1)) }
    });
    // The redirects are relative.
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
fn redirects_to_other_schemes_are_refused() {
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
fn redirects_from_https_to_http_are_refused() {
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
    // From http to https is allowed.
    let to = secure.url("/a");
    plain.on(move |_| Reply::redirect(&to));
    secure.on(|_| Reply::Object);
    client.probe(&plain.url("/a")).unwrap();
}

/// When a target fails, the URL is resolved again: it may lead to another server by now.
#[test]
fn a_url_is_resolved_again_after_its_target_failed() {
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

/// User and password in the URL are sent to no other server.
#[test]
fn user_and_password_are_not_sent_to_a_redirect_target() {
    let Pair { object, origin, target, client } = pair();
    let seen = Arc::new(AtomicBool::new(false));
    let (to, noted) = (target.url("/signed"), seen.clone());
    origin.on(move |request| {
        let right = request.header("authorization") == Some("Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ==");
        noted.store(right, Ordering::SeqCst);
        // A user and password in the redirect are ignored too.
        Reply::redirect(to.replacen("http://", "http://eve:evil@", 1))
    });
    let url = origin.url("/image").replacen("http://", "http://Aladdin:open%20sesame@", 1);
    let source = client.open(&url, &object);
    assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10]);
    assert!(seen.load(Ordering::SeqCst));
    assert_eq!(target.requests()[0].header("authorization"), None);
    assert!(!source.shown().contains("Aladdin") && source.shown().contains("/image"), "{}", source.shown());
}

/// A server on the public network, reached through a proxy, redirects to a service of this host, which bypasses the
/// proxy: the answer of that service would become the base.
/// Guards H9.
#[test]
fn redirects_from_the_public_network_to_this_host_are_refused() {
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
        Client::with_parts(&config, proxies.clone(), Arc::new(NoCredentials))
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
    assert_eq!(inside.requests().len(), 0, "no request reached the service");
    // A later read waits, because the redirect may be corrected, and the stall says why.
    proxy.on(|_| Reply::Object);
    let source = client.open("http://images.example/a", &object);
    client.read(&source, 0..10).unwrap();
    proxy.on(move |_| Reply::redirect(format!("http://127.0.0.1:{port}/internal")));
    let reading = client.start(&source, 0..10, Purpose::Demand);
    until("the read waits", || source.stall().is_some_and(|stall| stall.why.contains("loopback")));
    assert_eq!(inside.requests().len(), 0);
    proxy.on(|_| Reply::Object);
    client.wait(reading.done).unwrap();
    // The configuration can allow it.
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

/// A server of a private network redirects to a service of this host, or to the metadata service of the machine: the
/// answer would become the base.
/// Guards H9.
#[test]
fn redirects_from_a_private_network_stay_away_from_this_host_and_link_local_addresses() {
    let object = Object::new(MIB);
    let (proxy, inside) = (Server::start(object.clone()), Server::start(object.clone()));
    let none_for = Some("127.0.0.0/8,169.254.0.0/16".into());
    let proxies = Proxies { http: Some(proxy.url("")), https: None, none_for };
    let client_of = |allow: &[&str]| {
        let allow = allow.iter().map(|entry| (*entry).to_owned()).collect();
        let config = plyfs::config::HttpConfig { allow, ..quick() };
        Client::with_parts(&config, proxies.clone(), Arc::new(NoCredentials))
    };
    let port = inside.address().port();
    let lead = |to: String| {
        proxy.on(move |request| match request.target.contains("10.1.2.3") {
            true => Reply::redirect(to.clone()),
            false => Reply::Object,
        });
    };
    for host in ["127.0.0.1", "localhost", "169.254.169.254", "[fe80::1]", "[fd00:ec2::254]"] {
        lead(format!("http://{host}:{port}/latest/meta-data"));
        fails(client_of(&[]).probe("http://10.1.2.3/a"), Protocol, &["redirects to", "[http] allow"]);
    }
    assert_eq!(inside.requests().len(), 0, "no request reached the service");
    lead(format!("http://127.0.0.1:{port}/a"));
    client_of(&["127.0.0.1"]).probe("http://10.1.2.3/a").unwrap();
    // Another private network is as before.
    lead("http://192.168.7.7/a".into());
    client_of(&[]).probe("http://10.1.2.3/a").unwrap();
    // A server of this host leads to this host, and no farther than that.
    let origin = Server::start(object);
    origin.on(move |_| Reply::redirect(format!("http://127.0.0.1:{port}/a")));
    client_of(&[]).probe(&origin.url("/a")).unwrap();
    origin.on(|_| Reply::redirect("http://169.254.169.254/latest/meta-data"));
    fails(client_of(&[]).probe(&origin.url("/a")), Protocol, &["link-local", "[http] allow"]);
}

/// A server that redirected to a different dead host each time caused hundreds of requests a second and growing memory.
#[test]
fn redirects_to_many_dead_hosts_count_as_failures_of_their_url() {
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
    // 16 requests at the start; then one at a time, after pauses of 0.2, 0.4, 0.8 s and so on, each shortened by half
    // at most: 7 in the first 5 s.
    until("five seconds pass", || begin.elapsed() >= Duration::from_secs(5));
    assert!(origin.requests().len() <= 16 + 7, "{} requests", origin.requests().len());
    assert!(source.stall().is_some());
    origin.on(|_| Reply::Object);
    for (at, reading) in reads.into_iter().enumerate() {
        assert!(client.wait(reading.done).unwrap() == object.bytes[at..at + 1]);
    }
}

/// Each waiting read has the message of the last failure.
#[test]
fn a_redirect_to_an_endless_url_is_refused_in_a_short_message() {
    let Pair { object, origin, client, .. } = pair();
    for long in
        [format!("http://127.0.0.1:1/{}", "a".repeat(50_000)), format!("ftp://h/{}", "a".repeat(5000))]
    {
        origin.on(move |_| Reply::redirect(long.clone()));
        let source = client.open_briefly(&origin.url("/image"), &object);
        let text = fails(client.read(&source, 0..10), Protocol, &["it redirects to"]);
        assert!(text.len() < 1000, "{} bytes", text.len());
    }
}

/// Regression: the worker ended, because no clock has the time at which such a redirect ends.
#[test]
fn a_redirect_that_is_valid_for_ever_is_followed() {
    let Pair { object, origin, target, client } = pair();
    let to = target.url("/a");
    for seconds in [u64::MAX, u64::MAX / 2, 1 << 60] {
        let control = format!("public, max-age={seconds}");
        let lines = vec![("Location".into(), to.clone()), ("Cache-Control".into(), control)];
        origin.on(move |_| Reply::Status(302, lines.clone(), Vec::new()));
        let source = client.open_briefly(&origin.url("/image"), &object);
        assert!(client.read(&source, 5..10).unwrap() == object.bytes[5..10]);
    }
}
