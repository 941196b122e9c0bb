//! Joins concurrent flushes: the flushes that are requested while one runs are all served by the next one.

use std::cell::Cell;

use parking_lot::{Condvar, Mutex};

use super::guard::scopeguard;

/// Joins the flushes of one delta.
#[derive(Default)]
pub(super) struct FlushGate {
    rounds: Mutex<FlushRounds>,
    changed: Condvar,
}

/// The flushes that run, wait and have ended. What must hold: a caller learns the result of exactly the flush that
/// served it, however many flushes have ended before the caller's thread runs again.
#[derive(Debug, Default)]
pub(super) struct FlushRounds {
    running: bool,
    /// Number of the last flush that began, and of the last that ended.
    begun: u64,
    ended: u64,
    /// Numbers of the flushes whose result a caller has yet to read, one entry for each caller.
    waiting: Vec<u64>,
    /// Error numbers of failed flushes whose result a caller has yet to read.
    failed: Vec<(u64, i32)>,
}

impl FlushRounds {
    /// Registers a caller. Returns the number of the flush that serves it, which has not begun yet.
    pub(super) fn register(&mut self) -> u64 {
        let mine = self.begun + 1;
        self.waiting.push(mine);
        mine
    }

    /// Whether the caller must wait: its flush has not ended, and another one runs.
    fn must_wait(&self, mine: u64) -> bool {
        self.running && self.ended < mine
    }

    /// The result of the flush. `None`: the caller must lead it, and it counts as running. Each caller asks once.
    pub(super) fn outcome(&mut self, mine: u64) -> Option<Result<(), i32>> {
        if let Some(at) = self.waiting.iter().position(|n| *n == mine) {
            self.waiting.swap_remove(at);
        }
        if self.ended < mine {
            (self.running, self.begun) = (true, mine);
            return None;
        }
        let failed = self.failed.iter().find(|(n, _)| *n == mine).map(|(_, errno)| *errno);
        Some(failed.map_or(Ok(()), Err))
    }

    /// Notes the end of the flush that its caller led.
    pub(super) fn finish(&mut self, mine: u64, failed: Option<i32>) {
        self.running = false;
        self.ended = mine;
        self.failed.extend(failed.map(|errno| (mine, errno)));
        self.failed.retain(|(n, _)| self.waiting.contains(n));
    }
}

impl FlushGate {
    /// Runs `flush`, or waits for the flush of another caller that begins after this call. `errno` makes the error
    /// number that the other callers get, and `of_another` makes their error from it.
    pub(super) fn join<E>(
        &self,
        flush: impl FnOnce() -> Result<(), E>,
        errno: impl FnOnce(&E) -> i32,
        of_another: impl FnOnce(i32) -> E,
    ) -> Result<(), E> {
        let mut rounds = self.rounds.lock();
        let mine = rounds.register();
        while rounds.must_wait(mine) {
            self.changed.wait(&mut rounds);
        }
        if let Some(outcome) = rounds.outcome(mine) {
            return outcome.map_err(of_another);
        }
        drop(rounds);
        // When this unwinds, the callers that joined get EIO.
        let failed = Cell::new(Some(libc::EIO));
        let _lead = scopeguard(|| {
            self.rounds.lock().finish(mine, failed.get());
            self.changed.notify_all();
        });
        let result = flush();
        failed.set(result.as_ref().err().map(errno));
        result
    }
}
