//! `plyfs trash`, `plyfs base children` and `prune`, `plyfs disk children`.

use std::cell::Cell;
use std::time::{Duration, SystemTime};

use clap::Subcommand;
use serde_json::{Value, json};

use super::args::{self, DiskOrSnapshot};
use super::client::{Client, read};
use super::error::CliError;
use super::listing::{Listing, Noun, into_rows, no_notes};
use super::output::{Column, Kind, printable};
use super::retry;
use super::table::table;
use super::{Global, disk};
use crate::config::size::format_size;
use crate::control::wire::{ErrorKind, PruneBases, PrunedBases, Removed, RestoreDisk, TrashedDisk};

const EXAMPLES: &str = "\
Examples:
  plyfs trash ls
  plyfs trash restore vm1
  plyfs trash restore 17 --as vm1-old
  plyfs trash purge vm1
  plyfs trash purge --all

A daemon with `serve --trash-grace 7d`, or `[trash] grace`, keeps each removed disk for that time, with its snapshots. A \
disk in the trash needs its base and layers as before. When the store is full, nothing is purged before its time: purge \
gives the space back.";

const LS_EXAMPLES: &str = "\
Examples:
  plyfs trash ls
  plyfs trash ls --sort frees:desc
  plyfs trash ls -q --filter base=debian | xargs -r plyfs trash purge
  plyfs --json trash ls

FREES is what a purge of the disk gives back: layers that another disk needs do not count. -q prints numbers.";

const RESTORE_EXAMPLES: &str = "\
Examples:
  plyfs trash restore vm1
  plyfs trash restore vm1 --as vm1-old     the name is taken
  plyfs trash restore 17                   of several that had one name

The disk has its data, its snapshots, its owner and mode. The command prints the path of its file in the mount.";

const PURGE_EXAMPLES: &str = "\
Examples:
  plyfs trash purge vm1
  plyfs trash purge 17 18
  plyfs trash purge --all

The data is gone for good, and its space is free. Layers that a clone needs stay.";

pub(super) const BASE_CHILDREN_EXAMPLES: &str = "\
Examples:
  plyfs base children debian
  plyfs --json base children debian | jq -r '.[].name'

What is listed keeps the base from being removed.";

pub(super) const DISK_CHILDREN_EXAMPLES: &str = "\
Examples:
  plyfs disk children vm1
  plyfs disk children vm1@monday

Clones of the disk, clones of those, and copies that share its blocks, in the trash too. ON has the snapshots that show \
the layer on which the other disk stands. SHARED is what both need, once. Nothing of it keeps the disk or the snapshot \
from being removed.";

pub(super) const PRUNE_EXAMPLES: &str = "\
Examples:
  plyfs base prune --dry-run
  plyfs base prune --older-than 30d

Removes the bases that no disk, snapshot, disk in the trash, client or job needs, and that are not pinned, with their \
hydrated copies. The images themselves stay. The daemon does it by itself with `serve --base-unused-age` and \
`--base-unused-limit`.";

const COLUMNS: [Column; 7] = [
    ("NAME", "name", Kind::Text),
    ("ID", "id", Kind::Number),
    ("BASE", "base", Kind::Text),
    ("SIZE", "size", Kind::Size),
    ("FREES", "bytes", Kind::Size),
    ("REMOVED", "removed", Kind::Time),
    ("PURGED", "purged", Kind::Text),
];

const NOUN: Noun = Noun {
    names: ["disk in the trash", "disks in the trash"],
    // Several may have had one name.
    name: "id",
    columns: &COLUMNS,
    more: &[
        ("PURGE AFTER", "purge_after", Kind::Time),
        ("SNAPSHOTS", "snapshots", Kind::Number),
        ("OPEN", "open_handles", Kind::Number),
    ],
    totals: &[("bytes", Kind::Size, "{} at least")],
    notes: no_notes,
};

const BASE_CHILDREN: [Column; 3] =
    [("NAME", "name", Kind::Text), ("KIND", "kind", Kind::Text), ("ID", "id", Kind::Number)];

const DISK_CHILDREN: [Column; 6] = [
    ("NAME", "name", Kind::Text),
    ("KIND", "kind", Kind::Text),
    ("ON", "on", Kind::Text),
    ("LAYERS", "layers", Kind::Number),
    ("SHARED", "bytes", Kind::Size),
    ("ID", "id", Kind::Number),
];

const PRUNED: [Column; 3] =
    [("NAME", "name", Kind::Text), ("FREES", "bytes", Kind::Size), ("LAST USED", "last_used", Kind::Time)];

/// List, restore and purge removed disks
#[derive(Debug, Subcommand)]
#[command(after_help = EXAMPLES)]
pub(super) enum Trash {
    /// List the disks in the trash
    #[command(visible_alias = "list", after_help = LS_EXAMPLES)]
    Ls(Listing),
    /// Give a removed disk its name back
    #[command(after_help = RESTORE_EXAMPLES)]
    Restore {
        /// Name that the disk had, or its number
        #[arg(value_name = "NAME|NUMBER", value_parser = args::name)]
        disk: String,
        /// Restore it under this name
        #[arg(long = "as", value_name = "NAME", value_parser = args::new_name)]
        new_name: Option<String>,
    },
    /// Remove disks of the trash for good, and free their space
    #[command(after_help = PURGE_EXAMPLES)]
    Purge {
        /// Names that the disks had, or their numbers
        #[arg(required_unless_present = "all", value_name = "NAME|NUMBER", value_parser = args::name)]
        disks: Vec<String>,
        /// All disks that are in the trash now
        #[arg(long, conflicts_with = "disks")]
        all: bool,
    },
}

impl Trash {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        match self {
            Self::Ls(listing) => list(global, &listing),
            Self::Restore { disk, new_name } => restore(global, &disk, new_name),
            Self::Purge { disks, all } => purge(global, &disks, all),
        }
    }
}

fn all(client: &Client) -> Result<Vec<TrashedDisk>, CliError> {
    const ACTION: &str = "cannot list the trash";
    read(&client.get("/v1/trash", ACTION)?, ACTION)
}

fn list(global: &Global, listing: &Listing) -> Result<(), CliError> {
    listing.check(&NOUN)?;
    let mut rows = into_rows(global.client()?.get("/v1/trash", "cannot list the trash")?);
    let output = global.output();
    if !output.is_json() {
        for row in &mut rows {
            let purged = row["purge_after"].as_str().map(|time| until(time, SystemTime::now()));
            row["purged"] = purged.into();
        }
    }
    listing.run(&output, Value::Array(rows), &NOUN)
}

/// How long it is until a time of the API.
fn until(text: &str, now: SystemTime) -> String {
    const UNITS: [(u64, u64, &str); 4] =
        [(120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h"), (u64::MAX, 86_400, "d")];
    let Ok(at) = humantime::parse_rfc3339(text) else { return printable(text) };
    match at.duration_since(now).map(|left| left.as_secs()) {
        Ok(left) => {
            let unit = UNITS.into_iter().find(|(below, ..)| left < *below);
            unit.map_or_else(String::new, |(_, unit, word)| format!("in {} {word}", left / unit))
        }
        Err(_) => "soon".to_owned(),
    }
}

/// The disk in the trash that has this number or had this name.
fn find(trash: &[TrashedDisk], wanted: &str) -> Result<TrashedDisk, CliError> {
    let refused = |kind, message| Err(CliError::Refused { kind: Some(kind), message });
    let is_it = |disk: &&TrashedDisk| disk.name == wanted || disk.id.to_string() == wanted;
    let found: Vec<&TrashedDisk> = trash.iter().filter(is_it).collect();
    match found.as_slice() {
        [] => refused(
            ErrorKind::NotFound,
            format!("disk {wanted}: it is not in the trash; see `plyfs trash ls`"),
        ),
        [one] => Ok((*one).clone()),
        several => {
            let one = |disk: &&TrashedDisk| format!("{} ({}, removed {})", disk.id, disk.name, disk.removed);
            let list: Vec<String> = several.iter().map(one).collect();
            refused(
                ErrorKind::Invalid,
                format!(
                    "disk {wanted}: several are in the trash; give one of the numbers: {}",
                    list.join(", ")
                ),
            )
        }
    }
}

/// Restores a disk. A request that is sent again may find that the first attempt did it.
fn restore(global: &Global, wanted: &str, new_name: Option<String>) -> Result<(), CliError> {
    let client = global.client()?;
    let trashed = find(&all(&client)?, wanted)?;
    let name = new_name.clone().unwrap_or_else(|| trashed.name.clone());
    let action = format!("cannot restore disk {}", trashed.name);
    let path = format!("/v1/trash/{}/restore", trashed.id);
    let body = RestoreDisk { name: new_name };
    let is_repeated = Cell::new(false);
    let restored = retry::repeat(|| match client.post(&path, &body, &action) {
        Err(error) if is_repeated.get() && error.is(ErrorKind::NotFound) => {
            let shown = client.get(&format!("/v1/disks/{name}"), &action)?;
            if shown["id"].as_u64() == Some(trashed.id) { Ok(shown) } else { Err(error) }
        }
        done => {
            is_repeated.set(true);
            done
        }
    })?;
    global.output().value(&restored, disk::paths)
}

/// Purges disks one by one. A refusal does not stop the others.
fn purge(global: &Global, wanted: &[String], everything: bool) -> Result<(), CliError> {
    let client = global.client()?;
    let trash = all(&client)?;
    // All names are looked up first: a mistake in one purges nothing.
    let disks = match everything {
        true => trash,
        false => wanted.iter().map(|wanted| find(&trash, wanted)).collect::<Result<_, _>>()?,
    };
    let (mut removed, mut failed) = (Vec::new(), Vec::new());
    for TrashedDisk { id, name, .. } in disks {
        let is_repeated = Cell::new(false);
        let done = retry::repeat(|| {
            match client.delete(&format!("/v1/trash/{id}"), &format!("cannot purge disk {name}")) {
                Err(error) if is_repeated.get() && error.is(ErrorKind::NotFound) => Ok(Value::Null),
                done => {
                    is_repeated.set(true);
                    done
                }
            }
        });
        match done {
            Ok(_) => removed.push(name),
            Err(error @ CliError::Refused { .. }) => failed.push(error),
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

/// Lists what stands on a base.
pub(super) fn children_of_base(global: &Global, name: &str) -> Result<(), CliError> {
    let action = format!("cannot list what stands on base {name}");
    let list = global.client()?.get(&format!("/v1/bases/{name}/children"), &action)?;
    global.output().value(&list, |list| table(list, &BASE_CHILDREN, SystemTime::now(), None))
}

/// Lists the disks that share layers.
pub(super) fn children_of_disk(global: &Global, of: &DiskOrSnapshot) -> Result<(), CliError> {
    let action = format!("cannot list the children of {of}");
    let query = of.snapshot.as_ref().map_or_else(String::new, |name| format!("?snapshot={name}"));
    let list = global.client()?.get(&format!("/v1/disks/{}/children{query}", of.disk), &action)?;
    global.output().value(&list, |list| {
        let mut rows = list.clone();
        for row in rows.as_array_mut().into_iter().flatten() {
            let on = row["on"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let on: Vec<String> = on.map(|name| format!("{}@{name}", of.disk)).collect();
            row["on"] = on.join(", ").into();
        }
        table(&rows, &DISK_CHILDREN, SystemTime::now(), None)
    })
}

/// Removes the bases that nothing needs.
pub(super) fn prune(global: &Global, dry_run: bool, older_than: Option<Duration>) -> Result<(), CliError> {
    let action = "cannot prune the bases";
    let body = PruneBases { dry_run, older_than_seconds: older_than.map(|age| age.as_secs()) };
    let client = global.client()?;
    let answer = retry::repeat(|| client.post("/v1/prune", &body, action))?;
    let pruned: PrunedBases = read(&answer, action)?;
    global.output().value(&answer, |answer| {
        let gone = pruned.bases.iter().filter(|base| base.error.is_none()).count();
        let (bases, bytes) = (if gone == 1 { "base" } else { "bases" }, format_size(pruned.bytes));
        let summary = match dry_run {
            true => format!("{gone} {bases} would be removed, {bytes} freed\n"),
            false => format!("{gone} {bases} removed, {bytes} freed\n"),
        };
        let rows = &answer["bases"];
        if pruned.bases.is_empty() {
            summary
        } else {
            table(rows, &PRUNED, SystemTime::now(), None) + &summary
        }
    })?;
    let mut failed = pruned.bases.into_iter().filter_map(|base| base.error);
    match failed.next() {
        Some(message) => Err(CliError::Refused { kind: Some(ErrorKind::InUse), message }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trashed(id: u64, name: &str) -> TrashedDisk {
        TrashedDisk { id, name: name.into(), removed: "2026-01-02T00:00:00Z".into(), ..Default::default() }
    }

    #[test]
    fn a_name_that_several_disks_had_needs_a_number_and_the_message_lists_them() {
        let trash = [trashed(4, "vm1"), trashed(9, "vm2"), trashed(17, "vm1"), trashed(20, "9")];
        assert_eq!(find(&trash, "vm2").expect("one").id, 9);
        assert_eq!(find(&trash, "17").expect("one").id, 17);
        let said = find(&trash, "vm1").expect_err("two").to_string();
        assert!(said.contains("4 (vm1, removed 2026") && said.contains("17 (vm1"), "{said}");
        // A number of one disk and the name of another.
        let said = find(&trash, "9").expect_err("two").to_string();
        assert!(said.contains("9 (vm2") && said.contains("20 (9"), "{said}");
        let said = find(&trash, "vm3").expect_err("none").to_string();
        assert!(said.contains("disk vm3: it is not in the trash; see `plyfs trash ls`"), "{said}");
    }

    #[test]
    fn the_time_that_is_left_is_shown() {
        let now = humantime::parse_rfc3339("2026-01-02T00:00:00Z").expect("a time");
        assert_eq!(until("2026-01-09T00:00:00Z", now), "in 7 d");
        assert_eq!(until("2026-01-02T03:00:00Z", now), "in 3 h");
        assert_eq!(until("2026-01-02T00:01:01Z", now), "in 61 s");
        assert_eq!(until("2026-01-01T00:00:00Z", now), "soon");
    }
}
