//! The opener: a process that opens the files of bases for the worker, and can do nothing else.
//!
//! The worker parses what guests and images contain, so it gives up the right to open files of the host. But a base
//! can be added at any time, with a path that nobody knew when the rights were given up, and landlock can never be
//! widened. So the worker forks this process before, and asks it.
//!
//! What must hold:
//! - It opens regular files for reading only, never a file of the daemon's own mount, and with `[security] base_dirs`
//!   none outside of those; it writes nothing. Landlock, the capabilities and a filter of system calls hold it to that.
//! - It keeps nothing of the worker but one socket and standard error, and dies with it.
//! - A request that hangs (a dead network filesystem) holds up no other: there is a thread for each, and each request
//!   brings the socket for its answer. Those for one path are refused when several hang.
//! - Without it no base could be attached, so a worker whose opener is gone ends, and the next one has a new opener.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::confine;
use crate::config::Config;
use crate::io::{confine as process, sys};
use crate::source::{OpenHere, OpenImage, Opened, SourceError, SourceErrorKind};

/// As many requests may hang, and another one is still answered.
const THREADS: usize = 512;
/// A request that takes so long may hang.
const HANGS: Duration = Duration::from_secs(1);
/// So many requests for one path may hang; further ones are refused.
const HANGING: usize = 4;
const STACK: usize = 256 << 10;

/// Answers on the wire. The numbers mean something to one program only: both sides are the same process image.
const KINDS: [SourceErrorKind; 8] = [
    SourceErrorKind::NotFound,
    SourceErrorKind::NotAFile,
    SourceErrorKind::Permission,
    SourceErrorKind::Empty,
    SourceErrorKind::Changed,
    SourceErrorKind::OwnMount,
    SourceErrorKind::Outside,
    SourceErrorKind::Io,
];
const OPENED: u8 = u8::MAX;

/// The worker's end.
pub struct Opener {
    socket: OwnedFd,
}

impl Opener {
    /// Starts the process. Only while this one has a single thread.
    ///
    /// # Errors
    /// When there are other threads, or no process can be made.
    pub fn start(config: &Config) -> io::Result<Self> {
        let (ours, theirs) = sys::message_pair()?;
        match process::fork()? {
            process::Forked::Parent(pid) => {
                tracing::debug!(pid, "the opener runs");
                Ok(Self { socket: ours })
            }
            process::Forked::Child => {
                let code = match run(config, &theirs) {
                    Ok(()) => 0,
                    Err(error) => {
                        tracing::error!(%error, "the opener ends");
                        1
                    }
                };
                std::process::exit(code);
            }
        }
    }

    fn ask(&self, path: &Path) -> io::Result<Result<Opened, (SourceErrorKind, i32)>> {
        let (ours, theirs) = sys::message_pair()?;
        process::send_message(self.socket.as_fd(), path.as_os_str().as_bytes(), Some(theirs.as_fd()))?;
        drop(theirs);
        let mut answer = [0; 6];
        let (got, fd) = process::receive_message(ours.as_fd(), &mut answer)?;
        let [kind, direct, errno @ ..] = answer;
        match (got, fd) {
            (6, Some(fd)) if kind == OPENED => Ok(Ok(Opened { file: File::from(fd), direct: direct != 0 })),
            (6, None) => {
                let kind = KINDS.get(usize::from(kind)).copied().unwrap_or(SourceErrorKind::Io);
                Ok(Err((kind, i32::from_le_bytes(errno))))
            }
            (0, _) => Err(io::ErrorKind::BrokenPipe.into()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl OpenImage for Opener {
    fn open(&self, path: &Path) -> Result<Opened, SourceError> {
        match self.ask(path) {
            Ok(Ok(opened)) => Ok(opened),
            Ok(Err((kind, 0))) => Err(SourceError::new(kind, "open", path)),
            Ok(Err((_, errno))) => {
                Err(SourceError::from_io("open", path, io::Error::from_raw_os_error(errno)))
            }
            Err(error) if gone(&error) => {
                tracing::error!("the opener is gone; this worker ends so that the next one has another");
                std::process::abort();
            }
            Err(error) => Err(SourceError::from_io("open", path, error)),
        }
    }
}

/// Whether the process at the other end is not there any more.
pub(super) fn gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}

/// What may be opened.
struct Rules {
    mount: PathBuf,
    dirs: Vec<PathBuf>,
}

impl Rules {
    fn open(&self, path: &Path) -> Result<Opened, SourceError> {
        let refuse = |kind| Err(SourceError::new(kind, "open", path));
        // Before the file is opened: a base on the daemon's own mount would wait for itself. The path as it is comes
        // first, because even to resolve it there would ask the worker.
        if path.starts_with(&self.mount) {
            return refuse(SourceErrorKind::OwnMount);
        }
        let real = std::fs::canonicalize(path).map_err(|error| SourceError::from_io("open", path, error))?;
        if real.starts_with(&self.mount) {
            return refuse(SourceErrorKind::OwnMount);
        }
        if !self.dirs.is_empty() && !self.dirs.iter().any(|dir| real.starts_with(dir)) {
            return refuse(SourceErrorKind::Outside);
        }
        OpenHere.open(path)
    }
}

/// The child. Returns when the worker is gone.
fn run(config: &Config, socket: &OwnedFd) -> io::Result<()> {
    process::set_name(c"plyfs-opener");
    process::close_all_but(socket.as_fd())?;
    // Nothing of the host is kept busy by it.
    std::env::set_current_dir("/")?;
    let real = |path: &PathBuf| std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    let dirs: Vec<PathBuf> = config.security.base_dirs.iter().map(real).collect();
    confine::opener(&config.security, &dirs);
    // The mount's path came without symbolic links from the supervisor; to look at it here would be to touch it.
    let rules = Rules { mount: config.mount.clone(), dirs };
    let (idle, all) = (AtomicUsize::new(1), AtomicUsize::new(1));
    let threads = Arc::new(Threads { rules, idle, all, opening: Opening::default() });
    serve(&threads, socket);
    Ok(())
}

/// They are made as they are needed: most workers ask for a few files, one after the other.
struct Threads {
    rules: Rules,
    idle: AtomicUsize,
    all: AtomicUsize,
    opening: Opening,
}

/// Paths that are being opened, and since when.
#[derive(Default)]
struct Opening(Mutex<BTreeMap<PathBuf, Vec<Instant>>>);

impl Opening {
    /// Opens a path, unless earlier requests for it hang.
    fn open(&self, rules: &Rules, path: &Path, now: Instant) -> Result<Opened, SourceError> {
        {
            let mut opening = self.0.lock();
            let since = opening.entry(path.to_owned()).or_default();
            let hanging = since.iter().filter(|since| now.saturating_duration_since(**since) > HANGS);
            if hanging.count() >= HANGING {
                let busy = io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "earlier requests to open it have had no answer from its filesystem",
                );
                return Err(SourceError::from_io("open", path, busy));
            }
            since.push(now);
        }
        let opened = rules.open(path);
        let mut opening = self.0.lock();
        if let Some(since) = opening.get_mut(path) {
            if let Some(at) = since.iter().position(|since| *since == now) {
                since.swap_remove(at);
            }
            if since.is_empty() {
                opening.remove(path);
            }
        }
        opened
    }
}

impl Threads {
    /// One is busy from now on. Sees to it that another one waits, as far as possible.
    fn one_is_busy(self: &Arc<Self>, socket: &OwnedFd) {
        if self.idle.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        // Where that fails, the request is answered all the same, and the next one waits for it.
        if self.all.fetch_add(1, Ordering::AcqRel) >= THREADS || self.start_one(socket).is_err() {
            self.all.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn start_one(self: &Arc<Self>, socket: &OwnedFd) -> io::Result<()> {
        let (threads, socket) = (Arc::clone(self), socket.try_clone()?);
        // Before it runs: it may take a request at once, and be busy before it was counted as idle.
        self.idle.fetch_add(1, Ordering::AcqRel);
        let thread = std::thread::Builder::new().name("open".into()).stack_size(STACK).spawn(move || {
            serve(&threads, &socket);
            std::process::exit(0);
        });
        if thread.is_err() {
            self.idle.fetch_sub(1, Ordering::AcqRel);
        }
        thread.map(drop)
    }
}

/// Answers until the worker is gone. Each message goes to one of the threads that wait.
fn serve(threads: &Arc<Threads>, socket: &OwnedFd) {
    let mut request = vec![0; process::MAX_MESSAGE];
    loop {
        match process::receive_message(socket.as_fd(), &mut request) {
            Ok((0, _)) => return,
            Ok((got, Some(reply))) => {
                threads.one_is_busy(socket);
                answer(threads, Path::new(std::ffi::OsStr::from_bytes(&request[..got])), &reply);
                threads.idle.fetch_add(1, Ordering::AcqRel);
            }
            // Without a socket to answer on there is nothing to do; who asked sees that it was closed.
            Ok((_, None)) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
            Err(error) => {
                tracing::error!(%error, "the opener ends");
                return;
            }
        }
    }
}

fn answer(threads: &Threads, path: &Path, reply: &OwnedFd) {
    let mut message = [0; 6];
    let opened = match threads.opening.open(&threads.rules, path, Instant::now()) {
        Ok(opened) => {
            // What a worker had opened is known even if it was taken over by a guest.
            tracing::info!(path = %path.display(), "a file is opened for reading as a base");
            (message[0], message[1]) = (OPENED, u8::from(opened.direct));
            Some(opened.file)
        }
        Err(error) => {
            message[0] = KINDS.iter().position(|kind| *kind == error.kind()).unwrap_or(KINDS.len() - 1) as u8;
            let busy = |e: &io::Error| (e.kind() == io::ErrorKind::ResourceBusy).then_some(libc::EBUSY);
            let errno = error.io_error().and_then(|e| e.raw_os_error().or(busy(e))).unwrap_or(0);
            message[2..].copy_from_slice(&errno.to_le_bytes());
            None
        }
    };
    // When the asker is gone, so is the question.
    let _ = process::send_message(reply.as_fd(), &message, opened.as_ref().map(AsFd::as_fd));
}
