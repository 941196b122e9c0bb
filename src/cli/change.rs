//! `plyfs disk flatten`, `rebase` and `compact`: what a disk stands on.

use clap::Args;

use super::Global;
use super::args;
use super::disk::naming_open;
use super::error::CliError;
use super::retry;
use super::work::{Object, Wait, Work};
use crate::control::wire::{Change, Rebase as Body, WorkKind};

pub(super) const FLATTEN_EXAMPLES: &str = "\
Examples:
  plyfs disk flatten vm1
  plyfs disk flatten vm1 --rate 100M --background

Copies what the disk and its snapshots show of its base into the store. The disk stays in use. Afterwards it needs no base; \
a disk without snapshots needs no layer of other disks either. The work is a job of the daemon, flatten-NAME, which goes on \
when the command is interrupted or a worker dies. It waits while less than a tenth of the store's filesystem is free. \
`plyfs job cancel` ends it, and the disk is as it was.";

pub(super) const REBASE_EXAMPLES: &str = "\
Examples:
  plyfs disk rebase vm1 debian-12.9
  plyfs disk rebase vm1 debian-moved --unsafe    the same image, under another name

The disk shows the same bytes over the new base: what both bases have in common is shared, what differs is kept in the store. \
The disk stays in use. Of a disk without snapshots, also blocks that it wrote itself are given back where the new base has \
them. The new base must be as large as the present one. The work is a job, rebase-NAME, like that of `flatten`.

With --unsafe nothing is compared, and no block is copied: what the disk never wrote shows the new base. Where the bases \
differ, the disk changes under its guest; use it only for a base with the same contents. The command refuses a disk that \
is open, unless --force is given.";

pub(super) const COMPACT_EXAMPLES: &str = "\
Examples:
  plyfs disk compact vm1

Merges layers that only a removed snapshot told apart. The space of blocks that a later layer hides comes back, and the \
record of the disk gets room for more snapshots. The work is a job, compact-NAME, like that of `flatten`.";

/// How a change runs.
#[derive(Debug, Args)]
pub(super) struct How {
    /// Name of the disk
    #[arg(value_parser = args::name)]
    name: String,
    /// Most bytes per second that are read for it, such as 100M
    #[arg(long, value_name = "SIZE", value_parser = args::size)]
    rate: Option<u64>,
    /// Return at once; the work goes on in the daemon
    #[arg(long)]
    background: bool,
}

/// A new base.
#[derive(Debug, Args)]
pub(super) struct Rebase {
    #[command(flatten)]
    how: How,
    /// Name of the new base
    #[arg(value_parser = args::name)]
    base: String,
    /// Compare nothing: what was never written shows the new base
    #[arg(long = "unsafe", conflicts_with_all = ["rate", "background"])]
    is_unsafe: bool,
    /// With --unsafe: also a disk that is open
    #[arg(long, requires = "is_unsafe")]
    force: bool,
}

impl How {
    fn wait(&self) -> Wait {
        if self.background { Wait::No } else { Wait::UntilEnd }
    }

    pub(super) fn run(&self, global: &Global, kind: WorkKind) -> Result<(), CliError> {
        let body = Change { rate: self.rate };
        Work { object: Object::Disk(&self.name), kind, body }.run(global, self.wait())
    }
}

impl Rebase {
    pub(super) fn run(&self, global: &Global) -> Result<(), CliError> {
        let How { name, rate, .. } = &self.how;
        let Self { base, is_unsafe, force, .. } = self;
        let body = Body { base: base.clone(), rate: *rate, is_unsafe: *is_unsafe, force: *force };
        if !self.is_unsafe {
            let work = Work { object: Object::Disk(name), kind: WorkKind::Rebase, body };
            return work.run(global, self.how.wait());
        }
        let (path, action) = (format!("/v1/disks/{name}/rebase"), format!("cannot rebase disk {name}"));
        let client = global.client()?;
        let done = retry::repeat(|| client.post(&path, &body, &action));
        let disk = done.map_err(|error| naming_open(&client, name, error))?;
        global.output().value(&disk, |_| String::new())
    }
}
