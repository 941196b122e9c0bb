use std::fs::{self, File, FileTimes};
use std::io::Write;
use std::os::unix::fs::{FileExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::{ProptestConfig, any, prop_oneof, proptest};
use tempfile::TempDir;

use super::{AlignedBuf, FileIdentity, FileSource, Source, SourceErrorKind, Verdict, compare};
use crate::format::record::{BaseIdentity, Strictness};

fn pattern(len: usize) -> Vec<u8> {
    (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn file(len: usize) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("image");
    fs::write(&path, pattern(len)).expect("write the image");
    (dir, path)
}

fn open_fails(path: &Path, kind: SourceErrorKind, text: &str) {
    let error = FileSource::open(path).expect_err("must be refused");
    assert_eq!(error.kind(), kind);
    assert_eq!(error.object(), path.display().to_string());
    let message = error.to_string();
    assert!(message.contains(text) && message.contains(&path.display().to_string()), "{message}");
}

/// Changes the modification time, whatever the clock's granularity.
fn move_mtime(file: &File) {
    let before = file.metadata().and_then(|metadata| metadata.modified()).expect("a modification time");
    file.set_times(FileTimes::new().set_modified(before + Duration::from_secs(1))).expect("set the time");
}

#[test]
fn opening_what_is_not_an_image_is_refused_without_waiting() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    open_fails(&dir.path().join("nothing"), SourceErrorKind::NotFound, "no such file");
    open_fails(dir.path(), SourceErrorKind::NotAFile, "not a regular file or block device");
    open_fails(Path::new("/dev/zero"), SourceErrorKind::NotAFile, "not a regular file or block device");

    let fifo = dir.path().join("fifo");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().expect("mkfifo runs");
    assert!(made.success());
    open_fails(&fifo, SourceErrorKind::NotAFile, "not a regular file or block device");

    let socket = dir.path().join("socket");
    let _listener = UnixListener::bind(&socket).expect("a socket");
    open_fails(&socket, SourceErrorKind::NotAFile, "not a regular file or block device");

    let empty = dir.path().join("empty");
    File::create(&empty).expect("an empty file");
    open_fails(&empty, SourceErrorKind::Empty, "it is empty");

    let file = dir.path().join("file");
    fs::write(&file, "x").expect("a file");
    open_fails(&file.join("below"), SourceErrorKind::NotFound, "no such file");
}

#[test]
fn a_symbolic_link_is_followed() {
    let (dir, path) = file(5000);
    let link = dir.path().join("link");
    symlink(&path, &link).expect("a symbolic link");
    let source = FileSource::open(&link).expect("opens");
    assert_eq!(source.found(), FileSource::open(&path).expect("opens").found());
    assert_eq!(source.size(), 5000);
}

#[test]
fn a_read_of_any_alignment_gets_the_bytes_up_to_an_odd_end() {
    for len in [1, 511, 512, 4095, 4096, 4097, 10_000, 300_001] {
        let (_dir, path) = file(len);
        let source = FileSource::open(&path).expect("opens");
        let flat = pattern(len);

        let mut aligned = AlignedBuf::new(512 * 1024);
        let read = source.read_at(&mut aligned, 0).expect("reads");
        assert_eq!(aligned[..read], flat, "aligned, {len} bytes");

        let mut unaligned = vec![0; len + 7];
        let read = source.read_at(&mut unaligned[1..], 0).expect("reads");
        assert_eq!(unaligned[1..=read], flat, "unaligned, {len} bytes");

        let last = len as u64 - 1;
        let mut byte = [0; 3];
        assert_eq!(source.read_at(&mut byte, last).expect("reads"), 1);
        assert_eq!(byte[0], flat[last as usize]);
        assert_eq!(source.read_at(&mut byte, len as u64).expect("reads"), 0);
        assert_eq!(source.read_at(&mut byte, u64::MAX).expect("reads"), 0);
        assert_eq!(source.read_at(&mut aligned, (len as u64).next_multiple_of(4096)).expect("reads"), 0);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn reads_agree_with_a_flat_copy(
        len in 1..700_000usize,
        reads in proptest::collection::vec(
            (0..750_000u64, prop_oneof![0..5000usize, 0..600_000usize], any::<bool>()), 1..12),
    ) {
        let (_dir, path) = file(len);
        let flat = pattern(len);
        let source = FileSource::open(&path).expect("opens");
        let mut buf = AlignedBuf::new(600_000);
        for (offset, length, round) in reads {
            let (offset, length) = if round { (offset & !4095, length & !4095) } else { (offset, length) };
            let read = source.read_at(&mut buf[..length], offset).expect("reads");
            let start = len.min(offset as usize);
            assert_eq!(buf[..read], flat[start..len.min(start + length)]);
        }
    }
}

#[test]
fn a_file_changed_in_place_is_never_served_again() {
    let (_dir, path) = file(20_000);
    let source = FileSource::open(&path).expect("opens");
    let mut buf = vec![0; 4096];
    assert_eq!(source.read_at(&mut buf, 0).expect("reads"), 4096);
    let writer = File::options().write(true).open(&path).expect("opens for writing");
    let before = writer.metadata().and_then(|metadata| metadata.modified()).expect("a modification time");
    writer.write_all_at(b"new", 100).expect("writes");
    move_mtime(&writer);

    let error = source.read_at(&mut buf, 0).expect_err("must be refused");
    assert_eq!(error.kind(), SourceErrorKind::Changed);
    assert!(error.to_string().contains("a base must never change"), "{error}");

    // Restoring the time does not help this source.
    writer.set_times(FileTimes::new().set_modified(before)).expect("set the time");
    assert_eq!(source.read_at(&mut buf, 0).expect_err("sticky").kind(), SourceErrorKind::Changed);
    assert_eq!(source.check().expect_err("sticky").kind(), SourceErrorKind::Changed);
    assert_eq!(source.next_data(0).expect_err("sticky").kind(), SourceErrorKind::Changed);
    assert_eq!(source.next_hole(0).expect_err("sticky").kind(), SourceErrorKind::Changed);
}

#[test]
fn a_truncated_and_a_grown_file_are_changed_files() {
    for len in [8192, 30_000] {
        let (_dir, path) = file(20_000);
        let source = FileSource::open(&path).expect("opens");
        let writer = File::options().write(true).open(&path).expect("opens for writing");
        writer.set_len(len).expect("truncates");
        let mut buf = vec![0; 20_000];
        assert_eq!(source.read_at(&mut buf, 0).expect_err("changed").kind(), SourceErrorKind::Changed);
    }
}

#[test]
fn a_replaced_or_deleted_file_is_still_served() {
    let (dir, path) = file(20_000);
    let source = FileSource::open(&path).expect("opens");
    let next = dir.path().join("next");
    fs::write(&next, vec![1; 20_000]).expect("writes");
    fs::rename(&next, &path).expect("renames");
    let mut buf = vec![0; 20_000];
    assert_eq!(source.read_at(&mut buf, 0).expect("reads"), 20_000);
    assert_eq!(buf, pattern(20_000));
    assert_ne!(source.identity(), FileSource::open(&path).expect("opens").identity());
    fs::remove_file(&path).expect("removes");
    assert_eq!(source.read_at(&mut buf, 0).expect("reads"), 20_000);
}

#[test]
fn data_and_holes_are_found() {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let path = dir.path().join("sparse");
    let mut writer = File::create(&path).expect("creates");
    writer.write_all(&[1; 8192]).expect("writes");
    writer.write_all_at(&[1; 100], 1 << 20).expect("writes");
    writer.set_len(3 << 20).expect("extends");
    writer.sync_all().expect("syncs");
    let source = FileSource::open(&path).expect("opens");

    // A filesystem may know no holes, or larger ones than were left; data is never called a hole.
    let mut data = vec![false; 3 << 20];
    let mut at = 0;
    while let Some(start) = source.next_data(at).expect("seeks") {
        let end = source.next_hole(start).expect("seeks");
        assert!(at <= start && start < end && end <= 3 << 20);
        data[start as usize..end as usize].fill(true);
        at = end;
    }
    assert!(data[..8192].iter().all(|data| *data));
    assert!(data[1 << 20..(1 << 20) + 100].iter().all(|data| *data));
    assert_eq!(source.next_data(3 << 20).expect("seeks"), None);
    assert_eq!(source.next_data(u64::MAX).expect("seeks"), None);
    assert_eq!(source.next_hole(3 << 20).expect("seeks"), 3 << 20);
    assert_eq!(source.next_hole(u64::MAX).expect("seeks"), 3 << 20);
}

/// The multiplication overflowed.
#[test]
fn a_file_that_was_modified_after_the_year_2262_has_an_identity() {
    let late = FileIdentity { size: 5, mtime_s: 13_000_000_000, mtime_ns: 1, device: 0, inode: 1 };
    let registered = BaseIdentity::from(late);
    assert_eq!(compare(&registered, &late.into(), Strictness::Strong), Verdict::Same);
    let later = FileIdentity { mtime_s: 13_000_000_001, ..late };
    assert!(matches!(compare(&registered, &later.into(), Strictness::Strong), Verdict::Another(_)));
}
