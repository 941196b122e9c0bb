//! Changed extents, export and import through the command line and the mount.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};

use crate::harness::{PUNCH, Random, TestDaemon, fallocate, open, run, same, tool};

const MIB: u64 = 1 << 20;
const BASE: usize = 4 << 20;

fn put(daemon: &TestDaemon, disk: &str, at: u64, bytes: &[u8]) {
    open(&daemon.disk(disk)).write_all_at(bytes, at).unwrap();
}

/// A disk on a base, with data, zeros over the base, and a snapshot `one` before the last changes.
fn with_disk(daemon: &TestDaemon) {
    daemon.base(BASE);
    daemon.create("vm1", true, 16 * MIB);
    put(daemon, "vm1", 4096, &Random(1).bytes(8192));
    put(daemon, "vm1", 9 * MIB + 512, b"beyond the base");
    daemon.ok(&["disk", "snapshot", "vm1", "one"]);
    fallocate(&open(&daemon.disk("vm1")), PUNCH, MIB, 128 << 10).unwrap();
    put(daemon, "vm1", 2 * MIB, &[7; 70_000]);
    put(daemon, "vm1", 16 * MIB - 5, b"a end");
}

fn extents(list: &Value) -> Vec<(u64, u64, String)> {
    let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
    let one = |extent: &Value| {
        (number(extent, "offset"), number(extent, "length"), extent["content"].as_str().unwrap().to_owned())
    };
    list["extents"].as_array().unwrap().iter().map(one).collect()
}

fn wanted(list: &[(u64, u64, &str)]) -> Vec<(u64, u64, String)> {
    list.iter().map(|(offset, length, content)| (*offset, *length, (*content).to_owned())).collect()
}

#[test]
fn the_extents_that_differ_are_listed() {
    let daemon = TestDaemon::in_memory();
    with_disk(&daemon);
    let since_one =
        wanted(&[(MIB, 128 << 10, "zero"), (2 * MIB, 73_728, "data"), (16 * MIB - 4096, 4096, "data")]);
    let all = wanted(&[
        (4096, 8192, "data"),
        (MIB, 128 << 10, "zero"),
        (2 * MIB, 73_728, "data"),
        (9 * MIB, 4096, "data"),
        (16 * MIB - 4096, 4096, "data"),
    ]);
    daemon.ok(&["disk", "snapshot", "vm1", "two"]);
    for _ in 0..2 {
        let diff = |args: &[&str]| daemon.json(&[&["disk", "diff"], args].concat());
        assert_eq!(extents(&diff(&["vm1"])), all);
        assert_eq!(extents(&diff(&["vm1@one"])), since_one);
        assert_eq!(extents(&diff(&["vm1@one", "@two"])), since_one);
        assert_eq!(extents(&diff(&["vm1@one", "vm1@two"])), since_one);
        assert_eq!(
            extents(&diff(&["vm1", "@one"])),
            wanted(&[(4096, 8192, "data"), (9 * MIB, 4096, "data")])
        );
        let between = diff(&["vm1@one", "@two"]);
        assert_eq!((&between["since"], &between["until"]), (&json!("one"), &json!("two")), "{between}");
        assert_eq!((&between["size"], &between["next"]), (&json!(16 * MIB), &Value::Null), "{between}");
        daemon.kill_worker();
    }
    let text = daemon.ok(&["disk", "diff", "vm1@one"]);
    assert_eq!(text.lines().count(), 5, "{text}");
    assert!(text.ends_with("3 extents: 76K of data, 128K of zeros or base\n"), "{text}");
    for (args, part) in [
        (&["vm1@two", "@one"][..], "later one"),
        (&["vm1@one", "vm2@two"], "two disks"),
        (&["vm1@one", "two"], "@two"),
        (&["vm1@three"], "vm1@three: there is no snapshot"),
        (&["vm2"], "disk vm2: there is no disk"),
    ] {
        let why = daemon.fails(&[&["disk", "diff"], args].concat());
        assert!(why.contains(part), "{args:?}: {why}");
    }
    daemon.ok(&["disk", "rollback", "vm1", "one"]);
    assert!(daemon.fails(&["disk", "diff", "vm1@two"]).contains("rolled back"));
    assert_eq!(extents(&daemon.json(&["disk", "diff", "vm1@one"])), []);
}

/// Runs qemu-img. False, with a line SKIP, when it is missing.
fn qemu_img(args: &[&str]) -> bool {
    let Some(program) = tool("qemu-img") else { return false };
    run(Command::new(program).args(args));
    true
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Checks that an image shows the bytes of a raw file.
fn assert_shows(image: &Path, raw: &Path) {
    if qemu_img(&["check", "-q", "-f", "qcow2", text(image)]) {
        qemu_img(&["compare", "-q", "-f", "qcow2", "-F", "raw", text(image), text(raw)]);
    }
}

fn snapshots(daemon: &TestDaemon) -> usize {
    daemon.json(&["disk", "snapshots", "vm1"]).as_array().unwrap().len()
}

#[test]
fn a_disk_is_exported_as_raw_while_it_is_written() {
    let daemon = TestDaemon::on_disk();
    with_disk(&daemon);
    let now = fs::read(daemon.disk("vm1")).unwrap();
    let out = daemon.path("vm1.raw");
    let done = daemon.json(&["disk", "export", "vm1", text(&out)]);
    assert_eq!((&done["size"], &done["format"]), (&json!(16 * MIB), &json!("raw")), "{done}");
    same(&fs::read(&out).unwrap(), &now, "the file");
    assert!(out.metadata().unwrap().blocks() * 512 < 5 * MIB, "zeros are holes");
    assert_eq!(snapshots(&daemon), 1, "the one that the command took is gone");
    // A snapshot stays as it was, and so does a file that has the name.
    let one = daemon.path("one.raw");
    daemon.ok(&["disk", "export", "vm1@one", text(&one)]);
    put(&daemon, "vm1", 0, &[9; 4096]);
    assert!(daemon.fails(&["disk", "export", "vm1", text(&out)]).contains("--force"));
    same(&fs::read(&out).unwrap(), &now, "the file that exists");
    daemon.ok(&["disk", "export", "vm1", text(&out), "--force"]);
    same(&fs::read(&out).unwrap()[..4096], &[9; 4096], "the new file");
    let piped = daemon.cli(&["disk", "export", "vm1@one", "-"]);
    assert!(piped.status.success(), "{}", String::from_utf8_lossy(&piped.stderr));
    same(&piped.stdout, &fs::read(&one).unwrap(), "the pipe");
    assert_eq!(snapshots(&daemon), 1);
    // The clones and the disks of others can be exported as well as any.
    daemon.ok(&["disk", "clone", "vm1@one", "clone"]);
    daemon.ok(&["disk", "export", "clone", text(&one), "--force"]);
    same(&fs::read(&one).unwrap(), &piped.stdout, "the clone");
}

#[test]
fn exports_as_qcow2_show_the_disk_in_qemu() {
    let daemon = TestDaemon::on_disk();
    with_disk(&daemon);
    let now = daemon.path("now.raw");
    daemon.ok(&["disk", "snapshot", "vm1", "two"]);
    fs::copy(daemon.disk("vm1"), &now).unwrap();
    let base = daemon.path("b.img");
    for (number, more) in [
        &[][..],
        &["--compress", "zlib"],
        &["--compress", "zstd"],
        &["--onto", text(&base)],
        &["--onto", text(&base), "--compress", "zstd"],
        &["--onto", "b.img", "--compress", "zlib"],
    ]
    .iter()
    .enumerate()
    {
        let out = daemon.path(&format!("out{number}.qcow2"));
        let disk = if number % 2 == 0 { "vm1" } else { "vm1@two" };
        daemon.ok(&[&["disk", "export", disk, text(&out), "--format", "qcow2"], *more].concat());
        assert_shows(&out, &now);
        if number >= 3 {
            let len = out.metadata().unwrap().len();
            assert!(len < 2 * MIB, "{more:?}: {len} bytes; what the base has is not in it");
        }
    }
    let piped = daemon.cli(&["disk", "export", "vm1", "-", "--format", "qcow2"]);
    assert!(piped.status.success(), "{}", String::from_utf8_lossy(&piped.stderr));
    fs::write(daemon.path("piped"), piped.stdout).unwrap();
    assert_shows(&daemon.path("piped"), &now);
    assert_eq!(snapshots(&daemon), 2);
}

#[test]
fn places_and_options_that_do_not_fit_are_refused() {
    let daemon = TestDaemon::in_memory();
    with_disk(&daemon);
    daemon.create("blank", false, MIB);
    let (out, base) = (daemon.path("out"), daemon.path("b.img"));
    fs::write(daemon.path("short"), "too short").unwrap();
    let in_mount = daemon.disks().join("copy.raw");
    let in_store = daemon.store().join("copy.raw");
    let (out, base) = (text(&out), text(&base));
    for (args, part) in [
        (&["vm1", text(&in_mount)][..], "itself"),
        (&["vm1", text(&in_store)], "itself"),
        (&["vm1", base, "--force"], "image of its base"),
        (&["vm1", "/nowhere/out"], "/nowhere"),
        (&["vm1", out, "--compress", "zstd"], "--format qcow2"),
        (&["vm1", out, "--onto", base], "--format qcow2"),
        (&["vm1", "-", "--format", "qcow2", "--compress", "zlib"], "out of order"),
        (&["vm1", "-", "--json"], "JSON"),
        (&["blank", out, "--format", "qcow2", "--onto", base], "no base"),
        (&["vm1", out, "--format", "qcow2", "--onto", "short"], "exact copy"),
        (&["vm1@none", out], "none"),
        (&["vm2", out], "disk vm2: there is no disk"),
    ] {
        let why = daemon.fails(&[&["disk", "export"], args].concat());
        let why = if args.contains(&"--json") { why.replace('\\', "") } else { why };
        assert!(why.contains(part), "{args:?}: {why}");
    }
    assert!(!Path::new(out).exists());
    assert_eq!(snapshots(&daemon), 1);
}

#[test]
fn a_signal_ends_an_export_and_leaves_nothing() {
    let daemon = TestDaemon::on_disk();
    daemon.create("vm1", false, 600 * MIB);
    let data = Random(3).bytes(8 << 20);
    (0..70).for_each(|part| put(&daemon, "vm1", part * 8 * MIB, &data));
    let dir = daemon.path("out");
    fs::create_dir(&dir).unwrap();
    let file = dir.join("vm1.qcow2");
    let child = daemon
        .command()
        .args(["disk", "export", "vm1", text(&file), "--format", "qcow2", "--compress", "zlib"])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while snapshots(&daemon) == 0 || fs::read_dir(&dir).unwrap().count() == 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    run(Command::new("kill").args(["-INT", &child.id().to_string()]));
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stderr).contains("a signal ended it"));
    assert_eq!((snapshots(&daemon), fs::read_dir(&dir).unwrap().count()), (0, 0));
}

#[test]
fn an_image_is_imported_and_only_what_differs_from_the_base_is_stored() {
    let daemon = TestDaemon::on_disk();
    let base = daemon.base(BASE);
    let mut wanted = base.clone();
    wanted.resize(6 << 20, 0);
    wanted[4096..8192].fill(3);
    wanted[1 << 20..(1 << 20) + 65_536].fill(0);
    wanted[5 << 20..(5 << 20) + 10].fill(8);
    let raw = daemon.path("image.raw");
    fs::write(&raw, &wanted).unwrap();
    let path = daemon.ok(&["disk", "import", "blank", text(&raw)]);
    assert_eq!(path.trim(), text(&daemon.disk("blank")));
    same(&fs::read(daemon.disk("blank")).unwrap(), &wanted, "a blank disk");
    daemon.ok(&["disk", "import", "on", text(&raw), "--base", "b"]);
    same(&fs::read(daemon.disk("on")).unwrap(), &wanted, "on the base");
    assert_eq!(
        extents(&daemon.json(&["disk", "diff", "on"])),
        [(4096, 4096, "data".to_owned()), (MIB, 65_536, "zero".into()), (5 * MIB, 4096, "data".into())]
    );
    let shown = daemon.json(&["disk", "show", "on"]);
    assert_eq!(shown["base"], "b", "{shown}");
    // Two blocks of data and the map.
    assert!(shown["delta_bytes"].as_u64().unwrap() <= 4 * 4096, "{shown}");

    let overlay = daemon.path("overlay.qcow2");
    let backing = daemon.path("b.img");
    if !qemu_img(&["create", "-q", "-f", "qcow2", "-b", text(&backing), "-F", "raw", text(&overlay), "6M"]) {
        return;
    }
    let commands = ["-c", "write -q -P 3 4k 4k", "-c", "write -q -z 1M 64k", "-c", "write -q -P 8 5M 10"];
    run(Command::new("qemu-io").args(["-f", "qcow2"]).args(commands).arg(&overlay));
    let refused = daemon.fails(&["disk", "import", "overlay", text(&overlay)]);
    assert!(refused.contains("b.img") && refused.contains("--base"), "{refused}");
    let output = daemon.cli(&["disk", "import", "overlay", text(&overlay), "--base", "b"]);
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("all else comes from base b"), "{said}");
    same(&fs::read(daemon.disk("overlay")).unwrap(), &wanted, "an overlay");
    let refused =
        daemon.fails(&["disk", "import", "renamed", text(&overlay), "--format", "raw", "--base", "b"]);
    assert!(refused.contains("smaller"), "{refused}");
}

#[test]
fn an_import_that_fails_leaves_no_disk() {
    let daemon = TestDaemon::in_memory();
    daemon.create("taken", false, MIB);
    let raw = daemon.path("image.raw");
    File::create(&raw).unwrap().set_len(MIB).unwrap();
    for (args, part) in [
        (&["taken", text(&raw)][..], "exists already"),
        (&["new", "/nowhere/image"], "/nowhere/image"),
        (&["new", text(&raw), "--base", "none"], "none"),
        (&["new", text(&raw), "--format", "qcow2"], "not a usable qcow2 image"),
    ] {
        let why = daemon.fails(&[&["disk", "import"], args].concat());
        assert!(why.contains(part), "{args:?}: {why}");
    }
    // The tables lie outside of the file: that shows while it is copied.
    let image = daemon.path("image.qcow2");
    if !qemu_img(&["create", "-q", "-f", "qcow2", text(&image), "1M"]) {
        return;
    }
    let file = open(&image);
    let mut at = [0; 8];
    file.read_exact_at(&mut at, 40).unwrap();
    file.write_all_at(&(0x8000_0000_1000_0000u64).to_be_bytes(), u64::from_be_bytes(at)).unwrap();
    let why = daemon.fails(&["disk", "import", "new", text(&image)]);
    assert!(why.contains("not a usable qcow2 image"), "{why}");
    let names = daemon.json(&["disk", "ls"]);
    assert_eq!(names.as_array().unwrap().len(), 1, "{names}");
}

fn names(daemon: &TestDaemon, disk: &str) -> Vec<String> {
    let list = daemon.json(&["disk", "snapshots", disk]);
    list.as_array().unwrap().iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_copy_in_another_store_is_brought_forward_by_increments() {
    let (here, there) = (TestDaemon::on_disk(), TestDaemon::in_memory());
    with_disk(&here);
    there.base(BASE);
    here.ok(&["disk", "snapshot", "vm1", "two"]);
    open(&here.disk("vm1")).set_len(12 * MIB).unwrap();
    put(&here, "vm1", 3 * MIB, &[5; 4096]);
    fallocate(&open(&here.disk("vm1")), PUNCH, 2 * MIB, 8192).unwrap();
    here.ok(&["disk", "snapshot", "vm1", "three"]);
    let mut wanted = Vec::new();
    for name in ["one", "two", "three"] {
        let raw = here.path(name);
        here.ok(&["disk", "export", &format!("vm1@{name}"), text(&raw)]);
        wanted.push(fs::read(&raw).unwrap());
    }
    let files = ["first", "second", "third"].map(|name| here.path(name));
    let [first, second, third] = files.each_ref().map(|file| text(file));
    here.ok(&["disk", "export", "vm1@one", first, "--format", "increment"]);
    here.ok(&["disk", "export", "vm1@two", second, "--since", "@one"]);
    let piped = here.cli(&["disk", "export", "vm1@three", "-", "--since", "vm1@two"]);
    assert!(piped.status.success(), "{}", String::from_utf8_lossy(&piped.stderr));
    fs::write(&files[2], &piped.stdout).unwrap();
    assert!(files[1].metadata().unwrap().len() < 100_000, "only what changed");

    let refused = there.fails(&["disk", "import", "copy", first, "--increment"]);
    assert!(refused.contains("--base"), "{refused}");
    let apply = |file: &str| there.ok(&["disk", "import", "copy", file, "--increment"]);
    let look = |number: usize| {
        same(&fs::read(there.disk("copy")).unwrap(), &wanted[number], &format!("after file {number}"));
        let names = names(&there, "copy");
        assert!(names.len() == 1 && names[0].starts_with("plyfs-state-"), "{names:?}");
    };
    there.ok(&["disk", "import", "copy", first, "--increment", "--base", "b"]);
    look(0);
    let refused = there.fails(&["disk", "import", "copy", third, "--increment"]);
    assert!(refused.contains("in order"), "{refused}");
    // A copy that was written is not what the increment was made for.
    put(&there, "copy", 0, b"x");
    let refused = there.fails(&["disk", "import", "copy", second, "--increment"]);
    assert!(refused.contains("disk rollback copy plyfs-state-"), "{refused}");
    let state = names(&there, "copy").remove(0);
    there.ok(&["disk", "rollback", "copy", &state]);
    // A file that is cut is applied in part, and taken back.
    let cut = here.path("cut");
    let whole = fs::read(&files[1]).unwrap();
    fs::write(&cut, &whole[..whole.len() - 40]).unwrap();
    let refused = there.fails(&["disk", "import", "copy", text(&cut), "--increment"]);
    assert!(refused.contains("ends too early"), "{refused}");
    look(0);
    apply(second);
    look(1);
    let refused = there.fails(&["disk", "import", "copy", second, "--increment"]);
    assert!(refused.contains("already"), "{refused}");
    apply(third);
    look(2);
    let refused = there.fails(&["disk", "import", "other", second, "--increment"]);
    assert!(refused.contains("disk other: there is no disk"), "{refused}");
    let refused = there.fails(&["disk", "import", "other", text(&here.path("one")), "--increment"]);
    assert!(refused.contains("no increment"), "{refused}");
    there.ok(&["disk", "create", "mine", "--size", "1M"]);
    let refused = there.fails(&["disk", "import", "mine", second, "--increment"]);
    assert!(refused.contains("new name"), "{refused}");
    let refused = here.fails(&["disk", "export", "vm1", third, "--since", "@two"]);
    assert!(refused.contains("DISK@SNAPSHOT"), "{refused}");
}

/// A server of the network block device, which ends with its client, or when the test ends.
struct NbdServer {
    dir: tempfile::TempDir,
}

impl NbdServer {
    fn pid_file(&self) -> PathBuf {
        self.dir.path().join("pid")
    }

    fn url(&self) -> String {
        format!("nbd+unix:///?socket={}", self.dir.path().join("socket").display())
    }

    /// As docs/operations.md shows it; `qemu-nbd` returns when it listens.
    fn of(file: &Path) -> Option<Self> {
        let (server, dir) = (tool("qemu-nbd")?, tempfile::tempdir().unwrap());
        let this = Self { dir };
        let mut command = Command::new(server);
        command.args(["--read-only", "--format=raw", "--fork"]);
        command.arg(format!("--pid-file={}", this.pid_file().display()));
        command.arg(format!("--socket={}", this.dir.path().join("socket").display()));
        run(command.arg(file));
        Some(this)
    }
}

impl Drop for NbdServer {
    fn drop(&mut self) {
        let pid = fs::read_to_string(self.pid_file()).ok().and_then(|pid| pid.trim().parse::<i32>().ok());
        // Its process id belongs to it as long as its name says so.
        let is_it = |pid: &i32| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim() == "qemu-nbd")
        };
        if let Some(pid) = pid.filter(is_it) {
            crate::harness::signal(pid, libc::SIGTERM);
        }
    }
}

#[test]
fn nbd_servers_on_a_snapshot_tell_backup_tools_which_extents_are_allocated() {
    let daemon = TestDaemon::on_disk();
    daemon.create("vm1", false, 16 * MIB);
    put(&daemon, "vm1", MIB, &Random(1).bytes(65_536));
    put(&daemon, "vm1", 8 * MIB, &Random(2).bytes(4096));
    daemon.ok(&["disk", "snapshot", "vm1", "one"]);
    // What is written later is not in the snapshot.
    put(&daemon, "vm1", 12 * MIB, &Random(3).bytes(4096));
    let snapshot = daemon.mount().join("snapshots/vm1@one.raw");
    let Some(nbdinfo) = tool("nbdinfo") else { return };
    let map = |server: &NbdServer| -> Vec<(u64, u64, bool)> {
        let text = run(Command::new(&nbdinfo).args(["--map", "--json", &server.url()]));
        let list: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let number = |extent: &Value, key: &str| extent[key].as_u64().unwrap();
        let mut runs: Vec<(u64, u64, bool)> = Vec::new();
        for extent in list.as_array().unwrap() {
            let (offset, len) = (number(extent, "offset"), number(extent, "length"));
            // Bits of base:allocation: 1 a hole, 2 zeros.
            let is_data = number(extent, "type") & 2 == 0;
            match runs.last_mut() {
                Some(last) if last.2 == is_data => last.1 += len,
                _ => runs.push((offset, len, is_data)),
            }
        }
        runs
    };
    let expected = [
        (0, MIB, false),
        (MIB, 65_536, true),
        (MIB + 65_536, 7 * MIB - 65_536, false),
        (8 * MIB, 4096, true),
        (8 * MIB + 4096, 8 * MIB - 4096, false),
    ];
    let Some(server) = NbdServer::of(&snapshot) else { return };
    assert_eq!(map(&server), expected);
    drop(server);
    // The bytes, read as a backup tool does.
    let Some(server) = NbdServer::of(&snapshot) else { return };
    let copy = daemon.path("copy.raw");
    run(Command::new(tool("nbdcopy").unwrap()).arg(server.url()).arg(&copy));
    same(&fs::read(&copy).unwrap(), &fs::read(&snapshot).unwrap(), "the backup");
    assert!(fs::metadata(&copy).unwrap().blocks() * 512 < 2 * MIB, "holes stay holes");
}
