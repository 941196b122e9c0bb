//! plyfs: many virtual disks on one shared base image.
//!
//! A read travels `fuse -> disk -> delta | base -> cache -> source`; docs/design.md says which module may use which.

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
#[cfg(feature = "daemon")]
pub mod daemon;
pub mod delta;
pub mod disk;
pub mod events;
pub mod format;
#[cfg(feature = "daemon")]
pub mod fuse;
pub mod image;
pub mod io;
pub mod sabotage;
#[cfg(any(test, feature = "simulation"))]
pub mod simulation;
pub mod source;
pub mod store;
pub mod trace;

#[global_allocator]
static ALLOCATOR: io::PrefaultingAllocator = io::PrefaultingAllocator;
