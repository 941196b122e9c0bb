//! What the simulation of power cuts may change of the code: deliberate faults, which it has to catch, and small
//! limits, so that rare steps are taken often.
//!
//! A harness that cannot fail proves nothing. Each [`Sabotage`] takes one step of docs/format.md away; the campaign
//! shows that it finds every one of them. What must hold: outside of tests and of the feature `simulation` all of
//! this is constant, and the compiler removes it. Switches belong to a thread, so that tests do not meet.

/// One deliberate fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// A flush does not sync the data file.
    DataNotSynced,
    /// The map is journaled before the data file is synced.
    MapBeforeData,
    /// A record of a map file is taken whatever its checksum says.
    ChecksumIgnored,
    /// A directory is not synced.
    DirectoryNotSynced,
    /// A record is renamed into place before its bytes are synced.
    RenameBeforeSync,
    /// An appended record is not synced.
    JournalNotSynced,
    /// Replay takes `Zero` for a block that was never written.
    ZeroForgotten,
    /// The words that a failed flush had taken are not given back.
    WordsNotGivenBack,
    /// A shrink does not journal the size.
    ShrinkNotJournaled,
    /// Growing does not cut the data file to the old end.
    GrowthNotCut,
    /// The number of a new disk is used before the superblock says so.
    NumbersNotReserved,
    /// Purge removes the record before the files.
    RecordPurgedFirst,
    /// A start does not make the names durable that an earlier worker left.
    NamesNotSettled,
    /// The directory entry of a data file is not made durable by a flush that appends.
    EntryNotListed,
    /// A flush clears the note that the data file was written to before it takes the words.
    NoteClearedFirst,
    /// A write that grows the disk sets the size after the words.
    SizeAfterWords,
    /// What a failed sync may have lost is not written again.
    LostNotRedone,
    /// A shrink lets a flush come between the size in the journal and the size in memory.
    ShrinkNotAlone,
    /// What was fetched of a base is said to be in the store before it is durable.
    CopyNotSynced,
    /// What a failed sync of fetched blocks may have lost is not written again.
    CopyNotRedone,
    /// That a base is refused is known to this start of the daemon only.
    RefusalNotNoted,
}

/// All of them.
pub const ALL: [Sabotage; 21] = [
    Sabotage::DataNotSynced,
    Sabotage::MapBeforeData,
    Sabotage::ChecksumIgnored,
    Sabotage::DirectoryNotSynced,
    Sabotage::RenameBeforeSync,
    Sabotage::JournalNotSynced,
    Sabotage::ZeroForgotten,
    Sabotage::WordsNotGivenBack,
    Sabotage::ShrinkNotJournaled,
    Sabotage::GrowthNotCut,
    Sabotage::NumbersNotReserved,
    Sabotage::RecordPurgedFirst,
    Sabotage::NamesNotSettled,
    Sabotage::EntryNotListed,
    Sabotage::NoteClearedFirst,
    Sabotage::SizeAfterWords,
    Sabotage::LostNotRedone,
    Sabotage::ShrinkNotAlone,
    Sabotage::CopyNotSynced,
    Sabotage::CopyNotRedone,
    Sabotage::RefusalNotNoted,
];

#[cfg(any(test, feature = "simulation"))]
mod switches {
    use std::cell::Cell;

    use super::Sabotage;

    thread_local! {
        static FAULT: Cell<Option<Sabotage>> = const { Cell::new(None) };
        static SMALL: Cell<bool> = const { Cell::new(false) };
    }

    /// Whether this thread runs with a deliberate fault.
    pub fn sabotaged(fault: Sabotage) -> bool {
        FAULT.get() == Some(fault)
    }

    /// `real`, or `small` in a thread that simulates.
    pub fn limit(real: u64, small: u64) -> u64 {
        if SMALL.get() { small } else { real }
    }

    /// In a thread with this fault: lets others run in the middle of what should be one step.
    pub fn linger(fault: Sabotage) {
        if sabotaged(fault) {
            std::thread::sleep(std::time::Duration::from_micros(200));
        }
    }

    /// Puts a thread's switches back when it goes.
    #[derive(Debug)]
    pub struct Simulating(Option<Sabotage>, bool);

    /// From now on this thread has small limits and, when given, a deliberate fault.
    #[must_use]
    pub fn simulate(fault: Option<Sabotage>) -> Simulating {
        Simulating(FAULT.replace(fault), SMALL.replace(true))
    }

    impl Drop for Simulating {
        fn drop(&mut self) {
            FAULT.set(self.0);
            SMALL.set(self.1);
        }
    }
}

#[cfg(any(test, feature = "simulation"))]
pub use switches::{Simulating, limit, linger, sabotaged, simulate};

/// Never, outside of the simulation.
#[cfg(not(any(test, feature = "simulation")))]
#[inline(always)]
pub const fn sabotaged(_fault: Sabotage) -> bool {
    false
}

/// Nothing, outside of the simulation.
#[cfg(not(any(test, feature = "simulation")))]
#[inline(always)]
pub const fn linger(_fault: Sabotage) {}

/// `real`, outside of the simulation.
#[cfg(not(any(test, feature = "simulation")))]
#[inline(always)]
pub const fn limit(real: u64, _small: u64) -> u64 {
    real
}
