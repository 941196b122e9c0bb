//! Opens pools that are directories of this host, and makes a directory a pool.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::{OpenPools, Trouble, read_list};
use crate::format::layout::{CACHE, DELTAS, POOL_IDENTITY, staged};
use crate::format::pools::{LONGEST_POOL_IDENTITY, PoolEntry, PoolIdentity};
use crate::io::{HostMedium, Medium, Open, confine as process, read_whole, sys};

/// How long all pools may take to be opened.
const PATIENCE: Duration = Duration::from_secs(5);
/// The first byte of an answer of a process that looks at a pool.
const OPENED: u8 = 0;
const GONE: u8 = 1;
const REFUSED: u8 = 2;

/// Opens directories of this host.
#[derive(Default)]
pub struct HostPools {
    /// The directories that were opened before this process gave up its rights, by the number of the pool.
    held: Mutex<HashMap<u64, Result<OwnedFd, Trouble>>>,
    /// Whether other directories cannot be opened any more.
    is_confined: bool,
}

fn open_dir(dir: &str) -> io::Result<OwnedFd> {
    let flags = libc::O_DIRECTORY | libc::O_CLOEXEC;
    OpenOptions::new().read(true).custom_flags(flags).open(dir).map(OwnedFd::from)
}

fn look(pool: &PoolEntry, store: &[u8; 16]) -> Result<OwnedFd, Trouble> {
    let dir = open_dir(&pool.dir).map_err(|error| Trouble::of("it cannot be opened", &error))?;
    let again = dir.try_clone().map_err(|error| Trouble::of("it cannot be opened", &error))?;
    let medium = HostMedium::held(again, Path::new(&pool.dir));
    check_identity(&medium.map_err(|error| Trouble::of("it cannot be opened", &error))?, pool, store)?;
    Ok(dir)
}

/// Checks that a directory is the pool.
fn check_identity(medium: &dyn Medium, pool: &PoolEntry, store: &[u8; 16]) -> Result<(), Trouble> {
    let other = |why: &str| Trouble { why: why.to_owned(), is_gone: true };
    let identity = match medium.open(POOL_IDENTITY, Open::ToRead) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(other("there is no plyfs.pool in it: its drive is not mounted there"));
        }
        other => other.and_then(|file| read_whole(&*file, LONGEST_POOL_IDENTITY)),
    };
    let identity = identity.map_err(|error| Trouble::of("its plyfs.pool cannot be read", &error))?;
    let identity = PoolIdentity::decode(&identity).map_err(|error| other(&error.to_string()))?;
    if identity.store != *store {
        return Err(other("it is the pool of another store"));
    }
    if identity.uuid != pool.uuid {
        return Err(other("it is another pool of this store"));
    }
    Ok(())
}

/// A look at a directory that may hang: by a process of its own, because this one may not have a second thread yet.
enum Look {
    By(OwnedFd, u32),
    Done(Result<OwnedFd, Trouble>),
}

impl Look {
    fn start(pool: &PoolEntry, store: &[u8; 16]) -> Self {
        let Ok((ours, theirs)) = sys::message_pair() else { return Self::Done(look(pool, store)) };
        match process::fork() {
            Ok(process::Forked::Parent(child)) => Self::By(ours, child),
            Ok(process::Forked::Child) => {
                // It may outlive its parent for long, and must not keep the store's lock.
                if process::close_all_but(theirs.as_fd()).is_err() {
                    std::process::exit(1);
                }
                let sent = match look(pool, store) {
                    Ok(dir) => process::send_message(theirs.as_fd(), &[OPENED], Some(dir.as_fd())),
                    Err(Trouble { why, is_gone }) => {
                        let kind = if is_gone { GONE } else { REFUSED };
                        let why = &why.as_bytes()[..why.len().min(process::MAX_MESSAGE - 1)];
                        process::send_message(theirs.as_fd(), &[&[kind][..], why].concat(), None)
                    }
                };
                std::process::exit(i32::from(sent.is_err()))
            }
            // Only in a process that has threads, such as a test.
            Err(_) => Self::Done(look(pool, store)),
        }
    }

    fn found(self, patience: Duration) -> Result<OwnedFd, Trouble> {
        let (socket, child) = match self {
            Self::Done(found) => return found,
            Self::By(socket, child) => (socket, child),
        };
        let answered = sys::poll(&[socket.as_fd()], patience.as_millis() as i32);
        if answered.is_ok_and(|ready| !ready[0]) {
            let why = format!("its drive has not answered for {} s", PATIENCE.as_secs());
            return Err(Trouble { why, is_gone: false });
        }
        let mut answer = vec![0; process::MAX_MESSAGE];
        let received = process::receive_message(socket.as_fd(), &mut answer);
        // It ends at once now. One that hangs is left to the end of this process.
        for _ in 0..100 {
            if !matches!(sys::wait_now(child), Ok(None)) {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        match received.map(|(len, dir)| (&answer[..len], dir)) {
            Ok(([OPENED], Some(dir))) => Ok(dir),
            Ok(([kind @ (GONE | REFUSED), why @ ..], None)) => {
                let why = String::from_utf8_lossy(why).into_owned();
                Err(Trouble { why, is_gone: *kind == GONE })
            }
            Ok(_) => Err(Trouble { why: "the process that opens it has ended".into(), is_gone: false }),
            Err(error) => Err(Trouble { why: error.to_string(), is_gone: false }),
        }
    }
}

impl HostPools {
    /// Opens the directories of the pools of the store at `root`, before this process gives up its rights. Returns the
    /// paths of those that it holds: the process needs to keep its rights in them.
    pub fn hold(root: &Path, store: &[u8; 16]) -> (Self, Vec<PathBuf>) {
        let entries = HostMedium::new(root).map_err(|error| error.to_string());
        // The store reports a list that cannot be read.
        let entries = entries.and_then(|medium| read_list(&medium)).unwrap_or_default();
        let (mut held, mut dirs) = (HashMap::new(), Vec::new());
        let looks: Vec<_> = entries.into_iter().map(|pool| (Look::start(&pool, store), pool)).collect();
        let end = Instant::now() + PATIENCE;
        for (look, pool) in looks {
            let found = look.found(end.saturating_duration_since(Instant::now()));
            if found.is_ok() {
                dirs.push(PathBuf::from(&pool.dir));
            }
            held.insert(pool.number, found);
        }
        (Self { held: Mutex::new(held), is_confined: true }, dirs)
    }
}

impl OpenPools for HostPools {
    fn open(&self, pool: &PoolEntry, store: &[u8; 16]) -> Result<Arc<dyn Medium>, Trouble> {
        let dir = match self.held.lock().remove(&pool.number) {
            Some(held) => held?,
            None if self.is_confined => {
                let why = "this worker started before the pool was there".to_owned();
                return Err(Trouble { why, is_gone: false });
            }
            None => look(pool, store)?,
        };
        let medium = HostMedium::held(dir, Path::new(&pool.dir));
        let medium = medium.map_err(|error| Trouble::of("it cannot be opened", &error))?;
        // The directory may have been held for long.
        check_identity(&medium, pool, store)?;
        Ok(Arc::new(medium))
    }
}

/// Whether one of two paths lies in the other one.
pub fn is_inside(one: &Path, other: &Path) -> bool {
    one.starts_with(other) || other.starts_with(one)
}

/// Makes the directory `dir`, which is created when it is missing, a pool of the store at `root`. A directory that is a
/// pool of the store already stays as it is. Its files get the owner of the store.
///
/// # Errors
/// A directory that has other files or is the pool of another store; errors of the storage.
pub fn make_identity(root: &Path, store: &[u8; 16], dir: &Path) -> io::Result<()> {
    let refuse = |why: &str| Err(io::Error::new(io::ErrorKind::InvalidInput, why.to_owned()));
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let path = dir.join(POOL_IDENTITY);
    match fs::read(&path) {
        Ok(bytes) => {
            let identity = PoolIdentity::decode(&bytes).map_err(io::Error::other)?;
            return if identity.store == *store { Ok(()) } else { refuse("it is the pool of another store") };
        }
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Err(_) => {}
    }
    // What mkfs leaves is no sign of another use; nor is what an earlier attempt left, nor are copies of fetched blocks,
    // which a pool that was removed may leave.
    let known = ["lost+found", DELTAS, CACHE, &staged(POOL_IDENTITY)];
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let name = name.to_string_lossy();
        if !known.contains(&&*name) {
            return refuse(&format!("it is not empty: it has {name}; give an empty directory"));
        }
    }
    let meta = fs::metadata(root)?;
    let own = |path: &Path| match sys::effective_ids().0 {
        0 => chown(path, Some(meta.uid()), Some(meta.gid())),
        _ => Ok(()),
    };
    let mut uuid = [0; 16];
    getrandom::fill(&mut uuid).map_err(|error| io::Error::other(error.to_string()))?;
    let deltas = dir.join(DELTAS);
    match DirBuilder::new().mode(0o700).create(&deltas) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if fs::read_dir(&deltas)?.next().is_some() {
                return refuse("its deltas/ has files, but it has no plyfs.pool; restore that file");
            }
        }
        other => other?,
    }
    own(&deltas)?;
    own(dir)?;
    File::open(dir)?.sync_all()?;
    // The identity implies that the directory is complete.
    let bytes = PoolIdentity { store: *store, uuid, made_ns: sys::now_ns() }.encode();
    let temporary = dir.join(staged(POOL_IDENTITY));
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(&bytes)?;
    own(&temporary)?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    File::open(dir)?.sync_all()
}
