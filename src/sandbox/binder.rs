//! The binder: a process that waits until another program frees a TCP address, because a worker may bind none.
//!
//! What must hold:
//! - It binds one address, which the configuration names, and nothing that a message names.
//! - It runs only where the address was taken when the worker began. It does not try before the worker serves: a standby
//!   worker takes no address from the worker that serves.
//! - It dies with its worker, also in a pause between two tries.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use crate::io::{confine as process, sys};

/// The pauses between two tries, from the first to the longest. Each is twice the one before.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(16);
const BEGIN: u8 = 1;
const BOUND: u8 = 2;

/// The worker's end.
pub struct Binder {
    socket: OwnedFd,
}

impl Binder {
    /// Forks the binder. `bind` returns a socket that listens. The calling process has a single thread.
    ///
    /// # Errors
    /// When the process has other threads, or cannot fork.
    pub fn start(bind: impl Fn() -> io::Result<OwnedFd>) -> io::Result<Self> {
        let (ours, theirs) = sys::message_pair()?;
        match process::fork()? {
            process::Forked::Parent(pid) => {
                tracing::debug!(pid, "the binder runs");
                Ok(Self { socket: ours })
            }
            process::Forked::Child => {
                let code = match run(bind, &theirs) {
                    Ok(()) => 0,
                    Err(error) => {
                        tracing::error!(%error, "the binder ends");
                        1
                    }
                };
                std::process::exit(code);
            }
        }
    }

    /// Waits until the address is free and bound. Returns the socket, which listens.
    ///
    /// # Errors
    /// When the binder is gone.
    pub fn wait(&self) -> io::Result<OwnedFd> {
        process::send_message(self.socket.as_fd(), &[BEGIN], None)?;
        let mut answer = [0];
        match process::receive_message(self.socket.as_fd(), &mut answer)? {
            (1, Some(bound)) if answer[0] == BOUND => Ok(bound),
            _ => Err(io::ErrorKind::BrokenPipe.into()),
        }
    }
}

/// The child. Returns when the worker is gone.
fn run(bind: impl Fn() -> io::Result<OwnedFd>, socket: &OwnedFd) -> io::Result<()> {
    process::set_name(c"plyfs-binder");
    process::close_all_but(socket.as_fd())?;
    std::env::set_current_dir("/")?;
    let _ = process::no_new_privileges();
    let _ = process::forbid_core_dumps();
    let mut message = [0];
    if process::receive_message(socket.as_fd(), &mut message)?.0 == 0 {
        return Ok(());
    }
    let mut pause = FIRST_PAUSE;
    let bound = loop {
        match bind() {
            Ok(bound) => break bound,
            Err(_) => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    };
    process::send_message(socket.as_fd(), &[BOUND], Some(bound.as_fd()))?;
    drop(bound);
    // As every helper it ends with its worker, which may not reap it.
    process::receive_message(socket.as_fd(), &mut message).map(drop)
}
