//! `plyfs stop` reports how the daemon ended.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::harness::*;

const MIB: u64 = 1 << 20;

// Regression: the command reported success although the daemon ended with 1 and a disk was not durable.
#[test]
fn stop_fails_and_names_the_disks_that_are_not_durable() {
    let mut daemon = TestDaemon::on_disk();
    for name in ["good", "bad", "worse"] {
        open(&daemon.create(name, false, MIB)).write_all_at(name.as_bytes(), 0).unwrap();
    }
    let number = |name: &str| daemon.json(&["disk", "show", name])["id"].as_u64().unwrap();
    // Directories with the names of their first map files.
    let blocked =
        [number("bad"), number("worse")].map(|id| daemon.store().join(format!("deltas/{id}.1.map")));
    blocked.iter().for_each(|path| fs::create_dir(path).unwrap());
    let why = daemon.fails(&["stop"]);
    assert!(why.contains("disk bad") && why.contains("disk worse") && !why.contains("good"), "{why}");
    assert_eq!(daemon.exit_code(), Some(1));
    blocked.iter().for_each(|path| fs::remove_dir(path).unwrap());
    // The written data is still in memory.
    daemon.start();
    for name in ["good", "bad", "worse"] {
        same(&read_at(&open(&daemon.disk(name)), 0, name.len()), name.as_bytes(), name);
    }
    daemon.stop();
    daemon.ok(&["check"]);
}

#[test]
fn stop_fails_when_the_daemon_is_killed_before_it_ends() {
    let mut daemon = TestDaemon::on_disk();
    daemon.create("a", false, MIB);
    let supervisor = daemon.supervisor();
    signal(supervisor, libc::SIGSTOP);
    let mut stop = daemon.command();
    let stop = stop.arg("stop").stderr(std::process::Stdio::piped()).spawn().unwrap();
    // The worker passes the request on, but the supervisor is stopped and cannot receive it.
    daemon.kill_supervisor();
    let output = stop.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    daemon.start();
    daemon.stop();
}

/// Regression: the daemon ended no earlier than a container that had a private copy of the mount.
#[test]
fn stop_does_not_wait_for_another_mount_namespace() {
    let mut daemon = TestDaemon::on_disk();
    let path = daemon.create("a", false, MIB);
    open(&path).write_all_at(b"written", 0).unwrap();
    let mut container = Command::new("unshare");
    container.args(["--mount", "--propagation", "private", "sleep", "60"]);
    let mut container = container.spawn().unwrap();
    let pid = container.id().to_string();
    let comm = format!("/proc/{pid}/comm");
    until("the container", || (fs::read_to_string(&comm).unwrap() == "sleep\n").then_some(()));
    daemon.ok(&["stop"]);
    daemon.ended();
    assert!(container.try_wait().unwrap().is_none(), "the daemon waited for the container");
    let look = ["--mount", "--target", &pid, "ls"];
    let look = Command::new("nsenter").args(look).arg(daemon.mount()).env("LC_ALL", "C").output().unwrap();
    assert!(String::from_utf8_lossy(&look.stderr).contains("not connected"), "{look:?}");
    container.kill().unwrap();
    container.wait().unwrap();
    daemon.start();
    same(&read_at(&open(&path), 0, 7), b"written", "after the stop");
}
