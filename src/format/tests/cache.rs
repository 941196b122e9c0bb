//! Golden bytes and damage of the sums file of the cache. The expected bytes and sums were made by another program.

use super::*;
use crate::format::cache::*;

const BUMP: &str =
    "the bytes of the cache changed: bump the version of its header, so that older files are dropped";

fn header() -> CacheHeader {
    CacheHeader {
        sequence: 7,
        key: [0xab; 32],
        size: 100_000,
        pinned: true,
        verified: false,
        contents: None,
        direct: false,
    }
}

#[test]
fn the_header_is_these_bytes() {
    assert_eq!(
        hex(&header().encode()),
        concat!(
            "504c594341434845010000003a0000000000000000000000000000000000000000000000000000000700000000000000",
            "ababababababababababababababababababababababababababababababababa0860100000000000040000040000000",
            "01006b47ffed"
        ),
        "{BUMP}"
    );
    assert_eq!((CacheHeader::place(7), CacheHeader::place(8)), (2048, 0), "{BUMP}");
}

#[test]
fn a_header_with_verified_contents_is_these_bytes() {
    let header = CacheHeader { contents: Some([0xcd; 32]), ..header() };
    assert_eq!(
        hex(&header.encode()),
        concat!(
            "504c594341434845020000005a0000000000000000000000000000000000000000000000000000000700000000000000",
            "ababababababababababababababababababababababababababababababababa0860100000000000040000040000000",
            "0100cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd0cc150e7"
        ),
        "{BUMP}"
    );
    let older = CacheHeader { sequence: 6, ..self::header() };
    let both = area(&older, &header);
    assert_eq!(CacheHeader::decode(&both).unwrap().header, header);
    // What version 1 can say is written as version 1: contents under the key of their digest.
    let legacy = CacheHeader { verified: true, contents: Some([0xab; 32]), ..self::header() };
    assert_eq!(legacy.encode(), CacheHeader { contents: None, ..legacy.clone() }.encode());
    assert_eq!(CacheHeader::decode(&area(&older, &legacy)).unwrap().header.contents, None);
    // No longer once a block is missing.
    let lost = CacheHeader { verified: false, ..legacy };
    assert_eq!(CacheHeader::decode(&area(&older, &lost)).unwrap().header, lost);
}

#[test]
fn a_header_of_slots_in_their_places_has_an_autoclear_feature() {
    let header = CacheHeader { direct: true, ..header() };
    let bytes = header.encode();
    assert_eq!(
        hex(&bytes[..48]),
        "504c594341434845010000003a0000000000000000000000000000000000000001000000000000000700000000000000",
        "{BUMP}"
    );
    assert_eq!(bytes.len(), self::header().encode().len());
    assert_eq!(
        CacheHeader::decode(&area(&CacheHeader { sequence: 6, ..self::header() }, &header)).unwrap().header,
        header
    );
}

#[test]
fn the_list_of_inherited_keys_is_these_bytes() {
    let bytes = encode_inherited(&[3, 0x1_0000_0000]);
    assert_eq!(
        hex(&bytes),
        concat!(
            "504c59434b4559530100000010000000000000000000000000000000000000000000000000000000",
            "03000000000000000000000001000000bd3dddef"
        ),
        "{BUMP}"
    );
    assert_eq!(decode_inherited(&bytes).unwrap(), [3, 0x1_0000_0000]);
    assert_eq!(decode_inherited(&encode_inherited(&[])).unwrap(), [0; 0]);
    for at in 0..bytes.len() {
        let mut bad = bytes.clone();
        bad[at] ^= 4;
        assert!(decode_inherited(&bad).is_err() || (10..12).contains(&at) || (24..40).contains(&at), "{at}");
    }
}

#[test]
fn a_slot_is_these_bytes() {
    let mut sums = [0; 64];
    (sums[0], sums[63]) = (0x0102_0304_0506_0708, u64::MAX);
    let mut ages = Ages { base: 5, ages: [0; 64] };
    (ages.ages[0], ages.ages[63]) = (0x83, 4);
    let bytes = encode_slot(&[0xab; 32], 9, 3, &ages, &sums);
    assert_eq!(bytes.len() as u64, SLOT);
    assert_eq!(
        hex(&bytes[..128]),
        concat!(
            "0300000000000000b1fed2a200000000000000000000000000000000000000000500000000000000d2ad087400000000",
            "830000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000",
            "0000000000000000000000000000000400000000000000000000000000000000"
        ),
        "{BUMP}"
    );
    assert_eq!(hex(&bytes[128..144]), "08070605040302010000000000000000", "{BUMP}");
    assert_eq!(hex(&bytes[632..]), "ffffffffffffffff", "{BUMP}");
    assert_eq!(bytes[32..128], encode_ages(&[0xab; 32], 3, &ages), "{BUMP}");
    let slot = decode_slot(&[0xab; 32], 9, &bytes).unwrap();
    assert_eq!((slot.chunk, slot.ages, slot.sums), (Some(3), Some(ages), sums));
    for (key, no) in [([0xab; 32], 8), ([0xac; 32], 9)] {
        assert!(
            decode_slot(&key, no, &bytes).unwrap().chunk.is_none(),
            "in another place, or of another source"
        );
    }
    assert!(decode_slot(&[0xab; 32], 9, &bytes[1..]).is_err());
}

#[test]
fn a_block_has_this_sum() {
    let bytes: Vec<u8> = (0..CACHE_BLOCK).map(|n| (n * 7 % 251) as u8).collect();
    assert_eq!(block_sum(&[0xab; 32], 5, &bytes), 0x124d_99e4_761d_a5ea, "{BUMP}");
    assert_eq!(block_sum(&[0xab; 32], 5, &bytes[..1000]), 0x5f82_bdb1_8996_ff8b, "{BUMP}");
    assert_ne!(block_sum(&[0xab; 32], 6, &bytes), block_sum(&[0xab; 32], 5, &bytes));
    assert_ne!(block_sum(&[0xac; 32], 5, &bytes), block_sum(&[0xab; 32], 5, &bytes));
}

fn area(a: &CacheHeader, b: &CacheHeader) -> Vec<u8> {
    let mut area = vec![0; HEADER_AREA as usize];
    for header in [a, b] {
        let at = CacheHeader::place(header.sequence) as usize;
        area[at..at + header.encode().len()].copy_from_slice(&header.encode());
    }
    area
}

#[test]
fn the_newer_sound_copy_counts() {
    let (old, new) = (header(), CacheHeader { sequence: 8, pinned: false, ..header() });
    let both = area(&old, &new);
    let decoded = CacheHeader::decode(&both).unwrap();
    assert_eq!((&decoded.header, decoded.damaged), (&new, None));
    for at in 0..new.encode().len() {
        for bit in 0..8 {
            let mut bytes = both.clone();
            bytes[at] ^= 1 << bit;
            let decoded = CacheHeader::decode(&bytes).unwrap();
            assert!(decoded.header == old && decoded.damaged.is_some(), "byte {at} bit {bit}");
            bytes[2048 + at] ^= 1 << bit;
            assert!(CacheHeader::decode(&bytes).is_err());
        }
    }
    // A copy at the offset of the other copy does not count.
    let mut moved = both.clone();
    moved.copy_within(2048..2200, 0);
    assert!(CacheHeader::decode(&moved).unwrap().damaged.is_some());
    assert!(CacheHeader::decode(&both[..2048]).unwrap().damaged.is_some());
    assert!(CacheHeader::decode(&both[..50]).is_err() && CacheHeader::decode(&[]).is_err());
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoders_of_the_cache_panic(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
        let _ = CacheHeader::decode(&bytes);
        let _ = decode_inherited(&bytes);
        let _ = decode_slot(&[1; 32], 0, &bytes);
        let _ = decode_slot(&[1; 32], 0, &bytes[..bytes.len().min(SLOT as usize)]);
    }
}
