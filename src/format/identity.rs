//! Which object a file of a base is: the part of a record that differs from one kind of source to another.
//!
//! A new kind of source is a variant of [`Validator`] here, with a number of its own in docs/format.md. What must hold:
//! a record with a number that this plyfs does not know was written by a newer one, and is refused as such.

use super::codec::{FormatError, Reader, Writer};

/// Most names of a device.
const MOST_NAMES: u8 = 16;

/// A content digest as given by the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Digest {
    /// SHA-256.
    Sha256([u8; 32]),
    /// SHA-512.
    Sha512([u8; 64]),
}

/// How a changed source is noticed, besides its size. One variant for each kind of source.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Validator {
    /// A file of this host.
    File {
        /// Modification time in nanoseconds since the epoch.
        mtime_ns: i64,
        /// Inode number.
        inode: u64,
    },
    /// A block device of this host.
    Device {
        /// Its number: major in the upper 32 bits, minor in the lower ones.
        number: u64,
        /// The names that it keeps, the most specific one first, at most 16.
        names: Vec<String>,
    },
    /// An object of an HTTP server, RFC 9110 section 8.8, as the server sent them.
    Http {
        /// The ETag, with its quotes, and `W/` when it is weak.
        etag: Option<String>,
        /// Last-Modified.
        last_modified: Option<String>,
    },
    /// An object of a bucket of S3, as the service sent them.
    S3 {
        /// The id of its version, of a bucket that keeps versions.
        version: Option<String>,
        /// The ETag, with its quotes.
        etag: Option<String>,
        /// Last-Modified.
        last_modified: Option<String>,
    },
    /// An image of a Glance, OpenStack's image service.
    Glance {
        /// The ID of its record, a UUID.
        id: String,
        /// `os_hash_algo` and `os_hash_value` of its record with a colon between them; empty when it has none.
        hash: String,
        /// How its data is read.
        data: ImageData,
        /// What each answer with data repeats: its Content-MD5, or the ETag of another place.
        etag: Option<String>,
        /// Last-Modified of another place.
        last_modified: Option<String>,
    },
    /// An export of an NBD server. The protocol has no validator.
    Nbd {
        /// Its name; empty for the default export.
        export: String,
    },
    /// A blob of an OCI registry, or a part of it.
    Oci {
        /// The digest of the blob: `sha256:` and 64 digits.
        digest: String,
        /// Bytes of the blob.
        blob: u64,
        /// Where in the blob the disk begins.
        offset: u64,
    },
}

/// How the data of an image is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageData {
    /// From Glance, by ranges.
    Ranges,
    /// From Glance, as a whole: its store has no ranges.
    Whole,
    /// From the place that its record names.
    Location,
}

impl ImageData {
    fn number(self) -> u8 {
        match self {
            Self::Ranges => 0,
            Self::Whole => 1,
            Self::Location => 2,
        }
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        match r.u8()? {
            0 => Ok(Self::Ranges),
            1 => Ok(Self::Whole),
            2 => Ok(Self::Location),
            other => Err(r.newer(format!("way {other} to read an image is not known; use a newer plyfs"))),
        }
    }
}

/// The object that a file of a base was when the base was registered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseIdentity {
    /// Bytes of the source file.
    pub size: u64,
    /// What else tells a changed one.
    pub validator: Validator,
    /// Content digest, when given.
    pub digest: Option<Digest>,
}

fn put_texts(w: &mut Writer, texts: &[&Option<String>]) {
    for text in texts {
        match text {
            None => w.u8(0),
            Some(text) => w.u8(1).bytes(text.as_bytes()),
        };
    }
}

fn get_names(r: &mut Reader<'_>) -> Result<Vec<String>, FormatError> {
    let count = r.u8()?;
    if count > MOST_NAMES {
        return Err(r.bad(format!("{count} names of a device, at most {MOST_NAMES} can be")));
    }
    (0..count).map(|_| r.text()).collect()
}

impl Validator {
    fn number(&self) -> u8 {
        match self {
            Self::File { .. } => 0,
            Self::Http { .. } => 1,
            Self::S3 { .. } => 2,
            Self::Glance { .. } => 3,
            Self::Device { .. } => 4,
            Self::Nbd { .. } => 5,
            Self::Oci { .. } => 6,
        }
    }

    fn put(&self, w: &mut Writer) {
        match self {
            Self::File { mtime_ns, inode } => {
                w.i64(*mtime_ns).u64(*inode);
            }
            Self::Device { number, names } => {
                w.u64(*number).u8(names.len() as u8);
                for name in names {
                    w.bytes(name.as_bytes());
                }
            }
            Self::Http { etag, last_modified } => put_texts(w, &[etag, last_modified]),
            Self::S3 { version, etag, last_modified } => put_texts(w, &[version, etag, last_modified]),
            Self::Glance { id, hash, data, etag, last_modified } => {
                w.bytes(id.as_bytes()).bytes(hash.as_bytes()).u8(data.number());
                put_texts(w, &[etag, last_modified]);
            }
            Self::Nbd { export } => {
                w.bytes(export.as_bytes());
            }
            Self::Oci { digest, blob, offset } => {
                w.bytes(digest.as_bytes()).u64(*blob).u64(*offset);
            }
        }
    }

    fn get(r: &mut Reader<'_>, number: u8) -> Result<Self, FormatError> {
        let text = |r: &mut Reader<'_>| match r.u8()? {
            0 => Ok(None),
            1 => r.text().map(Some),
            other => Err(r.bad(format!("presence of a validator is {other}"))),
        };
        match number {
            0 => Ok(Self::File { mtime_ns: r.i64()?, inode: r.u64()? }),
            1 => Ok(Self::Http { etag: text(r)?, last_modified: text(r)? }),
            2 => Ok(Self::S3 { version: text(r)?, etag: text(r)?, last_modified: text(r)? }),
            3 => Ok(Self::Glance {
                id: r.text()?,
                hash: r.text()?,
                data: ImageData::get(r)?,
                etag: text(r)?,
                last_modified: text(r)?,
            }),
            4 => Ok(Self::Device { number: r.u64()?, names: get_names(r)? }),
            5 => Ok(Self::Nbd { export: r.text()? }),
            6 => Ok(Self::Oci { digest: r.text()?, blob: r.u64()?, offset: r.u64()? }),
            other => Err(r.newer(format!("kind {other} of a source is not known; use a newer plyfs"))),
        }
    }

    /// Number of the file on its filesystem, of a file of this host.
    pub fn inode(&self) -> Option<u64> {
        match self {
            Self::File { inode, .. } => Some(*inode),
            Self::Device { .. }
            | Self::Http { .. }
            | Self::S3 { .. }
            | Self::Glance { .. }
            | Self::Nbd { .. }
            | Self::Oci { .. } => None,
        }
    }

    /// Whether the source is a file or device of this host, which a read may wait for as for any disk.
    pub fn is_local(&self) -> bool {
        match self {
            Self::File { .. } | Self::Device { .. } => true,
            Self::Http { .. }
            | Self::S3 { .. }
            | Self::Glance { .. }
            | Self::Nbd { .. }
            | Self::Oci { .. } => false,
        }
    }

    /// When the contents were modified, in nanoseconds since the epoch, if the validator says so.
    pub fn modified_ns(&self) -> Option<i64> {
        match self {
            Self::File { mtime_ns, .. } => Some(*mtime_ns),
            Self::Device { .. }
            | Self::Http { .. }
            | Self::S3 { .. }
            | Self::Glance { .. }
            | Self::Nbd { .. }
            | Self::Oci { .. } => None,
        }
    }

    /// ETag and Last-Modified of a source that has them.
    pub fn http(&self) -> (Option<&str>, Option<&str>) {
        match self {
            Self::Http { etag, last_modified } | Self::S3 { etag, last_modified, .. } => {
                (etag.as_deref(), last_modified.as_deref())
            }
            Self::File { .. }
            | Self::Device { .. }
            | Self::Glance { .. }
            | Self::Nbd { .. }
            | Self::Oci { .. } => (None, None),
        }
    }

    /// The version of an object of a bucket that keeps versions.
    pub fn version(&self) -> Option<&str> {
        match self {
            Self::S3 { version, .. } => version.as_deref(),
            Self::File { .. }
            | Self::Device { .. }
            | Self::Http { .. }
            | Self::Glance { .. }
            | Self::Nbd { .. }
            | Self::Oci { .. } => None,
        }
    }

    /// Whether nothing about the source says a format, so that its operator has to.
    pub fn needs_a_format(&self) -> bool {
        matches!(self, Self::Device { .. })
    }

    /// Whether the object can only be read as a whole, so that all of it is to be cached.
    pub fn is_read_as_a_whole(&self) -> bool {
        matches!(self, Self::Glance { data: ImageData::Whole, .. })
    }
}

impl BaseIdentity {
    /// Whether version 1 of a record, which knows files of this host only, can express it.
    pub(super) fn fits_version_1(&self) -> bool {
        matches!(self.validator, Validator::File { .. })
    }

    pub(super) fn put(&self, w: &mut Writer, version: u16) {
        w.u64(self.size);
        if version > 1 {
            w.u8(self.validator.number());
        }
        self.validator.put(w);
        match &self.digest {
            None => w.u8(0),
            Some(Digest::Sha256(d)) => w.u8(1).raw(d),
            Some(Digest::Sha512(d)) => w.u8(2).raw(d),
        };
    }

    pub(super) fn get(r: &mut Reader<'_>, version: u16) -> Result<Self, FormatError> {
        let size = r.u64()?;
        let number = if version > 1 { r.u8()? } else { 0 };
        let validator = Validator::get(r, number)?;
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
        Ok(Self { size, validator, digest })
    }
}
