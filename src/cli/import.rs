//! `plyfs disk import`: a new disk with the contents of an image file.
//!
//! What must hold: the command opens the file that it was given, and none that the image names. A disk that does not have
//! all of the image is removed again.

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::Global;
use super::announce::Announcement;
use super::args;
use super::base::FormatArg;
use super::client::{Client, read};
use super::disk::paths;
use super::encryption::EncryptArgs;
use super::error::CliError;
use super::increment;
use super::interrupt::Interrupts;
use super::limits;
use super::output::printable;
use super::progress::{Progress, Update};
use super::retry::{self, Removal};
use crate::config::size::format_size;
use crate::control::wire::{self, CreateDisks, WorkKind};
use crate::import::{Format, ImageFile, ImportError};

pub(super) const EXAMPLES: &str = "\
Examples:
  plyfs disk import vm1 /backup/vm1.raw
  plyfs disk import vm1 vm1.qcow2 --base debian
  ssh host plyfs disk export vm1@tuesday - --since @monday | plyfs disk import vm1-copy - --increment

All bytes of the image are copied, once; a base needs no copy (plyfs base add). With --base the disk stores only what \
differs from the base. An image on top of a backing file needs --base: what the image itself has is taken, and all else \
comes from that base. plyfs opens no file that an image names; that the base has the contents of the backing file is the \
word of the operator. When the import fails, no disk is left.

With --increment the first file makes a copy (export --format increment), and each later one (export --since) brings it \
forward. An increment that was made for another state of the disk is refused, as is a copy that a process has open. When \
it fails, the copy is as it was before.";

#[derive(Debug, clap::Args)]
pub(super) struct Import {
    /// Name of the new disk
    #[arg(value_parser = args::new_name)]
    pub(super) name: String,
    /// The image file; an increment may come from standard input: -
    pub(super) file: PathBuf,
    /// The file is an increment: it makes a copy of a disk, or brings it forward
    #[arg(long, conflicts_with = "format")]
    increment: bool,
    /// Also bring a copy forward that is open: its clients see bytes change that they did not write
    #[arg(long, requires = "increment")]
    pub(super) force: bool,
    /// Format of the image [default: qcow2 or vmdk when the name ends in .qcow2 or .vmdk, else raw]
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    /// Base below the disk; of an image on top of a backing file, the one with the contents of that file
    #[arg(long, value_name = "BASE", value_parser = args::name)]
    pub(super) base: Option<String>,
    #[command(flatten)]
    limits: limits::Options,
    #[command(flatten)]
    pub(super) encryption: EncryptArgs,
}

impl Import {
    pub(super) fn run(&self, global: &Global) -> Result<(), CliError> {
        if self.increment {
            return increment::import(self, global);
        }
        let (client, image) = (global.client()?, self.open()?);
        self.take(global, &client, &image)?;
        self.print(global, &client, &image)
    }

    /// A qcow2 file on top of the contents of `base`, or of all of a disk.
    pub(super) fn of_overlay(name: String, file: PathBuf, base: Option<String>) -> Self {
        let (limits, encryption) = (limits::Options::default(), EncryptArgs::default());
        let format = Some(FormatArg::Qcow2);
        Self { name, file, increment: false, force: false, format, base, limits, encryption }
    }

    /// The image, which needs a base when it is on top of a backing file.
    pub(super) fn open(&self) -> Result<ImageFile, CliError> {
        let format = self.format.map(|format| match format {
            FormatArg::Raw => Format::Raw,
            FormatArg::Qcow2 => Format::Qcow2,
            FormatArg::Vmdk => Format::Vmdk,
        });
        let image = ImageFile::open(&self.file, format).map_err(|error| self.failed(&error))?;
        if let (Some(backing), None) = (image.backing(), &self.base) {
            return Err(CliError::Failed(format!(
                "{}: {} is on top of a backing file (\"{}\"), and plyfs opens no file that an image names; register that \
                 file with `plyfs base add`, and name the base with --base",
                self.action(),
                self.file.display(),
                printable(backing)
            )));
        }
        Ok(image)
    }

    /// Makes the disk. None is left when that fails.
    pub(super) fn take(&self, global: &Global, client: &Client, image: &ImageFile) -> Result<(), CliError> {
        let interrupts = Interrupts::catch();
        let disk = self.create(client, image.size())?;
        let mut job = Announcement::new(client, (WorkKind::Import, &self.name), None, image.size());
        let mut progress = Progress::of_short_work(&global.output());
        let mut signal = None;
        let copied = self.copy(image, Path::new(&disk.path), &mut |done| {
            signal = interrupts.pause(Duration::ZERO);
            let (title, total) = (&self.name, image.size());
            let text = format!("{} of {}", format_size(done), format_size(total));
            let update = Update { title, done, total, text, state: "importing" };
            let object = || json!({"name": self.name, "state": "importing", "bytes": done, "total": total});
            signal.is_none() && job.goes_on(done) && progress.show(&update, object).is_ok()
        });
        progress.clear();
        if let Err(error) = copied {
            let removed = retry::remove(
                client,
                "disk",
                &self.name,
                Removal { force: true, now: true, ..Removal::default() },
            );
            let error = match signal {
                Some(signal) => {
                    let message = format!("{}: a signal ended it; no disk is left", self.action());
                    CliError::Interrupted { message, signal }
                }
                None if job.is_cancelled() => {
                    CliError::Failed(format!("{}: an operator cancelled it; no disk is left", self.action()))
                }
                None => error,
            };
            // The reason for the failure comes last, where it is looked for.
            if let Err(stays) = removed {
                global.output().error(&stays);
            }
            return Err(error);
        }
        Ok(())
    }

    pub(super) fn action(&self) -> String {
        format!("cannot import disk {}", self.name)
    }

    pub(super) fn failed(&self, error: &ImportError) -> CliError {
        let from = format!("{} from {}", self.action(), self.file.display());
        let remedy = match error {
            // These say what to do.
            ImportError::Image(_) => "",
            ImportError::Source(_) => "; check the path",
            ImportError::Disk { .. } => "; see `plyfs status` and the daemon's log",
            ImportError::Stopped => "; repeat the command",
            ImportError::Stream(_) | ImportError::Cut | ImportError::Longer | ImportError::Increment(_) => {
                "; export it again"
            }
        };
        CliError::Failed(format!("{from}: {error}{remedy}"))
    }

    fn create(&self, client: &Client, size: u64) -> Result<wire::Disk, CliError> {
        let body = CreateDisks {
            names: vec![self.name.clone()],
            base: self.base.clone(),
            size: Some(size),
            limits: self.limits.wanted(),
            encryption: self.encryption.reference()?,
            ..CreateDisks::default()
        };
        let mut created: Vec<wire::Disk> =
            read(&retry::create(client, "/v1/disks", &body, &self.action())?, &self.action())?;
        created.pop().ok_or_else(|| CliError::InvalidAnswer {
            action: self.action(),
            problem: "the daemon's answer has no disk".to_owned(),
        })
    }

    fn copy(
        &self,
        image: &ImageFile,
        path: &Path,
        watch: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), CliError> {
        let transfer = |source| CliError::Transfer { action: self.action(), path: path.to_owned(), source };
        let disk = OpenOptions::new().read(true).write(true).open(path).map_err(transfer)?;
        image.copy_to(&disk, self.base.is_some(), watch).map_err(|error| self.failed(&error))?;
        disk.sync_all().map_err(transfer)
    }

    fn print(&self, global: &Global, client: &Client, image: &ImageFile) -> Result<(), CliError> {
        let mut disk: Value = client.get(&format!("/v1/disks/{}", self.name), &self.action())?;
        disk["backing_file"] = image.backing().into();
        if let (Some(backing), Some(base), false) = (image.backing(), &self.base, global.json) {
            // The path alone is on standard output, for scripts.
            let _ = writeln!(
                std::io::stderr(),
                "plyfs: disk {}: what {} itself has was taken; all else comes from base {base} in place of its backing \
                 file \"{}\"",
                self.name,
                printable(&self.file.display().to_string()),
                printable(backing)
            );
        }
        global.output().line(&disk, paths)
    }
}
