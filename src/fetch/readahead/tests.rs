use std::collections::HashSet;

use super::link::Replay;
use super::map::{Kind, Map, Marked};
use super::{Advice, BLOCK, Readahead, Score};

pub(super) const BOOT: &str = include_str!("../../../tests/data/debian-boot-reads.txt");
pub(super) const OTHER_BOOT: &str = include_str!("../../../tests/data/other-boot-reads.txt");

/// Blocks of an object of 2 GiB.
const BLOCKS: u64 = (2 << 30) / BLOCK;
const MIB: u64 = 1 << 20;

pub(super) fn reads(text: &str) -> Vec<(u64, u64)> {
    let number = |word: Option<&str>| word.unwrap().parse().unwrap();
    text.lines()
        .map(|line| line.split(' '))
        .map(|mut words| (number(words.next()), number(words.next())))
        .collect()
}

pub(super) fn distinct_blocks(reads: &[(u64, u64)]) -> usize {
    let blocks = reads.iter().flat_map(|(offset, length)| offset / BLOCK..(offset + length).div_ceil(BLOCK));
    blocks.collect::<HashSet<_>>().len()
}

/// Replays the reads one after the other, and waits for every requested block.
fn replay(reads: &[(u64, u64)]) -> Replay {
    let mut replay = Replay::new(BLOCKS);
    for (offset, length) in reads {
        replay.read_bytes(*offset, *length);
    }
    replay.finish();
    replay
}

/// Pseudo-random numbers below `limit`; the same seed gives the same numbers.
fn random(seed: u64, limit: u64) -> impl FnMut() -> u64 {
    let mut state = seed;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % limit
    }
}

impl Replay {
    fn report(&self) -> String {
        let scores = Kind::ALL.map(|kind| (kind, self.readahead.scores[kind as usize]));
        format!(
            "{:.1} MiB in {} requests, {} waits of together {:.2} s, {scores:?}",
            self.mib(),
            self.requests,
            self.waits,
            self.waited
        )
    }
}

#[test]
fn a_boot_fetches_at_most_55_mib_and_waits_less_than_3_s() {
    let replay = replay(&reads(BOOT));
    println!("{}", replay.report());
    assert!(replay.mib() <= 55.0 && replay.waited < 3.0, "{}", replay.report());
}

#[test]
fn another_boot_fetches_at_most_1_3_times_what_it_needs() {
    let replay = replay(&reads(OTHER_BOOT));
    println!("{}", replay.report());
    let needed = distinct_blocks(&reads(OTHER_BOOT)) as f64;
    assert!(replay.fetched as f64 <= 1.3 * needed && replay.waited < 3.0, "{}", replay.report());
}

#[test]
fn ten_boots_at_once_fetch_what_one_does() {
    let boot = reads(BOOT);
    // Each boot begins 37 reads after the one before.
    let together: Vec<_> = (0..boot.len() + 9 * 37)
        .flat_map(|step| (0..10).filter_map(move |reader: usize| step.checked_sub(reader * 37)))
        .filter_map(|at| boot.get(at).copied())
        .collect();
    assert_eq!(together.len(), 10 * boot.len());
    let replay = replay(&together);
    println!("{}", replay.report());
    assert!(replay.mib() <= 55.0, "{}", replay.report());
}

#[test]
fn a_scan_runs_at_the_speed_of_the_link_in_large_requests() {
    for size in [4096, 128 << 10, MIB] {
        let reads: Vec<_> = (0..256 * MIB / size).map(|number| (number * size, size)).collect();
        let replay = replay(&reads);
        println!("{size}: {:.3} s, {}", replay.now(), replay.report());
        let line = (256 * MIB) as f64 / 125e6;
        assert!(replay.now() < line / 0.85, "{size}: {} s, {}", replay.now(), replay.report());
        assert!(replay.requests <= 300, "{size}: {}", replay.report());
        assert!(replay.mib() <= 256.0 + 8.1, "{size}: {}", replay.report());
    }
}

#[test]
fn a_scan_downwards_and_parallel_scans_run_at_the_speed_of_the_link() {
    let down: Vec<_> = (0..2048).map(|number| ((2047 - number) * (128 << 10), 128 << 10)).collect();
    let side_by_side: Vec<_> =
        (0..4096u64).map(|number| ((number % 4) * 300 * MIB + number / 4 * (64 << 10), 64 << 10)).collect();
    for (name, reads) in [("down", down), ("side by side", side_by_side)] {
        let replay = replay(&reads);
        println!("{name}: {:.3} s, {}", replay.now(), replay.report());
        let line = (256 * MIB) as f64 / 125e6;
        assert!(replay.now() < line / 0.7, "{name}: {} s, {}", replay.now(), replay.report());
        assert!(replay.requests <= 600 && replay.mib() <= 256.0 + 33.0, "{name}: {}", replay.report());
    }
}

#[test]
fn a_random_reader_fetches_little_more_than_it_reads() {
    let mut next = random(1, 2 << 18);
    let reads: Vec<_> = (0..4000).map(|_| (next() * 4096, 4096)).collect();
    let replay = replay(&reads);
    println!("{}", replay.report());
    let needed = distinct_blocks(&reads) as f64;
    assert!((replay.fetched as f64) < 1.3 * needed, "{needed} needed, {}", replay.report());
}

#[test]
fn a_reader_in_strides_fetches_at_most_twice_what_it_reads() {
    for stride in [96 << 10, 512 << 10, 3 * MIB] {
        let reads: Vec<_> =
            (0..(2048 * MIB / stride).min(4000)).map(|number| (number * stride, 4096)).collect();
        let replay = replay(&reads);
        println!("{stride}: {}", replay.report());
        assert!(replay.fetched <= 2 * reads.len() as u64, "{stride}: {}", replay.report());
    }
}

#[test]
fn a_kind_of_guess_that_is_held_back_resumes_when_it_pays_again() {
    let mut next = random(1, 2 << 18);
    let mut both = Replay::new(2 * BLOCKS);
    for _ in 0..1000 {
        both.read_bytes((2 << 30) + next() * 4096, 4096);
    }
    let (fetched, waited) = (both.fetched, both.waited);
    for (offset, length) in reads(BOOT) {
        both.read_bytes(offset, length);
    }
    let alone = replay(&reads(BOOT));
    let (fetched, waited) = (both.fetched - fetched, both.waited - waited);
    println!("{fetched} blocks and {waited:.2} s, alone {} and {:.2} s", alone.fetched, alone.waited);
    // Without any guess it waits 7.9 s.
    assert!(waited < alone.waited + 2.0, "{waited} s, alone {} s: {}", alone.waited, both.report());
}

#[test]
fn the_same_read_again_changes_nothing() {
    let (mut once, mut twice) = (Readahead::new(BLOCKS), Readahead::new(BLOCKS));
    for (offset, length) in reads(BOOT) {
        let (first, end) = (offset / BLOCK, (offset + length).div_ceil(BLOCK));
        let advice = once.read(first, end - first, true, &|_| false);
        assert_eq!(twice.read(first, end - first, true, &|_| false), advice);
        // The blocks have come: the same read finds them.
        assert_eq!(twice.read(first, end - first, false, &|_| true), Advice::default());
    }
}

#[test]
fn advice_stays_inside_the_object_and_omits_present_blocks_at_its_ends() {
    let mut readahead = Readahead::new(10);
    assert_eq!(readahead.read(0, 8, true, &|_| false).ranges, [(8, 2)]);
    assert_eq!(readahead.read(9, 5, true, &|block| block == 8).ranges, []);
    assert_eq!(readahead.read(10, 1, true, &|_| false).ranges, []);
    assert_eq!(readahead.read(u64::MAX, u64::MAX, true, &|_| false).ranges, []);

    let mut readahead = Readahead::new(1000);
    readahead.read(500, 1, true, &|_| false);
    assert_eq!(readahead.read(520, 4, true, &|_| false).ranges[1], (501, 19), "the gap between two reads");
    let mut readahead = Readahead::new(1000);
    readahead.read(500, 1, true, &|_| false);
    assert_eq!(readahead.read(520, 4, true, &|block| block < 503 || block == 519).ranges[1], (503, 16));
}

#[test]
fn memory_is_bounded() {
    // 1 TiB, touched everywhere.
    let mut readahead = Readahead::new((1 << 40) / BLOCK);
    for region in 0..100_000 {
        readahead.read(region * 640, 1, true, &|_| false);
    }
    assert!(readahead.map.len() <= super::REGIONS, "{}", readahead.map.len());
}

#[test]
fn the_map_knows_which_blocks_were_read_and_which_guesses_were_used() {
    let mut map = Map::new(100);
    assert_eq!(map.guess(60, 70, Kind::Join), 10);
    assert_eq!(map.guess(65, 75, Kind::Stream), 5, "a guessed block is not guessed again");
    let marked = map.mark(58, 72);
    assert_eq!(marked, Marked { new: 14, used: [0, 10, 0, 2] });
    assert_eq!(map.mark(58, 72), Marked::default());
    assert_eq!(map.guess(58, 72, Kind::Near), 0, "a block that was read is not guessed");
    assert_eq!((map.count(0, 200), map.count(60, 70), map.count(72, 200)), (14, 10, 0));
    assert_eq!(
        (map.next(0, 200), map.next(65, 200), map.next(72, 200), map.next(0, 58)),
        (Some(58), Some(65), None, None)
    );
    assert_eq!((map.previous(0, 200), map.previous(0, 64), map.previous(0, 58)), (Some(71), Some(63), None));
}

#[test]
fn a_guess_that_does_not_pay_is_made_now_and_then() {
    let mut score = Score::default();
    let mut guess = |blocks| {
        let allowed = score.allowed(blocks);
        score.guess(allowed as u32);
        allowed > 0
    };
    let made = (0..1000).filter(|_| guess(8)).count();
    let enough = super::MIN_SAMPLE as usize / 8;
    assert!(made > enough && made < enough + 40, "{made}");
    score.used = score.guessed;
    assert_eq!(score.allowed(1000), 1000);
}
