//! A command that destroys data in use is refused, and names the processes, until it is said again with a second word.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::process::{Child, Command, Stdio};

use crate::harness::*;

const MIB: u64 = 1 << 20;

/// A process that has a file open. It ends with the test.
struct Holder(Child);

impl Holder {
    fn of(path: &std::path::Path) -> Self {
        let file = File::open(path).unwrap();
        let mut command = Command::new("sleep");
        Self(command.arg("600").stdin(Stdio::from(file)).spawn().unwrap())
    }

    fn is_named(&self, text: &str) -> bool {
        text.contains(&format!("sleep (pid {})", self.0.id()))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn names(daemon: &TestDaemon) -> Vec<String> {
    let disks = daemon.json(&["disk", "ls"]);
    disks.as_array().unwrap().iter().map(|disk| disk["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn an_open_disk_is_removed_only_with_force() {
    let daemon = TestDaemon::on_disk();
    let path = daemon.create("a", false, MIB);
    daemon.create("b", false, MIB);
    let holder = Holder::of(&path);
    for _ in 0..2 {
        let said = daemon.fails(&["disk", "rm", "a"]);
        assert!(
            said.contains("disk a: open in") && holder.is_named(&said) && said.contains("--force"),
            "{said}"
        );
        // Also after a takeover: the next worker has not seen the open.
        daemon.kill_worker();
    }
    // The refusal of one does not keep the others.
    daemon.fails(&["disk", "rm", "a", "b"]);
    assert_eq!(names(&daemon), ["a"]);
    daemon.ok(&["disk", "rm", "a", "--force"]);
    assert!(names(&daemon).is_empty());
}

#[test]
fn a_disk_whose_last_handle_was_just_closed_is_removed() {
    let daemon = TestDaemon::on_disk();
    for round in 0..20 {
        let path = daemon.create("a", false, MIB);
        open(&path).write_all_at(&[round; 4096], 0).unwrap();
        daemon.ok(&["disk", "rm", "a"]);
    }
}

#[test]
fn a_disk_becomes_smaller_only_with_shrink() {
    let daemon = TestDaemon::on_disk();
    let path = daemon.create("a", false, 4 * MIB);
    open(&path).write_all_at(b"data", 3 * MIB).unwrap();
    let said = daemon.fails(&["disk", "resize", "a", "1M"]);
    assert!(said.contains("disk a") && said.contains("lost") && said.contains("--shrink"), "{said}");
    let holder = Holder::of(&path);
    let said = daemon.fails(&["disk", "resize", "a", "1M"]);
    assert!(holder.is_named(&said) && said.contains("--shrink"), "{said}");
    assert_eq!(read_at(&open(&path), 3 * MIB, 4), b"data");
    daemon.ok(&["disk", "resize", "a", "8M"]);
    daemon.ok(&["disk", "resize", "a", "1M", "--shrink"]);
    assert_eq!(fs::metadata(&path).unwrap().len(), MIB);
}

#[test]
fn the_daemon_stops_under_open_files_only_with_force() {
    let mut daemon = TestDaemon::on_disk();
    daemon.base(MIB as usize);
    let path = daemon.create("a", true, MIB);
    for file in [path.clone(), daemon.mount().join("bases/b.raw")] {
        let holder = Holder::of(&file);
        let said = daemon.fails(&["stop"]);
        assert!(holder.is_named(&said) && said.contains("--force"), "{said}");
        assert_eq!(daemon.status()["disks"], 1, "it serves on");
    }
    // A mapping without a descriptor counts too.
    let file = open(&path);
    // SAFETY: a new mapping; the test does not access its memory.
    let at = unsafe {
        let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
        libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_PRIVATE, fd, 0)
    };
    assert_ne!(at, libc::MAP_FAILED);
    drop(file);
    let said = daemon.fails(&["stop"]);
    assert!(said.contains(&format!("(pid {})", std::process::id())), "{said}");
    // SAFETY: the range that was mapped above; nothing refers to it.
    unsafe { libc::munmap(at, 4096) };
    daemon.ok(&["stop"]);
    daemon.ended();
    daemon.start();
    let holder = Holder::of(&path);
    daemon.ok(&["stop", "--force"]);
    daemon.ended();
    drop(holder);
}

#[test]
fn a_list_of_disks_says_which_are_open_and_in_which_process() {
    let daemon = TestDaemon::on_disk();
    let path = daemon.create("a", false, MIB);
    daemon.create("closed", false, MIB);
    let holder = Holder::of(&path);
    let disks = daemon.json(&["disk", "ls"]);
    let shown = daemon.json(&["disk", "show", "a"]);
    for disk in [&disks[0], &shown] {
        assert_eq!(disk["open_handles"], 1, "{disk}");
        assert_eq!(disk["open_by"], serde_json::json!([{"pid": holder.0.id(), "command": "sleep"}]));
    }
    assert_eq!(disks[1]["open_handles"], 0);
    assert!(disks[1].get("open_by").is_none());
    for args in [&["disk", "ls"] as &[&str], &["disk", "show", "a"]] {
        let text = daemon.ok(args);
        assert!(holder.is_named(&text), "{text}");
    }
}

#[test]
fn a_disk_that_a_program_creates_is_its_owners_alone() {
    let daemon = TestDaemon::on_disk();
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o644).open(daemon.disk("a")).unwrap();
    File::create(daemon.disk("b")).unwrap();
    for name in ["a", "b"] {
        assert_eq!(fs::metadata(daemon.disk(name)).unwrap().mode() & 0o7777, 0o600, "{name}");
    }
}

#[test]
fn a_copy_that_is_open_is_brought_forward_only_with_force() {
    let daemon = TestDaemon::on_disk();
    daemon.create("a", false, MIB);
    for (name, byte) in [("one", 1), ("two", 2), ("three", 3)] {
        open(&daemon.disk("a")).write_all_at(&[byte; 4096], 0).unwrap();
        daemon.ok(&["disk", "snapshot", "a", name]);
    }
    let files = ["first", "second", "third"].map(|name| daemon.path(name).display().to_string());
    daemon.ok(&["disk", "export", "a@one", &files[0], "--format", "increment"]);
    daemon.ok(&["disk", "export", "a@two", &files[1], "--since", "@one"]);
    daemon.ok(&["disk", "export", "a@three", &files[2], "--since", "@two"]);
    daemon.ok(&["disk", "import", "copy", &files[0], "--increment"]);
    let path = daemon.disk("copy");
    let holder = Holder::of(&path);
    for _ in 0..2 {
        let said = daemon.fails(&["disk", "import", "copy", &files[1], "--increment"]);
        assert!(
            said.contains("disk copy: open in") && holder.is_named(&said) && said.contains("--force"),
            "{said}"
        );
        assert_eq!(fs::read(&path).unwrap()[..4096], [1; 4096]);
        daemon.kill_worker();
    }
    daemon.ok(&["disk", "import", "copy", &files[1], "--increment", "--force"]);
    assert_eq!(fs::read(&path).unwrap()[..4096], [2; 4096]);
    drop(holder);
    daemon.ok(&["disk", "import", "copy", &files[2], "--increment"]);
    assert_eq!(fs::read(&path).unwrap()[..4096], [3; 4096]);
}
