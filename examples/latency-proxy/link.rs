//! One direction of the link that all connections share: when each connection may send, and when its bytes arrive.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How far ahead of now the link may be reserved. With more, one connection could delay the others.
const AHEAD: Duration = Duration::from_millis(1);

/// One direction of the shared link.
pub struct Link {
    seconds_per_byte: f64,
    delay: Duration,
    free: Mutex<Instant>,
}

impl Link {
    pub fn new(bytes_per_second: f64, delay: Duration) -> Self {
        Self { seconds_per_byte: 1.0 / bytes_per_second, delay, free: Mutex::new(Instant::now()) }
    }

    /// Sends bytes after those that are already on the link. Returns when the last of them arrives at the other end,
    /// and how long their sender must wait before it sends more.
    pub fn send(&self, bytes: usize) -> (Instant, Duration) {
        let now = Instant::now();
        let mut free = self.free.lock().expect("nothing panics here");
        let begin = now.max(*free);
        *free = begin + Duration::from_secs_f64(bytes as f64 * self.seconds_per_byte);
        (*free + self.delay, free.saturating_duration_since(now + AHEAD))
    }
}
