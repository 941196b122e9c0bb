//! The directory of disks: which operations it allows, and to which users.

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;

use crate::harness::*;

fn c(path: &Path) -> CString {
    CString::new(path.to_str().unwrap()).unwrap()
}

fn check(result: i32) -> std::io::Result<()> {
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[test]
fn create_rename_and_unlink_work_as_on_any_filesystem() {
    let mut daemon = TestDaemon::on_disk();
    let new = daemon.disk("new");
    fs::write(&new, b"hello").unwrap();
    let shown = daemon.json(&["disk", "show", "new"]);
    assert_eq!((&shown["size"], &shown["base"]), (&5.into(), &serde_json::Value::Null));
    assert_eq!(errno(OpenOptions::new().write(true).create_new(true).open(&new)), libc::EEXIST);
    let old = daemon.create("old", false, 4096);
    // SAFETY: both strings end with a zero.
    let refused = check(unsafe {
        libc::renameat2(
            libc::AT_FDCWD,
            c(&new).as_ptr(),
            libc::AT_FDCWD,
            c(&old).as_ptr(),
            libc::RENAME_NOREPLACE,
        )
    });
    assert_eq!(errno(refused), libc::EEXIST);
    fs::rename(&new, &old).unwrap();
    assert_eq!(fs::read(&old).unwrap(), b"hello");
    assert!(!new.exists());
    assert_eq!(daemon.json(&["disk", "ls"]).as_array().unwrap().len(), 1);
    daemon.restart();
    assert_eq!(fs::read(&old).unwrap(), b"hello");
    fs::remove_file(&old).unwrap();
    assert_eq!(errno(fs::remove_file(&old)), libc::ENOENT);
    assert_eq!(fs::read_dir(daemon.disks()).unwrap().count(), 0);
}

#[test]
fn an_unlinked_open_disk_lives_until_its_last_close() {
    let daemon = TestDaemon::on_disk();
    let path = daemon.create("d", false, 64 << 20);
    let file = open(&path);
    let data = Random(5).bytes(32 << 20);
    file.write_all_at(&data, 0).unwrap();
    file.sync_all().unwrap();
    fs::remove_file(&path).unwrap();
    assert!(!path.exists());
    file.write_all_at(&[1; 100], 40 << 20).unwrap();
    same(&read_at(&file, 0, 32 << 20), &data, "unlinked");
    daemon.kill_worker();
    same(&read_at(&file, 0, 32 << 20), &data, "unlinked, after a kill");
    assert_eq!(read_at(&file, 40 << 20, 100), [1; 100]);
    let used = || -> u64 {
        let deltas = fs::read_dir(daemon.store().join("deltas")).unwrap();
        deltas.filter_map(|e| e.ok()?.metadata().ok()).map(|m| m.blocks() * 512).sum()
    };
    assert!(used() >= 32 << 20, "{} bytes used", used());
    drop(file);
    let until = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while used() > 0 && std::time::Instant::now() < until {
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert_eq!(used(), 0);
}

#[test]
fn directories_links_fifos_and_invalid_names_are_refused() {
    let daemon = TestDaemon::on_disk();
    let path = daemon.create("d", false, 4096);
    let other = daemon.disk("other");
    assert_eq!(errno(fs::create_dir(&other)), libc::EPERM);
    assert_eq!(errno(fs::hard_link(&path, &other)), libc::EPERM);
    assert_eq!(errno(std::os::unix::fs::symlink(&path, &other)), libc::EPERM);
    // SAFETY: the string ends with a zero.
    assert_eq!(errno(check(unsafe { libc::mkfifo(c(&other).as_ptr(), 0o600) })), libc::EPERM);
    for name in ["noraw", ".raw", ".hidden.raw", "a b.raw", "-x.raw", "é.raw"] {
        assert_eq!(errno(fs::write(daemon.disks().join(name), b"")), libc::EINVAL, "{name}");
        assert_eq!(errno(fs::rename(&path, daemon.disks().join(name))), libc::EINVAL, "{name}");
    }
    assert!(fs::write(daemon.disks().join(format!("{}.raw", "x".repeat(128))), b"").is_ok());
    assert!(fs::write(daemon.disks().join(format!("{}.raw", "x".repeat(129))), b"").is_err());
}

#[test]
fn hundreds_of_disks_are_listed_and_removed_while_the_directory_is_read() {
    let daemon = TestDaemon::on_disk();
    let names: Vec<String> = (0..300).map(|i| format!("disk-{i:03}")).collect();
    let mut args = vec!["disk", "create", "--size", "1M"];
    args.extend(names.iter().map(String::as_str));
    daemon.ok(&args);
    let mut found: Vec<_> = fs::read_dir(daemon.disks())
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    assert_eq!(found, names.iter().map(|n| format!("{n}.raw")).collect::<Vec<_>>());
    let mut removed = 0;
    for entry in fs::read_dir(daemon.disks()).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
        removed += 1;
    }
    assert_eq!(removed, 300);
    assert_eq!(daemon.json(&["disk", "ls"]).as_array().unwrap().len(), 0);
}

fn read_as_nobody(path: &Path) -> bool {
    let mut command = Command::new("setpriv");
    command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "head", "-c", "1"]).arg(path);
    command.output().unwrap().status.success()
}

#[test]
fn mode_owner_and_times_persist_and_the_mode_is_enforced() {
    let mut daemon = TestDaemon::on_disk();
    fs::set_permissions(daemon.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = daemon.create("d", false, 4096);
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
    assert!(!read_as_nobody(&path));
    std::os::unix::fs::chown(&path, Some(65534), Some(65534)).unwrap();
    assert!(read_as_nobody(&path));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_000_000_000, 123_456_789);
    open(&path).set_modified(time).unwrap();
    for round in ["at once", "after a restart"] {
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.mode(), meta.uid(), meta.gid()), (0o100_640, 65534, 65534), "{round}");
        assert_eq!(meta.modified().unwrap(), time, "{round}");
        assert_eq!(meta.nlink(), 1);
        if round == "at once" {
            daemon.restart();
        }
    }
    let base = daemon.base(4096);
    assert!(!read_as_nobody(&daemon.mount().join("bases/b.raw")));
    same(&fs::read(daemon.mount().join("bases/b.raw")).unwrap(), &base, "base");
    // SAFETY: plain data, filled by the call; the string ends with a zero.
    let (result, stat) = unsafe {
        let mut stat: libc::statvfs = std::mem::zeroed();
        (libc::statvfs(c(&path).as_ptr(), &mut stat), stat)
    };
    assert_eq!(result, 0);
    assert!(stat.f_blocks > 0 && stat.f_bavail > 0 && stat.f_bavail <= stat.f_blocks);
}
