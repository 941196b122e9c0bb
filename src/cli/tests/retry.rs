//! Commands against a scripted socket: what they send, and how they handle a lost answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use serde_json::{Value, json};

use super::super::client::Client;
use super::super::error::CliError;
use super::super::retry;
use crate::control::wire::{AddBase, CreateDisks, ErrorKind, Format};

/// One request that the daemon expects, and what it does with it.
enum Exchange {
    /// The worker dies before it answers.
    Lost(&'static str),
    Answer(&'static str, u16, Value),
}

use Exchange::{Answer, Lost};

fn refused(kind: &str) -> Value {
    json!({"error": {"kind": kind, "message": format!("it is {kind}")}})
}

/// A disk as the daemon shows it.
fn disk(name: &str, base: Option<&str>, size: u64) -> Value {
    json!({"name": name, "base": base, "size": size})
}

struct Daemon {
    dir: tempfile::TempDir,
    thread: JoinHandle<Vec<(String, String)>>,
}

impl Daemon {
    /// A daemon that accepts one connection per exchange, and checks that the request is the expected one.
    fn scripted(exchanges: Vec<Exchange>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join("control.sock")).expect("a socket");
        let thread = thread::spawn(move || {
            exchanges.into_iter().map(|exchange| serve_one(&listener, exchange)).collect()
        });
        Self { dir, thread }
    }

    fn client(&self) -> Client {
        Client::new(self.dir.path().to_owned()).expect("a client")
    }

    /// Head and body of each request that arrived.
    fn end(self) -> Vec<(String, String)> {
        self.thread.join().expect("each request was the expected one")
    }
}

fn serve_one(listener: &UnixListener, exchange: Exchange) -> (String, String) {
    let (mut stream, _) = listener.accept().expect("a connection");
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout");
    let mut reader = BufReader::new(stream.try_clone().expect("descriptors"));
    let mut head = String::new();
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).expect("a line of the request");
        if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().expect("a length");
        }
        if line == "\r\n" {
            break;
        }
        head += &line;
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("the body");
    let expected = match &exchange {
        Lost(expected) | Answer(expected, ..) => *expected,
    };
    assert!(head.starts_with(&format!("{expected} HTTP/1.1\r\n")), "expected {expected}, got {head}");
    if let Answer(_, status, value) = exchange {
        let text = value.to_string();
        let head = format!(
            "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            text.len()
        );
        stream.write_all((head + &text).as_bytes()).expect("answered");
    }
    (head, String::from_utf8(body).expect("text"))
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(ToString::to_string).collect()
}

fn create(
    daemon: &Daemon,
    wanted: &[&str],
    base: Option<&str>,
    size: Option<u64>,
) -> Result<Value, CliError> {
    let body =
        CreateDisks { names: names(wanted), base: base.map(str::to_owned), size, ..CreateDisks::default() };
    retry::create(&daemon.client(), "/v1/disks", &body, "cannot create")
}

#[test]
fn a_query_is_sent_until_it_is_answered() {
    let daemon = Daemon::scripted(vec![
        Lost("GET /v1/status"),
        Lost("GET /v1/status"),
        Answer("GET /v1/status", 200, json!({"disks": 1})),
    ]);
    assert_eq!(daemon.client().get("/v1/status", "cannot ask").expect("an answer")["disks"], 1);
    daemon.end();
}

#[test]
fn without_a_daemon_a_command_fails_at_once() {
    let daemon = Daemon::scripted(vec![Lost("GET /v1/status")]);
    let client = daemon.client();
    // The listener closes after the first request.
    let error = client.get("/v1/status", "cannot ask").expect_err("the daemon has ended meanwhile");
    assert!(matches!(error, CliError::Transport { .. }), "{error}");
    let error = client.get("/v1/status", "cannot ask").expect_err("no daemon runs");
    assert!(matches!(error, CliError::NoDaemon { .. }), "{error}");
    daemon.end();
}

/// The key and the body of each creation that arrived.
fn creations(daemon: Daemon) -> Vec<(String, Value)> {
    let of = |(head, body): (String, String)| {
        let key = head
            .lines()
            .find_map(|line| line.to_lowercase().strip_prefix("idempotency-key: ").map(str::to_owned));
        (key.expect("a key"), serde_json::from_str(&body).expect("JSON"))
    };
    daemon.end().into_iter().map(of).collect()
}

// Earlier, a command guessed from the creation time of an object whether its first attempt had created it.
#[test]
fn a_creation_is_sent_again_with_its_key() {
    let made = [disk("a", Some("b"), 8192), disk("c", Some("b"), 8192)];
    let daemon = Daemon::scripted(vec![
        Lost("POST /v1/disks"),
        Answer("POST /v1/disks", 503, refused("unavailable")),
        Lost("POST /v1/disks"),
        Answer("POST /v1/disks", 200, json!(made)),
    ]);
    assert_eq!(create(&daemon, &["a", "c"], Some("b"), None).expect("made"), json!(made));
    let sent = creations(daemon);
    assert_eq!(sent[0].0.len(), 32, "{sent:?}");
    assert_eq!(sent[0].1, json!({"names": ["a", "c"], "base": "b", "size": null}));
    assert!(sent.iter().all(|one| *one == sent[0]), "{sent:?}");
}

#[test]
fn two_commands_have_different_keys() {
    let of = || {
        let daemon = Daemon::scripted(vec![Answer("POST /v1/disks", 200, json!([disk("a", None, 4096)]))]);
        create(&daemon, &["a"], None, Some(4096)).expect("made");
        creations(daemon).remove(0).0
    };
    assert_ne!(of(), of());
}

#[test]
fn a_creation_fails_when_another_client_created_the_object_first() {
    let daemon =
        Daemon::scripted(vec![Lost("POST /v1/disks"), Answer("POST /v1/disks", 409, refused("exists"))]);
    let error = create(&daemon, &["a"], None, Some(4096)).expect_err("it is not ours");
    assert!(error.is(ErrorKind::Exists), "{error}");
    daemon.end();
    let daemon = Daemon::scripted(vec![Answer("POST /v1/disks", 409, refused("exists"))]);
    assert!(create(&daemon, &["a"], None, Some(4096)).is_err());
    daemon.end();
}

#[test]
fn a_removal_is_done_once() {
    let numbered = |id: u64| json!({"name": "a", "id": id});
    let daemon = Daemon::scripted(vec![
        Answer("GET /v1/disks/a", 200, numbered(1)),
        Lost("DELETE /v1/disks/a"),
        Answer("GET /v1/disks/a", 200, numbered(1)),
        Answer("DELETE /v1/disks/a", 200, json!({"removed": ["a"]})),
    ]);
    retry::remove(&daemon.client(), "disk", "a", retry::Removal::default()).expect("removed by the second");
    daemon.end();

    let daemon = Daemon::scripted(vec![
        Answer("GET /v1/disks/a", 200, numbered(1)),
        Lost("DELETE /v1/disks/a"),
        Answer("GET /v1/disks/a", 404, refused("not_found")),
    ]);
    retry::remove(&daemon.client(), "disk", "a", retry::Removal::default()).expect("removed by the first");
    daemon.end();

    // Another client has created a new disk of that name in between.
    let daemon = Daemon::scripted(vec![
        Answer("GET /v1/disks/a", 200, numbered(1)),
        Lost("DELETE /v1/disks/a"),
        Answer("GET /v1/disks/a", 200, numbered(2)),
    ]);
    retry::remove(&daemon.client(), "disk", "a", retry::Removal::default()).expect("removed by the first");
    daemon.end();

    // A disk that never existed is not reported as removed, even after a lost answer.
    let daemon = Daemon::scripted(vec![
        Answer("GET /v1/disks/a", 404, refused("not_found")),
        Lost("DELETE /v1/disks/a"),
        Answer("DELETE /v1/disks/a", 404, refused("not_found")),
    ]);
    retry::remove(&daemon.client(), "disk", "a", retry::Removal::default()).expect_err("it was never there");
    daemon.end();
}

#[test]
fn a_base_is_added_once() {
    let body = AddBase {
        name: "b".into(),
        source: "/b.img".into(),
        format: Some(Format::Raw),
        ..AddBase::default()
    };
    let made = json!({"name": "b", "source": "/b.img", "format": "raw"});
    let daemon = Daemon::scripted(vec![Lost("POST /v1/bases"), Answer("POST /v1/bases", 200, made.clone())]);
    assert_eq!(retry::create(&daemon.client(), "/v1/bases", &body, "cannot add").expect("made"), made);
    let sent = creations(daemon);
    assert_eq!(sent[0], sent[1]);

    let daemon =
        Daemon::scripted(vec![Lost("POST /v1/bases"), Answer("POST /v1/bases", 409, refused("exists"))]);
    let error = retry::create(&daemon.client(), "/v1/bases", &body, "cannot add").expect_err("another's");
    assert!(error.is(ErrorKind::Exists), "{error}");
    daemon.end();
}
