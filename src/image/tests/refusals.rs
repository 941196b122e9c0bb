//! What is not let in, each with the words that say so. Every row is an image that is good but for one thing.

use super::writer::{Fill, Qcow2, Vmdk, descriptor, pack, put32, put64};
use super::*;
use crate::image::{Method, compressed_as_a_whole};

/// What is wrong with it, if anything is, by the time all of it was read.
fn verdict(format: Format, file: Vec<u8>, chain: Chain) -> Result<(), ImageError> {
    let source = Far::new(file, Way::Near);
    let image = opened(format, &source, chain)?;
    read(&*image, &source, 0, image.size().min(1 << 20)).map(|_| ())
}

struct Row {
    name: &'static str,
    file: Vec<u8>,
    chain: Chain,
    kind: ImageErrorKind,
    says: &'static str,
}

fn check(format: Format, rows: Vec<Row>) {
    let mut wrong = Vec::new();
    for Row { name, file, chain, kind, says } in rows {
        match verdict(format, file, chain) {
            Ok(()) => wrong.push(format!("{name}: let in")),
            Err(error) => {
                let said = error.to_string();
                let expected = format!("not a usable {format} image: {says}");
                if said != expected || error.kind() != kind {
                    wrong.push(format!(
                        "{name}: {:?}\n  {said}\n  instead of {kind:?}\n  {expected}",
                        error.kind()
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

fn row(
    name: &'static str,
    spec: Qcow2,
    kind: ImageErrorKind,
    says: &'static str,
    change: impl FnOnce(&mut Vec<u8>),
) -> Row {
    let chain = Chain::Alone;
    let (mut file, _) = spec.write();
    change(&mut file);
    Row { name, file, chain, kind, says }
}

/// Where [`Qcow2::write`] puts things, with clusters of 512 bytes.
const L1: usize = 1024;
const L2: usize = 1536;

/// A header extension behind a header of 112 bytes.
fn extension(file: &mut [u8], kind: u32, data: &[u8]) {
    put32(file, 112, kind);
    put32(file, 116, data.len() as u32);
    file[120..120 + data.len()].copy_from_slice(data);
}

#[test]
fn hostile_qcow2_headers() {
    use ImageErrorKind::{Invalid, Refused, Unsupported};
    let plain = Qcow2::default;
    let mut names = vec![0; 96];
    names[..7].copy_from_slice(b"\x00\x3fwarp\x1b");
    names[48..55].copy_from_slice(b"\x01\x05wrong");
    let rows = vec![
        row(
            "cut",
            plain(),
            Invalid,
            "the file ends within the header; it is damaged or incomplete: take another copy of it",
            |f| f.truncate(90),
        ),
        row(
            "magic only",
            plain(),
            Invalid,
            "the file ends within the header; it is damaged or incomplete: take another copy of it",
            |f| f.truncate(4),
        ),
        row(
            "nothing",
            plain(),
            Invalid,
            "it does not begin as a qcow2 image does; check the file, and what --format says",
            Vec::clear,
        ),
        row(
            "raw",
            plain(),
            Invalid,
            "it does not begin as a qcow2 image does; if it is raw, say so with --format",
            |f| {
                f[0] = 0;
                f[510..512].copy_from_slice(&[0x55, 0xaa]);
            },
        ),
        row(
            "vmdk",
            plain(),
            Invalid,
            "it does not begin as a qcow2 image does; if it is vmdk, say so with --format",
            |f| f[..4].copy_from_slice(b"KDMV"),
        ),
        row(
            "vhdx",
            plain(),
            Unsupported,
            "it does not begin as a qcow2 image does, it looks like vhdx; convert it: qemu-img convert -O qcow2",
            |f| f[..8].copy_from_slice(b"vhdxfile"),
        ),
        row(
            "gzip",
            plain(),
            Unsupported,
            "the file is compressed as a whole, with gzip, and cannot be read from the middle; decompress it, or give the image as qcow2 with compressed clusters (qemu-img convert -c -O qcow2)",
            |f| f[..3].copy_from_slice(&[0x1f, 0x8b, 8]),
        ),
        row(
            "version 1",
            plain(),
            Unsupported,
            "it has version 1, and only 2 and 3 are read (at byte 4 of the file); convert it: qemu-img convert -O qcow2",
            |f| put32(f, 4, 1),
        ),
        row(
            "version 4",
            plain(),
            Unsupported,
            "it has version 4, and only 2 and 3 are read (at byte 4 of the file); convert it: qemu-img convert -O qcow2",
            |f| put32(f, 4, 4),
        ),
        row(
            "tiny clusters",
            plain(),
            Invalid,
            "its clusters have 2^8 bytes, not 2^9 to 2^21 (at byte 20 of the file); it is damaged or incomplete: take another copy of it",
            |f| put32(f, 20, 8),
        ),
        row(
            "huge clusters",
            plain(),
            Invalid,
            "its clusters have 2^4294967295 bytes, not 2^9 to 2^21 (at byte 20 of the file); it is damaged or incomplete: take another copy of it",
            |f| put32(f, 20, u32::MAX),
        ),
        row(
            "short header",
            plain(),
            Invalid,
            "its header is said to have 96 bytes (at byte 100 of the file); it is damaged or incomplete: take another copy of it",
            |f| put32(f, 100, 96),
        ),
        row(
            "long header",
            plain(),
            Invalid,
            "its header is said to have 520 bytes (at byte 100 of the file); it is damaged or incomplete: take another copy of it",
            |f| put32(f, 100, 520),
        ),
        row(
            "odd header",
            plain(),
            Invalid,
            "its header is said to have 109 bytes (at byte 100 of the file); it is damaged or incomplete: take another copy of it",
            |f| put32(f, 100, 109),
        ),
        row(
            "unknown feature",
            plain(),
            Unsupported,
            "it has incompatible features that are not known: bit 5 (at byte 72 of the file); convert it with the program that made it",
            |f| put64(f, 72, 1 << 5),
        ),
        row(
            "unknown features",
            plain(),
            Unsupported,
            "it has incompatible features that are not known: bit 5, bit 63 (warp\\u{1b}) (at byte 72 of the file); convert it with the program that made it",
            |f| {
                put64(f, 72, 1 << 5 | 1 << 63);
                extension(f, 0x6803_f857, &names);
            },
        ),
        row(
            "corrupt",
            plain(),
            Refused,
            "it is marked as corrupt (at byte 72 of the file); repair a copy (qemu-img check -r all) and check what is in it",
            |f| put64(f, 72, 2),
        ),
        row(
            "data file",
            plain(),
            Refused,
            "it keeps its data in another file, and an image may not say which files are read (at byte 72 of the file); make one file of it where it is trusted: qemu-img convert -O qcow2",
            |f| put64(f, 72, 4),
        ),
        row(
            "data file, CVE-2024-32498",
            plain(),
            Refused,
            "it keeps its data in another file, and an image may not say which files are read (at byte 112 of the file); make one file of it where it is trusted: qemu-img convert -O qcow2",
            |f| extension(f, 0x4441_5441, b"json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}"),
        ),
        row(
            "encrypted",
            plain(),
            Unsupported,
            "it is encrypted (at byte 32 of the file); decrypt it: qemu-img convert --image-opts with the secret, -O qcow2",
            |f| put32(f, 32, 2),
        ),
        row(
            "encryption by extension",
            plain(),
            Unsupported,
            "it is encrypted (at byte 112 of the file); decrypt it: qemu-img convert --image-opts with the secret, -O qcow2",
            |f| extension(f, 0x0537_be77, &[0; 16]),
        ),
        row(
            "compression type without feature",
            plain(),
            Invalid,
            "its compression type is 1, and the feature bit for another one than zlib is not set (at byte 104 of the file); it is damaged or incomplete: take another copy of it",
            |f| f[104] = 1,
        ),
        row(
            "feature without compression type",
            plain(),
            Invalid,
            "its compression type is 0, and the feature bit for another one than zlib is set (at byte 104 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, 72, 8),
        ),
        row(
            "unknown compression type",
            plain(),
            Unsupported,
            "its clusters are compressed in a way that is not known (type 2) (at byte 104 of the file); convert it: qemu-img convert -c -O qcow2",
            |f| {
                put64(f, 72, 8);
                f[104] = 2;
            },
        ),
        row(
            "refcounts",
            plain(),
            Invalid,
            "its refcounts have 2^7 bits, more than 64 (at byte 96 of the file); it is damaged or incomplete: take another copy of it",
            |f| put32(f, 96, 7),
        ),
        row(
            "subclusters of 16 bytes",
            plain(),
            Invalid,
            "its clusters of 512 bytes are too small for subclusters (extended L2 entries) (at byte 20 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, 72, 16),
        ),
        row(
            "2^63 bytes",
            plain(),
            Refused,
            "its disk is said to have 9223372036854775808 bytes, and more than 64 TiB is not supported (at byte 24 of the file); check that this is the image that was meant",
            |f| put64(f, 24, 1 << 63),
        ),
        row(
            "64 TiB and a byte",
            plain(),
            Refused,
            "its disk is said to have 70368744177665 bytes, and more than 64 TiB is not supported (at byte 24 of the file); check that this is the image that was meant",
            |f| put64(f, 24, (1 << 46) + 1),
        ),
        row(
            "extension goes on",
            plain(),
            Invalid,
            "its header extension 0x12345678 is said to have 4294967295 bytes (at byte 116 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                put32(f, 112, 0x1234_5678);
                put32(f, 116, u32::MAX);
            },
        ),
        row(
            "extension beyond 64 KiB",
            Qcow2 { bits: 17, size: 1 << 17, fills: vec![Fill::Data], ..plain() },
            Invalid,
            "a header extension goes beyond the first 64 KiB; it is damaged or incomplete: take another copy of it",
            |f| {
                put32(f, 112, 0x1234_5678);
                put32(f, 116, 70_000);
            },
        ),
        row(
            "backing name outside",
            plain(),
            Invalid,
            "the name of its backing file, 12 bytes at 0x1f8, is not in the header's cluster (at byte 8 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                put64(f, 8, 504);
                put32(f, 16, 12);
            },
        ),
        row(
            "backing name far away",
            plain(),
            Invalid,
            "the name of its backing file, 12 bytes at 0xffffffffffffffff, is not in the header's cluster (at byte 8 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                put64(f, 8, u64::MAX);
                put32(f, 16, 12);
            },
        ),
        row(
            "backing name on the header",
            plain(),
            Invalid,
            "the name of its backing file, 12 bytes at 0x8, is not in the header's cluster (at byte 8 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                put64(f, 8, 8);
                put32(f, 16, 12);
            },
        ),
        row(
            "backing file, CVE-2015-5163",
            Qcow2 { backing: Some("/etc/shadow"), ..plain() },
            Refused,
            "it is on top of a backing file (\"/etc/shadow\"), and an image may not say which files are read (at byte 8 of the file); name the file yourself with --backing, or make one file of both: qemu-img convert -O qcow2",
            |_| {},
        ),
        row(
            "backing json",
            Qcow2 { backing: Some("json:{\"driver\": \"nbd\"}\n\x1b[2J"), ..plain() },
            Refused,
            "it is on top of a backing file (\"json:{\\\"driver\\\": \\\"nbd\\\"}\\n\\u{1b}[2J\"), and an image may not say which files are read (at byte 8 of the file); name the file yourself with --backing, or make one file of both: qemu-img convert -O qcow2",
            |_| {},
        ),
        row(
            "backing URL with secrets",
            Qcow2 { backing: Some("https://me:secret@host/a/b.img?token=secret"), ..plain() },
            Refused,
            "it is on top of a backing file (\"https://host/a/b.img\"), and an image may not say which files are read (at byte 8 of the file); name the file yourself with --backing, or make one file of both: qemu-img convert -O qcow2",
            |_| {},
        ),
        Row {
            chain: Chain::OnBacking,
            ..row(
                "a backing image that is not wanted",
                plain(),
                Refused,
                "a backing image was given, and this image has none; leave the backing image out",
                |_| {},
            )
        },
    ];
    check(Format::Qcow2, rows);
}

#[test]
fn hostile_qcow2_tables() {
    use ImageErrorKind::{Invalid, Unsupported};
    let plain = Qcow2::default;
    let copied = 1u64 << 63;
    let extended = || Qcow2 { bits: 14, extended: true, size: 1 << 14, fills: vec![Fill::Data], ..plain() };
    let extended_l2 = 3usize << 14;
    let packed = |method| Qcow2 { method, size: 512, fills: vec![Fill::Packed], ..plain() };
    let stream = 4usize * 512;
    let rows = vec![
        row(
            "L1 entries",
            plain(),
            Unsupported,
            "its L1 table has 4294967295 entries, more than 32 MiB (at byte 36 of the file); convert it with larger clusters: qemu-img convert -O qcow2",
            |f| put32(f, 36, u32::MAX),
        ),
        row(
            "64 TiB of small clusters",
            plain(),
            Unsupported,
            "its L1 table has 2147483648 entries, more than 32 MiB (at byte 36 of the file); convert it with larger clusters: qemu-img convert -O qcow2",
            |f| put64(f, 24, 1 << 46),
        ),
        row(
            "L1 too short",
            plain(),
            Invalid,
            "its L1 table has 1 entries, and the disk needs 2 (at byte 36 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, 24, 32_769),
        ),
        row(
            "L1 unaligned",
            plain(),
            Invalid,
            "its L1 table, at 0x408, does not begin at a cluster (at byte 40 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, 40, 1032),
        ),
        row(
            "L1 on the header",
            plain(),
            Invalid,
            "its L1 table, at 0x0, lies on the header (at byte 40 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, 40, 0),
        ),
        row(
            "L1 beyond the file",
            plain(),
            Invalid,
            "its L1 table, at 0x100000, is not inside of the file (at byte 40 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, 40, 1 << 20),
        ),
        row(
            "L1 at the end of numbers",
            plain(),
            Invalid,
            "its L1 table, at 0xfffffffffffffe00, is not inside of the file (at byte 40 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, 40, u64::MAX - 511),
        ),
        row(
            "L1 on the refcounts",
            plain(),
            Invalid,
            "its L1 table, at 0x200, lies on the refcount table (at byte 40 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, 40, 512),
        ),
        row(
            "L1 entry reserved bits",
            plain(),
            Invalid,
            "L1 entry 0 has bits that are reserved (at byte 1024 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, L1, copied | 1536 | 1 << 60),
        ),
        row(
            "L2 outside",
            plain(),
            Invalid,
            "L1 entry 0 points outside of the file (at byte 1024 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, L1, copied | 0x00ff_ffff_ffff_fe00),
        ),
        row(
            "L2 unaligned",
            Qcow2 { bits: 10, size: 4096, ..plain() },
            Invalid,
            "L1 entry 0 does not point at the start of a cluster (at byte 2048 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, 2048, copied | 0xe00),
        ),
        row(
            "L2 is the L1",
            plain(),
            Invalid,
            "L1 entry 0 points into the L1 table itself (at byte 1024 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, L1, copied | 1024),
        ),
        row(
            "L2 is the refcount table",
            plain(),
            Invalid,
            "L1 entry 0 points into the refcount table (at byte 1024 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, L1, copied | 512),
        ),
        row(
            "one L2 twice",
            Qcow2 { size: 65 * 512, fills: vec![Fill::Data; 65], ..plain() },
            Invalid,
            "two L1 entries point at one L2 table, at 0x600 (at byte 1024 of the file); it is damaged or incomplete: take another copy of it",
            |f| f.copy_within(L1..L1 + 8, L1 + 8),
        ),
        row(
            "data outside",
            plain(),
            Invalid,
            "the L2 entry of guest offset 0x0 points outside of the file (at byte 1536 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, L2, copied | 1 << 40),
        ),
        row(
            "data unaligned",
            Qcow2 { bits: 10, size: 4096, ..plain() },
            Invalid,
            "the L2 entry of guest offset 0x0 does not point at the start of a cluster (at byte 3072 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, 3072, copied | 0xe00),
        ),
        row(
            "L2 entry reserved bits",
            plain(),
            Invalid,
            "the L2 entry of guest offset 0x0 has bits that are reserved (at byte 1536 of the file); it is damaged or incomplete: take another copy of it",
            |f| f[L2 + 7] |= 2,
        ),
        row(
            "zero cluster in version 2",
            Qcow2 { version: 2, fills: vec![Fill::Data; 4], ..plain() },
            Invalid,
            "the L2 entry of guest offset 0x200 has bits that are reserved (at byte 1544 of the file); it is damaged or incomplete: take another copy of it",
            |f| f[L2 + 15] |= 1,
        ),
        row(
            "zero flag beside subclusters",
            extended(),
            Invalid,
            "the L2 entry of guest offset 0x0 has bits that are reserved (at byte 49152 of the file); it is damaged or incomplete: take another copy of it",
            |f| f[extended_l2 + 7] |= 1,
        ),
        row(
            "subcluster of data and zeros",
            extended(),
            Invalid,
            "the L2 entry of guest offset 0x0 has a subcluster that is both data and zeros (at byte 49152 of the file); it is damaged or incomplete: take another copy of it",
            |f| f[extended_l2 + 8] |= 4,
        ),
        row(
            "subclusters without a place",
            extended(),
            Invalid,
            "the L2 entry of guest offset 0x0 has subclusters of data and no place for them (at byte 49152 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, extended_l2, 0),
        ),
        row(
            "compressed with subclusters",
            extended(),
            Invalid,
            "the L2 entry of guest offset 0x0 has bits that are reserved (at byte 49152 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, extended_l2, 1 << 62 | 0x8000),
        ),
        row(
            "compressed outside",
            plain(),
            Invalid,
            "the L2 entry of guest offset 0x400 points outside of the file (at byte 1552 of the file); it is damaged or incomplete: take another copy of it",
            |f| put64(f, L2 + 16, 1 << 62 | 1 << 50),
        ),
        row(
            "broken deflate",
            packed(Method::Deflate),
            Invalid,
            "its compressed cluster of guest offset 0x0 is bad: it cannot be decompressed (at byte 2048 of the file); it is damaged or incomplete: take another copy of it",
            |f| f[stream] = 0xff,
        ),
        row(
            "deflate of less than a cluster",
            packed(Method::Deflate),
            Invalid,
            "its compressed cluster of guest offset 0x0 is bad: it is shorter than a cluster when decompressed (at byte 2048 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                let s = pack(Method::Deflate, &[7; 511]);
                f[stream..stream + s.len()].copy_from_slice(&s);
            },
        ),
        row(
            "deflate without end",
            packed(Method::Deflate),
            Invalid,
            "its compressed cluster of guest offset 0x0 is bad: it is longer than a cluster when decompressed (at byte 2048 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                let s = pack(Method::Deflate, &vec![7; 1 << 14]);
                f[stream..stream + s.len()].copy_from_slice(&s);
            },
        ),
        row(
            "broken zstd",
            packed(Method::Zstd),
            Invalid,
            "its compressed cluster of guest offset 0x0 is bad: it cannot be decompressed (at byte 2048 of the file); it is damaged or incomplete: take another copy of it",
            |f| f[stream] = 0xff,
        ),
        row(
            "zstd of less than a cluster",
            packed(Method::Zstd),
            Invalid,
            "its compressed cluster of guest offset 0x0 is bad: it is shorter than a cluster when decompressed (at byte 2048 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                let s = pack(Method::Zstd, &[7; 511]);
                f[stream..].fill(0);
                f[stream..stream + s.len()].copy_from_slice(&s);
            },
        ),
        row(
            "zstd without end",
            packed(Method::Zstd),
            Invalid,
            "its compressed cluster of guest offset 0x0 is bad: it is longer than a cluster when decompressed (at byte 2048 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                let s = pack(Method::Zstd, &vec![7; 1 << 20]);
                f[stream..stream + s.len()].copy_from_slice(&s);
            },
        ),
    ];
    check(Format::Qcow2, rows);
}

fn vmdk_row(
    name: &'static str,
    spec: Vmdk,
    kind: ImageErrorKind,
    says: &'static str,
    change: impl FnOnce(&mut Vec<u8>),
) -> Row {
    let (mut file, _) = spec.write();
    change(&mut file);
    Row { name, file, chain: Chain::Alone, kind, says }
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn hostile_vmdk() {
    use ImageErrorKind::{Invalid, Refused, Unsupported};
    let plain = Vmdk::default;
    let stream = || Vmdk { compressed: true, ..plain() };
    let said = |from: &str, to: &str| {
        let text = descriptor("monolithicSparse", 32);
        assert!(text.contains(from));
        Vmdk { descriptor: Some(text.replacen(from, to, 1)), ..plain() }
    };
    // Of the default image: grains at sectors 3 and 11, the table at 19, the directory at 23.
    let (table, directory) = (19 * 512, 23 * 512);
    let rows = vec![
        vmdk_row(
            "text descriptor",
            plain(),
            Refused,
            "it is a descriptor that names the files of the disk, and an image may not say which files are read; make one file of the disk where it is trusted: qemu-img convert -O qcow2",
            |f| *f = descriptor("monolithicFlat", 32).into_bytes(),
        ),
        vmdk_row(
            "COWD",
            plain(),
            Unsupported,
            "it is of the old form COWD; convert it where it is trusted: qemu-img convert -O qcow2",
            |f| put(f, 0, b"COWD"),
        ),
        vmdk_row(
            "SESparse",
            plain(),
            Unsupported,
            "it is of the form SESparse; convert it where it is trusted: qemu-img convert -O qcow2",
            |f| put(f, 0, &0xcafe_babe_u64.to_le_bytes()),
        ),
        vmdk_row(
            "qcow2",
            plain(),
            Invalid,
            "it does not begin as a vmdk image does; if it is qcow2, say so with --format",
            |f| put(f, 0, b"QFI\xfb"),
        ),
        vmdk_row(
            "cut",
            plain(),
            Invalid,
            "the file ends within its header; it is damaged or incomplete: take another copy of it",
            |f| f.truncate(60),
        ),
        vmdk_row(
            "version",
            plain(),
            Unsupported,
            "it has version 4, and only 1 to 3 are read (at byte 4 of the file); convert it where it is trusted: qemu-img convert -O qcow2",
            |f| f[4] = 4,
        ),
        vmdk_row(
            "flags",
            plain(),
            Unsupported,
            "it has flags that are not known: 0x8000 (at byte 8 of the file); convert it where it is trusted: qemu-img convert -O qcow2",
            |f| f[9] |= 0x80,
        ),
        vmdk_row(
            "copied as text",
            plain(),
            Invalid,
            "its line ends were changed: it was copied as text (at byte 73 of the file); copy it again, as binary",
            |f| f[75] = b'\n',
        ),
        vmdk_row(
            "compression",
            plain(),
            Unsupported,
            "compression 2 with flags 0x5 is not known (at byte 77 of the file); convert it where it is trusted: qemu-img convert -O qcow2",
            |f| f[77] = 2,
        ),
        vmdk_row(
            "2^64 bytes",
            plain(),
            Refused,
            "its disk is said to have 18446744073709551615 bytes, and more than 64 TiB is not supported (at byte 12 of the file); check that this is the image that was meant",
            |f| put(f, 12, &u64::MAX.to_le_bytes()),
        ),
        vmdk_row(
            "no bytes",
            plain(),
            Invalid,
            "its disk is said to have no bytes (at byte 12 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, 12, &[0; 8]),
        ),
        vmdk_row(
            "grain",
            plain(),
            Invalid,
            "its grains are said to have 9223372036854775808 sectors, not a power of two up to 2 MiB (at byte 20 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, 20, &(1u64 << 63).to_le_bytes()),
        ),
        vmdk_row(
            "entries",
            plain(),
            Invalid,
            "its grain tables are said to have 0 entries (at byte 44 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, 44, &[0; 4]),
        ),
        vmdk_row(
            "a directory of GiB",
            plain(),
            Unsupported,
            "its grain directory has 68719476736 bytes, more than 32 MiB (at byte 12 of the file); convert it where it is trusted: qemu-img convert -O qcow2",
            |f| {
                put(f, 12, &(1u64 << 37).to_le_bytes());
                put(f, 44, &1u32.to_le_bytes());
            },
        ),
        vmdk_row(
            "directory outside",
            plain(),
            Invalid,
            "its grain directory, 4 bytes at 0xffffffffffffffff, is not inside of the file (at byte 56 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, 56, &(u64::MAX - 1).to_le_bytes()),
        ),
        vmdk_row(
            "directory on the header",
            plain(),
            Invalid,
            "its grain directory, 4 bytes at 0x0, is not inside of the file (at byte 56 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, 56, &[0; 8]),
        ),
        vmdk_row(
            "no descriptor",
            plain(),
            Refused,
            "there is no descriptor in it: it is one file of a disk of several (at byte 28 of the file); make one file of the disk where all of them are: qemu-img convert -O qcow2",
            |f| put(f, 28, &[0; 8]),
        ),
        vmdk_row(
            "descriptor outside",
            plain(),
            Invalid,
            "its descriptor is not inside of the file (at byte 28 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, 28, &u64::MAX.to_le_bytes()),
        ),
        vmdk_row(
            "descriptor of GiB",
            plain(),
            Invalid,
            "its descriptor is not inside of the file (at byte 28 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, 36, &(1u64 << 40).to_le_bytes()),
        ),
        vmdk_row(
            "host file, CVE-2022-47951",
            said("SPARSE \"disk one.vmdk\"", "FLAT \"/etc/shadow\" 0"),
            Refused,
            "its descriptor has an extent of type \"FLAT\", which is in another file, and an image may not say which files are read (at byte 512 of the file); make one file of the disk where it is trusted: qemu-img convert -O qcow2",
            |_| {},
        ),
        vmdk_row(
            "raw device",
            said("SPARSE \"disk one.vmdk\"", "VMFSRDM \"/dev/sda\""),
            Refused,
            "its descriptor has an extent of type \"VMFSRDM\", which is in another file, and an image may not say which files are read (at byte 512 of the file); make one file of the disk where it is trusted: qemu-img convert -O qcow2",
            |_| {},
        ),
        vmdk_row(
            "two extents",
            said("# The Disk", "RW 32 SPARSE \"two\"\n#"),
            Refused,
            "its disk consists of 2 extents, and only this file is read (at byte 512 of the file); make one file of the disk where it is trusted: qemu-img convert -O qcow2",
            |_| {},
        ),
        vmdk_row(
            "no extent",
            said("RW 32", "#"),
            Invalid,
            "its descriptor names no extent (at byte 512 of the file); it is damaged or incomplete: take another copy of it",
            |_| {},
        ),
        vmdk_row(
            "extent without a name",
            said("\"disk one.vmdk\"", "x"),
            Invalid,
            "its descriptor's extent has no name in quotes: \"32 SPARSE x\" (at byte 512 of the file); it is damaged or incomplete: take another copy of it",
            |_| {},
        ),
        vmdk_row(
            "extent of another size",
            said("RW 32", "RW 33"),
            Invalid,
            "its header has 32 sectors, and its descriptor says \"33\" (at byte 512 of the file); it is damaged or incomplete: take another copy of it",
            |_| {},
        ),
        vmdk_row(
            "parent",
            said("ffffffff", "12345678"),
            Refused,
            "it is on top of another image (parent \"12345678\"), and an image may not say which files are read (at byte 512 of the file); make one file of the disk where it is trusted: qemu-img convert -O qcow2",
            |_| {},
        ),
        vmdk_row(
            "parent by name",
            said("CID=a1b2c3d4", "parentFileNameHint=\"/etc/shadow\""),
            Refused,
            "it is on top of another image (parent \"/etc/shadow\"), and an image may not say which files are read (at byte 512 of the file); make one file of the disk where it is trusted: qemu-img convert -O qcow2",
            |_| {},
        ),
        vmdk_row(
            "another type",
            said("monolithicSparse", "twoGbMaxExtentSparse"),
            Unsupported,
            "it is of type \"twoGbMaxExtentSparse\", and only monolithicSparse and streamOptimized are read (at byte 512 of the file); convert it where it is trusted: qemu-img convert -O qcow2",
            |_| {},
        ),
        vmdk_row(
            "no type",
            said("createType", "madeType"),
            Invalid,
            "its descriptor does not say createType (at byte 512 of the file); it is damaged or incomplete: take another copy of it",
            |_| {},
        ),
        vmdk_row(
            "type twice",
            said("CID=a1b2c3d4", "createType=\"monolithicSparse\""),
            Invalid,
            "its descriptor says createType twice (at byte 512 of the file); it is damaged or incomplete: take another copy of it",
            |_| {},
        ),
        vmdk_row(
            "type that is not so",
            said("monolithicSparse", "streamOptimized"),
            Invalid,
            "its descriptor says streamOptimized, and its grains are not compressed (at byte 77 of the file); it is damaged or incomplete: take another copy of it",
            |_| {},
        ),
        vmdk_row(
            "no line of a descriptor",
            said("#DDB", "RW\x07"),
            Invalid,
            "line 11 of its descriptor is no line of one: \"RW\\u{7}\" (at byte 512 of the file); it is damaged or incomplete: take another copy of it",
            |_| {},
        ),
        vmdk_row(
            "table outside",
            plain(),
            Invalid,
            "its grain table at 0x1fffffffe00 is not inside of the file (at byte 11776 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, directory, &u32::MAX.to_le_bytes()),
        ),
        vmdk_row(
            "table on the directory",
            plain(),
            Invalid,
            "its grain table at 0x2c00 is not inside of the file (at byte 11776 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, directory, &22u32.to_le_bytes()),
        ),
        vmdk_row(
            "directory as its own table",
            Vmdk { entries: 7, ..plain() },
            Invalid,
            "its grain table at 0x2800 lies on the grain directory (at byte 10240 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, 20 * 512, &20u32.to_le_bytes()),
        ),
        vmdk_row(
            "one table twice",
            Vmdk { entries: 2, ..plain() },
            Invalid,
            "its grain table at 0x2600 lies on another one (at byte 10752 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, 21 * 512 + 4, &19u32.to_le_bytes()),
        ),
        vmdk_row(
            "grain outside",
            plain(),
            Invalid,
            "the grain table entry of guest offset 0x0 points outside of the file (at byte 9728 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, table, &u32::MAX.to_le_bytes()),
        ),
        vmdk_row(
            "no footer",
            Vmdk { footer: true, ..stream() },
            Invalid,
            "its grain directory is said to be at its end, and no footer is there (at byte 8704 of the file); it is damaged or incomplete: take another copy of it",
            |f| f.truncate(f.len() - 512),
        ),
        vmdk_row(
            "footer of another disk",
            Vmdk { footer: true, ..stream() },
            Invalid,
            "its header and its footer contradict each other (at byte 9728 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                let at = f.len() - 1024;
                f[at + 12] = 31;
            },
        ),
        vmdk_row(
            "marker of another grain",
            stream(),
            Invalid,
            "its compressed grain of guest offset 0x0 is bad: its marker says sector 1 of the disk (at byte 1536 of the file); it is damaged or incomplete: take another copy of it",
            |f| f[3 * 512] = 1,
        ),
        vmdk_row(
            "marker of another length",
            stream(),
            Invalid,
            "its compressed grain of guest offset 0x0 is bad: it goes on over what follows it (at byte 1536 of the file); it is damaged or incomplete: take another copy of it",
            |f| put(f, 3 * 512 + 8, &u32::MAX.to_le_bytes()),
        ),
        vmdk_row(
            "broken grain",
            stream(),
            Invalid,
            "its compressed grain of guest offset 0x0 is bad: it cannot be decompressed (at byte 1536 of the file); it is damaged or incomplete: take another copy of it",
            |f| f[3 * 512 + 12] = 0xff,
        ),
        vmdk_row(
            "grain without end",
            stream(),
            Invalid,
            "its compressed grain of guest offset 0x0 is bad: it is longer than a cluster when decompressed (at byte 1536 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                let s = pack(Method::Zlib, &vec![7; 8192]);
                put(f, 3 * 512 + 8, &(s.len() as u32).to_le_bytes());
                put(f, 3 * 512 + 12, &s);
            },
        ),
        vmdk_row(
            "grain of less",
            stream(),
            Invalid,
            "its compressed grain of guest offset 0x0 is bad: it is shorter than a cluster when decompressed (at byte 1536 of the file); it is damaged or incomplete: take another copy of it",
            |f| {
                let s = pack(Method::Zlib, &vec![7; 4000]);
                put(f, 3 * 512 + 8, &(s.len() as u32).to_le_bytes());
                put(f, 3 * 512 + 12, &s);
            },
        ),
        Row {
            chain: Chain::OnBacking,
            ..vmdk_row(
                "a backing image that is not wanted",
                plain(),
                Refused,
                "a backing image was given, and this image has none; leave the backing image out",
                |_| {},
            )
        },
    ];
    check(Format::Vmdk, rows);
}

#[test]
fn hostile_raw() {
    let too_big = inspect(Format::Raw, &[], (1 << 46) + 1, Chain::Alone).unwrap_err();
    assert_eq!(too_big.kind(), ImageErrorKind::Refused);
    let on_backing = inspect(Format::Raw, &[], 512, Chain::OnBacking).unwrap_err();
    assert_eq!(
        on_backing.to_string(),
        "not a usable raw image: a backing image was given, and a raw image has none; leave the backing image out"
    );
}

#[test]
fn a_file_that_is_compressed_as_a_whole_is_refused_by_name_and_content() {
    let zstd = pack(Method::Zstd, &[0; 600]);
    let refused = |name: &str| compressed_as_a_whole(Format::Raw, name, &zstd).map(|error| error.kind());
    assert_eq!(refused("https://host/disk.raw.ZST?token=x"), Some(ImageErrorKind::Unsupported));
    assert_eq!(refused("/srv/disk.img.zst"), Some(ImageErrorKind::Unsupported));
    // A raw disk may begin with anything.
    assert_eq!(refused("/srv/disk.img"), None);
    assert_eq!(compressed_as_a_whole(Format::Raw, "/srv/disk.zst", &[0; 512]).map(|e| e.kind()), None);
}

#[test]
fn what_is_only_unusual_is_read() {
    // Dirty refcounts, snapshots, a header without the field for compression, bitmaps, an unknown extension.
    let (mut file, flat) = Qcow2::default().write();
    put64(&mut file, 72, 1);
    put32(&mut file, 60, 3);
    put64(&mut file, 64, 0xffff_0000);
    put32(&mut file, 100, 104);
    put32(&mut file, 104, 0x2385_2875);
    put32(&mut file, 108, 24);
    put32(&mut file, 136, 0x7777_7777);
    put32(&mut file, 140, 3);
    let source = Far::new(file, Way::Near);
    let image = opened(Format::Qcow2, &source, Chain::Alone).unwrap();
    assert_eq!(read(&*image, &source, 0, flat.len() as u64).unwrap(), flat);
}

#[test]
fn a_window_of_gibibytes_costs_nothing() {
    // Frames that declare a window of 2^31 and 2^41 bytes, and have one block of 512 equal bytes.
    let spec = Qcow2 { method: Method::Zstd, size: 512, fills: vec![Fill::Packed], ..Qcow2::default() };
    for (window, read_as) in [(0xa8, Some(vec![Some(7); 512])), (0xf8, None)] {
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, window, 0x03, 0x10, 0x00, 0x07];
        let (mut file, _) = spec.write();
        file[2048..2048 + frame.len()].copy_from_slice(&frame);
        let source = Far::new(file, Way::Near);
        let image = opened(Format::Qcow2, &source, Chain::Alone).unwrap();
        assert_eq!(read(&*image, &source, 0, 512).ok(), read_as);
        let kept = crate::image::inflate::zstd_memory();
        assert!((1..1 << 18).contains(&kept), "{kept} bytes");
    }
}
