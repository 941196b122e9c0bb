use super::super::pools::{PoolEntry, PoolIdentity, decode, encode};
use super::{disk, hex, layered_disk};
use crate::format::Kind;
use crate::format::features::Features;
use crate::format::record::DiskRecord;

fn pools() -> Vec<PoolEntry> {
    let pool = |number, name: &str, dir: &str| PoolEntry {
        number,
        name: name.into(),
        dir: dir.into(),
        uuid: [number as u8; 16],
        added_ns: 5,
    };
    vec![pool(7, "fast", "/mnt/a"), pool(9, "slow", "/mnt/b")]
}

fn identity() -> PoolIdentity {
    PoolIdentity { store: [0xab; 16], uuid: [7; 16], made_ns: -2 }
}

/// A disk whose delta and one layer lie in pools.
fn disk_in_pools() -> DiskRecord {
    DiskRecord { features: Features::in_pools(vec![(5, 7), (9, 9)]), ..layered_disk() }
}

#[test]
fn golden_bytes_bump_the_version_when_this_fails() {
    let head = |magic: &str, len: &str| format!("{magic} 0100 0000 {len} {}", "00".repeat(24));
    let list = head("504c59504f4f4c53", "5e000000")
        + "0200 0700000000000000 0400 66617374 0600 2f6d6e742f61 07070707070707070707070707070707 0500000000000000\
           0900000000000000 0400 736c6f77 0600 2f6d6e742f62 09090909090909090909090909090909 0500000000000000";
    let one = head("504c59504f4f4c00", "28000000")
        + "abababababababababababababababab 07070707070707070707070707070707 feffffffffffffff";
    for (bytes, expected) in [(encode(&pools()), list), (identity().encode(), one)] {
        let sum = bytes.len() - 4;
        assert_eq!(hex(&bytes[..sum]), expected.replace(' ', ""), "the format changed: bump the version");
        assert_eq!(bytes[sum..], crc32c::crc32c(&bytes[..sum]).to_le_bytes());
    }
    assert_eq!(decode(&encode(&pools())), Ok(pools()));
    assert_eq!(decode(&encode(&[])), Ok(Vec::new()));
    assert_eq!(PoolIdentity::decode(&identity().encode()), Ok(identity()));
}

#[test]
fn the_pools_of_a_disk_are_a_feature_of_its_record() {
    let bytes = disk_in_pools().encode();
    assert_eq!((bytes[8], DiskRecord::decode(&bytes).unwrap()), (5, disk_in_pools()));
    let field = "0100 0400 2200 0200 0500000000000000 0700000000000000 0900000000000000 0900000000000000";
    let end = bytes.len() - 4;
    assert!(hex(&bytes[..end]).ends_with(&field.replace(' ', "")), "the format changed: bump the version");
    // A disk without one is written as before.
    assert_eq!(layered_disk().encode()[8], 4);
    for pools in
        [vec![(5, 0)], vec![(9, 9), (5, 7)], vec![(5, 7), (5, 7)], vec![(u64::MAX, 7)], vec![(5, u64::MAX)]]
    {
        let record = DiskRecord { features: Features::in_pools(pools), ..disk() };
        let error = DiskRecord::decode(&record.encode()).unwrap_err();
        assert_eq!(error.kind, Kind::Value, "{error}");
    }
}

#[test]
fn every_flipped_bit_and_every_cut_of_the_files_of_pools_is_detected() {
    for bytes in [encode(&pools()), identity().encode()] {
        let reads = |bytes: &[u8]| decode(bytes).is_ok() || PoolIdentity::decode(bytes).is_ok();
        assert!(reads(&bytes));
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                assert!(!reads(&damaged), "byte {at}, bit {bit}");
            }
            assert!(!reads(&bytes[..at]), "cut at {at}");
        }
    }
}

#[test]
fn a_list_with_an_impossible_pool_is_refused() {
    let [fast, slow] = <[PoolEntry; 2]>::try_from(pools()).unwrap();
    for bad in [
        PoolEntry { number: 0, ..fast.clone() },
        PoolEntry { number: u64::MAX, ..fast.clone() },
        PoolEntry { number: 9, ..fast.clone() },
        PoolEntry { name: "slow".into(), ..fast.clone() },
        PoolEntry { name: "default".into(), ..fast.clone() },
        PoolEntry { name: "../x".into(), ..fast.clone() },
        PoolEntry { dir: "relative".into(), ..fast },
    ] {
        let error = decode(&encode(&[slow.clone(), bad])).unwrap_err();
        assert_eq!(error.kind, Kind::Value, "{error}");
    }
}
