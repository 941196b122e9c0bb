//! Pools: where the files of deltas are, and what a pool that is gone takes with it.

mod power;

use super::*;
use crate::format::layout::{POOL_IDENTITY, data_path, disk_path};
use crate::store::pools::{Lost, make_identity};
use crate::store::{Change, Origin};

const BLOCK: usize = 4096;

struct Rig {
    fixture: TestStore,
}

impl Rig {
    /// A store with a pool `p`, which is in use.
    fn new() -> (Self, Store) {
        let (fixture, store) = TestStore::with_base();
        let rig = Self { fixture };
        let store = rig.with_pool(store, "p");
        (rig, store)
    }
    fn dir(&self, pool: &str) -> PathBuf {
        self.fixture.tmp.path().join(pool)
    }
    fn prepare(&self, pool: &str) {
        let uuid = Store::superblock(&self.fixture.path("")).unwrap().uuid;
        make_identity(&self.fixture.path(""), &uuid, &self.dir(pool)).unwrap();
    }
    fn add(&self, store: &Store, pool: &str) -> Result<(), StoreError> {
        store.add_pool(pool, self.dir(pool).to_str().unwrap(), Path::new("/nowhere/mnt")).map(drop)
    }
    /// Adds a pool, and lets another worker take over.
    fn with_pool(&self, store: Store, pool: &str) -> Store {
        self.prepare(pool);
        self.add(&store, pool).unwrap();
        drop(store);
        self.fixture.open()
    }
    fn files(&self, pool: &str) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(self.dir(pool).join("deltas"))
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
    /// The drive of a pool goes away, and an empty mount point is left.
    fn unmount(&self, pool: &str) {
        fs::rename(self.dir(pool), self.dir(&format!("{pool}.away"))).unwrap();
        fs::create_dir(self.dir(pool)).unwrap();
    }
    fn mount(&self, pool: &str) {
        fs::remove_dir(self.dir(pool)).unwrap();
        fs::rename(self.dir(&format!("{pool}.away")), self.dir(pool)).unwrap();
    }
}

fn create(store: &Store, pool: &str, name: &str) {
    store.create_disks_in(Some(pool), &[NewDisk { size: Some(4 * 4096), ..blank(name) }], None).unwrap();
}

fn put(store: &Store, name: &str, block: u64, byte: u8) {
    let node = store.disk(name).unwrap();
    node.change(|disk| disk.write(block * 4096, &[byte; BLOCK], 0)).unwrap().unwrap();
}

fn flush(store: &Store, name: &str) {
    store.disk(name).unwrap().attach().unwrap().delta().flush().unwrap();
}

fn blocks(store: &Store, name: &str) -> Vec<u8> {
    let disk = store.disk(name).unwrap().attach().unwrap();
    let mut bytes = vec![0xee; disk.size() as usize];
    disk.read(0, &mut bytes).unwrap();
    bytes.chunks(BLOCK).map(|block| block[0]).collect()
}

#[test]
fn the_files_of_a_disk_lie_in_its_pool_and_its_record_in_the_store() {
    let (rig, store) = Rig::new();
    create(&store, "p", "a");
    store.create_disks(&[blank("b")]).unwrap();
    for disk in ["a", "b"] {
        put(&store, disk, 1, 5);
        flush(&store, disk);
    }
    let (a, b) = (store.disk("a").unwrap().id(), store.disk("b").unwrap().id());
    assert_eq!(rig.files("p"), [format!("{a}.1.map"), format!("{a}.data")]);
    assert_eq!(rig.fixture.files("deltas"), [format!("{b}.1.map"), format!("{b}.data")]);
    let record = |disk| DiskRecord::decode(&fs::read(rig.fixture.path(&disk_path(disk))).unwrap()).unwrap();
    assert_eq!(record(a).features.pools.len(), 1);
    assert!(record(b).features.is_default(&record(b).lineage), "an older plyfs reads it");
    // After the death of the worker, and after a clean stop.
    drop(store);
    let store = rig.fixture.open();
    assert_eq!((blocks(&store, "a"), blocks(&store, "b")), (vec![0, 5, 0, 0], vec![0, 5]));
    store.close().unwrap();
    let store = rig.fixture.open();
    assert_eq!(blocks(&store, "a"), [0, 5, 0, 0]);
    store.unlink("a").unwrap();
    store.purge(a).unwrap();
    assert_eq!(rig.files("p"), [""; 0]);
}

#[test]
fn snapshots_rollbacks_and_clones_stay_in_the_pool_of_their_disk() {
    let (rig, store) = Rig::new();
    create(&store, "p", "a");
    put(&store, "a", 0, 1);
    store.snapshot("a", "s", None).unwrap();
    put(&store, "a", 0, 2);
    store.clone_disks(&Origin::parse("a"), &[NewDisk { size: None, ..blank("c") }], None).unwrap();
    put(&store, "c", 1, 3);
    flush(&store, "c");
    store.rollback("a", "s", None).unwrap();
    put(&store, "a", 2, 4);
    flush(&store, "a");
    let look = |store: &Store| (blocks(store, "a"), blocks(store, "c"));
    let wanted = (vec![1, 0, 4, 0], vec![2, 3, 0, 0]);
    assert_eq!(look(&store), wanted);
    assert_eq!(rig.fixture.files("deltas"), [""; 0], "all lie in the pool");
    store.close().unwrap();
    drop(store);
    let store = rig.fixture.open();
    assert_eq!(look(&store), wanted);
    assert_eq!(store.pools_of(&store.disk("c").unwrap()).0, "p");
}

#[test]
fn a_clone_in_another_pool_needs_both() {
    let (rig, store) = Rig::new();
    let store = rig.with_pool(store, "q");
    create(&store, "p", "a");
    put(&store, "a", 0, 1);
    let new = [NewDisk { size: None, ..blank("c") }];
    store.clone_disks_in(Some("q"), &Origin::parse("a"), &new, None).unwrap();
    put(&store, "c", 1, 2);
    flush(&store, "c");
    let node = store.disk("c").unwrap();
    assert_eq!(store.pools_of(&node), ("q".into(), vec!["p".into(), "q".into()]));
    assert!(rig.files("q").contains(&format!("{}.data", node.id())));
    store.close().unwrap();
    drop((node, store));
    rig.unmount("p");
    let store = rig.fixture.open();
    let why = store.disk("c").unwrap().problem().unwrap();
    assert!(why.contains("pool p is not available") && why.contains("plyfs pool attach p"), "{why}");
    store.close().unwrap();
    drop(store);
    rig.mount("p");
    let store = rig.fixture.open();
    assert_eq!(blocks(&store, "c"), [1, 2, 0, 0]);
}

/// Guards D89.
#[test]
fn a_pool_that_is_gone_at_start_takes_its_own_disks_only() {
    let (rig, store) = Rig::new();
    create(&store, "p", "a");
    store.create_disks(&[blank("b")]).unwrap();
    for disk in ["a", "b"] {
        put(&store, disk, 0, 6);
    }
    store.close().unwrap();
    drop(store);
    rig.unmount("p");
    let store = rig.fixture.open();
    assert_eq!(blocks(&store, "b"), [6, 0]);
    let node = store.disk("a").unwrap();
    assert_eq!((node.attributes().size, names(&store)), (4 * 4096, vec!["a".to_owned(), "b".to_owned()]));
    assert!(node.known_problem().unwrap().contains("pool p is not available"));
    assert_refused(node.attach(), Kind::Io, "its drive is not mounted there");
    assert_refused(store.create_disks_in(Some("p"), &[blank("x")], None), Kind::Io, "plyfs pool attach p");
    assert_refused(store.create_disks_in(Some("nope"), &[blank("x")], None), Kind::NotFound, "pool nope");
    assert!(!rig.dir("p").join("deltas").exists(), "nothing is written to the mount point");
    put(&store, "b", 1, 7);
    store.close().unwrap();
    drop((node, store));
    rig.mount("p");
    let store = rig.fixture.open();
    assert_eq!((blocks(&store, "a"), blocks(&store, "b")), (vec![6, 0, 0, 0], vec![6, 7]));
}

/// Guards D88.
#[test]
fn a_directory_that_is_not_the_pool_is_never_used() {
    let (rig, store) = Rig::new();
    let store = rig.with_pool(store, "q");
    create(&store, "p", "a");
    put(&store, "a", 0, 6);
    store.close().unwrap();
    drop(store);
    let file = rig.dir("p").join(POOL_IDENTITY);
    let right = fs::read(&file).unwrap();
    let other_store = {
        let bytes = fs::read(&file).unwrap();
        let mut identity = crate::format::pools::PoolIdentity::decode(&bytes).unwrap();
        identity.store = [9; 16];
        identity.encode()
    };
    let mut damaged = right.clone();
    damaged[50] ^= 1;
    let another = fs::read(rig.dir("q").join(POOL_IDENTITY)).unwrap();
    for (bytes, why) in [
        (other_store, "another store"),
        (another, "another pool"),
        (damaged, "checksum"),
        (Vec::new(), "identity"),
    ] {
        fs::write(&file, bytes).unwrap();
        let store = rig.fixture.open();
        assert_refused(store.disk("a").unwrap().attach(), Kind::Io, why);
        store.close().unwrap();
    }
    fs::write(&file, right).unwrap();
    assert_eq!(blocks(&rig.fixture.open(), "a"), [6, 0, 0, 0]);
}

/// Guards D88.
#[test]
fn a_directory_that_cannot_be_a_pool_is_refused() {
    let (rig, store) = Rig::new();
    let refused = |dir: &str, why: &str| {
        let added = store.add_pool("x", dir, Path::new("/nowhere/mnt"));
        assert_refused(added, Kind::Invalid, why);
    };
    refused("relative/path", "absolute");
    refused("/a/../b", "absolute");
    refused(rig.fixture.path("pool").to_str().unwrap(), "the directory of the store");
    refused(rig.fixture.tmp.path().to_str().unwrap(), "the directory of the store");
    refused("/nowhere/mnt/pool", "the mount");
    refused(rig.dir("p").to_str().unwrap(), "is pool p already");
    let empty = rig.dir("empty");
    fs::create_dir(&empty).unwrap();
    refused(empty.to_str().unwrap(), "plyfs pool add");
    rig.prepare("q");
    assert_refused(
        store.add_pool("p", rig.dir("q").to_str().unwrap(), Path::new("/nowhere/mnt")),
        Kind::Exists,
        "pool p",
    );
    let mut other =
        crate::format::pools::PoolIdentity::decode(&fs::read(rig.dir("q").join(POOL_IDENTITY)).unwrap());
    if let Ok(identity) = &mut other {
        identity.store = [1; 16];
        fs::write(rig.dir("q").join(POOL_IDENTITY), identity.encode()).unwrap();
    }
    refused(rig.dir("q").to_str().unwrap(), "another store");
    // A directory with files, or one of another store, is not prepared.
    let uuid = Store::superblock(&rig.fixture.path("")).unwrap().uuid;
    let prepare = |dir: &Path| make_identity(&rig.fixture.path(""), &uuid, dir).unwrap_err().to_string();
    assert!(prepare(&rig.dir("q")).contains("another store"));
    fs::write(empty.join("photo.jpg"), "x").unwrap();
    assert!(prepare(&empty).contains("not empty"));
}

#[test]
fn a_pool_with_disks_is_not_removed_and_an_empty_one_can_be_added_again() {
    let (rig, store) = Rig::new();
    create(&store, "p", "a");
    put(&store, "a", 0, 1);
    store.snapshot("a", "s", None).unwrap();
    assert_refused(store.remove_pool("p", Lost::No), Kind::InUse, "disk a");
    assert_refused(store.remove_pool("p", Lost::Yes), Kind::Invalid, "it is available");
    assert_refused(store.remove_pool("default", Lost::No), Kind::Invalid, "always stays");
    assert_refused(store.remove_pool("nope", Lost::No), Kind::NotFound, "pool nope");
    let id = store.unlink_with_snapshots("a").unwrap().id();
    assert_refused(store.remove_pool("p", Lost::No), Kind::InUse, "disk a");
    store.purge(id).unwrap();
    store.remove_pool("p", Lost::No).unwrap();
    assert!(!rig.dir("p").join(POOL_IDENTITY).exists());
    let store = rig.with_pool(store, "p");
    create(&store, "p", "b");
    assert_eq!(store.pool("p").unwrap().trouble, None);
}

/// Guards D89.
#[test]
fn the_files_of_a_removed_disk_wait_for_its_pool() {
    let (rig, store) = Rig::new();
    create(&store, "p", "a");
    put(&store, "a", 0, 1);
    store.close().unwrap();
    drop(store);
    rig.unmount("p");
    let store = rig.fixture.open();
    let id = store.unlink("a").unwrap().id();
    store.purge(id).unwrap();
    assert!(rig.fixture.path(&disk_path(id)).exists(), "its record knows what is to be removed");
    store.close().unwrap();
    drop(store);
    rig.mount("p");
    let store = rig.fixture.open();
    store.purge(id).unwrap();
    assert!(rig.files("p").is_empty() && !rig.fixture.path(&disk_path(id)).exists());
}

#[test]
fn a_pool_whose_drive_is_dead_is_forgotten_when_its_disks_are_removed() {
    let (rig, store) = Rig::new();
    create(&store, "p", "a");
    create(&store, "p", "b");
    for disk in ["a", "b"] {
        put(&store, disk, 0, 1);
    }
    drop(store);
    rig.unmount("p");
    let store = rig.fixture.open();
    store.unlink("a").unwrap();
    assert_refused(store.remove_pool("p", Lost::No), Kind::InUse, "disk a, disk b");
    assert_refused(store.remove_pool("p", Lost::Yes), Kind::InUse, "disk b");
    assert!(store.disk("b").unwrap().problem().unwrap().contains("not available"), "as before");
    store.unlink("b").unwrap();
    store.remove_pool("p", Lost::Yes).unwrap();
    assert!(store.unlinked().is_empty());
    store.close().unwrap();
}

/// Guards D89.
#[test]
fn what_was_not_flushed_to_a_drive_that_went_away_is_lost_and_reported() {
    let (rig, store) = Rig::new();
    create(&store, "p", "a");
    put(&store, "a", 0, 1);
    flush(&store, "a");
    put(&store, "a", 0, 2);
    put(&store, "a", 1, 2);
    let data = data_path(store.disk("a").unwrap().lineage().delta);
    // The worker dies with the drive. Of the page cache nothing was written.
    drop(store);
    rig.unmount("p");
    let bytes = [[1; BLOCK], [0; BLOCK]].concat();
    fs::write(rig.dir("p.away").join(data), bytes).unwrap();
    drop(rig.fixture.open());
    rig.mount("p");
    let store = rig.fixture.open();
    assert_eq!(blocks(&store, "a"), [1, 0, 0, 0], "a block that was never durable is as before");
    let disk = store.disk("a").unwrap().attach().unwrap();
    assert!(disk.delta().refuses_writes().unwrap().contains("its pool was gone"));
    disk.delta().opened();
    assert_eq!(disk.delta().refuses_writes(), None);
}

/// Guards D89.
#[test]
fn a_worker_that_may_not_open_a_pool_takes_no_live_map_away() {
    let (rig, store) = Rig::new();
    create(&store, "p", "a");
    put(&store, "a", 0, 2);
    drop(store);
    {
        let live = rig.fixture.tmp.path().join("live");
        let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
        let medium = Arc::new(crate::io::HostMedium::new(&rig.fixture.path("")).unwrap());
        let live = |_: &Superblock| Ok(Arc::new(LiveDir::new(&live)?) as Arc<dyn crate::io::LiveStore>);
        let store = Store::open_on(medium, live, cache, None, Arc::new(OpenHere)).unwrap();
        assert_refused(store.disk("a").unwrap().attach(), Kind::Io, "opens no pools");
    }
    assert_eq!(blocks(&rig.fixture.open(), "a"), [2, 0, 0, 0]);
}

#[test]
fn a_damaged_list_of_pools_takes_the_disks_in_pools_only() {
    let (rig, store) = Rig::new();
    create(&store, "p", "a");
    store.create_disks(&[blank("b")]).unwrap();
    for disk in ["a", "b"] {
        put(&store, disk, 0, 6);
    }
    store.close().unwrap();
    drop(store);
    let list = fs::read(rig.fixture.path("pools")).unwrap();
    fs::write(rig.fixture.path("pools"), "x").unwrap();
    let store = rig.fixture.open();
    assert_eq!(blocks(&store, "b"), [6, 0]);
    assert_refused(store.disk("a").unwrap().attach(), Kind::Io, "list of pools");
    rig.prepare("q");
    assert_refused(rig.add(&store, "q"), Kind::Invalid, "the list of pools cannot be read");
    store.close().unwrap();
    drop(store);
    fs::write(rig.fixture.path("pools"), list).unwrap();
    assert_eq!(blocks(&rig.fixture.open(), "a"), [6, 0, 0, 0]);
}

/// Copies the layers of a disk to a pool, one after the other. `interrupt`: between the steps, another worker takes over.
fn move_to(rig: &Rig, mut store: Store, disk: &str, pool: &str, interrupt: bool) -> Store {
    loop {
        if !store.begin_rework(disk, &Change::Move(pool.into()), 0).unwrap() {
            return store;
        }
        if interrupt {
            drop(store);
            store = rig.fixture.open();
        }
        reworks::make(&store, disk);
    }
}

/// Guards D95.
#[test]
fn a_move_whose_worker_dies_between_two_layers_goes_on_under_the_next_one() {
    let (rig, store) = Rig::new();
    let mut store = rig.with_pool(store, "q");
    create(&store, "p", "a");
    for (block, snapshot) in [(0, "s"), (1, "t"), (2, "u")] {
        put(&store, "a", block, block as u8 + 1);
        store.snapshot("a", snapshot, None).unwrap();
    }
    assert!(store.begin_rework("a", &Change::Move("q".into()), 77).unwrap());
    let mut layers = 0;
    loop {
        // Each worker finishes a layer, and dies.
        let node = store.disk("a").unwrap();
        let Some(rework) = node.rework() else { break };
        assert_eq!((rework.rate, rework.done), (77, 0), "the next layer is made as the command said");
        let making = store.open_rework(&node).unwrap();
        let mut at = 0;
        while at < making.size() {
            at = making.step(at).unwrap().next;
        }
        assert!(store.finish_rework(&node, making).unwrap());
        layers += 1;
        drop((node, store));
        store = rig.fixture.open();
    }
    assert!(layers >= 3, "a worker for each of the {layers} layers");
    assert_eq!(store.pools_of(&store.disk("a").unwrap()).1, ["q"]);
    assert_eq!(blocks(&store, "a"), [1, 2, 3, 0]);
    store.close().unwrap();
    assert_eq!(rig.files("p"), [""; 0]);
}

#[test]
fn a_disk_is_moved_with_its_snapshots_and_leaves_nothing_behind() {
    for interrupt in [false, true] {
        let (rig, store) = Rig::new();
        let store = rig.with_pool(store, "q");
        let new = NewDisk { base: Some("b".into()), size: Some(4 * 4096), ..blank("a") };
        store.create_disks_in(Some("p"), &[new], None).unwrap();
        put(&store, "a", 2, 1);
        store.snapshot("a", "s", None).unwrap();
        put(&store, "a", 0, 2);
        store.snapshot("a", "t", None).unwrap();
        put(&store, "a", 3, 3);
        let store = move_to(&rig, store, "a", "q", interrupt);
        put(&store, "a", 1, 4);
        let look = |store: &Store| {
            let of = |name: &str| {
                let frozen = store.open_snapshot("a", name).unwrap();
                let mut bytes = vec![0; 4 * BLOCK];
                frozen.read(0, &mut bytes, 0).unwrap();
                bytes.chunks(BLOCK).map(|block| block[0]).collect::<Vec<u8>>()
            };
            [blocks(store, "a"), of("s"), of("t")]
        };
        let wanted = [vec![2, 4, 1, 3], vec![7, 7, 1, 0], vec![2, 7, 1, 0]];
        assert_eq!(look(&store), wanted);
        let pools = store.pools_of(&store.disk("a").unwrap());
        assert_eq!(pools, ("q".into(), vec!["q".into()]));
        store.close().unwrap();
        assert_eq!(rig.files("p"), [""; 0]);
        drop(store);
        let store = rig.fixture.open();
        assert_eq!(look(&store), wanted);
        store.remove_pool("p", Lost::No).unwrap();
        // Back to the directory of the store.
        let store = move_to(&rig, store, "a", "default", interrupt);
        assert_eq!(look(&store), wanted);
        store.close().unwrap();
        assert_eq!(rig.files("q"), [""; 0]);
    }
}

/// Guards D94.
#[test]
fn a_moved_layer_shows_what_a_copy_shows_of_the_base_and_zeros_behind_a_cut() {
    let (rig, store) = Rig::new();
    reworks::create_copy(&store, "c");
    reworks::create_cut(&store, "a");
    for disk in ["c", "a"] {
        store.snapshot(disk, "s", None).unwrap();
        let wanted = family::read_snapshot(&store, disk, "s");
        assert!(store.begin_rework(disk, &Change::Move("p".into()), 0).unwrap());
        reworks::make(&store, disk);
        let moved = family::read_snapshot(&store, disk, "s");
        assert!(moved == wanted, "{disk}: {:?}, not {:?}", family::blocks(&moved), family::blocks(&wanted));
    }
    store.close().unwrap();
    drop(store);
    let store = rig.fixture.open();
    assert_eq!(family::read_snapshot(&store, "c", "s"), [7; 8192]);
    assert_eq!(family::read_snapshot(&store, "a", "s"), reworks::cut());
}

#[test]
fn a_moved_disk_leaves_the_layers_that_a_clone_needs() {
    let (rig, store) = Rig::new();
    let store = rig.with_pool(store, "q");
    create(&store, "p", "a");
    put(&store, "a", 0, 1);
    store.clone_disks(&Origin::parse("a"), &[NewDisk { size: None, ..blank("c") }], None).unwrap();
    put(&store, "c", 1, 2);
    assert_refused(
        store.begin_rework("a", &Change::Move("nope".into()), 0).map(drop),
        Kind::NotFound,
        "pool nope",
    );
    let store = move_to(&rig, store, "a", "q", false);
    assert_eq!((blocks(&store, "a"), blocks(&store, "c")), (vec![1, 0, 0, 0], vec![1, 2, 0, 0]));
    assert_eq!(store.pools_of(&store.disk("a").unwrap()).1, ["q"]);
    assert_eq!(store.pools_of(&store.disk("c").unwrap()).1, ["p"]);
    assert!(!store.begin_rework("a", &Change::Move("q".into()), 0).unwrap(), "all is there");
}
