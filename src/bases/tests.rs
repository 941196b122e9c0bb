//! Operations on bases of a real store, without a mount and without a network.

mod copies;
mod jobs;
mod unused;
mod whole;

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

use super::copies::Keeper;
use super::hydrate::{Hydrations, State};
use super::proofs::Wanted;
use super::sources::{HostSources, OpenCache};
use super::{BaseState, Bases, Description, Evicted, File, LastCopy, PreparedBase};
use crate::cache::BlockCache;
use crate::config::{Config, Overrides};
use crate::events::Events;
use crate::fetch::kept::Reach;
use crate::format::record::{Digest, ImageFormat, Strictness, Token};
use crate::io::LiveDir;
use crate::seal::{beside, seal};
use crate::source::OpenHere;
use crate::source::http::{Network, NoCredentials, Proxies};
use crate::store::pools::{NoPools, OpenPools};
use crate::store::{BaseNode, NewDisk, PreloadedRecords, Store, StoreError, StoreErrorKind as Kind};

const SIZE: usize = 100_000;

struct House {
    dir: TempDir,
    store: Arc<Store>,
    bases: Bases,
}

impl House {
    fn new() -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        Self::reopened(dir)
    }

    fn reopened(dir: TempDir) -> Self {
        Self::configured(dir, |_| {})
    }

    fn configured(dir: TempDir, change: impl FnOnce(&mut Config)) -> Self {
        Self::opened(dir, change, &NoPools)
    }

    fn opened(dir: TempDir, change: impl FnOnce(&mut Config), pools: &dyn OpenPools) -> Self {
        let root = dir.path().join("store");
        fs::create_dir_all(&root).unwrap();
        let mut config = config(&root);
        change(&mut config);
        let events = Events::new();
        let network = Network::prepare(&config.http, Proxies::from_variables(|_| None));
        let kept = OpenCache::open(&config, &events).unwrap();
        let sources = HostSources::new(
            Arc::new(OpenHere),
            &config.http,
            &network,
            Arc::new(NoCredentials),
            kept,
            events.clone(),
        );
        let sources = Arc::new(sources.unwrap());
        let live = LiveDir::new(&dir.path().join("live")).unwrap();
        let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
        let prepared = (PreloadedRecords::default(), pools);
        let store =
            Store::open_with_pools(&root, |_| Ok(Arc::new(live)), cache, None, sources.clone(), prepared);
        let store = Arc::new(store.unwrap());
        let of = store.clone();
        sources.settle_within(move || of.bases().iter().map(|base| base.current()).collect()).unwrap();
        let hydrations = Hydrations::new(store.clone(), sources.clone(), events, None);
        let keeper = Keeper::start(store.clone(), sources.clone()).unwrap();
        let bases = Bases::new(store.clone(), sources, hydrations, keeper, dir.path().join("mount"), false);
        Self { dir, store, bases }
    }

    fn image(&self, name: &str, byte: u8) -> PathBuf {
        let path = self.dir.path().join(name);
        fs::write(&path, vec![byte; SIZE]).unwrap();
        path
    }

    fn add(&self, new: Description) -> Result<Arc<BaseNode>, StoreError> {
        let prepared = self.bases.sources().handle().block_on(self.bases.prepare(new))?;
        self.bases.add(prepared)
    }

    /// Hydrates a base and waits until that is done.
    fn hydrated(&self, name: &str) -> Arc<BaseNode> {
        let base = self.bases.hydrate(name, None).unwrap();
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            let progress = self.bases.progress(base.id()).unwrap();
            if progress.has_ended() {
                assert_eq!(progress.state, State::Done, "{progress:?}");
                return base;
            }
            assert!(Instant::now() < end, "{progress:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Cached bytes of a base.
    fn kept(&self, base: &BaseNode) -> u64 {
        let contents = self.bases.sources().contents(base.record(), &base.record().image);
        contents.cached_bytes(Reach::Proven)
    }
}

fn config(root: &std::path::Path) -> Config {
    let flags =
        Overrides { store: Some(root.to_owned()), cache_disk: Some(64 << 20), ..Overrides::default() };
    Config::load(None, flags).unwrap()
}

/// A raw image of this host.
fn raw(name: &str, path: &std::path::Path) -> Description {
    Description {
        name: name.into(),
        image: File { source: path.to_str().unwrap().into(), mirrors: Vec::new(), format: None },
        backing: Vec::new(),
        onto: None,
        digest: None,
        proof: Wanted::default(),
        strictness: Strictness::Strong,
        deadline_s: None,
        max_requests: None,
        max_rate: None,
        pinned: false,
        delivery: super::Delivery::Ranges,
        token: None,
    }
}

fn with_digest(name: &str, path: &std::path::Path) -> Description {
    let digest = Sha256::digest(fs::read(path).unwrap());
    Description { digest: Some(Digest::Sha256(digest.into())), ..raw(name, path) }
}

#[track_caller]
fn refused<T>(result: Result<T, StoreError>, kind: Kind, part: &str) {
    let error = result.err().expect("it is refused");
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(part), "{error}");
}

fn state(house: &House, base: &Arc<BaseNode>) -> BaseState {
    let finding = house.bases.examine(std::slice::from_ref(base)).remove(0);
    house.bases.condition(base, finding).state
}

#[test]
fn an_invalid_description_is_refused_before_a_file_is_opened() {
    let house = House::new();
    let new = raw("b", &house.dir.path().join("none"));
    let day = 24 * 3600;
    for (bad, part) in [
        (Description { deadline_s: Some(367 * day), ..new.clone() }, "deadline"),
        (Description { max_requests: Some(0), ..new.clone() }, "max_requests"),
        (Description { max_requests: Some(257), ..new.clone() }, "max_requests"),
        (Description { max_rate: Some(1), ..new.clone() }, "max_rate"),
        (Description { name: "a/b".into(), ..new.clone() }, "1 to 128"),
    ] {
        refused(house.add(bad), Kind::Invalid, part);
    }
    let mirrored = File { mirrors: vec!["http://h/".into()], ..new.image.clone() };
    refused(house.add(Description { image: mirrored, ..new.clone() }), Kind::Invalid, "mirrors are of URLs");
    let ftp = File { source: "ftp://h/a".into(), ..new.image.clone() };
    refused(house.add(Description { image: ftp, ..new.clone() }), Kind::Invalid, "one of http, https");
    refused(house.add(new), Kind::Invalid, "none");
    assert!(house.store.bases().is_empty());
}

#[test]
fn the_name_decides_the_format_where_none_is_given_and_the_contents_never_do() {
    let house = House::new();
    let path = house.image("looks-like.qcow2", 7);
    refused(house.add(raw("b", &path)), Kind::Invalid, "qcow2");
    let mut as_raw = raw("b", &path);
    as_raw.image.format = Some(ImageFormat::Raw);
    assert_eq!(house.add(as_raw).unwrap().record().image.format, ImageFormat::Raw);
}

#[test]
fn a_raw_base_that_begins_as_another_format_has_to_be_meant() {
    let house = House::new();
    for (name, head, remedy) in [
        ("plain", b"QFI\xfb".as_slice(), "--format qcow2"),
        ("plain.raw", b"KDMV", "--format vmdk"),
        ("disk.img", b"vhdxfile", "qemu-img convert"),
        ("disk.raw.gz", &[0x1f, 0x8b, 0x08], "decompress it"),
    ] {
        let path = house.image(name, 0);
        fs::write(&path, [head, &[0; 4096]].concat()).unwrap();
        refused(house.add(raw("b", &path)), Kind::Invalid, remedy);
        refused(house.add(raw("b", &path)), Kind::Invalid, "--format raw");
        let mut meant = raw("b", &path);
        meant.image.format = Some(ImageFormat::Raw);
        assert_eq!(house.add(meant).unwrap().record().image.format, ImageFormat::Raw);
        house.bases.remove("b").unwrap();
    }
}

#[test]
fn a_file_on_the_own_mount_is_refused() {
    let house = House::new();
    let mount = house.dir.path().join("mount");
    fs::create_dir(&mount).unwrap();
    let inside = mount.join("a.raw");
    fs::write(&inside, [1; 4096]).unwrap();
    std::os::unix::fs::symlink(&inside, house.dir.path().join("link")).unwrap();
    for path in [inside, house.dir.path().join("link")] {
        refused(house.add(raw("b", &path)), Kind::Invalid, "own mount");
    }
}

#[test]
fn the_same_request_adds_a_base_once() {
    let house = House::new();
    let path = house.image("a", 1);
    let new = |byte| Description { token: Some(Token::of_hash([byte; 16])), ..raw("b", &path) };
    let made = house.add(new(1)).unwrap().id();
    // Also when the image is gone by then.
    fs::remove_file(&path).unwrap();
    assert_eq!(house.add(new(1)).unwrap().id(), made);
    refused(house.add(new(2)), Kind::Exists, "base b");
    let prepared = house.bases.sources().handle().block_on(house.bases.prepare(new(1)));
    assert!(matches!(prepared, Ok(PreparedBase::Known(_))));
}

#[test]
fn a_base_that_a_disk_needs_is_not_removed() {
    let house = House::new();
    let base = house.add(raw("b", &house.image("a", 1))).unwrap();
    let (name, base_name) = ("vm".to_owned(), Some("b".to_owned()));
    house
        .store
        .create_disks(&[NewDisk {
            name,
            base: base_name,
            size: None,
            mode: 0o600,
            uid: 0,
            gid: 0,
            limits: Default::default(),
        }])
        .unwrap();
    assert_eq!(house.bases.users(&base), 1);
    refused(house.bases.remove("b"), Kind::InUse, "disk vm");
    let id = house.store.unlink("vm").unwrap().id();
    house.store.purge(id).unwrap();
    house.bases.remove("b").unwrap();
    refused(house.bases.remove("b"), Kind::NotFound, "base b");
}

#[test]
fn a_hydrated_base_is_served_from_its_copy_which_is_evicted_only_when_the_original_is_there() {
    let house = House::new();
    let path = house.image("a", 1);
    house.add(with_digest("b", &path)).unwrap();
    assert_eq!(house.bases.kept_files(&house.store.base("b").unwrap()).count(), 0);
    let base = house.hydrated("b");
    assert_eq!(house.bases.progress(base.id()).unwrap().digest_matches, Some(true));
    assert_eq!(house.kept(&base), SIZE as u64);
    let away = path.with_extension("away");
    fs::rename(&path, &away).unwrap();
    assert_eq!(state(&house, &base), BaseState::Ok);
    // The copy is the last one.
    refused(house.bases.evict("b", LastCopy::Keep), Kind::Invalid, "may be the last one");
    assert_eq!(house.kept(&base), SIZE as u64);
    let House { dir, store, bases } = house;
    store.close().unwrap();
    drop((store, bases, base));
    let house = House::reopened(dir);
    let base = house.store.base("b").unwrap();
    assert_eq!(state(&house, &base), BaseState::Ok);
    fs::rename(&away, &path).unwrap();
    assert_eq!(house.bases.evict("b", LastCopy::Keep).unwrap(), Evicted { dropped: SIZE as u64, shared: 0 });
    assert!(!base.options().hydrate);
    assert_eq!(state(&house, &base), BaseState::Ok);
    // From here on the base is the original file.
    fs::write(&path, [2; 10]).unwrap();
    assert_eq!(state(&house, &base), BaseState::Failed);
}

#[test]
fn the_last_copy_of_a_base_is_dropped_when_the_operator_accepts_the_loss() {
    let house = House::new();
    let path = house.image("a", 1);
    house.add(with_digest("b", &path)).unwrap();
    let base = house.hydrated("b");
    fs::remove_file(&path).unwrap();
    refused(house.bases.evict("b", LastCopy::Keep), Kind::Invalid, "--force");
    assert_eq!(house.bases.evict("b", LastCopy::Drop).unwrap().dropped, SIZE as u64);
    assert_eq!(house.kept(&base), 0);
}

#[test]
fn contents_that_two_bases_share_are_dropped_with_the_last_that_retains_them() {
    let house = House::new();
    let path = house.image("a", 1);
    for name in ["one", "two"] {
        house.add(with_digest(name, &path)).unwrap();
    }
    let (one, two) = (house.hydrated("one"), house.hydrated("two"));
    let dropped = house.bases.evict("one", LastCopy::Keep).unwrap();
    assert_eq!(dropped.shared + dropped.dropped, SIZE as u64, "{dropped:?}");
    assert_eq!(house.kept(&two), SIZE as u64);
    house.bases.remove("one").unwrap();
    assert_eq!(house.kept(&two), SIZE as u64);
    assert_eq!(house.bases.evict("two", LastCopy::Keep).unwrap().shared, 0);
    assert_eq!(house.kept(&two), 0);
    drop(one);
}

#[test]
fn operations_that_a_base_does_not_support_are_refused() {
    let house = House::new();
    house.add(raw("b", &house.image("a", 1))).unwrap();
    refused(house.bases.hydrate("b", Some(0)), Kind::Invalid, "rate");
    refused(house.bases.give_up("b", true), Kind::Invalid, "file of this host");
    for result in
        [house.bases.hydrate("none", None), house.bases.verify("none"), house.bases.pin("none", true, None)]
    {
        refused(result, Kind::NotFound, "base none");
    }
    let prepare = |number| {
        let moving = house.bases.prepare_move("b", number, "http://127.0.0.1:1/".into(), None);
        house.bases.sources().handle().block_on(moving)
    };
    refused(prepare(0), Kind::Invalid, "file of this host");
    refused(prepare(1), Kind::Invalid, "it has 1 files");
    assert!(house.bases.pin("b", true, None).unwrap().options().pinned);
    assert!(!house.bases.pin("b", false, None).unwrap().options().pinned);
}

// Regression: it said that the cache was too small, and named --cache-disk, when a write of a reader had found room
// meanwhile.
#[test]
fn a_hydration_that_finds_no_room_names_the_bound_and_its_remedy() {
    // Bytes that the cache may have, and those that must stay free.
    let bounds = [(64 << 20, u64::MAX / 2, "[cache] disk_free"), (SIZE as u64 * 3 / 2, 0, "--cache-disk")];
    for (limit, floor, remedy) in bounds {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let house = House::configured(dir, |config| {
            (config.cache_disk, config.cache_disk_free) = (Some(limit), Some(floor));
        });
        if floor == 0 {
            // It fills most of the cache, and stays.
            house.add(raw("other", &house.image("other.raw", 8))).unwrap();
            house.hydrated("other");
        }
        let base = house.add(raw("b", &house.image("b.raw", 7))).unwrap();
        house.bases.hydrate("b", None).unwrap();
        let contents = house.bases.sources().contents(base.record(), &base.record().image);
        let end = Instant::now() + Duration::from_secs(60);
        // More than one round of the hydration.
        let mut said = Vec::new();
        while said.len() < 100 {
            // As after a write that found room.
            contents.disk_answers(true);
            let progress = house.bases.progress(base.id()).unwrap();
            if let Some(why) = progress.error {
                assert!(why.contains(remedy), "{why}");
                assert_eq!(why.contains("--cache-disk"), remedy == "--cache-disk", "{why}");
                said.push(why);
            }
            assert!(Instant::now() < end, "{:?}", progress.state);
            std::thread::sleep(Duration::from_millis(20));
        }
        house.bases.cancel_job("hydrate-b").unwrap();
    }
}

#[test]
fn a_wrong_digest_of_one_base_drops_no_contents_that_are_right_by_the_proof_of_another() {
    let house = House::new();
    let path = house.image("a", 1);
    seal(&path, &beside(&path), &mut |_| true).unwrap();
    let right = house.add(raw("right", &path)).unwrap();
    house.hydrated("right");
    assert_eq!(house.kept(&right), SIZE as u64);
    let wrong = Description { digest: Some(Digest::Sha256([9; 32])), ..raw("wrong", &path) };
    let wrong = house.add(wrong).unwrap();
    house.bases.hydrate("wrong", None).unwrap();
    let end = Instant::now() + Duration::from_secs(60);
    let progress = loop {
        let progress = house.bases.progress(wrong.id()).unwrap();
        // The only copy of the image, for the guests of the other base.
        assert_eq!(house.kept(&right), SIZE as u64, "{progress:?}");
        if progress.has_ended() {
            break progress;
        }
        assert!(Instant::now() < end, "{progress:?}");
        std::thread::sleep(Duration::from_millis(1));
    };
    assert_eq!((progress.state, progress.digest_matches), (State::Failed, Some(false)));
    let why = progress.error.unwrap();
    assert!(why.contains("BLAKE3") && why.contains("SHA-256"), "{why}");
    assert!(wrong.options().refused && !right.options().refused);
}
