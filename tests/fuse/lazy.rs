//! Bases on a web server, through the mount: fetching, the persistent cache, hydration.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::harness::{Random, TestDaemon, needs, open, read_at, run, same, signal, until};
use crate::server::{Object, Reply, Server};

const MIB: usize = 1 << 20;

fn served(len: usize) -> (TestDaemon, Server, Arc<Vec<u8>>) {
    let object = Object::new(len);
    let bytes = object.bytes.clone();
    (TestDaemon::on_disk(), Server::start(object), bytes)
}

fn add(daemon: &TestDaemon, name: &str, url: &str, more: &[&str]) {
    daemon.ok(&[&["base", "add", name, url], more].concat());
    daemon.ok(&["disk", "create", name, "--base", name]);
}

fn whole(daemon: &TestDaemon, name: &str, len: usize) -> Vec<u8> {
    read_at(&open(&daemon.disk(name)), 0, len)
}

/// Waits until the cache has `bytes` bytes of the base, so that a kill costs no fetch.
fn wait_until_cached(daemon: &TestDaemon, name: &str, bytes: usize) {
    until("all of it to be kept", || {
        (daemon.json(&["base", "show", name])["cached_bytes"].as_u64()? >= bytes as u64).then_some(())
    });
}

/// Guards D43.
#[test]
fn a_base_is_added_by_one_small_request_and_read_once_for_all_disks() {
    let (mut daemon, server, bytes) = served(5 * MIB + 123);
    add(&daemon, "b", &server.url("/b.img"), &[]);
    let requests = server.requests();
    assert_eq!(
        (requests.len(), requests[0].method.as_str(), requests[0].range()),
        (1, "GET", Some((0, 65535)))
    );
    daemon.ok(&["disk", "create", "two", "--base", "b"]);
    // Several readers of several disks at once.
    let readers: Vec<_> = ["b", "two", "b", "two"]
        .into_iter()
        .map(|name| {
            let (path, bytes) = (daemon.disk(name), bytes.clone());
            thread::spawn(move || same(&read_at(&open(&path), 0, bytes.len()), &bytes, "a reader"))
        })
        .collect();
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    assert_eq!(server.body_bytes(), bytes.len() as u64, "each byte is fetched once");
    wait_until_cached(&daemon, "b", bytes.len());
    let shown = daemon.json(&["base", "show", "b"]);
    assert_eq!(
        (shown["complete"].as_bool(), shown["cached_percent"].as_f64()),
        (Some(true), Some(100.0)),
        "{shown}"
    );

    // Another disk, another worker, another daemon: no block is fetched again.
    let before = server.requests().len();
    daemon.kill_worker();
    same(&whole(&daemon, "two", bytes.len()), &bytes, "the next worker");
    daemon.restart();
    same(&whole(&daemon, "b", bytes.len()), &bytes, "the next daemon");
    assert_eq!(server.requests().len(), before);
    let status = daemon.status();
    assert_eq!(status["cache"]["disk"]["used_bytes"].as_u64(), Some(bytes.len() as u64), "{status}");
    daemon.ok(&["base", "evict", "b"]);
    assert_eq!(daemon.json(&["base", "show", "b"])["cached_bytes"].as_u64(), Some(0));
    daemon.restart();
    same(&whole(&daemon, "b", bytes.len()), &bytes, "after an eviction");
    assert!(server.requests().len() > before);
}

/// Guards D36.
#[test]
fn partial_block_writes_wait_for_the_base_and_are_right() {
    let (daemon, server, bytes) = served(2 * MIB);
    add(&daemon, "b", &server.url("/b"), &[]);
    let file = open(&daemon.disk("b"));
    let mut model = bytes.to_vec();
    let mut random = Random(7);
    for n in 0..200u64 {
        let at = random.below(2 * MIB as u64 - 5000);
        let data = vec![n as u8; 1 + random.below(5000) as usize];
        if n % 3 == 0 {
            crate::harness::fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, 700)
                .unwrap();
            model[at as usize..at as usize + 700].fill(0);
        } else {
            file.write_all_at(&data, at).unwrap();
            model[at as usize..at as usize + data.len()].copy_from_slice(&data);
        }
    }
    same(&whole(&daemon, "b", model.len()), &model, "after writes");
}

/// Guards D43.
#[test]
fn reads_wait_for_a_server_that_is_down_and_other_operations_work() {
    if !needs("resend") {
        return;
    }
    let (mut daemon, mut server, bytes) = served(4 * MIB);
    add(&daemon, "b", &server.url("/b"), &[]);
    same(&read_at(&open(&daemon.disk("b")), 0, 4096), &bytes[..4096], "the head");
    let blank = daemon.create("blank", false, MIB as u64);
    server.stop();
    let waits = {
        let (path, bytes) = (daemon.disk("b"), bytes.clone());
        thread::spawn(move || {
            same(&read_at(&open(&path), 0, 3 * MIB), &bytes[..3 * MIB], "the waiting reader")
        })
    };
    // A partial block write needs the base, too. There are more of them than threads.
    let writers: Vec<_> = (0..40u64)
        .map(|n| {
            let path = daemon.disk("b");
            thread::spawn(move || open(&path).write_all_at(&[7; 10], 3 * MIB as u64 + n * 16384 + 5).unwrap())
        })
        .collect();
    let waiting = until("the base to wait", || {
        daemon.status()["waiting"].as_array().filter(|bases| !bases.is_empty()).map(|bases| bases[0].clone())
    });
    assert_eq!(waiting["base"], "b");
    until("the event", || {
        let events = daemon.json(&["events"]);
        events.as_array()?.iter().any(|e| e["event"] == "base.waiting" && e["base"] == "b").then_some(())
    });
    // An old connection may break before a new one is refused.
    assert!(waiting["why"].as_str().is_some_and(|why| !why.is_empty()), "{waiting}");
    assert_eq!(daemon.json(&["base", "show", "b"])["state"], "waiting");
    // Cached blocks are read, other disks are written, disks are created and removed.
    same(&read_at(&open(&daemon.disk("b")), 0, 4096), &bytes[..4096], "a cached block");
    open(&blank).write_all_at(&[1; 4096], 0).unwrap();
    daemon.ok(&["disk", "create", "other", "--base", "b"]);
    daemon.ok(&["disk", "rm", "other"]);
    // Waiting requests wait on under the next worker, and under the next version.
    daemon.kill_worker();
    until("the next worker to wait", || (!daemon.status()["waiting"].as_array()?.is_empty()).then_some(()));
    daemon.ok(&["upgrade"]);
    assert!(!waits.is_finished());
    server.start_again();
    waits.join().unwrap();
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    let mut model = bytes.to_vec();
    (0..40).for_each(|n| model[3 * MIB + n * 16384 + 5..][..10].fill(7));
    same(&whole(&daemon, "b", model.len()), &model, "at the end");
    until("no base to wait", || daemon.status()["waiting"].as_array()?.is_empty().then_some(()));

    // A stop of the daemon does not wait for a server.
    daemon.ok(&["base", "add", "c", &server.url("/c")]);
    server.stop();
    let mut stuck = Command::new("dd")
        .arg(format!("if={}", daemon.mount().join("bases/c.raw").display()))
        .args(["of=/dev/null", "bs=1M", "status=none"])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until("dd to wait", || (!daemon.status()["waiting"].as_array()?.is_empty()).then_some(()));
    signal(daemon.supervisor(), libc::SIGTERM);
    stuck.kill().unwrap();
    stuck.wait().unwrap();
    daemon.ended();
}

#[test]
fn a_deadline_ends_a_read_and_a_later_read_works() {
    let (daemon, mut server, bytes) = served(MIB);
    add(&daemon, "b", &server.url("/b"), &["--deadline", "1s"]);
    server.stop();
    let file = open(&daemon.disk("b"));
    let error = file.read_exact_at(&mut [0; 4096], 500_000).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    until("it to be told", || daemon.log().contains("readers of a base get an error").then_some(()));
    server.start_again();
    until("a read that works", || file.read_exact_at(&mut [0; 4096], 500_000).ok());
    same(&whole(&daemon, "b", bytes.len()), &bytes, "after the deadline");
}

#[test]
fn a_changed_image_is_an_error_at_the_deadline_and_versions_never_mix() {
    let (daemon, server, bytes) = served(4 * MIB);
    add(&daemon, "b", &server.url("/b"), &["--deadline", "1s"]);
    let file = open(&daemon.disk("b"));
    same(&read_at(&file, 0, 100_000), &bytes[..100_000], "the first version");
    wait_until_cached(&daemon, "b", 100_000);
    server.set_object(Object::seeded(4 * MIB, 2));
    let error = file.read_exact_at(&mut vec![0; MIB], 3 * MIB as u64).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    same(&read_at(&file, 0, 100_000), &bytes[..100_000], "cached blocks of the first version");
    until("the event", || {
        let events = daemon.json(&["events"]);
        events.as_array()?.iter().any(|e| e["event"] == "base.changed" && e["base"] == "b").then_some(())
    });
    // The new version is a base of its own.
    add(&daemon, "new", &server.url("/b"), &[]);
    same(&whole(&daemon, "new", 4 * MIB), &server.object().bytes, "the new version");
}

#[test]
fn flipped_bits_in_the_cache_cost_only_a_fetch() {
    let (mut daemon, server, bytes) = served(3 * MIB);
    add(&daemon, "b", &server.url("/b"), &[]);
    same(&whole(&daemon, "b", bytes.len()), &bytes, "cold");
    wait_until_cached(&daemon, "b", bytes.len());
    let mut random = Random(11);
    for round in 0..4 {
        daemon.stop();
        for entry in fs::read_dir(daemon.store().join("cache")).unwrap() {
            let path = entry.unwrap().path();
            let len = fs::metadata(&path).unwrap().len();
            let file = fs::OpenOptions::new().read(true).write(true).open(&path).unwrap();
            for _ in 0..if round == 3 { 500 } else { 5 } {
                let at = random.below(len);
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                byte[0] ^= 1 << random.below(8);
                file.write_all_at(&byte, at).unwrap();
            }
        }
        daemon.start();
        same(&whole(&daemon, "b", bytes.len()), &bytes, "after bits flipped");
        wait_until_cached(&daemon, "b", bytes.len());
    }
    let findings = Command::new(env!("CARGO_BIN_EXE_plyfs"))
        .args(["--store"])
        .arg(daemon.store())
        .arg("status")
        .output();
    assert!(findings.unwrap().status.success());
}

#[test]
fn reads_are_right_while_workers_are_killed_and_the_base_is_evicted() {
    let (daemon, server, bytes) = served(8 * MIB);
    add(&daemon, "b", &server.url("/b"), &[]);
    let done = Arc::new(AtomicU64::new(0));
    let readers: Vec<_> = (0..3u64)
        .map(|n| {
            let (path, bytes, done) = (daemon.disk("b"), bytes.clone(), done.clone());
            thread::spawn(move || {
                let (file, mut random) = (open(&path), Random(n + 1));
                while done.load(Ordering::Relaxed) == 0 {
                    let len = 1 + random.below(300_000) as usize;
                    let at = random.below((bytes.len() - len) as u64);
                    same(&read_at(&file, at, len), &bytes[at as usize..at as usize + len], "under kills");
                }
            })
        })
        .collect();
    for n in 0..6 {
        thread::sleep(std::time::Duration::from_millis(150));
        daemon.kill_worker();
        if n % 2 == 0 {
            daemon.ok(&["base", "evict", "b"]);
        }
    }
    done.store(1, Ordering::Relaxed);
    readers.into_iter().for_each(|reader| reader.join().unwrap());
    same(&whole(&daemon, "b", bytes.len()), &bytes, "after kills");
}

/// Guards D38.
#[test]
fn reads_are_right_with_a_small_cache_and_with_none() {
    for size in ["0", "1M"] {
        let object = Object::new(4 * MIB);
        let bytes = object.bytes.clone();
        let server = Server::start(object);
        let mut daemon = TestDaemon::unstarted("/var/tmp");
        daemon.try_start(&["--cache-disk", size]).unwrap();
        add(&daemon, "b", &server.url("/b"), &[]);
        for _ in 0..2 {
            same(&whole(&daemon, "b", bytes.len()), &bytes, size);
        }
        let shown = daemon.json(&["base", "show", "b"]);
        assert!(shown["cached_bytes"].as_u64().unwrap() <= MIB as u64, "{shown}");
        let said = daemon.fails(&["base", "hydrate", "b"]);
        assert!(said.contains("--cache-disk"), "{said}");
        daemon.stop();
    }
}

#[test]
fn verified_contents_under_two_names_are_fetched_once() {
    let (daemon, server, bytes) = served(MIB);
    let path = daemon.path("image");
    fs::write(&path, &*bytes).unwrap();
    let sum = run(Command::new("sha256sum").arg(&path)).split_whitespace().next().unwrap().to_owned();
    add(&daemon, "one", &server.url("/one"), &["--sha256", &sum]);
    same(&whole(&daemon, "one", MIB), &bytes, "one");
    wait_until_cached(&daemon, "one", MIB);
    assert!(daemon.ok(&["base", "verify", "one"]).contains("the digest matches"));
    let before = server.body_bytes();
    add(&daemon, "two", &server.url("/other/place"), &["--sha256", &sum]);
    let probe = server.body_bytes();
    same(&whole(&daemon, "two", MIB), &bytes, "two");
    assert_eq!(server.body_bytes(), probe, "only the probe of {} bytes", probe - before);
    // Blocks that the other base needs stay.
    daemon.ok(&["disk", "rm", "one"]);
    daemon.ok(&["base", "rm", "one"]);
    assert_eq!(daemon.json(&["base", "show", "two"])["complete"], true);
    daemon.ok(&["disk", "rm", "two"]);
    daemon.ok(&["base", "rm", "two"]);
    let left: Vec<_> =
        fs::read_dir(daemon.store().join("cache")).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_hydrated_base_needs_no_server_and_no_file() {
    let (mut daemon, mut server, bytes) = served(6 * MIB + 5);
    let path = daemon.path("image.raw");
    fs::write(&path, &*bytes).unwrap();
    let sum = run(Command::new("sha256sum").arg(&path)).split_whitespace().next().unwrap().to_owned();
    add(&daemon, "far", &server.url("/b"), &["--sha256", &sum]);
    add(&daemon, "near", path.to_str().unwrap(), &[]);
    for name in ["far", "near"] {
        let said = daemon.ok(&["base", "hydrate", name, "--rate", "100M"]);
        assert!(said.contains(if name == "far" { "the digest matches" } else { "no digest" }), "{said}");
        let shown = daemon.json(&["base", "show", name]);
        assert_eq!(
            (shown["complete"].as_bool(), shown["pinned"].as_bool()),
            (Some(true), Some(true)),
            "{shown}"
        );
    }
    assert_eq!(daemon.json(&["base", "show", "far"])["digest_verified"], true);
    let requests = server.requests().len();
    server.stop();
    fs::remove_file(&path).unwrap();
    daemon.restart();
    for name in ["far", "near"] {
        same(&whole(&daemon, name, bytes.len()), &bytes, name);
        assert!(daemon.ok(&["base", "verify", name]).contains("are in the store"));
    }
    assert_eq!(server.requests().len(), requests);
    // The cached copy is the only one.
    let said = daemon.fails(&["base", "evict", "near"]);
    assert!(said.contains("no such file"), "{said}");
    daemon.stop();
    let check =
        Command::new(env!("CARGO_BIN_EXE_plyfs")).arg("--store").arg(daemon.store()).arg("check").output();
    let check = check.unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
    daemon.start();

    // A base whose bytes do not match its digest.
    server.start_again();
    server.set_object(Object::seeded(MIB, 3));
    add(&daemon, "wrong", &server.url("/wrong"), &["--sha512", &"ab".repeat(64)]);
    let before = open(&daemon.disk("wrong"));
    read_at(&before, 0, 8192);
    let said = daemon.fails(&["base", "hydrate", "wrong"]);
    assert!(said.contains("digest"), "{said}");
    assert_eq!(before.read_exact_at(&mut [0; 10], 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    drop(before);
    let shown = daemon.json(&["base", "show", "wrong"]);
    assert_eq!((shown["digest_verified"].as_bool(), shown["cached_bytes"].as_u64()), (Some(false), Some(0)));
    // No reader gets a byte of it, through open files or new ones, now and after restarts.
    for _ in 0..2 {
        assert_eq!(daemon.json(&["base", "show", "wrong"])["state"], "refused");
        let read = fs::File::open(daemon.disk("wrong")).and_then(|file| file.read_exact_at(&mut [0; 10], 0));
        assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::EIO));
        daemon.restart();
    }
}

#[test]
fn hydration_continues_after_a_kill_and_when_the_server_is_back() {
    let (daemon, mut server, bytes) = served(6 * MIB);
    add(&daemon, "b", &server.url("/b"), &[]);
    daemon.ok(&["base", "hydrate", "b", "--rate", "2M", "--background"]);
    wait_until_cached(&daemon, "b", MIB);
    daemon.kill_worker();
    server.stop();
    thread::sleep(std::time::Duration::from_millis(300));
    server.start_again();
    until("a complete copy", || (daemon.json(&["base", "show", "b"])["complete"] == true).then_some(()));
    same(&whole(&daemon, "b", bytes.len()), &bytes, "hydrated");
}

#[test]
fn no_output_or_log_shows_a_secret() {
    let (mut daemon, mut server, bytes) = served(MIB);
    let url = server.url("/b?signature=hushhush").replace("http://", "http://somebody:openSesame@");
    let file = daemon.path("url");
    fs::write(&file, format!("{url}\n")).unwrap();
    daemon.ok(&["base", "add", "b", "--source-file", file.to_str().unwrap(), "--deadline", "1s"]);
    daemon.ok(&["disk", "create", "b", "--base", "b"]);
    same(&whole(&daemon, "b", MIB), &bytes, "with a password");
    let asked = server.requests();
    assert!(asked.iter().all(|r| r.header("authorization").is_some() && r.target.contains("hushhush")));
    daemon.ok(&["base", "evict", "b"]);
    daemon.restart();
    server.on(|_| Reply::status(403));
    assert!(open(&daemon.disk("b")).read_exact_at(&mut [0; 10], 5 * 100_000).is_err());
    server.stop();
    let mut shown = daemon.log();
    for args in [&["base", "ls"][..], &["base", "show", "b"], &["status"], &["events"], &["disk", "ls"]] {
        shown += &daemon.ok(args);
        shown += &daemon.json(args).to_string();
    }
    for secret in ["openSesame", "hushhush", "b3BlblNlc2FtZQ", "somebody"] {
        assert!(!shown.contains(secret), "{secret}");
    }
}

#[test]
fn images_of_every_format_read_as_qemu_img_reads_them() {
    if crate::harness::tool("qemu-img").is_none() {
        return;
    }
    let (mut daemon, server, _) = served(1);
    let raw = daemon.path("raw.img");
    let mut random = Random(3);
    // Zeros, repeated bytes and noise, with a size that is no multiple of a cluster.
    let mut bytes = vec![0; 3 * MIB + 1536];
    for n in 0..12 {
        let part = if n % 2 == 0 { random.bytes(70_000) } else { vec![n as u8; 90_000] };
        bytes[n * 250_000..][..part.len()].copy_from_slice(&part);
    }
    fs::write(&raw, &bytes).unwrap();
    let convert = |options: &[&str], to: &Path| {
        run(Command::new("qemu-img").args(["convert", "-f", "raw"]).args(options).arg(&raw).arg(to));
    };
    let cases: [(&str, &[&str]); 8] = [
        ("v2", &["-O", "qcow2", "-o", "compat=0.10"]),
        ("c512", &["-O", "qcow2", "-o", "cluster_size=512"]),
        ("c2m", &["-O", "qcow2", "-o", "cluster_size=2M"]),
        ("zlib", &["-O", "qcow2", "-c"]),
        ("zstd", &["-O", "qcow2", "-c", "-o", "compression_type=zstd,cluster_size=4k"]),
        ("ext", &["-O", "qcow2", "-o", "extended_l2=on,cluster_size=64k"]),
        ("mono", &["-O", "vmdk", "-o", "subformat=monolithicSparse"]),
        ("stream", &["-O", "vmdk", "-o", "subformat=streamOptimized"]),
    ];
    for (name, options) in cases {
        let suffix = if options[1] == "vmdk" { "vmdk" } else { "qcow2" };
        let file = daemon.path(&format!("{name}.{suffix}"));
        convert(options, &file);
        server.set_object(Object {
            bytes: Arc::new(fs::read(&file).unwrap()),
            ..Object::seeded(1, name.len() as u64 + options.len() as u64 * 100)
        });
        add(&daemon, name, &server.url(&format!("/{name}.{suffix}")), &[]);
        add(&daemon, &format!("{name}-here"), file.to_str().unwrap(), &[]);
        for disk in [name.to_owned(), format!("{name}-here")] {
            let path = daemon.disk(&disk);
            run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", suffix]).arg(&path).arg(&file));
            same(&read_at(&open(&path), 0, bytes.len()), &bytes, &disk);
        }
    }
    daemon.restart();
    for (name, _) in cases {
        same(&whole(&daemon, name, bytes.len()), &bytes, name);
    }
    // A chain in which the operator names every file.
    let top = daemon.path("top.qcow2");
    let below = daemon.path("zlib.qcow2");
    run(Command::new("qemu-img").args(["create", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&below).arg(&top));
    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -P 9 100k 50k"]).arg(&top));
    let refused = daemon.fails(&["base", "add", "top", top.to_str().unwrap()]);
    assert!(refused.contains("backing"), "{refused}");
    add(&daemon, "top", top.to_str().unwrap(), &["--backing", below.to_str().unwrap()]);
    bytes[102_400..102_400 + 51_200].fill(9);
    same(&whole(&daemon, "top", bytes.len()), &bytes, "top");
}
