//! `plyfs stop`: tells the daemon to stop, and waits until it no longer listens, its mount is gone and it has released
//! the store's lock.

use std::fs::{File, TryLockError};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::json;

use super::client::{Client, read};
use super::error::CliError;
use super::holders::{self, Holder, unescape};
use super::{Global, args};
use crate::control::wire::{self, ErrorKind, Status};
use crate::daemon::{End, Outcome};
use crate::format::layout;

const EXAMPLES: &str = "\
Examples:
  plyfs stop
  plyfs stop --timeout 30s

The command refuses while files of the mount are open, and names the processes that have them open: shut the VMs down \
first. With --force their later requests fail with I/O errors. When the command succeeds, all data is flushed, the mount is gone, and another daemon may start on the store. When a \
disk could not be closed, the exit status is 1 and the message names the disk.";

/// How often the command checks whether the daemon has ended. The daemon is not its child, so no signal reports the
/// end.
const INTERVAL: Duration = Duration::from_millis(10);

/// Stop the daemon: flush, unmount, and wait until it has ended
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Stop {
    /// Longest wait, such as 30s or 5m; the daemon continues to stop after that
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = args::longest_wait)]
    timeout: Duration,
    /// Stop although files of the mount are open
    #[arg(long)]
    force: bool,
}

impl Stop {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let client = global.client()?;
        let action = "cannot get the status";
        let status = client.get_now("/v1/status", action).map_err(nothing_to_stop);
        let status = status.and_then(|answer| read::<Status>(&answer, action));
        let status = match status {
            Ok(status) => Some(status),
            // A daemon that cannot give its status can still be stopped.
            Err(CliError::Refused { .. } | CliError::InvalidAnswer { .. } | CliError::TimedOut { .. }) => {
                None
            }
            Err(error) => return Err(error),
        };
        let mount = status.as_ref().map(|status| PathBuf::from(&status.mount));
        let mount = mount.filter(|mount| !mount.as_os_str().is_empty());
        let supervisor = status.and_then(|status| status.supervisor_pid);
        // Whether the outcome in the store belongs to this daemon. It may already hold an end, when another command has
        // told the daemon to stop.
        let records_outcome = Outcome::read(client.store())
            .is_some_and(|outcome| outcome.end.is_none() || supervisor == Some(outcome.pid));
        // The request may be sent twice: a worker that died may not have passed it on, and a second one has no effect.
        let forced = wire::Stop { force: true };
        if !self.force {
            refuse_open(&client, mount.as_deref())?;
        }
        match client.post_now("/v1/stop", self.force.then_some(&forced), "cannot stop the daemon") {
            // The daemon may end before its answer arrives.
            Ok(_) | Err(CliError::Transport { .. } | CliError::NoDaemon { .. }) => {}
            // No process has a file of the mount open.
            Err(error)
                if error.is(ErrorKind::MayBeInUse) && mount.as_deref().is_some_and(holders::are_all_seen) =>
            {
                client.post_now("/v1/stop", Some(&forced), "cannot stop the daemon")?;
            }
            Err(error) => return Err(error),
        }
        self.wait(&client, mount.as_deref())?;
        check_outcome(client.store(), records_outcome)?;
        global.output().value(&json!({ "stopped": true }), |_| String::new())
    }

    fn wait(&self, client: &Client, mount: Option<&Path>) -> Result<(), CliError> {
        let start = Instant::now();
        loop {
            let Some(state) = remaining(client, mount) else {
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

fn nothing_to_stop(error: CliError) -> CliError {
    match error {
        CliError::NoDaemon { store, socket, source } => CliError::NothingToStop { store, socket, source },
        other => other,
    }
}

/// Refuses while a process has a disk or a base of the mount open. The daemon refuses too, but it cannot name them, and
/// a supervisor without a worker does not know.
fn refuse_open(client: &Client, mount: Option<&Path>) -> Result<(), CliError> {
    let mount = mount.map_or_else(|| client.store().join("mnt"), Path::to_path_buf);
    let mut all: Vec<Holder> = holders::of_mount(&mount).into_values().flatten().collect();
    all.sort_by_key(|holder| holder.pid);
    all.dedup();
    if all.is_empty() {
        return Ok(());
    }
    Err(CliError::Open {
        object: format!("mount {}", mount.display()),
        holders: holders::names(&all),
        remedy: "shut these down first, or repeat with --force: they get I/O errors then",
    })
}

/// Fails when the daemon failed, so that this command and the daemon have the same exit status. `records_outcome`: the
/// daemon records how it ends. Earlier versions do not.
fn check_outcome(store: &Path, records_outcome: bool) -> Result<(), CliError> {
    if !records_outcome {
        return Ok(());
    }
    let unclean = |why: String| Err(CliError::EndedUncleanly { store: store.to_path_buf(), why });
    match Outcome::read(store).and_then(|outcome| outcome.end) {
        Some(End::Clean) => Ok(()),
        Some(End::Failed(why)) => unclean(why),
        None => unclean(format!(
            "it was killed before it had closed the store; writes that were not flushed stay in memory until the next \
             reboot: start again with: plyfs serve --store {}",
            store.display()
        )),
    }
}

/// Why the daemon has not ended yet; `None` once it has.
fn remaining(client: &Client, mount: Option<&Path>) -> Option<String> {
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

/// Whether `mountinfo` (proc(5)) has a FUSE filesystem on that mount point.
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

/// Whether another process holds the lock. The check takes a shared lock for an instant, and does not create the file.
fn is_locked(lock: &Path) -> bool {
    File::open(lock).is_ok_and(|file| matches!(file.try_lock_shared(), Err(TryLockError::WouldBlock)))
}
