//! What is read for a base was fetched for it, or was compared with its digest.

use super::*;

const SIZE: u64 = 70 * CACHE_BLOCK - 9;

fn named(own: u8, digest: Option<u8>) -> Of {
    Of { own: key(own), digest: digest.map(key), size: SIZE }
}

/// Bytes of a server: whole blocks of one letter.
fn bytes(letter: u8, first: u64, blocks: u64) -> Vec<u8> {
    let end = ((first + blocks) * CACHE_BLOCK).min(SIZE);
    vec![letter; (end - first * CACHE_BLOCK) as usize]
}

/// What is here from a block on, by letter; '-' for what is not.
fn seen(contents: &Contents) -> String {
    let one = |block| {
        let mut buf = bytes(0, block, 1);
        match contents.read(block, &mut buf, Reach::Proven) {
            0 => '-',
            _ => {
                assert!(buf.iter().all(|byte| *byte == buf[0]), "a mixture in block {block}");
                char::from(buf[0])
            }
        }
    };
    (0..contents.blocks()).map(one).collect()
}

fn all(letter: char) -> String {
    String::from(letter).repeat(70)
}

/// Compares, as a hydration does: it is right when it is all of one letter.
fn verify(contents: &Contents, right: u8) -> bool {
    let frozen = contents.freeze();
    let mut buf = bytes(0, 0, 70);
    let read = contents.read(0, &mut buf, Reach::Any) == 70;
    read && buf.iter().all(|byte| *byte == right) && frozen.seal()
}

/// Guards D42.
#[test]
fn bytes_under_a_digest_that_nobody_compared_are_read_by_their_own_base_alone() {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let (evil, good) = (cache.contents(named(1, Some(9))), cache.contents(named(2, Some(9))));
    evil.insert(0, &bytes(b'A', 0, 70));
    assert_eq!((seen(&evil), seen(&good)), (all('A'), all('-')));
    good.insert(0, &bytes(b'B', 0, 70));
    assert_eq!((seen(&evil), seen(&good)), (all('A'), all('B')));
    // The good one is compared: both have it from then on, and what the evil one fetched is not lost to itself only.
    assert!(verify(&good, b'B'));
    assert_eq!((seen(&evil), seen(&good)), (all('B'), all('B')));
    assert!(evil.is_verified() && evil.is_complete(Reach::Proven));
    let late = cache.contents(named(3, Some(9)));
    assert_eq!((seen(&late), late.is_verified()), (all('B'), true), "at once, with nothing fetched");
    assert_eq!(seen(&cache.contents(named(4, None))), all('-'));
    // The next worker knows it, too.
    cache.flush().unwrap();
    drop((evil, good, late, cache));
    let cache = open(&medium);
    assert_eq!(seen(&cache.contents(named(5, Some(9)))), all('B'));
    assert_eq!(check(&medium, Sums::Compare, Repair::No).unwrap(), []);
}

/// Guards D33, D42.
#[test]
fn nothing_comes_into_what_was_verified() {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let (one, two) = (cache.contents(named(1, Some(9))), cache.contents(named(2, Some(9))));
    one.insert(0, &bytes(b'B', 0, 70));
    assert!(verify(&one, b'B'));
    // A block goes bad, and the server of the first base lies by now.
    let source = cache.find(&key(1)).unwrap();
    let files = source.index.lock().files.clone().unwrap().get().unwrap();
    files.blocks.write_at(&[7; 100], 5 * CACHE_BLOCK).unwrap();
    let hole = |letter| format!("{}{letter}{}", "B".repeat(5), "B".repeat(64));
    assert_eq!((seen(&one), one.is_verified()), (hole('-'), false));
    one.insert(0, &bytes(b'X', 0, 70));
    assert_eq!((seen(&one), seen(&two)), (hole('X'), hole('-')), "its own bytes are its own");
    // A worker later as well.
    cache.flush().unwrap();
    drop((one, two, source, cache));
    let cache = open(&medium);
    let (one, two) = (cache.contents(named(1, Some(9))), cache.contents(named(2, Some(9))));
    assert_eq!((seen(&one), seen(&two)), (hole('X'), hole('-')));
    assert!(!verify(&one, b'B'));
    // What differs is dropped without what was verified, and the right block heals it for both.
    assert!(one.has_own());
    one.evict(EvictReason::Changed, Shares::Wanted);
    one.insert(5, &bytes(b'B', 5, 1));
    assert_eq!((seen(&one), seen(&two)), (all('B'), hole('-')));
    assert!(verify(&one, b'B'));
    assert_eq!((seen(&two), two.is_verified()), (all('B'), true));
    // Evicted, it is a cache as any other.
    one.evict(EvictReason::Asked, Shares::Free);
    one.insert(0, &bytes(b'Y', 0, 70));
    assert_eq!((seen(&one), seen(&two)), (all('Y'), all('-')));
}

/// Guards D42.
#[test]
fn what_is_compared_does_not_change_meanwhile() {
    let cache = open(&SimMedium::new(1));
    let contents = cache.contents(named(1, Some(9)));
    contents.insert(0, &bytes(b'B', 0, 69));
    let frozen = contents.freeze();
    contents.insert(69, &bytes(b'X', 69, 1));
    assert_eq!(contents.next_missing(0, Reach::Proven), Some(69));
    drop(frozen);
    contents.insert(69, &bytes(b'B', 69, 1));
    assert!(verify(&contents, b'B'));
}

#[test]
fn two_bases_that_are_verified_at_the_same_time_are_both_right() {
    let cache = open(&SimMedium::new(1));
    let (one, two) = (cache.contents(named(1, Some(9))), cache.contents(named(2, Some(9))));
    one.insert(0, &bytes(b'B', 0, 70));
    two.insert(0, &bytes(b'B', 0, 70));
    let (a, b) = (one.freeze(), two.freeze());
    assert!(a.seal() && b.seal());
    drop((a, b));
    one.remove(Shares::Wanted);
    assert_eq!((seen(&one), seen(&two)), (all('B'), all('B')));
    two.remove(Shares::Free);
    assert_eq!((seen(&one), cache.stats().used_bytes), (all('-'), 0));
}

/// Version 0.1.0 kept everything under the digest's key.
#[test]
fn of_an_older_store_what_was_verified_is_kept_and_the_rest_is_not_believed() {
    for verified in [true, false] {
        let medium = SimMedium::new(1);
        let cache = open(&medium);
        let older = cache.attach(key(9), SIZE);
        older.insert(0, &bytes(b'B', 0, 70));
        older.pin(true);
        cache.flush().unwrap();
        older.set_verified(verified);
        drop((older, cache));
        let cache = open(&medium);
        let contents = cache.contents(named(1, Some(9)));
        contents.believe();
        assert_eq!(seen(&contents), if verified { all('B') } else { all('-') });
        // Not lost either: it is compared, and then it counts.
        assert!(contents.is_complete(Reach::Any) && verify(&contents, b'B'));
        assert_eq!((seen(&contents), contents.is_verified()), (all('B'), true));
        drop((contents, cache));
        let cache = open(&medium);
        let contents = cache.contents(named(2, Some(9)));
        contents.believe();
        assert_eq!(seen(&contents), all('B'));
    }
    // One that is not right goes.
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let older = cache.attach(key(9), SIZE);
    older.insert(0, &bytes(b'A', 0, 70));
    let contents = cache.contents(named(1, Some(9)));
    assert!(!verify(&contents, b'B'));
    assert_eq!((contents.drop_unproven(), contents.is_complete(Reach::Any)), (SIZE, false));
}

#[test]
fn a_power_cut_leaves_what_was_verified_verified_or_not_and_never_wrong() {
    use crate::io::sim::{Call, Keep, Stage};
    let medium = SimMedium::new(1);
    let cuts: Arc<Mutex<Vec<SimMedium>>> = Arc::default();
    let (now, into) = (medium.clone(), cuts.clone());
    let rng = Mutex::new(Rng::new(7));
    medium.set_hook(Some(Arc::new(move |event| {
        if event.stage == Stage::Before && !matches!(event.call, Call::Read | Call::Open) {
            let mut rng = rng.lock();
            let keep = Keep::any(&mut rng);
            into.lock().push(now.crash(&mut rng, keep));
        }
        Ok(())
    })));
    let cache = open(&medium);
    let one = cache.contents(named(1, Some(9)));
    one.insert(0, &bytes(b'A', 0, 3));
    one.evict(EvictReason::Asked, Shares::Free);
    one.insert(0, &bytes(b'B', 0, 70));
    assert!(verify(&one, b'B'));
    one.evict(EvictReason::Asked, Shares::Free);
    one.pin(true);
    one.insert(0, &bytes(b'C', 0, 2));
    medium.set_hook(None);
    let cuts = std::mem::take(&mut *cuts.lock());
    assert!(cuts.len() > 20, "{}", cuts.len());
    for (n, medium) in cuts.into_iter().enumerate() {
        let cache = open(&medium);
        let other = seen(&cache.contents(named(2, Some(9))));
        assert!(other.chars().all(|seen| "B-".contains(seen)), "cut {n}: {other}");
        let own = seen(&cache.contents(named(1, Some(9))));
        assert!(own.chars().all(|seen| "ABC-".contains(seen)), "cut {n}: {own}");
    }
}
