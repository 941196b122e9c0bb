//! A daemon with its own store for each test. It ends with the test, even when the test fails.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde_json::Value;

pub const SECTOR: u64 = 512;

/// A running daemon and its store, in a temporary directory.
pub struct TestDaemon {
    pub dir: tempfile::TempDir,
    /// The path of the store, when it is not below `dir`.
    elsewhere: Option<PathBuf>,
    child: Option<Child>,
}

impl TestDaemon {
    pub fn on_disk() -> Self {
        Self::under("/var/tmp")
    }

    pub fn in_memory() -> Self {
        Self::under("/dev/shm")
    }

    fn under(parent: &str) -> Self {
        let mut daemon = Self::unstarted(parent);
        daemon.start();
        daemon
    }

    /// No daemon runs, and the store does not exist yet.
    pub fn unstarted(parent: &str) -> Self {
        let dir = tempfile::Builder::new().prefix("plyfs-test-").tempdir_in(parent).unwrap();
        Self { dir, elsewhere: None, child: None }
    }

    /// Not started; the store is at this path, on a filesystem of its own. The log and all else are where there is space.
    pub fn with_store_at(store: PathBuf) -> Self {
        let mut daemon = Self::unstarted("/var/tmp");
        daemon.elsewhere = Some(store);
        daemon
    }

    pub fn store(&self) -> PathBuf {
        self.elsewhere.clone().unwrap_or_else(|| self.dir.path().join("store"))
    }

    pub fn mount(&self) -> PathBuf {
        self.store().join("mnt")
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn disks(&self) -> PathBuf {
        self.mount().join("disks")
    }

    pub fn disk(&self, name: &str) -> PathBuf {
        self.disks().join(format!("{name}.raw"))
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_plyfs"));
        command.env("PLYFS_STORE", self.store()).stdin(Stdio::null());
        command
    }

    pub fn start(&mut self) {
        self.try_start(&[]).unwrap_or_else(|why| panic!("serve: {why}"));
    }

    /// Starts the daemon. The error is its log, when it ends before it is ready.
    pub fn try_start(&mut self, args: &[&str]) -> Result<(), String> {
        let mut command = self.command();
        command.args(["serve", "--cache-memory", "64M"]).args(args);
        self.try_start_command(command)
    }

    /// Starts the daemon under another program, which execs it or ends with it.
    pub fn start_under(&mut self, mut wrapper: Command) {
        wrapper.arg(env!("CARGO_BIN_EXE_plyfs")).args(["serve", "--cache-memory", "64M"]);
        wrapper.env("PLYFS_STORE", self.store()).stdin(Stdio::null());
        self.start_command(wrapper);
    }

    pub fn start_command(&mut self, command: Command) {
        self.try_start_command(command).unwrap_or_else(|why| panic!("serve: {why}"));
    }

    pub fn try_start_command(&mut self, mut command: Command) -> Result<(), String> {
        assert!(self.child.is_none());
        let log = OpenOptions::new().append(true).create(true).open(self.path("log")).unwrap();
        let from = log.metadata().unwrap().len() as usize;
        let mut child = command.stdout(Stdio::piped()).stderr(log).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        if line.starts_with("plyfs ready ") {
            self.child = Some(child);
            return Ok(());
        }
        let status = child.wait().unwrap();
        let log = fs::read(self.path("log")).unwrap();
        Err(format!("{status}: {}", String::from_utf8_lossy(&log[from..])))
    }

    /// Kills the supervisor with SIGKILL; the worker dies with it.
    pub fn kill_supervisor(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// The status, as soon as the daemon answers.
    pub fn status(&self) -> Value {
        until("a status", || serde_json::from_slice(&self.cli(&["--json", "status"]).stdout).ok())
    }

    /// The process ids of the worker and of the prepared standby worker.
    pub fn prepared(&self) -> (i32, i32) {
        until("a prepared standby worker", || {
            let status = self.status();
            let pid = |value: &Value| value.as_i64().map(|pid| pid as i32);
            let standby = pid(&status["standby"]["pid"]).filter(|_| status["standby"]["prepared"] == true);
            Some((pid(&status["worker_pid"])?, standby?))
        })
    }

    /// The arena of live maps, as the store's record names it.
    pub fn arena(&self) -> Option<PathBuf> {
        let record = fs::read(self.store().join("live")).ok()?;
        // Envelope, four numbers, and the path behind its length.
        let path = &record[40 + 32 + 2..record.len() - 4];
        Some(PathBuf::from(std::str::from_utf8(path).unwrap())).filter(|path| path.exists())
    }

    /// The directory of the live maps.
    pub fn live_dir(&self) -> Option<PathBuf> {
        self.arena().and_then(|arena| Some(arena.parent()?.to_owned()))
    }

    /// The directory in which a version without an arena keeps a file for each disk.
    pub fn former_live_dir(&self) -> PathBuf {
        let meta = fs::metadata(self.store()).unwrap();
        let superblock = fs::read(self.store().join("plyfs.store")).unwrap();
        let uuid: String = superblock[40..44].iter().map(|b| format!("{b:02x}")).collect();
        PathBuf::from(format!("/dev/shm/plyfs-{uuid}-{}-{}", meta.dev(), meta.ino()))
    }

    /// The files of live maps. A clean stop leaves none.
    pub fn live_maps(&self) -> Vec<PathBuf> {
        let former = self.store().join("plyfs.store").exists().then(|| self.former_live_dir());
        let of_dir =
            |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().map(|entry| entry.unwrap().path());
        self.arena().into_iter().chain(former.into_iter().flat_map(of_dir)).collect()
    }

    pub fn cli(&self, args: &[&str]) -> Output {
        self.command().args(args).output().unwrap()
    }

    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.cli(args);
        let said = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
        assert!(output.status.success(), "plyfs {args:?}: {}", String::from_utf8_lossy(&said));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The only line on stderr of a command that must fail: with status 1, or 2 for an invalid argument.
    pub fn fails(&self, args: &[&str]) -> String {
        let output = self.cli(args);
        assert!(matches!(output.status.code(), Some(1 | 2)), "plyfs {args:?}: {output:?}");
        assert_eq!(output.stderr.iter().filter(|b| **b == b'\n').count(), 1, "plyfs {args:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    pub fn json(&self, args: &[&str]) -> Value {
        let mut all = vec!["--json"];
        all.extend(args);
        serde_json::from_str(&self.ok(&all)).unwrap()
    }

    /// Registers base `b` of `size` random bytes.
    pub fn base(&self, size: usize) -> Vec<u8> {
        let data = Random(7).bytes(size);
        fs::write(self.path("b.img"), &data).unwrap();
        self.ok(&["base", "add", "b", self.path("b.img").to_str().unwrap()]);
        data
    }

    pub fn create(&self, name: &str, base: bool, size: u64) -> PathBuf {
        let size = size.to_string();
        let mut args = vec!["disk", "create", name, "--size", &size];
        if base {
            args.extend(["--base", "b"]);
        }
        self.ok(&args);
        self.disk(name)
    }

    /// Also under files that the test has open.
    pub fn stop(&mut self) {
        self.ok(&["stop", "--force"]);
        self.ended();
    }

    /// Waits for the end of a daemon that was told to stop; it must succeed.
    pub fn ended(&mut self) {
        let status = self.child.take().unwrap().wait().unwrap();
        assert!(status.success(), "the daemon ended with {status}");
    }

    /// Waits for the end of a daemon that was told to stop. Returns its exit status.
    pub fn exit_code(&mut self) -> Option<i32> {
        self.child.take().unwrap().wait().unwrap().code()
    }

    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    pub fn supervisor(&self) -> i32 {
        i32::try_from(self.child.as_ref().unwrap().id()).unwrap()
    }

    pub fn worker(&self) -> i32 {
        i32::try_from(self.json(&["status"])["worker_pid"].as_i64().unwrap()).unwrap()
    }

    /// Kills the worker, and waits until another worker serves.
    pub fn kill_worker(&self) {
        let killer = Killer::new(self);
        killer.kill();
        let until = Instant::now() + Duration::from_secs(20);
        while Instant::now() < until {
            let output = self.cli(&["--json", "status"]);
            if let Ok(value) = serde_json::from_slice::<Value>(&output.stdout)
                && value["worker_pid"]
                    .as_i64()
                    .is_some_and(|pid| pid > 0 && pid != killer.last.load(Ordering::Relaxed) as i64)
            {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("no worker within 20 s");
    }

    /// Kills the supervisor and the worker with SIGKILL.
    pub fn kill_everything(&mut self) {
        let worker = self.worker();
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        kill(worker);
        child.wait().unwrap();
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

impl Drop for TestDaemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let worker = self.cli(&["--json", "status"]).stdout;
            let worker = serde_json::from_slice::<Value>(&worker).ok().and_then(|v| v["worker_pid"].as_i64());
            if std::thread::panicking() {
                eprintln!("--- log of the daemon\n{}", self.log());
            }
            let _ = child.kill();
            if let Some(worker) = worker {
                kill(worker as i32);
            }
            let _ = child.wait();
        }
        let _ = Command::new("umount").arg("-l").arg(self.mount()).stderr(Stdio::null()).status();
        if let Some(dir) = self.live_dir() {
            let _ = Command::new("umount").arg("-l").arg(&dir).stderr(Stdio::null()).status();
            let ours =
                dir.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("plyfs-"));
            let _ = if ours { fs::remove_dir_all(&dir) } else { fs::remove_dir(&dir) };
        }
        if self.store().join("plyfs.store").exists() {
            let _ = fs::remove_dir_all(self.former_live_dir());
        }
    }
}

fn kill(pid: i32) {
    signal(pid, libc::SIGKILL);
}

pub fn signal(pid: i32, signal: i32) {
    // SAFETY: no memory is involved.
    unsafe { libc::kill(pid, signal) };
}

/// Calls `ask` every few milliseconds until it returns a value. Fails after a minute.
#[track_caller]
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(found) = ask() {
            return found;
        }
        assert!(Instant::now() < end, "no {what} within a minute");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The children of a process, including zombies.
pub fn children(pid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

/// Kills the workers of one daemon. Finds them as children of the supervisor, because the control socket needs a worker.
pub struct Killer {
    supervisor: u64,
    last: AtomicU64,
    pub kills: AtomicU64,
}

impl Killer {
    pub fn new(daemon: &TestDaemon) -> Self {
        let supervisor = u64::from(daemon.child.as_ref().unwrap().id());
        Self { supervisor, last: AtomicU64::new(0), kills: AtomicU64::new(0) }
    }

    pub fn kill(&self) {
        let children = format!("/proc/{0}/task/{0}/children", self.supervisor);
        let children = fs::read_to_string(children).unwrap();
        for pid in children.split_whitespace() {
            self.last.store(pid.parse().unwrap(), Ordering::Relaxed);
            self.kills.fetch_add(1, Ordering::Relaxed);
            kill(pid.parse().unwrap());
        }
    }
}

/// Kills the worker again and again, until dropped.
pub struct Storm {
    end: Arc<AtomicBool>,
    killer: Arc<Killer>,
    thread: Option<JoinHandle<()>>,
}

impl Storm {
    /// Kills at random intervals of 2 ms to 1 s, short and long ones equally often. Not all are short, because the
    /// supervisor makes ever longer pauses between workers that all die soon.
    pub fn at_random(daemon: &TestDaemon, seed: u64) -> Self {
        let mut random = Random(seed);
        let wait = move || {
            let shortest = Duration::from_millis(2 << random.below(9));
            shortest + shortest * random.below(1000) as u32 / 1000
        };
        Self::with(daemon, wait, u64::MAX)
    }

    pub fn new(daemon: &TestDaemon, period: Duration, most: u64) -> Self {
        Self::with(daemon, move || period, most)
    }

    fn with(daemon: &TestDaemon, mut wait: impl FnMut() -> Duration + Send + 'static, most: u64) -> Self {
        let end = Arc::new(AtomicBool::new(false));
        let killer = Arc::new(Killer::new(daemon));
        let (seen, kills) = (Arc::clone(&end), Arc::clone(&killer));
        let thread = std::thread::spawn(move || {
            while !seen.load(Ordering::Relaxed) && kills.kills.load(Ordering::Relaxed) < most {
                std::thread::sleep(wait());
                kills.kill();
            }
        });
        Self { end, killer, thread: Some(thread) }
    }

    /// The number of kills so far.
    pub fn kills(&self) -> u64 {
        self.killer.kills.load(Ordering::Relaxed)
    }

    /// Stops, and returns the number of kills.
    pub fn stop(mut self) -> u64 {
        self.end.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.kills()
    }
}

impl Drop for Storm {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
    }
}

/// The path of a program. `None`, with a line SKIP, when it is missing; in CI a missing program is a failure.
pub fn tool(name: &str) -> Option<PathBuf> {
    let home = std::env::var("HOME").unwrap_or_default();
    let path = format!("{}:{home}/.cargo/bin:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let found = path.split(':').map(|dir| Path::new(dir).join(name)).find(|path| path.is_file());
    if found.is_none() {
        assert!(std::env::var_os("CI").is_none(), "{name} is missing");
        println!("SKIP: {name} is missing");
    }
    found
}

/// Whether the kernel offers what a test is about, as the daemon finds it; a line SKIP when not.
pub fn needs(promise: &str) -> bool {
    static MISSING: OnceLock<Vec<String>> = OnceLock::new();
    let missing = MISSING.get_or_init(|| {
        let kernel = TestDaemon::in_memory().status()["kernel"].clone();
        let names = kernel["missing"].as_array().unwrap().iter();
        names.map(|missing| missing["promise"].as_str().unwrap().to_owned()).collect()
    });
    let lacks = missing.iter().any(|name| name == promise);
    if lacks {
        let test = std::thread::current();
        println!("SKIP: {}: the kernel lacks {promise}", test.name().unwrap_or("a test"));
    }
    !lacks
}

pub fn run(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let tail =
        text.lines().rev().take(60).collect::<Vec<_>>().into_iter().rev().collect::<Vec<_>>().join("\n");
    assert!(output.status.success(), "{command:?}: {}\n{tail}", output.status);
    text
}

pub fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

pub fn read_at(file: &File, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; len];
    file.read_exact_at(&mut bytes, at).unwrap();
    bytes
}

/// Compares bytes. The panic message has only the first byte that differs, because a whole disk would be unreadable.
#[track_caller]
pub fn same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("{what}: byte {at:#x} is {:#x}, not {:#x}", found[at], expected[at]);
    }
}

pub fn errno<T>(result: std::io::Result<T>) -> i32 {
    result.err().expect("an error").raw_os_error().unwrap()
}

/// xorshift64*: the same seed gives the same numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end
    }

    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend(self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

pub fn fallocate(file: &File, mode: i32, at: u64, len: u64) -> std::io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open, no memory is involved.
    let result = unsafe { libc::fallocate(file.as_raw_fd(), mode, at as i64, len as i64) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

pub const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
pub const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE;
