//! Which threads have just opened a base.
//!
//! cp(1) opens its source and then calls fstat(2). It calls copy_file_range(2) for the whole file, which shares all of it,
//! unless the file has fewer blocks than its size needs; then it reads and writes. The blocks of a base are what the host
//! has of it, so cp would fetch all of a base that is hardly cached. So the first fstat(2) after the open, by the thread
//! that opened, tells of all blocks.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// How long after an open(2) the first fstat(2) may come.
const PATIENCE: Duration = Duration::from_secs(5);
/// Most opens that are remembered.
const REMEMBERED: usize = 64;

struct Opening {
    thread: u32,
    base: u64,
    at: Instant,
}

/// See the module.
#[derive(Default)]
pub struct OpenedBases(Mutex<VecDeque<Opening>>);

impl OpenedBases {
    /// Notes that a thread opens a base; 0 is a thread that is not known.
    pub fn note(&self, thread: u32, base: u64) {
        if thread == 0 {
            return;
        }
        let mut all = self.0.lock();
        all.retain(|one| one.thread != thread);
        if all.len() == REMEMBERED {
            all.pop_front();
        }
        all.push_back(Opening { thread, base, at: Instant::now() });
    }

    /// Whether the thread has opened this base and asked for no attributes of it since. True once.
    pub fn take(&self, thread: u32, base: u64) -> bool {
        let mut all = self.0.lock();
        let found = all.iter().position(|one| (one.thread, one.base) == (thread, base));
        found.and_then(|at| all.remove(at)).is_some_and(|one| one.at.elapsed() < PATIENCE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_look_after_an_open_by_the_same_thread_is_told_apart() {
        let opened = OpenedBases::default();
        assert!(!opened.take(7, 1));
        opened.note(7, 1);
        assert!(!opened.take(8, 1) && !opened.take(7, 2));
        assert!(opened.take(7, 1) && !opened.take(7, 1), "once");
        opened.note(0, 1);
        assert!(!opened.take(0, 1), "a request that was sent again has no thread");
        (1..=REMEMBERED as u32 + 1).for_each(|thread| opened.note(thread, 5));
        assert!(!opened.take(1, 5) && opened.take(2, 5), "the oldest is forgotten");
    }
}
