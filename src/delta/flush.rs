//! Making a delta durable: the map file, flushes that join, and recovery.

use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex, RwLock};

use super::map::{Captured, LiveMap, Take};
use super::ranges::RangeLock;
use super::{Delta, DeltaError, DeltaSpec, Footing, data_name, map_name};
use crate::format::journal::{Expected, HEADER, Journal, MapHeader, ReadError, Record};
use crate::format::record::MapRoot;
use crate::format::{BLOCK, FormatError, Kind, MAX_DISK_SIZE};
use crate::io::{LiveFile, LiveHeader, MediumFile, Open, sys};

const LIVE_MAGIC: u64 = 0x0001_4556_494c_594c; // "LYLIVE", layout 1
/// A map file is rewritten when it is larger than this and than four times its first record.
const REWRITE: u64 = 256 << 10;
/// Zeros written ahead of the journal's end, so that an append changes no metadata of the filesystem.
const AHEAD: u64 = 16 << 10;

/// Keeps the root of a disk's durable map.
pub trait RootStore: Send + Sync {
    /// Durably replaces the root.
    fn commit(&self, root: MapRoot, modified_ns: i64) -> io::Result<()>;
}

/// State of the map file; who has it may append.
#[derive(Default)]
pub(super) struct Commit {
    root: MapRoot,
    /// Highest generation that a file was written for.
    tried: u64,
    file: Option<Arc<dyn MediumFile>>,
    nonce: u64,
    tail: u64,
    /// The file has zeros up to here.
    filled: u64,
    first: u64,
    seq: u64,
    /// The next flush writes a new map file.
    rewrite: bool,
    /// Size and overlap as the file has them.
    extent: (u64, u64),
}

impl Commit {
    pub(super) fn allocated(&self) -> u64 {
        self.file.as_ref().and_then(|f| f.allocated().ok()).unwrap_or(0)
    }
}

/// Lets concurrent flushes join: one that comes while another runs is served by the next.
#[derive(Default)]
pub(super) struct FlushGate {
    state: Mutex<Gate>,
    changed: Condvar,
}

#[derive(Default)]
struct Gate {
    running: bool,
    /// Flushes begun.
    begun: u64,
    /// Flushes ended, and how the ones that somebody may still wait for ended.
    ended: u64,
    failed: Vec<(u64, i32)>,
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    // Without randomness the clock has to do: the nonce guards against stale bytes, not against enemies.
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        Err(_) => sys::now_ns() as u64,
    }
}

impl Delta {
    /// Opens the delta of a disk: by its live map after a crash of the worker, by its map file after a reboot.
    ///
    /// # Errors
    /// `Damaged` and `DataMissing` when the store does not have what was acknowledged; what the storage says.
    pub fn open(spec: DeltaSpec, footing: Footing) -> Result<Self, DeltaError> {
        let fail = |operation| DeltaError::io(operation);
        let data_name = data_name(spec.disk);
        let data = match footing.medium.open(&data_name, Open::Existing) {
            Ok(file) => Some(file),
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(fail("opening the data file")(e)),
        };
        let identity = match &data {
            Some(data) => data.identity().map_err(fail("opening the data file"))?,
            None => (0, 0),
        };
        let (journal, commit) = open_map_file(&spec, &footing)?;
        let live = footing.live.existing(spec.disk).map_err(fail("opening the live map"))?;
        let live = match live {
            Some(live) if is_ours(&live, &spec, identity)? => Some(live),
            _ => None,
        };
        live.as_ref().map_or(Ok(()), |live| check_live(live, &spec))?;
        let taken_over = live.is_some();
        let map = match live {
            Some(live) => LiveMap::new(live),
            None => {
                // Before the map is made: what does not fit takes no memory.
                check_data(journal.as_ref(), data.as_deref(), &data_name)?;
                replay(&spec, &footing, journal, identity)?
            }
        };
        let delta = Self {
            spec,
            map,
            data: RwLock::new(data),
            ranges: RangeLock::default(),
            commit: Mutex::new(commit),
            gate: FlushGate::default(),
            unsynced: AtomicBool::new(true),
            unlisted: AtomicBool::new(true),
            footing,
        };
        if taken_over {
            if delta.error_epoch() != 0 {
                // A sync failed under an earlier worker: what the map file has in memory may not be on the medium.
                delta.commit.lock().rewrite = true;
            }
            let pending = delta.word(LiveHeader::PendingShrink);
            if pending != 0 {
                delta.shrink(pending - 1)?;
            }
        } else {
            delta.footing.live.publish(delta.spec.disk).map_err(fail("making the live map"))?;
        }
        Ok(delta)
    }

    /// Makes everything durable that was completed before the call.
    ///
    /// # Errors
    /// After a failed sync the error epoch has grown: what was written since the last flush may be lost. ENOSPC
    /// while appending to the map file is not such a failure, the flush can be asked for again.
    pub fn flush(&self) -> Result<(), DeltaError> {
        let mut gate = self.gate.state.lock();
        let mine = gate.begun + 1;
        while gate.running && gate.ended < mine {
            self.gate.changed.wait(&mut gate);
        }
        if gate.ended >= mine {
            return match gate.failed.iter().find(|(n, _)| *n == mine) {
                Some((_, errno)) => {
                    Err(DeltaError::io("flush of a concurrent caller")(io::Error::from_raw_os_error(*errno)))
                }
                None => Ok(()),
            };
        }
        gate.running = true;
        gate.begun = mine;
        drop(gate);
        let result = self.flush_alone();
        let mut gate = self.gate.state.lock();
        gate.running = false;
        gate.ended = mine;
        gate.failed.retain(|(n, _)| *n + 2 > mine);
        if let Err(error) = &result {
            let errno = match error {
                DeltaError::Io { source, .. } => source.raw_os_error().unwrap_or(libc::EIO),
                _ => libc::EIO,
            };
            gate.failed.push((mine, errno));
        }
        drop(gate);
        self.gate.changed.notify_all();
        result
    }

    fn flush_alone(&self) -> Result<(), DeltaError> {
        let mut commit = self.commit.lock();
        let large = commit.tail > REWRITE.max(4 * commit.first);
        let full = commit.rewrite || large;
        let take = if full { Take::All } else { Take::Changed };
        let (captured, extent) = self.map.take(take, || (self.size(), self.overlap()));
        // After the words: a word is set after this flag, so the data of every word taken is synced below.
        let was_unsynced = self.unsynced.swap(false, Ordering::AcqRel);
        let result = (|| {
            if was_unsynced && let Some(data) = self.data.read().clone() {
                data.sync_data().map_err(|e| self.poison("syncing the data file", e))?;
                self.list_data()?;
            }
            if captured.runs.is_empty() && extent == commit.extent {
                return Ok(());
            }
            self.journal(&mut commit, extent, &captured, full)
        })();
        match &result {
            Ok(()) => self.map.done(&captured),
            Err(_) => {
                self.unsynced.store(true, Ordering::Release);
                self.map.failed(&captured);
            }
        }
        result
    }

    /// Makes the directory entry of a new data file durable, once.
    fn list_data(&self) -> Result<(), DeltaError> {
        if self.unlisted.swap(false, Ordering::AcqRel) {
            self.footing.medium.sync_dir("deltas").map_err(|e| {
                self.unlisted.store(true, Ordering::Release);
                self.poison("syncing the directory of the data file", e)
            })?;
        }
        Ok(())
    }

    fn poison(&self, operation: &'static str, source: io::Error) -> DeltaError {
        self.map.live().header(LiveHeader::ErrorEpoch).fetch_add(1, Ordering::AcqRel);
        tracing::error!(disk = self.spec.disk, operation, error = %source, "a flush failed; writes are refused until the disk is opened again");
        DeltaError::Io { operation, source }
    }

    /// Journals a size at once; the caller has the whole range.
    pub(super) fn commit_size(&self, commit: &mut Commit, size: u64, overlap: u64) -> Result<(), DeltaError> {
        if commit.rewrite {
            // The first map file has everything, and what it claims has to be synced.
            let (captured, ()) = self.map.take(Take::All, || ());
            let result =
                self.sync_for_rewrite().and_then(|()| self.journal(commit, (size, overlap), &captured, true));
            match &result {
                Ok(()) => self.map.done(&captured),
                Err(_) => self.map.failed(&captured),
            }
            return result;
        }
        self.journal(commit, (size, overlap), &Captured::default(), false)
    }

    fn sync_for_rewrite(&self) -> Result<(), DeltaError> {
        match self.data.read().clone() {
            Some(data) => data.sync_data().map_err(|e| self.poison("syncing the data file", e)),
            None => Ok(()),
        }
    }

    fn journal(
        &self,
        commit: &mut Commit,
        extent: (u64, u64),
        captured: &Captured,
        full: bool,
    ) -> Result<(), DeltaError> {
        let (size, overlap) = extent;
        let record = Record { size, overlap, modified_ns: self.modified_ns(), runs: captured.runs.clone() };
        if full {
            self.rewrite(commit, &record)?
        } else {
            self.append(commit, &record)?
        }
        commit.extent = extent;
        Ok(())
    }

    fn append(&self, commit: &mut Commit, record: &Record) -> Result<(), DeltaError> {
        let Some(file) = commit.file.clone() else { return self.rewrite(commit, record) };
        let bytes = record.encode(commit.nonce, commit.seq);
        let end = commit.tail + bytes.len() as u64;
        if end > commit.filled {
            let zeros = vec![0; (end - commit.filled + AHEAD) as usize];
            // Only a convenience: without space for it the record itself may still fit.
            if file.write_at(&zeros, commit.filled).is_ok() {
                commit.filled += zeros.len() as u64;
            }
        }
        file.write_at(&bytes, commit.tail).map_err(DeltaError::io("appending to the map file"))?;
        if let Err(error) = file.sync_data() {
            // Nobody knows what of it is durable: a new file is written next time.
            commit.rewrite = true;
            return Err(self.poison("syncing the map file", error));
        }
        commit.tail = end;
        commit.filled = commit.filled.max(end);
        commit.seq += 1;
        Ok(())
    }

    /// Writes a new map file that says what `record` says, and makes it the root.
    fn rewrite(&self, commit: &mut Commit, record: &Record) -> Result<(), DeltaError> {
        let (disk, medium) = (self.spec.disk, &self.footing.medium);
        let header =
            MapHeader { disk, generation: commit.tried.max(commit.root.generation) + 1, nonce: random() };
        // Also after a failure: nobody knows which record is durable, so no file is written twice.
        commit.tried = header.generation;
        let mut bytes = header.encode();
        bytes.extend(record.encode(header.nonce, 1));
        let write = || {
            let file = medium.open(&map_name(disk, header.generation), Open::Create)?;
            file.set_len(0)?;
            file.write_at(&bytes, 0)?;
            Ok(file)
        };
        let file = write().map_err(DeltaError::io("writing a new map file"))?;
        let root = MapRoot { generation: header.generation, floor: bytes.len() as u64 };
        let durable = || {
            file.sync_data()?;
            medium.sync_dir("deltas")?;
            self.footing.roots.commit(root, record.modified_ns)
        };
        match durable() {
            Err(e) if e.raw_os_error() == Some(libc::ENOSPC) => {
                return Err(DeltaError::io("writing the disk's record")(e));
            }
            other => other.map_err(|e| self.poison("making a new map file durable", e))?,
        }
        if commit.root.generation != 0 {
            // A left-over is harmless; `plyfs check` names it.
            let _ = medium.remove(&map_name(disk, commit.root.generation));
        }
        let len = bytes.len() as u64;
        *commit = Commit {
            root,
            tried: header.generation,
            file: Some(file),
            nonce: header.nonce,
            tail: len,
            filled: len,
            first: len,
            seq: 2,
            rewrite: false,
            extent: (record.size, record.overlap),
        };
        Ok(())
    }

    /// Flushes, and notes how long the map file is, so that damage is noticed when it is opened again. The live map
    /// goes; nobody may use the delta afterwards.
    ///
    /// # Errors
    /// As [`Delta::flush`]; the live map stays then, for a next start before a reboot.
    pub fn close(&self) -> Result<(), DeltaError> {
        self.flush()?;
        let mut commit = self.commit.lock();
        let root = MapRoot { generation: commit.root.generation, floor: commit.tail };
        let modified = self.modified_ns();
        if root != commit.root || modified != self.spec.modified_ns {
            let done = self.footing.roots.commit(root, modified);
            done.map_err(DeltaError::io("writing the disk's record"))?;
            commit.root = root;
        }
        self.footing.live.remove(self.spec.disk).map_err(DeltaError::io("removing the live map"))
    }
}

/// The data file has the blocks that the map file says it has.
fn check_data(
    journal: Option<&Journal>,
    data: Option<&dyn MediumFile>,
    file: &str,
) -> Result<(), DeltaError> {
    let end = journal.map_or(0, |journal| journal.map.data_end());
    if end == 0 {
        return Ok(());
    }
    let has = data.map_or(Ok(0), MediumFile::len).map_err(DeltaError::io("opening the data file"))?;
    let needs = (end - 1) * BLOCK;
    if has > needs { Ok(()) } else { Err(DeltaError::DataMissing { file: file.into(), has, needs }) }
}

/// A live map has no checksum; but numbers that are not possible would end in a map file that nobody can read.
fn check_live(live: &LiveFile, spec: &DeltaSpec) -> Result<(), DeltaError> {
    let word = |word| live.header(word).load(Ordering::Acquire);
    let (size, overlap, pending) =
        (word(LiveHeader::Size), word(LiveHeader::Overlap), word(LiveHeader::PendingShrink));
    let pages = live.pages(0).last().map_or(0, |last| last + 1);
    let why = if size > MAX_DISK_SIZE || overlap > size.min(spec.overlap) || pending > size + 1 {
        format!("size {size}, overlap {overlap}, size to cut to {}", pending.wrapping_sub(1))
    } else if pages > LiveMap::PAGES_OF_LARGEST_DISK {
        format!("page {} is behind the largest disk", pages - 1)
    } else {
        return Ok(());
    };
    let source = FormatError { kind: Kind::Value, structure: "live map", detail: why };
    Err(DeltaError::Damaged { file: format!("{}.live", spec.disk), source })
}

/// Whether a worker of this version can take over a live map with this magic; the layout is in the upper 16 bits.
pub(super) fn check_layout(disk: u64, magic: u64) -> Result<(), DeltaError> {
    const NAME: u64 = (1 << 48) - 1;
    if magic & NAME == LIVE_MAGIC & NAME && magic != LIVE_MAGIC {
        let (has, knows) = (magic >> 48, LIVE_MAGIC >> 48);
        return Err(DeltaError::LiveLayout { disk, has, knows });
    }
    Ok(())
}

fn is_ours(live: &LiveFile, spec: &DeltaSpec, data: (u64, u64)) -> Result<bool, DeltaError> {
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
            "a live map belongs to other files than the store's and is not used"
        );
    }
    Ok(ours)
}

impl Delta {
    /// Whether this version can take over the live maps in `dir`, which another worker may be using.
    ///
    /// # Errors
    /// `LiveLayout` when one has another layout; what the storage says.
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
                // It was removed in this moment.
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                other => other.map_err(fail())?,
            }
            check_layout(disk, u64::from_le_bytes(magic))?;
        }
        Ok(())
    }
}

fn open_map_file(spec: &DeltaSpec, footing: &Footing) -> Result<(Option<Journal>, Commit), DeltaError> {
    let root = spec.root;
    if root.generation == 0 {
        let extent = (spec.size, spec.overlap);
        return Ok((None, Commit { rewrite: true, extent, ..Commit::default() }));
    }
    let name = map_name(spec.disk, root.generation);
    let fail = || DeltaError::io("opening the map file");
    let file = footing.medium.open(&name, Open::Existing).map_err(fail())?;
    let len = file.len().map_err(fail())?;
    let expected = Expected {
        disk: spec.disk,
        generation: root.generation,
        floor: root.floor,
        size: spec.size,
        overlap: spec.overlap,
        modified_ns: spec.modified_ns,
    };
    let journal = Journal::read(|buf, at| file.read_at(buf, at), len, &expected).and_then(|journal| {
        let why = match journal.raised {
            // What was cut off would show the base again.
            Some(raised) => format!("record {} has a larger overlap than the one before", raised.seq),
            None if journal.records == 0 => "it has no record".to_owned(),
            None => return Ok(journal),
        };
        Err(FormatError { kind: Kind::Value, structure: "map file", detail: why }.into())
    });
    let journal = match journal {
        Ok(journal) => journal,
        Err(ReadError::Format(source)) => return Err(DeltaError::Damaged { file: name, source }),
        Err(ReadError::Source(error)) => return Err(DeltaError::io("reading the map file")(error)),
    };
    let extent = (journal.size, journal.overlap);
    let commit = Commit {
        root,
        tried: root.generation,
        file: Some(file),
        nonce: journal.header.nonce,
        tail: journal.end,
        filled: if journal.torn { journal.end } else { len },
        first: HEADER as u64,
        seq: journal.next_seq,
        rewrite: journal.torn,
        extent,
    };
    Ok((Some(journal), commit))
}

/// Makes a live map of what is durable.
fn replay(
    spec: &DeltaSpec,
    footing: &Footing,
    journal: Option<Journal>,
    data: (u64, u64),
) -> Result<LiveMap, DeltaError> {
    let fail = || DeltaError::io("making the live map");
    let map = LiveMap::new(footing.live.fresh(spec.disk).map_err(fail())?);
    let (mut size, mut overlap, mut modified) = (spec.size, spec.overlap, spec.modified_ns);
    if let Some(mut journal) = journal {
        (size, overlap, modified) = (journal.size, journal.overlap, journal.modified_ns);
        journal.map.forget_zeros_above(overlap);
        map.load(&journal.map).map_err(fail())?;
    }
    let set = |word, value| map.live().header(word).store(value, Ordering::Release);
    set(LiveHeader::Disk, spec.disk);
    set(LiveHeader::Device, data.0);
    set(LiveHeader::Inode, data.1);
    set(LiveHeader::Size, size);
    set(LiveHeader::Overlap, overlap);
    set(LiveHeader::Modified, modified as u64);
    set(LiveHeader::Boot, sys::boot_number());
    set(LiveHeader::Magic, LIVE_MAGIC);
    Ok(map)
}
