//! The file that is imported.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use super::{ImportError, Under, copy};
use crate::image::{self, Chain, Format, HEAD, Image, not_raw_by_default};
use crate::source::{FileSource, Source};

/// An image in a file of this host.
pub struct ImageFile {
    source: Arc<FileSource>,
    image: Arc<dyn Image>,
    size: u64,
    format: Format,
    backing: Option<String>,
    chain: Chain,
}

impl std::fmt::Debug for ImageFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageFile")
            .field("format", &self.format)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

/// The format that the name of a file says.
fn by_name(path: &Path) -> Format {
    match path.extension().and_then(|end| end.to_str()) {
        Some("qcow2") => Format::Qcow2,
        Some("vmdk") => Format::Vmdk,
        _ => Format::Raw,
    }
}

impl ImageFile {
    /// Opens an image. Without a `format` the end of the name decides, and a file that is raw by default only must not
    /// begin as another format does. No file that the image names is opened.
    ///
    /// # Errors
    /// When the file cannot be read, or is no image of that format that plyfs reads.
    pub fn open(path: &Path, format: Option<Format>) -> Result<Self, ImportError> {
        let source = Arc::new(FileSource::open(path)?);
        let mut head = vec![0; HEAD.min(source.size()) as usize];
        source.read_at(&mut head, 0)?;
        let chosen = format.unwrap_or_else(|| by_name(path));
        if format.is_none()
            && chosen == Format::Raw
            && let Some(refused) = not_raw_by_default(&head)
        {
            return Err(refused.into());
        }
        let inspect = |chain| image::inspect(chosen, &head, source.size(), chain);
        // An image on top of another one is told by what it names.
        let (inspected, chain) = match inspect(Chain::OnBacking) {
            Ok(on_backing) => (on_backing, Chain::OnBacking),
            Err(_) => (inspect(Chain::Alone)?, Chain::Alone),
        };
        let size = inspected.size;
        let image = image::open(chosen, source.clone(), size, chain);
        Ok(Self { source, image, size, format: chosen, backing: inspected.backing_named, chain })
    }

    /// Bytes of the virtual disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The backing file that the image names, for messages only; `None` when the image has all of the disk.
    pub fn backing(&self) -> Option<&str> {
        match self.chain {
            Chain::OnBacking => Some(self.backing.as_deref().unwrap_or_default()),
            Chain::Alone => None,
        }
    }

    /// Copies the image to the file of a new disk of its size, which shows a base or is blank. An image on top of a
    /// backing file needs the base.
    ///
    /// # Errors
    /// As [`copy`].
    pub fn copy_to(
        &self,
        disk: &File,
        has_base: bool,
        watch: &mut dyn FnMut(u64) -> bool,
    ) -> Result<(), ImportError> {
        let under = match (has_base, self.chain) {
            (false, _) => Under::Nothing,
            (true, Chain::OnBacking) => Under::Backing,
            (true, Chain::Alone) => Under::Copy,
        };
        copy(&*self.image, &*self.source, (disk, under), watch)
    }
}
