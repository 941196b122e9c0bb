//! `plyfs check`: verifies every structure of a store, without a daemon.

use std::fmt::Write;

use crate::check::{Repair, VerifyBases};
use serde_json::{Map, Value, json};

use super::Global;
use super::error::CliError;
use super::output::{chain, printable};

const EXAMPLES: &str = "\
Examples:
  plyfs stop && plyfs check
  plyfs check --repair
  plyfs check --verify-bases
  plyfs --json check

The check is offline: no daemon may run on the store. Without --repair it writes nothing. Each finding names the \
invariant of docs/format.md that does not hold. The exit status is 0 only when nothing is left to repair.";

/// Verify every structure of the store, offline, and name each finding
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Check {
    /// Repair each finding that needs no guess about data
    #[arg(long)]
    repair: bool,
    /// Compare the digest of each base that was added with --sha256 or --sha512; reads these bases as a whole
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
        let report = crate::check::run_verifying(&store, &self.runtime_dir, repair, verify)
            .map_err(|error| CliError::Check { store: store.clone(), message: chain(&error) })?;
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
        global.output().value(&value, |_| {
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

/// The key of a kind of structures.
fn key(kind: &str) -> String {
    kind.to_ascii_lowercase().replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}
