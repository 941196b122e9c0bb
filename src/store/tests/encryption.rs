//! Encrypted disks of a store.

use zeroize::Zeroizing;

use super::family::{blocks, put, read_all, read_snapshot};
use super::*;
use crate::format::encryption::KeySource;
use crate::store::{CopySource, Origin, Secrets};

/// Secrets by their names.
#[derive(Default)]
struct Known(Mutex<Vec<(String, Vec<u8>)>>);

impl Known {
    fn set(&self, name: &str, secret: Option<&[u8]>) {
        let mut known = self.0.lock();
        known.retain(|(other, _)| other != name);
        known.extend(secret.map(|secret| (name.to_owned(), secret.to_vec())));
    }
}

impl Secrets for Known {
    fn secret(&self, source: &KeySource) -> Result<Zeroizing<Vec<u8>>, String> {
        let known = self.0.lock();
        let found = known.iter().find(|(name, _)| source == &named(name));
        found.map(|(_, secret)| Zeroizing::new(secret.clone())).ok_or_else(|| "it is not there".into())
    }
}

fn named(name: &str) -> KeySource {
    KeySource::Command(name.into())
}

const ONE: &[u8] = b"the first secret, with 32 bytes or more";
const TWO: &[u8] = b"the second secret, with 32 bytes or more";

struct Rig {
    fixture: TestStore,
    known: Arc<Known>,
}

impl Rig {
    /// A store with base `b`, and an encrypted disk `a` of 5 blocks on it.
    fn new() -> (Self, Store) {
        let (fixture, store) = TestStore::with_base();
        let rig = Self { fixture, known: Arc::default() };
        rig.known.set("one", Some(ONE));
        rig.known.set("two", Some(TWO));
        store.read_secrets_with(rig.known.clone());
        store.create_encrypted(&[on("b", "a", Some(5 * 4096))], &named("one"), None).unwrap();
        (rig, store)
    }
    fn open(&self) -> Store {
        let store = self.fixture.open();
        store.read_secrets_with(self.known.clone());
        store
    }
    /// Whether a file of the store has a run of `byte`, as [`put`] writes it.
    #[track_caller]
    fn assert_hidden(&self, bytes: &[u8]) {
        for dir in ["deltas", "disks", "."] {
            for name in self.fixture.files(dir) {
                let path = self.fixture.path(dir).join(&name);
                let Some(text) = path.is_file().then(|| fs::read(&path).unwrap()) else { continue };
                for byte in bytes {
                    assert!(!text.windows(24).any(|part| part == [*byte; 24]), "{dir}/{name} has {byte:#x}");
                }
                for secret in [ONE, TWO] {
                    assert!(!text.windows(16).any(|part| part == &secret[..16]), "{dir}/{name} has a secret");
                }
            }
        }
    }
    fn clone(&self, store: &Store, origin: &str, name: &str, key: &str) -> Result<(), StoreError> {
        let new = NewDisk { size: None, ..blank(name) };
        store.clone_encrypted(&Origin::parse(origin), &[new], &named(key), None).map(drop)
    }
}

/// Guards D86.
#[test]
fn no_plaintext_of_an_encrypted_disk_is_in_the_store() {
    let (rig, store) = Rig::new();
    put(&store, "a", 1, 0xa1);
    store.snapshot("a", "s", None).unwrap();
    put(&store, "a", 0, 0xa2);
    rig.clone(&store, "a", "c", "two").unwrap();
    put(&store, "c", 2, 0xa3);
    store.rollback("a", "s", None).unwrap();
    put(&store, "a", 3, 0xa4);
    let node = store.disk("a").unwrap();
    node.change(|disk| disk.write(4 * 4096 + 100, &[0xa5; 300], 0)).unwrap().unwrap();
    store.disk("a").unwrap().attach().unwrap().flush(0).unwrap();
    let all = [0xa1, 0xa2, 0xa3, 0xa4, 0xa5];
    rig.assert_hidden(&all);
    let look = |store: &Store| {
        assert_eq!(blocks(&read_all(store, "a")), [7, 0xa1, 0, 0xa4, 0]);
        assert_eq!(read_all(store, "a")[4 * 4096 + 100..][..301], [&[0xa5; 300][..], &[0]].concat());
        assert_eq!(blocks(&read_all(store, "c")), [0xa2, 0xa1, 0xa3, 0, 0]);
        assert_eq!(blocks(&read_snapshot(store, "a", "s")), [7, 0xa1, 0, 0, 0]);
    };
    look(&store);
    // After the death of the worker, and after a clean stop.
    drop(store);
    let store = rig.open();
    look(&store);
    store.close().unwrap();
    rig.assert_hidden(&all);
    look(&rig.open());
}

/// Guards D87.
#[test]
fn a_wrong_or_missing_secret_opens_nothing() {
    let (rig, store) = Rig::new();
    store.create_disks(&[on("b", "plain", None)]).unwrap();
    put(&store, "a", 1, 9);
    store.snapshot("a", "s", None).unwrap();
    store.close().unwrap();
    drop(store);
    for secret in [None, Some(TWO), Some(&b"short"[..]), Some(&[0; 64][..])] {
        rig.known.set("one", secret);
        let store = rig.open();
        let node = store.disk("a").unwrap();
        let error = node.attach().unwrap_err();
        assert!(matches!(error, StoreError::Locked { .. }), "{error}");
        assert_eq!(error.errno(), libc::ENOKEY);
        assert!(node.is_locked() && node.known_problem().unwrap().contains("locked"));
        assert!(store.open_snapshot("a", "s").is_err());
        assert_eq!(node.attributes().size, 5 * 4096);
        // The other disks work.
        put(&store, "plain", 0, 3);
        rig.known.set("one", Some(ONE));
        store.unlock("a").unwrap();
        assert_eq!(blocks(&read_all(&store, "a")), [7, 9, 0, 0, 0]);
        store.close().unwrap();
    }
}

/// A worker may die with a secret that the next one cannot read: what was written is not lost, and a stop is clean.
#[test]
fn a_store_with_a_locked_disk_that_was_in_use_is_closed() {
    let (rig, store) = Rig::new();
    put(&store, "a", 1, 9);
    drop(store);
    rig.known.set("one", None);
    let store = rig.open();
    store.close().unwrap();
    drop(store);
    rig.known.set("one", Some(ONE));
    assert_eq!(blocks(&read_all(&rig.open(), "a")), [7, 9, 0, 0, 0]);
}

#[test]
fn another_secret_takes_effect_without_writing_data() {
    let (rig, store) = Rig::new();
    put(&store, "a", 1, 9);
    store.snapshot("a", "s", None).unwrap();
    put(&store, "a", 2, 8);
    store.rekey("a", &named("two")).unwrap();
    rig.known.set("one", None);
    // Later keys are wrapped under the new secret too.
    store.snapshot("a", "t", None).unwrap();
    put(&store, "a", 3, 6);
    store.close().unwrap();
    drop(store);
    let store = rig.open();
    assert_eq!(blocks(&read_all(&store, "a")), [7, 9, 8, 6, 0]);
    assert!(store.rekey("a", &named("none")).is_err());
    store.close().unwrap();
    assert_eq!(blocks(&read_all(&rig.open(), "a")), [7, 9, 8, 6, 0]);
}

/// Guards D87.
#[test]
fn a_shredded_disk_is_gone_and_its_clone_stays() {
    let (rig, store) = Rig::new();
    put(&store, "a", 1, 9);
    rig.clone(&store, "a", "c", "two").unwrap();
    put(&store, "a", 2, 8);
    let id = store.disk("a").unwrap().id();
    let record = rig.fixture.path("disks").join(format!("{id}.disk"));
    // The file that the replacement removes.
    let old = fs::File::open(&record).unwrap();
    let before = fs::read(&record).unwrap();
    let encryption = DiskRecord::decode(&before).unwrap().features.encryption.unwrap();
    assert_eq!(encryption.keys.len(), 2);
    store.shred("a", false).unwrap();
    let after = fs::read(&record).unwrap();
    let (mut overwritten, mut reader) = (Vec::new(), &old);
    std::io::Read::read_to_end(&mut reader, &mut overwritten).unwrap();
    for key in &encryption.keys {
        for file in [&after, &overwritten] {
            assert!(!file.windows(16).any(|part| part == &key.wrapped[..16]), "a wrapped key is left");
        }
    }
    assert!(store.disk("a").is_err());
    // A worker that dies before the files are removed leaves a disk that opens with no secret.
    drop(store);
    let store = rig.open();
    let error = store.disk_by_id(id).unwrap().attach().unwrap_err();
    assert!(error.to_string().contains("shredded"), "{error}");
    store.purge(id).unwrap();
    assert_eq!(blocks(&read_all(&store, "c")), [7, 9, 0, 0, 0]);
    assert!(store.shred("c", false).is_ok());
    store.create_disks(&[blank("plain")]).unwrap();
    assert!(store.shred("plain", false).err().unwrap().to_string().contains("not encrypted"));
}

#[test]
fn a_clone_of_an_encrypted_disk_needs_a_secret_of_its_own() {
    let (rig, store) = Rig::new();
    put(&store, "a", 1, 9);
    let new = NewDisk { size: None, ..blank("c") };
    let error = store.clone_disks(&Origin::parse("a"), &[new], None).err().unwrap();
    assert!(error.to_string().contains("--key-file"), "{error}");
    assert!(rig.clone(&store, "a", "c", "none").is_err());
    assert!(store.disk("c").is_err());
    rig.clone(&store, "a", "c", "two").unwrap();
    store.close().unwrap();
    drop(store);
    // Each opens without the secret of the other.
    rig.known.set("one", None);
    let store = rig.open();
    assert_eq!(blocks(&read_all(&store, "c")), [7, 9, 0, 0, 0]);
    assert!(store.disk("a").unwrap().attach().is_err());
}

#[test]
fn an_encrypted_clone_of_a_plain_disk_encrypts_what_it_writes() {
    let (rig, store) = Rig::new();
    store.create_disks(&[on("b", "plain", Some(5 * 4096))]).unwrap();
    put(&store, "plain", 1, 3);
    rig.clone(&store, "plain", "c", "two").unwrap();
    put(&store, "c", 2, 0xa7);
    store.snapshot("c", "s", None).unwrap();
    put(&store, "c", 3, 0xa8);
    store.close().unwrap();
    rig.assert_hidden(&[0xa7, 0xa8]);
    drop(store);
    assert_eq!(blocks(&read_all(&rig.open(), "c")), [7, 3, 0xa7, 0xa8, 0]);
}

#[test]
fn a_copy_of_an_encrypted_disk_shares_no_blocks() {
    let (rig, store) = Rig::new();
    put(&store, "a", 1, 9);
    let empty = NewDisk { size: Some(1), ..blank("to") };
    store.create_disks(&[empty]).unwrap();
    let to = store.disk("to").unwrap();
    to.change(|disk| disk.resize(0)).unwrap().unwrap();
    let source = CopySource::Disk(store.disk("a").unwrap());
    assert!(store.share(&source, &to, None).unwrap().is_none());
    store.create_disks(&[on("b", "plain", Some(5 * 4096))]).unwrap();
    put(&store, "plain", 1, 9);
    let plain = CopySource::Disk(store.disk("plain").unwrap());
    store.create_encrypted(&[blank("dark")], &named("one"), None).unwrap();
    let dark = store.disk("dark").unwrap();
    dark.change(|disk| disk.resize(0)).unwrap().unwrap();
    assert!(store.share(&plain, &dark, None).unwrap().is_none());
    assert!(store.share(&plain, &to, None).unwrap().is_some());
    drop(rig);
}

#[test]
fn an_odd_end_and_growth_show_zeros() {
    let (rig, store) = Rig::new();
    let odd = NewDisk { size: Some(5000), ..blank("odd") };
    store.create_encrypted(&[odd], &named("one"), None).unwrap();
    let node = store.disk("odd").unwrap();
    let change = |call: &dyn Fn(&crate::disk::Disk) -> Result<(), crate::disk::DiskError>| {
        node.change(call).unwrap().unwrap();
    };
    change(&|disk| disk.write(0, &[5; 5000], 0));
    change(&|disk| disk.resize(4500));
    change(&|disk| disk.resize(9000));
    change(&|disk| disk.write(8999, &[6; 2], 0));
    change(&|disk| disk.zero(10, 20, 0));
    let wanted = || {
        let mut bytes = vec![5; 4500];
        bytes.resize(8999, 0);
        bytes.extend([6; 2]);
        bytes[10..30].fill(0);
        bytes
    };
    assert_eq!(read_all(&store, "odd"), wanted());
    drop(store);
    let store = rig.open();
    assert_eq!(read_all(&store, "odd"), wanted());
    store.close().unwrap();
    assert_eq!(read_all(&rig.open(), "odd"), wanted());
}
