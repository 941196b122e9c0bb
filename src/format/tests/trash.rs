//! Golden bytes of a disk in the trash, and damage of the features of a disk.

use super::super::features::{Features, Trashed};
use super::{DiskRecord, Kind, disk, hex, layered_disk};

fn trashed() -> DiskRecord {
    let trash = Some(Trashed { removed_ns: 0x0102, purge_ns: 0x0304 });
    DiskRecord { unlinked: true, features: Features { trash, ..Features::default() }, ..disk() }
}

/// If this fails, the on-disk format has changed: give the feature another tag.
#[test]
fn golden_bytes_of_a_trashed_disk_need_another_tag_when_this_fails() {
    let bytes = trashed().encode();
    assert_eq!(bytes[8], 5, "the version");
    // How many fields; tag and length of the first; its payload.
    let features = "0100 0100 1000 0201000000000000 0403000000000000".replace(' ', "");
    let end = bytes.len() - 4;
    assert_eq!(hex(&bytes[end - features.len() / 2..end]), features);
    for record in [trashed(), DiskRecord { features: trashed().features, ..layered_disk() }] {
        assert_eq!(DiskRecord::decode(&record.encode()), Ok(record));
    }
    assert!(!trashed().is_removed() && trashed().unlinked);
    assert!(DiskRecord { features: Features::default(), ..trashed() }.is_removed());
    // Without the feature an older plyfs reads the record.
    assert_eq!(DiskRecord { features: Features::default(), ..trashed() }.encode()[8], 1);
}

#[test]
fn an_unknown_feature_is_newer_and_a_damaged_one_is_damage() {
    let features = 2 + 2 + 2 + 16;
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = trashed().encode();
        bytes.truncate(bytes.len() - 4);
        let at = bytes.len() - features;
        let mut tail = bytes.split_off(at);
        change(&mut tail);
        bytes.extend(tail);
        let payload = (bytes.len() - 40) as u32;
        bytes[12..16].copy_from_slice(&payload.to_le_bytes());
        let sum = crc32c::crc32c(&bytes);
        bytes.extend(sum.to_le_bytes());
        DiskRecord::decode(&bytes)
    };
    assert_eq!(with(&|_| {}), Ok(trashed()));
    let kind = |change: &dyn Fn(&mut Vec<u8>)| with(change).expect_err("refused").kind;
    assert_eq!(kind(&|tail| tail[2..4].copy_from_slice(&60_000_u16.to_le_bytes())), Kind::Newer);
    // A field that is too short or too long, twice there, or missing.
    for length in [0_u8, 8, 15, 17] {
        assert_ne!(kind(&|tail| tail[4] = length), Kind::Newer);
    }
    let twice = |tail: &mut Vec<u8>| {
        tail[0] = 2;
        tail.extend_from_within(2..);
    };
    assert_ne!(kind(&twice), Kind::Newer);
    assert_ne!(kind(&|tail| tail[0] = 2), Kind::Newer);
    assert_ne!(kind(&|tail| tail[0] = 0), Kind::Newer);
}
