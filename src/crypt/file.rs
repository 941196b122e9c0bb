//! A data file whose blocks are encrypted.
//!
//! Blocks are encrypted whole, at their offsets: a write of a part of a block reads the block, changes it and writes all
//! of it. So the file ends with a whole block. A stored block of zeros alone was never written, or its space was freed:
//! it reads as zeros, as in a file that is not encrypted. No block encrypts to zeros alone but by chance (2^-32768).
//!
//! What must hold: the writers of a block exclude each other, as those of a delta do (its range lock). A reader never
//! decrypts a block of which a writer has stored a part: it would see other bytes than were ever written (D86). Writers
//! count, and a reader that was overtaken reads again. No writer waits for a reader.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use parking_lot::{Mutex, MutexGuard};
use zeroize::Zeroizing;

use super::DataKey;
use crate::format::BLOCK;
use crate::io::MediumFile;

/// Bytes of the file that share a counter: 64 blocks.
const STRIPE: u64 = 64 * BLOCK;
/// How many counters a file has.
const STRIPES: u64 = 64;
/// How often a reader that is overtaken tries again before it makes writers wait.
const TRIES: usize = 3;
const SIZE: usize = BLOCK as usize;

/// Counts the writes of some blocks.
#[derive(Default)]
struct Stripe {
    /// Odd while a writer writes.
    writes: AtomicU64,
    writer: Mutex<()>,
}

/// Held while blocks are written.
struct Writing<'a>(Vec<(&'a Stripe, MutexGuard<'a, ()>)>);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.iter().for_each(|(stripe, _)| _ = stripe.writes.fetch_add(1, Ordering::SeqCst));
    }
}

/// See the module.
pub struct EncryptedFile {
    file: Arc<dyn MediumFile>,
    /// `None`: the key is not here.
    key: Option<Arc<DataKey>>,
    stripes: [Stripe; STRIPES as usize],
}

fn locked() -> io::Error {
    io::Error::from_raw_os_error(libc::ENOKEY)
}

/// The range of whole blocks around a range.
fn around(offset: u64, len: u64) -> (u64, u64) {
    (offset / BLOCK * BLOCK, (offset + len).next_multiple_of(BLOCK))
}

/// The numbers of the locks of a range, ascending.
fn stripes(offset: u64, len: u64) -> impl Iterator<Item = usize> {
    let (first, last) = (offset / STRIPE, (offset + len.max(1) - 1) / STRIPE);
    let all = last - first >= STRIPES - 1;
    let (first, last) = (first % STRIPES, last % STRIPES);
    let is_in = move |n: &u64| {
        all || if first <= last { (first..=last).contains(n) } else { *n >= first || *n <= last }
    };
    (0..STRIPES).filter(is_in).map(|n| n as usize)
}

impl EncryptedFile {
    pub(super) fn new(file: Arc<dyn MediumFile>, key: Option<Arc<DataKey>>) -> Self {
        Self { file, key, stripes: std::array::from_fn(|_| Stripe::default()) }
    }

    fn key(&self) -> io::Result<&DataKey> {
        self.key.as_deref().ok_or_else(locked)
    }

    fn lock(&self, offset: u64, len: u64) -> Vec<(&Stripe, MutexGuard<'_, ()>)> {
        stripes(offset, len).map(|n| (&self.stripes[n], self.stripes[n].writer.lock())).collect()
    }

    fn writing(&self, offset: u64, len: u64) -> Writing<'_> {
        let held = self.lock(offset, len);
        held.iter().for_each(|(stripe, _)| _ = stripe.writes.fetch_add(1, Ordering::SeqCst));
        Writing(held)
    }

    /// How often a range was written, when no writer writes there now.
    fn writes(&self, offset: u64, len: u64) -> Option<u64> {
        fence(Ordering::SeqCst);
        let counts = stripes(offset, len).map(|n| self.stripes[n].writes.load(Ordering::SeqCst));
        // No counter falls, so the sums are the same only when all counters are.
        let sum =
            counts.into_iter().try_fold(0, |sum: u64, n| n.is_multiple_of(2).then(|| sum.wrapping_add(n)));
        fence(Ordering::SeqCst);
        sum
    }

    /// Decrypts whole blocks but those that were never written.
    fn decrypt(key: &DataKey, bytes: &mut [u8], offset: u64) {
        for (block, number) in bytes.chunks_exact_mut(SIZE).zip(offset / BLOCK..) {
            if block.iter().any(|byte| *byte != 0) {
                key.xts.decrypt(block, number);
            }
        }
    }

    /// Reads with `read`, which fills a buffer from an offset, in whole blocks. Returns how many bytes of `buf` the file
    /// has; `None` when a read gave `None`.
    fn read_with(
        key: &DataKey,
        buf: &mut [u8],
        offset: u64,
        read: &impl Fn(&mut [u8], u64) -> io::Result<Option<usize>>,
    ) -> io::Result<Option<usize>> {
        let blocks = |bytes: &mut [u8], at| -> io::Result<Option<usize>> {
            let Some(got) = read(bytes, at)? else { return Ok(None) };
            if !got.is_multiple_of(SIZE) {
                let why = "the file ends within a block; restore it from a backup";
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, why));
            }
            Self::decrypt(key, &mut bytes[..got], at);
            Ok(Some(got))
        };
        let mut part = Zeroizing::new([0; SIZE]);
        let mut done = 0;
        while done < buf.len() {
            let at = offset + done as u64;
            let (skip, left) = ((at % BLOCK) as usize, buf.len() - done);
            if skip == 0 && left >= SIZE {
                let wanted = left / SIZE * SIZE;
                let Some(got) = blocks(&mut buf[done..done + wanted], at)? else { return Ok(None) };
                done += got;
                if got < wanted {
                    break;
                }
            } else {
                let Some(got) = blocks(&mut *part, at - skip as u64)? else { return Ok(None) };
                let wanted = left.min(SIZE - skip);
                if got == 0 {
                    break;
                }
                buf[done..done + wanted].copy_from_slice(&part[skip..skip + wanted]);
                done += wanted;
            }
        }
        Ok(Some(done))
    }

    /// Reads a block of which a write changes a part.
    fn block(&self, key: &DataKey, start: u64, into: &mut [u8]) -> io::Result<()> {
        let got = self.file.read_at(into, start)?;
        into[got..].fill(0);
        Self::decrypt(key, into, start);
        Ok(())
    }

    fn write_with(
        &self,
        buf: &[u8],
        offset: u64,
        write: impl Fn(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        let key = self.key()?;
        let (start, end) = around(offset, buf.len() as u64);
        let mut whole = vec![0; (end - start) as usize];
        let (skip, len) = ((offset - start) as usize, whole.len());
        // Writers of a block exclude each other, so the blocks that are read here do not change.
        if skip > 0 {
            self.block(key, start, &mut whole[..SIZE])?;
        }
        if skip + buf.len() < len && (skip == 0 || len > SIZE) {
            self.block(key, end - BLOCK, &mut whole[len - SIZE..])?;
        }
        whole[skip..skip + buf.len()].copy_from_slice(buf);
        key.xts.encrypt(&mut whole, start / BLOCK);
        let _writing = self.writing(start, end - start);
        // One write, so that a power cut at a later sync leaves what it leaves of a file that is not encrypted.
        write(&whole, start)
    }
}

impl MediumFile for EncryptedFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let (key, len) = (self.key()?, buf.len() as u64);
        let mut read = || {
            let got = Self::read_with(key, buf, offset, &|buf, at| self.file.read_at(buf, at).map(Some));
            got.map(Option::unwrap_or_default)
        };
        for _ in 0..TRIES {
            let Some(writes) = self.writes(offset, len) else { break };
            let got = read()?;
            if self.writes(offset, len) == Some(writes) {
                return Ok(got);
            }
        }
        let _held = self.lock(offset, len);
        read()
    }

    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        let (key, len) = (self.key()?, buf.len() as u64);
        let Some(writes) = self.writes(offset, len) else { return Ok(None) };
        let got = Self::read_with(key, buf, offset, &|buf, at| self.file.read_now(buf, at))?;
        // A short read may be the end of what is in memory.
        let whole = |got: &usize| *got as u64 == len && self.writes(offset, len) == Some(writes);
        Ok(got.filter(whole))
    }

    fn is_in_memory(&self, offset: u64, len: u64) -> bool {
        let (start, end) = around(offset, len);
        self.file.is_in_memory(start, end - start)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_with(buf, offset, |buf, at| self.file.write_at(buf, at))
    }

    fn write_reserved(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.write_with(buf, offset, |buf, at| self.file.write_reserved(buf, at))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn check_written_back(&self) -> io::Result<()> {
        self.file.check_written_back()
    }

    fn write_stored(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let _writing = self.writing(offset, buf.len() as u64);
        self.file.write_at(buf, offset)
    }

    /// Bytes of the stored file: up to the end of the last block.
    fn len(&self) -> io::Result<u64> {
        self.file.len()
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }

    /// Keeps the whole of the last block: a part of it could not be decrypted. The caller writes zeros where it must not
    /// show what was cut.
    fn set_len(&self, len: u64) -> io::Result<()> {
        let len = len.next_multiple_of(BLOCK);
        let _writing = self.writing(0, STRIPES * STRIPE);
        self.file.set_len(len)
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        // Whole blocks only: the rest of a block could not be decrypted.
        let (start, end) = (offset.next_multiple_of(BLOCK), (offset + len) / BLOCK * BLOCK);
        if start >= end {
            return Ok(());
        }
        let _writing = self.writing(start, end - start);
        self.file.punch(start, end - start)
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let (start, end) = around(offset, len);
        self.file.allocate(start, end - start)
    }

    fn allocated(&self) -> io::Result<u64> {
        self.file.allocated()
    }

    fn has_space(&self, offset: u64, len: u64) -> io::Result<bool> {
        let (start, end) = around(offset, len);
        self.file.has_space(start, end - start)
    }

    fn identity(&self) -> io::Result<(u64, u64)> {
        self.file.identity()
    }

    fn stored(&self) -> Option<Arc<dyn MediumFile>> {
        Some(self.file.clone())
    }
}
