//! The trash, unused bases, and what stands on what, through the command line and the mount.

use std::fs;
use std::os::unix::fs::FileExt;

use crate::harness::{TestDaemon, open, read_at, until};

const MIB: u64 = 1 << 20;

/// A daemon that keeps removed disks for this long, with a base `b`.
fn keeping(grace: &str) -> TestDaemon {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    daemon.try_start(&["--trash-grace", grace]).unwrap();
    daemon.base(MIB as usize);
    daemon
}

fn put(daemon: &TestDaemon, disk: &str, at: u64, byte: u8) {
    open(&daemon.disk(disk)).write_all_at(&[byte; 4096], at).unwrap();
}

fn byte(daemon: &TestDaemon, disk: &str, at: u64) -> u8 {
    read_at(&open(&daemon.disk(disk)), at, 1)[0]
}

/// Name and number of the disks in the trash.
fn trash(daemon: &TestDaemon) -> Vec<(String, u64)> {
    let list = daemon.json(&["trash", "ls"]);
    let one =
        |disk: &serde_json::Value| (disk["name"].as_str().unwrap().to_owned(), disk["id"].as_u64().unwrap());
    list.as_array().unwrap().iter().map(one).collect()
}

/// Guards D82.
#[test]
fn removed_disks_are_listed_restored_and_purged_whatever_happens_to_the_daemon() {
    let mut daemon = keeping("7d");
    for (name, byte) in [("vm1", 1), ("vm2", 2), ("vm3", 3)] {
        daemon.create(name, true, 2 * MIB);
        put(&daemon, name, 4096, byte);
    }
    daemon.ok(&["disk", "snapshot", "vm1", "s"]);
    put(&daemon, "vm1", 4096, 4);
    daemon.ok(&["disk", "rm", "vm1", "--snapshots"]);
    // A removal through the mount, and a rename over a disk.
    fs::remove_file(daemon.disk("vm2")).unwrap();
    daemon.create("vm2", true, 2 * MIB);
    fs::rename(daemon.disk("vm2"), daemon.disk("vm3")).unwrap();
    let names = |daemon: &TestDaemon| trash(daemon).into_iter().map(|(name, _)| name).collect::<Vec<_>>();
    assert_eq!(names(&daemon), ["vm1", "vm2", "vm3"]);
    assert!(!daemon.disk("vm1").exists());
    let table = daemon.ok(&["trash", "ls"]);
    assert!(table.contains("in 6 d") || table.contains("in 7 d"), "{table}");
    daemon.kill_worker();
    assert_eq!(names(&daemon), ["vm1", "vm2", "vm3"]);
    daemon.stop();
    daemon.ok(&["check"]);
    // Without a trash from now on: what is in it stays.
    daemon.start();
    assert_eq!(names(&daemon), ["vm1", "vm2", "vm3"]);
    let status = daemon.status();
    assert_eq!(status["trashed_disks"], 3, "{status}");
    until("the bytes of the trash", || (daemon.status()["trashed_bytes"].as_u64() > Some(0)).then_some(()));
    assert!(daemon.ok(&["status"]).contains("trash"));
    let base = daemon.json(&["base", "show", "b"]);
    assert_eq!(
        (&base["trashed_disks"], base["trashed_bytes"].as_u64() > Some(0)),
        (&3.into(), true),
        "{base}"
    );

    let path = daemon.ok(&["trash", "restore", "vm1"]);
    assert_eq!(path.trim(), daemon.disk("vm1").to_str().unwrap());
    assert_eq!(byte(&daemon, "vm1", 4096), 4);
    daemon.ok(&["disk", "rollback", "vm1", "s"]);
    assert_eq!(byte(&daemon, "vm1", 4096), 1);
    daemon.ok(&["trash", "restore", "vm2"]);
    assert_eq!(byte(&daemon, "vm2", 4096), 2);
    // The name is taken.
    let refused = daemon.fails(&["trash", "restore", "vm3"]);
    assert!(refused.contains("--as NAME"), "{refused}");
    daemon.ok(&["trash", "restore", "vm3", "--as", "old3"]);
    assert_eq!((byte(&daemon, "old3", 4096), trash(&daemon)), (3, vec![]));
    // Without a trash a removal is one.
    daemon.ok(&["disk", "rm", "old3"]);
    assert_eq!(trash(&daemon), []);
}

#[test]
fn mistakes_about_the_trash_are_named() {
    let daemon = keeping("1h");
    for byte in [1, 2] {
        daemon.create("vm1", true, 2 * MIB);
        put(&daemon, "vm1", 0, byte);
        daemon.ok(&["disk", "rm", "vm1"]);
    }
    let numbers: Vec<String> = trash(&daemon).into_iter().map(|(_, number)| number.to_string()).collect();
    // The one that was removed last has the hint.
    for verb in ["show", "rm"] {
        let missing = daemon.fails(&["disk", verb, "vm1"]);
        assert!(
            missing.contains(&format!("in the trash; restore it with: plyfs trash restore {}", numbers[1])),
            "{missing}"
        );
        assert!(daemon.fails(&["disk", verb, "never"]).contains("there is no disk"));
    }
    for args in [["trash", "restore", "vm1"], ["trash", "purge", "vm1"]] {
        let wrong = daemon.fails(&args);
        assert!(numbers.iter().all(|number| wrong.contains(number)), "{wrong}");
    }
    for (args, part) in [
        (&["trash", "restore", "vm9"][..], "it is not in the trash; see `plyfs trash ls`"),
        (&["trash", "restore", "99999"], "it is not in the trash"),
        (&["trash", "purge", "vm9"], "it is not in the trash"),
        (&["trash", "purge", &numbers[0], "vm9"], "it is not in the trash"),
        (&["base", "rm", "b"], "trashed disk vm1 (plyfs trash purge "),
        (&["base", "children", "none"], "there is no base"),
        (&["disk", "children", "none"], "there is no disk"),
    ] {
        let wrong = daemon.fails(args);
        assert!(wrong.contains(part), "{args:?}: {wrong}");
    }
    assert_eq!(trash(&daemon).len(), 2, "a mistake in one name purges nothing");
    let children = daemon.json(&["base", "children", "b"]);
    assert_eq!(
        (children.as_array().unwrap().len(), &children[0]["kind"]),
        (2, &"trashed".into()),
        "{children}"
    );
    daemon.ok(&["trash", "restore", &numbers[1]]);
    assert_eq!(byte(&daemon, "vm1", 0), 2);
    daemon.ok(&["trash", "purge", "--all"]);
    daemon.ok(&["disk", "rm", "vm1", "--now"]);
    assert_eq!(trash(&daemon), []);
    // The kernel forgets the last file a moment later.
    until("a base that nothing needs", || daemon.cli(&["base", "rm", "b"]).status.success().then_some(()));
    until("free space", || (fs::read_dir(daemon.store().join("deltas")).unwrap().count() == 0).then_some(()));
}

#[test]
fn a_disk_whose_time_is_over_is_purged_unless_it_is_open() {
    let daemon = keeping("1s");
    daemon.create("closed", true, 2 * MIB);
    daemon.create("held", true, 2 * MIB);
    put(&daemon, "closed", 0, 1);
    let held = open(&daemon.disk("held"));
    held.write_all_at(&[2; 4096], 0).unwrap();
    daemon.ok(&["disk", "rm", "closed"]);
    daemon.ok(&["disk", "rm", "held", "--force"]);
    until("the end of the time", || (trash(&daemon).len() == 1).then_some(()));
    // A client goes on with a disk that is in the trash, and with one whose time is over.
    std::thread::sleep(std::time::Duration::from_secs(2));
    held.write_all_at(&[3; 4096], 4096).unwrap();
    assert_eq!((read_at(&held, 0, 1)[0], read_at(&held, 4096, 1)[0]), (2, 3));
    assert_eq!(trash(&daemon)[0].0, "held");
    drop(held);
    until("the last close", || trash(&daemon).is_empty().then_some(()));
    until("free space", || (fs::read_dir(daemon.store().join("deltas")).unwrap().count() == 0).then_some(()));
    assert!(daemon.log().contains("the time of a disk in the trash is over"), "{}", daemon.log());
}

#[test]
fn clones_are_listed_and_keep_what_a_purge_shares() {
    let daemon = keeping("1h");
    daemon.create("vm1", true, 2 * MIB);
    put(&daemon, "vm1", 0, 1);
    daemon.ok(&["disk", "snapshot", "vm1", "monday"]);
    daemon.ok(&["disk", "clone", "vm1@monday", "clone"]);
    let list = daemon.ok(&["disk", "children", "vm1"]);
    assert!(
        list.lines().nth(1).is_some_and(|line| line.starts_with("clone") && line.contains("vm1@monday")),
        "{list}"
    );
    assert_eq!(daemon.json(&["disk", "children", "vm1@monday"])[0]["name"], "clone");
    let kinds = |daemon: &TestDaemon| -> Vec<String> {
        let list = daemon.json(&["base", "children", "b"]);
        list.as_array().unwrap().iter().map(|child| format!("{} {}", child["name"], child["kind"])).collect()
    };
    assert_eq!(kinds(&daemon), [r#""vm1" "disk""#, r#""vm1@monday" "snapshot""#, r#""clone" "disk""#]);
    daemon.ok(&["disk", "rm", "vm1", "--snapshots"]);
    daemon.ok(&["trash", "purge", "vm1"]);
    assert_eq!((byte(&daemon, "clone", 0), kinds(&daemon)), (1, vec![r#""clone" "disk""#.to_owned()]));
}

/// Guards D83.
#[test]
fn unused_bases_are_pruned_by_hand_and_by_age_and_open_ones_stay() {
    let mut daemon = keeping("0");
    let image = daemon.path("other.raw");
    fs::write(&image, vec![9; MIB as usize]).unwrap();
    for name in ["open", "pinned", "free"] {
        daemon.ok(&["base", "add", name, image.to_str().unwrap()]);
    }
    daemon.ok(&["base", "pin", "pinned"]);
    daemon.create("vm1", true, 2 * MIB);
    let held = fs::File::open(daemon.mount().join("bases/open.raw")).unwrap();
    let refused = daemon.fails(&["base", "rm", "open"]);
    assert!(refused.contains("--force"), "{refused}");
    let pruned = |daemon: &TestDaemon, args: &[&str]| -> Vec<String> {
        let answer = daemon.json(&[&["base", "prune"], args].concat());
        answer["bases"]
            .as_array()
            .unwrap()
            .iter()
            .map(|base| base["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(pruned(&daemon, &["--dry-run"]), ["free"]);
    assert_eq!(pruned(&daemon, &["--older-than", "1h"]), [""; 0]);
    // The next worker does not know what clients have open, and asks the kernel.
    daemon.kill_worker();
    assert!(!pruned(&daemon, &["--dry-run"]).contains(&"open".to_owned()));
    assert_eq!(read_at(&held, 0, 1)[0], 9);
    let text = daemon.ok(&["base", "prune", "--dry-run"]);
    assert!(text.contains("would be removed"), "{text}");
    drop(held);
    // A new mount has no clients.
    daemon.stop();
    daemon.try_start(&["--base-unused-age", "1s"]).unwrap();
    let left = |daemon: &TestDaemon| daemon.json(&["base", "ls"]).as_array().unwrap().len();
    until("bases without a use to go", || (left(&daemon) == 2).then_some(()));
    let names = daemon.ok(&["base", "ls", "-q"]);
    assert_eq!(names, "b\npinned\n");
    assert!(image.exists() && daemon.log().contains("an unused base is removed"));
    let events = daemon.ok(&["events"]);
    assert!(events.contains("base.removed"), "{events}");
}
