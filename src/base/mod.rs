//! A base: one shared, read-only virtual disk over cached bytes of its sources.
//!
//! This is the only module that uses both the memory cache and the sources. What must hold:
//! - A read returns the bytes that the source had when it was opened, or an error. Bytes of a changed source reach
//!   neither a reader nor the cache, because the source vouches for each read before the insert (D6).
//! - [`Base::read_now`] never waits. [`Base::read`] may wait, but only for disks of this host. When bytes must come over
//!   a network, it returns an error of the kind `NotHere`.
//! - The result never depends on what the cache holds: `read` returns the bytes that it fetched, so that it works with a
//!   cache of no blocks, too (D7).
//!
//! [`crate::image`] interprets the bytes of a source. Clusters are decompressed here, and memory keeps only the
//! decompressed bytes.

mod holdings;
mod stack;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use holdings::StackHoldings;
pub use stack::Layer;
use stack::{PendingFetches, Stack};

use parking_lot::RwLock;

use crate::cache::{BLOCK, BlockCache, CacheId, Owner, Touch};
use crate::events::{Events, Reason, Traffic};
use crate::image::ImageError;
pub use crate::source::holdings::{HeldRow, Holdings, ROW, UNIT};
use crate::source::{AlignedBuf, Provenance, Purpose, Source, SourceError, SourceErrorKind, observe};
pub use crate::source::{Completion, Wanted, without_files};
use crate::stats::{Origin, Origins};

/// The most bytes of one request to a source.
const MAX_FETCH: usize = 1024 * 1024;
const MAX_FETCH_BLOCKS: usize = MAX_FETCH / BLOCK;

thread_local! {
    /// A buffer of [`MAX_FETCH`] bytes; taken out while in use.
    static FETCH_BUFFER: Cell<Option<AlignedBuf>> = const { Cell::new(None) };
}

/// The kind of a failure, for callers that act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum BaseErrorKind {
    /// The source has changed. Cached blocks are still right and are still served.
    Changed,
    /// Bytes must be fetched first: try again after [`BaseError::completion`].
    NotHere,
    /// The source could not be read.
    Io,
}

/// Why a read of a base failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// A source failed.
    #[error("{0}")]
    Source(#[from] SourceError),
    /// The image in a source is invalid.
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
    fn completion(&self) -> Option<&Completion> {
        match self {
            Self::Source(error) => error.completion(),
            Self::Image(_) => None,
        }
    }
}

/// A failed read of a base. The message is complete and includes that of the source.
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

    /// The offset in the virtual disk at which the failed request to the source began.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The completion after which the caller can try again, when the error only means that bytes must be fetched.
    pub fn completion(&self) -> Option<&Completion> {
        self.cause.completion()
    }

    /// Joins the errors of two reads that both must wait into one error.
    ///
    /// # Errors
    /// `next`, when it is a failure.
    pub fn join(earlier: Option<Self>, next: Self) -> Result<Self, Self> {
        let Some(completion) = next.completion() else { return Err(next) };
        let Some(before) = earlier.as_ref().and_then(Self::completion) else { return Ok(next) };
        let completion = Completion::all(vec![before.clone(), completion.clone()]);
        let cause = SourceError::not_here(next.base.clone(), completion).into();
        Ok(Self { cause, ..next })
    }

    /// The cause of the failure.
    pub fn cause(&self) -> &Cause {
        &self.cause
    }
}

/// An attached base. Its blocks leave the cache when it is dropped.
pub struct Base {
    name: String,
    stack: Stack,
    cache: Arc<BlockCache>,
    id: CacheId,
    remote: bool,
    traffic: Arc<Traffic>,
    /// Its contents do not have the digest that the operator gave: every read fails.
    refused: AtomicBool,
    /// Held shared while sources are read and the bytes are cached; exclusive while all cached bytes are dropped.
    reading: RwLock<()>,
}

impl Base {
    /// A base of one source, which is the disk. `number` is the base's number, which no other base ever has. Blocks that
    /// an earlier worker left are used again if the source still has the same identity.
    pub fn new(number: u64, name: String, source: Arc<dyn Source>, cache: Arc<BlockCache>) -> Self {
        let size = source.size();
        let traffic = Events::new().base(number, &name);
        Self::layered(number, name, size, vec![Layer { source, image: None }], cache, traffic)
    }

    /// A base of an image and its backing images. `size`: bytes of the virtual disk. `traffic` counts reads.
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

    /// Refuses every read from now on, because the contents do not have their digest.
    pub fn refuse(&self) {
        self.refused.store(true, Ordering::Release);
        self.purge();
    }

    /// Allows reads again, because the contents have their digest after all.
    pub fn accept(&self) {
        self.purge();
        self.refused.store(false, Ordering::Release);
    }

    /// Drops everything that memory holds of it, including tables of images. Later reads return bytes that were read from
    /// the sources after this call.
    pub fn purge(&self) {
        let _exclusive = self.reading.write();
        self.cache.forget(self.id);
        self.stack.forget();
    }

    fn check_refused(&self, offset: u64, length: u64) -> Result<(), BaseError> {
        if !self.refused.load(Ordering::Acquire) {
            return Ok(());
        }
        let why = "its contents do not have the digest that it was registered with";
        let advice = "when its source has the right contents again, run `plyfs base verify`";
        let cause = SourceError::remote(SourceErrorKind::Changed, "read", self.name.clone(), why, advice);
        Err(self.failed(offset, length, cause.into()))
    }

    /// Bytes of its blocks in memory.
    pub fn cached_bytes(&self) -> u64 {
        self.cache.cached_bytes(self.id)
    }

    /// Calls `each` for each of its blocks in memory, in no order.
    pub fn each_block_in_memory(&self, each: impl FnMut(u64)) {
        self.cache.each_block(self.id, each);
    }

    /// Whether its bytes are those of one file of this host, without a format to decode.
    pub fn is_plain(&self) -> bool {
        !self.remote && self.stack.raw().is_some()
    }

    /// Checks that the sources are unchanged, as far as that is possible without a request to a server.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn check(&self) -> Result<(), BaseError> {
        self.check_refused(0, 0)?;
        self.stack.check().map_err(|cause| self.failed(0, 0, cause.into()))
    }

    /// Starts to fetch the missing bytes of a range of the virtual disk from remote sources. Does not wait. The completion
    /// is that of the requests now under way, which may be fewer than requested.
    ///
    /// # Errors
    /// As [`read`](Self::read), but never `NotHere`.
    pub fn prefetch(
        &self,
        offset: u64,
        length: u64,
        purpose: Purpose,
    ) -> Result<Option<Completion>, BaseError> {
        if !self.remote {
            return Ok(None);
        }
        let _reading = self.reading.read();
        self.stack.prefetch(offset, length, purpose).map_err(|cause| self.failed(offset, length, cause))
    }

    /// Where the bytes of the virtual disk are now. Starts no fetch.
    pub fn holdings(&self) -> Box<dyn Holdings + '_> {
        match self.stack.raw() {
            Some(source) => source.holdings(),
            None => Box::new(StackHoldings::of(&self.stack)),
        }
    }

    /// Fills `buf` from `offset` on if all of it is in memory. Never waits and makes no system call. Beyond the end of
    /// the base there are zeros. When it returns false, the content of `buf` is undefined, and the caller must use
    /// [`read`](Self::read).
    #[must_use]
    pub fn read_now(&self, offset: u64, buf: &mut [u8], touch: Touch) -> bool {
        if self.refused.load(Ordering::Relaxed) {
            return false;
        }
        let inside = self.zero_past_end(offset, buf);
        self.cached(offset, &mut buf[..inside], touch) == inside
    }

    /// Fills `buf` from `offset` on; beyond the end of the base there are zeros. Missing blocks are read from the
    /// sources, adjacent ones in one request, and that may take as long as the source's disk needs. The last request
    /// reads up to `readahead` more bytes ahead, unless the next block is in memory or the source is remote: a remote
    /// source has its own readahead. Returns where the bytes came from.
    ///
    /// # Errors
    /// `NotHere` when bytes must be fetched first; all of them are under way then. Else `Changed` or `Io`. After an error
    /// the content of `buf` is undefined.
    pub fn read(
        &self,
        offset: u64,
        buf: &mut [u8],
        touch: Touch,
        readahead: u32,
    ) -> Result<Origins, BaseError> {
        self.check_refused(offset, buf.len() as u64)?;
        let inside = self.zero_past_end(offset, buf);
        let readahead = if self.remote { 0 } else { readahead };
        let mut pending = PendingFetches::default();
        let mut origins = Origins::default();
        origins.add(Origin::Zero, buf.len() - inside);
        let mut done = 0;
        while done < inside {
            let rest = &mut buf[done..inside];
            let cached = self.cached(offset + done as u64, rest, touch);
            origins.add(Origin::Memory, cached);
            done += cached;
            if done < inside {
                let fetched = self.fetch(offset + done as u64, &mut rest[cached..], readahead);
                let noted = match fetched.result {
                    Err(Cause::Source(error)) => pending.wait_for(error).map_err(Cause::Source),
                    other => other,
                };
                noted.map_err(|cause| self.failed(fetched.from, fetched.asked, cause))?;
                origins.add(fetched.origin, fetched.length);
                done += fetched.length;
            }
        }
        pending.end().map_err(|cause| self.failed(offset, inside as u64, cause))?;
        Ok(origins)
    }

    /// The first offset at or after `offset` that may hold data; `None` if there is none up to the end.
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

    /// The first offset at or after `offset` that is in a hole. The end of the base begins a hole.
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

    /// Zeroes the part of `buf` beyond the end of the base. Returns the length of the other part.
    fn zero_past_end(&self, offset: u64, buf: &mut [u8]) -> usize {
        let left = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let inside = left.min(buf.len());
        buf[inside..].fill(0);
        inside
    }

    /// Copies cached bytes, up to the first missing block. Returns the number of bytes.
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

    /// Counts bytes that were found in memory.
    fn found(&self, bytes: usize) -> usize {
        if bytes > 0 {
            self.traffic.add(Reason::Memory, bytes as u64);
        }
        bytes
    }

    /// Reads the missing blocks at `offset` from the sources, caches them, and copies their bytes to `buf`, which lies
    /// inside the base.
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
        let (filled, slowest) = observe(|| self.fill(&mut fetched[..bytes], from));
        let origin = match slowest {
            // The image says that the range reads as zeros.
            None if self.stack.raw().is_none() => Origin::Zero,
            Some(Provenance::Kept) => Origin::Disk,
            Some(Provenance::Fetched) | None => Origin::Fetched,
        };
        let result = filled.map(|()| {
            let (wanted, ahead) = fetched[..bytes].split_at(missing * BLOCK);
            self.cache.insert(self.id, first, wanted);
            self.cache.insert_ahead(self.id, first + missing as u64, ahead);
            self.cache.record_misses(missing as u64);
            buf[..length].copy_from_slice(&wanted[skip..skip + length]);
        });
        FETCH_BUFFER.set(Some(fetched));
        Fetched { length, from, asked: (self.size() - from).min(bytes as u64), origin, result }
    }

    /// Reads whole blocks into `blocks`, with zeros beyond the end.
    fn fill(&self, blocks: &mut [u8], from: u64) -> Result<(), Cause> {
        let inside = usize::try_from(self.size() - from).unwrap_or(usize::MAX).min(blocks.len());
        match self.stack.raw() {
            Some(source) => {
                let read = source.read_at(blocks, from)?;
                if read != inside {
                    return Err(self.ended_early().into());
                }
            }
            None => self
                .stack
                .read(&mut blocks[..inside], from, |start, cluster| self.cache_cluster(start, cluster))?,
        }
        blocks[inside..].fill(0);
        if !self.remote {
            // Remote sources count their own fetches.
            self.traffic.add(Reason::Demand, inside as u64);
        }
        Ok(())
    }

    /// Caches the blocks of a decompressed cluster, because a reader of a part of it is likely to read more.
    fn cache_cluster(&self, start: u64, cluster: &[u8]) {
        if !start.is_multiple_of(BLOCK as u64) {
            return;
        }
        let whole = cluster.len() / BLOCK * BLOCK;
        self.cache.insert_ahead(self.id, start / BLOCK as u64, &cluster[..whole]);
    }

    /// The number of blocks to read ahead from `next` on, in a request that reads `taken` other blocks.
    fn ahead(&self, next: u64, taken: usize, readahead: u32) -> usize {
        let left = self.size().div_ceil(BLOCK as u64).saturating_sub(next);
        let most = (readahead as usize).div_ceil(BLOCK).min(MAX_FETCH_BLOCKS - taken);
        let most = usize::try_from(left).unwrap_or(usize::MAX).min(most);
        self.cache.missing_run(self.id, next, most)
    }

    /// The error for a source that returns fewer bytes than its size promises.
    fn ended_early(&self) -> SourceError {
        let early =
            std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the source ended before its size");
        SourceError::from_io("read", std::path::Path::new(&self.name), early)
    }

    fn failed(&self, offset: u64, length: u64, cause: Cause) -> BaseError {
        BaseError { base: self.name.clone(), offset, length, cause }
    }
}

/// The result of one request to the sources.
struct Fetched {
    /// The bytes of the caller's buffer that it covers, at least one.
    length: usize,
    /// Its offset in the virtual disk.
    from: u64,
    /// Its length in bytes.
    asked: u64,
    /// Where its bytes came from, if it succeeded.
    origin: Origin,
    result: Result<(), Cause>,
}

impl Drop for Base {
    fn drop(&mut self) {
        self.cache.forget(self.id);
    }
}
