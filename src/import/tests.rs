//! Imports into plain files: a new file stands for a blank disk, a full one for a disk on a base.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use super::*;
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
