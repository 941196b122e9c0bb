//! The rights of a worker, the access of other users to disks, and the core dump of a crash.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::harness::{PUNCH, Random, TestDaemon, ZERO, fallocate, needs, open, run, same, tool};

const NOBODY: u32 = 65534;

/// A command that runs as user nobody, without groups.
fn as_nobody(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.uid(NOBODY).gid(NOBODY).stdin(Stdio::null());
    command
}

/// Whether a command succeeds as user nobody. If it fails, it must fail for lack of permission.
#[track_caller]
fn nobody_may(program: &str, args: &[&Path]) -> bool {
    let output = as_nobody(program).args(args).env("LC_ALL", "C").output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    let refused = text.contains("Permission denied") || text.contains("Operation not permitted");
    assert!(output.status.success() || refused, "{program} {args:?}: {text}");
    output.status.success()
}

fn status_of(pid: i64, task: &str) -> impl Fn(&str) -> String + use<> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{task}/status")).unwrap();
    move |key| {
        let line = text.lines().find_map(|line| line.strip_prefix(key));
        line.unwrap_or_else(|| panic!("no {key}")).trim_start_matches(':').trim().to_owned()
    }
}

/// Asserts that every thread of a process has at most these capabilities, and has a seccomp filter.
#[track_caller]
fn every_thread_is_confined(pid: i64, capabilities: u64) {
    let tasks: Vec<_> = fs::read_dir(format!("/proc/{pid}/task")).unwrap().collect();
    assert!(!tasks.is_empty(), "{pid}");
    for task in tasks {
        let status = status_of(pid, task.unwrap().file_name().to_str().unwrap());
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            let found = u64::from_str_radix(&status(set), 16).unwrap();
            assert_eq!(found & !capabilities, 0, "{set} of {}: {found:x}", status("Name"));
        }
        assert_eq!(
            (status("NoNewPrivs").as_str(), status("Seccomp").as_str()),
            ("1", "2"),
            "{}",
            status("Name")
        );
    }
}

fn children(pid: i64) -> Vec<i64> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// The text of `status` for landlock when it is on. Signals and abstract sockets came with Linux 6.12.
fn landlock() -> &'static str {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|number| number.trim().parse::<u32>().ok());
    let new = (numbers.next(), numbers.next()) >= (Some(6), Some(12));
    if new { "full" } else { "partial (the kernel knows an older version)" }
}

const IPC_LOCK: u64 = 1 << 14;
const DAC_READ_SEARCH: u64 = 1 << 2;

fn looks_confined(daemon: &TestDaemon) {
    let status = daemon.json(&["status"]);
    let confinement = &status["confinement"];
    assert_eq!(confinement["landlock"], landlock(), "{confinement}");
    assert_eq!(confinement["seccomp"], "on", "{confinement}");
    assert_eq!(confinement["core_dumps"], "off", "{confinement}");
    let locked = confinement["memory_locked"].as_bool().unwrap();
    let expected = if locked { vec!["ipc_lock"] } else { vec![] };
    assert_eq!(confinement["capabilities"], serde_json::json!(expected), "{confinement}");

    let worker = status["worker_pid"].as_i64().unwrap();
    every_thread_is_confined(worker, if locked { IPC_LOCK } else { 0 });
    let openers = children(worker);
    assert_eq!(openers.len(), 1, "{openers:?}");
    every_thread_is_confined(openers[0], DAC_READ_SEARCH);
    // The opener has no descriptor of the mount, the store or the control socket: only a socket per thread, and 0 to 2.
    for entry in fs::read_dir(format!("/proc/{}/fd", openers[0])).unwrap() {
        let entry = entry.unwrap();
        let number: u32 = entry.file_name().to_str().unwrap().parse().unwrap();
        let target = fs::read_link(entry.path()).unwrap();
        assert!(number < 3 || target.to_str().unwrap().starts_with("socket:"), "{number} is {target:?}");
    }
}

/// Guards D15.
#[test]
fn every_worker_is_confined_and_the_status_shows_it() {
    let daemon = TestDaemon::on_disk();
    looks_confined(&daemon);
    let text = daemon.ok(&["status"]);
    assert!(text.contains(&format!("landlock {}, seccomp on, core dumps off", landlock())), "{text}");
    daemon.kill_worker();
    looks_confined(&daemon);
}

#[test]
fn confinement_can_be_switched_off() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let config = daemon.path("c.toml");
    fs::write(&config, "[security]\ncapabilities = false\nlandlock = false\nseccomp = \"off\"\n").unwrap();
    daemon.try_start(&["--config", config.to_str().unwrap()]).unwrap();
    let confinement = daemon.json(&["status"])["confinement"].clone();
    assert_eq!(confinement["landlock"], "off (configuration)");
    assert_eq!(confinement["seccomp"], "off (configuration)");
    assert!(confinement["capabilities"].as_array().unwrap().len() > 5, "{confinement}");
    assert_eq!(
        children(i64::from(daemon.worker())),
        [] as [i64; 0],
        "there is no opener without confinement"
    );
    daemon.base(1 << 20);
    daemon.stop();
}

#[test]
fn bases_outside_of_their_directories_are_refused() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let (config, inside) = (daemon.path("c.toml"), daemon.path("images"));
    fs::create_dir(&inside).unwrap();
    fs::write(&config, format!("[security]\nbase_dirs = [{inside:?}]\n")).unwrap();
    for image in ["images/in.img", "out.img"] {
        fs::write(daemon.path(image), [1; 4096]).unwrap();
    }
    daemon.try_start(&["--config", config.to_str().unwrap()]).unwrap();
    daemon.ok(&["base", "add", "in", daemon.path("images/in.img").to_str().unwrap()]);
    let why = daemon.fails(&["base", "add", "out", daemon.path("out.img").to_str().unwrap()]);
    assert!(why.contains("outside the directories for bases") && why.contains("base_dirs"), "{why}");
    // The images that the store itself makes lie in none of the directories.
    daemon.ok(&["disk", "create", "d", "--base", "in"]);
    open(&daemon.disk("d")).write_all_at(&[2; 512], 512).unwrap();
    daemon.ok(&["disk", "commit", "d", "golden"]);
    daemon.ok(&["disk", "create", "on-golden", "--base", "golden"]);
    let mut wanted = [1; 4096];
    wanted[512..1024].fill(2);
    same(&fs::read(daemon.disk("on-golden")).unwrap(), &wanted, "a disk on the new base");
}

/// Typical work of a worker under strace: it makes no system call that is on no list.
#[test]
fn nothing_a_worker_does_is_refused() {
    let Some(strace) = tool("strace") else { return };
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let trace = daemon.path("trace");
    let mut wrapper = Command::new(strace);
    wrapper.args(["-f", "-qq", "-Z", "-o"]).arg(&trace);
    daemon.start_under(wrapper);
    let data = daemon.base(4 << 20);
    let path = daemon.create("a", true, 16 << 20);
    let file = open(&path);
    let mut bytes = vec![0; data.len()];
    file.read_exact_at(&mut bytes, 0).unwrap();
    same(&bytes, &data, "the base");
    file.write_all_at(&[7; 100_000], 12_345).unwrap();
    fallocate(&file, PUNCH, 1 << 20, 1 << 20).unwrap();
    fallocate(&file, ZERO, 3 << 20, 4096).unwrap();
    fallocate(&file, 0, 8 << 20, 4096).unwrap();
    file.sync_all().unwrap();
    file.set_len(12 << 20).unwrap();
    fs::rename(&path, daemon.disk("b")).unwrap();
    end(&daemon, libc::SIGKILL);
    file.write_all_at(&[8; 5000], 40_000).unwrap();
    file.sync_all().unwrap();
    chown(daemon.disk("b"), Some(NOBODY), None).unwrap();
    daemon.ok(&["disk", "resize", "b", "20M"]);
    daemon.ok(&["disk", "ls"]);
    File::create(daemon.disk("c")).unwrap().write_all(b"new").unwrap();
    drop(file);
    fs::remove_file(daemon.disk("c")).unwrap();
    daemon.ok(&["disk", "rm", "b"]);
    daemon.ok(&["base", "rm", "b"]);
    daemon.stop();
    let trace = fs::read_to_string(&trace).unwrap();
    assert!(trace.contains("clone3"), "the trace must contain failed calls: clone3 is refused on purpose");
    let refused: Vec<_> = trace
        .lines()
        .filter(|line| line.contains("ENOSYS") && !line.contains("clone3") || line.contains(" EACCES "))
        .collect();
    assert_eq!(refused, [] as [&str; 0]);
}

/// A missing kernel feature is logged once and shown in `status`, and has no other effect.
/// Guards D16.
#[test]
fn without_landlock_and_seccomp_in_the_kernel_the_daemon_works_and_reports_it() {
    let Some(strace) = tool("strace") else { return };
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let mut wrapper = Command::new(strace);
    wrapper.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=landlock_create_ruleset,seccomp"]);
    wrapper.args(["-e", "inject=landlock_create_ruleset,seccomp:error=ENOSYS"]);
    daemon.start_under(wrapper);
    let data = daemon.base(1 << 20);
    let path = daemon.create("a", true, 1 << 20);
    for _ in 0..2 {
        same(&fs::read(&path).unwrap(), &data, "the base");
        let confinement = daemon.json(&["status"])["confinement"].clone();
        for key in ["landlock", "seccomp"] {
            let text = confinement[key].as_str().unwrap();
            assert!(text.starts_with("off (") && text != "off (configuration)", "{confinement}");
        }
        end(&daemon, libc::SIGKILL);
    }
    let log = daemon.log();
    assert_eq!(log.matches("more rights than it needs").count(), 2, "once each, by the first worker: {log}");
}

/// The worker dies with its opener, and the next worker takes over.
#[test]
fn the_death_of_the_opener_costs_clients_only_a_pause() {
    if !needs("resend") {
        return;
    }
    let daemon = TestDaemon::on_disk();
    let data = daemon.base(1 << 20);
    let path = daemon.create("a", true, 1 << 20);
    daemon.kill_worker();
    let worker = i64::from(daemon.worker());
    // SAFETY: no memory is involved.
    children(worker).iter().for_each(|pid| assert_eq!(unsafe { libc::kill(*pid as i32, libc::SIGKILL) }, 0));
    same(&fs::read(&path).unwrap(), &data, "the base");
    assert_ne!(i64::from(daemon.worker()), worker);
    assert!(daemon.log().contains("the opener is gone"), "{}", daemon.log());
}

/// Sends the worker a signal, and waits for the next worker. The worker may be any descendant of the started process.
fn end(daemon: &TestDaemon, signal: i32) {
    let worker = daemon.worker();
    let until = Instant::now() + Duration::from_secs(60);
    // Rust's runtime ignores the first SIGSEGV that no fault caused; the second one kills.
    // SAFETY: no memory is involved.
    while unsafe { libc::kill(worker, signal) } == 0 {
        assert!(Instant::now() < until, "the worker does not die");
        std::thread::sleep(Duration::from_millis(10));
    }
    while daemon.cli(&["--json", "status"]).stdout.is_empty() || daemon.worker() == worker {
        assert!(Instant::now() < until, "no worker within 60 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn cores(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    entries.filter(|path| path.file_name().unwrap().to_str().unwrap().contains("core")).collect()
}

fn contains(path: &Path, marker: &[u8]) -> bool {
    let mut bytes = Vec::new();
    File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes.windows(marker.len()).any(|window| window == marker)
}

#[test]
fn a_crashed_worker_leaves_no_guest_data_behind() {
    let pattern = fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
    // The test finds a core file only when the pattern is a name without a directory.
    let here = !pattern.starts_with('|') && !pattern.contains('/') && pattern.contains("core");
    let marker: Vec<u8> = Random(99).bytes(64);
    for allowed in [true, false] {
        if allowed && !here {
            println!("SKIP: core files go to {pattern}, where the test cannot read them");
            continue;
        }
        let mut daemon = TestDaemon::unstarted("/var/tmp");
        let cwd = daemon.path("cwd");
        fs::create_dir(&cwd).unwrap();
        let config = daemon.path("c.toml");
        fs::write(&config, format!("[security]\ncore_dumps = {allowed}\n[cache]\nmemory = \"8M\"\n"))
            .unwrap();
        let mut wrapper = Command::new("sh");
        wrapper
            .args(["-c", "ulimit -c unlimited && exec \"$@\" --config \"$0\""])
            .arg(&config)
            .current_dir(&cwd);
        daemon.start_under(wrapper);
        fs::write(daemon.path("m.img"), marker.repeat((1 << 20) / marker.len())).unwrap();
        daemon.ok(&["base", "add", "m", daemon.path("m.img").to_str().unwrap()]);
        daemon.ok(&["disk", "create", "a", "--base", "m"]);
        let mut bytes = [0; 4096];
        open(&daemon.disk("a")).read_exact_at(&mut bytes, 0).unwrap();
        same(&bytes[..64], &marker, "the data is in the worker's cache");
        end(&daemon, libc::SIGSEGV);
        // In the directory where the worker was started, or where it may write.
        let found = [cores(&cwd), cores(&daemon.store())].concat();
        if allowed {
            assert!(
                found.iter().any(|core| contains(core, &marker)),
                "with core dumps the data is in one: {found:?}"
            );
        } else {
            assert_eq!(found, [] as [PathBuf; 0]);
            let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.worker())).unwrap();
            let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
            assert_eq!(core.split_whitespace().nth(4), Some("0"), "{core}");
        }
    }
}

#[test]
fn another_user_can_access_only_the_disks_that_were_given_to_it() {
    let daemon = TestDaemon::on_disk();
    fs::set_permissions(daemon.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    daemon.base(1 << 20);
    let (mine, theirs) = (daemon.create("mine", true, 1 << 20), daemon.create("theirs", true, 1 << 20));
    chown(&theirs, Some(NOBODY), None).unwrap();
    assert_eq!(fs::metadata(&mine).unwrap().mode() & 0o7777, 0o600);

    assert!(nobody_may("cat", &[&theirs]), "its own disk, by its path, as QEMU opens it");
    assert!(!nobody_may("cat", &[&mine]), "a disk of mode 0600");
    assert!(!nobody_may("cat", &[&daemon.mount().join("bases/b.raw")]), "a base");
    for dir in [
        "store/mnt",
        "store/mnt/disks",
        "store/mnt/bases",
        "store",
        "store/disks",
        "store/deltas",
        "store/bases",
    ] {
        assert!(!nobody_may("ls", &[&daemon.path(dir)]), "names in {dir}");
    }
    assert!(!nobody_may("ls", &[&daemon.live_dir().unwrap()]), "live maps");
    assert!(!nobody_may("cat", &[&daemon.arena().unwrap()]), "live maps");
    // The user may make no other changes, either.
    assert!(!nobody_may("rm", &[Path::new("-f"), &mine]));
    assert!(!nobody_may("touch", &[&daemon.disk("new")]));
    assert!(!nobody_may("chmod", &[Path::new("0666"), &mine]));
    fs::set_permissions(&mine, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(nobody_may("cat", &[&mine]), "a disk whose mode allows it");
}

#[test]
fn another_user_cannot_reach_the_control_socket() {
    let daemon = TestDaemon::on_disk();
    fs::set_permissions(daemon.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    assert!(UnixStream::connect(daemon.store().join("control.sock")).is_ok(), "the daemon's own user can");
    let binary = public_binary(&daemon);
    let output =
        as_nobody(&binary).args(["--store", daemon.store().to_str().unwrap(), "status"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("ermission denied") && text.contains("sudo"), "{text}");
}

/// The user's own store is not where root's daemon is.
#[test]
fn a_command_of_another_user_says_that_the_daemon_is_roots() {
    let daemon = TestDaemon::on_disk();
    fs::set_permissions(daemon.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let binary = public_binary(&daemon);
    // A user who runs no daemon in another test.
    let mut command = Command::new(&binary);
    command.uid(NOBODY - 1).gid(NOBODY - 1).env("HOME", "/nonexistent").env_remove("XDG_DATA_HOME");
    let output = command.arg("status").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("by root; run the command as root, such as with sudo"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

/// The socket has mode 0600 from its creation, whatever the umask.
#[test]
fn the_control_socket_is_never_accessible_to_other_users() {
    let Some(strace) = tool("strace") else { return };
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let (trace, socket) = (daemon.path("trace"), daemon.store().join("control.sock"));
    // If the mode were set after the creation of the socket, this delay would expose it.
    let script = "umask 0; trace=$0; strace=$1; shift; exec \"$strace\" -f -qq -o \"$trace\" \
                  -e trace=chmod,fchmodat,fchmod \
                  -e inject=chmod,fchmodat,fchmod:delay_enter=1500000 \"$@\"";
    let mut wrapper = Command::new("sh");
    wrapper.args(["-c", script]).arg(&trace).arg(strace);
    let watcher = std::thread::spawn(move || {
        let until = Instant::now() + Duration::from_secs(60);
        while Instant::now() < until {
            if let Ok(meta) = fs::symlink_metadata(&socket) {
                return meta.mode() & 0o777;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("no socket");
    });
    daemon.start_under(wrapper);
    assert_eq!(watcher.join().unwrap(), 0o600);
}

/// A copy of the program that every user can run.
fn public_binary(daemon: &TestDaemon) -> PathBuf {
    let path = daemon.path("plyfs");
    // cp makes the copy. If this process wrote it, a child of another test could inherit the open file, and running the
    // copy would be ETXTBSY.
    run(Command::new("cp").arg(env!("CARGO_BIN_EXE_plyfs")).arg(&path));
    path
}

/// While this is held, every user may open /dev/fuse, as on most hosts. Only one per machine at a time.
struct OpenDevice {
    _lock: File,
    mode: u32,
}

const DEVICE: &str = "/dev/fuse";

impl OpenDevice {
    fn new() -> Self {
        let lock =
            OpenOptions::new().write(true).create(true).truncate(false).open("/var/tmp/plyfs-test-fuse.lock");
        let lock = lock.unwrap();
        // SAFETY: no memory is involved.
        assert_eq!(unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX) }, 0);
        let mode = fs::metadata(DEVICE).unwrap().mode() & 0o7777;
        fs::set_permissions(DEVICE, fs::Permissions::from_mode(mode | 0o666)).unwrap();
        Self { _lock: lock, mode }
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        let _ = fs::set_permissions(DEVICE, fs::Permissions::from_mode(self.mode));
    }
}

#[test]
fn an_unprivileged_user_can_run_the_daemon_and_all_commands() {
    if tool("fusermount3").is_none() {
        return;
    }
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    fs::set_permissions(daemon.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    chown(daemon.dir.path(), Some(NOBODY), Some(NOBODY)).unwrap();
    let binary = public_binary(&daemon);
    let store = daemon.store();
    let mut command = as_nobody(&binary);
    command
        .arg("--store")
        .arg(&store)
        .args(["serve", "--cache-memory", "64M"])
        .current_dir(daemon.dir.path());
    {
        let _device = OpenDevice::new();
        daemon.start_command(command);
    }
    let plyfs = |args: &[&str]| run(as_nobody(&binary).arg("--store").arg(&store).args(args));
    let json = |args: &[&str]| serde_json::from_str::<serde_json::Value>(&plyfs(args)).unwrap();
    // All access to the mount is as user nobody, because without allow_other even root has none.
    let shell = |script: &str, args: &[&Path]| run(as_nobody("sh").args(["-euc", script, "sh"]).args(args));

    let data = Random(3).bytes(4 << 20);
    fs::write(daemon.path("b.img"), &data).unwrap();
    plyfs(&["base", "add", "b", daemon.path("b.img").to_str().unwrap()]);
    plyfs(&["disk", "create", "a", "--base", "b", "--size", "8M"]);
    let disk = daemon.disk("a");
    let image = daemon.path("b.img");
    shell("cmp -n 4194304 \"$1\" \"$2\"", &[&disk, &image]);
    shell(
        "head -c 100000 \"$2\" | dd of=\"$1\" bs=1000 seek=5000 conv=notrunc,fsync status=none",
        &[&disk, &image],
    );

    let status = json(&["--json", "status"]);
    let confinement = &status["confinement"];
    assert_eq!(confinement["capabilities"], serde_json::json!([]), "{confinement}");
    assert_eq!(confinement["landlock"], landlock(), "{confinement}");
    assert_eq!(confinement["seccomp"], "on", "{confinement}");
    let worker = status["worker_pid"].as_i64().unwrap();
    assert_eq!(
        fs::metadata(format!("/proc/{worker}/environ")).unwrap().uid(),
        0,
        "no other process of that user may trace it"
    );
    let status_file = status_of(worker, &worker.to_string());
    assert!(status_file("Uid").starts_with(&NOBODY.to_string()));

    run(as_nobody("kill").args(["-KILL", &worker.to_string()]));
    let after =
        "cmp -n 4194304 \"$1\" \"$2\"; head -c 5100000 \"$1\" | tail -c 100000 | cmp -n 100000 - \"$2\"";
    shell(after, &[&disk, &image]);
    assert_eq!(json(&["--json", "status"])["worker_starts"], 2);

    plyfs(&["disk", "create", "blank", "--size", "1M"]);
    plyfs(&["disk", "resize", "blank", "2M"]);
    plyfs(&["disk", "rm", "blank"]);
    plyfs(&["stop"]);
    daemon.ended();
    assert!(plyfs(&["check"]).contains("0 finding(s)"));
    let log = daemon.log();
    let locked = confinement["memory_locked"].as_bool().unwrap();
    assert_eq!(log.matches("memory is not locked").count(), usize::from(!locked), "logged once: {log}");
}

/// The names and nice values of the threads of a process.
fn threads(pid: i64) -> Vec<(String, i64)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    // A thread may end meanwhile.
    let stat = |task: fs::DirEntry| fs::read_to_string(task.path().join("stat")).ok();
    let nice = |stat: String| {
        let (head, rest) = stat.rsplit_once(')').unwrap();
        let name = head.split_once('(').unwrap().1.to_owned();
        (name, rest.split_whitespace().nth(16).unwrap().parse().unwrap())
    };
    tasks.filter_map(|task| stat(task.unwrap())).map(nice).collect()
}

/// Whether a process of this one may set RLIMIT_NICE: it has CAP_SYS_RESOURCE.
fn may_raise_priorities() -> bool {
    const SYS_RESOURCE: u64 = 1 << 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    u64::from_str_radix(held.trim(), 16).unwrap() & SYS_RESOURCE != 0
}

/// Guards D100.
#[test]
fn commands_and_background_work_leave_the_processors_to_guests() {
    let daemon = TestDaemon::on_disk();
    daemon.create("a", false, 1 << 20);
    let pid = daemon.json(&["status"])["worker_pid"].as_i64().unwrap();
    let threads = threads(pid);
    let of = |begin: &str| -> Vec<i64> {
        threads.iter().filter(|(name, _)| name.starts_with(begin)).map(|(_, nice)| *nice).collect()
    };
    let ordinary = of("fuser-")[0];
    // Without the right to raise a priority again, all threads keep the same one.
    let background = if may_raise_priorities() { (ordinary + 5).min(19) } else { ordinary };
    assert!(of("fuser-").iter().chain(&of("io-")).all(|nice| *nice == ordinary), "{threads:?}");
    for name in ["control", "retention"] {
        assert_eq!(of(name), vec![background], "{name}: {threads:?}");
    }
    // The threads of commands have the name of the runtime that starts them.
    assert!(
        threads.iter().any(|(name, nice)| name.starts_with("tokio") && *nice == background),
        "{threads:?}"
    );
}
