//! Quotas, IOPS and bandwidth of disks, through the mount.
//!
//! A disk in debt has passed one request and lets the next one go a second later. So tests compare what has happened with
//! what cannot have happened yet, and a slow machine only makes them slower.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::aio::Reads;
use crate::harness::*;

const MIB: u64 = 1 << 20;
const SOON: Duration = Duration::from_secs(60);

fn throttled(daemon: &TestDaemon) -> u64 {
    daemon.status()["requests"]["throttled"].as_u64().unwrap()
}

fn wait_for_throttled(daemon: &TestDaemon, count: u64) {
    until("requests that wait for their turn", || (throttled(daemon) >= count).then_some(()));
}

fn wait_for_event(daemon: &TestDaemon, kind: &str) {
    until("an event", || {
        let events = daemon.json(&["events"]);
        let is_it = |event: &Value| event["event"] == kind && event["disk"] == "one";
        events.as_array().unwrap().iter().any(is_it).then_some(())
    });
}

fn slow(daemon: &TestDaemon, name: &str) {
    daemon.ok(&["disk", "limit", name, "--iops", "1", "--burst", "1ms"]);
}

#[track_caller]
fn all_end(reads: &Reads, count: usize) {
    let mut ended = 0;
    while ended < count {
        let some = reads.ended(count, SOON);
        assert!(!some.is_empty(), "{ended} of {count} reads have ended");
        assert!(some.iter().all(|bytes| *bytes == 4096), "{some:?}");
        ended += some.len();
    }
}

/// Guards D85.
#[test]
fn a_disk_with_128_requests_that_wait_does_not_delay_another() {
    let daemon = TestDaemon::on_disk();
    daemon.create("slow", false, 16 * MIB);
    let free = open(&daemon.create("free", false, 16 * MIB));
    open(&daemon.disk("slow")).write_all_at(&[1; 4096], 0).unwrap();
    slow(&daemon, "slow");
    let reads = Reads::new(&daemon.disk("slow"), 128);
    reads.submit((0..128).map(|n| n * 4096));
    wait_for_throttled(&daemon, 100);
    for n in 0..200 {
        free.write_all_at(&[2; 4096], n * 4096).unwrap();
        assert_eq!(read_at(&free, n * 4096, 4096), [2; 4096]);
    }
    free.sync_all().unwrap();
    // Also what is not limited of the disk itself.
    open(&daemon.disk("slow")).sync_all().unwrap();
    assert_eq!(daemon.disk("slow").metadata().unwrap().len(), 16 * MIB);
    let left = throttled(&daemon);
    assert!(left > 40, "{left} still wait");
    let shown = daemon.json(&["disk", "show", "slow"]);
    assert!(shown["throttled"].as_u64().unwrap() > 40, "{shown}");
    daemon.ok(&["disk", "limit", "slow", "--iops", "none"]);
    all_end(&reads, 128);
    assert_eq!(throttled(&daemon), 0);
    let disks = daemon.json(&["disk", "show", "free"]);
    assert_eq!(disks["throttled"], 0);
}

#[test]
fn no_more_requests_end_than_the_rate_and_the_burst_allow() {
    let daemon = TestDaemon::in_memory();
    daemon.ok(&["disk", "create", "one", "--size", "16M", "--read-iops", "20", "--burst", "500ms"]);
    let reads = Reads::new(&daemon.disk("one"), 200);
    let began = Instant::now();
    reads.submit((0..200).map(|n| n * 4096));
    let mut ended = 0;
    while ended < 50 {
        ended += reads.ended(200, SOON).len();
        let most = began.elapsed().as_secs_f64() * 20.0 + 10.0 + 2.0;
        assert!(ended as f64 <= most, "{ended} of at most {most}");
    }
    // Writes are not limited.
    let file = open(&daemon.disk("one"));
    (0..200).for_each(|n| file.write_all_at(&[1; 4096], n * 4096).unwrap());
    assert!(throttled(&daemon) > 0);
    daemon.ok(&["disk", "limit", "one", "--read-iops", "none"]);
    all_end(&reads, 200 - ended);
}

#[test]
fn bytes_count_and_a_request_larger_than_the_burst_passes() {
    let daemon = TestDaemon::in_memory();
    daemon.create("one", false, 64 * MIB);
    let file = open(&daemon.disk("one"));
    daemon.ok(&["disk", "limit", "one", "--write-bandwidth", "2M/s", "--burst", "10ms"]);
    let began = Instant::now();
    let bytes = vec![7; MIB as usize];
    (0..5).for_each(|n| file.write_all_at(&bytes, n * MIB).unwrap());
    // The first one passes at once; each other one waits for half a second.
    assert!(began.elapsed() >= Duration::from_millis(1900), "{:?}", began.elapsed());
    let stats = daemon.json(&["disk", "show", "one"]);
    assert_eq!(stats["limits"]["write_bandwidth"], 2 * MIB);
    daemon.ok(&["disk", "limit", "one", "--write-bandwidth", "none"]);
    (0..60).for_each(|n| file.write_all_at(&bytes, n * MIB).unwrap());
    same(&read_at(&file, 4 * MIB, MIB as usize), &bytes, "the disk");
}

/// Guards D85.
#[test]
fn requests_of_a_killed_process_end_while_they_wait_for_their_turn() {
    let daemon = TestDaemon::in_memory();
    daemon.create("one", false, 16 * MIB);
    slow(&daemon, "one");
    let path = daemon.disk("one");
    let mut dd = Command::new("dd");
    dd.arg(format!("if={}", path.display())).args(["of=/dev/null", "bs=4k", "iflag=direct"]);
    let mut dd = dd.stderr(Stdio::null()).spawn().unwrap();
    wait_for_throttled(&daemon, 1);
    // In debt for long, so that only the signal can end it.
    let reads = Reads::new(&path, 100);
    reads.submit((0..100).map(|n| n * 4096));
    wait_for_throttled(&daemon, 90);
    dd.kill().unwrap();
    assert_eq!(dd.wait().unwrap().signal(), Some(libc::SIGKILL));
    let left = throttled(&daemon);
    assert!(left > 20, "the others still wait: {left}");
    daemon.ok(&["disk", "limit", "one", "--iops", "none"]);
    all_end(&reads, 100);
}

/// Guards D85.
#[test]
fn a_worker_that_dies_leaves_requests_that_wait_to_the_next_one() {
    if !needs("resend") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    daemon.create("one", false, 16 * MIB);
    let file = open(&daemon.disk("one"));
    file.write_all_at(&[3; 4096], 4096).unwrap();
    slow(&daemon, "one");
    let reads = Reads::new(&daemon.disk("one"), 64);
    reads.submit((0..64).map(|n| n * 4096));
    let writer = file.try_clone().unwrap();
    let write = std::thread::spawn(move || writer.write_all_at(&[4; 4096], 8192));
    wait_for_throttled(&daemon, 60);
    daemon.kill_worker();
    // The limits hold under the next worker, too.
    wait_for_throttled(&daemon, 40);
    daemon.prepared();
    daemon.ok(&["upgrade"]);
    wait_for_throttled(&daemon, 10);
    daemon.ok(&["disk", "limit", "one", "--iops", "none"]);
    all_end(&reads, 64);
    write.join().unwrap().unwrap();
    assert_eq!(read_at(&file, 8192, 4096), [4; 4096]);
}

#[test]
fn a_stop_does_not_wait_for_requests_that_wait_for_their_turn() {
    let mut daemon = TestDaemon::on_disk();
    daemon.create("one", false, 16 * MIB);
    slow(&daemon, "one");
    let file = open(&daemon.disk("one"));
    let writes: Vec<_> = (0..8)
        .map(|n| {
            let file = file.try_clone().unwrap();
            std::thread::spawn(move || file.write_all_at(&[5; 4096], n * 4096).is_ok())
        })
        .collect();
    wait_for_throttled(&daemon, 6);
    daemon.stop();
    let written = writes.into_iter().map(|write| write.join().unwrap());
    let written: Vec<bool> = written.collect();
    daemon.start();
    assert_eq!(daemon.json(&["disk", "show", "one"])["limits"]["iops"], 1);
    daemon.ok(&["disk", "limit", "one", "--iops", "none"]);
    let file = open(&daemon.disk("one"));
    for (n, written) in written.into_iter().enumerate() {
        let block = read_at(&file, n as u64 * 4096, 4096);
        let is = block[0];
        assert!(block.iter().all(|byte| *byte == is) && (is == 5 || !written), "block {n}: {is}");
    }
}

fn put(file: &File, at: u64, len: u64) -> Result<(), i32> {
    let bytes: Vec<u8> = vec![9; len as usize];
    match file.write_at(&bytes, at) {
        Ok(written) => {
            assert_eq!(written as u64, len);
            Ok(())
        }
        Err(error) => Err(error.raw_os_error().unwrap()),
    }
}

/// Guards D84.
#[test]
fn a_disk_at_its_quota_refuses_new_blocks_and_nothing_else() {
    let daemon = TestDaemon::on_disk();
    let base = daemon.base(4 * MIB as usize);
    daemon.ok(&["disk", "create", "one", "--base", "b", "--size", "16M", "--quota", "1M"]);
    daemon.create("other", false, 16 * MIB);
    let file = open(&daemon.disk("one"));
    assert_eq!(put(&file, 8 * MIB, MIB / 2), Ok(()));
    assert_eq!(put(&file, 9 * MIB, MIB), Err(libc::ENOSPC));
    same(&read_at(&file, 9 * MIB, MIB as usize), &vec![0; MIB as usize], "a refused write");
    assert_eq!(put(&file, 0, MIB), Err(libc::ENOSPC));
    same(&read_at(&file, 0, MIB as usize), &base[..MIB as usize], "a refused write");
    assert_eq!(put(&file, 10 * MIB, MIB / 2), Ok(()));
    for _ in 0..2 {
        assert_eq!(put(&file, 12 * MIB, 512), Err(libc::ENOSPC));
        assert_eq!(put(&file, 8 * MIB, MIB / 2), Ok(()), "an overwrite");
        assert_eq!(put(&file, 8 * MIB + 100, 1000), Ok(()));
        file.sync_all().unwrap();
        let status = daemon.status();
        assert_eq!((&status["disks_at_quota"], &status["space"]["full"]), (&json!(["one"]), &json!(false)));
        assert_eq!(daemon.ok(&["disk", "ls", "-q", "--filter", "at_quota=true"]), "one\n");
        let shown = daemon.json(&["disk", "show", "one"]);
        assert_eq!((&shown["quota_used"], &shown["at_quota"]), (&json!(MIB), &json!(true)));
        assert_eq!(put(&open(&daemon.disk("other")), 0, 4 * MIB), Ok(()), "other disks go on");
        // The next worker counts the same. It has refused nothing yet.
        daemon.kill_worker();
    }
    assert_eq!(put(&file, 12 * MIB, 4096), Err(libc::ENOSPC));
    wait_for_event(&daemon, "disk.full");
    fallocate(&file, PUNCH, 8 * MIB, MIB / 4).unwrap();
    assert_eq!(put(&file, 12 * MIB, MIB / 4), Ok(()), "after a discard, through the same handle");
    assert_eq!(put(&file, 13 * MIB, 4096), Err(libc::ENOSPC));
    // A discard that ends within blocks of the base.
    fallocate(&file, PUNCH, MIB + 100, 10_000).unwrap();
    assert_eq!(read_at(&file, MIB + 100, 10_000), vec![0; 10_000]);
    daemon.ok(&["disk", "limit", "one", "--quota", "2M"]);
    assert_eq!(put(&file, 13 * MIB, 4096), Ok(()), "after the quota was raised");
    assert_eq!(daemon.status()["disks_at_quota"], json!([]));
    assert_eq!(errno(fallocate(&file, 0, 4 * MIB, 3 * MIB)), libc::ENOSPC);
    daemon.ok(&["disk", "limit", "one", "--quota", "64K"]);
    assert_eq!(put(&file, 14 * MIB, 4096), Err(libc::ENOSPC), "below what the disk takes");
    assert_eq!(put(&file, 13 * MIB, 4096), Ok(()));
    file.set_len(5 * MIB).unwrap();
    fallocate(&file, PUNCH, 0, 5 * MIB).unwrap();
    assert_eq!(put(&file, 4 * MIB, 64 << 10), Ok(()));
    daemon.ok(&["disk", "limit", "one", "--quota", "none"]);
    assert_eq!(put(&file, 0, MIB), Ok(()));
    drop(file);
    daemon.ok(&["disk", "rm", "one"]);
    wait_for_event(&daemon, "disk.room");
}

/// Guards D84.
#[test]
fn a_snapshot_counts_against_the_quota_until_it_is_removed() {
    let daemon = TestDaemon::on_disk();
    daemon.ok(&["disk", "create", "one", "--size", "16M", "--quota", "1M"]);
    let file = open(&daemon.disk("one"));
    assert_eq!(put(&file, 0, MIB / 2), Ok(()));
    daemon.ok(&["disk", "snapshot", "one", "s"]);
    assert_eq!(put(&file, 0, MIB / 2), Ok(()), "what the snapshot holds is written anew");
    assert_eq!(put(&file, MIB, 4096), Err(libc::ENOSPC));
    daemon.ok(&["disk", "clone", "one@s", "two", "--iops", "700", "--quota", "2M"]);
    let limits = daemon.json(&["disk", "show", "two"])["limits"].clone();
    assert_eq!(
        (&limits["iops"], &limits["quota"], &limits["bandwidth"]),
        (&json!(700), &json!(2 * MIB), &Value::Null)
    );
    daemon.ok(&["disk", "rm", "two"]);
    let used = || daemon.json(&["disk", "show", "one"])["quota_used"].as_u64().unwrap();
    assert_eq!(used(), MIB);
    daemon.ok(&["disk", "rollback", "one", "s", "--force"]);
    assert_eq!(used(), MIB / 2);
    assert_eq!(put(&file, MIB, 4096), Ok(()));
}

#[test]
fn limits_are_shown_filtered_and_refused_with_the_remedy() {
    let mut daemon = TestDaemon::in_memory();
    daemon.ok(&["disk", "create", "one", "two", "--size", "16M", "--quota", "1G", "--bandwidth", "100M/s"]);
    daemon.create("three", false, MIB);
    let limits = json!({
        "quota": 1 << 30, "iops": null, "read_iops": null, "write_iops": null, "bandwidth": 100 * MIB,
        "read_bandwidth": null, "write_bandwidth": null, "burst_ms": null,
    });
    assert_eq!(daemon.json(&["disk", "show", "one"])["limits"], limits);
    let text = daemon.ok(&["disk", "limit", "one"]);
    assert!(text.contains("bandwidth") && text.contains("100M") && text.contains("1G"), "{text}");
    assert_eq!(daemon.json(&["disk", "limit", "one"])["limits"], limits);
    daemon.ok(&["disk", "limit", "two", "--write-iops", "30", "--burst", "1m", "--quota", "none"]);
    let two = &daemon.json(&["disk", "limit", "two"])["limits"];
    assert_eq!(
        (&two["write_iops"], &two["burst_ms"], &two["quota"]),
        (&json!(30), &json!(60_000), &Value::Null)
    );
    assert_eq!(two["bandwidth"], 100 * MIB, "what is not named stays");
    assert_eq!(daemon.ok(&["disk", "ls", "-q", "--filter", "quota=1G"]), "one\n");
    let rows = daemon.json(&["disk", "ls", "--sort", "quota:desc"]);
    assert_eq!((&rows[0]["name"], &rows[0]["limits"], rows[0].get("quota")), (&json!("one"), &limits, None));
    for (args, part) in [
        (&["--quota", "0"][..], "none"),
        (&["--quota", "100"], "4K"),
        (&["--quota", "-1G"], "negative"),
        (&["--iops", "0"], "none"),
        (&["--iops", "many"], "number"),
        (&["--iops", "9999999999999"], "give 1 to"),
        (&["--bandwidth", "1K/s"], "64K"),
        (&["--bandwidth", "100M/min"], "unit"),
        (&["--burst", "2h"], "1h"),
        (&["--burst", "5"], "time"),
    ] {
        let error = daemon.fails(&[&["disk", "limit", "one"], args].concat());
        assert!(error.contains(part), "{args:?}: {error}");
    }
    assert!(daemon.fails(&["disk", "limit", "none", "--iops", "5"]).contains("none"));
    assert_eq!(daemon.json(&["disk", "show", "one"])["limits"], limits, "refused limits change nothing");
    daemon.restart();
    assert_eq!(daemon.json(&["disk", "show", "one"])["limits"], limits);
    let metrics = run(Command::new("curl")
        .args(["-s", "--unix-socket"])
        .arg(daemon.store().join("control.sock"))
        .arg("http://x/metrics"));
    for name in ["plyfs_disks_at_quota 0", "plyfs_requests_throttled 0", "plyfs_quota_refusals_total 0"] {
        assert!(metrics.contains(name), "{name}");
    }
}

#[test]
fn an_imported_disk_has_the_limits_of_the_command() {
    let daemon = TestDaemon::on_disk();
    let image = daemon.path("image.raw");
    std::fs::write(&image, vec![5; MIB as usize]).unwrap();
    let options = ["--quota", "512M", "--iops", "5000", "--bandwidth", "1G"];
    daemon.ok(&[&["disk", "import", "vm", image.to_str().unwrap()], &options[..]].concat());
    let limits = daemon.json(&["disk", "show", "vm"])["limits"].clone();
    let wanted = (json!(512 << 20), json!(5000), json!(1 << 30));
    assert_eq!(
        (limits["quota"].clone(), limits["iops"].clone(), limits["bandwidth"].clone()),
        wanted,
        "{limits}"
    );
    same(&std::fs::read(daemon.disk("vm")).unwrap(), &vec![5; MIB as usize], "the image");
    let refused = daemon.fails(&["disk", "import", "vm2", image.to_str().unwrap(), "--quota", "64K"]);
    assert!(refused.contains("vm2"), "{refused}");
    assert!(!daemon.disk("vm2").exists(), "no disk is left of an import that does not fit its quota");
}
