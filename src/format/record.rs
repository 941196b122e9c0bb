//! The store's superblock and the records of bases and disks.

use super::codec::{ENVELOPE_HEAD, Envelope, FormatError, Reader, Writer};
pub use super::identity::{BaseIdentity, Digest, Validator};
use super::{MAX_DISK_SIZE, MAX_NUMBER, valid_name};

const SUPERBLOCK: Envelope = Envelope { magic: *b"PLYSTORE", version: 1, structure: "superblock" };
const BASE: Envelope = Envelope { magic: *b"PLYBASE\0", version: 4, structure: "base record" };
const DISK: Envelope = Envelope { magic: *b"PLYDISK\0", version: 3, structure: "disk record" };
/// Autoclear feature of a disk record: see [`DiskRecord::size_is_current`].
const SIZE_IS_CURRENT: u64 = 1;

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
    /// QEMU's qcow2, versions 2 and 3.
    Qcow2,
    /// VMware's VMDK: monolithicSparse or streamOptimized.
    Vmdk,
}

/// One file of a base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageFile {
    /// Absolute path, or URL.
    pub source: String,
    /// URLs of the same content.
    pub mirrors: Vec<String>,
    /// Format.
    pub format: ImageFormat,
    /// Bytes of its virtual disk.
    pub disk_size: u64,
    /// What it was at registration.
    pub identity: BaseIdentity,
}

/// What of an object of a server has to be the same from answer to answer, besides the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strictness {
    /// A strong ETag, or Last-Modified where there is none.
    #[default]
    Strong,
    /// A weak ETag is as good.
    Weak,
    /// Nothing.
    SizeOnly,
}

/// How a base is fetched and kept. May change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BaseOptions {
    /// How its server's answers are held to its identity.
    pub strictness: Strictness,
    /// Seconds after which a read that waits for the server fails; 0: never.
    pub deadline_s: u32,
    /// Requests at a time; 0: as many as the daemon may.
    pub max_requests: u32,
    /// Bytes per second; 0: as fast as it goes.
    pub max_rate: u64,
    /// What is fetched of it is not evicted for others.
    pub pinned: bool,
    /// All of it is to be in the store.
    pub hydrate: bool,
    /// Its contents did not have the digest that it was registered with: it is not served.
    pub refused: bool,
    /// Its operator said that its servers will not give it any more: nothing is asked of them, what is here is read.
    pub given_up: bool,
}

/// URLs that took the place of those that a file of a base was registered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Which of its files: 0 is the image, 1 the file below it.
    pub file: u8,
    /// The first is asked first. Not empty.
    pub urls: Vec<String>,
}

/// Stands for one request of a client to create something, which the client may send again: a hash of the key that the
/// client chose and of all that it asked for, 127 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    high: u64,
    low: u64,
}

/// In the first word of a token, and never in the time at which a mount was made.
const IS_TOKEN: u64 = 1 << 63;

impl Token {
    /// Of the bytes of a hash, but for one bit.
    pub fn of_hash(hash: [u8; 16]) -> Self {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| hash[at + i]));
        Self { high: word(0) | IS_TOKEN, low: word(8) }
    }
}

/// The request that a record notes, because it may be sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Of a mount: the disk was made, or its name given or taken.
    Mount(MountRequest),
    /// Of a client of the control socket: the disk was made.
    Client(Token),
}

impl Request {
    fn put(&self, w: &mut Writer) {
        match self {
            Self::Mount(request) => w.i64(request.mount_ns).u64(request.unique),
            Self::Client(token) => w.u64(token.high).u64(token.low),
        };
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        let (high, low) = (r.u64()?, r.u64()?);
        Ok(match high & IS_TOKEN {
            0 => Self::Mount(MountRequest { mount_ns: high as i64, unique: low }),
            _ => Self::Client(Token { high, low }),
        })
    }
}

/// A registered base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseRecord {
    /// Number in this store.
    pub id: u64,
    /// Name.
    pub name: String,
    /// The file that is the image.
    pub image: ImageFile,
    /// The files below it, the nearest first, as its operator named them.
    pub backing: Vec<ImageFile>,
    /// Nanoseconds since the epoch.
    pub created_ns: i64,
    /// How it is fetched and kept.
    pub options: BaseOptions,
    /// Where its files are now, when they are not any more where they were: at most one for each, in their order. What
    /// is kept of a file goes by [`ImageFile::source`], which stays what it was.
    pub moved: Vec<Moved>,
    /// The request that registered it, until the next clean close.
    pub token: Option<Token>,
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

/// One request of one mount. The kernel sends it again, under its number, when the worker that read it died before it
/// answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountRequest {
    /// When the mount was made, nanoseconds since the epoch: another mount counts its requests anew.
    pub mount_ns: i64,
    /// Its number, without the bit that says that it is sent again.
    pub unique: u64,
}

impl MountRequest {
    /// A number that stands for it, not 0, where there is no space for more.
    pub fn token(&self) -> u64 {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.mount_ns.to_le_bytes());
        bytes[8..].copy_from_slice(&self.unique.to_le_bytes());
        twox_hash::XxHash3_64::oneshot(&bytes).max(1)
    }
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
    /// Bytes; the map file, once there, has the word. As created, or as of the end of the map file at `map.floor`.
    pub size: u64,
    /// `size` is that of the last record before `map.floor`: the disk's, unless a record follows.
    pub size_is_current: bool,
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
    /// The request that made it, or gave or took its name last.
    pub request: Option<Request>,
}

fn put_format(w: &mut Writer, format: ImageFormat) {
    w.u8(match format {
        ImageFormat::Raw => 0,
        ImageFormat::Qcow2 => 1,
        ImageFormat::Vmdk => 2,
    });
}

fn get_format(r: &mut Reader<'_>, version: u16) -> Result<ImageFormat, FormatError> {
    match (version, r.u8()?) {
        (_, 0) => Ok(ImageFormat::Raw),
        (2.., 1) => Ok(ImageFormat::Qcow2),
        (2.., 2) => Ok(ImageFormat::Vmdk),
        (_, other) => Err(r.bad(format!("image format {other} is not known"))),
    }
}

impl ImageFile {
    /// The most mirrors, and the most files below an image.
    pub const MAX_FILES: usize = 16;

    /// Whether it is a file of this host, and not behind a network.
    pub fn is_local(&self) -> bool {
        self.identity.validator.is_local()
    }

    fn put(&self, w: &mut Writer) {
        w.bytes(self.source.as_bytes());
        put_format(w, self.format);
        w.u64(self.disk_size);
        self.identity.put(w, 2);
        w.u8(self.mirrors.len() as u8);
        for mirror in &self.mirrors {
            w.bytes(mirror.as_bytes());
        }
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        let source = r.text()?;
        let format = get_format(r, 2)?;
        let disk_size = get_size(r)?;
        let identity = BaseIdentity::get(r, 2)?;
        let mirrors = r.u8()?;
        if usize::from(mirrors) > Self::MAX_FILES {
            return Err(r.bad(format!("{mirrors} mirrors, at most {} can be", Self::MAX_FILES)));
        }
        let mirrors = (0..mirrors).map(|_| r.text()).collect::<Result<_, _>>()?;
        Ok(Self { source, mirrors, format, disk_size, identity })
    }
}

impl BaseOptions {
    /// Whether a file of the base is read through the cache of fetched blocks: it lies behind a network, or the store
    /// is to have a copy of it.
    pub fn keeps(&self, file: &ImageFile) -> bool {
        self.hydrate || !file.is_local()
    }

    /// Whether what the cache has of the base stays when others need room.
    pub fn retains(&self) -> bool {
        self.pinned || self.hydrate
    }

    fn put(&self, w: &mut Writer, version: u16) {
        w.u8(match self.strictness {
            Strictness::Strong => 0,
            Strictness::Weak => 1,
            Strictness::SizeOnly => 2,
        });
        w.u32(self.deadline_s).u32(self.max_requests).u64(self.max_rate);
        w.u8(self.pinned.into()).u8(self.hydrate.into()).u8(self.refused.into());
        if version > 2 {
            w.u8(self.given_up.into());
        }
    }

    fn get(r: &mut Reader<'_>, version: u16) -> Result<Self, FormatError> {
        let strictness = match r.u8()? {
            0 => Strictness::Strong,
            1 => Strictness::Weak,
            2 => Strictness::SizeOnly,
            other => return Err(r.bad(format!("strictness {other} is not known"))),
        };
        let (deadline_s, max_requests, max_rate) = (r.u32()?, r.u32()?, r.u64()?);
        let flag = |r: &mut Reader<'_>| match r.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(r.bad(format!("a flag is {other}"))),
        };
        let (pinned, hydrate, refused) = (flag(r)?, flag(r)?, flag(r)?);
        let given_up = version > 2 && flag(r)?;
        Ok(Self { strictness, deadline_s, max_requests, max_rate, pinned, hydrate, refused, given_up })
    }
}

fn put_moved(w: &mut Writer, moved: &[Moved]) {
    w.u8(moved.len() as u8);
    for Moved { file, urls } in moved {
        w.u8(*file).u8(urls.len() as u8);
        for url in urls {
            w.bytes(url.as_bytes());
        }
    }
}

/// Of a base that has so many files.
fn get_moved(r: &mut Reader<'_>, files: usize) -> Result<Vec<Moved>, FormatError> {
    let mut moved = Vec::<Moved>::new();
    for _ in 0..r.u8()? {
        let (file, count) = (r.u8()?, r.u8()?);
        if usize::from(file) >= files || moved.last().is_some_and(|last| last.file >= file) {
            return Err(r.bad(format!("file {file} of {files} moved, out of order or not there")));
        }
        if !(1..=1 + ImageFile::MAX_FILES).contains(&usize::from(count)) {
            return Err(r.bad(format!("file {file} has {count} URLs")));
        }
        let urls = (0..count).map(|_| r.text()).collect::<Result<_, _>>()?;
        moved.push(Moved { file, urls });
    }
    Ok(moved)
}

fn get_token(r: &mut Reader<'_>) -> Result<Token, FormatError> {
    match Request::get(r)? {
        Request::Client(token) => Ok(token),
        Request::Mount(_) => Err(r.bad("the token lacks its mark".to_owned())),
    }
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
    /// Bytes of the virtual disk.
    pub fn size(&self) -> u64 {
        self.image.disk_size
    }

    /// Its files, the image first.
    pub fn files(&self) -> impl Iterator<Item = &ImageFile> {
        std::iter::once(&self.image).chain(&self.backing)
    }

    /// As [`BaseOptions::keeps`], with the options of this record.
    pub fn keeps(&self, file: &ImageFile) -> bool {
        self.options.keeps(file)
    }

    /// When the contents of the image were modified: as its validator says, or else when it was registered.
    pub fn modified_ns(&self) -> i64 {
        self.image.identity.validator.modified_ns().unwrap_or(self.created_ns)
    }

    /// The URLs at which one of its files is now, the first of which is asked first.
    pub fn urls_of(&self, file: &ImageFile) -> Vec<String> {
        let number = self.files().position(|other| other == file);
        let moved = self.moved.iter().find(|moved| Some(usize::from(moved.file)) == number);
        match moved {
            Some(moved) => moved.urls.clone(),
            None => std::iter::once(&file.source).chain(&file.mirrors).cloned().collect(),
        }
    }

    /// The bytes of the file. What an older version can say is written as that one, which every plyfs reads.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(self.id).bytes(self.name.as_bytes());
        let image = &self.image;
        let old =
            image.format == ImageFormat::Raw && image.mirrors.is_empty() && image.identity.fits_version_1();
        let plain = self.moved.is_empty() && self.options == BaseOptions::default() && self.token.is_none();
        if old && self.backing.is_empty() && plain {
            w.bytes(image.source.as_bytes());
            put_format(&mut w, image.format);
            w.u64(image.disk_size);
            image.identity.put(&mut w, 1);
            w.i64(self.created_ns);
            return BASE.seal_as(1, &w.finish());
        }
        image.put(&mut w);
        w.u8(self.backing.len() as u8);
        for file in &self.backing {
            file.put(&mut w);
        }
        w.i64(self.created_ns);
        let version = match self.token {
            Some(_) => 4,
            None if self.options.given_up || !self.moved.is_empty() => 3,
            None => 2,
        };
        self.options.put(&mut w, version);
        if version > 2 {
            put_moved(&mut w, &self.moved);
        }
        if let Some(token) = self.token {
            w.u64(token.high).u64(token.low);
        }
        BASE.seal_as(version, &w.finish())
    }

    /// Reads the bytes of the file.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let (payload, version) = BASE.open_any(bytes)?;
        let mut r = Reader::new(payload, BASE.structure);
        let id = get_count(&mut r)?;
        let name = get_name(&mut r)?;
        let record = if version == 1 {
            let source = r.text()?;
            let format = get_format(&mut r, version)?;
            let size = get_size(&mut r)?;
            let identity = BaseIdentity::get(&mut r, version)?;
            let image = ImageFile { source, mirrors: Vec::new(), format, disk_size: size, identity };
            let created_ns = r.i64()?;
            let (backing, moved) = (Vec::new(), Vec::new());
            let options = BaseOptions::default();
            Self { id, name, image, backing, created_ns, options, moved, token: None }
        } else {
            let image = ImageFile::get(&mut r)?;
            let below = r.u8()?;
            if usize::from(below) > ImageFile::MAX_FILES {
                return Err(r.bad(format!("{below} files, at most {} can be", ImageFile::MAX_FILES)));
            }
            let backing = (0..below).map(|_| ImageFile::get(&mut r)).collect::<Result<_, _>>()?;
            let created_ns = r.i64()?;
            let options = BaseOptions::get(&mut r, version)?;
            let files = 1 + usize::from(below);
            let moved = if version > 2 { get_moved(&mut r, files)? } else { Vec::new() };
            let token = if version > 3 { Some(get_token(&mut r)?) } else { None };
            Self { id, name, image, backing, created_ns, options, moved, token }
        };
        r.end()?;
        Ok(record)
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
        let old = self.backing.as_ref().is_none_or(|backing| backing.identity.fits_version_1());
        let version = match (self.request, old) {
            (Some(_), _) => 3,
            (None, false) => 2,
            (None, true) => 1,
        };
        w.u64(self.id).bytes(self.name.as_bytes()).u64(self.name_seq).u8(self.unlinked.into());
        match &self.backing {
            None => {
                w.u8(0);
            }
            Some(backing) => {
                w.u8(1).u64(backing.base);
                backing.identity.put(&mut w, version);
            }
        }
        w.u64(self.size).u64(self.overlap);
        w.u32(self.mode).u32(self.uid).u32(self.gid);
        w.i64(self.created_ns).i64(self.changed_ns).i64(self.modified_ns);
        w.u64(self.map.generation).u64(self.map.floor);
        if let Some(request) = &self.request {
            request.put(&mut w);
        }
        let autoclear = if self.size_is_current { SIZE_IS_CURRENT } else { 0 };
        DISK.seal_with(version, autoclear, &w.finish())
    }

    /// Reads the bytes of the file.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let (payload, version, autoclear) = DISK.open_with(bytes)?;
        let mut r = Reader::new(payload, DISK.structure);
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
            1 => Some(Backing { base: get_count(&mut r)?, identity: BaseIdentity::get(&mut r, version)? }),
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
            size_is_current: autoclear & SIZE_IS_CURRENT != 0,
            overlap,
            mode: r.u32()? & 0o7777,
            uid: r.u32()?,
            gid: r.u32()?,
            created_ns: r.i64()?,
            changed_ns: r.i64()?,
            modified_ns: r.i64()?,
            map: MapRoot { generation: get_count(&mut r)?, floor: r.u64()? },
            request: if version < 3 { None } else { Some(Request::get(&mut r)?) },
        };
        r.end()?;
        Ok(out)
    }
}
