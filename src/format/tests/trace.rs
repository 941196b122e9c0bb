use super::super::record::Digest;
use super::super::trace::{MAX_ENTRIES, MAX_FILE, Origin, Trace, TraceEntry};
use super::super::{Kind, Reader, Writer};
use super::hex;
use proptest::prelude::*;

fn entry(first: u64, blocks: u64, at_ms: u32) -> TraceEntry {
    TraceEntry { first, blocks, at_ms }
}

fn trace() -> Trace {
    Trace {
        base: "debian-12".into(),
        size: 2 << 30,
        origin: Origin::Digest(Digest::Sha256([7; 32])),
        recorded_ns: 5,
        entries: vec![entry(0, 1, 0), entry(524_287, 1, 0), entry(256, 32, 7), entry(288, 4, 1000)],
    }
}

#[test]
fn golden_bytes_bump_the_version_when_this_fails() {
    let envelope = "504c595452414345\
                    0100000051000000000000000000000000000000000000000000000000000000";
    let payload = "09006465626961 6e2d3132 0000008000000000 0500000000000000 01\
                   0707070707070707070707070707070707070707070707070707070707070707\
                   04000000 000000 fcff3f0000 fffb3f1f07 0003e107";
    let bytes = trace().encode().expect("a trace");
    let expected = (envelope.to_owned() + payload).replace(' ', "");
    let sum = bytes.len() - 4;
    assert_eq!(hex(&bytes[..sum]), expected, "the format changed: bump the version");
    assert_eq!(bytes[sum..], crc32c::crc32c(&bytes[..sum]).to_le_bytes());
    assert_eq!(Trace::decode(&bytes), Ok(trace()));
}

#[test]
fn every_flipped_bit_and_every_cut_is_detected() {
    let bytes = trace().encode().expect("a trace");
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            assert!(Trace::decode(&damaged).is_err(), "byte {at}, bit {bit}");
        }
        assert!(Trace::decode(&bytes[..at]).is_err(), "cut at {at}");
    }
    assert!(Trace::decode(&[bytes, vec![0]].concat()).is_err());
}

/// Decodes a hostile payload in a right envelope, and expects `text` in the error.
fn refused(why: &str, text: &str, change: impl FnOnce(&mut Writer)) {
    let mut w = Writer::new();
    change(&mut w);
    let payload = w.finish();
    let mut bytes = trace().encode().expect("a trace");
    bytes.truncate(40);
    bytes[12..16].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend(payload);
    let sum = crc32c::crc32c(&bytes);
    bytes.extend(sum.to_le_bytes());
    let error = Trace::decode(&bytes).expect_err(why);
    assert!(error.to_string().contains(text), "{why}: {error}");
}

fn head(w: &mut Writer, size: u64, entries: u32) {
    w.bytes(b"b").u64(size).i64(0).u8(0).u32(entries);
}

#[test]
fn hostile_traces_are_refused() {
    refused("a name that is a path", "name", |w| {
        w.bytes(b"../b").u64(1).i64(0).u8(0).u32(0);
    });
    refused("no bytes", "a base of 0 bytes", |w| head(w, 0, 0));
    refused("2^63 bytes", "a base of 9223372036854775808 bytes", |w| head(w, 1 << 63, 0));
    refused("an unknown origin", "origin type 4 is not known", |w| {
        w.bytes(b"b").u64(1).i64(0).u8(4).u32(0);
    });
    refused("more entries than bytes", "4294967295 entries", |w| head(w, 4096, u32::MAX));
    refused("more entries than may be", "entries in", |w| {
        head(w, 1 << 46, MAX_ENTRIES as u32 + 1);
        w.raw(&vec![0; 3 * (MAX_ENTRIES + 1)]);
    });
    refused("past the end", "1 blocks at block 3", |w| {
        head(w, 3 * 4096, 1);
        w.varint(6).varint(0).varint(0);
    });
    refused("across the end", "2 blocks at block 2", |w| {
        head(w, 2 * 4096 + 1, 1);
        w.varint(4).varint(1).varint(0);
    });
    refused("before the start", "out of bounds", |w| {
        head(w, 4096, 1);
        w.varint(1).varint(0).varint(0);
    });
    refused("lengths that run over", "out of bounds", |w| {
        head(w, 1 << 46, 1);
        w.varint(0).varint(u64::MAX).varint(0);
    });
    refused("an end that runs over", "blocks at block", |w| {
        head(w, 1 << 46, 1);
        w.varint(2).varint(u64::MAX - 1).varint(0);
    });
    refused("the same blocks again and again", "more blocks than the base", |w| {
        head(w, 8 * 4096, 2);
        w.varint(0).varint(7).varint(0).varint(15).varint(7).varint(0);
    });
    refused("times that run over", "out of bounds", |w| {
        head(w, 8 * 4096, 2);
        w.varint(0).varint(0).varint(u32::MAX.into()).varint(0).varint(0).varint(1);
    });
    refused("numbers with bytes to spare", "more bytes than it needs", |w| {
        head(w, 8 * 4096, 1);
        w.raw(&[0x80, 0]).varint(0).varint(0);
    });
    refused("numbers of more than 64 bits", "more than 64 bits", |w| {
        head(w, 8 * 4096, 1);
        w.raw(&[0xff; 9]).u8(2).varint(0).varint(0);
    });
    refused("bytes left over", "too many", |w| {
        head(w, 8 * 4096, 1);
        w.varint(0).varint(0).varint(0).varint(0);
    });
    let large = Trace::decode(&vec![0; MAX_FILE as usize + 1]).expect_err("too large");
    assert!(large.to_string().contains("at most 16777216"), "{large}");
}

#[test]
fn a_trace_that_decode_would_refuse_is_not_encoded() {
    let with = |entries| Trace { entries, ..trace() }.encode().map(drop).map_err(|e| e.kind);
    assert_eq!(with(vec![]), Ok(()));
    assert_eq!(with(vec![entry(0, 0, 0)]), Err(Kind::Value));
    assert_eq!(with(vec![entry(524_288, 1, 0)]), Err(Kind::Value));
    assert_eq!(with(vec![entry(0, 1, 5), entry(1, 1, 4)]), Err(Kind::Value));
    assert_eq!(with(vec![entry(0, 1, 0); MAX_ENTRIES + 1]), Err(Kind::Value));
    let most: Vec<_> = (0..524_288u64).map(|n| entry(n * 77_777 % 524_288, 1, n as u32)).collect();
    let bytes = Trace { entries: most, ..trace() }.encode().expect("the most that fits this base");
    assert!((bytes.len() as u64) < MAX_FILE, "{}", bytes.len());
    assert!(Trace { base: "no/name".into(), ..trace() }.encode().is_err());
    assert!(Trace { size: 100, ..trace() }.encode().is_err());
}

#[test]
fn only_digests_of_one_kind_contradict_each_other() {
    let sha256 = |n| Origin::Digest(Digest::Sha256([n; 32]));
    let sha512 = |n| Origin::Digest(Digest::Sha512([n; 64]));
    assert!(sha256(1).contradicts(&sha256(2)) && sha512(1).contradicts(&sha512(2)));
    assert!(!sha256(1).contradicts(&sha256(1)) && !sha256(1).contradicts(&sha512(1)));
    assert!(!sha256(1).contradicts(&Origin::Unknown));
    assert!(!Origin::Validator([1; 32]).contradicts(&Origin::Validator([2; 32])));
}

proptest! {
    #[test]
    fn varints_decode_as_written(numbers in proptest::collection::vec((any::<u64>(), 0..64u32), 0..50)) {
        let numbers: Vec<u64> = numbers.into_iter().map(|(n, shift)| n >> shift).collect();
        let mut w = Writer::new();
        for n in &numbers {
            w.varint(*n);
        }
        let bytes = w.finish();
        let mut r = Reader::new(&bytes, "test");
        for n in numbers {
            prop_assert_eq!(r.varint(), Ok(n));
        }
        prop_assert_eq!(r.end(), Ok(()));
    }

    #[test]
    fn traces_decode_as_written(
        entries in proptest::collection::vec((0..10_000u64, 1..20u64, 0..2000u32), 0..200),
        kind in 0..4u8,
    ) {
        let mut at_ms = 0;
        let entries = entries.into_iter().map(|(first, blocks, since)| {
            at_ms += since;
            TraceEntry { first, blocks, at_ms }
        }).collect();
        let origin = match kind {
            0 => Origin::Unknown,
            1 => Origin::Digest(Digest::Sha256([1; 32])),
            2 => Origin::Digest(Digest::Sha512([2; 64])),
            _ => Origin::Validator([3; 32]),
        };
        let trace = Trace { size: 10_020 * 4096, origin, entries, ..trace() };
        let bytes = trace.encode().expect("within bounds");
        prop_assert_eq!(Trace::decode(&bytes), Ok(trace));
    }
}
