//! Handles FUSE_INTERRUPT. The FUSE crate answers it with ENOSYS, after which the kernel never sends another one.
//!
//! The program is linked with `--wrap=read` and `--wrap=writev` (build.rs), so every call of read(2) and writev(2) from its
//! Rust code comes here; those of the device pass [`unanswered`]. Of one descriptor, the FUSE device, this module takes out
//! the messages that say that a request's caller got a signal. It passes them to a listener and repeats the call. All other
//! reads pass at the cost of a comparison. What must hold:
//! - A message is taken out only when its length, its length field and its opcode all identify it.
//! - No interrupt is answered: an answer makes the kernel send the message again (EAGAIN), or no more of them (ENOSYS).
//!
//! Source: linux/include/uapi/linux/fuse.h, `fuse_in_header` and `fuse_interrupt_in`;
//! Documentation/filesystems/fuse/fuse.rst, "Interrupting filesystem operations".

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use super::unanswered;

const OPCODE_INTERRUPT: u32 = 36;
/// Bytes of a header, and of the whole message: the header and the number of the interrupted request.
const HEADER: usize = 40;
const LENGTH: usize = HEADER + 8;

type Listener = Box<dyn Fn(u64) + Send + Sync>;

static DEVICE: AtomicI32 = AtomicI32::new(-1);
static LISTENER: OnceLock<Listener> = OnceLock::new();
/// Whether the program was linked so that calls of read(2) come here.
static WRAPPED: AtomicBool = AtomicBool::new(false);

/// Whether the program was linked so that messages can be taken out. Known after the first read of any file.
pub fn is_linked() -> bool {
    WRAPPED.load(Ordering::Relaxed)
}

/// Passes each interrupt that is read from `device` to `listener`: the number of the request whose caller got a signal.
/// To be called once in the life of a process.
pub fn set_listener(device: BorrowedFd<'_>, listener: impl Fn(u64) + Send + Sync + 'static) {
    let _ = LISTENER.set(Box::new(listener));
    DEVICE.store(device.as_raw_fd(), Ordering::Release);
}

/// Stops taking out messages: the number of the descriptor may soon mean another file.
pub fn clear_listener() {
    DEVICE.store(-1, Ordering::Release);
}

/// The number of the request that a message interrupts; `None` for any other message.
fn interrupted(message: &[u8]) -> Option<u64> {
    let word = |at: usize| Some(u32::from_ne_bytes(message.get(at..at + 4)?.try_into().ok()?));
    let is_one = message.len() == LENGTH && word(0)? as usize == LENGTH && word(4)? == OPCODE_INTERRUPT;
    let number = message.get(HEADER..LENGTH)?;
    is_one.then(|| number.try_into().map(u64::from_ne_bytes)).and_then(Result::ok)
}

/// The target of calls of read(2).
///
/// # Safety
/// As for read(2): `buffer` has room for `size` bytes.
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
    fn only_complete_interrupt_messages_are_taken_out() {
        assert_eq!(interrupted(&message(48, 36, 0x8000_0000_0000_0042)), Some(0x8000_0000_0000_0042));
        assert_eq!(interrupted(&message(48, 37, 66)), None);
        assert_eq!(interrupted(&message(56, 36, 66)), None);
        assert_eq!(interrupted(&message(48, 36, 66)[..47]), None);
        let mut longer = message(48, 36, 66);
        longer.push(0);
        assert_eq!(interrupted(&longer), None);
    }

    #[test]
    fn interrupts_of_the_device_reach_the_listener_and_all_else_passes() {
        use std::os::fd::AsFd;
        use std::sync::Mutex;

        static HEARD: Mutex<Vec<u64>> = Mutex::new(Vec::new());
        let (ours, theirs) = super::super::sys::message_pair().expect("a pair");
        set_listener(theirs.as_fd(), |unique| HEARD.lock().expect("no panic").push(unique));
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
        clear_listener();
        send(&message(48, 36, 9));
        assert_eq!(read(), message(48, 36, 9));
    }
}
