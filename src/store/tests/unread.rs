//! Records that cannot be read for a while.

use super::*;
use crate::io::Open;

pub(super) struct SimStore {
    pub(super) medium: SimMedium,
    pub(super) live: Arc<SimLive>,
    tmp: TempDir,
}

impl SimStore {
    pub(super) fn new() -> Self {
        let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
        fs::write(tmp.path().join("b.raw"), [7; 8192]).unwrap();
        Self { medium: SimMedium::new(1), live: Arc::default(), tmp }
    }

    pub(super) fn open(&self) -> Store {
        let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
        let live = self.live.clone();
        Store::open_on(Arc::new(self.medium.clone()), |_| Ok(live), cache, Some(0), Arc::new(OpenHere))
            .unwrap()
    }

    /// Makes opens of these files fail.
    fn fails(&self, files: &[String], errno: i32) {
        let files = files.to_vec();
        self.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
            let fails = event.call == Call::Open && files.iter().any(|file| file == event.name);
            if fails { Err(std::io::Error::from_raw_os_error(errno)) } else { Ok(()) }
        })));
    }

    /// Makes all names be known from now on.
    fn stamped(self) -> Self {
        self.medium.stamp_files();
        self
    }

    fn works(&self) {
        self.medium.set_hook(None);
    }
}

// After EMFILE or EIO while a record was read, the record counted as damaged until the next start, and its name was
// free.
/// Guards D46.
#[test]
fn a_record_that_cannot_be_read_for_a_while_is_not_damaged_and_keeps_its_name() {
    for errno in [libc::EMFILE, libc::EIO, libc::ENOMEM] {
        let sim = SimStore::new();
        let store = sim.open();
        let source = sim.tmp.path().join("b.raw");
        store.add_base("b", source.to_str().unwrap(), None).unwrap();
        let ids: Vec<u64> = store
            .create_disks(&[on("b", "one", None), blank("two")])
            .unwrap()
            .iter()
            .map(|disk| disk.id())
            .collect();
        write(&store, "one");
        drop(store);

        let file = format!("disks/{}.disk", ids[0]);
        sim.fails(std::slice::from_ref(&file), errno);
        let store = sim.open();
        assert_eq!(names(&store), ["two"]);
        assert!(store.damaged().is_empty());
        assert_eq!(store.unread().iter().map(|record| &record.file).collect::<Vec<_>>(), [&file]);
        // The record may have any name and be on any base.
        assert_refused(store.create_disks(&[blank("one")]).map(drop), Kind::Io, &file);
        assert_refused(store.rename("two", "one", Replace::Yes).map(drop), Kind::Io, &file);
        assert_refused(store.remove_base("b"), Kind::Io, &file);
        store.retry_unread();
        assert!(store.disk_by_id(ids[0]).is_none());
        assert_eq!(store.unread().len(), 1);

        sim.works();
        // A lookup by number retries at once.
        assert_eq!(store.disk_by_id(ids[0]).unwrap().name(), "one");
        assert!(store.unread().is_empty());
        let mut bytes = [0; 4096];
        store.disk("one").unwrap().attach().unwrap().read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [1; 4096]);
        assert_refused(store.create_disks(&[blank("one")]).map(drop), Kind::Exists, "one");
        store.rename("two", "three", Replace::No).unwrap();
        assert_refused(store.remove_base("b"), Kind::InUse, "one");
    }
}

#[test]
fn a_base_whose_record_cannot_be_read_for_a_while_comes_back_to_its_disks() {
    let sim = SimStore::new();
    let store = sim.open();
    let source = sim.tmp.path().join("b.raw");
    let base = store.add_base("b", source.to_str().unwrap(), None).unwrap().id();
    store.create_disks(&[on("b", "one", None)]).unwrap();
    drop(store);

    let file = format!("bases/{base}.base");
    sim.fails(std::slice::from_ref(&file), libc::EMFILE);
    let store = sim.open();
    assert!(store.damaged().is_empty());
    assert_refused(store.disk("one").unwrap().attach().map(drop), Kind::Changed, &file);
    assert_refused(store.add_base("b", source.to_str().unwrap(), None).map(drop), Kind::Io, &file);
    sim.works();
    let until = std::time::Instant::now() + Duration::from_secs(60);
    while !store.unread().is_empty() && std::time::Instant::now() < until {
        store.retry_unread();
    }
    store.disk("one").unwrap().attach().unwrap();
    assert_eq!(store.disk("one").unwrap().base_name().as_deref(), Some("b"));
    assert_refused(store.add_base("b", source.to_str().unwrap(), None).map(drop), Kind::Exists, "b");
}

// Of two disks with one name the later one has it, also when its record could not be read at first.
#[test]
fn a_rename_that_was_cut_off_is_completed_when_its_record_can_be_read() {
    for late in [0, 1] {
        let sim = SimStore::new();
        let store = sim.open();
        let made = store.create_disks(&[blank("from"), blank("to")]).unwrap();
        let ids = [made[0].id(), made[1].id()];
        // The worker dies between the two records.
        sim.medium.plan(Fault {
            call: Call::Create,
            name: format!("disks/{}.disk", ids[1]),
            skip: 0,
            times: 1,
            errno: libc::EIO,
        });
        assert!(store.rename("from", "to", Replace::Yes).is_err());
        drop((store, made));

        sim.fails(&[format!("disks/{}.disk", ids[late])], libc::EIO);
        let store = sim.open();
        sim.works();
        assert!(store.disk_by_id(ids[late]).is_some());
        assert_eq!(store.disk("to").unwrap().id(), ids[0], "late: {late}");
        assert_eq!(store.unlinked().iter().map(|disk| disk.id()).collect::<Vec<_>>(), [ids[1]]);
        drop(store);
        let store = sim.open();
        assert_eq!(store.disk("to").unwrap().id(), ids[0]);
        assert_eq!(store.unlinked().len(), 1);
    }
}

// A record that cannot be read, and that the operator moves out of the store, blocks no names any more.
#[test]
fn a_record_that_is_moved_away_frees_the_names() {
    let sim = SimStore::new();
    let store = sim.open();
    let id = store.create_disks(&[blank("one")]).unwrap()[0].id();
    drop(store);
    sim.fails(&[format!("disks/{id}.disk")], libc::EIO);
    let store = sim.open();
    sim.works();
    sim.medium.remove(&format!("disks/{id}.disk")).unwrap();
    assert!(store.disk_by_id(id).is_none());
    assert!(store.unread().is_empty());
    store.create_disks(&[blank("one")]).unwrap();
}

// One record that could not be read kept every name from being given to a disk.
/// Guards D46.
#[test]
fn a_record_that_cannot_be_read_blocks_its_own_name_and_its_own_base_and_no_other() {
    let sim = SimStore::new().stamped();
    let store = sim.open();
    let source = sim.tmp.path().join("b.raw");
    for base in ["b", "other", "third"] {
        store.add_base(base, source.to_str().unwrap(), None).unwrap();
    }
    let one = store.create_disks(&[on("b", "one", None), blank("two")]).unwrap()[0].id();
    let third = store.base("third").unwrap().id();
    write(&store, "one");
    store.close().unwrap();
    drop(store);

    let (disk, base) = (format!("disks/{one}.disk"), format!("bases/{third}.base"));
    sim.fails(&[disk.clone(), base.clone()], libc::EIO);
    for _ in 0..2 {
        let store = sim.open();
        assert_eq!(store.unread().len(), 2);
        assert_refused(store.create_disks(&[blank("one")]).map(drop), Kind::Io, &disk);
        assert_refused(store.rename("two", "one", Replace::Yes).map(drop), Kind::Io, &disk);
        assert_refused(store.remove_base("b"), Kind::Io, &disk);
        assert_refused(store.add_base("third", source.to_str().unwrap(), None).map(drop), Kind::Io, &base);
        // All other names are free, and a base without such a disk goes.
        store.create_disks(&[blank("four"), on("other", "five", None)]).unwrap();
        store.rename("four", "six", Replace::No).unwrap();
        for disk in ["five", "six"] {
            let id = store.disk(disk).unwrap().id();
            store.unlink(disk).unwrap();
            store.purge(id).unwrap();
        }
        store.add_base("more", source.to_str().unwrap(), None).unwrap();
        store.remove_base("more").unwrap();
        // The next start still knows the name.
        store.close().unwrap();
    }
    sim.works();
    let store = sim.open();
    let mut bytes = [0; 4096];
    store.disk("one").unwrap().attach().unwrap().read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; 4096]);
    assert_refused(store.create_disks(&[blank("one")]).map(drop), Kind::Exists, "one");
}

/// Guards D46.
#[test]
fn a_record_that_changed_since_its_name_was_noted_may_have_any_name() {
    for lost in [false, true] {
        let sim = SimStore::new().stamped();
        let store = sim.open();
        let id = store.create_disks(&[blank("one")]).unwrap()[0].id();
        store.close().unwrap();
        drop(store);
        if lost {
            sim.medium.open("names", Open::Existing).unwrap().write_at(&[7; 20], 30).unwrap();
        } else {
            // The worker dies: the list has the name from before.
            let store = sim.open();
            store.rename("one", "two", Replace::No).unwrap();
        }
        let file = format!("disks/{id}.disk");
        sim.fails(std::slice::from_ref(&file), libc::EIO);
        let store = sim.open();
        for name in ["one", "two", "three"] {
            assert_refused(store.create_disks(&[blank(name)]).map(drop), Kind::Io, &file);
        }
    }
}
