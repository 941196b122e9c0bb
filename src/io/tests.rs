//! Tests of the live file.

use super::*;
use std::sync::atomic::Ordering;

#[test]
fn a_page_outlives_the_mapping_and_untouched_pages_are_absent() {
    let live = LiveFile::anonymous().unwrap();
    assert!(live.page(0).is_none());
    for page in [0, 1, 63, 64, 5000, 40_000, 1_082_000] {
        live.prepare(page).unwrap()[7].store(page + 1, Ordering::Relaxed);
    }
    live.header(LiveHeader::Size).store(99, Ordering::Relaxed);
    let next = live.reopen().unwrap();
    drop(live);
    assert_eq!(next.pages(0).collect::<Vec<_>>(), [0, 1, 63, 64, 5000, 40_000, 1_082_000]);
    assert_eq!(next.pages(64).count(), 4);
    for page in [0, 1, 63, 64, 5000, 40_000, 1_082_000] {
        assert_eq!(next.page(page).unwrap()[7].load(Ordering::Relaxed), page + 1);
    }
    assert_eq!(next.header(LiveHeader::Size).load(Ordering::Relaxed), 99);
    assert_eq!(next.prepare(1 << 40).unwrap_err().raw_os_error(), Some(libc::EFBIG));
}

#[test]
fn replaced_files_have_the_new_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let medium = HostMedium::new(dir.path()).unwrap();
    medium.make_dir("d").unwrap();
    replace(&medium, "d", "x", b"one").unwrap();
    replace(&medium, "d", "x", b"2").unwrap();
    let file = medium.open("d/x", Open::Existing).unwrap();
    assert_eq!(read_whole(&*file, 10).unwrap(), b"2");
    assert!(read_whole(&*file, 0).is_err());
    assert_eq!(medium.list("d").unwrap(), ["x"]);
}
