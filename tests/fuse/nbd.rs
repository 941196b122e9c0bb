//! Bases on NBD servers, through the mount: qemu-nbd and nbdkit, killed, changed and disturbed.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;

use crate::harness::{Random, TestDaemon, open, read_at, run, same, tool, until};

const MIB: usize = 1 << 20;

/// A server, until dropped.
struct Server(Child);

impl Server {
    /// Starts a server, which is ready when `is_ready`.
    fn start(command: &mut Command, is_ready: impl Fn() -> bool) -> Self {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut this = Self(child);
        until("an NBD server", || {
            assert_eq!(this.0.try_wait().unwrap(), None, "the server ended");
            is_ready().then_some(())
        });
        this
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A directory for sockets, and a daemon that may use it.
fn daemon_with_sockets() -> (TestDaemon, PathBuf) {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let (dir, config) = (daemon.path("sockets"), daemon.path("c.toml"));
    fs::create_dir(&dir).unwrap();
    fs::write(&config, format!("[security]\nnbd_socket_dirs = [{dir:?}]\n[http]\nstall_timeout = \"2s\"\n"))
        .unwrap();
    daemon.try_start(&["--config", config.to_str().unwrap()]).unwrap();
    (daemon, dir)
}

fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap().port()
}

/// qemu-nbd on a socket, for any number of clients.
fn qemu_nbd(program: &Path, socket: &Path, export: &str, image: &Path) -> Server {
    let _ = fs::remove_file(socket);
    let mut command = Command::new(program);
    command.args(["-r", "-t", "-e", "0", "-f", "raw", "-x", export, "-k"]).arg(socket).arg(image);
    Server::start(&mut command, || socket.exists())
}

fn waits(daemon: &TestDaemon, name: &str, state: &str, why: &str) {
    until(why, || {
        let shown = daemon.json(&["base", "show", name]);
        let is = shown["state"] == state && shown["waiting_for"].to_string().contains(why);
        is.then_some(())
    });
}

#[test]
fn a_guest_waits_for_an_export_and_goes_on_when_it_is_back() {
    let Some(program) = tool("qemu-nbd") else { return };
    let (daemon, dir) = daemon_with_sockets();
    let (bytes, image, socket) = (Random(21).bytes(20 * MIB), daemon.path("image"), dir.join("q.sock"));
    fs::write(&image, &bytes).unwrap();
    let server = qemu_nbd(&program, &socket, "golden", &image);
    let url = format!("nbd+unix:///golden?socket={}", socket.display());
    daemon.ok(&["base", "add", "g", &url]);
    assert_eq!(daemon.json(&["base", "show", "g"])["source"], url);
    daemon.ok(&["disk", "create", "d", "--base", "g"]);
    same(&read_at(&open(&daemon.disk("d")), 777, MIB), &bytes[777..777 + MIB], "the export");
    let read = |at: usize| {
        let path = daemon.disk("d");
        thread::spawn(move || read_at(&open(&path), at as u64, MIB))
    };
    // Killed.
    drop(server);
    let waiting = read(4 * MIB);
    waits(&daemon, "g", "waiting", "no connection");
    daemon.kill_worker();
    let server = qemu_nbd(&program, &socket, "golden", &image);
    same(&waiting.join().unwrap(), &bytes[4 * MIB..5 * MIB], "after a restart of the server");
    // The export is removed: the server has another one.
    drop(server);
    let server = qemu_nbd(&program, &socket, "other", &image);
    let waiting = read(8 * MIB);
    waits(&daemon, "g", "waiting", "no such export");
    // The export has another size.
    drop(server);
    let larger = daemon.path("larger");
    fs::write(&larger, [bytes.as_slice(), &[0; 512]].concat()).unwrap();
    let server = qemu_nbd(&program, &socket, "golden", &larger);
    waits(&daemon, "g", "changed", "20972032 bytes, not 20971520");
    drop(server);
    let server = qemu_nbd(&program, &socket, "golden", &image);
    same(&waiting.join().unwrap(), &bytes[8 * MIB..9 * MIB], "the right export is back");
    // Hydrated, it needs no server.
    daemon.ok(&["base", "hydrate", "g"]);
    drop(server);
    same(&fs::read(daemon.disk("d")).unwrap(), &bytes, "all of it");
}

#[test]
fn an_export_over_tcp_is_read_through_errors_and_delays() {
    let (Some(program), Some(_)) = (tool("nbdkit"), tool("nbdinfo")) else { return };
    let daemon = TestDaemon::on_disk();
    let (bytes, image, port) = (Random(22).bytes(8 * MIB), daemon.path("image"), free_port());
    fs::write(&image, &bytes).unwrap();
    let uri = format!("nbd://127.0.0.1:{port}/");
    let start = |filters: &[&str]| {
        let (before, after): (Vec<&str>, Vec<&str>) = filters.iter().partition(|arg| arg.starts_with("--"));
        let mut command = Command::new(&program);
        command.args(["-f", "-r", "-i", "127.0.0.1", "-p", &port.to_string()]);
        command.args(before).arg("file").arg(&image).args(after);
        Server::start(&mut command, || {
            Command::new("nbdinfo").args(["--size", &uri]).output().unwrap().status.success()
        })
    };
    let server = start(&[]);
    daemon.ok(&["base", "add", "e", &uri]);
    drop(server);
    let server = start(&["--filter=error", "error-pread=EIO", "error-pread-rate=30%"]);
    daemon.ok(&["disk", "create", "e", "--base", "e"]);
    same(&fs::read(daemon.disk("e")).unwrap(), &bytes, "through errors");
    drop(server);
    let server = start(&["--filter=delay", "rdelay=100ms"]);
    let url = format!("nbd://localhost:{port}/any");
    daemon.ok(&["base", "add", "l", &url, "--format", "raw"]);
    daemon.ok(&["disk", "create", "l", "--base", "l"]);
    same(&fs::read(daemon.disk("l")).unwrap(), &bytes, "through delays");
    drop(server);
}

#[test]
fn sockets_are_used_only_where_the_operator_allows_them() {
    let Some(program) = tool("qemu-nbd") else { return };
    let image;
    {
        let daemon = TestDaemon::on_disk();
        image = Random(23).bytes(MIB);
        fs::write(daemon.path("image"), &image).unwrap();
        let socket = daemon.path("q.sock");
        let _server = qemu_nbd(&program, &socket, "g", &daemon.path("image"));
        let why = daemon.fails(&["base", "add", "g", &format!("nbd+unix:///g?socket={}", socket.display())]);
        assert!(why.contains("nbd_socket_dirs"), "{why}");
    }
    let (daemon, dir) = daemon_with_sockets();
    fs::write(daemon.path("image"), &image).unwrap();
    let outside = daemon.path("q.sock");
    let _server = qemu_nbd(&program, &outside, "g", &daemon.path("image"));
    // A link does not lead out.
    std::os::unix::fs::symlink(&outside, dir.join("link")).unwrap();
    let why =
        daemon.fails(&["base", "add", "g", &format!("nbd+unix:///g?socket={}", dir.join("link").display())]);
    assert!(why.contains("nbd_socket_dirs"), "{why}");
    fs::write(dir.join("file"), "").unwrap();
    let why =
        daemon.fails(&["base", "add", "g", &format!("nbd+unix:///g?socket={}", dir.join("file").display())]);
    assert!(why.contains("cannot"), "{why}");
    let why =
        daemon.fails(&["base", "add", "g", &format!("nbd+unix:///g?socket={}", dir.join("none").display())]);
    assert!(why.contains("no such socket"), "{why}");
    for url in ["nbd:///e", "nbd://u:secret@h/e", "nbds://h/e", "rbd://pool/image"] {
        let why = daemon.fails(&["base", "add", "g", url]);
        assert!(!why.contains("secret"), "{why}");
    }
    let mirrors = daemon.fails(&["base", "add", "g", "nbd://127.0.0.1/g", "--mirror", "http://127.0.0.1/g"]);
    assert!(mirrors.contains("neither nbd nor nbd+unix"), "{mirrors}");
}

/// What an image names is not a place that plyfs opens.
#[test]
fn an_image_of_an_export_cannot_name_another_export() {
    let (Some(program), Some(tool)) = (tool("qemu-nbd"), tool("qemu-img")) else { return };
    let (daemon, dir) = daemon_with_sockets();
    let (image, socket) = (daemon.path("image.qcow2"), dir.join("q.sock"));
    let below = format!("nbd+unix:///g?socket={}", socket.display());
    run(Command::new(tool)
        .args(["create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", &below])
        .arg(&image)
        .arg("1M"));
    let _server = qemu_nbd(&program, &socket, "g", &image);
    let why = daemon.fails(&["base", "add", "g", &below, "--format", "qcow2"]);
    assert!(why.contains("backing"), "{why}");
}
