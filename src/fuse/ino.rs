//! Inode numbers. They are fixed for the life of a store, so they mean the same to every worker.

/// The object that an inode number identifies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// The mount point.
    Root,
    /// `disks/`.
    Disks,
    /// `bases/`.
    Bases,
    /// `snapshots/`.
    Snapshots,
    /// A disk, by its number.
    Disk(u64),
    /// A base, by its number.
    Base(u64),
    /// A snapshot, by its number.
    Snapshot(u64),
}

/// Inode numbers of snapshots start below this: disks and bases end below, and number 2^62 still fits.
const SNAPSHOTS: u64 = (3 << 62) - 1;

impl Node {
    /// The inode number of the object.
    pub fn ino(self) -> u64 {
        match self {
            Node::Root => 1,
            Node::Disks => 2,
            Node::Bases => 3,
            Node::Snapshots => 4,
            Node::Disk(id) => 16 + 2 * id,
            Node::Base(id) => 17 + 2 * id,
            Node::Snapshot(number) => SNAPSHOTS + number,
        }
    }

    /// The object of an inode number.
    pub fn of(ino: u64) -> Option<Self> {
        match ino {
            1 => Some(Node::Root),
            2 => Some(Node::Disks),
            3 => Some(Node::Bases),
            4 => Some(Node::Snapshots),
            0 | 5..=15 => None,
            n if n > SNAPSHOTS => Some(Node::Snapshot(n - SNAPSHOTS)),
            n if n.is_multiple_of(2) => Some(Node::Disk((n - 16) / 2)),
            n => Some(Node::Base((n - 17) / 2)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards D3.
    #[test]
    fn numbers_are_the_same_in_every_worker_of_every_version() {
        for (node, ino) in [
            (Node::Root, 1),
            (Node::Disks, 2),
            (Node::Bases, 3),
            (Node::Snapshots, 4),
            (Node::Disk(0), 16),
            (Node::Disk(1), 18),
            (Node::Base(1), 19),
            (Node::Disk(4096), 8208),
            (Node::Base(1 << 62), (1 << 63) + 17),
            (Node::Snapshot(1), 3 << 62),
            (Node::Snapshot(1 << 62), u64::MAX),
        ] {
            assert_eq!((node.ino(), Node::of(ino)), (ino, Some(node)));
        }
        assert!([0, 5, 15].into_iter().all(|ino| Node::of(ino).is_none()));
    }
}
