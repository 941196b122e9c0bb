//! Operations on a store, and their random choice.

use crate::io::sim::Rng;

use super::model::Names;

/// What is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum From {
    Disk(String),
    Snapshot(String, String),
    Base(String),
}

/// What a disk is to stand on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Stand {
    /// As few layers as possible, over its base.
    Merged,
    /// No base.
    Alone,
    /// Another base.
    On(String),
}

/// One operation of a history.
#[derive(Debug, Clone)]
pub(super) enum Op {
    Write {
        disk: String,
        at: u64,
        bytes: Vec<u8>,
    },
    Zero {
        disk: String,
        at: u64,
        len: u64,
    },
    Grow {
        disk: String,
        to: u64,
    },
    Resize {
        disk: String,
        to: u64,
    },
    Flush {
        disk: String,
    },
    Mode {
        disk: String,
        mode: u32,
    },
    /// Sets or removes the quota.
    Limit {
        disk: String,
        quota: Option<u64>,
    },
    Create {
        disks: Vec<(String, Option<String>, u64)>,
    },
    Rename {
        from: String,
        to: String,
    },
    Unlink {
        disk: String,
    },
    /// Removes a disk with its snapshots.
    Remove {
        disk: String,
        /// Whether it skips the trash.
        now: bool,
    },
    /// Restores a disk from the trash.
    Restore {
        /// Its place in the trash.
        index: usize,
        to: String,
    },
    /// Takes a disk out of the trash, to be purged.
    Discard {
        index: usize,
        /// How many disks are in the trash then.
        left: usize,
    },
    Snapshot {
        disk: String,
        name: String,
    },
    RemoveSnapshot {
        disk: String,
        name: String,
    },
    Rollback {
        disk: String,
        name: String,
    },
    /// Of the disk as it is now, or of a snapshot.
    Clone {
        from: String,
        snapshot: Option<String>,
        to: String,
    },
    /// Copies a range to the same offset of another disk.
    Copy {
        from: From,
        to: String,
        /// Whether that disk is cut to 0 bytes first.
        fresh: bool,
        at: u64,
        len: u64,
    },
    /// Changes what a disk stands on, and none of its bytes.
    Rework {
        disk: String,
        on: Stand,
    },
    /// Does what the store does now and then for layers.
    TendLayers,
    Purge,
    /// Detaches all idle disks.
    Detach,
    AddBase {
        name: String,
        source: usize,
    },
    RemoveBase {
        name: String,
    },
    Pin {
        base: String,
        pinned: bool,
    },
    /// Copies all of the base into the store; complete when the operation is done.
    Hydrate {
        base: String,
    },
    /// Reads the base from its file again.
    Unhydrate {
        base: String,
    },
    Evict {
        base: String,
    },
    /// Refuses the base, because it does not have its digest.
    Refuse {
        base: String,
    },
    /// Accepts the base again.
    Accept {
        base: String,
    },
    Close,
    WorkerDies,
    PowerCut,
}

impl Op {
    /// The operation for the log, with shortened contents.
    pub fn text(&self) -> String {
        match self {
            Self::Write { disk, at, bytes } => {
                format!("write {disk} {at}+{} ({:02x?})", bytes.len(), &bytes[..bytes.len().min(4)])
            }
            other => format!("{other:?}"),
        }
    }
}

impl Op {
    /// Whether it is unknown after a failure which names there are.
    pub(super) fn changes_names(&self) -> bool {
        matches!(
            self,
            Self::Create { .. }
                | Self::Rename { .. }
                | Self::Unlink { .. }
                | Self::Remove { .. }
                | Self::Restore { .. }
                | Self::Discard { .. }
                | Self::AddBase { .. }
                | Self::RemoveBase { .. }
                | Self::Snapshot { .. }
                | Self::RemoveSnapshot { .. }
                | Self::Rollback { .. }
                | Self::Clone { .. }
                | Self::Copy { .. }
                | Self::Rework { .. }
                | Self::Mode { .. }
                | Self::Purge
                | Self::Pin { .. }
                | Self::Hydrate { .. }
                | Self::Unhydrate { .. }
                | Self::Refuse { .. }
                | Self::Accept { .. }
        )
    }
}

const NAMES: [&str; 5] = ["a", "b", "c", "d", "e"];
pub(super) const SNAPSHOTS: [&str; 3] = ["r", "s", "t"];
const BASES: [&str; 2] = ["x", "y"];
/// Largest disk.
const SPAN: u64 = 700_000;

fn size(rng: &mut Rng) -> u64 {
    let span = *rng.pick(&[20_000, 150_000, 150_000, SPAN]);
    match rng.below(3) {
        0 => 1 + rng.below(span),
        1 => (1 + rng.below(span / 4096)) * 4096,
        _ => (1 + rng.below(span / 512)) * 512,
    }
}

fn range(rng: &mut Rng, end: u64) -> (u64, u64) {
    let unit = *rng.pick(&[1, 512, 4096, 4096]);
    let at = rng.below(end / unit + 1) * unit;
    let len = match rng.below(8) {
        0 => 1 + rng.below(600),
        1..4 => 4096,
        4 | 5 => (1 + rng.below(8)) * 4096,
        6 => 1 + rng.below(30_000),
        _ => *rng.pick(&[65_536, 131_072, 262_144, 1 << 20]),
    };
    (at, len)
}

/// Contents in which every 8 bytes are unique.
pub(super) fn bytes(rng: &mut Rng, len: u64) -> Vec<u8> {
    let stamp = rng.number() as u32 | 1;
    let mut out: Vec<u8> =
        (0..len / 8 + 1).flat_map(|n| (n << 32 | u64::from(stamp)).to_le_bytes()).collect();
    out.truncate(len as usize);
    out
}

/// A random operation on one of these bases.
fn any_of_a_base(rng: &mut Rng, names: &Names) -> Op {
    let bases: Vec<&String> = names.bases.keys().collect();
    let base = (*rng.pick(&bases)).clone();
    let now = names.bases[&base];
    match rng.below(10) {
        _ if now.refused && rng.chance(50) => Op::Accept { base },
        0 => Op::Refuse { base },
        1 => Op::Pin { pinned: !now.pinned, base },
        2 => Op::Evict { base },
        3 if now.hydrate => Op::Unhydrate { base },
        _ => Op::Hydrate { base },
    }
}

/// A random operation on the trash, which is not empty.
fn any_of_trash(rng: &mut Rng, names: &Names) -> Op {
    let left = names.trash.len() - 1;
    let index = rng.below(names.trash.len() as u64) as usize;
    if rng.chance(40) {
        return Op::Discard { index, left };
    }
    let own = names.trash[index].0.clone();
    Op::Restore { index, to: if rng.chance(60) { own } else { (*rng.pick(&NAMES)).into() } }
}

/// A copy to a disk.
pub(super) fn any_copy(rng: &mut Rng, to: String, names: &Names) -> Option<Op> {
    let served = names.disks.iter().filter(|(name, disk)| **name != to && !names.is_refused(disk));
    let mut sources: Vec<From> = Vec::new();
    for (name, disk) in served {
        sources.push(From::Disk(name.clone()));
        sources.extend(disk.snapshots.keys().map(|snapshot| From::Snapshot(name.clone(), snapshot.clone())));
    }
    let bases = names.bases.iter().filter(|(_, base)| !base.refused);
    sources.extend(bases.map(|(name, _)| From::Base(name.clone())));
    if sources.is_empty() {
        return None;
    }
    let from = rng.pick(&sources).clone();
    let fresh = rng.chance(50);
    let (at, len) = if rng.chance(30) { (0, SPAN * 2) } else { range(rng, 200_000) };
    Some(Op::Copy { from, to, fresh, at, len })
}

/// A random operation on snapshots and layers of a disk.
fn any_of_layers(rng: &mut Rng, disk: String, names: &Names, free: &[&str]) -> Op {
    let taken: Vec<&String> = names.disks[&disk].snapshots.keys().collect();
    let is_taken = |name: &&str| taken.iter().any(|taken| taken == name);
    let left: Vec<&str> = SNAPSHOTS.into_iter().filter(|name| !is_taken(name)).collect();
    if rng.chance(12) {
        return any_rework(rng, disk, names);
    }
    match rng.below(10) {
        0..3 if !left.is_empty() => Op::Snapshot { disk, name: (*rng.pick(&left)).into() },
        3..5 if !free.is_empty() => {
            let snapshot = (!taken.is_empty() && rng.chance(50)).then(|| (*rng.pick(&taken)).clone());
            Op::Clone { from: disk, snapshot, to: (*rng.pick(free)).into() }
        }
        5 | 6 if !taken.is_empty() => Op::Rollback { disk, name: (*rng.pick(&taken)).clone() },
        7 | 8 if !taken.is_empty() => Op::RemoveSnapshot { disk, name: (*rng.pick(&taken)).clone() },
        9 => Op::TendLayers,
        _ => Op::Flush { disk },
    }
}

/// A random change of what a disk stands on.
fn any_rework(rng: &mut Rng, disk: String, names: &Names) -> Op {
    let now = names.disks[&disk].base.as_ref();
    // The first file of the campaign is the larger one.
    let largest = now.and_then(|now| names.bases.get(now)).map_or(usize::MAX, |base| base.source);
    let others = names.bases.iter().filter(|(name, base)| Some(*name) != now && !base.refused);
    let others = others.filter(|(_, base)| base.source <= largest);
    let others: Vec<&String> = others.map(|(name, _)| name).collect();
    let on = match rng.below(3) {
        0 => Stand::Merged,
        1 if !others.is_empty() => Stand::On((*rng.pick(&others)).clone()),
        _ => Stand::Alone,
    };
    Op::Rework { disk, on }
}

/// How many of a hundred operations on disks are of snapshots and layers, in this part of a history. A layer is dropped
/// only after several of them, and what has nothing to do with layers needs histories with few.
pub(super) fn share_of_layers(rng: &mut Rng) -> u64 {
    *rng.pick(&[3, 16, 45])
}

/// A random operation on a store with these names.
pub(super) fn any(rng: &mut Rng, names: &Names, share_of_layers: u64) -> Op {
    let disks: Vec<&String> = names.disks.keys().collect();
    let free: Vec<&str> = NAMES.into_iter().filter(|n| !names.disks.contains_key(*n)).collect();
    let create = |rng: &mut Rng| {
        let mut free = free.clone();
        let mut disks = Vec::new();
        for _ in 0..(1 + rng.below(2)).min(free.len() as u64) {
            let name = free.remove(rng.below(free.len() as u64) as usize);
            let served = names.bases.iter().filter(|(_, base)| !base.refused);
            let bases: Vec<&String> = served.map(|(name, _)| name).collect();
            let base = (!bases.is_empty() && rng.chance(60)).then(|| (*rng.pick(&bases)).clone());
            let size = if base.is_some() { 100_001 + rng.below(2) * rng.below(60_000) } else { size(rng) };
            disks.push((name.to_owned(), base, size));
        }
        Op::Create { disks }
    };
    if !names.trash.is_empty() && rng.chance(9) {
        return any_of_trash(rng, names);
    }
    if disks.is_empty() || (disks.len() < 2 && rng.chance(30)) {
        if names.bases.is_empty() && rng.chance(60) {
            return Op::AddBase { name: (*rng.pick(&BASES)).into(), source: rng.below(2) as usize };
        }
        return create(rng);
    }
    if !names.bases.is_empty() && rng.chance(12) {
        return any_of_a_base(rng, names);
    }
    let disk = (*rng.pick(&disks)).clone();
    let now = names.disks[&disk].size();
    if names.is_refused(&names.disks[&disk]) {
        // A disk on a refused base is neither read nor written.
        return match rng.below(10) {
            0..4 => any_of_a_base(rng, names),
            4 => Op::Rename { from: disk, to: (*rng.pick(&NAMES)).into() },
            5 => Op::Unlink { disk },
            6 => Op::Detach,
            7 => Op::Close,
            8 => Op::WorkerDies,
            _ => Op::PowerCut,
        };
    }
    if rng.chance(share_of_layers / 3)
        && let Some(copy) = any_copy(rng, disk.clone(), names)
    {
        return copy;
    }
    if rng.chance(share_of_layers) {
        return any_of_layers(rng, disk, names, &free);
    }
    match rng.below(100) {
        0..36 => {
            let beyond = if rng.chance(25) { 20_000 } else { 0 };
            let (at, len) = range(rng, now + beyond);
            let bytes = if rng.chance(5) { vec![0; len as usize] } else { bytes(rng, len) };
            Op::Write { disk, at, bytes }
        }
        36..47 => {
            let (at, len) = range(rng, now);
            Op::Zero { disk, at, len: if rng.chance(15) { SPAN * 2 } else { len } }
        }
        47..50 => Op::Grow { disk, to: now + rng.below(30_000) },
        50..60 => {
            let to = match rng.below(4) {
                0 => now,
                1 => now + rng.below(40_000),
                2 => rng.below(now + 1),
                _ => size(rng),
            };
            Op::Resize { disk, to }
        }
        60..70 => Op::Flush { disk },
        70..74 => Op::Detach,
        74 if rng.chance(60) => {
            let quota = rng.chance(75).then(|| (1 << 40) + rng.below(1000));
            Op::Limit { disk, quota }
        }
        74 => Op::Mode { disk, mode: rng.below(0o1000) as u32 },
        75..79 if !free.is_empty() => create(rng),
        75..82 => Op::Rename { from: disk, to: (*rng.pick(&NAMES)).into() },
        82 if names.keeps_removed => Op::Remove { disk, now: rng.chance(40) },
        82..86 => Op::Unlink { disk },
        86..88 => Op::Purge,
        88..90 => {
            let name = *rng.pick(&BASES);
            let used = names.disks.values().any(|d| d.base.as_deref() == Some(name));
            match names.bases.contains_key(name) {
                true if used => Op::Flush { disk },
                true => Op::RemoveBase { name: name.into() },
                false => Op::AddBase { name: name.into(), source: rng.below(2) as usize },
            }
        }
        90..94 => Op::Close,
        94..98 => Op::WorkerDies,
        _ => Op::PowerCut,
    }
}
