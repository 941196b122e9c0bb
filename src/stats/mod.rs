//! Counters of disks and bases: what requests did, how long they took, and where the bytes of reads came from.
//!
//! `serve` counts each request when it is answered, whatever the frontend. What must hold:
//! - Counting takes no lock and makes no system call, because every request counts. It allocates at the first request of
//!   each kind only, so that a disk costs what it is used for.
//! - The bytes of answered reads are the sum of their origins: each byte has one origin, and a read that ran more than
//!   once counts once (D67).
//! - A sum over all disks never decreases while the worker lives: a removed disk leaves its part of the sums and nothing
//!   else (D68).

mod counters;
mod histogram;
mod registry;
#[cfg(test)]
mod tests;

pub use counters::{Counters, OperationSums, Sums, Total};
pub use histogram::{BUCKETS, bound_us};
pub use registry::{Counted, Registry, Series};

/// A kind of request on a disk or base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Operation {
    /// Bytes were read.
    Read,
    /// Bytes were written.
    Write,
    /// A range was freed; it reads as zeros.
    Discard,
    /// A range was zeroed.
    Zero,
    /// Space was reserved.
    Reserve,
    /// Everything completed before was made durable.
    Flush,
    /// Data or a hole was searched.
    Seek,
    /// A client opened it.
    Open,
    /// A client asked for its attributes.
    Attributes,
    /// A client changed its attributes or its size.
    Change,
    /// Bytes were copied to it from another file of the mount.
    Copy,
}

impl Operation {
    /// All operations.
    pub const ALL: [Self; 11] = [
        Self::Read,
        Self::Write,
        Self::Discard,
        Self::Zero,
        Self::Reserve,
        Self::Flush,
        Self::Seek,
        Self::Open,
        Self::Attributes,
        Self::Change,
        Self::Copy,
    ];

    /// Whether its requests have bytes.
    pub fn moves_bytes(self) -> bool {
        matches!(self, Self::Read | Self::Write | Self::Discard | Self::Zero | Self::Reserve | Self::Copy)
    }

    /// Its name for users.
    pub fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Discard => "discard",
            Self::Zero => "zero",
            Self::Reserve => "reserve",
            Self::Flush => "flush",
            Self::Seek => "seek",
            Self::Open => "open",
            Self::Attributes => "attributes",
            Self::Change => "change",
            Self::Copy => "copy",
        }
    }
}

/// Where the bytes of a read came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// The disk's delta.
    Delta,
    /// Nowhere: the range reads as zeros, in the delta or in the image.
    Zero,
    /// The memory cache.
    Memory,
    /// The persistent cache.
    Disk,
    /// The source of the base: its servers, or its file on this host.
    Fetched,
}

impl Origin {
    /// All origins.
    pub const ALL: [Self; 5] = [Self::Delta, Self::Zero, Self::Memory, Self::Disk, Self::Fetched];

    /// Its name for users.
    pub fn name(self) -> &'static str {
        match self {
            Self::Delta => "delta",
            Self::Zero => "zero",
            Self::Memory => "memory",
            Self::Disk => "disk",
            Self::Fetched => "fetched",
        }
    }
}

/// The bytes of one read, by origin.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Origins([u64; Origin::ALL.len()]);

impl Origins {
    /// Adds bytes.
    pub fn add(&mut self, origin: Origin, bytes: usize) {
        self.0[origin as usize] += bytes as u64;
    }

    /// Adds the bytes of another read.
    pub fn join(&mut self, other: Self) {
        for (mine, others) in self.0.iter_mut().zip(other.0) {
            *mine += others;
        }
    }

    /// Bytes that came from `origin`.
    pub fn of(&self, origin: Origin) -> u64 {
        self.0[origin as usize]
    }

    /// Bytes of all origins.
    pub fn bytes(&self) -> u64 {
        self.0.iter().sum()
    }
}
