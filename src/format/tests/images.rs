//! The identity of an image of a Glance.

use super::super::codec::{Reader, Writer};
use super::*;
use crate::format::record::ImageData;

fn image(data: ImageData, etag: Option<&str>) -> BaseIdentity {
    let validator = Validator::Glance {
        id: "abc".into(),
        hash: "sha512:01".into(),
        data,
        etag: etag.map(Into::into),
        last_modified: None,
    };
    BaseIdentity { size: 700, validator, digest: None }
}

fn written(identity: &BaseIdentity) -> Vec<u8> {
    let mut w = Writer::new();
    identity.put(&mut w, 2);
    w.finish()
}

/// If this fails, the on-disk format has changed: give the kind of source another number, and keep reading this one.
#[test]
fn golden_bytes_of_an_image_bump_the_version_when_this_fails() {
    let expected = "bc02000000000000 03 0300616263 0900 7368613531323a3031 00 01 0400226d6422 00 00";
    assert_eq!(hex(&written(&image(ImageData::Ranges, Some("\"md\"")))), expected.replace(' ', ""));
}

#[test]
fn images_decode_as_written_and_unknown_ways_are_of_a_newer_version() {
    for (number, data) in [ImageData::Ranges, ImageData::Whole, ImageData::Location].into_iter().enumerate() {
        for etag in [None, Some("\"e\"")] {
            let identity = image(data, etag);
            let bytes = written(&identity);
            // Behind size, kind, ID and digest of the record.
            assert_eq!(usize::from(bytes[8 + 1 + 5 + 11]), number);
            let mut r = Reader::new(&bytes, "identity");
            assert_eq!(BaseIdentity::get(&mut r, 2).unwrap(), identity);
            let record = BaseRecord { image: ImageFile { identity, ..base().image }, ..base() };
            assert_eq!(record.encode()[8], 2, "version 1 cannot express it");
            assert_eq!(BaseRecord::decode(&record.encode()).unwrap(), record);
        }
    }
    let mut bytes = written(&image(ImageData::Ranges, None));
    bytes[8 + 1 + 5 + 11] = 3;
    let error = BaseIdentity::get(&mut Reader::new(&bytes, "identity"), 2).unwrap_err();
    assert!(error.to_string().contains("use a newer plyfs"), "{error}");
}
