//! The list of pools of a store, and the file by which a directory shows that it is a pool (docs/format.md, "Pools").

use super::codec::{Envelope, FormatError, Reader, Writer};
use super::{MAX_NUMBER, valid_name};

/// Most bytes of the list of pools.
pub const LONGEST_POOL_LIST: u64 = 1 << 20;
/// Most bytes of the identity of a pool.
pub const LONGEST_POOL_IDENTITY: u64 = 4096;
/// Most pools of a store, besides the default one.
pub const MOST_POOLS: usize = 128;
/// Name of the pool that is the directory of the store.
pub const DEFAULT_POOL: &str = "default";

const LIST: Envelope = Envelope { magic: *b"PLYPOOLS", version: 1, structure: "list of pools" };
const IDENTITY: Envelope = Envelope { magic: *b"PLYPOOL\0", version: 1, structure: "identity of a pool" };

/// A pool of a store, as the store lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolEntry {
    /// Its number, from the sequence of all numbers. Records of disks have it.
    pub number: u64,
    /// Its name.
    pub name: String,
    /// Absolute path of its directory.
    pub dir: String,
    /// The random number that its identity has too.
    pub uuid: [u8; 16],
    /// When it was added, nanoseconds since the epoch.
    pub added_ns: i64,
}

/// The bytes of a list.
pub fn encode(pools: &[PoolEntry]) -> Vec<u8> {
    let mut w = Writer::new();
    w.u16(pools.len() as u16);
    for pool in pools {
        w.u64(pool.number).bytes(pool.name.as_bytes()).bytes(pool.dir.as_bytes());
        w.raw(&pool.uuid).i64(pool.added_ns);
    }
    LIST.seal(&w.finish())
}

/// Reads the bytes of a list.
///
/// # Errors
/// When they are damaged or of a newer plyfs.
pub fn decode(bytes: &[u8]) -> Result<Vec<PoolEntry>, FormatError> {
    let mut r = Reader::new(LIST.open(bytes)?, LIST.structure);
    let mut pools: Vec<PoolEntry> = Vec::new();
    for _ in 0..r.u16()? {
        let number = r.u64()?;
        let (name, dir) = (r.text()?, r.text()?);
        let uuid = get_uuid(&mut r)?;
        let added_ns = r.i64()?;
        if number == 0 || number > MAX_NUMBER || pools.iter().any(|pool| pool.number == number) {
            return Err(r.bad(format!("{number} is not the number of one pool")));
        }
        if !valid_name(&name) || name == DEFAULT_POOL || pools.iter().any(|pool| pool.name == name) {
            return Err(r.bad(format!("{name:?} is not the name of one pool")));
        }
        if !dir.starts_with('/') {
            return Err(r.bad(format!("{dir:?} is not an absolute path")));
        }
        pools.push(PoolEntry { number, name, dir, uuid, added_ns });
    }
    r.end()?;
    Ok(pools)
}

/// What a directory says about the pool that it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolIdentity {
    /// Of the store that the pool belongs to.
    pub store: [u8; 16],
    /// Of the pool.
    pub uuid: [u8; 16],
    /// When it was made, nanoseconds since the epoch.
    pub made_ns: i64,
}

impl PoolIdentity {
    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.raw(&self.store).raw(&self.uuid).i64(self.made_ns);
        IDENTITY.seal(&w.finish())
    }

    /// Reads the bytes of the file.
    ///
    /// # Errors
    /// When they are damaged or of a newer plyfs.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new(IDENTITY.open(bytes)?, IDENTITY.structure);
        let identity = Self { store: get_uuid(&mut r)?, uuid: get_uuid(&mut r)?, made_ns: r.i64()? };
        r.end()?;
        Ok(identity)
    }
}

fn get_uuid(r: &mut Reader<'_>) -> Result<[u8; 16], FormatError> {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(r.raw(16)?);
    Ok(uuid)
}
