//! VMDK images in a single file, made by qemu-img.

use std::fs;

use plyfs::image::Format;

use super::{Numbers, directory, disk_bytes, run, same_as_qemu, text};

#[test]
fn vmdk_reads_as_qemu_reads_it() {
    let mut numbers = Numbers(0x7a3d_1111);
    for subformat in ["monolithicSparse", "streamOptimized"] {
        for zeroed in ["off", "on"] {
            for size in [65_536u64, 512, 33 * 1024 * 1024 + 1536, 70_000_128] {
                let dir = directory();
                let (image, raw) = (dir.path().join("image"), dir.path().join("raw"));
                fs::write(&raw, disk_bytes(size as usize, &mut numbers)).expect("write");
                let options = format!("subformat={subformat},zeroed_grain={zeroed}");
                run(
                    "qemu-img",
                    &["convert", "-f", "raw", "-O", "vmdk", "-o", &options, text(&raw), text(&image)],
                );
                if subformat == "monolithicSparse" {
                    let half = size / 1024 * 512;
                    let (zeros, data) =
                        (format!("write -q -z 0 {half}"), format!("write -q -P 7 {} 512", size - 512));
                    run("qemu-io", &["-f", "vmdk", "-c", &zeros, "-c", &data, text(&image)]);
                }
                same_as_qemu(&format!("{subformat}, zeroed_grain={zeroed}, {size}"), Format::Vmdk, &[image]);
            }
        }
    }
}

#[test]
fn an_empty_vmdk_reads_zeros() {
    for size in ["1M", "8G"] {
        let dir = directory();
        let image = dir.path().join("image");
        run("qemu-img", &["create", "-q", "-f", "vmdk", text(&image), size]);
        let (opened, _) = super::open(Format::Vmdk, &image, plyfs::image::Chain::Alone);
        let size = opened.size();
        let mut at = 0;
        while at < size {
            let (extent, run) = opened.extent(at, size - at).expect("a valid image");
            assert_eq!(extent, plyfs::image::Extent::Zero);
            at += run;
        }
    }
}
