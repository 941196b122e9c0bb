//! The control socket's answer while no worker serves: why, instead of silence.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use serde::Serialize;

use crate::control::wire::{ErrorBody, ErrorKind, SilentStatus, Stopping, UpgradeBegun};

/// How long one client may take. The supervisor has nothing more urgent to do meanwhile than to start a worker.
const PATIENCE: Duration = Duration::from_millis(100);

/// What a client wants that needs no worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// `POST /v1/stop`.
    Stop,
    /// `POST /v1/upgrade` to the program that is installed now: it may be what makes workers live again.
    Upgrade,
}

/// What clients hear.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    /// Why no worker answers.
    pub message: &'a str,
    /// The answer to `GET /v1/status`, when there is a worker to tell of.
    pub status: Option<&'a SilentStatus>,
    /// The number of an upgrade that may begin.
    pub upgrade: Option<u64>,
}

/// Answers one client that waits, if any: with 503 and the reason, unless its wish can be granted.
pub fn answer(listener: &UnixListener, situation: &Situation<'_>) -> Option<Wish> {
    let Situation { message, status, upgrade } = *situation;
    // A worker made the socket one that does not block.
    let (mut client, _) = listener.accept().ok()?;
    client.set_nonblocking(false).ok()?;
    client.set_read_timeout(Some(PATIENCE)).ok()?;
    client.set_write_timeout(Some(PATIENCE)).ok()?;
    // What a client has said is read before the socket closes, or the answer may not reach it.
    let mut request = [0; 64 << 10];
    let got = client.read(&mut request).ok()?;
    let (request, body) = split(&request[..got])?;
    let (wish, line, body) = match request {
        b"POST /v1/stop HTTP/1.1" => (Some(Wish::Stop), "200 OK", text(&Stopping { stopping: true })),
        b"POST /v1/upgrade HTTP/1.1" if body == Body::None => match upgrade {
            Some(number) => (Some(Wish::Upgrade), "202 Accepted", text(&UpgradeBegun { number })),
            None => {
                let message = "an upgrade is under way, or the daemon is stopping; wait for its end";
                (None, "409 Conflict", text(&ErrorBody::new(ErrorKind::InUse, message)))
            }
        },
        b"GET /v1/status HTTP/1.1" if status.is_some() => (None, "200 OK", text(&status)),
        _ => (None, "503 Service Unavailable", text(&ErrorBody::new(ErrorKind::Unavailable, message))),
    };
    let head = format!("HTTP/1.1 {line}\r\ncontent-type: application/json\r\nconnection: close");
    let _ = write!(client, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    wish
}

/// As JSON, which these bodies always are: their keys are text.
fn text(body: &impl Serialize) -> String {
    serde_json::to_string(body).unwrap_or_default()
}

/// Whether a request has a body; what it says is not read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    None,
    Some,
}

/// The first line, and whether there is a body: by the header, as it may not be here yet.
fn split(request: &[u8]) -> Option<(&[u8], Body)> {
    let end = request.windows(4).position(|w| w == b"\r\n\r\n")?;
    let line = request.split(|b| *b == b'\r').next()?;
    let head = request[..end].to_ascii_lowercase();
    let mut fields = head.split(|b| *b == b'\n').filter_map(|field| field.strip_prefix(b"content-length:"));
    let is_none = fields.all(|length| length.trim_ascii() == b"0") && request.len() == end + 4;
    let chunked = head.windows(18).any(|w| w == b"transfer-encoding:");
    Some((line, if is_none && !chunked { Body::None } else { Body::Some }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::control::wire::Standby;

    fn ask(request: &str) -> (Option<Wish>, String) {
        ask_with(request, Some(7))
    }

    fn ask_with(request: &str, upgrade: Option<u64>) -> (Option<Wish>, String) {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).expect("bind");
        let mut client = UnixStream::connect(&path).expect("connect");
        client.write_all(request.as_bytes()).expect("write");
        let status = SilentStatus {
            version: "1".into(),
            mount: "/m".into(),
            store: "/s".into(),
            supervisor_pid: 4,
            supervisor_version: "1".into(),
            worker_pid: 5,
            worker_starts: 1,
            worker_not_answering_since: "2026-11-21T10:00:00Z".into(),
            worker_not_answering_why: "it is stopped".into(),
            worker_ends: Vec::new(),
            standby: Standby::default(),
            uptime_seconds: 1,
            bases: None,
            disks: None,
            cache: None,
        };
        let message = "the last one \"ended\"";
        let status = request.contains("with=status").then_some(&status);
        let wish = answer(&listener, &Situation { message, status, upgrade });
        let mut text = String::new();
        client.read_to_string(&mut text).expect("read");
        (wish, text)
    }

    #[test]
    fn clients_hear_why_nobody_serves() {
        let (wish, text) = ask("GET /v1/status HTTP/1.1\r\nhost: plyfs\r\n\r\n");
        assert_eq!(wish, None);
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        assert!(text.contains(r#""kind":"unavailable""#) && text.contains(r#"\"ended\""#), "{text}");
    }

    #[test]
    fn the_status_of_a_worker_that_does_not_answer_is_told() {
        let (_, text) = ask("GET /v1/status HTTP/1.1\r\nhost: plyfs\r\nx: with=status\r\n\r\n");
        assert!(
            text.starts_with("HTTP/1.1 200 ")
                && text.contains(r#""worker_pid":5,"#)
                && text.contains(r#""cache":null"#),
            "{text}"
        );
        let (_, text) = ask("GET /v1/disks HTTP/1.1\r\nhost: plyfs\r\nx: with=status\r\n\r\n");
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
    }

    #[test]
    fn an_end_and_an_upgrade_need_no_worker() {
        let (wish, text) = ask("POST /v1/stop HTTP/1.1\r\nhost: plyfs\r\n\r\n");
        assert_eq!(wish, Some(Wish::Stop));
        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
        let (wish, text) = ask("POST /v1/upgrade HTTP/1.1\r\nhost: plyfs\r\n\r\n");
        assert_eq!(wish, Some(Wish::Upgrade));
        assert!(text.contains(r#"{"number":7}"#), "{text}");
        let (wish, text) = ask("POST /v1/upgrade HTTP/1.1\r\nhost: plyfs\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(wish, Some(Wish::Upgrade), "{text}");
        let (wish, text) = ask_with("POST /v1/upgrade HTTP/1.1\r\nhost: plyfs\r\n\r\n", None);
        assert_eq!(wish, None);
        assert!(text.starts_with("HTTP/1.1 409 ") && text.contains("under way"), "{text}");
        // Another program is the worker's business: it reads the whole request.
        let (wish, text) = ask("POST /v1/upgrade HTTP/1.1\r\nhost: plyfs\r\n\r\n{\"program\":\"/x\"}");
        assert_eq!(wish, None);
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        // The body may come later than the head.
        let (wish, text) = ask("POST /v1/upgrade HTTP/1.1\r\nhost: plyfs\r\nContent-Length: 16\r\n\r\n");
        assert_eq!(wish, None, "{text}");
    }
}
