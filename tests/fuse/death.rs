//! Death of the supervisor and the worker: what the next start finds, and a mount that a service manager keeps.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::harness::{Random, TestDaemon, needs, open, read_at, same, until};
use crate::process::Client;

const SIZE: u64 = 4 << 20;

#[test]
fn acknowledged_writes_survive_the_death_of_supervisor_and_worker() {
    let mut daemon = TestDaemon::on_disk();
    let base = daemon.base(1 << 20);
    let paths: Vec<PathBuf> = (0..3).map(|n| daemon.create(&format!("d{n}"), n == 0, SIZE)).collect();
    let mut models: Vec<Vec<u8>> = vec![vec![0; SIZE as usize]; 3];
    models[0][..base.len()].copy_from_slice(&base);
    let mut random = Random(11);
    for round in 0..4 {
        for (path, model) in paths.iter().zip(&mut models) {
            let file = open(path);
            for n in 0..40 {
                let len = 1 + random.below(30_000);
                let at = random.below(SIZE - len);
                let bytes = random.bytes(len as usize);
                file.write_all_at(&bytes, at).unwrap();
                model[at as usize..(at + len) as usize].copy_from_slice(&bytes);
                if n == 20 && round % 2 == 0 {
                    file.sync_all().unwrap();
                }
            }
        }
        if round % 2 == 0 {
            daemon.kill_supervisor()
        } else {
            daemon.kill_everything()
        }
        daemon.start();
        for (path, model) in paths.iter().zip(&models) {
            same(&read_at(&open(path), 0, SIZE as usize), model, "after the death");
        }
    }
}

#[test]
fn flushed_writes_survive_a_reset_of_the_host() {
    let mut daemon = TestDaemon::on_disk();
    daemon.base(1 << 20);
    let path = daemon.create("a", true, SIZE);
    let mut flushed = read_at(&open(&path), 0, SIZE as usize);
    let mut random = Random(12);
    for _ in 0..3 {
        let file = open(&path);
        for _ in 0..30 {
            let len = 1 + random.below(30_000);
            let at = random.below(SIZE - len);
            let bytes = random.bytes(len as usize);
            file.write_all_at(&bytes, at).unwrap();
            flushed[at as usize..(at + len) as usize].copy_from_slice(&bytes);
        }
        file.sync_all().unwrap();
        let mut written = flushed.clone();
        for _ in 0..30 {
            let at = random.below(SIZE / 4096) as usize * 4096;
            let bytes = random.bytes(4096);
            file.write_all_at(&bytes, at as u64).unwrap();
            written[at..at + 4096].copy_from_slice(&bytes);
        }
        drop(file);
        daemon.kill_everything();
        // A reset loses memory.
        fs::remove_file(daemon.arena().unwrap()).unwrap();
        daemon.start();
        let found = read_at(&open(&path), 0, SIZE as usize);
        for at in (0..SIZE as usize).step_by(4096) {
            let block = &found[at..at + 4096];
            let is_either = block == &flushed[at..at + 4096] || block == &written[at..at + 4096];
            assert!(is_either, "the block at {at:#x} has neither the flushed nor the written contents");
        }
        // From here on, compare with the contents that were found.
        flushed = found;
    }
}

/// A service manager that handles `NOTIFY_SOCKET` as systemd does: it keeps descriptors by name, and removes them on
/// request.
struct Manager {
    path: PathBuf,
    kept: Arc<Mutex<Vec<(String, OwnedFd)>>>,
    said: Arc<Mutex<Vec<String>>>,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Manager {
    fn new(daemon: &TestDaemon) -> Self {
        let path = daemon.path("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        let (kept, said) = (Arc::default(), Arc::default());
        let end = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (kept, said, end) = (Arc::clone(&kept), Arc::clone(&said), Arc::clone(&end));
            move || {
                while !end.load(Ordering::Relaxed) {
                    if let Ok((text, fds)) = receive(&socket) {
                        hear(&text, fds, &kept, &said);
                    }
                }
            }
        });
        Self { path, kept, said, end, thread: Some(thread) }
    }

    fn names(&self) -> Vec<String> {
        self.kept.lock().unwrap().iter().map(|(name, _)| name.clone()).collect()
    }

    fn has_said(&self, line: &str) -> bool {
        self.said.lock().unwrap().iter().any(|said| said == line)
    }

    /// The command with which the service manager starts `plyfs serve`.
    fn command(&self, daemon: &TestDaemon, args: &[&str]) -> Command {
        let kept = self.kept.lock().unwrap();
        let names: Vec<&str> = kept.iter().map(|(name, _)| name.as_str()).collect();
        let fds: Vec<RawFd> = kept.iter().map(|(_, fd)| fd.as_raw_fd()).collect();
        let mut command = Command::new("/bin/sh");
        command.arg("-c");
        if fds.is_empty() {
            command.arg("exec \"$0\" \"$@\"");
        } else {
            command.arg("LISTEN_PID=$$ exec \"$0\" \"$@\"");
            command.env("LISTEN_FDS", fds.len().to_string()).env("LISTEN_FDNAMES", names.join(":"));
        }
        command.arg(env!("CARGO_BIN_EXE_plyfs")).args(["serve", "--cache-memory", "64M"]).args(args);
        command.env("PLYFS_STORE", daemon.store()).env("NOTIFY_SOCKET", &self.path);
        // SAFETY: only system calls that are allowed between fork and exec; the kept descriptors are open until the
        // child runs, and numbers from 100 on are unused there.
        unsafe {
            command.pre_exec(move || {
                for (n, fd) in fds.iter().enumerate() {
                    if libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, 100 + n as i32) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                for n in 0..fds.len() as i32 {
                    if libc::dup2(100 + n, 3 + n) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        command
    }

    fn start(&self, daemon: &mut TestDaemon) {
        let command = self.command(daemon, &[]);
        daemon.start_command(command);
        until("READY=1", || self.has_said("READY=1").then_some(()));
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        let _ = self.thread.take().unwrap().join();
    }
}

fn hear(text: &str, fds: Vec<OwnedFd>, kept: &Mutex<Vec<(String, OwnedFd)>>, said: &Mutex<Vec<String>>) {
    let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored").to_owned();
    let mut kept = kept.lock().unwrap();
    if text.lines().any(|line| line == "FDSTORE=1") {
        // The newest comes first, as in systemd.
        kept.splice(0..0, fds.into_iter().map(|fd| (name.clone(), fd)));
    } else if text.lines().any(|line| line == "FDSTOREREMOVE=1") {
        kept.retain(|(other, _)| *other != name);
    }
    said.lock().unwrap().extend(text.lines().map(str::to_owned));
}

/// A datagram with the descriptors that came with it.
fn receive(socket: &UnixDatagram) -> io::Result<(String, Vec<OwnedFd>)> {
    let mut bytes = [0u8; 4096];
    let mut control = [0u64; 32];
    let mut iov = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
    let mut fds = Vec::new();
    // SAFETY: the header points at buffers that outlive the call; received descriptors have no other owner.
    let got = unsafe {
        let mut message: libc::msghdr = std::mem::zeroed();
        (message.msg_iov, message.msg_iovlen) = (&mut iov, 1);
        (message.msg_control, message.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
        let got = libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_CMSG_CLOEXEC);
        if got < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut at = libc::CMSG_FIRSTHDR(&message);
        while !at.is_null() {
            if (*at).cmsg_type == libc::SCM_RIGHTS {
                let count = ((*at).cmsg_len - libc::CMSG_LEN(0) as usize) / size_of::<RawFd>();
                for n in 0..count {
                    let fd = std::ptr::read_unaligned(libc::CMSG_DATA(at).cast::<RawFd>().add(n));
                    fds.push(OwnedFd::from_raw_fd(fd));
                }
            }
            at = libc::CMSG_NXTHDR(&message, at);
        }
        got as usize
    };
    Ok((String::from_utf8_lossy(&bytes[..got]).into_owned(), fds))
}

/// A client of two disks in a process of its own. The test process itself must have no files open on a mount without a
/// daemon: its children inherit them until exec closes them, and the close needs the mount.
struct Guest {
    child: Child,
    dir: PathBuf,
}

impl Guest {
    const DIR_ENV: &str = "PLYFS_TEST_GUEST";

    fn new(daemon: &TestDaemon) -> Self {
        daemon.create("a", false, SIZE);
        daemon.create("quiet", false, SIZE);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "death::guest", "--nocapture"]).env(Self::DIR_ENV, daemon.dir.path());
        let dir = daemon.dir.path().to_owned();
        let mut guest = Self { child: command.stdout(Stdio::null()).spawn().unwrap(), dir };
        guest.answers(0);
        guest
    }

    /// Asserts that the open files of the guest work, and that it met no error.
    fn answers(&mut self, number: u32) {
        fs::write(self.dir.join(format!("ask-{number}")), "").unwrap();
        let seen = self.dir.join(format!("seen-{number}"));
        until("an answer of the guest", || (seen.exists() || self.has_ended()).then_some(()));
        assert!(!self.has_ended(), "the guest met an error");
    }

    fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Stops the guest, and returns the expected contents of disk `a`.
    fn stop(mut self) -> Vec<u8> {
        fs::write(self.dir.join("stop"), "").unwrap();
        assert!(self.child.wait().unwrap().success());
        fs::read(self.dir.join("model")).unwrap()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // After a failed test the guest may wait for the mount, which is removed next.
        let _ = self.child.try_wait();
    }
}

/// Not a test by itself: the process that [`Guest`] starts.
#[test]
fn guest() {
    let Some(dir) = std::env::var_os(Guest::DIR_ENV).map(PathBuf::from) else { return };
    let disks = dir.join("store/mnt/disks");
    let client = Client::new(&disks.join("a.raw"), SIZE, 5);
    let quiet = open(&disks.join("quiet.raw"));
    quiet.write_all_at(b"acknowledged", 12345).unwrap();
    let mut number = 0;
    while !dir.join("stop").exists() {
        if dir.join(format!("ask-{number}")).exists() {
            assert!(client.is_fine());
            same(&read_at(&quiet, 12345, 12), b"acknowledged", "through an open file");
            quiet.write_all_at(b"acknowledged", 12345).unwrap();
            fs::write(dir.join(format!("seen-{number}")), "").unwrap();
            number += 1;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    fs::write(dir.join("model"), client.stop()).unwrap();
}

#[test]
fn a_mount_that_the_service_manager_keeps_outlives_the_daemon() {
    if !needs("resend") {
        return;
    }
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let manager = Manager::new(&daemon);
    manager.start(&mut daemon);
    assert_eq!(manager.names().len(), 4, "{:?}", manager.names());
    let mut guest = Guest::new(&daemon);
    let since = daemon.status()["uptime_seconds"].clone();
    for round in 1..4 {
        if round == 2 {
            // The kept descriptors work for the next version, too.
            daemon.ok(&["upgrade"]);
        }
        daemon.kill_supervisor();
        manager.start(&mut daemon);
        guest.answers(round);
        assert_eq!(manager.names().len(), 4, "{:?}", manager.names());
        daemon.prepared();
    }
    assert!(daemon.log().contains("the mount was kept by the service manager"));
    assert!(daemon.status()["uptime_seconds"].as_u64() >= since.as_u64());
    let model = guest.stop();
    daemon.stop();
    assert!(manager.has_said("STOPPING=1"));
    until("an empty descriptor store", || manager.names().is_empty().then_some(()));
    manager.start(&mut daemon);
    same(&read_at(&open(&daemon.disk("a")), 0, SIZE as usize), &model, "after the stop");
}

/// The kernel's offer goes with the mount: the next daemon gets no FUSE_INIT.
#[test]
fn a_kept_mount_without_resend_outlives_the_daemon() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let manager = Manager::new(&daemon);
    let mut command = manager.command(&daemon, &[]);
    command.env("PLYFS_FUSE_MINOR", "37");
    daemon.start_command(command);
    until("all that is kept", || (manager.names().len() == 4).then_some(()));
    let path = daemon.create("a", false, SIZE);
    let kernel = daemon.status()["kernel"].clone();
    assert_eq!(kernel["missing"][0]["promise"], "resend");
    let write = |bytes: &[u8]| open(&path).write_all_at(bytes, 0).unwrap();
    write(b"first");
    for bytes in [b"after", b"again"] {
        daemon.kill_supervisor();
        manager.start(&mut daemon);
        assert_eq!(daemon.status()["kernel"], kernel);
        daemon.kill_worker();
        write(bytes);
        daemon.ok(&["upgrade"]);
        daemon.kill_worker();
        same(&read_at(&open(&path), 0, 5), bytes, "the file");
    }
    daemon.stop();
}

#[test]
fn descriptors_of_older_mounts_in_the_store_are_ignored() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let manager = Manager::new(&daemon);
    manager.start(&mut daemon);
    let mut guest = Guest::new(&daemon);
    daemon.kill_supervisor();
    {
        // Descriptors of a mount that has ended. A service manager passes descriptors in any order.
        let mut kept = manager.kept.lock().unwrap();
        let number: u64 = kept[0].0.rsplit('-').next().unwrap().parse().unwrap();
        let older = |(name, _): &(String, OwnedFd)| {
            let fd = OwnedFd::from(File::options().read(true).write(true).open("/dev/null").unwrap());
            (name.replace(&number.to_string(), &(number - 1).to_string()), fd)
        };
        let mut dead: Vec<(String, OwnedFd)> = kept.iter().map(older).collect();
        kept.insert(0, dead.pop().unwrap());
        kept.extend(dead);
    }
    manager.start(&mut daemon);
    guest.answers(1);
    until("only the living mount", || (manager.names().len() == 4).then_some(()));
    guest.stop();
}

#[test]
fn without_the_descriptors_the_next_start_cleans_up_the_dead_mount() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let manager = Manager::new(&daemon);
    manager.start(&mut daemon);
    let path = daemon.create("a", false, SIZE);
    open(&path).write_all_at(b"acknowledged", 0).unwrap();
    daemon.kill_supervisor();
    manager.kept.lock().unwrap().clear();
    manager.start(&mut daemon);
    same(&read_at(&open(&path), 0, 12), b"acknowledged", "after the death");
    assert!(daemon.log().contains("a dead mount of an earlier daemon is cleaned up"));
}

#[test]
fn a_living_mount_that_is_not_passed_on_makes_the_start_fail() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let manager = Manager::new(&daemon);
    manager.start(&mut daemon);
    daemon.kill_supervisor();
    // Started by hand, while the service manager has the mount.
    let begun = Instant::now();
    let why = daemon.try_start(&[]).unwrap_err();
    assert!(why.contains("no process has answered there") && why.contains("umount -l"), "{why}");
    assert!(begun.elapsed() >= Duration::from_secs(10), "{why}");
    manager.start(&mut daemon);
    daemon.create("a", false, SIZE);
}

#[test]
fn a_kept_mount_at_another_place_is_dropped() {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let manager = Manager::new(&daemon);
    manager.start(&mut daemon);
    let path = daemon.create("a", false, SIZE);
    open(&path).write_all_at(b"acknowledged", 0).unwrap();
    daemon.kill_supervisor();
    let elsewhere = daemon.path("elsewhere");
    let command = manager.command(&daemon, &["--mount", elsewhere.to_str().unwrap()]);
    daemon.start_command(command);
    assert!(daemon.log().contains("the configuration names another store or mount now"), "{}", daemon.log());
    same(&read_at(&open(&elsewhere.join("disks/a.raw")), 0, 12), b"acknowledged", "elsewhere");
    // Three descriptors of the new mount; the old one has ended.
    until("the new mount only", || (manager.names().len() == 4).then_some(()));
    let gone = until("an end of the old mount", || fs::metadata(daemon.mount()).err());
    assert_eq!(gone.raw_os_error(), Some(libc::ENOTCONN));
    daemon.stop();
    until("an empty descriptor store", || manager.names().is_empty().then_some(()));
    assert!(!is_listed(&elsewhere));
}

fn is_listed(path: &Path) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    table.lines().any(|line| line.split(' ').nth(4) == path.to_str())
}
