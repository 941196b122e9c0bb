//! `plyfs trace` and `plyfs base trace`: recordings of boots.

use std::path::PathBuf;

use clap::Subcommand;
use serde_json::json;

use super::Global;
use super::args;
use super::client::read;
use super::error::CliError;
use super::listing::{Listing, Noun, no_notes};
use super::output::{Column, Kind, printable};
use super::retry;
use super::table::fields;
use crate::control::wire::{Recording, Removed};

const EXAMPLES: &str = "\
Examples:
  plyfs trace record vm1            record what vm1 reads from now on, as the trace of its base
  plyfs trace record vm1 --stop     end the recording and keep it
  plyfs base trace show debian";

const RECORD_EXAMPLES: &str = "\
Examples:
  plyfs trace record vm1
  plyfs trace record vm1 --stop

The daemon records the first boot of a base without this command. A recording begins with the first read. It ends when \
the disk has read nothing new for 30 s, after 5 minutes, after 1 GiB, or with --stop. It replaces the trace that the \
base has. A recording is lost when its worker ends, except at `plyfs stop`.";

const BASE_EXAMPLES: &str = "\
Examples:
  plyfs base trace ls
  plyfs base trace export debian debian-12.trace
  plyfs base trace import debian debian-12.trace
  plyfs base trace rm debian

A trace is a small file: which blocks a boot read, in which order and when. A host that has the trace fetches these \
blocks before the guest reads them. The trace can be distributed with the image.";

pub(super) const COLUMNS: [Column; 7] = [
    ("BASE", "base", Kind::Text),
    ("BYTES", "bytes", Kind::Size),
    ("ENTRIES", "entries", Kind::Number),
    ("MS", "duration_ms", Kind::Number),
    ("FILE", "file_bytes", Kind::Size),
    ("RECORDED", "recorded", Kind::Time),
    ("ERROR", "error", Kind::Text),
];

pub(super) const FIELDS: [Column; 13] = [
    ("base", "base", Kind::Text),
    ("disk", "disk", Kind::Text),
    ("recorded on base", "recorded_on", Kind::Text),
    ("recorded", "recorded", Kind::Time),
    ("size of the base", "size", Kind::Size),
    ("origin", "origin", Kind::Text),
    ("fits the base", "fits", Kind::Text),
    ("read", "bytes", Kind::Size),
    ("entries", "entries", Kind::Number),
    ("milliseconds", "duration_ms", Kind::Number),
    ("prefetched", "prefetch_bytes", Kind::Size),
    ("file", "file_bytes", Kind::Size),
    ("error", "error", Kind::Text),
];

const NOUN: Noun = Noun {
    names: ["trace", "traces"],
    name: "base",
    columns: &COLUMNS,
    more: &FIELDS,
    totals: &[("file_bytes", Kind::Size, "{} in files")],
    notes: no_notes,
};

/// Record which blocks a boot reads, so that the next boot finds them fetched
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(super) enum Trace {
    /// Record the reads of a disk from now on, as the trace of its base
    #[command(after_help = RECORD_EXAMPLES)]
    Record {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        disk: String,
        /// End the recording and keep it
        #[arg(long)]
        stop: bool,
    },
}

/// List, show, export, import and remove the traces of bases
#[derive(Debug, Subcommand)]
#[command(after_help = BASE_EXAMPLES)]
pub(super) enum BaseTrace {
    /// List the traces
    #[command(
        visible_alias = "list",
        after_help = "Examples:\n  plyfs base trace ls\n  plyfs base trace ls --sort bytes:desc\n  plyfs --json base trace ls"
    )]
    Ls(Listing),
    /// Show the trace of a base
    #[command(after_help = "Examples:\n  plyfs base trace show debian")]
    Show {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
    },
    /// Write the trace of a base to a file
    #[command(after_help = "Examples:\n  plyfs base trace export debian debian-12.trace")]
    Export {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
        /// The file; an existing file is replaced
        file: PathBuf,
    },
    /// Replace the trace of a base by one from a file
    #[command(after_help = "Examples:\n  plyfs base trace import debian debian-12.trace")]
    Import {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
        /// The file
        file: PathBuf,
    },
    /// Remove traces; the next first boot is recorded
    #[command(after_help = "Examples:\n  plyfs base trace rm debian")]
    Rm {
        /// Names of the bases
        #[arg(required = true, value_name = "NAME", value_parser = args::name)]
        names: Vec<String>,
    },
}

impl Trace {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let Self::Record { disk, stop } = self;
        let client = global.client()?;
        let path = format!("/v1/disks/{disk}/trace");
        if stop {
            // Sent once only: when the worker ended, the recording is lost, and the next worker answers that.
            let trace = client.delete(&path, &format!("cannot end the recording of disk {disk}"))?;
            return global.output().value(&trace, |trace| fields(trace, &FIELDS));
        }
        let action = format!("cannot record disk {disk}");
        let recording = client.post_empty(&path, &action)?;
        let Recording { base, .. } = read(&recording, &action)?;
        let base = printable(&base);
        global.output().value(&recording, |_| {
            format!(
                "recording the reads of disk {disk} from base {base}; end and keep it with: plyfs trace record {disk} \
                 --stop\n"
            )
        })
    }
}

impl BaseTrace {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let client = global.client()?;
        let path = |name: &str| format!("/v1/bases/{name}/trace");
        match self {
            Self::Ls(listing) => {
                listing.check(&NOUN)?;
                let traces = client.get("/v1/traces", "cannot list traces")?;
                listing.run(&global.output(), traces, &NOUN)
            }
            Self::Show { name } => {
                let trace = client.get(&path(&name), &format!("cannot show the trace of base {name}"))?;
                global.output().value(&trace, |trace| fields(trace, &FIELDS))
            }
            Self::Export { name, file } => {
                let action = format!("cannot export the trace of base {name}");
                let bytes = client.get_bytes(&format!("{}/file", path(&name)), &action)?;
                std::fs::write(&file, &bytes).map_err(|source| CliError::Transfer {
                    action,
                    path: file.clone(),
                    source,
                })?;
                let done = json!({"base": name, "file": file, "file_bytes": bytes.len()});
                global.output().value(&done, |_| String::new())
            }
            Self::Import { name, file } => {
                let action = format!("cannot import a trace for base {name}");
                let bytes = std::fs::read(&file).map_err(|source| CliError::Transfer {
                    action: action.clone(),
                    path: file.clone(),
                    source,
                })?;
                let put = || client.put_bytes(&format!("{}/file", path(&name)), bytes.clone(), &action);
                let trace = retry::repeat(put)?;
                global.output().value(&trace, |_| String::new())
            }
            Self::Rm { names } => {
                let mut removed = Vec::new();
                for name in names {
                    client.delete(&path(&name), &format!("cannot remove the trace of base {name}"))?;
                    removed.push(name);
                }
                global.output().value(&json!(Removed { removed }), |_| String::new())
            }
        }
    }
}
