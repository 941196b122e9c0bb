//! `plyfs disk unlock`, `rekey` and `shred`, and the options of encrypted disks.

use std::cell::Cell;
use std::path::PathBuf;

use serde_json::json;

use super::Global;
use super::disk::naming_open;
use super::error::CliError;
use super::retry;
use crate::control::wire::{ErrorKind, KeyReference, Shred};

pub(super) const UNLOCK_EXAMPLES: &str = "\
Examples:
  plyfs disk unlock vm1

A disk is locked while the daemon cannot read its secret, or while that is another secret: opens of its file fail with \
\"Required key not available\". The daemon tries again at each open, but at most every 3 s; this command makes it try now.";

pub(super) const REKEY_EXAMPLES: &str = "\
Examples:
  plyfs disk rekey vm1 --key-file /etc/plyfs/keys/vm1.new
  plyfs disk rekey vm1 --key-command vm1-2027

Only the wrapped keys in the disk's record change, so it takes the same short time for a disk of any size. The disk may \
be in use. Clones keep their secrets.";

pub(super) const SHRED_EXAMPLES: &str = "\
Examples:
  plyfs disk shred vm1
  plyfs disk shred vm1 --snapshots && rm /etc/plyfs/keys/vm1

The daemon overwrites and forgets the keys of the disk, and removes the disk. No secret opens its data any more, \
wherever copies of its data files are. Clones keep the layers that they share. A filesystem that copies on write, an SSD \
and a backup may keep old blocks with wrapped keys: these need the secret, so destroy that too.";

/// Where the secret of a disk is.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct KeyArgs {
    /// File with the secret, on the daemon's host, in a directory of [encryption] key_dirs: at least 32 random bytes
    #[arg(long, value_name = "PATH", conflicts_with = "key_command")]
    key_file: Option<PathBuf>,
    /// Name with which the daemon's command ([encryption] key_command) prints the secret
    #[arg(long, value_name = "NAME")]
    key_command: Option<String>,
}

impl KeyArgs {
    /// The body of a request; `None` without options.
    pub(super) fn reference(&self) -> Result<Option<KeyReference>, CliError> {
        let key_file = match &self.key_file {
            None => None,
            Some(path) => {
                let path = std::path::absolute(path).map_err(CliError::Runtime)?;
                let text = path.to_str().map(str::to_owned);
                Some(text.ok_or_else(|| {
                    CliError::Failed(format!("{}: the path is not UTF-8; choose another", path.display()))
                })?)
            }
        };
        let reference = KeyReference { key_file, key_command: self.key_command.clone() };
        Ok((reference != KeyReference::default()).then_some(reference))
    }
}

/// The options of a command that makes disks.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct EncryptArgs {
    /// Encrypt what the disk writes (AES-256-XTS); its base stays shared and plain. Needs --key-file or --key-command
    #[arg(long, requires = "key_source")]
    encrypt: bool,
    #[command(flatten)]
    key: KeySourceArgs,
}

/// [`KeyArgs`] that mean nothing without `--encrypt`.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(id = "key_source", multiple = false, requires = "encrypt")]
pub(super) struct KeySourceArgs {
    /// File with the secret, on the daemon's host, in a directory of [encryption] key_dirs: at least 32 random bytes
    #[arg(long, value_name = "PATH")]
    key_file: Option<PathBuf>,
    /// Name with which the daemon's command ([encryption] key_command) prints the secret
    #[arg(long, value_name = "NAME")]
    key_command: Option<String>,
}

impl EncryptArgs {
    /// The body of a request; `None` for disks that are not encrypted.
    pub(super) fn reference(&self) -> Result<Option<KeyReference>, CliError> {
        let KeySourceArgs { key_file, key_command } = self.key.clone();
        KeyArgs { key_file, key_command }.reference()
    }
}

/// Tries the secret of a disk again.
pub(super) fn unlock(global: &Global, name: &str) -> Result<(), CliError> {
    let (path, action) = (format!("/v1/disks/{name}/unlock"), format!("cannot unlock disk {name}"));
    let client = global.client()?;
    let disk = retry::repeat(|| client.post(&path, &json!({}), &action))?;
    global.output().value(&disk, |_| String::new())
}

/// Gives a disk another secret. The same secret again changes nothing, so a request may be sent again.
pub(super) fn rekey(global: &Global, name: &str, key: &KeyArgs) -> Result<(), CliError> {
    let (path, action) =
        (format!("/v1/disks/{name}/rekey"), format!("cannot give disk {name} another secret"));
    let body = key.reference()?.unwrap_or_default();
    let client = global.client()?;
    let disk = retry::repeat(|| client.post(&path, &body, &action))?;
    global.output().value(&disk, |_| String::new())
}

/// Shreds a disk. A request that is sent again may find that the first attempt did it.
pub(super) fn shred(global: &Global, name: &str, force: bool, snapshots: bool) -> Result<(), CliError> {
    let (path, action) = (format!("/v1/disks/{name}/shred"), format!("cannot shred disk {name}"));
    let client = global.client()?;
    let body = Shred { force, snapshots };
    let is_repeated = Cell::new(false);
    let done = retry::repeat(|| match client.post(&path, &body, &action) {
        Err(error) if is_repeated.get() && error.is(ErrorKind::NotFound) => Ok(json!({"removed": [name]})),
        done => {
            is_repeated.set(true);
            done
        }
    });
    let removed = done.map_err(|error| naming_open(&client, name, error))?;
    global.output().value(&removed, |_| String::new())
}
