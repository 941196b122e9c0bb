//! Exports of made-up disks: compared with a model, and with qemu-img where it is installed.

use std::cell::Cell;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use super::qcow2::{Backing, CLUSTER, Compression, write, write_compressed};
use super::*;

const SIZE: u64 = 700 * CLUSTER + 512 * 3;

/// A sparse file with data of several kinds: noise, text and zeros, at and off the borders of clusters.
fn disk(dir: &Path) -> (File, Vec<u8>) {
    let file = File::options().read(true).write(true).create_new(true).open(dir.join("disk")).unwrap();
    file.set_len(SIZE).unwrap();
    let mut model = vec![0; SIZE as usize];
    let mut random = 1u64;
    let parts = [
        (0, 3 * CLUSTER),
        (5 * CLUSTER - 4096, 8192),
        (7 * CLUSTER + 4096, 4096),
        (20 * CLUSTER, 200 * CLUSTER),
        (600 * CLUSTER + 8192, 12288),
        (SIZE - 5000, 5000),
    ];
    for (number, (at, len)) in parts.into_iter().enumerate() {
        let bytes = &mut model[at as usize..(at + len) as usize];
        for (place, byte) in bytes.iter_mut().enumerate() {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *byte = match (number + place / CLUSTER as usize) % 3 {
                0 => (random >> 33) as u8,
                1 => b"many words of a text repeat themselves "[(random >> 40) as usize % 39],
                _ => 0,
            };
        }
        file.write_all_at(bytes, at).unwrap();
    }
    (file, model)
}

fn input(file: &File) -> FileInput {
    FileInput::new(file.try_clone().unwrap()).unwrap()
}

fn no_watch(_: u64) -> bool {
    true
}

/// Runs qemu-img and returns what it prints; `None` when there is none.
fn qemu_img(args: &[&str]) -> Option<String> {
    let Ok(output) = Command::new("qemu-img").args(args).output() else {
        eprintln!("SKIP: qemu-img is not installed");
        return None;
    };
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
    String::from_utf8(output.stdout).ok()
}

fn path(dir: &Path, name: &str) -> String {
    dir.join(name).to_str().unwrap().to_owned()
}

/// Checks an image, and that it shows `model`.
fn assert_shows(dir: &Path, image: &str, model: &[u8]) {
    fs::write(dir.join("model"), model).unwrap();
    let image = path(dir, image);
    if qemu_img(&["check", "-f", "qcow2", &image]).is_some() {
        qemu_img(&["compare", "-f", "qcow2", "-F", "raw", &image, &path(dir, "model")]);
        let info = qemu_img(&["info", "-f", "qcow2", "--output=json", &image]).unwrap();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], model.len(), "{info}");
    }
}

#[test]
fn a_raw_file_has_holes_where_the_disk_has_zeros() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (file, model) = disk(dir.path());
    let out = Output::create(&dir.path().join("out"), Existing::Keep).unwrap();
    raw::to_file(&input(&file), out.file(), &mut no_watch).unwrap();
    assert!(!dir.path().join("out").exists(), "the name comes last");
    out.finish().unwrap();
    assert!(fs::read(dir.path().join("out")).unwrap() == model);
    let (made, whole) = (fs::metadata(dir.path().join("out")).unwrap(), SIZE / 512);
    assert!(made.blocks() < whole / 3, "{} of {whole}", made.blocks());
    assert_eq!(made.mode() & 0o777, 0o600);
    let mut piped = Vec::new();
    raw::to_pipe(&input(&file), &mut piped, &mut no_watch).unwrap();
    assert!(piped == model);
}

#[test]
fn a_file_that_exists_stays_unless_it_is_to_be_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("out");
    fs::write(&place, "old").unwrap();
    assert!(Output::create(&place, Existing::Keep).is_err_and(|e| e.to_string().contains("--force")));
    drop(Output::create(&place, Existing::Replace).unwrap());
    assert_eq!(fs::read(&place).unwrap(), b"old");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "what is not finished is removed");
    Output::create(&place, Existing::Replace).unwrap().finish().unwrap();
    assert_eq!(fs::read(&place).unwrap(), b"");
    let late = Output::create(&dir.path().join("late"), Existing::Keep).unwrap();
    fs::write(dir.path().join("late"), "other").unwrap();
    assert!(late.finish().is_err());
    assert_eq!(fs::read(dir.path().join("late")).unwrap(), b"other");
    std::os::unix::fs::symlink("nowhere", dir.path().join("link")).unwrap();
    assert!(Output::create(&dir.path().join("link"), Existing::Replace).is_err());
}

#[test]
fn a_qcow2_image_shows_the_disk() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (file, model) = disk(dir.path());
    let mut piped = Vec::new();
    write(&input(&file), None, &mut piped, &mut no_watch).unwrap();
    fs::write(dir.path().join("plain"), &piped).unwrap();
    assert_shows(dir.path(), "plain", &model);
    let mut lens = vec![piped.len() as u64];
    for (name, compression) in [("zlib", Compression::Zlib), ("zstd", Compression::Zstd)] {
        let out = File::create_new(dir.path().join(name)).unwrap();
        write_compressed(&input(&file), None, compression, &out, &mut no_watch).unwrap();
        assert_shows(dir.path(), name, &model);
        lens.push(out.metadata().unwrap().len());
    }
    // A third is zeros, a third is text, and the noise leaves no gaps.
    assert!(lens[1] < lens[0] * 5 / 8 && lens[2] < lens[0] * 5 / 8, "{lens:?}");
}

#[test]
fn images_of_empty_and_of_tiny_disks_are_sound() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    for (number, size) in [512u64, CLUSTER, CLUSTER + 512, 3 << 30, 64 << 40].into_iter().enumerate() {
        let file = File::create_new(dir.path().join(format!("disk{number}"))).unwrap();
        file.set_len(size.min(8 << 40)).unwrap();
        let file = File::open(dir.path().join(format!("disk{number}"))).unwrap();
        let mut piped = Vec::new();
        write(&input(&file), None, &mut piped, &mut no_watch).unwrap();
        fs::write(dir.path().join("empty"), &piped).unwrap();
        let image = path(dir.path(), "empty");
        qemu_img(&["check", "-f", "qcow2", &image]);
        let packed = File::create(dir.path().join("packed")).unwrap();
        write_compressed(&input(&file), None, Compression::Zlib, &packed, &mut no_watch).unwrap();
        let other = path(dir.path(), "packed");
        qemu_img(&["check", "-f", "qcow2", &other]);
        qemu_img(&["compare", "-f", "qcow2", "-F", "qcow2", &image, &other]);
    }
    let odd = File::create_new(dir.path().join("odd")).unwrap();
    odd.set_len(1000).unwrap();
    let odd = File::open(dir.path().join("odd")).unwrap();
    let refused = write(&input(&odd), None, &mut Vec::new(), &mut no_watch);
    assert!(refused.is_err_and(|error| error.to_string().contains("raw")));
}

#[test]
fn an_overlay_has_only_what_differs_from_its_backing_image() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (_file, mut model) = disk(dir.path());
    // The base has other bytes everywhere, and ends before the disk.
    let base_size = 650 * CLUSTER;
    let base: Vec<u8> = (0..base_size).map(|at| (at / 4096 % 251 + 1) as u8).collect();
    fs::write(dir.path().join("base"), &base).unwrap();
    let extent = |offset, len, content| Extent { offset, len, content };
    let list = vec![
        extent(0, 4096, Content::Data),
        extent(CLUSTER, CLUSTER, Content::Zero),
        extent(5 * CLUSTER - 4096, 4096, Content::Zero),
        extent(20 * CLUSTER, 200 * CLUSTER, Content::Data),
        extent(300 * CLUSTER, 10 * CLUSTER + 4096, Content::Zero),
        extent(SIZE - 5000 - 5000 % 512, 4096, Content::Data),
    ];
    let mut shown = base;
    shown.resize(SIZE as usize, 0);
    for Extent { offset, len, content } in &list {
        let range = *offset as usize..(*offset + *len) as usize;
        if *content == Content::Zero {
            shown[range].fill(0);
        } else {
            shown[range.clone()].copy_from_slice(&model[range]);
        }
    }
    model.clone_from(&shown);
    let shown_file = File::options().read(true).write(true).create_new(true).open(dir.path().join("shown"));
    let shown_file = shown_file.unwrap();
    shown_file.write_all_at(&shown, 0).unwrap();
    let listed = || ListedInput::new(input(&shown_file), list.clone());
    let backing = Backing { path: path(dir.path(), "base"), format: "raw".into() };
    let mut piped = Vec::new();
    write(&listed(), Some(&backing), &mut piped, &mut no_watch).unwrap();
    fs::write(dir.path().join("plain"), &piped).unwrap();
    assert_shows(dir.path(), "plain", &model);
    assert!(piped.len() as u64 <= 220 * CLUSTER, "{}", piped.len());
    for (name, compression) in [("zlib", Compression::Zlib), ("zstd", Compression::Zstd)] {
        let out = File::create_new(dir.path().join(name)).unwrap();
        write_compressed(&listed(), Some(&backing), compression, &out, &mut no_watch).unwrap();
        assert_shows(dir.path(), name, &model);
    }
    let long = Backing { path: "x".repeat(1024), format: "raw".into() };
    assert!(write(&listed(), Some(&long), &mut Vec::new(), &mut no_watch).is_err());
}

#[test]
fn a_watch_ends_an_export() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (file, _) = disk(dir.path());
    let calls = Cell::new(0);
    let mut stop = |_: u64| calls.replace(calls.get() + 1) < 2;
    for kind in 0..3 {
        calls.set(0);
        let out = File::create(dir.path().join("out")).unwrap();
        let done = match kind {
            0 => raw::to_file(&input(&file), &out, &mut stop),
            1 => write(&input(&file), None, &mut Vec::new(), &mut stop),
            _ => write_compressed(&input(&file), None, Compression::Zstd, &out, &mut stop),
        };
        assert!(matches!(done, Err(ExportError::Stopped)), "{done:?}");
    }
}

#[test]
fn a_failing_reader_of_a_pipe_is_told_apart() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let (file, _) = disk(dir.path());
    let (reader, mut writer) = std::io::pipe().unwrap();
    drop(reader);
    let failed = raw::to_pipe(&input(&file), &mut writer, &mut no_watch).unwrap_err();
    assert!(failed.is_broken_pipe(), "{failed}");
}
