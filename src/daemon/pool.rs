//! Makes a directory a pool of a store, for `plyfs pool add`: a confined worker has no rights there yet.

use std::io;
use std::path::Path;

use crate::io::sys;
use crate::store::Store;
use crate::store::pools::{is_inside, make_identity};

/// Makes a directory a pool of the store, unless it is one. All paths are absolute and have no links.
///
/// # Errors
/// A directory that lies in the store or the mount, is used for something else, or cannot be written.
pub fn prepare_pool(store: &Path, mount: &Path, dir: &Path) -> io::Result<()> {
    let refuse = |why: String| Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    for (other, what) in [(store, "the store"), (mount, "the mount")] {
        if is_inside(dir, other) {
            return refuse(format!(
                "it and {what}, {}, lie one in the other; choose another directory",
                other.display()
            ));
        }
    }
    let existing = if dir.exists() { dir } else { dir.parent().unwrap_or(dir) };
    if sys::is_fuse(existing)? {
        return refuse("it lies on a FUSE filesystem; choose a directory on a local filesystem".into());
    }
    let superblock = Store::superblock(store).map_err(io::Error::other)?;
    make_identity(store, &superblock.uuid, dir)
}
