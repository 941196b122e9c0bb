//! plyfs serves many virtual disks from one shared base image, as plain raw files of a FUSE mount.
//!
//! A disk is its own writes (its *delta*) over a read-only *base*, which all its disks share. The base is a file of
//! this host or an object on a web server, in raw, qcow2 or VMDK format. plyfs reads it in place, block by block, when
//! a disk needs it. A *worker* process serves requests. When it dies, a standby worker takes over while disks stay
//! open.
//!
//! A read travels from [`disk`] to its [`delta`], or through the [`base`] and the memory [`cache`] to the [`image`] and
//! its [`source`]. [`store`] is the catalogue of disks and bases, [`mod@format`] has the bytes on disk, [`io`] has
//! every system call. `docs/architecture.md` has the path of a read, the terms, and the place of each change;
//! `docs/design.md` has the invariants (D1, D2, ...) that the code cites, and the lock order; `tests/layering.rs`
//! enforces which module may use which.

pub mod base;
#[cfg(feature = "daemon")]
pub mod bases;
pub mod cache;
pub mod check;
#[cfg(feature = "daemon")]
pub mod cli;
pub mod config;
#[cfg(feature = "daemon")]
pub mod control;
pub mod crypt;
#[cfg(feature = "daemon")]
pub mod daemon;
pub mod delta;
pub mod disk;
#[cfg(feature = "daemon")]
pub mod disks;
pub mod events;
#[cfg(feature = "daemon")]
pub mod export;
pub mod fetch;
pub mod format;
#[cfg(feature = "daemon")]
pub mod fuse;
pub mod image;
#[cfg(feature = "daemon")]
pub mod import;
pub mod io;
#[cfg(feature = "daemon")]
pub mod jobs;
pub mod layers;
pub mod limits;
pub mod mutant;
#[cfg(feature = "daemon")]
pub mod nova;
#[cfg(feature = "daemon")]
pub mod peers;
#[cfg(feature = "daemon")]
mod sandbox;
#[cfg(feature = "daemon")]
pub mod seal;
#[cfg(feature = "daemon")]
pub mod serve;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
pub mod source;
pub mod stats;
pub mod store;
pub mod trace;

#[global_allocator]
static ALLOCATOR: io::PrefaultingAllocator = io::PrefaultingAllocator;
