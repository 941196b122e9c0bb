//! `plyfs pool`: directories on other drives for the data of disks.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Subcommand;
use serde_json::Value;

use super::client::{Client, read};
use super::error::CliError;
use super::output::{Column, Kind, printable};
use super::retry;
use super::table::{fields, table};
use super::{Global, args};
use crate::control::wire::{self, AddPool, ErrorKind, Pool as Shown, PoolChange, PoolState, UpgradeState};
use crate::daemon::prepare_pool;

const EXAMPLES: &str = "\
Examples:
  plyfs pool add fast /mnt/nvme1/plyfs
  plyfs disk create vm1 --base debian --size 20G --pool fast
  plyfs pool ls

A pool is a directory, on a drive of its own as a rule. The data of its disks lies there. Names, records, bases and \
their cache stay in the directory of the store, which is the pool default. A drive that fails takes its own disks only.";

const ADD_EXAMPLES: &str = "\
Examples:
  plyfs pool add fast /mnt/nvme1/plyfs

The directory is created when it is missing, and must be empty. It gets a file plyfs.pool: a directory without that \
file, such as a mount point whose drive is not mounted, is never used. Disks pause for some milliseconds, because \
another worker takes over.";

const ATTACH_EXAMPLES: &str = "\
Examples:
  mount /mnt/nvme1 && plyfs pool attach fast

The disks of the pool are as after a power cut: what was flushed is there. Handles that were open refuse writes until \
they are opened again. When the drive failed while the daemon ran, unmount it first (umount -l), and check it.";

const RM_EXAMPLES: &str = "\
Examples:
  plyfs pool rm fast
  plyfs pool rm fast --lost      its drive is dead for good, and its disks were removed

The command refuses a pool in which a disk has data or layers, and names the disks. Other files in the directory stay.";

const COLUMNS: [Column; 6] = [
    ("NAME", "name", Kind::Text),
    ("DIR", "dir", Kind::Text),
    ("SIZE", "total_bytes", Kind::Size),
    ("FREE", "available_bytes", Kind::Size),
    ("DISKS", "disk_count", Kind::Number),
    ("STATE", "state", Kind::Text),
];

const FIELDS: [Column; 9] = [
    ("name", "name", Kind::Text),
    ("dir", "dir", Kind::Text),
    ("size", "total_bytes", Kind::Size),
    ("free", "available_bytes", Kind::Size),
    ("reserve", "reserve_held_bytes", Kind::Size),
    ("state", "state", Kind::Text),
    ("error", "error", Kind::Text),
    ("disks", "disk_names", Kind::Text),
    ("layers of", "layer_names", Kind::Text),
];

/// How long a takeover may take.
const TIMEOUT: Duration = Duration::from_secs(120);
const INTERVAL: Duration = Duration::from_millis(20);

/// Use directories on other drives for the data of disks
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(super) enum Pool {
    /// Make a directory a pool, and use it
    #[command(after_help = ADD_EXAMPLES)]
    Add {
        /// Name of the pool
        #[arg(value_parser = args::name)]
        name: String,
        /// Its directory
        dir: PathBuf,
    },
    /// List the pools
    #[command(visible_alias = "list", after_help = "Examples:\n  plyfs pool ls\n  plyfs --json pool ls")]
    Ls,
    /// Show one pool
    #[command(
        after_help = "Examples:\n  plyfs pool show fast\n  plyfs --json pool show fast | jq -r '.disks[]'"
    )]
    Show {
        /// Name of the pool
        #[arg(value_parser = args::name)]
        name: String,
    },
    /// Use a pool whose drive is back
    #[command(after_help = ATTACH_EXAMPLES)]
    Attach {
        /// Name of the pool
        #[arg(value_parser = args::name)]
        name: String,
    },
    /// Stop using a pool that has no data of disks
    #[command(after_help = RM_EXAMPLES)]
    Rm {
        /// Name of the pool
        #[arg(value_parser = args::name)]
        name: String,
        /// Its drive never comes back: forget what removed disks have there
        #[arg(long)]
        lost: bool,
    },
}

impl Pool {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        match self {
            Self::Add { name, dir } => add(global, &name, &dir),
            Self::Ls => {
                let list = global.client()?.get("/v1/pools", "cannot list the pools")?;
                let now = std::time::SystemTime::now();
                global.output().value(&list, |list| table(list, &COLUMNS, now, None))
            }
            Self::Show { name } => {
                let pool = global
                    .client()?
                    .get(&format!("/v1/pools/{name}"), &format!("cannot show pool {name}"))?;
                global.output().value(&pool, human)
            }
            Self::Attach { name } => {
                let (client, action) = (global.client()?, format!("cannot attach pool {name}"));
                let begun = begin(|| client.post_empty(&format!("/v1/pools/{name}/attach"), &action))?;
                used(global, &client, begun, &action)
            }
            Self::Rm { name, lost } => {
                let (client, action) = (global.client()?, format!("cannot remove pool {name}"));
                let query = if lost { "?lost=true" } else { "" };
                let removed = client.delete(&format!("/v1/pools/{name}{query}"), &action)?;
                global.output().value(&removed, |_| String::new())
            }
        }
    }
}

fn human(pool: &Value) -> String {
    let mut shown = pool.clone();
    for (key, from) in [("disk_names", "disks"), ("layer_names", "layers_of")] {
        let names = pool[from].as_array().map(Vec::as_slice).unwrap_or_default();
        let names: Vec<&str> = names.iter().filter_map(Value::as_str).collect();
        shown[key] = if names.is_empty() { Value::Null } else { names.join(", ").into() };
    }
    fields(&shown, &FIELDS)
}

fn refused(action: &str, why: &str) -> CliError {
    CliError::Refused { kind: Some(ErrorKind::Invalid), message: printable(&format!("{action}: {why}")) }
}

fn add(global: &Global, name: &str, dir: &Path) -> Result<(), CliError> {
    let action = format!("cannot add pool {name}");
    let (client, store) = (global.client()?, global.store()?);
    let status: wire::Status = read(&client.get("/v1/status", &action)?, &action)?;
    // The daemon sees paths without links; a directory that is missing has a parent.
    let path = args::absolute(dir)?;
    let real = |path: &Path| fs::canonicalize(path);
    let found = real(&path).or_else(|_| {
        let (parent, last) = (path.parent().unwrap_or(Path::new("/")), path.file_name().unwrap_or_default());
        real(parent).map(|parent| parent.join(last))
    });
    let found = found.map_err(|error| refused(&action, &format!("{}: {error}", path.display())))?;
    let store = real(&store).unwrap_or(store);
    prepare_pool(&store, Path::new(&status.mount), &found)
        .map_err(|error| refused(&action, &format!("{}: {error}", found.display())))?;
    let text = found.to_str().ok_or_else(|| CliError::NotUtf8 { path: found.clone() })?;
    let body = AddPool { name: name.to_owned(), dir: text.to_owned() };
    let begun = begin(|| client.post("/v1/pools", &body, &action))?;
    used(global, &client, begun, &action)
}

/// Sends a request that ends with a takeover. It may be sent again, and waits for a takeover that is under way.
fn begin(request: impl Fn() -> Result<Value, CliError>) -> Result<PoolChange, CliError> {
    let start = Instant::now();
    loop {
        match retry::repeat(&request) {
            Err(error) if error.is(ErrorKind::InUse) && start.elapsed() < TIMEOUT => {
                std::thread::sleep(INTERVAL * 5);
            }
            answer => return read(&answer?, "cannot read the answer"),
        }
    }
}

/// Waits for the takeover, and shows the pool.
fn used(global: &Global, client: &Client, begun: PoolChange, action: &str) -> Result<(), CliError> {
    let start = Instant::now();
    loop {
        let upgrade = match client.get("/v1/status", action) {
            Ok(status) => read::<Option<wire::Upgrade>>(&status["upgrade"], action)?,
            // The takeover replaces the worker.
            Err(CliError::Transport { .. } | CliError::InvalidAnswer { .. } | CliError::Refused { .. }) => {
                None
            }
            Err(error) => return Err(error),
        };
        match upgrade.filter(|upgrade| upgrade.number >= begun.upgrade) {
            Some(upgrade) if upgrade.state == UpgradeState::Failed => {
                let why = upgrade.why.as_deref().unwrap_or("the daemon is stopping").to_owned();
                let why = format!("the takeover failed: {why}; the pool is used after the next start");
                return Err(refused(action, &why));
            }
            Some(upgrade) if upgrade.state == UpgradeState::Done => break,
            _ if start.elapsed() >= TIMEOUT => {
                return Err(refused(action, "the takeover is not done yet; see plyfs status"));
            }
            _ => std::thread::sleep(INTERVAL),
        }
    }
    let shown = retry::repeat(|| client.get(&format!("/v1/pools/{}", begun.name), action))?;
    let pool: Shown = read(&shown, action)?;
    if pool.state == PoolState::Unavailable {
        let why = pool.error.unwrap_or_default();
        return Err(refused(action, &format!("{}: {why}", pool.dir)));
    }
    global.output().value(&shown, human)
}
