//! The files of bases for stat(2) and utimes(2), as Nova uses them.

use std::fs::{self, File, FileTimes};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::harness::{TestDaemon, errno, read_at, run, same, until};
use crate::server::{Object, Server};

const MIB: usize = 1 << 20;

fn file_of(daemon: &TestDaemon, base: &str) -> PathBuf {
    daemon.mount().join(format!("bases/{base}.raw"))
}

fn modified(path: &Path) -> SystemTime {
    fs::metadata(path).unwrap().modified().unwrap()
}

fn set(path: &Path, at: SystemTime) -> std::io::Result<()> {
    File::open(path)?.set_times(FileTimes::new().set_modified(at).set_accessed(at))
}

fn stored(path: &Path) -> u64 {
    fs::metadata(path).unwrap().blocks() * 512
}

/// Regression: EROFS, with which Nova gave up the boot of an instance.
#[test]
fn a_time_of_a_base_can_be_set_and_outlives_the_worker_and_the_daemon() {
    let mut daemon = TestDaemon::on_disk();
    daemon.base(MIB);
    let file = file_of(&daemon, "b");
    let image = modified(&daemon.path("b.img"));
    assert_eq!(modified(&file), image, "until a client sets it, it is that of the image");
    // As touch(1) and os.utime(path, None) do it: now.
    let before = SystemTime::now() - Duration::from_secs(1);
    run(Command::new("touch").arg("-c").arg(&file));
    assert!(modified(&file) >= before);
    assert!(
        fs::metadata(&file).unwrap().ctime() >= before.duration_since(UNIX_EPOCH).unwrap().as_secs() as i64
    );
    let at = UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789);
    set(&file, at).unwrap();
    assert_eq!(modified(&file), at);
    // The access time is not kept, and setting it is no error.
    run(Command::new("touch").args(["-c", "-a"]).arg(&file));
    assert_eq!(modified(&file), at);
    daemon.kill_worker();
    assert_eq!(modified(&file), at, "after the death of a worker");
    daemon.kill_everything();
    daemon.start();
    assert_eq!(modified(&file), at, "after a kill");
    daemon.restart();
    assert_eq!(modified(&file), at, "after a restart");
    // A setting is a use: never in the future, and never less than before.
    let used = || {
        let shown = daemon.json(&["base", "show", "b"])["last_used"].as_str().unwrap().to_owned();
        humantime::parse_rfc3339(&shown).unwrap()
    };
    let earlier = used();
    set(&file, SystemTime::now() + Duration::from_secs(3600)).unwrap();
    let later = used();
    assert!(later > earlier && later <= SystemTime::now(), "{earlier:?} {later:?}");
    set(&file, at).unwrap();
    assert_eq!((used(), modified(&file)), (later, at));
}

#[test]
fn nothing_else_of_a_base_can_be_set_and_no_time_by_another_user() {
    const NOBODY: u32 = 65534;
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    fs::set_permissions(daemon.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(daemon.path("plyfs.toml"), "[mount]\nbase_mode = \"0444\"\n").unwrap();
    daemon.try_start(&["--config", daemon.path("plyfs.toml").to_str().unwrap()]).unwrap();
    daemon.base(MIB);
    let file = file_of(&daemon, "b");
    let at = UNIX_EPOCH + Duration::from_secs(1_600_000_000);
    set(&file, at).unwrap();
    let read = Command::new("cat").arg(&file).uid(NOBODY).gid(NOBODY).output().unwrap();
    assert!(read.status.success() && read.stdout.len() == MIB, "it may read the file");
    for times in [vec!["-c"], vec!["-c", "-d", "2020-01-01"]] {
        let done =
            Command::new("touch").args(&times).arg(&file).env("LC_ALL", "C").uid(NOBODY).gid(NOBODY).output();
        let text = String::from_utf8(done.unwrap().stderr).unwrap();
        let refused = text.contains("Permission denied") || text.contains("Operation not permitted");
        assert!(refused, "{times:?}: {text}");
    }
    assert_eq!(errno(fs::set_permissions(&file, fs::Permissions::from_mode(0o600))), libc::EROFS);
    assert_eq!(errno(chown(&file, Some(NOBODY), Some(NOBODY))), libc::EROFS);
    let truncated = Command::new("truncate").args(["-c", "-s", "0"]).arg(&file).env("LC_ALL", "C").output();
    let text = String::from_utf8(truncated.unwrap().stderr).unwrap();
    assert!(text.contains("Read-only file system"), "{text}");
    let found = fs::metadata(&file).unwrap();
    assert_eq!((found.mode() & 0o777, found.uid(), found.len()), (0o444, 0, MIB as u64));
    assert_eq!(modified(&file), at);
    // A snapshot keeps its time.
    let disk = daemon.create("d", true, MIB as u64);
    daemon.ok(&["disk", "snapshot", "d", "s"]);
    let snapshot = daemon.mount().join("snapshots/d@s.raw");
    assert_eq!(errno(set(&snapshot, at)), libc::EROFS);
    set(&disk, at).unwrap();
}

/// Nova counts the blocks of its cache of images as used space of the host.
#[test]
fn the_blocks_of_a_base_are_those_that_the_host_has() {
    let object = Object::new(8 * MIB);
    let (daemon, server) = (TestDaemon::on_disk(), Server::start(object.clone()));
    daemon.ok(&["base", "add", "r", &server.url("/r")]);
    let file = file_of(&daemon, "r");
    assert_eq!(fs::metadata(&file).unwrap().len(), 8 * MIB as u64);
    let first = stored(&file);
    assert!(first > 0 && first <= MIB as u64, "the first bytes are kept, and not all: {first}");
    read_at(&open_read(&file), 4 * MIB as u64, 100_000);
    // What was fetched is kept in the background.
    let more = until("what was read is kept", || Some(stored(&file)).filter(|now| *now >= first + 100_000));
    assert!(more < 8 * MIB as u64, "{first} {more}");
    let cached = || daemon.json(&["base", "show", "r"])["cached_bytes"].as_u64().unwrap();
    until("readahead has ended", || (stored(&file) == cached()).then_some(()));
    // A file of many bytes without blocks would be taken for one hole, by tar for one.
    daemon.ok(&["base", "evict", "r"]);
    assert_eq!((cached(), stored(&file)), (0, 4096));
    // cp of a base that is hardly here makes a disk that shares it, and fetches nothing.
    let disk = daemon.disk("shared");
    run(Command::new("cp").arg(&file).arg(&disk));
    assert!(cached() < MIB as u64 && stored(&disk) < MIB as u64, "{} {}", cached(), stored(&disk));
    same(&fs::read(&disk).unwrap(), &object.bytes, "the disk");
    daemon.ok(&["disk", "rm", "shared"]);
    daemon.ok(&["base", "evict", "r"]);
    let copy = daemon.path("copy.raw");
    run(Command::new("cp").arg(&file).arg(&copy));
    same(&fs::read(&copy).unwrap(), &object.bytes, "a copy of what was not here");
    daemon.ok(&["base", "evict", "r"]);
    let archive = daemon.path("archive.tar");
    run(Command::new("tar").arg("-cSf").arg(&archive).arg("-C").arg(file.parent().unwrap()).arg("r.raw"));
    run(Command::new("tar").arg("-xSf").arg(&archive).arg("-C").arg(daemon.dir.path()));
    same(&fs::read(daemon.path("r.raw")).unwrap(), &object.bytes, "an archive of what was not here");
    daemon.ok(&["base", "hydrate", "r"]);
    assert_eq!(stored(&file), 8 * MIB as u64);

    // Of a file of this host: its own blocks, once it was opened.
    let image = daemon.path("sparse.img");
    File::create(&image).unwrap().set_len(64 * MIB as u64).unwrap();
    let written = File::options().write(true).open(&image).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&written, &[1; 8192], 0).unwrap();
    written.sync_all().unwrap();
    daemon.ok(&["base", "add", "s", image.to_str().unwrap()]);
    let file = file_of(&daemon, "s");
    read_at(&open_read(&file), 0, 4096);
    assert_eq!(stored(&file), fs::metadata(&image).unwrap().blocks() * 512);
    let disk = daemon.disk("of-sparse");
    run(Command::new("cp").arg(&file).arg(&disk));
    let shown = daemon.json(&["disk", "show", "of-sparse"]);
    assert_eq!((shown["base"].as_str(), stored(&disk) < MIB as u64), (Some("s"), true), "{shown}");
}

fn open_read(path: &Path) -> File {
    File::open(path).unwrap()
}
