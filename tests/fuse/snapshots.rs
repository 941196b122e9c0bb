//! Snapshots, clones and rollback through the command line and the mount.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::Duration;

use crate::harness::{Storm, TestDaemon, errno, needs, open, read_at, run, same, tool};

const MIB: u64 = 1 << 20;

fn put(daemon: &TestDaemon, disk: &str, at: u64, byte: u8) {
    let file = open(&daemon.disk(disk));
    file.write_all_at(&[byte; 4096], at).unwrap();
}

fn byte(daemon: &TestDaemon, disk: &str, at: u64) -> u8 {
    read_at(&open(&daemon.disk(disk)), at, 1)[0]
}

#[test]
fn a_disk_is_snapshotted_cloned_and_rolled_back() {
    let mut daemon = TestDaemon::on_disk();
    let base = daemon.base(1 << 20);
    daemon.create("vm1", true, 2 * MIB);
    put(&daemon, "vm1", 4096, 1);
    daemon.ok(&["disk", "snapshot", "vm1", "monday"]);
    put(&daemon, "vm1", 4096, 2);
    put(&daemon, "vm1", MIB, 3);
    let made = daemon.ok(&["disk", "clone", "vm1", "vm2", "vm3"]);
    assert_eq!(made.lines().count(), 2, "{made}");
    daemon.ok(&["disk", "clone", "vm1@monday", "old", "--size", "4M"]);
    let look = |daemon: &TestDaemon| {
        ["vm1", "vm2", "vm3", "old"].map(|disk| (byte(daemon, disk, 4096), byte(daemon, disk, MIB)))
    };
    let wanted = [(2, 3), (2, 3), (2, 3), (1, 0)];
    assert_eq!(look(&daemon), wanted);
    assert_eq!(fs::metadata(daemon.disk("old")).unwrap().len(), 4 * MIB);
    same(&read_at(&open(&daemon.disk("old")), 8192, 4096), &base[8192..12288], "of the base");
    daemon.kill_worker();
    assert_eq!(look(&daemon), wanted);
    let list = daemon.ok(&["disk", "snapshots", "vm1"]);
    assert!(list.lines().nth(1).is_some_and(|line| line.starts_with("vm1@monday")), "{list}");
    let shown = daemon.json(&["disk", "show", "vm1"]);
    assert_eq!(shown["snapshots"], 1, "{shown}");
    let layers = shown["layers"].as_array().unwrap();
    assert_eq!(layers.len(), 2, "{shown}");
    assert_eq!((&layers[0]["snapshots"][0], &layers[0]["shared_by"]), (&"monday".into(), &3.into()));

    // Destroying takes a second word.
    let held = open(&daemon.disk("vm1"));
    let refused = daemon.fails(&["disk", "rollback", "vm1", "monday"]);
    assert!(refused.contains("--force"), "{refused}");
    daemon.ok(&["disk", "rollback", "vm1", "monday", "--force"]);
    assert_eq!((read_at(&held, 4096, 1)[0], read_at(&held, MIB, 1)[0]), (1, 0));
    drop(held);
    let refused = daemon.fails(&["disk", "rm", "vm1"]);
    assert!(refused.contains("snapshot monday"), "{refused}");
    assert_eq!(errno(fs::remove_file(daemon.disk("vm1"))), libc::EBUSY);
    daemon.ok(&["disk", "rm", "vm1@monday"]);
    daemon.ok(&["disk", "rm", "vm1"]);
    daemon.restart();
    assert_eq!(look_at(&daemon, &["vm2", "vm3", "old"]), [(2, 3), (2, 3), (1, 0)]);
    daemon.ok(&["disk", "rm", "vm2", "vm3", "old"]);
    daemon.stop();
    assert_eq!(fs::read_dir(daemon.store().join("deltas")).unwrap().count(), 0);
    daemon.ok(&["check"]);
}

fn look_at(daemon: &TestDaemon, disks: &[&str]) -> Vec<(u8, u8)> {
    disks.iter().map(|disk| (byte(daemon, disk, 4096), byte(daemon, disk, MIB))).collect()
}

#[test]
fn mistakes_about_snapshots_are_named() {
    let daemon = TestDaemon::in_memory();
    daemon.create("vm1", false, MIB);
    for (args, part) in [
        (&["disk", "snapshot", "vm2", "s"][..], "disk vm2: there is no disk"),
        (&["disk", "snapshot", "vm1", "a/b"], "a name is"),
        (&["disk", "rollback", "vm1", "s"], "snapshot vm1@s: there is no snapshot"),
        (&["disk", "rm", "vm1@s"], "snapshot vm1@s: there is no snapshot"),
        (&["disk", "clone", "vm1@s", "vm2"], "snapshot vm1@s: there is no snapshot"),
        (&["disk", "clone", "vm1", "vm1"], "exists already"),
        (&["disk", "clone", "vm1", "vm2", "--size", "4096"], "smaller than its origin"),
    ] {
        let wrong = daemon.fails(args);
        assert!(wrong.contains(part), "{args:?}: {wrong}");
    }
    daemon.ok(&["disk", "snapshot", "vm1", "s"]);
    assert!(daemon.fails(&["disk", "snapshot", "vm1", "s"]).contains("exists already"));
}

#[test]
fn fio_verifies_its_writes_while_snapshots_are_taken_and_the_worker_is_killed() {
    if !needs("resend") {
        return;
    }
    let Some(fio) = tool("fio") else { return };
    let daemon = TestDaemon::on_disk();
    daemon.base(16 << 20);
    let disk = daemon.create("d", true, 32 * MIB);
    let storm = Storm::new(&daemon, Duration::from_millis(300), 30);
    std::thread::scope(|scope| {
        let load = scope.spawn(|| {
            let args = ["--name=v", "--rw=randwrite", "--bs=4k", "--size=32m", "--direct=1", "--iodepth=16"];
            let more = [
                "--ioengine=libaio",
                "--verify=crc32c",
                "--do_verify=1",
                "--verify_fatal=1",
                "--verify_state_save=0",
                "--loops=2",
            ];
            run(Command::new(&fio).args(args).args(more).arg(format!("--filename={}", disk.display())));
        });
        let mut number = 0;
        while !load.is_finished() {
            number += 1;
            daemon.ok(&["disk", "snapshot", "d", &format!("s{number}")]);
            daemon.ok(&["disk", "clone", "d", &format!("c{number}")]);
            if number > 2 {
                daemon.ok(&["disk", "rm", &format!("d@s{}", number - 2), &format!("c{}", number - 2)]);
            }
        }
        load.join().unwrap();
        assert!(number > 2, "{number}");
    });
    storm.stop();
}
