//! Looks up extents in the index of a layer.
//!
//! What must hold: an index takes little memory: it is kept whole when it is small, and otherwise the memory holds eight
//! bytes for each 511 extents and some leaves.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use super::files::PooledFile;
use super::memory::{Counted, File};
use super::{IndexIo, LayerError};
use crate::format::FormatError;
use crate::format::extents::{Extent, IndexHeader, PAGE, Where, decode_leaf, decode_table, leaf_at};
use crate::format::layout::index_path;
use crate::io::{MediumFile, Open};
use crate::mutant::limit;

/// Leaves of an index that is kept in memory: 256 KiB.
const KEPT_LEAVES: u64 = 64;
/// Leaves of a larger one that stay in memory.
const RECENT_LEAVES: usize = 16;

/// See the module.
pub(super) struct Index {
    extents: Extents,
    memory: Counted,
}

enum Extents {
    /// All of them.
    Kept(Vec<Extent>),
    /// They are read from a file, leaf by leaf.
    Paged(Box<Paged>),
}

/// The extents of a large index.
struct Paged {
    header: IndexHeader,
    file: IndexFile,
    /// The first extent of each leaf.
    firsts: Vec<Extent>,
    /// Leaves that were used lately, each at its number modulo the length.
    recent: [Mutex<Option<(u64, Leaf)>>; RECENT_LEAVES],
}

/// The file of a large index.
enum IndexFile {
    /// It has a name, and may be closed between two reads. Another file under that name has another nonce.
    Named(PooledFile),
    /// The index is needed while another one is made, and its file has no name.
    Nameless(Arc<dyn MediumFile>),
}

impl IndexFile {
    fn get(&self) -> io::Result<Arc<dyn MediumFile>> {
        match self {
            Self::Named(file) => file.get(),
            Self::Nameless(file) => Ok(file.clone()),
        }
    }

    fn get_now(&self) -> Option<Arc<dyn MediumFile>> {
        match self {
            Self::Named(file) => file.get_now(),
            Self::Nameless(file) => Some(file.clone()),
        }
    }
}

/// Whether the file of an index has its name in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    Given,
    None,
}

type Leaf = Arc<[Extent]>;

impl Paged {
    fn new(header: IndexHeader, file: IndexFile, firsts: Vec<Extent>) -> Self {
        Self { header, file, firsts, recent: [const { Mutex::new(None) }; RECENT_LEAVES] }
    }

    /// The leaf that contains `offset`.
    fn leaf_of(&self, offset: u64) -> u64 {
        self.firsts.partition_point(|first| first.start() <= offset).saturating_sub(1) as u64
    }

    fn slot(&self, leaf: u64) -> &Mutex<Option<(u64, Leaf)>> {
        &self.recent[leaf as usize % RECENT_LEAVES]
    }

    fn recent(&self, leaf: u64) -> Option<Leaf> {
        let slot = self.slot(leaf).try_lock()?;
        slot.as_ref().filter(|(number, _)| *number == leaf).map(|(_, extents)| extents.clone())
    }

    fn decode(&self, leaf: u64, page: &[u8; PAGE]) -> Result<Leaf, FormatError> {
        let extents: Leaf = decode_leaf(&self.header, leaf, page)?.into();
        if let Some(mut slot) = self.slot(leaf).try_lock() {
            *slot = Some((leaf, extents.clone()));
        }
        Ok(extents)
    }

    fn leaf(&self, leaf: u64) -> Result<Leaf, LayerError> {
        if let Some(extents) = self.recent(leaf) {
            return Ok(extents);
        }
        let layer = self.header.layer;
        let mut page = [0; PAGE];
        let got = self.file.get().and_then(|file| file.read_at(&mut page, leaf_at(leaf)));
        got.map_err(LayerError::io(layer, "reading the index"))?;
        self.decode(leaf, &page).map_err(LayerError::index(layer))
    }

    fn leaf_now(&self, leaf: u64) -> Option<Leaf> {
        if let Some(extents) = self.recent(leaf) {
            return Some(extents);
        }
        let mut page = [0; PAGE];
        let got = self.file.get_now()?.read_now(&mut page, leaf_at(leaf)).ok()??;
        if got == PAGE { self.decode(leaf, &page).ok() } else { None }
    }
}

fn bytes_of(extents: &[Extent]) -> u64 {
    size_of_val(extents) as u64
}

/// The extent of `extents` that contains `offset`, and where it ends. `after`: the extent behind them, if any.
fn look(extents: &[Extent], after: Option<&Extent>, offset: u64) -> (Where, u64) {
    let next = extents.partition_point(|extent| extent.start() <= offset);
    let place = next.checked_sub(1).map_or(Where::Zero, |at| extents[at].place());
    (place, extents.get(next).or(after).map_or(u64::MAX, |next| next.start()))
}

impl Index {
    /// Opens the index of the chain of these layers, the lowest first; `None` when there is none.
    ///
    /// # Errors
    /// When it is damaged, or of other layers.
    pub(super) fn open(io: &IndexIo, layers: &[u64]) -> Result<Option<Self>, LayerError> {
        let Some(layer) = layers.last().copied() else { return Ok(None) };
        let file = match io.medium.open(&index_path(layer), Open::Existing) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(LayerError::io(layer, "opening the index"))?,
        };
        Self::read((file, Name::Given), layers, layer, io).map(Some)
    }

    /// Reads what an index needs in memory.
    pub(super) fn read(
        (file, name): (Arc<dyn MediumFile>, Name),
        layers: &[u64],
        layer: u64,
        io: &IndexIo,
    ) -> Result<Self, LayerError> {
        let fail = || LayerError::io(layer, "reading the index");
        let len = file.len().map_err(fail())?;
        let mut page = vec![0; PAGE];
        let got = file.read_at(&mut page, 0).map_err(fail())?;
        let header = IndexHeader::decode(&page[..got], len).map_err(LayerError::index(layer))?;
        let mut table = vec![0; header.table_len()];
        let got = file.read_at(&mut table, header.table_at()).map_err(fail())?;
        let (numbers, firsts) = decode_table(&header, &table[..got]).map_err(LayerError::index(layer))?;
        if numbers != layers || header.layer != layer {
            let why = format!("it is of the layers {numbers:?}, not of {layers:?}");
            return Err(LayerError::io(layer, "opening the index")(io::Error::other(why)));
        }
        let is_large = header.leaves > limit(KEPT_LEAVES, 1);
        let file = if is_large && name == Name::Given {
            let (path, medium) = (index_path(layer), io.medium.clone());
            IndexFile::Named(PooledFile::opened(file, path, medium, io.files.clone()))
        } else {
            IndexFile::Nameless(file)
        };
        let paged = Box::new(Paged::new(header, file, firsts));
        if is_large {
            // The leaves that it keeps count as if it had them.
            let leaves = header.leaves.min(RECENT_LEAVES as u64) * PAGE as u64;
            let memory = io.memory.count(bytes_of(&paged.firsts) + leaves, File::Written);
            return Ok(Self { extents: Extents::Paged(paged), memory });
        }
        let leaves = (0..header.leaves).map(|leaf| paged.leaf(leaf)).collect::<Result<Vec<_>, _>>()?;
        let extents = leaves.concat();
        let memory = io.memory.count(bytes_of(&extents), File::Written);
        Ok(Self { extents: Extents::Kept(extents), memory })
    }

    /// An index that no file has.
    pub(super) fn in_memory(mut extents: Vec<Extent>, io: &IndexIo) -> Self {
        extents.shrink_to_fit();
        let memory = io.memory.count(bytes_of(&extents), File::Unwritten);
        Self { extents: Extents::Kept(extents), memory }
    }

    /// Whether it is in memory because it could not be written.
    pub(super) fn is_unwritten(&self) -> bool {
        self.memory.is_unwritten()
    }

    /// Where the bytes at `offset` are, and where that extent ends.
    ///
    /// # Errors
    /// When the index cannot be read or is damaged.
    pub(super) fn find(&self, offset: u64) -> Result<(Where, u64), LayerError> {
        match &self.extents {
            Extents::Kept(extents) => Ok(look(extents, None, offset)),
            Extents::Paged(paged) => {
                let leaf = paged.leaf_of(offset);
                Ok(look(&paged.leaf(leaf)?, paged.firsts.get(leaf as usize + 1), offset))
            }
        }
    }

    /// As [`Index::find`], if that needs no waiting.
    pub(super) fn find_now(&self, offset: u64) -> Option<(Where, u64)> {
        match &self.extents {
            Extents::Kept(extents) => Some(look(extents, None, offset)),
            Extents::Paged(paged) => {
                let leaf = paged.leaf_of(offset);
                Some(look(&paged.leaf_now(leaf)?, paged.firsts.get(leaf as usize + 1), offset))
            }
        }
    }
}
