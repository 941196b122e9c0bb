//! `plyfs events` across deaths of workers, upgrades and a stop.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::harness::{TestDaemon, until};

/// A process that follows the events, and the events that it printed.
struct Follower {
    child: Child,
    lines: Receiver<Value>,
}

impl Follower {
    fn of(daemon: &TestDaemon) -> Self {
        let before = daemon.status()["events"]["listeners"].as_u64().unwrap();
        let mut child = daemon
            .command()
            .args(["--json", "events", "--follow"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (send, lines) = channel();
        let stdout: BufReader<ChildStdout> = BufReader::new(child.stdout.take().unwrap());
        std::thread::spawn(move || {
            for line in stdout.lines() {
                let line = line.unwrap();
                if send.send(serde_json::from_str(&line).unwrap()).is_err() {
                    return;
                }
            }
        });
        until("a listener", || (daemon.status()["events"]["listeners"] == before + 1).then_some(()));
        Self { child, lines }
    }

    /// The next event of that kind.
    fn hears(&self, kind: &str) -> Value {
        loop {
            let event = self.lines.recv_timeout(Duration::from_secs(60)).expect(kind);
            if event["event"] == kind {
                return event;
            }
        }
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn events_follow_continues_with_the_next_worker() {
    let mut daemon = TestDaemon::on_disk();
    let first = &daemon.json(&["events"])[0];
    assert_eq!((first["event"].as_str(), first["number"].as_u64()), (Some("worker.started"), Some(1)));
    assert_eq!(first["worker"].as_i64(), Some(daemon.worker().into()));
    let mut follower = Follower::of(&daemon);
    daemon.kill_worker();
    let started = follower.hears("worker.started");
    let why = started["reason"].as_str().unwrap();
    assert!(why.contains("SIGKILL") && why.contains("its last events may be missing"), "{why}");
    let after_death = started["worker"].as_i64().unwrap();
    assert_eq!(after_death, i64::from(daemon.worker()));
    daemon.prepared();
    daemon.ok(&["upgrade"]);
    let started = follower.hears("worker.started");
    assert_eq!(started.get("reason"), None, "nothing is lost at an upgrade");
    let after_upgrade = started["worker"].as_i64().unwrap();
    assert_ne!(after_upgrade, after_death);
    until("a listener of the new worker", || (daemon.status()["events"]["listeners"] == 1).then_some(()));
    daemon.stop();
    let status = follower.child.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    let mut said = String::new();
    std::io::Read::read_to_string(&mut follower.child.stderr.take().unwrap(), &mut said).unwrap();
    assert!(said.contains("has ended") && said.lines().count() == 1, "{said}");
}

/// An upgrade waits 5 s for requests that do not end. It tells a follower's request to end.
#[test]
fn followers_delay_neither_an_upgrade_nor_a_stop() {
    let mut daemon = TestDaemon::on_disk();
    let _followers: Vec<_> = (0..3).map(|_| Follower::of(&daemon)).collect();
    daemon.prepared();
    let log = daemon.log().len();
    let begun = Instant::now();
    daemon.ok(&["upgrade"]);
    let took = begun.elapsed();
    let log = daemon.log()[log..].to_owned();
    assert!(!log.contains("cut off"), "{took:?}: {log}");
    daemon.stop();
}

#[test]
fn a_closed_pipe_on_stdout_ends_the_command() {
    let daemon = TestDaemon::on_disk();
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "\"$0\" events --follow | head -n 1"]).arg(env!("CARGO_BIN_EXE_plyfs"));
    command.env("PLYFS_STORE", daemon.store()).stdout(Stdio::piped());
    let child = command.spawn().unwrap();
    until("a listener", || (daemon.status()["events"]["listeners"] == 1).then_some(()));
    // The first line ends head, the second the command.
    daemon.kill_worker();
    until("a listener of the new worker", || {
        (daemon.status()["events"]["listeners"].as_u64() <= Some(1)).then_some(())
    });
    daemon.prepared();
    daemon.kill_worker();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("worker.started") && text.lines().count() == 1, "{text}");
}
