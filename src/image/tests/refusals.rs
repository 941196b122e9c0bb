//! Refusals and their messages. Every row is a valid image with one fault.

use super::writer::{Fill, Qcow2, Vmdk, descriptor, pack, put32, put64};
use super::*;
use crate::image::{Method, not_raw_by_default};

/// The error of inspecting, opening and reading the image, if there is one.
fn verdict(format: Format, file: Vec<u8>, chain: Chain) -> Result<(), ImageError> {
    let source = TestSource::new(file, Access::Local);
    let image = opened(format, &source, chain)?;
    read(&*image, &source, 0, image.size().min(1 << 20)).map(|_| ())
}

struct Row {
    name: &'static str,
    file: Vec<u8>,
    chain: Chain,
}

/// The expected name, kind and message of each row, in order.
const QCOW2_HEADERS: &str = include_str!("refusals-qcow2-headers.txt");
const QCOW2_TABLES: &str = include_str!("refusals-qcow2-tables.txt");
const VMDK: &str = include_str!("refusals-vmdk.txt");

fn check(format: Format, expected: &str, rows: Vec<Row>) {
    let mut actual = String::new();
    for Row { name, file, chain } in rows {
        let verdict = match verdict(format, file, chain) {
            Ok(()) => "accepted".to_owned(),
            Err(error) => {
                let text = error.to_string();
                let what = text.strip_prefix(&format!("not a usable {format} image: "));
                let what = what.unwrap_or_else(|| panic!("{name}: {text}"));
                format!("{:?} | {what}", error.kind())
            }
        };
        actual += &format!("{name} | {verdict}\n");
    }
    for (actual, expected) in actual.lines().zip(expected.lines()) {
        assert_eq!(actual, expected);
    }
    assert_eq!(actual.lines().count(), expected.lines().count());
}

fn row(name: &'static str, spec: Qcow2, change: impl FnOnce(&mut Vec<u8>)) -> Row {
    let (mut file, _) = spec.write();
    change(&mut file);
    Row { name, file, chain: Chain::Alone }
}

/// The offsets of the tables that [`Qcow2::write`] writes, with clusters of 512 bytes.
const L1: usize = 1024;
const L2: usize = 1536;

/// Writes a header extension behind a header of 112 bytes.
fn extension(file: &mut [u8], kind: u32, data: &[u8]) {
    put32(file, 112, kind);
    put32(file, 116, data.len() as u32);
    file[120..120 + data.len()].copy_from_slice(data);
}

#[test]
fn hostile_qcow2_headers_are_refused() {
    let plain = Qcow2::default;
    let mut names = vec![0; 96];
    names[..7].copy_from_slice(b"\x00\x3fwarp\x1b");
    names[48..55].copy_from_slice(b"\x01\x05wrong");
    let rows = vec![
        row("cut", plain(), |f| f.truncate(90)),
        row("magic only", plain(), |f| f.truncate(4)),
        row("nothing", plain(), Vec::clear),
        row("raw", plain(), |f| {
            f[0] = 0;
            f[510..512].copy_from_slice(&[0x55, 0xaa]);
        }),
        row("vmdk", plain(), |f| f[..4].copy_from_slice(b"KDMV")),
        row("vhdx", plain(), |f| f[..8].copy_from_slice(b"vhdxfile")),
        row("gzip", plain(), |f| f[..3].copy_from_slice(&[0x1f, 0x8b, 8])),
        row("version 1", plain(), |f| put32(f, 4, 1)),
        row("version 4", plain(), |f| put32(f, 4, 4)),
        row("tiny clusters", plain(), |f| put32(f, 20, 8)),
        row("huge clusters", plain(), |f| put32(f, 20, u32::MAX)),
        row("short header", plain(), |f| put32(f, 100, 96)),
        row("long header", plain(), |f| put32(f, 100, 520)),
        row("odd header", plain(), |f| put32(f, 100, 109)),
        row("unknown feature", plain(), |f| put64(f, 72, 1 << 5)),
        row("unknown features", plain(), |f| {
            put64(f, 72, 1 << 5 | 1 << 63);
            extension(f, 0x6803_f857, &names);
        }),
        row("corrupt", plain(), |f| put64(f, 72, 2)),
        row("data file", plain(), |f| put64(f, 72, 4)),
        row("data file, CVE-2024-32498", plain(), |f| {
            extension(f, 0x4441_5441, b"json:{\"driver\":\"file\",\"filename\":\"/etc/shadow\"}")
        }),
        row("encrypted", plain(), |f| put32(f, 32, 2)),
        row("encryption by extension", plain(), |f| extension(f, 0x0537_be77, &[0; 16])),
        row("compression type without feature", plain(), |f| f[104] = 1),
        row("feature without compression type", plain(), |f| put64(f, 72, 8)),
        row("unknown compression type", plain(), |f| {
            put64(f, 72, 8);
            f[104] = 2;
        }),
        row("refcounts", plain(), |f| put32(f, 96, 7)),
        row("subclusters of 16 bytes", plain(), |f| put64(f, 72, 16)),
        row("2^63 bytes", plain(), |f| put64(f, 24, 1 << 63)),
        row("64 TiB and a byte", plain(), |f| put64(f, 24, (1 << 46) + 1)),
        row("extension goes on", plain(), |f| {
            put32(f, 112, 0x1234_5678);
            put32(f, 116, u32::MAX);
        }),
        row(
            "extension beyond 64 KiB",
            Qcow2 { bits: 17, size: 1 << 17, fills: vec![Fill::Data], ..plain() },
            |f| {
                put32(f, 112, 0x1234_5678);
                put32(f, 116, 70_000);
            },
        ),
        row("backing name outside", plain(), |f| {
            put64(f, 8, 504);
            put32(f, 16, 12);
        }),
        row("backing name far away", plain(), |f| {
            put64(f, 8, u64::MAX);
            put32(f, 16, 12);
        }),
        row("backing name on the header", plain(), |f| {
            put64(f, 8, 8);
            put32(f, 16, 12);
        }),
        row("backing file, CVE-2015-5163", Qcow2 { backing: Some("/etc/shadow"), ..plain() }, |_| {}),
        row(
            "backing json",
            Qcow2 { backing: Some("json:{\"driver\": \"nbd\"}\n\x1b[2J"), ..plain() },
            |_| {},
        ),
        row(
            "backing URL with secrets",
            Qcow2 { backing: Some("https://me:secret@host/a/b.img?token=secret"), ..plain() },
            |_| {},
        ),
        Row { chain: Chain::OnBacking, ..row("a backing image that is not wanted", plain(), |_| {}) },
    ];
    check(Format::Qcow2, QCOW2_HEADERS, rows);
}

#[test]
fn hostile_qcow2_tables_are_refused() {
    let plain = Qcow2::default;
    let copied = 1u64 << 63;
    let extended = || Qcow2 { bits: 14, extended: true, size: 1 << 14, fills: vec![Fill::Data], ..plain() };
    let extended_l2 = 3usize << 14;
    let packed = |method| Qcow2 { method, size: 512, fills: vec![Fill::Packed], ..plain() };
    let stream = 4usize * 512;
    let rows = vec![
        row("L1 entries", plain(), |f| put32(f, 36, u32::MAX)),
        row("64 TiB of small clusters", plain(), |f| put64(f, 24, 1 << 46)),
        row("L1 too short", plain(), |f| put64(f, 24, 32_769)),
        row("L1 unaligned", plain(), |f| put64(f, 40, 1032)),
        row("L1 on the header", plain(), |f| put64(f, 40, 0)),
        row("L1 beyond the file", plain(), |f| put64(f, 40, 1 << 20)),
        row("L1 at the end of numbers", plain(), |f| put64(f, 40, u64::MAX - 511)),
        row("L1 on the refcounts", plain(), |f| put64(f, 40, 512)),
        row("L1 entry reserved bits", plain(), |f| put64(f, L1, copied | 1536 | 1 << 60)),
        row("L2 outside", plain(), |f| put64(f, L1, copied | 0x00ff_ffff_ffff_fe00)),
        row("L2 unaligned", Qcow2 { bits: 10, size: 4096, ..plain() }, |f| put64(f, 2048, copied | 0xe00)),
        row("L2 is the L1", plain(), |f| put64(f, L1, copied | 1024)),
        row("L2 is the refcount table", plain(), |f| put64(f, L1, copied | 512)),
        row("one L2 twice", Qcow2 { size: 65 * 512, fills: vec![Fill::Data; 65], ..plain() }, |f| {
            f.copy_within(L1..L1 + 8, L1 + 8)
        }),
        row("data outside", plain(), |f| put64(f, L2, copied | 1 << 40)),
        row("data unaligned", Qcow2 { bits: 10, size: 4096, ..plain() }, |f| put64(f, 3072, copied | 0xe00)),
        row("L2 entry reserved bits", plain(), |f| f[L2 + 7] |= 2),
        row("zero cluster in version 2", Qcow2 { version: 2, fills: vec![Fill::Data; 4], ..plain() }, |f| {
            f[L2 + 15] |= 1
        }),
        row("zero flag beside subclusters", extended(), |f| f[extended_l2 + 7] |= 1),
        row("subcluster of data and zeros", extended(), |f| f[extended_l2 + 8] |= 4),
        row("subclusters without a place", extended(), |f| put64(f, extended_l2, 0)),
        row("compressed with subclusters", extended(), |f| put64(f, extended_l2, 1 << 62 | 0x8000)),
        row("compressed outside", plain(), |f| put64(f, L2 + 16, 1 << 62 | 1 << 50)),
        row("broken deflate", packed(Method::Deflate), |f| f[stream] = 0xff),
        row("deflate of less than a cluster", packed(Method::Deflate), |f| {
            let s = pack(Method::Deflate, &[7; 511]);
            f[stream..stream + s.len()].copy_from_slice(&s);
        }),
        row("deflate without end", packed(Method::Deflate), |f| {
            let s = pack(Method::Deflate, &vec![7; 1 << 14]);
            f[stream..stream + s.len()].copy_from_slice(&s);
        }),
        row("broken zstd", packed(Method::Zstd), |f| f[stream] = 0xff),
        row("zstd of less than a cluster", packed(Method::Zstd), |f| {
            let s = pack(Method::Zstd, &[7; 511]);
            f[stream..].fill(0);
            f[stream..stream + s.len()].copy_from_slice(&s);
        }),
        row("zstd without end", packed(Method::Zstd), |f| {
            let s = pack(Method::Zstd, &vec![7; 1 << 20]);
            f[stream..stream + s.len()].copy_from_slice(&s);
        }),
    ];
    check(Format::Qcow2, QCOW2_TABLES, rows);
}

fn vmdk_row(name: &'static str, spec: Vmdk, change: impl FnOnce(&mut Vec<u8>)) -> Row {
    let (mut file, _) = spec.write();
    change(&mut file);
    Row { name, file, chain: Chain::Alone }
}

fn put(file: &mut [u8], at: usize, bytes: &[u8]) {
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

#[test]
fn hostile_vmdk_images_are_refused() {
    let plain = Vmdk::default;
    let stream = || Vmdk { compressed: true, ..plain() };
    let said = |from: &str, to: &str| {
        let text = descriptor("monolithicSparse", 32);
        assert!(text.contains(from));
        Vmdk { descriptor: Some(text.replacen(from, to, 1)), ..plain() }
    };
    // The default image has grains at sectors 3 and 11, the table at 19 and the directory at 23.
    let (table, directory) = (19 * 512, 23 * 512);
    let rows = vec![
        vmdk_row("text descriptor", plain(), |f| *f = descriptor("monolithicFlat", 32).into_bytes()),
        vmdk_row("COWD", plain(), |f| put(f, 0, b"COWD")),
        vmdk_row("SESparse", plain(), |f| put(f, 0, &0xcafe_babe_u64.to_le_bytes())),
        vmdk_row("qcow2", plain(), |f| put(f, 0, b"QFI\xfb")),
        vmdk_row("cut", plain(), |f| f.truncate(60)),
        vmdk_row("version", plain(), |f| f[4] = 4),
        vmdk_row("flags", plain(), |f| f[9] |= 0x80),
        vmdk_row("copied as text", plain(), |f| f[75] = b'\n'),
        vmdk_row("compression", plain(), |f| f[77] = 2),
        vmdk_row("2^64 bytes", plain(), |f| put(f, 12, &u64::MAX.to_le_bytes())),
        vmdk_row("no bytes", plain(), |f| put(f, 12, &[0; 8])),
        vmdk_row("grain", plain(), |f| put(f, 20, &(1u64 << 63).to_le_bytes())),
        vmdk_row("entries", plain(), |f| put(f, 44, &[0; 4])),
        vmdk_row("a directory of GiB", plain(), |f| {
            put(f, 12, &(1u64 << 37).to_le_bytes());
            put(f, 44, &1u32.to_le_bytes());
        }),
        vmdk_row("directory outside", plain(), |f| put(f, 56, &(u64::MAX - 1).to_le_bytes())),
        vmdk_row("directory on the header", plain(), |f| put(f, 56, &[0; 8])),
        vmdk_row("no descriptor", plain(), |f| put(f, 28, &[0; 8])),
        vmdk_row("descriptor outside", plain(), |f| put(f, 28, &u64::MAX.to_le_bytes())),
        vmdk_row("descriptor of GiB", plain(), |f| put(f, 36, &(1u64 << 40).to_le_bytes())),
        vmdk_row(
            "host file, CVE-2022-47951",
            said("SPARSE \"disk one.vmdk\"", "FLAT \"/etc/shadow\" 0"),
            |_| {},
        ),
        vmdk_row("raw device", said("SPARSE \"disk one.vmdk\"", "VMFSRDM \"/dev/sda\""), |_| {}),
        vmdk_row("two extents", said("# The Disk", "RW 32 SPARSE \"two\"\n#"), |_| {}),
        vmdk_row("no extent", said("RW 32", "#"), |_| {}),
        vmdk_row("extent without a name", said("\"disk one.vmdk\"", "x"), |_| {}),
        vmdk_row("extent of another size", said("RW 32", "RW 33"), |_| {}),
        vmdk_row("parent", said("ffffffff", "12345678"), |_| {}),
        vmdk_row("parent by name", said("CID=a1b2c3d4", "parentFileNameHint=\"/etc/shadow\""), |_| {}),
        vmdk_row("another type", said("monolithicSparse", "twoGbMaxExtentSparse"), |_| {}),
        vmdk_row("no type", said("createType", "madeType"), |_| {}),
        vmdk_row("type twice", said("CID=a1b2c3d4", "createType=\"monolithicSparse\""), |_| {}),
        vmdk_row("type that is not so", said("monolithicSparse", "streamOptimized"), |_| {}),
        vmdk_row("no line of a descriptor", said("#DDB", "RW\x07"), |_| {}),
        vmdk_row("table outside", plain(), |f| put(f, directory, &u32::MAX.to_le_bytes())),
        vmdk_row("table on the directory", plain(), |f| put(f, directory, &22u32.to_le_bytes())),
        vmdk_row("directory as its own table", Vmdk { entries: 7, ..plain() }, |f| {
            put(f, 20 * 512, &20u32.to_le_bytes())
        }),
        vmdk_row("one table twice", Vmdk { entries: 2, ..plain() }, |f| {
            put(f, 21 * 512 + 4, &19u32.to_le_bytes())
        }),
        vmdk_row("grain outside", plain(), |f| put(f, table, &u32::MAX.to_le_bytes())),
        vmdk_row("no footer", Vmdk { footer: true, ..stream() }, |f| f.truncate(f.len() - 512)),
        vmdk_row("footer of another disk", Vmdk { footer: true, ..stream() }, |f| {
            let at = f.len() - 1024;
            f[at + 12] = 31;
        }),
        vmdk_row("marker of another grain", stream(), |f| f[3 * 512] = 1),
        vmdk_row("marker of another length", stream(), |f| put(f, 3 * 512 + 8, &u32::MAX.to_le_bytes())),
        vmdk_row("broken grain", stream(), |f| f[3 * 512 + 12] = 0xff),
        vmdk_row("grain without end", stream(), |f| {
            let s = pack(Method::Zlib, &vec![7; 8192]);
            put(f, 3 * 512 + 8, &(s.len() as u32).to_le_bytes());
            put(f, 3 * 512 + 12, &s);
        }),
        vmdk_row("grain of less", stream(), |f| {
            let s = pack(Method::Zlib, &vec![7; 4000]);
            put(f, 3 * 512 + 8, &(s.len() as u32).to_le_bytes());
            put(f, 3 * 512 + 12, &s);
        }),
        Row { chain: Chain::OnBacking, ..vmdk_row("a backing image that is not wanted", plain(), |_| {}) },
    ];
    check(Format::Vmdk, VMDK, rows);
}

#[test]
fn raw_images_that_are_too_big_or_have_a_backing_image_are_refused() {
    let too_big = inspect(Format::Raw, &[], (1 << 46) + 1, Chain::Alone).unwrap_err();
    assert_eq!(too_big.kind(), ImageErrorKind::Refused);
    let on_backing = inspect(Format::Raw, &[], 512, Chain::OnBacking).unwrap_err();
    assert_eq!(
        on_backing.to_string(),
        "not a usable raw image: a backing image was given, but a raw image has none; omit the backing image"
    );
}

#[test]
fn a_file_that_begins_as_another_format_is_not_raw_by_default() {
    let zstd = pack(Method::Zstd, &[0; 600]);
    let mut vdi = vec![0; 512];
    vdi[64..68].copy_from_slice(&[0x7f, 0x10, 0xda, 0xbe]);
    let meant = "or pass --format raw if the disk itself begins so";
    for (head, parts) in [
        (b"QFI\xfb\0\0\0\x03".as_slice(), ["as a qcow2 image", "pass --format qcow2"]),
        (b"KDMV\x01", ["as a vmdk image", "pass --format vmdk"]),
        (b"# Disk DescriptorFile\nversion=1", ["as a vmdk image", "pass --format vmdk"]),
        (&vdi, ["as a vdi image", "qemu-img convert"]),
        (b"vhdxfile", ["as a vhdx image", "qemu-img convert"]),
        (&[0x1f, 0x8b, 0x08, 0], ["with gzip", "decompress it"]),
        (b"\xfd7zXZ\0", ["with xz", "decompress it"]),
        (&zstd, ["with zstd", "decompress it"]),
    ] {
        let said = not_raw_by_default(head).expect("a refusal").to_string();
        assert!(parts.iter().all(|part| said.contains(part)) && said.ends_with(meant), "{said}");
    }
    for head in [&[][..], &[0; 512], b"QFI", b"\xeb\x63\x90 a boot sector", &vdi[1..]] {
        assert!(not_raw_by_default(head).is_none(), "{head:?}");
    }
}

#[test]
fn unusual_but_valid_qcow2_images_are_read() {
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
    let source = TestSource::new(file, Access::Local);
    let image = opened(Format::Qcow2, &source, Chain::Alone).unwrap();
    assert_eq!(read(&*image, &source, 0, flat.len() as u64).unwrap(), flat);
}

#[test]
fn a_zstd_frame_that_declares_a_huge_window_takes_little_memory() {
    // Frames that declare windows of 2^31 and 2^41 bytes and contain one block of 512 equal bytes.
    let spec = Qcow2 { method: Method::Zstd, size: 512, fills: vec![Fill::Packed], ..Qcow2::default() };
    for (window, read_as) in [(0xa8, Some(vec![Some(7); 512])), (0xf8, None)] {
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0x00, window, 0x03, 0x10, 0x00, 0x07];
        let (mut file, _) = spec.write();
        file[2048..2048 + frame.len()].copy_from_slice(&frame);
        let source = TestSource::new(file, Access::Local);
        let image = opened(Format::Qcow2, &source, Chain::Alone).unwrap();
        assert_eq!(read(&*image, &source, 0, 512).ok(), read_as);
        let kept = crate::image::inflate::zstd_memory();
        assert!((1..1 << 18).contains(&kept), "{kept} bytes");
    }
}
