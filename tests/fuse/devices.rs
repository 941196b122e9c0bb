//! Filesystems on loop devices, for tests that need a small or failing store.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::harness::*;

/// A loop device over a file, until dropped.
pub struct LoopDevice(pub String);

impl LoopDevice {
    pub fn new(file: &Path) -> Self {
        Self(run(Command::new("losetup").args(["--find", "--show"]).arg(file)).trim().to_owned())
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

/// A filesystem, mounted until dropped. A daemon whose store is on it must be dropped first.
pub struct Volume {
    at: PathBuf,
    device: LoopDevice,
}

impl Volume {
    /// Creates the filesystem with the command `make`, to which the device's name is added, and mounts it.
    pub fn new(device: LoopDevice, at: PathBuf, make: &[&str], options: &str) -> Self {
        fs::create_dir_all(&at).unwrap();
        run(Command::new(make[0]).args(&make[1..]).arg(&device.0));
        run(Command::new("mount").args(["-o", options, &device.0]).arg(&at));
        Self { at, device }
    }

    /// A filesystem on a sparse file of `size` bytes in `dir`.
    pub fn on_file(dir: &Path, size: u64, make: &[&str]) -> Self {
        let image = dir.join("image");
        File::create(&image).unwrap().set_len(size).unwrap();
        Self::new(LoopDevice::new(&image), dir.join("volume"), make, "defaults")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.at.join(name)
    }

    /// Takes the filesystem away, and leaves an empty mount point.
    pub fn unmount(&self) {
        run(Command::new("umount").arg("-l").arg(&self.at));
    }

    /// Brings it back.
    pub fn mount(&self) {
        run(Command::new("mount").arg(&self.device.0).arg(&self.at));
    }

    fn filler(&self) -> PathBuf {
        self.path("filler")
    }

    /// Takes all free space, to the last block. Returns the number of bytes taken.
    pub fn fill(&self) -> u64 {
        let mut file = OpenOptions::new().create(true).append(true).open(self.filler()).unwrap();
        let before = file.metadata().unwrap().len();
        let mut end = before;
        for piece in [8 << 20, 256 << 10, 4096] {
            // SAFETY: an open descriptor and numbers.
            while unsafe { libc::fallocate(file.as_raw_fd(), 0, end as i64, piece) } == 0 {
                end += piece as u64;
            }
        }
        // The filesystem may give space to a later call that it refused to an earlier one, also after a sync.
        let mut tries = 0;
        while tries < 3 {
            match file.write_all(&[0xFF; 512]) {
                Ok(()) => tries = 0,
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "filling: {error}");
                    tries += 1;
                    file.sync_all().unwrap();
                }
            }
        }
        file.metadata().unwrap().len() - before
    }

    /// Takes all free space except about `left` bytes.
    pub fn fill_but(&self, left: u64) {
        self.fill();
        let file = OpenOptions::new().write(true).open(self.filler()).unwrap();
        file.set_len(file.metadata().unwrap().len() - left).unwrap();
        file.sync_all().unwrap();
    }

    /// Frees the space that `fill` took.
    pub fn make_space(&self) {
        fs::remove_file(self.filler()).unwrap();
        File::open(&self.at).unwrap().sync_all().unwrap();
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        // A lazy unmount, because a failed test may leave processes on it.
        let _ = Command::new("umount").arg("-l").arg(&self.at).status();
    }
}
