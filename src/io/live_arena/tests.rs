//! Tests of the arena.

use super::*;
use crate::io::LiveHeader;

const IDENTITY: ArenaIdentity = ArenaIdentity { id: 7, device: 1, inode: 2 };

fn arena(file: &File) -> LiveArena {
    LiveArena::open(file.try_clone().unwrap(), MapBounds::NONE).unwrap()
}

fn formatted() -> File {
    let file = sys::memory_file().unwrap();
    LiveArena::format(&file, &IDENTITY).unwrap();
    file
}

fn put(arena: &LiveArena, disk: u64, pages: &[u64]) {
    let live = arena.fresh(disk).unwrap();
    for page in pages {
        live.prepare(*page).unwrap()[9].store(disk << 32 | page, Ordering::Relaxed);
    }
    live.header(LiveHeader::Size).store(disk, Ordering::Relaxed);
    arena.publish(disk).unwrap();
}

#[track_caller]
fn has(arena: &LiveArena, disk: u64, pages: &[u64]) {
    let live = arena.existing(disk).unwrap().expect("a map");
    assert_eq!(live.pages(0).collect::<Vec<_>>(), pages);
    for page in pages {
        assert_eq!(live.page(*page).unwrap()[9].load(Ordering::Relaxed), disk << 32 | page);
    }
    assert_eq!(live.header(LiveHeader::Size).load(Ordering::Relaxed), disk);
}

#[test]
fn maps_of_many_disks_outlive_the_worker_without_a_name_or_a_descriptor_each() {
    let file = formatted();
    let first = arena(&file);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for disk in 1..=700 {
        put(&first, disk, &[0, disk]);
    }
    // The map of the largest disk fits.
    put(&first, 701, &[0, 5000, 1_082_000]);
    let held: Vec<_> = (1..=700).map(|disk| first.existing(disk).unwrap()).collect();
    // Other tests open some at the same time.
    assert!(descriptors() < before + 300, "{} descriptors more", descriptors() - before);
    drop((first, held));
    let next = arena(&file);
    (1..=700).for_each(|disk| has(&next, disk, &[0, disk]));
    has(&next, 701, &[0, 5000, 1_082_000]);
    assert!(next.existing(702).unwrap().is_none());
    let mut listed: Vec<u64> = LiveArena::list(&file).unwrap().into_iter().map(|(disk, _)| disk).collect();
    listed.sort_unstable();
    assert_eq!(listed, (1..=701).collect::<Vec<_>>());
}

#[test]
fn what_a_dead_worker_did_not_complete_is_given_back() {
    let file = formatted();
    let first = arena(&file);
    put(&first, 1, &[3]);
    let empty = first.memory().unwrap();
    let unfinished = first.fresh(2).unwrap();
    (0..50).for_each(|page| assert!(unfinished.prepare(page).is_ok()));
    let removed = first.existing(1).unwrap();
    // The worker dies with everything mapped.
    std::mem::forget((first, unfinished, removed));
    let next = arena(&file);
    assert!(next.existing(2).unwrap().is_none());
    has(&next, 1, &[3]);
    assert_eq!(next.memory().unwrap(), empty);
    put(&next, 2, &[0]);
    has(&next, 2, &[0]);
}

/// Guards D25.
#[test]
fn a_window_is_not_given_to_another_disk_while_it_is_mapped() {
    let file = formatted();
    let arena = arena(&file);
    put(&arena, 1, &[0]);
    let reader = arena.existing(1).unwrap().unwrap();
    let full = arena.memory().unwrap();
    arena.remove(1).unwrap();
    assert!(arena.existing(1).unwrap().is_none());
    put(&arena, 2, &[0]);
    assert_eq!(reader.page(0).unwrap()[9].load(Ordering::Relaxed), 1 << 32, "a mapping shows another disk");
    drop(reader);
    assert_eq!(arena.memory().unwrap(), full, "memory of a removed map is not given back");
    put(&arena, 3, &[7]);
    has(&arena, 2, &[0]);
    has(&arena, 3, &[7]);
}

#[test]
fn a_map_that_did_not_fit_is_replaced() {
    let file = formatted();
    let first = arena(&file);
    put(&first, 1, &[0, 1, 2]);
    put(&first, 1, &[5]);
    has(&first, 1, &[5]);
    drop(first);
    has(&arena(&file), 1, &[5]);
    assert_eq!(LiveArena::list(&file).unwrap().len(), 1);
}

#[test]
fn an_arena_moves_with_all_its_maps() {
    let (file, new) = (formatted(), formatted());
    let from = arena(&file);
    put(&from, 1, &[0, 5000]);
    put(&from, 9, &[1]);
    drop(from.fresh(10).unwrap());
    let to = arena(&new);
    to.copy_from(&arena(&file)).unwrap();
    has(&to, 1, &[0, 5000]);
    has(&to, 9, &[1]);
    assert!(to.existing(10).unwrap().is_none());
}

#[test]
fn an_arena_of_another_boot_layout_or_kind_is_not_used() {
    let file = formatted();
    assert_eq!(LiveArena::identity(&file).unwrap(), Some(IDENTITY));
    file.write_all_at(&1u64.to_ne_bytes(), word::BOOT as u64 * 8).unwrap();
    assert_eq!(LiveArena::identity(&file).unwrap(), None);
    file.write_all_at(&(MAGIC + (1 << 48)).to_ne_bytes(), 0).unwrap();
    let error = LiveArena::identity(&file).unwrap_err();
    assert!(error.to_string().contains("layout 2"), "{error}");
    file.write_all_at(&[0; 8], 0).unwrap();
    assert_eq!(LiveArena::identity(&file).unwrap_err().kind(), io::ErrorKind::InvalidData);
    let short = sys::memory_file().unwrap();
    assert!(LiveArena::identity(&short).is_err());
}

#[test]
fn one_disk_never_takes_all_the_memory_for_maps() {
    let file = formatted();
    let bounds = MapBounds { total: 1 << 20, per_disk: 700 << 10, reserve: 128 << 10 };
    let arena = LiveArena::open(file, bounds).unwrap();
    // Takes all it can.
    let fill = |disk: u64, wanted| {
        let live = arena.fresh(disk).unwrap();
        let refused = (0..).map(|page| live.prepare_for(page, wanted).map(drop)).find_map(Result::err);
        assert_eq!(refused.unwrap().raw_os_error(), Some(libc::ENOSPC));
        live
    };
    let mut before = u64::MAX;
    let greedy: Vec<_> = (1..=4).map(|disk| fill(disk, MapUse::Write)).collect();
    for live in &greedy {
        assert!(live.memory() < before && live.memory() > 16 << 10, "{} bytes", live.memory());
        before = live.memory();
    }
    assert!(arena.memory().unwrap() < 1 << 20);
    // A small map finds room, and what is there is discarded beyond the bound.
    arena.fresh(9).unwrap().prepare_for(0, MapUse::Write).unwrap();
    let live = &greedy[0];
    assert!(live.prepare_for(900_000, MapUse::Write).is_err());
    (0..8).for_each(|page| assert!(live.prepare_for(900_000 + page, MapUse::Discard).is_ok()));
    // Both bounds hold for discards too.
    let discarded = fill(10, MapUse::Discard);
    assert!(discarded.memory() <= (700 + 128) << 10);
    assert!(arena.memory().unwrap() <= (1024 + 128) << 10);
}

#[test]
fn one_disk_has_a_bound_of_its_own() {
    let bounds = MapBounds { total: 1 << 30, per_disk: 64 << 10, reserve: 16 << 10 };
    let arena = LiveArena::open(formatted(), bounds).unwrap();
    let live = arena.fresh(1).unwrap();
    let pages = (0..).take_while(|page| live.prepare_for(*page, MapUse::Write).is_ok()).count();
    assert_eq!(pages, 14, "64 KiB less the head");
    let more = (100..).take_while(|page| live.prepare_for(*page, MapUse::Discard).is_ok()).count();
    assert_eq!(more, 4);
}

/// What a version without the mark does when it takes an arena over: it gives back what is not complete.
fn taken_over_by_an_earlier_version(file: &File) {
    let entries = read_header(file).unwrap()[word::ENTRIES];
    for slot in 0..entries {
        let at = DIRECTORY_AT + slot * 8;
        let mut entry = [0; 8];
        file.read_exact_at(&mut entry, at).unwrap();
        if u64::from_ne_bytes(entry) & 3 != COMPLETE {
            file.write_all_at(&[0; 8], at).unwrap();
        }
    }
}

/// Guards D77.
#[test]
fn a_list_of_unflushed_pages_counts_until_an_earlier_version_took_the_arena_over() {
    let file = formatted();
    let first = arena(&file);
    put(&first, 1, &[0, 7]);
    let live = first.existing(1).unwrap().unwrap();
    assert!(!live.is_tracked());
    live.set_tracked();
    live.note_unflushed(7);
    drop((live, first));
    // However many workers come.
    for _ in 0..3 {
        let live = arena(&file).existing(1).unwrap().unwrap();
        assert!(live.is_tracked());
        assert_eq!(live.unflushed_pages().collect::<Vec<_>>(), [7]);
    }
    taken_over_by_an_earlier_version(&file);
    let next = arena(&file);
    let live = next.existing(1).unwrap().unwrap();
    assert!(!live.is_tracked(), "a list that an earlier version did not keep counts");
    // And again after that.
    live.set_tracked();
    assert!(arena(&file).existing(1).unwrap().unwrap().is_tracked());
    has(&next, 1, &[0, 7]);
}

/// Guards D77.
#[test]
fn a_map_that_moves_takes_its_list_of_unflushed_pages_along() {
    let (file, new) = (formatted(), formatted());
    let from = arena(&file);
    let far = 1_000_000;
    for disk in [1, 2] {
        put(&from, disk, &[0, 7, far]);
        let live = from.existing(disk).unwrap().unwrap();
        live.note_unflushed(7);
        live.note_unflushed(far);
        if disk == 1 {
            live.set_tracked();
        }
    }
    let to = arena(&new);
    to.copy_from(&arena(&file)).unwrap();
    let (first, second) = (to.existing(1).unwrap().unwrap(), to.existing(2).unwrap().unwrap());
    assert!(first.is_tracked() && !second.is_tracked());
    assert_eq!(first.unflushed_pages().collect::<Vec<_>>(), [7, far]);
    // The list of pages far behind is memory of the map.
    assert_eq!(first.memory(), 6 * PAGE);
}

/// The header lists the pages before this one.
const NEAR: u64 = 448 * 64;

/// A tmpfs of its own in a directory of its own, until dropped.
struct SmallTmpfs(tempfile::TempDir);

impl SmallTmpfs {
    fn new(options: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        sys::mount_tmpfs(dir.path(), options).unwrap();
        Self(dir)
    }

    fn file(&self, name: &str) -> File {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false).open(self.0.path().join(name)).unwrap()
    }

    /// Takes all the space that is left.
    fn fill(&self) {
        let rest = self.file("rest");
        let full = (0..).find_map(|page| sys::fallocate(rest.as_fd(), 0, page * PAGE, PAGE).err()).unwrap();
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC));
    }
}

impl Drop for SmallTmpfs {
    fn drop(&mut self) {
        let _ = sys::unmount(self.0.path(), sys::Detach::Yes);
    }
}

/// Guards D77.
#[test]
fn a_map_of_an_earlier_version_is_taken_over_when_there_is_no_memory_for_its_list() {
    if sys::effective_ids().0 != 0 {
        println!("SKIP: needs root");
        return;
    }
    let tmpfs = SmallTmpfs::new("size=4m");
    let file = tmpfs.file("arena");
    LiveArena::format(&file, &IDENTITY).unwrap();
    // Of a disk of more than 1.7 TiB; two pages of the list are behind the header.
    let pages = [0, 7, NEAR, NEAR + 40_000];
    put(&arena(&file), 1, &pages);
    // Such a version reserves no list.
    let list = window(1) + super::super::live::FAR_AT;
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    sys::fallocate(file.as_fd(), punch, list, 64 * PAGE).unwrap();
    taken_over_by_an_earlier_version(&file);
    tmpfs.fill();
    // However many workers come.
    for _ in 0..3 {
        let arena = arena(&file);
        has(&arena, 1, &pages);
        let live = arena.existing(1).unwrap().unwrap();
        assert!(!live.is_tracked(), "a list that the next worker does not find counts");
        pages.iter().for_each(|page| live.note_unflushed(*page));
        assert_eq!(live.unflushed_pages().collect::<Vec<_>>(), pages);
        live.forget_unflushed(NEAR);
        assert_eq!(live.unflushed_pages().collect::<Vec<_>>(), [0, 7, NEAR + 40_000]);
        live.set_tracked();
    }
    // With memory again, the list is kept as ever.
    std::fs::remove_file(tmpfs.0.path().join("rest")).unwrap();
    let last = arena(&file);
    let live = last.existing(1).unwrap().unwrap();
    assert!(!live.is_tracked());
    live.set_tracked();
    assert!(live.is_tracked());
}
