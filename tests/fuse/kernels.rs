//! Kernels that offer less than Linux 6.9: what ends with a worker there, and that nothing else does.
//!
//! `PLYFS_FUSE_MINOR` has the daemon use no more than a kernel of that protocol offers: 37 is Linux 6.1. `scripts/test-kernel`
//! runs these tests and all others on such a kernel itself.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::harness::*;
use crate::process::Client;
use crate::server::{Object, Server};

const MIB: u64 = 1 << 20;
const LINUX_6_1: &str = "37";

fn on_linux_6_1() -> TestDaemon {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    start(&mut daemon);
    daemon
}

fn start(daemon: &mut TestDaemon) {
    let mut command = daemon.command();
    command.args(["serve", "--cache-memory", "64M"]).env("PLYFS_FUSE_MINOR", LINUX_6_1);
    daemon.start_command(command);
}

fn names(missing: &serde_json::Value) -> Vec<String> {
    missing.as_array().unwrap().iter().map(|m| m["promise"].as_str().unwrap().to_owned()).collect()
}

/// A base whose server is down, and a disk on it of which nothing is here.
fn unreachable(daemon: &TestDaemon) -> (Server, Arc<Vec<u8>>) {
    let object = Object::new(4 * MIB as usize);
    let bytes = object.bytes.clone();
    let mut server = Server::start(object);
    daemon.ok(&["base", "add", "far", &server.url("/far")]);
    daemon.ok(&["disk", "create", "far", "--base", "far"]);
    server.stop();
    (server, bytes)
}

fn waits(daemon: &TestDaemon) {
    until("a request that waits", || {
        (daemon.json(&["status"])["requests"]["waiting"].as_u64()? > 0).then_some(())
    });
}

#[test]
fn what_a_kernel_lacks_is_said_at_the_start_and_in_status() {
    let mut daemon = on_linux_6_1();
    let kernel = daemon.status()["kernel"].clone();
    assert_eq!(names(&kernel["missing"]), ["resend", "shared_mmap", "parallel_writes"], "{kernel}");
    assert_eq!(kernel["fuse"], "7.37");
    assert!(daemon.log().contains("lacks what plyfs can use: requests in flight end with EIO"));
    let text = daemon.ok(&["status"]);
    assert!(text.contains("kernel lacks") && text.contains("shared_mmap (Linux 6.6)"), "{text}");
    // The next worker and the next version say the same.
    daemon.kill_worker();
    assert_eq!(daemon.status()["kernel"], kernel);
    daemon.ok(&["upgrade"]);
    daemon.kill_worker();
    assert_eq!(daemon.status()["kernel"], kernel);
    daemon.stop();
}

/// Guards D64.
#[test]
fn a_workers_death_ends_the_requests_that_it_had_read_and_nothing_else() {
    let daemon = on_linux_6_1();
    let (mut server, bytes) = unreachable(&daemon);
    let near = open(&daemon.create("near", false, MIB));
    near.write_all_at(b"before", 0).unwrap();
    let far = Arc::new(open(&daemon.disk("far")));
    // One of a thread that waits, and many at once.
    let readers: Vec<_> = (0..20_u64)
        .map(|n| {
            let far = far.clone();
            thread::spawn(move || {
                far.read_at(&mut [0; 512], n * 128 * 1024 + MIB).map_err(|e| e.raw_os_error())
            })
        })
        .collect();
    until("requests that wait", || {
        (daemon.json(&["status"])["requests"]["waiting"].as_u64()? >= 20).then_some(())
    });
    daemon.kill_worker();
    let ends: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    assert_eq!(ends, vec![Err(Some(libc::EIO)); 20]);
    // Files that were open are, and the same requests succeed when they are made again.
    same(&read_at(&near, 0, 6), b"before", "an open file");
    near.write_all_at(b"after", 0).unwrap();
    near.sync_all().unwrap();
    server.start_again();
    same(&read_at(&far, MIB, MIB as usize), &bytes[MIB as usize..2 * MIB as usize], "after the death");
    let log = daemon.log();
    assert!(log.contains("end with EIO: this kernel cannot send them to the next worker"), "{log}");
}

/// Guards D64.
#[test]
fn no_request_hangs_however_often_workers_die() {
    let mut daemon = on_linux_6_1();
    let path = daemon.create("a", false, 4 * MIB);
    let end = AtomicBool::new(false);
    let blocks: u64 = 64;
    let storm = Storm::at_random(&daemon, 11);
    let found: Vec<(u64, Vec<u8>, u64)> = thread::scope(|scope| {
        let clients: Vec<_> = (0..4_u64)
            .map(|n| {
                let (path, end) = (&path, &end);
                scope.spawn(move || {
                    // One block each of which the last word is known, and the words that may have come after it.
                    let file = until("an open file", || {
                        std::fs::File::options().read(true).write(true).open(path).ok()
                    });
                    let (mut last, mut maybe, mut errors) = (0_u8, Vec::new(), 0);
                    let mut word = 0_u8;
                    while !end.load(Ordering::Relaxed) {
                        word = word.wrapping_add(1);
                        match file.write_all_at(&[word; 4096], n * blocks * 4096) {
                            Ok(()) => (last, maybe) = (word, Vec::new()),
                            Err(error) => {
                                // ECONNABORTED is the kernel's own, of the few that are missed.
                                let errno = error.raw_os_error();
                                assert!(matches!(errno, Some(libc::EIO | libc::ECONNABORTED)), "{error}");
                                maybe.push(word);
                                errors += 1;
                            }
                        }
                    }
                    maybe.push(last);
                    (n, maybe, errors)
                })
            })
            .collect();
        while storm.kills() < 120 {
            thread::sleep(Duration::from_millis(20));
        }
        end.store(true, Ordering::Relaxed);
        clients.into_iter().map(|client| client.join().unwrap()).collect()
    });
    storm.stop();
    daemon.prepared();
    let file = open(&path);
    for (n, may_be, _) in &found {
        let block = read_at(&file, n * blocks * 4096, 4096);
        assert!(may_be.contains(&block[0]), "client {n}: {} is none of {may_be:?}", block[0]);
        same(&block, &[block[0]; 4096], "one write");
    }
    assert!(found.iter().map(|(_, _, errors)| errors).sum::<u64>() > 0, "no death met a request");
    drop(file);
    daemon.stop();
    daemon.ok(&["check"]);
}

/// Guards D65.
#[test]
fn an_upgrade_costs_no_request() {
    let daemon = on_linux_6_1();
    let clients: Vec<Client> = (0..4)
        .map(|n| Client::new(&daemon.create(&format!("d{n}"), false, 4 * MIB), 4 * MIB, n + 1))
        .collect();
    for _ in 0..10 {
        daemon.ok(&["upgrade"]);
        thread::sleep(Duration::from_millis(50));
    }
    assert!(clients.iter().all(Client::is_fine), "{}", daemon.log());
    clients.into_iter().for_each(|client| drop(client.stop()));
    assert!(!daemon.log().contains("end with EIO:"), "{}", daemon.log());
}

/// Guards D65.
#[test]
fn an_upgrade_that_would_cost_requests_is_refused_and_the_worker_goes_on() {
    let daemon = on_linux_6_1();
    let (mut server, bytes) = unreachable(&daemon);
    let client = Client::new(&daemon.create("near", false, 4 * MIB), 4 * MIB, 1);
    let far = open(&daemon.disk("far"));
    let (worker, _) = daemon.prepared();
    let reader = thread::spawn(move || read_at(&far, MIB, 4096));
    waits(&daemon);
    let said = daemon.fails(&["upgrade"]);
    assert!(said.contains("did not end within 5 s") && said.contains("plyfs status"), "{said}");
    assert_eq!(daemon.prepared().0, worker);
    assert!(client.is_fine() && !reader.is_finished());
    server.start_again();
    same(&reader.join().unwrap(), &bytes[MIB as usize..MIB as usize + 4096], "the read that waited");
    daemon.ok(&["upgrade"]);
    assert_ne!(daemon.prepared().0, worker);
    assert!(client.is_fine());
    client.stop();
}

/// Guards D65.
#[test]
fn a_move_of_the_live_maps_costs_no_request() {
    let daemon = on_linux_6_1();
    let client = Client::new(&daemon.create("a", false, 4 * MIB), 4 * MIB, 1);
    for round in 1..=3 {
        let dir = daemon.live_dir().unwrap();
        let _ = fs::remove_dir_all(&dir);
        until("a move", || (daemon.status()["live_maps"]["moves"].as_u64()? >= round).then_some(()));
    }
    assert!(client.is_fine(), "{}", daemon.log());
    client.stop();
}

#[test]
fn a_stop_with_requests_that_wait_comes_in_time() {
    let mut daemon = on_linux_6_1();
    let (_server, _) = unreachable(&daemon);
    let far = open(&daemon.disk("far"));
    let reader = thread::spawn(move || far.read_at(&mut [0; 512], MIB).is_err());
    waits(&daemon);
    let begun = Instant::now();
    daemon.ok(&["stop", "--force"]);
    assert!(begun.elapsed() < Duration::from_secs(30));
    assert!(reader.join().unwrap());
    daemon.ended();
    start(&mut daemon);
    daemon.stop();
}

/// What the README's table says of Linux before 6.6.
#[test]
fn a_shared_mapping_is_refused_and_a_private_one_works() {
    if tool("python3").is_none() {
        return;
    }
    let daemon = on_linux_6_1();
    let path = daemon.create("a", false, MIB);
    open(&path).write_all_at(b"mapped", 0).unwrap();
    let program = "import mmap, os, sys
f = os.open(sys.argv[1], os.O_RDWR)
print(mmap.mmap(f, 4096, mmap.MAP_PRIVATE)[:6])
try:
    mmap.mmap(f, 4096, mmap.MAP_SHARED)
except OSError as error:
    print(error.errno)";
    let said = run(Command::new("python3").arg("-c").arg(program).arg(&path));
    assert_eq!(said, format!("b'mapped'\n{}\n", libc::ENODEV));
}

#[test]
fn a_kernel_before_linux_5_14_is_refused() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let mut command = daemon.command();
    command.args(["serve"]).env("PLYFS_FUSE_MINOR", "33");
    let why = daemon.try_start_command(command).unwrap_err();
    assert!(why.contains("use Linux 5.14 or newer"), "{why}");
    assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains(daemon.mount().to_str().unwrap()));
}
