//! Commands against a socket that is played by the test: what they send, and what they make of a lost answer.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::super::again;
use super::super::client::Client;
use super::super::error::CliError;

/// What the daemon does with one request.
enum Turn {
    /// The worker dies with it.
    Lost(&'static str),
    Answer(&'static str, u16, Value),
}

use Turn::{Answer, Lost};

fn refused(kind: &str) -> Value {
    json!({"error": {"kind": kind, "message": format!("it is {kind}")}})
}

/// A disk as the daemon shows it, made so many seconds after now.
fn disk(name: &str, base: Option<&str>, size: u64, seconds: i64) -> Value {
    let shift = Duration::from_secs(seconds.unsigned_abs());
    let now = SystemTime::now();
    let created = if seconds < 0 { now - shift } else { now + shift };
    json!({"name": name, "base": base, "size": size, "created": humantime::format_rfc3339_nanos(created).to_string()})
}

struct Daemon {
    dir: tempfile::TempDir,
    thread: JoinHandle<Vec<String>>,
}

impl Daemon {
    /// Takes one connection for each turn; sees that the request is the expected one.
    fn playing(turns: Vec<Turn>) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(dir.path().join("control.sock")).expect("a socket");
        let thread = thread::spawn(move || turns.into_iter().map(|turn| take(&listener, turn)).collect());
        Self { dir, thread }
    }

    fn client(&self) -> Client {
        Client::new(self.dir.path().to_owned()).expect("a client")
    }

    /// The bodies that came.
    fn end(self) -> Vec<String> {
        self.thread.join().expect("each request was the expected one")
    }
}

fn take(listener: &UnixListener, turn: Turn) -> String {
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
    let expected = match &turn {
        Lost(expected) | Answer(expected, ..) => *expected,
    };
    assert!(head.starts_with(&format!("{expected} HTTP/1.1\r\n")), "expected {expected}, got {head}");
    if let Answer(_, status, value) = turn {
        let text = value.to_string();
        let head = format!(
            "HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
            text.len()
        );
        stream.write_all((head + &text).as_bytes()).expect("answered");
    }
    String::from_utf8(body).expect("text")
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
    again::create_disks(&daemon.client(), &names(wanted), base, size, "cannot create")
}

#[test]
fn a_question_is_asked_until_it_is_answered() {
    let daemon = Daemon::playing(vec![
        Lost("GET /v1/status"),
        Lost("GET /v1/status"),
        Answer("GET /v1/status", 200, json!({"disks": 1})),
    ]);
    assert_eq!(daemon.client().get("/v1/status", "cannot ask").expect("an answer")["disks"], 1);
    daemon.end();
}

#[test]
fn without_a_daemon_nobody_waits() {
    let daemon = Daemon::playing(vec![Lost("GET /v1/status")]);
    let client = daemon.client();
    // The listener goes with the first request.
    let error = client.get("/v1/status", "cannot ask").expect_err("nobody is there any more");
    assert!(matches!(error, CliError::Transport { .. }), "{error}");
    let error = client.get("/v1/status", "cannot ask").expect_err("nor is anybody now");
    assert!(matches!(error, CliError::NoDaemon { .. }), "{error}");
    daemon.end();
}

#[test]
fn a_creation_that_was_not_done_is_sent_again() {
    let made = disk("a", None, 4096, 0);
    let daemon = Daemon::playing(vec![
        Lost("POST /v1/disks"),
        Answer("GET /v1/disks/a", 404, refused("not_found")),
        Answer("POST /v1/disks", 200, json!([made])),
    ]);
    assert_eq!(create(&daemon, &["a"], None, Some(4096)).expect("made"), json!([made]));
    daemon.end();
}

#[test]
fn a_creation_that_was_done_is_not_sent_again() {
    let made = disk("a", Some("b"), 8192, 0);
    let daemon = Daemon::playing(vec![Lost("POST /v1/disks"), Answer("GET /v1/disks/a", 200, made.clone())]);
    assert_eq!(create(&daemon, &["a"], Some("b"), None).expect("made"), json!([made]));
    daemon.end();
}

#[test]
fn a_creation_that_was_cut_off_is_completed() {
    let disks: Vec<Value> = ["a", "b", "c"].iter().map(|name| disk(name, None, 4096, 0)).collect();
    let daemon = Daemon::playing(vec![
        Lost("POST /v1/disks"),
        Answer("GET /v1/disks/a", 404, refused("not_found")),
        Answer("GET /v1/disks/b", 200, disks[1].clone()),
        Answer("GET /v1/disks/c", 404, refused("not_found")),
        Answer("POST /v1/disks", 200, json!([disks[0], disks[2]])),
    ]);
    assert_eq!(create(&daemon, &["a", "b", "c"], None, Some(4096)).expect("made"), json!(disks));
    let last: Value = serde_json::from_str(&daemon.end()[4]).expect("JSON");
    assert_eq!(last["names"], json!(["a", "c"]));
}

#[test]
fn a_disk_that_was_there_before_or_is_another_is_not_taken_for_ours() {
    for other in [disk("a", None, 4096, -5), disk("a", None, 8192, 0), disk("a", Some("b"), 4096, 0)] {
        let daemon = Daemon::playing(vec![
            Lost("POST /v1/disks"),
            Answer("GET /v1/disks/a", 200, other.clone()),
            Answer("POST /v1/disks", 409, refused("exists")),
            Answer("GET /v1/disks/a", 200, other.clone()),
        ]);
        let error = create(&daemon, &["a"], None, Some(4096)).expect_err("it is not ours");
        assert!(error.is("exists"), "{error}");
        daemon.end();
    }
    // And when nothing was lost, it is not even looked at.
    let daemon = Daemon::playing(vec![Answer("POST /v1/disks", 409, refused("exists"))]);
    assert!(create(&daemon, &["a"], None, Some(4096)).is_err());
    daemon.end();
}

#[test]
fn a_removal_is_done_once() {
    let numbered = |id: u64| json!({"name": "a", "id": id});
    let daemon = Daemon::playing(vec![
        Answer("GET /v1/disks/a", 200, numbered(1)),
        Lost("DELETE /v1/disks/a"),
        Answer("GET /v1/disks/a", 200, numbered(1)),
        Answer("DELETE /v1/disks/a", 200, json!({"removed": ["a"]})),
    ]);
    again::remove(&daemon.client(), "disk", "a").expect("removed by the second");
    daemon.end();

    let daemon = Daemon::playing(vec![
        Answer("GET /v1/disks/a", 200, numbered(1)),
        Lost("DELETE /v1/disks/a"),
        Answer("GET /v1/disks/a", 404, refused("not_found")),
    ]);
    again::remove(&daemon.client(), "disk", "a").expect("removed by the first");
    daemon.end();

    // Somebody made a new one of that name in between.
    let daemon = Daemon::playing(vec![
        Answer("GET /v1/disks/a", 200, numbered(1)),
        Lost("DELETE /v1/disks/a"),
        Answer("GET /v1/disks/a", 200, numbered(2)),
    ]);
    again::remove(&daemon.client(), "disk", "a").expect("removed by the first");
    daemon.end();

    // What was never there is not removed, whatever gets lost.
    let daemon = Daemon::playing(vec![
        Answer("GET /v1/disks/a", 404, refused("not_found")),
        Lost("DELETE /v1/disks/a"),
        Answer("DELETE /v1/disks/a", 404, refused("not_found")),
    ]);
    again::remove(&daemon.client(), "disk", "a").expect_err("it was never there");
    daemon.end();
}

#[test]
fn a_base_is_added_once() {
    let body = json!({"name": "b", "source": "/b.img", "format": "raw"});
    let mut made = disk("b", None, 4096, 0);
    made["source"] = json!("/b.img");
    made["format"] = json!("raw");
    let daemon = Daemon::playing(vec![Lost("POST /v1/bases"), Answer("GET /v1/bases/b", 200, made.clone())]);
    assert_eq!(again::add_base(&daemon.client(), "b", &body, "cannot add").expect("made"), made);
    daemon.end();

    made["source"] = json!("/other.img");
    let daemon = Daemon::playing(vec![
        Lost("POST /v1/bases"),
        Answer("GET /v1/bases/b", 200, made),
        Answer("POST /v1/bases", 409, refused("exists")),
    ]);
    let error = again::add_base(&daemon.client(), "b", &body, "cannot add").expect_err("another's");
    assert!(error.is("exists"), "{error}");
    daemon.end();
}
