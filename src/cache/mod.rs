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
//! - Nothing here waits for anything but a short lock: no source, no system call on a hit, no allocation on a hit.
//! - **What one worker left is never believed by the next** (`tags`): a cache in a memory file outlives its worker,
//!   and a block of it is used only after its sum, which covers whose block it is, was compared (D17).

mod arena;
pub mod memory;
mod shard;
mod tags;
#[cfg(test)]
mod tests;

pub use memory::{Adoption, BlockCache, CacheId, CacheStats, Touch};
pub use tags::Owner;

/// Bytes of one block of this cache, which is the block of the delta's map too.
pub const BLOCK: usize = 4096;
