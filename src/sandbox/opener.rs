//! The opener: a process that opens the files of bases for the worker, and can do nothing else.
//!
//! The worker parses the data of guests and images, so it gives up the right to open files of the host. But an operator
//! can add a base at any time, with a path that was unknown when the worker gave up its rights, and landlock never
//! widens. So the worker forks this process first, and asks it to open files.
//!
//! What must hold:
//! - The opener opens regular files and block devices for reading only, never a file of the daemon's own mount or a
//!   device that lies on one, and with `[security] base_dirs` no file outside of these directories. A device that is
//!   mounted or part of another one is not opened.
//! - It connects to sockets of this host below `[security] nbd_socket_dirs` only. Without these it cannot: its filter has
//!   no such call. It writes nothing. Landlock, the capabilities and a filter of
//!   system calls enforce this.
//! - It keeps only one socket and standard error of the worker, and dies with it.
//! - A request that hangs (on a dead network filesystem) delays no other request. Each request has its own thread and
//!   brings the socket for its answer. When several requests for a path hang, further ones for it are refused.
//! - A worker cannot attach bases without its opener. When the opener is gone, the worker ends, and the next worker has
//!   a new opener.

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, chown};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::confine;
use crate::config::Config;
use crate::format::layout;
use crate::io::{confine as process, sys};
use crate::source::{Device, OpenHere, OpenImage, Opened, SourceError, SourceErrorKind, lies_below};

/// Most threads. While fewer requests than this hang, further ones are answered.
const THREADS: usize = 512;
/// A request that takes longer than this may hang.
const STUCK_AFTER: Duration = Duration::from_secs(1);
/// Requests for one path that may hang. Further ones are refused.
const MAX_STUCK: usize = 4;
const STACK: usize = 256 << 10;

/// The error kinds on the wire, by index. Both sides run the same program, so the indices need no stable meaning.
const KINDS: [SourceErrorKind; 9] = [
    SourceErrorKind::NotFound,
    SourceErrorKind::NotAFile,
    SourceErrorKind::Permission,
    SourceErrorKind::Empty,
    SourceErrorKind::InUse,
    SourceErrorKind::Changed,
    SourceErrorKind::OwnMount,
    SourceErrorKind::Outside,
    SourceErrorKind::Io,
];
const OPENED: u8 = u8::MAX;
/// The first byte of a request to connect to a socket; the path follows. No path begins with it.
const CONNECT: u8 = 0;
/// Bytes of each answer. After them: what is known of a device, or what holds it.
const FIXED: usize = 6;

/// The worker's end.
pub struct Opener {
    socket: OwnedFd,
}

impl Opener {
    /// Forks the opener. The calling process has a single thread.
    ///
    /// # Errors
    /// When the process has other threads, or cannot fork.
    pub fn start(config: &Config) -> io::Result<Self> {
        if !config.security.base_dirs.is_empty() {
            make_images(&config.store);
        }
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

    fn ask(&self, request: &[u8]) -> io::Result<Result<Opened, (SourceErrorKind, i32, String)>> {
        let (ours, theirs) = sys::message_pair()?;
        process::send_message(self.socket.as_fd(), request, Some(theirs.as_fd()))?;
        drop(theirs);
        let mut answer = vec![0; process::MAX_MESSAGE];
        let (got, fd) = process::receive_message(ours.as_fd(), &mut answer)?;
        let Some(([kind, direct, errno @ ..], rest)) = answer[..got].split_first_chunk::<FIXED>() else {
            let gone = if got == 0 { io::ErrorKind::BrokenPipe } else { io::ErrorKind::InvalidData };
            return Err(gone.into());
        };
        match fd {
            Some(fd) if *kind == OPENED => {
                let device = if rest.is_empty() { None } else { Some(parse(rest)?) };
                Ok(Ok(Opened { file: File::from(fd), direct: *direct != 0, device }))
            }
            None => {
                let kind = KINDS.get(usize::from(*kind)).copied().unwrap_or(SourceErrorKind::Io);
                Ok(Err((kind, i32::from_le_bytes(*errno), String::from_utf8_lossy(rest).into_owned())))
            }
            Some(_) => Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

impl OpenImage for Opener {
    fn open(&self, path: &Path) -> Result<Opened, SourceError> {
        self.request("open", path, path.as_os_str().as_bytes())
    }

    fn connect(&self, path: &Path) -> Result<UnixStream, SourceError> {
        let request = [&[CONNECT], path.as_os_str().as_bytes()].concat();
        let connected = self.request("connect to", path, &request)?;
        Ok(UnixStream::from(OwnedFd::from(connected.file)))
    }
}

impl Opener {
    /// Sends a request about a path. `operation` is for messages.
    fn request(&self, operation: &'static str, path: &Path, request: &[u8]) -> Result<Opened, SourceError> {
        match self.ask(request) {
            Ok(Ok(opened)) => Ok(opened),
            Ok(Err((SourceErrorKind::InUse, _, why))) => Err(SourceError::in_use(path, &why)),
            Ok(Err((kind, 0, _))) => Err(SourceError::new(kind, operation, path)),
            Ok(Err((_, errno, _))) => {
                Err(SourceError::from_io(operation, path, io::Error::from_raw_os_error(errno)))
            }
            Err(error) if is_gone(&error) => {
                tracing::error!("the opener is gone; this worker ends, and the next one starts a new opener");
                std::process::abort();
            }
            Err(error) => Err(SourceError::from_io(operation, path, error)),
        }
    }
}

/// What is known of a device, as [`text_of`] wrote it.
fn parse(text: &[u8]) -> io::Result<Device> {
    let text = std::str::from_utf8(text).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut lines = text.lines();
    let mut number = || lines.next()?.parse::<u64>().ok();
    let (Some(number), Some(sequence), Some(exclusive)) = (number(), number(), number()) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    Ok(Device { number, sequence, is_exclusive: exclusive != 0, names: lines.map(str::to_owned).collect() })
}

/// One line for each: number, sequence, whether it is held exclusively, names.
fn text_of(device: &Device) -> String {
    let Device { number, sequence, is_exclusive, names } = device;
    let numbers = format!("{number}\n{sequence}\n{}\n", u8::from(*is_exclusive));
    names.iter().fold(numbers, |text, name| text + name + "\n")
}

/// Whether the process at the other end has ended.
pub(super) fn is_gone(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::NotConnected
    )
}

/// The rules for paths that may be opened.
struct Rules {
    mount: PathBuf,
    dirs: Vec<PathBuf>,
    /// Directories with sockets.
    sockets: Vec<PathBuf>,
}

impl Rules {
    fn open(&self, path: &Path) -> Result<Opened, SourceError> {
        let refuse = |kind| Err(SourceError::new(kind, "open", path));
        // Checked before the file is opened, because a base on the daemon's own mount would wait for itself. The path
        // is first checked as given, because even resolving a path on the mount needs the worker.
        if path.starts_with(&self.mount) {
            return refuse(SourceErrorKind::OwnMount);
        }
        let real = std::fs::canonicalize(path).map_err(|error| SourceError::from_io("open", path, error))?;
        if real.starts_with(&self.mount) {
            return refuse(SourceErrorKind::OwnMount);
        }
        if lies_below(&real, &self.mount) {
            return refuse(SourceErrorKind::OwnMount);
        }
        if !self.dirs.is_empty() && !self.dirs.iter().any(|dir| real.starts_with(dir)) {
            return refuse(SourceErrorKind::Outside);
        }
        OpenHere.open(path)
    }

    fn connect(&self, path: &Path) -> Result<OwnedFd, SourceError> {
        let fail = |error| SourceError::from_io("connect to", path, error);
        let refuse = |kind| Err(SourceError::new(kind, "connect to", path));
        if path.starts_with(&self.mount) {
            return refuse(SourceErrorKind::OwnMount);
        }
        let real = std::fs::canonicalize(path).map_err(fail)?;
        if !self.sockets.iter().any(|dir| real.starts_with(dir)) {
            return refuse(SourceErrorKind::Outside);
        }
        if !std::fs::metadata(&real).map_err(fail)?.file_type().is_socket() {
            return refuse(SourceErrorKind::NotAFile);
        }
        OpenHere.connect(&real).map(OwnedFd::from)
    }

    /// Does what a request asks for.
    fn answer(&self, path: &Path, is_socket: bool) -> Result<Opened, SourceError> {
        if !is_socket {
            return self.open(path);
        }
        self.connect(path).map(|socket| Opened { file: File::from(socket), direct: false, device: None })
    }
}

/// Makes the directory of the images that `disk commit` makes, so that the opener gets a right to it. A commit makes it
/// later when this fails; the images can be opened after the next start.
fn make_images(store: &Path) {
    let dir = store.join(layout::IMAGES);
    let made = DirBuilder::new().mode(0o700).create(&dir).and_then(|()| {
        let owner = std::fs::metadata(store)?;
        chown(&dir, Some(owner.uid()), Some(owner.gid()))
    });
    match made {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            tracing::warn!(%error, dir = %dir.display(), "cannot make the directory of committed images");
        }
        _ => {}
    }
}

/// The child. Returns when the worker is gone.
fn run(config: &Config, socket: &OwnedFd) -> io::Result<()> {
    process::set_name(c"plyfs-opener");
    process::close_all_but(socket.as_fd())?;
    // So that the process keeps no filesystem of the host busy.
    std::env::set_current_dir("/")?;
    let real = |path: &PathBuf| std::fs::canonicalize(path).unwrap_or_else(|_| path.clone());
    let mut dirs: Vec<PathBuf> = config.security.base_dirs.iter().map(real).collect();
    if !dirs.is_empty() {
        // The images that `disk commit` makes.
        dirs.push(real(&config.store.join(layout::IMAGES)));
    }
    confine::opener(&config.security, &dirs);
    // The supervisor passed the mount's path without symbolic links. Resolving it here would access the mount.
    let sockets = config.security.nbd_socket_dirs.iter().map(real).collect();
    let rules = Rules { mount: config.mount.clone(), dirs, sockets };
    let (idle, all) = (AtomicUsize::new(1), AtomicUsize::new(1));
    let threads = Arc::new(Threads { rules, idle, all, in_flight: InFlight::default() });
    serve(&threads, socket);
    Ok(())
}

/// The threads of the opener. They are started when they are needed, because most workers open a few files, one after
/// the other.
struct Threads {
    rules: Rules,
    idle: AtomicUsize,
    all: AtomicUsize,
    in_flight: InFlight,
}

/// The paths that are being opened, and when each request began.
#[derive(Default)]
struct InFlight(Mutex<BTreeMap<PathBuf, Vec<Instant>>>);

impl InFlight {
    /// Opens or connects to a path, unless [`MAX_STUCK`] earlier requests for it hang.
    fn open(&self, rules: &Rules, path: &Path, is_socket: bool, now: Instant) -> Result<Opened, SourceError> {
        {
            let mut in_flight = self.0.lock();
            let begun = in_flight.entry(path.to_owned()).or_default();
            let stuck = begun.iter().filter(|at| now.saturating_duration_since(**at) > STUCK_AFTER);
            if stuck.count() >= MAX_STUCK {
                let busy = io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "earlier requests to open it have had no answer from its filesystem",
                );
                return Err(SourceError::from_io("open", path, busy));
            }
            begun.push(now);
        }
        let opened = rules.answer(path, is_socket);
        let mut in_flight = self.0.lock();
        if let Some(begun) = in_flight.get_mut(path) {
            if let Some(index) = begun.iter().position(|at| *at == now) {
                begun.swap_remove(index);
            }
            if begun.is_empty() {
                in_flight.remove(path);
            }
        }
        opened
    }
}

impl Threads {
    /// Marks the calling thread as busy. Starts another thread when no idle one is left.
    fn mark_busy(self: &Arc<Self>, socket: &OwnedFd) {
        if self.idle.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        // When no thread can be started, the next request waits until a thread is idle.
        if self.all.fetch_add(1, Ordering::AcqRel) >= THREADS || self.start_thread(socket).is_err() {
            self.all.fetch_sub(1, Ordering::AcqRel);
        }
    }

    fn start_thread(self: &Arc<Self>, socket: &OwnedFd) -> io::Result<()> {
        let (threads, socket) = (Arc::clone(self), socket.try_clone()?);
        // Counted as idle before it runs, because it may take a request at once.
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

/// Answers requests until the worker is gone. The kernel gives each message to one of the waiting threads.
fn serve(threads: &Arc<Threads>, socket: &OwnedFd) {
    let mut request = vec![0; process::MAX_MESSAGE];
    loop {
        match process::receive_message(socket.as_fd(), &mut request) {
            Ok((0, _)) => return,
            Ok((got, Some(reply))) => {
                threads.mark_busy(socket);
                answer(threads, &request[..got], &reply);
                threads.idle.fetch_add(1, Ordering::AcqRel);
            }
            // A request without a socket cannot be answered.
            Ok((_, None)) => {}
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {}
            Err(error) => {
                tracing::error!(%error, "the opener ends");
                return;
            }
        }
    }
}

fn answer(threads: &Threads, request: &[u8], reply: &OwnedFd) {
    let (is_socket, path) = match request.split_first() {
        Some((&CONNECT, path)) => (true, path),
        _ => (false, request),
    };
    let path = Path::new(std::ffi::OsStr::from_bytes(path));
    let mut message = vec![0; FIXED];
    let opened = match threads.in_flight.open(&threads.rules, path, is_socket, Instant::now()) {
        Ok(opened) => {
            // So that the log names each file that a worker opened, even when a guest has taken over the worker.
            match is_socket {
                true => tracing::info!(path = %path.display(), "connected to a socket of a base"),
                false => tracing::info!(path = %path.display(), "opened a file of a base for reading"),
            }
            (message[0], message[1]) = (OPENED, u8::from(opened.direct));
            message.extend(opened.device.iter().flat_map(|device| text_of(device).into_bytes()));
            Some(opened.file)
        }
        Err(error) => {
            message[0] = KINDS.iter().position(|kind| *kind == error.kind()).unwrap_or(KINDS.len() - 1) as u8;
            let busy = |e: &io::Error| (e.kind() == io::ErrorKind::ResourceBusy).then_some(libc::EBUSY);
            let errno = error.io_error().and_then(|e| e.raw_os_error().or(busy(e))).unwrap_or(0);
            message[2..FIXED].copy_from_slice(&errno.to_le_bytes());
            if error.kind() == SourceErrorKind::InUse {
                message.extend_from_slice(error.why().unwrap_or_default().as_bytes());
            }
            None
        }
    };
    // This fails when the client is gone. Then no answer is needed.
    let _ = process::send_message(reply.as_fd(), &message, opened.as_ref().map(AsFd::as_fd));
}
