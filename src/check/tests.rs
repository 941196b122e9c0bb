//! Breaks every invariant on purpose. The check must report it, and repair it where no guess is needed.

mod corruption;
mod layers;
mod pools;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tempfile::TempDir;

use super::{CheckError, Finding, Repair, Report, run, run_with_runtime_dir};
use crate::cache::BlockCache;
use crate::format::record::{BaseRecord, DiskRecord, Superblock};
use crate::io::{LiveDir, LiveStore};
use crate::store::{NewDisk, Store};

struct TestStore {
    tmp: TempDir,
}

fn live_name(store: &Path) -> String {
    let superblock = Superblock::decode(&fs::read(store.join("plyfs.store")).unwrap()).unwrap();
    let uuid: String = superblock.uuid[..4].iter().map(|b| format!("{b:02x}")).collect();
    let meta = fs::metadata(store).unwrap();
    format!("plyfs-{uuid}-{}-{}", meta.dev(), meta.ino())
}

impl TestStore {
    /// A store with base `b` and disks `one` (8 KiB on it, block 1 written) and `two` (blank, never written).
    fn new() -> Self {
        let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
        let fixture = Self { tmp };
        fs::create_dir(fixture.store()).unwrap();
        fs::create_dir(fixture.runtime()).unwrap();
        fs::write(fixture.tmp.path().join("b.raw"), [7; 8192]).unwrap();
        let store = fixture.open();
        store.add_base("b", fixture.tmp.path().join("b.raw").to_str().unwrap(), None).unwrap();
        store.create_disks(&[disk("one", Some("b")), disk("two", None)]).unwrap();
        write(&store, "one");
        store.close().unwrap();
        drop(store);
        fixture.assert_clean();
        fixture
    }
    fn store(&self) -> PathBuf {
        self.tmp.path().join("store")
    }
    fn runtime(&self) -> PathBuf {
        self.tmp.path().join("run")
    }
    fn open(&self) -> Store {
        let live = |_: &Superblock| {
            let dir = self.runtime().join(live_name(&self.store()));
            Ok(Arc::new(LiveDir::new(&dir)?) as Arc<dyn LiveStore>)
        };
        Store::open(&self.store(), live, Arc::new(BlockCache::new(1 << 20).unwrap()), None).unwrap()
    }
    fn check(&self, repair: Repair) -> Report {
        run_with_runtime_dir(&self.store(), &self.runtime(), repair).unwrap()
    }
    fn assert_clean(&self) {
        assert_eq!(self.check(Repair::No).findings, []);
    }
    /// Asserts a finding, by its number and a part of its text, that a repair does not remove.
    fn assert_lasting(&self, invariant: u32, part: &str) {
        for repair in [Repair::No, Repair::Yes] {
            let findings = self.check(repair).findings;
            let found = findings.iter().find(|f| f.invariant == invariant).expect("a finding");
            assert!(
                !found.repaired && format!("{} {}", found.object, found.message).contains(part),
                "{findings:?}"
            );
        }
    }
    /// Asserts that there is one finding, and that only a check with repair repairs it.
    fn assert_repaired(&self, invariant: u32, part: &str) {
        for _ in 0..2 {
            let findings = self.check(Repair::No).findings;
            assert!(is_one(&findings, invariant, part) && !findings[0].repaired, "{findings:?}");
        }
        let findings = self.check(Repair::Yes).findings;
        assert!(is_one(&findings, invariant, part) && findings[0].repaired, "{findings:?}");
    }
    fn path(&self, name: &str) -> PathBuf {
        self.store().join(name)
    }
    fn id(&self, name: &str) -> u64 {
        let record = |file: fs::DirEntry| DiskRecord::decode(&fs::read(file.path()).unwrap()).unwrap();
        let mut all = fs::read_dir(self.path("disks")).unwrap().map(|f| record(f.unwrap()));
        all.find(|r| r.name == name).unwrap().id
    }
    fn change(&self, name: &str, change: impl FnOnce(&mut DiskRecord)) {
        let path = self.path(&format!("disks/{}.disk", self.id(name)));
        let mut record = DiskRecord::decode(&fs::read(&path).unwrap()).unwrap();
        change(&mut record);
        fs::write(path, record.encode()).unwrap();
    }
    fn map(&self, name: &str) -> PathBuf {
        self.path(&format!("deltas/{}.1.map", self.id(name)))
    }
    fn data(&self, name: &str) -> PathBuf {
        self.path(&format!("deltas/{}.data", self.id(name)))
    }
}

fn is_one(findings: &[Finding], invariant: u32, part: &str) -> bool {
    findings.len() == 1
        && findings[0].invariant == invariant
        && format!("{} {}", findings[0].object, findings[0].message).contains(part)
}

fn disk(name: &str, base: Option<&str>) -> NewDisk {
    NewDisk {
        name: name.into(),
        base: base.map(Into::into),
        size: Some(8192),
        mode: 0o600,
        uid: 0,
        gid: 0,
        limits: Default::default(),
    }
}

fn write(store: &Store, name: &str) {
    let node = store.disk(name).unwrap();
    let disk = node.attach().unwrap();
    disk.delta().write(4096, &[1; 4096], &crate::delta::Edges::default()).unwrap();
    disk.delta().flush().unwrap();
}

fn flip(path: &Path, at: usize) {
    let mut bytes = fs::read(path).unwrap();
    bytes[at] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_path_that_is_no_store_is_refused_and_left_unchanged() {
    let tmp = tempfile::tempdir().unwrap();
    let file = tmp.path().join("file");
    fs::write(&file, "x").unwrap();
    for path in [tmp.path(), &tmp.path().join("missing"), &file] {
        let error = run(path, true).unwrap_err();
        assert!(matches!(error, CheckError::NoStore { .. }), "{error}");
        assert!(error.to_string().contains("plyfs.store"), "{error}");
    }
    assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
}

#[test]
fn a_store_in_use_is_refused() {
    let fixture = TestStore::new();
    assert_eq!(fs::metadata(fixture.path("lock")).unwrap().permissions().mode() & 0o777, 0o600);
    let held = fs::File::open(fixture.path("lock")).unwrap();
    assert!(crate::io::sys::try_lock(&held).unwrap());
    let error = run(&fixture.store(), false).unwrap_err().to_string();
    let path = fixture.store().display().to_string();
    assert_eq!(
        error,
        format!("a daemon is running on store {path}; stop it first: plyfs stop --store {path}")
    );
    drop(held);
    fixture.assert_clean();
}

#[test]
fn invariant_1_a_damaged_or_newer_superblock_is_reported() {
    let fixture = TestStore::new();
    flip(&fixture.path("plyfs.store"), 50);
    fixture.assert_lasting(1, "plyfs.store");
    let fixture = TestStore::new();
    let mut bytes = fs::read(fixture.path("plyfs.store")).unwrap();
    bytes[8] = 2;
    let end = bytes.len() - 4;
    let sum = crc32c::crc32c(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&sum);
    fs::write(fixture.path("plyfs.store"), bytes).unwrap();
    let error = run(&fixture.store(), true).unwrap_err();
    assert!(matches!(error, CheckError::Newer { .. }) && error.to_string().contains("newer"), "{error}");
    let fixture = TestStore::new();
    fs::remove_dir_all(fixture.path("bases")).unwrap();
    fixture.assert_lasting(1, "bases/");
}

#[test]
fn invariant_2_a_next_number_that_is_in_use_is_repaired() {
    let fixture = TestStore::new();
    let path = fixture.path("plyfs.store");
    let mut superblock = Superblock::decode(&fs::read(&path).unwrap()).unwrap();
    superblock.next_id = 2;
    fs::write(&path, superblock.encode()).unwrap();
    fixture.assert_repaired(2, "number 3 is in use");
    fixture.assert_clean();
    assert!(Superblock::decode(&fs::read(&path).unwrap()).unwrap().next_id > 3);
}

#[test]
fn invariant_3_damaged_records_are_reported() {
    let fixture = TestStore::new();
    let two = format!("disks/{}.disk", fixture.id("two"));
    flip(&fixture.path(&two), 60);
    fixture.assert_lasting(3, &two);
    assert_eq!(fixture.check(Repair::Yes).findings.len(), 1);
    fs::remove_file(fixture.path(&two)).unwrap();
    symlink("/etc/passwd", fixture.path(&two)).unwrap();
    fixture.assert_lasting(3, &two);

    let fixture = TestStore::new();
    flip(&fixture.path(&format!("disks/{}.disk", fixture.id("one"))), 60);
    assert_eq!(fixture.check(Repair::Yes).findings.len(), 1, "no file of a damaged disk is removed");
}

#[test]
fn invariant_4_a_record_under_another_number_is_reported() {
    let fixture = TestStore::new();
    fs::copy(fixture.path(&format!("disks/{}.disk", fixture.id("two"))), fixture.path("disks/77.disk"))
        .unwrap();
    fixture.assert_lasting(4, "disks/77.disk");
}

#[test]
fn invariant_5_of_two_disks_with_one_name_the_older_loses_it() {
    let fixture = TestStore::new();
    fixture.change("two", |r| r.name = "one".into());
    fixture.assert_repaired(5, "disk one");
    fixture.assert_repaired(12, "disk one");
    fixture.assert_clean();
    assert_eq!(fs::read_dir(fixture.path("disks")).unwrap().count(), 1);

    let fixture = TestStore::new();
    fixture.change("two", |r| {
        r.name = "one".into();
        r.name_seq = 1;
    });
    fixture.assert_lasting(5, "no order");
}

#[test]
fn invariant_5_a_replaced_disk_does_not_come_back_when_its_replacement_is_removed() {
    let fixture = TestStore::new();
    let two = fixture.path(&format!("disks/{}.disk", fixture.id("two")));
    fixture.change("two", |r| {
        r.name = "one".into();
        r.unlinked = true;
    });
    let findings = fixture.check(Repair::Yes).findings;
    assert!(findings.iter().any(|f| f.invariant == 5 && f.repaired), "{findings:?}");
    fixture.check(Repair::Yes);
    fixture.assert_clean();
    assert!(!two.exists());
}

#[test]
fn invariant_6_a_disk_without_its_version_of_the_base_is_reported() {
    let fixture = TestStore::new();
    fixture.change("one", |r| Arc::make_mut(&mut r.backing.as_mut().unwrap().identity).size += 1);
    fixture.assert_lasting(6, "another version of base b");
    let fixture = TestStore::new();
    fixture.change("one", |r| r.backing.as_mut().unwrap().base = 99);
    fixture.assert_lasting(6, "bases/99.base");
}

#[test]
fn invariant_7_a_changed_source_of_a_base_is_reported() {
    let fixture = TestStore::new();
    let source = fixture.tmp.path().join("b.raw");
    fs::write(&source, [8; 8192]).unwrap();
    fixture.assert_lasting(7, "modified");
    fs::write(&source, [8; 100]).unwrap();
    fixture.assert_lasting(7, "100 bytes");
    fs::remove_file(&source).unwrap();
    fixture.assert_lasting(7, source.to_str().unwrap());
}

#[test]
fn invariant_8_a_damaged_map_file_is_reported() {
    let fixture = TestStore::new();
    let whole = fs::read(fixture.map("one")).unwrap();
    flip(&fixture.map("one"), 100);
    fixture.assert_lasting(8, ".1.map");
    fs::write(fixture.map("one"), &whole[..70]).unwrap();
    fixture.assert_lasting(8, ".1.map");
    // While the map is damaged, another generation may be the only copy.
    let other = fixture.path(&format!("deltas/{}.2.map", fixture.id("one")));
    fs::write(&other, &whole).unwrap();
    fixture.check(Repair::Yes);
    assert!(other.exists());
    fs::remove_file(&other).unwrap();
    fs::remove_file(fixture.map("one")).unwrap();
    fixture.assert_lasting(8, ".1.map");
}

#[test]
fn a_torn_tail_is_no_finding() {
    let fixture = TestStore::new();
    let mut bytes = fs::read(fixture.map("one")).unwrap();
    let floor = fs::read(fixture.path(&format!("disks/{}.disk", fixture.id("one")))).unwrap();
    let floor = DiskRecord::decode(&floor).unwrap().map.floor as usize;
    bytes.resize(floor + 4096, 0);
    bytes[floor + 9] = 1;
    fs::write(fixture.map("one"), bytes).unwrap();
    let report = fixture.check(Repair::No);
    assert_eq!(report.findings, []);
    assert!(
        report.checked.iter().any(|(what, n)| what.contains("torn flush") && *n == 1),
        "{:?}",
        report.checked
    );
}

#[test]
fn invariant_9_an_overlap_that_grows_is_reported() {
    let fixture = TestStore::new();
    fixture.change("one", |r| r.overlap = 4096);
    fixture.assert_lasting(9, "record 1");
}

#[test]
fn invariant_10_a_short_or_missing_data_file_is_reported() {
    let fixture = TestStore::new();
    let file = fs::OpenOptions::new().write(true).open(fixture.data("one")).unwrap();
    file.set_len(4097).unwrap();
    fixture.assert_clean();
    file.set_len(4096).unwrap();
    fixture.assert_lasting(10, "4096 bytes");
    fs::remove_file(fixture.data("one")).unwrap();
    fixture.assert_lasting(10, "missing");
}

#[test]
fn invariant_11_stray_files_are_removed() {
    let fixture = TestStore::new();
    let (one, two) = (fixture.id("one"), fixture.id("two"));
    for stray in [
        "plyfs.store.tmp".to_owned(),
        "bases/1.base.tmp".to_owned(),
        format!("disks/{two}.disk.tmp"),
        "disks/900.disk.tmp".to_owned(),
        format!("deltas/{one}.2.map"),
        format!("deltas/{two}.1.map"),
        "deltas/900.data".to_owned(),
        "deltas/900.4.map".to_owned(),
    ] {
        fs::write(fixture.path(&stray), "").unwrap();
        let part =
            if stray.contains("900.disk") || !stray.contains("900") { &stray } else { "no disks/900.disk" };
        let number_taken = fixture.check(Repair::No).findings.iter().any(|f| f.invariant == 2);
        assert!(!number_taken);
        fixture.assert_repaired(11, part);
        assert!(!fixture.path(&stray).exists(), "{stray}");
        fixture.assert_clean();
    }
    fs::write(fixture.path("deltas/note"), "").unwrap();
    fixture.assert_lasting(11, "deltas/note");
    assert!(fixture.data("one").exists());
}

#[test]
fn invariant_11_data_without_a_record_is_kept() {
    let fixture = TestStore::new();
    let one = fixture.id("one");
    fs::remove_file(fixture.path(&format!("disks/{one}.disk"))).unwrap();
    fixture.assert_lasting(11, "restore that record");
    assert!(fixture.path(&format!("deltas/{one}.data")).exists());
    assert!(fixture.path(&format!("deltas/{one}.1.map")).exists());
}

#[test]
fn invariant_11_a_possible_last_copy_of_a_record_is_kept() {
    let fixture = TestStore::new();
    let path = fixture.path(&format!("disks/{}.disk", fixture.id("one")));
    let tmp = path.with_extension("disk.tmp");
    fs::copy(&path, &tmp).unwrap();
    flip(&path, 60);
    fixture.check(Repair::Yes);
    assert!(tmp.exists());
}

#[test]
fn invariant_12_the_files_of_an_unlinked_disk_are_removed() {
    let fixture = TestStore::new();
    let one = fixture.id("one");
    fixture.open().unlink("one").unwrap();
    fixture.assert_repaired(12, "disk one");
    fixture.assert_clean();
    for gone in [format!("disks/{one}.disk"), format!("deltas/{one}.data"), format!("deltas/{one}.1.map")] {
        assert!(!fixture.path(&gone).exists(), "{gone}");
    }
}

/// Guards D82.
#[test]
fn a_repair_keeps_a_disk_in_the_trash_and_checks_it() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.keep_removed_for(std::time::Duration::from_secs(3600));
    store.unlink("one").unwrap();
    drop(store);
    fixture.assert_clean();
    fixture.check(Repair::Yes);
    assert!(fixture.data("one").exists());
    fs::remove_file(fixture.data("one")).unwrap();
    fixture.assert_lasting(10, "one");
}

#[test]
fn a_disk_with_a_live_map_is_not_repaired() {
    let fixture = TestStore::new();
    let store = fixture.open();
    write(&store, "one");
    store
        .disk("one")
        .unwrap()
        .attach()
        .unwrap()
        .delta()
        .write(0, &[2; 4096], &crate::delta::Edges::default())
        .unwrap();
    let one = fixture.id("one");
    // Without a close, as after a crash.
    drop(store);
    let report = fixture.check(Repair::Yes);
    assert_eq!(report.findings, []);
    assert!(report.checked.iter().any(|(what, n)| what.starts_with("live maps") && *n == 1));
    fixture.open().unlink("one").unwrap();
    fixture.assert_lasting(12, "live map");
    assert!(fixture.data("one").exists());
    fs::write(fixture.path(&format!("deltas/{one}.9.map")), "").unwrap();
    fixture.assert_lasting(11, "live map");
    // Also when the superblock, which identifies the live maps, is damaged.
    flip(&fixture.path("plyfs.store"), 50);
    fixture.assert_lasting(12, "live map");
}

#[test]
fn nothing_is_written_without_repair() {
    let fixture = TestStore::new();
    let state = || {
        let mut all = Vec::new();
        for dir in ["", "bases", "disks", "deltas"] {
            for entry in fs::read_dir(fixture.path(dir)).unwrap().map(|e| e.unwrap()) {
                let meta = entry.metadata().unwrap();
                all.push((entry.path(), meta.ino(), meta.mtime_nsec(), meta.len()));
            }
        }
        all.sort();
        all
    };
    fixture.open().unlink("one").unwrap();
    fs::write(fixture.path("disks/900.disk.tmp"), "").unwrap();
    let before = state();
    assert_eq!(fixture.check(Repair::No).findings.len(), 2);
    assert_eq!(state(), before);
}

#[test]
fn damage_anywhere_is_reported_and_causes_no_panic() {
    let fixture = TestStore::new();
    let base = fs::read_dir(fixture.path("bases")).unwrap().next().unwrap().unwrap().path();
    BaseRecord::decode(&fs::read(&base).unwrap()).unwrap();
    let record = fixture.path(&format!("disks/{}.disk", fixture.id("one")));
    for path in [base, record, fixture.map("one"), fixture.path("plyfs.store")] {
        let whole = fs::read(&path).unwrap();
        for at in (0..whole.len().min(300)).step_by(3) {
            flip(&path, at);
            let report = run_with_runtime_dir(&fixture.store(), &fixture.runtime(), Repair::No);
            assert!(report.is_err() || !report.unwrap().findings.is_empty(), "{path:?} {at}");
            fs::write(&path, &whole).unwrap();
        }
    }
    fixture.assert_clean();
}

#[test]
fn invariant_5_a_replaced_disk_with_a_stray_of_its_record_is_repaired_in_one_run() {
    let fixture = TestStore::new();
    let two = fixture.id("two");
    fixture.change("two", |record| {
        record.name = "one".into();
        record.name_seq += 10;
    });
    // A power cut interrupted the write of the replaced disk's record.
    let mut one = fs::read_dir(fixture.path("disks")).unwrap().map(|f| f.unwrap().path());
    let one = one.find(|p| p.file_stem().unwrap().to_str() != Some(&two.to_string())).unwrap();
    fs::write(one.with_extension("disk.tmp"), b"half").unwrap();
    let findings = fixture.check(Repair::Yes).findings;
    assert!(findings.len() == 2 && findings.iter().all(|f| f.repaired), "{findings:?}");
    // The next run removes the disk without a name.
    fixture.assert_repaired(12, "was removed");
    fixture.assert_clean();
}

#[test]
fn the_persistent_cache_is_checked_and_a_repair_removes_damaged_blocks() {
    use crate::fetch::kept::{CACHE_BLOCK, CacheObserver, DiskCache, EvictReason, Limits, SourceKey};
    struct NoObserver;
    impl CacheObserver for NoObserver {
        fn evicted(&self, _: &SourceKey, _: u64, _: EvictReason) {}
        fn degraded(&self, why: Option<&str>) {
            panic!("{why:?}");
        }
    }
    let fixture = TestStore::new();
    let open = || {
        let medium = Arc::new(crate::io::HostMedium::new(&fixture.store()).unwrap());
        DiskCache::open(
            medium,
            Limits { bytes: Some(1 << 20), bases: None, free_floor: 0 },
            Arc::new(NoObserver),
        )
    };
    let key = SourceKey([5; 32]);
    open().attach(key, 3 * CACHE_BLOCK).insert(0, &[9; 3 * CACHE_BLOCK as usize]);
    fixture.assert_clean();
    let verifying = |repair| {
        let verify = super::VerifyBases::Yes;
        super::run_verifying(&fixture.store(), &fixture.runtime(), repair, verify).unwrap().findings
    };
    assert_eq!(verifying(Repair::No), []);
    let blocks = fixture.store().join(format!("cache/{key}.blocks"));
    let mut bytes = fs::read(&blocks).unwrap();
    bytes[CACHE_BLOCK as usize] = 8;
    fs::write(&blocks, bytes).unwrap();
    fixture.assert_clean();
    let found = verifying(Repair::No);
    assert!(
        found.len() == 1 && found[0].invariant == 14 && found[0].message.contains("block 1"),
        "{found:?}"
    );
    assert!(verifying(Repair::Yes)[0].repaired);
    assert_eq!(verifying(Repair::No), []);
    assert_eq!(open().attach(key, 3 * CACHE_BLOCK).present_run(0, 9), 1);
    fs::write(fixture.store().join(format!("cache/{key}.sums")), "?").unwrap();
    assert_eq!(fixture.check(Repair::No).findings[0].invariant, 14, "the structure is always checked");
    fixture.check(Repair::Yes);
    assert_eq!(fs::read_dir(fixture.store().join("cache")).unwrap().count(), 0);
    fixture.assert_clean();
}
