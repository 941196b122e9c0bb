//! The part of a disk's record that says how it is encrypted.

use super::{disk, layered_disk};
use crate::format::Kind;
use crate::format::encryption::{Encryption, KeySource, SALT, WRAPPED, WrappedKey};
use crate::format::features::Features;
use crate::format::record::DiskRecord;

fn encryption() -> Encryption {
    let key = |delta, byte| WrappedKey { delta, wrapped: [byte; WRAPPED] };
    Encryption {
        source: KeySource::File("/etc/plyfs/keys/vm-1".into()),
        salt: [9; SALT],
        keys: vec![key(3, 1), key(5, 2)],
    }
}

fn encrypted(encryption: Encryption) -> DiskRecord {
    DiskRecord {
        features: Features { encryption: Some(Box::new(encryption)), ..Features::default() },
        ..disk()
    }
}

/// The features of a record with `field` as its only one, after `before` bytes of the record.
fn with_field(field: &[u8]) -> Vec<u8> {
    let mut bytes = vec![1, 0, 3, 0];
    bytes.extend((field.len() as u16).to_le_bytes());
    bytes.extend(field);
    bytes
}

fn golden() -> Vec<u8> {
    let mut field = vec![1, 0, 20, 0];
    field.extend(b"/etc/plyfs/keys/vm-1");
    field.extend([9; 32]);
    field.extend([2, 0]);
    for (delta, byte) in [(3u64, 1), (5, 2)] {
        field.extend(delta.to_le_bytes());
        field.extend([byte; 72]);
    }
    field
}

/// The bytes of a record whose features are these.
fn record(features: &[u8]) -> Vec<u8> {
    let whole = encrypted(encryption()).encode();
    let payload = &whole[40..whole.len() - 4];
    let known = with_field(&golden());
    assert!(payload.ends_with(&known), "the bytes of the format changed: bump the version");
    let payload = [&payload[..payload.len() - known.len()], features].concat();
    let mut bytes = whole[..40].to_vec();
    bytes[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
    let sum = crc32c::crc32c(&bytes);
    bytes.extend(sum.to_le_bytes());
    bytes
}

#[test]
fn the_encryption_of_a_disk_has_these_bytes() {
    let bytes = encrypted(encryption()).encode();
    assert_eq!(bytes[8..10], [5, 0]);
    assert_eq!(record(&with_field(&golden())), bytes);
}

#[test]
fn a_record_with_encryption_is_read_again() {
    let mut commanded = encryption();
    commanded.source = KeySource::Command("vm-1".into());
    let shredded = Encryption { keys: Vec::new(), ..encryption() };
    assert!(shredded.is_shredded());
    for encryption in [encryption(), commanded, shredded] {
        let record = DiskRecord {
            features: Features { encryption: Some(Box::new(encryption)), ..Features::default() },
            ..layered_disk()
        };
        assert_eq!(DiskRecord::decode(&record.encode()).unwrap(), record);
    }
}

#[test]
fn an_encryption_that_is_not_valid_is_refused() {
    let change = |at: usize, byte: u8| {
        let mut field = golden();
        field[at] = byte;
        DiskRecord::decode(&record(&with_field(&field))).unwrap_err()
    };
    // Ciphers and sources of later versions.
    assert_eq!(change(0, 2).kind, Kind::Newer);
    assert_eq!(change(1, 2).kind, Kind::Newer);
    // A path that is not absolute, and one with a control character.
    assert_eq!(change(4, b'e').kind, Kind::Value);
    assert_eq!(change(10, b'\n').kind, Kind::Value);
    // Keys that are out of order, or more than there are.
    let keys = 4 + 20 + 32 + 2;
    assert_eq!(change(keys, 6).kind, Kind::Value);
    assert_eq!(change(keys + 7, 0x80).kind, Kind::Value);
    for count in [1, 3] {
        DiskRecord::decode(&record(&with_field(&{
            let mut field = golden();
            field[keys - 2] = count;
            field
        })))
        .unwrap_err();
    }
    for len in 0..golden().len() {
        DiskRecord::decode(&record(&with_field(&golden()[..len]))).unwrap_err();
    }
    let mut unknown = with_field(&golden());
    unknown[2] = 200;
    assert_eq!(DiskRecord::decode(&record(&unknown)).unwrap_err().kind, Kind::Newer);
}

#[test]
fn keys_are_kept_in_order_and_go_with_their_deltas() {
    let mut encryption = encryption();
    let key = |delta, byte| WrappedKey { delta, wrapped: [byte; WRAPPED] };
    encryption.add(key(4, 7));
    encryption.add(key(5, 8));
    let numbers: Vec<u64> = encryption.keys.iter().map(|key| key.delta).collect();
    assert_eq!(numbers, [3, 4, 5]);
    assert_eq!(encryption.key(5), Some(&key(5, 8)));
    let mut record = encrypted(encryption);
    record.forget_unneeded_keys();
    let left: Vec<u64> = record.features.encryption.unwrap().keys.iter().map(|key| key.delta).collect();
    assert_eq!(left, [3]);
}
