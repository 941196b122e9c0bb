//! `plyfs glance`: the images of a Glance, for Nova.

mod pass;

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use serde_json::{Value, json};

use self::pass::Pass;
use super::client::read;
use super::error::CliError;
use super::output::printable;
use super::{Global, args};
use crate::control::wire::Cloud;

const EXAMPLES: &str = "\
Examples:
  plyfs glance sync --dry-run
  plyfs glance sync";

const SYNC_EXAMPLES: &str = "\
Examples:
  plyfs glance sync --dry-run
  plyfs glance sync --cloud mycloud --instances /var/lib/nova/instances
  plyfs --json glance sync | jq .failed

One pass, for a timer (plyfs-glance-sync.timer). Each active image of the clouds of [[http.clouds]] becomes the base \
g-ID, and Nova finds it in its cache of images as a link: it makes its overlays on the file of the base, and downloads \
nothing. An image costs one request of 64 KiB until a VM reads it. An image that plyfs cannot read, and one whose bytes \
Nova would refuse, is left to Nova. An image that is gone from Glance, or not active, is removed once no overlay and no \
disk stands on it. A line tells of each change and of each image that failed; the exit status is 1 when one failed. \
Nothing is changed but links to bases, under Nova's own locks. Bases have to be readable by Nova and QEMU: set [mount] \
base_mode = \"0444\".";

/// Offer the images of OpenStack's image service to Nova
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(super) enum Glance {
    Sync(SyncImages),
}

/// Add every active image as a base, and link it into Nova's cache of images
#[derive(Debug, clap::Args)]
#[command(after_help = SYNC_EXAMPLES)]
pub(super) struct SyncImages {
    /// Nova's directory of instances, `instances_path` of nova.conf
    #[arg(long, value_name = "DIR", default_value = "/var/lib/nova/instances")]
    instances: PathBuf,
    /// A cloud of [[http.clouds]]; may be given more than once [default: all of them]
    #[arg(long = "cloud", value_name = "CLOUD")]
    clouds: Vec<String>,
    /// How long an image that is gone from Glance is kept after its last use
    #[arg(long, value_name = "TIME", value_parser = args::time_or_zero, default_value = "1h")]
    keep_unused: Duration,
    /// Only show what would be done
    #[arg(long)]
    dry_run: bool,
}

/// What became of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    /// A link was made.
    Linked,
    /// It is linked since an earlier pass.
    Present,
    /// It is gone from Glance: link and base are removed.
    Removed,
    /// It is gone from Glance, and still needed.
    Kept,
    /// It is left to Nova.
    Skipped,
    /// Nova works on it; a later pass goes on.
    Busy,
    /// It failed.
    Failed,
}

/// All of them, with their keys in the summary.
const OUTCOMES: [(Outcome, &str); 7] = [
    (Outcome::Linked, "linked"),
    (Outcome::Present, "present"),
    (Outcome::Removed, "removed"),
    (Outcome::Kept, "kept"),
    (Outcome::Skipped, "skipped"),
    (Outcome::Busy, "busy"),
    (Outcome::Failed, "failed"),
];

/// What a pass tells of an image, or of a cloud.
#[derive(Clone, Debug, Serialize)]
struct Report {
    cloud: String,
    /// Its ID; none of a cloud as a whole.
    image: Option<String>,
    name: Option<String>,
    result: Outcome,
    why: Option<String>,
}

impl Report {
    /// The line of a change or a failure; none of what stays as it is.
    fn line(&self) -> Option<String> {
        let result = OUTCOMES.iter().find(|(outcome, _)| *outcome == self.result).map(|(_, key)| *key)?;
        let is_told = matches!(self.result, Outcome::Linked | Outcome::Removed | Outcome::Failed);
        let image = self.image.as_deref().map_or_else(String::new, |image| format!(" image {image}"));
        let name = self.name.as_deref().map_or_else(String::new, |name| format!(" ({})", printable(name)));
        let why = self.why.as_deref().map_or_else(String::new, |why| format!(": {}", printable(why)));
        is_told.then(|| format!("{result}: cloud {}{image}{name}{why}\n", self.cloud))
    }
}

impl Glance {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let Self::Sync(sync) = self;
        sync.run(global)
    }
}

impl SyncImages {
    fn run(&self, global: &Global) -> Result<(), CliError> {
        let client = global.client()?;
        let action = "cannot list the clouds";
        let known: Vec<Cloud> = read(&client.get("/v1/clouds", action)?, action)?;
        let known: Vec<String> = known.into_iter().map(|cloud| cloud.name).collect();
        if known.is_empty() {
            let why = "cannot sync images: the daemon's configuration has no cloud; name one in [[http.clouds]], and \
                       restart the daemon";
            return Err(CliError::Failed(why.to_owned()));
        }
        if let Some(cloud) = self.clouds.iter().find(|cloud| !known.contains(cloud)) {
            let known = known.join(", ");
            return Err(CliError::Usage(format!(
                "--cloud {cloud}: the daemon has no such cloud; it has: {known}"
            )));
        }
        let clouds = if self.clouds.is_empty() { &known } else { &self.clouds };
        let reports = Pass::new(&client, self)?.run(clouds)?;
        let count = |wanted| reports.iter().filter(|report| report.result == wanted).count();
        let mut summary = json!({"dry_run": self.dry_run, "images": reports});
        for (outcome, key) in OUTCOMES {
            summary[key] = count(outcome).into();
        }
        global.output().value(&summary, |summary| self.text(&reports, summary))?;
        match count(Outcome::Failed) {
            0 => Ok(()),
            failed => {
                let total = reports.len();
                let why =
                    format!("cannot sync all images: {failed} of {total} failed; a later pass tries again");
                Err(CliError::Failed(why))
            }
        }
    }

    fn text(&self, reports: &[Report], summary: &Value) -> String {
        let mut text: String = reports.iter().filter_map(Report::line).collect();
        let counts = OUTCOMES.map(|(_, key)| format!("{key} {}", summary[key]));
        let only = if self.dry_run { "would be: " } else { "" };
        text.push_str(&format!("{only}{}\n", counts.join(", ")));
        text
    }
}
