//! A disk behaves like a regular file: contents, holes, sizes, locks, memory maps.

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use crate::harness::*;

const MIB: usize = 1 << 20;

#[test]
fn a_write_changes_only_its_disk_and_persists() {
    let mut daemon = TestDaemon::on_disk();
    let base = daemon.base(MIB);
    let one = daemon.create("one", true, 2 * MIB as u64);
    let two = daemon.create("two", true, MIB as u64);
    open(&one).write_all_at(&[1; 5000], 4000).unwrap();
    open(&two).write_all_at(&[2; 300], 4100).unwrap();
    let mut model = base.clone();
    model.resize(2 * MIB, 0);
    model[4000..9000].fill(1);
    let mut other = base.clone();
    other[4100..4400].fill(2);
    for round in ["at once", "after a restart", "after a kill"] {
        same(&fs::read(&one).unwrap(), &model, &format!("one {round}"));
        same(&fs::read(&two).unwrap(), &other, &format!("two {round}"));
        same(&fs::read(daemon.mount().join("bases/b.raw")).unwrap(), &base, &format!("base {round}"));
        if round == "at once" {
            daemon.restart();
        } else {
            daemon.kill_worker();
        }
    }
    same(&fs::read(daemon.path("b.img")).unwrap(), &base, "source");
    let raw = daemon.mount().join("bases/b.raw");
    assert_eq!(errno(OpenOptions::new().write(true).open(&raw)), libc::EROFS);
    assert_eq!(daemon.json(&["base", "show", "b"])["disks"], 2);
}

/// When the worker is killed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kills {
    /// When no operation is under way; the daemon is restarted, too.
    Between,
    /// At any moment.
    During,
}

/// Random writes, reads, punches, zero ranges, truncates, syncs, kills and restarts, aligned to 512 bytes and unaligned,
/// compared with a flat model.
fn random_operations(seed: u64, base: bool, mut daemon: TestDaemon, kills: Kills) {
    const MOST: u64 = 600 * 1024 + 512;
    let mut model = if base { daemon.base(400 * 1024 + 512) } else { Vec::new() };
    daemon.create("d", base, MOST);
    model.resize(MOST as usize, 0);
    let mut random = Random(seed);
    let mut file = open(&daemon.disk("d"));
    let mut done = Vec::new();
    let storm = (kills == Kills::During).then(|| Storm::at_random(&daemon, seed));
    for step in 0.. {
        if step >= 600 && storm.as_ref().is_none_or(|storm| storm.kills() >= 25) {
            break;
        }
        let grain = [1, SECTOR, SECTOR, 4096, 65536][random.below(5) as usize];
        let size = model.len() as u64;
        let at = random.below(size.max(1)) / grain * grain;
        let widest = [2000, 20_000, 200_000][random.below(3) as usize];
        let len = (random.below(widest) / grain * grain).clamp(1, MOST - at);
        let range = at as usize..(at + len) as usize;
        let kind = random.below(32);
        done.push(format!("{step}: kind {kind} at {at:#x} len {len:#x} size {size:#x}"));
        match kind {
            0..=11 => {
                let data = random.bytes(len as usize);
                file.write_all_at(&data, at).unwrap();
                model.resize(model.len().max(range.end), 0);
                model[range].copy_from_slice(&data);
            }
            12..=16 => {
                fallocate(&file, PUNCH, at, len).unwrap();
                let end = range.end.min(model.len());
                model[range.start.min(end)..end].fill(0);
            }
            17..=20 => {
                let keep = random.below(2) == 0;
                fallocate(&file, if keep { ZERO | libc::FALLOC_FL_KEEP_SIZE } else { ZERO }, at, len)
                    .unwrap();
                if !keep {
                    model.resize(model.len().max(range.end), 0);
                }
                let end = range.end.min(model.len());
                model[range.start.min(end)..end].fill(0);
            }
            21 | 22 => {
                fallocate(&file, 0, at, len).unwrap();
                model.resize(model.len().max(range.end), 0);
            }
            23 | 24 => {
                let size = random.below(MOST) / grain * grain;
                file.set_len(size).unwrap();
                model.resize(size as usize, 0);
            }
            25..=27 => {
                let end = range.end.min(model.len());
                let start = range.start.min(end);
                same(&read_at(&file, start as u64, end - start), &model[start..end], &done.join("\n"));
            }
            28 => file.sync_all().unwrap(),
            29 => file.sync_data().unwrap(),
            30 if step % 4 == 0 && kills == Kills::Between => daemon.kill_worker(),
            31 if step % 8 == 0 && kills == Kills::Between => {
                drop(file);
                daemon.restart();
                file = open(&daemon.disk("d"));
            }
            _ => {}
        }
        if step % 10 == 9 {
            same(&fs::read(daemon.disk("d")).unwrap(), &model, &done.join("\n"));
            holes_read_zeros(&file, &model, &done.join("\n"));
        }
        // Keep the latest operations for the panic message.
        if done.len() > 600 {
            done.drain(..300);
        }
    }
    let Some(storm) = storm else { return };
    assert!(storm.stop() >= 25);
    drop(file);
    daemon.restart();
    same(&fs::read(daemon.disk("d")).unwrap(), &model, "after the storm and a restart");
    daemon.stop();
    daemon.ok(&["check"]);
}

fn seek(file: &fs::File, at: u64, whence: i32) -> Option<u64> {
    // SAFETY: the descriptor is open, no memory is involved.
    u64::try_from(unsafe { libc::lseek(file.as_raw_fd(), at as i64, whence) }).ok()
}

fn holes_read_zeros(file: &fs::File, model: &[u8], what: &str) {
    let mut at = 0;
    while at < model.len() as u64 {
        let data = seek(file, at, libc::SEEK_DATA).unwrap_or(model.len() as u64);
        assert!(data >= at, "SEEK_DATA from {at:#x} is {data:#x}\n{what}");
        assert!(
            model[at as usize..data as usize].iter().all(|b| *b == 0),
            "data in the hole {at:#x}..{data:#x}\n{what}"
        );
        if data == model.len() as u64 {
            return;
        }
        at = seek(file, data, libc::SEEK_HOLE).unwrap();
        assert!(at > data && at <= model.len() as u64, "SEEK_HOLE from {data:#x} is {at:#x}\n{what}");
    }
}

#[test]
fn random_operations_on_a_base_match_a_flat_model() {
    random_operations(11, true, TestDaemon::on_disk(), Kills::Between);
    random_operations(12, true, TestDaemon::in_memory(), Kills::Between);
}

#[test]
fn random_operations_on_a_blank_disk_match_a_flat_model() {
    random_operations(13, false, TestDaemon::on_disk(), Kills::Between);
}

/// Guards D4.
#[test]
fn random_operations_with_kills_during_them_match_a_flat_model() {
    if !needs("resend") {
        return;
    }
    random_operations(14, true, TestDaemon::on_disk(), Kills::During);
    random_operations(15, true, TestDaemon::in_memory(), Kills::During);
    random_operations(16, false, TestDaemon::on_disk(), Kills::During);
}

#[test]
fn after_a_shrink_and_a_growth_the_base_stays_hidden() {
    let mut daemon = TestDaemon::on_disk();
    let base = daemon.base(MIB);
    let path = daemon.create("d", true, MIB as u64);
    let file = open(&path);
    file.set_len(1000).unwrap();
    file.set_len(MIB as u64).unwrap();
    let mut model = base[..1000].to_vec();
    model.resize(MIB, 0);
    same(&fs::read(&path).unwrap(), &model, "at once");
    drop(file);
    daemon.restart();
    same(&fs::read(&path).unwrap(), &model, "after a restart");
}

#[test]
fn an_open_file_sees_a_resize_by_the_command() {
    let daemon = TestDaemon::on_disk();
    let base = daemon.base(MIB);
    let path = daemon.create("d", true, MIB as u64);
    let file = open(&path);
    assert_eq!(file.metadata().unwrap().len(), MIB as u64);
    daemon.ok(&["disk", "resize", "d", "3M"]);
    assert_eq!(file.metadata().unwrap().len(), 3 * MIB as u64);
    same(&read_at(&file, MIB as u64, 2 * MIB), &vec![0; 2 * MIB], "grown");
    daemon.ok(&["disk", "resize", "d", "64K", "--shrink"]);
    assert_eq!(file.metadata().unwrap().len(), 65536);
    assert_eq!(file.read_at(&mut [0; 10], 65536).unwrap(), 0);
    daemon.ok(&["disk", "resize", "d", "1M"]);
    let mut model = base[..65536].to_vec();
    model.resize(MIB, 0);
    same(&read_at(&file, 0, MIB), &model, "shrunk and grown");
}

struct Map {
    at: *mut u8,
    len: usize,
}

impl Map {
    fn new(file: &fs::File, len: usize, flags: i32) -> Self {
        // SAFETY: a new mapping, nothing is replaced.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
        Self { at: at.cast(), len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping lives as long as self.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }

    fn sync(&self) {
        // SAFETY: the range is mapped.
        assert_eq!(unsafe { libc::msync(self.at.cast(), self.len, libc::MS_SYNC) }, 0);
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

#[test]
fn a_shared_map_changes_the_disk_and_a_private_map_does_not() {
    if !needs("shared_mmap") {
        return;
    }
    let mut daemon = TestDaemon::on_disk();
    let mut model = daemon.base(MIB);
    let path = daemon.create("d", true, MIB as u64);
    let file = open(&path);
    let other = open(&path);
    let mut map = Map::new(&file, MIB, libc::MAP_SHARED);
    same(map.bytes(), &model, "mapped");
    map.bytes()[10_000..30_000].fill(3);
    map.sync();
    model[10_000..30_000].fill(3);
    same(&read_at(&other, 0, MIB), &model, "through another descriptor");
    let mut private = Map::new(&file, MIB, libc::MAP_PRIVATE);
    private.bytes()[0..100].fill(4);
    same(&read_at(&other, 0, MIB), &model, "after a private write");
    drop((map, private, file, other));
    daemon.restart();
    same(&fs::read(&path).unwrap(), &model, "after a restart");
}

#[test]
fn locks_of_two_descriptors_conflict() {
    let daemon = TestDaemon::on_disk();
    let path = daemon.create("d", false, MIB as u64);
    let (one, two) = (open(&path), open(&path));
    // SAFETY: the descriptors are open.
    let flock = |file: &fs::File, how| unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) };
    assert_eq!(flock(&one, libc::LOCK_EX), 0);
    assert_eq!(flock(&two, libc::LOCK_SH), -1);
    assert_eq!(flock(&one, libc::LOCK_UN), 0);
    assert_eq!(flock(&two, libc::LOCK_SH), 0);
    assert_eq!(flock(&one, libc::LOCK_SH), 0);
    let ofd = |file: &fs::File, kind: i32, start: i64, len: i64| {
        // SAFETY: flock is plain data.
        let mut lock: libc::flock = unsafe { std::mem::zeroed() };
        (lock.l_type, lock.l_whence, lock.l_start, lock.l_len) =
            (kind as i16, libc::SEEK_SET as i16, start, len);
        // SAFETY: the descriptor is open and the lock lives through the call.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) }
    };
    assert_eq!(ofd(&one, libc::F_WRLCK, 100, 1), 0);
    assert_eq!(ofd(&two, libc::F_RDLCK, 100, 1), -1);
    assert_eq!(ofd(&two, libc::F_WRLCK, 101, 10), 0);
    drop(one);
    // A child of another test inherits the descriptor until it execs its program.
    until("the lock of a closed file is free", || (ofd(&two, libc::F_RDLCK, 100, 1) == 0).then_some(()));
}

#[test]
fn direct_append_and_synchronous_writes_are_read_back() {
    let daemon = TestDaemon::on_disk();
    let mut model = daemon.base(MIB);
    let path = daemon.create("d", true, MIB as u64);
    let direct = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&path).unwrap();
    let data = Random(3).bytes(10_001);
    direct.write_all_at(&data[1..], 1001).unwrap();
    model[1001..11_001].copy_from_slice(&data[1..]);
    let mut buffer = vec![0; 20_001];
    direct.read_exact_at(&mut buffer[1..], 3).unwrap();
    same(&buffer[1..], &model[3..20_003], "an unaligned direct read");
    let synchronous = OpenOptions::new().write(true).custom_flags(libc::O_DSYNC).open(&path).unwrap();
    synchronous.write_all_at(&[9; 777], 70_000).unwrap();
    model[70_000..70_777].fill(9);
    let mut append = OpenOptions::new().append(true).open(&path).unwrap();
    append.write_all(b"the end").unwrap();
    model.extend(b"the end");
    same(&fs::read(&path).unwrap(), &model, "all");
    assert_eq!(direct.read_at(&mut [0; 100], model.len() as u64).unwrap(), 0);
    assert_eq!(direct.read_at(&mut [0; 100], model.len() as u64 - 3).unwrap(), 3);
    assert_eq!(direct.read_at(&mut [0; 100], 1 << 40).unwrap(), 0);
}

#[test]
fn the_block_count_follows_writes_punches_and_preallocation() {
    let daemon = TestDaemon::on_disk();
    let base = daemon.base(MIB);
    let path = daemon.create("d", true, MIB as u64);
    let file = open(&path);
    let blocks = || file.metadata().unwrap().blocks();
    let untouched = blocks();
    file.write_all_at(&[1; 65536], 0).unwrap();
    let written = blocks();
    assert!(written >= untouched + 128, "{untouched} then {written}");
    fallocate(&file, PUNCH, 0, 65536).unwrap();
    assert!(blocks() < written, "{written} then {}", blocks());
    let before = blocks();
    fallocate(&file, 0, 131_072, 65536).unwrap();
    assert!(blocks() >= before + 128, "{before} then {} after a preallocation", blocks());
    let mut model = base;
    model[..65536].fill(0);
    let mut found = Vec::new();
    open(&path).read_to_end(&mut found).unwrap();
    same(&found, &model, "a preallocation changes no byte");
}
