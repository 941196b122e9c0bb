//! Jobs: long work in the background, its progress, and how it is cancelled.

mod job;
mod table;

pub use job::{Job, Paced, Progress, Start, State, Stopped, What};
pub use table::Table;
