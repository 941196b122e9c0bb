//! Sealed layers: what disks and snapshots share, and what never changes.
//!
//! A [`Chain`] is a layer with all layers below it. Its *index* says for each byte which layer has it, so that a read
//! costs the same however many layers there are. The index is made of the map files of the layers, once, and shared by
//! all disks that stand on the same layer. What must hold: an index is never trusted more than the map files. Where its
//! bytes are damaged or gone, it is made again, and a reader notices nothing (D76).

mod build;
mod error;
mod files;
mod index;
mod memory;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use build::build;
pub use error::LayerError;
use files::{OpenFiles, PooledFile};
use index::Index;
use memory::IndexMemory;
pub use memory::MemorySums;

use crate::crypt::Cipher;
use crate::delta::DeltaSpec;
use crate::format::BLOCK;
use crate::format::extents::Where;
use crate::format::layout::data_path;
use crate::io::Medium;

/// The data file of a layer. It is opened when it is read.
pub struct LayerFile {
    number: u64,
    data: PooledFile,
}

impl LayerFile {
    /// Number of the layer.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Reads bytes that the layer has. Bytes of the disk's last block past the end of the file are zeros.
    ///
    /// # Errors
    /// A file that is too short; errors of the storage.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> Result<(), LayerError> {
        let fail = || LayerError::io(self.number, "reading the data file");
        let data = self.data.get().map_err(LayerError::io(self.number, "opening the data file"))?;
        let got = data.read_at(buf, offset).map_err(fail())?;
        if got < buf.len() {
            // The last block of a disk may be a part of one. But the file has a part of it.
            let last = (offset + buf.len() as u64 - 1) / BLOCK * BLOCK;
            let len = data.len().map_err(fail())?;
            if len <= last {
                let why =
                    format!("it has {len} bytes, but the layer has data at {last}; restore it from a backup");
                return Err(fail()(io::Error::new(io::ErrorKind::UnexpectedEof, why)));
            }
            buf[got..].fill(0);
        }
        Ok(())
    }

    /// As [`LayerFile::read`], if all bytes are in memory; otherwise false.
    pub fn read_now(&self, buf: &mut [u8], offset: u64) -> bool {
        // A file that is not open may have to wait for the store.
        self.data.get_now().is_some_and(|data| matches!(data.read_now(buf, offset), Ok(Some(_))))
    }
}

/// Where bytes of a chain are.
#[derive(Clone)]
pub enum Part<'a> {
    /// Nowhere: zeros.
    Zero,
    /// In what lies below the chain.
    Below,
    /// In a layer.
    Layer(&'a LayerFile),
}

/// What an index needs of its store.
#[derive(Clone)]
struct IndexIo {
    medium: Arc<dyn Medium>,
    files: Arc<OpenFiles>,
    memory: Arc<IndexMemory>,
}

/// A layer with all layers below it.
pub struct Chain {
    specs: Vec<DeltaSpec>,
    io: IndexIo,
    /// By their position in the table of an index: the lowest first.
    files: Vec<Arc<LayerFile>>,
    index: RwLock<Arc<Index>>,
    /// Held while this index is made.
    building: Arc<Mutex<()>>,
}

impl std::fmt::Debug for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Chain").field("layers", &self.numbers()).finish_non_exhaustive()
    }
}

impl Chain {
    /// Opens the index of a chain, or makes it. `specs`: the layers, the lowest first; all are sealed. The caller holds
    /// `building`.
    fn open(
        layers: &Layers,
        specs: Vec<DeltaSpec>,
        medium: Arc<dyn Medium>,
        building: Arc<Mutex<()>>,
        cipher: &dyn Fn(u64) -> Cipher,
    ) -> Result<Self, LayerError> {
        let numbers: Vec<u64> = specs.iter().map(|spec| spec.disk).collect();
        let files = numbers.iter().map(|number| layers.file(*number, &medium, cipher)).collect();
        let io = IndexIo { medium, files: layers.open_files.clone(), memory: layers.memory.clone() };
        let index = match Index::open(&io, &numbers) {
            Ok(Some(index)) => index,
            Ok(None) => build(&specs, &io)?,
            Err(error) => {
                tracing::warn!(%error, "the index of a layer cannot be used; it is made again");
                build(&specs, &io)?
            }
        };
        Ok(Self { specs, io, files, index: RwLock::new(Arc::new(index)), building })
    }

    /// Number of the layer at the top.
    pub fn number(&self) -> u64 {
        self.specs.last().map_or(0, |spec| spec.disk)
    }

    /// Numbers of its layers, the lowest first.
    pub fn numbers(&self) -> Vec<u64> {
        self.specs.iter().map(|spec| spec.disk).collect()
    }

    fn part(&self, place: Where) -> Part<'_> {
        match place {
            Where::Zero => Part::Zero,
            Where::Below => Part::Below,
            Where::Layer(slot) => Part::Layer(&self.files[usize::from(slot)]),
        }
    }

    /// Where the bytes from `offset` on are, and where that extent ends, at most `end`.
    ///
    /// # Errors
    /// When neither the index nor the map files can be read.
    pub fn extent(&self, offset: u64, end: u64) -> Result<(Part<'_>, u64), LayerError> {
        let index = self.index.read().clone();
        let found = match index.find(offset) {
            Ok(found) => found,
            Err(error) => self.healed(&index, &error)?.find(offset)?,
        };
        let (place, stop) = found;
        Ok((self.part(place), stop.min(end)))
    }

    /// As [`Chain::extent`], if that needs no waiting.
    pub fn extent_now(&self, offset: u64, end: u64) -> Option<(Part<'_>, u64)> {
        let (place, stop) = self.index.try_read()?.find_now(offset)?;
        Some((self.part(place), stop.min(end)))
    }

    /// Makes the index again, unless another thread has done so meanwhile.
    fn healed(&self, broken: &Arc<Index>, error: &LayerError) -> Result<Arc<Index>, LayerError> {
        let _building = self.building.lock();
        let now = self.index.read().clone();
        if !Arc::ptr_eq(&now, broken) {
            return Ok(now);
        }
        tracing::warn!(%error, "the index of a layer is damaged; it is made again");
        let index = Arc::new(build(&self.specs, &self.io)?);
        *self.index.write() = index.clone();
        Ok(index)
    }

    /// Tries again to write an index that only the memory has. Returns whether a file has it.
    fn write_index(&self) -> bool {
        if !self.index.read().is_unwritten() {
            return true;
        }
        let _building = self.building.lock();
        match build(&self.specs, &self.io) {
            Ok(index) if !index.is_unwritten() => {
                *self.index.write() = Arc::new(index);
                true
            }
            _ => false,
        }
    }
}

/// The open layers of a store. Disks that stand on the same layers share them.
#[derive(Default)]
pub struct Layers {
    files: Mutex<HashMap<u64, Weak<LayerFile>>>,
    /// By the layer at the top and all layers below it: disks may have put different ones below the same layer.
    chains: Mutex<HashMap<Vec<u64>, Weak<Chain>>>,
    /// By the layer. Held while its index is opened or made: two disks on one layer make it once, and no two write one
    /// file. Disks on other layers do not wait for it.
    building: Mutex<HashMap<u64, Arc<Mutex<()>>>>,
    memory: Arc<IndexMemory>,
    open_files: Arc<OpenFiles>,
}

impl Layers {
    /// Sets how many files of layers are open at a time, beside those that are being read.
    pub fn open_at_most(&self, files: usize) {
        self.open_files.set_most(files);
    }

    /// The memory of its indexes.
    pub fn memory(&self) -> MemorySums {
        self.memory.sums()
    }

    /// Whether there is memory for an index that could not be written. When there is none, tries to write those that the
    /// memory has. The caller holds no `building`.
    pub fn has_room(&self) -> bool {
        let is_over = || {
            let MemorySums { unwritten, limit, .. } = self.memory.sums();
            unwritten > limit
        };
        if is_over() {
            let chains: Vec<_> = self.chains.lock().values().filter_map(Weak::upgrade).collect();
            // Where one cannot be written, neither can the others.
            let _ = chains.iter().all(|chain| chain.write_index());
        }
        !is_over()
    }

    /// Sets how many bytes of unwritten indexes there may be.
    #[cfg(test)]
    pub fn bound_unwritten(&self, limit: u64) {
        self.memory.set_limit(limit);
    }

    fn file(&self, number: u64, medium: &Arc<dyn Medium>, cipher: &dyn Fn(u64) -> Cipher) -> Arc<LayerFile> {
        let mut files = self.files.lock();
        if let Some(file) = files.get(&number).and_then(Weak::upgrade) {
            return file;
        }
        let data = PooledFile::new(data_path(number), medium.clone(), self.open_files.clone());
        let data = data.stored_with(cipher(number));
        let file = Arc::new(LayerFile { number, data });
        files.retain(|_, file| file.strong_count() > 0);
        files.insert(number, Arc::downgrade(&file));
        file
    }

    /// Whether a disk or a reader of a snapshot has the layer open.
    pub fn is_open(&self, number: u64) -> bool {
        self.files.lock().get(&number).is_some_and(|file| file.strong_count() > 0)
    }

    fn opened(&self, numbers: &[u64]) -> Option<Arc<Chain>> {
        self.chains.lock().get(numbers).and_then(Weak::upgrade)
    }

    /// The chain of sealed layers `specs`, the lowest first; `None` when there are none.
    ///
    /// # Errors
    /// When there is no index, and a map file cannot be read.
    pub fn chain(
        &self,
        specs: Vec<DeltaSpec>,
        medium: Arc<dyn Medium>,
    ) -> Result<Option<Arc<Chain>>, LayerError> {
        self.chain_with(specs, medium, &|_| Cipher::Plain)
    }

    /// As [`Layers::chain`]; `cipher` says how the bytes of each layer are stored.
    ///
    /// # Errors
    /// As [`Layers::chain`].
    pub fn chain_with(
        &self,
        specs: Vec<DeltaSpec>,
        medium: Arc<dyn Medium>,
        cipher: &dyn Fn(u64) -> Cipher,
    ) -> Result<Option<Arc<Chain>>, LayerError> {
        let Some(top) = specs.last().map(|spec| spec.disk) else { return Ok(None) };
        let numbers: Vec<u64> = specs.iter().map(|spec| spec.disk).collect();
        if let Some(chain) = self.opened(&numbers) {
            return Ok(Some(chain));
        }
        let building = self.building(top);
        let _building = building.lock();
        if let Some(chain) = self.opened(&numbers) {
            return Ok(Some(chain));
        }
        let chain = Arc::new(Chain::open(self, specs, medium, building.clone(), cipher)?);
        let mut chains = self.chains.lock();
        chains.retain(|_, chain| chain.strong_count() > 0);
        chains.insert(numbers, Arc::downgrade(&chain));
        Ok(Some(chain))
    }

    fn building(&self, layer: u64) -> Arc<Mutex<()>> {
        let mut building = self.building.lock();
        building.retain(|_, held| Arc::strong_count(held) > 1);
        building.entry(layer).or_default().clone()
    }
}
