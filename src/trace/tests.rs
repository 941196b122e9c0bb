use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use proptest::prelude::*;

use super::{AutoRecord, End, Limits, Player, RecordError, Recorder, Tap, TraceStore, TracedBase, Tracer};
use crate::events::{Events, Kind};
use crate::format::BLOCK;
use crate::format::record::Digest;
use crate::format::trace::{Origin, Trace, TraceEntry};
use crate::io::sim::{Call, Fault, Keep, Rng, SimMedium};
use crate::io::{Medium, Open};

const SIZE: u64 = 64 << 20;
const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// A recorder with a clock that the test sets.
struct TestRecorder {
    recorder: Recorder,
    start: Instant,
    ms: AtomicU64,
}

impl TestRecorder {
    fn new(size: u64) -> Self {
        Self {
            recorder: Recorder::new(size, Limits::default()),
            start: Instant::now(),
            ms: AtomicU64::new(0),
        }
    }
    fn now(&self) -> Instant {
        self.start + Duration::from_millis(self.ms.load(Ordering::Relaxed))
    }
    fn at(&self, ms: u64) -> &Self {
        self.ms.store(ms, Ordering::Relaxed);
        self
    }
    fn note(&self, offset: u64, len: u64) -> &Self {
        self.recorder.note_at(offset, len, || self.now());
        self
    }
    fn entries(&self) -> Vec<(u64, u64, u32)> {
        self.recorder.entries().iter().map(|e| (e.first, e.blocks, e.at_ms)).collect()
    }
}

#[test]
fn the_first_read_of_a_block_counts_in_order_and_time() {
    let test = TestRecorder::new(SIZE);
    test.at(500).note(0, 512).note(512, 512);
    test.at(520).note(8 * BLOCK + 1, 2 * BLOCK);
    test.at(525).note(11 * BLOCK, BLOCK);
    test.at(600).note(12 * BLOCK, BLOCK);
    // Blocks that were read before are omitted; there are new blocks on both sides of them.
    test.at(700).note(7 * BLOCK, 8 * BLOCK).note(0, BLOCK);
    assert_eq!(test.entries(), [(0, 1, 0), (8, 4, 20), (12, 1, 100), (7, 1, 200), (13, 2, 200)]);
    assert_eq!(test.recorder.bytes(), 9 * BLOCK);
    // No block beyond the end is noted.
    test.note(SIZE - BLOCK, 10 * BLOCK).note(SIZE, BLOCK).note(u64::MAX - 5, 100).note(50 * BLOCK, 0);
    assert_eq!(test.entries()[5..], [(SIZE / BLOCK - 1, 1, 200)]);
}

#[test]
fn a_short_last_block_is_noted_as_a_block() {
    let test = TestRecorder::new(BLOCK + 1);
    test.note(0, 10 * BLOCK);
    assert_eq!(test.entries(), [(0, 2, 0)]);
}

#[test]
fn recordings_end_by_themselves() {
    let ms = Duration::from_millis;
    let begun = || {
        let test = TestRecorder::new(4 << 30);
        assert_eq!(test.recorder.ended(test.now() + Duration::from_secs(9999)), None, "nothing was read");
        test.note(0, BLOCK);
        test
    };
    let idle = begun();
    assert_eq!(idle.recorder.ended(idle.now() + ms(29_999)), None);
    // A repeated read notes nothing.
    idle.at(20_000).note(0, BLOCK);
    assert_eq!(idle.recorder.ended(idle.start + ms(30_000)), Some(End::Idle));
    idle.note(BLOCK, BLOCK);
    assert_eq!(idle.entries().len(), 1, "the recording has ended");

    let long = begun();
    for second in 1..300 {
        long.at(second * 1000).note(second * 8 * BLOCK, BLOCK);
        assert_eq!(long.recorder.ended(long.now()), None);
    }
    assert_eq!(long.recorder.ended(long.start + ms(300_000)), Some(End::Time));

    let much = begun();
    much.note(0, (1 << 30) - BLOCK);
    assert_eq!(much.recorder.ended(much.now()), None);
    much.note(1 << 30, BLOCK);
    assert_eq!(much.recorder.ended(much.now()), Some(End::Bytes));

    let asked = begun();
    asked.recorder.end(End::Asked);
    asked.recorder.end(End::Bytes);
    assert_eq!(asked.recorder.ended(asked.start + ms(300_000)), Some(End::Asked));
}

#[test]
fn memory_is_bounded_whatever_the_size_of_the_base() {
    let test = TestRecorder::new(1 << 46);
    for page in 0..5000 {
        test.note(page << 28, BLOCK);
    }
    assert_eq!(test.recorder.ended(test.now()), Some(End::Entries));
    assert_eq!(test.entries().len(), 4096);
}

#[test]
fn threads_that_read_the_same_blocks_note_each_block_once() {
    let recorder = Arc::new(Recorder::new(SIZE, Limits::default()));
    let threads: Vec<_> = (0..4u64)
        .map(|seed| {
            let recorder = recorder.clone();
            thread::spawn(move || {
                for n in 0..20_000u64 {
                    let at = (n * 7919 + seed * 13) % (SIZE / BLOCK);
                    recorder.note(at * BLOCK, 3 * BLOCK);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().expect("notes"));
    let mut seen = vec![0u8; (SIZE / BLOCK) as usize];
    for entry in recorder.entries() {
        for block in entry.first..entry.first + entry.blocks {
            seen[block as usize] += 1;
        }
    }
    assert!(seen.iter().all(|n| *n == 1), "{:?}", seen.iter().position(|n| *n != 1));
    assert_eq!(recorder.bytes(), SIZE);
}

proptest! {
    #[test]
    fn a_recording_agrees_with_a_flat_list(reads in proptest::collection::vec((0..300_000u64, 0..20_000u64), 0..60)) {
        let size = 290_000;
        let test = TestRecorder::new(size);
        let mut seen = std::collections::BTreeSet::new();
        let mut order = Vec::new();
        for (offset, len) in reads {
            test.note(offset, len);
            let end = (offset + len).min(size.next_multiple_of(BLOCK));
            for block in offset / BLOCK..end.div_ceil(BLOCK).max(offset / BLOCK) {
                if seen.insert(block) {
                    order.push(block);
                }
            }
        }
        let entries = test.recorder.entries();
        let noted: Vec<u64> = entries.iter().flat_map(|e| e.first..e.first + e.blocks).collect();
        prop_assert_eq!(noted, order);
    }

    #[test]
    fn a_player_fetches_all_blocks_of_a_trace_and_only_small_gaps_besides(
        list in proptest::collection::vec((0..4000u64, 1..40u64), 0..200), cut in 1..5000u64,
    ) {
        let entries: Vec<_> =
            list.into_iter().map(|(first, blocks)| TraceEntry { first, blocks, at_ms: 0 }).collect();
        let size = cut * BLOCK - 7;
        let ranges: Vec<_> = Player::new(&trace(entries.clone()), size).collect();
        let blocks = |range: &std::ops::Range<u64>| range.start / BLOCK..range.end.div_ceil(BLOCK);
        let fetched: std::collections::BTreeSet<u64> = ranges.iter().flat_map(blocks).collect();
        let wanted: std::collections::BTreeSet<u64> =
            entries.iter().flat_map(|e| e.first..e.first + e.blocks).filter(|block| *block < cut).collect();
        prop_assert!(wanted.is_subset(&fetched));
        for range in &ranges {
            prop_assert!(range.start < range.end && range.end <= size && range.end - range.start <= MIB);
        }
        // Every other block lies within a gap's distance of a wanted block.
        for block in fetched.difference(&wanted) {
            let near = wanted.range(block.saturating_sub(16)..block + 17).next();
            prop_assert!(near.is_some(), "block {}", block);
        }
    }
}

fn trace(entries: Vec<TraceEntry>) -> Trace {
    Trace { base: "b".into(), size: SIZE, origin: Origin::Unknown, recorded_ns: 0, entries }
}

#[test]
fn a_player_merges_neighbours_of_a_window_and_keeps_the_order_of_windows() {
    let entry = |at: u64, len: u64| TraceEntry { first: at / BLOCK, blocks: len / BLOCK, at_ms: 0 };
    let mut player = Player::new(
        &trace(vec![
            entry(32 * MIB, 256 * KIB),
            entry(0, 4 * KIB),
            entry(64 * KIB, 252 * KIB),
            // The second window: adjacent to a piece of the first, but fetched later.
            entry(32 * MIB + 256 * KIB, 512 * KIB),
            entry(40 * MIB, 3 * MIB),
        ]),
        SIZE,
    );
    assert_eq!(player.left(), 1024 * KIB + 3 * MIB);
    assert_eq!(player.next(), Some(0..316 * KIB));
    assert_eq!(player.next(), Some(32 * MIB..32 * MIB + 256 * KIB));
    assert_eq!(player.left(), 512 * KIB + 3 * MIB);
    assert_eq!(player.next(), Some(32 * MIB + 256 * KIB..32 * MIB + 768 * KIB));
    let rest: Vec<_> = player.collect();
    assert_eq!(rest, [40 * MIB..41 * MIB, 41 * MIB..42 * MIB, 42 * MIB..43 * MIB]);
}

fn subject(base: u64) -> TracedBase {
    TracedBase { base, name: format!("b{base}"), size: SIZE, origin: Origin::Unknown }
}

fn tracer(medium: &SimMedium, automatic: AutoRecord) -> (Tracer, Events) {
    let events = Events::new();
    let store = TraceStore::new(Arc::new(medium.clone()));
    (Tracer::new(store, Limits::default(), automatic, events.clone()), events)
}

/// Reads like a boot.
fn boot(tap: &Tap) {
    for n in 0..300u64 {
        tap.note(n * 7919 % (SIZE / BLOCK) * BLOCK, BLOCK);
    }
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(31)
}

#[test]
fn the_first_boot_of_a_base_becomes_its_trace() {
    let (tracer, events) = tracer(&SimMedium::new(1), AutoRecord::Yes);
    let taps: Vec<_> = (1..=3).map(|disk| Arc::new(Tap::new(disk))).collect();
    taps.iter().for_each(|tap| tracer.attached(tap, false, &subject(9)));
    assert!(taps.iter().all(|tap| tap.is_open()));
    // The boot is not that of the first disk, nor of the first that read anything.
    taps[0].note(0, BLOCK);
    boot(&taps[1]);
    taps[0].note(0, 2 * BLOCK);
    assert_eq!(tracer.recording(), [1, 2]);
    tracer.tick(Instant::now());
    assert!(tracer.store().load(9).expect("reads").is_none());
    tracer.tick(later());
    let trace = tracer.store().load(9).expect("reads").expect("a trace");
    assert_eq!((trace.base.as_str(), trace.size, trace.blocks()), ("b9", SIZE, 300));
    assert!(!tracer.is_recording() && taps.iter().all(|tap| !tap.is_open()));
    let told = &events.recent(0)[0].event;
    assert_eq!((told.kind, told.bytes), (Kind::TraceRecorded, Some(300 * BLOCK)));
    // The base has a trace now.
    tracer.attached(&taps[0], false, &subject(9));
    assert!(!taps[0].is_open());
    assert_eq!(tracer.player(&subject(9)).expect("a player").left(), 300 * BLOCK);
    // Until it is removed.
    assert!(tracer.remove(9).expect("removes") && !tracer.remove(9).expect("nothing"));
    tracer.attached(&taps[0], false, &subject(9));
    assert!(taps[0].is_open());
}

#[test]
fn a_recording_that_is_no_first_boot_is_not_saved() {
    let medium = SimMedium::new(1);
    let (tracer, _) = tracer(&medium, AutoRecord::Yes);
    let (written, one, two) = (Arc::new(Tap::new(1)), Arc::new(Tap::new(2)), Arc::new(Tap::new(3)));
    tracer.attached(&written, true, &subject(9));
    assert!(!written.is_open(), "it was booted before");
    tracer.attached(&one, false, &subject(9));
    tracer.attached(&two, false, &subject(9));
    // A program reads a partition table.
    one.note(0, 64 * KIB);
    tracer.tick(later());
    assert!(tracer.store().load(9).expect("reads").is_none());
    assert!(one.is_open() && two.is_open());
    // A program copies the disk.
    for at in (0..SIZE).step_by(MIB as usize) {
        one.note(at, MIB);
    }
    tracer.tick(later());
    assert!(tracer.store().load(9).expect("reads").is_none());
    assert!(!one.is_open() && two.is_open());
    one.note(0, BLOCK);
    assert!(tracer.recording().is_empty());
    boot(&two);
    tracer.close();
    assert_eq!(tracer.store().load(9).expect("reads").expect("a trace").blocks(), 300);
    // The next worker finds the trace.
    let (next, _) = super::tests::tracer(&medium, AutoRecord::Yes);
    next.attached(&one, false, &subject(9));
    assert!(!one.is_open());
    next.attached(&one, false, &subject(10));
    assert!(one.is_open());
    // The disks of the base were removed.
    drop(one);
    next.tick(Instant::now());
    assert!(!next.is_recording());
}

#[test]
fn of_many_first_boots_at_once_a_few_are_recorded() {
    let (tracer, _) = tracer(&SimMedium::new(1), AutoRecord::Yes);
    let taps: Vec<_> = (1..=50).map(|disk| Arc::new(Tap::new(disk))).collect();
    taps.iter().for_each(|tap| tracer.attached(tap, false, &subject(9)));
    // Any of them may be recorded; the last begins first.
    taps.iter().rev().for_each(|tap| boot(tap));
    assert_eq!(tracer.recording(), (43..=50).rev().collect::<Vec<_>>());
    tracer.tick(later());
    assert!(tracer.store().load(9).expect("reads").is_some());
    assert!(taps.iter().all(|tap| !tap.is_open()));
}

#[test]
fn a_requested_recording_is_saved_whatever_it_contains() {
    let (tracer, _) = tracer(&SimMedium::new(1), AutoRecord::No);
    let (one, two) = (Arc::new(Tap::new(1)), Arc::new(Tap::new(2)));
    tracer.attached(&one, false, &subject(9));
    assert!(!one.is_open());
    assert!(matches!(tracer.stop(1), Err(RecordError::None)));
    tracer.record(&one, subject(9)).expect("begins");
    let again = tracer.record(&two, subject(9)).expect_err("one at a time");
    assert_eq!(again.to_string(), "a recording of base b9 by disk number 1 is under way");
    assert!(matches!(tracer.stop(1), Err(RecordError::Empty)));
    tracer.record(&one, subject(9)).expect("begins");
    one.note(0, BLOCK);
    two.note(BLOCK, BLOCK);
    let recorded = tracer.stop(1).expect("kept, however small");
    assert_eq!((recorded.entries, recorded.bytes, recorded.end), (1, BLOCK, End::Asked));
    assert!(!one.is_open());
}

#[test]
fn a_requested_recording_replaces_an_automatic_one() {
    let (tracer, _) = tracer(&SimMedium::new(1), AutoRecord::Yes);
    let (one, two) = (Arc::new(Tap::new(1)), Arc::new(Tap::new(2)));
    tracer.attached(&one, false, &subject(9));
    boot(&one);
    tracer.record(&two, subject(9)).expect("begins");
    assert!(!one.is_open() && two.is_open());
    // A disk that is attached later is not recorded.
    let three = Arc::new(Tap::new(3));
    tracer.attached(&three, false, &subject(9));
    assert!(!three.is_open());
    two.note(0, BLOCK);
    tracer.tick(later());
    assert_eq!(tracer.store().load(9).expect("reads").expect("a trace").blocks(), 1);
}

#[test]
fn a_trace_of_another_image_is_not_played() {
    let (tracer, _) = tracer(&SimMedium::new(1), AutoRecord::Yes);
    let digest = |n| Origin::Digest(Digest::Sha256([n; 32]));
    let entries = vec![TraceEntry { first: 0, blocks: 1, at_ms: 0 }];
    tracer.save(9, &Trace { origin: digest(1), ..trace(entries) }).expect("saves");
    assert!(tracer.player(&TracedBase { origin: digest(1), ..subject(9) }).is_some());
    assert!(tracer.player(&subject(9)).is_some());
    assert!(tracer.player(&TracedBase { origin: digest(2), ..subject(9) }).is_none());
    assert!(tracer.player(&TracedBase { size: SIZE + 1, ..subject(9) }).is_none());
    assert!(tracer.player(&subject(8)).is_none());
}

#[test]
fn a_damaged_trace_is_reported_and_not_played() {
    let medium = SimMedium::new(1);
    let (tracer, _) = tracer(&medium, AutoRecord::Yes);
    tracer.save(9, &trace(vec![TraceEntry { first: 0, blocks: 1, at_ms: 0 }])).expect("saves");
    medium.open("traces/9.trace", Open::Existing).expect("a file").write_at(&[1], 50).expect("writes");
    assert!(tracer.player(&subject(9)).is_none());
    let list = tracer.store().list().expect("lists");
    let why = list[0].trace.as_ref().expect_err("damaged");
    assert!(why.contains("checksum"), "{why}");
    assert!(tracer.remove(9).expect("removes"));
}

#[test]
fn a_full_store_loses_the_recording_and_nothing_else() {
    let medium = SimMedium::new(1);
    let (tracer, events) = tracer(&medium, AutoRecord::Yes);
    let old = trace(vec![TraceEntry { first: 0, blocks: 1, at_ms: 0 }]);
    tracer.save(9, &old).expect("saves");
    let tap = Arc::new(Tap::new(1));
    tracer.record(&tap, subject(9)).expect("begins");
    boot(&tap);
    let full = Fault { call: Call::Write, name: ".trace".into(), skip: 0, times: 1, errno: libc::ENOSPC };
    medium.plan(full);
    let error = tracer.stop(1).expect_err("no space");
    assert!(error.to_string().contains("os error 28"), "{error}");
    assert_eq!(tracer.store().load(9).expect("reads"), Some(old));
    assert!(events.recent(0).is_empty() && !tap.is_open());
    assert_eq!(medium.list("traces").expect("lists"), ["9.trace"]);
}

#[test]
fn after_a_power_cut_there_is_the_old_trace_or_the_new_one() {
    let one = |first| trace(vec![TraceEntry { first, blocks: 1, at_ms: 0 }]);
    let medium = SimMedium::new(1);
    let (tracer, _) = tracer(&medium, AutoRecord::Yes);
    let rng = Mutex::new(Rng::new(5));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let (cut, cuts) = (medium.clone(), seen.clone());
    medium.set_hook(Some(Arc::new(move |_| {
        for _ in 0..20 {
            let mut rng = rng.lock();
            let keep = Keep::any(&mut rng);
            let after = TraceStore::new(Arc::new(cut.crash(&mut rng, keep)));
            cuts.lock().push(after.load(9).expect("never half a trace"));
        }
        Ok(())
    })));
    tracer.save(9, &one(1)).expect("saves");
    let first = seen.lock().len();
    tracer.save(9, &one(2)).expect("saves");
    medium.set_hook(None);
    let seen = seen.lock();
    assert!(seen[..first].iter().all(|found| found.as_ref().is_none_or(|found| *found == one(1))));
    assert!(seen[first..].iter().all(|found| *found == Some(one(1)) || *found == Some(one(2))));
    let keep = Keep { sectors: 0, lengths: 0, entries: 0, stale: false };
    let after = TraceStore::new(Arc::new(medium.crash(&mut Rng::new(1), keep)));
    assert_eq!(after.load(9).expect("reads"), Some(one(2)));
}

#[test]
fn a_trace_is_played_at_the_first_read_of_each_disk() {
    let (tracer, _) = tracer(&SimMedium::new(1), AutoRecord::Yes);
    let played = Arc::new(Mutex::new(Vec::new()));
    let list = played.clone();
    tracer.prefetch_with(move |base| list.lock().push(base));
    let (one, two, bare) = (Arc::new(Tap::new(1)), Arc::new(Tap::new(2)), Arc::new(Tap::new(3)));
    tracer.save(9, &trace(vec![TraceEntry { first: 0, blocks: 1, at_ms: 0 }])).expect("saves");
    tracer.attached(&one, false, &subject(9));
    tracer.attached(&two, true, &subject(9));
    tracer.attached(&bare, true, &subject(10));
    assert!(played.lock().is_empty(), "no disk reads yet");
    for tap in [&one, &one, &two, &bare] {
        tap.note(0, BLOCK);
    }
    assert_eq!(*played.lock(), [9, 9]);
    assert!(!one.is_open() && !two.is_open(), "later reads cost a load");
}
