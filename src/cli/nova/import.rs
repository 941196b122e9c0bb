//! Instances become disks.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use super::{Ended, Outcome, PATIENCE, Report, Work, name_in, note};
use crate::cli::args;
use crate::cli::client::read;
use crate::cli::error::CliError;
use crate::cli::import::Import;
use crate::cli::retry::{self, Removal};
use crate::control::wire::{self, AddBase, BaseState, Format};
use crate::nova::{Below, Disk, Held, Vm, format_in_info, set_format_in_info};

/// What the names of bases from the cache begin with; the name of the entry follows.
const PREFIX: &str = "nova-";
/// The end of the name of a disk that does not have all yet.
const PART: &str = ".part";

pub(super) fn all(work: &Work<'_>, vms: Vec<Vm>, reports: &mut Vec<Report>) -> Result<(), CliError> {
    for vm in vms {
        let disks = vm.disks().map_err(Ended::from);
        let report = |file: String| Report {
            vm: Some(vm.name.clone()),
            disk: Some(format!("{}_{file}", vm.name)),
            file,
            base: None,
            result: Outcome::Failed,
            why: None,
        };
        match disks {
            Ok(disks) => {
                for (file, disk) in disks {
                    let mut report = report(file.clone());
                    let done = one(work, &vm, (&file, &disk), &mut report);
                    note(reports, report, done)?;
                }
            }
            Err(ended) => note(reports, report("disk".to_owned()), Err(ended))?,
        }
    }
    Ok(())
}

fn skipped(why: &str) -> Ended {
    Ended::With(Outcome::Skipped, why.to_owned())
}

fn failed(why: String) -> Ended {
    Ended::With(Outcome::Failed, why)
}

fn one(work: &Work<'_>, vm: &Vm, (file, disk): (&str, &Disk), report: &mut Report) -> Result<Outcome, Ended> {
    let name = format!("{}_{file}", vm.name);
    args::name(&name).map_err(|why| failed(format!("{name}: {why}")))?;
    let target = work.file_of_disk(&name);
    let backing = match disk {
        Disk::Link(found) if *found == target => return linked(work, vm, file),
        Disk::Link(found) => return Err(skipped(&format!("it is a link to {}", found.display()))),
        Disk::Other => return Err(skipped("it is no qcow2 file")),
        Disk::Qcow2(backing) => backing,
    };
    let Some(held) = vm.hold(file)? else {
        let why = "a process has it open; stop the instance (openstack server stop), and repeat";
        return Err(Ended::With(Outcome::Running, why.to_owned()));
    };
    report.base = backing.as_ref().map(|backing| base_of(work, vm, backing)).transpose()?;
    if work.options.dry_run {
        return Ok(Outcome::Done);
    }
    match work.find::<wire::Disk>("disk", &name)? {
        None => take(work, vm, file, (&name, report.base.clone()), &held)?,
        Some(_) => is_current(&target, &name, &held)?,
    }
    vm.replace_by_link(&held, file, &target)?;
    // From here on QEMU fails to open it, rather than to take a qcow2 file for a raw one.
    linked(work, vm, file).map(|_| Outcome::Done)
}

/// What is left to do for a disk with its link.
fn linked(work: &Work<'_>, vm: &Vm, file: &str) -> Result<Outcome, Ended> {
    if work.options.dry_run {
        return Ok(Outcome::Present);
    }
    if format_in_info(vm, file)?.as_deref() != Some("raw") {
        set_format_in_info(vm, file, "raw")?;
    }
    if work.options.remove {
        match fs::remove_file(vm.before(file)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
    }
    Ok(Outcome::Present)
}

/// Whether a disk that an earlier command has made still has what the qcow2 file has.
fn is_current(target: &Path, name: &str, held: &Held) -> Result<(), Ended> {
    let made = fs::metadata(target)?;
    if (made.mtime(), made.mtime_nsec()) >= held.modified()? {
        return Ok(());
    }
    Err(failed(format!(
        "disk {name} exists, and the qcow2 file was changed since it was made; if it is of an import that was \
         interrupted, remove it with: plyfs disk rm {name}"
    )))
}

fn take(
    work: &Work<'_>,
    vm: &Vm,
    file: &str,
    (name, base): (&str, Option<String>),
    held: &Held,
) -> Result<(), Ended> {
    let part = format!("{name}{PART}");
    if work.find::<wire::Disk>("disk", &part)?.is_some() {
        retry::remove(work.client, "disk", &part, Removal { now: true, ..Removal::default() })?;
    }
    let import = Import::of_overlay(part.clone(), vm.path(file), base);
    import.take(work.global, work.client, &import.open()?)?;
    let (made, target) = (work.file_of_disk(&part), work.file_of_disk(name));
    let (uid, gid, mode) = held.owner()?;
    chown(&made, Some(uid), Some(gid))?;
    fs::set_permissions(&made, fs::Permissions::from_mode(mode))?;
    Ok(fs::rename(&made, &target)?)
}

/// The base of what a disk stands on, which is made when it is missing.
fn base_of(work: &Work<'_>, vm: &Vm, backing: &str) -> Result<String, Ended> {
    let entry = match work.instances.below(vm, backing)? {
        Below::Image(entry) => entry,
        Below::Link(target) => {
            let of_another =
                || failed(format!("its image is a link to {}, which is no base", target.display()));
            return name_in(&work.mount.join("bases"), &target).ok_or_else(of_another);
        }
    };
    let name = format!("{PREFIX}{entry}");
    args::name(&name).map_err(|why| failed(format!("{name}: {why}")))?;
    if work.options.dry_run {
        return Ok(name);
    }
    let Some(lock) = work.instances.lock_name(&entry, PATIENCE)? else {
        return Err(failed(format!("Nova holds the lock of its image {entry}; repeat the command")));
    };
    let kept = work.instances.keep(&entry)?;
    let mut state = register(work, &name, &kept)?;
    work.instances.link_kept(&lock, &entry, &work.file_of_base(&name))?;
    if state == BaseState::Ok {
        state = work.find::<wire::Base>("base", &name)?.map_or(BaseState::Failed, |base| base.state);
    }
    if state != BaseState::Ok {
        // Nova has set the time of the file before it was behind the link. No disk stands on the base yet, or it is refused.
        retry::remove(work.client, "base", &name, Removal::default())?;
        state = register(work, &name, &kept)?;
    }
    match state {
        BaseState::Ok => Ok(name),
        _ => Err(failed(format!("base {name} cannot be used; see plyfs base show {name}"))),
    }
}

fn register(work: &Work<'_>, name: &str, kept: &Path) -> Result<BaseState, Ended> {
    let source = kept.to_str().ok_or_else(|| CliError::NotUtf8 { path: kept.to_owned() })?;
    if let Some(base) = work.find::<wire::Base>("base", name)? {
        if base.source != source {
            return Err(failed(format!(
                "base {name} is of {}, not of {source}; rename or remove it",
                base.source
            )));
        }
        return Ok(base.state);
    }
    // An image of the cache has the format that Nova gave it. plyfs refuses one that names another file.
    let mut magic = Vec::new();
    File::open(kept)?.take(4).read_to_end(&mut magic)?;
    let format = (magic == b"QFI\xfb").then_some(Format::Qcow2);
    let body = AddBase { name: name.to_owned(), source: source.to_owned(), format, ..AddBase::default() };
    let action = format!("cannot add base {name}");
    let base: wire::Base = read(&retry::create(work.client, "/v1/bases", &body, &action)?, &action)?;
    Ok(base.state)
}
