//! `plyfs import nova` and `plyfs export nova`, with the files that QEMU makes as Nova does.

use std::fs::{self, File};
use std::io::BufRead;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::harness::{Random, TestDaemon, run, same, until};

const MIB: usize = 1 << 20;
const IMAGE: &str = "a9993e364706816aba3e25717850c26c9cd0d89d";
const NOVA: u32 = 64055;

/// A directory of instances with one image, as Nova makes it.
struct Host {
    daemon: TestDaemon,
    dir: PathBuf,
    image: Vec<u8>,
}

impl Host {
    fn new() -> Self {
        let daemon = TestDaemon::on_disk();
        let dir = daemon.path("instances");
        fs::create_dir_all(dir.join("_base")).unwrap();
        chown(&dir, Some(NOVA), Some(NOVA)).unwrap();
        let image = Random(5).bytes(4 * MIB);
        fs::write(dir.join("_base").join(IMAGE), &image).unwrap();
        Self { daemon, dir, image }
    }

    fn entry(&self) -> PathBuf {
        self.dir.join("_base").join(IMAGE)
    }

    fn disk(&self, vm: &str) -> PathBuf {
        self.dir.join(vm).join("disk")
    }

    /// An instance whose disk is larger than the image, and has `byte` in places. Returns what the disk shows.
    fn vm(&self, vm: &str, byte: u8) -> Vec<u8> {
        let disk = self.disk(vm);
        fs::create_dir(disk.parent().unwrap()).unwrap();
        let mut create = Command::new("qemu-img");
        create
            .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
            .arg(self.entry())
            .arg(&disk)
            .arg("6M");
        run(&mut create);
        let mut shown = [self.image.clone(), vec![0; 2 * MIB]].concat();
        for (at, len) in [(4096, 10_240), (3 * MIB + 512, 65_536), (5 * MIB, 4096)] {
            let write = format!("write -q -P {byte} {at} {len}");
            run(Command::new("qemu-io").args(["-f", "qcow2", "-c", &write]).arg(&disk));
            shown[at..at + len].fill(byte);
        }
        run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -q -z 1M 64k"]).arg(&disk));
        shown[MIB..MIB + 65_536].fill(0);
        chown(&disk, Some(NOVA), Some(NOVA + 1)).unwrap();
        fs::write(disk.parent().unwrap().join("disk.config"), vec![7; 2048]).unwrap();
        let info = json!({disk.to_str().unwrap(): "qcow2"});
        fs::write(disk.parent().unwrap().join("disk.info"), format!("{info}\n")).unwrap();
        shown
    }

    fn info(&self, vm: &str) -> Value {
        let info: Value =
            serde_json::from_slice(&fs::read(self.dir.join(vm).join("disk.info")).unwrap()).unwrap();
        info[self.disk(vm).to_str().unwrap()].clone()
    }

    /// What a qcow2 file shows.
    fn shows(&self, disk: &Path) -> Vec<u8> {
        let raw = self.daemon.path("shown.raw");
        run(Command::new("qemu-img").args(["convert", "-f", "qcow2", "-O", "raw"]).arg(disk).arg(&raw));
        fs::read(&raw).unwrap()
    }

    /// Status and summary of a command.
    fn run(&self, verb: &str, more: &[&str]) -> (bool, Value) {
        let mut command = self.daemon.command();
        let command = command.args(["--json", verb, "nova"]).arg(&self.dir).args(more);
        let output = command.output().unwrap();
        let (out, err) =
            (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr).into_owned());
        let last = out.lines().last().unwrap_or_else(|| panic!("{err}"));
        (
            output.status.success(),
            serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {out}{err}")),
        )
    }

    #[track_caller]
    fn done(&self, verb: &str, more: &[&str], done: u64) -> Value {
        let (ok, summary) = self.run(verb, more);
        assert!(ok && summary["done"] == done, "{summary:#}");
        summary
    }
}

/// A process that has an image open as QEMU has it.
fn holder(path: &Path) -> std::process::Child {
    let script = "import fcntl,sys,time\nfile = open(sys.argv[1], 'rb')\n\
                  fcntl.lockf(file, fcntl.LOCK_SH, 1, 100)\nprint('held', flush=True)\ntime.sleep(600)";
    let mut child =
        Command::new("python3").args(["-c", script]).arg(path).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    child
}

/// Guards D111.
#[test]
fn instances_become_disks_without_a_copy_of_their_image_and_files_again() {
    let mut host = Host::new();
    let (one, two) = (host.vm("vm1", 0x11), host.vm("vm2", 0x22));
    let inode = fs::metadata(host.entry()).unwrap().ino();
    let planned = host.done("import", &["--dry-run"], 2);
    assert_eq!(planned["disks"][0]["base"], format!("nova-{IMAGE}"));
    assert_eq!(host.daemon.json(&["disk", "ls"]), json!([]));
    assert!(host.entry().is_file() && !host.entry().is_symlink());
    // One by one; the overlay of the other goes on.
    let summary = host.done("import", &["--vm", "vm1"], 1);
    assert_eq!(summary["skipped"], 1, "the config drive: {summary:#}");
    let base = host.daemon.mount().join(format!("bases/nova-{IMAGE}.raw"));
    assert_eq!(fs::read_link(host.entry()).unwrap(), base);
    let kept = host.dir.join("plyfs-bases").join(format!("{IMAGE}.raw"));
    assert_eq!(fs::metadata(&kept).unwrap().ino(), inode, "the image was not copied");
    assert_eq!(fs::read_link(host.disk("vm1")).unwrap(), host.daemon.disk("vm1_disk"));
    assert_eq!(host.info("vm1"), "raw");
    same(&fs::read(host.disk("vm1")).unwrap(), &one, "the disk of vm1");
    let found = fs::metadata(host.disk("vm1")).unwrap();
    assert_eq!((found.uid(), found.gid()), (NOVA, NOVA + 1));
    let shown = host.daemon.json(&["disk", "show", "vm1_disk"]);
    assert!(shown["delta_bytes"].as_u64().unwrap() < MIB as u64, "{shown:#}");
    same(&host.shows(&host.disk("vm2")), &two, "the overlay of vm2 on the link");
    same(&host.shows(&host.dir.join("vm1/disk.before-plyfs")), &one, "what was before");
    // Nova sets the time of the image, which does not reach the file.
    run(Command::new("touch").arg("-c").arg(host.entry()));
    host.daemon.restart();
    assert_eq!(host.daemon.json(&["base", "show", &format!("nova-{IMAGE}")])["state"], "ok");
    // Again: what is done is left.
    let (ok, summary) = host.run("import", &["--remove"]);
    assert!(ok && summary["present"] == 1 && summary["done"] == 1, "{summary:#}");
    assert!(
        !host.dir.join("vm1/disk.before-plyfs").exists() && !host.dir.join("vm2/disk.before-plyfs").exists()
    );
    same(&fs::read(host.disk("vm2")).unwrap(), &two, "the disk of vm2");

    // A guest goes on writing, and then back.
    let mut changed = one.clone();
    changed[2 * MIB..2 * MIB + 8192].fill(0x33);
    std::os::unix::fs::FileExt::write_all_at(
        &File::options().write(true).open(host.disk("vm1")).unwrap(),
        &[0x33; 8192],
        2 * MIB as u64,
    )
    .unwrap();
    host.done("export", &["--dry-run"], 2);
    assert!(host.disk("vm1").is_symlink());
    host.done("export", &["--vm", "vm1"], 1);
    assert!(!host.disk("vm1").is_symlink());
    assert_eq!(host.info("vm1"), "qcow2");
    same(&host.shows(&host.disk("vm1")), &changed, "the file of vm1");
    let found = fs::metadata(host.disk("vm1")).unwrap();
    assert_eq!((found.uid(), found.gid()), (NOVA, NOVA + 1));
    assert!(found.blocks() * 512 < MIB as u64, "it has what differs from the image");
    host.daemon.ok(&["disk", "rm", "vm1_disk"]);
    // A reader of the base that has ended may count for a moment.
    until("all is back", || {
        host.run("export", &["--remove"]);
        (host.daemon.json(&["base", "ls"]) == json!([])).then_some(())
    });
    assert_eq!(host.daemon.json(&["disk", "ls"]), json!([]));
    assert_eq!(fs::symlink_metadata(host.entry()).unwrap().ino(), inode, "the image is back in the cache");
    same(&host.shows(&host.disk("vm1")), &changed, "the file of vm1 on the image");
    same(&host.shows(&host.disk("vm2")), &two, "the file of vm2 on the image");
    assert_eq!(host.info("vm2"), "qcow2");
}

/// Guards D111.
#[test]
fn an_instance_that_runs_is_left_and_an_interrupted_takeover_goes_on() {
    let host = Host::new();
    let one = host.vm("vm1", 0x11);
    let two = host.vm("vm2", 0x22);
    let mut qemu = holder(&host.disk("vm1"));
    let (ok, summary) = host.run("import", &[]);
    assert!(!ok && summary["running"] == 1 && summary["done"] == 1, "{summary:#}");
    assert!(!host.disk("vm1").is_symlink());
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    // A command that was killed while it copied, and one that was killed before the file was replaced.
    host.daemon.ok(&["disk", "create", "vm1_disk.part", "--size", "6M"]);
    host.done("import", &[], 1);
    same(&fs::read(host.disk("vm1")).unwrap(), &one, "vm1");
    let before = host.dir.join("vm2/disk.before-plyfs");
    fs::rename(&before, host.disk("vm2")).unwrap();
    fs::write(
        host.dir.join("vm2/disk.info"),
        json!({host.disk("vm2").to_str().unwrap(): "qcow2"}).to_string(),
    )
    .unwrap();
    host.done("import", &[], 1);
    assert_eq!(
        (fs::read_link(host.disk("vm2")).unwrap(), host.info("vm2")),
        (host.daemon.disk("vm2_disk"), "raw".into())
    );
    // The guest went on with the file: the disk is out of date, and nothing is lost.
    fs::rename(&before, host.disk("vm2")).unwrap();
    run(Command::new("qemu-io").args(["-f", "qcow2", "-c", "write -q -P 9 0 512"]).arg(host.disk("vm2")));
    let (ok, summary) = host.run("import", &[]);
    assert!(!ok && summary["failed"] == 1, "{summary:#}");
    assert!(summary.to_string().contains("plyfs disk rm vm2_disk"), "{summary:#}");
    host.daemon.ok(&["disk", "rm", "vm2_disk"]);
    host.done("import", &[], 1);
    let mut newer = two;
    newer[..512].fill(9);
    same(&fs::read(host.disk("vm2")).unwrap(), &newer, "vm2");
    // A disk that is open is not given back.
    let mut qemu = holder(&host.disk("vm1"));
    let (ok, summary) = host.run("export", &[]);
    assert!(!ok && summary["running"] == 1 && summary["done"] == 1, "{summary:#}");
    assert!(host.disk("vm1").is_symlink());
    qemu.kill().unwrap();
    qemu.wait().unwrap();
    host.done("export", &["--vm", "vm1"], 1);
    same(&host.shows(&host.disk("vm1")), &one, "vm1");
}

#[test]
fn a_disk_that_stands_on_a_file_elsewhere_is_left() {
    let host = Host::new();
    host.vm("vm1", 0x11);
    let secret = host.daemon.path("secret.raw");
    fs::write(&secret, vec![1; 6 * MIB]).unwrap();
    for backing in [secret.to_str().unwrap(), "../../secret.raw", "json:{\"driver\":\"raw\"}"] {
        let mut rebase = Command::new("qemu-img");
        rebase.args(["rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", backing]).arg(host.disk("vm1"));
        assert!(rebase.output().unwrap().status.success());
        let (ok, summary) = host.run("import", &[]);
        assert!(!ok && summary["failed"] == 1, "{backing}: {summary:#}");
        assert!(summary.to_string().contains("is not in _base"), "{summary:#}");
    }
    assert!(!host.disk("vm1").is_symlink());
    assert_eq!(host.daemon.json(&["base", "ls"]), json!([]));
    assert!(host.daemon.fails(&["import", "nova", "/nonexistent"]).contains("check the path"));
    let dir = host.dir.to_str().unwrap();
    assert!(host.daemon.fails(&["import", "nova", dir, "--vm", "vm9"]).contains("no instance"));
}
