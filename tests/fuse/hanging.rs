//! A filesystem with one file whose reads hang on request. It simulates files of a base on an NFS server that is gone.

use std::ffi::OsStr;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime};

use fuser::{
    BackgroundSession, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo,
    LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEntry, ReplyOpen, Request,
};

const FILE: u64 = 2;
/// A file whose open hangs.
const TRAP: u64 = 3;

/// A request without an answer.
enum Held {
    Read(ReplyData),
    Open(ReplyOpen),
    Attributes(ReplyAttr),
}

#[derive(Default)]
struct State {
    hangs: bool,
    /// Attributes hang too. They are never cached.
    attributes_hang: bool,
    held: Vec<Held>,
}

struct Shared {
    bytes: Vec<u8>,
    state: Mutex<State>,
    more: Condvar,
}

struct Fs(Arc<Shared>);

impl Fs {
    fn attr(&self, ino: u64) -> FileAttr {
        let (kind, perm) =
            if ino == 1 { (FileType::Directory, 0o755) } else { (FileType::RegularFile, 0o644) };
        let at = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        FileAttr {
            ino: INodeNo(ino),
            size: self.0.bytes.len() as u64,
            blocks: self.0.bytes.len() as u64 / 512,
            atime: at,
            mtime: at,
            ctime: at,
            crtime: at,
            kind,
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }

    /// The kernel caches neither the name nor the attributes.
    fn named(&self, ino: u64, reply: ReplyEntry) {
        reply.entry(&Duration::ZERO, &self.attr(ino), Generation(0));
    }

    fn hold(&self, held: Held) {
        self.0.state.lock().unwrap().held.push(held);
        self.0.more.notify_all();
    }
}

impl Filesystem for Fs {
    fn lookup(&self, _: &Request, _: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match name.to_str() {
            Some("image") => self.named(FILE, reply),
            Some(name) if name.starts_with("trap") => self.named(TRAP, reply),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if ino.0 != 1 && self.0.state.lock().unwrap().attributes_hang {
            return self.hold(Held::Attributes(reply));
        }
        reply.attr(&Duration::ZERO, &self.attr(ino.0));
    }

    fn open(&self, _: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        if ino.0 == TRAP && self.0.state.lock().unwrap().hangs {
            return self.hold(Held::Open(reply));
        }
        reply.opened(FileHandle(0), FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NOFLUSH);
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
        if self.0.state.lock().unwrap().hangs {
            return self.hold(Held::Read(reply));
        }
        let end = (offset as usize + size as usize).min(self.0.bytes.len());
        reply.data(&self.0.bytes[(offset as usize).min(end)..end]);
    }
}

/// Mounted until it is dropped.
pub struct Hanging {
    dir: tempfile::TempDir,
    shared: Arc<Shared>,
    session: Option<BackgroundSession>,
}

impl Hanging {
    pub fn new(bytes: Vec<u8>) -> Self {
        let dir = tempfile::Builder::new().prefix("plyfs-hang-").tempdir_in("/var/tmp").unwrap();
        let shared = Arc::new(Shared { bytes, state: Mutex::default(), more: Condvar::new() });
        let mut config = fuser::Config::default();
        config.mount_options = vec![fuser::MountOption::FSName("hanging".into())];
        let session = fuser::spawn_mount(Fs(shared.clone()), dir.path(), &config).unwrap();
        Self { dir, shared, session: Some(session) }
    }

    pub fn image(&self) -> PathBuf {
        self.dir.path().join("image")
    }

    /// A path whose open hangs while the filesystem hangs.
    pub fn trap(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("trap{number}"))
    }

    /// From now on only names and attributes are answered.
    pub fn hang(&self) {
        self.shared.state.lock().unwrap().hangs = true;
    }

    /// From now on only names are answered, as by a server that has gone.
    pub fn hang_with_attributes(&self) {
        let mut state = self.shared.state.lock().unwrap();
        (state.hangs, state.attributes_hang) = (true, true);
    }

    /// Answers again; the requests that hung fail.
    pub fn go_on(&self) {
        let held = {
            let mut state = self.shared.state.lock().unwrap();
            (state.hangs, state.attributes_hang) = (false, false);
            std::mem::take(&mut state.held)
        };
        for held in held {
            match held {
                Held::Read(reply) => reply.error(Errno::EIO),
                Held::Open(reply) => reply.error(Errno::EIO),
                Held::Attributes(reply) => reply.error(Errno::EIO),
            }
        }
    }

    /// Waits until so many requests hang; fails after half a minute.
    #[track_caller]
    pub fn wait_for(&self, count: usize) {
        let state = self.shared.state.lock().unwrap();
        let few = |state: &mut State| state.held.len() < count;
        let (state, timeout) =
            self.shared.more.wait_timeout_while(state, Duration::from_secs(30), few).unwrap();
        assert!(!timeout.timed_out(), "{} requests hang, {count} were expected", state.held.len());
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.go_on();
        let session = self.session.take();
        // A lazy unmount, because a file may still be open.
        let _ = std::process::Command::new("umount").arg("-l").arg(self.dir.path()).status();
        drop(session);
    }
}
