//! Copies between files of the mount: cp(1), copy_file_range(2) at any offset, and what is shared then.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::harness::{PUNCH, Random, Storm, TestDaemon, errno, fallocate, needs, open, read_at, run, same};

const MIB: u64 = 1 << 20;

/// Copies up to `len` bytes in one call. Returns how many.
fn copy_once(from: &File, at: u64, to: &File, to_at: u64, len: u64) -> std::io::Result<u64> {
    let (mut at, mut to_at) = (at as i64, to_at as i64);
    // SAFETY: both offsets live through the call.
    let done = unsafe {
        libc::copy_file_range(from.as_raw_fd(), &mut at, to.as_raw_fd(), &mut to_at, len as usize, 0)
    };
    u64::try_from(done).map_err(|_| std::io::Error::last_os_error())
}

/// Copies up to `len` bytes, fewer at the end of the source.
pub fn copy(from: &File, at: u64, to: &File, to_at: u64, len: u64) -> u64 {
    let mut done = 0;
    while done < len {
        match copy_once(from, at + done, to, to_at + done, len - done).unwrap() {
            0 => break,
            bytes => done += bytes,
        }
    }
    done
}

/// A new disk of 0 bytes.
fn blank(daemon: &TestDaemon, name: &str) -> File {
    File::options().read(true).write(true).create_new(true).open(daemon.disk(name)).unwrap()
}

fn cp(from: &Path, to: &Path) {
    run(Command::new("cp").arg(from).arg(to));
}

/// As a program does that asks for the whole file at once. cp(1) of coreutils 9.1 reads and writes a file with holes.
fn copy_of_disk(from: &Path, to: &Path) {
    let from = File::open(from).unwrap();
    let to = File::options().write(true).create(true).truncate(true).open(to).unwrap();
    copy(&from, 0, &to, 0, 1 << 40);
}

fn id_of(daemon: &TestDaemon, name: &str) -> u64 {
    daemon.json(&["disk", "show", name])["id"].as_u64().unwrap()
}

fn base_file(daemon: &TestDaemon) -> PathBuf {
    let names: Vec<_> = fs::read_dir(daemon.mount().join("bases")).unwrap().flatten().collect();
    names[0].path()
}

#[test]
fn cp_of_a_base_makes_a_disk_that_shares_it() {
    let mut daemon = TestDaemon::on_disk();
    let content = daemon.base(5 * MIB as usize + 777);
    let disk = daemon.disk("vm1");
    cp(&base_file(&daemon), &disk);
    same(&fs::read(&disk).unwrap(), &content, "the copy");
    assert!(fs::metadata(&disk).unwrap().blocks() < 100, "nothing is copied");
    let shown = daemon.json(&["disk", "show", "vm1"]);
    assert!(shown["base"].is_string(), "{shown}");
    let used = base_file(&daemon).file_stem().unwrap().to_str().unwrap().to_owned();
    assert!(daemon.fails(&["base", "rm", &used]).contains("vm1"));
    // It is a disk like any other.
    let file = open(&disk);
    file.write_all_at(b"changed", 4090).unwrap();
    let mut wanted = content.clone();
    wanted[4090..4097].copy_from_slice(b"changed");
    daemon.kill_worker();
    same(&fs::read(&disk).unwrap(), &wanted, "under the next worker");
    file.set_len(2 * MIB).unwrap();
    file.set_len(3 * MIB).unwrap();
    wanted.truncate(2 * MIB as usize);
    wanted.resize(3 * MIB as usize, 0);
    same(&fs::read(&disk).unwrap(), &wanted, "cut and grown");
    drop(file);
    daemon.restart();
    same(&fs::read(&disk).unwrap(), &wanted, "after a restart");
    // Again over the same name: cp truncates the disk first.
    cp(&base_file(&daemon), &disk);
    same(&fs::read(&disk).unwrap(), &content, "copied again");
    assert!(fs::metadata(&disk).unwrap().blocks() < 100, "nothing is copied again");
    daemon.restart();
    same(&fs::read(&disk).unwrap(), &content, "copied again, after a restart");
    daemon.stop();
    daemon.ok(&["check"]);
}

// What docs/semantics.md says of modes.
#[test]
fn cp_gives_a_new_disk_the_mode_of_its_source() {
    let daemon = TestDaemon::on_disk();
    daemon.base(MIB as usize);
    let mode = |name: &str| fs::metadata(daemon.disk(name)).unwrap().mode() & 0o7777;
    let base = base_file(&daemon);
    daemon.create("old", true, MIB);
    daemon.ok(&["disk", "snapshot", "old", "s"]);
    let snapshot = daemon.mount().join("snapshots/old@s.raw");
    cp(&base, &daemon.disk("of-base"));
    cp(&snapshot, &daemon.disk("of-snapshot"));
    assert_eq!((mode("of-base"), mode("of-snapshot")), (0o400, 0o400));
    for (umask, wanted) in [("077", 0o600), ("022", 0o644)] {
        let name = format!("under-{umask}");
        let script = format!("umask {umask}; exec cp --no-preserve=mode \"$0\" \"$1\"");
        run(Command::new("sh").args(["-c", &script]).arg(&base).arg(daemon.disk(&name)));
        assert_eq!(mode(&name), wanted, "{umask}");
    }
    cp(&base, &daemon.disk("old"));
    daemon.ok(&["disk", "clone", "of-base", "clone"]);
    assert_eq!((mode("old"), mode("clone")), (0o600, 0o600));
}

#[test]
fn cp_of_a_disk_and_of_a_snapshot_are_clones() {
    let mut daemon = TestDaemon::on_disk();
    let mut content = daemon.base(4 * MIB as usize);
    content.resize(64 * MIB as usize, 0);
    let one = daemon.create("one", true, 64 * MIB);
    let mut random = Random(7);
    let file = open(&one);
    let write = |file: &File, content: &mut Vec<u8>, random: &mut Random| {
        for _ in 0..40 {
            let at = random.below(63 * MIB) as usize;
            let len = 1 + random.below(200_000) as usize;
            let bytes = random.bytes(len);
            file.write_all_at(&bytes, at as u64).unwrap();
            content[at..at + len].copy_from_slice(&bytes);
        }
    };
    write(&file, &mut content, &mut random);
    let (two, three) = (daemon.disk("two"), daemon.disk("three"));
    copy_of_disk(&one, &two);
    let first = content.clone();
    assert!(
        fs::metadata(&two).unwrap().blocks() < 1000,
        "most is shared: {}",
        fs::metadata(&two).unwrap().blocks()
    );
    daemon.ok(&["disk", "snapshot", "one", "monday"]);
    write(&file, &mut content, &mut random);
    let names: Vec<_> = fs::read_dir(daemon.mount().join("snapshots")).unwrap().flatten().collect();
    let names: Vec<_> = names.iter().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["one@monday.raw"]);
    let snapshot = daemon.mount().join("snapshots/one@monday.raw");
    same(&fs::read(&snapshot).unwrap(), &first, "the snapshot");
    cp(&snapshot, &three);
    let check = |content: &[u8]| {
        same(&fs::read(&one).unwrap(), content, "the disk");
        same(&fs::read(&two).unwrap(), &first, "the copy of the disk");
        same(&fs::read(&three).unwrap(), &first, "the copy of the snapshot");
    };
    check(&content);
    // Also where the bytes are read and written.
    let four = daemon.disk("four");
    cp(&one, &four);
    same(&fs::read(&four).unwrap(), &content, "copied by reading and writing");
    // Over a disk that has layers of its own, and over one with another past.
    copy_of_disk(&two, &three);
    copy_of_disk(&one, &two);
    same(&fs::read(&two).unwrap(), &content, "copied again");
    cp(&snapshot, &two);
    check(&content);
    daemon.kill_worker();
    check(&content);
    daemon.restart();
    check(&content);
    // A snapshot is read-only, and goes.
    assert_eq!(errno(fs::remove_file(&snapshot)), libc::EPERM);
    assert_eq!(errno(File::options().write(true).open(&snapshot)), libc::EROFS);
    drop(file);
    daemon.ok(&["disk", "rm", "one@monday"]);
    assert_eq!(errno(fs::read(&snapshot)), libc::ENOENT);
    daemon.ok(&["disk", "rm", "one"]);
    same(&fs::read(&two).unwrap(), &first, "without its origin");
    daemon.ok(&["disk", "rm", "two", "three", "four"]);
    daemon.stop();
    assert_eq!(fs::read_dir(daemon.store().join("deltas")).unwrap().count(), 0);
    daemon.ok(&["check"]);
}

// The thread changes the source between two calls that look like one copy.
#[test]
fn a_copy_has_what_its_own_thread_wrote_before() {
    let daemon = TestDaemon::in_memory();
    let (one, two) = (open(&daemon.create("one", false, 4 * MIB)), blank(&daemon, "two"));
    one.write_all_at(&vec![1; MIB as usize], 0).unwrap();
    for step in 0..4u64 {
        let at = step * MIB;
        one.write_all_at(&vec![step as u8 + 1; MIB as usize], at).unwrap();
        assert_eq!(copy(&one, at, &two, at, MIB), MIB);
        same(&read_at(&two, at, MIB as usize), &vec![step as u8 + 1; MIB as usize], "the part just written");
    }
    assert_eq!(id_of(&daemon, "two"), id_of(&daemon, "one") + 1);
}

#[test]
fn a_copy_onto_itself_is_refused_and_within_one_disk_is_right() {
    let daemon = TestDaemon::in_memory();
    let file = open(&daemon.create("d", false, MIB));
    let bytes = Random(3).bytes(MIB as usize);
    file.write_all_at(&bytes, 0).unwrap();
    assert_eq!(errno(copy_once(&file, 0, &file, 1000, 5000)), libc::EINVAL);
    assert_eq!(copy(&file, 100, &file, 500_000, 300_000), 300_000);
    let mut wanted = bytes.clone();
    wanted.copy_within(100..300_100, 500_000);
    same(&read_at(&file, 0, MIB as usize), &wanted, "within one disk");
    // Past the end of the source there is nothing.
    assert_eq!(copy(&file, MIB, &file, 0, 4096), 0);
}

/// Does everything at random to some disks, and compares them with memory.
struct Model {
    random: Random,
    files: Vec<File>,
    sources: Vec<(File, Vec<u8>)>,
    wanted: Vec<Vec<u8>>,
}

const MOST: u64 = 3 * MIB;

impl Model {
    fn range(&mut self) -> (u64, u64) {
        let at = self.random.below(MOST);
        let len = 1 + self.random.below((MOST - at).min(1 << 19));
        // Mostly whole blocks.
        if self.random.below(4) == 0 { (at, len) } else { (at & !4095, (len + 4095) & !4095) }
    }

    fn put(&mut self, disk: usize, at: u64, bytes: &[u8]) {
        let (at, end) = (at as usize, at as usize + bytes.len());
        let wanted = &mut self.wanted[disk];
        if wanted.len() < end {
            wanted.resize(end, 0);
        }
        wanted[at..end].copy_from_slice(bytes);
    }

    fn step(&mut self) {
        let disk = self.random.below(self.files.len() as u64) as usize;
        let (at, len) = self.range();
        match self.random.below(10) {
            0..=2 => {
                let bytes = self.random.bytes(len.min(70_000) as usize);
                self.files[disk].write_all_at(&bytes, at).unwrap();
                self.put(disk, at, &bytes);
            }
            3 => {
                let size = self.random.below(MOST) & !(self.random.below(2) * 4095);
                let size = if self.random.below(2) == 0 { 0 } else { size };
                self.files[disk].set_len(size).unwrap();
                self.wanted[disk].resize(size as usize, 0);
            }
            4 => {
                fallocate(&self.files[disk], PUNCH, at, len).unwrap();
                let end = (at + len).min(self.wanted[disk].len() as u64);
                if at < end {
                    self.wanted[disk][at as usize..end as usize].fill(0);
                }
            }
            _ => self.copy(disk, (at, len)),
        }
    }

    /// Copies a range, often from the start to the end and to the same offset.
    fn copy(&mut self, to: usize, (mut at, mut len): (u64, u64)) {
        let count = self.files.len() + self.sources.len();
        let from = self.random.below(count as u64) as usize;
        let whole = self.random.below(3) == 0;
        if whole {
            (at, len) = (0, MOST);
            self.files[to].set_len(0).unwrap();
            self.wanted[to].clear();
        }
        let to_at = if whole || self.random.below(3) > 0 { at } else { self.range().0 };
        if from == to && at < to_at + len && to_at < at + len {
            return;
        }
        let (source, bytes) = match self.files.get(from) {
            Some(file) => (file, &self.wanted[from]),
            None => {
                let (file, bytes) = &self.sources[from - self.files.len()];
                (file, bytes)
            }
        };
        let end = (at + len).min(bytes.len() as u64);
        let part = bytes.get(at as usize..end as usize).unwrap_or_default().to_vec();
        let done = copy(source, at, &self.files[to], to_at, len);
        assert_eq!(done, part.len() as u64, "from {at}, {len} bytes");
        if done > 0 {
            self.put(to, to_at, &part);
        }
    }

    fn compare(&self, when: &str) {
        for (file, wanted) in self.files.iter().zip(&self.wanted) {
            assert_eq!(file.metadata().unwrap().len(), wanted.len() as u64, "{when}");
            same(&read_at(file, 0, wanted.len()), wanted, when);
        }
    }
}

fn all_copies_compare_with_memory(seed: u64, steps: u64, kills: bool) {
    let daemon = TestDaemon::on_disk();
    let base = daemon.base(2 * MIB as usize + 1000);
    let disks =
        [("a", true, 3 * MIB), ("b", true, 4 * MIB), ("c", false, 0), ("d", false, 0), ("e", false, MIB)];
    let mut random = Random(seed);
    let mut wanted: Vec<Vec<u8>> = Vec::new();
    let mut files = Vec::new();
    for (name, on_base, size) in disks {
        files.push(if size == 0 { blank(&daemon, name) } else { open(&daemon.create(name, on_base, size)) });
        let mut content = if on_base { base.clone() } else { Vec::new() };
        content.resize(size as usize, 0);
        wanted.push(content);
    }
    let bytes = random.bytes(500_000);
    files[1].write_all_at(&bytes, 900_000).unwrap();
    wanted[1][900_000..1_400_000].copy_from_slice(&bytes);
    daemon.ok(&["disk", "snapshot", "b", "s"]);
    let snapshot = File::open(daemon.mount().join("snapshots/b@s.raw")).unwrap();
    let sources = vec![(File::open(base_file(&daemon)).unwrap(), base), (snapshot, wanted[1].clone())];
    let mut model = Model { random, files, sources, wanted };
    let storm = kills.then(|| Storm::new(&daemon, Duration::from_millis(200), 200));
    for step in 0..steps {
        model.step();
        if step % 50 == 49 {
            model.compare(&format!("seed {seed}, step {step}"));
        }
        if step % 97 == 96 {
            let name = ["a", "b", "c", "d", "e"][model.random.below(5) as usize];
            let _ = daemon.cli(&["disk", "snapshot", name, &format!("s{step}")]);
        }
    }
    if let Some(storm) = storm {
        storm.stop();
    }
    model.compare("at the end");
}

#[test]
fn copies_of_everything_to_everything_compare_with_memory() {
    for seed in 1..=4 {
        all_copies_compare_with_memory(seed, 400, false);
    }
}

#[test]
fn copies_while_the_worker_is_killed_compare_with_memory() {
    if needs("resend") {
        for seed in 11..=12 {
            all_copies_compare_with_memory(seed, 600, true);
        }
    }
}
