//! Every invariant broken on purpose, named, and put right where no guess is needed.

mod corruption;

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

struct House {
    tmp: TempDir,
}

fn live_name(store: &Path) -> String {
    let superblock = Superblock::decode(&fs::read(store.join("plyfs.store")).unwrap()).unwrap();
    let uuid: String = superblock.uuid[..4].iter().map(|b| format!("{b:02x}")).collect();
    let meta = fs::metadata(store).unwrap();
    format!("plyfs-{uuid}-{}-{}", meta.dev(), meta.ino())
}

impl House {
    /// A store with base `b` and disks `one` (8 KiB on it, block 1 written) and `two` (blank, never written).
    fn new() -> Self {
        let tmp = tempfile::tempdir_in("/dev/shm").unwrap();
        let house = Self { tmp };
        fs::create_dir(house.store()).unwrap();
        fs::create_dir(house.runtime()).unwrap();
        fs::write(house.tmp.path().join("b.raw"), [7; 8192]).unwrap();
        let store = house.open();
        store.add_base("b", house.tmp.path().join("b.raw").to_str().unwrap(), None).unwrap();
        store.create_disks(&[disk("one", Some("b")), disk("two", None)]).unwrap();
        write(&store, "one");
        store.close().unwrap();
        drop(store);
        house.assert_clean();
        house
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
    /// One finding, by its number and a part of its text, that a repair leaves.
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
    /// One finding that a repair puts right, and that is not put right without.
    fn assert_mended(&self, invariant: u32, part: &str) {
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
    NewDisk { name: name.into(), base: base.map(Into::into), size: Some(8192), mode: 0o600, uid: 0, gid: 0 }
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
fn what_is_no_store_is_refused_and_left_as_it_is() {
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
    let house = House::new();
    assert_eq!(fs::metadata(house.path("lock")).unwrap().permissions().mode() & 0o777, 0o600);
    let held = fs::File::open(house.path("lock")).unwrap();
    assert!(crate::io::sys::try_lock(&held).unwrap());
    let error = run(&house.store(), false).unwrap_err().to_string();
    let path = house.store().display().to_string();
    assert_eq!(
        error,
        format!("a daemon is running on store {path}; stop it first: plyfs stop --store {path}")
    );
    drop(held);
    house.assert_clean();
}

#[test]
fn one_damaged_superblock_and_newer() {
    let house = House::new();
    flip(&house.path("plyfs.store"), 50);
    house.assert_lasting(1, "plyfs.store");
    let house = House::new();
    let mut bytes = fs::read(house.path("plyfs.store")).unwrap();
    bytes[8] = 2;
    let end = bytes.len() - 4;
    let sum = crc32c::crc32c(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&sum);
    fs::write(house.path("plyfs.store"), bytes).unwrap();
    let error = run(&house.store(), true).unwrap_err();
    assert!(matches!(error, CheckError::Newer { .. }) && error.to_string().contains("newer"), "{error}");
    let house = House::new();
    fs::remove_dir_all(house.path("bases")).unwrap();
    house.assert_lasting(1, "bases/");
}

#[test]
fn two_next_number_above_all_in_use() {
    let house = House::new();
    let path = house.path("plyfs.store");
    let mut superblock = Superblock::decode(&fs::read(&path).unwrap()).unwrap();
    superblock.next_id = 2;
    fs::write(&path, superblock.encode()).unwrap();
    house.assert_mended(2, "number 3 is in use");
    house.assert_clean();
    assert!(Superblock::decode(&fs::read(&path).unwrap()).unwrap().next_id > 3);
}

#[test]
fn three_damaged_records() {
    let house = House::new();
    let two = format!("disks/{}.disk", house.id("two"));
    flip(&house.path(&two), 60);
    house.assert_lasting(3, &two);
    assert_eq!(house.check(Repair::Yes).findings.len(), 1);
    fs::remove_file(house.path(&two)).unwrap();
    symlink("/etc/passwd", house.path(&two)).unwrap();
    house.assert_lasting(3, &two);

    let house = House::new();
    flip(&house.path(&format!("disks/{}.disk", house.id("one"))), 60);
    assert_eq!(house.check(Repair::Yes).findings.len(), 1, "nothing of a damaged disk is removed");
}

#[test]
fn four_record_under_another_number() {
    let house = House::new();
    fs::copy(house.path(&format!("disks/{}.disk", house.id("two"))), house.path("disks/77.disk")).unwrap();
    house.assert_lasting(4, "disks/77.disk");
}

#[test]
fn five_two_disks_with_one_name() {
    let house = House::new();
    house.change("two", |r| r.name = "one".into());
    house.assert_mended(5, "disk one");
    house.assert_mended(12, "disk one");
    house.assert_clean();
    assert_eq!(fs::read_dir(house.path("disks")).unwrap().count(), 1);

    let house = House::new();
    house.change("two", |r| {
        r.name = "one".into();
        r.name_seq = 1;
    });
    house.assert_lasting(5, "no order");
}

#[test]
fn five_a_replaced_disk_does_not_come_back_when_its_replacement_is_removed() {
    let house = House::new();
    let two = house.path(&format!("disks/{}.disk", house.id("two")));
    house.change("two", |r| {
        r.name = "one".into();
        r.unlinked = true;
    });
    let findings = house.check(Repair::Yes).findings;
    assert!(findings.iter().any(|f| f.invariant == 5 && f.repaired), "{findings:?}");
    house.check(Repair::Yes);
    house.assert_clean();
    assert!(!two.exists());
}

#[test]
fn six_backing() {
    let house = House::new();
    house.change("one", |r| r.backing.as_mut().unwrap().identity.size += 1);
    house.assert_lasting(6, "another version of base b");
    let house = House::new();
    house.change("one", |r| r.backing.as_mut().unwrap().base = 99);
    house.assert_lasting(6, "bases/99.base");
}

#[test]
fn seven_source_of_a_base() {
    let house = House::new();
    let source = house.tmp.path().join("b.raw");
    fs::write(&source, [8; 8192]).unwrap();
    house.assert_lasting(7, "modified");
    fs::write(&source, [8; 100]).unwrap();
    house.assert_lasting(7, "100 bytes");
    fs::remove_file(&source).unwrap();
    house.assert_lasting(7, source.to_str().unwrap());
}

#[test]
fn eight_map_file() {
    let house = House::new();
    let whole = fs::read(house.map("one")).unwrap();
    flip(&house.map("one"), 100);
    house.assert_lasting(8, ".1.map");
    fs::write(house.map("one"), &whole[..70]).unwrap();
    house.assert_lasting(8, ".1.map");
    // As long as the map is damaged, another generation may be all that is left of it.
    let other = house.path(&format!("deltas/{}.2.map", house.id("one")));
    fs::write(&other, &whole).unwrap();
    house.check(Repair::Yes);
    assert!(other.exists());
    fs::remove_file(&other).unwrap();
    fs::remove_file(house.map("one")).unwrap();
    house.assert_lasting(8, ".1.map");
}

#[test]
fn a_torn_tail_is_no_finding() {
    let house = House::new();
    let mut bytes = fs::read(house.map("one")).unwrap();
    let floor = fs::read(house.path(&format!("disks/{}.disk", house.id("one")))).unwrap();
    let floor = DiskRecord::decode(&floor).unwrap().map.floor as usize;
    bytes.resize(floor + 4096, 0);
    bytes[floor + 9] = 1;
    fs::write(house.map("one"), bytes).unwrap();
    let report = house.check(Repair::No);
    assert_eq!(report.findings, []);
    assert!(
        report.checked.iter().any(|(what, n)| what.contains("cut off") && *n == 1),
        "{:?}",
        report.checked
    );
}

#[test]
fn nine_overlap_never_grows() {
    let house = House::new();
    house.change("one", |r| r.overlap = 4096);
    house.assert_lasting(9, "record 1");
}

#[test]
fn ten_data_file() {
    let house = House::new();
    let file = fs::OpenOptions::new().write(true).open(house.data("one")).unwrap();
    file.set_len(4097).unwrap();
    house.assert_clean();
    file.set_len(4096).unwrap();
    house.assert_lasting(10, "4096 bytes");
    fs::remove_file(house.data("one")).unwrap();
    house.assert_lasting(10, "missing");
}

#[test]
fn eleven_strays() {
    let house = House::new();
    let (one, two) = (house.id("one"), house.id("two"));
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
        fs::write(house.path(&stray), "").unwrap();
        let part =
            if stray.contains("900.disk") || !stray.contains("900") { &stray } else { "no disks/900.disk" };
        let number_taken = house.check(Repair::No).findings.iter().any(|f| f.invariant == 2);
        assert!(!number_taken);
        house.assert_mended(11, part);
        assert!(!house.path(&stray).exists(), "{stray}");
        house.assert_clean();
    }
    fs::write(house.path("deltas/note"), "").unwrap();
    house.assert_lasting(11, "deltas/note");
    assert!(house.data("one").exists());
}

#[test]
fn eleven_data_without_a_record_is_kept() {
    let house = House::new();
    let one = house.id("one");
    fs::remove_file(house.path(&format!("disks/{one}.disk"))).unwrap();
    house.assert_lasting(11, "restore that record");
    assert!(house.path(&format!("deltas/{one}.data")).exists());
    assert!(house.path(&format!("deltas/{one}.1.map")).exists());
}

#[test]
fn eleven_what_may_be_the_last_copy_of_a_record_is_kept() {
    let house = House::new();
    let path = house.path(&format!("disks/{}.disk", house.id("one")));
    let tmp = path.with_extension("disk.tmp");
    fs::copy(&path, &tmp).unwrap();
    flip(&path, 60);
    house.check(Repair::Yes);
    assert!(tmp.exists());
}

#[test]
fn twelve_unlinked_disk() {
    let house = House::new();
    let one = house.id("one");
    house.open().unlink("one").unwrap();
    house.assert_mended(12, "disk one");
    house.assert_clean();
    for gone in [format!("disks/{one}.disk"), format!("deltas/{one}.data"), format!("deltas/{one}.1.map")] {
        assert!(!house.path(&gone).exists(), "{gone}");
    }
}

#[test]
fn what_a_live_map_speaks_for_is_not_repaired() {
    let house = House::new();
    let store = house.open();
    write(&store, "one");
    store
        .disk("one")
        .unwrap()
        .attach()
        .unwrap()
        .delta()
        .write(0, &[2; 4096], &crate::delta::Edges::default())
        .unwrap();
    let one = house.id("one");
    // No close: as after a crash.
    drop(store);
    let report = house.check(Repair::Yes);
    assert_eq!(report.findings, []);
    assert!(report.checked.iter().any(|(what, n)| what.starts_with("live maps") && *n == 1));
    house.open().unlink("one").unwrap();
    house.assert_lasting(12, "live map");
    assert!(house.data("one").exists());
    fs::write(house.path(&format!("deltas/{one}.9.map")), "").unwrap();
    house.assert_lasting(11, "live map");
    // Also when the superblock cannot say whose live maps they are.
    flip(&house.path("plyfs.store"), 50);
    house.assert_lasting(12, "live map");
}

#[test]
fn nothing_is_written_without_repair() {
    let house = House::new();
    let state = || {
        let mut all = Vec::new();
        for dir in ["", "bases", "disks", "deltas"] {
            for entry in fs::read_dir(house.path(dir)).unwrap().map(|e| e.unwrap()) {
                let meta = entry.metadata().unwrap();
                all.push((entry.path(), meta.ino(), meta.mtime_nsec(), meta.len()));
            }
        }
        all.sort();
        all
    };
    house.open().unlink("one").unwrap();
    fs::write(house.path("disks/900.disk.tmp"), "").unwrap();
    let before = state();
    assert_eq!(house.check(Repair::No).findings.len(), 2);
    assert_eq!(state(), before);
}

#[test]
fn damage_anywhere_is_a_report_and_never_a_panic() {
    let house = House::new();
    let base = fs::read_dir(house.path("bases")).unwrap().next().unwrap().unwrap().path();
    BaseRecord::decode(&fs::read(&base).unwrap()).unwrap();
    let record = house.path(&format!("disks/{}.disk", house.id("one")));
    for path in [base, record, house.map("one"), house.path("plyfs.store")] {
        let whole = fs::read(&path).unwrap();
        for at in (0..whole.len().min(300)).step_by(3) {
            flip(&path, at);
            let report = run_with_runtime_dir(&house.store(), &house.runtime(), Repair::No);
            assert!(report.is_err() || !report.unwrap().findings.is_empty(), "{path:?} {at}");
            fs::write(&path, &whole).unwrap();
        }
    }
    house.assert_clean();
}

#[test]
fn five_a_replaced_disk_with_a_stray_of_its_record_is_mended_in_one_run() {
    let house = House::new();
    let two = house.id("two");
    house.change("two", |record| {
        record.name = "one".into();
        record.name_seq += 10;
    });
    // Power went while the record of the one that was replaced was being written.
    let mut one = fs::read_dir(house.path("disks")).unwrap().map(|f| f.unwrap().path());
    let one = one.find(|p| p.file_stem().unwrap().to_str() != Some(&two.to_string())).unwrap();
    fs::write(one.with_extension("disk.tmp"), b"half").unwrap();
    let findings = house.check(Repair::Yes).findings;
    assert!(findings.len() == 2 && findings.iter().all(|f| f.repaired), "{findings:?}");
    // What is left is the disk without a name, for the next run.
    house.assert_mended(12, "was removed");
    house.assert_clean();
}

#[test]
fn the_cache_of_fetched_blocks_is_checked_and_what_is_damaged_of_it_goes() {
    use crate::fetch::kept::{CACHE_BLOCK, DiskCache, EvictReason, Limits, SourceKey, Watch};
    struct Nobody;
    impl Watch for Nobody {
        fn evicted(&self, _: &SourceKey, _: u64, _: EvictReason) {}
        fn degraded(&self, why: Option<&str>) {
            panic!("{why:?}");
        }
    }
    let house = House::new();
    let open = || {
        let medium = Arc::new(crate::io::HostMedium::new(&house.store()).unwrap());
        DiskCache::open(medium, Limits { bytes: Some(1 << 20), bases: None, free_floor: 0 }, Arc::new(Nobody))
    };
    let key = SourceKey([5; 32]);
    open().attach(key, 3 * CACHE_BLOCK).insert(0, &[9; 3 * CACHE_BLOCK as usize]);
    house.assert_clean();
    let verifying = |repair| {
        let verify = super::VerifyBases::Yes;
        super::run_verifying(&house.store(), &house.runtime(), repair, verify).unwrap().findings
    };
    assert_eq!(verifying(Repair::No), []);
    let blocks = house.store().join(format!("cache/{key}.blocks"));
    let mut bytes = fs::read(&blocks).unwrap();
    bytes[CACHE_BLOCK as usize] = 8;
    fs::write(&blocks, bytes).unwrap();
    house.assert_clean();
    let found = verifying(Repair::No);
    assert!(
        found.len() == 1 && found[0].invariant == 14 && found[0].message.contains("block 1"),
        "{found:?}"
    );
    assert!(verifying(Repair::Yes)[0].repaired);
    assert_eq!(verifying(Repair::No), []);
    assert_eq!(open().attach(key, 3 * CACHE_BLOCK).present_run(0, 9), 1);
    fs::write(house.store().join(format!("cache/{key}.sums")), "?").unwrap();
    assert_eq!(house.check(Repair::No).findings[0].invariant, 14, "the structure is always checked");
    house.check(Repair::Yes);
    assert_eq!(fs::read_dir(house.store().join("cache")).unwrap().count(), 0);
    house.assert_clean();
}
