//! The priority of threads whose work no guest waits for.
//!
//! Guests, commands and background work share the processors. A thread at [`background`] priority takes what the threads
//! of requests leave, and about a third of a processor's time where they leave nothing: it may hold a lock that a request
//! needs. What must hold: a thread that serves guests never has the lower priority. New threads inherit that of the thread
//! that starts them, so those that serve guests, and that any thread may start, call [`ordinary`] first (D100).
//!
//! A process may raise the priority of a thread again only within RLIMIT_NICE. Where the limit cannot be set, all threads
//! keep the same priority.

use std::sync::OnceLock;

use super::sys::check;

/// How much nicer threads of background work are than others: the scheduler gives them a third of the weight.
const NICER: i32 = 5;
/// The lowest priority.
const NICEST: i32 = 19;

/// The nice value of threads that serve guests; `None` when it cannot be restored, and priorities stay alone.
static ORDINARY: OnceLock<Option<i32>> = OnceLock::new();

/// To be called once, while the process has its rights and one thread.
pub fn prepare() {
    ORDINARY.get_or_init(|| {
        // SAFETY: numbers, and a plain struct in and out.
        unsafe {
            *libc::__errno_location() = 0;
            let nice = libc::getpriority(libc::PRIO_PROCESS as _, 0);
            if nice == -1 && *libc::__errno_location() != 0 {
                return None;
            }
            let wanted = libc::rlim_t::try_from(20 - nice).ok()?;
            let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
            check(libc::getrlimit(libc::RLIMIT_NICE, &mut limit).into()).ok()?;
            if limit.rlim_cur < wanted {
                let limit = libc::rlimit { rlim_cur: wanted, rlim_max: limit.rlim_max.max(wanted) };
                check(libc::setrlimit(libc::RLIMIT_NICE, &limit).into()).ok()?;
            }
            Some(nice)
        }
    });
}

fn set(nice: impl FnOnce(i32) -> i32) {
    if let Some(Some(ordinary)) = ORDINARY.get() {
        let nice = nice(*ordinary).min(NICEST);
        // SAFETY: numbers only; 0 is the calling thread. Without success the thread keeps its priority.
        unsafe { libc::setpriority(libc::PRIO_PROCESS as _, 0, nice) };
    }
}

/// The calling thread, and threads that it starts, get the priority of background work.
pub fn background() {
    set(|ordinary| ordinary + NICER);
}

/// The calling thread gets the priority of threads that serve guests, whatever thread has started it.
pub fn ordinary() {
    set(|ordinary| ordinary);
}

/// The nice value of the calling thread.
#[cfg(test)]
pub fn current() -> i32 {
    // SAFETY: numbers only.
    unsafe { libc::getpriority(libc::PRIO_PROCESS as _, 0) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards D100.
    #[test]
    fn a_thread_that_serves_guests_has_the_ordinary_priority_whatever_thread_starts_it() {
        prepare();
        let before = current();
        let of_new_thread = || {
            std::thread::spawn(|| {
                (current(), {
                    ordinary();
                    current()
                })
            })
            .join()
        };
        let (inherited, own) = std::thread::spawn(move || {
            background();
            assert!(current() > before || ORDINARY.get() == Some(&None) || before == NICEST);
            of_new_thread().map(|(inherited, own)| (inherited == current(), own))
        })
        .join()
        .expect("no panic")
        .expect("no panic");
        assert!(inherited, "threads inherit the priority");
        assert_eq!(own, before);
        assert_eq!(current(), before, "another thread's priority");
    }
}
