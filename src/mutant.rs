//! Mutants: deliberate faults that the simulation of power cuts must catch, and small limits that make rare steps
//! frequent.
//!
//! A test harness that cannot fail proves nothing. Each [`Mutant`] removes one step of docs/format.md, and the campaign
//! shows that it detects every one. What must hold: outside of tests and of the feature `simulation`, all of this is
//! constant and the compiler removes it. The switches are per thread, so that concurrent tests do not affect each other.

/// One deliberate fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// A flush does not sync the data file.
    DataNotSynced,
    /// A flush journals the map before it syncs the data file.
    MapBeforeData,
    /// A reader accepts a record of a map file without comparing its checksum.
    ChecksumIgnored,
    /// A directory is not synced.
    DirectoryNotSynced,
    /// A record is renamed into place before its bytes are synced.
    RenameBeforeSync,
    /// An appended record is not synced.
    JournalNotSynced,
    /// Replay reads a block that was never written as `Zero`.
    ZeroForgotten,
    /// A failed flush counts the map words that it took as durable.
    WordsNotRestored,
    /// A flush takes pages from the list of unflushed ones before their words are durable.
    TakenWordsForgotten,
    /// A shrink does not journal the size.
    ShrinkNotJournaled,
    /// A growing disk does not truncate the data file to the old end first.
    GrowthNotCut,
    /// A new disk uses its number before the superblock reserves the number.
    DiskNumberNotReserved,
    /// Purge removes the record before the files.
    RecordRemovedFirst,
    /// A start does not sync the names that an earlier worker left.
    NamesNotSynced,
    /// A flush that appends does not sync the directory entry of the data file.
    DirectoryEntryNotSynced,
    /// A flush clears the note that the data file is dirty before it takes the map words.
    DirtyNoteClearedFirst,
    /// A write that grows the disk sets the size after the map words.
    SizeAfterWords,
    /// A flush does not write again what a failed sync may have lost.
    LostNotRewritten,
    /// A shrink lets a flush run between the size in the journal and the size in memory.
    ShrinkNotExclusive,
    /// The cache counts a fetched block as kept before the block is durable.
    CacheBlockNotSynced,
    /// The cache does not write fetched blocks again that a failed sync may have lost.
    CacheBlockNotRewritten,
    /// The refusal of a base is not recorded, and is forgotten when the daemon ends.
    RefusalNotRecorded,
    /// A delta becomes a sealed layer without its last flush.
    LayerNotFlushed,
    /// A flush of a disk leaves out a layer whose sealing is under way.
    PendingNotFlushed,
    /// The removal of a layer forgets that other disks need it.
    SharedLayerRemoved,
    /// The files of dropped layers are removed before the record says so.
    DroppedTooEarly,
    /// A copy shows what lies below without hiding the blocks before its range.
    GapNotHidden,
    /// A layer takes the place of others before its files have everything.
    MadeNotClosed,
    /// A disk that is put on another base keeps the old one in its record.
    BaseNotReplaced,
    /// A rename over a disk notes only after its commit that the disk is to be kept in the trash.
    TrashNotedLate,
    /// Blocks that a record carried count also after the data file was synced.
    CarriedOutlivesSync,
    /// A flush of blocks that were only overwritten syncs the data file, and notes that in no record.
    CarriedNotSettled,
    /// A start does not put the carried blocks into the data file.
    CarriedNotPlaced,
    /// A flush carries fewer blocks than were written since the last one.
    WrittenBlockForgotten,
}

impl Mutant {
    /// Whether this thread runs with this fault.
    #[cfg(any(test, feature = "simulation"))]
    pub fn is_active(self) -> bool {
        switches::active() == Some(self)
    }

    /// Whether this thread runs with this fault: never, outside of the simulation.
    #[cfg(not(any(test, feature = "simulation")))]
    #[inline(always)]
    pub const fn is_active(self) -> bool {
        false
    }

    /// In a thread with this fault: lets other threads run in the middle of a step that should be atomic.
    #[cfg(any(test, feature = "simulation"))]
    pub fn widen_race(self) {
        if self.is_active() {
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// Does nothing, outside of the simulation.
    #[cfg(not(any(test, feature = "simulation")))]
    #[inline(always)]
    pub const fn widen_race(self) {}
}

/// All mutants.
pub const ALL: [Mutant; 34] = [
    Mutant::DataNotSynced,
    Mutant::MapBeforeData,
    Mutant::ChecksumIgnored,
    Mutant::DirectoryNotSynced,
    Mutant::RenameBeforeSync,
    Mutant::JournalNotSynced,
    Mutant::ZeroForgotten,
    Mutant::WordsNotRestored,
    Mutant::TakenWordsForgotten,
    Mutant::ShrinkNotJournaled,
    Mutant::GrowthNotCut,
    Mutant::DiskNumberNotReserved,
    Mutant::RecordRemovedFirst,
    Mutant::NamesNotSynced,
    Mutant::DirectoryEntryNotSynced,
    Mutant::DirtyNoteClearedFirst,
    Mutant::SizeAfterWords,
    Mutant::LostNotRewritten,
    Mutant::ShrinkNotExclusive,
    Mutant::CacheBlockNotSynced,
    Mutant::CacheBlockNotRewritten,
    Mutant::RefusalNotRecorded,
    Mutant::LayerNotFlushed,
    Mutant::PendingNotFlushed,
    Mutant::SharedLayerRemoved,
    Mutant::DroppedTooEarly,
    Mutant::GapNotHidden,
    Mutant::MadeNotClosed,
    Mutant::BaseNotReplaced,
    Mutant::TrashNotedLate,
    Mutant::CarriedOutlivesSync,
    Mutant::CarriedNotSettled,
    Mutant::CarriedNotPlaced,
    Mutant::WrittenBlockForgotten,
];

#[cfg(any(test, feature = "simulation"))]
mod switches {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static FAULT: Cell<Option<Mutant>> = const { Cell::new(None) };
        static SMALL: Cell<bool> = const { Cell::new(false) };
    }

    /// The fault that this thread runs with.
    pub(super) fn active() -> Option<Mutant> {
        FAULT.get()
    }

    /// `small` in a thread that simulates, else `real`.
    pub fn limit(real: u64, small: u64) -> u64 {
        if SMALL.get() { small } else { real }
    }

    /// Restores the thread's switches when it is dropped.
    #[derive(Debug)]
    pub struct Simulating(Option<Mutant>, bool);

    /// From now on this thread has small limits and, when given, a deliberate fault.
    #[must_use]
    pub fn simulate(fault: Option<Mutant>) -> Simulating {
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
pub use switches::{Simulating, limit, simulate};

/// `real`, outside of the simulation.
#[cfg(not(any(test, feature = "simulation")))]
#[inline(always)]
pub const fn limit(real: u64, _small: u64) -> u64 {
    real
}
