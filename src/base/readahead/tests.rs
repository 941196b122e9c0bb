use std::collections::HashSet;

use super::BLOCK;
use super::link::Replay;

pub(super) const BOOT: &str = include_str!("../../../tests/data/debian-boot-reads.txt");
pub(super) const OTHER_BOOT: &str = include_str!("../../../tests/data/other-boot-reads.txt");

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

#[test]
fn a_boot_fetches_little_and_waits_little() {
    let mut replay = Replay::new((2 << 30) / super::BLOCK);
    for (offset, length) in reads(BOOT) {
        replay.read_bytes(offset, length);
    }
    replay.finish();
    let report = format!(
        "{:.1} MiB in {} requests, {} waits, {:.2} s, {:?}",
        replay.mib(),
        replay.requests,
        replay.waits,
        replay.waited,
        replay.readahead.scores
    );
    println!("{report}");
    assert!(replay.mib() <= 55.0 && replay.waited < 3.2, "{report}");
}
