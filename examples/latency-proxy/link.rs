//! One direction of the wire that all connections share: who sends when, and when it arrives.

use std::sync::Mutex;
use std::time::{Duration, Instant};

/// How far ahead of now the wire may be promised: more, and one connection could push the others back.
const AHEAD: Duration = Duration::from_millis(1);

/// See the module.
pub struct Link {
    seconds_per_byte: f64,
    delay: Duration,
    free: Mutex<Instant>,
}

impl Link {
    pub fn new(bytes_per_second: f64, delay: Duration) -> Self {
        Self { seconds_per_byte: 1.0 / bytes_per_second, delay, free: Mutex::new(Instant::now()) }
    }

    /// Puts bytes on the wire behind what is on it. Returns when the last of them arrives at the other end, and how
    /// long their sender has to wait before it may send more.
    pub fn send(&self, bytes: usize) -> (Instant, Duration) {
        let now = Instant::now();
        let mut free = self.free.lock().expect("nothing panics here");
        let begin = now.max(*free);
        *free = begin + Duration::from_secs_f64(bytes as f64 * self.seconds_per_byte);
        (*free + self.delay, free.saturating_duration_since(now + AHEAD))
    }
}
