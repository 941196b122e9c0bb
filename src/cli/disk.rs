//! `plyfs disk`: the writable disks of VMs.

use clap::Subcommand;
use serde_json::{Value, json};

use super::Global;
use super::args;
use super::client::read;
use super::error::CliError;
use super::output::{Column, Kind, fields, print_error, printable, table};
use super::retry;
use crate::control::wire::{self, CreateDisks, Removed, Resize};

const EXAMPLES: &str = "\
Examples:
  plyfs disk create vm1 --base debian --size 20G
  plyfs disk ls
  plyfs disk resize vm1 40G
  plyfs disk rm vm1";

const CREATE_EXAMPLES: &str = "\
Examples:
  plyfs disk create vm1 --base debian               the size of the base
  plyfs disk create vm1 vm2 vm3 --base debian --size 20G
  plyfs disk create scratch --size 100G             a blank disk

A disk of any size takes the same short time, because no data moves. Several disks are created together or not at all. \
The command prints the path of each disk's file in the mount. With --json it prints an object for one NAME, an array \
for several.";

const RM_EXAMPLES: &str = "\
Examples:
  plyfs disk rm vm1
  plyfs disk rm vm1 vm2

The command deletes all data of the disk. A disk that is open in a VM exists without a name until its last close.";

const RESIZE_EXAMPLES: &str = "\
Examples:
  plyfs disk resize vm1 40G

A smaller size discards the data beyond it: those bytes read as zeros when the disk grows again. A running QEMU learns \
the new size through its monitor command block_resize.";

pub(super) const COLUMNS: [Column; 7] = [
    ("NAME", "name", Kind::Text),
    ("BASE", "base", Kind::Text),
    ("SIZE", "size", Kind::Size),
    ("DELTA", "delta_bytes", Kind::Size),
    ("STATE", "state", Kind::Text),
    ("CREATED", "created", Kind::Text),
    ("PATH", "path", Kind::Text),
];

pub(super) const FIELDS: [Column; 11] = [
    ("name", "name", Kind::Text),
    ("id", "id", Kind::Text),
    ("path", "path", Kind::Text),
    ("base", "base", Kind::Text),
    ("size", "size", Kind::Size),
    ("delta", "delta_bytes", Kind::Size),
    ("map in memory", "map_bytes", Kind::Size),
    ("created", "created", Kind::Text),
    ("state", "state", Kind::Text),
    ("error", "error", Kind::Text),
    ("refuses writes", "refuses_writes", Kind::Text),
];

/// Create, list, resize and remove disks: each is one raw file under the mount
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(super) enum Disk {
    /// Create disks on a base, or blank ones
    #[command(after_help = CREATE_EXAMPLES)]
    Create {
        /// Names of the new disks
        #[arg(required = true, value_name = "NAME", value_parser = args::name)]
        names: Vec<String>,
        /// Base that the disks start from; without it they are blank
        #[arg(long, value_name = "BASE", value_parser = args::name)]
        base: Option<String>,
        /// Size of each disk; needed without a base [default: the base's size]
        #[arg(long, value_name = "SIZE", value_parser = args::size, allow_hyphen_values = true)]
        #[arg(required_unless_present = "base")]
        size: Option<u64>,
    },
    /// List the disks
    #[command(visible_alias = "list", after_help = "Examples:\n  plyfs disk ls\n  plyfs --json disk ls")]
    Ls,
    /// Show one disk
    #[command(after_help = "Examples:\n  plyfs disk show vm1\n  plyfs --json disk show vm1 | jq -r .path")]
    Show {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        name: String,
    },
    /// Remove disks and all data written to them
    #[command(after_help = RM_EXAMPLES)]
    Rm {
        /// Names of the disks
        #[arg(required = true, value_name = "NAME", value_parser = args::name)]
        names: Vec<String>,
    },
    /// Grow or shrink a disk
    #[command(after_help = RESIZE_EXAMPLES)]
    Resize {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        name: String,
        /// New size
        #[arg(value_parser = args::size, allow_hyphen_values = true)]
        size: u64,
    },
}

impl Disk {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        match self {
            Self::Create { names, base, size } => create(global, &names, base.as_deref(), size),
            Self::Ls => {
                let disks = global.client()?.get("/v1/disks", "cannot list disks")?;
                global.output().value(&disks, |disks| table(disks, &COLUMNS))
            }
            Self::Show { name } => {
                let disk = global
                    .client()?
                    .get(&format!("/v1/disks/{name}"), &format!("cannot show disk {name}"))?;
                global.output().value(&disk, |disk| fields(disk, &FIELDS))
            }
            Self::Rm { names } => remove(global, "disk", &names),
            Self::Resize { name, size } => {
                let (path, action) =
                    (format!("/v1/disks/{name}/resize"), format!("cannot resize disk {name}"));
                let client = global.client()?;
                let disk = retry::repeat(|| client.post(&path, &Resize { size }, &action))?;
                // The kernel learns the new size with the next attributes that it requests. The resize holds even if
                // this user cannot see the file, or if the mount is in another namespace.
                if let Ok(wire::Disk { path, .. }) = read(&disk, &action) {
                    let _ = std::fs::metadata(path);
                }
                global.output().value(&disk, |_| String::new())
            }
        }
    }
}

fn create(global: &Global, names: &[String], base: Option<&str>, size: Option<u64>) -> Result<(), CliError> {
    let action = match names {
        [name] => format!("cannot create disk {name}"),
        names => format!("cannot create {} disks", names.len()),
    };
    let body = CreateDisks { name: None, names: names.to_vec(), base: base.map(str::to_owned), size };
    let mut disks = retry::create(&global.client()?, "/v1/disks", &body, &action)?;
    // For one disk an object, as every command but `ls` prints.
    if let (1, Value::Array(list)) = (names.len(), &mut disks)
        && list.len() == 1
    {
        disks = list.remove(0);
    }
    global.output().value(&disks, paths)
}

/// The path of an object, or of each object of an array, one per line.
pub(super) fn paths(value: &Value) -> String {
    let objects = value.as_array().map_or(std::slice::from_ref(value), Vec::as_slice);
    objects.iter().filter_map(|object| object["path"].as_str()).map(|path| printable(path) + "\n").collect()
}

/// Removes disks or bases one by one. A refused removal does not stop the others.
pub(super) fn remove(global: &Global, noun: &str, names: &[String]) -> Result<(), CliError> {
    let client = global.client()?;
    let mut removed = Vec::new();
    let mut failed = Vec::new();
    for name in names {
        match retry::remove(&client, noun, name) {
            Ok(_) => removed.push(name.clone()),
            Err(error @ CliError::Refused { .. }) => failed.push(error),
            // Without a daemon that answers, the others would fail in the same way.
            Err(error) => {
                failed.push(error);
                break;
            }
        }
    }
    global.output().value(&json!(Removed { removed }), |_| String::new())?;
    let last = failed.pop();
    for error in failed {
        print_error(&error.to_string());
    }
    last.map_or(Ok(()), Err)
}
