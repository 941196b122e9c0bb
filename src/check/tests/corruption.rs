//! Damages files of a store: flips bits, truncates, extends, swaps and removes them. The check reports the damage or the
//! store is unaffected. A repair removes nothing that a restore of the damaged file from a backup would need.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::{TestStore, disk, run_with_runtime_dir, write};
use crate::check::{Repair, Report, VerifyBases, run_verifying};
use crate::delta::Edges;
use crate::format::layout::NAMES;
use crate::format::record::{BaseRecord, Digest, Superblock};
use crate::store::{NewDisk, Store};

/// All files of a store, except the lock, with their bytes.
fn files(fixture: &TestStore) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    for dir in ["", "bases/", "disks/", "deltas/"] {
        for entry in fs::read_dir(fixture.path(dir)).unwrap().map(|e| e.unwrap()) {
            let name = entry.file_name().into_string().unwrap();
            if entry.path().is_file() && name != "lock" {
                out.insert(format!("{dir}{name}"), fs::read(entry.path()).unwrap());
            }
        }
    }
    out
}

fn contents(store: &Store) -> BTreeMap<String, Result<Vec<u8>, String>> {
    let read = |node: &crate::store::DiskNode| {
        let disk = node.attach().map_err(|e| e.to_string())?;
        let mut bytes = vec![0xee; disk.size() as usize];
        disk.read(0, &mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    };
    store.disks_after(0).iter().map(|node| (node.name(), read(node))).collect()
}

/// A store whose disks had several flushes, a shrink, discards, and a clean close.
fn lived_in() -> TestStore {
    let fixture = TestStore::new();
    let store = fixture.open();
    let blank = NewDisk { size: Some(1 << 20), ..disk("three", None) };
    store.create_disks(&[blank]).unwrap();
    let node = store.disk("three").unwrap();
    let disk = node.attach().unwrap();
    let delta = disk.delta();
    for n in 0..6u64 {
        delta.write(n * 9000, &[n as u8 + 1; 5000], &Edges::default()).unwrap();
        delta.flush().unwrap();
    }
    delta.zero_blocks(1, 2).unwrap();
    delta.resize(40_000, crate::delta::Durability::Now).unwrap();
    write(&store, "one");
    store.close().unwrap();
    drop(store);
    fixture.assert_clean();
    fixture
}

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % n.max(1)
    }
}

/// Damages one or two files. Returns the description, and the names of the files.
fn damage(
    fixture: &TestStore,
    whole: &BTreeMap<String, Vec<u8>>,
    random: &mut Random,
) -> (String, Vec<String>) {
    let names: Vec<&String> = whole.keys().collect();
    let name = names[random.below(names.len())].clone();
    let (path, mut bytes) = (fixture.path(&name), whole[&name].clone());
    let at = random.below(bytes.len());
    let what = match random.below(8) {
        0 => {
            fs::remove_file(&path).unwrap();
            return (format!("{name} removed"), vec![name]);
        }
        1 => {
            bytes.truncate(at);
            format!("{name} cut at {at}")
        }
        2 => {
            bytes[at..].iter_mut().take(4096).for_each(|b| *b = 0);
            format!("{name} zeros from {at}")
        }
        3 => {
            bytes.extend_from_within(at..);
            format!("{name} doubled from {at}")
        }
        4 => {
            let other = names[random.below(names.len())].clone();
            fs::write(&path, &whole[&other]).unwrap();
            fs::write(fixture.path(&other), &bytes).unwrap();
            return (format!("{name} and {other} exchanged"), vec![name, other]);
        }
        5 => {
            // Under another number, generation or kind.
            let dir = name.rsplit_once('/').map_or("", |(dir, _)| dir);
            let new =
                ["7.disk", "2.1.map", "9.data", "3.2.map", "1.base", "3.disk.tmp", "note"][random.below(7)];
            let new = if dir.is_empty() { new.to_owned() } else { format!("{dir}/{new}") };
            fs::write(fixture.path(&new), &bytes).unwrap();
            return (format!("{name} copied to {new}"), vec![new]);
        }
        _ => {
            bytes[at] ^= 1 << random.below(8);
            format!("{name} flipped at {at}")
        }
    };
    fs::write(path, bytes).unwrap();
    (what, vec![name])
}

/// Restores single files, as from a backup.
fn restore(fixture: &TestStore, whole: &BTreeMap<String, Vec<u8>>, names: &[String]) {
    for name in names {
        match whole.get(name) {
            Some(bytes) => fs::write(fixture.path(name), bytes).unwrap(),
            None => drop(fs::remove_file(fixture.path(name))),
        }
    }
}

#[test]
fn any_damage_is_reported_or_harmless_and_a_repair_loses_nothing() {
    let fixture = lived_in();
    let whole = files(&fixture);
    let expected = contents(&fixture.open());
    // That was a start without a clean stop.
    fixture.open().close().unwrap();
    assert!(expected.values().all(Result::is_ok) && expected.len() == 3, "{expected:?}");
    let never_written = format!("disks/{}.disk", fixture.id("two"));
    let mut found = 0;
    for seed in 1..1200u64 {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let (what, touched) = damage(&fixture, &whole, &mut random);
        let check = |repair| run_with_runtime_dir(&fixture.store(), &fixture.runtime(), repair);
        let before = files(&fixture);
        let first = check(Repair::No);
        assert_eq!(files(&fixture), before, "{what}: a check without repair wrote something");
        let clean = first.as_ref().is_ok_and(|report| report.findings.is_empty());
        // The list of names is a hint: damage of it is harmless, and no finding.
        found += u32::from(!clean || touched.iter().any(|name| name == NAMES));
        // The bytes of a data file have no checksum, and a disk that was never written has no other file.
        let traceless =
            touched.iter().any(|name| name.ends_with(".data")) || touched.contains(&never_written);
        if clean && !traceless {
            assert_eq!(contents(&fixture.open()), expected, "{what}: the check found nothing");
            fixture.open().close().unwrap();
        }

        restore_all(&fixture, &before);
        let repaired = check(Repair::Yes);
        if let (Ok(repaired), Ok(again)) = (&repaired, check(Repair::No)) {
            no_repair_twice(repaired, &again, &what);
        }
        restore(&fixture, &whole, &touched);
        assert_eq!(contents(&fixture.open()), expected, "{what}: repaired, then restored from a backup");
        restore_all(&fixture, &whole);
        fs::remove_dir_all(fixture.runtime()).unwrap();
        fs::create_dir(fixture.runtime()).unwrap();
    }
    assert!(found > 800, "{found} of 1200");
}

fn no_repair_twice(repaired: &Report, again: &Report, what: &str) {
    for finding in repaired.findings.iter().filter(|f| f.repaired) {
        let comes_back =
            again.findings.iter().any(|f| (f.invariant, &f.object) == (finding.invariant, &finding.object));
        assert!(!comes_back, "{what}: repaired and found again: {finding:?}");
    }
}

/// Restores exactly these files.
fn restore_all(fixture: &TestStore, whole: &BTreeMap<String, Vec<u8>>) {
    for name in files(fixture).keys().filter(|name| !whole.contains_key(*name)) {
        fs::remove_file(fixture.path(name)).unwrap();
    }
    for (name, bytes) in whole {
        fs::write(fixture.path(name), bytes).unwrap();
    }
}

#[test]
fn invariant_2_a_number_that_leaves_no_room_is_not_repaired() {
    let fixture = TestStore::new();
    let number = u64::MAX - 5000;
    fs::write(fixture.path(&format!("deltas/{number}.data")), [1; 4096]).unwrap();
    let before = fs::read(fixture.path("plyfs.store")).unwrap();
    fixture.assert_lasting(2, &number.to_string());
    assert_eq!(fs::read(fixture.path("plyfs.store")).unwrap(), before);
    Superblock::decode(&before).unwrap();
}

#[test]
fn invariant_7_the_digest_of_a_base_is_compared_on_request() {
    let fixture = TestStore::new();
    let verify =
        |repair| run_verifying(&fixture.store(), &fixture.runtime(), repair, VerifyBases::Yes).unwrap();
    let count = |report: &Report, what: &str| report.checked.iter().find(|(w, _)| w == what).unwrap().1;
    let report = verify(Repair::No);
    assert_eq!((count(&report, "digests verified"), count(&report, "bases without a digest")), (0, 1));
    assert!(report.findings.is_empty());

    let path = fs::read_dir(fixture.path("bases")).unwrap().next().unwrap().unwrap().path();
    let with = |digest: Digest| {
        let mut record = BaseRecord::decode(&fs::read(&path).unwrap()).unwrap();
        record.image.identity.digest = Some(digest);
        fs::write(&path, record.encode()).unwrap();
        fixture
            .change("one", |r| r.backing.as_mut().unwrap().identity = record.image.identity.clone().into());
    };
    // sha256sum and sha512sum of 8192 bytes 7.
    let sum = |program: &str| {
        let out = std::process::Command::new(program).arg(fixture.tmp.path().join("b.raw")).output().unwrap();
        let text = String::from_utf8(out.stdout).unwrap();
        let text = text.split(' ').next().unwrap();
        (0..text.len() / 2)
            .map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap())
            .collect::<Vec<_>>()
    };
    let sha256: [u8; 32] = sum("sha256sum").try_into().unwrap();
    let sha512: [u8; 64] = sum("sha512sum").try_into().unwrap();
    for digest in [Digest::Sha256(sha256), Digest::Sha512(sha512)] {
        with(digest);
        let report = verify(Repair::No);
        assert_eq!(report.findings, []);
        assert_eq!((count(&report, "digests verified"), count(&report, "bases without a digest")), (1, 0));
    }
    for digest in [Digest::Sha256([9; 32]), Digest::Sha512([9; 64])] {
        with(digest);
        fixture.assert_clean();
        for repair in [Repair::No, Repair::Yes] {
            let findings = verify(repair).findings;
            assert!(
                findings.len() == 1 && findings[0].invariant == 7 && !findings[0].repaired,
                "{findings:?}"
            );
            assert!(findings[0].message.contains("0909"), "{findings:?}");
        }
    }
}

/// A live map has no checksum. A live map with an impossible header is neither used nor removed, because it may have the
/// only record of unflushed data.
#[test]
fn a_live_map_with_an_impossible_header_is_kept_and_not_served() {
    let fixture = TestStore::new();
    let store = fixture.open();
    write(&store, "one");
    drop(store);
    let id = fixture.id("one");
    let dir = fs::read_dir(fixture.runtime()).unwrap().next().unwrap().unwrap().path();
    let live = dir.join(format!("{id}.live"));
    let whole = fs::read(&live).unwrap();
    let with = |word: usize, value: u64| {
        let mut bytes = whole.clone();
        bytes[word * 8..word * 8 + 8].copy_from_slice(&value.to_le_bytes());
        put(&live, &bytes);
    };
    let problem = || fixture.open().disk("one").unwrap().problem();
    // Size, overlap, and the size of a pending shrink.
    for (word, value) in [(4, u64::MAX), (4, 1 << 47), (5, 8193), (5, u64::MAX), (7, u64::MAX), (7, 8194)] {
        with(word, value);
        let why = problem().unwrap_or_else(|| panic!("word {word} {value:#x} is served"));
        assert!(why.contains(&format!("{id}.live")), "{why}");
    }
    put(&live, &whole[..whole.len() - 4096]);
    let why = problem().expect("a live map that was cut is served");
    assert!(why.contains("cut"), "{why}");
    put(&live, &whole);
    assert_eq!(problem(), None);
}

fn put(path: &Path, bytes: &[u8]) {
    fs::write(path, bytes).unwrap();
}
