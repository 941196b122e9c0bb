//! plyfs: many virtual disks on one shared base image.
//!
//! A read travels `fuse -> serve -> disk -> delta | base -> cache -> image -> fetch -> source`; docs/design.md says which
//! module may use which.

pub mod base;
pub mod cache;
pub mod check;
#[cfg(feature = "daemon")]
pub mod cli;
pub mod config;
#[cfg(feature = "daemon")]
pub mod daemon;
pub mod delta;
pub mod disk;
pub mod events;
pub mod fetch;
pub mod format;
#[cfg(feature = "daemon")]
pub mod fuse;
pub mod image;
pub mod io;
pub mod sabotage;
#[cfg(feature = "daemon")]
mod sandbox;
#[cfg(feature = "daemon")]
pub mod serve;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
pub mod source;
pub mod store;
pub mod trace;

#[global_allocator]
static ALLOCATOR: io::PrefaultingAllocator = io::PrefaultingAllocator;
