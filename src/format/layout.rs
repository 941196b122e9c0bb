//! The name of every file of a store, each once (docs/format.md, "The store directory").
//!
//! Names are part of the format: one version finds by name what another version wrote. What must hold: outside of
//! tests, each name on disk is spelled here only, so that no two places can disagree.

/// The superblock. A directory with this file is a store.
pub const SUPERBLOCK: &str = "plyfs.store";
/// Locked by the daemon, or by the check.
pub const LOCK: &str = "lock";
/// Space kept back for metadata.
pub const RESERVE: &str = "reserve";
/// The record of live maps: where the live maps of this boot are.
pub const LIVE_RECORD: &str = "live";
/// The list of names: what records said, for when they cannot be read.
pub const NAMES: &str = "names";
/// The list of pools. Exists once there was one besides the store's directory.
pub const POOLS: &str = "pools";
/// In the directory of a pool: its identity. A directory without it is no pool.
pub const POOL_IDENTITY: &str = "plyfs.pool";
/// The list of uses: when each base was needed last.
pub const USED: &str = "used";
/// How the last daemon ended.
pub const OUTCOME: &str = "daemon.outcome";
/// The control socket of the running daemon.
pub const CONTROL_SOCKET: &str = "control.sock";
/// The default mount point.
pub const MOUNT: &str = "mnt";

/// Records of bases.
pub const BASES: &str = "bases";
/// Records of disks.
pub const DISKS: &str = "disks";
/// Data files and map files of disks.
pub const DELTAS: &str = "deltas";
/// The cache of fetched blocks.
pub const CACHE: &str = "cache";
/// Traces of bases. Created with the first trace.
pub const TRACES: &str = "traces";
/// Images of bases that were made of disks. Created with the first of them; the store removes an image with its last base.
pub const IMAGES: &str = "images";
/// Directories that every store has.
pub const DIRS: [&str; 3] = [BASES, DISKS, DELTAS];

/// Suffixes of names, with their dot.
pub const BASE_SUFFIX: &str = ".base";
pub const DISK_SUFFIX: &str = ".disk";
pub const DATA_SUFFIX: &str = ".data";
pub const MAP_SUFFIX: &str = ".map";
pub const INDEX_SUFFIX: &str = ".index";
pub const TRACE_SUFFIX: &str = ".trace";
pub const BLOCKS_SUFFIX: &str = ".blocks";
pub const SUMS_SUFFIX: &str = ".sums";
pub const PROOF_SUFFIX: &str = ".proof";
/// Suffix of a file that is being written. The file has no meaning after a crash.
pub const STAGED_SUFFIX: &str = ".tmp";

/// In [`CACHE`]: the list of bases whose contents lie under the key that version 0.1.0 made.
pub const INHERITED: &str = "inherited";

/// Name of the record of a base, in [`BASES`].
pub fn base_record(base: u64) -> String {
    format!("{base}{BASE_SUFFIX}")
}

/// Path of the record of a base, from the store's directory.
pub fn base_path(base: u64) -> String {
    format!("{BASES}/{base}{BASE_SUFFIX}")
}

/// Name of the record of a disk, in [`DISKS`].
pub fn disk_record(disk: u64) -> String {
    format!("{disk}{DISK_SUFFIX}")
}

/// Path of the record of a disk, from the store's directory.
pub fn disk_path(disk: u64) -> String {
    format!("{DISKS}/{disk}{DISK_SUFFIX}")
}

/// Path of the data file of a delta, from the store's directory.
pub fn data_path(delta: u64) -> String {
    format!("{DELTAS}/{delta}{DATA_SUFFIX}")
}

/// Path of a map file of a delta, from the store's directory.
pub fn map_path(delta: u64, generation: u64) -> String {
    format!("{DELTAS}/{delta}.{generation}{MAP_SUFFIX}")
}

/// Path of the index of a layer, from the store's directory.
pub fn index_path(layer: u64) -> String {
    format!("{DELTAS}/{layer}{INDEX_SUFFIX}")
}

/// Name of the trace of a base, in [`TRACES`].
pub fn trace_file(base: u64) -> String {
    format!("{base}{TRACE_SUFFIX}")
}

/// The name of the file `name` while it is being written.
pub fn staged(name: &str) -> String {
    format!("{name}{STAGED_SUFFIX}")
}

/// Parses a number in a file name: decimal, without leading zeros or a sign.
pub fn number(text: &str) -> Option<u64> {
    text.parse::<u64>().ok().filter(|n| n.to_string() == text)
}

/// A file in [`DELTAS`], by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeltaFile {
    /// The data file of a delta.
    Data(u64),
    /// The index of a layer.
    Index(u64),
    /// A map file of a delta.
    Map {
        /// The delta.
        delta: u64,
        /// Its generation.
        generation: u64,
    },
}

impl DeltaFile {
    /// Number of the delta.
    pub fn delta(self) -> u64 {
        match self {
            Self::Data(delta) | Self::Index(delta) | Self::Map { delta, .. } => delta,
        }
    }

    /// The number in a path from the store's directory, also of a file that is being written. `None` when the path is not
    /// that of a delta's file.
    pub fn number_in(path: &str) -> Option<u64> {
        number(path.strip_prefix(DELTAS)?.strip_prefix('/')?.split('.').next()?)
    }

    /// `None` for a name that plyfs does not make.
    pub fn of(name: &str) -> Option<Self> {
        if let Some(delta) = name.strip_suffix(DATA_SUFFIX) {
            return number(delta).map(Self::Data);
        }
        if let Some(layer) = name.strip_suffix(INDEX_SUFFIX) {
            return number(layer).map(Self::Index);
        }
        let (delta, generation) = name.strip_suffix(MAP_SUFFIX)?.split_once('.')?;
        Some(Self::Map { delta: number(delta)?, generation: number(generation)? })
    }
}
