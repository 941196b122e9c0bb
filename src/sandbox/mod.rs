//! Least privilege: what a worker gives up before its first request, and the helper processes that keep what it gave
//! up and is still needed. docs/design.md, "Least privilege", says against whom.
//!
//! A worker parses the requests of guests and the images that they boot from, and holds no right that this does not
//! need. What must hold:
//! - A helper is forked before the worker is confined, does one thing on request, and dies with its worker: the
//!   [`opener`] opens the files of bases, the helper of [`secrets`] reads credentials.
//! - A helper is confined too. Nothing that the worker sends widens what a helper may do.

pub mod confine;
pub mod opener;
pub mod secrets;
mod syscalls;
