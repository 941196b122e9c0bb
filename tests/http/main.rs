//! Sources on web servers, tested against a server that misbehaves on request. The tests of `answers`, `identity` and
//! `redirects` cover the ways in which other programs got wrong bytes from the network.

mod access;
mod answers;
mod glance;
mod harness;
mod identity;
mod limits;
mod nbd;
mod oci;
mod peers;
mod proofs;
mod redirects;
mod retries;
mod s3;
mod server;
