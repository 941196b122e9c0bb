//! A raw image: the file is the disk. Its contents are never probed, because a guest can write any header.

use super::{Chain, Compressed, Extent, Format, Image, ImageError, Inspected};
use crate::format::MAX_DISK_SIZE;
use crate::source::Source;

pub(super) struct Raw {
    size: u64,
}

impl Raw {
    pub(super) fn new(source: &dyn Source) -> Self {
        Self { size: source.size() }
    }
}

pub(super) fn inspect(file_size: u64, chain: Chain) -> Result<Inspected, ImageError> {
    if file_size > MAX_DISK_SIZE {
        return Err(super::too_big(Format::Raw, file_size));
    }
    match chain {
        Chain::Alone => Ok(Inspected { size: file_size, unit: 1, method: None, backing_named: None }),
        Chain::OnBacking => {
            let why = "a backing image was given, but a raw image has none";
            Err(ImageError::refused(Format::Raw, why, "omit the backing image"))
        }
    }
}

impl Image for Raw {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent(&self, offset: u64, len: u64) -> Result<(Extent, u64), ImageError> {
        let left = self.size.saturating_sub(offset);
        if left == 0 {
            return Ok((Extent::Zero, len));
        }
        Ok((Extent::Plain { at: offset }, len.min(left)))
    }

    fn inflate(&self, _what: &Compressed, out: &mut Vec<u8>) -> Result<(), ImageError> {
        out.clear();
        Err(ImageError::invalid(Format::Raw, "a raw image has no compressed clusters"))
    }
}
