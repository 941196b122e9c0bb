//! Messages to the kernel besides replies: the answer to FUSE_INIT, and notifications.
//!
//! Source: linux/include/uapi/linux/fuse.h, protocol 7.45.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use super::Node;
use super::promises::{OLDEST, Protocol};
use crate::format::{Reader, Writer};
use crate::io::sys;
use crate::serve::Frontend;

const OPCODE_INIT: u32 = 26;
const NOTIFY_INVAL_INODE: i32 = 2;
const NOTIFY_RESEND: i32 = 7;
/// Since Linux 6.18.
const NOTIFY_PRUNE: i32 = 9;
const MINOR: u32 = 45;

/// Most bytes of one read or write request.
pub const MAX_WRITE: u32 = 1 << 20;
/// Asynchronous requests of the whole mount that may be in flight. Requests that wait for a server count too, so this
/// is the largest value of the protocol. The kernel lowers it to `max_user_bgreq` for a supervisor without
/// CAP_SYS_ADMIN.
const MAX_BACKGROUND: u16 = u16::MAX;
/// Above this number of asynchronous requests the kernel skips readahead, which a mount with direct I/O has only for
/// mapped files.
const CONGESTION: u16 = MAX_BACKGROUND / 4 * 3;
/// The file with `max_user_bgreq`.
const USER_LIMIT: &str = "/sys/module/fuse/parameters/max_user_bgreq";

const ASYNC_READ: u64 = 1 << 0;
const BIG_WRITES: u64 = 1 << 5;
const ASYNC_DIO: u64 = 1 << 15;
const PARALLEL_DIROPS: u64 = 1 << 18;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
const DIRECT_IO_ALLOW_MMAP: u64 = 1 << 36;
const HAS_RESEND: u64 = 1 << 39;
const WANTED: u64 = ASYNC_READ
    | BIG_WRITES
    | ASYNC_DIO
    | PARALLEL_DIROPS
    | MAX_PAGES
    | INIT_EXT
    | DIRECT_IO_ALLOW_MMAP
    | HAS_RESEND;

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// A lower minor protocol number than the kernel's, so that tests have on any kernel what an older one offers.
pub const PROTOCOL_ENV: &str = "PLYFS_FUSE_MINOR";

/// What a kernel offers, no later than the protocol that the environment names.
fn offered_by(kernel: u32, flags: u64, limit: Option<u32>) -> (u32, u64) {
    /// Flags and the minor protocol number that they came with.
    const CAME_WITH: [(u64, u32); 2] = [(DIRECT_IO_ALLOW_MMAP, 39), (HAS_RESEND, 40)];
    let minor = limit.map_or(kernel, |limit| kernel.min(limit));
    let hidden = CAME_WITH.into_iter().filter(|(_, came)| limit.is_some_and(|limit| limit < *came));
    (minor, hidden.fold(flags, |flags, (flag, _)| flags & !flag))
}

/// Reads FUSE_INIT from a new mount and answers it. The answer holds for the life of the mount.
///
/// # Errors
/// When the kernel's protocol is older than that of Linux 5.14.
pub fn answer_init(fuse: BorrowedFd<'_>) -> io::Result<Protocol> {
    let mut buf = vec![0; 64 << 10];
    let got = sys::read(fuse, &mut buf)?;
    let mut r = Reader::new(&buf[..got], "FUSE_INIT");
    let short = |_| bad("FUSE_INIT is too short");
    let _len = r.u32().map_err(short)?;
    let opcode = r.u32().map_err(short)?;
    let unique = r.u64().map_err(short)?;
    r.raw(24).map_err(short)?;
    if opcode != OPCODE_INIT {
        return Err(bad("the first request was not FUSE_INIT"));
    }
    let (major, minor) = (r.u32().map_err(short)?, r.u32().map_err(short)?);
    let (readahead, flags) = (r.u32().map_err(short)?, r.u32().map_err(short)?);
    let flags2 = r.u32().unwrap_or(0);
    let limit = std::env::var(PROTOCOL_ENV).ok().and_then(|text| text.parse().ok());
    let (minor, offered) = offered_by(minor, u64::from(flags) | u64::from(flags2) << 32, limit);
    if major != 7 || minor < OLDEST {
        return Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("the kernel speaks FUSE {major}.{minor}, which is too old; use Linux 5.14 or newer"),
        ));
    }
    let flags = WANTED & offered;
    let mut w = Writer::new();
    w.u32(16 + 64).u32(0).u64(unique);
    w.u32(7).u32(minor.min(MINOR)).u32(readahead).u32(flags as u32);
    w.u16(MAX_BACKGROUND).u16(CONGESTION).u32(MAX_WRITE).u32(1);
    w.u16((MAX_WRITE / 4096) as u16).u16(0).u32((flags >> 32) as u32);
    w.raw(&[0; 28]);
    sys::write(fuse, w.as_slice())?;
    Ok(Protocol { minor, resend: flags & HAS_RESEND != 0, shared_mmap: flags & DIRECT_IO_ALLOW_MMAP != 0 })
}

/// Ends a request with EIO, of those that were read from this descriptor of the connection. False when it was not there
/// any more.
pub fn fail(fuse: BorrowedFd<'_>, unique: u64) -> bool {
    let mut w = Writer::new();
    w.u32(16).u32((-libc::EIO) as u32).u64(unique);
    sys::write(fuse, w.as_slice()).is_ok()
}

/// The largest number of asynchronous requests that the kernel allows in flight, for a mount of this process's user.
pub fn window() -> u16 {
    if sys::effective_ids().0 == 0 {
        return MAX_BACKGROUND;
    }
    let limit = std::fs::read_to_string(USER_LIMIT).ok().and_then(|text| text.trim().parse::<u32>().ok());
    // The default of Linux 6.x on a host of 1 GiB.
    let limit = limit.unwrap_or(334);
    u16::try_from(limit).unwrap_or(MAX_BACKGROUND)
}

/// Sets the window of this version on a mount that an earlier version made. `device`: the mount's minor device number.
///
/// # Errors
/// Without CAP_SYS_ADMIN the window stays below `max_user_bgreq`. Without fusectl it cannot be changed.
pub fn widen(device: u32) -> io::Result<()> {
    control(device, "max_background", &window().to_string())?;
    control(device, "congestion_threshold", &(window() / 4 * 3).to_string())
}

/// Aborts a connection: all waiting and all later requests fail. `device`: as for [`widen`].
///
/// # Errors
/// When fusectl is not mounted and cannot be mounted.
pub fn abort(device: u32) -> io::Result<()> {
    control(device, "abort", "1")
}

fn control(device: u32, name: &str, value: &str) -> io::Result<()> {
    match std::fs::write(format!("/sys/fs/fuse/connections/{device}/{name}"), value) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let root = sys::open_fusectl()?;
            std::fs::write(format!("/proc/self/fd/{}/{device}/{name}", root.as_raw_fd()), value)
        }
        other => other,
    }
}

/// A FUSE_INIT message as the kernel would send it, for the FUSE crate, which needs a handshake.
pub fn synthetic_init() -> Vec<u8> {
    let mut w = Writer::new();
    w.u32(40 + 64).u32(OPCODE_INIT).u64(2).raw(&[0; 24]);
    let flags = u64::MAX;
    w.u32(7).u32(MINOR).u32(MAX_WRITE).u32(flags as u32).u32((flags >> 32) as u32);
    w.raw(&[0; 44]);
    w.finish()
}

/// Sends notifications. Only threads that hold no lock and serve no request may call it: the kernel may wait for a
/// reply to a request before it accepts a notification.
pub struct KernelNotifier {
    fuse: OwnedFd,
}

impl KernelNotifier {
    /// Uses a descriptor of the mount's connection.
    pub fn new(fuse: OwnedFd) -> Self {
        Self { fuse }
    }

    fn send(&self, code: i32, body: &[u8]) -> io::Result<()> {
        let mut w = Writer::new();
        w.u32(16 + body.len() as u32).u32(code as u32).u64(0).raw(body);
        sys::write(self.fuse.as_fd(), w.as_slice())
    }

    /// Makes the kernel queue again the requests that an earlier worker read and did not answer.
    pub fn resend(&self) -> io::Result<()> {
        self.send(NOTIFY_RESEND, &[])
    }

    /// Makes the kernel drop the unused names that it keeps of an inode. With the last name it forgets the inode.
    ///
    /// The kernel looks names up again at each use, so this only frees memory sooner; an older kernel refuses it.
    /// FUSE_NOTIFY_INVAL_ENTRY, which drops one name by its directory, must not be used. It waits, unkillably, for the
    /// lock of the directory. The creator of a file there holds that lock until its request is answered. A worker that
    /// is killed at that moment never ends, so no other worker starts, and the request is never answered.
    pub fn forget_names(&self, ino: u64) {
        let mut w = Writer::new();
        w.u32(1).u32(0).u64(0).u64(ino);
        let _ = self.send(NOTIFY_PRUNE, w.as_slice());
    }

    /// Drops the cached attributes of an inode, but not its pages. False when the kernel does not know the inode, so
    /// that no client can have it open.
    pub fn refresh(&self, ino: u64) -> io::Result<bool> {
        let mut w = Writer::new();
        w.u64(ino).i64(-1).i64(0);
        match self.send(NOTIFY_INVAL_INODE, w.as_slice()) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(e),
        }
    }
}

impl Frontend for KernelNotifier {
    fn release(&self, disk: u64) {
        self.forget_names(Node::Disk(disk).ino());
    }

    fn may_use(&self, disk: u64) -> io::Result<bool> {
        self.refresh(Node::Disk(disk).ino())
    }

    fn release_base(&self, base: u64) {
        self.forget_names(Node::Base(base).ino());
    }

    fn may_use_base(&self, base: u64) -> io::Result<bool> {
        self.refresh(Node::Base(base).ino())
    }

    fn resized(&self, disk: u64) {
        // Of an inode that the kernel does not know there are no attributes to drop.
        let _ = self.refresh(Node::Disk(disk).ino());
    }
}
