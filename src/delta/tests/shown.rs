//! An overlap that grows.

use super::*;
use crate::mutant::simulate;

// The first record of a flush had the new overlap, and a later one the words that hide what lies before the range.
/// Guards D81.
#[test]
fn a_power_cut_between_two_records_of_a_flush_shows_nothing_before_the_range() {
    let _small = simulate(None);
    let rig = Rig { rises: true, ..Rig::new() };
    let delta = rig.open();
    put(&delta, 1, 1);
    delta.flush().unwrap();
    assert!(delta.show_below(0, (100 * BLOCK, 101 * BLOCK), true).unwrap());
    assert_eq!([0, 1, 99, 100].map(|block| byte(&delta, block)), [0, 1, 0, 0xba]);
    let (medium, cuts) = (rig.medium.clone(), Arc::new(Mutex::new(Vec::new())));
    let seen = cuts.clone();
    rig.medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.call == Call::SyncData && event.name.ends_with(".map") && event.stage == Stage::After {
            seen.lock().push(medium.crash(&mut Rng::new(7), NOTHING));
        }
        Ok(())
    })));
    let root = *rig.roots.0.lock();
    delta.flush().unwrap();
    rig.medium.set_hook(None);
    let cuts = std::mem::take(&mut *cuts.lock());
    assert!(cuts.len() > 2, "{} records", cuts.len());
    for (number, medium) in cuts.into_iter().enumerate() {
        let roots = Arc::new(Roots(Mutex::new(root)));
        let after = Rig { medium, live: Arc::default(), roots, overlap: 0, rises: true }.open();
        let shown = (0..100).find(|block| *block != 1 && byte(&after, *block) != 0);
        assert_eq!(shown, None, "after record {number}");
    }
    let (_, after) = rig.cut(NOTHING);
    assert_eq!([0, 1, 99, 100].map(|block| byte(&after, block)), [0, 1, 0, 0xba]);
}
