//! The supervisor's answer on the control socket while no worker serves: the reason, instead of a timeout.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use serde::Serialize;

use crate::control::wire::{ErrorBody, ErrorKind, SilentStatus, Stopping, UpgradeBegun};

/// The time limit of one client. The supervisor waits for it, so a client can delay the start of a worker by this time.
const CLIENT_TIMEOUT: Duration = Duration::from_millis(100);

/// A request that needs no worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SupervisorRequest {
    /// `POST /v1/stop`.
    Stop,
    /// `POST /v1/upgrade` to the installed program, which may repair workers that keep ending.
    Upgrade,
}

/// The answers to clients.
#[derive(Debug, Clone, Copy)]
pub struct Unavailability<'a> {
    /// Why no worker answers.
    pub message: &'a str,
    /// The answer to `GET /v1/status`, when a worker exists that does not answer.
    pub status: Option<&'a SilentStatus>,
    /// The number of an upgrade that may begin.
    pub upgrade: Option<u64>,
}

/// Answers one waiting client, if any. Returns its request when the supervisor can carry it out; otherwise the answer
/// is 503 with the reason.
pub fn answer(listener: &UnixListener, unavailability: &Unavailability<'_>) -> Option<SupervisorRequest> {
    let Unavailability { message, status, upgrade } = *unavailability;
    // A worker made the listening socket non-blocking.
    let (mut client, _) = listener.accept().ok()?;
    client.set_nonblocking(false).ok()?;
    client.set_read_timeout(Some(CLIENT_TIMEOUT)).ok()?;
    client.set_write_timeout(Some(CLIENT_TIMEOUT)).ok()?;
    // The request is read before the socket closes; otherwise the client may not receive the answer.
    let mut request = [0; 64 << 10];
    let got = client.read(&mut request).ok()?;
    let (request, body) = split(&request[..got])?;
    let (accepted, line, body) = match request {
        b"POST /v1/stop HTTP/1.1" => {
            (Some(SupervisorRequest::Stop), "200 OK", text(&Stopping { stopping: true }))
        }
        b"POST /v1/upgrade HTTP/1.1" if body == Body::None => match upgrade {
            Some(number) => {
                (Some(SupervisorRequest::Upgrade), "202 Accepted", text(&UpgradeBegun { number }))
            }
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
    accepted
}

/// The body as JSON. These bodies have text keys only, so they always encode.
fn text(body: &impl Serialize) -> String {
    serde_json::to_string(body).unwrap_or_default()
}

/// Whether a request has a body. Its content is not read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Body {
    None,
    Some,
}

/// The request line, and whether the request has a body. The header decides, because the body may not have arrived yet.
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

    fn ask(request: &str) -> (Option<SupervisorRequest>, String) {
        ask_with(request, Some(7))
    }

    fn ask_with(request: &str, upgrade: Option<u64>) -> (Option<SupervisorRequest>, String) {
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
        let accepted = answer(&listener, &Unavailability { message, status, upgrade });
        let mut text = String::new();
        client.read_to_string(&mut text).expect("read");
        (accepted, text)
    }

    #[test]
    fn the_answer_says_why_no_worker_serves() {
        let (accepted, text) = ask("GET /v1/status HTTP/1.1\r\nhost: plyfs\r\n\r\n");
        assert_eq!(accepted, None);
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        assert!(text.contains(r#""kind":"unavailable""#) && text.contains(r#"\"ended\""#), "{text}");
    }

    #[test]
    fn status_reports_a_worker_that_does_not_answer() {
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
    fn stop_and_upgrade_need_no_worker() {
        let (accepted, text) = ask("POST /v1/stop HTTP/1.1\r\nhost: plyfs\r\n\r\n");
        assert_eq!(accepted, Some(SupervisorRequest::Stop));
        assert!(text.starts_with("HTTP/1.1 200 "), "{text}");
        let (accepted, text) = ask("POST /v1/upgrade HTTP/1.1\r\nhost: plyfs\r\n\r\n");
        assert_eq!(accepted, Some(SupervisorRequest::Upgrade));
        assert!(text.contains(r#"{"number":7}"#), "{text}");
        let (accepted, text) = ask("POST /v1/upgrade HTTP/1.1\r\nhost: plyfs\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(accepted, Some(SupervisorRequest::Upgrade), "{text}");
        let (accepted, text) = ask_with("POST /v1/upgrade HTTP/1.1\r\nhost: plyfs\r\n\r\n", None);
        assert_eq!(accepted, None);
        assert!(text.starts_with("HTTP/1.1 409 ") && text.contains("under way"), "{text}");
        // Only a worker upgrades to another program, because it reads the whole request.
        let (accepted, text) = ask("POST /v1/upgrade HTTP/1.1\r\nhost: plyfs\r\n\r\n{\"program\":\"/x\"}");
        assert_eq!(accepted, None);
        assert!(text.starts_with("HTTP/1.1 503 "), "{text}");
        // The body may arrive after the head.
        let (accepted, text) = ask("POST /v1/upgrade HTTP/1.1\r\nhost: plyfs\r\nContent-Length: 16\r\n\r\n");
        assert_eq!(accepted, None, "{text}");
    }
}
