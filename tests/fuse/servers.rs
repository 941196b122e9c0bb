//! Servers that refuse requests, serve wrong objects or are slow, through the mount. Reads wait for a server that may
//! recover.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::harness::{TestDaemon, open, read_at, same, until};
use crate::server::{Object, Reply, Server};

const MIB: usize = 1 << 20;
/// An offset that is not fetched when the base is added.
const FAR: u64 = 700_000;

fn added(more: &[&str]) -> (TestDaemon, Server, Object) {
    let object = Object::new(2 * MIB);
    let (daemon, server) = (TestDaemon::on_disk(), Server::start(object.clone()));
    daemon.ok(&[&["base", "add", "b", &server.url("/b?signature=one")], more].concat());
    daemon.ok(&["disk", "create", "b", "--base", "b"]);
    (daemon, server, object)
}

fn state(daemon: &TestDaemon) -> String {
    daemon.json(&["base", "show", "b"])["state"].as_str().unwrap().to_owned()
}

fn becomes(daemon: &TestDaemon, wanted: &str) {
    until(wanted, || (state(daemon) == wanted).then_some(()));
}

fn events(daemon: &TestDaemon, kind: &str) -> usize {
    let events = daemon.json(&["events"]);
    events.as_array().unwrap().iter().filter(|event| event["event"] == kind && event["base"] == "b").count()
}

/// Reads at an offset that is not cached, on a thread.
fn reader(daemon: &TestDaemon, object: &Object) -> thread::JoinHandle<()> {
    let (path, bytes) = (daemon.disk("b"), object.bytes.clone());
    thread::spawn(move || {
        same(&read_at(&open(&path), FAR, 100_000), &bytes[FAR as usize..][..100_000], "a reader that waited");
    })
}

/// Regression: each of these was EIO within milliseconds: an expired token, a path that is missing for four seconds, a
/// deactivated image, an empty body, a store without random access.
#[test]
fn a_temporary_refusal_of_a_server_is_no_error_for_a_guest() {
    let (daemon, server, object) = added(&[]);
    for status in [401, 403, 404, 410, 204, 400] {
        server.on(move |_| Reply::status(status));
        let waits = reader(&daemon, &object);
        becomes(&daemon, "waiting");
        let shown = daemon.json(&["base", "show", "b"]);
        let why = shown["waiting_for"].as_str().unwrap();
        assert!(why.contains(&status.to_string()), "{shown}");
        assert!(shown["waiting_since"].is_string() && shown["state_since"].is_string(), "{shown}");
        assert!(shown["servers"][0]["trouble"].as_str().unwrap().contains(&status.to_string()), "{shown}");
        assert!(daemon.ok(&["base", "ls"]).contains("waiting"));
        // Cached blocks are read meanwhile.
        same(&read_at(&open(&daemon.disk("b")), 0, 4096), &object.bytes[..4096], "a cached block");
        server.on(|_| Reply::Object);
        waits.join().unwrap();
        becomes(&daemon, "ok");
        daemon.ok(&["base", "evict", "b"]);
        daemon.ok(&["disk", "rm", "b"]);
        daemon.ok(&["base", "rm", "b"]);
        daemon.ok(&["base", "add", "b", &server.url("/b")]);
        daemon.ok(&["disk", "create", "b", "--base", "b"]);
    }
    // Adding a base fails at once.
    server.on(|_| Reply::status(404));
    assert!(daemon.fails(&["base", "add", "none", &server.url("/c")]).contains("404"));
}

/// Regression: after a presigned URL expired, reads were EIO until the base and its disks were created anew.
/// Guards H10.
#[test]
fn an_expired_url_is_replaced_under_open_disks() {
    let (mut daemon, server, object) = added(&[]);
    let bytes = object.bytes.clone();
    let file = open(&daemon.disk("b"));
    same(&read_at(&file, 0, 64 << 10), &bytes[..64 << 10], "before");
    server.on(|request| match request.target.contains("signature=two") {
        true => Reply::Object,
        false => Reply::status(403),
    });
    let waits = reader(&daemon, &object);
    becomes(&daemon, "waiting");
    // The new source must not be another object, a URL that is refused too, or a path.
    let other = Server::start(Object::seeded(2 * MIB, 7));
    assert!(daemon.fails(&["base", "set", "b", "--source", &other.url("/b")]).contains("another object"));
    assert!(daemon.fails(&["base", "set", "b", "--source", &server.url("/b?signature=no")]).contains("403"));
    assert!(daemon.fails(&["base", "set", "b", "--source", "/images/b"]).contains("not a URL"));
    assert!(!waits.is_finished());
    // The secret comes from a file.
    let path = daemon.path("url");
    fs::write(&path, format!("{}\n", server.url("/b?signature=two"))).unwrap();
    daemon.ok(&["base", "set", "b", "--source-file", path.to_str().unwrap()]);
    waits.join().unwrap();
    becomes(&daemon, "ok");
    let shown = daemon.json(&["base", "show", "b"]).to_string() + &daemon.log();
    assert!(!shown.contains("signature=two"), "{shown}");
    // Cached blocks stay usable, and a later daemon uses the new URL.
    let asked = server.requests().len();
    same(&read_at(&file, 0, 64 << 10), &bytes[..64 << 10], "cached blocks");
    assert_eq!(server.requests().len(), asked, "no block is fetched twice");
    drop(file);
    daemon.kill_worker();
    until("the next worker", || daemon.status()["worker_starts"].as_u64().filter(|n| *n > 1));
    same(&read_at(&open(&daemon.disk("b")), 0, 64 << 10), &bytes[..64 << 10], "after a kill");
    daemon.restart();
    assert_eq!(server.requests().len(), asked, "no block is fetched twice");
    same(&read_at(&open(&daemon.disk("b")), 0, 2 * MIB), &bytes, "after a restart");
    assert!(server.requests()[asked..].iter().all(|request| request.target.contains("signature=two")));
    daemon.stop();
    let check =
        Command::new(env!("CARGO_BIN_EXE_plyfs")).arg("--store").arg(daemon.store()).arg("check").output();
    let check = check.unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    daemon.start();
}

/// Only the operator can know that a server is gone for good.
#[test]
fn base_fail_ends_waiting_reads_until_it_is_undone() {
    let (mut daemon, server, object) = added(&[]);
    server.on(|_| Reply::status(404));
    let file = open(&daemon.disk("b"));
    let waits = {
        let file = file.try_clone().unwrap();
        thread::spawn(move || file.read_exact_at(&mut [0; 4096], FAR).unwrap_err().raw_os_error())
    };
    becomes(&daemon, "waiting");
    daemon.ok(&["base", "fail", "b"]);
    assert_eq!(waits.join().unwrap(), Some(libc::EIO));
    // Later reads do not wait, cached blocks are read, and both hold after a restart.
    drop(file);
    for _ in 0..2 {
        assert_eq!(state(&daemon), "given_up");
        let file = open(&daemon.disk("b"));
        assert_eq!(file.read_exact_at(&mut [0; 4096], FAR).unwrap_err().raw_os_error(), Some(libc::EIO));
        same(&read_at(&file, 0, 4096), &object.bytes[..4096], "a cached block");
        drop(file);
        daemon.restart();
    }
    server.on(|_| Reply::Object);
    let asked = server.requests().len();
    assert!(open(&daemon.disk("b")).read_exact_at(&mut [0; 4096], FAR).is_err());
    assert_eq!(server.requests().len(), asked, "no request reaches the server");
    daemon.ok(&["base", "fail", "b", "--undo"]);
    reader(&daemon, &object).join().unwrap();
    becomes(&daemon, "ok");
    // Another URL undoes it as well.
    daemon.ok(&["base", "fail", "b"]);
    daemon.ok(&["base", "set", "b", "--source", &server.url("/elsewhere")]);
    same(&read_at(&open(&daemon.disk("b")), 0, 2 * MIB), &object.bytes, "from elsewhere");
    // A file has no server.
    let path = daemon.path("image");
    fs::write(&path, &*object.bytes).unwrap();
    daemon.ok(&["base", "add", "file", path.to_str().unwrap()]);
    assert!(daemon.fails(&["base", "fail", "file"]).contains("file of this host"));
    assert!(
        daemon.fails(&["base", "set", "file", "--source", &server.url("/b")]).contains("file of this host")
    );
}

/// Regression: after one answer of a cache with another version, reads were EIO until the next worker, with the state ok.
#[test]
fn another_version_of_the_object_is_never_used_and_reads_wait() {
    let (daemon, server, object) = added(&[]);
    // A cache on the way has another version. The server behind it has the right one.
    let old = Object::seeded(2 * MIB, 2);
    server.on(move |request| match request.header("cache-control") {
        Some("no-cache") => Reply::Object,
        _ => Reply::Of(old.clone()),
    });
    same(
        &read_at(&open(&daemon.disk("b")), 200_000, 4096),
        &object.bytes[200_000..][..4096],
        "past the cache",
    );
    // For a while, the server has another version.
    server.set_object(Object::seeded(2 * MIB, 2));
    server.on(|_| Reply::Object);
    let waits = reader(&daemon, &object);
    becomes(&daemon, "changed");
    until("the event", || (events(&daemon, "base.changed") > 0).then_some(()));
    assert!(daemon.ok(&["base", "ls"]).contains("changed"));
    assert!(!waits.is_finished());
    server.set_object(object.clone());
    waits.join().unwrap();
    becomes(&daemon, "ok");
    until("the event", || (events(&daemon, "base.resumed") > 0).then_some(()));
    same(&read_at(&open(&daemon.disk("b")), 0, 2 * MIB), &object.bytes, "no byte of the other version");
}

/// Regression: after a deadline `base ls` showed ok and an event reported that the base resumed, with the server down.
#[test]
fn a_base_is_shown_as_failing_until_a_read_succeeds() {
    let (daemon, mut server, object) = added(&["--deadline", "1s"]);
    server.stop();
    let file = open(&daemon.disk("b"));
    assert_eq!(file.read_exact_at(&mut [0; 4096], FAR).unwrap_err().raw_os_error(), Some(libc::EIO));
    becomes(&daemon, "failing");
    let shown = daemon.json(&["base", "show", "b"]);
    assert!(shown["error"].as_str().unwrap().contains("has not sent it for 1s"), "{shown}");
    assert!(shown["failing_since"].is_string(), "{shown}");
    let since = shown["failing_since"].as_str().unwrap();
    let listed = daemon.ok(&["base", "ls"]);
    let line = listed.lines().find(|line| line.starts_with("b: ")).unwrap_or_else(|| panic!("{listed}"));
    assert!(line.starts_with(&format!("b: failing since {since}: ")), "{line}");
    assert!(line.contains("has not sent it for 1s") && line.contains("refused"), "{line}");
    assert!(daemon.ok(&["status"]).contains("failing"));
    until("the error to be told", || (events(&daemon, "base.error") > 0).then_some(()));
    // A read of a cached block does not change the state, and neither does a disk that is opened again.
    same(&read_at(&file, 0, 4096), &object.bytes[..4096], "a cached block");
    same(&read_at(&open(&daemon.disk("b")), 0, 4096), &object.bytes[..4096], "a cached block");
    assert_eq!(state(&daemon), "failing");
    // A later error keeps the beginning.
    assert_eq!(file.read_exact_at(&mut [0; 4096], FAR).unwrap_err().raw_os_error(), Some(libc::EIO));
    assert_eq!(daemon.json(&["base", "show", "b"])["failing_since"], shown["failing_since"]);
    assert_eq!(events(&daemon, "base.resumed"), 0);
    server.start_again();
    until("a read that works", || file.read_exact_at(&mut [0; 4096], FAR).ok());
    becomes(&daemon, "ok");
    assert!(daemon.json(&["base", "show", "b"])["error"].is_null());
    assert!(!daemon.ok(&["base", "ls"]).contains("b: "), "no line about a base that works");
    until("the event", || (events(&daemon, "base.resumed") > 0).then_some(()));
}

/// Regression: one byte a second reset every timer, so that a deadline of 3 s never passed and the state was ok.
#[test]
fn the_deadline_ends_a_read_from_a_server_that_sends_one_byte_a_second() {
    let (daemon, server, _) = added(&["--deadline", "3s"]);
    server.on(|_| Reply::Trickle(Duration::from_secs(1)));
    let error = open(&daemon.disk("b")).read_exact_at(&mut vec![0; 4096], FAR).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    becomes(&daemon, "failing");
    let shown = daemon.json(&["base", "show", "b"]);
    assert!(shown["error"].as_str().unwrap().contains("has not sent it for 3s"), "{shown}");
}

/// A reader that is killed while it waits does not affect other readers.
#[test]
fn a_killed_reader_frees_its_place_for_other_readers() {
    let (daemon, server, object) = added(&[]);
    server.on(|_| Reply::status(503));
    let path = daemon.disk("b");
    let mut killed: Vec<_> = (0..8)
        .map(|n| {
            let mut dd = Command::new("dd");
            dd.arg(format!("if={}", path.display())).arg(format!("skip={}", n + 6));
            dd.args(["of=/dev/null", "bs=128K", "count=1", "iflag=direct", "status=none"]);
            dd.stderr(Stdio::null()).spawn().unwrap()
        })
        .collect();
    becomes(&daemon, "waiting");
    let waits = reader(&daemon, &object);
    for dd in &mut killed {
        dd.kill().unwrap();
    }
    server.on(|_| Reply::Object);
    waits.join().unwrap();
    for dd in &mut killed {
        dd.wait().unwrap();
    }
    becomes(&daemon, "ok");
}
