//! `plyfs stop`: tells the daemon to stop and waits until nothing of it is left.

use std::fs::{File, TryLockError};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::Global;
use super::client::{Client, read};
use super::error::CliError;
use crate::control::wire::Status;
use crate::daemon::{End, Outcome};
use crate::format::layout;

const EXAMPLES: &str = "\
Examples:
  plyfs stop
  plyfs stop --timeout 30s

When it is done everything is flushed, the mount is gone and another daemon may start on the store. When a disk
could not be closed the exit status is 1, and the message names it.";

/// The daemon is no child of this process, so nothing tells of its end: it is looked at this often.
const INTERVAL: Duration = Duration::from_millis(10);

/// Stop the daemon: flush, unmount, and wait until it is done
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Stop {
    /// How long to wait at most, such as 30s or 5m; the daemon goes on stopping after that
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

impl Stop {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let client = global.client()?;
        let action = "cannot get the status";
        let status = client.get_now("/v1/status", action).and_then(|said| read::<Status>(&said, action));
        let status = match status {
            Ok(status) => Some(status),
            // A daemon in trouble can still be stopped.
            Err(CliError::Refused { .. } | CliError::Answer { .. } | CliError::Late { .. }) => None,
            Err(error) => return Err(error),
        };
        let mount = status.as_ref().map(|status| PathBuf::from(&status.mount));
        let mount = mount.filter(|mount| !mount.as_os_str().is_empty());
        let supervisor = status.and_then(|status| status.supervisor_pid);
        // Of this daemon, whose end may be noted already when another command has told it to stop.
        let noted = Outcome::read(client.store())
            .is_some_and(|outcome| outcome.end.is_none() || supervisor == Some(outcome.pid));
        // Told twice it stops once; a worker that died of something else may not have passed it on.
        match client.post_now("/v1/stop", "cannot stop the daemon") {
            // It may be gone before its answer is here.
            Ok(_) | Err(CliError::Transport { .. } | CliError::NoDaemon { .. }) => {}
            Err(error) => return Err(error),
        }
        self.wait(&client, mount.as_deref())?;
        how_it_ended(client.store(), noted)?;
        global.output().value(&json!({ "stopped": true }), |_| String::new())
    }

    fn wait(&self, client: &Client, mount: Option<&Path>) -> Result<(), CliError> {
        let start = Instant::now();
        loop {
            let Some(state) = what_is_left(client, mount) else {
                return Ok(());
            };
            if start.elapsed() >= self.timeout {
                let waited = humantime::format_duration(self.timeout).to_string();
                return Err(CliError::StillRunning { store: client.store().to_path_buf(), waited, state });
            }
            std::thread::sleep(INTERVAL);
        }
    }
}

/// The exit status of this command is the daemon's. `noted`: it notes how it ends, which versions before did not.
fn how_it_ended(store: &Path, noted: bool) -> Result<(), CliError> {
    if !noted {
        return Ok(());
    }
    let badly = |why: String| Err(CliError::EndedBadly { store: store.to_path_buf(), why });
    match Outcome::read(store).and_then(|outcome| outcome.end) {
        Some(End::Clean) => Ok(()),
        Some(End::Failed(why)) => badly(why),
        None => badly(format!(
            "it was killed before it had closed the store; what was written and not flushed is in memory until the next \
             reboot: start again with: plyfs serve --store {}",
            store.display()
        )),
    }
}

/// The first thing that keeps the daemon from being gone.
fn what_is_left(client: &Client, mount: Option<&Path>) -> Option<String> {
    if client.is_listening() {
        return Some("it still answers".to_owned());
    }
    if let Some(mount) = mount.filter(|mount| is_mounted(mount)) {
        return Some(format!("{} is still mounted", mount.display()));
    }
    is_locked(&client.store().join(layout::LOCK)).then(|| "it still holds the store's lock".to_owned())
}

fn is_mounted(mount: &Path) -> bool {
    std::fs::read("/proc/self/mountinfo").is_ok_and(|table| has_fuse_mount(&table, mount))
}

/// Whether a line of `mountinfo` (proc(5)) is a FUSE filesystem on that mount point.
pub(super) fn has_fuse_mount(table: &[u8], mount: &Path) -> bool {
    table.split(|&byte| byte == b'\n').any(|line| {
        let mut words = line.split(|&byte| byte == b' ');
        let point = words.nth(4);
        // Optional fields end with a dash; the type follows.
        let kind = words.skip_while(|word| *word != b"-").nth(1);
        kind.is_some_and(|kind| kind.starts_with(b"fuse"))
            && point.is_some_and(|point| unescape(point) == mount.as_os_str().as_bytes())
    })
}

/// Blanks, tabs, newlines and backslashes are written as a backslash and three octal digits.
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) = (first, tail) {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            out.push(*first);
            rest = tail;
        }
    }
    out
}

/// Whether another process holds the lock. It is taken shared and for an instant, and never when it does not exist.
fn is_locked(lock: &Path) -> bool {
    File::open(lock).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}
