//! Changes of the catalogue that run at the same time.

use std::sync::mpsc::{Receiver, Sender};

use super::*;
use crate::io::{LiveFile, LiveStore};
use crate::source::{OpenImage, Opened, SourceError};

/// A filesystem that hangs while a file is opened.
struct HangingFiles {
    calls: Mutex<Sender<()>>,
    go_on: Mutex<Receiver<()>>,
}

impl OpenImage for HangingFiles {
    fn open(&self, path: &Path) -> Result<Opened, SourceError> {
        if path.ends_with("b.raw") {
            self.calls.lock().send(()).unwrap();
            self.go_on.lock().recv().unwrap();
        }
        OpenHere.open(path)
    }
}

// One base on a hanging filesystem blocked all changes of names in the store.
/// Guards D45.
#[test]
fn a_base_that_hangs_blocks_no_other_change() {
    let (fixture, store) = TestStore::with_base();
    fs::write(fixture.path("../c.raw"), [8; 8192]).unwrap();
    let other = fixture.tmp.path().join("c.raw");
    store.create_disks(&[blank("one"), blank("two"), blank("three")]).unwrap();
    store.close().unwrap();
    drop(store);
    let (calls, called) = mpsc::channel();
    let (release, go_on) = mpsc::channel();
    let sources = Arc::new(HangingFiles { calls: Mutex::new(calls), go_on: Mutex::new(go_on) });
    let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
    let live = fixture.tmp.path().join("live");
    let live = |_: &Superblock| Ok(Arc::new(LiveDir::new(&live)?) as Arc<dyn crate::io::LiveStore>);
    let store = Store::open_with(&fixture.path(""), live, cache, None, sources).unwrap();
    std::thread::scope(|scope| {
        let hanging = [
            scope.spawn(|| store.create_disks(&[on("b", "four", None)]).map(drop)),
            scope.spawn(|| store.add_base("again", &fixture.source(), None).map(drop)),
        ];
        called.recv().unwrap();
        called.recv().unwrap();
        let (done, all) = mpsc::channel();
        let store = &store;
        scope.spawn(move || {
            store.create_disks(&[blank("five")]).unwrap();
            // The new name is free until its base is open.
            store.rename("one", "four", Replace::No).unwrap();
            store.purge(store.unlink("two").unwrap().id()).unwrap();
            store.add_base("c", other.to_str().unwrap(), None).unwrap();
            store.create_disks(&[on("c", "six", None)]).unwrap();
            store.base("b").unwrap().attached();
            store.remove_base("c").unwrap_err();
            assert_eq!(names(store), ["five", "four", "six", "three"]);
            done.send(()).unwrap();
        });
        // The timeout is for a failing test only.
        let waited = all.recv_timeout(Duration::from_secs(60));
        release.send(()).unwrap();
        release.send(()).unwrap();
        waited.expect("nothing else waits");
        let [created, added] = hanging.map(|thread| thread.join().unwrap());
        assert_refused(created, Kind::Exists, "four");
        added.unwrap();
    });
}

/// Guards D45.
#[test]
fn concurrent_creations_all_succeed_and_each_name_is_given_once() {
    let (fixture, store) = TestStore::with_base();
    let won: usize = std::thread::scope(|scope| {
        let makers: Vec<_> = (0..4)
            .map(|maker| {
                let store = &store;
                scope.spawn(move || {
                    let own: Vec<_> = (0..100).map(|n| on("b", &format!("d{maker}-{n}"), None)).collect();
                    store.create_disks(&own).unwrap();
                    let shared: Vec<_> = (0..40).map(|n| blank(&format!("shared-{n}"))).collect();
                    usize::from(store.create_disks(&shared).is_ok())
                })
            })
            .collect();
        makers.into_iter().map(|maker| maker.join().unwrap()).sum()
    });
    assert_eq!(won, 1);
    assert_eq!(names(&store).len(), 440);
    let mut ids: Vec<_> = store.disks_after(0).iter().map(|disk| disk.id()).collect();
    ids.dedup();
    assert_eq!(ids.len(), 440);
    drop(store);
    assert_eq!(names(&fixture.open()).len(), 440);
}

#[test]
fn a_base_is_not_removed_while_a_disk_is_created_on_it() {
    for _ in 0..50 {
        let (_house, store) = TestStore::with_base();
        std::thread::scope(|scope| {
            let removed = scope.spawn(|| store.remove_base("b").is_ok());
            let made = store.create_disks(&[on("b", "one", None)]).is_ok();
            assert!(made != removed.join().unwrap());
        });
        assert!(store.disks_after(0).iter().all(|disk| disk.attach().is_ok()));
    }
}

/// Live maps whose removal waits for the test.
struct SlowLiveStore {
    inner: LiveDir,
    calls: Mutex<Sender<()>>,
    go_on: Mutex<Receiver<()>>,
}

impl LiveStore for SlowLiveStore {
    fn existing(&self, disk: u64) -> std::io::Result<Option<LiveFile>> {
        self.inner.existing(disk)
    }
    fn fresh(&self, disk: u64) -> std::io::Result<LiveFile> {
        self.inner.fresh(disk)
    }
    fn publish(&self, disk: u64) -> std::io::Result<()> {
        self.inner.publish(disk)
    }
    fn abandon(&self, disk: u64) -> std::io::Result<()> {
        self.inner.abandon(disk)
    }
    fn disks(&self) -> std::io::Result<Vec<u64>> {
        self.inner.disks()
    }
    fn remove(&self, disk: u64) -> std::io::Result<()> {
        self.calls.lock().send(()).unwrap();
        self.go_on.lock().recv().unwrap();
        self.inner.remove(disk)
    }
}

// The kernel's FORGET began to purge a removed disk, and the command that had removed it answered before the space was
// free. The next write of a guest then found no space.
#[test]
fn the_second_purge_of_a_disk_returns_when_its_files_are_gone() {
    let fixture = TestStore::new();
    let (calls, called) = mpsc::channel();
    let (release, go_on) = mpsc::channel();
    let dir = fixture.tmp.path().join("slow");
    let live = move |_: &Superblock| {
        let slow =
            SlowLiveStore { inner: LiveDir::new(&dir)?, calls: Mutex::new(calls), go_on: Mutex::new(go_on) };
        Ok(Arc::new(slow) as Arc<dyn LiveStore>)
    };
    let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
    let store = Store::open_with(&fixture.path(""), live, cache, None, Arc::new(OpenHere)).unwrap();
    store.create_disks(&[blank("one")]).unwrap();
    let node = store.unlink("one").unwrap();
    let record = fixture.path(&format!("disks/{}.disk", node.id()));
    std::thread::scope(|scope| {
        let first = scope.spawn(|| store.purge(node.id()));
        called.recv().unwrap();
        let (done, second) = mpsc::channel();
        let (store, node, record) = (&store, &node, &record);
        scope.spawn(move || {
            store.purge(node.id()).unwrap();
            let _ = done.send(record.exists());
        });
        let early = second.recv_timeout(Duration::from_millis(200));
        release.send(()).unwrap();
        first.join().unwrap().unwrap();
        assert!(early.is_err(), "it returned while the first was still at it");
        assert!(!second.recv().unwrap(), "the record was still there");
    });
    assert!(store.disk_by_id(node.id()).is_none());
    assert!(store.unlinked().is_empty());
}
