//! Encrypted disks through the command line and the mount.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::harness::{Storm, TestDaemon, errno, open, read_at, same};
use crate::tools::fsx;

const MIB: u64 = 1 << 20;
/// What the tests write: found in any file, it is plaintext.
const PATTERN: &[u8] = b"<plaintext of a guest>";
const SECRETS: [&str; 3] = [
    "alpha-0123456789abcdef0123456789abcdef",
    "bravo-0123456789abcdef0123456789abcdef",
    "printed-0123456789abcdef0123456789abcd",
];

fn pattern(len: usize) -> Vec<u8> {
    PATTERN.iter().copied().cycle().take(len).collect()
}

fn key(daemon: &TestDaemon, name: &str) -> PathBuf {
    daemon.path("keys").join(name)
}

fn put_key(daemon: &TestDaemon, name: &str, secret: &str) {
    fs::write(key(daemon, name), format!("{secret}\n")).unwrap();
}

fn config(daemon: &TestDaemon) -> String {
    daemon.path("plyfs.toml").to_str().unwrap().to_owned()
}

/// A daemon with keys `a` and `b` in files, and a command that prints a secret for the name `c`.
fn unstarted() -> TestDaemon {
    let daemon = TestDaemon::unstarted("/var/tmp");
    fs::create_dir(daemon.path("keys")).unwrap();
    put_key(&daemon, "a", SECRETS[0]);
    put_key(&daemon, "b", SECRETS[1]);
    let command = daemon.path("print-key");
    let script =
        format!("#!/bin/sh\n[ \"$1 $2\" = 'get c' ] && [ \"$PLYFS_KEY\" = c ] && echo {}\n", SECRETS[2]);
    fs::write(&command, script).unwrap();
    fs::set_permissions(&command, fs::Permissions::from_mode(0o755)).unwrap();
    let keys = daemon.path("keys");
    let text = format!("[encryption]\nkey_dirs = [{keys:?}]\nkey_command = [{command:?}, \"get\"]\n");
    fs::write(daemon.path("plyfs.toml"), text).unwrap();
    daemon
}

fn start(daemon: &mut TestDaemon) {
    let config = config(daemon);
    daemon.try_start(&["--config", &config]).unwrap();
}

fn serving() -> TestDaemon {
    let mut daemon = unstarted();
    start(&mut daemon);
    daemon
}

fn encrypted(daemon: &TestDaemon, name: &str, size: &str) {
    let key = key(daemon, "a");
    let key = key.to_str().unwrap();
    daemon.ok(&["disk", "create", name, "--size", size, "--encrypt", "--key-file", key]);
}

/// Whether `bytes`, of which most are zeros, have `text`.
fn has(bytes: &[u8], text: &[u8]) -> bool {
    let pieces = (0..bytes.len()).step_by(4096).map(|at| &bytes[at..bytes.len().min(at + 4096 + text.len())]);
    let mut written = pieces.filter(|piece| piece.iter().any(|byte| *byte != 0));
    written.any(|piece| piece.windows(text.len()).any(|part| part == text))
}

/// Whether a file below `dir` has one of the texts. The mount and the files of the test are not looked at.
fn find(dir: &Path, texts: &[&[u8]]) -> Option<String> {
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() && entry.file_name() != "mnt" {
            if let Some(found) = find(&path, texts) {
                return Some(found);
            }
        } else if kind.is_file() {
            let bytes = fs::read(&path).unwrap();
            let has = |text: &&&[u8]| has(&bytes, text);
            if let Some(text) = texts.iter().find(has) {
                return Some(format!("{} has {}", path.display(), String::from_utf8_lossy(text)));
            }
        }
    }
    None
}

#[track_caller]
fn assert_hidden(daemon: &TestDaemon) {
    let mut texts: Vec<&[u8]> = vec![PATTERN];
    texts.extend(SECRETS.iter().map(|secret| secret.as_bytes()));
    if let Some(found) = find(&daemon.store(), &texts) {
        panic!("{found}");
    }
    let log = daemon.log();
    for secret in SECRETS {
        assert!(!log.contains(secret), "the log has a secret");
    }
}

/// Guards D86.
#[test]
fn nothing_of_an_encrypted_disk_is_in_the_store_in_plaintext() {
    let mut daemon = serving();
    daemon.base(1 << 20);
    let key_a = key(&daemon, "a");
    let key_a = key_a.to_str().unwrap();
    daemon.ok(&["disk", "create", "vm1", "--base", "b", "--size", "2M", "--encrypt", "--key-file", key_a]);
    let base = read_at(&open(&daemon.disk("vm1")), 0, MIB as usize);
    let put = |daemon: &TestDaemon, disk: &str, at: u64, len: usize| {
        let file = open(&daemon.disk(disk));
        file.write_all_at(&pattern(len), at).unwrap();
        file.sync_all().unwrap();
    };
    put(&daemon, "vm1", 5000, 100_000);
    daemon.ok(&["disk", "snapshot", "vm1", "s"]);
    put(&daemon, "vm1", MIB, 70_001);
    daemon.ok(&["disk", "clone", "vm1@s", "vm2", "--encrypt", "--key-command", "c"]);
    put(&daemon, "vm2", 4096, 512);
    let image = daemon.path("image.raw");
    fs::write(&image, pattern(300_000)).unwrap();
    daemon.ok(&[
        "disk",
        "import",
        "vm3",
        image.to_str().unwrap(),
        "--encrypt",
        "--key-file",
        key(&daemon, "b").to_str().unwrap(),
    ]);
    let wanted = {
        let mut vm1 = base.clone();
        vm1.resize(2 << 20, 0);
        vm1[5000..105_000].copy_from_slice(&pattern(100_000));
        let mut vm2 = vm1.clone();
        vm2[4096..4608].copy_from_slice(&pattern(512));
        vm1[MIB as usize..][..70_001].copy_from_slice(&pattern(70_001));
        [vm1, vm2, pattern(300_000)]
    };
    let look = |daemon: &TestDaemon| {
        for (disk, bytes) in ["vm1", "vm2", "vm3"].iter().zip(&wanted) {
            same(&read_at(&open(&daemon.disk(disk)), 0, bytes.len()), bytes, disk);
        }
    };
    look(&daemon);
    daemon.kill_worker();
    look(&daemon);
    assert_hidden(&daemon);
    // A copy in the mount of an encrypted disk to one that is encrypted stays hidden too.
    encrypted(&daemon, "vm4", "2M");
    fs::copy(daemon.disk("vm1"), daemon.disk("vm4")).unwrap();
    same(&read_at(&open(&daemon.disk("vm4")), 0, 2 << 20), &wanted[0], "a copy");
    daemon.ok(&["disk", "rollback", "vm1", "s"]);
    daemon.stop();
    assert_hidden(&daemon);
    start(&mut daemon);
    same(&read_at(&open(&daemon.disk("vm4")), 0, 2 << 20), &wanted[0], "a copy after a restart");
    same(&read_at(&open(&daemon.disk("vm1")), 5000, 100_000), &pattern(100_000), "the snapshot's bytes");
    // Every answer says where secrets are, and none has one.
    let shown = daemon.json(&["disk", "show", "vm2"]);
    assert_eq!((&shown["key"], &shown["state"]), (&"command c".into(), &"ok".into()));
    for answer in [shown, daemon.status(), daemon.json(&["disk", "ls"])] {
        assert!(SECRETS.iter().all(|secret| !answer.to_string().contains(secret)), "{answer}");
    }
    daemon.stop();
    daemon.ok(&["check"]);
    assert_hidden(&daemon);
}

/// Guards D87.
#[test]
fn a_disk_without_its_secret_is_locked_and_the_others_work() {
    let mut daemon = serving();
    encrypted(&daemon, "dark", "1M");
    daemon.create("plain", false, MIB);
    open(&daemon.disk("dark")).write_all_at(&pattern(5000), 0).unwrap();
    daemon.stop();
    fs::remove_file(key(&daemon, "a")).unwrap();
    start(&mut daemon);
    open(&daemon.disk("plain")).write_all_at(b"works", 0).unwrap();
    let opening = |daemon: &TestDaemon| errno(fs::File::open(daemon.disk("dark")));
    assert_eq!(opening(&daemon), libc::ENOKEY);
    let shown = daemon.json(&["disk", "show", "dark"]);
    assert_eq!((&shown["state"], &shown["size"]), (&"locked".into(), &MIB.into()), "{shown}");
    assert!(shown["error"].as_str().unwrap().contains("No such file"), "{shown}");
    let refused = daemon.fails(&["disk", "unlock", "dark"]);
    assert!(refused.contains("locked") && refused.contains("keys/a"), "{refused}");
    for (secret, why) in [(SECRETS[1], "not the one of this disk"), ("short", "less than 32 bytes")] {
        put_key(&daemon, "a", secret);
        let refused = daemon.fails(&["disk", "unlock", "dark"]);
        assert!(refused.contains(why) && !refused.contains(secret), "{refused}");
        assert_eq!(opening(&daemon), libc::ENOKEY);
    }
    put_key(&daemon, "a", SECRETS[0]);
    daemon.ok(&["disk", "unlock", "dark"]);
    same(&read_at(&open(&daemon.disk("dark")), 0, 5000), &pattern(5000), "the disk");
}

#[test]
fn a_secret_is_read_from_the_configured_places_only() {
    let daemon = serving();
    let outside = daemon.path("outside");
    fs::write(&outside, SECRETS[0]).unwrap();
    std::os::unix::fs::symlink(&outside, key(&daemon, "link")).unwrap();
    for path in [outside, key(&daemon, "link"), key(&daemon, "../outside")] {
        let path = path.to_str().unwrap();
        let refused = daemon.fails(&["disk", "create", "x", "--size", "1M", "--encrypt", "--key-file", path]);
        assert!(refused.contains("key_dirs"), "{refused}");
    }
    let refused =
        daemon.fails(&["disk", "create", "x", "--size", "1M", "--encrypt", "--key-command", "other"]);
    assert!(refused.contains("exit status"), "{refused}");
    let refused = daemon.fails(&["disk", "create", "x", "--size", "1M", "--encrypt"]);
    assert!(refused.contains("--key-file"), "{refused}");
    assert_eq!(daemon.json(&["disk", "ls"]).as_array().unwrap().len(), 0);
}

#[test]
fn another_secret_is_given_while_the_disk_is_in_use() {
    let mut daemon = serving();
    encrypted(&daemon, "vm1", "1M");
    let held = open(&daemon.disk("vm1"));
    held.write_all_at(&pattern(9000), 100).unwrap();
    daemon.ok(&["disk", "rekey", "vm1", "--key-file", key(&daemon, "b").to_str().unwrap()]);
    fs::remove_file(key(&daemon, "a")).unwrap();
    daemon.kill_worker();
    same(&read_at(&held, 100, 9000), &pattern(9000), "after the death of the worker");
    drop(held);
    daemon.stop();
    start(&mut daemon);
    same(&read_at(&open(&daemon.disk("vm1")), 100, 9000), &pattern(9000), "after a restart");
    let refused = daemon.fails(&["disk", "rekey", "vm1", "--key-command", "other"]);
    assert!(refused.contains("print-key"), "{refused}");
}

/// Guards D87.
#[test]
fn a_shredded_disk_is_gone() {
    let daemon = serving();
    encrypted(&daemon, "vm1", "1M");
    let file = open(&daemon.disk("vm1"));
    file.write_all_at(&pattern(9000), 100).unwrap();
    daemon.ok(&["disk", "snapshot", "vm1", "s"]);
    daemon.ok(&["disk", "clone", "vm1", "vm2", "--encrypt", "--key-command", "c"]);
    assert!(daemon.fails(&["disk", "shred", "vm1"]).contains("--force"));
    drop(file);
    assert!(daemon.fails(&["disk", "shred", "vm1"]).contains("snapshot s"));
    daemon.create("plain", false, MIB);
    assert!(daemon.fails(&["disk", "shred", "plain"]).contains("not encrypted"));
    daemon.ok(&["disk", "shred", "vm1", "--snapshots"]);
    assert_eq!(errno(fs::metadata(daemon.disk("vm1"))), libc::ENOENT);
    daemon.kill_worker();
    same(&read_at(&open(&daemon.disk("vm2")), 100, 9000), &pattern(9000), "the clone");
}

#[test]
fn fsx_on_an_encrypted_disk_survives_kills() {
    let daemon = serving();
    encrypted(&daemon, "x", "1M");
    let storm = Storm::at_random(&daemon, 3);
    fsx(&daemon, &daemon.disk("x"), 7, 20_000);
    storm.stop();
}

/// Guards D86 and D94.
#[test]
fn an_encrypted_disk_is_flattened_merged_and_moved_and_stays_hidden() {
    let mut daemon = serving();
    let image = crate::harness::Random(3).bytes(2 * MIB as usize + 4096);
    fs::write(daemon.path("b.img"), &image).unwrap();
    daemon.ok(&["base", "add", "b", daemon.path("b.img").to_str().unwrap()]);
    let secret = key(&daemon, "a");
    let secret = secret.to_str().unwrap();
    daemon.ok(&["disk", "create", "dark", "--base", "b", "--size", "4M", "--encrypt", "--key-file", secret]);
    let mut wanted = image.clone();
    wanted.resize(4 * MIB as usize, 0);
    let put = |daemon: &TestDaemon, wanted: &mut Vec<u8>, at: usize, len: usize| {
        let bytes = pattern(len);
        open(&daemon.disk("dark")).write_all_at(&bytes, at as u64).unwrap();
        wanted[at..at + len].copy_from_slice(&bytes);
    };
    let look = |daemon: &TestDaemon, wanted: &[u8], when: &str| {
        same(&read_at(&open(&daemon.disk("dark")), 0, wanted.len()), wanted, when);
        assert_hidden(daemon);
    };
    for (round, at) in [0, 1_000_000, 3_000_000, 500].into_iter().enumerate() {
        put(&daemon, &mut wanted, at, 70_000 + round);
        daemon.ok(&["disk", "snapshot", "dark", &format!("s{round}")]);
    }
    let shown = wanted.clone();
    put(&daemon, &mut wanted, 2_000_000, 5000);
    daemon.ok(&["disk", "flatten", "dark"]);
    look(&daemon, &wanted, "flattened");
    daemon.ok(&["disk", "rm", "dark@s0", "dark@s1", "dark@s2"]);
    daemon.ok(&["disk", "compact", "dark"]);
    daemon.kill_worker();
    look(&daemon, &wanted, "merged");
    let pool = daemon.path("pool");
    daemon.ok(&["pool", "add", "fast", pool.to_str().unwrap()]);
    daemon.ok(&["disk", "move", "dark", "fast"]);
    look(&daemon, &wanted, "moved");
    assert_eq!(find(&pool, &[PATTERN]), None);
    daemon.stop();
    start(&mut daemon);
    look(&daemon, &wanted, "after a restart");
    let snapshot = fs::File::open(daemon.mount().join("snapshots/dark@s3.raw")).unwrap();
    same(&read_at(&snapshot, 0, shown.len()), &shown, "the snapshot");
    daemon.ok(&["disk", "rm", "dark@s3"]);
    daemon.ok(&["disk", "rebase", "dark", "b"]);
    look(&daemon, &wanted, "rebased");
    let refused = daemon.fails(&["disk", "commit", "dark", "plain"]);
    assert!(refused.contains("--plain"), "{refused}");
    daemon.stop();
    daemon.ok(&["check"]);
}
