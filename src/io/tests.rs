//! Tests of the live file, and of files of the host.

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

/// KiB of shared memory that huge pages map in this process, by smaps(5).
fn huge_mapped() -> u64 {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let values = smaps.lines().filter_map(|line| line.strip_prefix("ShmemPmdMapped:"));
    values.map(|value| value.trim().trim_end_matches(" kB").parse::<u64>().unwrap()).sum()
}

/// Guards D66.
#[test]
fn full_runs_of_map_pages_become_huge_pages_and_take_no_memory() {
    use std::os::unix::fs::MetadataExt;
    let file = sys::memory_file().unwrap();
    let live = LiveFile::new(file.try_clone().unwrap()).unwrap();
    // Behind 64 pages of the head: the second and the third huge page are full, the fourth has a hole, the first has one in
    // the head. One more is full in another segment.
    let pages = || (0..2000).filter(|page| *page != 1700).chain(4544..5056);
    for page in pages() {
        live.prepare(page).unwrap()[7].store(page + 1, Ordering::Relaxed);
    }
    let blocks = file.metadata().unwrap().blocks();
    assert_eq!(huge_mapped(), 0);
    assert_eq!(live.merge_pages(1), 1);
    let done = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        // Writers do not stop meanwhile, and lose nothing.
        let writer = scope.spawn(|| {
            let mut rounds = 0;
            while !done.load(Ordering::Relaxed) || rounds == 0 {
                rounds += 1;
                for page in 448..1472 {
                    live.page(page).unwrap()[9].fetch_add(1, Ordering::Relaxed);
                }
            }
            rounds
        });
        assert_eq!(live.merge_pages(100), 2);
        done.store(true, Ordering::Relaxed);
        let rounds = writer.join().unwrap();
        for page in 448..1472 {
            assert_eq!(live.page(page).unwrap()[9].load(Ordering::Relaxed), rounds);
        }
    });
    assert_eq!(live.merge_pages(100), 0, "each is tried once");
    assert_eq!(huge_mapped(), 3 * 2048, "Linux 6.1 and contiguous memory are there");
    assert_eq!(file.metadata().unwrap().blocks(), blocks);
    live.prepare(1700).unwrap();
    assert_eq!(live.merge_pages(100), 1);
    let next = live.reopen().unwrap();
    for page in pages() {
        assert_eq!(next.page(page).unwrap()[7].load(Ordering::Relaxed), page + 1);
    }
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

#[test]
fn a_live_file_that_was_cut_is_an_error_and_no_signal() {
    let file = sys::memory_file().unwrap();
    let live = LiveFile::new(file.try_clone().unwrap()).unwrap();
    live.prepare(0).unwrap();
    live.prepare(70).unwrap();
    drop(live);
    let whole = file.metadata().unwrap().len();
    file.set_len(whole - 4096).unwrap();
    let error = LiveFile::new(file.try_clone().unwrap()).unwrap_err();
    assert!(error.to_string().contains("was cut"), "{error}");
    file.set_len(whole).unwrap();
    assert_eq!(LiveFile::new(file).unwrap().pages(0).collect::<Vec<_>>(), [0, 70]);
}

#[test]
fn a_live_file_that_claims_too_many_pages_is_read_to_its_end() {
    use std::os::unix::fs::FileExt;
    let file = sys::memory_file().unwrap();
    LiveFile::new(file.try_clone().unwrap()).unwrap().prepare(5).unwrap();
    // The last word of the header page: how many words of the summary are in use.
    file.write_all_at(&u64::MAX.to_le_bytes(), 511 * 8).unwrap();
    let live = LiveFile::new(file).unwrap();
    assert_eq!(live.pages(0).collect::<Vec<_>>(), [5]);
    assert!(live.page(u64::MAX).is_none());
}

#[test]
fn live_maps_that_a_dead_worker_did_not_complete_are_removed() {
    let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
    let dir = tmp.path().join("live");
    let live = LiveDir::new(&dir).unwrap();
    live.fresh(1).unwrap();
    live.publish(1).unwrap();
    live.fresh(2).unwrap();
    let names = || {
        let mut all: Vec<_> =
            std::fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        all.sort();
        all
    };
    assert_eq!(names(), ["1.live", "2.tmp"]);
    let next = LiveDir::new(&dir).unwrap();
    assert_eq!(names(), ["1.live"]);
    assert!(next.existing(1).unwrap().is_some() && next.existing(2).unwrap().is_none());
}

#[test]
fn of_a_file_that_the_kernel_has_yet_to_write_nothing_was_refused() {
    for dir in [std::env::temp_dir(), "/dev/shm".into()] {
        let tmp = tempfile::tempdir_in(dir).unwrap();
        let file = HostMedium::new(tmp.path()).unwrap().open("f", Open::Create).unwrap();
        file.write_at(&[1; 8192], 0).unwrap();
        file.check_written_back().unwrap();
        file.sync_data().unwrap();
        file.check_written_back().unwrap();
    }
}
