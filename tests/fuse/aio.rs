//! Asynchronous direct reads with io_submit(2), as libaio in QEMU and fio makes them.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// `struct iocb` of linux/aio_abi.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Block {
    data: u64,
    key: u32,
    rw_flags: u32,
    opcode: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    flags: u32,
    eventfd: u32,
}

/// `struct io_event`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Event {
    data: u64,
    object: u64,
    result: i64,
    result2: i64,
}

const READ: u16 = 0;
const PAGE: usize = 4096;

/// Reads of 4 KiB from one file. Reads that are under way when it is dropped must end by themselves.
pub struct Reads {
    context: u64,
    file: File,
    /// One page for all reads. Only a caller with a single read looks at its contents.
    buffer: *mut libc::c_void,
}

// SAFETY: the buffer is memory of this process, which the kernel alone writes to.
unsafe impl Send for Reads {}

impl Reads {
    pub fn new(path: &Path, depth: u32) -> Self {
        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
        let mut context = 0_u64;
        // SAFETY: the context is written to `context`.
        let made = unsafe { libc::syscall(libc::SYS_io_setup, depth, &raw mut context) };
        assert_eq!(made, 0, "io_setup: {}", io::Error::last_os_error());
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping.
        let buffer = unsafe {
            libc::mmap(std::ptr::null_mut(), PAGE, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
        };
        assert_ne!(buffer, libc::MAP_FAILED);
        Self { context, file, buffer }
    }

    /// Begins a read of 4 KiB at each of these offsets.
    pub fn submit(&self, offsets: impl IntoIterator<Item = u64>) {
        let blocks: Vec<Block> = offsets
            .into_iter()
            .map(|offset| Block {
                opcode: READ,
                file: self.file.as_raw_fd() as u32,
                buffer: self.buffer as u64,
                bytes: PAGE as u64,
                offset: offset as i64,
                data: offset,
                ..Block::default()
            })
            .collect();
        let pointers: Vec<*const Block> = blocks.iter().map(std::ptr::from_ref).collect();
        let mut done = 0;
        while done < pointers.len() {
            let rest = &pointers[done..];
            // SAFETY: each points to a block that lives until the call returns; the buffer lives as long as `self`.
            let taken =
                unsafe { libc::syscall(libc::SYS_io_submit, self.context, rest.len(), rest.as_ptr()) };
            assert!(taken > 0, "io_submit: {}", io::Error::last_os_error());
            done += taken as usize;
        }
    }

    /// The results of ended reads, at most `most`. Waits at most `timeout` for the first.
    pub fn ended(&self, most: usize, timeout: Duration) -> Vec<i64> {
        let mut events = vec![Event::default(); most];
        let timeout =
            libc::timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
        // SAFETY: there is room for that many events.
        let got = unsafe {
            libc::syscall(
                libc::SYS_io_getevents,
                self.context,
                1_i64,
                most,
                events.as_mut_ptr(),
                &raw const timeout,
            )
        };
        events[..usize::try_from(got).unwrap_or(0)].iter().map(|event| event.result).collect()
    }

    /// The bytes of the last read.
    pub fn page(&self) -> Vec<u8> {
        // SAFETY: the mapping has that many bytes, and the caller has no read under way.
        unsafe { std::slice::from_raw_parts(self.buffer.cast::<u8>(), PAGE) }.to_vec()
    }

    /// Makes `count` reads at these offsets, `depth` at a time. Returns the latency of each, sorted.
    pub fn latencies(
        &self,
        count: usize,
        depth: usize,
        mut offset: impl FnMut() -> u64,
    ) -> Option<Vec<Duration>> {
        let mut all = Vec::with_capacity(count);
        while all.len() < count {
            let began = Instant::now();
            self.submit((0..depth).map(|_| offset()));
            for _ in 0..depth {
                let ended = self.ended(1, Duration::from_secs(20));
                assert_eq!(ended, [PAGE as i64], "a read failed or does not end");
                all.push(began.elapsed());
            }
        }
        all.sort_unstable();
        Some(all)
    }
}

impl Drop for Reads {
    fn drop(&mut self) {
        // SAFETY: the context is ours; the kernel waits for reads that are under way.
        unsafe { libc::syscall(libc::SYS_io_destroy, self.context) };
    }
}
