use super::super::used::{TimesOfBase, UseList, UsedBase, decode, encode};
use super::hex;

fn list() -> UseList {
    let used = vec![UsedBase { base: 2, used_ns: 7 }, UsedBase { base: 9, used_ns: -2 }];
    UseList { used, times: Vec::new() }
}

fn with_times() -> UseList {
    UseList { times: vec![TimesOfBase { base: 9, modified_ns: 5, changed_ns: -1 }], ..list() }
}

#[test]
fn golden_bytes_of_the_list_of_uses_bump_the_version_when_this_fails() {
    let envelope = "504c595553454400\
                    0100000021000000000000000000000000000000000000000000000000000000";
    let payload = "02 0200000000000000 0700000000000000 0900000000000000 feffffffffffffff";
    let bytes = encode(&list());
    let expected = (envelope.to_owned() + payload).replace(' ', "");
    let sum = bytes.len() - 4;
    assert_eq!(hex(&bytes[..sum]), expected, "the format changed: bump the version");
    assert_eq!(bytes[sum..], crc32c::crc32c(&bytes[..sum]).to_le_bytes());
    assert_eq!(decode(&bytes), Ok(list()));
    assert_eq!(decode(&encode(&UseList::default())), Ok(UseList::default()));
    // A list with times has version 2.
    let envelope = "504c595553454400\
                    020000003a000000000000000000000000000000000000000000000000000000";
    let payload = payload.to_owned() + "01 0900000000000000 0500000000000000 ffffffffffffffff";
    let bytes = encode(&with_times());
    let expected = (envelope.to_owned() + &payload).replace(' ', "");
    assert_eq!(hex(&bytes[..bytes.len() - 4]), expected, "the format changed: bump the version");
    assert_eq!(decode(&bytes), Ok(with_times()));
}

#[test]
fn every_flipped_bit_and_every_cut_of_a_list_of_uses_is_detected() {
    for bytes in [encode(&list()), encode(&with_times())] {
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut damaged = bytes.clone();
                damaged[at] ^= 1 << bit;
                assert!(decode(&damaged).is_err(), "byte {at}, bit {bit}");
            }
            assert!(decode(&bytes[..at]).is_err(), "cut at {at}");
        }
        assert!(decode(&[bytes, vec![0]].concat()).is_err());
    }
}
