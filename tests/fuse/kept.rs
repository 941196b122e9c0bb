//! The persistent cache through the mount: which base reads which blocks, and which blocks must not be lost.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::thread;

use crate::harness::{House, open, read_at, run, same, until};
use crate::server::{Object, Server};

const MIB: usize = 1 << 20;

fn sha256(house: &House, bytes: &[u8]) -> String {
    let path = house.path("to-sum");
    fs::write(&path, bytes).unwrap();
    run(Command::new("sha256sum").arg(&path)).split_whitespace().next().unwrap().to_owned()
}

fn letter(letter: u8, len: usize) -> Object {
    Object { bytes: Arc::new(vec![letter; len]), ..Object::seeded(0, u64::from(letter)) }
}

fn add(house: &House, name: &str, source: &str, more: &[&str]) {
    house.ok(&[&["base", "add", name, source], more].concat());
    house.ok(&["disk", "create", name, "--base", name]);
}

fn whole(house: &House, name: &str, len: usize) -> Vec<u8> {
    read_at(&open(&house.disk(name)), 0, len)
}

/// Waits until the cache has `bytes` bytes of the base.
fn wait_until_cached(house: &House, name: &str, bytes: usize) {
    until("all of it to be kept", || {
        (house.json(&["base", "show", name])["cached_bytes"].as_u64()? >= bytes as u64).then_some(())
    });
}

/// Base `evil` on server A and base `good` on server B, with the digest of B's bytes.
#[test]
fn a_digest_that_was_not_compared_gives_no_base_the_blocks_of_another() {
    let len = 4 * MIB;
    let (a, b) = (Server::start(letter(b'A', len)), Server::start(letter(b'B', len)));
    let mut house = House::on_disk();
    let sum = sha256(&house, &b.object().bytes);
    add(&house, "evil", &a.url("/a"), &["--sha256", &sum]);
    same(&whole(&house, "evil", len), &vec![b'A'; len], "evil");
    wait_until_cached(&house, "evil", len);
    add(&house, "good", &b.url("/b"), &["--sha256", &sum]);
    same(&whole(&house, "good", len), &vec![b'B'; len], "good");
    house.restart();
    same(&whole(&house, "good", len), &vec![b'B'; len], "good, the next daemon");
    let said = house.ok(&["base", "hydrate", "good"]);
    assert!(said.contains("the digest matches"), "{said}");
    assert_eq!(house.json(&["base", "show", "good"])["state"], "ok");
    // A third base with the digest is complete at once.
    let probe = b.url("/elsewhere");
    add(&house, "third", &probe, &["--sha256", &sum]);
    let before = b.body_bytes();
    same(&whole(&house, "third", len), &vec![b'B'; len], "third");
    assert_eq!(b.body_bytes(), before, "no request reaches its server");
    assert_eq!(house.json(&["base", "show", "third"])["digest_verified"], true);
    // Hydrated blocks stay when other bases are evicted or removed.
    house.ok(&["base", "evict", "third"]);
    house.ok(&["base", "evict", "evil"]);
    house.ok(&["disk", "rm", "third"]);
    house.ok(&["base", "rm", "third"]);
    assert_eq!(house.json(&["base", "show", "good"])["complete"], true);
    // The wrong contents of the evil base's server are detected, and affect only the evil base.
    a.set_object(letter(b'A', len));
    house.ok(&["base", "evict", "good"]);
    let said = house.fails(&["base", "hydrate", "evil"]);
    assert!(said.contains("digest"), "{said}");
    assert_eq!(house.json(&["base", "show", "evil"])["state"], "refused");
    same(&whole(&house, "good", len), &vec![b'B'; len], "good at the end");
}

#[test]
fn a_refused_base_is_accepted_when_its_bytes_are_right_again() {
    let len = 3 * MIB;
    let right = Object::new(len);
    let wrong = Object { bytes: Arc::new(vec![7; len]), ..right.clone() };
    let server = Server::start(wrong.clone());
    let mut house = House::on_disk();
    let sum = sha256(&house, &right.bytes);
    add(&house, "b", &server.url("/b"), &["--sha256", &sum]);
    let disk = open(&house.disk("b"));
    same(&read_at(&disk, 0, 100_000), &[7; 100_000], "before the comparison");
    let said = house.fails(&["base", "hydrate", "b"]);
    assert!(said.contains("fetched twice"), "{said}");
    assert_eq!(disk.read_exact_at(&mut [0; 10], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    house.fails(&["base", "verify", "b"]);
    server.set_object(right.clone());
    house.restart();
    let said = house.ok(&["base", "verify", "b"]);
    assert!(said.contains("the digest matches"), "{said}");
    same(&whole(&house, "b", len), &right.bytes, "the right contents");
    assert_eq!(house.json(&["base", "show", "b"])["state"], "ok");
}

/// The source has no validator. A new base on the replaced image reads only the new image.
#[test]
fn a_new_base_on_a_replaced_image_reads_no_block_of_the_old_one() {
    let len = 2 * MIB;
    let plain = |letter| Object { bytes: Arc::new(vec![letter; len]), etag: None, last_modified: None };
    let server = Server::start(plain(b'1'));
    let house = House::on_disk();
    add(&house, "old", &server.url("/image"), &["--identity", "size"]);
    same(&whole(&house, "old", len), &vec![b'1'; len], "old");
    wait_until_cached(&house, "old", len);
    server.set_object(plain(b'2'));
    add(&house, "new", &server.url("/image"), &["--identity", "size"]);
    same(&whole(&house, "new", len), &vec![b'2'; len], "new");
    same(&whole(&house, "old", len), &vec![b'1'; len], "cached blocks of the old image");
}

/// Hydrated bases whose originals are removed, and a start with few descriptors.
#[test]
fn a_start_with_few_descriptors_loses_no_hydrated_base() {
    let mut house = House::on_disk();
    let bases = 60;
    let bytes = |n: usize| vec![n as u8 + 1; 40_000];
    for n in 0..bases {
        let path = house.path(&format!("image{n}"));
        fs::write(&path, bytes(n)).unwrap();
        house.ok(&["base", "add", &format!("b{n}"), path.to_str().unwrap()]);
        house.ok(&["base", "hydrate", &format!("b{n}")]);
        fs::remove_file(&path).unwrap();
    }
    house.stop();
    let mut few = Command::new("prlimit");
    few.arg("--nofile=110:110");
    house.start_under(few);
    let read = |house: &House, n: usize| {
        let path = house.mount().join(format!("bases/b{n}.raw"));
        same(&read_at(&fs::File::open(path).unwrap(), 0, 40_000), &bytes(n), &format!("base {n}"));
    };
    (0..bases).for_each(|n| read(&house, n));
    house.stop();
    house.start();
    (0..bases).for_each(|n| read(&house, n));
}

/// The eviction comes while a reader waits for a dead server and the base is being hydrated.
#[test]
fn an_eviction_cancels_the_hydration_of_the_base() {
    let len = 6 * MIB;
    let object = Object::new(len);
    let mut server = Server::start(object.clone());
    let house = House::on_disk();
    let sum = sha256(&house, &object.bytes);
    add(&house, "b", &server.url("/b"), &["--sha256", &sum]);
    same(&read_at(&open(&house.disk("b")), 0, MIB), &object.bytes[..MIB], "the head");
    wait_until_cached(&house, "b", MIB);
    server.stop();
    let waits = {
        let (path, bytes) = (house.disk("b"), object.bytes.clone());
        thread::spawn(move || {
            same(&read_at(&open(&path), 3 * MIB as u64, MIB), &bytes[3 * MIB..4 * MIB], "waited")
        })
    };
    until("the reader to wait", || (house.json(&["base", "show", "b"])["state"] == "waiting").then_some(()));
    house.ok(&["base", "hydrate", "b", "--background"]);
    until("the hydration to wait", || {
        (house.json(&["base", "show", "b"])["work"]["state"] == "waiting").then_some(())
    });
    let said = house.fails(&["base", "verify", "b"]);
    assert!(said.contains("is being hydrated"), "{said}");
    house.ok(&["base", "evict", "b"]);
    let shown = house.json(&["base", "show", "b"]);
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
    assert!(house.ok(&["base", "verify", "b"]).contains("0 bytes are here"));
    server.start_again();
    waits.join().unwrap();
    same(&whole(&house, "b", len), &object.bytes, "afterwards");
}
