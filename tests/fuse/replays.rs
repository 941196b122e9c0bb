//! Requests that the kernel sends again after a worker's death, while a command changed the names meanwhile.

use std::fs;
use std::path::Path;

use crate::harness::*;
use crate::strace::Strace;

const MIB: u64 = 1 << 20;

/// Injects faults into system calls of a process, until dropped.
fn inject(pid: i32, arguments: &[&str]) -> Option<Strace> {
    Strace::attach(pid, &[&["-o", "/dev/null"], arguments].concat())
}

/// Kills the worker in `request`, between the durable change and the answer, and runs a command before the kernel sends
/// the request again.
fn overtaken(daemon: &TestDaemon, request: impl FnOnce() + Send, command: &[&str]) -> Option<String> {
    let (worker, standby) = daemon.prepared();
    // Delays the first write of the next worker to the mount, which makes the kernel send the request again.
    let resend = ["-e", "trace=write", "-P", "/dev/fuse", "-e", "inject=write:delay_enter=2000000:when=1"];
    let _late = inject(standby, &resend)?;
    // Kills the worker when the record has its name. The next worker makes that durable.
    let killer = inject(worker, &["-e", "trace=fsync", "-e", "inject=fsync:signal=SIGKILL"])?;
    std::thread::scope(|scope| {
        let request = scope.spawn(request);
        until("the death of the worker", || {
            (!Path::new(&format!("/proc/{worker}/task")).exists()).then_some(())
        });
        drop(killer);
        let said = daemon.ok(command);
        assert!(!request.is_finished(), "the request ended before the command");
        request.join().unwrap();
        Some(said)
    })
}

/// Guards D4, D27.
#[test]
fn a_repeated_removal_keeps_the_disk_that_took_the_name() {
    if !needs("resend") {
        return;
    }
    let mut daemon = TestDaemon::on_disk();
    let disk = daemon.create("vm", false, MIB);
    let create = ["disk", "create", "vm", "--size", "2M"];
    if overtaken(&daemon, || fs::remove_file(&disk).unwrap(), &create).is_none() {
        return;
    }
    assert_eq!(daemon.json(&["disk", "show", "vm"])["size"], 2 * MIB);
    daemon.stop();
    daemon.ok(&["check"]);
}

#[test]
fn a_repeated_rename_keeps_the_disk_that_took_the_name() {
    if !needs("resend") {
        return;
    }
    let mut daemon = TestDaemon::on_disk();
    let (from, to) = (daemon.create("from", false, MIB), daemon.disk("to"));
    let create = ["disk", "create", "from", "--size", "2M"];
    if overtaken(&daemon, || fs::rename(&from, &to).unwrap(), &create).is_none() {
        return;
    }
    assert_eq!(daemon.json(&["disk", "show", "to"])["size"], MIB);
    assert_eq!(daemon.json(&["disk", "show", "from"])["size"], 2 * MIB);
    daemon.stop();
    daemon.ok(&["check"]);
}
