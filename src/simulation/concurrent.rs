//! Histories in which several threads use one disk at once.

use std::sync::Arc;

use super::cut::DEEPEST;
use super::model::{Interruption, Model};
use super::operation::Op;
use super::sim_store::{Outcome, SimStore};
use super::{Campaign, Counts};
use crate::format::BLOCK;
use crate::io::sim::{Rng, SimLive, SimMedium};
use crate::mutant::{Mutant, simulate};

impl SimStore {
    /// Runs one disk that several threads use at once. Each thread has blocks of its own, so that the model knows what was
    /// written last. The last thread also has the end of the disk.
    pub fn concurrent_history(
        campaign: &Arc<Campaign>,
        seed: u64,
        fault: Option<Mutant>,
    ) -> Result<(), String> {
        const THREADS: u64 = 3;
        const BLOCKS: u64 = 48;
        let mut rng = Rng::new(seed);
        let medium = SimMedium::new(rng.number());
        let start = (SimLive::default(), Model::default());
        let mut world = Self::watched(campaign, medium, start.0, start.1, rng.fork(), (DEEPEST, true));
        world.open(Interruption::WorkerDeath)?;
        world.run(Op::AddBase { name: "x".into(), source: 0 })?;
        let base = rng.chance(50).then(|| "x".to_owned());
        world.run(Op::Create { disks: vec![("a".into(), base, BLOCKS * BLOCK)] })?;
        world.run(Op::Flush { disk: "a".into() })?;
        // Power cuts happen from here on.
        world.restart_as(0)?;
        let world = &world;
        let disk = "a".to_owned();
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let (mut rng, disk) = (rng.fork(), disk.clone());
                scope.spawn(move || {
                    let _switches = simulate(fault);
                    for _ in 0..12 {
                        let own = rng.below(BLOCKS / THREADS) * THREADS + thread;
                        let (at, stamp) = (own * BLOCK + rng.below(3) * 512, rng.number() as u8 | 1);
                        let op = match rng.below(8) {
                            0..3 if thread == THREADS - 1 => {
                                Op::Resize { disk: disk.clone(), to: BLOCKS * BLOCK + rng.below(70_000) }
                            }
                            3 | 4 if thread == THREADS - 1 => {
                                let at = BLOCKS * BLOCK + rng.below(70_000);
                                Op::Write { disk: disk.clone(), at, bytes: vec![stamp; 5000] }
                            }
                            0..4 => Op::Write { disk: disk.clone(), at, bytes: vec![stamp; 2048] },
                            4 => Op::Zero { disk: disk.clone(), at: own * BLOCK, len: BLOCK },
                            _ => Op::Flush { disk: disk.clone() },
                        };
                        let text = op.text();
                        world.hook.model.lock().log.push(format!("thread {thread}: {text}"));
                        Counts::add(&world.hook.campaign.counts.operations);
                        match world.step_shared(&op) {
                            Ok(Outcome::Done) => {}
                            _ if world.hook.campaign.stopped() => return,
                            Ok(Outcome::Failed(why)) => {
                                world.hook.violated(&format!("{text} failed: {why}"));
                            }
                            Err(why) => {
                                world.hook.violated(&why);
                            }
                        }
                    }
                });
            }
        });
        Ok(())
    }
}
