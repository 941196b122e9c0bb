//! The system calls that a worker and its helpers may make, and the result of the others.
//!
//! Each process has two filters. The stricter result applies:
//! - A call that is on no list fails with ENOSYS, as on an older kernel; libraries then use an older call. The process
//!   is not killed, because the kernel would send the request that led to the call again, to the next worker, for ever.
//! - A call that only an intruder in the process makes ([`FORBIDDEN`]) kills the process at once. The next worker
//!   starts from clean memory; the clients see a pause.

use std::collections::BTreeMap;
use std::os::fd::RawFd;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::config::SeccompMode;
use crate::io::sys;

/// The process that a filter is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A worker without bases on the network.
    Worker,
    /// A worker with bases on the network.
    NetworkWorker,
    /// A helper that only reads files.
    Opener,
    /// As [`Role::Opener`], and it connects to sockets of this host.
    ConnectingOpener,
}

impl Role {
    /// Whether it is one of the openers.
    pub(super) fn is_opener(self) -> bool {
        matches!(self, Self::Opener | Self::ConnectingOpener)
    }
}

/// Memory, threads, signals, time, exit: calls of the C library and Rust's runtime in every program.
const RUNTIME: &[c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_get_robust_list,
    libc::SYS_getcpu,
    libc::SYS_getcwd,
    libc::SYS_getegid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_getuid,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    // Rust's exit waits in this call when another thread already exits; on x86_64 in pause(2).
    libc::SYS_ppoll,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_sigaltstack,
    libc::SYS_sysinfo,
    libc::SYS_uname,
];

/// Calls to open, examine and read files.
const READING: &[c_long] = &[
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_pread64,
    libc::SYS_read,
    libc::SYS_readlinkat,
    libc::SYS_readv,
    libc::SYS_statfs,
    libc::SYS_statx,
];

/// Messages on existing sockets. The only new sockets are pairs.
const MESSAGES: &[c_long] = &[
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_write,
    libc::SYS_writev,
];

/// The other calls that serving disks needs. The list omits chmod, chown, utimes, extended attributes and links on
/// purpose, because landlock does not restrict them. The owner and mode of a disk are in its record.
///
/// io_uring would add its three calls.
const SERVING: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_close_range,
    libc::SYS_copy_file_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fadvise64,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_flock,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_memfd_create,
    libc::SYS_mincore,
    libc::SYS_mkdirat,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_mlockall,
    libc::SYS_msync,
    libc::SYS_munlock,
    libc::SYS_pidfd_open,
    libc::SYS_pipe2,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    sys::SYS_CACHESTAT,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readahead,
    libc::SYS_renameat2,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_signalfd4,
    libc::SYS_socketpair,
    libc::SYS_splice,
    libc::SYS_sync_file_range,
    libc::SYS_syncfs,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_unlinkat,
];

/// Calls to connect and to resolve names. socket(2) is among the conditional calls. The list omits bind(2) and
/// listen(2) on purpose: only the control socket, which others made, and the socket of metrics have clients.
const CONNECTING: &[c_long] = &[libc::SYS_connect, libc::SYS_sendmmsg];

/// Older forms of the calls above, which other C libraries still use.
#[cfg(target_arch = "x86_64")]
const READING_OLD: &[c_long] = &[
    libc::SYS_access,
    libc::SYS_lstat,
    libc::SYS_open,
    libc::SYS_pause,
    libc::SYS_readlink,
    libc::SYS_stat,
    libc::SYS_time,
];
#[cfg(target_arch = "x86_64")]
const SERVING_OLD: &[c_long] = &[
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_mkdir,
    libc::SYS_poll,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_rmdir,
    libc::SYS_unlink,
];
#[cfg(not(target_arch = "x86_64"))]
const READING_OLD: &[c_long] = &[];
/// renameat(2), by which the C library renames on this architecture, and which the libc crate does not name there.
#[cfg(target_arch = "aarch64")]
const SERVING_OLD: &[c_long] = &[38];
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const SERVING_OLD: &[c_long] = &[];

/// Calls that kill the process: other programs, other processes' memory, mounts, namespaces, identity, the kernel
/// itself.
const FORBIDDEN: &[c_long] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_bpf,
    libc::SYS_capset,
    libc::SYS_chroot,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_execve,
    libc::SYS_execveat,
    libc::SYS_finit_module,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_init_module,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_move_mount,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_personality,
    libc::SYS_pidfd_getfd,
    libc::SYS_pivot_root,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_setgid,
    libc::SYS_setgroups,
    libc::SYS_setns,
    libc::SYS_setregid,
    libc::SYS_setresgid,
    libc::SYS_setresuid,
    libc::SYS_setreuid,
    libc::SYS_settimeofday,
    libc::SYS_setuid,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_umount2,
    libc::SYS_unshare,
    libc::SYS_userfaultfd,
];

/// A condition on one argument.
enum Arg {
    Is(u8, u64),
    /// The bits of `mask` equal those of `value`.
    Bits {
        arg: u8,
        mask: u64,
        value: u64,
    },
}

const PR_SET_VMA: u64 = 0x5356_4d41;
const PR_SET_IO_FLUSHER: u64 = 57;

/// Calls that are allowed with some arguments only. At least one condition of a call must hold.
fn conditional(role: Role, listens: Option<RawFd>) -> Vec<(c_long, Arg)> {
    let pid = u64::from(sys::pid());
    let executable = libc::PROT_EXEC as u64;
    let mut all = vec![
        // Threads, not processes. clone3(2) is on no list, because a filter cannot see its arguments. The C library
        // then uses clone(2).
        (
            libc::SYS_clone,
            Arg::Bits { arg: 0, mask: libc::CLONE_THREAD as u64, value: libc::CLONE_THREAD as u64 },
        ),
        // No new executable memory.
        (libc::SYS_mmap, Arg::Bits { arg: 2, mask: executable, value: 0 }),
        (libc::SYS_mprotect, Arg::Bits { arg: 2, mask: executable, value: 0 }),
        // Signals to the process itself: abort(3), and faults that are raised again.
        (libc::SYS_tgkill, Arg::Is(0, pid)),
        (libc::SYS_prlimit64, Arg::Is(0, 0)),
        (libc::SYS_prlimit64, Arg::Is(0, pid)),
        // The priority of the calling thread.
        (libc::SYS_setpriority, Arg::Is(1, 0)),
    ];
    for option in [libc::PR_SET_NAME as u64, libc::PR_SET_PDEATHSIG as u64, PR_SET_VMA, PR_SET_IO_FLUSHER] {
        all.push((libc::SYS_prctl, Arg::Is(0, option)));
    }
    if let Some(socket) = listens {
        all.push((libc::SYS_listen, Arg::Is(0, socket as u64)));
    }
    if role == Role::NetworkWorker {
        // No AF_UNIX, which reaches the host's services, and no AF_NETLINK, which the C library does not need.
        for family in [libc::AF_INET, libc::AF_INET6] {
            all.push((libc::SYS_socket, Arg::Is(0, family as u64)));
        }
        // The size of a name server's answer.
        all.push((libc::SYS_ioctl, Arg::Is(1, libc::FIONREAD)));
    }
    if role == Role::ConnectingOpener {
        all.push((libc::SYS_socket, Arg::Is(0, libc::AF_UNIX as u64)));
    }
    if !role.is_opener() {
        // Non-blocking sockets, the check whether standard error is a terminal, and the extents of a file.
        for request in [libc::FIONBIO, libc::TCGETS, sys::FS_IOC_FIEMAP] {
            all.push((libc::SYS_ioctl, Arg::Is(1, request)));
        }
    }
    all
}

fn allowed(role: Role) -> Vec<c_long> {
    let mut lists = vec![RUNTIME, READING, READING_OLD, MESSAGES];
    if !role.is_opener() {
        lists.extend([SERVING, SERVING_OLD]);
    }
    if matches!(role, Role::NetworkWorker | Role::ConnectingOpener) {
        lists.push(CONNECTING);
    }
    lists.concat()
}

/// Installs both filters for all threads. Returns the mode in force. `listens`: a bound socket that the process listens
/// on later.
pub(super) fn restrict(role: Role, mode: SeccompMode, listens: Option<RawFd>) -> Result<String, String> {
    let (others, in_force) = match mode {
        SeccompMode::On => (SeccompAction::Errno(libc::ENOSYS as u32), "on"),
        SeccompMode::Log => (SeccompAction::Log, "log"),
        SeccompMode::Off => return Ok("off (configuration)".into()),
    };
    let compile = |rules, mismatch, matched| -> Result<BpfProgram, String> {
        let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(|e| e.to_string())?;
        let filter = SeccompFilter::new(rules, mismatch, matched, arch).map_err(|e| e.to_string())?;
        BpfProgram::try_from(filter).map_err(|e| e.to_string())
    };
    let always = |calls: &[c_long]| calls.iter().map(|call| (*call, Vec::new())).collect::<BTreeMap<_, _>>();
    let mut rules = always(&allowed(role));
    for (call, arg) in conditional(role, listens) {
        let condition = match arg {
            Arg::Is(arg, value) => {
                SeccompCondition::new(arg, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
            }
            Arg::Bits { arg, mask, value } => {
                SeccompCondition::new(arg, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(mask), value)
            }
        };
        let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
        rules.entry(call).or_default().push(rule.map_err(|e| e.to_string())?);
    }
    let allow = compile(rules, others, SeccompAction::Allow)?;
    let forbid = compile(always(FORBIDDEN), SeccompAction::Allow, SeccompAction::KillProcess)?;
    let mut programs = vec![forbid, allow];
    if mode == SeccompMode::Log {
        // The C library has a replacement for clone3, so a log of it would be no sign that a list lacks a call.
        let older = SeccompAction::Errno(libc::ENOSYS as u32);
        programs.push(compile(always(&[libc::SYS_clone3]), SeccompAction::Allow, older)?);
    }
    for program in &programs {
        seccompiler::apply_filter_all_threads(program).map_err(|e| e.to_string())?;
    }
    Ok(in_force.into())
}
