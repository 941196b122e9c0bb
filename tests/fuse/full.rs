//! A store on a full filesystem, and a full tmpfs of live maps.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::devices::Volume;
use crate::harness::*;

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
const DISK: u64 = 64 * MIB;
const BLOCKS: u64 = DISK / BLOCK as u64;
const WRITERS: u64 = 4;

const EXT4: &[&str] = &["mkfs.ext4", "-q", "-F"];
const EXT4_SMALL_BLOCKS: &[&str] = &["mkfs.ext4", "-q", "-F", "-b", "1024", "-O", "^has_journal"];
const XFS: &[&str] = &["mkfs.xfs", "-q", "-f"];

/// The allowed contents of each block: tags of writes, or the block of the base.
struct Model {
    base: Vec<u8>,
    /// For each block: the last acknowledged write, then the writes that failed since.
    may_be: Vec<Vec<u64>>,
}

/// `BASE` is the base's block, `ZERO` zeros, any other a tag that fills the block.
const BASE: u64 = u64::MAX;
const ZERO: u64 = 0;

impl Model {
    fn new(base: Vec<u8>) -> Self {
        Self { base, may_be: vec![vec![BASE]; BLOCKS as usize] }
    }

    fn wrote(&mut self, block: u64, tag: u64, acknowledged: bool) {
        let may_be = &mut self.may_be[block as usize];
        if acknowledged {
            may_be.clear();
        }
        may_be.push(tag);
    }

    fn contents(&self, block: usize, tag: u64) -> Vec<u8> {
        match tag {
            BASE => self.base[block * BLOCK..(block + 1) * BLOCK].to_vec(),
            tag => tag.to_le_bytes().repeat(BLOCK / 8),
        }
    }

    /// Asserts that each block has one of its allowed contents, which becomes the only allowed one.
    #[track_caller]
    fn verify(&mut self, disk: &Path, what: &str) {
        let found = fs::read(disk).unwrap();
        assert_eq!(found.len() as u64, DISK, "{what}: length");
        for block in 0..BLOCKS as usize {
            let is = &found[block * BLOCK..(block + 1) * BLOCK];
            let known = self.may_be[block].iter().copied().find(|tag| is == self.contents(block, *tag));
            let tag = known.unwrap_or_else(|| {
                panic!(
                    "{what}: block {block} begins with {:x?} and is none of {:x?}",
                    &is[..16],
                    self.may_be[block]
                )
            });
            self.may_be[block] = vec![tag];
        }
    }
}

/// Writes at random places from several threads until each got `refusals` errors. Returns the distinct errors.
fn write_until_refused(file: &File, model: &mut Model, refusals: u64, seed: u64) -> BTreeSet<i32> {
    let refused_total = AtomicU64::new(0);
    let per_writer = BLOCKS / WRITERS;
    let results: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let refused_total = &refused_total;
                scope.spawn(move || {
                    let mut random = Random(seed + writer + 1);
                    let (mut log, mut errors, mut refused) = (Vec::new(), BTreeSet::new(), 0);
                    let until = Instant::now() + Duration::from_secs(60);
                    while refused < refusals {
                        assert!(Instant::now() < until, "no lack of space within 60 s");
                        let count = [1, 1, 1, 2, 16, 64][random.below(6) as usize];
                        let first = writer * per_writer + random.below(per_writer - count);
                        let tag = random.next() | 1;
                        let bytes = tag.to_le_bytes().repeat(count as usize * BLOCK / 8);
                        let result = file.write_all_at(&bytes, first * BLOCK as u64);
                        if let Err(error) = &result {
                            errors.insert(error.raw_os_error().unwrap());
                            refused += 1;
                            refused_total.fetch_add(1, Ordering::Relaxed);
                        }
                        log.push((first, count, tag, result.is_ok()));
                    }
                    (log, errors)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let mut errors = BTreeSet::new();
    for (log, seen) in results {
        errors.extend(seen);
        for (first, count, tag, ok) in log {
            (first..first + count).for_each(|block| model.wrote(block, tag, ok));
        }
    }
    errors
}

fn check_is_clean(daemon: &TestDaemon) {
    let output = daemon.cli(&["check"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

fn store_disk_full(size: u64, make: &[&str]) {
    if tool(make[0]).is_none() {
        return;
    }
    let dir = tempfile::Builder::new().prefix("plyfs-test-").tempdir_in("/var/tmp").unwrap();
    let volume = Volume::on_file(dir.path(), size, make);
    let mut daemon = TestDaemon::with_store_at(volume.path("store"));
    daemon.start();
    let mut model = Model::new(daemon.base(DISK as usize));
    let disk = daemon.create("d", true, DISK);
    let other = daemon.create("other", false, DISK);
    let gone = daemon.create("gone", false, DISK);
    fs::write(&other, Random(3).bytes(100_000)).unwrap();
    {
        let file = open(&gone);
        file.write_all_at(&Random(4).bytes(12 << 20), 0).unwrap();
        file.sync_all().unwrap();
    }
    let before = daemon.json(&["status"]);
    assert_eq!(before["space"]["full"], false, "{before}");
    assert_eq!(before["space"]["reserve_held_bytes"], before["space"]["reserve_bytes"], "{before}");
    assert!(before["space"]["reserve_bytes"].as_u64().unwrap() >= MIB, "{before}");

    // The writes and another program fill the filesystem during the writes.
    volume.fill_but(24 * MIB);
    let file = open(&disk);
    std::thread::scope(|scope| {
        let fill = || {
            let until = Instant::now() + Duration::from_secs(60);
            while fs::metadata(&disk).unwrap().blocks() * 512 < 8 * MIB && Instant::now() < until {
                std::thread::yield_now();
            }
            volume.fill();
        };
        scope.spawn(fill);
        let errors = write_until_refused(&file, &mut model, 30, 1);
        assert_eq!(errors, BTreeSet::from([libc::ENOSPC]));
    });
    volume.fill();
    model.verify(&disk, "full");

    // Operations that need no space for data still work.
    file.sync_all().unwrap();
    let errors = write_until_refused(&file, &mut model, 30, 2);
    assert_eq!(errors, BTreeSet::from([libc::ENOSPC]));
    file.sync_data().unwrap();
    let full = daemon.json(&["status"]);
    assert_eq!(full["space"]["full"], true, "{full}");
    model.verify(&disk, "full, flushed");
    let written = (0..BLOCKS).find(|b| model.may_be[*b as usize] != [BASE]).unwrap();
    for round in 0..50 {
        // Overwritten in place, flushed.
        file.write_all_at(&77u64.to_le_bytes().repeat(BLOCK / 8), written * BLOCK as u64).unwrap();
        model.wrote(written, 77, true);
        if round % 10 == 0 {
            file.sync_data().unwrap();
        }
    }
    for at in 0..8 {
        // A discard of an unwritten range needs only a map record.
        let block = at * (BLOCKS / 8);
        fallocate(&file, PUNCH, block * BLOCK as u64, 3 * BLOCK as u64).unwrap();
        (block..block + 3).for_each(|b| model.wrote(b, ZERO, true));
        volume.fill();
        file.sync_all().unwrap();
    }
    fallocate(&file, PUNCH, 7 * BLOCK as u64 + 512, 1024)
        .unwrap_or_else(|e| panic!("discard of a part: {e}"));
    fallocate(&file, PUNCH, 7 * BLOCK as u64, BLOCK as u64).unwrap();
    model.wrote(7, ZERO, true);
    fs::rename(daemon.disk("other"), daemon.disk("renamed")).unwrap();
    fs::set_permissions(daemon.disk("renamed"), fs::Permissions::from_mode(0o640)).unwrap();
    let new = daemon.create("new", false, MIB);
    assert_eq!(fs::read(&new).unwrap(), vec![0; MIB as usize]);
    open(&new).set_len(2 * MIB).unwrap();
    volume.fill();
    daemon.ok(&["disk", "rm", "new"]);
    daemon.ok(&["base", "add", "b2", daemon.path("b.img").to_str().unwrap()]);
    daemon.ok(&["base", "rm", "b2"]);
    volume.fill();
    model.verify(&disk, "full, after discards");

    // The space of a removed disk is free at once.
    daemon.ok(&["disk", "rm", "gone"]);
    file.write_all_at(&5u64.to_le_bytes().repeat(BLOCK / 8), 100 * BLOCK as u64).unwrap();
    model.wrote(100, 5, true);
    volume.fill();
    write_until_refused(&file, &mut model, 5, 3);

    // When there is space again, the same descriptor and the same worker go on.
    volume.make_space();
    for block in (0..BLOCKS).step_by(7) {
        file.write_all_at(&9u64.to_le_bytes().repeat(BLOCK / 8), block * BLOCK as u64).unwrap();
        model.wrote(block, 9, true);
    }
    file.sync_all().unwrap();
    model.verify(&disk, "with space again");
    let after = daemon.json(&["status"]);
    assert_eq!(after["worker_starts"], before["worker_starts"]);
    assert_eq!(after["worker_pid"], before["worker_pid"]);
    assert_eq!(after["space"]["full"], false, "{after}");
    assert_eq!(after["space"]["reserve_held_bytes"], after["space"]["reserve_bytes"], "{after}");
    assert_eq!(after["disks_refusing_writes"], serde_json::json!([]), "{after}");

    // On the full filesystem: a worker's death, a stop and a start, with unflushed writes.
    volume.fill();
    write_until_refused(&file, &mut model, 20, 4);
    volume.fill();
    daemon.kill_worker();
    model.verify(&disk, "full, the next worker");
    file.sync_all().unwrap();
    write_until_refused(&file, &mut model, 5, 5);
    drop(file);
    volume.fill();
    daemon.stop();
    check_is_clean(&daemon);
    volume.fill();
    daemon.start();
    model.verify(&disk, "full, after a restart");
    same(&fs::read(daemon.disk("renamed")).unwrap()[..100_000], &Random(3).bytes(100_000), "the other disk");
    write_until_refused(&open(&disk), &mut model, 5, 6);
    daemon.kill_everything();
    volume.fill();
    daemon.start();
    model.verify(&disk, "full, after a kill of everything");
    daemon.stop();
    check_is_clean(&daemon);
}

#[test]
fn a_full_tmpfs_of_live_maps_is_enospc_until_it_is_larger() {
    let dir = tempfile::Builder::new().prefix("plyfs-test-").tempdir_in("/var/tmp").unwrap();
    let runtime = dir.path().join("runtime");
    fs::create_dir(&runtime).unwrap();
    run(Command::new("mount").args(["-t", "tmpfs", "-o", "size=1M", "none"]).arg(&runtime));
    struct Unmount(std::path::PathBuf);
    impl Drop for Unmount {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        }
    }
    let _unmount = Unmount(runtime.clone());
    let config = dir.path().join("plyfs.toml");
    fs::write(&config, format!("runtime.dir = {runtime:?}\n")).unwrap();
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    daemon.try_start(&["--config", config.to_str().unwrap()]).unwrap();
    let disk = daemon.create("d", false, 1 << 40);
    let file = open(&disk);
    let mut written = Vec::new();
    // A page of the map is 62 MiB of the disk; a write of 1 MiB may need two.
    let refused = loop {
        let at = written.len() as u64 * 64 * MIB;
        match file.write_all_at(&[written.len() as u8 | 1; 4096], at) {
            Ok(()) => written.push(at),
            Err(error) => break error,
        }
        assert!(written.len() < 1000, "no lack of memory");
    };
    assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC));
    assert!(written.len() > 100, "{}", written.len());
    let at = |n: u64| n * 64 * MIB;
    assert_eq!(errno(file.write_all_at(&[1; 4096], at(2000))), libc::ENOSPC);
    // Blocks whose map page exists can be written, discarded and flushed.
    file.write_all_at(&[3; 4096], 4096).unwrap();
    fallocate(&file, PUNCH, at(1), 4096).unwrap();
    file.sync_all().unwrap();
    assert_eq!(daemon.json(&["status"])["worker_starts"], 1);
    assert!(daemon.json(&["disk", "show", "d"])["refuses_writes"].is_null());
    // Another disk cannot be opened until there is memory again.
    let other = daemon.create("other", false, MIB);
    assert_eq!(errno(File::open(&other)), libc::ENOSPC);
    run(Command::new("mount").args(["-o", "remount,size=2M"]).arg(&runtime));
    fs::write(&other, b"other").unwrap();
    file.write_all_at(&[1; 4096], at(2000)).unwrap();
    for (n, at) in written.iter().enumerate().skip(2) {
        same(&read_at(&file, *at, 4096), &[n as u8 | 1; 4096], "written before");
    }
    same(&read_at(&file, at(1), 4096), &[0; 4096], "discarded");
    same(&read_at(&file, 4096, 4096), &[3; 4096], "written meanwhile");
    assert_eq!(daemon.json(&["status"])["worker_starts"], 1);
    drop(file);
    daemon.stop();
}

/// The filesystem becomes full during a run of fio: fio gets ENOSPC, and each block is old or new.
#[test]
fn store_disk_full_during_a_fio_run() {
    let Some(fio) = tool("fio") else { return };
    let dir = tempfile::Builder::new().prefix("plyfs-test-").tempdir_in("/var/tmp").unwrap();
    let volume = Volume::on_file(dir.path(), 96 * MIB, EXT4);
    let mut daemon = TestDaemon::with_store_at(volume.path("store"));
    daemon.start();
    let mut model = Model::new(daemon.base(DISK as usize));
    let disk = daemon.create("d", true, DISK);
    volume.fill_but(16 * MIB);
    let pattern = 0x5a5a_1234_5a5a_1234u64;
    let report = daemon.path("fio.json");
    let fio = |more: &[&str]| {
        let mut command = Command::new(&fio);
        command.args(["--name=v", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--ioengine=libaio"]);
        command.args(["--direct=1", "--verify=pattern", "--verify_pattern=0x34125a5a34125a5a", "--size=64m"]);
        command.args(["--output-format=json", "--randseed=4"]).arg(format!("--output={}", report.display()));
        command.arg(format!("--filename={}", disk.display())).args(more).current_dir(daemon.dir.path());
        let status = command.status().unwrap();
        let text = fs::read_to_string(&report).unwrap();
        let from = text.find('{').unwrap();
        let json: serde_json::Value = serde_json::from_str(&text[from..]).unwrap();
        (status.success(), json["jobs"][0]["error"].as_i64().unwrap())
    };
    assert_eq!(fio(&["--do_verify=0"]), (false, i64::from(libc::ENOSPC)));
    model.may_be.iter_mut().for_each(|may_be| may_be.push(pattern));
    model.verify(&disk, "fio ended for lack of space");
    assert!(model.may_be.iter().any(|m| *m == [pattern]) && model.may_be.iter().any(|m| *m == [BASE]));
    open(&disk).sync_all().unwrap();
    volume.make_space();
    // The same run with verification, under the same worker.
    assert_eq!(fio(&["--do_verify=1", "--verify_fatal=1", "--io_size=48m"]), (true, 0));
    assert_eq!(daemon.json(&["status"])["worker_starts"], 1);
    daemon.stop();
}

#[test]
fn store_disk_full_ext4() {
    store_disk_full(96 * MIB, EXT4);
}

#[test]
fn store_disk_full_ext4_with_small_blocks_and_no_journal() {
    store_disk_full(80 * MIB, EXT4_SMALL_BLOCKS);
}

#[test]
fn store_disk_full_xfs() {
    store_disk_full(320 * MIB, XFS);
}
