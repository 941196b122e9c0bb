use proptest::prelude::*;

use super::{far_base, fnv, hex, moved_base, token};
use crate::format::codec::{Envelope, Writer};
use crate::format::proof::*;
use crate::format::record::{BaseRecord, FileProof};
use crate::format::{Kind, MAX_DISK_SIZE};

/// The hash of the pages of the proof of 65 whole groups and 5 bytes, and a base record of version 5. Both are computed
/// by another program, with a BLAKE3 of its own.
const GOLDEN_TREE: &str = "64fbe3d33d952303b6a6eb56d3afabf173f42a89e3d57347defde61eb27fb876";
const GOLDEN_BASE_5: u64 = 11_979_631_562_612_530_107;

/// A base that needs version 5.
pub(super) fn proven_base() -> BaseRecord {
    let mut base = far_base();
    let places = vec!["https://h/d.obao".into(), "/srv/d.obao".into()];
    base.image.proof = Some(FileProof { root: [0xcd; 32], places });
    base.backing[0].proof = Some(FileProof { root: [0xef; 32], places: Vec::new() });
    base
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u8).collect()
}

/// The proof of some bytes, given in pieces of `piece` bytes.
fn proof_of(all: &[u8], piece: usize) -> (Vec<u8>, Layout, Hash) {
    let mut builder = Builder::new(all.len() as u64);
    let mut proof = vec![0; builder.layout().proof_size() as usize];
    let mut written = 0;
    for piece in all.chunks(piece) {
        let mut put = |offset: u64, page: &[u8]| -> Result<(), ()> {
            written += page.len() as u64;
            proof[offset as usize..offset as usize + page.len()].copy_from_slice(page);
            Ok(())
        };
        builder.update(piece, &mut put).unwrap();
    }
    assert_eq!(written + HEADER_AREA, builder.layout().proof_size(), "each page once");
    let root = builder.root().expect("all bytes came");
    (proof, builder.layout().clone(), root)
}

fn page<'a>(proof: &'a [u8], layout: &Layout, id: PageId) -> &'a [u8] {
    let (offset, length) = layout.place(id);
    &proof[offset as usize..(offset + length) as usize]
}

fn entry(page: &[u8], at: usize) -> Hash {
    page[at * 32..at * 32 + 32].try_into().unwrap()
}

/// Proves all of it, from the root down, and that one flipped bit of anything is found.
fn check(all: &[u8], piece: usize) {
    let (proof, layout, root) = proof_of(all, piece);
    assert_eq!(root, *blake3::hash(all).as_bytes(), "{} bytes", all.len());
    for level in (0..layout.levels()).rev() {
        for index in 0..layout.pages(level) {
            let id = PageId { level, index };
            let hash = match layout.is_top(id) {
                true => root,
                false => {
                    let (parent, at) = id.parent();
                    entry(page(&proof, &layout, parent), at)
                }
            };
            let mut bytes = page(&proof, &layout, id).to_vec();
            assert!(layout.page_has(id, &bytes, &hash), "{id:?} of {}", all.len());
            let at = (index as usize * 37 + level as usize) % bytes.len();
            bytes[at] ^= 1 << (index % 8);
            assert!(!layout.page_has(id, &bytes, &hash));
            assert!(
                !layout.page_has(id, &bytes[..bytes.len() - 1], &hash) && !layout.page_has(id, &[], &hash)
            );
        }
    }
    for group in 0..layout.groups() {
        let hash = layout.page_of(group).map_or(root, |(id, at)| entry(page(&proof, &layout, id), at));
        let start = (group * GROUP) as usize;
        let mut bytes = all[start..start + layout.group_len(group) as usize].to_vec();
        assert!(layout.group_has(group, &bytes, &hash), "group {group} of {}", all.len());
        let at = (group as usize * 41) % bytes.len();
        bytes[at] ^= 0x10;
        assert!(!layout.group_has(group, &bytes, &hash));
        bytes[at] ^= 0x10;
        bytes.push(0);
        assert!(!layout.group_has(group, &bytes, &hash) && !layout.group_has(group, &[], &hash));
    }
}

#[test]
fn the_root_is_the_blake3_hash_and_each_page_and_group_is_proven_by_itself() {
    let group = GROUP as usize;
    for len in [1, 1023, 1024, 1025, group - 1, group, group + 1, 2 * group, 3 * group, 64 * group] {
        check(&bytes(len), 1000);
    }
    // Two levels; the last page of the lowest level, and the last group, of any length.
    for len in [64 * group + 1, 65 * group, 127 * group + 5, 128 * group, 129 * group - 1, 200 * group + 77] {
        check(&bytes(len), 1 << 20);
    }
}

/// Three levels: a page of the middle level, and a short one behind it.
#[test]
fn a_proof_has_as_many_levels_as_it_needs() {
    check(&bytes(64 * 64 * GROUP as usize + GROUP as usize + 3), 1 << 20);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]
    #[test]
    fn files_of_any_size_are_proven(len in 1usize..(3 << 20), piece in 1usize..100_000) {
        check(&bytes(len), piece);
    }
}

#[test]
fn the_largest_image_has_six_levels_and_a_proof_of_a_500th_of_its_size() {
    let layout = Layout::of(MAX_DISK_SIZE);
    assert_eq!((layout.levels(), layout.groups()), (6, 1 << 32));
    assert!(layout.proof_size() > MAX_DISK_SIZE / 512 && layout.proof_size() < MAX_DISK_SIZE / 500);
    let (mut last, mut at) = (PageId { level: 0, index: layout.pages(0) - 1 }, layout.proof_size());
    loop {
        let (offset, length) = layout.place(last);
        assert_eq!(offset + length, at, "{last:?}: the pages lie without gaps, the highest first");
        let first = PageId { index: 0, ..last };
        at = layout.place(first).0;
        if layout.is_top(last) {
            break;
        }
        last = PageId { level: last.level + 1, index: layout.pages(last.level + 1) - 1 };
    }
    assert_eq!(at, HEADER_AREA);
    let small = Layout::of(GROUP);
    assert_eq!((small.levels(), small.proof_size(), small.page_of(0)), (0, HEADER_AREA, None));
}

fn header() -> ProofHeader {
    ProofHeader { size: 5000, root: [7; 32] }
}

#[test]
fn golden_bytes_bump_the_version_when_this_fails() {
    let bytes = header().encode();
    let expected = "504c5950524f4f46 0100 0000 30000000".to_owned()
        + &"00".repeat(24)
        + "8813000000000000 00400000 40000000"
        + &"07".repeat(32);
    let sum = expected.replace(' ', "").len() / 2;
    assert_eq!(hex(&bytes[..sum]), expected.replace(' ', ""), "the format changed: bump the version");
    assert_eq!(bytes[sum..sum + 4], crc32c::crc32c(&bytes[..sum]).to_le_bytes());
    assert!(bytes.len() as u64 == HEADER_AREA && bytes[sum + 4..].iter().all(|byte| *byte == 0));
    assert_eq!(ProofHeader::decode(&bytes), Ok(header()));
    assert_eq!(fnv(&proven_base().encode()), GOLDEN_BASE_5, "base record, version 5");
    // The tree itself: an image of 66 groups.
    let (proof, _, _) = proof_of(&self::bytes(65 * GROUP as usize + 5), 5000);
    let tree = blake3::hash(&proof[HEADER_AREA as usize..]).to_string();
    assert_eq!(tree, GOLDEN_TREE, "the format changed: bump the version");
}

#[test]
fn a_damaged_or_hostile_header_is_refused() {
    let good = header().encode();
    for at in 0..92 {
        let mut bytes = good.clone();
        bytes[at] ^= 1;
        assert!(ProofHeader::decode(&bytes).is_err(), "byte {at}");
    }
    for len in 0..92 {
        assert_eq!(ProofHeader::decode(&good[..len]).unwrap_err().kind, Kind::Truncated);
    }
    assert_eq!(ProofHeader::decode(b"<!doctype html>".repeat(20).as_slice()).unwrap_err().kind, Kind::Magic);
    for size in [0, MAX_DISK_SIZE + 1, u64::MAX] {
        let error = ProofHeader::decode(&ProofHeader { size, ..header() }.encode()).unwrap_err();
        assert!(error.kind == Kind::Value && error.detail.contains("which no image has"), "{error}");
    }
}

#[test]
fn a_base_without_a_proof_is_written_in_an_older_version_and_one_with_a_proof_comes_back() {
    assert_eq!((far_base().encode()[8], moved_base().encode()[8], proven_base().encode()[8]), (2, 3, 5));
    let below = BaseRecord { image: far_base().image, ..proven_base() };
    let moved = BaseRecord { moved: moved_base().moved, token: Some(token()), ..proven_base() };
    for base in [proven_base(), below, moved] {
        assert_eq!(base.encode()[8], 5);
        assert_eq!(BaseRecord::decode(&base.encode()).unwrap(), base);
    }
}

/// A record of version 5 whose field of proofs has these bytes.
fn with_field(tag: u16, field: &[u8]) -> Vec<u8> {
    let base = BaseRecord { backing: proven_base().backing, ..proven_base() };
    let bytes = base.encode();
    // Number of fields, tag, length, and the field; then the checksum of the envelope.
    let whole: usize = 2 + 2 + 2 + 1 + (1 + 32 + 1 + 2 + 16 + 2 + 11) + (1 + 32 + 1);
    let mut w = Writer::new();
    w.raw(&bytes[40..bytes.len() - 4 - whole]).u16(1).u16(tag).bytes(field);
    Envelope { magic: *b"PLYBASE\0", version: 5, structure: "base record" }.seal(&w.finish())
}

#[test]
fn a_wrong_list_of_proofs_is_refused_and_an_unknown_field_is_of_a_newer_version() {
    let entry = |file: u8, places: u8| [vec![file], vec![9; 32], vec![places]].concat();
    let list = |entries: &[Vec<u8>]| [vec![entries.len() as u8], entries.concat()].concat();
    assert!(BaseRecord::decode(&with_field(1, &list(&[entry(0, 0), entry(1, 0)]))).is_ok());
    for (field, part) in [
        (list(&[]), "empty"),
        (list(&[entry(2, 0)]), "not there"),
        (list(&[entry(1, 0), entry(0, 0)]), "out of order"),
        (list(&[entry(0, 0), entry(0, 0)]), "out of order"),
        (list(&[entry(0, 18)]), "at most 17"),
        (list(&[entry(0, 1)]), "bytes needed"),
        ([list(&[entry(0, 0)]), vec![0]].concat(), "too many"),
    ] {
        let error = BaseRecord::decode(&with_field(1, &field)).unwrap_err();
        assert!(error.detail.contains(part), "{part}: {error}");
    }
    assert_eq!(BaseRecord::decode(&with_field(3, &[])).unwrap_err().kind, Kind::Newer);
}
