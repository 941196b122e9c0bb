//! Exports and imports as jobs: listed, cancelled, and cleared up after a client that was killed.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::process::{Child, Stdio};

use serde_json::Value;

use crate::harness::{Random, TestDaemon, open, same, signal, until};

const MIB: u64 = 1 << 20;

fn names(daemon: &TestDaemon, disk: &str) -> Vec<String> {
    let list = daemon.json(&["disk", "snapshots", disk]);
    list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

fn jobs(daemon: &TestDaemon) -> Vec<Value> {
    daemon.json(&["jobs"]).as_array().unwrap().clone()
}

/// A disk, and an export of it to a pipe that no process reads yet.
fn exporting(daemon: &TestDaemon) -> (Vec<u8>, Child) {
    let bytes = Random(5).bytes(8 << 20);
    open(&daemon.create("vm1", false, 8 * MIB)).write_all_at(&bytes, 0).unwrap();
    let mut command = daemon.command();
    command.args(["disk", "export", "vm1", "-"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    until("a listed export", || (jobs(daemon).len() == 1 && names(daemon, "vm1").len() == 1).then_some(()));
    (bytes, child)
}

fn are_gone(daemon: &TestDaemon) -> Option<()> {
    (jobs(daemon).is_empty() && names(daemon, "vm1").is_empty()).then_some(())
}

#[test]
fn an_export_is_listed_and_a_cancellation_ends_it_and_leaves_nothing() {
    let daemon = TestDaemon::on_disk();
    for is_read in [true, false] {
        let (_, mut child) = exporting(&daemon);
        let job = jobs(&daemon).remove(0);
        assert_eq!(job["id"], format!("export-vm1-{}", child.id()));
        let shown =
            (job["kind"].as_str(), job["disk"].as_str(), job["state"].as_str(), job["total"].as_u64());
        assert_eq!(shown, (Some("export"), Some("vm1"), Some("copying"), Some(8 * MIB)));
        assert!(daemon.ok(&["job", "show", job["id"].as_str().unwrap()]).contains("copying"));
        std::thread::scope(|scope| {
            let mut out = child.stdout.take().unwrap();
            let cancelled = scope.spawn(|| daemon.ok(&["job", "cancel", job["id"].as_str().unwrap()]));
            if is_read {
                until("the cancelled state", || {
                    jobs(&daemon).first().is_none_or(|job| job["state"] == "cancelled").then_some(())
                });
                out.read_to_end(&mut Vec::new()).unwrap();
            }
            let mut said = String::new();
            child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
            assert!(!child.wait().unwrap().success() && said.contains("an operator cancelled it"), "{said}");
            assert_eq!(said.contains("nothing is left"), is_read, "{said}");
            cancelled.join().unwrap();
        });
        until("no job and no snapshot", || are_gone(&daemon));
        daemon.ok(&["disk", "rm", "vm1"]);
    }
}

#[test]
fn the_snapshot_of_a_killed_export_goes() {
    let daemon = TestDaemon::on_disk();
    let (_, mut child) = exporting(&daemon);
    // Snapshots of a like name that no client holds stay.
    daemon.ok(&["disk", "snapshot", "vm1", "plyfs-export-0123456789abcdef"]);
    // A process that is stopped keeps its snapshot.
    signal(child.id() as i32, libc::SIGSTOP);
    std::thread::sleep(std::time::Duration::from_secs(15));
    assert_eq!(names(&daemon, "vm1").len(), 2);
    child.kill().unwrap();
    child.wait().unwrap();
    until("a snapshot less", || (names(&daemon, "vm1") == ["plyfs-export-0123456789abcdef"]).then_some(()));
    assert!(jobs(&daemon).is_empty());
}

#[test]
fn an_export_survives_the_death_of_the_worker_and_is_listed_again() {
    let daemon = TestDaemon::on_disk();
    let (bytes, mut child) = exporting(&daemon);
    daemon.kill_worker();
    until("the job, under the next worker", || (jobs(&daemon).len() == 1).then_some(()));
    let mut shown = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut shown).unwrap();
    assert!(child.wait().unwrap().success());
    same(&shown, &bytes, "the export");
    assert_eq!(are_gone(&daemon), Some(()));
    // A worker that ends in order does not wait for it.
    daemon.ok(&["disk", "rm", "vm1"]);
    let (_, mut child) = exporting(&daemon);
    daemon.ok(&["upgrade"]);
    until("the job, after an upgrade", || (jobs(&daemon).len() == 1).then_some(()));
    child.kill().unwrap();
    child.wait().unwrap();
    until("no job and no snapshot", || are_gone(&daemon));
}

#[test]
fn a_cancelled_import_leaves_no_disk() {
    let daemon = TestDaemon::on_disk();
    let bytes = Random(6).bytes(8 << 20);
    open(&daemon.create("vm1", false, 8 * MIB)).write_all_at(&bytes, 0).unwrap();
    daemon.ok(&["disk", "snapshot", "vm1", "s"]);
    let file = daemon.path("first");
    daemon.ok(&["disk", "export", "vm1@s", file.to_str().unwrap(), "--format", "increment"]);
    let mut stream = Vec::new();
    File::open(&file).unwrap().read_to_end(&mut stream).unwrap();
    let mut command = daemon.command();
    command.args(["disk", "import", "copy", "-", "--increment"]).stdin(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    input.write_all(&stream[..3 << 20]).unwrap();
    let job = until("a listed import", || jobs(&daemon).pop());
    assert_eq!((job["kind"].as_str(), job["disk"].as_str()), (Some("import"), Some("copy")));
    daemon.ok(&["job", "cancel", job["id"].as_str().unwrap()]);
    // It sees that when it has something to do. It may not read the rest.
    let _ = input.write_all(&stream[3 << 20..]);
    drop(input);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("an operator cancelled it"), "{said}");
    assert!(!fs::exists(daemon.disk("copy")).unwrap() && jobs(&daemon).is_empty());
}
