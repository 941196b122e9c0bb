use super::super::names::{NameEntry, decode, encode};
use super::hex;

fn entries() -> Vec<NameEntry> {
    let disk = NameEntry {
        is_base: false,
        number: 5,
        inode: 7,
        changed_ns: 9,
        len: 300,
        name: "vm1".into(),
        base: 4,
    };
    let base = NameEntry {
        is_base: true,
        number: 4,
        inode: 8,
        changed_ns: -2,
        len: 200,
        name: "debian".into(),
        base: 0,
    };
    vec![disk, base]
}

#[test]
fn golden_bytes_bump_the_version_when_this_fails() {
    let envelope = "504c594e414d4553\
                    0100000060000000000000000000000000000000000000000000000000000000";
    let payload = "02\
                   00 0500000000000000 0700000000000000 0900000000000000 2c01000000000000 0300766d31 0400000000000000\
                   01 0400000000000000 0800000000000000 feffffffffffffff c800000000000000 060064656269616e 0000000000000000";
    let bytes = encode(&entries());
    let expected = (envelope.to_owned() + payload).replace(' ', "");
    let sum = bytes.len() - 4;
    assert_eq!(hex(&bytes[..sum]), expected, "the format changed: bump the version");
    assert_eq!(bytes[sum..], crc32c::crc32c(&bytes[..sum]).to_le_bytes());
    assert_eq!(decode(&bytes), Ok(entries()));
    assert_eq!(decode(&encode(&[])), Ok(Vec::new()));
}

#[test]
fn every_flipped_bit_and_every_cut_of_a_list_of_names_is_detected() {
    let bytes = encode(&entries());
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
