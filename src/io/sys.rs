//! System calls for which the standard library has no safe function.

use std::ffi::{CStr, CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::Space;

pub(super) fn check(ret: i64) -> io::Result<i64> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

pub(super) fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

pub(super) fn off(v: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(v).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))
}

/// fallocate(2), repeated when a signal interrupts it.
pub fn fallocate(fd: BorrowedFd<'_>, mode: i32, offset: u64, len: u64) -> io::Result<()> {
    let (offset, len) = (off(offset)?, off(len)?);
    loop {
        // SAFETY: plain numbers and a descriptor that the caller keeps open.
        match check(unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, len) }.into()) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(drop),
        }
    }
}

/// Reads from the page cache only; `None` when a part would have to come from the disk.
pub fn read_cached(fd: BorrowedFd<'_>, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
    let iov = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    // SAFETY: one iovec over a buffer that is borrowed for the call.
    let got = unsafe { libc::preadv2(fd.as_raw_fd(), &iov, 1, off(offset)?, libc::RWF_NOWAIT) };
    match check(got as i64) {
        Ok(n) if n as usize == buf.len() => Ok(Some(n as usize)),
        // Short: the end of the file, or the end of what is cached. The waiting read finds out.
        Ok(_) => Ok(None),
        Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EOPNOTSUPP | libc::EINTR)) => Ok(None),
        Err(e) => Err(e),
    }
}

fn page_size() -> u64 {
    static SIZE: OnceLock<u64> = OnceLock::new();
    // SAFETY: asks for a number.
    *SIZE.get_or_init(|| unsafe { libc::sysconf(libc::_SC_PAGESIZE) }.max(1) as u64)
}

/// cachestat(2), since Linux 6.5; the same number on all architectures (asm-generic/unistd.h).
pub const SYS_CACHESTAT: libc::c_long = 451;

/// Whether the page cache has all pages of a range. False if the kernel does not tell.
pub fn is_cached(fd: BorrowedFd<'_>, offset: u64, len: u64) -> bool {
    if len == 0 {
        return true;
    }
    // `struct cachestat_range` and `struct cachestat` of linux/mman.h.
    let range = [offset, len];
    let mut counts = [0_u64; 5];
    // SAFETY: the kernel reads two words and writes five.
    let done =
        unsafe { libc::syscall(SYS_CACHESTAT, fd.as_raw_fd(), range.as_ptr(), counts.as_mut_ptr(), 0) };
    let page = page_size();
    let pages = (offset + len).div_ceil(page) - offset / page;
    done == 0 && counts[0] >= pages
}

/// Whether the kernel could write what it wrote of a file by itself. A failure is reported once, here or by a sync.
pub fn check_written_back(fd: BorrowedFd<'_>) -> io::Result<()> {
    // sync_file_range(2) waits for the pages of a range, here for none, and gives the error of the whole file.
    const NO_PAGES: i64 = 1 << 62;
    let wait = libc::SYNC_FILE_RANGE_WAIT_BEFORE;
    // SAFETY: takes numbers only.
    let done = unsafe { libc::sync_file_range(fd.as_raw_fd(), NO_PAGES, 4096, wait) };
    let error = io::Error::last_os_error();
    if done == 0 || error.raw_os_error() == Some(libc::ENOSYS) { Ok(()) } else { Err(error) }
}

/// The request of ioctl(2) that lists a file's extents.
pub const FS_IOC_FIEMAP: libc::c_ulong = 0xc020_660b;

/// Argument and result of [`FS_IOC_FIEMAP`] (linux/fiemap.h), with room for some extents.
#[repr(C)]
struct ExtentQuery {
    start: u64,
    length: u64,
    flags: u32,
    mapped_extents: u32,
    extent_count: u32,
    reserved: u32,
    extents: [FileExtent; 32],
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FileExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_flags: [u32; 3],
}

/// Whether every byte of a range has space of its own on the filesystem, so that writing it needs none: written,
/// preallocated, or reserved for delayed allocation. False where writes are never in place (btrfs).
pub fn has_space(fd: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<bool> {
    const LAST: u32 = 0x1;
    const NOT_IN_PLACE: u32 = 0x8 | 0x200 | 0x2000; // encoded, inline, shared
    let (mut at, end) = (offset, offset + len);
    // SAFETY: plain numbers, of which zero is a value; the descriptor is open for the call.
    let kind = unsafe {
        let mut out: libc::statfs = std::mem::zeroed();
        check(libc::fstatfs(fd.as_raw_fd(), &mut out).into())?;
        out.f_type
    };
    if kind == libc::BTRFS_SUPER_MAGIC {
        return Ok(false);
    }
    while at < end {
        let mut query = ExtentQuery {
            start: at,
            length: end - at,
            flags: 0,
            mapped_extents: 0,
            extent_count: 32,
            reserved: 0,
            extents: [FileExtent::default(); 32],
        };
        // SAFETY: the struct is laid out as the kernel's, with room for as many extents as it says.
        match check(unsafe { libc::ioctl(fd.as_raw_fd(), FS_IOC_FIEMAP, &mut query) }.into()) {
            Ok(_) => {}
            Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => return has_pages(fd, at, end),
            Err(e) => return Err(e),
        }
        let found = &query.extents[..(query.mapped_extents as usize).min(32)];
        for extent in found {
            if extent.logical > at || extent.flags & NOT_IN_PLACE != 0 {
                return Ok(false);
            }
            at = at.max(extent.logical + extent.length);
        }
        if found.last().is_none_or(|last| last.flags & LAST != 0) {
            break;
        }
    }
    Ok(at >= end)
}

/// As [`has_space`], by the holes of the file, for tmpfs.
fn has_pages(fd: BorrowedFd<'_>, offset: u64, end: u64) -> io::Result<bool> {
    // SAFETY: numbers only; no code uses the position of the file.
    let hole = check(unsafe { libc::lseek(fd.as_raw_fd(), off(offset)?, libc::SEEK_HOLE) })?;
    Ok(hole as u64 >= end)
}

/// An unnamed file in memory.
pub fn memory_file() -> io::Result<File> {
    // SAFETY: a constant name; the returned descriptor has no other owner.
    unsafe {
        let fd = check(libc::memfd_create(c"plyfs".as_ptr(), libc::MFD_CLOEXEC).into())?;
        Ok(File::from_raw_fd(fd as RawFd))
    }
}

fn statfs(path: &Path) -> io::Result<libc::statfs> {
    let path = c_path(path)?;
    // SAFETY: the struct is plain numbers, zero is a value of it; the path is a C string.
    unsafe {
        let mut out: libc::statfs = std::mem::zeroed();
        check(libc::statfs(path.as_ptr(), &mut out).into())?;
        Ok(out)
    }
}

/// Whether files under `path` live in memory (tmpfs, ramfs).
pub fn is_memory_filesystem(path: &Path) -> io::Result<bool> {
    const RAMFS: i64 = 0x8584_58f6;
    Ok(matches!(statfs(path)?.f_type, libc::TMPFS_MAGIC | RAMFS))
}

/// Whether `path` lies on a FUSE filesystem.
pub fn is_fuse(path: &Path) -> io::Result<bool> {
    Ok(statfs(path)?.f_type == libc::FUSE_SUPER_MAGIC)
}

/// Space of the filesystem that holds `path`.
pub fn space(path: &Path) -> io::Result<Space> {
    let s = statfs(path)?;
    let unit = s.f_frsize as u64;
    Ok(Space { total: s.f_blocks * unit, free: s.f_bfree * unit, available: s.f_bavail * unit })
}

/// flock(2), exclusive, without waiting. False when another process holds the lock.
pub fn try_lock(file: &File) -> io::Result<bool> {
    // SAFETY: a descriptor and a number.
    match check(unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) }.into()) {
        Ok(_) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EWOULDBLOCK) => Ok(false),
        Err(e) => Err(e),
    }
}

/// As [`try_lock`], of a file that another one may replace: false also when `path` names another file now.
pub fn try_lock_named(file: &File, path: &Path) -> io::Result<bool> {
    Ok(try_lock(file)? && is_named(file, path)?)
}

/// Whether `path` names this open file.
pub fn is_named(file: &File, path: &Path) -> io::Result<bool> {
    let (named, held) = match std::fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
        named => (named?, file.metadata()?),
    };
    Ok((named.dev(), named.ino()) == (held.dev(), held.ino()))
}

/// flock(2): gives the lock of an open file description back, whatever other descriptors it has.
pub fn unlock(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: a descriptor and a number.
    check(unsafe { libc::flock(fd.as_raw_fd(), libc::LOCK_UN) }.into()).map(drop)
}

/// Sets or clears close-on-exec.
pub fn set_cloexec(fd: RawFd, on: bool) -> io::Result<()> {
    // SAFETY: descriptor flags; no memory is involved.
    check(unsafe { libc::fcntl(fd, libc::F_SETFD, if on { libc::FD_CLOEXEC } else { 0 }) }.into()).map(drop)
}

/// Makes `new` refer to what `old` refers to.
pub fn replace_fd(old: BorrowedFd<'_>, new: RawFd) -> io::Result<()> {
    // SAFETY: `new` is a descriptor that the caller wants replaced.
    check(unsafe { libc::dup3(old.as_raw_fd(), new, libc::O_CLOEXEC) }.into()).map(drop)
}

/// Takes the descriptors that the parent process left open under these numbers, once in the life of the process.
///
/// # Errors
/// `AlreadyExists` on a second call, which would take descriptors that have an owner; `InvalidInput` when a number
/// comes twice; `EBADF` when one is not open.
pub fn inherit_once(fds: &[RawFd]) -> io::Result<Vec<OwnedFd>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Err(io::ErrorKind::AlreadyExists.into());
    }
    for (n, fd) in fds.iter().enumerate() {
        if *fd < 3 || fds[..n].contains(fd) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        set_cloexec(*fd, true)?;
    }
    // SAFETY: the numbers are open, differ, were opened by the parent or before exec, and this is the first and only
    // time they are taken.
    Ok(fds.iter().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }).collect())
}

/// Sends a signal to a child of this process that was not reaped yet.
pub fn kill(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::kill(pid as libc::pid_t, signal) }.into()).map(drop)
}

/// Whether a process of this number exists, of any user.
pub fn is_process(pid: u32) -> bool {
    // SAFETY: numbers only; signal 0 is none.
    let sent = check(unsafe { libc::kill(pid as libc::pid_t, 0) }.into());
    sent.is_ok() || sent.is_err_and(|error| error.raw_os_error() != Some(libc::ESRCH))
}

/// Sends a signal to the process group that a child leads. The child was not reaped yet.
pub fn kill_group(pid: u32, signal: i32) -> io::Result<()> {
    // SAFETY: numbers only.
    check(unsafe { libc::kill(-(pid as libc::pid_t), signal) }.into()).map(drop)
}

/// The exit status of a child that has ended; `None` while it runs. Reaps the child. Does not wait.
///
/// # Errors
/// When the process is not a child of this process.
pub fn wait_now(pid: u32) -> io::Result<Option<ExitStatus>> {
    let mut status = 0;
    // SAFETY: room for the status.
    match check(unsafe { libc::waitpid(pid as libc::pid_t, &mut status, libc::WNOHANG) }.into()) {
        Ok(0) => Ok(None),
        other => other.map(|_| Some(ExitStatus::from_raw(status))),
    }
}

/// Reaps a child if it has ended. Does not wait.
pub fn reap(pid: u32) {
    // SAFETY: numbers, and no status is wanted.
    unsafe { libc::waitpid(pid as libc::pid_t, ptr::null_mut(), libc::WNOHANG) };
}

/// execve(2): this process continues as another program. It keeps its descriptors without close-on-exec, its children
/// and its blocked signals (which `std`'s exec would unblock). Returns only on failure.
pub fn exec(program: &Path, arguments: &[OsString], environment: &[(OsString, OsString)]) -> io::Error {
    let pair = |(key, value): &(OsString, OsString)| {
        CString::new([key.as_bytes(), b"=", value.as_bytes()].concat()).map_err(io::Error::other)
    };
    let word = |word: &OsString| CString::new(word.as_bytes()).map_err(io::Error::other);
    let prepared = (|| {
        let arguments: Vec<CString> = arguments.iter().map(word).collect::<io::Result<_>>()?;
        let environment: Vec<CString> = environment.iter().map(pair).collect::<io::Result<_>>()?;
        Ok((c_path(program)?, arguments, environment))
    })();
    let (program, arguments, environment) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return error,
    };
    let pointers = |list: &[CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|s| s.as_ptr()).chain([ptr::null()]).collect()
    };
    let (argv, envp) = (pointers(&arguments), pointers(&environment));
    // SAFETY: C strings and arrays that end with null and outlive the call.
    unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Sets the name of this process for `ps` and `top`, which show 15 bytes.
pub fn set_process_name(name: &CStr) {
    // SAFETY: a C string.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// A pair of connected sockets that preserve message boundaries.
pub fn message_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors, which have no other owner afterwards.
    unsafe {
        check(
            libc::socketpair(libc::AF_UNIX, libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr())
                .into(),
        )?;
        Ok((OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])))
    }
}

/// Receives one descriptor over a Unix socket, as fusermount3 sends it.
pub fn receive_fd(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0u8; 1];
    let mut iov = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    let mut control = [0u64; 8];
    // SAFETY: the message header points at buffers that outlive the call; the control buffer is aligned for
    // cmsghdr; a descriptor that arrives has no other owner.
    unsafe {
        let mut msg: libc::msghdr = std::mem::zeroed();
        msg.msg_iov = &mut iov;
        msg.msg_iovlen = 1;
        msg.msg_control = control.as_mut_ptr().cast();
        msg.msg_controllen = size_of_val(&control);
        let got = check(libc::recvmsg(socket.as_raw_fd(), &mut msg, libc::MSG_CMSG_CLOEXEC) as i64)?;
        let cmsg = libc::CMSG_FIRSTHDR(&msg);
        if got == 0 || cmsg.is_null() || (*cmsg).cmsg_type != libc::SCM_RIGHTS {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the message carries no descriptor"));
        }
        let fd = ptr::read_unaligned(libc::CMSG_DATA(cmsg).cast::<RawFd>());
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// mount(2) of a FUSE descriptor.
pub fn mount_fuse(target: &Path, options: &str) -> io::Result<()> {
    let (target, options) = (c_path(target)?, CString::new(options).map_err(io::Error::other)?);
    // SAFETY: C strings that outlive the call.
    let ret = unsafe {
        libc::mount(
            c"plyfs".as_ptr(),
            target.as_ptr(),
            c"fuse.plyfs".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV,
            options.as_ptr().cast(),
        )
    };
    check(ret.into()).map(drop)
}

/// mount(2) of a new tmpfs.
pub fn mount_tmpfs(target: &Path, options: &str) -> io::Result<()> {
    let (target, options) = (c_path(target)?, CString::new(options).map_err(io::Error::other)?);
    // SAFETY: C strings that outlive the call.
    let ret = unsafe {
        libc::mount(
            c"plyfs".as_ptr(),
            target.as_ptr(),
            c"tmpfs".as_ptr(),
            libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC,
            options.as_ptr().cast(),
        )
    };
    check(ret.into()).map(drop)
}

/// The control filesystem of FUSE connections (fusectl), mounted nowhere: for hosts and containers that do not have it
/// at /sys/fs/fuse/connections. fsopen(2), fsmount(2).
///
/// # Errors
/// Without CAP_SYS_ADMIN; on Linux before 5.2.
pub fn open_fusectl() -> io::Result<OwnedFd> {
    const CLOEXEC: libc::c_uint = 1;
    const CREATE: libc::c_uint = 6;
    // SAFETY: numbers and a C string that outlives the call.
    let context = new_fd(unsafe { libc::syscall(libc::SYS_fsopen, c"fusectl".as_ptr(), CLOEXEC) })?;
    let (fd, none) = (context.as_raw_fd(), ptr::null::<libc::c_char>());
    // SAFETY: numbers; this command takes neither key nor value.
    check(unsafe { libc::syscall(libc::SYS_fsconfig, fd, CREATE, none, none, 0) })?;
    let attributes = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    // SAFETY: numbers.
    new_fd(unsafe { libc::syscall(libc::SYS_fsmount, fd, CLOEXEC, attributes as libc::c_uint) })
}

/// The new descriptor that a system call returned.
fn new_fd(ret: libc::c_long) -> io::Result<OwnedFd> {
    // SAFETY: it is new, and has no other owner.
    check(ret).map(|fd| unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// umount2(2). With [`Detach::Yes`] also a mount that is in use.
pub fn unmount(target: &Path, detach: Detach) -> io::Result<()> {
    let target = c_path(target)?;
    let flags = match detach {
        Detach::No => 0,
        Detach::Yes => libc::MNT_DETACH,
    } | libc::UMOUNT_NOFOLLOW;
    // SAFETY: a C string that outlives the call.
    check(unsafe { libc::umount2(target.as_ptr(), flags) }.into()).map(drop)
}

/// Whether to detach a mount that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detach {
    /// The mount stays, and the call fails with EBUSY.
    No,
    /// The mount leaves the tree, and ends with its last user.
    Yes,
}

/// A descriptor that becomes readable when one of the signals arrives; the signals are blocked from then on.
pub fn signal_fd(signals: &[i32]) -> io::Result<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset before use.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        for signal in signals {
            libc::sigaddset(&mut set, *signal);
        }
        check(libc::sigprocmask(libc::SIG_BLOCK, &set, ptr::null_mut()).into())?;
        let fd = check(libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK).into())?;
        Ok(OwnedFd::from_raw_fd(fd as RawFd))
    }
}

/// Unblocks all signals, in a child before exec.
pub fn unblock_signals() {
    // SAFETY: async-signal-safe calls on a local set.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, ptr::null_mut());
    }
}

/// Reads the number of a signal from [`signal_fd`]; `None` when there is none.
pub fn read_signal(fd: BorrowedFd<'_>) -> Option<i32> {
    // SAFETY: the struct is plain numbers and as large as what signalfd writes.
    unsafe {
        let mut info: libc::signalfd_siginfo = std::mem::zeroed();
        let want = size_of::<libc::signalfd_siginfo>();
        let got = libc::read(fd.as_raw_fd(), (&raw mut info).cast(), want);
        (got == want as isize).then_some(info.ssi_signo as i32)
    }
}

/// Waits until one of the descriptors is readable or hung up. Returns which.
pub fn poll(fds: &[BorrowedFd<'_>], timeout_ms: i32) -> io::Result<Vec<bool>> {
    let mut polls: Vec<libc::pollfd> =
        fds.iter().map(|fd| libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 }).collect();
    // SAFETY: a slice with its length.
    match check(unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, timeout_ms) }.into()) {
        Err(e) if e.kind() != io::ErrorKind::Interrupted => Err(e),
        _ => Ok(polls.iter().map(|p| p.revents != 0).collect()),
    }
}

/// Connects to a socket in the filesystem. Waits up to `limit` for room in the socket's queue, then fails with
/// `WouldBlock`.
pub fn connect_within(path: &Path, limit: Option<Duration>) -> io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: a plain struct of numbers.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    // SAFETY: numbers only; the descriptor is new.
    let socket = unsafe {
        let fd = check(libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0).into())?;
        UnixStream::from_raw_fd(fd as RawFd)
    };
    socket.set_write_timeout(limit)?;
    let length = std::mem::size_of_val(&address) as libc::socklen_t;
    // SAFETY: an address with its length.
    check(unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), length) }.into())?;
    Ok(socket)
}

/// read(2).
pub fn read(fd: BorrowedFd<'_>, buf: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: a buffer with its length.
        match check(unsafe { libc::read(fd.as_raw_fd(), buf.as_mut_ptr().cast(), buf.len()) } as i64) {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            other => return other.map(|n| n as usize),
        }
    }
}

/// write(2) of all bytes or an error, as for devices and message sockets.
pub fn write(fd: BorrowedFd<'_>, buf: &[u8]) -> io::Result<()> {
    // SAFETY: a buffer with its length.
    let put = check(unsafe { libc::write(fd.as_raw_fd(), buf.as_ptr().cast(), buf.len()) } as i64)?;
    if put as usize == buf.len() {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::WriteZero, "short write"))
    }
}

/// Sends a whole message on a socket without waiting. `WouldBlock` when the other end does not read.
pub fn send_now(fd: BorrowedFd<'_>, buf: &[u8]) -> io::Result<()> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: a buffer with its length.
    check(unsafe { libc::send(fd.as_raw_fd(), buf.as_ptr().cast(), buf.len(), flags) } as i64).map(drop)
}

/// Makes the kernel kill this process when its parent's thread ends. Fails when the parent is gone already.
pub fn die_with_parent(parent: u32) -> io::Result<()> {
    // SAFETY: numbers only.
    unsafe {
        check(libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL).into())?;
        if libc::getppid() as u32 == parent {
            Ok(())
        } else {
            Err(io::Error::other("the supervisor is gone"))
        }
    }
}

/// Which protections of the process against memory pressure are in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Protection {
    /// Memory is locked in RAM.
    pub locked: bool,
    /// The kernel does not wait for this process's writeback when it reclaims memory for the process.
    pub io_flusher: bool,
}

/// RLIMIT_MEMLOCK: bytes that the process may lock without CAP_IPC_LOCK; `u64::MAX` when there is no limit.
pub fn memory_lock_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: plain struct out.
    unsafe { libc::getrlimit(libc::RLIMIT_MEMLOCK, &mut limit) };
    limit.rlim_cur
}

/// Locks memory as it is touched, and marks the process as one that serves I/O, as far as its rights allow.
pub fn protect() -> Protection {
    super::priority::prepare();
    // With a limit, MCL_FUTURE would make later mappings fail.
    let may_lock = effective_ids().0 == 0 || memory_lock_limit() == libc::RLIM_INFINITY;
    // SAFETY: numbers only.
    unsafe {
        let flags = libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT;
        let locked = may_lock && libc::mlockall(flags) == 0;
        const PR_SET_IO_FLUSHER: i32 = 57;
        let io_flusher = libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0;
        Protection { locked, io_flusher }
    }
}

/// Raises the limit on descriptors to its maximum.
pub fn raise_descriptor_limit() {
    // SAFETY: plain struct in and out.
    unsafe {
        let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        if libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) == 0 {
            limit.rlim_cur = limit.rlim_max;
            libc::setrlimit(libc::RLIMIT_NOFILE, &limit);
        }
    }
}

/// The first byte of a file at or after `offset` that is not in a hole; `None` when there is none.
pub fn next_data(fd: BorrowedFd<'_>, offset: u64) -> io::Result<Option<u64>> {
    // SAFETY: the descriptor is open, no memory is involved.
    match check(unsafe { libc::lseek(fd.as_raw_fd(), off(offset)?, libc::SEEK_DATA) }) {
        Ok(at) => Ok(Some(at as u64)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The first hole of a file at or after `offset`; the end of the file is one. `None` when `offset` is behind the end.
pub fn next_hole(fd: BorrowedFd<'_>, offset: u64) -> io::Result<Option<u64>> {
    // SAFETY: the descriptor is open, no memory is involved.
    match check(unsafe { libc::lseek(fd.as_raw_fd(), off(offset)?, libc::SEEK_HOLE) }) {
        Ok(at) => Ok(Some(at as u64)),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The limit on descriptors of the process; a low number when it is unknown.
pub fn descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: writes the plain struct that is passed.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } {
        0 => limit.rlim_cur,
        _ => 256,
    }
}

/// Effective user and group id.
pub fn effective_ids() -> (u32, u32) {
    // SAFETY: cannot fail.
    unsafe { (libc::geteuid(), libc::getegid()) }
}

/// Coarse wall clock in nanoseconds since the epoch: a few nanoseconds to read, a resolution of a few milliseconds.
pub fn now_ns() -> i64 {
    let mut at = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: plain struct out.
    unsafe { libc::clock_gettime(libc::CLOCK_REALTIME_COARSE, &mut at) };
    at.tv_sec * 1_000_000_000 + at.tv_nsec
}

/// A number that identifies this boot of the machine. Read once, because a confined process may not read it later.
pub fn boot_number() -> u64 {
    static NUMBER: OnceLock<u64> = OnceLock::new();
    *NUMBER.get_or_init(|| {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        // Never 0, which means none.
        u64::from(crc32c::crc32c(id.as_bytes())) | 1 << 32
    })
}

/// umask(2); returns the old mask. The mask belongs to the whole process, so this is for a process with one thread.
pub fn set_umask(mask: u32) -> u32 {
    // SAFETY: cannot fail.
    unsafe { libc::umask(mask) }
}

/// Number of this process.
pub fn pid() -> u32 {
    std::process::id()
}

/// Bytes of memory of the machine; 0 when the kernel does not say.
pub fn total_memory() -> usize {
    // SAFETY: an all-zero struct is valid, and the kernel fills it.
    let mut info = unsafe { std::mem::zeroed::<libc::sysinfo>() };
    // SAFETY: a pointer to a struct of this frame.
    let done = unsafe { libc::sysinfo(&raw mut info) };
    if done == 0 { (info.totalram as usize).saturating_mul(info.mem_unit as usize) } else { 0 }
}

/// Touches the pages of a buffer, so that no page fault happens when the kernel copies into it.
pub fn touch_pages(buf: &mut [u8]) {
    for at in (0..buf.len()).step_by(4096) {
        // SAFETY: in bounds; volatile, so that it is not left out.
        unsafe { ptr::write_volatile(buf.as_mut_ptr().add(at), 0) };
    }
}

/// Whether the connection of a /dev/fuse descriptor has ended.
pub fn fuse_ended(fd: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one pollfd with its count.
    let ready = unsafe { libc::poll(&mut poll, 1, 0) };
    ready == 1 && poll.revents & (libc::POLLERR | libc::POLLHUP) != 0
}
