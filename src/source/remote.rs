//! The interface between the cache of fetched bytes and the network.
//!
//! A [`RemoteSource`] gets ranges of one immutable object. It knows nothing of caches, blocks or readers. What must
//! hold: it delivers bytes of the pinned object, or fails. A web server's bytes are delivered only from an answer that
//! proves to be about that object and range, and that is complete up to each delivered byte (H1).

use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use parking_lot::Mutex;

use super::SourceError;
use super::proven::{ProofOfRange, Prover, disproven};

/// Why bytes are fetched. Decides the priority (in this order) and how long the fetch is retried.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Purpose {
    /// A reader waits.
    Demand,
    /// A reader is expected to read here next.
    Readahead,
    /// The trace of an earlier boot names them.
    Prefetch,
    /// The whole object is copied to this host.
    Hydrate,
}

/// Takes the bytes of a fetch, piece by piece.
pub type Deliver = Box<dyn FnMut(&[u8]) + Send>;

/// A fetch under way.
pub type Fetch = Pin<Box<dyn Future<Output = Result<(), SourceError>> + Send>>;

/// Since when reads wait for a server, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stall {
    /// When the first request failed after the last one that succeeded.
    pub since: SystemTime,
    /// The last failure, without secrets.
    pub why: String,
    /// What reads wait for.
    pub kind: StallKind,
}

/// What reads wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StallKind {
    /// A server that answers with the bytes.
    Waiting,
    /// The object of the base: the server has another object in its place.
    Changed,
}

/// One URL of an object, and whether it works.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UrlState {
    /// Without user info and query.
    pub url: String,
    /// The last failure, while the URL does not work.
    pub trouble: Option<String>,
    /// Whether it is another host that has a part of the bytes.
    pub is_peer: bool,
}

/// Runs work that waits for a network or a disk.
pub trait Spawn: Send + Sync {
    /// Runs a future to its end, on threads that run only futures.
    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>);
    /// Runs work that waits for a disk.
    fn spawn_blocking(&self, job: Box<dyn FnOnce() + Send>);
}

/// One immutable object behind a network. See the module.
pub trait RemoteSource: Send + Sync + 'static {
    /// Size of the object in bytes.
    fn size(&self) -> u64;

    /// The URL that is asked first, without query and user info; or the path.
    fn shown(&self) -> String;

    /// Gets the bytes of `range`, which is not empty and lies inside the object. Calls `deliver` with them in order, in
    /// pieces of any size, as they come; `deliver` does not wait. A transfer that breaks is continued where it broke.
    /// A server that is down, refuses, or has another object is retried until the deadline of the base, or without end
    /// when there is none; for any purpose but [`Purpose::Demand`] only a few times. The deadline counts from `since`,
    /// when the first reader began to wait for these bytes.
    ///
    /// The future ends when all bytes are delivered. Dropping it cancels the request.
    ///
    /// # Errors
    /// After the deadline `Unreachable`, `Denied`, `Protocol` or `Changed`, by the last failure; `GivenUp` when the
    /// operator gave the base up. Bytes that were delivered before are valid.
    fn fetch(self: Arc<Self>, range: Range<u64>, purpose: Purpose, since: Instant, deliver: Deliver)
    -> Fetch;

    /// As [`fetch`](Self::fetch), for a range of whole parts: delivers only parts that `proof` proves (D103). A server
    /// whose bytes are not those is one that fails: another one is asked, or the same one later.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch), and those of `proof`. Of a file of this host `Changed`, when a part is not what it must
    /// be.
    fn fetch_proven(
        self: Arc<Self>,
        range: Range<u64>,
        purpose: Purpose,
        since: Instant,
        mut deliver: Deliver,
        proof: ProofOfRange,
    ) -> Fetch {
        Box::pin(async move {
            let prover = Arc::new(Mutex::new(Prover::new(range.clone(), proof.unit)));
            let parts = proof.parts.await?;
            prover.lock().know(parts);
            let (all, failed) = (prover.clone(), Arc::new(Mutex::new(None)));
            let noted = failed.clone();
            let taking: Deliver = Box::new(move |bytes| {
                let mut noted = noted.lock();
                if noted.is_none() {
                    let mut prover = all.lock();
                    prover.take(bytes);
                    *noted = prover.deliver(&mut *deliver).err();
                }
            });
            let shown = self.shown();
            self.fetch(range, purpose, since, taking).await?;
            let failed = failed.lock().take();
            failed.map_or(Ok(()), |what| Err(disproven(&shown, &what)))
        })
    }

    /// Since when reads wait for the server, and why; none when no read waits.
    fn stall(&self) -> Option<Stall>;

    /// Replaces the URLs; the first one is asked first. Requests under way are cancelled and continue there (H10).
    ///
    /// # Errors
    /// `Protocol`, when one of them is no URL of this kind of source.
    fn set_urls(&self, urls: &[String]) -> Result<(), SourceError>;

    /// With `true`, ends all present and later requests with an error, until it is called with `false`. A source that
    /// waits for no server does nothing.
    fn give_up(&self, given_up: bool);

    /// The URLs, in the order in which they are asked.
    fn urls(&self) -> Vec<UrlState>;

    /// The URLs of the proof of the object, where it has one.
    fn proof_urls(&self) -> Vec<UrlState> {
        Vec::new()
    }

    /// Whether the object is a file of this host.
    fn is_local(&self) -> bool {
        false
    }
}
