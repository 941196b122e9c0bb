//! The notify helper: a process that runs the operator's command for events, because a worker may run no program.
//!
//! What must hold:
//! - It runs the command that the configuration names, and nothing that a message of the worker names. A message is
//!   the command's standard input.
//! - It runs only where the configuration has a command. The command has the rights of the daemon.
//! - A command that hangs is killed with its children after [`TIME`]. Meanwhile no other runs.

#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::secrets::COMMAND_PATH;
use crate::config::Config;
use crate::io::{confine as process, sys};

/// How long the command may run.
const TIME: Duration = Duration::from_secs(10);
/// How often the helper checks whether the command has ended.
const CHECK_INTERVAL: Duration = Duration::from_millis(5);
const DONE: u8 = 1;
const FAILED: u8 = 0;

/// The worker's end.
pub struct NotifyHelper {
    socket: Mutex<OwnedFd>,
}

impl NotifyHelper {
    /// Forks the helper, when the configuration has a command. The calling process has a single thread.
    ///
    /// # Errors
    /// When the process has other threads, or cannot fork.
    pub fn start(config: &Config) -> io::Result<Option<Self>> {
        let Some(command) = &config.notify.command else { return Ok(None) };
        let (ours, theirs) = sys::message_pair()?;
        match process::fork()? {
            process::Forked::Parent(pid) => {
                tracing::debug!(pid, "the notify helper runs");
                Ok(Some(Self { socket: Mutex::new(ours) }))
            }
            process::Forked::Child => {
                let code = match run(command, &theirs) {
                    Ok(()) => 0,
                    Err(error) => {
                        tracing::error!(%error, "the notify helper ends");
                        1
                    }
                };
                std::process::exit(code);
            }
        }
    }

    /// Runs the command with at least 1 and at most `MAX_MESSAGE` bytes of input. Waits for its end.
    ///
    /// # Errors
    /// Why it failed.
    pub fn run(&self, input: &[u8]) -> Result<(), String> {
        let unreachable = |error: io::Error| format!("cannot ask the notify helper: {error}");
        let socket = self.socket.lock();
        process::send_message(socket.as_fd(), input, None).map_err(unreachable)?;
        let mut answer = vec![0; process::MAX_MESSAGE];
        let (got, _) = process::receive_message(socket.as_fd(), &mut answer).map_err(unreachable)?;
        match answer[..got].split_first() {
            Some((&DONE, _)) => Ok(()),
            Some((_, why)) => Err(String::from_utf8_lossy(why).into_owned()),
            None => Err("the notify helper has ended; the next worker starts a new one".into()),
        }
    }
}

/// The child. Returns when the worker is gone.
fn run(command: &[String], socket: &OwnedFd) -> io::Result<()> {
    process::set_name(c"plyfs-notify");
    process::close_all_but(socket.as_fd())?;
    std::env::set_current_dir("/")?;
    let _ = process::no_new_privileges();
    let _ = process::forbid_core_dumps();
    let mut input = vec![0; process::MAX_MESSAGE];
    loop {
        let got = match process::receive_message(socket.as_fd(), &mut input) {
            Ok((0, _)) => return Ok(()),
            Ok((got, _)) => got,
            Err(error) => return Err(error),
        };
        let answer = match execute(command, &input[..got], TIME) {
            Ok(()) => vec![DONE],
            Err(why) => [FAILED].into_iter().chain(why.bytes().take(1000)).collect(),
        };
        process::send_message(socket.as_fd(), &answer, None)?;
    }
}

/// Runs a command with this input.
fn execute(command: &[String], input: &[u8], time: Duration) -> Result<(), String> {
    let (program, arguments) = command.split_first().ok_or("the command is empty; name a program")?;
    let failed = |why: String| format!("{program}: {why}");
    let end = Instant::now() + time;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", COMMAND_PATH)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        // A group of its own, so that its children can be killed with it.
        .process_group(0)
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    if let Some(mut stdin) = child.stdin.take() {
        // A pipe holds 64 KiB, so this does not wait. A program that does not read its input may have succeeded.
        let _ = stdin.write_all(input);
    }
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(failed(format!("it failed ({status})"))),
            Ok(None) if Instant::now() < end => std::thread::sleep(CHECK_INTERVAL),
            Ok(None) | Err(_) => {
                // It is not reaped yet, so the pid is still its own.
                let _ = sys::kill_group(child.id(), libc::SIGKILL);
                let _ = child.wait();
                return Err(failed(format!("it takes longer than {time:?}")));
            }
        }
    }
}
