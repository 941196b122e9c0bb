//! `plyfs upgrade`: another version of the program takes over while the disks are in use.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::client::{Client, read};
use super::error::CliError;
use super::output::printable;
use super::table::lines;
use super::{Global, args};
use crate::control::wire::{self, ErrorKind, UpgradeBegun, UpgradeState, UpgradeTo};

const EXAMPLES: &str = "\
Examples:
  plyfs upgrade                                   to the file now at the path that the daemon was started from
  plyfs upgrade --program /opt/plyfs-2/bin/plyfs

Disks pause for some milliseconds; no VM has to stop. The new version first shows that it can start and read the \
store. When it cannot, the old version goes on serving without a pause, and this command fails with the reason.";

const INTERVAL: Duration = Duration::from_millis(20);

/// Replace the running daemon with the installed program, while disks stay open
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Upgrade {
    /// The new program [default: the path that the daemon was started from]
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Longest wait, such as 30s or 5m; the upgrade continues after that
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = args::longest_wait)]
    timeout: Duration,
}

impl Upgrade {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let client = global.client()?;
        let program = match &self.program {
            Some(program) => Some(absolute(program)?),
            None => None,
        };
        let start = Instant::now();
        let number = self.begin(&client, program.as_ref(), start)?;
        loop {
            let answer = match client.get("/v1/status", "cannot get the status") {
                Ok(status) => status["upgrade"].clone(),
                // The upgrade replaces the worker that got the request.
                Err(
                    CliError::Transport { .. } | CliError::InvalidAnswer { .. } | CliError::Refused { .. },
                ) => Value::Null,
                Err(error) => return Err(error),
            };
            let upgrade: Option<wire::Upgrade> = read(&answer, "cannot get the status")?;
            if let Some(upgrade) = upgrade.filter(|upgrade| upgrade.number >= number) {
                // Of two upgrades that begin in the same moment, only the first one runs.
                let is_other = program.as_ref().is_some_and(|program| *program != upgrade.program);
                if is_other && upgrade.state != UpgradeState::Running {
                    let other = &upgrade.program;
                    let message = format!("cannot upgrade: an upgrade to {other} came first; try again");
                    return Err(refused(Some(ErrorKind::InUse), &message));
                }
                match upgrade.state {
                    UpgradeState::Running => {}
                    UpgradeState::Done => return global.output().value(&answer, |_| human(&upgrade)),
                    UpgradeState::Failed => {
                        let why = upgrade.why.as_deref().unwrap_or("the daemon is stopping");
                        let (to, from) = (&upgrade.program, &upgrade.from);
                        let message = format!("cannot upgrade to {to}: {why}; version {from} serves");
                        return Err(refused(None, &message));
                    }
                }
            }
            if start.elapsed() >= self.timeout {
                let waited = humantime::format_duration(self.timeout);
                let message = format!("the upgrade is not done after {waited}; see plyfs status");
                return Err(refused(None, &message));
            }
            std::thread::sleep(INTERVAL);
        }
    }
}

fn refused(kind: Option<ErrorKind>, message: &str) -> CliError {
    CliError::Refused { kind, message: printable(message) }
}

/// Makes the path absolute, because the daemon has another current directory.
fn absolute(program: &Path) -> Result<String, CliError> {
    let path = args::absolute(program)?;
    match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(CliError::NotUtf8 { path }),
    }
}

impl Upgrade {
    /// Begins an upgrade, and returns its number. A worker that dies before it answers may have passed the request on.
    fn begin(&self, client: &Client, program: Option<&String>, start: Instant) -> Result<u64, CliError> {
        let number = || -> Result<u64, CliError> {
            let action = "cannot get the status";
            let status: wire::Status = read(&client.get_now("/v1/status", action)?, action)?;
            Ok(status.upgrade.map_or(0, |upgrade| upgrade.number))
        };
        // A daemon without a worker accepts an upgrade, but cannot give its number.
        let before = match number() {
            Err(error) if error.is(ErrorKind::Unavailable) => None,
            other => Some(other?),
        };
        let request = || match program {
            Some(program) => {
                let body = UpgradeTo { program: Some(program.clone()) };
                client.post("/v1/upgrade", &body, "cannot upgrade")
            }
            // Without a body, because a daemon without a worker accepts only that.
            None => client.post_empty("/v1/upgrade", "cannot upgrade"),
        };
        let mut may_have_begun = false;
        loop {
            let error = match request() {
                Ok(answer) => return Ok(read::<UpgradeBegun>(&answer, "cannot upgrade")?.number),
                Err(error) => error,
            };
            let is_transient =
                matches!(error, CliError::Transport { .. }) || error.is(ErrorKind::Unavailable);
            if !(is_transient || may_have_begun && error.is(ErrorKind::InUse)) {
                return Err(error);
            }
            may_have_begun |= is_transient;
            if let (Some(before), Ok(now)) = (before, number())
                && now > before
            {
                return Ok(before + 1);
            }
            if start.elapsed() >= self.timeout {
                return Err(error);
            }
            std::thread::sleep(INTERVAL);
        }
    }
}

fn human(upgrade: &wire::Upgrade) -> String {
    let to = upgrade.to.as_deref().map_or_else(|| "-".to_owned(), printable);
    let mut pairs =
        vec![("program", printable(&upgrade.program)), ("from", printable(&upgrade.from)), ("to", to)];
    if let Some(why) = &upgrade.why {
        pairs.push(("note", printable(why)));
    }
    lines(pairs.into_iter())
}
