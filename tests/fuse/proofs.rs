//! Bases whose image has a proof, through the mount: servers that send wrong bytes, files that lost some.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::harness::{Random, TestDaemon, needs, open, read_at, same, until};
use crate::server::{Object, Reply, Request, Server};

const MIB: usize = 1 << 20;
const GROUP: u64 = 16 << 10;

/// The proof that `plyfs base seal` makes of some bytes, and the hash that it prints.
fn sealed(daemon: &TestDaemon, bytes: &[u8]) -> (Vec<u8>, String) {
    let image = daemon.path("sealed.img");
    fs::write(&image, bytes).unwrap();
    let made = daemon.json(&["base", "seal", image.to_str().unwrap()]);
    let proof = PathBuf::from(made["proof"].as_str().unwrap());
    let bytes = fs::read(&proof).unwrap();
    fs::remove_file(&image).unwrap();
    fs::remove_file(&proof).unwrap();
    (bytes, made["blake3"].as_str().unwrap().to_owned())
}

fn served(daemon: &TestDaemon, object: &Object) -> (Server, String) {
    let (proof, root) = sealed(daemon, &object.bytes);
    let server = Server::start(object.clone());
    server.set_proof(proof);
    (server, root)
}

/// The object with one flipped bit in the range of a request.
fn flipped(object: &Object, request: &Request, n: u64) -> Object {
    let (first, last) = request.range().unwrap();
    let mut bytes = object.bytes.to_vec();
    let last = last.min(bytes.len() as u64 - 1);
    let at = first + n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % (last - first + 1);
    bytes[at as usize] ^= 1 << (n % 8);
    Object { bytes: Arc::new(bytes), ..object.clone() }
}

fn add(daemon: &TestDaemon, name: &str, source: &str, more: &[&str]) {
    daemon.ok(&[&["base", "add", name, source], more].concat());
    daemon.ok(&["disk", "create", name, "--base", name]);
}

fn cached(daemon: &TestDaemon, name: &str) -> u64 {
    daemon.json(&["base", "show", name])["cached_bytes"].as_u64().unwrap()
}

/// Guards D103.
#[test]
fn no_wrong_byte_of_a_server_reaches_a_reader_or_the_cache() {
    let object = Object::new(6 * MIB + 777);
    let mut daemon = TestDaemon::on_disk();
    let (server, root) = served(&daemon, &object);
    add(&daemon, "b", &server.url("/b.img?token=x"), &["--blake3", &root]);
    let shown = daemon.json(&["base", "show", "b"]);
    assert_eq!(
        (shown["blake3"].as_str(), shown["proof"].as_str()),
        (Some(&*root), Some(&*server.url("/b.img.obao")))
    );
    // Two of three answers have a wrong bit.
    let (whole, lies) = (object.clone(), Arc::new(AtomicU64::new(0)));
    let told = lies.clone();
    server.on(move |request| match told.fetch_add(1, Ordering::SeqCst) {
        n if n % 3 < 2 && !request.is_for_a_proof() => Reply::Of(flipped(&whole, request, n)),
        _ => Reply::Object,
    });
    let readers: Vec<_> = (0..4u64)
        .map(|seed| {
            let (path, bytes) = (daemon.disk("b"), object.bytes.clone());
            thread::spawn(move || {
                let (file, mut random) = (open(&path), Random(seed + 1));
                for _ in 0..40 {
                    let at = random.below(bytes.len() as u64 / 4096) * 4096;
                    let len = (1 + random.below(50)) as usize * 4096;
                    let end = (at as usize + len).min(bytes.len() / 4096 * 4096);
                    same(&read_at(&file, at, end - at as usize), &bytes[at as usize..end], "a reader");
                }
            })
        })
        .collect();
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    same(&read_at(&open(&daemon.disk("b")), 0, object.bytes.len()), &object.bytes, "all of it");
    assert!(lies.load(Ordering::SeqCst) > 2);
    until("all of it to be kept", || (cached(&daemon, "b") == object.bytes.len() as u64).then_some(()));
    assert!(daemon.log().contains("bytes that are not those of the image"), "{}", daemon.log());
    // What is kept is right, for the next worker and the next daemon.
    let before = server.requests().len();
    daemon.kill_worker();
    same(&read_at(&open(&daemon.disk("b")), 0, object.bytes.len()), &object.bytes, "the next worker");
    daemon.restart();
    same(&read_at(&open(&daemon.disk("b")), 0, object.bytes.len()), &object.bytes, "the next daemon");
    assert_eq!(server.requests().len(), before);
    daemon.ok(&["base", "hydrate", "b"]);
    assert_eq!(daemon.json(&["base", "show", "b"])["digest_verified"], true);
    daemon.stop();
    let report = daemon.json(&["check"]);
    assert_eq!(report["findings"].as_array().map(Vec::len), Some(0), "{report}");
}

/// Guards D105.
#[test]
fn proven_bases_of_one_hash_share_the_cache_from_the_first_byte_and_others_do_not() {
    let object = Object::new(3 * MIB);
    let daemon = TestDaemon::on_disk();
    let (one, root) = served(&daemon, &object);
    let other = Object { etag: Some("\"another tag\"".into()), last_modified: None, ..object.clone() };
    let (mut two, _) = served(&daemon, &other);
    add(&daemon, "one", &one.url("/one"), &[]);
    same(&read_at(&open(&daemon.disk("one")), 0, MIB), &object.bytes[..MIB], "the first");
    until("it to be kept", || (cached(&daemon, "one") >= MIB as u64).then_some(()));
    add(&daemon, "two", &two.url("/two"), &["--blake3", &root]);
    // Of the same place, without the proof.
    add(&daemon, "unproven", &two.url("/two"), &["--no-proof"]);
    until("both to have the same", || (cached(&daemon, "two") == cached(&daemon, "one")).then_some(()));
    assert!(cached(&daemon, "two") >= MIB as u64);
    assert_eq!(cached(&daemon, "unproven"), 4 * GROUP, "the first request alone");
    let shown = daemon.json(&["base", "show", "unproven"]);
    assert!(shown["proof"].is_null() && shown["blake3"].is_null(), "{shown}");
    two.stop();
    same(
        &read_at(&open(&daemon.disk("two")), 0, MIB),
        &object.bytes[..MIB],
        "the second, without its server",
    );
    two.start_again();
    // Wrong bytes that the unproven base takes reach no other.
    let whole = other.clone();
    two.on(move |request| match request.is_for_a_proof() {
        true => Reply::Object,
        false => Reply::Of(flipped(&whole, request, 5)),
    });
    let wrong = read_at(&open(&daemon.disk("unproven")), 2 * MIB as u64, MIB);
    assert!(wrong != object.bytes[2 * MIB..], "nothing proves these");
    two.on(|_| Reply::Object);
    same(&read_at(&open(&daemon.disk("two")), 2 * MIB as u64, MIB), &object.bytes[2 * MIB..], "proven");
    // What two bases share stays when one goes.
    for name in ["one", "unproven"] {
        daemon.ok(&["disk", "rm", name]);
        daemon.ok(&["base", "rm", name]);
    }
    two.stop();
    same(
        &read_at(&open(&daemon.disk("two")), 0, MIB),
        &object.bytes[..MIB],
        "after the removal of the first",
    );
}

#[test]
fn a_proof_that_does_not_fit_is_refused_when_the_base_is_added() {
    let object = Object::new(2 * MIB + 5);
    let daemon = TestDaemon::on_disk();
    let (server, root) = served(&daemon, &object);
    let (right, _) = sealed(&daemon, &object.bytes);
    let (of_another, _) = sealed(&daemon, &Object::seeded(2 * MIB + 5, 9).bytes);
    let (of_another_size, _) = sealed(&daemon, &object.bytes[..MIB]);
    let url = server.url("/b");
    let refused = |more: &[&str], part: &str| {
        let error = daemon.fails(&[&["base", "add", "b", &url], more].concat());
        assert!(error.contains(part), "{part:?} is not in {error}");
        assert!(error.contains("plyfs base seal") && error.contains("--no-proof"), "{error}");
    };
    let mut damaged = right.clone();
    damaged[140] ^= 1;
    let mut header = right.clone();
    header[50] ^= 1;
    let longer = [right.clone(), vec![0; 32]].concat();
    for (proof, part) in [
        (of_another, "bytes 0 to 16383 of the image are not those"),
        (of_another_size, "it is the proof of an image of 1048576 bytes"),
        (damaged, "do not belong to the hash"),
        (header, "checksum"),
        (longer, "bytes, not"),
        (right[..right.len() - 32].to_vec(), "bytes, not"),
    ] {
        server.set_proof(proof);
        refused(&[], part);
    }
    server.set_proof(right);
    refused(&["--blake3", &"ab".repeat(32)], &format!("the BLAKE3 hash of that is {root}"));
    // A page that the server has for every name is no proof, unless it was named as one.
    server.set_proof(b"<!doctype html>".repeat(100));
    refused(&["--proof", &server.url("/x.obao")], "magic");
    daemon.ok(&["base", "add", "b", &url]);
    assert!(daemon.json(&["base", "show", "b"])["proof"].is_null());
    // Without a proof the hash is a digest.
    daemon.ok(&["base", "add", "c", &url, "--blake3", &root]);
    daemon.ok(&["base", "hydrate", "c"]);
    assert_eq!(daemon.json(&["base", "show", "c"])["digest_verified"], true);
    daemon.ok(&["base", "add", "d", &url, "--blake3", &"ab".repeat(32)]);
    let error = daemon.fails(&["base", "hydrate", "d"]);
    assert!(error.contains("digest"), "{error}");
}

#[test]
fn reads_wait_for_the_right_bytes_and_the_state_names_the_server_and_the_range() {
    if !needs("resend") {
        return;
    }
    let object = Object::new(2 * MIB);
    let daemon = TestDaemon::on_disk();
    let (server, _) = served(&daemon, &object);
    add(&daemon, "b", &server.url("/b"), &[]);
    let whole = object.clone();
    server.on(move |request| match request.is_for_a_proof() {
        true => Reply::Object,
        false => Reply::Of(flipped(&whole, request, 0)),
    });
    let waits = {
        let (path, bytes) = (daemon.disk("b"), object.bytes.clone());
        thread::spawn(move || {
            same(&read_at(&open(&path), MIB as u64, 4096), &bytes[MIB..MIB + 4096], "the reader")
        })
    };
    let shown = until("the base to wait", || {
        let shown = daemon.json(&["base", "show", "b"]);
        (shown["state"] == "waiting").then_some(shown)
    });
    assert!(shown["waiting_for"].as_str().unwrap().contains("are not those that the proof names"), "{shown}");
    until("the server to be named", || {
        let shown = daemon.json(&["base", "show", "b"]);
        let server = shown["servers"].as_array()?.iter().find(|one| one["trouble"].is_string())?.clone();
        server["url"].as_str()?.ends_with("/b").then_some(())
    });
    // The next worker proves, too.
    daemon.kill_worker();
    until("the next worker to wait", || {
        (daemon.json(&["base", "show", "b"])["state"] == "waiting").then_some(())
    });
    assert!(!waits.is_finished());
    server.on(|_| Reply::Object);
    waits.join().unwrap();
    until("no base to wait", || (daemon.json(&["base", "show", "b"])["state"] == "ok").then_some(()));
}

/// Changes bytes of a file as a medium does that lost them: its metadata stays.
fn rot(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x80], at).unwrap();
    file.sync_all().unwrap();
    file.set_modified(modified).unwrap();
}

/// Guards D103.
#[test]
fn a_file_of_this_host_that_lost_bytes_gives_an_error_there_and_verify_names_the_ranges() {
    let object = Object::new(3 * MIB + 100);
    let daemon = TestDaemon::on_disk();
    let image = daemon.path("image.raw");
    fs::write(&image, &*object.bytes).unwrap();
    let path = image.to_str().unwrap();
    daemon.ok(&["base", "seal", path]);
    daemon.ok(&["base", "add", "b", path]);
    let proof = daemon.json(&["base", "show", "b"])["proof"].clone();
    assert_eq!(proof.as_str(), Some(&*format!("{path}.obao")));
    daemon.ok(&["base", "verify", "b"]);
    rot(&image, 100_000);
    rot(&image, 2 * MIB as u64);
    daemon.ok(&["disk", "create", "b", "--base", "b"]);
    let file = open(&daemon.disk("b"));
    same(&read_at(&file, 0, 98_304), &object.bytes[..98_304], "before the wrong group");
    let error = file.read_exact_at(&mut [0; 4096], 98_304).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    same(&read_at(&file, 3 * MIB as u64, 100), &object.bytes[3 * MIB..], "the short group at the end");
    let error = daemon.fails(&["base", "verify", "b"]);
    assert!(
        error.contains("32768 bytes differ from its proof: bytes 98304 to 114687, 2097152 to 2113535"),
        "{error}"
    );
    // Without the proof nothing notices it; so its blocks in memory are others.
    daemon.ok(&["base", "add", "unproven", path, "--no-proof"]);
    daemon.ok(&["disk", "create", "u", "--base", "unproven"]);
    assert_eq!(read_at(&open(&daemon.disk("u")), 98_304, 4096).len(), 4096);
    assert_eq!(file.read_exact_at(&mut [0; 4096], 98_304).unwrap_err().raw_os_error(), Some(libc::EIO));
}

/// Bytes of the image that requests of a server are for, without those for its proof.
fn asked(server: &Server) -> u64 {
    let of_image = |request: &&Request| !request.is_for_a_proof();
    let ranges = server.requests();
    ranges.iter().filter(of_image).filter_map(Request::range).map(|(first, last)| last + 1 - first).sum()
}

/// Guards D108.
#[test]
fn of_the_next_build_of_an_image_that_the_host_has_only_what_changed_is_fetched() {
    let object = Object::new(12 * MIB + 5);
    let mut daemon = TestDaemon::on_disk();
    let (one, _) = served(&daemon, &object);
    // The earlier build needs no proof.
    add(&daemon, "one", &one.url("/one"), &["--no-proof"]);
    same(&read_at(&open(&daemon.disk("one")), 0, object.bytes.len()), &object.bytes, "the earlier build");
    until("it to be kept", || (cached(&daemon, "one") == object.bytes.len() as u64).then_some(()));
    let mut bytes = object.bytes.to_vec();
    for at in [3 * MIB + 9, 7 * MIB, 12 * MIB + 1] {
        bytes[at] ^= 1;
    }
    let next = Object { bytes: Arc::new(bytes), etag: Some("\"next\"".into()), ..object.clone() };
    let (two, _) = served(&daemon, &next);
    add(&daemon, "two", &two.url("/two"), &[]);
    same(&read_at(&open(&daemon.disk("two")), 0, next.bytes.len()), &next.bytes, "the next build");
    // The beginning, before it is known that they are related, and three groups.
    let bytes = asked(&two);
    assert!(bytes <= 1 << 20, "{bytes} bytes were fetched");
    until("all of it to be kept", || (cached(&daemon, "two") == next.bytes.len() as u64).then_some(()));
    // It has its own copy.
    daemon.ok(&["disk", "rm", "one"]);
    daemon.ok(&["base", "rm", "one"]);
    daemon.restart();
    let requests = two.requests().len();
    same(&read_at(&open(&daemon.disk("two")), 0, next.bytes.len()), &next.bytes, "the next daemon");
    assert_eq!(two.requests().len(), requests);
    // Another image, of which nothing is here.
    let other = Object::seeded(3 * MIB, 77);
    let (three, _) = served(&daemon, &other);
    add(&daemon, "three", &three.url("/three"), &[]);
    same(&read_at(&open(&daemon.disk("three")), 0, other.bytes.len()), &other.bytes, "another image");
    assert!(asked(&three) >= other.bytes.len() as u64);
    daemon.stop();
    let report = daemon.json(&["check"]);
    assert_eq!(report["findings"].as_array().map(Vec::len), Some(0), "{report}");
}
