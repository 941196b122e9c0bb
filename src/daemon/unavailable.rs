//! The control socket's answer while no worker serves: why, instead of silence.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::Duration;

use serde_json::json;

/// How long one client may take. The supervisor has nothing more urgent to do meanwhile than to start a worker.
const PATIENCE: Duration = Duration::from_millis(100);

/// Answers one client that waits, if any, with 503 and the reason.
pub fn answer(listener: &UnixListener, message: &str) {
    // A worker made the socket one that does not block.
    let Ok((mut client, _)) = listener.accept() else { return };
    let ready = client
        .set_nonblocking(false)
        .and_then(|()| client.set_read_timeout(Some(PATIENCE)))
        .and_then(|()| client.set_write_timeout(Some(PATIENCE)));
    if ready.is_err() {
        return;
    }
    // What a client has said is read before the socket closes, or the answer may not reach it.
    let mut request = [0; 64 << 10];
    if !matches!(client.read(&mut request), Ok(1..)) {
        return;
    }
    let body = json!({"error": {"kind": "unavailable", "message": message}}).to_string();
    let head = "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nconnection: close";
    let _ = write!(client, "{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
}
