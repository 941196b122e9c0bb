//! Images in the store itself, which `plyfs disk commit` made: they go with the last base that has them.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use super::{BaseNode, Store};
use crate::format::layout;
use crate::format::record::ImageFile;
use crate::io::Open;

impl Store {
    /// Removes the images in the store itself that only a removed base has.
    pub(super) fn remove_images(&self, base: &BaseNode) -> io::Result<()> {
        let others = self.bases();
        let mut any = false;
        for file in base.record().files() {
            let Some(inode) = file.identity.validator.inode() else { continue };
            let Some(name) = Path::new(&file.source).file_name().and_then(OsStr::to_str) else { continue };
            // By its name and number, too: the removed base may have a file of another filesystem with both.
            let is_it = |other: &ImageFile| {
                let same_name = Path::new(&other.source).file_name().is_some_and(|other| other == name);
                other.source == file.source || same_name && other.identity.validator.inode() == Some(inode)
            };
            let is_needed = others.iter().any(|other| other.record().files().any(is_it));
            let path = format!("{}/{name}", layout::IMAGES);
            // A file of another directory may have the same name.
            let is_ours = self.medium.open(&path, Open::Existing).and_then(|file| file.identity());
            if is_needed || !is_ours.is_ok_and(|(_, ours)| ours == inode) {
                continue;
            }
            self.medium.remove(&path)?;
            any = true;
        }
        if any { self.medium.sync_dir(layout::IMAGES) } else { Ok(()) }
    }
}
