//! Flatten, rebase and compact: what a disk stands on changes, and none of its bytes.

use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use serde_json::Value;

use crate::harness::{Random, Storm, TestDaemon, fallocate, open, read_at, same, until};

const MIB: usize = 1 << 20;
const BLOCK: u64 = 4096;

/// Registers an image with these bytes as a base.
fn add_base(daemon: &TestDaemon, name: &str, bytes: &[u8]) {
    let image = daemon.path(&format!("{name}.raw"));
    fs::write(&image, bytes).unwrap();
    daemon.ok(&["base", "add", name, image.to_str().unwrap()]);
}

/// An image and one that differs from it in some blocks, in a hole, and in its length.
fn images() -> (Vec<u8>, Vec<u8>) {
    let mut rng = Random(7);
    let mut first = rng.bytes(4 * MIB);
    first[MIB..MIB + 65_536].fill(0);
    let mut second = first.clone();
    second[10 * 4096..13 * 4096].fill(9);
    second[MIB..MIB + 4096].fill(8);
    second[3 * MIB..3 * MIB + 8192].fill(0);
    second.extend(rng.bytes(300_000));
    (first, second)
}

/// Writes, discards and grows a disk at random. Returns its bytes.
fn change(daemon: &TestDaemon, disk: &str, before: &[u8], seed: u64) -> Vec<u8> {
    let mut rng = Random(seed);
    let mut now = before.to_vec();
    let file = open(&daemon.disk(disk));
    for _ in 0..40 {
        let at = rng.below(now.len() as u64 - 70_000) / 512 * 512;
        let len = 512 + rng.below(65_536) as usize;
        if rng.below(4) == 0 {
            let at = at / BLOCK * BLOCK;
            fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, at, len as u64).unwrap();
            now[at as usize..at as usize + len].fill(0);
        } else {
            let bytes = rng.bytes(len);
            file.write_all_at(&bytes, at).unwrap();
            now[at as usize..at as usize + len].copy_from_slice(&bytes);
        }
    }
    now
}

fn bytes_of(daemon: &TestDaemon, disk: &str) -> Vec<u8> {
    fs::read(daemon.disk(disk)).unwrap()
}

fn stored(disk: &Value) -> u64 {
    let layers = disk["layers"].as_array().unwrap().iter();
    disk["delta_bytes"].as_u64().unwrap() + layers.map(|layer| layer["bytes"].as_u64().unwrap()).sum::<u64>()
}

/// Guards D94.
#[test]
fn a_flattened_disk_needs_no_base_and_shows_the_same_bytes_under_its_open_file() {
    let mut daemon = TestDaemon::on_disk();
    let (image, _) = images();
    add_base(&daemon, "b", &image);
    daemon.ok(&["disk", "create", "vm1", "--base", "b", "--size", "6M"]);
    let mut wanted = image.clone();
    wanted.resize(6 * MIB, 0);
    let wanted = change(&daemon, "vm1", &wanted, 1);
    daemon.ok(&["disk", "clone", "vm1", "vm2"]);
    let held = open(&daemon.disk("vm1"));
    let said = daemon.ok(&["disk", "flatten", "vm1"]);
    assert!(said.contains("it has no base, 1 layers"), "{said}");
    same(&read_at(&held, 0, 6 * MIB), &wanted, "under the open file");
    let wanted = change(&daemon, "vm1", &wanted, 2);
    daemon.kill_worker();
    same(&read_at(&held, 0, 6 * MIB), &wanted, "after a kill");
    drop(held);
    let shown = daemon.json(&["disk", "show", "vm1"]);
    assert_eq!((&shown["base"], &shown["job"]), (&Value::Null, &Value::Null), "{shown}");
    assert!(daemon.ok(&["disk", "flatten", "vm1"]).contains("nothing to do"));
    assert!(daemon.fails(&["base", "rm", "b"]).contains("disk vm2"), "only the clone needs it");
    daemon.ok(&["disk", "rm", "vm2"]);
    daemon.ok(&["base", "rm", "b"]);
    fs::remove_file(daemon.path("b.raw")).unwrap();
    daemon.restart();
    same(&bytes_of(&daemon, "vm1"), &wanted, "without its base");
    daemon.stop();
    daemon.ok(&["check"]);
}

/// Guards D94.
#[test]
fn a_rebased_disk_keeps_what_differs_from_the_new_base_and_gives_back_what_is_the_same() {
    let mut daemon = TestDaemon::on_disk();
    let (first, second) = images();
    add_base(&daemon, "first", &first);
    add_base(&daemon, "second", &second);
    daemon.ok(&["disk", "create", "vm1", "--base", "first"]);
    // The guest wrote what the new base has there, too.
    let file = open(&daemon.disk("vm1"));
    file.write_all_at(&second[10 * 4096..13 * 4096], 10 * 4096).unwrap();
    file.write_all_at(&[5; 4096], 2 * MIB as u64).unwrap();
    drop(file);
    let wanted = bytes_of(&daemon, "vm1");
    let said = daemon.ok(&["disk", "rebase", "vm1", "second"]);
    assert!(said.contains("base second"), "{said}");
    same(&bytes_of(&daemon, "vm1"), &wanted, "over the new base");
    let shown = daemon.json(&["disk", "show", "vm1"]);
    assert_eq!(shown["base"], "second");
    // The written block, the block that was a hole, and the two that the new base has as zeros.
    let layers: u64 = shown["layers"].as_array().unwrap().iter().map(|l| l["bytes"].as_u64().unwrap()).sum();
    assert_eq!(layers, 3 * BLOCK, "{shown}");
    daemon.ok(&["base", "rm", "first"]);
    assert!(daemon.ok(&["disk", "rebase", "vm1", "second"]).contains("nothing to do"));
    // A growing disk shows zeros there, not the longer base.
    open(&daemon.disk("vm1")).set_len(5 * MIB as u64).unwrap();
    let mut grown = wanted.clone();
    grown.resize(5 * MIB, 0);
    same(&bytes_of(&daemon, "vm1"), &grown, "grown");
    daemon.restart();
    same(&bytes_of(&daemon, "vm1"), &grown, "after a restart");
    daemon.stop();
    daemon.ok(&["check"]);
}

/// Guards D94.
#[test]
fn snapshots_and_clones_show_their_bytes_after_the_disk_was_rebased_and_flattened() {
    let mut daemon = TestDaemon::on_disk();
    let (first, second) = images();
    add_base(&daemon, "first", &first);
    add_base(&daemon, "second", &second);
    daemon.ok(&["disk", "create", "vm1", "--base", "first"]);
    let mut states = vec![first.clone()];
    daemon.ok(&["disk", "snapshot", "vm1", "s0"]);
    for seed in 1..4 {
        let now = change(&daemon, "vm1", states.last().unwrap(), seed);
        daemon.ok(&["disk", "snapshot", "vm1", &format!("s{seed}")]);
        states.push(now);
    }
    daemon.ok(&["disk", "clone", "vm1@s1", "clone"]);
    states.push(change(&daemon, "vm1", &states[3], 9));
    let look = |daemon: &TestDaemon, when: &str| {
        for (number, wanted) in states[..4].iter().enumerate() {
            let file = daemon.mount().join(format!("snapshots/vm1@s{number}.raw"));
            same(&fs::read(file).unwrap(), wanted, &format!("snapshot {number} {when}"));
        }
        same(&bytes_of(daemon, "vm1"), &states[4], when);
        same(&bytes_of(daemon, "clone"), &states[1], &format!("the clone {when}"));
    };
    look(&daemon, "before");
    // A reader that has a snapshot open reads on.
    let reader = fs::File::open(daemon.mount().join("snapshots/vm1@s2.raw")).unwrap();
    daemon.ok(&["disk", "rebase", "vm1", "second"]);
    same(&read_at(&reader, 0, states[2].len()), &states[2], "the open snapshot");
    look(&daemon, "after the rebase");
    let changed = daemon.ok(&["disk", "diff", "vm1@s3"]);
    assert!(!changed.is_empty());
    daemon.kill_worker();
    look(&daemon, "after a kill");
    daemon.ok(&["disk", "flatten", "vm1"]);
    look(&daemon, "after the flattening");
    assert!(daemon.fails(&["base", "rm", "first"]).contains("disk clone"));
    daemon.ok(&["base", "rm", "second"]);
    daemon.restart();
    look(&daemon, "after a restart");
    assert_eq!(daemon.ok(&["disk", "diff", "vm1@s3"]), changed);
    daemon.ok(&["disk", "rollback", "vm1", "s2"]);
    same(&bytes_of(&daemon, "vm1"), &states[2], "rolled back");
    daemon.stop();
    daemon.ok(&["check"]);
}

/// Guards D94.
#[test]
fn the_space_of_blocks_that_later_layers_hide_comes_back_when_layers_are_merged() {
    let mut daemon = TestDaemon::on_disk();
    daemon.ok(&["disk", "create", "vm1", "--size", "4M"]);
    let mut wanted = vec![0; 4 * MIB];
    for round in 1..=5u8 {
        wanted[..MIB].fill(round);
        open(&daemon.disk("vm1")).write_all_at(&wanted[..MIB], 0).unwrap();
        daemon.ok(&["disk", "snapshot", "vm1", &format!("s{round}")]);
    }
    assert!(daemon.ok(&["disk", "compact", "vm1"]).contains("nothing to do"));
    daemon.ok(&["disk", "rm", "vm1@s2", "vm1@s3", "vm1@s4"]);
    let before = daemon.json(&["disk", "show", "vm1"]);
    let said = daemon.ok(&["disk", "compact", "vm1"]);
    assert!(said.contains("2 layers"), "{said}");
    let after = daemon.json(&["disk", "show", "vm1"]);
    assert_eq!(
        (before["layers"].as_array().unwrap().len(), after["layers"].as_array().unwrap().len()),
        (5, 2)
    );
    assert!(
        stored(&before) >= 5 * MIB as u64 && stored(&after) < 2 * MIB as u64 + 65_536,
        "{before} {after}"
    );
    same(&bytes_of(&daemon, "vm1"), &wanted, "merged");
    let first = fs::read(daemon.mount().join("snapshots/vm1@s1.raw")).unwrap();
    assert!(first[..MIB].iter().all(|byte| *byte == 1));
    let deltas = fs::read_dir(daemon.store().join("deltas")).unwrap();
    let data = deltas.filter(|file| file.as_ref().unwrap().file_name().to_string_lossy().ends_with(".data"));
    assert_eq!(data.count(), 2, "old layers are removed");
    daemon.restart();
    same(&bytes_of(&daemon, "vm1"), &wanted, "after a restart");
    daemon.stop();
    daemon.ok(&["check"]);
}

/// Guards D95.
#[test]
fn a_change_goes_on_after_kills_and_a_stop_while_the_disk_is_written() {
    let mut daemon = TestDaemon::on_disk();
    let image = Random(5).bytes(24 * MIB);
    add_base(&daemon, "b", &image);
    daemon.ok(&["disk", "create", "vm1", "--base", "b"]);
    let mut wanted = image.clone();
    daemon.ok(&["disk", "flatten", "vm1", "--rate", "6M", "--background"]);
    let storm = Storm::new(&daemon, Duration::from_millis(400), 5);
    let file = open(&daemon.disk("vm1"));
    let mut rng = Random(6);
    for _ in 0..60 {
        let at = rng.below(24 * 256) * BLOCK;
        let bytes = rng.bytes(4096);
        file.write_all_at(&bytes, at).unwrap();
        wanted[at as usize..at as usize + 4096].copy_from_slice(&bytes);
        std::thread::sleep(Duration::from_millis(20));
    }
    drop(file);
    storm.stop();
    let job = daemon.json(&["job", "show", "flatten-vm1"]);
    assert_eq!(
        (&job["state"], &job["resumed"], &job["disk"]),
        (&"copying".into(), &true.into(), &"vm1".into())
    );
    let other = daemon.fails(&["disk", "compact", "vm1"]);
    assert!(other.contains("plyfs job cancel flatten-vm1"), "{other}");
    daemon.restart();
    same(&bytes_of(&daemon, "vm1"), &wanted, "half way");
    let rest = daemon.ok(&["disk", "flatten", "vm1"]);
    assert!(rest.contains("no base"), "{rest}");
    same(&bytes_of(&daemon, "vm1"), &wanted, "flattened");
    daemon.ok(&["base", "rm", "b"]);
    daemon.stop();
    daemon.ok(&["check"]);
}

#[test]
fn a_cancelled_change_leaves_the_disk_as_it_was_and_a_removed_disk_ends_it() {
    let mut daemon = TestDaemon::on_disk();
    let image = Random(5).bytes(16 * MIB);
    add_base(&daemon, "b", &image);
    daemon.ok(&["disk", "create", "vm1", "vm2", "--base", "b"]);
    for disk in ["vm1", "vm2"] {
        daemon.ok(&["disk", "flatten", disk, "--rate", "1M", "--background"]);
    }
    until("copied bytes", || {
        let job = daemon.json(&["job", "show", "flatten-vm1"]);
        job["bytes"].as_u64().filter(|bytes| *bytes > 0)
    });
    daemon.ok(&["job", "cancel", "flatten-vm1"]);
    let shown = daemon.json(&["disk", "show", "vm1"]);
    assert_eq!((&shown["base"], stored(&shown)), (&"b".into(), 0), "{shown}");
    daemon.ok(&["disk", "rm", "vm2"]);
    same(&bytes_of(&daemon, "vm1"), &image, "as before");
    until("no file of a layer", || {
        (fs::read_dir(daemon.store().join("deltas")).unwrap().count() == 0).then_some(())
    });
    assert_eq!(daemon.json(&["jobs"]).as_array().unwrap().len(), 1);
    daemon.stop();
    daemon.ok(&["check"]);
}

#[test]
fn a_rebase_to_what_does_not_fit_is_refused() {
    let daemon = TestDaemon::on_disk();
    let (first, second) = images();
    add_base(&daemon, "large", &second);
    add_base(&daemon, "small", &first);
    daemon.ok(&["disk", "create", "vm1", "--base", "large"]);
    daemon.ok(&["disk", "create", "blank", "--size", "1M"]);
    for (args, part) in [
        (&["disk", "rebase", "vm1", "small"][..], "fewer than the"),
        (&["disk", "rebase", "vm1", "small", "--unsafe"], "fewer than the"),
        (&["disk", "rebase", "vm1", "none"], "there is no base"),
        (&["disk", "rebase", "none", "small"], "there is no disk"),
        (&["disk", "rebase", "blank", "small", "--unsafe"], "leave --unsafe out"),
        (&["disk", "flatten", "none"], "there is no disk"),
        (&["disk", "flatten", "vm1", "--rate", "0"], "rate"),
        (&["disk", "rebase", "vm1", "small", "--unsafe", "--rate", "1M"], "cannot be used with"),
    ] {
        let output = daemon.cli(args);
        let wrong = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && wrong.contains(part), "{args:?}: {wrong}");
    }
    same(&bytes_of(&daemon, "vm1"), &second, "as before");
}

#[test]
fn an_unsafe_rebase_changes_the_base_of_a_closed_disk_and_nothing_else() {
    let mut daemon = TestDaemon::on_disk();
    let (first, second) = images();
    add_base(&daemon, "first", &first);
    add_base(&daemon, "second", &second);
    daemon.ok(&["disk", "create", "vm1", "--base", "first"]);
    let file = open(&daemon.disk("vm1"));
    file.write_all_at(&[5; 4096], 2 * MIB as u64).unwrap();
    let refused = daemon.fails(&["disk", "rebase", "vm1", "second", "--unsafe"]);
    assert!(refused.contains("open"), "{refused}");
    drop(file);
    until("the rebase of the closed disk", || {
        daemon.cli(&["disk", "rebase", "vm1", "second", "--unsafe"]).status.success().then_some(())
    });
    let mut wanted = second[..first.len()].to_vec();
    wanted[2 * MIB..2 * MIB + 4096].fill(5);
    same(&bytes_of(&daemon, "vm1"), &wanted, "over the other base");
    daemon.ok(&["base", "rm", "first"]);
    daemon.restart();
    same(&bytes_of(&daemon, "vm1"), &wanted, "after a restart");
    daemon.stop();
    daemon.ok(&["check"]);
}

/// A base that is replaced by a copy under a disk.
#[test]
fn a_disk_on_a_blank_ground_can_be_put_on_a_base() {
    let mut daemon = TestDaemon::on_disk();
    let (first, _) = images();
    add_base(&daemon, "b", &first);
    daemon.ok(&["disk", "create", "vm1", "--size", "4M"]);
    open(&daemon.disk("vm1")).write_all_at(&first, 0).unwrap();
    daemon.ok(&["disk", "rebase", "vm1", "b"]);
    let shown = daemon.json(&["disk", "show", "vm1"]);
    assert_eq!((&shown["base"], stored(&shown)), (&"b".into(), 0), "all is in the base: {shown}");
    same(&bytes_of(&daemon, "vm1"), &first, "over the base");
    daemon.stop();
    daemon.ok(&["check"]);
}

#[test]
fn a_disk_and_a_snapshot_become_bases_on_top_of_the_images_of_the_present_one() {
    let mut daemon = TestDaemon::on_disk();
    let (first, _) = images();
    add_base(&daemon, "b", &first);
    daemon.ok(&["disk", "create", "vm1", "--base", "b", "--size", "5M"]);
    let mut blank = first.clone();
    blank.resize(5 * MIB, 0);
    let monday = change(&daemon, "vm1", &blank, 1);
    daemon.ok(&["disk", "snapshot", "vm1", "monday"]);
    let now = change(&daemon, "vm1", &monday, 2);
    let path = daemon.ok(&["disk", "commit", "vm1@monday", "monday"]);
    assert!(path.trim_end().ends_with("bases/monday.raw"), "{path}");
    daemon.ok(&["disk", "commit", "vm1", "now", "--compress", "zstd"]);
    same(&fs::read(daemon.mount().join("bases/monday.raw")).unwrap(), &monday, "the base of the snapshot");
    same(&fs::read(daemon.mount().join("bases/now.raw")).unwrap(), &now, "the base of the disk");
    assert_eq!(daemon.json(&["disk", "snapshots", "vm1"]).as_array().unwrap().len(), 1, "its own is gone");
    let image = daemon.store().join("images/monday.qcow2");
    let stored = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(&image).unwrap()) * 512;
    assert!(stored < 7 * MIB as u64 / 2, "{stored} bytes: the base is not copied");
    let shown = daemon.json(&["base", "show", "monday"]);
    assert_eq!(
        (&shown["format"], shown["backing"].as_array().unwrap().len()),
        (&"qcow2".into(), 1),
        "{shown}"
    );

    // A commit of a disk on a committed base.
    daemon.ok(&["disk", "create", "vm2", "--base", "now"]);
    let later = change(&daemon, "vm2", &now, 3);
    daemon.ok(&["disk", "commit", "vm2", "later"]);
    same(&fs::read(daemon.mount().join("bases/later.raw")).unwrap(), &later, "over two images");
    let taken = daemon.fails(&["disk", "commit", "vm1", "now"]);
    assert!(taken.contains("exists already"), "{taken}");
    assert!(daemon.fails(&["disk", "commit", "none", "x"]).contains("there is no disk"));

    // An image stays as long as a base has it.
    daemon.ok(&["disk", "rm", "vm2"]);
    daemon.ok(&["base", "rm", "now", "monday"]);
    assert!(!image.exists() && daemon.store().join("images/now.qcow2").exists());
    daemon.restart();
    same(&fs::read(daemon.mount().join("bases/later.raw")).unwrap(), &later, "after a restart");
    daemon.ok(&["base", "rm", "later"]);
    assert_eq!(fs::read_dir(daemon.store().join("images")).unwrap().count(), 0);
    same(&bytes_of(&daemon, "vm1"), &now, "the disk is as it was");
    daemon.stop();
    daemon.ok(&["check"]);
    fs::write(daemon.store().join("images/x.qcow2.7.tmp"), b"left by a kill").unwrap();
    let found = daemon.cli(&["check"]);
    let text = String::from_utf8(found.stdout).unwrap();
    assert!(!found.status.success() && text.contains("no base has it"), "{text}");
    daemon.ok(&["check", "--repair"]);
    assert_eq!(fs::read_dir(daemon.store().join("images")).unwrap().count(), 0);
}

#[test]
fn snapshots_that_come_and_go_do_not_fill_the_record_of_their_disk() {
    let mut daemon = TestDaemon::on_disk();
    daemon.ok(&["disk", "create", "vm1", "--size", "4M"]);
    let mut wanted = vec![0; 4 * MIB];
    for round in 0..100u64 {
        let at = (round % 50 * BLOCK) as usize;
        wanted[at..at + 4096].fill(round as u8 + 1);
        open(&daemon.disk("vm1")).write_all_at(&wanted[at..at + 4096], at as u64).unwrap();
        daemon.ok(&["disk", "snapshot", "vm1", "s"]);
        daemon.ok(&["disk", "rm", "vm1@s"]);
    }
    until("merged layers", || {
        let shown = daemon.json(&["disk", "show", "vm1"]);
        (shown["job"].is_null() && shown["layers"].as_array().unwrap().len() < 40).then_some(())
    });
    same(&bytes_of(&daemon, "vm1"), &wanted, "merged");
    daemon.stop();
    daemon.ok(&["check"]);
}

/// A control socket before that of a daemon. It calls a function once, before it passes on the first request for changed
/// extents.
struct Intercepted {
    dir: tempfile::TempDir,
    stops: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

/// Passes on what one side sends; `look` sees it first.
fn pass(mut from: UnixStream, mut to: UnixStream, look: impl Fn(&[u8]) + Send + 'static) {
    thread::spawn(move || {
        let mut part = [0; 65536];
        while let Ok(len @ 1..) = from.read(&mut part) {
            look(&part[..len]);
            if to.write_all(&part[..len]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

impl Intercepted {
    fn new(daemon: &TestDaemon, before: impl FnOnce() + Send + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("control.sock")).unwrap();
        let real = daemon.store().join("control.sock");
        let (before, stops) = (Arc::new(Mutex::new(Some(before))), Arc::<AtomicBool>::default());
        let told = stops.clone();
        let thread = thread::spawn(move || {
            for client in listener.incoming() {
                let client = client.unwrap();
                if told.load(Ordering::Acquire) {
                    return;
                }
                let server = UnixStream::connect(&real).unwrap();
                let before = before.clone();
                pass(server.try_clone().unwrap(), client.try_clone().unwrap(), |_| ());
                pass(client, server, move |sent| {
                    if String::from_utf8_lossy(sent).contains("/extents")
                        && let Some(before) = before.lock().unwrap().take()
                    {
                        before();
                    }
                });
            }
        });
        Self { dir, stops, thread: Some(thread) }
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plyfs"));
        command.env("PLYFS_STORE", self.dir.path()).args(args);
        command.output().unwrap()
    }
}

impl Drop for Intercepted {
    fn drop(&mut self) {
        self.stops.store(true, Ordering::Release);
        drop(UnixStream::connect(self.dir.path().join("control.sock")));
        let _ = self.thread.take().map(thread::JoinHandle::join);
    }
}

#[test]
fn an_export_onto_the_base_of_a_disk_that_gets_another_base_meanwhile_fails_and_leaves_nothing() {
    let daemon = TestDaemon::on_disk();
    let (first, second) = images();
    add_base(&daemon, "first", &first);
    add_base(&daemon, "second", &second);
    let export = |disk: &str, image: &str| -> (Output, PathBuf) {
        daemon.ok(&["disk", "create", disk, "--base", "first"]);
        open(&daemon.disk(disk)).write_all_at(&[5; 4096], 2 * MIB as u64).unwrap();
        let (mut rebase, name) = (daemon.command(), disk.to_owned());
        let between = Intercepted::new(&daemon, move || {
            let done = rebase.args(["disk", "rebase", &name, "second"]).output().unwrap();
            assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        });
        let out = daemon.path(&format!("{disk}.qcow2"));
        let onto = daemon.path(image);
        let args = ["--format", "qcow2", "--onto", onto.to_str().unwrap()];
        let run = between.run(&[&["disk", "export", disk, out.to_str().unwrap()], &args[..]].concat());
        assert_eq!(daemon.json(&["disk", "show", disk])["base"], "second", "the test changes the base");
        (run, out)
    };
    let (run, out) = export("vm1", "first.raw");
    let error = String::from_utf8_lossy(&run.stderr).into_owned();
    assert!(!run.status.success() && error.contains("another base meanwhile"), "{error}");
    assert!(!out.exists(), "an image that shows neither what the disk had nor what it has");
    assert_eq!(daemon.json(&["disk", "snapshots", "vm1"]), serde_json::json!([]));
}

/// Guards D95.
#[test]
fn a_job_waits_for_a_base_that_cannot_be_opened_and_goes_on_when_it_is_back() {
    let mut daemon = TestDaemon::on_disk();
    let (image, _) = images();
    add_base(&daemon, "b", &image);
    daemon.ok(&["disk", "create", "vm1", "--base", "b"]);
    let wanted = change(&daemon, "vm1", &image, 3);
    daemon.ok(&["disk", "flatten", "vm1", "--rate", "64K", "--background"]);
    let (at, away) = (daemon.path("b.raw"), daemon.path("away.raw"));
    fs::rename(&at, &away).unwrap();
    // The next worker cannot open the base.
    daemon.kill_worker();
    until("the job says what it waits for", || {
        let job = daemon.json(&["job", "show", "flatten-vm1"]);
        assert_ne!(job["state"], "failed", "{job}");
        let why = job["error"].as_str()?;
        (job["state"] == "waiting" && why.contains("b.raw")).then_some(())
    });
    fs::rename(&away, &at).unwrap();
    daemon.ok(&["disk", "flatten", "vm1"]);
    assert_eq!(daemon.json(&["disk", "show", "vm1"])["base"], Value::Null);
    same(&bytes_of(&daemon, "vm1"), &wanted, "flattened");
    daemon.stop();
    daemon.ok(&["check"]);
}
