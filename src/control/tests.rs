use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::get;
use serde_json::Value;
use tokio::sync::Notify;

use super::events::{events as handler, serve_until, summary};
use crate::events::{Event, Events, Kind, Reason};

/// A socket with the route of events and a slow route.
struct Socket {
    dir: tempfile::TempDir,
    events: Events,
    drain: Arc<Notify>,
    thread: JoinHandle<()>,
}

impl Socket {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = std::os::unix::net::UnixListener::bind(dir.path().join("s")).expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        let (events, drain) = (Events::new(), Arc::new(Notify::new()));
        let slow = || async {
            tokio::time::sleep(Duration::from_millis(1500)).await;
            "answered"
        };
        let router = Router::new()
            .route("/v1/events", get(handler))
            .route("/slow", get(slow))
            .with_state(events.clone());
        let (bus, drained) = (events.clone(), drain.clone());
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).expect("a socket");
                serve_until(listener, router, drained, bus, Duration::from_millis(100)).await;
            });
        });
        Self { dir, events, drain, thread }
    }

    fn ask(&self, path: &str) -> UnixStream {
        ask(self.dir.path(), path)
    }

    /// Drains the socket. Fails when its thread does not end.
    fn end(self) {
        self.drain.notify_one();
        let (sender, ended) = std::sync::mpsc::channel();
        let thread = self.thread;
        thread::spawn(move || sender.send(thread.join()));
        ended.recv_timeout(Duration::from_secs(20)).expect("the end").expect("no panic");
    }
}

fn ask(dir: &Path, path: &str) -> UnixStream {
    let mut stream = UnixStream::connect(dir.join("s")).expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    // With 1.0 the answer ends with the connection, and has no chunks.
    write!(stream, "GET {path} HTTP/1.0\r\n\r\n").expect("asked");
    stream
}

/// Status and body of an answer, read to its end.
fn answer(mut stream: UnixStream) -> (u16, String) {
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head");
    (head[9..12].parse().expect("a status"), body.to_owned())
}

fn objects(body: &str) -> Vec<Value> {
    body.lines().map(|line| serde_json::from_str(line).expect("an object")).collect()
}

/// Waits until `wanted` clients follow events.
fn await_listeners(events: &Events, wanted: usize) {
    while events.state().listeners != wanted {
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn recent_events_are_lines_of_objects() {
    let socket = Socket::new();
    socket.events.emit(Event::of_base(Kind::BaseError, "b").because("a \"reason\"\nof two lines"));
    socket.events.emit(Event::new(Kind::CacheRecovered));
    let (status, body) = answer(socket.ask("/v1/events"));
    let found = objects(&body);
    assert_eq!((status, found.len()), (200, 2), "{body}");
    assert_eq!(found[0]["event"], "base.error");
    assert_eq!(found[0]["base"], "b");
    assert_eq!(found[0]["reason"], "a \"reason\"\nof two lines");
    assert_eq!(found[0]["worker"], std::process::id());
    assert!(found[0].get("bytes").is_none());
    assert!(humantime::parse_rfc3339(found[1]["at"].as_str().expect("a time")).is_ok());
    assert_eq!(objects(&answer(socket.ask("/v1/events?after=1")).1)[0]["number"], 2);
    // The number of another worker is ignored.
    assert_eq!(objects(&answer(socket.ask("/v1/events?after=1&worker=1")).1).len(), 2);
    for bad in ["/v1/events?after=x", "/v1/events?follow=perhaps", "/v1/events?other=1"] {
        assert_eq!(answer(socket.ask(bad)).0, 400, "{bad}");
    }
    socket.end();
}

#[test]
fn a_follower_gets_new_events_and_the_end_of_the_stream() {
    let socket = Socket::new();
    socket.events.emit(Event::of_base(Kind::BaseWaiting, "b"));
    let (new, all) = (socket.ask("/v1/events?follow=true"), socket.ask("/v1/events?follow=true&after=0"));
    await_listeners(&socket.events, 2);
    socket.events.emit(Event::of_base(Kind::BaseResumed, "b"));
    socket.end();
    let names = |stream| {
        let (status, body) = answer(stream);
        assert_eq!(status, 200);
        let name = |event: &Value| event["event"].as_str().expect("a name").to_owned();
        objects(&body).iter().map(name).collect::<Vec<_>>()
    };
    assert_eq!(names(new), ["following", "base.resumed"]);
    assert_eq!(names(all), ["following", "base.waiting", "base.resumed"]);
}

#[test]
fn a_follower_that_disconnects_is_removed() {
    let socket = Socket::new();
    let stream = socket.ask("/v1/events?follow=true");
    await_listeners(&socket.events, 1);
    drop(stream);
    await_listeners(&socket.events, 0);
    socket.end();
}

#[test]
fn a_follower_above_the_limit_is_refused() {
    let socket = Socket::new();
    let all: Vec<_> = (0..crate::events::LISTENERS).map(|_| socket.ask("/v1/events?follow=true")).collect();
    await_listeners(&socket.events, all.len());
    let (status, body) = answer(socket.ask("/v1/events?follow=true"));
    assert_eq!(status, 429);
    assert_eq!(objects(&body)[0]["error"]["kind"], "busy");
    socket.end();
}

/// A client that follows and does not read. Its connection is full, so the end cannot be sent to it.
fn stalled_follower(socket: &Socket) -> UnixStream {
    let stream = socket.ask("/v1/events?follow=true");
    await_listeners(&socket.events, 1);
    while socket.events.state().lost == 0 {
        for _ in 0..200 {
            socket.events.emit(Event::of_base(Kind::BaseError, "b").because("x".repeat(500)));
        }
        thread::sleep(Duration::from_millis(1));
    }
    stream
}

#[test]
fn a_follower_that_does_not_read_does_not_delay_the_end() {
    let socket = Socket::new();
    let _stream = stalled_follower(&socket);
    socket.end();
}

/// A destination of notifications is a listener without a connection.
#[test]
fn the_end_waits_for_a_destination_as_long_as_it_is_told() {
    let socket = Socket::new();
    let (events, slow) = (socket.events.clone(), socket.events.listen(None).expect("room"));
    let begun = Instant::now();
    socket.end();
    assert!(begun.elapsed() >= Duration::from_millis(100));
    assert_eq!(events.state().listeners, 1);
    drop(slow);
}

#[test]
fn a_request_that_has_begun_is_answered_before_the_end() {
    let socket = Socket::new();
    let _stream = stalled_follower(&socket);
    let slow = socket.ask("/slow");
    thread::sleep(Duration::from_millis(100));
    socket.end();
    assert_eq!(answer(slow), (200, "answered".to_owned()));
}

#[test]
fn status_has_exact_counters() {
    let events = Events::new();
    let traffic = events.base(1, "debian");
    (0..3).for_each(|_| traffic.add(Reason::Disk, 16384));
    traffic.add(Reason::Corrupt, 100);
    let summary = serde_json::to_value(summary(&events, 0)).expect("JSON");
    let base = &summary["bases"][0];
    assert_eq!(base["base"], "debian");
    assert_eq!(base["hit"]["disk"], serde_json::json!({"count": 3, "bytes": 49152}));
    assert_eq!(base["hit"]["memory"]["bytes"], 0);
    assert_eq!(base["evict"]["corrupt"]["bytes"], 100);
    assert_eq!(summary["since"], "1970-01-01T00:00:00.000000000Z");
}
