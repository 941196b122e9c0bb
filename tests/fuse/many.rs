//! Many disks: descriptors and attachments.

use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::harness::*;

const MIB: u64 = 1 << 20;

fn create(daemon: &TestDaemon, count: usize) -> Vec<String> {
    let names: Vec<String> = (0..count).map(|n| format!("d{n}")).collect();
    let mut args = vec!["disk", "create", "--size", "1M"];
    args.extend(names.iter().map(String::as_str));
    daemon.ok(&args);
    names
}

fn attached(daemon: &TestDaemon) -> u64 {
    daemon.json(&["status"])["attached_disks"].as_u64().unwrap()
}

// Regression: with 300 disks and 256 descriptors fsync was EIO, `stop` ended with 0 and the daemon with 1, and `check`
// found damage that no clean stop repaired.
#[test]
fn more_disks_can_be_in_use_than_there_are_descriptors() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let mut few = Command::new("sh");
    few.args(["-c", "ulimit -n 256 && exec \"$@\"", "sh"]);
    daemon.start_under(few);
    let names = create(&daemon, 300);
    let files: Vec<_> = names.iter().map(|name| open(&daemon.disk(name))).collect();
    for round in 1..3u8 {
        for (n, file) in files.iter().enumerate() {
            file.write_all_at(&[round, n as u8], u64::from(round) * 4096).unwrap();
            file.sync_all().unwrap();
        }
    }
    assert!((1..150).contains(&attached(&daemon)));
    // Unflushed writes to disks that are attached and to disks that are not.
    for (n, file) in files.iter().enumerate() {
        file.write_all_at(&[3, n as u8], 3 * 4096).unwrap();
    }
    daemon.kill_worker();
    for (n, file) in files.iter().enumerate() {
        for round in 1..4u8 {
            assert_eq!(read_at(file, u64::from(round) * 4096, 2), [round, n as u8]);
        }
    }
    drop(files);
    daemon.stop();
    daemon.ok(&["check"]);
}

/// Guards D93.
#[test]
fn a_disk_has_more_layers_than_there_are_descriptors() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let mut few = Command::new("sh");
    few.args(["-c", "ulimit -n 256 && exec \"$@\"", "sh"]);
    daemon.start_under(few);
    create(&daemon, 2);
    let file = open(&daemon.disk("d0"));
    for n in 0..LAYERS {
        file.write_all_at(&[n as u8; 2048], n * 2048).unwrap();
        daemon.ok(&["disk", "snapshot", "d0", &format!("s{n}")]);
    }
    let wanted: Vec<u8> = (0..LAYERS * 2048).map(|at| (at / 2048) as u8).collect();
    for _ in 0..2 {
        same(&read_at(&file, 0, wanted.len()), &wanted, "all layers");
        // Each snapshot has a chain of its own.
        for n in (0..LAYERS).step_by(7) {
            let path = daemon.mount().join(format!("snapshots/d0@s{n}.raw"));
            let shown = std::fs::read(path).unwrap();
            same(&shown[..wanted.len()][..(n as usize + 1) * 2048], &wanted[..(n as usize + 1) * 2048], "s");
        }
        let descriptors = std::fs::read_dir(format!("/proc/{}/fd", daemon.worker())).unwrap().count();
        assert!(descriptors < 200, "{descriptors}");
        let other = open(&daemon.disk("d1"));
        other.write_all_at(b"served", 0).unwrap();
        other.sync_all().unwrap();
        daemon.kill_worker();
    }
    drop(file);
    daemon.stop();
    daemon.ok(&["check"]);
}

const LAYERS: u64 = 300;

// Regression: each listed disk stayed attached until the worker ended.
#[test]
fn a_listing_and_a_stat_of_each_file_attach_no_disk() {
    let mut daemon = TestDaemon::on_disk();
    let names = create(&daemon, 100);
    open(&daemon.disk("d7")).write_all_at(b"written", 4096).unwrap();
    daemon.restart();
    let list = daemon.json(&["disk", "ls"]);
    assert_eq!(list.as_array().unwrap().len(), 100);
    assert!(list.as_array().unwrap().iter().all(|disk| disk["size"] == MIB && disk["state"] == "ok"));
    for name in &names {
        let meta = std::fs::metadata(daemon.disk(name)).unwrap();
        assert_eq!(meta.len(), MIB);
    }
    assert!(list[7]["delta_bytes"].as_u64() > Some(0) && list[8]["delta_bytes"] == 0, "{list}");
    assert_eq!(attached(&daemon), 0);
    assert!(list.as_array().unwrap().iter().all(|disk| disk["map_bytes"] == 0), "{list}");
    daemon.stop();
}
