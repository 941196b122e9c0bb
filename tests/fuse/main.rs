//! Tests through a real mount: one daemon per test, as root, with the tools that users run on disks.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::cast_possible_wrap)]

mod aio;
mod api;
mod check;
mod copies;
mod crashes;
mod death;
mod devices;
mod directory;
mod encryption;
mod events;
mod export;
mod failing;
mod file;
mod full;
mod hanging;
mod harness;
mod hung_files;
mod in_use;
mod isolation;
mod jobs;
mod kept;
mod kernels;
mod lazy;
mod live;
mod many;
mod operations;
mod privilege;
mod process;
mod pty;
mod refusals;
mod replays;
#[path = "../http/server.rs"]
mod server;
mod servers;
mod snapshots;
mod stopping;
mod supervision;
mod tools;
mod top;
mod traces;
mod upgrade;
mod web;
mod worker;
