//! Sources on web servers, against a server that does wrong on request. The first table of known bugs of others (wrong
//! bytes from the network) has a test for each row, most of them in `answers`, `identity` and `redirects`.

mod access;
mod answers;
mod harness;
mod identity;
mod limits;
mod redirects;
mod retries;
mod server;
