//! The limits in the record of a disk.

use super::*;
use crate::format::limits::{Limits, Rates};

fn limited(limits: Limits) -> DiskRecord {
    DiskRecord { features: Features { limits: limits.boxed(), ..Features::default() }, ..disk() }
}

fn all() -> Limits {
    Limits {
        quota: Some(1 << 30),
        iops: Rates { all: Some(500), read: Some(400), write: Some(300) },
        bandwidth: Rates { all: Some(100 << 20), read: Some(90 << 20), write: Some(80 << 20) },
        burst_ms: Some(30_000),
    }
}

/// Payload of the field: a count of fields, the tag, the length.
fn at_the_end(record: &DiskRecord) -> Vec<u8> {
    let bytes = record.encode();
    bytes[bytes.len() - 4 - 66..bytes.len() - 4].to_vec()
}

#[test]
fn limits_survive_encoding() {
    let one = |limits: Limits| limited(limits);
    for limits in [
        all(),
        Limits { quota: Some(4096), ..Limits::default() },
        Limits { iops: Rates { write: Some(1), ..Rates::default() }, ..Limits::default() },
        Limits { burst_ms: Some(1), ..Limits::default() },
    ] {
        let record = one(limits);
        assert_eq!(DiskRecord::decode(&record.encode()).unwrap(), record);
    }
    assert_eq!(
        at_the_end(&limited(all())),
        [
            &[1, 0, 2, 0, 60, 0][..],
            &(1u64 << 30).to_le_bytes(),
            &500u64.to_le_bytes(),
            &400u64.to_le_bytes(),
            &300u64.to_le_bytes(),
            &(100u64 << 20).to_le_bytes(),
            &(90u64 << 20).to_le_bytes(),
            &(80u64 << 20).to_le_bytes(),
            &30_000u32.to_le_bytes(),
        ]
        .concat()
    );
}

#[test]
fn a_disk_without_limits_has_a_record_that_an_older_plyfs_reads() {
    let record = limited(Limits::default());
    assert_eq!(record.encode(), disk().encode());
    assert!(limited(all()).encode()[8] == 5 && record.encode()[8] < 5, "the versions");
}

#[test]
fn limits_out_of_their_bounds_are_refused() {
    let iops = |rate| Limits { iops: Rates { all: Some(rate), ..Rates::default() }, ..Limits::default() };
    let bandwidth =
        |rate| Limits { bandwidth: Rates { read: Some(rate), ..Rates::default() }, ..Limits::default() };
    for (limits, part) in [
        (Limits { quota: Some(4095), ..Limits::default() }, "quota is 4095; give 4096 to"),
        (Limits { quota: Some(u64::MAX), ..Limits::default() }, "quota"),
        (iops(1 << 40), "IOPS"),
        (bandwidth(65_535), "read bandwidth is 65535; give 65536 to"),
        (bandwidth(u64::MAX), "bandwidth"),
        (Limits { burst_ms: Some(3_600_001), ..Limits::default() }, "burst"),
    ] {
        let problem = limits.problem().expect("a problem");
        assert!(problem.contains(part), "{problem}");
        let error = DiskRecord::decode(&limited(limits).encode()).expect_err("out of bounds");
        assert!(error.to_string().contains(part), "{error}");
    }
    for zero in [Limits { quota: Some(0), ..Limits::default() }, iops(0), bandwidth(0)] {
        let problem = zero.problem().expect("a problem");
        assert!(problem.contains("is 0; leave it out for no limit"), "{problem}");
    }
    assert_eq!(all().problem(), None);
}
