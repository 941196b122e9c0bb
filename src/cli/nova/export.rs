//! Disks of instances become qcow2 files again.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use super::{Ended, Outcome, PATIENCE, Report, Work, name_in, note};
use crate::cli::disk::refuse_open;
use crate::cli::error::CliError;
use crate::cli::export::{Export, Place};
use crate::cli::retry::{self, Removal};
use crate::control::wire::{self, ErrorKind};
use crate::nova::{Disk, Entry, Vm, set_format_in_info};

pub(super) fn all(work: &Work<'_>, vms: Vec<Vm>, reports: &mut Vec<Report>) -> Result<(), CliError> {
    for vm in vms {
        let report = |file: String, disk: Option<String>| Report {
            vm: Some(vm.name.clone()),
            file,
            disk,
            base: None,
            result: Outcome::Failed,
            why: None,
        };
        match vm.disks().map_err(Ended::from) {
            Ok(disks) => {
                for (file, disk) in disks {
                    let Disk::Link(target) = disk else { continue };
                    let Some(name) = name_in(&work.mount.join("disks"), &target) else { continue };
                    let mut report = report(file.clone(), Some(name.clone()));
                    let done = one(work, &vm, (&file, &name), &mut report);
                    note(reports, report, done)?;
                }
            }
            Err(ended) => note(reports, report("disk".to_owned(), None), Err(ended))?,
        }
    }
    if work.options.remove && !work.options.dry_run {
        give_back(work, reports)?;
    }
    Ok(())
}

fn one(work: &Work<'_>, vm: &Vm, (file, name): (&str, &str), report: &mut Report) -> Result<Outcome, Ended> {
    let Some(disk) = work.find::<wire::Disk>("disk", name)? else {
        return Err(Ended::With(Outcome::Failed, format!("there is no disk {name}")));
    };
    report.base.clone_from(&disk.base);
    let running = |error: CliError| match error {
        CliError::Open { .. } | CliError::Refused { .. } => Ended::With(Outcome::Running, error.to_string()),
        other => Ended::Command(other),
    };
    refuse_open(work.client, name, "stop the instance, and repeat").map_err(running)?;
    let onto = disk.base.as_deref().map(|base| image_of(work, base)).transpose()?.flatten();
    if work.options.dry_run {
        return Ok(Outcome::Done);
    }
    // QEMU opens no disk that is locked, until the file has its place.
    let path = PathBuf::from(&disk.path);
    let Some(held) = crate::nova::hold(&path)? else {
        let why = format!("a process has disk {name} open; stop the instance, and repeat");
        return Err(Ended::With(Outcome::Running, why));
    };
    let exported = vm.exported(file);
    let onto = match onto {
        Some(onto) => Some(onto.to_str().ok_or_else(|| CliError::NotUtf8 { path: onto.clone() })?.to_owned()),
        None => None,
    };
    Export::of_overlay(name, exported.clone(), onto).write_file(work.global, Place::Elsewhere)?;
    let found = fs::metadata(&path)?;
    chown(&exported, Some(found.uid()), Some(found.gid()))?;
    fs::set_permissions(&exported, fs::Permissions::from_mode(found.mode() & 0o777))?;
    File::open(&exported)?.sync_all()?;
    // First, so that QEMU fails to open the link rather than to take the qcow2 file for a raw one.
    set_format_in_info(vm, file, "qcow2")?;
    vm.replace_by_file(file)?;
    drop(held);
    if work.options.remove {
        retry::remove(work.client, "disk", name, Removal::default())?;
    }
    Ok(Outcome::Done)
}

/// The entry of the cache that has the contents of a base; none of a base that is not of an image.
fn image_of(work: &Work<'_>, base: &str) -> Result<Option<PathBuf>, Ended> {
    let Some(found) = work.find::<wire::Base>("base", base)? else { return Ok(None) };
    let target = work.file_of_base(base);
    let entry = work.instances.entry_of_kept(Path::new(&found.source));
    let place = match (&entry, base.strip_prefix("g-")) {
        (Some(entry), _) => work.instances.place_of_name(entry),
        (None, Some(image)) => work.instances.place_of(image),
        (None, None) => return Ok(None),
    };
    if fs::metadata(&place).is_ok() || work.options.dry_run {
        return Ok(Some(place));
    }
    // Nova's cache manager has removed the link.
    let name = place.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let Some(lock) = work.instances.lock_name(name, PATIENCE)? else {
        return Err(Ended::With(
            Outcome::Failed,
            "Nova holds the lock of its image; repeat the command".to_owned(),
        ));
    };
    match (entry, base.strip_prefix("g-")) {
        (Some(entry), _) => work.instances.link_kept(&lock, &entry, &target)?,
        (None, Some(image)) if work.instances.link(&lock, image, &target)? == Entry::Link(target.clone()) => {
        }
        _ => return Ok(None),
    }
    Ok(Some(place))
}

/// Gives images back to the cache that no disk needs any more.
fn give_back(work: &Work<'_>, reports: &mut Vec<Report>) -> Result<(), CliError> {
    let kept = match work.instances.kept() {
        Ok(kept) => kept,
        Err(error) => return Err(CliError::Failed(format!("cannot export instances: {error}"))),
    };
    for entry in kept {
        let base = format!("nova-{entry}");
        let report = Report {
            vm: None,
            file: format!("_base/{entry}"),
            disk: None,
            base: Some(base.clone()),
            result: Outcome::Failed,
            why: None,
        };
        note(reports, report, give_back_one(work, &entry, &base))?;
    }
    Ok(())
}

fn give_back_one(work: &Work<'_>, entry: &str, base: &str) -> Result<Outcome, Ended> {
    let skipped = |why: String| Err(Ended::With(Outcome::Skipped, why));
    let Some(lock) = work.instances.lock_name(entry, PATIENCE)? else {
        return skipped("Nova holds the lock of the image".to_owned());
    };
    if work.find::<wire::Base>("base", base)?.is_some() {
        match retry::remove(work.client, "base", base, Removal::default()) {
            Err(error) if error.is(ErrorKind::InUse) || error.is(ErrorKind::MayBeInUse) => {
                return skipped(error.to_string());
            }
            removed => drop(removed?),
        }
    }
    match work.instances.give_back(&lock, entry, &work.file_of_base(base))? {
        true => Ok(Outcome::Done),
        false => skipped("Nova has another file there".to_owned()),
    }
}
