//! A file of the simulated medium: its durable state, and its changes in flight.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use super::{Call, Keep, Rng, Shared};
use crate::io::MediumFile;

/// Bytes of a data file that reach the medium together.
const BLOCK: u64 = 4096;
/// The same for all other files. They have checksums, so nothing is assumed of the medium, not even sectors of 512
/// bytes.
const SECTOR: u64 = 64;

/// Contents of a sector; `None` is zeros.
type Sector = Option<Arc<[u8]>>;

#[derive(Debug, Clone, Default)]
pub(super) struct Inode {
    unit: u64,
    pub len: u64,
    sectors: BTreeMap<u64, Arc<[u8]>>,
    durable: BTreeMap<u64, Arc<[u8]>>,
    durable_len: u64,
    /// The contents that each sector has had since the last sync, oldest first.
    pending: BTreeMap<u64, Vec<Sector>>,
    pending_len: Vec<u64>,
    /// The medium refused what was written back, and no call has said so yet.
    refused: bool,
}

impl Inode {
    pub fn new(name: &str) -> Self {
        Self { unit: if name.ends_with(".data") { BLOCK } else { SECTOR }, ..Self::default() }
    }

    pub fn in_flight(&self) -> usize {
        self.pending.len() + self.pending_len.len()
    }

    /// Reads from `offset`, as many bytes as there are.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> usize {
        let end = (offset + buf.len() as u64).min(self.len);
        if end <= offset {
            return 0;
        }
        let buf = &mut buf[..(end - offset) as usize];
        buf.fill(0);
        for (no, sector) in self.sectors.range(offset / self.unit..end.div_ceil(self.unit)) {
            let start = no * self.unit;
            let (from, to) = (start.max(offset), (start + self.unit).min(end));
            buf[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&sector[(from - start) as usize..(to - start) as usize]);
        }
        buf.len()
    }

    /// Changes the bytes `offset..end`. `bytes` is `None` for zeros.
    fn put(&mut self, offset: u64, end: u64, bytes: Option<&[u8]>) {
        for no in offset / self.unit..end.div_ceil(self.unit) {
            let start = no * self.unit;
            let (from, to) = (start.max(offset), (start + self.unit).min(end));
            let whole = from == start && to == start + self.unit;
            if bytes.is_none() && (whole || !self.sectors.contains_key(&no)) {
                if self.sectors.remove(&no).is_some() || self.pending.contains_key(&no) {
                    self.pending.entry(no).or_default().push(None);
                }
                continue;
            }
            let mut sector: Vec<u8> =
                self.sectors.get(&no).map_or_else(|| vec![0; self.unit as usize], |s| s.to_vec());
            let part = &mut sector[(from - start) as usize..(to - start) as usize];
            match bytes {
                Some(bytes) => part.copy_from_slice(&bytes[(from - offset) as usize..(to - offset) as usize]),
                None => part.fill(0),
            }
            let sector: Arc<[u8]> = sector.into();
            self.sectors.insert(no, sector.clone());
            self.pending.entry(no).or_default().push(Some(sector));
        }
    }

    fn resized(&mut self, len: u64) {
        if len != self.len {
            self.len = len;
            self.pending_len.push(len);
        }
    }

    pub fn write(&mut self, bytes: &[u8], offset: u64) {
        let end = offset + bytes.len() as u64;
        self.put(offset, end, Some(bytes));
        self.resized(self.len.max(end));
    }

    /// Does what an interrupted write may do: writes some of the first whole sectors, but not all bytes.
    pub fn write_part(&mut self, bytes: &[u8], offset: u64, rng: &mut Rng) {
        let sectors = (offset + bytes.len() as u64) / self.unit - offset / self.unit;
        let end = (offset / self.unit + rng.below(sectors + 1)) * self.unit;
        if end > offset && end < offset + bytes.len() as u64 {
            self.write(&bytes[..(end - offset) as usize], offset);
        }
    }

    pub fn punch(&mut self, offset: u64, len: u64) {
        let end = (offset + len).min(self.len);
        if end > offset {
            self.put(offset, end, None);
        }
    }

    pub fn set_len(&mut self, len: u64) {
        if len < self.len {
            let last = self.len;
            self.put(len, last.div_ceil(self.unit) * self.unit, None);
        }
        self.resized(len);
    }

    pub fn sync(&mut self) {
        for (no, mut versions) in std::mem::take(&mut self.pending) {
            match versions.pop().flatten() {
                Some(sector) => self.durable.insert(no, sector),
                None => self.durable.remove(&no),
            };
        }
        self.pending_len.clear();
        self.durable_len = self.len;
    }

    /// Any part becomes durable, and the rest never will: the kernel considers the pages clean. The length is metadata,
    /// which stays dirty.
    pub fn sync_failed(&mut self, rng: &mut Rng) {
        for (no, versions) in std::mem::take(&mut self.pending) {
            if rng.chance(50) {
                match versions[rng.below(versions.len() as u64) as usize].clone() {
                    Some(sector) => self.durable.insert(no, sector),
                    None => self.durable.remove(&no),
                };
            }
        }
    }

    /// The medium refuses what is in flight, which the kernel writes by itself, and memory has dropped it since. The length
    /// stays dirty.
    pub fn refuse(&mut self) {
        self.refused |= !self.pending.is_empty();
        self.pending.clear();
        self.sectors = self.durable.clone();
    }

    /// Memory drops all that is not in flight.
    pub fn evict(&mut self) {
        let in_flight = |no: &u64| self.pending.contains_key(no);
        let mut sectors = self.durable.clone();
        sectors.retain(|no, _| !in_flight(no));
        sectors.extend(self.sectors.iter().filter(|(no, _)| in_flight(no)).map(|(no, s)| (*no, s.clone())));
        self.sectors = sectors;
    }

    /// Reports once that the medium refused what was written back.
    fn check(&mut self) -> io::Result<()> {
        let refused = std::mem::take(&mut self.refused);
        if refused { Err(io::Error::from_raw_os_error(libc::EIO)) } else { Ok(()) }
    }

    /// The file after a cut.
    pub fn crash(&self, rng: &mut Rng, keep: Keep) -> Self {
        let mut sectors = self.durable.clone();
        for (no, versions) in &self.pending {
            if rng.chance(keep.sectors) {
                // Mostly the last contents: the others were overwritten before writeback.
                let at = if rng.chance(60) {
                    versions.len() - 1
                } else {
                    rng.below(versions.len() as u64) as usize
                };
                match versions[at].clone() {
                    Some(sector) => sectors.insert(*no, sector),
                    None => sectors.remove(no),
                };
            } else if keep.stale && !self.durable.contains_key(no) && no * self.unit >= self.durable_len {
                let garbage: Vec<u8> = (0..self.unit).map(|_| rng.number() as u8).collect();
                sectors.insert(*no, garbage.into());
            }
        }
        let mut len = self.durable_len;
        if !self.pending_len.is_empty() && rng.chance(keep.lengths) {
            let last = self.pending_len.len() - 1;
            len = if rng.chance(60) { self.pending_len[last] } else { *rng.pick(&self.pending_len) };
        }
        sectors.split_off(&len.div_ceil(self.unit));
        if !len.is_multiple_of(self.unit)
            && let Some(sector) = sectors.get_mut(&(len / self.unit))
        {
            let mut cut = sector.to_vec();
            cut[(len % self.unit) as usize..].fill(0);
            *sector = cut.into();
        }
        Self { unit: self.unit, len, durable: sectors.clone(), sectors, durable_len: len, ..Self::default() }
    }
}

pub(super) struct SimFile {
    pub shared: Arc<Shared>,
    pub inode: u64,
    pub name: String,
}

impl SimFile {
    fn call<T>(
        &self,
        call: Call,
        fail: impl FnOnce(&mut Inode, &mut Rng),
        deed: impl FnOnce(&mut Inode) -> T,
    ) -> io::Result<T> {
        self.shared.call(
            (call, &self.name),
            |state| {
                let mut rng = state.rng().fork();
                fail(state.inode(self.inode), &mut rng);
            },
            |state| Ok(deed(state.inode(self.inode))),
        )
    }
}

impl MediumFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        // `inode()` would copy a file that a fork shares.
        self.shared.call(
            (Call::Read, &self.name),
            |_| {},
            |state| Ok(state.inodes.get(&self.inode).map_or(0, |inode| inode.read(buf, offset))),
        )
    }
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        self.read_at(buf, offset).map(Some)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.call(
            Call::Write,
            |inode, rng| inode.write_part(buf, offset, rng),
            |inode| inode.write(buf, offset),
        )
    }
    fn sync_data(&self) -> io::Result<()> {
        let synced = self.call(Call::SyncData, Inode::sync_failed, |inode| {
            inode.sync();
            inode.check()
        });
        synced?
    }
    fn check_written_back(&self) -> io::Result<()> {
        let mut state = self.shared.state.lock();
        let refused = state.inodes.get(&self.inode).is_some_and(|inode| inode.refused);
        if refused { state.inode(self.inode).check() } else { Ok(()) }
    }
    fn len(&self) -> io::Result<u64> {
        Ok(self.shared.state.lock().inodes.get(&self.inode).map_or(0, |inode| inode.len))
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.call(Call::SetLen, |_, _| {}, |inode| inode.set_len(len))
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call(Call::Punch, |_, _| {}, |inode| inode.punch(offset, len))
    }
    fn allocate(&self, _offset: u64, _len: u64) -> io::Result<()> {
        self.call(Call::Allocate, |_, _| {}, |_| ())
    }
    fn allocated(&self) -> io::Result<u64> {
        let state = self.shared.state.lock();
        Ok(state.inodes.get(&self.inode).map_or(0, |inode| inode.sectors.len() as u64 * inode.unit))
    }
    fn identity(&self) -> io::Result<(u64, u64)> {
        Ok((1, self.inode))
    }
}
