//! Servers that fail, are slow, or go away.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use plyfs::config::HttpConfig;
use plyfs::source::SourceErrorKind::{Denied, Unreachable};
use plyfs::source::http::RemoteOptions;
use plyfs::source::{Purpose, RemoteSource};

use crate::harness::{Client, MIB, fails, quick, until};
use crate::server::{Object, Reply, Server};

#[test]
fn temporary_failures_are_retried() {
    let object = Object::new(MIB);
    for reply in [
        Reply::status(408),
        Reply::status(425),
        Reply::status(429),
        Reply::status(500),
        Reply::status(502),
        Reply::status(503),
        Reply::status(504),
        Reply::status(599),
        Reply::Close,
        Reply::Cut(0),
        Reply::Stall(0),
        Reply::Raw(b"HTTP/1.1 2".to_vec()),
        Reply::Raw(b"what?\r\n\r\n".to_vec()),
        Reply::After(Duration::from_secs(20), Box::new(Reply::Object)),
    ] {
        let server = Server::start(object.clone());
        // Shorter than the delay of the last reply.
        let config = HttpConfig { connect_timeout: Duration::from_millis(300), ..quick() };
        let client = Client::with(&config);
        let source = client.open(&server.url("/a"), &object);
        let first = reply.clone();
        server.on(move |request| if request.number < 2 { first.clone() } else { Reply::Object });
        assert!(client.read(&source, 10..5000).unwrap() == object.bytes[10..5000], "{reply:?}");
        assert_eq!(server.requests().len(), 3, "{reply:?}");
        assert_eq!(source.stall(), None);
        assert_eq!(client.http.servers()[0].1.retries, 2);
    }
}

#[test]
fn a_broken_transfer_is_resumed_where_it_broke() {
    let object = Object::new(4 * MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    server.on(|request| match request.number {
        0 => Reply::Cut(1_000_001),
        1 => Reply::Stall(500_000),
        2 => Reply::Cut(0),
        3 => Reply::Cut(1),
        _ => Reply::Object,
    });
    let bytes = client.read(&source, 100..object.bytes.len() as u64).unwrap();
    assert!(bytes == object.bytes[100..]);
    let ranges: Vec<u64> = server.requests().iter().map(|request| request.range().unwrap().0).collect();
    assert_eq!(ranges, [100, 1_000_101, 1_500_101, 1_500_101, 1_500_102]);
    assert!(server.requests().iter().all(|request| request.range().unwrap().1 == 4 * MIB as u64 - 1));
}

/// They continue by themselves when it is back.
#[test]
fn reads_wait_while_the_server_is_down() {
    let object = Object::new(MIB);
    let mut server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    client.read(&source, 0..10).unwrap();
    assert_eq!(source.stall(), None);
    server.stop();
    let reads: Vec<_> =
        (0..20).map(|at| client.start(&source, at * 100..at * 100 + 100, Purpose::Demand)).collect();
    // An existing connection may break first.
    until("reads wait", || source.stall().is_some_and(|stall| stall.why.contains("refused")));
    let stall = source.stall().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(source.stall().unwrap().since, stall.since, "`since` is the first failure");
    // Cancelling one read does not affect the others.
    let mut reads = reads.into_iter();
    reads.next().unwrap().task.abort();
    server.start_again();
    for (at, reading) in reads.enumerate() {
        let at = (at + 1) * 100;
        assert!(client.wait(reading.done).unwrap() == object.bytes[at..at + 100]);
    }
    assert_eq!(source.stall(), None);
}

#[test]
fn a_read_fails_at_its_deadline() {
    let object = Object::new(MIB);
    let mut server = Server::start(object.clone());
    let client = Client::new();
    let options = RemoteOptions { deadline: Some(Duration::from_millis(700)), ..RemoteOptions::default() };
    let source = client.open_with(&[&server.url("/a")], &object, options);
    server.stop();
    let begin = Instant::now();
    fails(
        client.read(&source, 0..10),
        Unreachable,
        &["has not sent it for 700ms", "refused", "check the server"],
    );
    assert!(begin.elapsed() >= Duration::from_millis(700));
    assert_eq!(source.stall(), None);
    // The deadline counts from the first failure after the last byte: a read that progresses does not reach it.
    server.start_again();
    server.on(|_| Reply::Cut(50_000));
    assert!(client.read(&source, 0..MIB as u64).unwrap() == *object.bytes);
    assert_eq!(server.requests().len(), MIB.div_ceil(50_000));
}

/// A later read asks again.
#[test]
fn fetches_that_no_reader_waits_for_give_up() {
    let object = Object::new(MIB);
    for purpose in [Purpose::Readahead, Purpose::Prefetch, Purpose::Hydrate] {
        let server = Server::start(object.clone());
        let client = Client::new();
        let source = client.open(&server.url("/a"), &object);
        server.on(|_| Reply::status(500));
        fails(client.read_for(&source, 0..10, purpose), Unreachable, &["500"]);
        assert_eq!(server.requests().len(), 4, "{purpose:?}");
        assert_eq!(source.stall(), None, "no reader waits");
    }
}

/// 429 without back-off led to a storm of requests.
/// Guards H4.
#[test]
fn retry_after_of_an_overloaded_server_is_respected() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    client.read(&source, 0..10).unwrap();
    server.forget_requests();
    let since = Instant::now();
    server.on(move |_| {
        if since.elapsed() < Duration::from_millis(1500) {
            Reply::Status(429, vec![("Retry-After".into(), "2".into())], Vec::new())
        } else {
            Reply::Object
        }
    });
    let reads: Vec<_> =
        (0..100).map(|at| client.start(&source, at * 100..at * 100 + 100, Purpose::Demand)).collect();
    server.wait_for_requests(1);
    until("reads wait", || source.stall().is_some());
    // The requests that were already running, and no more until the time is over; then one by one.
    std::thread::sleep(Duration::from_millis(1000));
    let early = server.requests().len();
    assert!(early <= 16, "{early} requests before the time in Retry-After was over");
    for (at, reading) in reads.into_iter().enumerate() {
        assert!(client.wait(reading.done).unwrap() == object.bytes[at * 100..at * 100 + 100]);
    }
    assert!(since.elapsed() >= Duration::from_secs(2), "Retry-After is respected");
    let all = server.requests().len();
    assert!(all <= early + 100, "{all} requests for 100 reads, {early} of them refused");
}

/// However many reads wait, one at a time asks, with growing pauses.
/// Guards H4.
#[test]
fn a_server_that_is_down_gets_one_request_at_a_time() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (running, max) = (now.clone(), most.clone());
    server.on(|_| Reply::status(503));
    let _ = client.read_for(&source, 0..10, Purpose::Readahead);
    server.forget_requests();
    server.on(move |_| {
        max.fetch_max(running.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(50));
        running.fetch_sub(1, Ordering::SeqCst);
        Reply::status(503)
    });
    let begin = Instant::now();
    let reads: Vec<_> =
        (0..50).map(|at| client.start(&source, at * 100..at * 100 + 100, Purpose::Demand)).collect();
    server.wait_for_requests(3);
    assert_eq!(most.load(Ordering::SeqCst), 1);
    // The pauses have grown to 1.6 s and 3.2 s, each shortened by half at most.
    assert!(begin.elapsed() >= Duration::from_millis(1600), "{:?}", begin.elapsed());
    for reading in reads {
        reading.task.abort();
    }
}

/// The cancellation of one request failed every reader that waited for it, and a failed start hung all readers. Here:
/// the one request that may run while a server is down is cancelled, and another takes its place.
#[test]
fn a_cancelled_read_does_not_fail_the_others() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    server.on(|request| match request.number {
        0 => Reply::status(503),
        1 => Reply::After(Duration::from_secs(3), Box::new(Reply::Object)),
        _ => Reply::Object,
    });
    let config_timeout = Duration::from_secs(5);
    let first = client.start(&source, 0..100, Purpose::Demand);
    server.wait_for_requests(2);
    let begin = Instant::now();
    let second = client.start(&source, 100..200, Purpose::Demand);
    until("the second waits", || source.stall().is_some());
    first.task.abort();
    assert!(client.wait(second.done).unwrap() == object.bytes[100..200]);
    assert!(begin.elapsed() < config_timeout);
    assert!(first.bytes.lock().unwrap().is_empty());
}

/// An expired token, a deactivated image, a path that is missing for four seconds: each of them is temporary.
/// Guards H3.
#[test]
fn reads_wait_while_a_server_refuses_them_until_the_deadline() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a?token=secret"), &object);
    for (status, why) in
        [(401, "asks for credentials"), (403, "forbids"), (404, "nothing there"), (410, "any more")]
    {
        server.on(move |_| Reply::status(status));
        let brief = client.open_briefly(&server.url("/a?token=secret"), &object);
        let text = fails(
            client.read(&brief, 0..10),
            Denied,
            &["has not sent it for 700ms", why, &status.to_string(), "check the URL"],
        );
        assert!(!text.contains("secret"), "{text}");
        // Adding a base fails at once.
        fails(client.probe(&server.url("/a")), Denied, &[why]);
        let reading = client.start(&source, 0..10, Purpose::Demand);
        until("the read waits", || source.stall().is_some_and(|stall| stall.why.contains(why)));
        server.on(|_| Reply::Object);
        assert!(client.wait(reading.done).unwrap() == object.bytes[..10], "after {status}");
        assert_eq!(source.stall(), None);
    }
}

#[test]
fn a_failing_mirror_is_replaced_by_the_next() {
    let object = Object::new(MIB);
    let (mut first, second) = (Server::start(object.clone()), Server::start(object.clone()));
    let client = Client::new();
    let urls = [&*first.url("/a"), &*second.url("/a")];
    let source = client.open_with(&urls, &object, RemoteOptions::default());
    client.read(&source, 0..10).unwrap();
    assert_eq!((first.requests().len(), second.requests().len()), (1, 0), "the first mirror is preferred");
    // The first fails in the middle of a transfer.
    first.on(|_| Reply::Cut(1000));
    assert!(client.read(&source, 0..MIB as u64).unwrap() == *object.bytes);
    assert_eq!(second.requests()[0].range(), Some((1000, MIB as u64 - 1)));
    first.stop();
    for _ in 0..5 {
        assert!(client.read(&source, 7..10).unwrap() == object.bytes[7..10]);
    }
    // The first refuses, the second answers.
    first.on(|_| Reply::status(404));
    first.start_again();
    assert!(client.read(&source, 7..10).unwrap() == object.bytes[7..10]);
    first.on(|_| Reply::status(204));
    assert!(client.read(&source, 7..10).unwrap() == object.bytes[7..10]);
    // The first is preferred again when it works.
    first.on(|_| Reply::Object);
    until("the first is asked again", || {
        let before = first.requests().iter().filter(|request| request.range() == Some((20, 29))).count();
        client.read(&source, 20..30).unwrap();
        first.requests().iter().filter(|request| request.range() == Some((20, 29))).count() > before
    });
    // A base can be added while a mirror is down.
    first.stop();
    let probed = client.probe_all(&urls, Default::default()).unwrap();
    assert_eq!(probed.identity, crate::harness::identity(&object));
}

#[test]
fn adding_a_base_of_an_unreachable_server_fails_soon() {
    let mut server = Server::start(Object::new(MIB));
    let url = server.url("/a?secret");
    server.stop();
    let client = Client::new();
    let why = fails(client.probe(&url), Unreachable, &["cannot read http://127.0.0.1", "refused"]);
    assert!(!why.contains("secret"), "{why}");
    let why = fails(client.probe("http://no-such-host.invalid/a"), Unreachable, &["no-such-host.invalid/a"]);
    assert!(why.contains("dns") || why.contains("lookup") || why.contains("resolve"), "{why}");
}

/// One byte a second reset the stall timer: a read waited forever, no mirror was tried, and the state was ok.
/// Guards H8.
#[test]
fn a_server_that_sends_single_bytes_counts_as_too_slow() {
    let object = Object::new(MIB);
    let (slow, good) = (Server::start(object.clone()), Server::start(object.clone()));
    slow.on(|_| Reply::Trickle(Duration::from_millis(100)));
    let client = Client::new();
    // The mirror takes over.
    let source = client.open_with(&[&slow.url("/a"), &good.url("/a")], &object, RemoteOptions::default());
    assert!(client.read(&source, 0..200_000).unwrap() == object.bytes[..200_000]);
    let state = source.urls();
    assert!(state[0].trouble.as_ref().is_some_and(|why| why.contains("too slow")), "{state:?}");
    assert_eq!(state[1].trouble, None);
    // Later reads do not wait for the slow one again.
    let before = slow.requests().len();
    for at in 0..10 {
        client.read(&source, at * 1000..at * 1000 + 70_000).unwrap();
    }
    assert!(slow.requests().len() <= before + 2, "{} requests", slow.requests().len() - before);
    // Without a mirror the read is reported as waiting, and fails at its deadline.
    let alone = client.open(&slow.url("/a"), &object);
    let reading = client.start(&alone, 0..200_000, Purpose::Demand);
    until("the stall is reported", || alone.stall().is_some_and(|stall| stall.why.contains("too slow")));
    reading.task.abort();
    let options = RemoteOptions { deadline: Some(Duration::from_secs(2)), ..RemoteOptions::default() };
    let alone = client.open_with(&[&slow.url("/a")], &object, options);
    fails(client.read(&alone, 0..200_000), Unreachable, &["has not sent it for 2s", "too slow"]);
}

/// Even if the deadline is shorter than `stall_timeout`.
/// Guards H8.
#[test]
fn a_mirror_is_asked_before_the_deadline() {
    let object = Object::new(MIB);
    let good = Server::start(object.clone());
    for reply in [Reply::Stall(0), Reply::Stall(100), Reply::Trickle(Duration::from_millis(50))] {
        let hangs = Server::start(object.clone());
        hangs.on(move |_| reply.clone());
        let client = Client::with(&HttpConfig { stall_timeout: Duration::from_secs(600), ..quick() });
        let options = RemoteOptions { deadline: Some(Duration::from_secs(6)), ..RemoteOptions::default() };
        let source = client.open_with(&[&hangs.url("/a"), &good.url("/a")], &object, options);
        assert!(client.read(&source, 0..200_000).unwrap() == object.bytes[..200_000]);
    }
}

/// Fetches for others before that moment do not count.
/// Guards H8.
#[test]
fn a_deadline_counts_from_the_moment_a_reader_began_to_wait() {
    let object = Object::new(MIB);
    let mut server = Server::start(object.clone());
    let client = Client::new();
    let deadline = Duration::from_secs(3600);
    let options = RemoteOptions { deadline: Some(deadline), ..RemoteOptions::default() };
    let source = client.open_with(&[&server.url("/a")], &object, options);
    server.stop();
    let Some(long_ago) = Instant::now().checked_sub(deadline) else { return };
    let late = source.clone().fetch(0..10, Purpose::Demand, long_ago, Box::new(|_| {}));
    fails(client.wait(late), Unreachable, &["has not sent it for 3600s"]);
}
