//! The store's superblock and the records of bases and disks.

use super::codec::{ENVELOPE_HEAD, Envelope, FormatError, Reader, Writer};
use super::{MAX_DISK_SIZE, MAX_NUMBER, valid_name};

const SUPERBLOCK: Envelope = Envelope { magic: *b"PLYSTORE", version: 1, structure: "superblock" };
const BASE: Envelope = Envelope { magic: *b"PLYBASE\0", version: 1, structure: "base record" };
const DISK: Envelope = Envelope { magic: *b"PLYDISK\0", version: 1, structure: "disk record" };

/// Identity of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Random, fixed for the life of the store.
    pub uuid: [u8; 16],
    /// Nanoseconds since the epoch.
    pub created_ns: i64,
    /// Numbers below this one may have been given to a disk or base; numbers are never used again.
    pub next_id: u64,
}

impl Superblock {
    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.raw(&self.uuid).i64(self.created_ns).u64(self.next_id);
        SUPERBLOCK.seal(&w.finish())
    }
    /// Reads the bytes of the file.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new(SUPERBLOCK.open(bytes)?, SUPERBLOCK.structure);
        let mut uuid = [0; 16];
        uuid.copy_from_slice(r.raw(16)?);
        let out = Self { uuid, created_ns: r.i64()?, next_id: get_count(&mut r)? };
        r.end()?;
        Ok(out)
    }
}

/// How a base's source encodes its virtual disk. Fixed at registration, never probed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageFormat {
    /// The file is the disk.
    Raw,
}

/// A content digest as given by the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Digest {
    /// SHA-256.
    Sha256([u8; 32]),
    /// SHA-512.
    Sha512([u8; 64]),
}

/// What a base has to be, so that a changed file is noticed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseIdentity {
    /// Bytes of the source file.
    pub size: u64,
    /// Modification time in nanoseconds since the epoch.
    pub mtime_ns: i64,
    /// Inode number of the source file.
    pub inode: u64,
    /// Content digest, when given.
    pub digest: Option<Digest>,
}

/// A registered base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseRecord {
    /// Number in this store.
    pub id: u64,
    /// Name.
    pub name: String,
    /// Absolute path.
    pub source: String,
    /// Format of the source.
    pub format: ImageFormat,
    /// Bytes of the virtual disk.
    pub size: u64,
    /// What the source was at registration.
    pub identity: BaseIdentity,
    /// Nanoseconds since the epoch.
    pub created_ns: i64,
}

/// A disk's reference to its base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Number of the base.
    pub base: u64,
    /// The base's identity when the disk was made.
    pub identity: BaseIdentity,
}

/// Where a disk's durable map is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MapRoot {
    /// Generation of the map file; 0 when nothing was ever flushed.
    pub generation: u64,
    /// The map file is valid up to here at least, in bytes.
    pub floor: u64,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskRecord {
    /// Number in this store; decides the names of its files and its inode.
    pub id: u64,
    /// Name. Two records with one name: the higher `name_seq` has it.
    pub name: String,
    /// Grows with every rename in the store.
    pub name_seq: u64,
    /// Unlinked; lives until its last close.
    pub unlinked: bool,
    /// The base, or none for a blank disk.
    pub backing: Option<Backing>,
    /// Bytes, as created. The map file, once there, has the word.
    pub size: u64,
    /// Bytes from the start that fall through to the base, as created.
    pub overlap: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Nanoseconds since the epoch.
    pub created_ns: i64,
    /// Last change of this record.
    pub changed_ns: i64,
    /// Last change of the contents that the record knows of.
    pub modified_ns: i64,
    /// The durable map.
    pub map: MapRoot,
}

fn put_identity(w: &mut Writer, identity: &BaseIdentity) {
    w.u64(identity.size).i64(identity.mtime_ns).u64(identity.inode);
    match &identity.digest {
        None => w.u8(0),
        Some(Digest::Sha256(d)) => w.u8(1).raw(d),
        Some(Digest::Sha512(d)) => w.u8(2).raw(d),
    };
}

fn get_identity(r: &mut Reader<'_>) -> Result<BaseIdentity, FormatError> {
    let (size, mtime_ns, inode) = (r.u64()?, r.i64()?, r.u64()?);
    let digest = match r.u8()? {
        0 => None,
        1 => {
            let mut d = [0; 32];
            d.copy_from_slice(r.raw(32)?);
            Some(Digest::Sha256(d))
        }
        2 => {
            let mut d = [0; 64];
            d.copy_from_slice(r.raw(64)?);
            Some(Digest::Sha512(d))
        }
        other => return Err(r.bad(format!("digest type {other} is not known"))),
    };
    Ok(BaseIdentity { size, mtime_ns, inode, digest })
}

/// A number that grows, and has to have room for that: above 2^62 it was never reached by counting.
fn get_count(r: &mut Reader<'_>) -> Result<u64, FormatError> {
    let count = r.u64()?;
    if count <= MAX_NUMBER { Ok(count) } else { Err(r.bad(format!("number {count} is above 2^62"))) }
}

fn get_name(r: &mut Reader<'_>) -> Result<String, FormatError> {
    let name = r.text()?;
    if valid_name(&name) { Ok(name) } else { Err(r.bad(format!("{name:?} is not a name"))) }
}

fn get_size(r: &mut Reader<'_>) -> Result<u64, FormatError> {
    let size = r.u64()?;
    if size <= MAX_DISK_SIZE { Ok(size) } else { Err(r.bad(format!("size {size} is above 64 TiB"))) }
}

impl BaseRecord {
    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(self.id).bytes(self.name.as_bytes()).bytes(self.source.as_bytes());
        w.u8(match self.format {
            ImageFormat::Raw => 0,
        });
        w.u64(self.size);
        put_identity(&mut w, &self.identity);
        w.i64(self.created_ns);
        BASE.seal(&w.finish())
    }
    /// Reads the bytes of the file.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new(BASE.open(bytes)?, BASE.structure);
        let id = get_count(&mut r)?;
        let name = get_name(&mut r)?;
        let source = r.text()?;
        let format = match r.u8()? {
            0 => ImageFormat::Raw,
            other => return Err(r.bad(format!("image format {other} is not known"))),
        };
        let size = get_size(&mut r)?;
        let identity = get_identity(&mut r)?;
        let created_ns = r.i64()?;
        r.end()?;
        Ok(Self { id, name, source, format, size, identity, created_ns })
    }
}

/// What can be read of a disk's record whose checksum is wrong. None of it is certain: it is good for keeping a name
/// or a base that the disk may need, and for nothing else.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Salvage {
    /// Its name, or something that looks like one.
    pub name: String,
    /// Its place in the order of names.
    pub name_seq: Option<u64>,
}

impl DiskRecord {
    /// Reads what looks like a name from bytes that [`DiskRecord::decode`] refuses.
    pub fn salvage(bytes: &[u8]) -> Option<Salvage> {
        let mut r = Reader::new(bytes.get(ENVELOPE_HEAD..)?, DISK.structure);
        let _id = r.u64().ok()?;
        let name = get_name(&mut r).ok()?;
        Some(Salvage { name, name_seq: get_count(&mut r).ok() })
    }

    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(self.id).bytes(self.name.as_bytes()).u64(self.name_seq).u8(self.unlinked.into());
        match &self.backing {
            None => {
                w.u8(0);
            }
            Some(backing) => {
                w.u8(1).u64(backing.base);
                put_identity(&mut w, &backing.identity);
            }
        }
        w.u64(self.size).u64(self.overlap);
        w.u32(self.mode).u32(self.uid).u32(self.gid);
        w.i64(self.created_ns).i64(self.changed_ns).i64(self.modified_ns);
        w.u64(self.map.generation).u64(self.map.floor);
        DISK.seal(&w.finish())
    }
    /// Reads the bytes of the file.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new(DISK.open(bytes)?, DISK.structure);
        let id = get_count(&mut r)?;
        let name = get_name(&mut r)?;
        let name_seq = get_count(&mut r)?;
        let unlinked = match r.u8()? {
            0 => false,
            1 => true,
            other => return Err(r.bad(format!("unlinked flag is {other}"))),
        };
        let backing = match r.u8()? {
            0 => None,
            1 => Some(Backing { base: get_count(&mut r)?, identity: get_identity(&mut r)? }),
            other => return Err(r.bad(format!("backing type {other} is not known"))),
        };
        let (size, overlap) = (get_size(&mut r)?, get_size(&mut r)?);
        if overlap > size {
            return Err(r.bad(format!("overlap {overlap} is above the size {size}")));
        }
        let out = Self {
            id,
            name,
            name_seq,
            unlinked,
            backing,
            size,
            overlap,
            mode: r.u32()? & 0o7777,
            uid: r.u32()?,
            gid: r.u32()?,
            created_ns: r.i64()?,
            changed_ns: r.i64()?,
            modified_ns: r.i64()?,
            map: MapRoot { generation: get_count(&mut r)?, floor: r.u64()? },
        };
        r.end()?;
        Ok(out)
    }
}
