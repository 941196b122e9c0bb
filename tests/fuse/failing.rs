//! Failing storage under disks, bases and records.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::devices::{LoopDevice, Volume};
use crate::harness::*;
use crate::strace::Strace;

const MIB: u64 = 1 << 20;

/// A disk of nbdkit that fails while a file exists.
pub struct BadDisk {
    server: Child,
    dir: PathBuf,
}

impl BadDisk {
    pub fn new(dir: &Path, size: u64) -> Option<Self> {
        let (nbdkit, nbdfuse) = (tool("nbdkit")?, tool("nbdfuse")?);
        let at = dir.join("nbd");
        fs::create_dir(&at).unwrap();
        fs::write(dir.join("image"), b"").unwrap();
        File::options().write(true).open(dir.join("image")).unwrap().set_len(size).unwrap();
        let mut server = Command::new(nbdfuse)
            .arg(at.join("disk"))
            .args(["--command"])
            .arg(nbdkit)
            .args(["-s", "--exit-with-parent", "--filter=error", "file"])
            .arg(dir.join("image"))
            .args(["error=EIO", "error-rate=100%"])
            .arg(format!("error-file={}", dir.join("fail").display()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        while fs::metadata(at.join("disk")).map_or(true, |m| m.len() != size) {
            assert!(Instant::now() < until && server.try_wait().unwrap().is_none(), "nbdfuse does not serve");
            std::thread::sleep(Duration::from_millis(20));
        }
        Some(Self { server, dir: dir.to_owned() })
    }

    pub fn file(&self) -> PathBuf {
        self.dir.join("nbd/disk")
    }

    pub fn fails(&self) {
        fs::write(self.dir.join("fail"), b"").unwrap();
    }

    pub fn works(&self) {
        fs::remove_file(self.dir.join("fail")).unwrap();
    }
}

impl Drop for BadDisk {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.dir.join("fail"));
        let _ = Command::new("umount").arg("-l").arg(self.dir.join("nbd")).status();
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Makes system calls of the worker on one file fail, until dropped.
fn fail_calls(daemon: &TestDaemon, path: &Path, inject: &str) -> Option<Strace> {
    let (inject, out) = (format!("inject={inject}"), daemon.path("strace"));
    Strace::attach(
        daemon.worker(),
        &["-P", path.to_str().unwrap(), "-e", &inject, "-o", out.to_str().unwrap()],
    )
}

/// The data file of a disk.
fn data_file(daemon: &TestDaemon, name: &str) -> PathBuf {
    let id = daemon.json(&["disk", "show", name])["id"].as_u64().unwrap();
    daemon.store().join(format!("deltas/{id}.data"))
}

pub fn drop_caches() {
    // SAFETY: no memory is involved.
    unsafe { libc::sync() };
    fs::write("/proc/sys/vm/drop_caches", b"3").unwrap();
}

#[test]
fn after_a_failed_fsync_a_disk_refuses_writes_until_it_is_reopened() {
    let daemon = TestDaemon::on_disk();
    let (bad, good) = (daemon.create("bad", false, MIB), daemon.create("good", false, MIB));
    let (file, other) = (open(&bad), open(&good));
    for file in [&file, &other] {
        file.write_all_at(&[1; 8192], 0).unwrap();
        file.sync_all().unwrap();
        file.write_all_at(&[2; 8192], 4096).unwrap();
    }
    {
        let Some(_strace) = fail_calls(&daemon, &data_file(&daemon, "bad"), "fdatasync:error=EIO:when=1")
        else {
            return;
        };
        assert_eq!(errno(file.sync_all()), libc::EIO);
    }
    // Without strace a sync would succeed, but prove nothing.
    assert_eq!(errno(file.sync_all()), libc::EIO);
    assert_eq!(errno(file.write_all_at(&[3; 4096], 0)), libc::EIO);
    assert_eq!(errno(fallocate(&file, PUNCH, 0, 4096)), libc::EIO);
    same(&read_at(&file, 0, 4096), &[1; 4096], "reads go on");
    let why = daemon.json(&["disk", "show", "bad"]);
    let text = why["refuses_writes"].as_str().unwrap_or_else(|| panic!("{why}"));
    assert!(text.contains("a flush failed: syncing the data file: Input/output error"), "{text}");
    assert_eq!(daemon.json(&["status"])["disks_refusing_writes"], serde_json::json!(["bad"]));
    assert!(daemon.ok(&["status"]).contains("bad; a flush failed"));
    assert!(daemon.log().contains("a flush failed"), "{}", daemon.log());
    // The same under the next worker.
    daemon.kill_worker();
    assert_eq!(errno(file.write_all_at(&[3; 4096], 0)), libc::EIO);
    assert!(daemon.json(&["disk", "show", "bad"])["refuses_writes"].is_string());
    // The other disk works.
    other.write_all_at(&[4; 4096], 0).unwrap();
    other.sync_all().unwrap();
    assert!(daemon.json(&["disk", "show", "good"])["refuses_writes"].is_null());
    drop(file);
    let file = open(&bad);
    assert!(daemon.json(&["disk", "show", "bad"])["refuses_writes"].is_null());
    file.write_all_at(&[5; 4096], 0).unwrap();
    file.sync_all().unwrap();
    same(&read_at(&file, 0, 12288)[4096..], &[2; 8192], "the earlier write");
}

#[test]
fn an_io_error_affects_only_its_range_and_its_disk() {
    let daemon = TestDaemon::on_disk();
    let (bad, good) = (daemon.create("bad", false, MIB), daemon.create("good", false, MIB));
    let (file, other) = (open(&bad), open(&good));
    file.write_all_at(&[1; 65536], 0).unwrap();
    other.write_all_at(&[1; 65536], 0).unwrap();
    {
        let calls = "pwrite64,pread64,preadv2:error=EIO";
        let Some(_strace) = fail_calls(&daemon, &data_file(&daemon, "bad"), calls) else { return };
        assert_eq!(errno(file.write_all_at(&[2; 4096], 0)), libc::EIO);
        assert_eq!(errno(file.read_exact_at(&mut [0; 4096], 4096)), libc::EIO);
        same(&read_at(&file, 65536, 4096), &[0; 4096], "a range that needs no storage");
        other.write_all_at(&[2; 4096], 0).unwrap();
        same(&read_at(&other, 0, 4096), &[2; 4096], "the other disk");
        other.sync_all().unwrap();
    }
    same(&read_at(&file, 0, 65536), &[1; 65536], "unchanged by the failed write");
    // After a failed write, flushes still work.
    file.write_all_at(&[3; 4096], 0).unwrap();
    file.sync_all().unwrap();
    assert!(daemon.json(&["disk", "show", "bad"])["refuses_writes"].is_null());
}

#[test]
fn a_store_on_a_failing_disk_returns_errors_and_recovers() {
    let dir = tempfile::Builder::new().prefix("plyfs-test-").tempdir_in("/var/tmp").unwrap();
    let Some(bad_disk) = BadDisk::new(dir.path(), 96 * MIB) else { return };
    // Without a journal: errors of its own would make the whole filesystem read-only.
    let make = ["mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=0"];
    let device = LoopDevice::new(&bad_disk.file());
    let volume = Volume::new(device, dir.path().join("volume"), &make, "errors=continue");
    let healthy = TestDaemon::on_disk();
    let elsewhere = open(&healthy.create("d", false, MIB));
    let mut daemon = TestDaemon::with_store_at(volume.path("store"));
    daemon.start();
    let (one, two) = (daemon.create("one", false, 8 * MIB), daemon.create("two", false, 8 * MIB));
    let (file, other) = (open(&one), open(&two));
    let content = Random(5).bytes(4 << 20);
    for file in [&file, &other] {
        file.write_all_at(&content, 0).unwrap();
        file.sync_all().unwrap();
    }
    drop_caches();
    bad_disk.fails();
    assert_eq!(errno(file.read_exact_at(&mut vec![0; 65536], MIB)), libc::EIO);
    same(&read_at(&file, 6 * MIB, 4096), &[0; 4096], "a range that needs no storage");
    bad_disk.works();
    same(&read_at(&file, 0, 4 << 20), &content, "when it works again");
    let refused = daemon.json(&["status"])["disks_refusing_writes"].clone();
    assert_eq!(refused, serde_json::json!([]));

    // When the writeback fails, the flush of that disk fails, and no other.
    file.write_all_at(&content, 0).unwrap();
    bad_disk.fails();
    assert_eq!(errno(file.sync_all()), libc::EIO);
    elsewhere.write_all_at(&[1; 4096], 0).unwrap();
    elsewhere.sync_all().unwrap();
    bad_disk.works();
    assert_eq!(errno(file.sync_all()), libc::EIO);
    assert_eq!(errno(file.write_all_at(&[1; 4096], 0)), libc::EIO);
    assert_eq!(daemon.json(&["status"])["disks_refusing_writes"], serde_json::json!(["one"]));
    other.write_all_at(&[9; 4096], 0).unwrap();
    other.sync_all().unwrap();
    drop(file);
    let file = open(&one);
    file.write_all_at(&content, 0).unwrap();
    file.sync_all().unwrap();
    drop((file, other));
    daemon.stop();
    let output = daemon.cli(&["check"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    daemon.start();
    same(&fs::read(&one).unwrap()[..4 << 20], &content, "after a restart");
    same(&fs::read(&two).unwrap()[4096..4 << 20], &content[4096..], "the other disk after a restart");
    daemon.stop();
}

#[test]
fn an_io_error_of_a_base_affects_only_its_range_and_caches_nothing_wrong() {
    let dir = tempfile::Builder::new().prefix("plyfs-test-").tempdir_in("/var/tmp").unwrap();
    let Some(bad_disk) = BadDisk::new(dir.path(), 16 * MIB) else { return };
    let content = Random(6).bytes(16 << 20);
    let base = bad_disk.file();
    File::options().write(true).open(&base).unwrap().write_all(&content).unwrap();
    let daemon = TestDaemon::on_disk();
    daemon.ok(&["base", "add", "b", base.to_str().unwrap()]);
    let file = open(&daemon.create("d", true, 16 * MIB));
    let other = open(&daemon.create("blank", false, MIB));
    same(&read_at(&file, 0, 65536), &content[..65536], "while it works");
    file.write_all_at(&[7; 4096], 8 * MIB).unwrap();
    drop_caches();
    bad_disk.fails();
    assert_eq!(errno(file.read_exact_at(&mut [0; 4096], 4 * MIB)), libc::EIO);
    // A partial block write needs the base's bytes, a write of a whole block does not.
    assert_eq!(errno(file.write_all_at(&[1; 100], 5 * MIB)), libc::EIO);
    file.write_all_at(&[8; 4096], 9 * MIB).unwrap();
    same(&read_at(&file, 0, 65536), &content[..65536], "blocks in memory");
    same(&read_at(&file, 8 * MIB, 4096), &[7; 4096], "the disk's own blocks");
    other.write_all_at(&[1; 4096], 0).unwrap();
    file.sync_all().unwrap();
    bad_disk.works();
    let mut expected = content;
    expected[8 << 20..(8 << 20) + 4096].fill(7);
    expected[9 << 20..(9 << 20) + 4096].fill(8);
    same(&read_at(&file, 0, 16 << 20), &expected, "when it works again");
}

#[test]
fn an_io_error_of_a_record_makes_only_that_disk_unavailable() {
    let dir = tempfile::Builder::new().prefix("plyfs-test-").tempdir_in("/var/tmp").unwrap();
    let mut daemon = TestDaemon::on_disk();
    daemon.create("lost", false, MIB);
    let kept = daemon.create("kept", false, MIB);
    fs::write(&kept, b"fine").unwrap();
    let id = daemon.json(&["disk", "show", "lost"])["id"].as_u64().unwrap();
    daemon.stop();
    // The record is on a failing disk.
    let name = format!("disks/{id}.disk");
    let record = fs::read(daemon.store().join(&name)).unwrap();
    let Some(bad_disk) = BadDisk::new(dir.path(), record.len() as u64) else { return };
    File::options().write(true).open(bad_disk.file()).unwrap().write_all(&record).unwrap();
    run(Command::new("mount").arg("--bind").arg(bad_disk.file()).arg(daemon.store().join(&name)));
    struct Unmount(PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
    let _unmount = Unmount(daemon.store().join(&name));
    drop_caches();
    bad_disk.fails();
    daemon.start();
    let status = daemon.json(&["status"]);
    // The record may be sound, so it does not count as damaged.
    assert_eq!(status["unread"][0]["file"], name, "{status}");
    assert_eq!(status["damaged"].as_array().map(Vec::len), Some(0), "{status}");
    assert!(daemon.log().contains(&name), "{}", daemon.log());
    assert!(!daemon.disk("lost").exists());
    assert_eq!(&fs::read(&kept).unwrap()[..4], b"fine");
    // The disk's name is unknown, so no disk can be created.
    assert!(daemon.fails(&["disk", "create", "lost", "--size", "1M"]).contains(&name));
    fs::write(&kept, b"FINE").unwrap();
    bad_disk.works();
    until("the disk", || daemon.disk("lost").exists().then_some(()));
    assert_eq!(daemon.json(&["status"])["unread"].as_array().map(Vec::len), Some(0));
}

#[test]
fn fsync_and_o_dsync_write_return_after_fdatasync_of_data_and_map() {
    let daemon = TestDaemon::on_disk();
    let disk = daemon.create("d", false, MIB);
    let file = open(&disk);
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.sync_all().unwrap();
    if tool("strace").is_none() {
        return;
    }
    let out = daemon.path("strace");
    let traced = |what: &dyn Fn()| -> Vec<String> {
        let calls = "trace=pwrite64,fdatasync,writev,write";
        let strace =
            Strace::attach(daemon.worker(), &["-y", "-e", calls, "-o", out.to_str().unwrap()]).unwrap();
        what();
        drop(strace);
        fs::read_to_string(&out).unwrap().lines().map(str::to_owned).collect()
    };
    // The position in the trace of the call with these parts.
    let place = |lines: &[String], parts: &[&str]| {
        let found = lines.iter().position(|line| parts.iter().all(|part| line.contains(part)));
        found.unwrap_or_else(|| panic!("no {parts:?} in {}", lines.join("\n")))
    };
    let synchronous = fs::OpenOptions::new().write(true).custom_flags(libc::O_DSYNC).open(&disk).unwrap();
    let fsync: &dyn Fn() = &|| {
        file.write_all_at(&[2; 4096], 8192).unwrap();
        file.sync_all().unwrap();
    };
    let dsync: &dyn Fn() = &|| synchronous.write_all_at(&[2; 4096], 16384).unwrap();
    for what in [fsync, dsync] {
        let lines = traced(what);
        let written = place(&lines, &["pwrite64", ".data>"]);
        let data = place(&lines, &["fdatasync", ".data>"]);
        let journal = place(&lines, &["pwrite64", ".map>"]);
        let map = place(&lines, &["fdatasync", ".map>"]);
        let answer = lines.iter().rposition(|line| line.contains("/dev/fuse")).expect("an answer");
        assert!(
            written < data && data < journal && journal < map && map < answer,
            "{written} {data} {journal} {map} {answer}: {}",
            lines.join("\n")
        );
    }
}

#[test]
fn punch_zero_range_discard_and_detect_zeroes_read_zeros_and_free_space() {
    let Some(io) = tool("qemu-io") else { return };
    let mut daemon = TestDaemon::on_disk();
    let mut model = daemon.base(8 << 20);
    let disk = daemon.create("d", true, 8 * MIB);
    let file = open(&disk);
    file.write_all_at(&vec![5; 4 << 20], 0).unwrap();
    model[..4 << 20].fill(5);
    file.sync_all().unwrap();
    let used = |daemon: &TestDaemon| daemon.json(&["disk", "show", "d"])["delta_bytes"].as_u64().unwrap();
    let before = used(&daemon);
    // Over the disk's own data, and over the base.
    for (mode, at) in [(PUNCH, 0), (ZERO, MIB), (PUNCH, 5 * MIB), (ZERO, 6 * MIB + 512)] {
        fallocate(&file, mode, at, 512 << 10).unwrap();
        model[at as usize..at as usize + (512 << 10)].fill(0);
    }
    for (options, command, at) in [
        ("discard=unmap", "discard 2M 512k", 2 * MIB),
        ("discard=unmap,detect-zeroes=unmap", "write -P 0 3M 512k", 3 * MIB),
        ("discard=unmap,detect-zeroes=unmap", "write -P 0 7M 512k", 7 * MIB),
    ] {
        let spec = format!("driver=raw,{options},file.driver=file,file.filename={}", disk.display());
        let text = run(Command::new(&io).args(["--image-opts", "-t", "none", "-c", command, &spec]));
        assert!(!text.contains("failed"), "{command}: {text}");
        model[at as usize..at as usize + (512 << 10)].fill(0);
    }
    same(&read_at(&file, 0, 8 << 20), &model, "zeroed");
    assert!(used(&daemon) <= before - (2 << 20) + 65536, "{before} bytes before, {} after", used(&daemon));
    file.sync_all().unwrap();
    drop(file);
    daemon.kill_worker();
    same(&fs::read(&disk).unwrap(), &model, "under the next worker");
    daemon.restart();
    same(&fs::read(&disk).unwrap(), &model, "after a restart");
    assert!(used(&daemon) <= before - (2 << 20) + 65536);
}

#[test]
fn a_missing_or_modified_base_fails_its_disks_until_it_is_back() {
    let mut daemon = TestDaemon::on_disk();
    let model = daemon.base(MIB as usize);
    let disk = daemon.create("d", true, MIB);
    let (at, away) = (daemon.path("b.img"), daemon.path("away.img"));
    // While the base is served, its file is open and its name is not needed.
    fs::rename(&at, &away).unwrap();
    same(&fs::read(&disk).unwrap(), &model, "removed while served");
    daemon.restart();
    assert_eq!(errno(File::open(&disk)), libc::EIO);
    let shown = daemon.json(&["disk", "show", "d"]);
    assert!(shown["error"].as_str().unwrap().contains(at.to_str().unwrap()), "{shown}");
    fs::rename(&away, &at).unwrap();
    same(&fs::read(&disk).unwrap(), &model, "back again");
    // After a write to the base while it is served, blocks that are not in memory are refused and never mixed.
    daemon.restart();
    let file = open(&disk);
    let bad = File::options().write(true).open(&at).unwrap();
    bad.write_all_at(&[0xBB; 4096], 512 << 10).unwrap();
    assert_eq!(errno(file.read_exact_at(&mut [0; 4096], 512 << 10)), libc::EIO);
    assert_eq!(errno(file.read_exact_at(&mut [0; 4096], 0)), libc::EIO);
    file.write_all_at(&[1; 4096], 0).unwrap();
    same(&read_at(&file, 0, 4096), &[1; 4096], "the disk's own blocks");
    assert!(daemon.log().contains("b.img"), "{}", daemon.log());
}
