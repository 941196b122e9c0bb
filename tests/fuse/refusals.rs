//! Refusals of invalid mount points, stores, bases and disks, and the start after a kill of the daemon.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use crate::harness::*;
use crate::server::{Object, Reply, Server};

/// The log of a daemon that must refuse to start with these arguments.
fn refused(daemon: &mut TestDaemon, args: &[&str]) -> String {
    daemon.try_start(args).expect_err(&format!("serve {args:?} has to be refused"))
}

#[test]
fn unfit_mount_points_are_refused() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let at = |daemon: &TestDaemon, name: &str| daemon.path(name).to_str().unwrap().to_owned();
    fs::create_dir(daemon.path("full")).unwrap();
    fs::write(daemon.path("full/file"), b"").unwrap();
    fs::create_dir(daemon.path("busy")).unwrap();
    let (full, file, busy) = (at(&daemon, "full"), at(&daemon, "full/file"), at(&daemon, "busy"));
    let inside = daemon.store().join("deltas").to_str().unwrap().to_owned();
    assert!(refused(&mut daemon, &["--mount", &full]).contains(&full));
    assert!(refused(&mut daemon, &["--mount", &file]).contains(&file));
    assert!(refused(&mut daemon, &["--mount", &inside]).contains("deltas"));
    run(Command::new("mount").args(["-t", "tmpfs", "none", &busy]));
    let why = daemon.try_start(&["--mount", &busy]);
    run(Command::new("umount").arg(&busy));
    if why.is_ok() {
        daemon.stop();
    }
    assert!(why.expect_err("a busy mount point has to be refused").contains(&busy));
    daemon.start();
}

/// Guards D1.
#[test]
fn a_second_daemon_on_a_store_is_refused() {
    let daemon = TestDaemon::on_disk();
    let second = daemon.path("second");
    let output = daemon.cli(&["serve", "--mount", second.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    daemon.ok(&["status"]);
    daemon.create("d", false, 4096);
    assert_eq!(fs::read(daemon.disk("d")).unwrap().len(), 4096);
}

#[test]
fn a_store_of_a_newer_version_is_refused_and_left_unchanged() {
    let mut daemon = TestDaemon::on_disk();
    daemon.stop();
    let path = daemon.store().join("plyfs.store");
    let mut bytes = fs::read(&path).unwrap();
    bytes[8] += 1;
    let end = bytes.len() - 4;
    let sum = crc32c::crc32c(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&sum);
    fs::write(&path, &bytes).unwrap();
    let why = refused(&mut daemon, &[]);
    assert!(why.contains("newer"), "{why}");
    assert_eq!(fs::read(&path).unwrap(), bytes);
}

#[test]
fn crash_of_the_daemon_loses_nothing_and_its_dead_mount_is_cleaned_up() {
    let mut daemon = TestDaemon::on_disk();
    let mut model = daemon.base(1 << 20);
    let disk = daemon.create("d", true, 1 << 20);
    {
        let file = open(&disk);
        let data = Random(9).bytes(300_000);
        file.write_all_at(&data, 1234).unwrap();
        model[1234..301_234].copy_from_slice(&data);
        fallocate(&file, PUNCH, 500_000, 100_000).unwrap();
        model[500_000..600_000].fill(0);
    }
    daemon.kill_everything();
    daemon.start();
    same(&fs::read(&disk).unwrap(), &model, "after the kill");
    daemon.restart();
    same(&fs::read(&disk).unwrap(), &model, "after a stop");
    let mounts = fs::read_to_string("/proc/mounts").unwrap();
    assert_eq!(mounts.matches(daemon.mount().to_str().unwrap()).count(), 1);
}

#[test]
fn invalid_sources_of_bases_are_refused() {
    let daemon = TestDaemon::on_disk();
    let at = |name: &str| daemon.path(name).to_str().unwrap().to_owned();
    fs::create_dir(at("dir")).unwrap();
    fs::write(at("empty"), b"").unwrap();
    run(Command::new("mkfifo").arg(at("fifo")));
    for name in ["missing", "dir", "empty", "fifo"] {
        let why = daemon.fails(&["base", "add", "b", &at(name)]);
        assert!(why.contains(&at(name)), "{name}: {why}");
    }
    assert_eq!(daemon.json(&["base", "ls"]).as_array().unwrap().len(), 0);
    daemon.base(8192);
    assert!(daemon.fails(&["base", "add", "b", &at("b.img")]).contains("exists"));
    let own = daemon.create("own", false, 4096);
    daemon.fails(&["base", "add", "own", own.to_str().unwrap()]);
}

#[test]
fn invalid_disks_are_refused() {
    let daemon = TestDaemon::on_disk();
    daemon.base(8192);
    let create = |args: &[&str]| daemon.fails(&[&["disk", "create"], args].concat());
    create(&["zero", "--size", "0"]);
    create(&["none"]);
    create(&["small", "--base", "b", "--size", "4096"]);
    create(&["huge", "--size", "9223372036854775808"]);
    create(&["orphan", "--base", "missing"]);
    assert_eq!(daemon.json(&["disk", "ls"]).as_array().unwrap().len(), 0);
    daemon.create("one", true, 8192);
    daemon.create("two", true, 8192);
    assert!(create(&["one", "--size", "1M"]).contains("one"));
    let why = daemon.fails(&["base", "rm", "b"]);
    assert!(why.contains("one") && why.contains("two"), "{why}");
    daemon.ok(&["disk", "rm", "one", "two"]);
    daemon.ok(&["base", "rm", "b"]);
}

#[test]
fn base_changed_fails_its_disks_and_no_others() {
    let mut daemon = TestDaemon::on_disk();
    daemon.base(1 << 20);
    let disk = daemon.create("d", true, 1 << 20);
    let other = daemon.create("other", false, 4096);
    fs::write(&other, b"fine").unwrap();
    daemon.stop();
    fs::write(daemon.path("b.img"), vec![1; 1 << 20]).unwrap();
    daemon.start();
    assert_eq!(errno(fs::File::open(&disk)), libc::EIO);
    let shown = daemon.json(&["disk", "show", "d"]);
    assert_eq!(shown["state"], "failed");
    let why = shown["error"].as_str().unwrap();
    assert!(why.contains(daemon.path("b.img").to_str().unwrap()), "{why}");
    assert_eq!(&fs::read(&other).unwrap()[..4], b"fine");
    assert!(Path::new(&disk).exists());
}

/// The first bytes of the image are looked at wherever they come from: here from the target of a redirect, under a name
/// that says nothing of the format.
#[test]
fn an_image_that_is_not_raw_is_refused_behind_a_redirect_with_the_remedy() {
    let daemon = TestDaemon::on_disk();
    for (name, offset, magic, remedy) in [
        ("qcow2", 0, b"QFI\xfb".as_slice(), "pass --format qcow2"),
        ("vmdk", 0, b"KDMV", "pass --format vmdk"),
        ("vmdk", 0, b"# Disk DescriptorFile", "pass --format vmdk"),
        ("vdi", 64, b"\x7f\x10\xda\xbe", "qemu-img convert -O qcow2"),
        ("vhdx", 0, b"vhdxfile", "qemu-img convert -O qcow2"),
        ("gzip", 0, b"\x1f\x8b\x08", "decompress it"),
        ("xz", 0, b"\xfd7zXZ\0", "decompress it"),
        ("zstd", 0, b"\x28\xb5\x2f\xfd", "decompress it"),
    ] {
        let mut object = Object::new(1 << 20);
        let mut bytes = object.bytes.to_vec();
        bytes[..128].fill(0);
        bytes[offset..offset + magic.len()].copy_from_slice(magic);
        object.bytes = Arc::new(bytes);
        let (target, server) = (Server::start(object.clone()), Server::start(object));
        let to = target.url("/object");
        server.on(move |_| Reply::redirect(to.clone()));
        let url = server.url("/latest");
        let text = daemon.fails(&["base", "add", "b", &url]);
        for part in ["base b", "begins as", name, remedy, "--format raw if the disk itself begins so"] {
            assert!(text.contains(part), "{name}: {part}: {text}");
        }
        assert_eq!(target.requests().len(), 1, "{name}: the redirect is followed");
        assert_eq!(daemon.json(&["base", "ls"]), serde_json::json!([]), "{name}");
        // The operator says that the disk itself begins so.
        daemon.ok(&["base", "add", "b", &url, "--format", "raw"]);
        daemon.ok(&["base", "rm", "b"]);
    }
}
