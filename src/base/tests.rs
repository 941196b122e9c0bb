use std::fs::{self, File, FileTimes};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;
use proptest::prelude::{ProptestConfig, any, prop_oneof, proptest};
use tempfile::TempDir;

use super::{Base, BaseErrorKind, Cause};
use crate::cache::{BLOCK, BlockCache, Touch};
use crate::source::{FileSource, Identity, Source, SourceError, SourceErrorKind};

const MIB: u64 = 1024 * 1024;

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn cache(limit: u64) -> Arc<BlockCache> {
    Arc::new(BlockCache::new(limit).expect("address space for a test cache"))
}

fn file(len: usize) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("image");
    fs::write(&path, pattern(len)).expect("write the image");
    (dir, path)
}

fn file_base(path: &Path, limit: u64) -> Base {
    Base::new(1, "debian".into(), Arc::new(FileSource::open(path).expect("opens")), cache(limit))
}

/// The bytes that a reader must get: the flat image, then zeros.
fn expected(flat: &[u8], offset: u64, len: usize) -> Vec<u8> {
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(flat.len());
    let end = start.saturating_add(len).min(flat.len());
    let mut bytes = flat[start..end].to_vec();
    bytes.resize(len, 0);
    bytes
}

/// Reads as a disk does: first from memory, then from the source.
fn read(base: &Base, offset: u64, len: usize, readahead: u32) -> Vec<u8> {
    let mut buf = vec![0xee; len];
    if !base.read_now(offset, &mut buf, Touch::Use) {
        base.read(offset, &mut buf, Touch::Repeat, readahead).expect("reads");
    }
    buf
}

/// A source in memory that records its requests.
struct RecordingSource {
    bytes: Vec<u8>,
    identity: Identity,
    requests: Mutex<Vec<(u64, usize)>>,
    failure: Mutex<Option<SourceErrorKind>>,
}

impl RecordingSource {
    fn new(len: usize) -> Arc<Self> {
        let identity = Identity::Contents { size: len as u64, key: [0; 32] };
        Arc::new(Self {
            bytes: pattern(len),
            identity,
            requests: Mutex::default(),
            failure: Mutex::default(),
        })
    }

    fn requests(&self) -> Vec<(u64, usize)> {
        std::mem::take(&mut self.requests.lock())
    }
}

impl Source for RecordingSource {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<usize, SourceError> {
        self.requests.lock().push((offset, buf.len()));
        assert!(buf.as_ptr().addr().is_multiple_of(4096) && buf.len() <= MIB as usize);
        // Overwrite the buffer even when the read fails.
        buf.fill(0xbb);
        self.check()?;
        let start = self.bytes.len().min(offset as usize);
        let end = self.bytes.len().min(start + buf.len());
        buf[..end - start].copy_from_slice(&self.bytes[start..end]);
        Ok(end - start)
    }

    fn size(&self) -> u64 {
        self.identity.size()
    }

    fn identity(&self) -> &Identity {
        &self.identity
    }

    fn next_data(&self, offset: u64) -> Result<Option<u64>, SourceError> {
        Ok(Some(offset))
    }

    fn next_hole(&self, _offset: u64) -> Result<u64, SourceError> {
        Ok(u64::MAX)
    }

    fn check(&self) -> Result<(), SourceError> {
        match *self.failure.lock() {
            Some(kind) => Err(SourceError::new(kind, "read", Path::new("/images/recorded"))),
            None => Ok(()),
        }
    }
}

#[test]
fn a_repeated_read_is_answered_from_memory() {
    let source = RecordingSource::new(100_001);
    let base = Base::new(1, "debian".into(), source.clone(), cache(MIB));
    assert_eq!((base.name(), base.size()), ("debian", 100_001));
    let mut buf = vec![0; 5000];
    assert!(!base.read_now(3000, &mut buf, Touch::Use));
    assert_eq!(source.requests(), [], "read_now never asks the source");
    base.read(3000, &mut buf, Touch::Use, 0).expect("reads");
    assert_eq!(buf, expected(&source.bytes, 3000, 5000));
    assert_eq!(source.requests(), [(0, 2 * BLOCK)]);
    assert_eq!(base.cached_bytes(), 2 * BLOCK as u64);

    buf.fill(0);
    assert!(base.read_now(3000, &mut buf, Touch::Use));
    assert_eq!(buf, expected(&source.bytes, 3000, 5000));
    assert!(base.read_now(0, &mut buf[..1], Touch::Use));
    assert!(base.read_now(8192, &mut buf[..0], Touch::Use), "an empty read always succeeds");
    assert!(!base.read_now(8191, &mut buf[..2], Touch::Use));
}

#[test]
fn reads_beyond_the_end_return_zeros() {
    let source = RecordingSource::new(4097);
    let base = Base::new(1, "debian".into(), source.clone(), cache(MIB));
    for (offset, len) in [(0, 20_000), (4096, 4096), (4097, 10), (5000, 3), (1 << 40, 8192), (u64::MAX, 1)] {
        assert_eq!(read(&base, offset, len, 65536), expected(&source.bytes, offset, len), "{offset}+{len}");
    }
    source.requests();
    assert!(base.read_now(4097, &mut [1; 100_000], Touch::Use));
    assert_eq!(source.requests(), []);
    assert_eq!(base.cached_bytes(), 2 * BLOCK as u64);
}

#[test]
fn each_missing_run_is_one_request_and_cached_blocks_are_not_requested() {
    let source = RecordingSource::new(8 * MIB as usize);
    let base = Base::new(1, "debian".into(), source.clone(), cache(64 * MIB));
    read(&base, 10 * 4096, 2 * 4096, 0);
    assert_eq!(source.requests(), [(10 * 4096, 2 * BLOCK)]);
    assert_eq!(read(&base, 0, 20 * 4096, 0), expected(&source.bytes, 0, 20 * 4096));
    assert_eq!(source.requests(), [(0, 10 * BLOCK), (12 * 4096, 8 * BLOCK)]);

    // A request has 1 MiB at most.
    let large = read(&base, 2 * MIB + 100, 2 * MIB as usize, 4096);
    assert_eq!(large, expected(&source.bytes, 2 * MIB + 100, 2 * MIB as usize));
    let mib = MIB as usize;
    assert_eq!(source.requests(), [(2 * MIB, mib), (3 * MIB, mib), (4 * MIB, 2 * BLOCK)]);
}

#[test]
fn readahead_extends_the_last_run_up_to_a_cached_block_or_the_end() {
    let source = RecordingSource::new(100 * BLOCK + 1);
    let base = Base::new(1, "debian".into(), source.clone(), cache(64 * MIB));
    read(&base, 50 * 4096, 1, 0);
    read(&base, 90 * 4096, 1, 65536);
    assert_eq!(source.requests(), [(50 * 4096, BLOCK), (90 * 4096, 11 * BLOCK)]);
    read(&base, 40 * 4096, 4096, 65536);
    assert_eq!(source.requests(), [(40 * 4096, 10 * BLOCK)], "up to the cached block");
    read(&base, 0, 4096, 5000);
    assert_eq!(source.requests(), [(0, 3 * BLOCK)], "rounded up to blocks");
    read(&base, 48 * 4096, 3 * 4096, 5000);
    assert_eq!(source.requests(), [], "a hit reads nothing ahead");
    // Each read missed one block. Blocks that were read ahead are no misses.
    assert_eq!(base.cache.stats().misses, 4);
    assert_eq!(read(&base, 0, 101 * BLOCK, u32::MAX), expected(&source.bytes, 0, 101 * BLOCK));
}

#[test]
fn a_failed_read_caches_nothing() {
    let source = RecordingSource::new(100_000);
    let base = Base::new(1, "debian".into(), source.clone(), cache(MIB));
    read(&base, 0, 4096, 0);
    let mut buf = vec![0; 8192];
    for (failure, kind) in
        [(SourceErrorKind::Io, BaseErrorKind::Io), (SourceErrorKind::Changed, BaseErrorKind::Changed)]
    {
        *source.failure.lock() = Some(failure);
        let error = base.read(100, &mut buf, Touch::Use, 4096).expect_err("must fail");
        assert_eq!((error.kind(), error.offset(), error.base()), (kind, 4096, "debian"));
        assert!(matches!(error.cause(), Cause::Source(cause) if cause.kind() == failure), "{error:?}");
        let message = error.to_string();
        assert!(
            message.starts_with("base debian: reading 12288 bytes at offset 4096: cannot read /images/"),
            "{message}"
        );
        assert_eq!(base.cached_bytes(), BLOCK as u64);
        assert_eq!(base.check().expect_err("must fail").kind(), kind);
    }
    *source.failure.lock() = None;
    base.read(100, &mut buf, Touch::Use, 4096).expect("reads again");
    assert_eq!(buf, expected(&source.bytes, 100, 8192));
}

#[test]
fn data_and_holes_are_clipped_to_the_base() {
    let source = RecordingSource::new(10_000);
    let base = Base::new(1, "debian".into(), source, cache(MIB));
    assert_eq!(base.next_data(9_999).expect("seeks"), Some(9_999));
    assert_eq!(base.next_data(10_000).expect("seeks"), None);
    assert_eq!(base.next_hole(5).expect("seeks"), 10_000);
    assert_eq!(base.next_hole(20_000).expect("seeks"), 10_000);
}

#[test]
fn the_blocks_of_a_dropped_base_leave_the_cache() {
    let cache = cache(4 * MIB);
    let one = Base::new(1, "one".into(), RecordingSource::new(100_000), cache.clone());
    let two = Base::new(2, "two".into(), RecordingSource::new(200_000), cache.clone());
    read(&one, 0, 100_000, 0);
    assert_eq!(two.cached_bytes(), 0, "bases share no blocks");
    read(&two, 0, 8192, 0);
    let id = one.id;
    drop(one);
    assert_eq!(cache.cached_bytes(id), 0);
    assert_eq!(two.cached_bytes(), 8192);
}

/// Guards D6.
#[test]
fn reads_of_a_file_that_changed_in_place_return_old_bytes_or_an_error() {
    let (_dir, path) = file(40_000);
    let flat = pattern(40_000);
    let base = file_base(&path, MIB);
    assert_eq!(read(&base, 0, 4096, 0), flat[..4096]);

    let writer = File::options().write(true).open(&path).expect("opens for writing");
    let before = writer.metadata().and_then(|metadata| metadata.modified()).expect("a modification time");
    writer.write_all_at(&[0xaa; 40_000], 0).expect("writes");
    writer.set_times(FileTimes::new().set_modified(before + Duration::from_secs(1))).expect("set the time");

    let mut buf = vec![0; 4096];
    assert!(base.read_now(0, &mut buf, Touch::Use), "the cached block is right and is served");
    assert_eq!(buf, flat[..4096]);
    for offset in [4096, 8000, 2000] {
        let error = base.read(offset, &mut buf, Touch::Use, 65536).expect_err("must be refused");
        assert_eq!(error.kind(), BaseErrorKind::Changed);
        assert!(!base.read_now(offset, &mut buf, Touch::Use), "new bytes did not get into the cache");
    }
    assert_eq!(base.cached_bytes(), 4096);
    assert_eq!(base.check().expect_err("changed").kind(), BaseErrorKind::Changed);
}

#[test]
fn a_truncated_file_counts_as_changed() {
    let (_dir, path) = file(40_000);
    let base = file_base(&path, MIB);
    File::options().write(true).open(&path).and_then(|file| file.set_len(5000)).expect("truncates");
    let mut buf = vec![0; 40_000];
    for (offset, len) in [(0, 40_000), (20_000, 100), (0, 1)] {
        let error = base.read(offset, &mut buf[..len], Touch::Use, 0).expect_err("must be refused");
        assert_eq!(error.kind(), BaseErrorKind::Changed);
    }
    assert_eq!(base.cached_bytes(), 0);
}

#[test]
fn after_a_rename_over_the_file_the_old_contents_are_served() {
    let (dir, path) = file(40_000);
    let base = file_base(&path, MIB);
    let next = dir.path().join("next");
    fs::write(&next, vec![0xaa; 50_000]).expect("writes");
    fs::rename(&next, &path).expect("renames");
    assert_eq!(read(&base, 0, 45_000, 0), expected(&pattern(40_000), 0, 45_000));
    base.check().expect("the old file is unchanged");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Guards D7.
    #[test]
    fn random_reads_agree_with_the_flat_file(
        len in prop_oneof![1..20_000usize, 1..3_000_000usize],
        limit in prop_oneof![0..100_000u64, 0..2 * MIB, 4 * MIB..8 * MIB],
        reads in proptest::collection::vec((
            any::<proptest::sample::Index>(),
            prop_oneof![0..10_000usize, 0..1_500_000usize],
            prop_oneof![proptest::prelude::Just(0u32), 0..200_000u32],
            any::<bool>(),
        ), 1..25),
    ) {
        let (_dir, path) = file(len);
        let flat = pattern(len);
        let base = file_base(&path, limit);
        for (offset, length, readahead, round) in reads {
            let offset = offset.index(len + 10_000) as u64;
            let (offset, length) = if round { (offset & !4095, length & !4095) } else { (offset, length) };
            assert!(read(&base, offset, length, readahead) == expected(&flat, offset, length), "{offset}+{length}");
        }
        let stats = base.cache.stats();
        assert!(base.cached_bytes() <= limit.min(len.next_multiple_of(BLOCK) as u64));
        assert!(stats.memory_used <= limit.max(64 * 1024));
    }
}

/// Guards D7.
#[test]
fn concurrent_readers_agree_with_the_flat_file() {
    let len = 3_000_001;
    let (_dir, path) = file(len);
    let flat = pattern(len);
    for limit in [0, MIB, 16 * MIB] {
        let base = file_base(&path, limit);
        thread::scope(|scope| {
            for worker in 1..=4u64 {
                let (base, flat) = (&base, &flat);
                scope.spawn(move || {
                    let mut random = worker;
                    for _ in 0..300 {
                        random = random
                            .wrapping_mul(6_364_136_223_846_793_005)
                            .wrapping_add(1_442_695_040_888_963_407);
                        let offset = (random >> 20) % (len as u64 + 5000);
                        let length = (random >> 44) as usize % 70_000;
                        let bytes = read(base, offset, length, (random >> 50) as u32);
                        assert!(bytes == expected(flat, offset, length), "{offset}+{length}");
                    }
                });
            }
        });
    }
}
