//! Reads the state from which a delta opens: the live map of an earlier worker, or the map file.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::sync::atomic::Ordering;

use super::carry::{CarryState, place_carried};
use super::commit::MapFileState;
use super::load::{DataEnd, data_end};
use super::map::LiveMap;
use super::{Delta, DeltaError, DeltaIo, DeltaSpec};
use crate::format::journal::{Expected, Journal, ReadError, WordSink};
use crate::format::layout::{data_path, map_path};
use crate::format::{BLOCK, FormatError, Kind, MAX_DISK_SIZE};
use crate::io::{LiveArena, LiveFile, LiveHeader, Medium, MediumFile, Open, sys};

const LIVE_MAGIC: u64 = 0x0001_4556_494c_594c; // "LYLIVE", layout 1

/// Checks that the data file has the blocks before `end`, which the map file claims.
pub(super) fn check_data(end: DataEnd, data: Option<&dyn MediumFile>, file: &str) -> Result<(), DeltaError> {
    let end = end.block();
    if end == 0 {
        return Ok(());
    }
    let has = data.map_or(Ok(0), MediumFile::len).map_err(DeltaError::io("opening the data file"))?;
    let needs = (end - 1) * BLOCK;
    if has > needs { Ok(()) } else { Err(DeltaError::DataMissing { file: file.into(), has, needs }) }
}

/// Checks the numbers of a live map, which has no checksum. Impossible numbers would lead to a map file that cannot be
/// read.
pub(super) fn check_live(live: &LiveFile, spec: &DeltaSpec) -> Result<(), DeltaError> {
    let word = |word| live.header(word).load(Ordering::Acquire);
    let (size, overlap, pending) =
        (word(LiveHeader::Size), word(LiveHeader::Overlap), word(LiveHeader::PendingShrink));
    let most = if spec.rises { size } else { size.min(spec.overlap) };
    let pages = live.pages(0).last().map_or(0, |last| last + 1);
    let why = if size > MAX_DISK_SIZE || overlap > most || pending > size + 1 {
        format!("size {size}, overlap {overlap}, pending shrink to {}", pending.wrapping_sub(1))
    } else if pages > LiveMap::PAGES_OF_LARGEST_DISK {
        format!("page {} is past the end of the largest disk", pages - 1)
    } else {
        return Ok(());
    };
    let source = FormatError { kind: Kind::Value, structure: "live map", detail: why };
    Err(DeltaError::Damaged { file: format!("{}.live", spec.disk), source })
}

/// Whether a worker of this version can take over a live map with this magic. The upper 16 bits are the layout.
fn check_layout(disk: u64, magic: u64) -> Result<(), DeltaError> {
    const NAME: u64 = (1 << 48) - 1;
    if magic & NAME == LIVE_MAGIC & NAME && magic != LIVE_MAGIC {
        let (has, knows) = (magic >> 48, LIVE_MAGIC >> 48);
        return Err(DeltaError::LiveLayout { disk, has, knows });
    }
    Ok(())
}

pub(super) fn is_ours(live: &LiveFile, spec: &DeltaSpec, data: (u64, u64)) -> Result<bool, DeltaError> {
    let word = |word| live.header(word).load(Ordering::Acquire);
    check_layout(spec.disk, word(LiveHeader::Magic))?;
    let inode = (word(LiveHeader::Device), word(LiveHeader::Inode));
    let ours = word(LiveHeader::Magic) == LIVE_MAGIC
        && word(LiveHeader::Disk) == spec.disk
        && word(LiveHeader::Boot) == sys::boot_number()
        && (inode == data || inode.1 == 0);
    if !ours {
        tracing::warn!(
            disk = spec.disk,
            "the live map belongs to other files than those of the store; it is ignored"
        );
    }
    Ok(ours)
}

/// The error epochs of a live map that was given up because the drive with the files was gone (D89); `None` when it is not
/// such a map.
pub(super) fn epochs_of_given_up(live: &LiveFile, spec: &DeltaSpec) -> Option<(u64, u64)> {
    let word = |word| live.header(word).load(Ordering::Acquire);
    let is_given_up = word(LiveHeader::Device) == u64::MAX
        && word(LiveHeader::Inode) == u64::MAX
        && word(LiveHeader::Disk) == spec.disk
        && word(LiveHeader::Boot) == sys::boot_number();
    is_given_up.then(|| (word(LiveHeader::ErrorEpoch), word(LiveHeader::OpenedEpoch)))
}

impl Delta {
    /// Whether this version can take over the live maps of an arena. Another worker may be using the arena.
    ///
    /// # Errors
    /// `LiveLayout` when one has another layout; errors of the storage.
    pub fn probe_arena(arena: &File) -> Result<(), DeltaError> {
        let maps = LiveArena::list(arena).map_err(DeltaError::io("reading the arena of live maps"))?;
        maps.into_iter().try_for_each(|(disk, magic)| check_layout(disk, magic))
    }

    /// Whether this version can take over the live maps in `dir`. Another worker may be using them.
    ///
    /// # Errors
    /// `LiveLayout` when one has another layout; errors of the storage.
    pub fn probe_live(dir: &Path) -> Result<(), DeltaError> {
        let fail = || DeltaError::io("reading a live map");
        let entries = match std::fs::read_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(fail())?,
        };
        for entry in entries {
            let name = entry.map_err(fail())?.file_name();
            let disk = name.to_str().and_then(|n| n.strip_suffix(".live")).and_then(|n| n.parse().ok());
            let Some(disk) = disk else { continue };
            let mut magic = [0; 8];
            match std::fs::File::open(dir.join(&name)).and_then(|mut file| file.read_exact(&mut magic)) {
                // It was removed just now.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => other.map_err(fail())?,
            }
            check_layout(disk, u64::from_le_bytes(magic))?;
        }
        Ok(())
    }
}

impl Delta {
    /// Reads the files from which a delta without a live map would open. Changes nothing.
    ///
    /// # Errors
    /// As [`Delta::open`].
    pub fn check_files(spec: &DeltaSpec, medium: &dyn Medium) -> Result<(), DeltaError> {
        let (journal, commit) = open_map_file::<()>(spec, medium)?;
        let end = match (&journal, &commit.file) {
            (Some(journal), Some(file)) => {
                data_end(journal, &**file, &map_path(spec.disk, spec.root.generation))?
            }
            _ => DataEnd::default(),
        };
        let data = match medium.open(&data_path(spec.disk), Open::Existing) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            other => Some(other.map_err(DeltaError::io("opening the data file"))?),
        };
        check_data(end, data.as_deref(), &data_path(spec.disk))
    }
}

/// Opens the map file that the record names, and reads it; `M` is what becomes of its words.
pub(super) fn open_map_file<M: WordSink>(
    spec: &DeltaSpec,
    medium: &dyn Medium,
) -> Result<(Option<Journal<M>>, MapFileState), DeltaError> {
    let root = spec.root;
    if root.generation == 0 {
        let bounds = (spec.size, spec.overlap);
        return Ok((None, MapFileState { rewrite: true, bounds, ..MapFileState::default() }));
    }
    let name = map_path(spec.disk, root.generation);
    let fail = || DeltaError::io("opening the map file");
    let file = medium.open(&name, Open::Existing).map_err(fail())?;
    let len = file.len().map_err(fail())?;
    let expected = Expected {
        disk: spec.disk,
        generation: root.generation,
        floor: root.floor,
        size: spec.size,
        overlap: spec.overlap,
        modified_ns: spec.modified_ns,
    };
    let journal =
        Journal::<M>::read_with(|buf, at| file.read_at(buf, at), len, &expected).and_then(|journal| {
            let why = match journal.raised {
                // Where no copy shows what lies below, a larger overlap would show the base again where the disk was cut.
                Some(raised) if !spec.rises => {
                    format!("record {} has a larger overlap than the record before it", raised.seq)
                }
                _ if journal.records == 0 => "it has no record".to_owned(),
                _ => return Ok(journal),
            };
            Err(FormatError { kind: Kind::Value, structure: "map file", detail: why }.into())
        });
    let journal = match journal {
        Ok(journal) => journal,
        Err(ReadError::Format(source)) => return Err(DeltaError::Damaged { file: name, source }),
        Err(ReadError::Source(error)) => return Err(DeltaError::io("reading the map file")(error)),
    };
    let bounds = (journal.size, journal.overlap);
    let commit = MapFileState {
        root,
        last_started: root.generation,
        file: Some(file),
        nonce: journal.header.nonce,
        tail: journal.end,
        zeroed_to: if journal.torn { journal.end } else { len },
        // The length of the file at its last rewrite is not recorded.
        base_len: journal.ordered_len,
        size_allowance: 0,
        seq: journal.next_seq,
        rewrite: journal.torn,
        maybe_unsynced: false,
        redo_from: None,
        bounds,
        carry: CarryState::of(&journal),
        retired: false,
        sealed: false,
    };
    Ok((Some(journal), commit))
}

/// Creates a live map from the durable state. Checks that the data file has what the map claims.
pub(super) fn replay(
    spec: &DeltaSpec,
    delta_io: &DeltaIo,
    durable: Option<(&Journal<()>, &dyn MediumFile)>,
    data: Option<&dyn MediumFile>,
    identity: (u64, u64),
) -> Result<LiveMap, DeltaError> {
    let map = LiveMap::new(delta_io.live.fresh(spec.disk).map_err(DeltaError::io("creating the live map"))?);
    let (mut size, mut overlap, mut modified) = (spec.size, spec.overlap, spec.modified_ns);
    if let Some((journal, file)) = durable {
        (size, overlap, modified) = (journal.size, journal.overlap, journal.modified_ns);
        let end = map.load(journal, file, &map_path(spec.disk, spec.root.generation))?;
        check_data(end, data, &data_path(spec.disk))?;
        place_carried(spec.disk, journal, (&map, file), data)?;
    }
    let set = |word, value| map.live().header(word).store(value, Ordering::Release);
    set(LiveHeader::Disk, spec.disk);
    set(LiveHeader::Device, identity.0);
    set(LiveHeader::Inode, identity.1);
    set(LiveHeader::Size, size);
    set(LiveHeader::Overlap, overlap);
    set(LiveHeader::Modified, modified as u64);
    set(LiveHeader::Boot, sys::boot_number());
    // No page has a bit.
    map.live().set_tracked();
    set(LiveHeader::Magic, LIVE_MAGIC);
    Ok(map)
}
