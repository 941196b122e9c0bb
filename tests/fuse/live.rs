//! The live maps: their place, their removal by other programs, their memory.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::harness::{PUNCH, Random, TestDaemon, ZERO, fallocate, open, read_at, same, until};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 8 * MIB;

fn moves(daemon: &TestDaemon) -> u64 {
    daemon.status()["live_maps"]["moves"].as_u64().unwrap()
}

/// Removes the directory of the live maps with all its files, as a clean-up job does.
fn remove_live_maps(daemon: &TestDaemon) {
    let dir = daemon.live_dir().unwrap();
    let _ = fs::remove_dir_all(&dir);
    assert_eq!(fs::read_dir(&dir).map_or(0, Iterator::count), 0, "{} is not empty", dir.display());
}

/// Guards D24.
#[test]
fn removing_the_directory_of_the_live_maps_loses_no_data() {
    let mut daemon = TestDaemon::on_disk();
    daemon.base(SIZE as usize);
    let path = daemon.create("a", true, SIZE);
    let mut random = Random(5);
    let (first, second, third) = (random.bytes(4096), random.bytes(4096), random.bytes(4096));
    let file = open(&path);
    file.write_all_at(&first, 0).unwrap();
    remove_live_maps(&daemon);
    file.write_all_at(&second, MIB).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(&third, 2 * MIB).unwrap();
    // At once, so before or after the supervisor has noticed.
    daemon.kill_worker();
    same(&read_at(&file, 0, 4096), &first, "written before the removal");
    same(&read_at(&file, MIB, 4096), &second, "flushed after it");
    same(&read_at(&file, 2 * MIB, 4096), &third, "written after it");
    // The maps get a new name, by which the next daemon finds them.
    until("live maps with a name", || daemon.arena().filter(|_| moves(&daemon) > 0));
    assert!(daemon.log().contains("of the live maps is gone"));
    assert!(daemon.status()["live_maps"]["problem"].is_null());
    file.write_all_at(&third, 3 * MIB).unwrap();
    drop(file);
    daemon.kill_everything();
    daemon.start();
    let file = open(&path);
    for (at, bytes) in [(0, &first), (MIB, &second), (2 * MIB, &third), (3 * MIB, &third)] {
        same(&read_at(&file, at, 4096), bytes, "after a kill of everything");
    }
    drop(file);
    daemon.stop();
    assert_eq!(daemon.live_maps(), Vec::<PathBuf>::new());
    daemon.start();
    same(&read_at(&open(&path), 2 * MIB, 4096), &third, "after a stop");
    daemon.stop();
}

#[test]
fn removing_the_live_maps_repeatedly_under_load_loses_no_data() {
    let daemon = TestDaemon::on_disk();
    daemon.base(SIZE as usize);
    let file = open(&daemon.create("a", true, SIZE));
    let mut expected = read_at(&file, 0, SIZE as usize);
    let mut random = Random(6);
    for round in 1..=3 {
        remove_live_maps(&daemon);
        until("a move", || {
            let at = random.below(SIZE / 4096) * 4096;
            let bytes = random.bytes(4096);
            file.write_all_at(&bytes, at).unwrap();
            expected[at as usize..at as usize + 4096].copy_from_slice(&bytes);
            (moves(&daemon) >= round).then_some(())
        });
    }
    daemon.kill_worker();
    same(&read_at(&file, 0, SIZE as usize), &expected, "after three removals");
}

/// Any user can create the directory that versions without an arena used, and fill the memory behind it.
#[test]
fn a_squatted_shared_memory_directory_keeps_no_daemon_from_starting() {
    let mut daemon = TestDaemon::on_disk();
    let path = daemon.create("a", false, SIZE);
    daemon.stop();
    let squatted = daemon.former_live_dir();
    let nobody = Command::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "mkdir"])
        .arg(&squatted)
        .status();
    assert!(nobody.unwrap().success());
    assert_eq!(fs::metadata(&squatted).unwrap().uid(), 65534);
    daemon.start();
    open(&path).write_all_at(b"written", 0).unwrap();
    daemon.kill_everything();
    daemon.start();
    same(&read_at(&open(&path), 0, 7), b"written", "after a kill");
    // The arena has a tmpfs of its own, so files of others in /dev/shm do not affect it.
    let arena = fs::metadata(daemon.arena().unwrap()).unwrap();
    assert_ne!(arena.dev(), fs::metadata("/dev/shm").unwrap().dev());
    assert_eq!(arena.mode() & 0o7777, 0o600);
    assert_eq!(fs::metadata(daemon.live_dir().unwrap()).unwrap().mode() & 0o7777, 0o700);
    let mount = daemon.live_dir().unwrap();
    daemon.stop();
    assert!(!mount.exists(), "the place of the live maps outlives a clean stop");
    assert!(squatted.exists(), "the directory of another user stays");
}

/// In the directory that the operator names, the daemon avoids a name that another user has taken.
#[test]
fn a_squatted_runtime_directory_keeps_no_daemon_from_starting() {
    let mut daemon = TestDaemon::on_disk();
    let path = daemon.create("a", false, SIZE);
    daemon.stop();
    let runtime = tempfile::Builder::new().prefix("plyfs-test-").tempdir_in("/dev/shm").unwrap();
    let name = daemon.former_live_dir().file_name().unwrap().to_owned();
    let squatted = runtime.path().join(name);
    fs::create_dir(&squatted).unwrap();
    std::os::unix::fs::chown(&squatted, Some(65534), None).unwrap();
    let config = daemon.path("plyfs.toml");
    fs::write(&config, format!("runtime.dir = {:?}\n", runtime.path())).unwrap();
    let config = ["--config", config.to_str().unwrap()];
    daemon.try_start(&config).unwrap();
    let arena = daemon.arena().unwrap();
    assert!(arena.starts_with(runtime.path()) && !arena.starts_with(&squatted), "{}", arena.display());
    open(&path).write_all_at(b"written", 0).unwrap();
    daemon.kill_everything();
    daemon.try_start(&config).unwrap();
    assert_eq!(daemon.arena().unwrap(), arena);
    same(&read_at(&open(&path), 0, 7), b"written", "after a kill");
    daemon.stop();
    assert!(!arena.exists());
}

#[test]
fn live_maps_of_many_disks_cost_one_descriptor() {
    let daemon = TestDaemon::on_disk();
    let names: Vec<String> = (0..60).map(|n| format!("d{n}")).collect();
    let mut args = vec!["disk", "create", "--size", "1M"];
    args.extend(names.iter().map(String::as_str));
    daemon.ok(&args);
    let open: Vec<File> = names.iter().map(|name| open(&daemon.disk(name))).collect();
    open.iter().for_each(|file| file.write_all_at(b"x", 0).unwrap());
    let held = fs::read_dir(format!("/proc/{}/fd", daemon.worker())).unwrap();
    let held: Vec<PathBuf> = held.filter_map(|fd| fs::read_link(fd.unwrap().path()).ok()).collect();
    let is_map =
        |path: &&PathBuf| path.to_str().is_some_and(|path| path.contains(".arena") || path.contains(".live"));
    assert_eq!(held.iter().filter(is_map).count(), 1, "{held:?}");
}

/// Leaves live maps as a killed version without an arena does: a file for each disk.
fn as_former_version(daemon: &TestDaemon) {
    let arena = daemon.arena().unwrap();
    let file = File::open(&arena).unwrap();
    let dir = daemon.former_live_dir();
    fs::create_dir(&dir).unwrap();
    let own = Command::new("chmod").arg("0700").arg(&dir).status().unwrap();
    assert!(own.success());
    let mut directory = vec![0; 4096];
    file.read_exact_at(&mut directory, 4096).unwrap();
    for (slot, entry) in (0u64..).zip(directory.chunks(8)) {
        let entry = u64::from_ne_bytes(entry.try_into().unwrap());
        if entry & 3 != 2 {
            continue;
        }
        let mut map = vec![0; 80 * 4096];
        let got = file.read_at(&mut map, (slot + 1) << 33).unwrap();
        map.truncate(got);
        fs::write(dir.join(format!("{}.live", entry >> 2)), map).unwrap();
    }
    let _ = Command::new("umount").arg("-l").arg(arena.parent().unwrap()).status();
    fs::remove_file(daemon.store().join("live")).unwrap();
}

#[test]
fn live_maps_of_a_version_without_an_arena_are_taken_over() {
    let mut daemon = TestDaemon::on_disk();
    daemon.base(SIZE as usize);
    let paths = ["a", "b", "c"].map(|name| daemon.create(name, true, SIZE));
    let bytes = Random(8).bytes(3 * 4096);
    for (path, bytes) in paths.iter().zip(bytes.chunks(4096)) {
        open(path).write_all_at(bytes, MIB).unwrap();
    }
    daemon.kill_everything();
    as_former_version(&daemon);
    // One file was truncated. Only that disk is not served, because it may have unflushed data.
    let cut = fs::read_dir(daemon.former_live_dir()).unwrap().map(|e| e.unwrap().path()).max().unwrap();
    let whole = fs::metadata(&cut).unwrap().len();
    OpenOptions::new().write(true).open(&cut).unwrap().set_len(64 * 4096).unwrap();
    assert!(whole > 64 * 4096);
    daemon.start();
    assert!(!daemon.former_live_dir().exists());
    for (path, bytes) in paths.iter().zip(bytes.chunks(4096)).take(2) {
        same(&read_at(&open(path), MIB, 4096), bytes, "not flushed by the former version");
    }
    assert!(File::open(&paths[2]).is_err());
    daemon.kill_everything();
    daemon.start();
    same(&read_at(&open(&paths[0]), MIB, 4096), &bytes[..4096], "after another kill");
}

/// The next start reports live maps that are gone.
#[test]
fn a_start_without_the_live_maps_of_the_last_daemon_reports_the_loss() {
    let mut daemon = TestDaemon::on_disk();
    let path = daemon.create("a", false, SIZE);
    open(&path).write_all_at(b"written", 0).unwrap();
    daemon.kill_everything();
    fs::remove_file(daemon.arena().unwrap()).unwrap();
    daemon.start();
    assert!(daemon.log().contains("live maps of the last daemon are gone"), "{}", daemon.log());
    assert!(daemon.status()["live_maps"]["problem"].as_str().unwrap().contains("lost"));
    assert!(daemon.ok(&["status"]).contains("live maps problem"));
    daemon.restart();
    assert!(daemon.status()["live_maps"]["problem"].is_null());
    // A copy of a store in use does not own the live maps.
    open(&path).write_all_at(b"written", 0).unwrap();
    let mut copy = TestDaemon::unstarted("/var/tmp");
    let mut copied = Command::new("cp");
    copied.args(["-a", "-x"]).arg(daemon.store()).arg(copy.dir.path()).stderr(Stdio::null());
    let _ = copied.status();
    let _ = fs::remove_dir_all(copy.store().join("mnt"));
    fs::write(copy.store().join("lock"), "").unwrap();
    copy.start();
    assert!(!copy.log().contains("are gone"), "{}", copy.log());
    same(&read_at(&open(&path), 0, 7), b"written", "the original store");
}

#[test]
fn only_the_guest_that_fills_the_memory_for_maps_is_refused() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let config = daemon.path("plyfs.toml");
    fs::write(&config, "runtime.map_memory = '4M'\nruntime.map_memory_per_disk = '1M'\n").unwrap();
    daemon.try_start(&["--config", config.to_str().unwrap()]).unwrap();
    fs::write(daemon.path("b.img"), vec![7; SIZE as usize]).unwrap();
    File::options().write(true).open(daemon.path("b.img")).unwrap().set_len(1 << 40).unwrap();
    daemon.ok(&["base", "add", "b", daemon.path("b.img").to_str().unwrap()]);
    let greedy = open(&daemon.create("greedy", true, 1 << 40));
    let quiet = open(&daemon.create("quiet", true, 1 << 40));
    // A write every 64 MiB: each is a page of the map.
    let at = |n: u64| n * 64 * MIB;
    let written = (0..).take_while(|n| match greedy.write_all_at(&[1; 4096], at(*n)) {
        Ok(()) => true,
        Err(error) => {
            assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
            false
        }
    });
    let written = written.count() as u64;
    assert!((200..=256).contains(&written), "{written} pages");
    assert_eq!(greedy.write_at(&[1; 4096], at(written)).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    // Writes to existing map pages still work, and so do discards anywhere.
    greedy.write_all_at(&[2; 4096], at(1) + 4096).unwrap();
    fallocate(&greedy, PUNCH, at(2), 4096).unwrap();
    for n in 0..50 {
        fallocate(&greedy, if n % 2 == 0 { PUNCH } else { ZERO }, at(written + 100 + n), 4096).unwrap();
    }
    greedy.sync_all().unwrap();
    same(&read_at(&greedy, at(2), 4096), &[0; 4096], "discarded");
    // The other disk works as before.
    (0..50).for_each(|n| quiet.write_all_at(&[3; 4096], at(n)).unwrap());
    quiet.sync_all().unwrap();
    let maps = &daemon.status()["live_maps"];
    assert_eq!((&maps["limit_bytes"], &maps["disk_limit_bytes"]), (&(4 * MIB).into(), &MIB.into()));
    assert!(maps["bytes"].as_u64().unwrap() > MIB, "{maps}");
    let of = |name: &str| daemon.json(&["disk", "show", name])["map_bytes"].as_u64().unwrap();
    assert!(of("greedy") >= MIB && of("greedy") < 2 * MIB && of("quiet") > 50 * 4096, "{}", of("greedy"));
    assert_eq!(daemon.status()["worker_starts"], 1);
    // The same under the next worker.
    daemon.kill_worker();
    assert_eq!(greedy.write_at(&[1; 4096], at(written)).unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    same(&read_at(&greedy, at(1) + 4096, 4096), &[2; 4096], "written at the bound");
    drop((greedy, quiet));
    daemon.stop();
    assert!(Path::new(&daemon.store()).exists());
}

/// Anonymous memory of a process in bytes.
fn anonymous_memory(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() << 10
}

/// The map has 66 MiB. The memory of a flush does not grow with it.
#[test]
fn a_flush_of_a_disk_with_a_large_map_takes_little_memory() {
    let mut daemon = TestDaemon::on_disk();
    fs::write(daemon.path("b.img"), b"x").unwrap();
    File::options().write(true).open(daemon.path("b.img")).unwrap().set_len(1 << 40).unwrap();
    daemon.ok(&["base", "add", "b", daemon.path("b.img").to_str().unwrap()]);
    let disk = daemon.create("d", true, 1 << 40);
    let file = open(&disk);
    fallocate(&file, ZERO, 0, 1 << 40).unwrap();
    let worker = daemon.worker();
    let before = anonymous_memory(worker);
    let (done, highest) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                highest.fetch_max(anonymous_memory(worker), Ordering::Relaxed);
            }
        });
        for round in 0..3 {
            // The first flush writes the whole map, the later ones append.
            file.write_all_at(&[1; 4096], round * 4096).unwrap();
            file.sync_all().unwrap();
            fallocate(&file, ZERO, 0, 1 << 40).unwrap();
        }
        file.sync_all().unwrap();
        done.store(true, Ordering::Relaxed);
    });
    let grown = highest.load(Ordering::Relaxed).saturating_sub(before);
    assert!(grown < 48 << 20, "the worker grew by {} MiB", grown >> 20);
    assert!(daemon.json(&["disk", "show", "d"])["map_bytes"].as_u64().unwrap() > 60 * MIB);
    drop(file);
    daemon.kill_everything();
    daemon.start();
    same(&read_at(&open(&disk), 0, 4096), &[0; 4096], "after a kill");
    daemon.restart();
    same(&read_at(&open(&disk), (1 << 40) - 4096, 4096), &[0; 4096], "after a stop");
}
