//! Live upgrade: to good programs under load, and to all kinds of bad ones.
//!
//! The tests use bash as a version that misbehaves. The supervisor starts `PROGRAM worker` and execs `PROGRAM serve ...`,
//! so bash runs the scripts `worker` and `serve` in the daemon's directory.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::harness::{Random, TestDaemon, children, needs, open, read_at, same, signal, until};
use crate::process::Client;

const BASH: &str = "/bin/bash";
/// Functions for a script of a worker: `say` sends a message to the supervisor, `hear` waits for one.
const SPEAK: &str = r#"
fd=$(sed 's/.*"channel":\([0-9]*\).*/\1/' <<<"$PLYFS_WORKER")
say() { printf '%s' "$1" >&$fd; }
hear() { dd bs=65536 count=1 status=none <&$fd; }
"#;
const PREPARED: &str = r#"say '{"prepared":{"version":"9.9","hand_over":3}}'"#;

/// A copy of the program.
fn copy(daemon: &TestDaemon, name: &str) -> PathBuf {
    let path = daemon.path(name);
    fs::copy(env!("CARGO_BIN_EXE_plyfs"), &path).unwrap();
    path
}

/// The file that a process runs.
fn program(pid: i32) -> PathBuf {
    fs::read_link(format!("/proc/{pid}/exe")).unwrap()
}

/// A daemon whose working directory is the test's.
fn in_own_directory() -> TestDaemon {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let mut command = daemon.command();
    command.args(["serve", "--cache-memory", "64M"]).current_dir(daemon.dir.path());
    daemon.start_command(command);
    daemon
}

fn script(daemon: &TestDaemon, name: &str, text: &str) {
    fs::write(daemon.path(name), format!("{SPEAK}\n{text}\n")).unwrap();
}

/// Writes bash scripts that exec the program; a worker first waits for the file `go`.
fn wrapped(daemon: &TestDaemon) {
    let plyfs = env!("CARGO_BIN_EXE_plyfs");
    script(daemon, "worker", &format!("while [ ! -e go ]; do sleep 0.01; done; exec {plyfs} worker"));
    script(daemon, "serve", &format!("exec {plyfs} serve \"$@\""));
}

fn lock(file: &fs::File, command: i32) -> bool {
    // SAFETY: the struct is plain numbers, zero is a value of it.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_len) = (libc::F_WRLCK as i16, 512);
    // SAFETY: the struct outlives the call.
    unsafe { libc::fcntl(file.as_raw_fd(), command, &lock) == 0 }
}

#[test]
fn clients_do_not_notice_an_upgrade_under_load() {
    let mut daemon = TestDaemon::on_disk();
    let supervisor = daemon.supervisor();
    let size = 8 << 20;
    let paths: Vec<PathBuf> = (0..4).map(|n| daemon.create(&format!("d{n}"), false, size)).collect();
    let clients: Vec<Client> =
        paths.iter().zip(1..).map(|(path, seed)| Client::new(path, size, seed)).collect();
    let locked = daemon.create("locked", false, 1 << 20);
    let (holder, other) = (open(&locked), open(&locked));
    // SAFETY: no memory is involved.
    let flock =
        |file: &fs::File| unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) == 0 };
    assert!(flock(&holder) && lock(&holder, libc::F_OFD_SETLK));
    holder.write_all_at(b"held", 0).unwrap();
    let still_locked = || {
        assert!(!flock(&other) && !lock(&other, libc::F_OFD_SETLK), "a lock was lost");
        same(&read_at(&other, 0, 4), b"held", "open files");
    };

    let next = copy(&daemon, "next");
    let done = daemon.json(&["upgrade", "--program", next.to_str().unwrap()]);
    assert_eq!((&done["state"], &done["number"]), (&"done".into(), &1.into()), "{done}");
    assert_eq!(done["why"], serde_json::Value::Null, "{done}");
    assert_eq!(daemon.status()["supervisor_pid"], supervisor);
    let (worker, standby) = daemon.prepared();
    for pid in [supervisor, worker, standby] {
        assert_eq!(program(pid), next, "{pid}");
    }
    still_locked();

    // Without a path, the upgrade uses the file that is there now.
    let newer = copy(&daemon, "newer");
    let inode = newer.metadata().unwrap().ino();
    fs::rename(&newer, &next).unwrap();
    daemon.ok(&["upgrade"]);
    let runs_it = |pid: i32| {
        assert_eq!(fs::metadata(format!("/proc/{pid}/exe")).unwrap().ino(), inode, "{pid}");
        assert_eq!(program(pid), next, "{pid}");
    };
    let (worker, standby) = daemon.prepared();
    [supervisor, worker, standby].into_iter().for_each(runs_it);
    still_locked();

    // The new supervisor works like the first one.
    if needs("resend") {
        daemon.kill_worker();
        let (worker, standby) = daemon.prepared();
        [worker, standby].into_iter().for_each(runs_it);
        still_locked();
    }
    daemon.ok(&["upgrade", "--program", env!("CARGO_BIN_EXE_plyfs")]);
    still_locked();
    assert!(clients.iter().all(Client::is_fine));
    let models: Vec<Vec<u8>> = clients.into_iter().map(Client::stop).collect();
    drop((holder, other));
    signal(supervisor, libc::SIGTERM);
    daemon.ended();
    daemon.start();
    for (path, model) in paths.iter().zip(models) {
        same(&read_at(&open(path), 0, size as usize), &model, "after the restart");
    }
}

#[test]
fn an_upgrade_to_an_unusable_program_fails_and_changes_nothing() {
    let daemon = in_own_directory();
    let client = Client::new(&daemon.create("a", false, 1 << 20), 1 << 20, 1);
    let (worker, _) = daemon.prepared();
    let file = |name: &str, mode: u32, text: &str| {
        fs::write(daemon.path(name), text).unwrap();
        fs::set_permissions(daemon.path(name), fs::Permissions::from_mode(mode)).unwrap();
        daemon.path(name)
    };
    let programs = [
        (file("text", 0o755, "hello\n"), "cannot start"),
        (file("data", 0o644, "hello\n"), "cannot start"),
        (file("script", 0o755, "#!/bin/sh\nexit 0\n"), "is no plyfs"),
        (daemon.path("missing"), "No such file"),
        (daemon.dir.path().to_owned(), "cannot start"),
        (PathBuf::from("/bin/false"), "exit status: 1"),
        (PathBuf::from("/bin/true"), "is no plyfs"),
        (PathBuf::from("/bin/cat"), "could not prepare itself"),
    ];
    for (path, why) in programs {
        let text = daemon.fails(&["upgrade", "--program", path.to_str().unwrap(), "--timeout", "30s"]);
        assert!(text.contains("cannot upgrade to") && text.contains(why), "{}: {text}", path.display());
        assert_eq!(daemon.prepared().0, worker, "{}", path.display());
    }
    let scripts = [
        ("exit 3", "exit status: 3"),
        ("kill -SEGV $$", "SIGSEGV"),
        ("say 'hello'; hear", "cannot be decoded"),
        (r#"say '"ready"'; say '"drained"'; exit 4"#, "exit status: 4"),
        (r#"say '{"failed":"no luck\ntoday"}'; exit 1"#, "no luck today"),
        // The worker closes its channel and goes on running.
        (
            "for n in /proc/$$/fd/*; do n=${n##*/}; ((n > 2)) && eval \"exec $n>&-\"; done; exec sleep 600",
            "SIGKILL",
        ),
    ];
    for (text, why) in scripts {
        script(&daemon, "worker", text);
        let said = daemon.fails(&["upgrade", "--program", BASH, "--timeout", "30s"]);
        assert!(said.contains("could not prepare itself") && said.contains(why), "{text}: {said}");
        assert_eq!(daemon.prepared().0, worker, "{text}");
    }
    assert!(client.is_fine());
    client.stop();
    // After all that, an upgrade to a good program works.
    daemon.ok(&["upgrade"]);
    assert_eq!(daemon.status()["upgrade"]["number"], 15);
}

#[test]
fn if_the_new_version_cannot_take_over_the_old_one_goes_on() {
    let daemon = in_own_directory();
    let client = Client::new(&daemon.create("a", false, 1 << 20), 1 << 20, 1);
    // The last case costs a pause of 20 s.
    for then in ["hear; exit 7", "say 'hello'; sleep 1", "exec sleep 600"] {
        script(&daemon, "worker", &format!("{PREPARED}; {then}"));
        let said = daemon.fails(&["upgrade", "--program", BASH]);
        assert!(said.contains("could not"), "{then}: {said}");
        let (worker, standby) = daemon.prepared();
        for pid in [daemon.supervisor(), worker, standby] {
            assert_eq!(program(pid), Path::new(env!("CARGO_BIN_EXE_plyfs")), "{then}");
        }
        let mut found = children(daemon.supervisor());
        found.sort_unstable();
        let mut expected = vec![worker, standby];
        expected.sort_unstable();
        assert_eq!(found, expected, "{then}");
    }
    assert!(client.is_fine());
    client.stop();
}

#[test]
fn a_program_that_fails_as_supervisor_runs_as_worker_only() {
    let daemon = in_own_directory();
    let client = Client::new(&daemon.create("a", false, 1 << 20), 1 << 20, 1);
    wrapped(&daemon);
    fs::write(daemon.path("go"), "").unwrap();
    script(&daemon, "serve", "exit 9");
    let done = daemon.json(&["upgrade", "--program", BASH]);
    assert_eq!(done["state"], "done", "{done}");
    assert!(done["why"].as_str().unwrap().contains("exit status: 9"), "{done}");
    assert_eq!(program(daemon.supervisor()), Path::new(env!("CARGO_BIN_EXE_plyfs")));
    let may_die = needs("resend");
    if may_die {
        daemon.kill_worker();
        daemon.prepared();
    }
    // When the program works as supervisor, it becomes the supervisor, too.
    wrapped(&daemon);
    let done = daemon.json(&["upgrade"]);
    assert_eq!((&done["state"], &done["why"]), (&"done".into(), &serde_json::Value::Null), "{done}");
    if may_die {
        daemon.kill_worker();
    }
    assert!(client.is_fine());
    client.stop();
}

#[test]
fn only_one_upgrade_runs_at_a_time_and_a_stop_ends_it() {
    let mut daemon = in_own_directory();
    script(&daemon, "worker", "exec sleep 600");
    let said = daemon.fails(&["upgrade", "--program", BASH, "--timeout", "100ms"]);
    assert!(said.contains("not done after 100ms"), "{said}");
    assert_eq!(daemon.status()["upgrade"]["state"], "running");
    let said = daemon.fails(&["upgrade"]);
    assert!(said.contains("under way"), "{said}");
    let candidate = until("a candidate", || {
        children(daemon.supervisor()).into_iter().find(|pid| program(*pid).ends_with("sleep"))
    });
    daemon.stop();
    assert!(!Path::new(&format!("/proc/{candidate}")).exists(), "the candidate outlives the daemon");
}

#[test]
fn a_stop_during_an_upgrade_is_carried_out() {
    let mut daemon = in_own_directory();
    let path = daemon.create("a", false, 1 << 20);
    open(&path).write_all_at(b"not flushed", 8192).unwrap();
    wrapped(&daemon);
    daemon.fails(&["upgrade", "--program", BASH, "--timeout", "100ms"]);
    let (worker, _) = daemon.prepared();
    // The stopped worker does not receive the request to make room, so the upgrade takes some seconds.
    signal(worker, libc::SIGSTOP);
    fs::write(daemon.path("go"), "").unwrap();
    until("a prepared version", || daemon.log().contains("makes room").then_some(()));
    signal(daemon.supervisor(), libc::SIGTERM);
    daemon.ended();
    assert_eq!(daemon.live_maps(), Vec::<std::path::PathBuf>::new());
    daemon.start();
    same(&read_at(&open(&path), 8192, 11), b"not flushed", "after the stop");
}

#[test]
fn a_version_that_cannot_read_the_store_is_refused() {
    let daemon = TestDaemon::on_disk();
    daemon.base(1 << 20);
    let client = Client::new(&daemon.create("a", true, 1 << 20), 1 << 20, 1);
    let (worker, _) = daemon.prepared();
    let next = copy(&daemon, "next");
    let upgrade = ["upgrade", "--program", next.to_str().unwrap()];

    let bases = daemon.store().join("bases");
    let record = fs::read_dir(&bases).unwrap().next().unwrap().unwrap().path();
    let mut bytes = fs::read(record).unwrap();
    bytes[8] = 255;
    let end = bytes.len() - 4;
    let sum = crc32c::crc32c(&bytes[..end]);
    bytes[end..].copy_from_slice(&sum.to_le_bytes());
    let newer = bases.join("900000.base");
    fs::write(&newer, bytes).unwrap();
    let said = daemon.fails(&upgrade);
    assert!(said.contains("900000.base") && said.contains("newer"), "{said}");
    assert_eq!(daemon.prepared().0, worker);
    fs::remove_file(newer).unwrap();

    // Write a map with an unknown layout into the last slot of the arena's first directory page.
    let arena = File::options().read(true).write(true).open(daemon.arena().unwrap()).unwrap();
    let (entry, window) = (4096 + 511 * 8, 512 << 33);
    let mut magic = [0; 8];
    // The slot of the arena's mark has no live map.
    let of_disk = (1u64..=4).any(|slot| {
        arena.read_exact_at(&mut magic, slot << 33).unwrap();
        magic.starts_with(b"LYLIVE") || magic[..6].iter().rev().eq(b"LYLIVE")
    });
    assert!(of_disk, "{magic:?}");
    magic[6] ^= 0xFF;
    arena.write_all_at(&magic, window).unwrap();
    arena.write_all_at(&(900_000u64 << 2 | 2).to_ne_bytes(), entry).unwrap();
    let said = daemon.fails(&upgrade);
    assert!(said.contains("layout"), "{said}");
    assert_eq!(daemon.prepared().0, worker);
    arena.write_all_at(&[0; 8], entry).unwrap();
    // The same with an unknown layout of the arena itself.
    arena.read_exact_at(&mut magic, 0).unwrap();
    let mut newer = magic;
    newer[6] ^= 0xFF;
    arena.write_all_at(&newer, 0).unwrap();
    let said = daemon.fails(&upgrade);
    assert!(said.contains("layout"), "{said}");
    assert_eq!(daemon.prepared().0, worker);
    arena.write_all_at(&magic, 0).unwrap();

    assert_ne!(daemon.json(&upgrade)["state"], "failed");
    assert!(client.is_fine());
    client.stop();
}

#[test]
fn commands_do_not_notice_upgrades() {
    let daemon = TestDaemon::on_disk();
    fs::write(daemon.path("b.img"), Random(3).bytes(1 << 20)).unwrap();
    let image = daemon.path("b.img");
    let image = image.to_str().unwrap();
    let done = std::sync::atomic::AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| {
        let work: [Box<dyn Fn(u64) + Send>; 3] = [
            Box::new(|n| {
                let name = format!("d{n}");
                daemon.ok(&["disk", "create", &name, "--size", "1M"]);
                daemon.ok(&["disk", "rm", &name]);
            }),
            Box::new(|n| {
                let name = format!("b{n}");
                daemon.ok(&["base", "add", &name, image]);
                daemon.ok(&["base", "rm", &name]);
            }),
            Box::new(|_| {
                let status = daemon.cli(&["status"]);
                let why = String::from_utf8_lossy(&status.stderr);
                // On a slow machine a worker takes over in more than a second, and the supervisor answers.
                assert!(status.status.success() || why.contains("is taking over"), "{why}");
                daemon.ok(&["disk", "list"]);
            }),
        ];
        let threads = work.map(|job| {
            let done = &done;
            scope.spawn(move || {
                let mut n = 0;
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    job(n);
                    n += 1;
                }
                n
            })
        });
        for number in 1..=10 {
            let output = daemon.cli(&["--json", "upgrade"]);
            if !output.status.success() || threads.iter().any(|t| t.is_finished()) {
                done.store(true, std::sync::atomic::Ordering::Relaxed);
                panic!("upgrade {number}: {}", String::from_utf8_lossy(&output.stderr));
            }
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        threads.map(|thread| thread.join().unwrap())
    });
    assert!(rounds.iter().all(|n| *n > 1), "{rounds:?}");
    assert_eq!(daemon.json(&["status"])["upgrade"]["number"], 10);
}

#[test]
fn workers_may_die_while_versions_change() {
    if !needs("resend") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    let client = Client::new(&daemon.create("a", false, 1 << 20), 1 << 20, 1);
    let storm = crate::harness::Storm::new(&daemon, Duration::from_millis(150), u64::MAX);
    // A kill also hits the candidate. The upgrade then fails and reports it.
    let done = (0..12).filter(|_| daemon.cli(&["upgrade"]).status.success()).count();
    let kills = storm.stop();
    assert!(kills > 0);
    assert!(client.is_fine());
    client.stop();
    daemon.prepared();
    daemon.ok(&["upgrade"]);
    println!("{done} of 12 upgrades under {kills} kills");
}
