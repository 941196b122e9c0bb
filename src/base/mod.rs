//! The shared image: one virtual disk, read-only, as every disk on it sees it, over cached bytes of a source.
//!
//! It is the only place that knows both the cache and the source. What must hold:
//! - A read returns the bytes that the source had when it was opened, or an error; bytes of a changed source
//!   neither reach a reader nor the cache (the source vouches for each read before it is inserted) (D6).
//! - [`Base::read_now`] waits for nothing; everything that may wait is in [`Base::read`], and that waits for disks of
//!   this host only. What has to come over a network is an error of the kind `NotHere`.
//! - The result never depends on what the cache keeps: `read` takes fetched bytes from the fetch, so a cache
//!   of no blocks works too (D7).
//!
//! What the bytes of a source mean is the business of [`crate::image`]; clusters are decompressed here, and only what
//! comes out is kept in memory.

mod stack;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use stack::Layer;
use stack::{Coming, Stack};

use parking_lot::RwLock;

use crate::cache::{BLOCK, BlockCache, CacheId, Owner, Touch};
use crate::events::{Events, Reason, Traffic};
use crate::image::ImageError;
use crate::source::{AlignedBuf, Purpose, Source, SourceError, SourceErrorKind};
pub use crate::source::{Arrival, Wanted, without_files};

/// The most that one request to the source asks for.
const MAX_FETCH: usize = 1024 * 1024;
const MAX_FETCH_BLOCKS: usize = MAX_FETCH / BLOCK;

thread_local! {
    /// Of [`MAX_FETCH`] bytes; taken out while in use.
    static FETCH_BUFFER: Cell<Option<AlignedBuf>> = const { Cell::new(None) };
}

/// What kind of failure, for callers that decide by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BaseErrorKind {
    /// The source is not what it was; what is cached is still right and is still served.
    Changed,
    /// It has to be fetched first: to be asked again when [`BaseError::arrival`] says so.
    NotHere,
    /// The source could not be read.
    Io,
}

/// Why a read of a base failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// One of its sources.
    #[error("{0}")]
    Source(#[from] SourceError),
    /// What is in one of them.
    #[error("{0}")]
    Image(ImageError),
}

impl From<ImageError> for Cause {
    fn from(error: ImageError) -> Self {
        match error.source_error() {
            Some(source) => Self::Source(source.clone()),
            None => Self::Image(error),
        }
    }
}

impl Cause {
    fn arrival(&self) -> Option<&Arrival> {
        match self {
            Self::Source(error) => error.arrival(),
            Self::Image(_) => None,
        }
    }
}

/// A read of a base that failed. The message is complete, the source's own included.
#[derive(Debug, thiserror::Error)]
#[error("base {base}: reading {length} bytes at offset {offset}: {cause}")]
pub struct BaseError {
    base: String,
    offset: u64,
    length: u64,
    cause: Cause,
}

impl BaseError {
    pub fn kind(&self) -> BaseErrorKind {
        match &self.cause {
            Cause::Source(error) if error.kind() == SourceErrorKind::Changed => BaseErrorKind::Changed,
            Cause::Source(error) if error.kind() == SourceErrorKind::NotHere => BaseErrorKind::NotHere,
            Cause::Source(_) | Cause::Image(_) => BaseErrorKind::Io,
        }
    }

    /// The base's name.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Where in the virtual disk the failed request to the source began, bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// When to ask again, of an error that is no failure.
    pub fn arrival(&self) -> Option<&Arrival> {
        self.cause.arrival()
    }

    /// One error for two reads that both have to wait; the one that is a failure, when there is one.
    ///
    /// # Errors
    /// `next`, when it is a failure.
    pub fn join(earlier: Option<Self>, next: Self) -> Result<Self, Self> {
        let Some(arrival) = next.arrival() else { return Err(next) };
        let Some(before) = earlier.as_ref().and_then(Self::arrival) else { return Ok(next) };
        let arrival = Arrival::all(vec![before.clone(), arrival.clone()]);
        let cause = SourceError::not_here(next.base.clone(), arrival).into();
        Ok(Self { cause, ..next })
    }

    /// What was wrong.
    pub fn cause(&self) -> &Cause {
        &self.cause
    }
}

/// A base in use. Dropping it drops its blocks from the cache.
pub struct Base {
    name: String,
    stack: Stack,
    cache: Arc<BlockCache>,
    id: CacheId,
    remote: bool,
    traffic: Arc<Traffic>,
    /// Its contents are not what its operator said: nothing of it is given to anybody.
    refused: AtomicBool,
    /// Shared while sources are read and what they gave is kept; exclusive while all that is kept is dropped.
    reading: RwLock<()>,
}

impl Base {
    /// Of one source that is the disk. `number` is the base's own, and never another's: blocks of it that an earlier
    /// worker left are used again when the source has the same identity as then.
    pub fn new(number: u64, name: String, source: Arc<dyn Source>, cache: Arc<BlockCache>) -> Self {
        let size = source.size();
        let traffic = Events::new().base(number, &name);
        Self::layered(number, name, size, vec![Layer { source, image: None }], cache, traffic)
    }

    /// Of an image and what is below it. `size`: bytes of the virtual disk; `traffic` counts what is read.
    pub fn layered(
        number: u64,
        name: String,
        size: u64,
        layers: Vec<Layer>,
        cache: Arc<BlockCache>,
        traffic: Arc<Traffic>,
    ) -> Self {
        let stack = Stack::new(layers, size);
        let id = cache.register_as(Owner::new(number, &stack.identity()));
        let remote = stack.sources().any(Source::is_remote);
        Self {
            name,
            stack,
            cache,
            id,
            remote,
            traffic,
            refused: AtomicBool::new(false),
            reading: RwLock::new(()),
        }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of the virtual disk; any number.
    pub fn size(&self) -> u64 {
        self.stack.size()
    }

    /// Gives nothing of it to anybody from now on: its contents do not have their digest.
    pub fn refuse(&self) {
        self.refused.store(true, Ordering::Release);
        self.purge();
    }

    /// Its contents have their digest after all.
    pub fn accept(&self) {
        self.purge();
        self.refused.store(false, Ordering::Release);
    }

    /// Drops all that is kept of it in memory, tables of images included. What is read from now on was read from its
    /// sources after this.
    pub fn purge(&self) {
        let _none_reads = self.reading.write();
        self.cache.forget(self.id);
        self.stack.forget();
    }

    fn check_refused(&self, offset: u64, length: u64) -> Result<(), BaseError> {
        if !self.refused.load(Ordering::Acquire) {
            return Ok(());
        }
        let why = "its contents do not have the digest that it was registered with";
        let advice = "when its source has the right ones again, run `plyfs base verify`";
        let cause = SourceError::remote(SourceErrorKind::Changed, "read", self.name.clone(), why, advice);
        Err(self.failed(offset, length, cause.into()))
    }

    /// Bytes of it that are in memory.
    pub fn cached_bytes(&self) -> u64 {
        self.cache.cached_bytes(self.id)
    }

    /// Whether a read is only a read of a file of this host, with nothing to decode.
    pub fn is_plain(&self) -> bool {
        !self.remote && self.stack.raw().is_some()
    }

    /// Whether the sources are still what they were, as far as that can be told without asking a server.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn check(&self) -> Result<(), BaseError> {
        self.check_refused(0, 0)?;
        self.stack.check().map_err(|cause| self.failed(0, 0, cause.into()))
    }

    /// Has a range of the virtual disk fetched, as far as it lies behind a network and is not here. Does not wait;
    /// returns when what is under way now is here. Less than was asked for may be under way.
    ///
    /// # Errors
    /// As [`read`](Self::read), but never `NotHere`.
    pub fn prefetch(&self, offset: u64, length: u64, purpose: Purpose) -> Result<Option<Arrival>, BaseError> {
        if !self.remote {
            return Ok(None);
        }
        let _reading = self.reading.read();
        self.stack.prefetch(offset, length, purpose).map_err(|cause| self.failed(offset, length, cause))
    }

    /// Fills `buf` from `offset` on if all of it is in memory: no waiting, no system call. Past the end of
    /// the base there are zeros. If false, the content of `buf` is undefined, and [`read`](Self::read) is the
    /// way.
    #[must_use]
    pub fn read_now(&self, offset: u64, buf: &mut [u8], touch: Touch) -> bool {
        if self.refused.load(Ordering::Relaxed) {
            return false;
        }
        let inside = self.zero_past_end(offset, buf);
        self.cached(offset, &mut buf[..inside], touch) == inside
    }

    /// Fills `buf` from `offset` on; past the end of the base there are zeros. What is not in memory comes
    /// from the source, in pieces as large as neighbouring missing blocks allow, and may take as long as the
    /// disk under it does. The last piece is extended by up to `readahead` bytes that nobody asked for yet (none if
    /// what follows is in memory, or if it lies behind a network: such a source reads ahead by itself).
    ///
    /// # Errors
    /// `NotHere` when something has to be fetched first, all of it being under way; `Changed` or `Io`. Then the content
    /// of `buf` is undefined.
    pub fn read(&self, offset: u64, buf: &mut [u8], touch: Touch, readahead: u32) -> Result<(), BaseError> {
        self.check_refused(offset, buf.len() as u64)?;
        let inside = self.zero_past_end(offset, buf);
        let readahead = if self.remote { 0 } else { readahead };
        let mut coming = Coming::default();
        let mut done = 0;
        while done < inside {
            let rest = &mut buf[done..inside];
            let cached = self.cached(offset + done as u64, rest, touch);
            done += cached;
            if done < inside {
                let fetched = self.fetch(offset + done as u64, &mut rest[cached..], readahead);
                let noted = match fetched.result {
                    Err(Cause::Source(error)) => coming.wait_for(error).map_err(Cause::Source),
                    other => other,
                };
                noted.map_err(|cause| self.failed(fetched.from, fetched.asked, cause))?;
                done += fetched.length;
            }
        }
        coming.end().map_err(|cause| self.failed(offset, inside as u64, cause))
    }

    /// The first offset at or after `offset` that may hold data; none up to the end.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>, BaseError> {
        if offset >= self.size() {
            return Ok(None);
        }
        let _reading = self.reading.read();
        self.stack.next(offset, true).map_err(|cause| self.failed(offset, 0, cause))
    }

    /// The first offset at or after `offset` that is in a hole; the end counts as one, and so does what lies
    /// beyond it.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn next_hole(&self, offset: u64) -> Result<u64, BaseError> {
        let size = self.size();
        if offset >= size {
            return Ok(size);
        }
        let _reading = self.reading.read();
        let found = self.stack.next(offset, false).map_err(|cause| self.failed(offset, 0, cause))?;
        Ok(found.unwrap_or(size))
    }

    /// Zeroes what lies past the end, and returns how many bytes of `buf` do not.
    fn zero_past_end(&self, offset: u64, buf: &mut [u8]) -> usize {
        let left = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let inside = left.min(buf.len());
        buf[inside..].fill(0);
        inside
    }

    /// Copies what is cached, up to the first block that is not. Returns bytes.
    fn cached(&self, offset: u64, buf: &mut [u8], touch: Touch) -> usize {
        let mut block = offset / BLOCK as u64;
        let skip = (offset % BLOCK as u64) as usize;
        let mut done = 0;
        if skip != 0 {
            let head = buf.len().min(BLOCK - skip);
            if !self.cache.read_part(self.id, block, skip, &mut buf[..head], touch) {
                return 0;
            }
            done = head;
            block += 1;
        }
        let whole = (buf.len() - done) / BLOCK;
        if whole > 0 {
            let copied = self.cache.read(self.id, block, &mut buf[done..done + whole * BLOCK], touch);
            done += copied * BLOCK;
            block += copied as u64;
            if copied < whole {
                return self.found(done);
            }
        }
        if done < buf.len() && self.cache.read_part(self.id, block, 0, &mut buf[done..], touch) {
            done = buf.len();
        }
        self.found(done)
    }

    fn found(&self, bytes: usize) -> usize {
        if bytes > 0 {
            self.traffic.add(Reason::Memory, bytes as u64);
        }
        bytes
    }

    /// Reads the missing blocks at `offset` from the sources, keeps them, and copies to `buf`, which lies
    /// inside the base, what belongs there.
    fn fetch(&self, offset: u64, buf: &mut [u8], readahead: u32) -> Fetched {
        let _reading = self.reading.read();
        let first = offset / BLOCK as u64;
        let skip = (offset % BLOCK as u64) as usize;
        let asked = (skip + buf.len()).div_ceil(BLOCK);
        // At least one: another thread may have inserted the block since it was missed.
        let missing = self.cache.missing_run(self.id, first, asked.min(MAX_FETCH_BLOCKS)).max(1);
        let ahead = if missing == asked { self.ahead(first + asked as u64, missing, readahead) } else { 0 };

        let from = first * BLOCK as u64;
        let bytes = (missing + ahead) * BLOCK;
        let length = buf.len().min(missing * BLOCK - skip);
        let mut fetched = FETCH_BUFFER.take().unwrap_or_else(|| AlignedBuf::new(MAX_FETCH));
        let result = self.fill(&mut fetched[..bytes], from).map(|()| {
            let (wanted, ahead) = fetched[..bytes].split_at(missing * BLOCK);
            self.cache.insert(self.id, first, wanted);
            self.cache.insert_ahead(self.id, first + missing as u64, ahead);
            self.cache.record_misses(missing as u64);
            buf[..length].copy_from_slice(&wanted[skip..skip + length]);
        });
        FETCH_BUFFER.set(Some(fetched));
        Fetched { length, from, asked: (self.size() - from).min(bytes as u64), result }
    }

    /// Reads whole blocks into `blocks`; zeros past the end.
    fn fill(&self, blocks: &mut [u8], from: u64) -> Result<(), Cause> {
        let inside = usize::try_from(self.size() - from).unwrap_or(usize::MAX).min(blocks.len());
        match self.stack.raw() {
            Some(source) => {
                let read = source.read_at(blocks, from)?;
                if read != inside {
                    return Err(self.ended_early().into());
                }
            }
            None => {
                self.stack.read(&mut blocks[..inside], from, |start, cluster| self.keep(start, cluster))?
            }
        }
        blocks[inside..].fill(0);
        if !self.remote {
            // Others count for themselves what they had to fetch.
            self.traffic.add(Reason::Demand, inside as u64);
        }
        Ok(())
    }

    /// Keeps the blocks of a cluster that was decompressed; who asked for a part of it will ask for more.
    fn keep(&self, start: u64, cluster: &[u8]) {
        if !start.is_multiple_of(BLOCK as u64) {
            return;
        }
        let whole = cluster.len() / BLOCK * BLOCK;
        self.cache.insert_ahead(self.id, start / BLOCK as u64, &cluster[..whole]);
    }

    /// How many blocks from `next` on to read ahead, behind `taken` that are read anyway.
    fn ahead(&self, next: u64, taken: usize, readahead: u32) -> usize {
        let left = self.size().div_ceil(BLOCK as u64).saturating_sub(next);
        let most = (readahead as usize).div_ceil(BLOCK).min(MAX_FETCH_BLOCKS - taken);
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(most);
        self.cache.missing_run(self.id, next, most)
    }

    /// For a source that breaks its word.
    fn ended_early(&self) -> SourceError {
        let early =
            std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the source ended before its size");
        SourceError::from_io("read", std::path::Path::new(&self.name), early)
    }

    fn failed(&self, offset: u64, length: u64, cause: Cause) -> BaseError {
        BaseError { base: self.name.clone(), offset, length, cause }
    }
}

/// What came of one request to the sources.
struct Fetched {
    /// Bytes of the caller's buffer that it was about, at least one.
    length: usize,
    /// Where in the virtual disk it began.
    from: u64,
    /// Bytes.
    asked: u64,
    result: Result<(), Cause>,
}

impl Drop for Base {
    fn drop(&mut self) {
        self.cache.forget(self.id);
    }
}
