//! Deaths of the worker under load of every kind. The long runs are scripts/crash-campaign and scripts/crash-guest.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use plyfs::format::record::DiskRecord;

use crate::harness::*;

fn signal(pid: i32, number: i32) {
    // SAFETY: no memory is involved.
    assert_eq!(unsafe { libc::kill(pid, number) }, 0);
}

/// The campaign with few kills, but with all its clients and comparisons.
#[test]
fn a_short_crash_campaign_passes() {
    if !needs("resend") {
        return;
    }
    if tool("fio").is_none() || tool("python3").is_none() {
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/crash-campaign");
    let text = run(Command::new(script)
        .args(["--kills", "40", "--seed", "3"])
        .env("PLYFS_BIN", env!("CARGO_BIN_EXE_plyfs")));
    assert!(text.contains("crash campaign passed: 4"), "{text}");
}

/// The control socket outlives the worker. A command that meets the death of a worker waits for the next one, and is done
/// once.
#[test]
fn commands_wait_for_the_next_worker() {
    let mut daemon = TestDaemon::on_disk();
    daemon.base(1 << 20);
    let storm = Storm::at_random(&daemon, 21);
    let mut round = 0;
    while storm.kills() < 25 {
        let names: Vec<String> = (0..3).map(|i| format!("r{round}-{i}")).collect();
        let made = daemon.json(&["disk", "create", &names[0], &names[1], &names[2], "--base", "b"]);
        let made: Vec<&str> = made.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
        assert_eq!(made, names);
        daemon.ok(&["disk", "resize", &names[0], "3M"]);
        assert_eq!(daemon.json(&["disk", "show", &names[0]])["size"], 3 << 20);
        assert_eq!(daemon.json(&["status"])["disks"], round + 3);
        daemon.ok(&["disk", "rm", &names[0], &names[1]]);
        let source = daemon.path("b.img");
        daemon.ok(&["base", "add", "again", source.to_str().unwrap()]);
        daemon.ok(&["base", "rm", "again"]);
        // A refusal stays a refusal, however often the worker dies.
        assert!(daemon.fails(&["disk", "create", &names[2], "--base", "b"]).contains("exists"));
        assert!(daemon.fails(&["disk", "rm", &names[0]]).contains(&names[0]));
        round += 1;
    }
    assert!(storm.stop() >= 25);
    assert_eq!(daemon.json(&["disk", "ls"]).as_array().unwrap().len(), round);
    daemon.stop();
    daemon.ok(&["check"]);
}

/// The worker died after `disk rm` was committed and before it told the kernel. The kernel still has the name, and no
/// client may ever look it up again.
#[test]
fn the_next_worker_completes_a_removal_that_was_not_reported_to_the_kernel() {
    let daemon = TestDaemon::on_disk();
    daemon.base(1 << 20);
    let path = daemon.create("gone", true, 1 << 20);
    fs::write(&path, [1; 100_000]).unwrap();
    fs::metadata(&path).unwrap();
    let id = daemon.json(&["disk", "show", "gone"])["id"].as_u64().unwrap();
    let record = daemon.store().join(format!("disks/{id}.disk"));

    signal(daemon.supervisor(), libc::SIGSTOP);
    Killer::new(&daemon).kill();
    let mut unlinked = DiskRecord::decode(&fs::read(&record).unwrap()).unwrap();
    unlinked.unlinked = true;
    fs::write(&record, unlinked.encode()).unwrap();
    signal(daemon.supervisor(), libc::SIGCONT);

    let until = Instant::now() + Duration::from_secs(20);
    // The count drops when the removal begins, so the record is checked as well.
    while daemon.json(&["status"])["unlinked_disks"] != 0 || record.exists() {
        assert!(Instant::now() < until, "the disk that was removed still takes space");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(errno(fs::metadata(&path)), libc::ENOENT);
}
