//! Records of a map file that carry blocks.

use super::*;

fn decode(bytes: &[u8]) -> Result<Journal, FormatError> {
    super::decode(bytes, 0)
}

fn plain() -> Record {
    Record { carried: None, runs: Vec::new(), ..carrying(&[]) }
}

#[test]
fn the_latest_bytes_of_each_carried_block_count_until_a_record_says_that_the_data_file_was_synced() {
    let bytes = carrying_map_file(&[carrying(&[33]), carrying(&[33, 40]), carrying(&[])]);
    let journal = decode(&bytes).unwrap();
    assert_eq!(journal.carried.keys().copied().collect::<Vec<_>>(), [33, 40]);
    for (block, at) in journal.carried_data() {
        assert_eq!(bytes[at as usize..][..BLOCK as usize], [block as u8; BLOCK as usize]);
    }
    let second = carrying_map_file(&[carrying(&[33])]).len() as u64;
    assert!(journal.carried[&33] > second, "of the second record");
    let settled = carrying_map_file(&[carrying(&[33]), plain(), carrying(&[40])]);
    assert_eq!(decode(&settled).unwrap().carried.keys().copied().collect::<Vec<_>>(), [40]);
}

#[test]
fn a_carried_block_that_is_no_data_any_more_is_not_for_the_data_file() {
    let zeroed = Record { runs: vec![Run { first: 1, words: vec![2] }], ..carrying(&[]) };
    let journal = decode(&carrying_map_file(&[carrying(&[32, 33]), zeroed])).unwrap();
    assert_eq!(journal.carried.len(), 2);
    assert_eq!(journal.carried_data().count(), 0, "block 32 is zeros, and block 33 falls through");
}

#[test]
fn the_data_file_needs_no_bytes_of_blocks_that_are_carried() {
    let journal = decode(&carrying_map_file(&[carrying(&[62, 63])])).unwrap();
    assert_eq!(journal.map.data_end(), 64);
    assert_eq!(journal.data_end(), 62);
    let all: Vec<u64> = (32..48).collect();
    let rest: Vec<u64> = (48..64).collect();
    let journal = decode(&carrying_map_file(&[carrying(&all), carrying(&rest)])).unwrap();
    assert_eq!(journal.data_end(), 0);
}

#[test]
fn an_impossible_carried_block_is_refused() {
    let refused = |record: Record| decode(&carrying_map_file(&[record])).unwrap_err().kind;
    assert_eq!(refused(carrying(&[40, 33])), Kind::Value, "not ascending");
    assert_eq!(refused(carrying(&[33, 33])), Kind::Value, "twice");
    assert_eq!(refused(carrying(&[1 << 18])), Kind::Value, "past the end of the disk");
    assert_eq!(refused(carrying(&(33..50).collect::<Vec<_>>())), Kind::Value, "too many");
    // Without the feature the flag is unknown.
    let mut bytes = map_file();
    bytes.extend(carrying(&[33]).encode(0x1234, 4));
    assert_eq!(decode(&bytes).unwrap_err().kind, Kind::Value);
    // A count that does not fit its record.
    let record = carrying(&[33]);
    let end = carrying_map_file(std::slice::from_ref(&record)).len();
    let count = end - (8 + BLOCK as usize) - 8;
    for wrong in [0u64, 2, u64::MAX] {
        let mut bytes = carrying_map_file(&[]);
        let mut one = record.encode(0x1234, 1);
        let at = count - bytes.len();
        one[at..at + 8].copy_from_slice(&wrong.to_le_bytes());
        let sum = {
            let sum = crc32c::crc32c(&0x1234u64.to_le_bytes());
            crc32c::crc32c_append(crc32c::crc32c_append(sum, &one[..24]), &one[32..])
        };
        one[24..28].copy_from_slice(&sum.to_le_bytes());
        bytes.extend(one);
        assert_eq!(decode(&bytes).unwrap_err().kind, Kind::Value, "{wrong}");
    }
}

#[test]
fn a_block_with_the_beginning_of_a_record_is_not_carried() {
    let mut block = [0; BLOCK as usize];
    assert!(Carried::may_carry(&block));
    let record = plain().encode(1, 1);
    block[1024..1032].copy_from_slice(&record[..8]);
    assert!(!Carried::may_carry(&block));
    // Candidates begin at multiples of 8 bytes.
    block.rotate_right(4);
    assert!(Carried::may_carry(&block));
}

proptest! {
    /// The last block with data before any block, beside a search of each word.
    #[test]
    fn the_last_data_before_a_block_is_found(runs in prop::collection::vec((0u64..300, 1u64..200, 0u64..3), 0..6), end in 0u64..20_000) {
        let mut map = crate::format::replay::Replay::default();
        for (first, len, state) in runs {
            map.set(first, Words::Same(len, 0x5555_5555_5555_5555 * state));
        }
        let slow = (0..end).rev().find(|block| map.state(*block) == Some(crate::format::journal::State::Data));
        prop_assert_eq!(map.data_end_before(end), slow.map_or(0, |block| block + 1));
    }
}
