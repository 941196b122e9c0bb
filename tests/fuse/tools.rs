//! Tools that test or use disks: fsx, fio, qemu-img, filesystems on a loop device.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::harness::*;

const MIB: u64 = 1 << 20;

const FSX: &str = "flen = 1048576
[opsize]
max = 100000
[weights]
close_open = 1
invalidate = 1
mapread = 10
mapwrite = 10
read = 10
write = 20
truncate = 4
fsync = 1
fdatasync = 1
posix_fallocate = 4
punch_hole = 10
sendfile = 2
posix_fadvise = 1
copy_file_range = 4
";

pub fn fsx(daemon: &TestDaemon, disk: &Path, seed: u32, operations: u32) {
    fsx_with(FSX, daemon, disk, seed, operations);
}

fn fsx_with(config: &str, daemon: &TestDaemon, disk: &Path, seed: u32, operations: u32) {
    let Some(tool) = tool("fsx") else { return };
    fs::write(daemon.path("fsx.toml"), config).unwrap();
    let mut command = Command::new(tool);
    command.current_dir(daemon.dir.path()).arg("-f").arg(daemon.path("fsx.toml"));
    command
        .args(["-N", &operations.to_string(), "-S", &seed.to_string(), "-P"])
        .arg(daemon.dir.path())
        .arg(disk);
    run(&mut command);
}

#[test]
fn fsx_on_a_blank_disk() {
    if !needs("shared_mmap") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    fsx(&daemon, &daemon.create("d", false, MIB), 1, 100_000);
}

#[test]
fn fsx_on_a_disk_over_a_base() {
    if !needs("shared_mmap") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    daemon.base(MIB as usize);
    fsx(&daemon, &daemon.create("d", true, MIB), 2, 100_000);
}

#[test]
fn fsx_while_the_worker_is_killed_every_300_ms() {
    if !needs("resend") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    daemon.base(MIB as usize);
    let disk = daemon.create("d", true, MIB);
    let storm = Storm::new(&daemon, Duration::from_millis(300), u64::MAX);
    fsx(&daemon, &disk, 3, 20_000);
    assert!(storm.stop() > 0);
}

/// Guards D2.
#[test]
fn fsx_while_the_worker_is_killed_at_random_moments() {
    if !needs("resend") {
        return;
    }
    for (base, seed) in [(true, 4), (false, 5)] {
        let mut daemon = TestDaemon::on_disk();
        daemon.base(MIB as usize);
        let disk = daemon.create("d", base, MIB);
        let storm = Storm::at_random(&daemon, u64::from(seed));
        fsx(&daemon, &disk, seed, 20_000);
        assert!(storm.stop() > 5);
        daemon.stop();
        daemon.ok(&["check"]);
    }
}

/// Says that work is over, also when it fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Between two disks: the module `copy_model`.
#[test]
fn fsx_that_mostly_copies_within_a_disk_while_snapshots_of_it_come_and_go() {
    if !needs("shared_mmap") {
        return;
    }
    let mut daemon = TestDaemon::on_disk();
    daemon.base(MIB as usize);
    let disk = daemon.create("d", true, MIB);
    let config = FSX.replace("copy_file_range = 4", "copy_file_range = 60");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                for name in ["one", "two"] {
                    daemon.ok(&["disk", "snapshot", "d", name]);
                }
                daemon.ok(&["disk", "rm", "d@one", "d@two"]);
            }
        });
        let _ends = Ends(&is_over);
        fsx_with(&config, &daemon, &disk, 6, 10_000);
    });
    daemon.stop();
    daemon.ok(&["check"]);
}

fn fio(disk: &Path, args: &[&str]) {
    let Some(tool) = tool("fio") else { return };
    let mut command = Command::new(tool);
    command.args(["--name=v", "--rw=randwrite", "--direct=1", "--ioengine=libaio", "--iodepth=16"]);
    command.args(["--verify=crc32c", "--verify_fatal=1", "--randseed=4", "--output-format=terse"]);
    command.args(args).arg(format!("--filename={}", disk.display()));
    let dir = tempfile::tempdir().unwrap();
    run(command.current_dir(dir.path()));
}

const UNALIGNED: &[&str] = &[
    "--bssplit=512/20:1536/10:4k/20:5k/10:16k/20:64k/20",
    "--blockalign=512",
    "--numjobs=4",
    "--size=12m",
    "--offset_increment=16m",
];

#[test]
fn fio_verifies_its_writes_at_depth_16() {
    let daemon = TestDaemon::on_disk();
    daemon.base(64 << 20);
    fio(&daemon.create("d", true, 64 * MIB), &["--bs=4k", "--size=64m"]);
    fio(&daemon.create("e", true, 64 * MIB), UNALIGNED);
}

#[test]
fn fio_verifies_its_writes_while_the_worker_is_killed_every_200_ms() {
    if !needs("resend") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    daemon.base(64 << 20);
    let one = daemon.create("d", true, 64 * MIB);
    let two = daemon.create("e", true, 64 * MIB);
    let storm = Storm::new(&daemon, Duration::from_millis(200), 20);
    fio(&one, &["--bs=4k", "--size=64m"]);
    fio(&two, UNALIGNED);
    fio(&one, &["--bs=4k", "--size=64m", "--loops=2"]);
    assert!(storm.stop() > 3);
}

#[test]
fn qemu_img_and_qemu_io_work_on_a_disk() {
    let (Some(img), Some(io)) = (tool("qemu-img"), tool("qemu-io")) else { return };
    let mut daemon = TestDaemon::on_disk();
    let mut model = daemon.base(4 << 20);
    let disk = daemon.create("d", true, 8 * MIB);
    model.resize(8 << 20, 0);
    for (k, command) in
        ["write -P 17 1536 9728", "write -z 65536 70144", "discard 1M 1M", "write -z -u 3M 512", "flush"]
            .iter()
            .enumerate()
    {
        let args = ["-f", "raw", "-t", "none", "-d", "unmap", "-c", command];
        let text = run(Command::new(&io).args(args).arg(&disk));
        assert!(!text.contains("failed"), "{k}: {command}: {text}");
    }
    model[1536..1536 + 9728].fill(17);
    model[65536..65536 + 70144].fill(0);
    model[1 << 20..2 << 20].fill(0);
    model[3 << 20..(3 << 20) + 512].fill(0);
    same(&fs::read(&disk).unwrap(), &model, "written by qemu-io");
    daemon.restart();
    same(&fs::read(&disk).unwrap(), &model, "after a restart");
    let flat = daemon.path("flat");
    fs::write(&flat, &model).unwrap();
    run(Command::new(&img).args(["compare", "-f", "raw", "-F", "raw"]).args([&flat, &disk]));
    let qcow = daemon.path("x.qcow2");
    run(Command::new(&img).args(["convert", "-f", "raw", "-O", "qcow2"]).args([&disk, &qcow]));
    let new = daemon.disk("new");
    run(Command::new(&img).args(["convert", "-f", "qcow2", "-O", "raw"]).args([&qcow, &new]));
    same(&fs::read(&new).unwrap(), &model, "converted into a new disk");
    let text = run(Command::new(&img).args(["map", "-f", "raw", "--output=json"]).arg(&disk));
    let map: serde_json::Value = serde_json::from_str(&text).unwrap();
    let mut end = 0;
    for extent in map.as_array().unwrap() {
        let (start, length) = (extent["start"].as_u64().unwrap(), extent["length"].as_u64().unwrap());
        assert_eq!(start, end);
        end += length;
        let bytes = &model[start as usize..end as usize];
        assert!(extent["zero"] == false || bytes.iter().all(|b| *b == 0), "{extent}");
    }
    assert_eq!(end, 8 * MIB);
    assert!(map.as_array().unwrap().len() > 1, "no hole in {map}");
}

/// What a program prints on both channels, and whether it succeeds.
fn said(command: &mut Command) -> (bool, String) {
    let output = command.env("LC_ALL", "C").output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// Tools that replace a file make a temporary one first. Where that is refused, the log says what to do instead.
#[test]
fn tools_that_make_temporary_files_are_told_what_to_do_instead() {
    let daemon = TestDaemon::on_disk();
    let base = daemon.base(1 << 20);
    let disk = daemon.create("vm1", true, MIB);
    let new = daemon.path("new.raw");
    let data = Random(11).bytes(2 << 20);
    fs::write(&new, &data).unwrap();
    let logged = |words: &str| daemon.log().matches(words).count();

    if let Some(rsync) = tool("rsync") {
        for _ in 0..3 {
            let (ok, text) = said(Command::new(&rsync).arg("-a").arg(&new).arg(&disk));
            assert!(!ok && text.contains("Invalid argument"), "{text}");
        }
        same(&fs::read(&disk).unwrap(), &base, "a refused copy changes nothing");
        until("the remedy", || (logged("use rsync --inplace") > 0).then_some(()));
        assert_eq!(logged("use rsync --inplace"), 1, "once, not once for each attempt");
        run(Command::new(&rsync).args(["-a", "--inplace"]).arg(&new).arg(&disk));
        same(&fs::read(&disk).unwrap(), &data, "rsync --inplace over a disk");
        run(Command::new(&rsync).args(["-a", "--inplace"]).arg(&new).arg(daemon.disk("copied")));
        same(&fs::read(daemon.disk("copied")).unwrap(), &data, "rsync --inplace makes a disk");
    }
    let (ok, text) = said(Command::new("sed").args(["-i", "s/a/b/"]).arg(&disk));
    assert!(!ok && text.contains("Invalid argument"), "{text}");
    until("the remedy", || (logged("dd conv=notrunc") > 0).then_some(()));

    // cp and mv write into the file, or make it by its own name.
    for (name, program) in [("vm1", "cp"), ("made", "cp"), ("moved", "mv"), ("vm1", "mv")] {
        let source = daemon.path(&format!("{name}-{program}.raw"));
        fs::write(&source, &data[..1 << 20]).unwrap();
        run(Command::new(program).arg(&source).arg(daemon.disk(name)));
        same(&fs::read(daemon.disk(name)).unwrap(), &data[..1 << 20], program);
    }
    let install = daemon.disk("installed");
    run(Command::new("install").args(["-m", "640"]).arg(&new).arg(&install));
    same(&fs::read(&install).unwrap(), &data, "install");

    for (name, advice) in [
        ("vm1.snapshot-1", "--diskspec vda,file=PATH"),
        ("debian.qcow2", "plyfs base add NAME FILE;"),
        ("notes", "give the disk such a name"),
    ] {
        let (ok, text) = said(Command::new("cp").arg(&new).arg(daemon.disks().join(name)));
        assert!(!ok && text.contains("Invalid argument"), "{text}");
        until(name, || (logged(advice) > 0).then_some(()));
    }
    assert!(!said(Command::new("mv").arg(&install).arg(daemon.disks().join("installed.img"))).0);
    assert_eq!(logged("plyfs base add NAME FILE;"), 1, "the same kind of name");
    assert!(!said(Command::new("mkdir").arg(daemon.disks().join("images"))).0);
    until("the remedy", || (logged("make the directory elsewhere") > 0).then_some(()));
    assert!(!said(Command::new("cp").arg(&new).arg(daemon.mount().join("bases/b2.raw"))).0);
    until("the remedy", || (logged("plyfs base add NAME FILE-OR-URL") > 0).then_some(()));
}

struct Loop(String);

impl Loop {
    fn new(disk: &Path) -> Self {
        Self(
            run(Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(disk))
                .trim()
                .to_owned(),
        )
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

struct Mounted(std::path::PathBuf);

impl Mounted {
    fn new(device: &Loop, at: std::path::PathBuf) -> Self {
        fs::create_dir_all(&at).unwrap();
        run(Command::new("mount").arg(&device.0).arg(&at));
        Self(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

fn filesystem(make: &str, make_args: &[&str], check: &str, check_args: &[&str]) {
    let (Some(make), Some(check)) = (tool(make), tool(check)) else { return };
    let mut daemon = TestDaemon::on_disk();
    daemon.base(32 << 20);
    let disk = daemon.create("d", true, 512 * MIB);
    let contents: Vec<Vec<u8>> = (1..40).map(|i| Random(i).bytes(100_000 * i as usize / 3)).collect();
    let verify = |at: &Path| {
        for (i, content) in contents.iter().enumerate().filter(|(i, _)| i % 5 != 0) {
            same(&fs::read(at.join(format!("f{i}"))).unwrap(), content, &format!("file {i}"));
        }
    };
    {
        let device = Loop::new(&disk);
        run(Command::new(&make).args(make_args).arg(&device.0));
        {
            let mounted = Mounted::new(&device, daemon.path("guest"));
            for (i, content) in contents.iter().enumerate() {
                fs::write(mounted.0.join(format!("f{i}")), content).unwrap();
            }
            for i in (0..contents.len()).step_by(5) {
                fs::remove_file(mounted.0.join(format!("f{i}"))).unwrap();
            }
            run(Command::new("fstrim").arg(&mounted.0));
        }
        let mounted = Mounted::new(&device, daemon.path("guest"));
        daemon.kill_worker();
        verify(&mounted.0);
    }
    daemon.restart();
    let device = Loop::new(&disk);
    verify(&Mounted::new(&device, daemon.path("guest")).0);
    run(Command::new(&check).args(check_args).arg(&device.0));
}

#[test]
fn ext4_on_a_loop_device_is_sound() {
    filesystem("mkfs.ext4", &["-q", "-F"], "e2fsck", &["-fn"]);
}

#[test]
fn xfs_on_a_loop_device_is_sound() {
    filesystem("mkfs.xfs", &["-q", "-f"], "xfs_repair", &["-n"]);
}
