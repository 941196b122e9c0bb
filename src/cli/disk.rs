//! `plyfs disk`: the writable disks of VMs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::Subcommand;
use serde_json::{Value, json};

use super::Global;
use super::args::{self, DiskOrSnapshot};
use super::change;
use super::client::{Client, read};
use super::commit;
use super::diff;
use super::encryption::{self, EncryptArgs, KeyArgs};
use super::error::CliError;
use super::export;
use super::holders::{self, Holder};
use super::import;
use super::limits;
use super::listing::{Listing, Noun, into_rows, no_notes};
use super::map;
use super::output::{Column, Kind, printable};
use super::retry::{self, Removal};
use super::snapshot;
use super::table::fields;
use super::trash;
use crate::control::wire::{self, CreateDisks, ErrorKind, Removed, Resize, WorkKind};

const EXAMPLES: &str = "\
Examples:
  plyfs disk create vm1 --base debian --size 20G
  plyfs disk ls
  plyfs disk resize vm1 40G
  plyfs disk limit vm1 --quota 50G --iops 500
  plyfs disk snapshot vm1 monday
  plyfs disk clone vm1@monday vm2
  plyfs disk diff vm1@monday
  plyfs disk rm vm1";

const CREATE_EXAMPLES: &str = "\
Examples:
  plyfs disk create vm1 --base debian               the size of the base
  plyfs disk create vm1 vm2 vm3 --base debian --size 20G
  plyfs disk create scratch --size 100G             a blank disk
  plyfs disk create vm4 --base debian --pool fast   its data in another pool
  plyfs disk create vm4 --base debian --quota 50G --iops 500 --bandwidth 100M/s
  plyfs disk create vm4 --base debian --encrypt --key-file /etc/plyfs/keys/vm4

A disk of any size takes the same short time, because no data moves. Several disks are created together or not at all. \
The command prints the path of each disk's file in the mount. With --json it prints an object for one NAME, an array \
for several.";

const LS_EXAMPLES: &str = "\
Examples:
  plyfs disk ls
  plyfs disk ls --sort delta:desc
  plyfs disk ls --filter base=debian --filter name~web
  plyfs disk ls --filter at_quota=true
  plyfs disk ls -q --filter name~test | xargs -r plyfs disk rm
  plyfs --json disk ls

On a terminal each line is cut to its width. In a pipe nothing is cut. With --json times are RFC 3339.";

const MAP_EXAMPLES: &str = "\
Examples:
  plyfs disk map vm1
  plyfs disk map vm1 --cells 4096
  plyfs --json disk map vm1 | jq .total

The command draws cells of equal size. A small letter (a lighter block) means that a cell has some of that kind. A disk that is not in use is \
read from its durable map. It fetches \
nothing. A terminal gets colours unless NO_COLOR is set.";

const RM_EXAMPLES: &str = "\
Examples:
  plyfs disk rm vm1
  plyfs disk rm vm1 vm2
  plyfs disk rm vm1@monday          a snapshot
  plyfs disk rm vm1 --now           past the trash

The command deletes all data of the disk. Where the daemon has a trash (serve --trash-grace), it puts the disk there \
first: plyfs trash restore vm1 takes it back, until its time is over. A snapshot skips the trash. The command refuses a \
disk that is open, and names the processes; with --force such a disk exists without a name until its last close. A disk \
with snapshots goes with --snapshots only. Clones stay.";

const RESIZE_EXAMPLES: &str = "\
Examples:
  plyfs disk resize vm1 40G
  plyfs disk resize vm1 10G --shrink

A smaller size discards the data beyond it: those bytes read as zeros when the disk grows again. It needs --shrink. A \
running QEMU learns \
the new size through its monitor command block_resize.";

pub(super) const COLUMNS: [Column; 8] = [
    ("NAME", "name", Kind::Text),
    ("BASE", "base", Kind::Text),
    ("SIZE", "size", Kind::Size),
    ("DELTA", "delta_bytes", Kind::Size),
    ("OPEN", "open_handles", Kind::Number),
    ("STATE", "state", Kind::Text),
    ("CREATED", "created", Kind::Time),
    ("PATH", "path", Kind::Text),
];

pub(super) const FIELDS: [Column; 16] = [
    ("name", "name", Kind::Text),
    ("id", "id", Kind::Text),
    ("path", "path", Kind::Text),
    ("base", "base", Kind::Text),
    ("size", "size", Kind::Size),
    ("delta", "delta_bytes", Kind::Size),
    ("pool", "pool", Kind::Text),
    ("needs pools", "pool_names", Kind::Text),
    ("map in memory", "map_bytes", Kind::Size),
    ("created", "created", Kind::Time),
    ("key", "key", Kind::Text),
    ("state", "state", Kind::Text),
    ("error", "error", Kind::Text),
    ("refuses writes", "refuses_writes", Kind::Text),
    ("open handles", "open_handles", Kind::Number),
    ("job", "job", Kind::Text),
];

/// What the command adds to the daemon's answer: the processes that have a disk open, as far as it may see them.
const OPEN_BY: &str = "open_by";
const OPEN_BY_COLUMN: Column = ("OPEN BY", OPEN_BY, Kind::Text);

const NOUN: Noun = Noun {
    names: ["disk", "disks"],
    name: "name",
    columns: &COLUMNS,
    more: &[
        OPEN_BY_COLUMN,
        ("POOL", "pool", Kind::Text),
        ("ID", "id", Kind::Number),
        ("ERROR", "error", Kind::Text),
        ("REFUSES WRITES", "refuses_writes", Kind::Text),
        ("MAP", "map_bytes", Kind::Size),
        limits::COLUMNS[0],
        limits::COLUMNS[1],
        limits::COLUMNS[2],
        limits::COLUMNS[3],
        limits::COLUMNS[4],
    ],
    totals: &[
        ("size", Kind::Size, "{} in all"),
        ("delta_bytes", Kind::Size, "{} written"),
        ("open_handles", Kind::Number, "open handles: {}"),
    ],
    notes: no_notes,
};

/// Create, list, resize and remove disks: each is one raw file under the mount
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(super) enum Disk {
    /// Create disks on a base, or blank ones
    #[command(after_help = CREATE_EXAMPLES)]
    Create {
        /// Names of the new disks
        #[arg(required = true, value_name = "NAME", value_parser = args::new_name)]
        names: Vec<String>,
        /// Base that the disks start from; without it they are blank
        #[arg(long, value_name = "BASE", value_parser = args::name)]
        base: Option<String>,
        /// Size of each disk; needed without a base [default: the base's size]
        #[arg(long, value_name = "SIZE", value_parser = args::disk_size, allow_hyphen_values = true)]
        #[arg(required_unless_present = "base")]
        size: Option<u64>,
        /// Pool of their data [default: the directory of the store]
        #[arg(long, value_name = "POOL", value_parser = args::name)]
        pool: Option<String>,
        #[command(flatten)]
        limits: limits::Options,
        #[command(flatten)]
        encryption: EncryptArgs,
    },
    /// Print or change the limits of a disk: its quota, its IOPS and its bandwidth
    #[command(after_help = limits::EXAMPLES)]
    Limit {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        name: String,
        #[command(flatten)]
        limits: limits::Options,
    },
    /// List the disks
    #[command(visible_alias = "list", after_help = LS_EXAMPLES)]
    Ls(Listing),
    /// Show one disk
    #[command(after_help = "Examples:\n  plyfs disk show vm1\n  plyfs --json disk show vm1 | jq -r .path")]
    Show {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        name: String,
    },
    /// Show where the bytes of a disk are: its delta, zeros, and the parts of its base
    #[command(after_help = MAP_EXAMPLES)]
    Map {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        name: String,
        /// The most cells [default: as many as fit]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
        cells: Option<u32>,
    },
    /// Remove disks and all data written to them
    #[command(after_help = RM_EXAMPLES)]
    Rm {
        /// Names of the disks, or DISK@SNAPSHOT
        #[arg(required = true, value_name = "NAME", value_parser = args::disk_or_snapshot)]
        names: Vec<DiskOrSnapshot>,
        /// Also remove disks that are open
        #[arg(long)]
        force: bool,
        /// Also remove the snapshots of the disks
        #[arg(long)]
        snapshots: bool,
        /// Skip the trash
        #[arg(long)]
        now: bool,
    },
    /// List the disks that share layers with a disk: its clones and theirs
    #[command(after_help = trash::DISK_CHILDREN_EXAMPLES)]
    Children {
        /// The disk, or DISK@SNAPSHOT
        #[arg(value_name = "DISK", value_parser = args::disk_or_snapshot)]
        disk: DiskOrSnapshot,
    },
    /// Take a snapshot of a disk
    #[command(after_help = snapshot::SNAPSHOT_EXAMPLES)]
    Snapshot {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        disk: String,
        /// Name of the snapshot
        #[arg(value_parser = args::name)]
        name: String,
    },
    /// List the snapshots of a disk
    #[command(after_help = snapshot::SNAPSHOTS_EXAMPLES)]
    Snapshots {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        disk: String,
    },
    /// Return a disk to a snapshot, and lose what was written since
    #[command(after_help = snapshot::ROLLBACK_EXAMPLES)]
    Rollback {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        disk: String,
        /// Name of the snapshot
        #[arg(value_parser = args::name)]
        snapshot: String,
        /// Also roll back a disk that is open
        #[arg(long)]
        force: bool,
    },
    /// Make disks that show what a disk or a snapshot shows, without a copy
    #[command(after_help = snapshot::CLONE_EXAMPLES)]
    Clone {
        /// The disk, or DISK@SNAPSHOT
        #[arg(value_name = "SOURCE", value_parser = args::disk_or_snapshot)]
        origin: DiskOrSnapshot,
        /// Names of the new disks
        #[arg(required = true, value_name = "NAME", value_parser = args::new_name)]
        names: Vec<String>,
        /// Size of each new disk [default: that of the source]
        #[arg(long, value_name = "SIZE", value_parser = args::disk_size, allow_hyphen_values = true)]
        size: Option<u64>,
        /// Pool of what they write; the layers stay where they are [default: that of the source]
        #[arg(long, value_name = "POOL", value_parser = args::name)]
        pool: Option<String>,
        #[command(flatten)]
        limits: limits::Options,
        #[command(flatten)]
        encryption: EncryptArgs,
    },
    /// List the extents of a disk that differ from its base, or between two snapshots
    #[command(after_help = diff::EXAMPLES)]
    Diff {
        /// The disk, or DISK@SNAPSHOT to start from
        #[arg(value_name = "DISK[@A]", value_parser = args::disk_or_snapshot)]
        from: DiskOrSnapshot,
        /// The snapshot to end at [default: the disk as it is now]
        #[arg(value_name = "@B", value_parser = diff::end)]
        end: Option<DiskOrSnapshot>,
    },
    /// Write a disk to a raw file or a qcow2 image
    #[command(after_help = export::EXAMPLES)]
    Export(export::Export),
    /// Create a disk with the contents of an image file
    #[command(after_help = import::EXAMPLES)]
    Import(import::Import),
    /// Make a disk independent of its base
    #[command(after_help = change::FLATTEN_EXAMPLES)]
    Flatten(change::How),
    /// Put a disk on another base, with the same bytes
    #[command(after_help = change::REBASE_EXAMPLES)]
    Rebase(change::Rebase),
    /// Move a disk to another pool, while it is in use
    #[command(after_help = change::MOVE_EXAMPLES)]
    Move(change::Move),
    /// Make a new base of what a disk or a snapshot shows
    #[command(after_help = commit::EXAMPLES)]
    Commit(commit::Commit),
    /// Merge layers that no snapshot tells apart any more
    #[command(after_help = change::COMPACT_EXAMPLES)]
    Compact(change::How),
    /// Try the secret of a locked disk again
    #[command(after_help = encryption::UNLOCK_EXAMPLES)]
    Unlock {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        name: String,
    },
    /// Give an encrypted disk another secret
    #[command(after_help = encryption::REKEY_EXAMPLES)]
    Rekey {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        name: String,
        #[command(flatten)]
        key: KeyArgs,
    },
    /// Forget the keys of an encrypted disk, and remove it
    #[command(after_help = encryption::SHRED_EXAMPLES)]
    Shred {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        name: String,
        /// Also shred a disk that is open
        #[arg(long)]
        force: bool,
        /// Also shred the snapshots of the disk
        #[arg(long)]
        snapshots: bool,
    },
    /// Grow or shrink a disk
    #[command(after_help = RESIZE_EXAMPLES)]
    Resize {
        /// Name of the disk
        #[arg(value_parser = args::name)]
        name: String,
        /// New size
        #[arg(value_parser = args::disk_size, allow_hyphen_values = true)]
        size: u64,
        /// Accept a smaller size, and the loss of the data beyond it
        #[arg(long)]
        shrink: bool,
    },
}

impl Disk {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        match self {
            Self::Create { names, base, size, pool, limits, encryption } => {
                create(global, &names, (base, size, pool), (&limits, &encryption))
            }
            Self::Limit { name, limits } => limits::run(global, &name, &limits),
            Self::Ls(listing) => list(global, &listing),
            Self::Show { name } => {
                let mut disk = global
                    .client()?
                    .get(&format!("/v1/disks/{name}"), &format!("cannot show disk {name}"))?;
                add_holders(std::iter::once(&mut disk));
                global.output().value(&disk, |disk| {
                    let shown = fields(
                        &limits::flat(with_names(disk)),
                        &[FIELDS.as_slice(), &[("open by", OPEN_BY, Kind::Text)], &limits::FIELDS].concat(),
                    );
                    shown + &snapshot::layers(disk)
                })
            }
            Self::Map { name, cells } => map::show(global, "disk", &name, cells),
            Self::Rm { names, force, snapshots, now } => {
                remove_each(global, &names, |client, name| match &name.snapshot {
                    Some(snapshot) => snapshot::remove(client, &name.disk, snapshot),
                    None => remove_disk(client, &name.disk, Removal { force, snapshots, now }),
                })
            }
            Self::Children { disk } => trash::children_of_disk(global, &disk),
            Self::Snapshot { disk, name } => snapshot::take(global, &disk, &name),
            Self::Snapshots { disk } => snapshot::list(global, &disk),
            Self::Rollback { disk, snapshot, force } => snapshot::roll_back(global, &disk, &snapshot, force),
            Self::Clone { origin, names, size, pool, limits, encryption } => {
                snapshot::clone(global, &origin, &names, (size, pool), (&limits, &encryption))
            }
            Self::Unlock { name } => encryption::unlock(global, &name),
            Self::Rekey { name, key } => encryption::rekey(global, &name, &key),
            Self::Shred { name, force, snapshots } => encryption::shred(global, &name, force, snapshots),
            Self::Diff { from, end } => diff::run(global, &from, end.as_ref()),
            Self::Export(export) => export.run(global),
            Self::Import(import) => import.run(global),
            Self::Flatten(how) => how.run(global, WorkKind::Flatten),
            Self::Rebase(rebase) => rebase.run(global),
            Self::Commit(commit) => commit.run(global),
            Self::Move(moved) => moved.run(global),
            Self::Compact(how) => how.run(global, WorkKind::Compact),
            Self::Resize { name, size, shrink } => {
                let (path, action) =
                    (format!("/v1/disks/{name}/resize"), format!("cannot resize disk {name}"));
                let client = global.client()?;
                let resized = retry::repeat(|| client.post(&path, &Resize { size, shrink }, &action));
                let disk = resized.map_err(|error| naming_shrunk(&client, &name, error))?;
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

fn list(global: &Global, listing: &Listing) -> Result<(), CliError> {
    listing.check(&NOUN)?;
    let mut disks = global.client()?.get("/v1/disks", "cannot list disks")?;
    let output = global.output();
    // For names alone it is not worth to look through all processes.
    if output.is_json() || listing.is_table(&output) || listing.uses(OPEN_BY) {
        add_holders(disks.as_array_mut().into_iter().flatten());
    }
    let disks = into_rows(if output.is_json() { disks } else { with_names(&disks) });
    let disks: Vec<Value> = disks.into_iter().map(limits::flat).collect();
    let all = disks.len();
    let mut disks = listing.choose(disks, &NOUN)?;
    if output.is_json() {
        disks = disks.into_iter().map(limits::nested).collect();
    }
    let mut columns = COLUMNS.to_vec();
    if disks.iter().any(|disk| disk.get(OPEN_BY).is_some()) {
        columns.insert(columns.len() - 1, OPEN_BY_COLUMN);
    }
    listing.print(&output, disks, (&NOUN, &columns, all))
}

fn create(
    global: &Global,
    names: &[String],
    (base, size, pool): (Option<String>, Option<u64>, Option<String>),
    (limits, encryption): (&limits::Options, &EncryptArgs),
) -> Result<(), CliError> {
    let action = match names {
        [name] => format!("cannot create disk {name}"),
        names => format!("cannot create {} disks", names.len()),
    };
    let (names, limits, encryption) = (names.to_vec(), limits.wanted(), encryption.reference()?);
    let body = CreateDisks { names, base, size, pool, limits, encryption, ..CreateDisks::default() };
    let mut disks = retry::create(&global.client()?, "/v1/disks", &body, &action)?;
    // For one disk an object, as every command but `ls` prints.
    if let (1, Value::Array(list)) = (body.names.len(), &mut disks)
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

/// The error for a disk or base that is open, with the names of the processes when this command can see them. None when a disk
/// that may be open is not.
pub(super) fn naming_holders(
    client: &Client,
    (noun, name): (&str, &str),
    error: CliError,
    remedy: &'static str,
) -> Option<CliError> {
    if !(error.is(ErrorKind::InUse) || error.is(ErrorKind::MayBeInUse)) {
        return Some(error);
    }
    let shown = client.get(&format!("/v1/{noun}s/{name}"), &format!("cannot show {noun} {name}"));
    let path = shown.ok().and_then(|shown| Some(PathBuf::from(shown["path"].as_str()?)));
    let Some((path, mount)) = path.as_deref().and_then(|path| Some((path, path.parent()?.parent()?))) else {
        return Some(error);
    };
    match holders_of(path, mount) {
        Some(holders) => Some(CliError::Open { object: format!("{noun} {name}"), holders, remedy }),
        None if error.is(ErrorKind::MayBeInUse) && holders::are_all_seen(mount) => None,
        None => Some(error),
    }
}

/// How long a disk may still count as open after close(2) has returned.
const CLOSING: Duration = Duration::from_millis(500);

/// Refuses a disk that a client has open, or may have open.
pub(super) fn refuse_open(client: &Client, name: &str, remedy: &'static str) -> Result<(), CliError> {
    let action = format!("cannot show disk {name}");
    let begun = Instant::now();
    loop {
        let disk: wire::Disk = read(&client.get(&format!("/v1/disks/{name}"), &action)?, &action)?;
        if disk.open_handles == Some(0) {
            return Ok(());
        }
        if begun.elapsed() >= CLOSING {
            let (kind, state) = match disk.open_handles {
                Some(_) => (ErrorKind::InUse, "a client has it open"),
                None => (ErrorKind::MayBeInUse, "a client may have it open since an earlier worker"),
            };
            let error =
                CliError::Refused { kind: Some(kind), message: format!("disk {name}: {state}; {remedy}") };
            return naming_holders(client, ("disk", name), error, remedy).map_or(Ok(()), Err);
        }
        std::thread::sleep(CLOSING / 20);
    }
}

/// The error of a rollback of a disk that is open, with the names of the processes.
pub(super) fn naming_open(client: &Client, name: &str, error: CliError) -> CliError {
    const REMEDY: &str = "close it there, or repeat with --force";
    match &error {
        CliError::Refused { kind, message } => {
            let same = CliError::Refused { kind: *kind, message: message.clone() };
            naming_holders(client, ("disk", name), same, REMEDY).unwrap_or(error)
        }
        _ => error,
    }
}

/// The error of a resize to a smaller size.
fn naming_shrunk(client: &Client, name: &str, error: CliError) -> CliError {
    const REMEDY: &str =
        "a smaller size takes the data beyond it from there: repeat with --shrink if that is meant";
    match &error {
        CliError::Refused { kind, message } => {
            let same = CliError::Refused { kind: *kind, message: message.clone() };
            naming_holders(client, ("disk", name), same, REMEDY).unwrap_or(error)
        }
        _ => error,
    }
}

/// The processes that have a file of the mount open, as a message names them.
fn holders_of(path: &Path, mount: &Path) -> Option<String> {
    holders::of_mount(mount).get(path.strip_prefix(mount).ok()?).map(|holders| holders::names(holders))
}

/// Adds to each disk that is, or may be, open the processes that have it open.
fn add_holders<'a>(disks: impl Iterator<Item = &'a mut Value>) {
    let open: Vec<&mut Value> =
        disks.filter(|disk| disk.get("open_handles").is_some_and(|handles| *handles != 0)).collect();
    let Some(mount) = open.first().and_then(|disk| Path::new(disk["path"].as_str()?).parent()?.parent())
    else {
        return;
    };
    let all = holders::of_mount(mount);
    for disk in open {
        let file = disk["path"].as_str().and_then(|path| Path::new(path).file_name());
        let Some(holders) = file.and_then(|file| all.get(&Path::new("disks").join(file))) else { continue };
        let list = holders.iter().map(|holder| json!({"pid": holder.pid, "command": holder.command}));
        disk[OPEN_BY] = list.collect();
    }
}

/// The disks with the holders as text.
fn with_names(disks: &Value) -> Value {
    let text = |disk: &Value| {
        let mut disk = disk.clone();
        let pools = disk["needs_pools"].as_array().map(Vec::as_slice).unwrap_or_default();
        if pools.iter().any(|pool| *pool != disk["pool"]) {
            let pools: Vec<&str> = pools.iter().filter_map(Value::as_str).collect();
            disk["pool_names"] = pools.join(", ").into();
        }
        if let Some(list) = disk.get(OPEN_BY).and_then(Value::as_array) {
            let one = |holder: &Value| Holder {
                pid: holder["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok()),
                command: holder["command"].as_str().unwrap_or_default().to_owned(),
            };
            disk[OPEN_BY] = holders::names(&list.iter().map(one).collect::<Vec<_>>()).into();
        }
        disk
    };
    disks.as_array().map_or_else(|| text(disks), |list| list.iter().map(text).collect())
}

/// Removes a disk. When the daemon refuses because the disk is open, the error names the processes.
fn remove_disk(client: &Client, name: &str, options: Removal) -> Result<Value, CliError> {
    const REMEDY: &str = "close it there, or repeat with --force: its data is deleted at the last close";
    retry::remove(client, "disk", name, options).or_else(|error| {
        match naming_holders(client, ("disk", name), error, REMEDY) {
            Some(error) => Err(error),
            None => retry::remove(client, "disk", name, Removal { force: true, ..options }),
        }
    })
}

/// Removes objects one by one. A refused removal does not stop the others.
pub(super) fn remove_each<T: ToString>(
    global: &Global,
    names: &[T],
    remove: impl Fn(&Client, &T) -> Result<Value, CliError>,
) -> Result<(), CliError> {
    let client = global.client()?;
    let mut removed = Vec::new();
    let mut failed = Vec::new();
    for name in names {
        match remove(&client, name) {
            Ok(_) => removed.push(name.to_string()),
            Err(error @ (CliError::Refused { .. } | CliError::Open { .. })) => failed.push(error),
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
        global.output().error(&error);
    }
    last.map_or(Ok(()), Err)
}
