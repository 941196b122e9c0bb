//! Where the live maps are. The supervisor holds their arena by descriptor, and keeps a name for it. By that name the
//! next daemon of this boot finds the arena when all processes of this daemon are killed.
//!
//! What must hold:
//! - The place is one that no other user can create, fill or list: for root a tmpfs of the daemon's own, otherwise a
//!   directory of its own with a name that other users cannot guess or take.
//! - The store's record names the one arena that is authoritative. An arena is filled before the record names it, and
//!   the record is removed before the arena (D26).
//! - A removed name loses no data (D24): the live maps move to a new home between two workers.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use super::worker::live_dir_name;
use crate::config::{Config, host};
use crate::format::layout::{self, LIVE_RECORD};
use crate::format::live::{LONGEST_LIVE_RECORD, LiveRecord};
use crate::io::{
    ArenaIdentity, HostMedium, LiveArena, LiveDir, LiveFile, LiveHeader, LiveStore, MapBounds, Open,
    read_whole, sys,
};
use crate::store::{Store, with_reserve_of};

/// The directory in which root's supervisor mounts the tmpfs of each store.
const MOUNTS: &str = "/run/plyfs";
/// The directory of live maps in versions without an arena, and the last resort of this one.
const SHARED: &str = "/dev/shm";
const SUFFIX: &str = ".arena";

/// How much memory the live maps may take with this configuration.
pub fn bounds(config: &Config) -> MapBounds {
    let quarter = host::total_memory().unwrap_or(1 << 30) / 4;
    let total = config.map_memory.unwrap_or_else(|| quarter.max(64 << 20));
    let per_disk = config.map_memory_per_disk.unwrap_or(total / 2).min(total);
    MapBounds { total, per_disk, reserve: total / 8 }
}

/// The directory in which versions without an arena keep a file for each disk.
pub fn former_dir(config: &Config) -> io::Result<PathBuf> {
    let parent = config.runtime_dir.as_deref().unwrap_or(Path::new(SHARED));
    Ok(parent.join(store_name(config)?))
}

fn store_name(config: &Config) -> io::Result<String> {
    let superblock = Store::superblock(&config.store).map_err(|e| io::Error::other(e.to_string()))?;
    live_dir_name(&superblock, &config.store)
}

fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).map_err(|e| io::Error::other(e.to_string()))?;
    Ok(u64::from_ne_bytes(bytes))
}

/// Creates a directory that only this user may enter, or accepts an existing one.
fn own_dir(dir: &Path) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
        _ => {}
    }
    let meta = fs::symlink_metadata(dir)?;
    if meta.is_dir() && meta.uid() == sys::effective_ids().0 && meta.mode() & 0o077 == 0 {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("{} belongs to another user or is open to others", dir.display()),
    ))
}

fn in_memory(dir: &Path) -> io::Result<()> {
    if sys::is_memory_filesystem(dir)? {
        return Ok(());
    }
    Err(io::Error::new(
        io::ErrorKind::Unsupported,
        format!("{} is not on tmpfs; set [runtime] dir to a directory on tmpfs", dir.display()),
    ))
}

/// A directory of this user below one that other users may share. When another user has taken its name, it gets a
/// random name.
fn directory(parent: &Path, name: Option<&str>) -> io::Result<PathBuf> {
    in_memory(parent)?;
    let fallback = || Ok::<_, io::Error>(parent.join(format!("plyfs-{:016x}", random()?)));
    let mut dir = match name {
        Some(name) => parent.join(name),
        None => fallback()?,
    };
    if let Err(error) = own_dir(&dir) {
        tracing::warn!(%error, "cannot use the usual directory for live maps; a directory with a random name is used");
        dir = fallback()?;
        own_dir(&dir)?;
    }
    in_memory(&dir)?;
    Ok(dir)
}

/// A tmpfs for this store only. It survives the daemon.
fn mount(name: &str, bounds: &MapBounds) -> io::Result<PathBuf> {
    let top = Path::new(MOUNTS);
    own_dir(top)?;
    let dir = top.join(name);
    own_dir(&dir)?;
    if fs::metadata(&dir)?.dev() == fs::metadata(top)?.dev() {
        // Room for two arenas, because the live maps may have to move. The size is a limit and takes no memory.
        let size = (bounds.total.saturating_add(bounds.reserve)).saturating_mul(2).saturating_add(64 << 20);
        let mounted = sys::mount_tmpfs(&dir, &format!("mode=0700,size={}k", (size >> 10).min(1 << 50)));
        mounted.inspect_err(|_| drop(fs::remove_dir(&dir)))?;
    }
    in_memory(&dir)?;
    Ok(dir)
}

/// The directory for a new arena: the first one that can be used.
fn place(config: &Config) -> io::Result<PathBuf> {
    let name = store_name(config)?;
    if let Some(dir) = &config.runtime_dir {
        return directory(dir, Some(&name));
    }
    let mounted = if sys::effective_ids().0 == 0 {
        mount(name.trim_start_matches("plyfs-"), &bounds(config))
    } else {
        Err(io::ErrorKind::PermissionDenied.into())
    };
    mounted.or_else(|error| {
        tracing::debug!(%error, "cannot mount a tmpfs for the live maps; a shared tmpfs is used");
        let user = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|dir| dir.is_absolute());
        let user = user.filter(|dir| own_dir(dir).is_ok() && in_memory(dir).is_ok());
        match user.map(|dir| directory(&dir, Some(&name))) {
            Some(Ok(found)) => Ok(found),
            _ => directory(Path::new(SHARED), None),
        }
    })
}

/// The arena of a store, with its name.
#[derive(Debug)]
pub struct LiveHome {
    file: File,
    path: PathBuf,
    identity: ArenaIdentity,
}

fn identity_of(config: &Config, id: u64) -> io::Result<ArenaIdentity> {
    let meta = fs::metadata(&config.store)?;
    Ok(ArenaIdentity { id, device: meta.dev(), inode: meta.ino() })
}

/// The store's record of live maps, when it belongs to this boot and to this place of the store.
fn record(config: &Config) -> io::Result<Option<LiveRecord>> {
    let medium = HostMedium::new(&config.store)?;
    let file = match crate::io::Medium::open(&medium, LIVE_RECORD, Open::Existing) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    // After a power cut the record may be damaged. Then the arena that it named is gone too.
    let decoded = LiveRecord::decode(&read_whole(&*file, LONGEST_LIVE_RECORD)?).ok();
    let here = identity_of(config, 0)?;
    Ok(decoded.filter(|record| {
        record.boot == sys::boot_number() && (record.device, record.inode) == (here.device, here.inode)
    }))
}

fn open_arena(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let meta = file.metadata()?;
    if meta.is_file() && meta.uid() == sys::effective_ids().0 {
        return Ok(file);
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("{} is not a file of the daemon's user", path.display()),
    ))
}

impl LiveHome {
    /// The arena that an earlier daemon of this boot left, found by its name or among `kept`; otherwise a new one. When
    /// the arena that the record names is gone, the second value says which data is lost.
    ///
    /// # Errors
    /// When there is no memory for it, or when the arena belongs to a newer plyfs.
    pub fn find(config: &Config, kept: Vec<File>) -> io::Result<(Self, Option<String>)> {
        let mut lost = None;
        let record = record(config)?;
        if let Some(record) = &record {
            let path = PathBuf::from(&record.path);
            let identity = identity_of(config, record.id)?;
            let mut why = String::new();
            for file in open_arena(&path).map_err(|e| why = e.to_string()).into_iter().chain(kept) {
                match LiveArena::identity(&file) {
                    Ok(Some(found)) if found == identity => {
                        let home = Self { file, path, identity };
                        return home.with_name(config).map(|home| (home, None));
                    }
                    Err(e) if e.kind() == io::ErrorKind::Unsupported => return Err(e),
                    Ok(_) => why = "it belongs to another store or boot".into(),
                    Err(e) => why = e.to_string(),
                }
            }
            let path = path.display();
            tracing::error!(
                %path,
                why,
                "the live maps of the last daemon are gone: writes that were not flushed before it ended are lost"
            );
            lost =
                Some(format!("{path} is gone ({why}): writes that the last daemon had not flushed are lost"));
        }
        let home = Self::create(config)?;
        home.fill(config, None)?;
        Ok((home, lost))
    }

    /// Continues with an arena that the former program of this process held.
    ///
    /// # Errors
    /// When the file is not an arena.
    pub fn resumed(config: &Config, file: File, path: PathBuf) -> io::Result<Self> {
        let found = LiveArena::identity(&file)?.ok_or(io::ErrorKind::InvalidData)?;
        let identity = identity_of(config, found.id)?;
        Ok(Self { file, path, identity })
    }

    /// Gives the arena a new name when its name is gone, and adopts live maps of versions without an arena.
    fn with_name(self, config: &Config) -> io::Result<Self> {
        if self.is_named() {
            self.sweep();
            self.fill(config, None)?;
            return Ok(self);
        }
        let home = Self::create(config)?;
        home.fill(config, Some(&self))?;
        Ok(home)
    }

    /// Creates an empty arena that no record names yet.
    ///
    /// # Errors
    /// When there is no place or no memory for it.
    pub fn create(config: &Config) -> io::Result<Self> {
        let dir = place(config)?;
        let identity = identity_of(config, random()?)?;
        let path = dir.join(format!("{:016x}{SUFFIX}", identity.id));
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = options.open(&path)?;
        LiveArena::format(&file, &identity).inspect_err(|_| drop(fs::remove_file(&path)))?;
        let home = Self { file, path, identity };
        Ok(home)
    }

    /// Copies the maps of `from` and of versions without an arena into this arena, then makes the record name it. No
    /// worker runs.
    ///
    /// # Errors
    /// When there is no memory for it. Then nothing has changed.
    pub fn fill(&self, config: &Config, from: Option<&Self>) -> io::Result<()> {
        let open = |home: &Self| LiveArena::open(home.file.try_clone()?, MapBounds::NONE);
        let arena = open(self)?;
        if let Some(from) = from {
            arena.copy_from(&open(from)?)?;
        }
        let former = former_dirs(config)?;
        for dir in &former {
            adopt_former(&arena, dir)?;
        }
        self.write_record(config)?;
        former.iter().for_each(|dir| remove_former(dir));
        if from.is_some() {
            self.sweep();
        }
        Ok(())
    }

    fn write_record(&self, config: &Config) -> io::Result<()> {
        let path = self.path.to_str().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        let ArenaIdentity { id, device, inode } = self.identity;
        let bytes = LiveRecord { boot: sys::boot_number(), id, device, inode, path }.encode();
        let medium = HostMedium::new(&config.store)?;
        // After a power cut the record is useless, so it is not synced.
        with_reserve_of(&medium, || {
            let staged = config.store.join(layout::staged(LIVE_RECORD));
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            options.open(&staged)?.write_all_at(&bytes, 0)?;
            fs::rename(&staged, config.store.join(LIVE_RECORD))
        })
    }

    /// The arena.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its path still refers to it.
    pub fn is_named(&self) -> bool {
        let (Ok(named), Ok(held)) = (fs::symlink_metadata(&self.path), self.file.metadata()) else {
            return false;
        };
        (named.dev(), named.ino()) == (held.dev(), held.ino())
    }

    fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Removes other arenas in its directory. No record names them, because the directory belongs to one store.
    fn sweep(&self) {
        for entry in fs::read_dir(self.dir()).into_iter().flatten().flatten() {
            if entry.path() != self.path && entry.file_name().to_string_lossy().ends_with(SUFFIX) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Removes the arena and its record, unless it has the map of a disk. No worker runs.
    pub fn remove(self, config: &Config) {
        if LiveArena::list(&self.file).is_ok_and(|maps| !maps.is_empty()) {
            tracing::warn!(
                path = %self.path.display(),
                "live maps have writes that are not flushed; they stay for the next start"
            );
            return;
        }
        // The record is removed before the arena: a record without its arena means that data is lost.
        if let Err(error) = fs::remove_file(config.store.join(LIVE_RECORD))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "cannot remove the record of live maps; the live maps stay too");
            return;
        }
        self.discard(sys::Detach::Yes);
    }

    /// Removes an arena that no record names, and unmounts its filesystem. With `Detach::Yes` it detaches a filesystem
    /// that is in use.
    pub fn discard(self, detach: sys::Detach) {
        let dir = self.dir().to_path_buf();
        let _ = fs::remove_file(&self.path);
        drop(self.file);
        if dir.parent() == Some(Path::new(MOUNTS)) {
            let unmounted = sys::unmount(&dir, sys::Detach::No);
            if unmounted.is_err() && detach == sys::Detach::Yes {
                let _ = sys::unmount(&dir, detach);
            }
        }
        // This fails when the directory has another arena.
        let _ = fs::remove_dir(&dir);
    }
}

/// Directories with live maps of a version without an arena.
fn former_dirs(config: &Config) -> io::Result<Vec<PathBuf>> {
    let name = store_name(config)?;
    let mut parents = vec![PathBuf::from(SHARED)];
    parents.extend(config.runtime_dir.clone().filter(|dir| dir != Path::new(SHARED)));
    let is_ours = |dir: &PathBuf| {
        fs::symlink_metadata(dir).is_ok_and(|meta| {
            meta.is_dir() && meta.uid() == sys::effective_ids().0 && meta.mode() & 0o077 == 0
        })
    };
    Ok(parents.into_iter().map(|parent| parent.join(&name)).filter(is_ours).collect())
}

fn former_maps(dir: &Path) -> Vec<(u64, PathBuf)> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let number = |path: &Path| path.file_name()?.to_str()?.strip_suffix(".live")?.parse().ok();
    entries.filter_map(|entry| Some((number(&entry.path())?, entry.path()))).collect()
}

fn adopt_former(arena: &LiveArena, dir: &Path) -> io::Result<()> {
    let former = LiveDir::beside(dir)?;
    for (disk, path) in former_maps(dir) {
        // A map in the arena is newer.
        if arena.existing(disk)?.is_some() {
            continue;
        }
        match former.existing(disk) {
            Ok(Some(live)) => arena.adopt(disk, &live)?,
            Ok(None) => {}
            Err(e) if e.kind() == io::ErrorKind::InvalidData => {
                tracing::error!(path = %path.display(), %e, "a live map is damaged; its disk is not served");
                let live = LiveFile::anonymous()?;
                let head = fs::read(&path).unwrap_or_default();
                for (at, word) in [
                    (LiveHeader::Magic, live.header(LiveHeader::Magic)),
                    (LiveHeader::Disk, live.header(LiveHeader::Disk)),
                    (LiveHeader::Boot, live.header(LiveHeader::Boot)),
                    (LiveHeader::Device, live.header(LiveHeader::Device)),
                    (LiveHeader::Inode, live.header(LiveHeader::Inode)),
                ] {
                    let bytes = head.as_chunks::<8>().0.get(at as usize).copied().unwrap_or_default();
                    word.store(u64::from_ne_bytes(bytes), Ordering::Relaxed);
                }
                // No disk has this size, so the map is refused and not repaired.
                live.header(LiveHeader::Size).store(u64::MAX, Ordering::Relaxed);
                arena.adopt(disk, &live)?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

fn remove_former(dir: &Path) {
    let maps = former_maps(dir);
    if !maps.is_empty() {
        tracing::info!(dir = %dir.display(), maps = maps.len(), "adopted the live maps of an older version");
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let former = entry.path().extension().is_some_and(|e| e == "live" || e == "tmp");
        let _ = if former { fs::remove_file(entry.path()) } else { Ok(()) };
    }
    let _ = fs::remove_dir(dir);
}

/// A home that is removed again when a later step of the start fails and it is empty.
pub struct TentativeHome<'a> {
    home: Option<LiveHome>,
    config: &'a Config,
}

impl<'a> TentativeHome<'a> {
    /// As [`LiveHome::find`].
    ///
    /// # Errors
    /// As [`LiveHome::find`].
    pub fn find(config: &'a Config, kept: Vec<File>) -> io::Result<(Self, Option<String>)> {
        let (home, lost) = LiveHome::find(config, kept)?;
        Ok((Self { home: Some(home), config }, lost))
    }

    /// Keeps the home.
    pub fn keep(mut self) -> Option<LiveHome> {
        self.home.take()
    }

    /// The home, which may be removed yet.
    pub fn get(&self) -> Option<&LiveHome> {
        self.home.as_ref()
    }
}

impl Drop for TentativeHome<'_> {
    fn drop(&mut self) {
        if let Some(home) = self.home.take() {
            home.remove(self.config);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Overrides;
    use crate::daemon::start;

    /// Guards D26.
    #[test]
    fn of_several_arenas_the_one_in_the_record_is_authoritative() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("directory");
        let flags = Overrides { store: Some(dir.path().join("store")), ..Overrides::default() };
        let config = Config::load(None, flags).expect("valid");
        let config = Config { runtime_dir: Some(dir.path().into()), ..config };
        let _lock = start::open_store(&config).expect("a new store");
        let (old, lost) = LiveHome::find(&config, Vec::new()).expect("a home");
        assert_eq!(lost, None);
        let kept = |home: &LiveHome| home.file().try_clone().expect("descriptors");
        // An arena that is not filled yet.
        let empty = LiveHome::create(&config).expect("a home");
        let (found, _) = LiveHome::find(&config, vec![kept(&empty)]).expect("a home");
        assert_eq!(found.identity, old.identity);
        // The arena that the maps moved to, and the former one, kept by its descriptor.
        let new = LiveHome::create(&config).expect("a home");
        new.fill(&config, Some(&old)).expect("filled");
        let arena = LiveArena::open(kept(&new), MapBounds::NONE).expect("an arena");
        arena.fresh(7).and_then(|_| arena.publish(7)).expect("a map");
        let (found, _) = LiveHome::find(&config, vec![kept(&old)]).expect("a home");
        assert_eq!(found.identity, new.identity);
        // The name of the new arena is removed too.
        fs::remove_file(new.path()).expect("removed");
        let (found, lost) = LiveHome::find(&config, vec![kept(&old), kept(&new)]).expect("a home");
        let disks: Vec<_> =
            LiveArena::list(found.file()).expect("maps").into_iter().map(|(disk, _)| disk).collect();
        assert_eq!((disks, lost), (vec![7], None));
        // Without the new arena, an older one does not replace it.
        fs::remove_file(found.path()).expect("removed");
        let (found, lost) = LiveHome::find(&config, vec![kept(&old), kept(&new)]).expect("a home");
        assert!(LiveArena::list(found.file()).expect("maps").is_empty() && lost.is_some());
    }
}
