//! A worker is killed after any store to the live map. The next one flushes all that was acknowledged, and looks only at
//! pages that changed.

use super::super::map::step;
use super::*;

/// What a worker that was killed left.
struct Left {
    live: SimLive,
    medium: SimMedium,
    root: MapRoot,
}

impl Left {
    /// As the next worker finds it.
    fn rig(self) -> Rig {
        let roots = Arc::new(Roots(Mutex::new(self.root)));
        Rig { medium: self.medium, live: Arc::new(self.live), roots, overlap: 0, rises: false }
    }
}

/// What kills in the middle of `act` would leave: one after each step.
fn kills(rig: &Rig, act: impl FnOnce()) -> Vec<Left> {
    let left: Arc<Mutex<Vec<Left>>> = Arc::default();
    let (live, medium, roots, all) = (rig.live.clone(), rig.medium.clone(), rig.roots.clone(), left.clone());
    step::WATCH.set(Some(Box::new(move |_| {
        let root = *roots.0.lock();
        all.lock().push(Left { live: live.fork().unwrap(), medium: medium.fork(), root });
    })));
    act();
    step::WATCH.set(None);
    std::mem::take(&mut *left.lock())
}

/// Blocks of one page, of the next one, and of a page that the list keeps behind the header.
const BLOCKS: [u64; 4] = [3, 40, 15_872, 15_872 * 30_000];

fn large(rig: &Rig) -> Arc<Delta> {
    let delta = rig.open();
    delta.resize((BLOCKS[3] + 1) * BLOCK, Durability::Flush).unwrap();
    delta
}

/// Guards D77.
#[test]
fn a_write_that_is_sent_again_after_a_kill_at_any_step_is_flushed() {
    for flushed_before in [false, true] {
        for block in BLOCKS {
            let rig = Rig::new();
            let delta = large(&rig);
            if flushed_before {
                put(&delta, block + 1, 1);
                delta.flush().unwrap();
            }
            let kills = kills(&rig, || put(&delta, block, 7));
            assert!(kills.len() >= 3, "{}", kills.len());
            for (step, left) in kills.into_iter().enumerate() {
                let next = left.rig();
                let delta = next.open();
                put(&delta, block, 7);
                delta.flush().unwrap();
                let (_after, cut) = next.cut(NOTHING);
                assert_eq!(byte(&cut, block), 7, "block {block}, killed after step {step}");
            }
        }
    }
}

/// Guards D77.
#[test]
fn a_flush_of_the_next_worker_has_all_that_a_kill_at_any_step_of_a_flush_left() {
    for fails in [false, true] {
        let rig = Rig::new();
        let delta = large(&rig);
        put(&delta, 1, 1);
        delta.flush().unwrap();
        BLOCKS.iter().for_each(|block| put(&delta, *block, 7));
        // A word changes while the flush is under way, and is taken again.
        let other = delta.clone();
        rig.once(Call::SyncData, ".data", Stage::After, move || put(&other, 4, 8));
        if fails {
            rig.fail(Call::SyncData, ".map", libc::EIO);
        }
        let kills = kills(&rig, || assert_eq!(delta.flush().is_err(), fails));
        rig.medium.set_hook(None);
        assert!(kills.len() > 30, "{}", kills.len());
        for (step, left) in kills.into_iter().enumerate() {
            let next = left.rig();
            next.open().flush().unwrap();
            let (_after, cut) = next.cut(NOTHING);
            for block in BLOCKS {
                assert_eq!(byte(&cut, block), 7, "block {block}, killed after step {step}");
            }
        }
        if !fails {
            let (_after, cut) = rig.cut(NOTHING);
            assert_eq!(byte(&cut, 4), 8);
        }
    }
}

/// Guards D77.
#[test]
fn the_first_flush_of_the_next_worker_looks_only_at_pages_that_changed() {
    let rig = Rig::new();
    let delta = large(&rig);
    for page in 0..200 {
        put(&delta, page * 15_872, 1);
    }
    delta.flush().unwrap();
    BLOCKS.iter().for_each(|block| put(&delta, block + 5, 7));
    drop(delta);
    let delta = rig.open();
    assert_eq!(delta.map.unflushed_pages().collect::<Vec<_>>(), [0, 1, 30_000]);
    delta.flush().unwrap();
    assert_eq!(delta.map.unflushed_pages().count(), 0);
}

/// Guards D77.
#[test]
fn a_map_that_an_earlier_version_changed_is_flushed_as_a_whole() {
    let rig = Rig::new();
    let delta = large(&rig);
    delta.flush().unwrap();
    BLOCKS.iter().for_each(|block| put(&delta, *block, 7));
    // A version without the list leaves pages unlisted; the arena then has another mark.
    delta.map.live().unflushed_pages().for_each(|page| delta.map.live().forget_unflushed(page));
    delta.map.live().header(LiveHeader::Tracked).store(5, Ordering::Release);
    drop(delta);
    let delta = rig.open();
    assert!(!delta.map.live().is_tracked());
    delta.flush().unwrap();
    assert!(delta.map.live().is_tracked());
    let (_after, cut) = rig.cut(NOTHING);
    BLOCKS.iter().for_each(|block| assert_eq!(byte(&cut, *block), 7));
}
