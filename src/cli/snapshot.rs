//! `plyfs disk snapshot`, `snapshots`, `rollback` and `clone`.

use std::cell::Cell;

use serde_json::{Value, json};

use super::Global;
use super::args::DiskOrSnapshot;
use super::client::Client;
use super::disk::paths;
use super::encryption::EncryptArgs;
use super::error::CliError;
use super::limits;
use super::output::{Column, Kind};
use super::retry;
use super::table::table;
use crate::control::wire::{CreateDisks, ErrorKind, Rollback, TakeSnapshot};

pub(super) const SNAPSHOT_EXAMPLES: &str = "\
Examples:
  plyfs disk snapshot vm1 monday
  plyfs disk clone vm1@monday vm2
  plyfs disk rm vm1@monday

The snapshot has all writes that were completed before the command, as after a power cut. The disk stays in use. \
Nothing is copied, and hundreds of snapshots do not slow reads.";

pub(super) const SNAPSHOTS_EXAMPLES: &str = "\
Examples:
  plyfs disk snapshots vm1
  plyfs --json disk snapshots vm1 | jq -r '.[].name'

ONLY is what the removal of the snapshot would free.";

pub(super) const ROLLBACK_EXAMPLES: &str = "\
Examples:
  plyfs disk rollback vm1 monday

What was written since the snapshot is lost; take another snapshot first to keep it. All snapshots stay. The command \
refuses a disk that is open, unless --force is given: its clients then see other bytes than they wrote.";

pub(super) const CLONE_EXAMPLES: &str = "\
Examples:
  plyfs disk clone vm1 vm2                the disk as it is now, in use or not
  plyfs disk clone vm1@monday old1 old2
  plyfs disk clone golden vm{1..100} --size 40G
  plyfs disk clone golden vm1 --pool fast
  plyfs disk clone golden vm{1..100} --size 40G --quota 20G
  plyfs disk clone dark vm5 --encrypt --key-file /etc/plyfs/keys/vm5

A clone of any size takes the same short time, because nothing is copied. Several are made together or not at all, and \
show the same moment. A clone has the limits that the command names, and none of its origin. A clone of an encrypted disk is \
encrypted, and needs --encrypt with a secret of its own. A clone needs nothing of its origin afterwards: either can be \
removed.";

const COLUMNS: [Column; 5] = [
    ("NAME", "full_name", Kind::Text),
    ("SIZE", "size", Kind::Size),
    ("ONLY", "only_bytes", Kind::Size),
    ("CREATED", "created", Kind::Time),
    ("ID", "id", Kind::Number),
];

/// What `disk show` says of each layer.
const LAYER_COLUMNS: [Column; 4] = [
    ("LAYER", "id", Kind::Number),
    ("HOLDS", "bytes", Kind::Size),
    ("OTHER DISKS", "shared_by", Kind::Number),
    ("SNAPSHOTS", "names", Kind::Text),
];

/// The layers of a disk as a table, the lowest first; nothing when it has none.
pub(super) fn layers(disk: &Value) -> String {
    let mut rows = disk["layers"].clone();
    let Some(list) = rows.as_array_mut().filter(|list| !list.is_empty()) else { return String::new() };
    for layer in list {
        let names: Vec<&str> =
            layer["snapshots"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
        layer["names"] = names.join(", ").into();
    }
    format!("\n{}", table(&rows, &LAYER_COLUMNS, std::time::SystemTime::now(), None))
}

/// Takes a snapshot.
pub(super) fn take(global: &Global, disk: &str, name: &str) -> Result<(), CliError> {
    let action = format!("cannot take snapshot {disk}@{name}");
    let body = TakeSnapshot { name: name.to_owned() };
    let taken = retry::create(&global.client()?, &format!("/v1/disks/{disk}/snapshots"), &body, &action)?;
    global.output().value(&taken, |_| String::new())
}

/// Lists the snapshots of a disk.
pub(super) fn list(global: &Global, disk: &str) -> Result<(), CliError> {
    let action = format!("cannot list the snapshots of disk {disk}");
    let list = global.client()?.get(&format!("/v1/disks/{disk}/snapshots"), &action)?;
    global.output().value(&list, |list| {
        let mut rows = list.clone();
        for row in rows.as_array_mut().into_iter().flatten() {
            let name = row["name"].as_str().unwrap_or_default();
            row["full_name"] = format!("{disk}@{name}").into();
        }
        table(&rows, &COLUMNS, std::time::SystemTime::now(), None)
    })
}

/// Removes a snapshot. A request that is sent again may find that the first attempt did it.
pub(super) fn remove(client: &Client, disk: &str, name: &str) -> Result<Value, CliError> {
    let (path, action) =
        (format!("/v1/disks/{disk}/snapshots/{name}"), format!("cannot remove snapshot {disk}@{name}"));
    let is_repeated = Cell::new(false);
    retry::repeat(|| match client.delete(&path, &action) {
        Err(error) if is_repeated.get() && error.is(ErrorKind::NotFound) => {
            Ok(json!({"removed": [format!("{disk}@{name}")]}))
        }
        done => {
            is_repeated.set(true);
            done
        }
    })
}

/// Returns a disk to a snapshot.
pub(super) fn roll_back(global: &Global, disk: &str, name: &str, force: bool) -> Result<(), CliError> {
    let action = format!("cannot roll disk {disk} back");
    let body = Rollback { snapshot: name.to_owned(), force };
    let client = global.client()?;
    let done = retry::create(&client, &format!("/v1/disks/{disk}/rollback"), &body, &action);
    let disk = done.map_err(|error| super::disk::naming_open(&client, disk, error))?;
    // As after a resize: the kernel learns the size with the next attributes that it requests.
    if let Some(path) = disk["path"].as_str() {
        let _ = std::fs::metadata(path);
    }
    global.output().value(&disk, |_| String::new())
}

/// Makes clones.
pub(super) fn clone(
    global: &Global,
    origin: &DiskOrSnapshot,
    names: &[String],
    (size, pool): (Option<u64>, Option<String>),
    (limits, encryption): (&limits::Options, &EncryptArgs),
) -> Result<(), CliError> {
    let action = format!("cannot clone {origin}");
    let (names, from) = (names.to_vec(), Some(origin.to_string()));
    let (limits, encryption) = (limits.wanted(), encryption.reference()?);
    let body = CreateDisks { names, from, size, pool, limits, encryption, ..Default::default() };
    let mut disks = retry::create(&global.client()?, "/v1/disks", &body, &action)?;
    // For one disk an object, as every command but `ls` prints.
    if let (1, Value::Array(list)) = (body.names.len(), &mut disks)
        && list.len() == 1
    {
        disks = list.remove(0);
    }
    global.output().value(&disks, paths)
}
