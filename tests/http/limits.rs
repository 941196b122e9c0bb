//! Limits on concurrent requests and on bandwidth.

use std::time::{Duration, Instant};

use plyfs::config::HttpConfig;
use plyfs::source::Purpose;
use plyfs::source::http::RemoteOptions;

use crate::harness::{Client, MIB, quick, until};
use crate::server::{Object, Reply, Server};

fn slow(server: &Server) {
    server.on(|_| Reply::After(Duration::from_millis(100), Box::new(Reply::Object)));
}

#[test]
fn concurrent_requests_stay_within_max_requests() {
    let object = Object::new(MIB);
    for (all, own, most) in [(3, None, 3), (16, Some(2), 2), (2, Some(50), 2), (1, None, 1)] {
        let server = Server::start(object.clone());
        slow(&server);
        let client = Client::with(&HttpConfig { max_requests: all, ..quick() });
        let options = RemoteOptions { max_requests: own, ..RemoteOptions::default() };
        let source = client.open_with(&[&server.url("/a")], &object, options);
        let reads: Vec<_> = (0..10).map(|at| client.start(&source, at..at + 1, Purpose::Demand)).collect();
        for reading in reads {
            client.wait(reading.done).unwrap();
        }
        // The first request runs alone: it resolves the URL.
        assert_eq!(server.most_at_once(), most, "{all} {own:?}");
    }
}

/// A reader does not wait until hydration ends.
#[test]
fn reads_go_before_hydration() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    slow(&server);
    let client = Client::with(&HttpConfig { max_requests: 4, ..quick() });
    let source = client.open(&server.url("/a"), &object);
    client.read(&source, 0..1).unwrap();
    let hydration: Vec<_> =
        (0..40).map(|at| client.start(&source, 1000 + at..1001 + at, Purpose::Hydrate)).collect();
    server.wait_for_requests(4);
    assert!(server.most_at_once() <= 3, "one request is reserved for readers");
    for at in 0..5 {
        client.read(&source, at..at + 1).unwrap();
    }
    let requests = server.requests();
    let done = requests.iter().filter(|request| request.range().unwrap().0 >= 1000).count();
    assert!(done < 30, "{done} of 40 hydration requests ran before 5 reads");
    for reading in hydration {
        client.wait(reading.done).unwrap();
    }
}

/// A read that is cancelled, running or queued, frees its place.
#[test]
fn cancelled_reads_free_their_places() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    server.on(|_| Reply::Stall(0));
    let client =
        Client::with(&HttpConfig { max_requests: 2, stall_timeout: Duration::from_secs(600), ..quick() });
    let source = client.open(&server.url("/a"), &object);
    let reads: Vec<_> = (0..10).map(|at| client.start(&source, at..at + 1, Purpose::Demand)).collect();
    server.wait_for_requests(1);
    for reading in &reads {
        reading.task.abort();
    }
    server.on(|_| Reply::Object);
    for at in 0..10 {
        client.read(&source, at..at + 1).unwrap();
    }
}

#[test]
fn bandwidth_stays_within_max_rate() {
    let object = Object::new(2 * MIB);
    let server = Server::start(object.clone());
    let rate = Some(MIB as u64);
    for (all, own) in [(rate, None), (None, rate)] {
        let client = Client::with(&HttpConfig { max_rate: all, ..quick() });
        let options = RemoteOptions { max_rate: own, ..RemoteOptions::default() };
        let source = client.open_with(&[&server.url("/a")], &object, options);
        let begin = Instant::now();
        assert!(client.read(&source, 0..2 * MIB as u64).unwrap() == *object.bytes);
        assert!(begin.elapsed() >= Duration::from_millis(1800), "{:?}", begin.elapsed());
    }
}

#[test]
fn requests_and_bytes_are_counted() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    client.probe(&server.url("/a")).unwrap();
    let source = client.open(&server.url("/a"), &object);
    client.read(&source, 0..1000).unwrap();
    let counters = client.http.servers()[0].1;
    assert_eq!((counters.requests, counters.retries, counters.bytes), (2, 0, (64 << 10) + 1000));
    until("the server has sent everything", || server.body_bytes() == (64 << 10) + 1000);
}

/// Guards H7.
#[test]
fn a_request_that_hangs_gives_its_place_to_another_base() {
    let object = Object::new(MIB);
    let (hangs, works) = (Server::start(object.clone()), Server::start(object.clone()));
    hangs.on(|_| Reply::Stall(0));
    // One place for requests that no reader waits for.
    let config = HttpConfig { max_requests: 2, stall_timeout: Duration::from_secs(600), ..quick() };
    let client = Client::with(&config);
    let (one, other) = (client.open(&hangs.url("/a"), &object), client.open(&works.url("/a"), &object));
    let hanging = client.start(&one, 0..10, Purpose::Hydrate);
    hangs.wait_for_requests(1);
    assert!(client.read_for(&other, 0..10, Purpose::Hydrate).unwrap() == object.bytes[..10]);
    hanging.task.abort();
}
