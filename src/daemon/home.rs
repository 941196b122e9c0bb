//! Where the live maps are: the supervisor holds their arena by descriptor, and keeps a name for it, by which the next
//! daemon of this boot finds it when all of this one is killed.
//!
//! What must hold:
//! - The place is one that no other user can make, fill or list: a tmpfs of the daemon's own as root, else a directory
//!   of its own with a name that other users cannot guess or take.
//! - The store's record names the one arena that counts. An arena is filled before the record names it, and the record
//!   goes before the arena (D26).
//! - A name that is gone loses nothing (D24): what is there moves to a new home between two workers.

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

/// Below it the supervisor of root mounts the tmpfs of each store.
const MOUNTS: &str = "/run/plyfs";
/// Where live maps were before there was an arena, and are when there is no better place.
const SHARED: &str = "/dev/shm";
const SUFFIX: &str = ".arena";

/// How much memory the maps of a configuration may take.
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

/// Makes a directory that only this user may enter, or finds one.
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
        format!("{} is not on tmpfs; set [runtime] dir to a directory that is", dir.display()),
    ))
}

/// A directory below one that others may use too. A name that is taken is left to its owner.
fn directory(parent: &Path, name: Option<&str>) -> io::Result<PathBuf> {
    in_memory(parent)?;
    let fallback = || Ok::<_, io::Error>(parent.join(format!("plyfs-{:016x}", random()?)));
    let mut dir = match name {
        Some(name) => parent.join(name),
        None => fallback()?,
    };
    if let Err(error) = own_dir(&dir) {
        tracing::warn!(%error, "live maps are kept under another name");
        dir = fallback()?;
        own_dir(&dir)?;
    }
    in_memory(&dir)?;
    Ok(dir)
}

/// A tmpfs of this store alone. It outlives the daemon.
fn mount(name: &str, bounds: &MapBounds) -> io::Result<PathBuf> {
    let top = Path::new(MOUNTS);
    own_dir(top)?;
    let dir = top.join(name);
    own_dir(&dir)?;
    if fs::metadata(&dir)?.dev() == fs::metadata(top)?.dev() {
        // Room for two arenas, because one may have to move. It is a limit, and takes no memory.
        let size = (bounds.total.saturating_add(bounds.reserve)).saturating_mul(2).saturating_add(64 << 20);
        let mounted = sys::mount_tmpfs(&dir, &format!("mode=0700,size={}k", (size >> 10).min(1 << 50)));
        mounted.inspect_err(|_| drop(fs::remove_dir(&dir)))?;
    }
    in_memory(&dir)?;
    Ok(dir)
}

/// The first place that can be had.
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
        tracing::debug!(%error, "live maps have no filesystem of their own");
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

/// What the store's record says of live maps of this boot and this place.
fn record(config: &Config) -> io::Result<Option<LiveRecord>> {
    let medium = HostMedium::new(&config.store)?;
    let file = match crate::io::Medium::open(&medium, LIVE_RECORD, Open::Existing) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    // A power cut may leave anything of it; then there is nothing that it could name.
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
    Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("{} is not the daemon's", path.display())))
}

impl LiveHome {
    /// The arena that an earlier daemon of this boot left, found by its name or among `kept`; else a new one. Says what
    /// is lost when it is gone.
    ///
    /// # Errors
    /// When there is no memory for it, or what is there was left by a newer plyfs.
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
                        return home.renamed(config).map(|home| (home, None));
                    }
                    Err(e) if e.kind() == io::ErrorKind::Unsupported => return Err(e),
                    Ok(_) => why = "it is of another store or boot".into(),
                    Err(e) => why = e.to_string(),
                }
            }
            let path = path.display();
            tracing::error!(
                %path,
                why,
                "the live maps of the last daemon are gone: what was written and not flushed before it ended is lost"
            );
            lost = Some(format!("{path} is gone ({why}): what the last daemon had not flushed is lost"));
        }
        let home = Self::make(config)?;
        home.fill(config, None)?;
        Ok((home, lost))
    }

    /// Goes on with an arena that another program of this process held.
    ///
    /// # Errors
    /// When it is none.
    pub fn resumed(config: &Config, file: File, path: PathBuf) -> io::Result<Self> {
        let found = LiveArena::identity(&file)?.ok_or(io::ErrorKind::InvalidData)?;
        let identity = identity_of(config, found.id)?;
        Ok(Self { file, path, identity })
    }

    /// With a name, when it has none any more. Takes what versions without an arena left behind.
    fn renamed(self, config: &Config) -> io::Result<Self> {
        if self.is_named() {
            self.sweep();
            self.fill(config, None)?;
            return Ok(self);
        }
        let home = Self::make(config)?;
        home.fill(config, Some(&self))?;
        Ok(home)
    }

    /// An empty one that no record names yet.
    ///
    /// # Errors
    /// When there is no place or no memory for it.
    pub fn make(config: &Config) -> io::Result<Self> {
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

    /// Fills it with what `from` and versions without an arena left, then has the record name it. No worker runs.
    ///
    /// # Errors
    /// When there is no memory for it; nothing has changed then.
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
        // Of no use after a power cut, so nothing waits for the medium.
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

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether its name still leads to it.
    pub fn is_named(&self) -> bool {
        let (Ok(named), Ok(held)) = (fs::symlink_metadata(&self.path), self.file.metadata()) else {
            return false;
        };
        (named.dev(), named.ino()) == (held.dev(), held.ino())
    }

    fn dir(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new("/"))
    }

    /// Removes the arenas beside it, which no record names: this directory is for one store.
    fn sweep(&self) {
        for entry in fs::read_dir(self.dir()).into_iter().flatten().flatten() {
            if entry.path() != self.path && entry.file_name().to_string_lossy().ends_with(SUFFIX) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Forgets it, unless it has what a disk needs. No worker runs.
    pub fn remove(self, config: &Config) {
        if LiveArena::list(&self.file).is_ok_and(|maps| !maps.is_empty()) {
            tracing::warn!(path = %self.path.display(), "live maps are left for the next start");
            return;
        }
        // The record goes first: one without an arena says that something is lost.
        if let Err(error) = fs::remove_file(config.store.join(LIVE_RECORD))
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "the record of live maps is left behind");
            return;
        }
        self.discard(sys::Detach::Yes);
    }

    /// Removes an arena that no record names, and its filesystem: with `detach` also when that is in use.
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
        // A directory with another arena is not empty.
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
        // What the arena has is later.
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
                // No disk has this size, so the map is refused and not mended.
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
        tracing::info!(dir = %dir.display(), maps = maps.len(), "live maps of an older version were taken over");
    }
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let former = entry.path().extension().is_some_and(|e| e == "live" || e == "tmp");
        let _ = if former { fs::remove_file(entry.path()) } else { Ok(()) };
    }
    let _ = fs::remove_dir(dir);
}

/// A home that is given up again, when what comes before serving fails and nothing is in it.
pub struct Tentative<'a> {
    home: Option<LiveHome>,
    config: &'a Config,
}

impl<'a> Tentative<'a> {
    /// As [`LiveHome::find`].
    ///
    /// # Errors
    /// As [`LiveHome::find`].
    pub fn find(config: &'a Config, kept: Vec<File>) -> io::Result<(Self, Option<String>)> {
        let (home, lost) = LiveHome::find(config, kept)?;
        Ok((Self { home: Some(home), config }, lost))
    }

    /// The home, for good.
    pub fn keep(mut self) -> Option<LiveHome> {
        self.home.take()
    }

    /// The home, for now.
    pub fn get(&self) -> Option<&LiveHome> {
        self.home.as_ref()
    }
}

impl Drop for Tentative<'_> {
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
    fn of_several_arenas_the_one_that_the_record_names_counts() {
        let dir = tempfile::tempdir_in("/dev/shm").expect("directory");
        let flags = Overrides { store: Some(dir.path().join("store")), ..Overrides::default() };
        let config = Config::load(None, flags).expect("valid");
        let config = Config { runtime_dir: Some(dir.path().into()), ..config };
        let _lock = start::open_store(&config).expect("a new store");
        let (old, lost) = LiveHome::find(&config, Vec::new()).expect("a home");
        assert_eq!(lost, None);
        let kept = |home: &LiveHome| home.file().try_clone().expect("descriptors");
        // One that was not filled yet.
        let empty = LiveHome::make(&config).expect("a home");
        let (found, _) = LiveHome::find(&config, vec![kept(&empty)]).expect("a home");
        assert_eq!(found.identity, old.identity);
        // One that the maps moved to, and the one before, kept by its descriptor.
        let new = LiveHome::make(&config).expect("a home");
        new.fill(&config, Some(&old)).expect("filled");
        let arena = LiveArena::open(kept(&new), MapBounds::NONE).expect("an arena");
        arena.fresh(7).and_then(|_| arena.publish(7)).expect("a map");
        let (found, _) = LiveHome::find(&config, vec![kept(&old)]).expect("a home");
        assert_eq!(found.identity, new.identity);
        // Its name is gone, too.
        fs::remove_file(new.path()).expect("removed");
        let (found, lost) = LiveHome::find(&config, vec![kept(&old), kept(&new)]).expect("a home");
        let disks: Vec<_> =
            LiveArena::list(found.file()).expect("maps").into_iter().map(|(disk, _)| disk).collect();
        assert_eq!((disks, lost), (vec![7], None));
        // Without it nothing older is taken for it.
        fs::remove_file(found.path()).expect("removed");
        let (found, lost) = LiveHome::find(&config, vec![kept(&old), kept(&new)]).expect("a home");
        assert!(LiveArena::list(found.file()).expect("maps").is_empty() && lost.is_some());
    }
}
