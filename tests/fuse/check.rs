//! `plyfs check` shows its progress.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::Stdio;

use serde_json::Value;

use crate::harness::TestDaemon;
use crate::pty::Pty;

/// More than any machine compares within a second. The file is a hole.
const SIZE: u64 = 64 << 30;

/// A store without a daemon. It has a base whose digest takes long, and does not match.
fn slow_to_check() -> (TestDaemon, PathBuf) {
    let mut daemon = TestDaemon::on_disk();
    let image = daemon.path("large.img");
    File::create(&image).unwrap().set_len(SIZE).unwrap();
    daemon.ok(&["base", "add", "large", image.to_str().unwrap(), "--sha256", &"0".repeat(64)]);
    daemon.stop();
    (daemon, image)
}

/// Lets the comparison come to its end.
fn shorten(image: &PathBuf) {
    OpenOptions::new().write(true).open(image).unwrap().set_len(0).unwrap();
}

#[test]
fn a_long_check_prints_lines_of_json_of_which_the_last_is_the_result() {
    let (daemon, image) = slow_to_check();
    let mut command = daemon.command();
    command.args(["--json", "check", "--verify-bases"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut next = || lines.next().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
    let (first, second) = (next().unwrap(), next().unwrap());
    for update in [&first, &second] {
        assert_eq!((update["part"].as_str(), update["total"].as_u64()), (Some("digests"), Some(SIZE)));
    }
    let done = |update: &Value| update["done"].as_u64().unwrap();
    assert!(0 < done(&first) && done(&first) < done(&second) && done(&second) < SIZE, "{first} {second}");
    shorten(&image);
    let rest: Vec<Value> = std::iter::from_fn(next).collect();
    let (result, updates) = rest.split_last().unwrap();
    assert!(updates.iter().all(|update| update["part"].is_string()), "{updates:?}");
    assert!(result["findings"].as_array().is_some_and(|all| !all.is_empty()), "{result}");
    let kinds = result["checked"].as_object().unwrap();
    let is_key = |kind: &String| kind.bytes().all(|byte| byte == b'_' || byte.is_ascii_lowercase());
    assert!(kinds.keys().all(is_key) && kinds.contains_key("map_files"), "{result}");
    assert_eq!(child.wait().unwrap().code(), Some(1));
}

#[test]
fn a_long_check_shows_a_bar_on_a_terminal_and_removes_it() {
    let (daemon, image) = slow_to_check();
    let mut command = daemon.command();
    command.args(["check", "--verify-bases"]);
    let terminal = Pty::spawn(command, 120, 24);
    terminal.until_shown("digests of bases [");
    terminal.until_shown(" of 64G");
    shorten(&image);
    let (status, output) = terminal.end();
    assert_eq!(status, Some(1));
    let (_, after) = output.rsplit_once("digests of bases [").unwrap();
    assert!(after.contains("finding(s), 1 not repaired"), "{after:?}");
    // The line of the bar is cleared before the result.
    let cleared = after.find("\u{1b}[2K").expect("it is cleared");
    assert!(cleared < after.find("large.img has the digest").expect("a finding"), "{after:?}");
}
