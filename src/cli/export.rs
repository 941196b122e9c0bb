//! `plyfs disk export`: what a disk or a snapshot shows, as a raw file or a qcow2 image.
//!
//! What must hold: the command reads a snapshot, through the mount, in its own process; the daemon opens no file for it.
//! A snapshot that the command took is removed at its end, also after an error and a signal.

use std::fs::{self, File};
use std::io::{self, IsTerminal};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::ValueEnum;
use serde_json::{Value, json};

use super::Global;
use super::announce::Announcement;
use super::args::{self, DiskOrSnapshot};
use super::client::{Client, read};
use super::diff::{self, Moments};
use super::error::CliError;
use super::increment;
use super::interrupt::Interrupts;
use super::output::{Output as Printer, Reader};
use super::progress::{Progress, Update};
use super::{retry, snapshot};
use crate::config::size::format_size;
use crate::control::wire::{self, ErrorKind, ExtentContent, HELD_SNAPSHOT, TakeSnapshot, WorkKind};
use crate::export::increment::{self as increment_stream, IncrementHeader};
use crate::export::qcow2::{self, Backing, Compression};
use crate::export::{Content, Existing, ExportError, Extent, FileInput, Input, ListedInput, Output, raw};

pub(super) const EXAMPLES: &str = "\
Examples:
  plyfs disk export vm1 /backup/vm1.raw
  plyfs disk export vm1@monday /backup/vm1.qcow2 --format qcow2 --compress zstd
  plyfs disk export vm1 vm1.qcow2 --format qcow2 --onto /images/debian-12.raw
  plyfs disk export vm1@monday - | ssh backup 'cat >vm1.raw'
  plyfs disk export vm1@tuesday vm1.inc --since @monday

Without a snapshot the command takes one, plyfs-export-..., and removes it at the end; the disk stays in use. The file \
has its name only when it is complete and on its disk; only its owner may read it. In a raw file zeros are holes. With \
--onto the image has only what differs from the base, and names the backing image for all else: the image of the base or \
an exact copy of it. FILE - is standard output, in order, without compression.

An increment has only what changed between two snapshots; --format increment without --since has all that a copy needs to \
begin. `plyfs disk import --increment` applies them.";

/// The format of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum FileFormat {
    /// The file is the disk
    Raw,
    /// QEMU's format
    Qcow2,
    /// A stream for `plyfs disk import --increment`
    Increment,
}

/// The compression of a qcow2 image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum CompressArg {
    /// Every reader of qcow2 knows it
    Zlib,
    /// Faster and smaller; QEMU 5.1 and later
    Zstd,
}

/// Formats of a backing image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum BackingFormat {
    Raw,
    Qcow2,
    Vmdk,
}

#[derive(Debug, clap::Args)]
pub(super) struct Export {
    /// The disk as it is now, or DISK@SNAPSHOT
    #[arg(value_name = "DISK[@SNAPSHOT]", value_parser = args::disk_or_snapshot)]
    source: DiskOrSnapshot,
    /// The file, or - for standard output
    file: PathBuf,
    /// Format of the file [default: raw, with --since increment]
    #[arg(long, value_enum)]
    format: Option<FileFormat>,
    /// Write only what changed since this snapshot, for a copy that has its state
    #[arg(long, value_name = "@SNAPSHOT", value_parser = diff::end)]
    since: Option<DiskOrSnapshot>,
    /// Compress the clusters of a qcow2 image
    #[arg(long, value_enum)]
    compress: Option<CompressArg>,
    /// Write only what differs from the base, on top of this image; as with qemu-img, a relative path starts at FILE
    #[arg(long, value_name = "BACKING")]
    onto: Option<String>,
    /// Format of the backing image [default: that of the base when BACKING is its file, else raw]
    #[arg(long, value_enum, requires = "onto")]
    onto_format: Option<BackingFormat>,
    /// Replace a file that exists
    #[arg(long)]
    force: bool,
}

/// Standard output as a file name.
const STDOUT: &str = "-";

/// Where the file may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Neither in the store nor in the mount.
    Elsewhere,
    /// In the store: it becomes the image of a base.
    Store,
}

impl Export {
    /// A qcow2 image on top of the base of a disk, which becomes a base.
    pub(super) fn of_commit(
        source: &DiskOrSnapshot,
        file: &Path,
        compress: Option<CompressArg>,
        base: Option<&wire::Base>,
    ) -> Self {
        let onto_format = base.map(|base| match base.format {
            wire::Format::Raw => BackingFormat::Raw,
            wire::Format::Qcow2 => BackingFormat::Qcow2,
            wire::Format::Vmdk => BackingFormat::Vmdk,
        });
        Self {
            source: source.clone(),
            file: file.to_owned(),
            format: Some(FileFormat::Qcow2),
            since: None,
            compress,
            onto: base.map(|base| base.source.clone()),
            onto_format,
            force: false,
        }
    }

    /// A qcow2 image of a disk as it is now, on top of a raw file with the contents of its base, or of all of it.
    pub(super) fn of_overlay(disk: &str, file: PathBuf, onto: Option<String>) -> Self {
        Self {
            source: DiskOrSnapshot { disk: disk.to_owned(), snapshot: None },
            file,
            format: Some(FileFormat::Qcow2),
            since: None,
            compress: None,
            onto_format: onto.is_some().then_some(BackingFormat::Raw),
            onto,
            force: true,
        }
    }

    pub(super) fn run(&self, global: &Global) -> Result<(), CliError> {
        self.check_options(global)?;
        let (size, bytes) = self.write_file(global, Place::Elsewhere)?;
        self.print(&global.output(), size, bytes)
    }

    /// Writes the file. Returns the bytes of the disk, and of the file when that is known.
    pub(super) fn write_file(&self, global: &Global, place: Place) -> Result<(u64, Option<u64>), CliError> {
        let client = global.client()?;
        let disk: wire::Disk =
            read(&client.get(&format!("/v1/disks/{}", self.source.disk), &self.action())?, &self.action())?;
        let base = self.base(&client, &disk)?;
        let mount = Path::new(&disk.path).parent().and_then(Path::parent).unwrap_or(Path::new("/"));
        if !self.is_stdout() && place == Place::Elsewhere {
            self.check_place(&client, mount, base.as_ref())?;
        }
        let backing = self.backing(base.as_ref())?;
        let header = match (self.format(), &self.source.snapshot) {
            (FileFormat::Increment, Some(until)) => {
                let moments = (self.since(), until.as_str());
                Some(increment::header(&client, &disk, moments, base.as_ref(), &self.action())?)
            }
            _ => None,
        };
        let output = self.output()?;
        // From here on a signal ends the work in order.
        let interrupts = Interrupts::catch();
        let printer = global.output();
        let mut progress = Progress::of_short_work(&printer);
        let own = self.source.snapshot.is_none().then(held_name).transpose()?;
        let what = (WorkKind::Export, disk.name.as_str());
        // Before the snapshot is taken, so that it goes when this process is killed.
        let mut job = Announcement::new(&client, what, own.as_deref(), disk.size);
        let taken = match (&self.source.snapshot, own) {
            (Some(name), _) => {
                Source { client: &client, disk: &disk.name, snapshot: name.clone(), is_temporary: false }
            }
            (None, Some(name)) if job.is_known() => Source::take(&client, &disk.name, name, &self.action())?,
            // No daemon may take it for one that it is to remove.
            (None, _) => Source::take(&client, &disk.name, plain_name()?, &self.action())?,
        };
        let mut signal = None;
        let written = self.write(
            (&taken, mount, disk.base.as_deref()),
            (backing.as_ref(), header.as_ref()),
            output.as_ref(),
            &mut |done, size| {
                signal = interrupts.pause(Duration::ZERO);
                let title = self.source.to_string();
                let text = format!("{} of {}", format_size(done), format_size(size));
                let update = Update { title: &title, done, total: size, text, state: "exporting" };
                let object =
                    || json!({"disk": disk.name, "state": "exporting", "bytes": done, "total": size});
                signal.is_none() && job.goes_on(done) && progress.show(&update, object).is_ok()
            },
        );
        progress.clear();
        let finished = written.and_then(|size| {
            let bytes =
                output.as_ref().map(|output| output.file().metadata().map(|meta| meta.blocks() * 512));
            output.map_or(Ok(()), Output::finish).map_err(Failure::Export)?;
            Ok((size, bytes.and_then(Result::ok)))
        });
        let removed = taken.end();
        let (size, bytes) = match finished {
            Ok(done) => done,
            Err(Failure::Export(ExportError::Stopped)) if job.is_cancelled() => {
                let why = "an operator cancelled it; nothing is left";
                return Err(CliError::Failed(format!("{} to {}: {why}", self.action(), self.place())));
            }
            Err(failure) => return Err(self.failed(failure, signal)),
        };
        removed?;
        Ok((size, bytes))
    }

    fn format(&self) -> FileFormat {
        let default = if self.since.is_some() { FileFormat::Increment } else { FileFormat::Raw };
        self.format.unwrap_or(default)
    }

    fn since(&self) -> Option<&str> {
        self.since.as_ref()?.snapshot.as_deref()
    }

    fn is_stdout(&self) -> bool {
        self.file == Path::new(STDOUT)
    }

    fn action(&self) -> String {
        format!("cannot export {}", self.source)
    }

    fn place(&self) -> String {
        if self.is_stdout() { "standard output".into() } else { self.file.display().to_string() }
    }

    fn refuse(&self, why: &str) -> CliError {
        CliError::Usage(format!("{}: {why}", self.action()))
    }

    fn check_options(&self, global: &Global) -> Result<(), CliError> {
        let is_raw = self.format() == FileFormat::Raw;
        let is_increment = self.format() == FileFormat::Increment;
        let of_another = |since: &DiskOrSnapshot| !since.disk.is_empty() && since.disk != self.source.disk;
        Err(self.refuse(if self.since.is_some() && !is_increment {
            "what changed since a snapshot is an increment; leave out --format, or see --onto"
        } else if is_increment && (self.compress.is_some() || self.onto.is_some()) {
            "an increment is neither compressed nor on top of an image; leave out --compress and --onto"
        } else if is_increment && self.source.snapshot.is_none() {
            "an increment ends at a snapshot, where the next one starts; name DISK@SNAPSHOT"
        } else if self.since.as_ref().is_some_and(of_another) {
            "--since names another disk; name a snapshot of this one"
        } else if is_raw && self.compress.is_some() {
            "a raw file is not compressed; add --format qcow2"
        } else if is_raw && self.onto.is_some() {
            "a raw file has no backing image; add --format qcow2"
        } else if self.is_stdout() && self.compress.is_some() {
            "a compressed image needs a file that can be written out of order; name one, or leave out --compress"
        } else if self.is_stdout() && global.json {
            "standard output cannot have the disk and JSON; name a file, or leave out --json"
        } else if self.is_stdout() && io::stdout().is_terminal() {
            "a terminal is no place for a disk; name a file, or redirect standard output"
        } else {
            return Ok(());
        }))
    }

    /// The base of the disk, which an image on top of it needs.
    fn base(&self, client: &Client, disk: &wire::Disk) -> Result<Option<wire::Base>, CliError> {
        let Some(name) = &disk.base else {
            return match self.onto {
                None => Ok(None),
                Some(_) => {
                    Err(self.refuse("the disk has no base, so there is nothing below it; leave out --onto"))
                }
            };
        };
        let shown = client.get(&format!("/v1/bases/{name}"), &self.action())?;
        read(&shown, &self.action()).map(Some)
    }

    /// Refuses a file in the store, in the mount, or one that the disk is made of.
    fn check_place(&self, client: &Client, mount: &Path, base: Option<&wire::Base>) -> Result<(), CliError> {
        let dir = self.file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let transfer = |source| CliError::Transfer { action: self.action(), path: dir.to_owned(), source };
        let real = dir.canonicalize().map_err(transfer)?;
        let device = fs::metadata(&real).map_err(transfer)?.dev();
        let is_in_mount = fs::metadata(mount).is_ok_and(|mount| mount.dev() == device);
        let is_in_store = client.store().canonicalize().is_ok_and(|store| real.starts_with(store));
        if is_in_mount || is_in_store {
            return Err(self.refuse(&format!(
                "{} is in the mount or the store of plyfs itself; name a file elsewhere",
                self.file.display()
            )));
        }
        if base.is_some_and(|base| is_same_file(&self.file, Path::new(&base.source))) {
            return Err(self.refuse(&format!(
                "{} is the image of its base, which disks read; name another file",
                self.file.display()
            )));
        }
        Ok(())
    }

    /// The backing image that the file names.
    fn backing(&self, base: Option<&wire::Base>) -> Result<Option<Backing>, CliError> {
        let (Some(path), Some(base)) = (&self.onto, base) else { return Ok(None) };
        let beside = self.file.parent().unwrap_or(Path::new("")).join(path);
        let is_image = is_same_file(&beside, Path::new(&base.source));
        let format = match self.onto_format {
            Some(BackingFormat::Raw) => wire::Format::Raw,
            Some(BackingFormat::Qcow2) => wire::Format::Qcow2,
            Some(BackingFormat::Vmdk) => wire::Format::Vmdk,
            None if is_image => base.format,
            None => wire::Format::Raw,
        };
        // Of another file only the length is known.
        let found = fs::metadata(&beside).ok().filter(|found| found.is_file() && format == wire::Format::Raw);
        if let Some(found) = found.filter(|found| found.len() != base.size) {
            return Err(self.refuse(&format!(
                "{} has {} bytes, and base {} has {}; give the image of the base or an exact copy of it, and its format \
                 with --onto-format",
                beside.display(),
                found.len(),
                base.name,
                base.size
            )));
        }
        let format = match format {
            wire::Format::Raw => "raw",
            wire::Format::Qcow2 => "qcow2",
            wire::Format::Vmdk => "vmdk",
        };
        Ok(Some(Backing { path: path.clone(), format: format.to_owned() }))
    }

    fn output(&self) -> Result<Option<Output>, CliError> {
        if self.is_stdout() {
            return Ok(None);
        }
        let existing = if self.force { Existing::Replace } else { Existing::Keep };
        Output::create(&self.file, existing).map(Some).map_err(|error| self.failed(error.into(), None))
    }

    /// Writes the file. Returns the bytes of the disk.
    fn write(
        &self,
        (source, mount, base): (&Source<'_>, &Path, Option<&str>),
        (backing, header): (Option<&Backing>, Option<&IncrementHeader>),
        output: Option<&Output>,
        watch: &mut dyn FnMut(u64, u64) -> bool,
    ) -> Result<u64, Failure> {
        let path = mount.join("snapshots").join(format!("{}@{}.raw", source.disk, source.snapshot));
        let opened = File::open(&path).map_err(|source| {
            Failure::Cli(CliError::Transfer { action: self.action(), path: path.clone(), source })
        })?;
        let file = FileInput::new(opened)?;
        let size = file.size();
        let mut watch = |done| watch(done, size);
        let is_part = backing.is_some() || header.is_some();
        let input: Box<dyn Input> = if is_part {
            Box::new(ListedInput::new(file, source.extents(self.since(), base, &self.action())?))
        } else {
            Box::new(file)
        };
        match (self.format(), self.compress, output) {
            (FileFormat::Raw, _, Some(output)) => raw::to_file(&*input, output.file(), &mut watch)?,
            (FileFormat::Raw, _, None) => raw::to_pipe(&*input, &mut io::stdout().lock(), &mut watch)?,
            (FileFormat::Qcow2, Some(compress), Some(output)) => {
                let compression = match compress {
                    CompressArg::Zlib => Compression::Zlib,
                    CompressArg::Zstd => Compression::Zstd,
                };
                qcow2::write_compressed(&*input, backing, compression, output.file(), &mut watch)?;
            }
            (FileFormat::Qcow2, _, Some(output)) => {
                qcow2::write(&*input, backing, &mut io::BufWriter::new(output.file()), &mut watch)?;
            }
            (FileFormat::Increment, _, output) => {
                let header = header.ok_or(ExportError::Stopped)?;
                let mut out: Box<dyn io::Write> = match output {
                    Some(output) => Box::new(io::BufWriter::new(output.file())),
                    None => Box::new(io::stdout().lock()),
                };
                increment_stream::write(&*input, header, &mut out, &mut watch)?;
            }
            (FileFormat::Qcow2, _, None) => {
                qcow2::write(&*input, backing, &mut io::stdout().lock(), &mut watch)?;
            }
        }
        Ok(size)
    }

    fn failed(&self, failure: Failure, signal: Option<i32>) -> CliError {
        let error = match failure {
            Failure::Cli(error) => return error,
            Failure::Export(error) => error,
        };
        let action = format!("{} to {}", self.action(), self.place());
        if let Some(signal) = signal {
            return CliError::Interrupted {
                message: format!("{action}: a signal ended it; nothing is left"),
                signal,
            };
        }
        let remedy = match &error {
            ExportError::Read { .. } => "; see `plyfs disk show` and the daemon's log",
            ExportError::Write { .. } if error.is_broken_pipe() => "; its reader ended before the disk did",
            ExportError::Write { .. } => "; check the place and its free space",
            ExportError::Unsuitable(_) => "",
            ExportError::Stopped => "; repeat the command",
        };
        CliError::Failed(format!("{action}: {error}{remedy}"))
    }

    fn print(&self, printer: &Printer, size: u64, bytes: Option<u64>) -> Result<(), CliError> {
        if self.is_stdout() {
            return Ok(());
        }
        let format = match self.format() {
            FileFormat::Raw => "raw",
            FileFormat::Qcow2 => "qcow2",
            FileFormat::Increment => "increment",
        };
        let done: Value = json!({
            "disk": self.source.disk,
            "snapshot": self.source.snapshot,
            "file": self.file,
            "format": format,
            "size": size,
            "file_bytes": bytes,
        });
        printer.line(&done, |_| String::new())
    }
}

/// Why nothing was written.
enum Failure {
    Cli(CliError),
    Export(ExportError),
}

impl From<CliError> for Failure {
    fn from(error: CliError) -> Self {
        Self::Cli(error)
    }
}

impl From<ExportError> for Failure {
    fn from(error: ExportError) -> Self {
        Self::Export(error)
    }
}

fn random() -> Result<u64, CliError> {
    let mut random = [0; 8];
    getrandom::fill(&mut random).map_err(|error| CliError::Runtime(io::Error::other(error.to_string())))?;
    Ok(u64::from_le_bytes(random))
}

/// The name of a snapshot that the daemon removes when this process is gone.
fn held_name() -> Result<String, CliError> {
    Ok(format!("{HELD_SNAPSHOT}{:016x}", random()?))
}

/// The name of a snapshot that stays until it is removed.
fn plain_name() -> Result<String, CliError> {
    Ok(format!("plyfs-export-{:016x}", random()?))
}

/// The snapshot that is read.
struct Source<'a> {
    client: &'a Client,
    disk: &'a str,
    snapshot: String,
    is_temporary: bool,
}

impl<'a> Source<'a> {
    /// Takes a snapshot for the time of the command.
    fn take(client: &'a Client, disk: &'a str, name: String, action: &str) -> Result<Self, CliError> {
        let body = TakeSnapshot { name: name.clone() };
        retry::create(client, &format!("/v1/disks/{disk}/snapshots"), &body, action)?;
        Ok(Self { client, disk, snapshot: name, is_temporary: true })
    }

    /// What differs from an earlier snapshot, or from the base, which must be the one that the file refers to.
    fn extents(
        &self,
        since: Option<&str>,
        base: Option<&str>,
        action: &str,
    ) -> Result<Vec<Extent>, CliError> {
        let moments = Moments { disk: self.disk, since, until: Some(&self.snapshot) };
        let mut all = Vec::new();
        moments.each(self.client, action, |part| {
            if part.base.as_deref() != base {
                let why = "the disk was put on another base meanwhile; try again";
                return Err(CliError::Failed(format!("{action}: {why}")));
            }
            all.extend(part.extents.iter().map(|extent| Extent {
                offset: extent.offset,
                len: extent.length,
                content: match extent.content {
                    ExtentContent::Data => Content::Data,
                    ExtentContent::Zero => Content::Zero,
                    // An earlier snapshot hid the base here: its bytes are new.
                    ExtentContent::Base if since.is_some() => Content::Data,
                    ExtentContent::Base => Content::Backing,
                },
            }));
            Ok(Reader::Present)
        })?;
        Ok(all)
    }

    /// Removes the snapshot if the command took it.
    fn end(mut self) -> Result<(), CliError> {
        self.remove()
    }

    fn remove(&mut self) -> Result<(), CliError> {
        if !std::mem::take(&mut self.is_temporary) {
            return Ok(());
        }
        match snapshot::remove(self.client, self.disk, &self.snapshot) {
            Err(error) if error.is(ErrorKind::NotFound) => Ok(()),
            done => done.map(drop),
        }
    }
}

impl Drop for Source<'_> {
    fn drop(&mut self) {
        // After a panic there is no place for an error.
        let _ = self.remove();
    }
}

fn is_same_file(one: &Path, other: &Path) -> bool {
    match (fs::metadata(one), fs::metadata(other)) {
        (Ok(one), Ok(other)) => (one.dev(), one.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}
