//! The memory cache of decoded base blocks, shared by every disk of every base.
//!
//! A hundred disks on one base read the same blocks. The cache holds them once, and a hit in the process's own memory is
//! the fastest answer. What must hold:
//! - **A block that is found has exactly the bytes that were inserted for its key.** Bytes of a base never change, so an
//!   insert of a present key changes nothing, and an address space ([`CacheId`]) is never reused.
//! - **Memory is bounded** by the configured limit, bookkeeping included.
//! - **A scan does not evict the working set of other readers**: S3-FIFO ([`memory`]) separates blocks that were used
//!   once from blocks that were used again.
//! - A call waits only for a short lock. A hit makes no system call and no allocation.
//! - **A worker does not trust the blocks that an earlier worker left** (`tags`): a cache in a memory file outlives its
//!   worker, and a block is used only after its checksum was compared, which covers the block's owner (D17).

mod arena;
pub mod memory;
mod shard;
mod tags;
#[cfg(test)]
mod tests;

pub use memory::{Adoption, BlockCache, CacheId, CacheStats, Touch};
pub use tags::Owner;

/// Bytes of one block of this cache; the delta's map has the same block size.
pub const BLOCK: usize = 4096;
