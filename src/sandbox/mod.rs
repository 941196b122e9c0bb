//! Least privilege: the rights that a worker gives up before its first request, and the helper processes that keep the
//! rights that are still needed. docs/design.md, "Least privilege", has the threat model.
//!
//! A worker parses the requests of guests and the images that they boot from, and has only the rights that this needs.
//! What must hold:
//! - A helper is forked before the worker is confined, does one thing on request, and dies with its worker: the
//!   [`opener`] opens the files of bases, the helper of [`secrets`] reads credentials, that of [`notifier`] runs the
//!   operator's command for events, and the [`binder`] waits for an address.
//! - A helper is confined too. No message of the worker widens the rights of a helper.

pub mod binder;
pub mod confine;
pub mod notifier;
pub mod opener;
pub mod secrets;
mod syscalls;
