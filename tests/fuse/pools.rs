//! Pools on drives of their own: full, not mounted, failing.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::devices::{LoopDevice, Volume};
use crate::failing::BadDisk;
use crate::harness::*;

const MIB: u64 = 1 << 20;
const EXT4: &[&str] = &["mkfs.ext4", "-q", "-F", "-O", "^has_journal"];

/// A drive of 64 MiB for a pool of the daemon.
fn drive(daemon: &TestDaemon, name: &str) -> Volume {
    let dir = daemon.path(name);
    fs::create_dir(&dir).unwrap();
    Volume::on_file(&dir, 64 * MIB, EXT4)
}

fn add(daemon: &TestDaemon, name: &str, volume: &Volume) -> PathBuf {
    let dir = volume.path("plyfs");
    daemon.ok(&["pool", "add", name, dir.to_str().unwrap()]);
    dir
}

fn create(daemon: &TestDaemon, name: &str, pool: &str, size: u64) -> PathBuf {
    daemon.ok(&["disk", "create", name, "--size", &size.to_string(), "--pool", pool]);
    daemon.disk(name)
}

fn pool(daemon: &TestDaemon, name: &str) -> Value {
    daemon.json(&["pool", "show", name])
}

#[test]
fn a_pool_is_added_and_used_while_disks_are_open() {
    let mut daemon = TestDaemon::on_disk();
    let (first, second) = (drive(&daemon, "drive1"), drive(&daemon, "drive2"));
    let file = open(&daemon.create("here", false, MIB));
    file.write_all_at(&[1; 4096], 0).unwrap();
    let dir = add(&daemon, "fast", &first);
    same(&read_at(&file, 0, 4096), &[1; 4096], "a disk that was open");
    file.write_all_at(&[2; 4096], 4096).unwrap();
    let there = open(&create(&daemon, "there", "fast", 8 * MIB));
    there.write_all_at(&[3; 65536], 0).unwrap();
    there.sync_all().unwrap();
    assert!(fs::read_dir(dir.join("deltas")).unwrap().count() >= 2, "its data file and its map");
    assert_eq!(daemon.json(&["disk", "show", "there"])["pool"], "fast");
    let shown = pool(&daemon, "fast");
    assert_eq!((&shown["state"], &shown["disks"]), (&json!("ok"), &json!(["there"])));
    assert!(shown["total_bytes"].as_u64().unwrap() < 64 * MIB, "{shown}");
    // The worker is confined as before, and the next one as well.
    there.write_all_at(&[4; 4096], 0).unwrap();
    daemon.kill_worker();
    same(&read_at(&there, 0, 4096), &[4; 4096], "written and not flushed");
    assert!(daemon.status()["confinement"]["landlock"].as_str().unwrap() != "");

    let refused = |dir: &str, why: &str| {
        let error = daemon.fails(&["pool", "add", "x", dir]);
        assert!(error.contains(why), "{dir}: {error}");
    };
    refused(dir.to_str().unwrap(), "is pool fast already");
    refused(dir.join("inside").to_str().unwrap(), "lie one in the other");
    refused(daemon.store().join("pool").to_str().unwrap(), "the store");
    refused(daemon.mount().join("pool").to_str().unwrap(), "lie one in the other");
    fs::create_dir(second.path("used")).unwrap();
    fs::write(second.path("used/photo.jpg"), "x").unwrap();
    refused(second.path("used").to_str().unwrap(), "not empty");
    let other = TestDaemon::on_disk();
    let taken = add(&other, "theirs", &second);
    refused(taken.to_str().unwrap(), "another store");
    drop(other);
    assert!(daemon.fails(&["pool", "add", "fast", second.path("new").to_str().unwrap()]).contains("exists"));

    daemon.ok(&["disk", "snapshot", "there", "s"]);
    daemon.ok(&["disk", "clone", "there@s", "copy", "--pool", "default"]);
    let copy = daemon.json(&["disk", "show", "copy"]);
    assert_eq!((&copy["pool"], &copy["needs_pools"]), (&json!("default"), &json!(["default", "fast"])));
    assert!(daemon.ok(&["disk", "show", "copy"]).contains("default, fast"));
    same(&read_at(&open(&daemon.disk("copy")), 0, 4096), &[4; 4096], "the clone");
    let error = daemon.fails(&["pool", "rm", "fast"]);
    assert!(error.contains("disk copy, disk there"), "{error}");
    drop((file, there));
    daemon.ok(&["disk", "rm", "copy"]);
    daemon.ok(&["disk", "rm", "there", "--snapshots"]);
    daemon.ok(&["pool", "rm", "fast"]);
    assert!(!daemon.ok(&["pool", "ls"]).contains("fast"));
    daemon.stop();
    daemon.ok(&["check"]);
}

/// Guards D89.
#[test]
fn a_full_pool_stops_its_own_disks_only() {
    let mut daemon = TestDaemon::on_disk();
    let (small, large) = (drive(&daemon, "drive1"), drive(&daemon, "drive2"));
    add(&daemon, "small", &small);
    add(&daemon, "large", &large);
    let full = open(&create(&daemon, "full", "small", 256 * MIB));
    let other = open(&create(&daemon, "other", "large", 256 * MIB));
    let here = open(&daemon.create("here", false, 256 * MIB));
    full.write_all_at(&[1; 65536], 0).unwrap();
    full.sync_all().unwrap();
    small.fill();
    let error = (0..64).find_map(|n| full.write_all_at(&[2; 65536], (n + 1) * 65536).err());
    assert_eq!(error.and_then(|error| error.raw_os_error()), Some(libc::ENOSPC));
    for file in [&other, &here] {
        (0..64).for_each(|n| file.write_all_at(&[3; 65536], n * 65536).unwrap());
        file.sync_all().unwrap();
    }
    // What needs no new space goes on, and so do flushes and discards: the pool has a reserve.
    full.write_all_at(&[4; 4096], 0).unwrap();
    full.sync_all().unwrap();
    assert_eq!(pool(&daemon, "small")["state"], "full");
    assert_eq!(pool(&daemon, "large")["state"], "ok");
    assert_eq!(daemon.status()["space"]["full"], false);
    small.make_space();
    until("space", || full.write_all_at(&[5; 65536], 8 << 20).ok());
    full.sync_all().unwrap();
    drop((full, other, here));
    daemon.stop();
    daemon.ok(&["check"]);
}

/// Guards D88, D89.
#[test]
fn a_pool_that_is_not_mounted_at_start_is_listed_and_comes_back_without_a_restart() {
    let mut daemon = TestDaemon::on_disk();
    let volume = drive(&daemon, "drive");
    let dir = volume.path("");
    daemon.ok(&["pool", "add", "fast", dir.to_str().unwrap()]);
    let file = open(&create(&daemon, "there", "fast", MIB));
    file.write_all_at(&[1; 4096], 0).unwrap();
    let here = open(&daemon.create("here", false, MIB));
    here.write_all_at(&[2; 4096], 0).unwrap();
    drop((file, here));
    daemon.stop();
    volume.unmount();
    daemon.start();
    let shown = daemon.json(&["disk", "show", "there"]);
    assert_eq!((&shown["state"], &shown["size"]), (&json!("failed"), &json!(MIB)), "{shown}");
    assert!(shown["error"].as_str().unwrap().contains("plyfs pool attach fast"), "{shown}");
    assert_eq!(pool(&daemon, "fast")["state"], "unavailable");
    assert_eq!(daemon.json(&["status"])["unavailable_pools"], json!(["fast"]));
    assert!(fs::metadata(daemon.disk("there")).unwrap().len() == MIB);
    assert_eq!(errno(fs::read(daemon.disk("there"))), libc::EIO);
    same(&read_at(&open(&daemon.disk("here")), 0, 4096), &[2; 4096], "the other disk");
    assert!(
        daemon.fails(&["disk", "create", "new", "--size", "1M", "--pool", "fast"]).contains("not available")
    );
    assert!(daemon.fails(&["pool", "attach", "fast"]).contains("not mounted"));
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0, "nothing is written to the mount point");
    let here = open(&daemon.disk("here"));
    volume.mount();
    daemon.ok(&["pool", "attach", "fast"]);
    same(&read_at(&open(&daemon.disk("there")), 0, 4096), &[1; 4096], "the disk is back");
    here.write_all_at(&[3; 4096], 0).unwrap();
    drop(here);
    daemon.stop();
    daemon.ok(&["check"]);
}

/// Guards D89.
#[test]
fn a_drive_that_fails_while_the_daemon_runs_takes_its_own_disks_only() {
    let mut daemon = TestDaemon::on_disk();
    let dir = daemon.path("drive");
    fs::create_dir(&dir).unwrap();
    let Some(bad) = BadDisk::new(&dir, 64 * MIB) else { return };
    let volume = Volume::new(LoopDevice::new(&bad.file()), dir.join("volume"), EXT4, "errors=continue");
    add(&daemon, "bad", &volume);
    let file = open(&create(&daemon, "there", "bad", 8 * MIB));
    file.write_all_at(&[1; 65536], 0).unwrap();
    file.sync_all().unwrap();
    let here = open(&daemon.create("here", false, 8 * MIB));
    bad.fails();
    file.write_all_at(&[2; 65536], 0).unwrap();
    assert_eq!(errno(file.sync_all()), libc::EIO);
    here.write_all_at(&[3; 65536], 0).unwrap();
    here.sync_all().unwrap();
    assert_eq!(daemon.json(&["status"])["disks_refusing_writes"], json!(["there"]));
    // A worker that starts now, and a stop, do without the pool.
    daemon.kill_worker();
    same(&read_at(&here, 0, 4096), &[3; 4096], "the other disk");
    here.write_all_at(&[4; 4096], 0).unwrap();
    here.sync_all().unwrap();
    drop((here, file));
    daemon.cli(&["stop"]);
    daemon.ended();
    bad.works();
    volume.unmount();
    volume.mount();
    daemon.start();
    same(&read_at(&open(&daemon.disk("here")), 0, 4096), &[4; 4096], "the other disk");
    let found = read_at(&open(&daemon.disk("there")), 0, 65536);
    assert!(
        found.chunks(4096).all(|block| block == [1; 4096] || block == [2; 4096]),
        "as flushed, or as written"
    );
    daemon.stop();
}

#[test]
fn a_disk_is_moved_to_another_pool_while_it_is_written() {
    let mut daemon = TestDaemon::on_disk();
    let (first, second) = (drive(&daemon, "drive1"), drive(&daemon, "drive2"));
    let from = add(&daemon, "one", &first);
    add(&daemon, "two", &second);
    let content = Random(7).bytes(8 << 20);
    let file = open(&create(&daemon, "vm", "one", 16 * MIB));
    file.write_all_at(&content, 0).unwrap();
    daemon.ok(&["disk", "snapshot", "vm", "s"]);
    file.write_all_at(&[9; 65536], MIB).unwrap();
    let mut expected = content.clone();
    expected[1 << 20..(1 << 20) + 65536].fill(9);
    // Slowly, so that the worker dies meanwhile.
    daemon.ok(&["disk", "move", "vm", "two", "--rate", "4M", "--background"]);
    file.write_all_at(&[8; 65536], 9 << 20).unwrap();
    daemon.kill_worker();
    file.write_all_at(&[7; 65536], 10 << 20).unwrap();
    until("the end of the job", || {
        let jobs = daemon.json(&["jobs"]);
        let job = jobs.as_array().unwrap().iter().find(|job| job["id"] == "move-vm")?.clone();
        assert_ne!(job["state"], "failed", "{job}");
        (job["state"] == "done").then_some(())
    });
    daemon.ok(&["disk", "move", "vm", "two"]);
    assert_eq!(daemon.json(&["disk", "show", "vm"])["needs_pools"], json!(["two"]));
    same(&read_at(&file, 0, 8 << 20), &expected, "the disk");
    same(&read_at(&file, 9 << 20, 65536), &[8; 65536], "what was written during the move");
    same(&read_at(&file, 10 << 20, 65536), &[7; 65536], "what was written after the death of the worker");
    let snapshot = std::fs::File::open(daemon.mount().join("snapshots/vm@s.raw")).unwrap();
    same(&read_at(&snapshot, 0, 8 << 20), &content, "the snapshot");
    drop((file, snapshot));
    until("the removal of the old files", || {
        (fs::read_dir(from.join("deltas")).unwrap().count() == 0).then_some(())
    });
    daemon.ok(&["pool", "rm", "one"]);
    daemon.stop();
    daemon.ok(&["check"]);
}
