//! Lets concurrent flushes join: one that comes while another runs is served by the next, together with all others
//! that wait.

use std::cell::Cell;

use parking_lot::{Condvar, Mutex};

use super::guard::scopeguard;

/// How flushes of one delta join.
#[derive(Default)]
pub(super) struct FlushGate {
    turns: Mutex<Turns>,
    changed: Condvar,
}

/// Whose turn it is. What must hold: whoever arrived is told how exactly the flush ended that served him, however many
/// have ended since, because he may not have run meanwhile.
#[derive(Debug, Default)]
pub(super) struct Turns {
    running: bool,
    /// Flushes begun, and ended.
    begun: u64,
    ended: u64,
    /// Which ones somebody waits for, or has not yet asked for.
    waiting: Vec<u64>,
    /// How the ones failed that somebody may still ask for.
    failed: Vec<(u64, i32)>,
}

impl Turns {
    /// Somebody wants a flush that begins after now: the number of the one that serves him.
    pub(super) fn arrive(&mut self) -> u64 {
        let mine = self.begun + 1;
        self.waiting.push(mine);
        mine
    }

    /// Whether that one has neither ended nor may be begun.
    fn is_to_wait(&self, mine: u64) -> bool {
        self.running && self.ended < mine
    }

    /// How it ended; `None` when it is for the asker to lead it, which then runs. To be asked once.
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

    /// The flush that somebody leads has ended.
    pub(super) fn end(&mut self, mine: u64, failed: Option<i32>) {
        self.running = false;
        self.ended = mine;
        self.failed.extend(failed.map(|errno| (mine, errno)));
        self.failed.retain(|(n, _)| self.waiting.contains(n));
    }
}

impl FlushGate {
    /// Runs `flush`, or waits for somebody else's that begins after now: then `Err` has its error number, as `failed`
    /// made it.
    pub(super) fn join<E>(
        &self,
        flush: impl FnOnce() -> Result<(), E>,
        errno: impl FnOnce(&E) -> i32,
        of_another: impl FnOnce(i32) -> E,
    ) -> Result<(), E> {
        let mut turns = self.turns.lock();
        let mine = turns.arrive();
        while turns.is_to_wait(mine) {
            self.changed.wait(&mut turns);
        }
        if let Some(outcome) = turns.outcome(mine) {
            return outcome.map_err(of_another);
        }
        drop(turns);
        // Those who joined are told so when this unwinds.
        let failed = Cell::new(Some(libc::EIO));
        let _lead = scopeguard(|| {
            self.turns.lock().end(mine, failed.get());
            self.changed.notify_all();
        });
        let result = flush();
        failed.set(result.as_ref().err().map(errno));
        result
    }
}
