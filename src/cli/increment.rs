//! `plyfs disk export --since` and `plyfs disk import --increment`: a copy of a disk that is brought forward.
//!
//! A copy notes its state in the name of a snapshot, `plyfs-state-...`. What must hold: an increment is applied to the
//! state that it was made for and to no other; when it cannot be applied in full, the copy returns to that state.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read};
use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::Global;
use super::announce::Announcement;
use super::client::{Client, read};
use super::diff::Moments;
use super::error::CliError;
use super::import::Import;
use super::interrupt::Interrupts;
use super::output::Reader;
use super::progress::{Progress, Update};
use super::retry::{self, Removal};
use super::snapshot;
use crate::config::size::format_size;
use crate::control::wire::{self, CreateDisks, Resize, Rollback, TakeSnapshot, WorkKind};
use crate::export::increment::{BaseNote, IncrementHeader, Moment};
use crate::import::ImportError;
use crate::import::increment::Increment;

/// The beginning of the name of a snapshot that notes a state.
const STATE: &str = "plyfs-state-";
/// The remedy for a copy that is open.
const OPEN: &str = "close it there, or repeat with --force";

fn snapshots(client: &Client, disk: &str, action: &str) -> Result<Vec<wire::Snapshot>, CliError> {
    read(&client.get(&format!("/v1/disks/{disk}/snapshots"), action)?, action)
}

/// The header of the increment between two snapshots, and the bytes of the disk at the later one.
pub(super) fn header(
    client: &Client,
    disk: &wire::Disk,
    (since, until): (Option<&str>, &str),
    base: Option<&wire::Base>,
    action: &str,
) -> Result<IncrementHeader, CliError> {
    let all = snapshots(client, &disk.name, action)?;
    let find = |name: &str| {
        all.iter().find(|snapshot| snapshot.name == name).ok_or_else(|| {
            CliError::Failed(format!(
                "{action}: snapshot {}@{name}: there is no snapshot of this name",
                disk.name
            ))
        })
    };
    let moment = |snapshot: &wire::Snapshot| {
        // Numbers are unique in a store only, and times tell stores apart.
        let text = format!("{} {} {} {}", disk.id, disk.created, snapshot.id, snapshot.created);
        let mut bytes = [0; 16];
        bytes.copy_from_slice(&Sha256::digest(text)[..16]);
        Moment(bytes)
    };
    let since = since.map(find).transpose()?.map(moment);
    let until = find(until)?;
    let mut nonce = [0; 8];
    getrandom::fill(&mut nonce).map_err(|error| CliError::Runtime(io::Error::other(error.to_string())))?;
    let created = humantime::parse_rfc3339(&until.created).unwrap_or(UNIX_EPOCH);
    let created = created.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    Ok(IncrementHeader {
        nonce: u64::from_le_bytes(nonce),
        disk: disk.name.clone(),
        since,
        until: moment(until),
        size: until.size,
        base: base.map(|base| BaseNote { name: base.name.clone(), size: base.size, digest: digest(base) }),
        created_ns: i64::try_from(created).unwrap_or(i64::MAX),
    })
}

fn digest(base: &wire::Base) -> String {
    let named =
        |name: &str, digest: &Option<String>| digest.as_ref().map(|digest| format!("{name}:{digest}"));
    let sha = named("sha256", &base.sha256).or_else(|| named("sha512", &base.sha512));
    sha.or_else(|| named("blake3", &base.blake3)).unwrap_or_default()
}

/// Applies an increment to a copy, or makes one.
pub(super) fn import(import: &Import, global: &Global) -> Result<(), CliError> {
    let failed = |error: ImportError| import.failed(&error);
    let input: Box<dyn Read> = if import.file == Path::new("-") {
        Box::new(io::stdin())
    } else {
        let file = File::open(&import.file);
        Box::new(file.map_err(|source| CliError::File { path: import.file.clone(), source })?)
    };
    let increment = Increment::open(BufReader::with_capacity(1 << 20, input)).map_err(failed)?;
    let header = increment.header().clone();
    let client = global.client()?;
    let interrupts = Interrupts::catch();
    let copy = Copy { import, client: &client, header: &header };
    let disk = if header.since.is_none() { copy.create()? } else { copy.find()? };
    let mut job = Announcement::new(&client, (WorkKind::Import, &import.name), None, header.size);
    let mut progress = Progress::of_short_work(&global.output());
    let mut signal = None;
    let mut watch = |done| {
        signal = interrupts.pause(Duration::ZERO);
        let (title, total) = (&import.name, header.size);
        let text = format!("{} of {}", format_size(done), format_size(total));
        let update = Update { title, done, total, text, state: "importing" };
        let object = || json!({"name": import.name, "state": "importing", "bytes": done, "total": total});
        signal.is_none() && job.goes_on(done) && progress.show(&update, object).is_ok()
    };
    let applied = copy.resize(&disk).and_then(|()| {
        let transfer =
            |source| CliError::Transfer { action: import.action(), path: disk.path.clone().into(), source };
        let file = OpenOptions::new().read(true).write(true).open(&disk.path).map_err(transfer)?;
        increment.apply(&file, &mut watch).map_err(failed)?;
        file.sync_all().map_err(transfer)?;
        drop(file);
        // What a client wrote meanwhile would be noted as the state of the exported disk.
        copy.refuse_open()?;
        copy.note()
    });
    progress.clear();
    if let Err(error) = applied {
        if let Err(stays) = copy.undo() {
            global.output().error(&stays);
        }
        return Err(match signal {
            Some(signal) => {
                let message = format!("{}: a signal ended it; the disk is as it was before", import.action());
                CliError::Interrupted { message, signal }
            }
            None if job.is_cancelled() => {
                let why = "an operator cancelled it; the disk is as it was before";
                CliError::Failed(format!("{}: {why}", import.action()))
            }
            None => error,
        });
    }
    // It takes space, and does no harm.
    if let Err(stays) = copy.forget() {
        global.output().error(&stays);
    }
    let disk: Value = client.get(&format!("/v1/disks/{}", import.name), &import.action())?;
    global.output().line(&disk, super::disk::paths)
}

/// The disk that is a copy.
struct Copy<'a> {
    import: &'a Import,
    client: &'a Client,
    header: &'a IncrementHeader,
}

impl Copy<'_> {
    fn refuse(&self, why: &str) -> CliError {
        CliError::Failed(format!("{}: {why}", self.import.action()))
    }

    /// Makes the disk for the first state.
    fn create(&self) -> Result<wire::Disk, CliError> {
        let action = self.import.action();
        let base = match (&self.header.base, &self.import.base) {
            (None, None) => None,
            (None, Some(base)) => {
                return Err(self.refuse(&format!("the exported disk has no base; leave out --base {base}")));
            }
            (Some(note), None) => {
                return Err(self.refuse(&format!(
                    "the exported disk is on base {}; name the base of this store with the same contents with --base",
                    note.name
                )));
            }
            (Some(note), Some(name)) => {
                let base: wire::Base =
                    read(&self.client.get(&format!("/v1/bases/{name}"), &action)?, &action)?;
                let has_digests = !note.digest.is_empty() && !digest(&base).is_empty();
                let kind = |digest: &str| digest.split(':').next().map(str::to_owned);
                let is_another =
                    has_digests && kind(&note.digest) == kind(&digest(&base)) && note.digest != digest(&base);
                if base.size != note.size || is_another {
                    return Err(self.refuse(&format!(
                        "base {name} does not have the contents of base {} of the exported disk; name the right base",
                        note.name
                    )));
                }
                Some(name.clone())
            }
        };
        let body = CreateDisks {
            names: vec![self.import.name.clone()],
            base,
            size: Some(self.header.size),
            encryption: self.import.encryption.reference()?,
            ..CreateDisks::default()
        };
        let mut made: Vec<wire::Disk> =
            read(&retry::create(self.client, "/v1/disks", &body, &action)?, &action)?;
        made.pop().ok_or_else(|| self.refuse("the daemon's answer has no disk; repeat the command"))
    }

    /// Finds the disk, and checks that it has the state that the increment was made for.
    fn find(&self) -> Result<wire::Disk, CliError> {
        let (name, action) = (&self.import.name, self.import.action());
        if let Some(base) = &self.import.base {
            return Err(self.refuse(&format!("it has its base already; leave out --base {base}")));
        }
        let disk: wire::Disk = read(&self.client.get(&format!("/v1/disks/{name}"), &action)?, &action)?;
        let states: Vec<String> =
            snapshots(self.client, name, &action)?.into_iter().map(|s| s.name).collect();
        let Some(since) = self.since() else { return Ok(disk) };
        if !states.contains(&since) {
            let has = states.iter().rev().find_map(|name| name.strip_prefix(STATE));
            let until = self.header.until.to_string();
            return Err(self.refuse(&match has {
                Some(has) if has == until => "it has the state of this increment already; import the next one".into(),
                Some(has) => format!(
                    "the increment starts from state {}, and the disk has state {has}; import the increments in order",
                    since.trim_start_matches(STATE)
                ),
                None => "it was made by no import of an increment; import the first one, of --format increment, under a \
                         new name"
                    .into(),
            }));
        }
        self.refuse_open()?;
        let moments = Moments { disk: name, since: Some(&since), until: None };
        let mut is_same = true;
        moments.each(self.client, &action, |part| {
            is_same &= part.extents.is_empty();
            Ok(if is_same { Reader::Present } else { Reader::Gone })
        })?;
        let before =
            snapshots(self.client, name, &action)?.into_iter().find(|snapshot| snapshot.name == since);
        if !is_same || before.is_none_or(|before| before.size != disk.size) {
            return Err(self.refuse(&format!(
                "it was written since the last increment; return to that state with `plyfs disk rollback {name} {since}`, \
                 or keep the changes in a clone"
            )));
        }
        Ok(disk)
    }

    /// Refuses a copy that a client has open, unless the command was told not to.
    fn refuse_open(&self) -> Result<(), CliError> {
        if self.import.force {
            Ok(())
        } else {
            super::disk::refuse_open(self.client, &self.import.name, OPEN)
        }
    }

    /// The name of the snapshot with the earlier state.
    fn since(&self) -> Option<String> {
        self.header.since.map(|since| format!("{STATE}{since}"))
    }

    fn resize(&self, disk: &wire::Disk) -> Result<(), CliError> {
        if disk.size == self.header.size {
            return Ok(());
        }
        let (path, action) = (format!("/v1/disks/{}/resize", disk.name), self.import.action());
        let body = Resize { size: self.header.size, shrink: true };
        retry::repeat(|| self.client.post(&path, &body, &action))?;
        // The kernel learns the size with the next attributes that it requests.
        let _ = std::fs::metadata(&disk.path);
        Ok(())
    }

    /// Notes the new state.
    fn note(&self) -> Result<(), CliError> {
        let (name, action) = (&self.import.name, self.import.action());
        let body = TakeSnapshot { name: format!("{STATE}{}", self.header.until) };
        retry::create(self.client, &format!("/v1/disks/{name}/snapshots"), &body, &action).map(drop)
    }

    /// Removes the snapshot of the earlier state.
    fn forget(&self) -> Result<(), CliError> {
        self.since()
            .map_or(Ok(()), |since| snapshot::remove(self.client, &self.import.name, &since).map(drop))
    }

    /// Returns to the earlier state.
    fn undo(&self) -> Result<(), CliError> {
        let (name, action) = (&self.import.name, self.import.action());
        match self.since() {
            None => {
                let removal = Removal { force: true, snapshots: true, now: true };
                retry::remove(self.client, "disk", name, removal).map(drop)
            }
            Some(since) => {
                let body = Rollback { snapshot: since, force: true };
                retry::create(self.client, &format!("/v1/disks/{name}/rollback"), &body, &action).map(drop)
            }
        }
    }
}
