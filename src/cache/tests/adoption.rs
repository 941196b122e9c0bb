//! A cache in a memory file, across workers: which blocks the next worker takes over.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use proptest::prelude::{Strategy, any, prop, prop_oneof, proptest};

use super::super::{Adoption, BLOCK, BlockCache, CacheId, Owner, Touch};
use super::{MIB, content, contents, present, use_block};

const LIMIT: u64 = 8 * MIB;

fn owner(number: u64) -> Owner {
    Owner::new(number, b"size 1, modified at 2")
}

fn again(file: &OwnedFd) -> OwnedFd {
    file.try_clone().expect("descriptors")
}

/// The next worker's cache, and the result of its adoption.
fn next(file: &OwnedFd, limit: u64) -> (BlockCache, Adoption) {
    let cache = BlockCache::prepare(again(file), limit).expect("mapped");
    let adoption = cache.adopt();
    (cache, adoption)
}

fn kept(file: &OwnedFd) -> BlockCache {
    let (cache, adoption) = next(file, LIMIT);
    assert!(matches!(adoption, Adoption::Kept), "{adoption:?}");
    cache
}

/// A file that a worker left with `blocks` blocks of base 1, and their contents.
fn left(blocks: u64) -> (OwnedFd, Vec<u8>) {
    let file = BlockCache::memory_file().expect("memfd");
    let (cache, adoption) = next(&file, LIMIT);
    assert!(matches!(adoption, Adoption::Empty), "{adoption:?}");
    let data = contents(1, 0, blocks);
    cache.insert(cache.register_as(owner(1)), 0, &data);
    (file, data)
}

fn bytes_of(file: &OwnedFd) -> Vec<u8> {
    let file = File::from(again(file));
    let mut bytes = vec![0; file.metadata().expect("stat").len() as usize];
    file.read_exact_at(&mut bytes, 0).expect("read");
    bytes
}

fn write(file: &OwnedFd, at: usize, bytes: &[u8]) {
    File::from(again(file)).write_all_at(bytes, at as u64).expect("write");
}

/// The offset of a block's bytes in the file.
fn place(file: &[u8], bytes: &[u8]) -> usize {
    file.chunks(BLOCK).position(|block| block == bytes).expect("the block is in the file") * BLOCK
}

#[test]
fn the_next_worker_has_the_blocks_of_the_last_one() {
    let (file, data) = left(500);
    let cache = kept(&file);
    let (other, id) = (cache.register_as(owner(2)), cache.register_as(owner(1)));
    assert_ne!(other, id);
    let mut buf = vec![0; data.len()];
    assert_eq!(cache.missing_run(id, 0, 500), 0);
    assert_eq!(cache.read(id, 0, &mut buf, Touch::Use), 500);
    assert_eq!(buf, data);
    assert_eq!(cache.read(other, 0, &mut buf, Touch::Use), 0);
    let mut part = [0; 100];
    assert!(cache.read_part(id, 77, 4000 - 4, &mut part, Touch::Use));
    assert_eq!(part[..], content(1, 77)[3996..4096]);
    let stats = cache.stats();
    assert_eq!((stats.adopted_blocks, stats.adopted_rejected, stats.insertions), (500, 0, 0));
    assert_eq!(cache.cached_bytes(id), 500 * BLOCK as u64);
    cache.assert_consistent();

    // The worker after that has the blocks of both.
    cache.insert(id, 500, &contents(1, 500, 20));
    drop(cache);
    let cache = kept(&file);
    let id = cache.register_as(owner(1));
    let mut buf = vec![0; 520 * BLOCK];
    assert_eq!(cache.read(id, 0, &mut buf, Touch::Use), 520);
    assert_eq!(buf, contents(1, 0, 520));
    assert_eq!(cache.stats().adopted_blocks, 520);
}

#[test]
fn a_changed_source_finds_no_block_of_the_old_one() {
    let (file, _) = left(64);
    let cache = kept(&file);
    let changed = cache.register_as(Owner::new(1, b"size 1, modified at 3"));
    let mut buf = vec![0; BLOCK];
    for block in 0..64 {
        assert!(!cache.contains(changed, block));
        assert_eq!(cache.read(changed, block, &mut buf, Touch::Use), 0);
    }
    cache.insert(changed, 0, &contents(9, 0, 64));
    assert_eq!(cache.read(cache.register_as(owner(1)), 5, &mut buf, Touch::Use), 1);
    assert_eq!(buf, content(1, 5));
    assert_eq!(cache.read(changed, 5, &mut buf, Touch::Use), 1);
    assert_eq!(buf, content(9, 5));
}

#[test]
fn a_standby_accesses_nothing_until_it_adopts() {
    let (file, data) = left(300);
    let before = bytes_of(&file);
    let real = File::from(again(&file)).metadata().expect("stat").blocks();
    let standby = BlockCache::prepare(again(&file), LIMIT).expect("mapped");
    let id = standby.register_as(owner(1));
    let mut buf = vec![0; BLOCK];
    assert_eq!(standby.read(id, 0, &mut buf, Touch::Use), 0);
    assert!(!standby.read_part(id, 0, 0, &mut buf, Touch::Use));
    assert_eq!(standby.missing_run(id, 0, 10), 10);
    standby.insert(id, 0, &contents(7, 0, 300));
    standby.insert_ahead(id, 1000, &contents(7, 0, 300));
    assert_eq!((standby.cached_bytes(id), standby.stats().insertions), (0, 0));
    assert!(bytes_of(&file) == before);
    // A page that is only read is allocated, too.
    assert!(File::from(again(&file)).metadata().expect("stat").blocks() <= real + 2, "the tail was accessed");

    assert!(matches!(standby.adopt(), Adoption::Kept));
    let mut buf = vec![0; data.len()];
    assert_eq!(standby.read(id, 0, &mut buf, Touch::Use), 300);
    assert_eq!(buf, data);
}

#[test]
fn a_block_with_a_flipped_bit_is_never_read() {
    let (file, data) = left(200);
    let image = bytes_of(&file);
    let mut random = 5u64;
    let mut broken = Vec::new();
    for block in (0..200).step_by(7) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let at = place(&image, &content(1, block)) + (random >> 40) as usize % BLOCK;
        write(&file, at, &[image[at] ^ 1 << (random >> 60 & 7)]);
        broken.push(block);
    }
    let cache = kept(&file);
    let id = cache.register_as(owner(1));
    let mut buf = vec![0; BLOCK];
    for block in 0..200 {
        let found = cache.read(id, block, &mut buf, Touch::Use) == 1;
        assert_eq!(found, !broken.contains(&block), "block {block}");
        assert!(!found || buf == content(1, block));
        assert_eq!(cache.contains(id, block), found);
        assert!(found || cache.missing_run(id, block, 1) == 1);
    }
    assert_eq!(cache.stats().adopted_rejected, broken.len() as u64);
    assert_eq!(cache.cached_bytes(id), (200 - broken.len() as u64) * BLOCK as u64);
    cache.assert_consistent();

    // After they are inserted again, they are sound, also for the next worker.
    for block in broken {
        cache.insert(id, block, &content(1, block));
    }
    cache.assert_consistent();
    let mut buf = vec![0; data.len()];
    assert_eq!(cache.read(id, 0, &mut buf, Touch::Use), 200);
    assert_eq!(buf, data);
    let cache = kept(&file);
    buf.fill(0);
    assert_eq!(cache.read(cache.register_as(owner(1)), 0, &mut buf, Touch::Use), 200);
    assert_eq!((buf == data, cache.stats().adopted_rejected), (true, 0));
}

#[test]
fn the_slots_of_rejected_blocks_are_reused() {
    let (file, _) = left(100);
    let image = bytes_of(&file);
    for block in 0..100 {
        write(&file, place(&image, &content(1, block)), b"overwritten");
    }
    let cache = kept(&file);
    let (id, other) = (cache.register_as(owner(1)), cache.register_as(owner(2)));
    let mut buf = vec![0; BLOCK];
    for block in 0..100 {
        assert_eq!(cache.read(id, block, &mut buf, Touch::Use), 0);
    }
    assert_eq!(cache.stats().adopted_rejected, 100);
    let data = contents(2, 0, 4000);
    cache.insert(other, 0, &data);
    cache.assert_consistent();
    cache.forget(id);
    cache.forget(other);
    cache.assert_consistent();
    assert_eq!(cache.cached_bytes(other), 0);
}

#[test]
fn bytes_under_another_blocks_tag_are_never_read() {
    let (file, _) = left(64);
    let image = bytes_of(&file);
    // All are in one run, so in one shard. Only the tags distinguish them.
    let (one, two) = (place(&image, &content(1, 3)), place(&image, &content(1, 4)));
    write(&file, one, &content(1, 4));
    write(&file, two, &content(1, 3));
    let cache = kept(&file);
    let id = cache.register_as(owner(1));
    let mut buf = vec![0; BLOCK];
    let read: Vec<usize> = (2..6).map(|block| cache.read(id, block, &mut buf, Touch::Use)).collect();
    assert_eq!(read, [1, 0, 0, 1]);
}

/// Guards D17.
#[test]
fn a_cache_of_another_size_or_layout_starts_empty() {
    for limit in [LIMIT / 2, LIMIT + MIB, 64 * MIB] {
        let (file, _) = left(1000);
        let (cache, adoption) = next(&file, limit);
        assert!(matches!(adoption, Adoption::Dropped), "{limit}: {adoption:?}");
        let id = cache.register_as(owner(1));
        assert_eq!((present(&cache, id, 0..1000), cache.stats().adopted_blocks), (0, 0));
        cache.insert(id, 0, &contents(1, 0, 10));
        drop(cache);
        let (cache, adoption) = next(&file, limit);
        assert!(matches!(adoption, Adoption::Kept), "{limit}: {adoption:?}");
        assert_eq!(present(&cache, cache.register_as(owner(1)), 0..1000), 10);
    }
    for word in 0..5 {
        let (file, _) = left(1000);
        let mut bytes = bytes_of(&file)[word * 8..word * 8 + 8].to_vec();
        bytes[0] ^= 1;
        write(&file, word * 8, &bytes);
        let (cache, adoption) = next(&file, LIMIT);
        assert!(matches!(adoption, Adoption::Dropped), "word {word}: {adoption:?}");
        assert_eq!(present(&cache, cache.register_as(owner(1)), 0..1000), 0);
    }
}

#[test]
fn adopt_nothing_drops_all_blocks() {
    let (file, _) = left(1000);
    let cache = BlockCache::prepare(again(&file), LIMIT).expect("mapped");
    assert!(matches!(cache.adopt_nothing(), Adoption::Dropped));
    let id = cache.register_as(owner(1));
    assert_eq!(present(&cache, id, 0..1000), 0);
    cache.insert(id, 0, &contents(1, 0, 3));
    assert_eq!(present(&cache, id, 0..1000), 3);
    drop(cache);
    let cache = kept(&file);
    assert_eq!(present(&cache, cache.register_as(owner(1)), 0..1000), 3);
}

#[test]
fn the_file_takes_memory_only_for_its_blocks_and_cannot_be_truncated() {
    let (file, _) = left(64);
    let file = File::from(file);
    let meta = file.metadata().expect("stat");
    assert!(meta.len() <= LIMIT && meta.blocks() * 512 < MIB, "{} bytes for 64 blocks", meta.blocks() * 512);
    let cut = file.set_len(4096).expect_err("sealed: a mapping of it must never fault");
    assert_eq!(cut.raw_os_error(), Some(libc::EPERM));
}

#[test]
fn blocks_that_were_used_again_stay_in_the_main_queue_of_the_next_worker() {
    let file = BlockCache::memory_file().expect("memfd");
    let (cache, _) = next(&file, LIMIT);
    let capacity = cache.capacity_blocks() as u64;
    let hot_blocks = capacity / 2;
    let mut buf = vec![0; BLOCK];
    let (hot, scanned) = (cache.register_as(owner(1)), cache.register_as(owner(2)));
    for _ in 0..2 {
        for block in 0..hot_blocks {
            use_block(&cache, hot, block, &mut buf);
        }
    }
    // The scan pushes the hot blocks out of the small queue into the main queue.
    for block in 0..capacity * 2 {
        use_block(&cache, scanned, block, &mut buf);
    }
    drop(cache);
    let cache = kept(&file);
    let (hot, scanned) = (cache.register_as(owner(1)), cache.register_as(owner(2)));
    for block in capacity * 2..capacity * 6 {
        use_block(&cache, scanned, block, &mut buf);
    }
    let left = present(&cache, hot, 0..hot_blocks) as u64;
    assert!(left * 10 >= hot_blocks * 9, "{left} of {hot_blocks} hot blocks are left");
}

#[test]
fn a_base_that_was_attached_twice_leaves_no_rejected_blocks() {
    let (file, data) = left(100);
    let cache = kept(&file);
    let first = cache.register_as(owner(1));
    assert_eq!(present(&cache, first, 0..100), 100);
    cache.forget(first);
    let second = cache.register_as(owner(1));
    assert_ne!(first, second, "an id is never used again");
    assert_eq!(present(&cache, second, 0..100), 0);
    // They go into other slots when other blocks came in between.
    cache.insert(cache.register_as(owner(2)), 0, &contents(2, 0, 50));
    cache.insert(second, 0, &data);
    drop(cache);
    let cache = kept(&file);
    let id = cache.register_as(owner(1));
    let mut buf = vec![0; data.len()];
    assert_eq!(cache.read(id, 0, &mut buf, Touch::Use), 100);
    assert_eq!((buf == data, cache.stats().adopted_rejected), (true, 0));
    cache.assert_consistent();
}

#[test]
fn blocks_without_an_owner_do_not_outlive_their_worker() {
    let (file, _) = left(1);
    let cache = kept(&file);
    let id = cache.register();
    cache.insert(id, 0, &contents(3, 0, 50));
    assert_eq!(present(&cache, id, 0..50), 50);
    drop(cache);
    let cache = kept(&file);
    assert_eq!(cache.stats().adopted_blocks, 1);
}

#[derive(Clone, Debug)]
enum Damage {
    Bytes { at: usize, length: usize, value: u8 },
    Copy { from: usize, to: usize, length: usize },
    Word { at: usize, value: u64 },
}

fn damages() -> impl Strategy<Value = Vec<Damage>> {
    // The first 3 MiB hold the header, the tags and the used part of the first shards.
    let at = prop_oneof![0..4096usize, 0..70_000usize, 0..3_000_000usize];
    let damage = prop_oneof![
        (at.clone(), 1..5000usize, any::<u8>()).prop_map(|(at, length, value)| Damage::Bytes {
            at,
            length,
            value
        }),
        (at.clone(), at.clone(), 1..9000usize).prop_map(|(from, to, length)| Damage::Copy {
            from,
            to,
            length
        }),
        (0..3000usize, 0..3000usize, 1..3usize).prop_map(|(from, to, tags)| Damage::Copy {
            from: BLOCK + from * 32,
            to: BLOCK + to * 32,
            length: tags * 32
        }),
        (at, any::<u64>()).prop_map(|(at, value)| Damage::Word { at: at / 8 * 8, value }),
        (16..20usize, 0..5000u64).prop_map(|(word, value)| Damage::Word { at: word * 8, value }),
    ];
    prop::collection::vec(damage, 1..12)
}

proptest! {
    #![proptest_config(proptest::prelude::ProptestConfig::with_cases(64))]

    /// After any stray write of a worker, the next one reads the inserted bytes or none.
    /// Guards D17.
    #[test]
    fn no_damage_makes_a_read_return_a_wrong_byte(damages in damages()) {
        let (file, data) = left(600);
        let mut image = bytes_of(&file);
        for damage in damages {
            match damage {
                Damage::Bytes { at, length, value } => image[at..at + length].fill(value),
                Damage::Copy { from, to, length } => image.copy_within(from..from + length, to),
                Damage::Word { at, value } => image[at..at + 8].copy_from_slice(&value.to_le_bytes()),
            }
        }
        write(&file, 0, &image);
        for round in 0..2 {
            let (cache, _) = next(&file, LIMIT);
            let id = cache.register_as(owner(1));
            let mut buf = vec![0; BLOCK];
            for (block, bytes) in (0..).zip(data.chunks(BLOCK)) {
                if cache.read(id, block, &mut buf, Touch::Use) == 1 {
                    assert!(buf == bytes, "round {round}, block {block}");
                } else {
                    cache.insert(id, block, bytes);
                }
                assert_eq!(cache.read(id, block, &mut buf, Touch::Use), 1);
                assert!(buf == bytes, "round {round}, block {block}");
            }
            cache.assert_consistent();
        }
    }
}

const VICTIM: &str = "PLYFS_TEST_CACHE_VICTIM";
const VICTIM_BLOCKS: u64 = 6000;

fn victim_id(cache: &BlockCache, base: u64) -> CacheId {
    cache.register_as(owner(base))
}

/// Not a test by itself: the process that the test below kills.
#[test]
fn victim() {
    let Ok(path) = std::env::var(VICTIM) else { return };
    let file = File::options().read(true).write(true).open(path).expect("the parent's memory file");
    let (cache, _) = next(&file.into(), LIMIT);
    println!("victim runs");
    thread::scope(|scope| {
        for thread in 0..3u64 {
            let cache = &cache;
            scope.spawn(move || {
                let mut random = u64::from(std::process::id()) << 8 | thread;
                let mut buf = vec![0; 40 * BLOCK];
                loop {
                    random = random
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1_442_695_040_888_963_407);
                    let (base, first) = (1 + (random >> 20) % 2, (random >> 33) % VICTIM_BLOCKS);
                    let length = 1 + (random >> 50) % 40;
                    let id = victim_id(cache, base);
                    let found = cache.read(id, first, &mut buf, Touch::Use);
                    if buf[..found * BLOCK] != contents(base, first, found as u64) {
                        println!("wrong bytes");
                        std::process::abort();
                    }
                    cache.insert(id, first, &contents(base, first, length));
                }
            });
        }
    });
}

/// Guards D18.
#[test]
fn a_worker_that_is_killed_at_any_moment_leaves_only_right_blocks() {
    let file = BlockCache::memory_file().expect("memfd");
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_fd().as_raw_fd());
    let mut adopted = 0;
    for kill in 0..25u64 {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "cache::tests::adoption::victim", "--nocapture", "--test-threads=1"])
            .env(VICTIM, &path)
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let mut said = BufReader::new(child.stdout.take().expect("a pipe")).lines().map_while(Result::ok);
        assert!(said.any(|line| line.ends_with("victim runs")), "the victim did not start");
        thread::sleep(Duration::from_micros(500 + kill * 1700));
        child.kill().expect("killed");
        let rest: Vec<String> = said.collect();
        assert!(rest.iter().all(|line| !line.contains("wrong")), "{rest:?}");
        assert!(!child.wait().expect("reaped").success());

        let cache = kept(&file);
        let mut model: HashMap<u64, CacheId> = HashMap::new();
        let mut buf = vec![0; BLOCK];
        for base in [1, 2] {
            let id = *model.entry(base).or_insert_with(|| victim_id(&cache, base));
            for block in 0..VICTIM_BLOCKS + 40 {
                if cache.read(id, block, &mut buf, Touch::Use) == 1 {
                    assert!(buf == content(base, block), "kill {kill}, base {base}, block {block}");
                    adopted += 1;
                }
            }
        }
        cache.assert_consistent();
        // A slot that was being written has no tag, so no block is rejected.
        assert_eq!(cache.stats().adopted_rejected, 0, "kill {kill}");
    }
    assert!(adopted > 10_000, "{adopted} blocks were taken over in all: the test tested little");
}
