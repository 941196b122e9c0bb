//! Jobs of the daemon, and the commands that wait for them.

use std::fs;
use std::process::{Child, Stdio};

use serde_json::Value;

use crate::harness::{TestDaemon, open, read_at, same, signal, until};
use crate::pty::Pty;
use crate::server::{Object, Server};

const MIB: usize = 1 << 20;

fn spawn(daemon: &TestDaemon, args: &[&str]) -> Child {
    daemon.command().args(args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// The job, once `is_so` holds for it.
#[track_caller]
fn job(daemon: &TestDaemon, id: &str, is_so: impl Fn(&Value) -> bool) -> Value {
    until(&format!("the wanted state of job {id}"), || {
        let shown = daemon.cli(&["--json", "job", "show", id]);
        serde_json::from_slice::<Value>(&shown.stdout).ok().filter(&is_so)
    })
}

fn served(len: usize) -> (TestDaemon, Server, Object) {
    let object = Object::new(len);
    let server = Server::start(object.clone());
    let daemon = TestDaemon::on_disk();
    daemon.ok(&["base", "add", "b", &server.url("/b")]);
    (daemon, server, object)
}

/// Guards D73.
#[test]
fn a_hydration_goes_on_after_a_kill_and_an_interrupted_command_until_it_is_cancelled() {
    let (daemon, mut server, object) = served(6 * MIB);
    server.stop();
    let waiting = spawn(&daemon, &["base", "hydrate", "b", "--rate", "3M"]);
    job(&daemon, "hydrate-b", |job| job["state"] == "waiting");
    daemon.kill_worker();
    let resumed = job(&daemon, "hydrate-b", |job| job["resumed"] == true && job["state"] == "waiting");
    assert!(resumed["error"].is_string() && resumed["ended"].is_null(), "{resumed}");
    signal(i32::try_from(waiting.id()).unwrap(), libc::SIGINT);
    let output = waiting.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(130), &b""[..]), "{said}");
    for part in ["the hydration goes on", "plyfs job show hydrate-b", "plyfs job cancel hydrate-b"] {
        assert!(said.contains(part), "{said}");
    }
    let listed = daemon.json(&["jobs"]);
    assert_eq!((listed[0]["id"].as_str(), listed[0]["state"].as_str()), (Some("hydrate-b"), Some("waiting")));
    assert!(daemon.ok(&["job", "ls"]).starts_with("ID "));
    assert_eq!(daemon.json(&["base", "show", "b"])["work"]["job"], "hydrate-b");

    assert_eq!(daemon.ok(&["job", "cancel", "hydrate-b"]), "");
    let shown = daemon.json(&["job", "show", "hydrate-b"]);
    assert_eq!((shown["state"].as_str(), shown["ended"].is_string()), (Some("cancelled"), true), "{shown}");
    assert_eq!(daemon.json(&["base", "show", "b"])["pinned"], false);
    assert_eq!(daemon.ok(&["job", "cancel", "hydrate-b"]), "", "it is cancelled already");
    daemon.kill_worker();
    assert_eq!(daemon.json(&["jobs"]).as_array().unwrap().len(), 0, "no worker continues it");
    let missing = daemon.fails(&["job", "show", "hydrate-b"]);
    assert!(missing.contains("there is no job of that name"), "{missing}");
    server.start_again();
    assert!(daemon.ok(&["base", "hydrate", "b"]).contains("6291456 bytes are in the store"));
    let path = daemon.mount().join("bases/b.raw");
    same(&read_at(&fs::File::open(path).unwrap(), 0, 6 * MIB), &object.bytes, "hydrated at last");
}

#[test]
fn a_command_begins_a_verification_again_that_ended_with_its_worker_and_cancels_it_when_interrupted() {
    let daemon = TestDaemon::on_disk();
    let image = daemon.path("large.raw");
    // So large that no machine compares it while the test runs.
    fs::File::create(&image).unwrap().set_len(1 << 40).unwrap();
    let digest = "ab".repeat(32);
    daemon.ok(&["base", "add", "b", image.to_str().unwrap(), "--sha256", &digest]);
    let waiting = spawn(&daemon, &["base", "verify", "b"]);
    let first = job(&daemon, "verify-b", |job| job["state"] == "verifying");
    daemon.kill_worker();
    let again = job(&daemon, "verify-b", |job| job["state"] == "verifying");
    assert!(again["began"].as_str() > first["began"].as_str(), "{first} {again}");
    assert_eq!(again["resumed"], false);
    signal(i32::try_from(waiting.id()).unwrap(), libc::SIGTERM);
    let output = waiting.wait_with_output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(143), "{said}");
    assert!(said.contains("the verification was cancelled"), "{said}");
    assert_eq!(daemon.json(&["job", "show", "verify-b"])["state"], "cancelled");
}

#[test]
fn updates_of_a_hydration_are_lines_of_json_and_the_last_one_is_the_result() {
    let (daemon, _server, _) = served(4 * MIB);
    let output = daemon.ok(&["--json", "base", "hydrate", "b", "--rate", "2M"]);
    let lines: Vec<Value> = output.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(lines.len() > 1, "{output}");
    let (last, updates) = lines.split_last().unwrap();
    let bytes: Vec<_> = updates.iter().map(|line| line["bytes"].as_u64().unwrap()).collect();
    assert!(bytes.is_sorted(), "{output}");
    assert!(updates.iter().all(|line| line["id"] == "hydrate-b"), "{output}");
    assert_eq!((last["name"].as_str(), last["work"]["state"].as_str()), (Some("b"), Some("done")), "{last}");
    assert_eq!(
        (last["complete"].as_bool(), last["work"]["bytes"].as_u64()),
        (Some(true), Some(4 << 20)),
        "{last}"
    );
    let background = daemon.ok(&["--json", "base", "hydrate", "b", "--background"]);
    assert_eq!(background.lines().count(), 1, "{background}");
    // Work that ends at once has its result only.
    assert_eq!(daemon.json(&["base", "hydrate", "b"])["name"], "b");
}

#[test]
fn a_command_that_waits_draws_a_bar_on_a_terminal_and_nothing_elsewhere() {
    let (daemon, _server, _) = served(4 * MIB);
    let mut command = daemon.command();
    command.args(["base", "hydrate", "b", "--rate", "2M"]);
    let pty = Pty::spawn(command, 100, 24);
    pty.until_shown("fetching");
    let (status, output) = pty.end();
    assert_eq!(status, Some(0), "{output}");
    assert!(
        output.contains("b [#") && output.contains("100% 4M of 4M") && output.contains("done"),
        "{output}"
    );
    assert!(output.contains("4194304 bytes are in the store"), "{output}");
    daemon.ok(&["base", "evict", "b"]);
    let quiet = daemon.cli(&["base", "hydrate", "b"]);
    assert_eq!(String::from_utf8(quiet.stderr).unwrap(), "");
}

#[test]
fn ctrl_c_on_the_terminal_ends_the_wait_and_leaves_the_hydration() {
    let (daemon, mut server, _) = served(4 * MIB);
    server.stop();
    let mut command = daemon.command();
    command.args(["base", "hydrate", "b"]);
    let mut pty = Pty::spawn(command, 80, 24);
    pty.until_shown("waiting");
    pty.type_keys("\x03");
    let (status, output) = pty.end();
    assert_eq!(status, Some(130), "{output}");
    assert!(output.contains("the hydration goes on"), "{output}");
    job(&daemon, "hydrate-b", |job| job["state"] == "waiting");
}

#[test]
fn lists_fit_the_terminal_and_their_names_are_arguments_of_other_commands() {
    let daemon = TestDaemon::in_memory();
    daemon.base(MIB);
    let names: Vec<String> = (0..30).map(|n| format!("a-disk-with-a-long-name-{n}")).collect();
    let all = names.iter().map(String::as_str);
    daemon.ok(&["disk", "create", "--base", "b"].into_iter().chain(all).collect::<Vec<_>>());
    let file = open(&daemon.disk(&names[7]));
    std::os::unix::fs::FileExt::write_all_at(&file, &[1; 8192], 0).unwrap();
    for columns in [40, 80, 132] {
        let mut command = daemon.command();
        command.args(["disk", "ls", "--sort", "name:desc"]);
        let (status, output) = Pty::spawn(command, columns, 24).end();
        assert_eq!(status, Some(0));
        let lines: Vec<&str> = output.lines().collect();
        assert_eq!(lines.len(), 32, "{output}");
        for line in &lines {
            assert!(line.chars().count() <= columns.into(), "{columns}: {line}");
        }
        assert!(lines[31].starts_with("30 disks, 30M in all"), "{output}");
    }
    let piped = daemon.ok(&["disk", "ls"]);
    assert!(piped.contains(daemon.disk(&names[0]).to_str().unwrap()) && piped.contains("s ago"), "{piped}");
    let largest = daemon.ok(&["disk", "ls", "-q", "--sort", "delta:desc"]);
    assert_eq!(largest.lines().next(), Some(names[7].as_str()));
    let few = daemon.ok(&["disk", "ls", "-q", "--filter", "name~name-2", "--filter", "base=b"]);
    assert_eq!(few.lines().count(), 11, "{few}");
    let json = daemon.json(&["disk", "ls", "--filter", "name~name-2"]);
    assert_eq!(json.as_array().unwrap().len(), 11);
    assert!(json[0]["created"].as_str().unwrap().ends_with('Z'), "{json}");
    let removed: Vec<&str> = few.lines().collect();
    daemon.ok(&[&["disk", "rm"], removed.as_slice()].concat());
    assert_eq!(daemon.json(&["disk", "ls"]).as_array().unwrap().len(), 19);
    assert_eq!(daemon.ok(&["base", "ls", "--quiet"]), "b\n");
    let wrong = daemon.fails(&["base", "ls", "--filter", "colour=red"]);
    assert!(wrong.contains("there is no column \"colour\""), "{wrong}");
}
