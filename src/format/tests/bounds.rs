//! Hostile and damaged bytes: the size of its input bounds what a decoder takes.

use proptest::prelude::*;

use super::{Superblock, base, decode, disk, each, map_file};
use crate::format::journal::{MapHeader, Record, Run};
use crate::format::record::{BaseRecord, DiskRecord};
use crate::format::replay::{Replay, Words};
use crate::format::{Kind, MAX_DISK_SIZE};

const NONCE: u64 = 0x1234;
const ZERO: u64 = 0xaaaa_aaaa_aaaa_aaaa;
const DATA: u64 = 0x5555_5555_5555_5555;
/// Words of the map of the largest disk.
const ALL: u64 = MAX_DISK_SIZE / 4096 / 32;

/// A map file with records of these payloads, each with the right checksum.
fn file(payloads: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = MapHeader { disk: 3, generation: 4, nonce: NONCE, carries: false }.encode();
    for (seq, payload) in (1u64..).zip(payloads) {
        bytes.extend(record(seq, payload));
    }
    bytes
}

fn record(seq: u64, payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"PLYJ\0\0\0\0".to_vec();
    bytes.extend(seq.to_le_bytes());
    bytes.extend((payload.len() as u64).to_le_bytes());
    let sum = crc32c::crc32c_append(crc32c::crc32c(&NONCE.to_le_bytes()), &bytes);
    bytes.extend(crc32c::crc32c_append(sum, payload).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(payload);
    bytes
}

/// The payload with these runs: first word, number of words, type, words that follow.
fn payload(size: u64, overlap: u64, runs: &[(u64, u64, u64, &[u64])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [size, overlap, 0, runs.len() as u64] {
        bytes.extend(word.to_le_bytes());
    }
    for (first, len, kind, words) in runs {
        for word in [first, len, kind].into_iter().chain(*words) {
            bytes.extend(word.to_le_bytes());
        }
    }
    bytes
}

fn refused(payloads: &[Vec<u8>], part: &str) {
    let error = decode(&file(payloads), 0).unwrap_err();
    assert!(error.kind == Kind::Value && error.to_string().contains(part), "{error}, expected {part}");
}

#[test]
fn the_helper_makes_what_the_encoder_makes() {
    let run = Run { first: 7, words: vec![1, 2, 0] };
    let made = Record { size: 1 << 30, overlap: 4096, modified_ns: 0, runs: vec![run], carried: None }
        .encode(NONCE, 1);
    assert_eq!(made, record(1, &payload(1 << 30, 4096, &[(7, 3, 0, &[1, 2, 0])])));
    assert_eq!(decode(&file(&[payload(1 << 30, 0, &[])]), 0).unwrap().records, 1);
}

/// A thousand records of 100 bytes, each for all words of a disk of 64 TiB: expanded they would take 4 TiB.
#[test]
fn a_repeated_run_takes_no_memory_for_its_length() {
    let all = |value: u64| payload(MAX_DISK_SIZE, 0, &[(0, ALL, 1, &[value])]);
    let payloads: Vec<_> = (0..1000).map(|n| all(if n % 2 == 0 { DATA } else { ZERO })).collect();
    let bytes = file(&payloads);
    let journal = decode(&bytes, bytes.len() as u64).unwrap();
    assert_eq!(journal.records, 1000);
    assert_eq!(journal.map.words().collect::<Vec<_>>(), [(0, Words::Same(ALL, ZERO))]);
    assert!(journal.map.memory() < 100);
    let mut map = journal.map;
    map.forget_zeros_above(0);
    assert_eq!(map.words().count(), 0);
    assert_eq!(decode(&file(&payloads[..1]), 0).unwrap().map.data_end(), ALL * 32);
}

#[test]
fn words_past_the_size_of_their_record_are_not_set() {
    let size = 33 * 4096;
    let journal = decode(&file(&[payload(size, 0, &[(0, ALL, 1, &[DATA])])]), 0).unwrap();
    assert_eq!(journal.map.data_end(), 33);
    let words: Vec<u64> = journal.map.words().flat_map(|(_, words)| each(words)).collect();
    assert_eq!((words.len(), &words[..3]), (64, &[DATA, 1, 0][..]));
    // As a flush after a shrink writes them: zeros, for words past the end.
    let journal = decode(&file(&[payload(4096, 0, &[(1 << 20, 2, 0, &[0, 0])])]), 0).unwrap();
    assert_eq!((journal.records, journal.map.words().count()), (1, 0));
}

#[test]
fn records_that_no_plyfs_writes_are_refused_with_a_reason() {
    let size = 1 << 30;
    for (runs, part) in [
        (&[(ALL, 1, 1, &[1][..])][..], "outside of the largest disk"),
        (&[(u64::MAX, 2, 1, &[1][..])], "outside of the largest disk"),
        (&[(0, u64::MAX, 0, &[1][..])], "outside of the largest disk"),
        (&[(0, 0, 1, &[1][..])], "outside of the largest disk"),
        (&[(0, 4, 0, &[1][..])], "longer than its record"),
        (&[(0, 1 << 28, 0, &[1][..])], "longer than its record"),
        (&[(0, 4, 1, &[][..])], "longer than its record"),
        (&[(0, 1, 2, &[1][..])], "run type 2"),
        (&[(0, 1, 0, &[3][..])], "state that does not exist"),
        (&[(0, 9, 1, &[3 << 62][..])], "state that does not exist"),
        (&[(0, 1, 0, &[1, 1][..])], "too many"),
        (&[(0, 2, 0, &[1, 1][..]), (1, 1, 0, &[1])], "follows one that ends at 2"),
        (&[(5, 2, 1, &[1][..]), (0, 1, 1, &[1])], "follows one that ends at 7"),
    ] {
        refused(&[payload(size, 0, runs)], part);
        refused(&[payload(size, 0, &[]), payload(size, 0, runs)], part);
    }
    refused(&[payload(MAX_DISK_SIZE + 1, 0, &[])], "size 70368744177665");
    refused(&[payload(4096, 4097, &[])], "overlap 4097");
    refused(&[payload(4096, 0, &[])[..24].to_vec()], "longer than its record");
    // More runs than the bytes allow.
    let mut lie = payload(size, 0, &[]);
    lie[24..28].fill(0xff);
    refused(&[lie], "longer than its record");
}

#[test]
fn an_overlap_that_grows_is_reported() {
    let journal = decode(&file(&[payload(8192, 4096, &[]), payload(8192, 4097, &[])]), 0).unwrap();
    let raised = journal.raised.unwrap();
    assert_eq!((raised.seq, raised.before, raised.overlap), (2, 4096, 4097));
    let journal = decode(&file(&[payload(16384, 8193, &[])]), 0).unwrap();
    assert_eq!(journal.raised.unwrap().before, 8192);
}

/// A torn tail full of candidate records, each up to the end: summing each of them would take hours.
#[test]
fn a_tail_of_nothing_but_records_is_refused_in_a_time_bounded_by_its_length() {
    let mut bytes = file(&[payload(4096, 0, &[])]);
    let heads = 1 << 16;
    for n in 0..heads {
        bytes.extend(b"PLYJ\0\0\0\0");
        bytes.extend(2u64.to_le_bytes());
        bytes.extend(((heads - n - 1) * 32_u64).to_le_bytes());
        bytes.extend([7, 0, 0, 0, 0, 0, 0, 0]);
    }
    let error = decode(&bytes, 0).unwrap_err();
    assert!(error.to_string().contains("looks like a record"), "{error}");
}

#[test]
fn a_record_of_many_windows_is_read_as_a_whole() {
    let words: Vec<u64> =
        (0..200_000).map(|n| [1, 2, 4, 8][n % 4] << (n % 60)).map(|w: u64| w & DATA).collect();
    let runs = vec![Run { first: 3, words: words.clone() }, Run { first: 900_000, words: vec![1] }];
    let record = Record { size: MAX_DISK_SIZE, overlap: 0, modified_ns: 0, runs, carried: None };
    let mut bytes = MapHeader { disk: 3, generation: 4, nonce: NONCE, carries: false }.encode();
    bytes.extend(record.encode(NONCE, 1));
    let end = bytes.len() as u64;
    bytes.resize(bytes.len() + (1 << 20), 0);
    bytes.extend(record.encode(NONCE, 2));
    let error = decode(&bytes, end).unwrap_err();
    assert!(error.to_string().contains(&format!("follows at {}", end + (1 << 20))), "{error}");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    let journal = decode(&bytes, end).unwrap();
    assert_eq!((journal.records, journal.end, journal.torn), (1, end, true));
    let got: Vec<u64> = journal.map.words().flat_map(|(_, words)| each(words)).collect();
    assert_eq!(got[3..200_003], words);
    assert_eq!(journal.map.data_end(), 900_000 * 32 + 1);
    // The file is truncated in the middle of a window while it is read.
    let short = |buf: &mut [u8], at: u64| {
        let rest = &bytes[(at as usize).min(300_000)..300_000];
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok::<_, ()>(n)
    };
    let expected = crate::format::journal::Expected {
        disk: 3,
        generation: 4,
        floor: end,
        size: 0,
        overlap: 0,
        modified_ns: 0,
    };
    assert!(crate::format::journal::Journal::read(short, bytes.len() as u64, &expected).is_err());
}

#[test]
fn numbers_that_could_overflow_are_refused() {
    let superblock = |next_id| Superblock { uuid: [1; 16], created_ns: 0, next_id };
    assert!(Superblock::decode(&superblock(1 << 62).encode()).is_ok());
    assert_eq!(Superblock::decode(&superblock((1 << 62) + 1).encode()).unwrap_err().kind, Kind::Value);
    let changes: [fn(&mut DiskRecord); 4] = [
        |r| r.id = u64::MAX,
        |r| r.name_seq = u64::MAX,
        |r| r.map.generation = u64::MAX,
        |r| r.backing.as_mut().unwrap().base = u64::MAX,
    ];
    for change in changes {
        let mut record = disk();
        change(&mut record);
        assert_eq!(DiskRecord::decode(&record.encode()).unwrap_err().kind, Kind::Value);
    }
    assert_eq!(
        BaseRecord::decode(&BaseRecord { id: 1 << 63, ..base() }.encode()).unwrap_err().kind,
        Kind::Value
    );
}

/// One change to a map of a hundred pages.
#[derive(Debug, Clone)]
enum Change {
    Same(u64, u64, u64),
    Each(u64, Vec<u64>),
    Clear(u64),
}

const SMALL: u64 = 6400;

fn change() -> impl Strategy<Value = Change> {
    let word = prop_oneof![Just(0), Just(DATA), Just(ZERO), (0u32..64).prop_map(|bit| (1 << bit) & DATA)];
    prop_oneof![
        (0..SMALL, 0..SMALL, word.clone())
            .prop_map(|(first, len, word)| { Change::Same(first, len.min(SMALL - first), word) }),
        (0..SMALL - 300, prop::collection::vec(word, 1..300))
            .prop_map(|(first, words)| Change::Each(first, words)),
        (0..SMALL * 32).prop_map(Change::Clear),
    ]
}

#[test]
fn a_cut_in_the_first_word_of_a_page_keeps_the_blocks_before_it() {
    let mut replay = Replay::default();
    replay.set(0, Words::Same(256, DATA));
    replay.clear_from(64 * 32 + 1);
    assert_eq!(replay.data_end(), 64 * 32 + 1);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn a_replay_equals_a_flat_array(changes in prop::collection::vec(change(), 0..40), overlap in 0..SMALL * 32) {
        let (mut replay, mut flat) = (Replay::default(), vec![0u64; SMALL as usize]);
        let mut given = 0;
        for change in changes {
            match change {
                Change::Same(first, len, word) => {
                    replay.set(first, Words::Same(len, word));
                    flat[first as usize..(first + len) as usize].fill(word);
                    given += 32;
                }
                Change::Each(first, words) => {
                    replay.set(first, Words::Each(&words));
                    flat[first as usize..][..words.len()].copy_from_slice(&words);
                    given += 24 + 8 * words.len() as u64;
                }
                Change::Clear(block) => {
                    replay.clear_from(block);
                    for (word, value) in (0u64..).zip(&mut flat) {
                        let keep = block.saturating_sub(word * 32).min(32);
                        *value &= if keep == 32 { u64::MAX } else { (1 << (2 * keep)) - 1 };
                    }
                    given += 64;
                }
            }
            prop_assert!(expand(&replay) == flat);
            prop_assert!(replay.memory() <= 64 * given + 64, "{} bytes for {given}", replay.memory());
            let end = flat.iter().rposition(|w| w & DATA != 0).map_or(0, |at| {
                at as u64 * 32 + u64::from((63 - (flat[at] & DATA).leading_zeros()) / 2) + 1
            });
            prop_assert_eq!(replay.data_end(), end);
            let runs: Vec<Run> = flat.iter().enumerate().fold(Vec::new(), |mut runs: Vec<Run>, (at, word)| {
                match runs.last_mut() {
                    _ if *word == 0 => {}
                    Some(run) if run.first + run.words.len() as u64 == at as u64 => run.words.push(*word),
                    _ => runs.push(Run { first: at as u64, words: vec![*word] }),
                }
                runs
            });
            let empty = Record::default().encode(0, 1).len() as u64;
            let written = Record { runs, ..Record::default() }.encode(0, 1).len() as u64;
            prop_assert_eq!(replay.encoded_len(), written - empty);
        }
        replay.forget_zeros_above(overlap * 4096);
        let now = expand(&replay);
        for block in 0..SMALL * 32 {
            let state = |map: &[u64]| map[(block / 32) as usize] >> (block % 32 * 2) & 3;
            let (was, is) = (state(&flat), state(&now));
            prop_assert!(was == is || (was == 2 && is == 0 && block >= overlap), "block {block}: {was}, {is}");
        }
        prop_assert!(replay.words().all(|(_, words)| !matches!(words, Words::Same(_, 0 | ZERO))
            || overlap > 0), "zeros above the overlap cost nothing");
    }

    /// Valid bytes that were changed, cut or doubled: never a panic, never more memory than they justify.
    #[test]
    fn damaged_golden_bytes_never_panic_nor_take_more_memory_than_they_justify(
        what in 0usize..4,
        edits in prop::collection::vec((any::<u16>(), any::<u8>(), 0u8..6), 0..8),
        mend in any::<bool>(),
    ) {
        let superblock = Superblock { uuid: [0xab; 16], created_ns: 1, next_id: 1000 };
        let mut bytes = [disk().encode(), base().encode(), superblock.encode(), map_file()][what].clone();
        for (at, value, how) in edits {
            let at = usize::from(at) % bytes.len().max(1);
            match how {
                _ if bytes.is_empty() => {}
                0 => bytes.truncate(at),
                1 => bytes.extend_from_within(at..),
                2 => bytes[at..].iter_mut().take(8).for_each(|b| *b = value),
                3 => bytes[at] = value,
                4 => bytes[at] ^= 1 << (value % 8),
                _ => drop(bytes.drain(at..(at + usize::from(value)).min(bytes.len()))),
            }
        }
        if mend && bytes.len() > 4 {
            // With a right checksum the change reaches the decoder behind it.
            let end = bytes.len() - 4;
            let sum = crc32c::crc32c(&bytes[..end]).to_le_bytes();
            bytes[end..].copy_from_slice(&sum);
        }
        if let Ok(record) = DiskRecord::decode(&bytes) {
            prop_assert!(record.overlap <= record.size && record.size <= MAX_DISK_SIZE);
        }
        let _ = BaseRecord::decode(&bytes);
        let _ = Superblock::decode(&bytes);
        if let Ok(journal) = decode(&bytes, 0) {
            prop_assert!(journal.end <= bytes.len() as u64);
            prop_assert!(journal.map.memory() <= 64 * bytes.len() as u64);
        }
    }

    /// Any numbers in runs whose record has the right checksum.
    #[test]
    fn records_of_any_numbers_never_panic_nor_take_more_memory_than_they_justify(
        records in prop::collection::vec(
            (0..=MAX_DISK_SIZE, any::<u64>(), prop::collection::vec(
                (0..ALL, prop_oneof![0..64u64, 0..ALL, any::<u64>()], 0..2u64, any::<u64>()), 0..4)),
            0..6),
    ) {
        let payloads: Vec<_> = records
            .iter()
            .map(|(size, overlap, runs)| {
                let mut next = 0;
                let words: Vec<_> = runs.iter().map(|r| vec![r.3 & DATA; if r.2 == 0 { r.1.min(70) } else { 1 } as usize]).collect();
                let runs: Vec<_> = runs
                    .iter()
                    .zip(&words)
                    .map(|(r, words)| {
                        let first = next + r.0 % (ALL - next).max(1);
                        let len = if r.2 == 0 { words.len() as u64 } else { r.1 };
                        next = (first + len % ALL).min(ALL);
                        (first, len, r.2, words.as_slice())
                    })
                    .collect();
                payload(*size, overlap % (size + 1), &runs)
            })
            .collect();
        let bytes = file(&payloads);
        if let Ok(journal) = decode(&bytes, 0) {
            prop_assert!(journal.map.memory() <= 64 * bytes.len() as u64);
            prop_assert!(journal.map.data_end() * 4096 < journal.size + 4096);
        }
    }
}

/// All words of a small map.
fn expand(replay: &Replay) -> Vec<u64> {
    let mut out = vec![0; SMALL as usize];
    for (first, words) in replay.words() {
        for (at, word) in (first as usize..).zip(each(words)) {
            if word != 0 {
                out[at] = word;
            }
        }
    }
    out
}
