//! Makes the index of a chain: merges the map of its top layer over the index of the layers below.

use std::io;
use std::sync::Arc;

use super::index::{Index, Name};
use super::{IndexIo, LayerError};
use crate::delta::survey::Survey;
use crate::delta::{Delta, DeltaSpec};
use crate::format::BLOCK;
use crate::format::extents::{Extent, IndexHeader, LEAF_EXTENTS, MOST_LAYERS, PAGE, Where};
use crate::format::extents::{encode_leaf, encode_table, leaf_at};
use crate::format::journal::State;
use crate::format::layout::{index_path, staged};
use crate::io::{Medium, MediumFile, Open};
use crate::mutant::limit;

/// Leaves that are written at a time.
const WRITTEN_AT_ONCE: usize = 64;

/// Makes the index of a chain of layers, the lowest first. The highest index of the layers below that the store has is
/// used. Indexes in between are not kept. Takes memory for the map of one layer at a time, however many there are, and for
/// an index that cannot be written.
///
/// # Errors
/// When a map file cannot be read.
pub(super) fn build(specs: &[DeltaSpec], io: &IndexIo) -> Result<Index, LayerError> {
    let numbers: Vec<u64> = specs.iter().map(|spec| spec.disk).collect();
    if specs.len() > MOST_LAYERS {
        let error = io::Error::other("its chain has too many layers");
        return Err(LayerError::io(numbers[specs.len() - 1], "making the index")(error));
    }
    let stored = |count: usize| Index::open(io, &numbers[..count]).ok().flatten().map(|index| (count, index));
    // An index may be damaged in a leaf that only the merge reads.
    if let Some((count, index)) = (1..specs.len()).rev().find_map(stored)
        && let Ok(merged) = build_over(Some(index), count, specs, &numbers, io)
    {
        return Ok(merged);
    }
    build_over(None, 0, specs, &numbers, io)
}

/// Merges the layers from the place `from` on over the index of those below.
fn build_over(
    mut lower: Option<Index>,
    from: usize,
    specs: &[DeltaSpec],
    numbers: &[u64],
    io: &IndexIo,
) -> Result<Index, LayerError> {
    for (place, spec) in specs.iter().enumerate().skip(from) {
        lower = Some(merge(spec, &numbers[..=place], numbers[specs.len() - 1], lower.as_ref(), io)?);
    }
    lower.ok_or_else(|| LayerError::io(0, "making the index")(io::ErrorKind::InvalidInput.into()))
}

/// Merges the map of a layer over an index. `top` is the layer whose index is wanted at last.
fn merge(
    spec: &DeltaSpec,
    numbers: &[u64],
    top: u64,
    lower: Option<&Index>,
    io: &IndexIo,
) -> Result<Index, LayerError> {
    let (layer, medium) = (spec.disk, &io.medium);
    let survey =
        Delta::survey_durable(spec, &**medium).map_err(|source| LayerError::Map { layer, source })?;
    let merge = Merge { layer, slot: (numbers.len() - 1) as u16, survey: &survey, lower };
    let fail = || LayerError::io(layer, "writing the index");
    let to_file = || {
        let mut writer = IndexWriter::start(medium.clone(), layer, top).map_err(fail())?;
        merge.run(&mut |start, place| writer.put(start, place))?;
        let file = writer.finish(numbers, survey.size).map_err(fail())?;
        let name = if layer == top { Name::Given } else { Name::None };
        Index::read((file, name), numbers, layer, io)
    };
    to_file().or_else(|error| {
        // Memory is found where a guest would get an error.
        let mut extents = Vec::new();
        merge.run(&mut |start, place| {
            extents.push(Extent::new(start, place));
            Ok(())
        })?;
        tracing::warn!(%error, "the index of a layer cannot be written; it is kept in memory");
        Ok(Index::in_memory(extents, io))
    })
}

/// Takes the beginnings of extents, in order.
type Put<'a> = &'a mut dyn FnMut(u64, Where) -> io::Result<()>;

/// The map of a layer over the index of the layers below.
struct Merge<'a> {
    layer: u64,
    slot: u16,
    survey: &'a Survey<'a>,
    lower: Option<&'a Index>,
}

impl Merge<'_> {
    /// Puts the extents, neighbours of one kind as one.
    fn run(&self, put: Put<'_>) -> Result<(), LayerError> {
        let size = self.survey.size;
        let mut last = None;
        let mut put = |start, place| match last.replace(place) {
            Some(before) if before == place => Ok(()),
            _ => put(start, place),
        };
        let (mut at, mut done) = (0, Ok(()));
        self.survey.runs(&mut |run| {
            let (from, to) = ((run.first * BLOCK).min(size), (run.end * BLOCK).min(size));
            let place = if run.state == State::Data { Where::Layer(self.slot) } else { Where::Zero };
            if done.is_ok() && from < to {
                done = self.show_below(at, from, &mut put);
                done =
                    std::mem::replace(&mut done, Ok(())).and_then(|()| put(from, place).map_err(self.fail()));
                at = to;
            }
        });
        done?;
        self.show_below(at, size, &mut put)?;
        put(size, Where::Zero).map_err(self.fail())
    }

    fn fail(&self) -> impl FnOnce(io::Error) -> LayerError {
        LayerError::io(self.layer, "writing the index")
    }

    /// Puts what shows through a range in which the layer has nothing.
    fn show_below(&self, from: u64, to: u64, put: Put<'_>) -> Result<(), LayerError> {
        let border = self.survey.overlap.clamp(from, to);
        let mut at = from;
        while at < border {
            let (place, stop) = self.lower.map_or(Ok((Where::Below, border)), |lower| lower.find(at))?;
            put(at, place).map_err(self.fail())?;
            at = stop.min(border);
        }
        if border < to { put(border, Where::Zero).map_err(self.fail()) } else { Ok(()) }
    }
}

/// Writes an index beside the place of the index that is wanted, and puts it there at the end when it is that one. The
/// file of another one has no name in the end, so that no two threads write one file.
///
/// Nothing of it is synced: what a power cut loses does not match the checksums, and the index is made again.
struct IndexWriter {
    medium: Arc<dyn Medium>,
    layer: u64,
    top: u64,
    nonce: u64,
    file: Arc<dyn MediumFile>,
    leaf: Vec<Extent>,
    firsts: Vec<Extent>,
    /// Leaves that are not written yet.
    pages: Vec<u8>,
    written: u64,
    is_kept: bool,
}

impl IndexWriter {
    fn start(medium: Arc<dyn Medium>, layer: u64, top: u64) -> io::Result<Self> {
        let mut nonce = [0; 8];
        getrandom::fill(&mut nonce).map_err(|e| io::Error::other(e.to_string()))?;
        let file = medium.open(&staged(&index_path(top)), Open::Create)?;
        file.set_len(0)?;
        Ok(Self {
            medium,
            layer,
            top,
            nonce: u64::from_le_bytes(nonce),
            file,
            leaf: Vec::new(),
            firsts: Vec::new(),
            pages: Vec::new(),
            written: 0,
            is_kept: false,
        })
    }

    /// Begins an extent at `start`, where the one before ends.
    fn put(&mut self, start: u64, place: Where) -> io::Result<()> {
        self.leaf.push(Extent::new(start, place));
        // Tests use small leaves.
        if self.leaf.len() >= limit(LEAF_EXTENTS as u64, 3) as usize { self.end_leaf() } else { Ok(()) }
    }

    fn end_leaf(&mut self) -> io::Result<()> {
        let number = self.firsts.len() as u64;
        self.firsts.extend(self.leaf.first());
        self.pages.extend_from_slice(&encode_leaf(self.nonce, number, &self.leaf));
        self.leaf.clear();
        if self.pages.len() >= WRITTEN_AT_ONCE * PAGE { self.write_pages() } else { Ok(()) }
    }

    fn write_pages(&mut self) -> io::Result<()> {
        self.file.write_at(&self.pages, leaf_at(self.written))?;
        self.written = self.firsts.len() as u64;
        self.pages.clear();
        Ok(())
    }

    fn finish(mut self, layers: &[u64], end: u64) -> io::Result<Arc<dyn MediumFile>> {
        if !self.leaf.is_empty() {
            self.end_leaf()?;
        }
        self.write_pages()?;
        let header = IndexHeader {
            layer: self.layer,
            nonce: self.nonce,
            end,
            leaves: self.firsts.len() as u64,
            layers: layers.len() as u16,
        };
        self.file.write_at(&encode_table(self.nonce, layers, &self.firsts), header.table_at())?;
        self.file.write_at(&header.encode(), 0)?;
        if self.layer == self.top {
            let path = index_path(self.top);
            self.medium.rename(&staged(&path), &path)?;
            self.is_kept = true;
        }
        Ok(self.file.clone())
    }
}

impl Drop for IndexWriter {
    fn drop(&mut self) {
        if !self.is_kept {
            let _ = self.medium.remove(&staged(&index_path(self.top)));
        }
    }
}
