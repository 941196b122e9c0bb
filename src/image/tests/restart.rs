//! Failing and remote sources.

use super::writer::{Fill, Qcow2, Vmdk};
use super::*;
use crate::image::Method;

/// 64 KiB clusters in the order of the guest, as `qemu-img convert` arranges them; metadata at its usual places.
fn typical(method: Method) -> (Vec<u8>, Flat) {
    let fills = (0..300).map(|index| if index % 3 == 0 { Fill::Nothing } else { Fill::Packed }).collect();
    let image = Qcow2 { bits: 16, size: 300 << 16, fills, method, ..Qcow2::default() };
    image.write()
}

fn round_trips_until_data(format: Format, file: Vec<u8>, offset: u64) -> usize {
    let source = TestSource::new(file, Access::Remote);
    let image = opened(format, &source, Chain::Alone).unwrap();
    assert_eq!(source.state.lock().reads, 0, "no read before the first call of extent");
    retry(&source, || image.extent(offset, 1)).unwrap();
    source.state.lock().round_trips
}

#[test]
fn metadata_takes_few_round_trips() {
    let (file, _) = typical(Method::Zstd);
    assert_eq!(round_trips_until_data(Format::Qcow2, file, 1 << 16), 1, "all metadata is near the start");

    // With tables anywhere in the file: the header, then L1, then all L2 tables at once.
    let fills = vec![Fill::Data; 64 * 70];
    let image = Qcow2 { size: 512 * 64 * 70, fills, ..Qcow2::default() };
    let (mut file, _) = image.write();
    // Move L1 to the end.
    let at = file.len();
    file.extend_from_within(1024..1024 + 1024);
    super::writer::put64(&mut file, 40, at as u64);
    let source = TestSource::new(file, Access::Remote);
    let image = opened(Format::Qcow2, &source, Chain::Alone).unwrap();
    for table in (0..70).rev() {
        retry(&source, || image.extent(table * 512 * 64, 1)).unwrap();
    }
    assert_eq!(source.state.lock().round_trips, 3, "every table was announced");

    let fills = vec![Fill::Data; 20_000];
    for footer in [false, true] {
        let image = Vmdk {
            grain: 1,
            capacity: 20_000,
            fills: fills.clone(),
            compressed: true,
            footer,
            ..Vmdk::default()
        };
        assert_eq!(
            round_trips_until_data(Format::Vmdk, image.write().0, 70_000),
            1,
            "the tables are at the end"
        );
    }
}

#[test]
fn an_error_of_the_source_is_returned_and_not_cached() {
    let vmdk = Vmdk { compressed: true, footer: true, ..Vmdk::default() };
    let cases = [(Format::Qcow2, Qcow2::default().write()), (Format::Vmdk, vmdk.write())];
    for (format, (file, flat)) in cases {
        let mut failures = 0;
        for fail_at in 1..20 {
            let source = TestSource::new(file.clone(), Access::Local);
            source.state.lock().fail_at = Some(fail_at);
            let image = opened(format, &source, Chain::Alone).unwrap();
            let size = flat.len() as u64;
            if let Err(error) = read(&*image, &source, 0, size) {
                assert_eq!(error.kind(), ImageErrorKind::Source);
                assert_eq!(error.source_error().map(SourceError::kind), Some(SourceErrorKind::Io));
                assert!(error.completion().is_none());
                failures += 1;
            }
            source.state.lock().fail_at = None;
            assert_eq!(read(&*image, &source, 0, size).unwrap(), flat);
        }
        assert!(failures >= 4, "{format}: only {failures} reads");
    }
}

#[test]
fn an_error_of_the_image_is_cached() {
    let (mut file, _) = Qcow2::default().write();
    super::writer::put64(&mut file, 1024, 0x00ff_0000_0000_0000);
    let source = TestSource::new(file, Access::Local);
    let image = opened(Format::Qcow2, &source, Chain::Alone).unwrap();
    let first = image.extent(0, 1).unwrap_err();
    assert_eq!(first.kind(), ImageErrorKind::Invalid);
    let reads = source.state.lock().reads;
    let again = image.extent(700, 1).unwrap_err();
    assert_eq!(again.to_string(), first.to_string());
    assert_eq!(source.state.lock().reads, reads);
}

#[test]
fn two_threads_may_load_the_same_tables() {
    let (file, flat) = typical(Method::Deflate);
    for _ in 0..4 {
        let source = TestSource::new(file.clone(), Access::Alternating);
        let image = opened(Format::Qcow2, &source, Chain::Alone).unwrap();
        std::thread::scope(|scope| {
            for part in 0..4u64 {
                let (image, source, flat) = (&image, &source, &flat);
                scope.spawn(move || {
                    let (from, len) = (part * (60 << 16), 60 << 16);
                    let got = read(&**image, source, from, len).unwrap();
                    assert!(got == flat[from as usize..(from + len) as usize]);
                });
            }
        });
    }
}

#[test]
fn the_work_of_one_extent_call_is_bounded() {
    // 64 TiB without data take one step. A disk of small zero clusters is not walked to its end.
    let empty = Qcow2 { bits: 21, size: 1 << 46, fills: vec![], ..Qcow2::default() };
    let (mut file, _) = Qcow2 { size: 0, ..empty }.write();
    let l1 = file.len();
    file.resize(l1 + (8 << 20) / 64, 0);
    let entries = (1u64 << 46).div_ceil((1 << 18) << 21);
    super::writer::put64(&mut file, 24, 1 << 46);
    super::writer::put32(&mut file, 36, entries as u32);
    super::writer::put64(&mut file, 40, l1 as u64);
    let source = TestSource::new(file, Access::Local);
    let image = opened(Format::Qcow2, &source, Chain::Alone).unwrap();
    assert_eq!(image.extent(12_345, u64::MAX).unwrap(), (Extent::Zero, (1 << 46) - 12_345));

    let zeros = Qcow2 { size: 512 * 40_000, fills: vec![Fill::Zero; 40_000], ..Qcow2::default() };
    let source = TestSource::new(zeros.write().0, Access::Local);
    let image = opened(Format::Qcow2, &source, Chain::Alone).unwrap();
    let (extent, run) = image.extent(0, u64::MAX).unwrap();
    assert_eq!(extent, Extent::Zero);
    assert!(source.state.lock().reads < 50);
    assert!((1 << 19..512 * 40_000).contains(&run), "{run}");
}
