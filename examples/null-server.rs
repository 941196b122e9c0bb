//! A FUSE server that answers from memory and does nothing else: the limit of the transport, with which scripts/bench
//! compares plyfs.
//!
//!     null-server MOUNT BYTES
//!
//! MOUNT/disks/null.raw has BYTES bytes. Every read returns the same mebibyte of memory, every write is dropped, every
//! flush succeeds at once. What costs time outside of the server is as in plyfs: the FUSE crate, the number of threads,
//! the flags of the mount and of open files, the largest request, and attributes that the kernel does not keep. The
//! program prints a line `null-server ready` once the mount can be used. It ends when the mount is gone.

use std::ffi::OsStr;
use std::io;
use std::process::exit;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen,
    ReplyWrite, Request, Session, SessionACL, WriteFlags,
};
use plyfs::config::Overrides;
use plyfs::fuse::kernel::MAX_WRITE;

const ROOT: INodeNo = INodeNo::ROOT;
const DISKS: INodeNo = INodeNo(2);
const DISK: INodeNo = INodeNo(3);
const TTL: Duration = Duration::ZERO;

struct Null {
    size: u64,
    bytes: Vec<u8>,
}

impl Null {
    fn attributes(&self, ino: INodeNo) -> FileAttr {
        let is_file = ino == DISK;
        FileAttr {
            ino,
            size: if is_file { self.size } else { 0 },
            blocks: if is_file { self.size / 512 } else { 0 },
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: if is_file { FileType::RegularFile } else { FileType::Directory },
            perm: if is_file { 0o600 } else { 0o755 },
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

impl Filesystem for Null {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // As `WANTED` of src/fuse/kernel.rs.
        for flag in
            [InitFlags::FUSE_ASYNC_DIO, InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP]
        {
            config
                .add_capabilities(flag)
                .map_err(|_| io::Error::other(format!("the kernel lacks {flag:?}")))?;
        }
        let refused = |nearest| io::Error::other(format!("a limit was refused; the nearest is {nearest}"));
        config.set_max_write(MAX_WRITE).map_err(refused)?;
        let refused = |nearest| io::Error::other(format!("a limit was refused; the nearest is {nearest}"));
        config.set_max_background(u16::MAX).map_err(refused)?;
        config.set_congestion_threshold(u16::MAX / 4 * 3).map_err(refused)?;
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = match parent {
            ROOT if name == "disks" => DISKS,
            DISKS if name == "null.raw" => DISK,
            _ => return reply.error(Errno::ENOENT),
        };
        reply.entry(&TTL, &self.attributes(found), Generation(0));
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        reply.attr(&TTL, &self.attributes(ino));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let flags = FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let left = self.size.saturating_sub(offset).min(self.bytes.len() as u64) as usize;
        reply.data(&self.bytes[..left.min(size as usize)]);
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.written(data.len() as u32);
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }
}

fn run(mount: &str, size: u64) -> Result<(), String> {
    // plyfs's own default.
    let threads =
        plyfs::config::Config::load(None, Overrides::default()).map_err(|e| e.to_string())?.fuse_threads;
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("null".into()), MountOption::DefaultPermissions];
    config.acl = SessionACL::All;
    config.n_threads = Some(threads);
    // Not zeros: the pages exist before the first request.
    let null = Null { size, bytes: vec![0x5a; MAX_WRITE as usize] };
    let session = Session::new(null, mount, &config).map_err(|e| format!("cannot mount {mount}: {e}"))?;
    println!("null-server ready");
    session.run().map_err(|e| format!("cannot read requests: {e}"))
}

fn main() {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let size = arguments.get(1).and_then(|text| text.parse().ok());
    let (Some(size), [mount, _]) = (size, &arguments[..]) else {
        eprintln!("usage: null-server MOUNT BYTES");
        exit(2);
    };
    if let Err(error) = run(mount, size) {
        eprintln!("null-server: {error}");
        exit(1);
    }
}
