//! System calls with which a process gives up rights before it serves, and with which it starts the helper processes
//! that keep some.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::ptr;

use super::sys::{c_path, check};

/// Largest message of [`send_message`] in bytes.
pub const MAX_MESSAGE: usize = 8192;

/// Which side of a fork(2) this is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forked {
    /// The new process.
    Child,
    /// The calling process, with the number of the new one.
    Parent(u32),
}

/// How many threads this process has.
///
/// # Errors
/// When /proc is not mounted.
pub fn threads() -> io::Result<usize> {
    Ok(std::fs::read_dir("/proc/self/task")?.count())
}

/// fork(2) of a process with one thread. The child dies with its parent.
///
/// # Errors
/// `Other` when there are other threads: their locks would stay locked in the child for ever.
pub fn fork() -> io::Result<Forked> {
    if threads()? != 1 {
        return Err(io::Error::other("cannot fork: other threads run already"));
    }
    let parent = std::process::id();
    // SAFETY: this is the only thread, so the child has a consistent copy of everything, and may do what any process
    // with one thread may.
    match check(unsafe { libc::fork() }.into())? {
        0 => {
            if super::sys::die_with_parent(parent).is_err() {
                std::process::exit(1);
            }
            Ok(Forked::Child)
        }
        child => Ok(Forked::Parent(child as u32)),
    }
}

/// Closes every descriptor from 3 on except `keep`. For a child after [`fork`], which never runs the destructors of
/// inherited values.
///
/// # Errors
/// When the kernel has no close_range(2).
pub fn close_all_but(keep: BorrowedFd<'_>) -> io::Result<()> {
    let keep = keep.as_raw_fd() as libc::c_uint;
    let close = |first: libc::c_uint, last: libc::c_uint| {
        if first > last {
            return Ok(());
        }
        // SAFETY: numbers only; nothing of this process uses these descriptors any more.
        check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(drop)
    };
    close(3, keep - 1)?;
    close(keep + 1, libc::c_uint::MAX)
}

/// Sets the name of this process for ps and top. At most 15 bytes count.
pub fn set_name(name: &std::ffi::CStr) {
    // SAFETY: a C string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Forbids core dumps of this process, also to a program to which the host pipes them. Other processes of the same user
/// may not trace the process or read its memory.
///
/// # Errors
/// Errors of prctl(2).
pub fn forbid_core_dumps() -> io::Result<()> {
    let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: numbers, and a struct that outlives the call.
    unsafe {
        check(libc::setrlimit(libc::RLIMIT_CORE, &none).into())?;
        check(libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0).into()).map(drop)
    }
}

/// Prevents that any program that this process runs gains rights.
///
/// # Errors
/// Errors of prctl(2).
pub fn no_new_privileges() -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) }.into()).map(drop)
}

/// Whether the effective user, with the effective capabilities, may read, change and enter a directory.
pub fn may_use_directory(path: &Path) -> bool {
    let Ok(path) = c_path(path) else { return false };
    let how = libc::R_OK | libc::W_OK | libc::X_OK;
    // SAFETY: a C string that outlives the call.
    unsafe { libc::faccessat(libc::AT_FDCWD, path.as_ptr(), how, libc::AT_EACCESS) == 0 }
}

/// Room for the control message of one descriptor, aligned as its header is.
const CONTROL: usize = 8;

/// Sends one message of 1 to [`MAX_MESSAGE`] bytes, with a descriptor or without.
///
/// # Errors
/// Errors of sendmsg(2); `BrokenPipe` when the other end is gone.
pub fn send_message(socket: BorrowedFd<'_>, bytes: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut iov = libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() };
    let mut control = [0u64; CONTROL];
    // SAFETY: the message header points at buffers that outlive the call and are only read; the control buffer is
    // aligned for cmsghdr and larger than CMSG_SPACE of one descriptor.
    unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        if let Some(fd) = fd {
            msg.msg_control = control.as_mut_ptr().cast();
            msg.msg_controllen = libc::CMSG_SPACE(size_of::<RawFd>() as u32) as _;
            let cmsg = libc::CMSG_FIRSTHDR(&msg);
            (*cmsg).cmsg_level = libc::SOL_SOCKET;
            (*cmsg).cmsg_type = libc::SCM_RIGHTS;
            (*cmsg).cmsg_len = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
            ptr::write_unaligned(libc::CMSG_DATA(cmsg).cast::<RawFd>(), fd.as_raw_fd());
        }
        loop {
            match check(libc::sendmsg(socket.as_raw_fd(), &msg, libc::MSG_NOSIGNAL) as i64) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other.map(drop),
            }
        }
    }
}

/// Waits for one message. Returns its length, and the descriptor that it carried. 0 bytes: the other end is gone.
///
/// # Errors
/// Errors of recvmsg(2); `InvalidData` when the message or its control data does not fit.
pub fn receive_message(socket: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let mut control = [0u64; CONTROL];
    // SAFETY: the message header points at buffers that outlive the call; the control buffer is aligned for cmsghdr,
    // and no larger than one descriptor needs, so that the kernel passes no more; that one has no other owner.
    unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = libc::CMSG_LEN(size_of::<RawFd>() as u32) as _;
        let got = loop {
            match check(libc::recvmsg(socket.as_raw_fd(), &mut msg, libc::MSG_CMSG_CLOEXEC) as i64) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => break other?,
            }
        };
        let cmsg = libc::CMSG_FIRSTHDR(&msg);
        let fd = if cmsg.is_null() || (*cmsg).cmsg_type != libc::SCM_RIGHTS {
            None
        } else {
            Some(OwnedFd::from_raw_fd(ptr::read_unaligned(libc::CMSG_DATA(cmsg).cast::<RawFd>())))
        };
        if msg.msg_flags & (libc::MSG_TRUNC | libc::MSG_CTRUNC) != 0 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the message or its control data is larger than the buffer",
            ));
        }
        Ok((got as usize, fd))
    }
}

/// Runs `work` in a copy of this process and thread, to test what cannot be undone. Returns its exit code, or the
/// negative number of the signal that ended it.
#[cfg(test)]
pub fn in_child(work: impl FnOnce() -> i32) -> i32 {
    // SAFETY: the child has this thread only. The C library keeps its allocator usable over fork(2), and the tests use
    // no other lock that another thread could have held. It ends without running anything of the test's.
    unsafe {
        let child = libc::fork();
        assert!(child >= 0, "fork: {}", io::Error::last_os_error());
        if child == 0 {
            let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|panic| {
                // The test harness captures the output of this process and never shows it.
                let text = panic.downcast_ref::<String>().map_or("a panic without text", String::as_str);
                let _ = io::Write::write_all(&mut io::stderr(), format!("in the child: {text}\n").as_bytes());
                101
            });
            libc::_exit(code);
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(child, &mut status, 0), child);
        if libc::WIFSIGNALED(status) { -libc::WTERMSIG(status) } else { libc::WEXITSTATUS(status) }
    }
}

/// A system call by its number, with numbers only, to test the filter. Returns its error number.
#[cfg(test)]
pub fn bare_call(number: libc::c_long, arguments: [u64; 3]) -> Option<i32> {
    let [a, b, c] = arguments;
    // SAFETY: the tests give null pointers, numbers and flags with which no call touches memory in use.
    let result = unsafe { libc::syscall(number, a, b, c, 0, 0, 0) };
    if result == -1 { io::Error::last_os_error().raw_os_error() } else { None }
}

/// mkfifo(3), for tests.
#[cfg(test)]
pub fn make_fifo(path: &std::ffi::CStr) -> io::Result<()> {
    // SAFETY: a C string.
    check(unsafe { libc::mkfifo(path.as_ptr(), 0o600) }.into()).map(drop)
}

/// Kills a child, for tests. Returns when it is reaped.
#[cfg(test)]
pub fn end_process(pid: i32) {
    // SAFETY: numbers only; the status goes nowhere.
    unsafe {
        assert_eq!(libc::kill(pid, libc::SIGKILL), 0);
        assert_eq!(libc::waitpid(pid, ptr::null_mut(), 0), pid);
    }
}
