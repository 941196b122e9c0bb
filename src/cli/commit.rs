//! `plyfs disk commit`: what a disk or a snapshot shows becomes a new base.
//!
//! What must hold: the new base refers to the images of the present one, which are not copied. Without a new base no image
//! is left.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, chown};
use std::path::{Path, PathBuf};

use super::Global;
use super::args::{self, DiskOrSnapshot};
use super::client::{Client, read};
use super::error::CliError;
use super::export::{CompressArg, Export, Place};
use super::retry;
use crate::control::wire::{AddBase, Base, Disk, ErrorKind, Format, Identity};
use crate::format::layout::IMAGES;

pub(super) const EXAMPLES: &str = "\
Examples:
  plyfs disk commit golden web-2026-11
  plyfs disk commit vm1@monday web-2026-11 --compress zstd
  plyfs disk commit vm1 web-2026-11 --image /images/web-2026-11.qcow2

Writes what differs from the base of the disk into a qcow2 image, and registers it as a base on top of the images of that \
base, which are not copied, and whose cached blocks both bases share. The disk and its base stay as they are. Disks on the \
new base see what the disk or the snapshot shows now. Without --image the image lies in the store, and `plyfs base rm` of \
the last base that has it removes it.";

#[derive(Debug, clap::Args)]
pub(super) struct Commit {
    /// The disk as it is now, or DISK@SNAPSHOT
    #[arg(value_name = "DISK[@SNAPSHOT]", value_parser = args::disk_or_snapshot)]
    source: DiskOrSnapshot,
    /// Name of the new base
    #[arg(value_parser = args::new_name)]
    base: String,
    /// The image file [default: in the store]
    #[arg(long, value_name = "FILE")]
    image: Option<PathBuf>,
    /// Make a base of an encrypted disk: the image is not encrypted
    #[arg(long)]
    plain: bool,
    /// Compress the clusters of the image
    #[arg(long, value_enum)]
    compress: Option<CompressArg>,
}

impl Commit {
    fn action(&self) -> String {
        format!("cannot commit {} as base {}", self.source, self.base)
    }

    pub(super) fn run(&self, global: &Global) -> Result<(), CliError> {
        let (client, action) = (global.client()?, self.action());
        let shown = client.get(&format!("/v1/disks/{}", self.source.disk), &action)?;
        let disk: Disk = read(&shown, &action)?;
        match client.get(&format!("/v1/bases/{}", self.base), &action) {
            Err(error) if error.is(ErrorKind::NotFound) => {}
            Err(error) => return Err(error),
            Ok(_) => {
                let why = "a base of this name exists already; choose another name";
                return Err(CliError::Refused {
                    kind: Some(ErrorKind::Exists),
                    message: format!("{action}: {why}"),
                });
            }
        }
        let below: Option<Base> = match &disk.base {
            None => None,
            Some(name) => Some(read(&client.get(&format!("/v1/bases/{name}"), &action)?, &action)?),
        };
        if disk.key.is_some() && !self.plain {
            let why = "the disk is encrypted, and a base is not; repeat with --plain if that is meant";
            return Err(CliError::Failed(format!("{action}: {why}")));
        }
        let (file, place) = match &self.image {
            Some(file) => {
                (std::path::absolute(file).map_err(|source| self.failed(file, source))?, Place::Elsewhere)
            }
            None => (self.place(&client)?, Place::Store),
        };
        let image = Image::new(file);
        Export::of_commit(&self.source, &image.path, self.compress, below.as_ref())
            .write_file(global, place)?;
        // The image has what differs from the base that the disk had when it was written: the export reads what differs
        // from the base that it finds.
        let shown = client.get(&format!("/v1/disks/{}", self.source.disk), &action)?;
        let now: Disk = read(&shown, &action)?;
        if now.base != disk.base {
            let why = "the disk was put on another base meanwhile; try again";
            return Err(CliError::Failed(format!("{action}: {why}")));
        }
        if place == Place::Store {
            self.give(&client, &image.path)?;
        }
        let body = AddBase {
            name: self.base.clone(),
            source: image.path.display().to_string(),
            format: Some(Format::Qcow2),
            onto: disk.base,
            identity: Some(Identity::default()),
            ..AddBase::default()
        };
        let base = retry::create(&client, "/v1/bases", &body, &action)?;
        image.keep();
        global.output().value(&base, super::disk::paths)
    }

    fn failed(&self, path: &Path, source: io::Error) -> CliError {
        CliError::Transfer { action: self.action(), path: path.to_owned(), source }
    }

    /// The path of an image in the store.
    fn place(&self, client: &Client) -> Result<PathBuf, CliError> {
        let store = client.store().canonicalize().map_err(|source| self.failed(client.store(), source))?;
        let dir = store.join(IMAGES);
        match fs::DirBuilder::new().mode(0o700).create(&dir) {
            Ok(()) => self.give(client, &dir)?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(self.failed(&dir, error)),
        }
        Ok(dir.join(format!("{}.qcow2", self.base)))
    }

    /// Gives a new file to the owner of the store: the daemon may run as another user than the command.
    fn give(&self, client: &Client, path: &Path) -> Result<(), CliError> {
        let owner = fs::metadata(client.store()).map_err(|source| self.failed(client.store(), source))?;
        chown(path, Some(owner.uid()), Some(owner.gid())).map_err(|source| self.failed(path, source))
    }
}

/// A new image, which is removed again unless it becomes a base.
struct Image {
    path: PathBuf,
    is_kept: std::cell::Cell<bool>,
    is_new: bool,
}

impl Image {
    fn new(path: PathBuf) -> Self {
        let is_new = fs::symlink_metadata(&path).is_err();
        Self { path, is_kept: std::cell::Cell::new(false), is_new }
    }

    fn keep(&self) {
        self.is_kept.set(true);
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.is_new && !self.is_kept.get() {
            let _ = fs::remove_file(&self.path);
        }
    }
}
