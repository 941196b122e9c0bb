//! `plyfs top` on a terminal and without one.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use serde_json::Value;

use crate::harness::{TestDaemon, open, signal, until};
use crate::pty::Pty;

const MIB: usize = 1 << 20;

/// Writes to a disk until it is dropped.
struct Load {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Load {
    fn on(daemon: &TestDaemon, disk: &str) -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let (file, over) = (open(&daemon.disk(disk)), is_over.clone());
        let thread = std::thread::spawn(move || {
            let (mut at, block) = (0, [7; 4096]);
            while !over.load(Ordering::Relaxed) {
                file.write_all_at(&block, at).unwrap();
                at = (at + 4096) % (MIB as u64);
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
        });
        Self { is_over, thread: Some(thread) }
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

fn serving() -> (TestDaemon, Load) {
    let daemon = TestDaemon::in_memory();
    daemon.base(MIB);
    daemon.ok(&["disk", "create", "busy", "idle", "--base", "b"]);
    let load = Load::on(&daemon, "busy");
    (daemon, load)
}

#[test]
fn one_frame_is_printed_as_text_or_as_json() {
    let (daemon, _load) = serving();
    let text = daemon.ok(&["top", "--once", "--interval", "1s"]);
    let rows: Vec<&str> = text.lines().map(|line| line.split(' ').next().unwrap()).collect();
    let at =
        |name: &str| rows.iter().position(|row| *row == name).unwrap_or_else(|| panic!("{name}: {text}"));
    assert!(at("busy") < at("idle") && at("idle") < at("b"), "{text}");
    let lines = daemon.ok(&["--json", "top", "--batch", "2", "--interval", "1s", "--filter", "name=busy"]);
    let frames: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(frames.len(), 2, "{lines}");
    for frame in frames {
        let disks = frame["disks"].as_array().unwrap();
        assert_eq!(disks.len(), 1, "{frame}");
        assert!(disks[0]["writes_per_second"].as_f64().unwrap() > 1.0, "{frame}");
        assert!(disks[0]["write_latency_us"].as_u64().unwrap() > 0, "{frame}");
        assert_eq!(
            (&frame["total"]["disks"], &frame["worker_changed"]),
            (&2.into(), &false.into()),
            "{frame}"
        );
    }
    let wrong = daemon.fails(&["top"]);
    assert!(wrong.contains("no terminal; give --once"), "{wrong}");
}

#[test]
fn the_screen_takes_keys_outlives_a_worker_and_leaves_the_terminal_as_it_was() {
    let (daemon, _load) = serving();
    let mut command = daemon.command();
    command.args(["top", "--interval", "1s"]);
    let mut pty = Pty::spawn(command, 150, 30);
    pty.until_shown("busy");
    pty.until_shown("quit");
    daemon.kill_worker();
    // A word: the screen moves over a space that was there before.
    pty.until_shown("another");
    pty.type_keys("/idle\r");
    pty.until_shown("(of");
    pty.type_keys("p");
    pty.until_shown("PAUSED");
    pty.resize(60, 10);
    pty.type_keys("q");
    let (status, output) = pty.end();
    assert_eq!(status, Some(0), "{output}");
    assert!(output.contains("\u{1b}[?1049h") && output.ends_with("\u{1b}[?1049l\u{1b}[?25h"), "{output:?}");
}

/// The terminal's new size and the key are there at once for the program that looks for both.
#[test]
fn keys_typed_while_the_terminal_changes_its_size_are_taken() {
    let (daemon, _load) = serving();
    let mut command = daemon.command();
    command.args(["top", "--interval", "60s"]);
    let mut pty = Pty::spawn(command, 100, 30);
    pty.until_shown("quit");
    pty.type_keys("/");
    pty.until_shown("filter");
    for (round, key) in (0..).zip(('a'..='z').cycle().take(78)) {
        let shown = pty.output().len();
        pty.resize(100 + round % 2, 30);
        pty.type_keys(&key.to_string());
        // The screen before ends with another letter.
        let text = format!("{key}_");
        until(&text, || pty.output().get(shown..)?.contains(&text).then_some(()));
    }
    pty.type_keys("\u{3}");
    assert_eq!(pty.end().0, Some(0));
}

#[test]
fn a_signal_leaves_the_terminal_as_it_was() {
    let (daemon, _load) = serving();
    let mut command = daemon.command();
    command.arg("top");
    let pty = Pty::spawn(command, 100, 30);
    pty.until_shown("quit");
    signal(pty.pid(), libc::SIGTERM);
    let (status, output) = pty.end();
    assert_eq!(status, Some(143), "{output}");
    assert!(output.contains("\u{1b}[?1049l"), "{output:?}");
}
