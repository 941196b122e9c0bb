//! `plyfs base`: shared, read-only images.

use std::path::Path;

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};

use super::Global;
use super::again;
use super::args;
use super::error::CliError;
use super::output::{Column, Kind, fields, table};

const EXAMPLES: &str = "\
Examples:
  plyfs base add debian /images/debian-12.raw
  plyfs base ls
  plyfs base show debian
  plyfs base rm debian";

const ADD_EXAMPLES: &str = "\
Examples:
  plyfs base add debian /images/debian-12.raw
  plyfs base add debian debian-12.qcow2 --format qcow2
  plyfs base add debian ./debian-12.raw --sha256 \"$(sha256sum < debian-12.raw | cut -d' ' -f1)\"

A format is never guessed: a raw image is raw, whatever its bytes say. The image must not change while it is a base.
Prints the path of the base's file in the mount.";

const RM_EXAMPLES: &str = "\
Examples:
  plyfs base rm debian

Refuses while a disk still needs the base, and names the disks. The image itself is never touched.";

const COLUMNS: [Column; 7] = [
    ("NAME", "name", Kind::Text),
    ("FORMAT", "format", Kind::Text),
    ("SIZE", "size", Kind::Size),
    ("DISKS", "disks", Kind::Number),
    ("CACHED", "cached_bytes", Kind::Size),
    ("STATE", "state", Kind::Text),
    ("SOURCE", "source", Kind::Text),
];

const FIELDS: [Column; 12] = [
    ("name", "name", Kind::Text),
    ("id", "id", Kind::Text),
    ("path", "path", Kind::Text),
    ("source", "source", Kind::Text),
    ("format", "format", Kind::Text),
    ("size", "size", Kind::Size),
    ("disks", "disks", Kind::Number),
    ("cached", "cached_bytes", Kind::Size),
    ("sha256", "sha256", Kind::Text),
    ("created", "created", Kind::Text),
    ("state", "state", Kind::Text),
    ("error", "error", Kind::Text),
];

/// Register, list and remove bases: the shared, read-only images that disks start from
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(super) enum Base {
    /// Register an image as a base; returns at once, nothing is copied or converted
    #[command(after_help = ADD_EXAMPLES)]
    Add {
        /// Name of the new base
        #[arg(value_parser = args::name)]
        name: String,
        /// Path or URL of the image
        source: String,
        /// Format of the image
        #[arg(long, value_enum, default_value = "raw")]
        format: Format,
        /// Digest that the image file must have
        #[arg(long, value_name = "HEX", value_parser = args::sha256, conflicts_with = "sha512")]
        sha256: Option<String>,
        /// Digest that the image file must have
        #[arg(long, value_name = "HEX", value_parser = args::sha512)]
        sha512: Option<String>,
    },
    /// List the bases
    #[command(visible_alias = "list", after_help = "Examples:\n  plyfs base ls\n  plyfs --json base ls")]
    Ls,
    /// Show one base
    #[command(after_help = "Examples:\n  plyfs base show debian\n  plyfs --json base show debian")]
    Show {
        /// Name of the base
        #[arg(value_parser = args::name)]
        name: String,
    },
    #[command(subcommand)]
    Trace(super::trace::BaseTrace),
    /// Remove bases that no disk needs
    #[command(after_help = RM_EXAMPLES)]
    Rm {
        /// Names of the bases
        #[arg(required = true, value_name = "NAME", value_parser = args::name)]
        names: Vec<String>,
    },
}

/// What an image file contains.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Format {
    Raw,
    Qcow2,
    Vmdk,
}

impl Format {
    fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
        }
    }
}

impl Base {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        match self {
            Self::Add { name, source, format, sha256, sha512 } => {
                let body = json!({
                    "name": name,
                    "source": absolute_source(source)?,
                    "format": format.name(),
                    "sha256": sha256,
                    "sha512": sha512,
                });
                let action = format!("cannot add base {name}");
                let base = again::add_base(&global.client()?, &name, &body, &action)?;
                global.output().value(&base, super::disk::paths)
            }
            Self::Ls => {
                let bases = global.client()?.get("/v1/bases", "cannot list bases")?;
                global.output().value(&bases, |bases| table(bases, &COLUMNS))
            }
            Self::Show { name } => {
                let base = global
                    .client()?
                    .get(&format!("/v1/bases/{name}"), &format!("cannot show base {name}"))?;
                global.output().value(&base, |base| fields(base, &FIELDS))
            }
            Self::Trace(trace) => trace.run(global),
            Self::Rm { names } => super::disk::remove(global, "base", &names),
        }
    }
}

/// The daemon has another current directory: a path is sent absolute, a URL as it is.
fn absolute_source(source: String) -> Result<Value, CliError> {
    if args::is_url(&source) {
        return Ok(Value::String(source));
    }
    let path = args::absolute(Path::new(&source))?;
    match path.to_str() {
        Some(text) => Ok(Value::String(text.to_owned())),
        None => Err(CliError::NotUtf8 { path }),
    }
}
