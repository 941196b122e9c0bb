//! The memory cache of decoded base blocks, shared by every disk of every base.
//!
//! A hundred disks on one base read the same blocks; they are kept once, here, and answering out of this
//! process's own memory is also the fastest answer there is. What must hold:
//! - **A block that is found has exactly the bytes that were inserted for its key.** Bytes of a base never
//!   change, so an insert of a present key changes nothing, and an address space ([`CacheId`]) is never
//!   reused.
//! - **Memory is bounded** by the limit given at the start, bookkeeping included, whatever is read.
//! - **One scan does not throw out what the others work with**: S3-FIFO ([`memory`]) keeps blocks that were
//!   used once apart from blocks that were used again.
//! - Nothing here waits for anything but a short lock: no system call, no source, no allocation on a hit.

mod arena;
pub mod memory;
#[cfg(test)]
mod tests;

pub use memory::{BLOCK, BlockCache, CacheId, CacheStats, Touch};
