//! Other hosts as mirrors: what they have, miss, send wrong and do not answer.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use plyfs::source::http::peer::ContentName;
use plyfs::source::http::{HttpSource, RemoteOptions};
use plyfs::source::{Purpose, RemoteSource};

use crate::harness::{Client, MIB};
use crate::server::{Object, Reply, Request, Server};

const KIB: u64 = 1 << 10;

fn name(object: &Object) -> ContentName {
    ContentName::of_root(blake3::hash(&object.bytes).as_bytes())
}

/// A peer without a request so far.
fn peer(object: &Object) -> Server {
    let etag = Some(name(object).tag());
    Server::start(Object { etag, last_modified: None, ..object.clone() })
}

fn url(peer: &Server) -> String {
    format!("plyfs://{}", peer.address())
}

/// The object at a server, with peers that are named behind it.
fn open(client: &Client, origin: &Server, peers: &[String], object: &Object) -> Arc<HttpSource> {
    let urls: Vec<String> = std::iter::once(origin.url("/a")).chain(peers.iter().cloned()).collect();
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    let options = RemoteOptions { contents: Some(name(object)), ..RemoteOptions::default() };
    client.open_with(&urls, object, options)
}

/// What a peer answers that has these ranges alone.
fn held(object: &Object, ranges: &[Range<u64>], request: &Request) -> Reply {
    let (first, last) = request.range().unwrap();
    let size = object.bytes.len() as u64;
    let line = |name: &str, value: String| (name.to_owned(), value);
    match ranges.iter().find(|range| range.contains(&first)) {
        Some(range) => {
            let end = range.end.min(last + 1);
            let body = object.bytes[first as usize..end as usize].to_vec();
            let range = line("Content-Range", format!("bytes {first}-{}/{size}", end - 1));
            Reply::Status(206, vec![range, line("ETag", name(object).tag())], body)
        }
        None => {
            let next = ranges.iter().map(|range| range.start).filter(|start| *start > first).min();
            let missing = line("Plyfs-Missing", format!("{first}-{}", next.unwrap_or(size) - 1));
            Reply::Status(504, vec![missing], Vec::new())
        }
    }
}

/// Guards H14.
#[test]
fn a_peer_is_asked_first_and_what_it_misses_comes_from_the_server_at_once() {
    let (client, object) = (Client::new(), Object::new(MIB));
    let (origin, peer) = (Server::start(object.clone()), peer(&object));
    let (whole, ranges) = (object.clone(), [0..64 * KIB, 192 * KIB..512 * KIB]);
    peer.on(move |request| held(&whole, &ranges, request));
    let source = open(&client, &origin, &[url(&peer)], &object);
    let begin = Instant::now();
    assert!(client.read(&source, 0..MIB as u64).unwrap() == *object.bytes);
    // No pause of a gate, the shortest of which is longer.
    assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
    let asked: Vec<_> = origin.requests().iter().map(|request| request.range().unwrap()).collect();
    assert_eq!(asked, [(64 * KIB, 192 * KIB - 1), (512 * KIB, MIB as u64 - 1)]);
    for request in peer.requests() {
        assert_eq!(request.target, name(&object).path());
        assert_eq!(request.header("cache-control"), Some("only-if-cached"));
        assert_eq!(request.header("if-match"), Some(&*name(&object).tag()));
    }
    assert_eq!(peer.requests().len(), 4);
    // It works, and misses are counted apart.
    assert!(source.stall().is_none() && source.urls().iter().all(|url| url.trouble.is_none()));
    let (_, count) = &client.http.servers()[0];
    assert_eq!((count.misses, count.retries, count.wrong), (2, 0, 0));
}

/// Guards H14.
#[test]
fn no_answer_of_a_peer_makes_a_base_wait_or_change() {
    let object = Object::new(MIB);
    let another = Object::seeded(MIB, 5);
    let longer = Object { etag: Some(name(&object).tag()), ..Object::new(MIB + 1) };
    for (what, reply) in [
        ("it does not have the base", Reply::status(404)),
        ("it is gone", Reply::status(410)),
        ("it has no time", Reply::status(503)),
        ("it fails", Reply::status(500)),
        ("it forbids", Reply::status(403)),
        ("it has another tag", Reply::Of(another.clone())),
        ("it has another size", Reply::Of(longer)),
        ("the tag is another now", Reply::status(412)),
        ("it ends earlier", Reply::Status(416, vec![("Content-Range".into(), "bytes */5".into())], vec![])),
        ("it redirects", Reply::redirect("http://127.0.0.1:1/")),
        ("it closes", Reply::Close),
        ("it stalls", Reply::Stall(5000)),
        ("it says nothing", Reply::After(Duration::from_secs(8), Box::new(Reply::Object))),
    ] {
        let client = Client::new();
        let (origin, peer) = (Server::start(object.clone()), peer(&object));
        peer.on(move |_| reply.clone());
        let source = open(&client, &origin, &[url(&peer)], &object);
        let begin = Instant::now();
        for purpose in [Purpose::Demand, Purpose::Hydrate, Purpose::Demand] {
            let read = client.read_for(&source, 100 * KIB..300 * KIB, purpose).unwrap();
            assert!(read == object.bytes[100 * KIB as usize..300 * KIB as usize], "{what}");
            assert!(source.stall().is_none(), "{what}");
        }
        assert!(begin.elapsed() < Duration::from_secs(20), "{what}: {:?}", begin.elapsed());
        assert!(source.urls().iter().any(|url| !url.is_peer && url.trouble.is_none()), "{what}");
    }
}

#[test]
fn a_peer_without_the_base_is_left_alone_for_a_while_and_no_other_base_of_it_is() {
    let (client, object) = (Client::new(), Object::new(MIB));
    let (origin, peer) = (Server::start(object.clone()), peer(&object));
    let whole = object.clone();
    let path = name(&object).path();
    peer.on(move |request| match request.target == path {
        true => Reply::status(404),
        false => Reply::Of(Object { etag: Some(name(&whole).tag()), ..whole.clone() }),
    });
    let source = open(&client, &origin, &[url(&peer)], &object);
    for at in 0..8u64 {
        let range = at * 64 * KIB..(at + 1) * 64 * KIB;
        assert!(
            client.read(&source, range.clone()).unwrap()
                == object.bytes[range.start as usize..range.end as usize]
        );
    }
    assert_eq!(peer.requests().len(), 1);
    let other = Object::seeded(MIB, 9);
    let at_peer = Object { etag: Some(name(&other).tag()), last_modified: None, ..other.clone() };
    peer.on(move |_| Reply::Of(at_peer.clone()));
    let source = open(&client, &Server::start(other.clone()), &[url(&peer)], &other);
    assert!(client.read(&source, 0..MIB as u64).unwrap() == *other.bytes);
    assert_eq!(peer.requests().len(), 2);
}

#[test]
fn peers_that_are_down_fail_no_hydration() {
    let (client, object) = (Client::new(), Object::new(MIB));
    let origin = Server::start(object.clone());
    // Nothing listens there.
    let peers: Vec<String> = (0..6).map(|n| format!("plyfs://127.0.0.{}:9", 10 + n)).collect();
    let source = open(&client, &origin, &peers, &object);
    assert!(client.read_for(&source, 0..MIB as u64, Purpose::Hydrate).unwrap() == *object.bytes);
}

/// A server that is down is waited for, and a peer that gets the bytes meanwhile is asked again.
#[test]
fn a_peer_is_asked_again_while_the_server_is_down() {
    let (client, object) = (Client::new(), Object::new(MIB));
    let (mut origin, peer) = (Server::start(object.clone()), peer(&object));
    let (whole, all, begin) = (object.clone(), 0..MIB as u64, Instant::now());
    peer.on(move |request| match begin.elapsed() < Duration::from_secs(2) {
        true => held(&whole, &[], request),
        false => held(&whole, std::slice::from_ref(&all), request),
    });
    let source = open(&client, &origin, &[url(&peer)], &object);
    origin.stop();
    assert!(client.read(&source, 0..64 * KIB).unwrap() == object.bytes[..64 * KIB as usize]);
    assert!(peer.requests().len() < 30, "{}", peer.requests().len());
}
