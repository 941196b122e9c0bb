//! The identities of a block device and of an export.

use super::super::codec::{Reader, Writer};
use super::*;

fn device(names: &[&str]) -> BaseIdentity {
    let names = names.iter().map(|name| (*name).to_owned()).collect();
    BaseIdentity { size: 700, validator: Validator::Device { number: 253 << 32 | 3, names }, digest: None }
}

fn written(identity: &BaseIdentity) -> Vec<u8> {
    let mut w = Writer::new();
    identity.put(&mut w, 2);
    w.finish()
}

/// If this fails, the on-disk format has changed: give the kind of source another number, and keep reading this one.
#[test]
fn golden_bytes_of_a_device_bump_the_version_when_this_fails() {
    let expected = "bc02000000000000 04 03000000fd000000 02 0300613a62 0100 63 00";
    assert_eq!(hex(&written(&device(&["a:b", "c"]))), expected.replace(' ', ""));
}

#[test]
fn devices_decode_as_written_and_too_many_names_are_damage() {
    for names in [&[][..], &["dm-uuid:x"], &["n"; 16]] {
        let identity = device(names);
        let bytes = written(&identity);
        assert_eq!(BaseIdentity::get(&mut Reader::new(&bytes, "identity"), 2).unwrap(), identity);
        let record = BaseRecord { image: ImageFile { identity, ..base().image }, ..base() };
        assert_eq!(record.encode()[8], 2, "version 1 cannot express it");
        assert_eq!(BaseRecord::decode(&record.encode()).unwrap(), record);
    }
    let bytes = written(&device(&["n"; 17]));
    let error = BaseIdentity::get(&mut Reader::new(&bytes, "identity"), 2).unwrap_err();
    assert!(error.to_string().contains("17 names of a device"), "{error}");
}

#[test]
fn golden_bytes_of_an_export_bump_the_version_when_this_fails() {
    let export =
        BaseIdentity { size: 700, validator: Validator::Nbd { export: "gold".into() }, digest: None };
    let bytes = written(&export);
    assert_eq!(hex(&bytes), "bc02000000000000 05 0400676f6c64 00".replace(' ', ""));
    assert_eq!(BaseIdentity::get(&mut Reader::new(&bytes, "identity"), 2).unwrap(), export);
}

#[test]
fn golden_bytes_of_a_blob_bump_the_version_when_this_fails() {
    let validator = Validator::Oci { digest: "sha256:01".into(), blob: 0x1000, offset: 512 };
    let blob = BaseIdentity { size: 700, validator, digest: None };
    let bytes = written(&blob);
    let expected = "bc02000000000000 06 0900 7368613235363a3031 0010000000000000 0002000000000000 00";
    assert_eq!(hex(&bytes), expected.replace(' ', ""));
    assert_eq!(BaseIdentity::get(&mut Reader::new(&bytes, "identity"), 2).unwrap(), blob);
}
