//! The filesystem through a real mount: one daemon per test, as root, with the tools that users point at it.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_possible_wrap)]

mod crashes;
mod death;
mod devices;
mod directory;
mod events;
mod failing;
mod file;
mod full;
mod harness;
mod kept;
mod lazy;
mod live;
mod privilege;
mod process;
mod refusals;
#[path = "../http/server.rs"]
mod server;
mod tools;
mod traces;
mod upgrade;
