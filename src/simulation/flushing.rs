//! Parts of histories in which a disk is flushed after every few writes, as a database does. Such flushes carry what was
//! written, and others of the same disk in between sync it.

use super::model::Names;
use super::operation::Op;
use crate::format::BLOCK;
use crate::io::sim::Rng;

/// Whether the history of a seed has such parts. The others are what they were without.
pub(super) fn is_chosen(seed: u64) -> bool {
    seed % 6 == 3
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
