//! `plyfs upgrade`: another version of the program takes over while the disks are in use.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::client::Client;
use super::error::CliError;
use super::output::{lines, printable};
use super::{Global, args};

const EXAMPLES: &str = "\
Examples:
  plyfs upgrade                                   the program that the daemon was started from, as it is now
  plyfs upgrade --program /opt/plyfs-2/bin/plyfs

Disks pause for some milliseconds; nobody has to stop. The new version first shows that it can start and read the store;
when it cannot, the old one has served all the time and this command fails with the reason.";

const INTERVAL: Duration = Duration::from_millis(20);

/// Have the program that is installed now take over from the one that runs, without stopping anybody
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Upgrade {
    /// The program to go on as [default: the path that the daemon was started from]
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// How long to wait at most, such as 30s or 5m; the upgrade goes on after that
    #[arg(long, value_name = "DURATION", default_value = "5m", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

impl Upgrade {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let client = global.client()?;
        let body = match &self.program {
            Some(program) => Some(json!({"program": args::absolute(program)?})),
            None => None,
        };
        let start = Instant::now();
        let number = self.begin(&client, body.as_ref(), start)?;
        let wanted = body.as_ref().map(|body| &body["program"]);
        loop {
            let upgrade = match client.get("/v1/status", "cannot get the status") {
                Ok(status) => status["upgrade"].clone(),
                // The worker that was asked is the one that makes room.
                Err(CliError::Transport { .. } | CliError::Answer { .. } | CliError::Refused { .. }) => {
                    Value::Null
                }
                Err(error) => return Err(error),
            };
            if upgrade["number"].as_u64().is_some_and(|at| at >= number) {
                // Two that were begun in one moment are one: the first one's.
                if wanted.is_some_and(|wanted| *wanted != upgrade["program"] && upgrade["state"] != "running")
                {
                    let other = upgrade["program"].as_str().unwrap_or("another program");
                    let message = format!("cannot upgrade: an upgrade to {other} came first; try again");
                    return Err(CliError::Refused { kind: "in_use".into(), message: printable(&message) });
                }
                match upgrade["state"].as_str() {
                    Some("done") => return global.output().value(&upgrade, human),
                    Some("failed") => {
                        let why = upgrade["why"].as_str().unwrap_or("the daemon is stopping");
                        let message = format!(
                            "cannot upgrade to {}: {why}; version {} serves",
                            upgrade["program"].as_str().unwrap_or("the new program"),
                            upgrade["from"].as_str().unwrap_or("before"),
                        );
                        return Err(CliError::Refused {
                            kind: "failed".into(),
                            message: printable(&message),
                        });
                    }
                    _ => {}
                }
            }
            if start.elapsed() >= self.timeout {
                let waited = humantime::format_duration(self.timeout);
                let message = format!("the upgrade is not done after {waited}; see plyfs status");
                return Err(CliError::Refused { kind: "timeout".into(), message });
            }
            std::thread::sleep(INTERVAL);
        }
    }
}

impl Upgrade {
    /// Has an upgrade begin; its number. A worker that dies before it answers may have passed the word on.
    fn begin(&self, client: &Client, body: Option<&Value>, start: Instant) -> Result<u64, CliError> {
        let number = || -> Result<u64, CliError> {
            let status = client.get_now("/v1/status", "cannot get the status")?;
            Ok(status["upgrade"]["number"].as_u64().unwrap_or(0))
        };
        // A daemon without a worker can be told as well, but not asked.
        let before = match number() {
            Err(error) if error.is("unavailable") => None,
            other => Some(other?),
        };
        let mut lost = false;
        loop {
            let error = match client.post("/v1/upgrade", body, "cannot upgrade") {
                Ok(answer) => return Ok(answer["number"].as_u64().unwrap_or(0)),
                Err(error) => error,
            };
            let passes = matches!(error, CliError::Transport { .. }) || error.is("unavailable");
            if !(passes || lost && error.is("in_use")) {
                return Err(error);
            }
            lost |= passes;
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

fn human(upgrade: &Value) -> String {
    let text = |key: &str| upgrade[key].as_str().map_or_else(|| "-".to_owned(), printable);
    let mut pairs = vec![("program", text("program")), ("from", text("from")), ("to", text("to"))];
    if upgrade["why"].is_string() {
        pairs.push(("note", text("why")));
    }
    lines(pairs.into_iter())
}
