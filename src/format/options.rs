//! The options of a base: how it is fetched and cached.

use super::codec::{FormatError, Reader, Writer};
use super::record::{ImageFile, get_count, get_flag};

/// Which validators of a server's answers must match, besides the size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Strictness {
    /// A strong ETag, or Last-Modified of a server that sends no ETag.
    #[default]
    Strong,
    /// An ETag, weak or strong, or Last-Modified. For mirrors and nodes whose ETags differ, and servers that make them
    /// weak.
    Weak,
    /// None. Only a digest of the image can tell whether the contents changed.
    SizeOnly,
}

/// How a base is fetched and cached. These may change after registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BaseOptions {
    /// Which validators of its server's answers must match.
    pub strictness: Strictness,
    /// Seconds after which a read that waits for the server fails; 0: never.
    pub deadline_s: u32,
    /// Requests at a time; 0: as many as the daemon makes.
    pub max_requests: u32,
    /// Bytes per second; 0: without a bound.
    pub max_rate: u64,
    /// Its cached blocks are not evicted for others.
    pub pinned: bool,
    /// All of it is to be cached.
    pub hydrate: bool,
    /// Its contents did not match its digest: it is not served.
    pub refused: bool,
    /// Its operator gave its servers up: they get no requests, and only cached blocks are read.
    pub given_up: bool,
    /// Further copies of its cached blocks on other drives.
    pub copies: Option<KeptCopies>,
}

/// How many copies of its cached blocks a base has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptCopies {
    /// All copies, with the one in the cache of the store; from 2 to [`KeptCopies::MOST`].
    pub count: u8,
    /// A number that no other base ever had. It changes when the base's blocks are dropped, so that what an absent drive
    /// still has is not taken for a copy.
    pub number: u64,
}

impl KeptCopies {
    /// The most copies, with the one in the cache of the store.
    pub const MOST: u8 = 8;

    pub(super) fn put(self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u8(self.count).u64(self.number);
        w.finish()
    }

    pub(super) fn get(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        match r.u8()? {
            count @ 2..=Self::MOST => Ok(Self { count, number: get_count(r)? }),
            other => Err(r.bad(format!("{other} copies, from 2 to {} can be", Self::MOST))),
        }
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

    pub(super) fn put(&self, w: &mut Writer, version: u16) {
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

    pub(super) fn get(r: &mut Reader<'_>, version: u16) -> Result<Self, FormatError> {
        let strictness = match r.u8()? {
            0 => Strictness::Strong,
            1 => Strictness::Weak,
            2 => Strictness::SizeOnly,
            other => return Err(r.bad(format!("strictness {other} is not known"))),
        };
        let (deadline_s, max_requests, max_rate) = (r.u32()?, r.u32()?, r.u64()?);
        let (pinned, hydrate, refused) = (get_flag(r)?, get_flag(r)?, get_flag(r)?);
        let given_up = version > 2 && get_flag(r)?;
        let copies = None;
        Ok(Self {
            strictness,
            deadline_s,
            max_requests,
            max_rate,
            pinned,
            hydrate,
            refused,
            given_up,
            copies,
        })
    }
}
