//! The supervisor and its workers: takeovers, workers that keep dying, a stop at any moment.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{Random, TestDaemon, children, needs, open, read_at, run, same, signal, tool, until};

/// A client that writes, reads, compares and flushes one disk through one open file, until it is stopped.
pub struct Client {
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<u8>>>,
}

impl Client {
    pub fn new(path: &Path, size: u64, seed: u64) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let (seen, path) = (Arc::clone(&end), path.to_path_buf());
        let (first, begun) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let file = open(&path);
            let mut model = read_at(&file, 0, size as usize);
            let (mut random, mut rounds) = (Random(seed), 0);
            // At least one round, however soon it is stopped.
            while rounds == 0 || !seen.load(Ordering::Relaxed) {
                let len = 1 + random.below(64 << 10);
                let at = random.below(size - len);
                let bytes = random.bytes(len as usize);
                file.write_all_at(&bytes, at).unwrap_or_else(|e| panic!("write: {e}"));
                model[at as usize..(at + len) as usize].copy_from_slice(&bytes);
                let at = random.below(size - len);
                same(&read_at(&file, at, len as usize), &model[at as usize..(at + len) as usize], "read");
                if rounds % 16 == 0 {
                    file.sync_data().unwrap_or_else(|e| panic!("flush: {e}"));
                }
                rounds += 1;
                let _ = first.send(());
            }
            same(&read_at(&file, 0, size as usize), &model, "the whole disk");
            model
        });
        // Wait until the client has done its first round.
        let _ = begun.recv();
        Self { end, thread: Some(thread) }
    }

    /// Stops the client, and returns the expected contents of the disk.
    pub fn stop(mut self) -> Vec<u8> {
        self.end.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }

    /// Whether the client met no error; a client ends at its first error.
    pub fn is_fine(&self) -> bool {
        !self.thread.as_ref().unwrap().is_finished()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

/// The open files of a process: kinds and paths, without the numbers that change.
fn open_files(pid: i32) -> Vec<String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let link = |e: std::io::Result<fs::DirEntry>| fs::read_link(e.unwrap().path()).ok();
    let kind = |path: std::path::PathBuf| {
        let text = path.display().to_string();
        text.split_once(":[").map_or(text.clone(), |(kind, _)| kind.to_owned())
    };
    let mut all: Vec<String> = entries.filter_map(link).map(kind).collect();
    all.sort();
    all
}

fn state(pid: i32) -> Option<char> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit(") ").next()?.chars().next()
}

fn is_mounted(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}

#[test]
fn the_standby_takes_over_and_another_is_prepared() {
    if !needs("resend") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    let disk = open(&daemon.create("a", false, 1 << 20));
    disk.write_all_at(b"before", 4096).unwrap();
    let (worker, standby) = daemon.prepared();
    signal(worker, libc::SIGKILL);
    same(&read_at(&disk, 4096, 6), b"before", "after the worker");
    let (next, after) = daemon.prepared();
    assert_eq!(next, standby, "another worker than the standby took over");
    assert!(![worker, standby].contains(&after));

    // Only the standby dies: the worker goes on.
    let before = daemon.status();
    signal(after, libc::SIGKILL);
    let another = until("another standby", || Some(daemon.prepared()).filter(|(_, s)| *s != after));
    assert_eq!(another.0, standby, "the worker ended with its standby");
    let now = daemon.status();
    assert_eq!(now["worker_starts"], before["worker_starts"]);
    assert_eq!(now["worker_ends"], before["worker_ends"]);

    // Both die at the same moment.
    signal(another.1, libc::SIGKILL);
    signal(another.0, libc::SIGKILL);
    same(&read_at(&disk, 4096, 6), b"before", "after both");
    let (worker, standby) = daemon.prepared();
    for old in [another.0, another.1] {
        assert!(old != worker && old != standby);
    }
    let end = daemon.status()["worker_ends"].as_array().unwrap().last().unwrap().clone();
    assert!(end["why"].as_str().unwrap().contains("SIGKILL"), "{end}");
}

/// Guards D22.
#[test]
fn kills_and_upgrades_leak_no_files_or_processes() {
    let daemon = TestDaemon::on_disk();
    let arguments = || fs::read(format!("/proc/{}/cmdline", daemon.supervisor())).unwrap();
    let arguments_before = arguments();
    let look = |pids: (i32, i32)| {
        let (worker, standby) = pids;
        [open_files(daemon.supervisor()), open_files(worker), open_files(standby)]
    };
    // Compare with the state after one of each, because an upgraded supervisor may have other files than the first.
    daemon.kill_worker();
    daemon.ok(&["upgrade"]);
    let before = look(daemon.prepared());
    for round in 0..20 {
        let (worker, _) = daemon.prepared();
        signal(worker, libc::SIGKILL);
        until("another worker", || (daemon.status()["worker_pid"] != worker).then_some(()));
        if round % 4 == 0 {
            // This standby is not prepared yet.
            let standby = daemon.status()["standby"]["pid"].as_i64();
            standby.into_iter().for_each(|pid| signal(pid as i32, libc::SIGKILL));
        }
    }
    for _ in 0..20 {
        daemon.ok(&["upgrade"]);
    }
    // The connection of an ended command may still be open.
    let mut after = None;
    until(&format!("files as before ({before:#?}"), || {
        let pids = daemon.prepared();
        after = Some(look(pids));
        (after.as_ref() == Some(&before)).then_some(())
    });
    let (worker, standby) = daemon.prepared();
    let mut expected = vec![worker, standby];
    let mut found = children(daemon.supervisor());
    expected.sort_unstable();
    found.sort_unstable();
    assert_eq!(found, expected, "children of the supervisor");
    assert_eq!(arguments(), arguments_before);
    assert_eq!(fs::read_to_string(format!("/proc/{}/comm", daemon.supervisor())).unwrap().trim(), "plyfs");
    for pid in [worker, standby] {
        let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
        let environment = String::from_utf8_lossy(&environment);
        assert!(!environment.contains("PLYFS_RESUME=") && !environment.contains("LISTEN_"), "{environment}");
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let blocked = status.lines().find_map(|line| line.strip_prefix("SigBlk:")).unwrap();
        assert_eq!(blocked.trim(), "0000000000000000", "signals that {pid} blocks");
    }
}

/// Guards D22.
#[test]
fn as_the_first_process_of_a_container_the_supervisor_reaps_orphans() {
    if tool("unshare").is_none() {
        return;
    }
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let mut unshare = Command::new("unshare");
    unshare.args(["--pid", "--fork", "--kill-child", "--mount-proc"]);
    daemon.start_under(unshare);
    let supervisor = children(daemon.supervisor())[0];
    for _ in 0..5 {
        let starts = daemon.status()["worker_starts"].clone();
        // Workers have openers, which outlive them for a moment.
        let worker = children(supervisor).into_iter().find(|pid| state(*pid) != Some('Z')).unwrap();
        signal(worker, libc::SIGKILL);
        until("another worker", || (daemon.status()["worker_starts"] != starts).then_some(()));
        daemon.prepared();
    }
    until("an end of all zombies", || {
        let zombies = children(supervisor).into_iter().filter(|pid| state(*pid) == Some('Z')).count();
        (zombies == 0).then_some(())
    });
    daemon.stop();
}

#[test]
fn workers_that_keep_dying_are_restarted_with_pauses_and_reported() {
    if !needs("resend") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    let client = Client::new(&daemon.create("a", false, 4 << 20), 4 << 20, 1);
    let end = Instant::now() + Duration::from_secs(3);
    while Instant::now() < end {
        for pid in children(daemon.supervisor()) {
            signal(pid, libc::SIGKILL);
        }
        std::thread::sleep(Duration::from_micros(300));
    }
    let status = daemon.status();
    assert!(status["back_off_ms"].as_u64().unwrap() > 0, "{status}");
    let ends = status["worker_ends"].as_array().unwrap();
    assert!(
        ends.len() > 5 && ends.iter().all(|end| end["why"].as_str().unwrap().contains("SIGKILL")),
        "{status}"
    );
    assert!(daemon.log().contains("workers keep ending soon"));
    // A worker that lives for a while ends the pauses.
    let (worker, _) = daemon.prepared();
    std::thread::sleep(Duration::from_millis(500));
    signal(worker, libc::SIGKILL);
    until("another worker", || (daemon.status()["worker_pid"] != worker).then_some(()));
    assert_eq!(daemon.status()["back_off_ms"], 0);
    assert!(client.is_fine());
    client.stop();
}

/// Leaves the daemon without a serving worker: the standby that must take over is stopped. Returns its process id.
fn stop_serving(daemon: &TestDaemon) -> i32 {
    let (worker, standby) = daemon.prepared();
    signal(standby, libc::SIGSTOP);
    signal(worker, libc::SIGKILL);
    standby
}

#[test]
fn without_a_serving_worker_the_status_reports_it() {
    if !needs("resend") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    let client = Client::new(&daemon.create("a", false, 1 << 20), 1 << 20, 1);
    let stopped = stop_serving(&daemon);
    // A request in the first second waits until a worker or the supervisor can answer.
    let why = daemon.fails(&["status"]);
    assert!(why.contains("no worker has served") && why.contains(&stopped.to_string()), "{why}");
    assert!(why.contains("SIGKILL"), "{why}");
    signal(stopped, libc::SIGCONT);
    assert_eq!(daemon.status()["worker_pid"], stopped);
    client.stop();
}

#[test]
fn a_worker_that_does_not_take_over_is_replaced() {
    if !needs("resend") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    let client = Client::new(&daemon.create("a", false, 1 << 20), 1 << 20, 1);
    let stuck = stop_serving(&daemon);
    // The worker stays stopped: the supervisor must notice that.
    let status = until("another worker", || {
        let output = daemon.cli(&["--json", "status"]);
        output.status.success().then(|| serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap())
    });
    assert_ne!(status["worker_pid"], stuck);
    let why = status["worker_ends"].as_array().unwrap().last().unwrap()["why"].as_str().unwrap().to_owned();
    assert!(why.contains("did not take over"), "{why}");
    assert!(client.is_fine());
    client.stop();
}

#[test]
fn a_stop_without_a_serving_worker_closes_the_store() {
    let mut daemon = TestDaemon::on_disk();
    let path = daemon.create("a", false, 1 << 20);
    open(&path).write_all_at(b"not flushed", 8192).unwrap();
    stop_serving(&daemon);
    // Only the live map knows the bytes, and a clean stop removes it.
    daemon.stop();
    assert_eq!(daemon.live_maps(), Vec::<std::path::PathBuf>::new());
    daemon.start();
    same(&read_at(&open(&path), 8192, 11), b"not flushed", "after the stop");
}

#[test]
fn a_worker_that_dies_while_the_store_is_closed_is_replaced() {
    for files_are_open in [false, true] {
        let mut daemon = TestDaemon::on_disk();
        let path = daemon.create("a", false, 1 << 20);
        let file = open(&path);
        file.write_all_at(b"not flushed", 8192).unwrap();
        let file = files_are_open.then_some(file);
        let (worker, _) = daemon.prepared();
        signal(worker, libc::SIGSTOP);
        signal(daemon.supervisor(), libc::SIGTERM);
        until("an end of the mount", || (!is_mounted(&daemon.mount())).then_some(()));
        signal(worker, libc::SIGKILL);
        daemon.ended();
        drop(file);
        assert_eq!(daemon.live_maps(), Vec::<std::path::PathBuf>::new());
        daemon.start();
        same(&read_at(&open(&path), 8192, 11), b"not flushed", "after the stop");
    }
}

#[test]
fn a_daemon_whose_mount_was_detached_stops_cleanly() {
    let mut daemon = TestDaemon::on_disk();
    let path = daemon.create("a", false, 1 << 20);
    let file = open(&path);
    file.write_all_at(b"not flushed", 8192).unwrap();
    run(Command::new("umount").arg("-l").arg(daemon.mount()));
    daemon.stop();
    drop(file);
    assert_eq!(daemon.live_maps(), Vec::<std::path::PathBuf>::new());
    daemon.start();
    same(&read_at(&open(&path), 8192, 11), b"not flushed", "after the stop");
}

#[test]
fn a_store_that_becomes_readable_again_needs_no_restart() {
    if !needs("resend") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    let client = Client::new(&daemon.create("a", false, 1 << 20), 1 << 20, 1);
    let (worker, standby) = daemon.prepared();
    let superblock = daemon.store().join("plyfs.store");
    let good = fs::read(&superblock).unwrap();
    let mut bad = good.clone();
    bad[20] ^= 1;
    fs::write(&superblock, &bad).unwrap();
    signal(standby, libc::SIGKILL);
    signal(worker, libc::SIGKILL);
    let why = until("a reason", || {
        let output = daemon.cli(&["status"]);
        let text = String::from_utf8(output.stderr).unwrap();
        (text.contains("plyfs.store") && text.contains("tried in")).then_some(text)
    });
    assert!(why.contains("no worker has served"), "{why}");
    assert!(client.is_fine());
    fs::write(&superblock, &good).unwrap();
    let status: Value = daemon.status();
    assert!(status["worker_ends"].to_string().contains("plyfs.store"), "{status}");
    client.stop();
}
