//! FUSE_INTERRUPT, which the FUSE crate answers with ENOSYS: then the kernel never sends another one.
//!
//! The program is linked with `--wrap=read` and `--wrap=writev` (build.rs), so that every call of read(2) and writev(2)
//! from its Rust code comes here; those of the device pass [`unanswered`].
//! Of one descriptor, the FUSE device, the messages that say that a request's caller got a signal are taken out and
//! told to a listener, and the call is repeated. All others pass at the cost of a comparison. What must hold:
//! - A message is taken out only when its length, its length field and its opcode all say what it is.
//! - Nothing is answered: the kernel wants an answer only to send the message again (EAGAIN), or never (ENOSYS).
//!
//! Source: linux/include/uapi/linux/fuse.h, `fuse_in_header` and `fuse_interrupt_in`;
//! Documentation/filesystems/fuse/fuse.rst, "Interrupting filesystem operations".

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use super::unanswered;

const OPCODE_INTERRUPT: u32 = 36;
/// Of a header, and of the message with the number that follows it.
const HEADER: usize = 40;
const LENGTH: usize = HEADER + 8;

type Listener = Box<dyn Fn(u64) + Send + Sync>;

static DEVICE: AtomicI32 = AtomicI32::new(-1);
static LISTENER: OnceLock<Listener> = OnceLock::new();
/// The program was linked so that calls come here.
static WRAPPED: AtomicBool = AtomicBool::new(false);

/// Whether the program was linked so that messages can be taken out; known after the first read of anything.
pub fn are_seen() -> bool {
    WRAPPED.load(Ordering::Relaxed)
}

/// From now on `listener` hears of each interrupt that is read from `device`: the number of the request whose caller got
/// a signal. Once in the life of a process.
pub fn hear(device: BorrowedFd<'_>, listener: impl Fn(u64) + Send + Sync + 'static) {
    let _ = LISTENER.set(Box::new(listener));
    DEVICE.store(device.as_raw_fd(), Ordering::Release);
}

/// The descriptor's number may mean another file from now on.
pub fn hear_no_more() {
    DEVICE.store(-1, Ordering::Release);
}

/// The number of the request that a message interrupts, if it is such a message.
fn interrupted(message: &[u8]) -> Option<u64> {
    let word = |at: usize| Some(u32::from_ne_bytes(message.get(at..at + 4)?.try_into().ok()?));
    let is_one = message.len() == LENGTH && word(0)? as usize == LENGTH && word(4)? == OPCODE_INTERRUPT;
    let number = message.get(HEADER..LENGTH)?;
    is_one.then(|| number.try_into().map(u64::from_ne_bytes)).and_then(Result::ok)
}

/// What calls of read(2) are linked to.
///
/// # Safety
/// As of read(2): `buffer` has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __wrap_read(fd: RawFd, buffer: *mut libc::c_void, size: usize) -> isize {
    WRAPPED.store(true, Ordering::Relaxed);
    loop {
        // SAFETY: the caller's promise. The system call itself, as read(2) of the C library leads here.
        let read = || unsafe { libc::syscall(libc::SYS_read, fd, buffer, size) } as isize;
        if fd != DEVICE.load(Ordering::Acquire) {
            return read();
        }
        let got = unanswered::read_listed(buffer.cast(), read);
        if got != LENGTH as isize {
            return got;
        }
        // SAFETY: the kernel has just written that many bytes there.
        let message = unsafe { std::slice::from_raw_parts(buffer.cast::<u8>(), LENGTH) };
        match (interrupted(message), LISTENER.get()) {
            (Some(unique), Some(listener)) => listener(unique),
            _ => return got,
        }
    }
}

/// What calls of writev(2) are linked to.
///
/// # Safety
/// As of writev(2): `parts` has `count` parts, each with its length.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn __wrap_writev(fd: RawFd, parts: *const libc::iovec, count: libc::c_int) -> isize {
    // SAFETY: the caller's promise. The system call itself, as writev(2) of the C library leads here.
    let write = || unsafe { libc::syscall(libc::SYS_writev, fd, parts, count) } as isize;
    if count < 1 || fd != DEVICE.load(Ordering::Acquire) {
        return write();
    }
    // SAFETY: the caller's promise: the first part is there, and is as long as it says.
    let start = unsafe { std::slice::from_raw_parts((*parts).iov_base.cast::<u8>(), (*parts).iov_len) };
    unanswered::write_listed(start, write)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(length: u32, opcode: u32, unique: u64) -> Vec<u8> {
        let mut bytes = [length.to_ne_bytes(), opcode.to_ne_bytes()].concat();
        bytes.resize(HEADER, 0);
        bytes.extend(unique.to_ne_bytes());
        bytes
    }

    #[test]
    fn only_what_is_an_interrupt_in_every_respect_is_taken_out() {
        assert_eq!(interrupted(&message(48, 36, 0x8000_0000_0000_0042)), Some(0x8000_0000_0000_0042));
        assert_eq!(interrupted(&message(48, 37, 66)), None);
        assert_eq!(interrupted(&message(56, 36, 66)), None);
        assert_eq!(interrupted(&message(48, 36, 66)[..47]), None);
        let mut longer = message(48, 36, 66);
        longer.push(0);
        assert_eq!(interrupted(&longer), None);
    }

    #[test]
    fn interrupts_of_the_device_are_heard_and_everything_else_passes() {
        use std::os::fd::AsFd;
        use std::sync::Mutex;

        static HEARD: Mutex<Vec<u64>> = Mutex::new(Vec::new());
        let (ours, theirs) = super::super::sys::message_pair().expect("a pair");
        hear(theirs.as_fd(), |unique| HEARD.lock().expect("no panic").push(unique));
        let send = |bytes: &[u8]| super::super::sys::write(ours.as_fd(), bytes).expect("sent");
        let mut buffer = [0_u8; 256];
        let mut read = || {
            // SAFETY: the buffer has that much room.
            let got = unsafe { __wrap_read(theirs.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
            buffer[..got as usize].to_vec()
        };
        let other = message(48, 15, 8);
        send(&message(48, 36, 6));
        send(&message(48, 36, 7));
        send(&other);
        assert_eq!(read(), other);
        assert_eq!(*HEARD.lock().expect("no panic"), [6, 7]);
        // The number belongs to another file.
        hear_no_more();
        send(&message(48, 36, 9));
        assert_eq!(read(), message(48, 36, 9));
    }
}
