//! `plyfs import nova` and `plyfs export nova`: the instances of a Nova host become disks, and files again.
//!
//! What must hold: what goes wrong with one disk ends the work on that disk alone, and it is then the whole disk that it
//! was. Only a signal, and a daemon that is gone, end the command. The command called again goes on.

mod export;
mod import;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use serde_json::json;

use super::Global;
use super::client::{Client, read};
use super::ended::Outcomes;
use super::error::CliError;
use super::output::printable;
use crate::control::wire::{ErrorKind, Status};
use crate::nova::{Instances, Vm};

const EXAMPLES: &str = "\
Examples:
  plyfs import nova /var/lib/nova/instances --dry-run
  plyfs import nova /var/lib/nova/instances --vm 5f0a6d3e-2f4f-4b3b-9d57-4a5f2d0c8b11";

const IMPORT_EXAMPLES: &str = "\
Examples:
  plyfs import nova /var/lib/nova/instances --dry-run
  plyfs import nova /var/lib/nova/instances --vm 5f0a6d3e-2f4f-4b3b-9d57-4a5f2d0c8b11
  plyfs import nova /var/lib/nova/instances --remove

Each qcow2 disk of each instance that is shut off becomes the disk INSTANCE_disk, with what the qcow2 file has; a link \
takes its place, and disk.info calls it raw. An image of _base becomes a base without a copy: its file moves to \
plyfs-bases in the same directory, and a link to the file of the base takes its place, on which other overlays go on. \
The qcow2 file stays as disk.before-plyfs, unless --remove is given. A disk that a process has open is left. Nova has to \
know such disks (nova-plyfs) before it migrates, resizes or deletes the instance.";

const EXPORT_EXAMPLES: &str = "\
Examples:
  plyfs export nova /var/lib/nova/instances --dry-run
  plyfs export nova /var/lib/nova/instances --remove

Undoes plyfs import nova: each disk that an instance has as a link becomes a qcow2 file on top of its image in _base. With \
--remove the disk of plyfs is removed then, and an image that no disk needs any more goes back to _base.";

/// Take over what another program has
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(super) enum ImportFrom {
    /// Make the disks of the instances of a Nova host disks of plyfs
    #[command(after_help = IMPORT_EXAMPLES)]
    Nova(Options),
}

/// Give back what was taken over
#[derive(Debug, Subcommand)]
#[command(after_help = EXPORT_EXAMPLES)]
pub(super) enum ExportTo {
    /// Make the disks of the instances of a Nova host qcow2 files again
    #[command(after_help = EXPORT_EXAMPLES)]
    Nova(Options),
}

#[derive(Debug, clap::Args)]
pub(super) struct Options {
    /// Nova's directory of instances
    dir: PathBuf,
    /// Only this instance, by the name of its directory; may be given more than once [default: all]
    #[arg(long = "vm", value_name = "ID")]
    vms: Vec<String>,
    /// Also remove what the disk was before
    #[arg(long)]
    remove: bool,
    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
}

/// What became of a disk, or of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    Done,
    /// It was done before.
    Present,
    /// It is no disk for this command.
    Skipped,
    /// A process has it open.
    Running,
    Failed,
}

const OUTCOMES: [(Outcome, &str); 5] = [
    (Outcome::Done, "done"),
    (Outcome::Present, "present"),
    (Outcome::Skipped, "skipped"),
    (Outcome::Running, "running"),
    (Outcome::Failed, "failed"),
];

#[derive(Clone, Debug, Serialize)]
struct Report {
    /// The instance; none of an image.
    vm: Option<String>,
    /// Name of the file.
    file: String,
    /// The disk of plyfs.
    disk: Option<String>,
    base: Option<String>,
    result: Outcome,
    why: Option<String>,
}

impl Outcomes for Outcome {
    const FAILED: Self = Self::Failed;
}

/// Why the work on a disk ends.
type Ended = super::ended::Ended<Outcome>;

/// How long Nova may hold the lock of an image.
const PATIENCE: Duration = Duration::from_secs(10);

/// What both commands work with.
struct Work<'a> {
    global: &'a Global,
    client: &'a Client,
    options: &'a Options,
    instances: Instances,
    mount: PathBuf,
}

impl ImportFrom {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let Self::Nova(options) = self;
        run(global, &options, "import", import::all)
    }
}

impl ExportTo {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let Self::Nova(options) = self;
        run(global, &options, "export", export::all)
    }
}

fn run(
    global: &Global,
    options: &Options,
    verb: &str,
    all: impl FnOnce(&Work<'_>, Vec<Vm>, &mut Vec<Report>) -> Result<(), CliError>,
) -> Result<(), CliError> {
    let refuse =
        |error: std::io::Error| CliError::Failed(format!("cannot {verb} instances: {error}; check the path"));
    let instances = super::args::absolute(&options.dir).map(|dir| Instances::open(&dir))?.map_err(refuse)?;
    let client = global.client()?;
    let action = format!("cannot {verb} instances");
    let status: Status = read(&client.get("/v1/status", &action)?, &action)?;
    let mut vms = instances.vms().map_err(refuse)?;
    if let Some(vm) = options.vms.iter().find(|wanted| vms.iter().all(|vm| vm.name != **wanted)) {
        let dir = options.dir.display();
        return Err(CliError::Usage(format!("--vm {vm}: {dir} has no instance with disks of that name")));
    }
    vms.retain(|vm| options.vms.is_empty() || options.vms.contains(&vm.name));
    let work = Work { global, client: &client, options, instances, mount: PathBuf::from(status.mount) };
    let mut reports = Vec::new();
    let ended = all(&work, vms, &mut reports);
    let count = |wanted| reports.iter().filter(|report| report.result == wanted).count();
    let mut summary = json!({"dry_run": options.dry_run, "disks": reports});
    for (outcome, key) in OUTCOMES {
        summary[key] = count(outcome).into();
    }
    global.output().line(&summary, |_| text(&reports, options.dry_run))?;
    ended?;
    let left = count(Outcome::Failed) + count(Outcome::Running);
    if left == 0 {
        return Ok(());
    }
    let why = format!(
        "cannot {verb} all disks: {left} of {} are left; correct what is said of each, and repeat",
        reports.len()
    );
    Err(CliError::Failed(why))
}

fn text(reports: &[Report], dry_run: bool) -> String {
    let line = |report: &Report| {
        let key = OUTCOMES.iter().find(|(outcome, _)| *outcome == report.result).map_or("", |(_, key)| *key);
        let key = if dry_run && report.result == Outcome::Done { "would be done" } else { key };
        let vm = report.vm.as_deref().map_or_else(String::new, |vm| format!("{}/", printable(vm)));
        let why = report.why.as_deref().map_or_else(String::new, |why| format!(": {}", printable(why)));
        format!("{key}: {vm}{}{why}\n", printable(&report.file))
    };
    reports.iter().map(line).collect()
}

impl Work<'_> {
    fn file_of_disk(&self, disk: &str) -> PathBuf {
        self.mount.join("disks").join(format!("{disk}.raw"))
    }

    fn file_of_base(&self, base: &str) -> PathBuf {
        self.mount.join("bases").join(format!("{base}.raw"))
    }

    /// The disk or base of this name, if there is one.
    fn find<T: serde::de::DeserializeOwned>(&self, noun: &str, name: &str) -> Result<Option<T>, CliError> {
        let action = format!("cannot show {noun} {name}");
        match self.client.get(&format!("/v1/{noun}s/{name}"), &action) {
            Err(error) if error.is(ErrorKind::NotFound) => Ok(None),
            found => read(&found?, &action).map(Some),
        }
    }
}

/// The name of the object that a link of the mount leads to; none of another link.
fn name_in(dir: &Path, target: &Path) -> Option<String> {
    let name = target.strip_prefix(dir).ok()?.to_str()?.strip_suffix(".raw")?;
    super::args::name(name).ok()
}

/// Adds the report of a disk that ended, or passes on what ends the command.
fn note(reports: &mut Vec<Report>, mut report: Report, done: Result<Outcome, Ended>) -> Result<(), CliError> {
    (report.result, report.why) = match done {
        Ok(outcome) => (outcome, report.why),
        Err(Ended::With(outcome, why)) => (outcome, Some(why)),
        Err(Ended::Command(error)) => return Err(error),
    };
    reports.push(report);
    Ok(())
}
