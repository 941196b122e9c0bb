use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use axum::routing::{get, post};

use super::*;

const LIMIT: usize = 8;

/// A server with a route that waits, which counts its requests, and one that does not.
struct Server {
    dir: tempfile::TempDir,
    waiting: Arc<AtomicUsize>,
    go_on: Arc<Notify>,
    drain: Arc<Notify>,
    thread: thread::JoinHandle<()>,
}

impl Server {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = std::os::unix::net::UnixListener::bind(dir.path().join("s")).expect("a socket");
        listener.set_nonblocking(true).expect("a socket");
        let (waiting, go_on, drain) =
            (Arc::<AtomicUsize>::default(), Arc::<Notify>::default(), Arc::<Notify>::default());
        let (count, end) = (waiting.clone(), go_on.clone());
        let wait = move || {
            let (count, end) = (count.clone(), end.clone());
            async move {
                let ended = end.notified();
                count.fetch_add(1, Ordering::AcqRel);
                ended.await;
                "waited"
            }
        };
        let router = Router::new()
            .route("/wait", get(wait))
            .route("/quick", get(|| async { "quick" }))
            .route("/length", post(|body: Bytes| async move { body.len().to_string() }));
        let drained = drain.clone();
        let thread = thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::UnixListener::from_std(listener).expect("a socket");
                serve(listener, LIMIT, router, async move { drained.notified().await }).await;
            });
        });
        Self { dir, waiting, go_on, drain, thread }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join("s")).expect("a connection");
        stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
        stream
    }

    fn get(&self, path: &str) -> UnixStream {
        let mut stream = self.connect();
        let asked = write!(stream, "GET {path} HTTP/1.0\r\n\r\n");
        // A server that refuses the connection may have closed it by now. Its answer can still be read.
        let is_refused = asked.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::BrokenPipe);
        assert!(asked.is_ok() || is_refused, "{asked:?}");
        stream
    }

    /// Connections that wait for their answers.
    fn wait_for_answers(&self, count: usize) -> Vec<UnixStream> {
        let streams = (0..count).map(|_| self.get("/wait")).collect();
        while self.waiting.load(Ordering::Acquire) < count {
            thread::sleep(Duration::from_millis(1));
        }
        streams
    }

    fn end(self) {
        self.drain.notify_one();
        self.thread.join().expect("no panic");
    }
}

fn answer(mut stream: UnixStream) -> String {
    let mut text = String::new();
    stream.read_to_string(&mut text).expect("an answer");
    text
}

#[test]
fn clients_that_send_nothing_or_half_a_request_keep_no_other_client_out() {
    let server = Server::new();
    for begun in ["", "GET /qui", "POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf"] {
        let mut silent: Vec<_> = (0..3 * LIMIT).map(|_| server.connect()).collect();
        silent.iter_mut().for_each(|stream| drop(stream.write_all(begun.as_bytes())));
        assert!(answer(server.get("/quick")).ends_with("quick"), "after {begun:?}");
        // The first of them are closed: they read the end or an error, and do not wait.
        let oldest = &mut silent[0];
        let read = oldest.read(&mut [0; 512]);
        assert!(
            read.is_ok() || read.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionReset),
            "{read:?}"
        );
    }
    server.end();
}

#[test]
fn a_connection_whose_request_is_being_answered_is_not_replaced() {
    let server = Server::new();
    let waiting = server.wait_for_answers(LIMIT - 1);
    for _ in 0..3 * LIMIT {
        assert!(answer(server.get("/quick")).ends_with("quick"));
    }
    server.go_on.notify_waiters();
    for stream in waiting {
        assert!(answer(stream).ends_with("waited"));
    }
    server.end();
}

#[test]
fn a_connection_above_the_bound_is_refused_with_the_reason() {
    let server = Server::new();
    let waiting = server.wait_for_answers(LIMIT);
    let refused = answer(server.get("/quick"));
    assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
    let (_, body) = refused.split_once("\r\n\r\n").expect("a head");
    let body: serde_json::Value = serde_json::from_str(body).expect("an object");
    assert_eq!(body["error"]["kind"], "busy");
    assert!(body["error"]["message"].as_str().is_some_and(|text| text.contains("8 connections")), "{body}");
    // A flood of them ends too.
    let flood: Vec<_> = (0..4 * REFUSALS).map(|_| server.connect()).collect();
    drop(flood);
    server.go_on.notify_waiters();
    waiting.into_iter().for_each(|stream| assert!(answer(stream).ends_with("waited")));
    assert!(answer(server.get("/quick")).ends_with("quick"));
    server.end();
}

#[test]
fn a_connection_is_used_again_for_further_requests() {
    let server = Server::new();
    let mut stream = server.connect();
    for length in [0, 1, 100_000] {
        write!(stream, "POST /length HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n\r\n")
            .expect("asked");
        stream.write_all(&vec![b'x'; length]).expect("sent");
        let wanted = format!("\r\n\r\n{length}");
        let mut text = String::new();
        while !text.ends_with(&wanted) {
            let mut bytes = [0; 512];
            let read = stream.read(&mut bytes).expect("an answer");
            assert!(read > 0, "{text}");
            text += &String::from_utf8_lossy(&bytes[..read]);
        }
    }
    server.end();
}
