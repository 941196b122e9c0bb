//! The persistent cache through the mount: which base reads which blocks, and which blocks must not be lost.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use crate::harness::{TestDaemon, open, read_at, run, same, until};
use crate::server::{Object, Server};

const MIB: usize = 1 << 20;

fn sha256(daemon: &TestDaemon, bytes: &[u8]) -> String {
    let path = daemon.path("to-sum");
    fs::write(&path, bytes).unwrap();
    run(Command::new("sha256sum").arg(&path)).split_whitespace().next().unwrap().to_owned()
}

fn letter(letter: u8, len: usize) -> Object {
    Object { bytes: Arc::new(vec![letter; len]), ..Object::seeded(0, u64::from(letter)) }
}

fn add(daemon: &TestDaemon, name: &str, source: &str, more: &[&str]) {
    daemon.ok(&[&["base", "add", name, source], more].concat());
    daemon.ok(&["disk", "create", name, "--base", name]);
}

fn whole(daemon: &TestDaemon, name: &str, len: usize) -> Vec<u8> {
    read_at(&open(&daemon.disk(name)), 0, len)
}

/// Waits until the cache has `bytes` bytes of the base.
fn wait_until_cached(daemon: &TestDaemon, name: &str, bytes: usize) {
    until("all of it to be kept", || {
        (daemon.json(&["base", "show", name])["cached_bytes"].as_u64()? >= bytes as u64).then_some(())
    });
}

/// Base `evil` on server A and base `good` on server B, with the digest of B's bytes.
#[test]
fn a_digest_that_was_not_compared_gives_no_base_the_blocks_of_another() {
    let len = 4 * MIB;
    let (a, b) = (Server::start(letter(b'A', len)), Server::start(letter(b'B', len)));
    let mut daemon = TestDaemon::on_disk();
    let sum = sha256(&daemon, &b.object().bytes);
    add(&daemon, "evil", &a.url("/a"), &["--sha256", &sum]);
    same(&whole(&daemon, "evil", len), &vec![b'A'; len], "evil");
    wait_until_cached(&daemon, "evil", len);
    add(&daemon, "good", &b.url("/b"), &["--sha256", &sum]);
    same(&whole(&daemon, "good", len), &vec![b'B'; len], "good");
    daemon.restart();
    same(&whole(&daemon, "good", len), &vec![b'B'; len], "good, the next daemon");
    let said = daemon.ok(&["base", "hydrate", "good"]);
    assert!(said.contains("the digest matches"), "{said}");
    assert_eq!(daemon.json(&["base", "show", "good"])["state"], "ok");
    // A third base with the digest is complete at once.
    let probe = b.url("/elsewhere");
    add(&daemon, "third", &probe, &["--sha256", &sum]);
    let before = b.body_bytes();
    same(&whole(&daemon, "third", len), &vec![b'B'; len], "third");
    assert_eq!(b.body_bytes(), before, "no request reaches its server");
    assert_eq!(daemon.json(&["base", "show", "third"])["digest_verified"], true);
    // Hydrated blocks stay when other bases are evicted or removed.
    daemon.ok(&["base", "evict", "third"]);
    daemon.ok(&["base", "evict", "evil"]);
    daemon.ok(&["disk", "rm", "third"]);
    daemon.ok(&["base", "rm", "third"]);
    assert_eq!(daemon.json(&["base", "show", "good"])["complete"], true);
    // The wrong contents of the evil base's server are detected, and affect only the evil base.
    a.set_object(letter(b'A', len));
    daemon.ok(&["base", "evict", "good"]);
    let said = daemon.fails(&["base", "hydrate", "evil"]);
    assert!(said.contains("digest"), "{said}");
    assert_eq!(daemon.json(&["base", "show", "evil"])["state"], "refused");
    same(&whole(&daemon, "good", len), &vec![b'B'; len], "good at the end");
}

#[test]
fn a_refused_base_is_accepted_when_its_bytes_are_right_again() {
    let len = 3 * MIB;
    let right = Object::new(len);
    let wrong = Object { bytes: Arc::new(vec![7; len]), ..right.clone() };
    let server = Server::start(wrong.clone());
    let mut daemon = TestDaemon::on_disk();
    let sum = sha256(&daemon, &right.bytes);
    add(&daemon, "b", &server.url("/b"), &["--sha256", &sum]);
    let disk = open(&daemon.disk("b"));
    same(&read_at(&disk, 0, 100_000), &[7; 100_000], "before the comparison");
    let said = daemon.fails(&["base", "hydrate", "b"]);
    assert!(said.contains("fetched twice"), "{said}");
    assert_eq!(disk.read_exact_at(&mut [0; 10], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    daemon.fails(&["base", "verify", "b"]);
    server.set_object(right.clone());
    daemon.restart();
    let said = daemon.ok(&["base", "verify", "b"]);
    assert!(said.contains("the digest matches"), "{said}");
    same(&whole(&daemon, "b", len), &right.bytes, "the right contents");
    assert_eq!(daemon.json(&["base", "show", "b"])["state"], "ok");
}

/// The source has no validator. A new base on the replaced image reads only the new image.
#[test]
fn a_new_base_on_a_replaced_image_reads_no_block_of_the_old_one() {
    let len = 2 * MIB;
    let plain = |letter| Object { bytes: Arc::new(vec![letter; len]), etag: None, last_modified: None };
    let server = Server::start(plain(b'1'));
    let daemon = TestDaemon::on_disk();
    add(&daemon, "old", &server.url("/image"), &["--identity", "size"]);
    same(&whole(&daemon, "old", len), &vec![b'1'; len], "old");
    wait_until_cached(&daemon, "old", len);
    server.set_object(plain(b'2'));
    add(&daemon, "new", &server.url("/image"), &["--identity", "size"]);
    same(&whole(&daemon, "new", len), &vec![b'2'; len], "new");
    same(&whole(&daemon, "old", len), &vec![b'1'; len], "cached blocks of the old image");
}

/// Hydrated bases whose originals are removed, and a start with few descriptors.
#[test]
fn a_start_with_few_descriptors_loses_no_hydrated_base() {
    let mut daemon = TestDaemon::on_disk();
    let bases = 60;
    let bytes = |n: usize| vec![n as u8 + 1; 40_000];
    for n in 0..bases {
        let path = daemon.path(&format!("image{n}"));
        fs::write(&path, bytes(n)).unwrap();
        daemon.ok(&["base", "add", &format!("b{n}"), path.to_str().unwrap()]);
        daemon.ok(&["base", "hydrate", &format!("b{n}")]);
        fs::remove_file(&path).unwrap();
    }
    daemon.stop();
    let mut few = Command::new("prlimit");
    few.arg("--nofile=110:110");
    daemon.start_under(few);
    let read = |daemon: &TestDaemon, n: usize| {
        let path = daemon.mount().join(format!("bases/b{n}.raw"));
        same(&read_at(&fs::File::open(path).unwrap(), 0, 40_000), &bytes(n), &format!("base {n}"));
    };
    (0..bases).for_each(|n| read(&daemon, n));
    daemon.stop();
    daemon.start();
    (0..bases).for_each(|n| read(&daemon, n));
}

/// The eviction comes while a reader waits for a dead server and the base is being hydrated.
#[test]
fn an_eviction_cancels_the_hydration_of_the_base() {
    let len = 6 * MIB;
    let object = Object::new(len);
    let mut server = Server::start(object.clone());
    let daemon = TestDaemon::on_disk();
    let sum = sha256(&daemon, &object.bytes);
    add(&daemon, "b", &server.url("/b"), &["--sha256", &sum]);
    same(&read_at(&open(&daemon.disk("b")), 0, MIB), &object.bytes[..MIB], "the head");
    wait_until_cached(&daemon, "b", MIB);
    server.stop();
    let waits = {
        let (path, bytes) = (daemon.disk("b"), object.bytes.clone());
        thread::spawn(move || {
            same(&read_at(&open(&path), 3 * MIB as u64, MIB), &bytes[3 * MIB..4 * MIB], "waited")
        })
    };
    until("the reader to wait", || (daemon.json(&["base", "show", "b"])["state"] == "waiting").then_some(()));
    daemon.ok(&["base", "hydrate", "b", "--background"]);
    until("the hydration to wait", || {
        (daemon.json(&["base", "show", "b"])["work"]["state"] == "waiting").then_some(())
    });
    let said = daemon.fails(&["base", "verify", "b"]);
    assert!(said.contains("is being hydrated"), "{said}");
    daemon.ok(&["base", "evict", "b"]);
    let shown = daemon.json(&["base", "show", "b"]);
    assert_eq!(
        (shown["cached_bytes"].as_u64(), shown["pinned"].as_bool()),
        (Some(0), Some(false)),
        "{shown}"
    );
    assert_eq!(
        (shown["work"]["state"].as_str(), shown["work"]["error"].as_str()),
        (Some("cancelled"), Some("the base was evicted")),
        "{shown}"
    );
    assert!(daemon.ok(&["base", "verify", "b"]).contains("0 bytes are in the store"));
    server.start_again();
    waits.join().unwrap();
    same(&whole(&daemon, "b", len), &object.bytes, "afterwards");
}

/// The copy in the store is the last one when the server is gone, or has another image: then an eviction loses data.
#[test]
fn the_last_copy_of_a_base_on_a_server_is_dropped_only_with_force() {
    let daemon = TestDaemon::on_disk();
    let object = letter(b'a', MIB);
    let mut server = Server::start(object.clone());
    add(&daemon, "b", &server.url("/b"), &["--sha256", &sha256(&daemon, &object.bytes)]);
    daemon.ok(&["base", "hydrate", "b"]);
    let cached = || daemon.json(&["base", "show", "b"])["cached_bytes"].as_u64().unwrap();
    for another in [false, true] {
        if another {
            server.start_again();
            server.set_object(Object::seeded(MIB, 9));
        } else {
            server.stop();
        }
        let text = daemon.fails(&["base", "evict", "b"]);
        for part in ["base b", "may be the last one", "repeat with --force"] {
            assert!(text.contains(part), "{another}: {part}: {text}");
        }
        assert_eq!(cached(), MIB as u64, "{another}: a refused eviction drops nothing");
        same(&whole(&daemon, "b", MIB), &object.bytes, "the last copy serves");
    }
    let shown = daemon.json(&["base", "show", "b"]);
    assert_eq!((&shown["pinned"], &shown["complete"]), (&true.into(), &true.into()), "{shown}");

    // The server has the image again: nothing is lost, and the command asks for no word.
    server.set_object(object.clone());
    assert_eq!(daemon.ok(&["base", "evict", "b"]), "b: 1M dropped\n");
    assert_eq!(cached(), 0);
    same(&whole(&daemon, "b", MIB), &object.bytes, "fetched again");

    daemon.ok(&["base", "hydrate", "b"]);
    server.stop();
    daemon.fails(&["base", "evict", "b"]);
    assert_eq!(daemon.ok(&["base", "evict", "b", "--force"]), "b: 1M dropped\n");
    assert_eq!(cached(), 0);
}
