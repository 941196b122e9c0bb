//! Model tests: any arrangement of clusters, read in any ranges, compared with a flat reference.

use proptest::prelude::{Just, ProptestConfig, Strategy, any, prop, prop_assert_eq, prop_oneof, proptest};
use proptest::test_runner::TestCaseError;

use super::writer::{Fill, Qcow2, Vmdk};
use super::*;
use crate::image::Method;
use crate::image::table::Tables;

fn fills(extended: bool, old: bool) -> impl Strategy<Value = Fill> {
    let parts = prop::collection::vec(prop_oneof![3 => Just(1u8), 1 => Just(0), 1 => Just(2)], 32);
    prop_oneof![
        3 => Just(Fill::Nothing),
        4 => Just(Fill::Data),
        3 => Just(Fill::Packed),
        2 => Just(if old { Fill::Nothing } else { Fill::Zero }),
        1 => Just(if old { Fill::Data } else { Fill::Reserved }),
        3 => parts.prop_map(move |parts| if extended { Fill::Parts(parts) } else { Fill::Data }),
    ]
}

fn qcow2() -> impl Strategy<Value = Qcow2> {
    let kind = prop_oneof![
        Just((2, false, Method::Deflate)),
        Just((3, false, Method::Deflate)),
        Just((3, false, Method::Zstd)),
        Just((3, true, Method::Deflate)),
        Just((3, true, Method::Zstd)),
    ];
    (kind, 0u32..4).prop_flat_map(|((version, extended, method), bits)| {
        let bits = if extended { 14 + bits / 2 } else { 9 + bits };
        // Enough for three L2 tables of the smallest clusters.
        let many = if extended { 1..6usize } else { 1..140 };
        let backing = prop_oneof![Just(None), Just(Some("below.raw"))];
        let rest = (any::<u64>(), any::<u64>(), any::<bool>(), any::<bool>(), backing);
        (prop::collection::vec(fills(extended, version == 2), many), rest).prop_map(
            move |(fills, (seed, odd, in_order, cut, backing))| {
                let cluster = 1u64 << bits;
                let size = fills.len() as u64 * cluster - odd % cluster;
                Qcow2 { version, bits, extended, method, size, fills, backing, seed, in_order, cut }
            },
        )
    })
}

fn vmdk() -> impl Strategy<Value = Vmdk> {
    let fill = prop_oneof![2 => Just(Fill::Nothing), 1 => Just(Fill::Zero), 4 => Just(Fill::Data)];
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    let entries = prop_oneof![Just(512u32), Just(7)];
    (0u32..5, entries, prop::collection::vec(fill, 1..60), flags, any::<u64>(), any::<u64>()).prop_map(
        |(grain, entries, fills, (compressed, zero_grains, footer, in_order), seed, odd)| {
            let grain = 1u64 << grain;
            let capacity = fills.len() as u64 * grain - odd % grain;
            let footer = footer && compressed;
            Vmdk {
                grain,
                entries,
                capacity,
                compressed,
                zero_grains,
                fills,
                footer,
                seed,
                in_order,
                descriptor: None,
            }
        },
    )
}

/// Compares the whole disk and random ranges.
fn compare(format: Format, file: Vec<u8>, flat: &Flat, chain: Chain, seed: u64) -> Result<(), TestCaseError> {
    for access in [Access::Local, Access::Remote, Access::Alternating] {
        let source = TestSource::new(file.clone(), access);
        let image = opened(format, &source, chain).unwrap_or_else(|error| panic!("{error}"));
        prop_assert_eq!(image.size(), flat.len() as u64);
        let mut numbers = Numbers::new(seed);
        let size = flat.len() as u64;
        for round in 0..12 {
            let offset = if round == 0 { 0 } else { numbers.below(size) };
            let most = if round == 0 { size } else { (size - offset).min(1 << numbers.below(18)) };
            let len = if round == 0 { size } else { 1 + numbers.below(most) };
            let got = read(&*image, &source, offset, len).unwrap_or_else(|error| panic!("{error}"));
            let expected = &flat[offset as usize..(offset + len) as usize];
            if let Some(at) = got.iter().zip(expected).position(|(a, b)| a != b) {
                panic!("byte {} differs: {:?}, not {:?}", offset + at as u64, got[at], expected[at]);
            }
        }
        // Beyond the end.
        prop_assert_eq!(image.extent(size, 10).unwrap(), (Extent::Zero, 10));
        prop_assert_eq!(image.extent(u64::MAX, 10).unwrap(), (Extent::Zero, 10));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn any_qcow2_reads_as_it_was_written(image in qcow2()) {
        let (file, flat) = image.write();
        let chain = if image.backing.is_some() { Chain::OnBacking } else { Chain::Alone };
        compare(Format::Qcow2, file, &flat, chain, image.seed)?;
    }

    #[test]
    fn any_vmdk_reads_as_it_was_written(image in vmdk()) {
        let (file, flat) = image.write();
        compare(Format::Vmdk, file, &flat, Chain::Alone, image.seed)?;
    }
}

#[test]
fn raw_is_never_probed() {
    // A guest can write the header of another format.
    let (file, _) = Qcow2 { backing: Some("/etc/shadow"), ..Qcow2::default() }.write();
    let source = TestSource::new(file.clone(), Access::Local);
    let image = opened(Format::Raw, &source, Chain::Alone).unwrap();
    let flat: Flat = file.iter().map(|byte| Some(*byte)).collect();
    assert_eq!(read(&*image, &source, 0, file.len() as u64).unwrap(), flat);
}

#[test]
fn only_clusters_that_are_contiguous_in_guest_and_file_are_one_run() {
    let fills = vec![Fill::Data; 8];
    let whole = Qcow2 { size: 8 * 512, fills, ..Qcow2::default() };
    let run = |file: Vec<u8>| {
        let source = TestSource::new(file, Access::Local);
        opened(Format::Qcow2, &source, Chain::Alone).unwrap().extent(100, 8 * 512).unwrap().1
    };
    let (mut file, _) = whole.write();
    assert_eq!(run(file.clone()), 8 * 512 - 100);
    // Swap two entries of the L2 table.
    let l2 = 3 * 512;
    let (third, fourth) = (file[l2 + 16..l2 + 24].to_vec(), file[l2 + 24..l2 + 32].to_vec());
    file[l2 + 16..l2 + 24].copy_from_slice(&fourth);
    file[l2 + 24..l2 + 32].copy_from_slice(&third);
    assert_eq!(run(file), 2 * 512 - 100);
}

#[test]
fn cached_tables_stay_within_their_bound() {
    let tables = Tables::<u64>::new(64 * 1024);
    let mut numbers = Numbers::new(7);
    let content = |at: u64| -> Arc<[u64]> { vec![at; 16 + at as usize % 500].into() };
    let mut hits = 0;
    for _ in 0..20_000 {
        // Most lookups are for few tables.
        let at = if numbers.below(4) > 0 { numbers.below(8) } else { numbers.below(1000) };
        match tables.get(at) {
            Some(table) => {
                assert_eq!(table, content(at));
                hits += 1;
            }
            None => tables.put(at, content(at)),
        }
        assert!(tables.bytes() <= 64 * 1024);
    }
    assert!(hits > 12_000, "{hits} hits of 20000: frequently used tables do not stay");
}
