//! The line between the cache of fetched bytes and the network.
//!
//! A [`RemoteSource`] knows how to get a range of one immutable object and nothing of caches, blocks or readers. What
//! must hold: it delivers the bytes of the object that was pinned, or fails; a byte that it delivered came with status
//! 206, the exact range, the pinned size and validator, in an answer that is complete up to that byte.

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use super::SourceError;

/// Why bytes are fetched. Decides priority (in this order) and how long it is tried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// A reader waits.
    Demand,
    /// A reader is expected to be there next.
    Readahead,
    /// A trace of an earlier boot says so.
    Prefetch,
    /// The whole object is to be here in the end.
    Hydrate,
}

/// Who gets the bytes of a fetch, piece by piece.
pub type Deliver = Box<dyn FnMut(&[u8]) + Send>;

/// A fetch under way.
pub type Fetch = Pin<Box<dyn Future<Output = Result<(), SourceError>> + Send>>;

/// Since when reads wait for a server, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// When the first request failed after the last one that succeeded.
    pub since: SystemTime,
    /// What failed, without anything secret.
    pub why: String,
    /// In which way.
    pub kind: StallKind,
}

/// What reads wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StallKind {
    /// An answer that gives the bytes.
    Waiting,
    /// The object of the base: another one answers in its place.
    Changed,
}

/// One URL of an object, and whether it works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UrlState {
    /// Without user info and query.
    pub url: String,
    /// How it failed last, when it does not work.
    pub trouble: Option<String>,
}

/// Somewhere to run what waits for a network.
pub trait Spawn: Send + Sync {
    /// Runs a future to its end, with others, on threads that nothing else may keep.
    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>);
    /// Runs what waits for a disk.
    fn spawn_blocking(&self, job: Box<dyn FnOnce() + Send>);
}

/// One immutable object behind a network. See the module.
pub trait RemoteSource: Send + Sync {
    /// Bytes of the object.
    fn size(&self) -> u64;

    /// The URL, or the first of several, without query and user info.
    fn shown(&self) -> String;

    /// Gets the bytes of `range`, which is not empty and lies inside the object. `deliver` is called with them in
    /// order, in pieces of any size, as they come; it does not wait. A transfer that breaks is taken up where it broke.
    /// A server that is down, refuses, or has another object is asked again until the deadline of the base, or for as
    /// long as it takes when there is none; for any purpose but [`Purpose::Demand`] a few times only. The deadline
    /// counts from `since`, when the first reader began to wait for these bytes.
    ///
    /// The future ends when all bytes were delivered. Dropped, the request is given up.
    ///
    /// # Errors
    /// After the deadline `Unreachable`, `Denied`, `Protocol` or `Changed`, by the last failure; `GivenUp` when the
    /// operator said so. What was delivered before is right all the same.
    fn fetch(self: Arc<Self>, range: Range<u64>, purpose: Purpose, since: Instant, deliver: Deliver)
    -> Fetch;

    /// Whether reads wait for the server now.
    fn stall(&self) -> Option<Stall>;

    /// Replaces the URLs, the first of which is asked first. Requests under way are given up, and go on there (H10).
    ///
    /// # Errors
    /// `Protocol`, when one of them cannot be a URL of this kind of source.
    fn set_urls(&self, urls: &[String]) -> Result<(), SourceError>;

    /// Ends all requests with an error, now and from now on; or no longer. Does nothing to a source that waits for no
    /// server.
    fn give_up(&self, given_up: bool);

    /// The URLs, in the order in which they are asked.
    fn urls(&self) -> Vec<UrlState>;
}
