//! Each test runs in a process of its own, because a process cannot undo its confinement.

use std::fs::{self, File};
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, symlink};
use std::path::Path;
use std::sync::Arc;

use tempfile::TempDir;

use self::server::{Object, Server, Tls};
use super::{ActiveMeasures, Policy, apply};
use crate::config::{HttpConfig, SeccompMode, SecurityConfig};
use crate::io::confine::{bare_call, in_child};
use crate::io::sys;
use crate::source::http::{Http, Network, NoCredentials, Proxies, RemoteOptions};

#[allow(clippy::duplicate_mod, reason = "the server of the tests of HTTP, which the library does not have")]
#[path = "../../../tests/http/server.rs"]
mod server;

/// A directory with a store's directories, a directory for live maps, and a file that a worker must not read.
fn fixture() -> TempDir {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    for part in ["store/bases", "store/disks", "store/deltas", "run/live"] {
        fs::create_dir_all(dir.path().join(part)).unwrap();
    }
    fs::write(dir.path().join("secret"), "secret").unwrap();
    dir
}

fn confine(dir: &Path, security: &SecurityConfig) -> ActiveMeasures {
    apply(&Policy {
        security,
        store: &dir.join("store"),
        pools: &[],
        live_dir: Some(&dir.join("run/live")),
        memory_locked: false,
        first: false,
        listens: None,
    })
}

/// Runs `work` in a confined process, and fails when `work` does not complete.
#[track_caller]
fn confined(security: &SecurityConfig, work: impl FnOnce(&Path, ActiveMeasures)) {
    let dir = fixture();
    let code = in_child(|| {
        let in_force = confine(dir.path(), security);
        work(dir.path(), in_force);
        7
    });
    assert_eq!(code, 7, "the confined process did not complete (101: a panic, negative: a signal)");
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn is_root() -> bool {
    sys::effective_ids().0 == 0
}

#[test]
fn all_measures_are_in_force_on_this_kernel() {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    confined(&SecurityConfig::default(), |_, in_force| {
        // Signals and abstract sockets came with Linux 6.12.
        let mut numbers = release.split(['.', '-']).map_while(|number| number.trim().parse::<u32>().ok());
        let new = (numbers.next(), numbers.next()) >= (Some(6), Some(12));
        assert_eq!(in_force.landlock == "full", new, "{}", in_force.landlock);
        assert!(new || in_force.landlock.starts_with("partial"), "{}", in_force.landlock);
        assert_eq!(in_force.seccomp, "on");
        assert_eq!(in_force.core_dumps, "off");
        assert_eq!(in_force.capabilities, Vec::<String>::new());
        assert!(!in_force.memory_locked);
    });
}

#[test]
fn measures_that_are_switched_off_are_reported_as_off() {
    let security = SecurityConfig {
        capabilities: false,
        landlock: false,
        seccomp: SeccompMode::Off,
        core_dumps: true,
        base_dirs: Vec::new(),
        nbd_socket_dirs: Vec::new(),
        network: false,
    };
    confined(&security, |dir, in_force| {
        assert_eq!(in_force.landlock, "off (configuration)");
        assert_eq!(in_force.seccomp, "off (configuration)");
        assert_eq!(in_force.core_dumps, "on");
        assert_eq!(in_force.capabilities.is_empty(), !is_root());
        // The other tests expect refusals of these calls. Here they succeed, so the refusals come from the confinement.
        assert_eq!(fs::read(dir.join("secret")).unwrap(), b"secret");
        fs::write(dir.join("new"), "x").unwrap();
        fs::set_permissions(dir.join("secret"), fs::Permissions::from_mode(0o640)).unwrap();
        assert_eq!(bare_call(libc::SYS_socket, [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0]), None);
    });
}

#[test]
fn the_store_and_the_live_maps_stay_usable() {
    confined(&SecurityConfig::default(), |dir, _| {
        for part in ["store", "store/deltas", "run/live"] {
            let (a, b) = (dir.join(part).join("a"), dir.join(part).join("b"));
            let file = File::options().read(true).write(true).create(true).truncate(true).open(&a).unwrap();
            file.write_all_at(b"bytes", 10).unwrap();
            file.sync_data().unwrap();
            sys::fallocate(file.as_fd(), libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 0, 4096)
                .unwrap();
            file.set_len(3).unwrap();
            fs::rename(&a, &b).unwrap();
            File::open(dir.join(part)).unwrap().sync_all().unwrap();
            assert_eq!(
                fs::read_dir(dir.join(part)).unwrap().filter(|e| e.as_ref().unwrap().path() == b).count(),
                1
            );
            fs::remove_file(&b).unwrap();
        }
        fs::create_dir(dir.join("store/more")).unwrap();
        fs::rename(dir.join("store/more"), dir.join("store/deltas/more")).unwrap();
        sys::space(&dir.join("store")).unwrap();
        fs::remove_dir(dir.join("run/live")).unwrap();
    });
}

#[test]
fn files_outside_of_the_store_cannot_be_accessed() {
    confined(&SecurityConfig::default(), |dir, _| {
        // A confined worker cannot create a link that leads out of the store.
        symlink_by_call(&dir.join("secret"), &dir.join("store/link"));
        for path in [dir.join("secret"), "/etc/shadow".into(), "/etc/passwd".into(), "/dev/fuse".into()] {
            assert_eq!(errno(File::open(&path)), Some(libc::EACCES), "{path:?}");
        }
        for path in
            [dir.join("new"), dir.join("run/new"), "/dev/shm/plyfs-new".into(), "/tmp/plyfs-new".into()]
        {
            assert_eq!(errno(File::create(&path)), Some(libc::EACCES), "{path:?}");
        }
        assert_eq!(errno(fs::read_dir(dir)), Some(libc::EACCES));
        assert_eq!(errno(fs::rename(dir.join("secret"), dir.join("store/secret"))), Some(libc::EACCES));
        assert_eq!(errno(fs::remove_file(dir.join("secret"))), Some(libc::EACCES));
        assert_eq!(errno(fs::create_dir(dir.join("run/dir"))), Some(libc::EACCES));
        // The filter refuses the calls that landlock does not cover.
        let open = fs::Permissions::from_mode(0o777);
        assert_eq!(errno(fs::set_permissions(dir.join("secret"), open)), Some(libc::ENOSYS));
        assert_eq!(errno(chown(dir.join("secret"), Some(65534), None)), Some(libc::ENOSYS));
    });
}

/// Checks that symlink(2), which is on no list, is refused.
fn symlink_by_call(target: &Path, link: &Path) {
    assert_eq!(errno(symlink(target, link)), Some(libc::ENOSYS));
}

#[test]
fn a_link_in_the_store_to_a_file_outside_cannot_be_opened() {
    let dir = fixture();
    symlink(dir.path().join("secret"), dir.path().join("store/link")).unwrap();
    let code = in_child(|| {
        confine(dir.path(), &SecurityConfig::default());
        i32::from(errno(File::open(dir.path().join("store/link"))) != Some(libc::EACCES))
    });
    assert_eq!(code, 0);
}

#[test]
fn sockets_executable_memory_and_new_processes_are_refused() {
    let without = SecurityConfig { network: false, ..SecurityConfig::default() };
    for (security, inet) in [(without, Some(libc::ENOSYS)), (SecurityConfig::default(), None)] {
        confined(&security, |_, _| {
            for family in [libc::AF_UNIX, libc::AF_NETLINK, libc::AF_PACKET, libc::AF_VSOCK] {
                let socket = bare_call(libc::SYS_socket, [family as u64, libc::SOCK_STREAM as u64, 0]);
                assert_eq!(socket, Some(libc::ENOSYS), "{family}");
            }
            for family in [libc::AF_INET, libc::AF_INET6] {
                let socket = bare_call(libc::SYS_socket, [family as u64, libc::SOCK_STREAM as u64, 0]);
                assert!(socket == inet || socket == Some(libc::EAFNOSUPPORT), "{family}: {socket:?}");
            }
            // No client connects to a worker.
            assert_eq!(bare_call(libc::SYS_bind, [0; 3]), Some(libc::ENOSYS));
            assert_eq!(bare_call(libc::SYS_listen, [0; 3]), Some(libc::ENOSYS));
            let executable = (libc::PROT_READ | libc::PROT_EXEC) as u64;
            assert_eq!(bare_call(libc::SYS_mmap, [0, 4096, executable]), Some(libc::ENOSYS));
            assert_eq!(bare_call(libc::SYS_mprotect, [0, 0, executable]), Some(libc::ENOSYS));
            // New processes and signals to other processes are refused.
            assert_eq!(bare_call(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0]), Some(libc::ENOSYS));
            assert_eq!(bare_call(libc::SYS_kill, [1, 0, 0]), Some(libc::ENOSYS));
            assert_eq!(bare_call(libc::SYS_tgkill, [1, 1, 0]), Some(libc::ENOSYS));
            assert_eq!(bare_call(libc::SYS_io_uring_setup, [1, 0, 0]), Some(libc::ENOSYS));
        });
    }
}

/// A confined worker resolves names and reads from servers, with TLS and without, and needs no other file for it.
#[test]
fn a_confined_worker_reads_bases_on_the_network() {
    let object = Object::new(300_000);
    let tls = Tls::new(&[b"http/1.1"]);
    let (plain, secure) = (Server::start(object.clone()), Server::start_tls(object.clone(), &tls));
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let ca_file = dir.path().join("ca.pem");
    fs::write(&ca_file, &tls.ca_pem).unwrap();
    let http = HttpConfig { ca_file: Some(ca_file), ..HttpConfig::default() };
    confined(&SecurityConfig::default(), |_, _| {
        // A certificate that was not loaded before cannot be read now.
        assert_eq!(errno(File::open(http.ca_file.as_ref().unwrap())), Some(libc::EACCES));
    });
    let fixture = fixture();
    let code = in_child(|| {
        let network = Network::prepare(&http, Proxies::default());
        confine(fixture.path(), &SecurityConfig::default());
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let http = Http::new(&http, &network, Arc::new(NoCredentials), runtime.handle().clone()).unwrap();
        for (server, scheme) in [(&plain, "http"), (&secure, "https")] {
            let url = format!("{scheme}://localhost:{}/a", server.address().port());
            let probed = runtime.block_on(http.probe(&[url], &RemoteOptions::default())).unwrap();
            assert!(probed.head == object.bytes[..64 << 10]);
        }
        // No file has this name, so a name server is asked if there is one. No system call is refused.
        let unknown = ["http://plyfs-test.invalid/a".to_owned()];
        let error =
            runtime.block_on(http.probe(&unknown, &RemoteOptions::default())).unwrap_err().to_string();
        assert!(!error.contains("not implemented") && !error.contains("denied"), "{error}");
        7
    });
    assert_eq!(code, 7, "101: a panic, negative: a signal");
}

#[test]
fn calls_that_only_an_intruder_makes_kill_the_process() {
    for (name, call) in [
        ("execve", libc::SYS_execve),
        ("ptrace", libc::SYS_ptrace),
        ("mount", libc::SYS_mount),
        ("bpf", libc::SYS_bpf),
        ("setuid", libc::SYS_setuid),
        ("unshare", libc::SYS_unshare),
        ("process_vm_readv", libc::SYS_process_vm_readv),
    ] {
        for seccomp in [SeccompMode::On, SeccompMode::Log] {
            let dir = fixture();
            let code = in_child(|| {
                confine(dir.path(), &SecurityConfig { seccomp, ..SecurityConfig::default() });
                bare_call(call, [0; 3]);
                1
            });
            assert_eq!(code, -libc::SIGSYS, "{name} with {seccomp:?}");
        }
    }
}

#[test]
fn mode_log_allows_calls_that_are_on_no_list() {
    let security = SecurityConfig { seccomp: SeccompMode::Log, ..SecurityConfig::default() };
    confined(&security, |_, in_force| {
        assert_eq!(in_force.seccomp, "log");
        assert_eq!(bare_call(libc::SYS_socket, [libc::AF_UNIX as u64, libc::SOCK_STREAM as u64, 0]), None);
    });
}

#[test]
fn threads_memory_and_backtraces_still_work() {
    confined(&SecurityConfig::default(), |_, _| {
        let thread = std::thread::Builder::new().name("late".into()).stack_size(256 << 10);
        let sum = thread.spawn(|| vec![1u8; 64 << 20].iter().map(|b| u64::from(*b)).sum::<u64>()).unwrap();
        assert_eq!(sum.join().unwrap(), 64 << 20);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            tokio::task::spawn_blocking(|| std::thread::sleep(std::time::Duration::from_millis(1)))
                .await
                .unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        });
        let trace = std::backtrace::Backtrace::force_capture().to_string();
        assert!(trace.contains("confine::tests"), "{trace}");
        let mut file = sys::memory_file().unwrap();
        file.write_all(b"in memory").unwrap();
        std::io::stderr().write_all(b"").unwrap();
    });
}

#[test]
fn a_confined_process_can_abort() {
    let dir = fixture();
    let code = in_child(|| {
        confine(dir.path(), &SecurityConfig::default());
        std::process::abort()
    });
    assert_eq!(code, -libc::SIGABRT, "the filter must not change the signal");
}

#[test]
fn no_capability_is_left_in_any_set() {
    confined(&SecurityConfig::default(), |_, _| {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let value = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
            line.trim_start_matches(':').trim().to_owned()
        };
        let sets: &[_] =
            if is_root() { &["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] } else { &["CapEff"] };
        for set in sets {
            assert_eq!(u64::from_str_radix(&value(set), 16).unwrap(), 0, "{set}");
        }
        assert_eq!(value("NoNewPrivs"), "1");
        assert_eq!(value("Seccomp"), "2");
    });
}

/// Root serves a store of another user, which root without any capability could not do.
#[test]
fn a_store_of_another_user_keeps_only_the_capability_that_it_needs() {
    if !is_root() {
        println!("SKIP: needs root");
        return;
    }
    let dir = fixture();
    for part in ["store", "store/bases", "store/disks", "store/deltas"] {
        chown(dir.path().join(part), Some(65534), Some(65534)).unwrap();
        fs::set_permissions(dir.path().join(part), fs::Permissions::from_mode(0o700)).unwrap();
    }
    let code = in_child(|| {
        let in_force = confine(dir.path(), &SecurityConfig::default());
        assert_eq!(in_force.capabilities, ["dac_override"]);
        fs::write(dir.path().join("store/deltas/1.data"), "x").unwrap();
        assert_eq!(errno(File::open(dir.path().join("secret"))), Some(libc::EACCES), "landlock refuses it");
        7
    });
    assert_eq!(code, 7);
}

/// Why CAP_IPC_LOCK is kept: all later memory is locked, and without it the kernel refuses memory above RLIMIT_MEMLOCK.
#[test]
fn locked_memory_needs_the_right_to_lock() {
    const MORE: usize = 256 << 20;
    let dir = fixture();
    let grows = |memory_locked| {
        in_child(|| {
            if !sys::protect().locked {
                return 3;
            }
            apply(&Policy {
                security: &SecurityConfig::default(),
                store: &dir.path().join("store"),
                pools: &[],
                live_dir: Some(&dir.path().join("run/live")),
                memory_locked,
                first: false,
                listens: None,
            });
            // The memory is not touched, so it is not used.
            i32::from(Vec::<u8>::new().try_reserve_exact(MORE).is_ok())
        })
    };
    match grows(true) {
        3 => println!("SKIP: memory cannot be locked here"),
        with => assert_eq!((with, grows(false)), (1, i32::from(sys::memory_lock_limit() > MORE as u64))),
    }
}
