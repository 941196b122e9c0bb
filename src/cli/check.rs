//! `plyfs check`: verifies every structure of a store, without a daemon.

use std::cell::RefCell;
use std::fmt::Write;

use serde_json::{Map, Value, json};

use super::Global;
use super::error::CliError;
use super::output::{chain, printable};
use super::progress::{Progress, Update};
use crate::check::{Part, Repair, Step, VerifyBases};
use crate::config::size::format_size;

const EXAMPLES: &str = "\
Examples:
  plyfs stop && plyfs check
  plyfs check --repair
  plyfs check --verify-bases
  plyfs --json check

The check is offline: no daemon may run on the store. Without --repair it writes nothing. Each finding names the \
invariant of docs/format.md that does not hold. The exit status is 0 only when nothing is left to repair.

A check that takes longer than a second shows its progress: on a terminal as a bar, with --json as lines with an object \
each, of which the last one is the result. Ctrl-C ends the check; what it has repaired stays repaired.";

/// Verify every structure of the store, offline, and name each finding
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Check {
    /// Repair each finding that needs no guess about data
    #[arg(long)]
    repair: bool,
    /// Compare the digest of each base that was added with a digest or a proof; reads these bases as a whole
    #[arg(long)]
    verify_bases: bool,
    /// Directory of the live maps; the daemon's `[runtime] dir`
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    runtime_dir: std::path::PathBuf,
}

impl Check {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let store = global.store()?;
        let repair = if self.repair { Repair::Yes } else { Repair::No };
        let verify = if self.verify_bases { VerifyBases::Yes } else { VerifyBases::No };
        let shown = RefCell::new(Shown::new(global));
        let watch = |step| shown.borrow_mut().step(&step);
        let report = crate::check::run_watched(&store, &self.runtime_dir, repair, verify, &watch);
        shown.into_inner().end()?;
        let report =
            report.map_err(|error| CliError::Check { store: store.clone(), message: chain(&error) })?;
        let unrepaired = report.findings.iter().filter(|finding| !finding.repaired).count();
        let findings: Vec<Value> = report
            .findings
            .iter()
            .map(|finding| {
                json!({
                    "invariant": finding.invariant,
                    "object": finding.object,
                    "message": finding.message,
                    "repaired": finding.repaired,
                })
            })
            .collect();
        let checked: Map<String, Value> =
            report.checked.iter().map(|(kind, count)| (key(kind), json!(count))).collect();
        let value = json!({ "store": store.to_string_lossy(), "findings": findings, "checked": checked });
        global.output().line(&value, |_| {
            let mut out = String::new();
            for finding in &report.findings {
                let line = format!(
                    "{}: invariant {}: {}{}",
                    finding.object,
                    finding.invariant,
                    finding.message,
                    if finding.repaired { " (repaired)" } else { "" }
                );
                out.push_str(&printable(&line));
                out.push('\n');
            }
            let counts: Vec<String> =
                report.checked.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
            // Writing to a string cannot fail.
            let _ = writeln!(
                out,
                "checked {}: {} finding(s), {unrepaired} not repaired",
                if counts.is_empty() { "nothing".to_owned() } else { printable(&counts.join(", ")) },
                report.findings.len()
            );
            out
        })?;
        if unrepaired == 0 {
            return Ok(());
        }
        let advice = if self.repair {
            "restore the named objects from a backup, or remove them"
        } else {
            "repair with: plyfs check --repair"
        };
        Err(CliError::Findings { store, unrepaired, advice })
    }
}

/// The progress of a check.
struct Shown {
    progress: Progress,
    /// Why standard output could not be written, once that failed.
    failed: Result<(), CliError>,
}

impl Shown {
    fn new(global: &Global) -> Self {
        Self { progress: Progress::of_short_work(&global.output()), failed: Ok(()) }
    }

    fn step(&mut self, step: &Step) {
        let Step { part, done, total } = *step;
        let (state, what, is_bytes) = match part {
            Part::Disks => ("disks", "maps of disks", false),
            Part::Digests => ("digests", "digests of bases", true),
            Part::Cache => ("cache", "files of cached blocks", false),
            Part::CachedBytes => ("cached_bytes", "cached blocks", true),
        };
        let number = |number: u64| if is_bytes { format_size(number) } else { number.to_string() };
        let text = format!("{} of {}", number(done), number(total));
        let update = Update { title: what, done, total, text, state: "checking" };
        let object = || json!({"part": state, "done": done, "total": total});
        if self.failed.is_ok() {
            self.failed = self.progress.show(&update, object);
        }
    }

    fn end(self) -> Result<(), CliError> {
        self.progress.clear();
        self.failed
    }
}

/// The key of a kind of structures.
fn key(kind: &str) -> String {
    kind.to_ascii_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}
