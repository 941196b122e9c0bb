//! Traces of boots: records which blocks of a base are read first and when, stores that, and plays it back before the
//! next guest reads them.
//!
//! Each boot reads the same few percent of an image, in nearly the same order. With a trace, plyfs fetches these blocks
//! from the image's server in few large requests, before the guest reads them one by one. What must hold: a trace decides
//! only what is fetched early, never what a read returns (D23). Recording costs a read next to nothing and takes bounded
//! memory. Nothing here waits for a network.

mod player;
mod recorder;
mod store;
mod tap;
#[cfg(test)]
mod tests;
mod tracer;

pub use player::Player;
pub use recorder::{End, Limits, Recorder};
pub use store::{SavedTrace, TraceStore};
pub use tap::Tap;
pub use tracer::{AutoRecord, RecordError, SavedRecording, TracedBase, Tracer};
