//! SIGINT and SIGTERM to a command that waits.
//!
//! What must hold: the first signal ends the wait in an orderly way, with a message. A second one ends the process at
//! once, whatever the command waits for.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

#[derive(Default)]
struct Shared {
    first: Mutex<Option<i32>>,
    arrived: Condvar,
}

/// The signals of this process, from the time at which it is made.
pub(super) struct Interrupts(Arc<Shared>);

impl Interrupts {
    /// Catches the signals. Where that is not possible, they end the process as usual.
    pub(super) fn catch() -> Self {
        let shared = Arc::new(Shared::default());
        let this = Arc::clone(&shared);
        let wait = |mut signals: Signals| {
            move || {
                for signal in signals.forever() {
                    if this.first.lock().replace(signal).is_some() {
                        std::process::exit(status(signal).into());
                    }
                    this.arrived.notify_all();
                }
            }
        };
        if let Ok(signals) = Signals::new([SIGINT, SIGTERM]) {
            let _ = thread::Builder::new().name("signals".into()).spawn(wait(signals));
        }
        Self(shared)
    }

    /// Waits for a while. Returns the signal that arrived, at once when it has arrived before.
    pub(super) fn pause(&self, time: Duration) -> Option<i32> {
        let end = Instant::now() + time;
        let mut first = self.0.first.lock();
        while first.is_none() && !self.0.arrived.wait_until(&mut first, end).timed_out() {}
        *first
    }
}

/// The exit status of a process that a signal ended, as a shell reports it.
pub(super) fn status(signal: i32) -> u8 {
    u8::try_from(128 + signal).unwrap_or(1)
}
