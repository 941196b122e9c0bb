use super::super::used::{UsedBase, decode, encode};
use super::hex;

fn list() -> Vec<UsedBase> {
    vec![UsedBase { base: 2, used_ns: 7 }, UsedBase { base: 9, used_ns: -2 }]
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
    assert_eq!(decode(&encode(&[])), Ok(Vec::new()));
}

#[test]
fn every_flipped_bit_and_every_cut_of_a_list_of_uses_is_detected() {
    let bytes = encode(&list());
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
