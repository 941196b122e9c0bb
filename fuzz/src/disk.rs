//! A disk under any history of operations, failures, crashes and power cuts, against what the contract allows.
//!
//! For each block the model has the content that reads have to give now, and the contents that may be there after a
//! power cut: everything since the last flush.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use arbitrary::Arbitrary;
use plyfs::base::Base;
use plyfs::cache::BlockCache;
use plyfs::delta::{Delta, DeltaIo, DeltaSpec};
use plyfs::disk::{Disk, Grow, Seek};
use plyfs::source::{Identity, Source, SourceError, SourceErrorKind};

use crate::medium::{Fault, Lives, Memory, Roots};

const BLOCK: usize = 4096;
const SPAN: u64 = 40 * BLOCK as u64;
const BASE: usize = 9 * BLOCK + 700;

/// What is done to a disk.
#[derive(Debug, Clone, Arbitrary)]
pub enum Op {
    Write {
        at: u32,
        len: u16,
        seed: u8,
        align: bool,
    },
    Zero {
        at: u32,
        len: u16,
        align: bool,
    },
    Resize {
        to: u32,
    },
    Allocate {
        at: u32,
        len: u16,
        grow: bool,
    },
    Flush,
    /// A clean close, and open again.
    Close,
    /// The worker dies.
    Crash,
    /// Power goes; the bits say what of the unsynced survives.
    PowerCut {
        bits: u64,
    },
    /// One of the next calls to the storage fails, for want of space or with EIO.
    Fault {
        after: u8,
        space: bool,
    },
}

/// A new disk and what happens to it.
#[derive(Debug, Clone, Arbitrary)]
pub struct History {
    pub based: bool,
    pub size: u32,
    pub ops: Vec<Op>,
}

struct Image(Vec<u8>, Identity);

impl Source for Image {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        let rest = &self.0[self.0.len().min(offset as usize)..];
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
    fn size(&self) -> u64 {
        self.0.len() as u64
    }
    fn identity(&self) -> &Identity {
        &self.1
    }
    fn next_data(&self, offset: u64) -> Result<Option<u64>, SourceError> {
        Ok((offset < self.size()).then_some(offset))
    }
    fn next_hole(&self, offset: u64) -> Result<u64, SourceError> {
        if offset > self.size() {
            return Err(SourceError::new(SourceErrorKind::Io, "seek", Path::new("memory")));
        }
        Ok(self.size())
    }
    fn check(&self) -> Result<(), SourceError> {
        Ok(())
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i / 512) as u8 ^ (i as u8).wrapping_mul(31) ^ seed | 1).collect()
}

fn base() -> Arc<Base> {
    static SHARED: OnceLock<Arc<Base>> = OnceLock::new();
    let make = || {
        let identity = Identity::Contents { size: BASE as u64, key: [0; 32] };
        let cache = Arc::new(BlockCache::new(1 << 20).expect("memory"));
        Arc::new(Base::new(1, "base".into(), Arc::new(Image(pattern(BASE, 0xa5), identity)), cache))
    };
    SHARED.get_or_init(make).clone()
}

type Content = Arc<[u8]>;

#[derive(Clone)]
struct Block {
    now: Content,
    /// After a power cut it is one of these.
    possible: Vec<Content>,
    /// A sync failed while it was not flushed: what a power cut leaves of it is not known.
    lost: bool,
    /// Wholly replaced since then.
    healing: bool,
}

impl Block {
    fn new(bytes: &[u8]) -> Self {
        let mut now = bytes.to_vec();
        now.resize(BLOCK, 0);
        let now: Content = now.into();
        Self { possible: vec![now.clone()], now, lost: false, healing: false }
    }
    fn turn(&mut self, next: Content, whole: bool) {
        if !self.possible.contains(&next) {
            self.possible.push(next.clone());
        }
        self.healing |= whole;
        self.now = next;
    }
}

/// The content with everything behind `len` bytes forgotten.
fn cut(content: &Content, len: usize) -> Content {
    if len >= BLOCK || content[len..].iter().all(|b| *b == 0) {
        return content.clone();
    }
    let mut bytes = content.to_vec();
    bytes[len..].fill(0);
    bytes.into()
}

/// Bytes of block `n` on a disk of `size` bytes.
fn inside(n: usize, size: u64) -> usize {
    size.saturating_sub((n * BLOCK) as u64).min(BLOCK as u64) as usize
}

struct Model {
    size: u64,
    sizes: Vec<u64>,
    blocks: Vec<Block>,
}

impl Model {
    /// What an operation makes of the disk when it is done: content of each block, and whether it is wholly new.
    fn set_size(&mut self, size: u64) {
        self.size = size;
        if !self.sizes.contains(&size) {
            self.sizes.push(size);
        }
    }
}

struct Rig {
    medium: Arc<Memory>,
    lives: Arc<Lives>,
    roots: Arc<Roots>,
    based: bool,
    size: u64,
    disk: Option<Disk>,
    model: Model,
    /// Failed syncs that the model knows of.
    failed: u32,
}

impl Rig {
    fn open(&self) -> Result<Disk, plyfs::delta::DeltaError> {
        let overlap = if self.based { BASE as u64 } else { 0 };
        let root = self.roots.root();
        let spec = DeltaSpec { disk: 1, size: self.size, overlap, modified_ns: 0, root };
        let delta_io =
            DeltaIo { medium: self.medium.clone(), live: self.lives.clone(), roots: self.roots.clone() };
        Ok(Disk::new(Delta::open(spec, delta_io)?, self.based.then(base)))
    }

    fn disk(&mut self) -> &Disk {
        if self.disk.is_none() {
            // What fails once has to work when it is tried again.
            let disk = self.open().or_else(|_| {
                self.medium.set_fault(None);
                self.open()
            });
            self.disk = Some(disk.expect("the disk opens"));
        }
        self.disk.as_ref().expect("just opened")
    }

    fn read(&mut self) -> (u64, Vec<u8>) {
        let disk = self.disk();
        let size = disk.size();
        let mut bytes = vec![0xee; size as usize + 10];
        let got = disk.read(0, &mut bytes).expect("nothing fails reading").bytes() as usize;
        assert_eq!(got as u64, size);
        bytes.truncate(got);
        (size, bytes)
    }

    /// Everything reads as the model has it; where `next` differs because a call failed, the one or the other.
    fn compare(&mut self, next: Option<(u64, &[Option<(Content, bool)>])>) {
        let (size, bytes) = self.read();
        if let Some((other, _)) = next.filter(|_| size != self.model.size) {
            assert_eq!(size, other, "size after a failure, was {}", self.model.size);
            self.model.set_size(size);
        }
        assert_eq!(size, self.model.size);
        for (n, block) in self.model.blocks.iter_mut().enumerate() {
            let len = inside(n, size);
            let at = (n * BLOCK).min(bytes.len());
            let is = &bytes[at..at + len];
            if *is == block.now[..len] {
                continue;
            }
            match next.and_then(|(_, changes)| changes[n].clone()) {
                Some((content, whole)) if *is == content[..len] => block.turn(content, whole),
                _ => panic!("block {n} reads what was never written"),
            }
        }
    }

    /// After a call: `changes` are what it makes of the blocks, when it succeeds.
    fn settle(&mut self, ok: bool, size: u64, changes: &[Option<(Content, bool)>]) {
        self.note_failed_syncs();
        if ok {
            self.model.set_size(size);
            for (block, change) in self.model.blocks.iter_mut().zip(changes) {
                if let Some((content, whole)) = change {
                    block.turn(content.clone(), *whole);
                }
            }
            return self.compare(None);
        }
        // It may be done in part, and a power cut may leave any part of it too.
        if !self.model.sizes.contains(&size) {
            self.model.sizes.push(size);
        }
        for (block, change) in self.model.blocks.iter_mut().zip(changes) {
            if let Some((content, _)) = change
                && !block.possible.contains(content)
            {
                block.possible.push(content.clone());
            }
        }
        self.compare(Some((size, changes)));
    }

    fn note_failed_syncs(&mut self) {
        let failed = self.medium.failed_syncs();
        if failed != self.failed {
            self.failed = failed;
            for block in &mut self.model.blocks {
                if block.possible.len() > 1 {
                    (block.lost, block.healing) = (true, false);
                }
            }
        }
    }

    fn flushed(&mut self, ok: bool) {
        self.note_failed_syncs();
        if ok {
            self.model.sizes = vec![self.model.size];
            for block in &mut self.model.blocks {
                block.possible = vec![block.now.clone()];
                block.lost &= !block.healing;
            }
        }
        self.compare(None);
    }

    /// Takes what is there, when the contract allows it.
    fn after_power_cut(&mut self) -> bool {
        self.disk = None;
        self.lives.forget();
        let lost = self.model.blocks.iter().any(|block| block.lost);
        match self.open() {
            Ok(disk) => self.disk = Some(disk),
            // A data file that a failed sync left short.
            Err(_) if lost => return false,
            Err(error) => panic!("after a power cut: {error}"),
        }
        let (size, bytes) = self.read();
        assert!(self.model.sizes.contains(&size), "size {size} after a power cut, of {:?}", self.model.sizes);
        for (n, block) in self.model.blocks.iter_mut().enumerate() {
            let len = inside(n, size);
            let at = (n * BLOCK).min(bytes.len());
            let is = &bytes[at..at + len];
            let allowed = block.lost || block.possible.iter().any(|p| *is == p[..len]);
            assert!(allowed, "block {n} after a power cut is none of {} contents", block.possible.len());
            *block = Block::new(is);
        }
        self.model.size = size;
        self.model.sizes = vec![size];
        true
    }
}

/// Runs a history. Panics when the disk does what it may not.
pub fn run(history: &History) {
    let medium = Arc::new(Memory::default());
    let based = history.based;
    let size = if based {
        BASE as u64 + u64::from(history.size) % (SPAN - BASE as u64)
    } else {
        u64::from(history.size) % SPAN
    };
    let mut first = if based { pattern(BASE, 0xa5) } else { Vec::new() };
    first.resize(SPAN as usize, 0);
    let model = Model { size, sizes: vec![size], blocks: first.chunks(BLOCK).map(Block::new).collect() };
    let roots = Arc::new(Roots::new(medium.clone()));
    let mut rig = Rig { medium, lives: Arc::default(), roots, based, size, disk: None, model, failed: 0 };
    for op in history.ops.iter().take(60) {
        if !step(&mut rig, op) {
            return;
        }
    }
    rig.medium.set_fault(None);
    rig.disk = None;
    rig.compare(None);
    holes(&mut rig);
}

fn range(at: u32, len: u16, align: bool) -> (u64, u64) {
    let (mut at, mut len) = (u64::from(at) % SPAN, u64::from(len));
    if align {
        (at, len) = (at / 512 * 512, len.next_multiple_of(512));
    }
    (at, len.clamp(1, SPAN - at))
}

fn step(rig: &mut Rig, op: &Op) -> bool {
    let epoch = rig.disk().delta().error_epoch();
    let size = rig.model.size;
    let mut changes = vec![None; rig.model.blocks.len()];
    // What a range of bytes becomes.
    let fill = |rig: &Rig,
                changes: &mut Vec<Option<(Content, bool)>>,
                from: u64,
                to: u64,
                bytes: &dyn Fn(u64) -> u8| {
        for (n, change) in changes.iter_mut().enumerate() {
            let start = (n * BLOCK) as u64;
            let (a, b) = (from.max(start), to.min(start + BLOCK as u64));
            if a < b {
                let mut content = rig.model.blocks[n].now.to_vec();
                for at in a..b {
                    content[(at - start) as usize] = bytes(at);
                }
                *change = Some((content.into(), b - a == BLOCK as u64));
            }
        }
    };
    match *op {
        Op::Write { at, len, seed, align } => {
            let (at, len) = range(at, len, align);
            let bytes = pattern(len as usize, seed);
            fill(rig, &mut changes, at, at + len, &|i| bytes[(i - at) as usize]);
            let ok = rig.disk().write(at, &bytes, epoch).is_ok();
            rig.settle(ok, size.max(at + len), &changes);
        }
        Op::Zero { at, len, align } => {
            let (at, len) = range(at, len, align);
            fill(rig, &mut changes, at.min(size), (at + len).min(size), &|_| 0);
            let ok = rig.disk().zero(at, len, epoch).is_ok();
            rig.settle(ok, size, &changes);
        }
        Op::Resize { to } => {
            let to = u64::from(to) % SPAN;
            for (n, change) in changes.iter_mut().enumerate() {
                let content = cut(&rig.model.blocks[n].now, inside(n, to));
                if to < size && content != rig.model.blocks[n].now {
                    *change = Some((content, false));
                }
            }
            let ok = rig.disk().resize(to).is_ok();
            if ok {
                // Durable at return, and of every earlier content only what is below the size.
                rig.model.sizes = vec![to];
                for (n, block) in rig.model.blocks.iter_mut().enumerate().filter(|_| to < size) {
                    let len = inside(n, to);
                    block.possible.iter_mut().for_each(|content| *content = cut(content, len));
                    block.healing |= len == 0;
                }
            }
            rig.settle(ok, to, &changes);
        }
        Op::Allocate { at, len, grow } => {
            let (at, len) = range(at, len, false);
            let ok = rig.disk().allocate(at, len, if grow { Grow::Yes } else { Grow::No }, epoch).is_ok();
            rig.settle(ok, if grow { size.max(at + len) } else { size }, &changes);
        }
        Op::Flush => {
            let ok = rig.disk().flush(epoch).is_ok();
            rig.flushed(ok);
        }
        Op::Close => {
            let ok = rig.disk().delta().close().is_ok();
            rig.disk = None;
            rig.flushed(ok);
        }
        Op::Crash => {
            rig.disk = None;
            rig.compare(None);
        }
        Op::PowerCut { bits } => {
            // Known before, or a sync that nobody saw fail counts as one.
            rig.note_failed_syncs();
            let mut bits = bits | 1;
            rig.medium.power_cut(|| {
                bits ^= bits << 13;
                bits ^= bits >> 7;
                bits ^= bits << 17;
                bits & 1 == 0
            });
            return rig.after_power_cut();
        }
        Op::Fault { after, space } => {
            let errno = if space { libc::ENOSPC } else { libc::EIO };
            rig.medium.set_fault(Some(Fault { after: u32::from(after % 12), errno }));
        }
    }
    true
}

/// What a seek calls a hole reads zeros.
fn holes(rig: &mut Rig) {
    let (size, bytes) = rig.read();
    let disk = rig.disk();
    let mut at = 0;
    while at < size {
        let data = disk.seek(at, Seek::Data).expect("nothing fails").unwrap_or(size);
        assert!(bytes[at as usize..data as usize].iter().all(|b| *b == 0), "the hole {at}..{data} has data");
        at = match data {
            data if data < size => disk.seek(data, Seek::Hole).expect("nothing fails").unwrap_or(size),
            _ => size,
        };
    }
}
