//! The shared image: one virtual disk, read-only, as every disk on it sees it, over cached bytes of a source.
//!
//! It is the only place that knows both the cache and the source. What must hold:
//! - A read returns the bytes that the source had when it was opened, or an error; bytes of a changed source
//!   neither reach a reader nor the cache (the source vouches for each read before it is inserted).
//! - [`Base::read_now`] waits for nothing; everything that may wait is in [`Base::read`].
//! - The result never depends on what the cache keeps: `read` takes fetched bytes from the fetch, so a cache
//!   of no blocks works too.
//!
//! Formats: raw, where the virtual disk is the source.

pub mod readahead;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::sync::Arc;

use crate::cache::{BLOCK, BlockCache, CacheId, Owner, Touch};
use crate::source::{AlignedBuf, Arrival, Identity, Source, SourceError, SourceErrorKind};

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

/// A read of a base that failed. The message is complete, the source's own included.
#[derive(Debug, thiserror::Error)]
#[error("base {base}: reading {length} bytes at offset {offset}: {cause}")]
pub struct BaseError {
    base: String,
    offset: u64,
    length: u64,
    cause: SourceError,
}

impl BaseError {
    pub fn kind(&self) -> BaseErrorKind {
        match self.cause.kind() {
            SourceErrorKind::Changed => BaseErrorKind::Changed,
            SourceErrorKind::NotHere => BaseErrorKind::NotHere,
            SourceErrorKind::NotFound
            | SourceErrorKind::NotAFile
            | SourceErrorKind::Permission
            | SourceErrorKind::Empty
            | SourceErrorKind::OwnMount
            | SourceErrorKind::Outside
            | SourceErrorKind::Denied
            | SourceErrorKind::Unreachable
            | SourceErrorKind::Protocol
            | SourceErrorKind::Io => BaseErrorKind::Io,
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

    /// What the source said.
    pub fn cause(&self) -> &SourceError {
        &self.cause
    }
}

/// A base in use. Dropping it drops its blocks from the cache.
pub struct Base {
    name: String,
    source: Arc<dyn Source>,
    cache: Arc<BlockCache>,
    id: CacheId,
    size: u64,
}

impl Base {
    /// `number` is the base's own, and never another's: blocks of it that an earlier worker left are used again
    /// when the source has the same identity as then.
    pub fn new(number: u64, name: String, source: Arc<dyn Source>, cache: Arc<BlockCache>) -> Self {
        let id = cache.register_as(Owner::new(number, &source.identity().to_bytes()));
        let size = source.size();
        Self { name, source, cache, id, size }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes of the virtual disk; any number.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes of it that are in memory.
    pub fn cached_bytes(&self) -> u64 {
        self.cache.cached_bytes(self.id)
    }

    /// What the source was when it was opened.
    pub fn identity(&self) -> &Identity {
        self.source.identity()
    }

    /// Whether the source is still what it was.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn check(&self) -> Result<(), BaseError> {
        self.source.check().map_err(|cause| self.failed(0, 0, cause))
    }

    /// Fills `buf` from `offset` on if all of it is in memory: no waiting, no system call. Past the end of
    /// the base there are zeros. If false, the content of `buf` is undefined, and [`read`](Self::read) is the
    /// way.
    #[must_use]
    pub fn read_now(&self, offset: u64, buf: &mut [u8], touch: Touch) -> bool {
        let inside = self.zero_past_end(offset, buf);
        self.cached(offset, &mut buf[..inside], touch) == inside
    }

    /// Fills `buf` from `offset` on; past the end of the base there are zeros. What is not in memory comes
    /// from the source, in pieces as large as neighbouring missing blocks allow, and may take as long as the
    /// source does. The last piece is extended by up to `readahead` bytes that nobody asked for yet (none if
    /// what follows is in memory).
    ///
    /// # Errors
    /// `Changed` or `Io`; then the content of `buf` is undefined.
    pub fn read(&self, offset: u64, buf: &mut [u8], touch: Touch, readahead: u32) -> Result<(), BaseError> {
        let inside = self.zero_past_end(offset, buf);
        let mut done = 0;
        while done < inside {
            let rest = &mut buf[done..inside];
            let cached = self.cached(offset + done as u64, rest, touch);
            done += cached;
            if done < inside {
                done += self.fetch(offset + done as u64, &mut rest[cached..], readahead)?;
            }
        }
        Ok(())
    }

    /// The first offset at or after `offset` that may hold data; none up to the end.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn next_data(&self, offset: u64) -> Result<Option<u64>, BaseError> {
        if offset >= self.size {
            return Ok(None);
        }
        let found = self.source.next_data(offset).map_err(|cause| self.failed(offset, 0, cause))?;
        Ok(found.filter(|found| *found < self.size).map(|found| found.max(offset)))
    }

    /// The first offset at or after `offset` that is in a hole; the end counts as one, and so does what lies
    /// beyond it.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn next_hole(&self, offset: u64) -> Result<u64, BaseError> {
        if offset >= self.size {
            return Ok(self.size);
        }
        let found = self.source.next_hole(offset).map_err(|cause| self.failed(offset, 0, cause))?;
        Ok(found.clamp(offset, self.size))
    }

    /// Zeroes what lies past the end, and returns how many bytes of `buf` do not.
    fn zero_past_end(&self, offset: u64, buf: &mut [u8]) -> usize {
        let left = usize::try_from(self.size.saturating_sub(offset)).unwrap_or(usize::MAX);
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
                return done;
            }
        }
        if done < buf.len() && self.cache.read_part(self.id, block, 0, &mut buf[done..], touch) {
            done = buf.len();
        }
        done
    }

    /// Reads the missing blocks at `offset` from the source, keeps them, and copies to `buf`, which lies
    /// inside the base, what belongs there. Returns bytes, at least one.
    fn fetch(&self, offset: u64, buf: &mut [u8], readahead: u32) -> Result<usize, BaseError> {
        let first = offset / BLOCK as u64;
        let skip = (offset % BLOCK as u64) as usize;
        let asked = (skip + buf.len()).div_ceil(BLOCK);
        // At least one: another thread may have inserted the block since it was missed.
        let missing = self.cache.missing_run(self.id, first, asked.min(MAX_FETCH_BLOCKS)).max(1);
        let ahead = if missing == asked { self.ahead(first + asked as u64, missing, readahead) } else { 0 };

        let from = first * BLOCK as u64;
        let bytes = (missing + ahead) * BLOCK;
        let inside = usize::try_from(self.size - from).unwrap_or(usize::MAX).min(bytes);
        let mut fetched = FETCH_BUFFER.take().unwrap_or_else(|| AlignedBuf::new(MAX_FETCH));
        let result = self
            .source
            .read_at(&mut fetched[..bytes], from)
            .and_then(|read| if read == inside { Ok(()) } else { Err(self.ended_early()) });
        let result = result.map(|()| {
            fetched[inside..bytes].fill(0);
            let (wanted, ahead) = fetched[..bytes].split_at(missing * BLOCK);
            self.cache.insert(self.id, first, wanted);
            self.cache.insert_ahead(self.id, first + missing as u64, ahead);
            self.cache.record_misses(missing as u64);
            let copied = buf.len().min(wanted.len() - skip);
            buf[..copied].copy_from_slice(&wanted[skip..skip + copied]);
            copied
        });
        FETCH_BUFFER.set(Some(fetched));
        result.map_err(|cause| self.failed(from, inside as u64, cause))
    }

    /// How many blocks from `next` on to read ahead, behind `taken` that are read anyway.
    fn ahead(&self, next: u64, taken: usize, readahead: u32) -> usize {
        let left = self.size.div_ceil(BLOCK as u64).saturating_sub(next);
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

    fn failed(&self, offset: u64, length: u64, cause: SourceError) -> BaseError {
        BaseError { base: self.name.clone(), offset, length, cause }
    }
}

impl Drop for Base {
    fn drop(&mut self) {
        self.cache.forget(self.id);
    }
}
