//! Flushes of large maps, and writers that go on meanwhile.

use super::*;
use crate::io::LIVE_PAGE_WORDS;
use crate::io::prefault::counted::most_of;
use crate::mutant::simulate;

/// Fills `pages` pages of a map as scattered writes of a guest leave it: neighbouring words differ, and all are dirty.
fn scatter(delta: &Delta, pages: u64) {
    delta.open_data().unwrap();
    for no in 0..pages {
        let page = delta.map.live().prepare(no).unwrap();
        for (at, word) in page.iter().enumerate().take(LIVE_PAGE_WORDS) {
            // Hides the base except for one block.
            let zeros = 0xaaaa_aaaa_aaaa_aaaa & !(1 << (at % 32 * 2 + 1));
            let value = if at < 8 { u64::MAX >> (if at == 7 { 16 } else { 0 }) } else { zeros };
            if !(8..16).contains(&at) {
                word.store(value, Ordering::Release);
            }
        }
    }
}

/// The longest write to a map file since this call.
fn longest_write(rig: &Rig) -> Arc<AtomicU64> {
    let (longest, before) = (Arc::new(AtomicU64::new(0)), AtomicU64::new(0));
    let (seen, medium) = (longest.clone(), rig.medium.clone());
    rig.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.call == Call::Write && event.stage == Stage::After && event.name.ends_with(".map") {
            let len = medium.open(event.name, Open::Existing)?.len()?;
            let last = before.swap(len, Ordering::AcqRel);
            seen.fetch_max(len.saturating_sub(last), Ordering::AcqRel);
        }
        Ok(())
    })));
    longest
}

#[test]
fn a_flush_of_a_large_map_has_bounded_memory() {
    // 256 GiB: a map of 16 MiB.
    const PAGES: u64 = 4200;
    let size = PAGES * 496 * 32 * BLOCK;
    let rig = Rig { overlap: size, ..Rig::new() };
    let delta = rig.open();
    delta.resize(size, Durability::Flush).unwrap();
    scatter(&delta, PAGES);
    let longest = longest_write(&rig);
    delta.flush().unwrap();
    let first = longest.load(Ordering::Acquire);
    assert!((1 << 20..5 << 20).contains(&first), "a write of {first} bytes");
    let root = *rig.roots.0.lock();
    assert!(root.floor > PAGES * 496 * 8, "{root:?}");
    // Appended, and rewritten.
    for _ in 0..2 {
        scatter(&delta, PAGES);
        (0..PAGES).for_each(|page| delta.map.mark_dirty(page * 496 * 32));
        delta.flush().unwrap();
    }
    delta.commit.lock().rewrite = true;
    delta.flush().unwrap();
    let all = longest.load(Ordering::Acquire);
    assert!(all < 5 << 20, "a write of {all} bytes");
    assert!(rig.roots.0.lock().generation > root.generation);
    rig.medium.set_hook(None);
    let (_after, cut) = rig.cut(NOTHING);
    for no in [0, 1, PAGES / 2, PAGES - 1] {
        let (ours, theirs) = (delta.map.live().page(no).unwrap(), cut.map.live().page(no).unwrap());
        let word = |page: &[AtomicU64; LIVE_PAGE_WORDS], at: usize| page[at].load(Ordering::Acquire);
        let same = (16..LIVE_PAGE_WORDS).all(|at| word(ours, at) != 0 && word(ours, at) == word(theirs, at));
        assert!(same, "page {no}");
    }
}

/// Guards D12.
#[test]
fn a_word_that_changes_while_it_is_flushed_claims_only_what_is_synced() {
    for keep in [NOTHING, ALL] {
        let rig = Rig { overlap: 65_536, ..Rig::new() };
        let delta = rig.open();
        // In the first flush, which writes a new file, and in one that appends.
        for (round, first) in [(1, 0), (2, 5)] {
            put(&delta, first, round);
            let other = delta.clone();
            rig.once(Call::SyncData, ".data", Stage::After, move || put(&other, first + 1, round));
            delta.flush().unwrap();
            rig.medium.set_hook(None);
            let (_after, cut) = rig.cut(keep);
            assert_eq!(byte(&cut, first), round, "a flushed block");
            assert!([0xba, round].contains(&byte(&cut, first + 1)), "{}", byte(&cut, first + 1));
            assert_eq!(byte(&cut, first + 2), 0xba);
        }
        delta.flush().unwrap();
        let (_after, cut) = rig.cut(NOTHING);
        assert_eq!((byte(&cut, 1), byte(&cut, 6)), (1, 2), "flushed by the next");
    }
}

#[test]
fn writers_go_on_while_a_flush_writes_its_records() {
    let _small = simulate(None);
    let rig = Rig::new();
    let delta = rig.open();
    delta.resize(1 << 30, Durability::Flush).unwrap();
    // Distant words: a record holds few of them.
    let block = |n: u64| n * 4001;
    (0..60).for_each(|n| put(&delta, block(n), 1));
    let (other, writes) = (delta.clone(), Arc::new(AtomicU64::new(0)));
    let count = writes.clone();
    rig.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.call == Call::Write && event.name.ends_with(".map") && event.stage == Stage::Before {
            let n = count.fetch_add(1, Ordering::AcqRel);
            if n < 1000 {
                // Changes words that the flush has written, and words that it has yet to write.
                put(&other, block(n % 60) + 1, 2);
                put(&other, block(59 - n % 60) + 2, 3);
            }
        }
        Ok(())
    })));
    delta.flush().unwrap();
    let written = writes.load(Ordering::Acquire);
    assert!(written > 10, "{written} writes to the map file");
    assert!(written < 400, "{written} writes: a flush that follows its writers does not end");
    rig.medium.set_hook(None);
    let (_after, cut) = rig.cut(NOTHING);
    (0..60).for_each(|n| assert_eq!(byte(&cut, block(n)), 1, "block {n}"));
    delta.flush().unwrap();
    let (_after, cut) = rig.cut(NOTHING);
    (0..60).for_each(|n| assert_eq!(byte(&cut, block(n)), 1, "block {n}"));
    (0..10).for_each(|n| assert_eq!(byte(&cut, block(n) + 1), 2, "block {n}"));
}

#[test]
fn a_flush_of_many_records_that_is_cut_anywhere_leaves_each_block_old_or_new() {
    for keep in [NOTHING, ALL, Keep { sectors: 50, lengths: 50, entries: 50, stale: true }] {
        let _small = simulate(None);
        let rig = Rig::new();
        let delta = rig.open();
        delta.resize(1 << 28, Durability::Flush).unwrap();
        let block = |n: u64| n * 4001;
        (0..12).for_each(|n| put(&delta, block(n), 1));
        delta.flush().unwrap();
        (0..16).for_each(|n| put(&delta, block(n), 2));
        let cuts = Arc::new(AtomicU64::new(0));
        let (count, medium) = (cuts.clone(), rig.medium.clone());
        let roots = rig.roots.clone();
        rig.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
            if event.name.ends_with(".map") {
                let medium = medium.crash(&mut Rng::new(count.fetch_add(1, Ordering::AcqRel)), keep);
                let root = Mutex::new(*roots.0.lock());
                let after = Rig {
                    medium,
                    live: Arc::default(),
                    roots: Arc::new(Roots(root)),
                    overlap: 0,
                    rises: false,
                };
                let cut = after.open();
                for n in 0..16 {
                    let allowed: &[u8] = if n < 12 { &[1, 2] } else { &[0, 2] };
                    assert!(allowed.contains(&byte(&cut, block(n))), "block {n}: {}", byte(&cut, block(n)));
                }
            }
            Ok(())
        })));
        delta.flush().unwrap();
        delta.commit.lock().rewrite = true;
        put(&delta, block(1), 2);
        delta.flush().unwrap();
        assert!(cuts.load(Ordering::Acquire) > 12);
        rig.medium.set_hook(None);
        let (_after, cut) = rig.cut(NOTHING);
        (0..16).for_each(|n| assert_eq!(byte(&cut, block(n)), 2, "block {n}"));
    }
}

/// Guards D13.
#[test]
fn words_that_a_dead_worker_took_are_flushed_by_the_next_without_a_scan_at_attach() {
    [false, true].into_iter().for_each(taken_and_not_given_back);
}

fn taken_and_not_given_back(is_tended: bool) {
    let rig = Rig::new();
    let delta = rig.open();
    put(&delta, 3, 7);
    rig.fail(Call::SyncData, ".map", libc::EIO);
    // The worker dies in the middle of a flush: words are taken and not given back.
    std::mem::forget(TakenWords::take(&delta));
    drop(delta);
    rig.open().flush().unwrap_err();
    let next = rig.open();
    if is_tended {
        next.tend_map(1);
    }
    next.flush().unwrap();
    let (_after, cut) = rig.cut(NOTHING);
    assert_eq!(byte(&cut, 3), 7);
}

/// The map file is as large as the map, several times after appends. Guards D99.
#[test]
fn attaching_a_disk_with_a_large_map_takes_bounded_memory_beside_the_live_map() {
    const PAGES: u64 = 4200;
    let size = PAGES * 496 * 32 * BLOCK;
    let rig = Rig { overlap: size, ..Rig::new() };
    let delta = rig.open();
    delta.resize(size, Durability::Flush).unwrap();
    scatter(&delta, PAGES);
    delta.flush().unwrap();
    scatter(&delta, PAGES);
    (0..PAGES).for_each(|page| delta.map.mark_dirty(page * 496 * 32));
    delta.flush().unwrap();
    let (file, live) = (delta.commit.lock().tail, delta.map.live().memory());
    assert!(file > 30 << 20 && live > 16 << 20, "a file of {file} bytes, a live map of {live}");
    drop(delta);
    let (delta, taken_over) = most_of(|| rig.open());
    assert!(taken_over < 2 << 20, "{taken_over} bytes for a takeover");
    delta.close().unwrap();
    drop(delta);
    let (delta, attached) = most_of(|| rig.open());
    assert!(attached < 4 << 20, "{attached} bytes for an attach");
    assert_eq!(delta.map.live().memory(), live);
}

/// Random histories of writes, discards, sizes and flushes, in files of many records. Guards D99.
#[test]
fn a_map_that_is_loaded_from_its_last_record_on_is_that_of_all_records_in_order() {
    let _small = simulate(None);
    const BLOCKS: u64 = 40_000;
    for seed in 0..60 {
        let mut rng = Rng::new(seed);
        let rig = Rig { overlap: [0, 65_536][seed as usize % 2], ..Rig::new() };
        let delta = rig.open();
        delta.resize(BLOCKS * BLOCK, Durability::Flush).unwrap();
        for _ in 0..200 {
            let blocks = delta.size().div_ceil(BLOCK);
            let first = rng.below(blocks);
            let end = (first + 1 + rng.below(2_000)).min(blocks);
            match rng.below(10) {
                0..4 => _ = delta.write(first * BLOCK, &[1; BLOCK as usize], &Edges::default()),
                4..6 => _ = delta.zero_blocks(first, end),
                6 => delta.resize(rng.below(BLOCKS * BLOCK) + 1, Durability::Now).unwrap(),
                _ => delta.flush().unwrap(),
            }
        }
        delta.flush().unwrap();
        let spec = DeltaSpec { root: *rig.roots.0.lock(), overlap: rig.overlap, ..delta.spec };
        let (_after, loaded) = rig.cut(NOTHING);
        let durable = Delta::survey_durable(&spec, &rig.medium).unwrap();
        assert_eq!((loaded.size(), loaded.overlap()), (durable.size, durable.overlap));
        let mut page_words = [0; crate::delta::survey::PAGE_WORDS];
        for page in 0..=BLOCKS / 15_872 {
            durable.read(page as u32, &mut page_words);
            let hidden = loaded.overlap().div_ceil(BLOCK).div_ceil(32);
            let mut had = [0; 496];
            loaded.map.copy_page(page, &mut had);
            for (word, value) in (page * 496..).zip(page_words) {
                let expected =
                    if word < hidden { value } else { crate::format::replay::without_zeros(value) };
                assert_eq!(had[(word % 496) as usize], expected, "seed {seed}, word {word}");
            }
        }
    }
}

#[test]
fn a_next_worker_appends_to_a_large_map_file_and_does_not_write_it_anew() {
    const PAGES: u64 = 200;
    let size = PAGES * 496 * 32 * BLOCK;
    let rig = Rig { overlap: size, ..Rig::new() };
    let delta = rig.open();
    delta.resize(size, Durability::Flush).unwrap();
    scatter(&delta, PAGES);
    delta.flush().unwrap();
    let written = *rig.roots.0.lock();
    assert!(written.floor > 512 << 10, "{written:?}");
    drop(delta);
    // Killed, and closed and opened again.
    for round in 0..6 {
        let delta = rig.open();
        put(&delta, round, 7);
        delta.flush().unwrap();
        if round % 2 == 0 {
            delta.close().unwrap();
        }
        assert_eq!(rig.roots.0.lock().generation, written.generation, "round {round}");
    }
    // Out of date it is written anew all the same, however often it was opened.
    let mut rounds = 0;
    while rig.roots.0.lock().generation == written.generation {
        let delta = rig.open();
        (0..PAGES).for_each(|page| (0..496).for_each(|word| delta.map.mark_dirty((page * 496 + word) * 32)));
        delta.flush().unwrap();
        rounds += 1;
    }
    assert_eq!(rounds, 4);
}
