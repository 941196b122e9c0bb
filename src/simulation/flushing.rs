//! Parts of histories in which a disk is flushed after every few writes, as a database does. Such flushes carry what was
//! written, and others of the same disk in between sync it.

use super::model::Names;
use super::operation::{Op, SNAPSHOTS, any_copy};
use crate::format::BLOCK;
use crate::io::sim::Rng;

/// What a history has of such parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Flushing {
    /// None: it is what it was without.
    #[default]
    Never,
    /// Whole blocks are written and discarded between the flushes.
    Blocks,
    /// Also: sizes change, writes and discards end within blocks, the disk is copied to, sealed, detached and taken over.
    Mixed,
}

impl Flushing {
    /// That of the history of a seed.
    pub fn of(seed: u64) -> Self {
        match seed % 12 {
            3 => Self::Blocks,
            7 | 9 | 10 | 11 => Self::Mixed,
            _ => Self::Never,
        }
    }
}

/// Writes to a few blocks of one disk, each time with a flush.
pub(super) fn some(rng: &mut Rng, names: &Names) -> Vec<Op> {
    let served: Vec<&String> =
        names.disks.iter().filter(|(_, disk)| !names.is_refused(disk)).map(|(name, _)| name).collect();
    if served.is_empty() {
        return Vec::new();
    }
    let disk = (*rng.pick(&served)).clone();
    let blocks = names.disks[&disk].size() / BLOCK;
    if names.flushing == Flushing::Mixed {
        return mixed(rng, names, &disk);
    }
    if blocks == 0 {
        return Vec::new();
    }
    let first = rng.below(blocks);
    let mut ops = Vec::new();
    for _ in 0..2 + rng.below(6) {
        for _ in 0..1 + rng.below(3) {
            let at = (first + rng.below(6)).min(blocks - 1) * BLOCK;
            ops.push(match rng.below(10) {
                0 => Op::Zero { disk: disk.clone(), at, len: BLOCK },
                // More than one flush carries.
                1 => write(rng, &disk, at, blocks * BLOCK - at),
                _ => write(rng, &disk, at, BLOCK),
            });
        }
        ops.push(Op::Flush { disk: disk.clone() });
    }
    if rng.chance(40) {
        ops.push(Op::PowerCut);
    }
    ops
}

fn write(rng: &mut Rng, disk: &str, at: u64, len: u64) -> Op {
    Op::Write { disk: disk.to_owned(), at, bytes: super::operation::bytes(rng, len) }
}

/// As [`some`], with all that may come between two flushes.
fn mixed(rng: &mut Rng, names: &Names, disk: &str) -> Vec<Op> {
    let model = &names.disks[disk];
    let mut size = model.size();
    let first = rng.below(size + 1) / BLOCK;
    let mut snapshots = SNAPSHOTS.into_iter().filter(|name| !model.snapshots.contains_key(*name));
    let own = || disk.to_owned();
    let mut ops = Vec::new();
    for _ in 0..2 + rng.below(7) {
        for _ in 0..1 + rng.below(3) {
            let at = (first + rng.below(6)) * BLOCK;
            let op = match rng.below(40) {
                0..3 => Op::Zero { disk: own(), at, len: BLOCK },
                3..6 => Op::Zero { disk: own(), at: at + rng.below(BLOCK), len: 1 + rng.below(3 * BLOCK) },
                6..9 => {
                    size -= size.min(1 + rng.below(9000));
                    Op::Resize { disk: own(), to: size }
                }
                9..12 => {
                    size += rng.below(9000);
                    Op::Resize { disk: own(), to: size }
                }
                12 => {
                    size += rng.below(9000);
                    Op::Grow { disk: own(), to: size }
                }
                13 | 14 => {
                    let (at, len) = (at + rng.below(BLOCK), 1 + rng.below(9000));
                    write(rng, disk, at, len)
                }
                15 => Op::Detach,
                16 => Op::WorkerDies,
                17 => match snapshots.next() {
                    Some(name) => Op::Snapshot { disk: own(), name: name.into() },
                    None => Op::TendLayers,
                },
                18 => match any_copy(rng, own(), names) {
                    Some(copy) => copy,
                    None => Op::Flush { disk: own() },
                },
                _ => write(rng, disk, at, BLOCK),
            };
            ops.push(op);
        }
        ops.push(Op::Flush { disk: own() });
    }
    if rng.chance(40) {
        ops.push(Op::PowerCut);
    }
    ops
}
