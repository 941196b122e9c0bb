//! `plyfs job` and `plyfs jobs`: work on whole bases and on disks in the background, and copies of disks.

use clap::Subcommand;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

use super::Global;
use super::client::read;
use super::error::CliError;
use super::listing::{Listing, Noun, no_notes};
use super::output::{Column, Kind};
use super::table::fields;
use crate::control::wire::{Job as WireJob, WorkState};

const EXAMPLES: &str = "\
Examples:
  plyfs jobs
  plyfs job show hydrate-debian
  plyfs job cancel hydrate-debian";

const LS_EXAMPLES: &str = "\
Examples:
  plyfs jobs
  plyfs job ls --filter state=failed
  plyfs --json jobs

A job is work on a whole base (`base hydrate`, `base verify`) or on a disk (`disk flatten`, `disk rebase`, `disk compact`). \
The list has the last job of each kind of each base and disk since the worker began to serve. A job continues in the next \
worker, under the same identifier; only a verification ends with its worker. `disk export` and `disk import` are jobs of \
their commands: each is listed until its command ends.";

const CANCEL_EXAMPLES: &str = "\
Examples:
  plyfs job cancel hydrate-debian
  plyfs jobs -q --filter state=waiting | xargs plyfs job cancel
  plyfs jobs -q --filter disk=vm1 | xargs plyfs job cancel

The command returns when the job has ended. No later worker continues a cancelled hydration. What it has fetched stays \
in the cache until other bases need the room; of a file of this host the copy is dropped. What a job on a disk has copied \
is dropped, and the disk is as it was. A command that exports or imports is told, and ends as after a signal. A job that \
had ended before is not changed.";

pub(super) const COLUMNS: [Column; 9] = [
    ("ID", "id", Kind::Text),
    ("STATE", "state", Kind::Text),
    ("%", "percent", Kind::Number),
    ("DONE", "bytes", Kind::Size),
    ("TOTAL", "total", Kind::Size),
    ("RATE", "rate", Kind::Size),
    ("BEGAN", "began", Kind::Time),
    ("ENDED", "ended", Kind::Time),
    ("ERROR", "error", Kind::Text),
];

pub(super) const FIELDS: [Column; 15] = [
    ("id", "id", Kind::Text),
    ("kind", "kind", Kind::Text),
    ("base", "base", Kind::Text),
    ("disk", "disk", Kind::Text),
    ("state", "state", Kind::Text),
    ("error", "error", Kind::Text),
    ("done", "bytes", Kind::Size),
    ("total", "total", Kind::Size),
    ("percent", "percent", Kind::Text),
    ("rate", "rate", Kind::Size),
    ("seconds left", "seconds_left", Kind::Number),
    ("digest matches", "digest_matches", Kind::Text),
    ("began", "began", Kind::Time),
    ("ended", "ended", Kind::Time),
    ("resumed", "resumed", Kind::Text),
];

const NOUN: Noun = Noun {
    names: ["job", "jobs"],
    name: "id",
    columns: &COLUMNS,
    more: &FIELDS,
    totals: &[],
    notes: no_notes,
};

/// List, show and cancel the work on bases and disks
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(super) enum Job {
    /// List the jobs; `plyfs jobs` does the same
    #[command(visible_alias = "list", after_help = LS_EXAMPLES)]
    Ls(Listing),
    /// Show one job
    #[command(
        after_help = "Examples:\n  plyfs job show hydrate-debian\n  plyfs --json job show hydrate-debian"
    )]
    Show {
        /// Identifier of the job
        id: String,
    },
    /// Cancel jobs
    #[command(after_help = CANCEL_EXAMPLES)]
    Cancel {
        /// Identifiers of the jobs
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
}

/// List the jobs: work on bases and disks in the background
#[derive(Debug, clap::Args)]
#[command(after_help = LS_EXAMPLES)]
pub(super) struct Jobs {
    #[command(flatten)]
    listing: Listing,
}

impl Jobs {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        list(&self.listing, global)
    }
}

fn list(listing: &Listing, global: &Global) -> Result<(), CliError> {
    listing.check(&NOUN)?;
    let jobs = global.client()?.get("/v1/jobs", "cannot list jobs")?;
    listing.run(&global.output(), jobs, &NOUN)
}

/// The path of a job. An identifier that no job can have goes to the daemon as one that no job has.
fn path(id: &str) -> String {
    const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'.').remove(b'_').remove(b'-');
    format!("/v1/jobs/{}", utf8_percent_encode(id, ESCAPED))
}

impl Job {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        match self {
            Self::Ls(listing) => list(&listing, global),
            Self::Show { id } => {
                let job = global.client()?.get(&path(&id), &format!("cannot show job {id}"))?;
                global.output().value(&job, |job| fields(job, &FIELDS))
            }
            Self::Cancel { ids } => cancel(global, &ids),
        }
    }
}

/// Cancels jobs one by one. A refusal does not stop the others.
fn cancel(global: &Global, ids: &[String]) -> Result<(), CliError> {
    let client = global.client()?;
    let mut failed = Vec::new();
    for id in ids {
        let action = format!("cannot cancel job {id}");
        let answer = super::retry::repeat(|| client.post_empty(&format!("{}/cancel", path(id)), &action));
        match answer {
            Ok(answer) => {
                let job: WireJob = read(&answer, &action)?;
                global.output().line(&answer, |_| cancelled(&job))?;
            }
            Err(error @ CliError::Refused { .. }) => failed.push(error),
            Err(error) => return Err(error),
        }
    }
    let last = failed.pop();
    for error in failed {
        global.output().error(&error);
    }
    last.map_or(Ok(()), Err)
}

/// A job that had ended before is not cancelled, and the user is told so.
fn cancelled(job: &WireJob) -> String {
    match job.state {
        WorkState::Cancelled => String::new(),
        state => format!("job {}: had ended before ({})\n", job.id, state.name()),
    }
}
