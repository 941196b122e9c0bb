//! Two disks that are copied to each other and within themselves at random, read, written, mapped, cut and punched, and
//! compared with two arrays in memory: what fsx does within one file, between two.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::copies::copy;
use crate::harness::{PUNCH, Random, TestDaemon, ZERO, fallocate, needs, open, read_at, same};

/// Most bytes of a disk.
const MOST: u64 = 1 << 20;
const STEPS: u64 = 800;
const NAMES: [&str; 2] = ["a", "b"];

/// One of the disks.
struct ModelDisk {
    file: File,
    wanted: Vec<u8>,
}

impl ModelDisk {
    fn size(&self) -> u64 {
        self.wanted.len() as u64
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        let end = at as usize + bytes.len();
        if self.wanted.len() < end {
            self.wanted.resize(end, 0);
        }
        self.wanted[at as usize..end].copy_from_slice(bytes);
    }

    fn write_mapped(&mut self, at: u64, bytes: &[u8]) {
        let (len, fd) = (self.wanted.len(), self.file.as_raw_fd());
        let (rights, end) = (libc::PROT_READ | libc::PROT_WRITE, at as usize + bytes.len());
        assert!(end <= len);
        // SAFETY: the map is of the whole file, which no other thread cuts, and is used within its bounds only.
        unsafe {
            let map = libc::mmap(std::ptr::null_mut(), len, rights, libc::MAP_SHARED, fd, 0);
            assert_ne!(map, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), map.cast::<u8>().add(at as usize), bytes.len());
            assert_eq!(libc::munmap(map, len), 0);
        }
        self.put(at, bytes);
    }
}

struct TwoDisks {
    daemon: TestDaemon,
    random: Random,
    disks: [ModelDisk; 2],
    /// Whether shared maps can be written.
    maps: bool,
    /// What was done, for the message of a failure.
    log: Vec<String>,
}

impl TwoDisks {
    fn new(seed: u64) -> Self {
        let daemon = TestDaemon::on_disk();
        let base = daemon.base(600_000);
        let disk = |name: &str, on_base: bool, size: u64| {
            let mut wanted = if on_base { base.clone() } else { Vec::new() };
            wanted.resize(size as usize, 0);
            ModelDisk { file: open(&daemon.create(name, on_base, size)), wanted }
        };
        let disks = [disk(NAMES[0], true, MOST), disk(NAMES[1], false, MOST / 2)];
        Self { daemon, random: Random(seed), disks, maps: needs("shared_mmap"), log: Vec::new() }
    }

    /// A place, often at the border of a block, or beside it.
    fn place(&mut self, end: u64) -> u64 {
        let at = self.random.below(end + 1);
        let at = match self.random.below(4) {
            0 => at,
            1 => (at & !4095) + self.random.below(3),
            _ => at & !4095,
        };
        at.saturating_sub(self.random.below(8) / 7).min(end)
    }

    fn range(&mut self, end: u64) -> (u64, u64) {
        let at = self.place(end.saturating_sub(1));
        let longest = if self.random.below(2) == 0 { 20_000 } else { MOST };
        let len = 1 + self.random.below(longest.min(end - at).max(1));
        let to = if self.random.below(2) == 0 { (at + len).next_multiple_of(4096) } else { at + len };
        (at, to.min(end).max(at + 1) - at)
    }

    fn step(&mut self) {
        let n = self.random.below(2) as usize;
        let what = self.random.below(20);
        let (at, len) = self.range(MOST);
        self.log.push(format!("{n} {what} {at} {len}"));
        match what {
            0..=3 => {
                let bytes = self.random.bytes(len as usize);
                self.disks[n].file.write_all_at(&bytes, at).unwrap();
                self.disks[n].put(at, &bytes);
            }
            4 if self.maps && at < self.disks[n].size() => {
                let bytes = self.random.bytes(len.min(self.disks[n].size() - at) as usize);
                self.disks[n].write_mapped(at, &bytes);
            }
            5 => {
                let size = if self.random.below(2) == 0 { 0 } else { self.place(MOST) };
                self.disks[n].file.set_len(size).unwrap();
                self.disks[n].wanted.resize(size as usize, 0);
            }
            6 | 7 => {
                let mode = if what == 6 { PUNCH } else { ZERO };
                fallocate(&self.disks[n].file, mode, at, len).unwrap();
                let disk = &mut self.disks[n];
                if what == 7 {
                    disk.wanted.resize(disk.wanted.len().max((at + len) as usize), 0);
                }
                let end = (at + len).min(disk.size()) as usize;
                disk.wanted.get_mut(at as usize..end).unwrap_or_default().fill(0);
            }
            8 => self.disks[n].file.sync_all().unwrap(),
            9 => {
                let name = format!("s{}", self.log.len());
                self.daemon.ok(&["disk", "snapshot", NAMES[n], &name]);
                if self.random.below(2) == 0 {
                    self.daemon.ok(&["disk", "rm", &format!("{}@{name}", NAMES[n])]);
                }
            }
            10 => self.disks[n].file = open(&self.daemon.disk(NAMES[n])),
            11 | 12 => self.check(n, at, len),
            13..=15 => self.copy_whole(n),
            _ => {
                let to = if self.random.below(3) == 0 { n } else { 1 - n };
                self.copy_part(n, to, (at, len));
            }
        }
    }

    fn check(&self, n: usize, at: u64, len: u64) {
        let disk = &self.disks[n];
        let end = (at + len).min(disk.size());
        let wanted = disk.wanted.get(at as usize..end as usize).unwrap_or_default();
        same(&read_at(&disk.file, at, wanted.len()), wanted, "a part");
    }

    /// Copies at the same or another offset.
    fn copy_part(&mut self, from: usize, to: usize, (at, len): (u64, u64)) {
        let to_at = if self.random.below(2) == 0 { at } else { self.place(MOST - len) };
        // A copy within a disk that grows it would go on with what it copied.
        let len = if from == to { len.min(self.disks[from].size().saturating_sub(at)) } else { len };
        if from != to || to_at >= at + len || at >= to_at + len {
            self.copy_to(from, to, (at, to_at, len));
        }
    }

    fn copy_to(&mut self, from: usize, to: usize, (at, to_at, len): (u64, u64, u64)) {
        let source = &self.disks[from];
        let part = source.wanted.get(at as usize..(at + len).min(source.size()) as usize);
        let part = part.unwrap_or_default().to_vec();
        assert_eq!(copy(&source.file, at, &self.disks[to].file, to_at, len), part.len() as u64);
        if !part.is_empty() {
            self.disks[to].put(to_at, &part);
        }
    }

    /// Copies a whole disk over the other, as cp does, at once or in parts, with changes of the source in between.
    fn copy_whole(&mut self, to: usize) {
        let from = 1 - to;
        self.disks[to].file.set_len(0).unwrap();
        self.disks[to].wanted.clear();
        let mut at = 0;
        while at < MOST {
            let len = if self.random.below(3) == 0 { MOST } else { self.range(MOST).1 };
            self.copy_to(from, to, (at, at, len.min(MOST - at)));
            at += len;
            if self.random.below(4) == 0 {
                let place = self.place(MOST - 5000);
                let bytes = self.random.bytes(5000);
                self.disks[from].file.write_all_at(&bytes, place).unwrap();
                self.disks[from].put(place, &bytes);
            }
        }
    }

    fn compare(&self) {
        for (n, disk) in self.disks.iter().enumerate() {
            assert_eq!(disk.file.metadata().unwrap().len(), disk.size(), "disk {n}");
            same(&read_at(&disk.file, 0, disk.wanted.len()), &disk.wanted, NAMES[n]);
        }
    }
}

fn two_disks_compare_with_memory(seed: u64, kills: bool) {
    let mut two = TwoDisks::new(seed);
    let run = std::panic::AssertUnwindSafe(|| {
        for step in 1..=STEPS {
            two.step();
            if step % 20 == 0 {
                two.compare();
            }
            if kills && step % 100 == 50 {
                two.daemon.kill_worker();
                two.compare();
            }
        }
        two.daemon.restart();
        for (disk, name) in two.disks.iter_mut().zip(NAMES) {
            disk.file = open(&two.daemon.disk(name));
        }
        two.compare();
        two.daemon.stop();
        two.daemon.ok(&["check"]);
    });
    if let Err(panic) = std::panic::catch_unwind(run) {
        let last = two.log.len().saturating_sub(20);
        eprintln!("seed {seed}, step {}, the last: {:#?}", two.log.len(), &two.log[last..]);
        std::panic::resume_unwind(panic);
    }
}

/// Guards D81.
#[test]
fn two_disks_that_are_copied_to_each_other_compare_with_memory() {
    for seed in 21..=23 {
        two_disks_compare_with_memory(seed, false);
    }
}

/// Guards D81.
#[test]
fn two_disks_that_are_copied_to_each_other_by_dying_workers_compare_with_memory() {
    for seed in 31..=32 {
        two_disks_compare_with_memory(seed, true);
    }
}

#[test]
fn two_disks_that_are_copied_to_each_other_with_a_new_seed_compare_with_memory() {
    let mut seed = [0; 8];
    getrandom::fill(&mut seed).unwrap();
    // A generator of zeros only would stay there.
    let seed = u64::from_le_bytes(seed) | 1;
    println!("seed {seed}");
    two_disks_compare_with_memory(seed, true);
}
