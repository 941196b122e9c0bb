//! Traces of boots: recording which blocks of a base are read first and when, keeping that, and playing it back ahead
//! of the next guest.
//!
//! A boot reads the same few percent of an image each time, in nearly the same order. A host that knows them asks the
//! image's server for them in few large requests before the guest asks one by one. What must hold: a trace decides
//! what is fetched early and never what is read (D23); recording costs a read next to nothing and bounded memory; nothing
//! here waits for a network.

mod player;
mod recorder;
mod store;
mod tap;
#[cfg(test)]
mod tests;
mod tracer;

pub use player::Player;
pub use recorder::{End, Limits, Recorder};
pub use store::{Saved, TraceStore};
pub use tap::Tap;
pub use tracer::{Automatic, RecordError, Recorded, Subject, Tracer};
