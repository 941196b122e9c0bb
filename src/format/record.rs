//! The store's superblock and the records of bases and disks.

use std::sync::Arc;

use super::codec::{ENVELOPE_HEAD, Envelope, FormatError, Reader, Writer};
use super::features::{Features, get_fields, put_fields};
pub use super::file_proof::FileProof;
use super::file_proof::{get_proofs, put_proofs};
pub use super::identity::{BaseIdentity, Digest, ImageData, Validator};
use super::lineage::Lineage;
pub use super::options::{BaseOptions, KeptCopies, Strictness};
use super::rework::Purpose;
use super::{MAX_DISK_SIZE, MAX_NUMBER, valid_name};

const SUPERBLOCK: Envelope = Envelope { magic: *b"PLYSTORE", version: 1, structure: "superblock" };
const BASE: Envelope = Envelope { magic: *b"PLYBASE\0", version: 5, structure: "base record" };
const DISK: Envelope = Envelope { magic: *b"PLYDISK\0", version: 5, structure: "disk record" };
/// Tag of the proofs of a base's files.
const PROOFS: u16 = 1;
/// Tag of the further copies of its cached blocks.
const COPIES: u16 = 2;
/// Autoclear feature of a disk record; see [`DiskRecord::size_is_current`].
const SIZE_IS_CURRENT: u64 = 1;

/// Identity of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Random, fixed for the life of the store.
    pub uuid: [u8; 16],
    /// Time of creation, nanoseconds since the epoch.
    pub created_ns: i64,
    /// Only numbers below this one may belong to a disk or base. A number is never used twice.
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

/// How a file of a base encodes its virtual disk. The operator decides it at registration; it is never guessed.
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
    /// The object at registration.
    pub identity: BaseIdentity,
    /// The hash of its contents, and where its proof is.
    pub proof: Option<FileProof>,
}

/// URLs that replace those that a file of a base was registered with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moved {
    /// Number of the file: 0 is the image, 1 the file below it.
    pub file: u8,
    /// The first one is asked first. Not empty.
    pub urls: Vec<String>,
}

/// Identifies one request of a client to create an object. The client may send the request again. 127 bits of a hash of
/// the client's key and the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Token {
    high: u64,
    low: u64,
}

/// Set in the first word of a token, and never in the time at which a mount was made.
const IS_TOKEN: u64 = 1 << 63;

impl Token {
    /// Of a hash, of which one bit is dropped.
    pub fn of_hash(hash: [u8; 16]) -> Self {
        let word = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| hash[at + i]));
        Self { high: word(0) | IS_TOKEN, low: word(8) }
    }

    pub(super) fn put(self, w: &mut Writer) {
        w.u64(self.high).u64(self.low);
    }

    pub(super) fn get(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        match Request::get(r)? {
            Request::Client(token) => Ok(token),
            Request::Mount(_) => Err(r.bad("the token lacks its mark".to_owned())),
        }
    }
}

/// The request in a record, because it may be sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// A request of a mount, which made the disk or changed its name.
    Mount(MountRequest),
    /// A request of a client of the control socket, which made the disk.
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
    /// How it is fetched and cached.
    pub options: BaseOptions,
    /// Files that have other URLs than at registration: at most one entry for each file, in their order. The key of a
    /// file's cached blocks goes by [`ImageFile::source`], which does not change.
    pub moved: Vec<Moved>,
    /// The request that registered it, until the next clean close.
    pub token: Option<Token>,
}

/// A disk's reference to its base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backing {
    /// Number of the base.
    pub base: u64,
    /// The base's identity when the disk was made. Disks on one base share it.
    pub identity: Arc<BaseIdentity>,
}

/// The map file of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MapRoot {
    /// Generation of the map file; 0 before the first flush.
    pub generation: u64,
    /// The map file is complete up to this byte at least.
    pub floor: u64,
}

/// One request of one mount. The kernel sends it again, with the same number, when the worker that read it died before
/// it answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MountRequest {
    /// When the mount was made, nanoseconds since the epoch. Each mount numbers its requests from the start.
    pub mount_ns: i64,
    /// Number of the request, without the bit that says that it is sent again.
    pub unique: u64,
}

impl MountRequest {
    /// A hash of it that is not 0, for a place that has room for one number only.
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
    /// Number in this store; decides the names of its files and its inode number.
    pub id: u64,
    /// Name. Of two records with one name, the one with the higher `name_seq` has it.
    pub name: String,
    /// Grows with every creation and rename in the store.
    pub name_seq: u64,
    /// Whether it has lost its name; it lives until its last close.
    pub unlinked: bool,
    /// The base, or none for a blank disk.
    pub backing: Option<Backing>,
    /// Bytes, at creation or at `map.floor` of the map file. Once there is a map file, that is authoritative.
    pub size: u64,
    /// Whether `size` is that of the last record before `map.floor`: the disk's size, unless a record follows.
    pub size_is_current: bool,
    /// Bytes from the start that fell through to the base at creation.
    pub overlap: u64,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Nanoseconds since the epoch.
    pub created_ns: i64,
    /// Last change of its attributes.
    pub changed_ns: i64,
    /// Last modification of its contents, as of the last write of the record.
    pub modified_ns: i64,
    /// The map file.
    pub map: MapRoot,
    /// The last request that made it or changed its name.
    pub request: Option<Request>,
    /// Its delta, the sealed layers below it, and its snapshots.
    pub lineage: Lineage,
    /// What it has besides.
    pub features: Features,
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
        Ok(Self { source, mirrors, format, disk_size, identity, proof: None })
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

/// For a base with `files` files.
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

/// A number that grows and needs room for that. Counting never reaches 2^62.
pub(super) fn get_count(r: &mut Reader<'_>) -> Result<u64, FormatError> {
    let count = r.u64()?;
    if count <= MAX_NUMBER { Ok(count) } else { Err(r.bad(format!("number {count} is above 2^62"))) }
}

pub(super) fn get_flag(r: &mut Reader<'_>) -> Result<bool, FormatError> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(r.bad(format!("a flag is {other}"))),
    }
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

    fn files_mut(&mut self) -> impl Iterator<Item = &mut ImageFile> {
        std::iter::once(&mut self.image).chain(&mut self.backing)
    }

    /// As [`BaseOptions::keeps`], with the options of this record.
    pub fn keeps(&self, file: &ImageFile) -> bool {
        self.options.keeps(file)
    }

    /// When the contents of the image were modified: as its validator says, or else when it was registered.
    pub fn modified_ns(&self) -> i64 {
        self.image.identity.validator.modified_ns().unwrap_or(self.created_ns)
    }

    /// The present URLs of one of its files; the first one is asked first.
    pub fn urls_of(&self, file: &ImageFile) -> Vec<String> {
        let number = self.files().position(|other| other == file);
        let moved = self.moved.iter().find(|moved| Some(usize::from(moved.file)) == number);
        match moved {
            Some(moved) => moved.urls.clone(),
            None => std::iter::once(&file.source).chain(&file.mirrors).cloned().collect(),
        }
    }

    /// The bytes of the file, in the oldest version that can express the record, so that an older plyfs reads it.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(self.id).bytes(self.name.as_bytes());
        let image = &self.image;
        let old =
            image.format == ImageFormat::Raw && image.mirrors.is_empty() && image.identity.fits_version_1();
        let mut fields = Vec::new();
        if self.files().any(|file| file.proof.is_some()) {
            fields.push((PROOFS, put_proofs(self.files())));
        }
        if let Some(copies) = self.options.copies {
            fields.push((COPIES, copies.put()));
        }
        let plain = self.moved.is_empty()
            && self.options == BaseOptions::default()
            && self.token.is_none()
            && fields.is_empty();
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
            _ if !fields.is_empty() => 5,
            Some(_) => 4,
            None if self.options.given_up || !self.moved.is_empty() => 3,
            None => 2,
        };
        self.options.put(&mut w, version);
        if version > 2 {
            put_moved(&mut w, &self.moved);
        }
        if version > 4 {
            w.u8(self.token.is_some().into());
        }
        if let Some(token) = self.token {
            token.put(&mut w);
        }
        if version > 4 {
            put_fields(&mut w, fields);
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
            let image =
                ImageFile { source, mirrors: Vec::new(), format, disk_size: size, identity, proof: None };
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
            let has_token = match version {
                0..4 => false,
                4 => true,
                _ => get_flag(&mut r)?,
            };
            let token = if has_token { Some(Token::get(&mut r)?) } else { None };
            let mut record = Self { id, name, image, backing, created_ns, options, moved, token };
            if version > 4 {
                let mut set = |tag, r: &mut Reader<'_>| match tag {
                    PROOFS => get_proofs(r, record.files_mut()),
                    COPIES => {
                        record.options.copies = Some(KeptCopies::get(r)?);
                        Ok(())
                    }
                    _ => Err(r.newer(format!("field {tag} is not known; use a newer plyfs"))),
                };
                get_fields(&mut r, BASE.structure, &mut set)?;
            }
            record
        };
        r.end()?;
        Ok(record)
    }
}

/// The readable part of a disk's record whose checksum is wrong. None of it is certain. It is used only to keep a name
/// or a base that the disk may need.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Salvage {
    /// The name, or bytes that look like a name.
    pub name: String,
    /// The order of names.
    pub name_seq: Option<u64>,
}

impl DiskRecord {
    /// Numbers of the bases that it needs: its own, and the one that it is being put on.
    pub fn bases(&self) -> impl Iterator<Item = u64> {
        let next = match self.lineage.rework.as_ref().map(|rework| &rework.purpose) {
            Some(Purpose::Rebase { to: Some(backing), .. }) => Some(backing.base),
            _ => None,
        };
        let own = self.backing.as_ref().map(|backing| backing.base);
        own.into_iter().chain(next.filter(move |next| own != Some(*next)))
    }

    /// Whether it lost its name, and cannot have one again: its files are to be removed.
    pub fn is_removed(&self) -> bool {
        self.unlinked && self.features.trash.is_none()
    }

    /// Reads bytes that look like a name from a record that [`DiskRecord::decode`] refuses.
    pub fn salvage(bytes: &[u8]) -> Option<Salvage> {
        let mut r = Reader::new(bytes.get(ENVELOPE_HEAD..)?, DISK.structure);
        let _id = r.u64().ok()?;
        let name = get_name(&mut r).ok()?;
        Some(Salvage { name, name_seq: get_count(&mut r).ok() })
    }

    /// Forgets the keys of deltas that the record does not name any more.
    pub fn forget_unneeded_keys(&mut self) {
        if let Some(encryption) = &mut self.features.encryption {
            let lineage = &self.lineage;
            encryption.keys.retain(|key| lineage.deltas().any(|delta| delta == key.delta));
        }
    }

    /// The bytes of the file.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        let old = self.backing.as_ref().is_none_or(|backing| backing.identity.fits_version_1());
        let version = match (self.request, old) {
            _ if !self.features.is_default(&self.lineage) => 5,
            _ if !self.lineage.is_default(self.id) => 4,
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
        if version > 3 {
            w.u8(self.request.is_some().into());
        }
        if let Some(request) = &self.request {
            request.put(&mut w);
        }
        if version > 3 {
            self.lineage.put(&mut w);
        }
        if version > 4 {
            self.features.put(&mut w, &self.lineage);
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
            1 => {
                let base = get_count(&mut r)?;
                Some(Backing { base, identity: Arc::new(BaseIdentity::get(&mut r, version)?) })
            }
            other => return Err(r.bad(format!("backing type {other} is not known"))),
        };
        let (size, overlap) = (get_size(&mut r)?, get_size(&mut r)?);
        if overlap > size {
            return Err(r.bad(format!("overlap {overlap} is above the size {size}")));
        }
        let mut out = Self {
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
            request: None,
            lineage: Lineage::of(id),
            features: Features::default(),
        };
        let has_request = match version {
            0..3 => false,
            3 => true,
            _ => match r.u8()? {
                0 => false,
                1 => true,
                other => return Err(r.bad(format!("request flag is {other}"))),
            },
        };
        if has_request {
            out.request = Some(Request::get(&mut r)?);
        }
        if version > 3 {
            out.lineage = Lineage::get(&mut r)?;
        }
        if version > 4 {
            out.features = Features::get(&mut r, &mut out.lineage, DISK.structure)?;
        }
        r.end()?;
        Ok(out)
    }
}
