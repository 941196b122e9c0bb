//! A stopped worker, and hanging files: the supervisor and the commands report them, and a stop ends in bounded time.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use crate::hanging::Hanging;
use crate::harness::{Random, TestDaemon, open, read_at, same, signal, until};

const MIB: usize = 1 << 20;
/// Longer than any operation here, on any machine.
const BOUND: Duration = Duration::from_secs(60);

/// Runs `work` on another thread. Fails when it does not end.
#[track_caller]
fn ends<T: Send + 'static>(what: &str, work: impl FnOnce() -> T + Send + 'static) -> T {
    let (says, done) = channel();
    thread::spawn(move || says.send(work()));
    done.recv_timeout(BOUND).unwrap_or_else(|_| panic!("{what} does not end"))
}

/// Runs a command in bounded time. Returns its standard output, its standard error, and whether it succeeded.
#[track_caller]
fn says(daemon: &TestDaemon, args: &[&str]) -> (String, String, bool) {
    let mut command = daemon.command();
    command.args(args);
    let output = ends(&format!("{args:?}"), move || command.output().unwrap());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (text(&output.stdout), text(&output.stderr), output.status.success())
}

/// Starts a process that reads an offset of a disk that was not read before.
fn reads(disk: &Path) -> Child {
    let mut command = std::process::Command::new("dd");
    command.arg(format!("if={}", disk.display()));
    command.args(["of=/dev/null", "bs=4096", "count=1", "skip=500", "status=none"]);
    command.stderr(Stdio::null()).spawn().unwrap()
}

#[track_caller]
fn status_of_silent(daemon: &TestDaemon) -> serde_json::Value {
    until("a status of a worker that does not answer", || {
        let (out, err, ok) = says(daemon, &["--json", "status"]);
        assert!(ok, "{err}");
        let status: serde_json::Value = serde_json::from_str(&out).unwrap();
        status["worker_not_answering_since"].is_string().then_some(status)
    })
}

/// The arguments of a stop.
fn stop(files_are_open: bool) -> &'static [&'static str] {
    if files_are_open { &["stop", "--force"] } else { &["stop"] }
}

#[test]
fn a_stopped_worker_is_reported_and_an_upgrade_replaces_it() {
    let daemon = TestDaemon::on_disk();
    let file = open(&daemon.create("a", false, 1 << 20));
    file.write_all_at(b"not flushed", 8192).unwrap();
    let (worker, _) = daemon.prepared();
    signal(worker, libc::SIGSTOP);
    let status = status_of_silent(&daemon);
    assert_eq!(status["worker_pid"], worker);
    assert_eq!(status["supervisor_pid"], daemon.supervisor());
    assert!(status["worker_not_answering_why"].as_str().unwrap().contains("stopped by a signal"), "{status}");
    let (human, ..) = says(&daemon, &["status"]);
    assert!(human.contains("not answering since") && human.contains("plyfs upgrade"), "{human}");
    let log = daemon.log();
    assert!(log.contains("the worker does not answer"), "{log}");
    let (_, err, ok) = says(&daemon, &["upgrade"]);
    assert!(ok, "{err}");
    same(&read_at(&file, 8192, 11), b"not flushed", "after the upgrade");
    assert_ne!(daemon.prepared().0, worker);
}

#[test]
fn a_worker_that_continues_is_not_replaced() {
    let daemon = TestDaemon::on_disk();
    daemon.create("a", false, 1 << 20);
    let (worker, _) = daemon.prepared();
    signal(worker, libc::SIGSTOP);
    status_of_silent(&daemon);
    signal(worker, libc::SIGCONT);
    let status = until("the worker to answer", || {
        Some(daemon.status()).filter(|status| status["worker_not_answering_since"].is_null())
    });
    assert_eq!(
        (status["worker_pid"].as_i64(), status["disks"].as_u64()),
        (Some(worker.into()), Some(1)),
        "{status}"
    );
    until("the log", || daemon.log().contains("the worker answers again").then_some(()));
}

#[test]
fn a_stop_ends_in_bounded_time_when_the_worker_is_stopped() {
    for files_are_open in [false, true] {
        let mut daemon = TestDaemon::on_disk();
        let path = daemon.create("a", false, 1 << 20);
        let file = open(&path);
        file.write_all_at(b"not flushed", 8192).unwrap();
        let file = files_are_open.then_some(file);
        let (worker, _) = daemon.prepared();
        signal(worker, libc::SIGSTOP);
        let (_, err, ok) = says(&daemon, stop(files_are_open));
        assert!(ok, "{err}");
        daemon.ended();
        drop(file);
        assert_eq!(daemon.live_maps(), Vec::<std::path::PathBuf>::new());
        daemon.start();
        same(&read_at(&open(&path), 8192, 11), b"not flushed", "after the stop");
    }
}

#[test]
fn a_stop_does_not_wait_for_a_hanging_filesystem_of_a_base() {
    for files_are_open in [false, true] {
        let hanging = Hanging::new(Random(9).bytes(4 * MIB));
        let mut daemon = TestDaemon::on_disk();
        daemon.ok(&["base", "add", "nfs", hanging.image().to_str().unwrap()]);
        daemon.ok(&["disk", "create", "a", "--base", "nfs"]);
        let path = daemon.disk("a");
        let file = open(&path);
        file.write_all_at(&[7; 4096], 8192).unwrap();
        hanging.hang();
        let mut reader = reads(&path);
        hanging.wait_for(1);
        let file = files_are_open.then_some(file);
        reader.kill().unwrap();
        ends("the reader", move || reader.wait().unwrap());
        let (_, err, ok) = says(&daemon, stop(files_are_open));
        assert!(ok, "{err}\n{}", daemon.log());
        daemon.ended();
        drop(file);
        hanging.go_on();
        daemon.start();
        same(&read_at(&open(&path), 8192, 4096), &[7; 4096], "after the stop");
        daemon.stop();
    }
}

// Regression: the worker could not end, because one of its threads waited in the kernel. Where fusectl was not mounted,
// its clients waited as long.
#[test]
fn reads_that_wait_for_a_hanging_filesystem_end_with_the_daemon() {
    let hanging = Hanging::new(Random(9).bytes(4 * MIB));
    let mut daemon = TestDaemon::on_disk();
    daemon.ok(&["base", "add", "nfs", hanging.image().to_str().unwrap()]);
    daemon.ok(&["disk", "create", "a", "--base", "nfs"]);
    let path = daemon.disk("a");
    drop(open(&path));
    hanging.hang();
    let mut reader = reads(&path);
    hanging.wait_for(1);
    let (_, err, ok) = says(&daemon, &["stop"]);
    assert!(!ok && err.contains(&format!("(pid {})", reader.id())), "{err}");
    let (_, err, ok) = says(&daemon, stop(true));
    assert!(ok, "{err}\n{}", daemon.log());
    daemon.ended();
    ends("the reader", move || assert!(!reader.wait().unwrap().success()));
    hanging.go_on();
    daemon.start();
    daemon.stop();
}

#[test]
fn commands_on_a_hanging_path_delay_no_other_command() {
    let hanging = Hanging::new(Random(9).bytes(MIB));
    let mut daemon = TestDaemon::on_disk();
    let data = daemon.base(MIB);
    daemon.create("a", true, 1 << 20);
    daemon.restart();
    hanging.hang();
    let adds: Vec<Child> = (0..40)
        .map(|n| {
            let mut command = daemon.command();
            command.args(["base", "add", &format!("n{n}"), hanging.trap(n).to_str().unwrap()]);
            command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    hanging.wait_for(1);
    let (out, err, ok) = says(&daemon, &["--json", "status"]);
    assert!(ok && out.contains("worker_pid"), "{err}");
    let (out, err, ok) = says(&daemon, &["disk", "ls"]);
    assert!(ok && out.contains('a'), "{err}");
    // The first use of a base opens its file.
    let path = daemon.disk("a");
    ends("a read", move || same(&read_at(&open(&path), 0, MIB), &data, "another base"));
    let (_, err, ok) = says(&daemon, &["stop"]);
    assert!(ok, "{err}");
    hanging.go_on();
    for mut add in adds {
        add.kill().unwrap();
        ends("a command", move || add.wait().unwrap());
    }
    daemon.ended();
}
