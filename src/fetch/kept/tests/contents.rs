//! A block that a base reads was fetched for that base, or was compared with its digest.

use super::*;

const SIZE: u64 = 70 * CACHE_BLOCK - 9;

fn keys(own: u8, digest: Option<u8>) -> FileKeys {
    FileKeys { own: key(own), digest: digest.map(key), size: SIZE }
}

/// Bytes of a server: blocks filled with one letter.
fn bytes(letter: u8, first: u64, blocks: u64) -> Vec<u8> {
    let end = ((first + blocks) * CACHE_BLOCK).min(SIZE);
    vec![letter; (end - first * CACHE_BLOCK) as usize]
}

/// The blocks that the contents read, by letter; '-' for a missing block.
fn seen(contents: &Contents) -> String {
    let one = |block| {
        let mut buf = bytes(0, block, 1);
        match contents.read(block, &mut buf, Reach::Proven) {
            0 => '-',
            _ => {
                assert!(buf.iter().all(|byte| *byte == buf[0]), "mixed bytes in block {block}");
                char::from(buf[0])
            }
        }
    };
    (0..contents.blocks()).map(one).collect()
}

fn all(letter: char) -> String {
    String::from(letter).repeat(70)
}

/// Compares the whole, as a hydration does: the contents match when all blocks have the letter `right`.
fn verify(contents: &Contents, right: u8) -> bool {
    let frozen = contents.freeze();
    let mut buf = bytes(0, 0, 70);
    let read = contents.read(0, &mut buf, Reach::Any) == 70;
    read && buf.iter().all(|byte| *byte == right) && frozen.seal()
}

/// Guards D42.
#[test]
fn blocks_that_were_not_compared_are_read_by_their_own_base_alone() {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let (evil, good) = (cache.contents(keys(1, Some(9))), cache.contents(keys(2, Some(9))));
    evil.insert(0, &bytes(b'A', 0, 70));
    assert_eq!((seen(&evil), seen(&good)), (all('A'), all('-')));
    good.insert(0, &bytes(b'B', 0, 70));
    assert_eq!((seen(&evil), seen(&good)), (all('A'), all('B')));
    // The good contents are compared. From then on both bases read them, and the evil base no longer its own.
    assert!(verify(&good, b'B'));
    assert_eq!((seen(&evil), seen(&good)), (all('B'), all('B')));
    assert!(evil.is_verified() && evil.is_complete(Reach::Proven));
    let late = cache.contents(keys(3, Some(9)));
    assert_eq!(
        (seen(&late), late.is_verified()),
        (all('B'), true),
        "a later base reads them at once, without a fetch"
    );
    assert_eq!(seen(&cache.contents(keys(4, None))), all('-'));
    // The next worker reads them, too.
    cache.flush().unwrap();
    drop((evil, good, late, cache));
    let cache = open(&medium);
    assert_eq!(seen(&cache.contents(keys(5, Some(9)))), all('B'));
    assert_eq!(check(&medium, Checksums::Compare, Repair::No).unwrap(), []);
}

/// Guards D33, D42.
#[test]
fn a_verified_source_takes_no_more_blocks() {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let (one, two) = (cache.contents(keys(1, Some(9))), cache.contents(keys(2, Some(9))));
    one.insert(0, &bytes(b'B', 0, 70));
    assert!(verify(&one, b'B'));
    // A block is damaged, and the server of the first base serves wrong bytes by now.
    let source = cache.find(&key(1)).unwrap();
    let files = source.index.lock().files.clone().unwrap().get().unwrap();
    files.blocks.write_at(&[7; 100], 5 * CACHE_BLOCK).unwrap();
    let hole = |letter| format!("{}{letter}{}", "B".repeat(5), "B".repeat(64));
    assert_eq!((seen(&one), one.is_verified()), (hole('-'), false));
    one.insert(0, &bytes(b'X', 0, 70));
    assert_eq!((seen(&one), seen(&two)), (hole('X'), hole('-')), "another base does not read them");
    // The same with the next worker.
    cache.flush().unwrap();
    drop((one, two, source, cache));
    let cache = open(&medium);
    let (one, two) = (cache.contents(keys(1, Some(9))), cache.contents(keys(2, Some(9))));
    assert_eq!((seen(&one), seen(&two)), (hole('X'), hole('-')));
    assert!(!verify(&one, b'B'));
    // Eviction drops the wrong block and keeps the verified ones. The right block then heals the contents for both.
    assert!(one.has_own());
    one.evict(EvictReason::Changed, SharedCopies::Keep);
    one.insert(5, &bytes(b'B', 5, 1));
    assert_eq!((seen(&one), seen(&two)), (all('B'), hole('-')));
    assert!(verify(&one, b'B'));
    assert_eq!((seen(&two), two.is_verified()), (all('B'), true));
    // After a full eviction, the base caches its own blocks again.
    one.evict(EvictReason::Asked, SharedCopies::Drop);
    one.insert(0, &bytes(b'Y', 0, 70));
    assert_eq!((seen(&one), seen(&two)), (all('Y'), all('-')));
}

/// Guards D42.
#[test]
fn contents_do_not_change_while_they_are_compared() {
    let cache = open(&SimMedium::new(1));
    let contents = cache.contents(keys(1, Some(9)));
    contents.insert(0, &bytes(b'B', 0, 69));
    let frozen = contents.freeze();
    contents.insert(69, &bytes(b'X', 69, 1));
    assert_eq!(contents.next_missing(0, Reach::Proven), Some(69));
    drop(frozen);
    contents.insert(69, &bytes(b'B', 69, 1));
    assert!(verify(&contents, b'B'));
}

#[test]
fn two_bases_can_be_verified_at_the_same_time() {
    let cache = open(&SimMedium::new(1));
    let (one, two) = (cache.contents(keys(1, Some(9))), cache.contents(keys(2, Some(9))));
    one.insert(0, &bytes(b'B', 0, 70));
    two.insert(0, &bytes(b'B', 0, 70));
    let (a, b) = (one.freeze(), two.freeze());
    assert!(a.seal() && b.seal());
    drop((a, b));
    one.remove(SharedCopies::Keep);
    assert_eq!((seen(&one), seen(&two)), (all('B'), all('B')));
    two.remove(SharedCopies::Drop);
    assert_eq!((seen(&one), cache.stats().used_bytes), (all('-'), 0));
}

/// Version 0.1.0 cached all blocks under the digest's key.
#[test]
fn an_upgrade_trusts_blocks_that_an_older_version_verified_and_no_others() {
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
        let contents = cache.contents(keys(1, Some(9)));
        contents.adopt_verified();
        assert_eq!(seen(&contents), if verified { all('B') } else { all('-') });
        // The other blocks are not lost: after a comparison they are verified.
        assert!(contents.is_complete(Reach::Any) && verify(&contents, b'B'));
        assert_eq!((seen(&contents), contents.is_verified()), (all('B'), true));
        drop((contents, cache));
        let cache = open(&medium);
        let contents = cache.contents(keys(2, Some(9)));
        contents.adopt_verified();
        assert_eq!(seen(&contents), all('B'));
    }
    // Contents that do not match are dropped.
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let older = cache.attach(key(9), SIZE);
    older.insert(0, &bytes(b'A', 0, 70));
    let contents = cache.contents(keys(1, Some(9)));
    assert!(!verify(&contents, b'B'));
    assert_eq!((contents.drop_unproven(), contents.is_complete(Reach::Any)), (SIZE, false));
}

#[test]
fn after_a_power_cut_another_base_reads_only_verified_blocks() {
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
    let one = cache.contents(keys(1, Some(9)));
    one.insert(0, &bytes(b'A', 0, 3));
    one.evict(EvictReason::Asked, SharedCopies::Drop);
    one.insert(0, &bytes(b'B', 0, 70));
    assert!(verify(&one, b'B'));
    one.evict(EvictReason::Asked, SharedCopies::Drop);
    one.pin(true);
    one.insert(0, &bytes(b'C', 0, 2));
    medium.set_hook(None);
    let cuts = std::mem::take(&mut *cuts.lock());
    assert!(cuts.len() > 20, "{}", cuts.len());
    for (n, medium) in cuts.into_iter().enumerate() {
        let cache = open(&medium);
        let other = seen(&cache.contents(keys(2, Some(9))));
        assert!(other.chars().all(|seen| "B-".contains(seen)), "cut {n}: {other}");
        let own = seen(&cache.contents(keys(1, Some(9))));
        assert!(own.chars().all(|seen| "ABC-".contains(seen)), "cut {n}: {own}");
    }
}

/// Guards D120.
#[test]
fn only_what_was_compared_is_lent_to_other_hosts_and_lending_changes_nothing() {
    let medium = SimMedium::new(1);
    let cache = open(&medium);
    let contents = cache.contents(keys(1, Some(9)));
    contents.insert(0, &bytes(b'A', 0, 70));
    let lent = |reach| {
        let mut buf = bytes(0, 3, 20);
        let blocks = contents.lend(3, &mut buf, reach);
        (blocks, buf[..blocks * BLOCK].iter().all(|byte| *byte == b'A'))
    };
    let before = cache.stats();
    assert_eq!((lent(Reach::Proven), lent(Reach::Verified)), ((20, true), (0, true)));
    assert!(verify(&contents, b'A'));
    let seen = cache.stats();
    assert_eq!(
        (lent(Reach::Verified), contents.lend(69, &mut bytes(0, 69, 1), Reach::Verified)),
        ((20, true), 1)
    );
    let after = cache.stats();
    assert_eq!((before.hits, before.misses), (0, 0));
    assert_eq!((after.hits, after.misses), (seen.hits, seen.misses));
}
