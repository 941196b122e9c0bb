//! Block devices of this host as bases, through the mount.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::devices::{LoopDevice, Volume};
use crate::harness::{Random, TestDaemon, errno, open, read_at, run, same, tool, until};

const MIB: usize = 1 << 20;

/// A loop device over a file with these bytes.
fn device(daemon: &TestDaemon, name: &str, bytes: &[u8]) -> (LoopDevice, PathBuf) {
    let file = daemon.path(name);
    fs::write(&file, bytes).unwrap();
    (LoopDevice::new(&file), file)
}

fn claim(device: &str) -> std::io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(device)
}

fn reads(path: &Path, at: u64, expected: &[u8], what: &str) {
    same(&read_at(&open(path), at, expected.len()), expected, what);
}

/// Guards D106.
#[test]
fn a_device_is_a_base_and_is_held_as_long_as_it_is_one() {
    let mut daemon = TestDaemon::on_disk();
    let bytes = Random(11).bytes(9 * MIB);
    let (device, _file) = device(&daemon, "golden", &bytes);
    let path = device.0.as_str();
    let why = daemon.fails(&["base", "add", "g", path]);
    assert!(why.contains(path) && why.contains("--format raw"), "{why}");
    assert!(claim(path).is_ok(), "a refused base holds nothing");
    daemon.ok(&["base", "add", "g", path, "--format", "raw"]);
    daemon.ok(&["disk", "create", "d", "--base", "g"]);
    reads(&daemon.disk("d"), 12_345, &bytes[12_345..MIB], "a read that is not aligned");
    open(&daemon.disk("d")).write_all_at(&[9; 4096], 8192).unwrap();
    assert_eq!(errno(claim(path)), libc::EBUSY);
    // One process needs one claim, however many bases there are.
    daemon.ok(&["base", "add", "again", path, "--format", "raw"]);
    daemon.ok(&["disk", "create", "e", "--base", "again"]);
    reads(&daemon.disk("e"), 5 * MIB as u64, &bytes[5 * MIB..], "another base, up to the end");
    // The next worker finds the device free, or waits until it is.
    daemon.kill_worker();
    reads(&daemon.disk("d"), 2 * MIB as u64, &bytes[2 * MIB..4 * MIB], "after the death of a worker");
    assert_eq!(errno(claim(path)), libc::EBUSY);
    daemon.ok(&["upgrade", "--program", env!("CARGO_BIN_EXE_plyfs")]);
    reads(&daemon.disk("d"), 4 * MIB as u64, &bytes[4 * MIB..6 * MIB], "after an upgrade");
    assert_eq!(errno(claim(path)), libc::EBUSY);
    daemon.restart();
    reads(&daemon.disk("d"), 0, &bytes[..8192], "after a restart");
    daemon.ok(&["disk", "rm", "d"]);
    daemon.ok(&["disk", "rm", "e"]);
    daemon.ok(&["base", "rm", "g"]);
    daemon.ok(&["base", "rm", "again"]);
    until("a removed base holds nothing", || claim(path).ok());
    assert!(fs::read(path).unwrap() == bytes, "a base is never written");
}

#[test]
fn a_device_that_something_else_holds_is_refused_by_what_holds_it() {
    let daemon = TestDaemon::on_disk();
    let volume = Volume::on_file(daemon.dir.path(), 32 << 20, &["mkfs.ext4", "-q"]);
    let mounted = run(Command::new("findmnt").args(["-no", "SOURCE", "--target"]).arg(volume.path("")));
    let why = daemon.fails(&["base", "add", "m", mounted.trim(), "--format", "raw"]);
    assert!(
        why.contains("it is mounted on ") && why.contains("/volume") && why.contains("unmount it"),
        "{why}"
    );
    let (device, _file) = device(&daemon, "golden", &[1; MIB]);
    let held = claim(&device.0).unwrap();
    let why = daemon.fails(&["base", "add", "h", &device.0, "--format", "raw"]);
    assert!(why.contains("another process holds it") && why.contains("fuser -v"), "{why}");
    drop(held);
    daemon.ok(&["base", "add", "h", &device.0, "--format", "raw"]);
}

#[test]
fn another_device_in_the_place_of_the_registered_one_is_not_read() {
    let mut daemon = TestDaemon::on_disk();
    let bytes = Random(12).bytes(4 * MIB);
    let (device, file) = device(&daemon, "golden", &bytes);
    daemon.ok(&["base", "add", "g", &device.0, "--format", "raw"]);
    daemon.ok(&["disk", "create", "d", "--base", "g"]);
    reads(&daemon.disk("d"), 0, &bytes[..4096], "the device");
    // It grows under the base.
    fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(5 << 20).unwrap();
    run(Command::new("losetup").args(["-c", &device.0]));
    let read = open(&daemon.disk("d")).read_at(&mut [0; 4096], 2 << 20);
    assert_eq!(errno(read), libc::EIO);
    let why = daemon.json(&["base", "show", "g"])["error"].to_string();
    assert!(why.contains("its size or modification time"), "{why}");
    daemon.stop();
    fs::OpenOptions::new().write(true).open(&file).unwrap().set_len(4 << 20).unwrap();
    // Another file of the same size at the same device.
    let other = daemon.path("other");
    fs::write(&other, vec![3; 4 * MIB]).unwrap();
    run(Command::new("losetup").args(["-d", &device.0]));
    run(Command::new("losetup").arg(&device.0).arg(&other));
    let found = daemon.cli(&["check"]);
    let said = String::from_utf8_lossy(&found.stdout).into_owned();
    assert!(!found.status.success() && said.contains("another device than the one registered"), "{said}");
    daemon.start();
    let why = daemon.json(&["base", "show", "g"])["error"].to_string();
    assert!(why.contains("another device") && why.contains("golden@0, but file:"), "{why}");
    daemon.stop();
    run(Command::new("losetup").args(["-d", &device.0]));
    run(Command::new("losetup").arg(&device.0).arg(&file));
    daemon.start();
    reads(&daemon.disk("d"), 0, &bytes, "the registered one is back");
}

#[test]
fn a_device_on_the_daemons_own_mount_is_refused() {
    let daemon = TestDaemon::on_disk();
    daemon.ok(&["disk", "create", "d", "--size", "4M"]);
    let device = LoopDevice::new(&daemon.disk("d"));
    let why = daemon.fails(&["base", "add", "b", &device.0, "--format", "raw"]);
    assert!(why.contains("own mount"), "{why}");
}

#[test]
fn with_base_dirs_only_devices_that_are_named_are_opened() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let (named, _file) = device(&daemon, "a", &[1; MIB]);
    let (other, _file) = device(&daemon, "b", &[2; MIB]);
    let link = daemon.path("link");
    std::os::unix::fs::symlink(&named.0, &link).unwrap();
    let config = daemon.path("c.toml");
    fs::write(&config, format!("[security]\nbase_dirs = [{link:?}]\n")).unwrap();
    run(daemon.command().args(["check-config", "--config"]).arg(&config));
    daemon.try_start(&["--config", config.to_str().unwrap()]).unwrap();
    let why = daemon.fails(&["base", "add", "b", &other.0, "--format", "raw"]);
    assert!(why.contains("outside the directories for bases"), "{why}");
    daemon.ok(&["base", "add", "a", link.to_str().unwrap(), "--format", "raw"]);
    // What identifies it is read under the same rules.
    run(Command::new("losetup").args(["-d", &other.0]));
    daemon.ok(&["disk", "create", "d", "--base", "a"]);
    reads(&daemon.disk("d"), 0, &[1; 4096], "the device");
    let held = claim(&named.0);
    assert_eq!(errno(held), libc::EBUSY);
}

#[test]
fn an_image_that_was_written_onto_a_device_is_a_base() {
    let Some(tool) = tool("qemu-img") else { return };
    let daemon = TestDaemon::on_disk();
    let bytes = Random(13).bytes(3 * MIB);
    fs::write(daemon.path("raw"), &bytes).unwrap();
    let (device, _file) = device(&daemon, "golden", &vec![0; 6 * MIB]);
    run(Command::new(tool)
        .args(["convert", "-n", "--target-is-zero", "-f", "raw", "-O", "qcow2"])
        .arg(daemon.path("raw"))
        .arg(qcow2(&device)));
    daemon.ok(&["base", "add", "q", &device.0, "--format", "qcow2"]);
    daemon.ok(&["disk", "create", "d", "--base", "q"]);
    reads(&daemon.disk("d"), 0, &bytes, "the image");
}

/// The device with an empty image on it.
fn qcow2(device: &LoopDevice) -> &str {
    run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &device.0, "3M"]));
    &device.0
}
