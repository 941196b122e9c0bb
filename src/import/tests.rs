//! Imports into plain files: a new file stands for a blank disk, a full one for a disk on a base.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::increment::{Increment, IncrementHeader, Moment};
use super::*;
use crate::export;
use crate::image::{Chain, Format, HEAD, inspect, open};
use crate::source::FileSource;

const SIZE: usize = 4 << 20;
const CLUSTER: usize = 64 << 10;

fn bytes(seed: u8, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 4096) as u8 ^ (at as u8).wrapping_mul(7) ^ seed | 1).collect()
}

fn import(image: &Path, format: Format, chain: Chain, target: (&File, Under)) -> Result<u64, ImportError> {
    let source = Arc::new(FileSource::open(image)?);
    let mut head = vec![0; HEAD.min(source.size()) as usize];
    source.read_at(&mut head, 0)?;
    let size = inspect(format, &head, source.size(), chain)?.size;
    target.0.set_len(size.max(target.0.metadata().unwrap().len())).unwrap();
    let image = open(format, source.clone(), size, chain);
    copy(&*image, &*source, target, &mut |_| true)?;
    Ok(size)
}

fn file(path: &Path, content: &[u8]) -> File {
    fs::write(path, content).unwrap();
    File::options().read(true).write(true).open(path).unwrap()
}

/// Runs qemu-img; false when there is none.
fn qemu_img(args: &[&str]) -> bool {
    let Ok(output) = Command::new("qemu-img").args(args).output() else {
        eprintln!("SKIP: qemu-img is not installed");
        return false;
    };
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
    true
}

#[test]
fn a_raw_image_with_holes_becomes_a_sparse_disk() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let image = file(&dir.path().join("image"), b"");
    image.set_len(SIZE as u64 + 100).unwrap();
    image.write_all_at(&bytes(1, 9000), 123_000).unwrap();
    image.write_all_at(&vec![0; CLUSTER], 1 << 20).unwrap();
    image.write_all_at(b"end", SIZE as u64 + 97).unwrap();
    let disk = file(&dir.path().join("disk"), b"");
    import(&dir.path().join("image"), Format::Raw, Chain::Alone, (&disk, Under::Nothing)).unwrap();
    assert!(fs::read(dir.path().join("disk")).unwrap() == fs::read(dir.path().join("image")).unwrap());
    assert!(disk.metadata().unwrap().blocks() * 512 <= 8 * 4096, "{}", disk.metadata().unwrap().blocks());
}

#[test]
fn of_a_copy_of_the_base_only_what_differs_is_written() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let base = bytes(2, SIZE);
    let mut wanted = base.clone();
    wanted[5 * 4096 + 7] ^= 8;
    wanted[2 << 20..(2 << 20) + 3 * 4096].fill(0);
    let image = file(&dir.path().join("image"), &wanted);
    // A hole of the image hides the base too.
    wanted[3 << 20..(3 << 20) + CLUSTER].fill(0);
    sys::fallocate(
        image.as_fd(),
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
        3 << 20,
        CLUSTER as u64,
    )
    .unwrap();
    let disk = file(&dir.path().join("disk"), &base);
    let before = disk.metadata().unwrap().blocks();
    import(&dir.path().join("image"), Format::Raw, Chain::Alone, (&disk, Under::Copy)).unwrap();
    assert!(fs::read(dir.path().join("disk")).unwrap() == wanted);
    let freed = (before - disk.metadata().unwrap().blocks()) * 512;
    assert_eq!(freed, (CLUSTER + 3 * 4096) as u64, "zeros are holes");
}

#[test]
fn the_clusters_of_an_overlay_are_taken_and_all_else_is_left_to_the_base() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let base = bytes(3, SIZE);
    fs::write(path("base"), &base).unwrap();
    let (base_path, image) = (path("base"), path("image"));
    if !qemu_img(&["create", "-q", "-f", "qcow2", "-b", &base_path, "-F", "raw", &image, "6M"]) {
        return;
    }
    let io = Command::new("qemu-io")
        .args([
            "-f",
            "qcow2",
            "-c",
            "write -P 9 70k 4k",
            "-c",
            "write -z 1M 128k",
            "-c",
            "write -P 5 5M 1M",
            &image,
        ])
        .output()
        .unwrap();
    assert!(io.status.success(), "{io:?}");
    let image_path = dir.path().join("image");
    let alone =
        import(&image_path, Format::Qcow2, Chain::Alone, (&file(&dir.path().join("x"), b""), Under::Nothing));
    assert!(alone.is_err_and(|error| error.to_string().contains("backing file")));
    let mut wanted = base.clone();
    wanted.resize(6 << 20, 0);
    wanted[70 << 10..74 << 10].fill(9);
    wanted[1 << 20..(1 << 20) + (128 << 10)].fill(0);
    wanted[5 << 20..].fill(5);
    let disk = file(&dir.path().join("disk"), &base);
    import(&image_path, Format::Qcow2, Chain::OnBacking, (&disk, Under::Backing)).unwrap();
    assert!(fs::read(dir.path().join("disk")).unwrap() == wanted);
}

#[test]
fn compressed_clusters_are_inflated_once() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let wanted: Vec<u8> =
        bytes(4, SIZE).iter().enumerate().map(|(at, byte)| byte * u8::from(at & 8192 == 0)).collect();
    fs::write(path("raw"), &wanted).unwrap();
    let (raw, image) = (path("raw"), path("image"));
    if !qemu_img(&["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &image]) {
        return;
    }
    let disk = file(&dir.path().join("disk"), b"");
    let image = dir.path().join("image");
    assert_eq!(import(&image, Format::Qcow2, Chain::Alone, (&disk, Under::Nothing)).unwrap(), SIZE as u64);
    assert!(fs::read(dir.path().join("disk")).unwrap() == wanted);
    // Over a disk that has other bytes.
    let disk = file(&dir.path().join("disk"), &bytes(5, SIZE));
    import(&image, Format::Qcow2, Chain::Alone, (&disk, Under::Copy)).unwrap();
    assert!(fs::read(dir.path().join("disk")).unwrap() == wanted);
}

#[test]
fn a_watch_ends_an_import() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    file(&dir.path().join("image"), &bytes(6, SIZE));
    let source = Arc::new(FileSource::open(&dir.path().join("image")).unwrap());
    let image = open(Format::Raw, source.clone(), SIZE as u64, Chain::Alone);
    let disk = file(&dir.path().join("disk"), b"");
    let mut calls = 0;
    let stopped = copy(&*image, &*source, (&disk, Under::Nothing), &mut |_| {
        calls += 1;
        calls < 3
    });
    assert!(matches!(stopped, Err(ImportError::Stopped)), "{stopped:?}");
}

/// Numbers of the frames of an increment: heads and data.
fn frames(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let header = IncrementHeader::len(bytes.first_chunk().unwrap()).unwrap();
    let (mut at, mut all) = (header, Vec::new());
    while at < bytes.len() {
        let number = |from: usize| u64::from_le_bytes(bytes[from..from + 8].try_into().unwrap());
        let data = if bytes[at] == 1 { number(at + 16) as usize } else { 0 };
        all.push(at..at + 32 + data);
        at += 32 + data;
    }
    all
}

#[test]
fn an_increment_brings_a_copy_forward_and_damage_is_found_before_it_is_applied() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let old = bytes(7, SIZE);
    let mut new = old.clone();
    new.resize(SIZE + CLUSTER, 0);
    new[4096..12288].fill(1);
    new[8192..9000].fill(0);
    new[1 << 20..3 << 20].copy_from_slice(&bytes(9, 2 << 20));
    new[(3 << 20) + 4096..(3 << 20) + CLUSTER].fill(0);
    let extent = |from: usize, to: usize, content| export::Extent {
        offset: from as u64,
        len: (to - from) as u64,
        content,
    };
    let list = vec![
        extent(4096, 12288, export::Content::Data),
        extent(1 << 20, 3 << 20, export::Content::Data),
        extent((3 << 20) + 4096, (3 << 20) + CLUSTER, export::Content::Zero),
        extent(SIZE, SIZE + CLUSTER, export::Content::Zero),
    ];
    let now = export::FileInput::new(file(&dir.path().join("now"), &new)).unwrap();
    let input = export::ListedInput::new(now, list);
    let header = IncrementHeader {
        nonce: 77,
        disk: "vm1".into(),
        since: Some(Moment([1; 16])),
        until: Moment([2; 16]),
        size: new.len() as u64,
        base: None,
        created_ns: 0,
    };
    let mut stream = Vec::new();
    export::increment::write(&input, &header, &mut stream, &mut |_| true).unwrap();
    assert!(stream.len() < (2 << 20) + 3 * 4096, "{}", stream.len());
    let apply = |stream: &[u8], watch: &mut dyn FnMut(u64) -> bool| {
        let disk = file(&dir.path().join("copy"), &old);
        disk.set_len(new.len() as u64).unwrap();
        Increment::open(stream)?.apply(&disk, watch)
    };
    apply(&stream, &mut |_| true).unwrap();
    assert!(fs::read(dir.path().join("copy")).unwrap() == new);
    assert_eq!(Increment::open(&stream[..]).unwrap().header(), &header);

    let frames = frames(&stream);
    assert!(frames.len() > 5, "{frames:?}");
    for end in frames.iter().map(|frame| frame.start).chain([0, 10, 50, stream.len() - 1]) {
        assert!(matches!(apply(&stream[..end], &mut |_| true), Err(ImportError::Cut)), "cut at {end}");
    }
    for frame in &frames {
        for at in [frame.start, frame.start + 8, frame.start + 16, frame.start + 24, frame.end - 1] {
            // The last four bytes of a head are reserved.
            if at >= frame.start + 28 && at < frame.start + 32 {
                continue;
            }
            let mut broken = stream.clone();
            broken[at] ^= 0x10;
            assert!(apply(&broken, &mut |_| true).is_err(), "byte {at} of {frame:?}");
        }
        let missing = [&stream[..frame.start], &stream[frame.end..]].concat();
        assert!(apply(&missing, &mut |_| true).is_err(), "{frame:?} is missing");
    }
    let longer = [&stream[..], b"x"].concat();
    assert!(matches!(apply(&longer, &mut |_| true), Err(ImportError::Longer)));
    let mut calls = 0;
    let stopped = apply(&stream, &mut |_| {
        calls += 1;
        calls < 3
    });
    assert!(matches!(stopped, Err(ImportError::Stopped)), "{stopped:?}");
}
