//! Tests of the delta on a medium that fails or panics, and while other calls run in the middle of one.

mod carried;
mod interrupted;
mod killed;
mod large_maps;
mod lost;
mod shown;
mod space;

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64};

use super::flush::TakenWords;
use super::*;
use crate::io::sim::{Call, Event, Fault, Hook, Keep, Rng, SimLive, SimMedium, Stage};

#[derive(Default)]
struct Roots(Mutex<MapRoot>);

impl RootStore for Roots {
    fn commit(&self, root: MapRoot, _modified_ns: i64) -> io::Result<()> {
        *self.0.lock() = root;
        Ok(())
    }
}

const ALL: Keep = Keep { sectors: 100, lengths: 100, entries: 100, stale: false };
const NOTHING: Keep = Keep { sectors: 0, lengths: 0, entries: 0, stale: false };

struct Rig {
    medium: SimMedium,
    live: Arc<SimLive>,
    roots: Arc<Roots>,
    overlap: u64,
    rises: bool,
}

impl Rig {
    fn new() -> Self {
        Self::on(SimMedium::new(1))
    }
    fn on(medium: SimMedium) -> Self {
        medium.make_dir("deltas").unwrap();
        medium.sync_dir(".").unwrap();
        Self { medium, live: Arc::default(), roots: Arc::default(), overlap: 0, rises: false }
    }
    fn open(&self) -> Arc<Delta> {
        self.try_open().unwrap()
    }
    fn try_open(&self) -> Result<Arc<Delta>, DeltaError> {
        let overlap = self.overlap;
        let spec = DeltaSpec {
            disk: 1,
            size: 65_536,
            overlap,
            rises: self.rises,
            modified_ns: 0,
            root: *self.roots.0.lock(),
        };
        let delta_io = DeltaIo {
            medium: Arc::new(self.medium.clone()),
            live: self.live.clone(),
            roots: self.roots.clone(),
        };
        Delta::open(spec, delta_io).map(Arc::new)
    }
    /// The delta after a power cut now.
    fn cut(&self, keep: Keep) -> (Self, Arc<Delta>) {
        let after = Self {
            medium: self.medium.crash(&mut Rng::new(7), keep),
            live: Arc::default(),
            roots: Arc::new(Roots(Mutex::new(*self.roots.0.lock()))),
            overlap: self.overlap,
            rises: self.rises,
        };
        let delta = after.open();
        (after, delta)
    }
    /// Runs `act` once, at the first such call to a file whose name ends with `name`.
    fn once(&self, call: Call, name: &'static str, stage: Stage, act: impl Fn() + Send + Sync + 'static) {
        let done = AtomicBool::new(false);
        let hook: Hook = Arc::new(move |event: &Event<'_>| {
            let here = event.call == call && event.name.ends_with(name) && event.stage == stage;
            if here && !done.swap(true, Ordering::AcqRel) {
                act();
            }
            Ok(())
        });
        self.medium.set_hook(Some(hook));
    }
    fn fail(&self, call: Call, name: &str, errno: i32) {
        self.medium.plan(Fault { call, name: name.into(), skip: 0, times: 1, errno });
    }
}

fn put(delta: &Delta, block: u64, byte: u8) {
    delta.write(block * BLOCK, &[byte; BLOCK as usize], &Edges::default()).unwrap();
}

fn byte(delta: &Delta, block: u64) -> u8 {
    let (mapping, _) = delta.extent(block * BLOCK, (block + 1) * BLOCK);
    let mut buf = [0; BLOCK as usize];
    match mapping {
        Mapping::Data => delta.read(&mut buf, block * BLOCK).unwrap(),
        Mapping::Zero => {}
        Mapping::Base => return 0xba,
    }
    assert!(buf.iter().all(|b| *b == buf[0]), "block {block} is torn");
    buf[0]
}

#[test]
fn a_panic_in_a_flush_leaves_its_words_to_the_next_and_no_caller_hangs() {
    for (call, name) in [
        (Call::SyncData, ".data"),
        (Call::SyncData, ".map"),
        (Call::Write, ".map"),
        (Call::Create, ".map"),
        (Call::SyncDir, "deltas"),
    ] {
        let rig = Rig::new();
        let delta = rig.open();
        put(&delta, 3, 7);
        let joined: Arc<Mutex<Option<Result<(), DeltaError>>>> = Arc::default();
        let waits = Arc::new(AtomicU64::new(0));
        let joiner: Arc<Mutex<Option<std::thread::JoinHandle<()>>>> = Arc::default();
        {
            let (delta, joined, waits, joiner) =
                (delta.clone(), joined.clone(), waits.clone(), joiner.clone());
            rig.once(call, name, Stage::Before, move || {
                let (delta, joined, begun) = (delta.clone(), joined.clone(), waits.clone());
                *joiner.lock() = Some(std::thread::spawn(move || {
                    begun.store(1, Ordering::Release);
                    let result = delta.flush();
                    *joined.lock() = Some(result);
                }));
                while waits.load(Ordering::Acquire) == 0 {
                    std::thread::yield_now();
                }
                panic!("the medium panics");
            });
        }
        let panicked = catch_unwind(AssertUnwindSafe(|| delta.flush()));
        assert!(panicked.is_err(), "{call:?} {name}");
        // A waiting flush ends, whether the panicking flush served it or it leads the next one.
        joiner.lock().take().unwrap().join().unwrap();
        assert!(joined.lock().is_some());
        rig.medium.set_hook(None);
        delta.flush().unwrap();
        let (_after, delta) = rig.cut(NOTHING);
        assert_eq!(byte(&delta, 3), 7, "{call:?} {name}");
    }
}

#[test]
fn a_panic_in_a_shrink_does_not_cut_what_is_written_later() {
    let rig = Rig::new();
    let delta = rig.open();
    put(&delta, 9, 1);
    delta.flush().unwrap();
    rig.once(Call::SyncData, ".map", Stage::Before, || panic!("the medium panics"));
    assert!(catch_unwind(AssertUnwindSafe(|| delta.resize(4096, Durability::Now))).is_err());
    rig.medium.set_hook(None);
    assert_eq!(delta.size(), 65_536);
    put(&delta, 10, 2);
    // The worker dies, and the next one takes over the live map.
    drop(delta);
    let delta = rig.open();
    assert_eq!((delta.size(), byte(&delta, 9), byte(&delta, 10)), (65_536, 1, 2));
}

/// Guards D12.
#[test]
fn blocks_that_a_failed_sync_lost_are_written_again_before_they_are_claimed() {
    for seed in 0..20 {
        let rig = Rig { medium: SimMedium::new(seed), overlap: 65_536, ..Rig::new() };
        rig.medium.make_dir("deltas").unwrap();
        rig.medium.sync_dir(".").unwrap();
        let delta = rig.open();
        (0..8).for_each(|block| put(&delta, block, 5));
        rig.fail(Call::SyncData, ".data", libc::EIO);
        delta.flush().unwrap_err();
        assert_eq!(delta.error_epoch(), 1);
        // All ways to the next record.
        match seed % 3 {
            0 => delta.flush().unwrap(),
            1 => delta.resize(40_960, Durability::Now).unwrap(),
            _ => delta.resize(70_000, Durability::Now).unwrap(),
        }
        let (_after, delta) = rig.cut(NOTHING);
        (0..8).for_each(|block| assert_eq!(byte(&delta, block), 5, "seed {seed} block {block}"));
    }
}

#[test]
fn a_joined_flush_reports_the_failure_of_the_one_that_served_it() {
    let rig = Rig::new();
    let delta = rig.open();
    put(&delta, 0, 1);
    let results: Arc<Mutex<Vec<bool>>> = Arc::default();
    let begun = Arc::new(AtomicU64::new(0));
    let threads: Arc<Mutex<Vec<std::thread::JoinHandle<()>>>> = Arc::default();
    {
        let (delta, results, begun, threads) =
            (delta.clone(), results.clone(), begun.clone(), threads.clone());
        rig.once(Call::SyncData, ".data", Stage::Before, move || {
            for _ in 0..4 {
                let (delta, results, begun) = (delta.clone(), results.clone(), begun.clone());
                threads.lock().push(std::thread::spawn(move || {
                    begun.fetch_add(1, Ordering::AcqRel);
                    let result = delta.flush();
                    results.lock().push(result.is_ok());
                }));
            }
            while begun.load(Ordering::Acquire) < 4 {
                std::thread::yield_now();
            }
        });
    }
    rig.fail(Call::SyncData, ".data", libc::EIO);
    assert!(delta.flush().is_err());
    for thread in threads.lock().drain(..) {
        thread.join().unwrap();
    }
    // Each flush ran after the failure. Its sync may prove nothing, so it reports an error.
    assert_eq!(results.lock().len(), 4);
    assert_eq!(delta.error_epoch(), 1, "earlier handles are refused");
}

#[test]
fn a_write_during_the_sync_of_a_flush_is_synced_by_the_next() {
    for stage in [Stage::Before, Stage::After] {
        let rig = Rig::new();
        let delta = rig.open();
        put(&delta, 0, 1);
        {
            let delta = delta.clone();
            rig.once(Call::SyncData, ".data", stage, move || put(&delta, 1, 2));
        }
        delta.flush().unwrap();
        delta.flush().unwrap();
        let (_after, cut) = rig.cut(NOTHING);
        assert_eq!((byte(&cut, 0), byte(&cut, 1)), (1, 2), "{stage:?}");
    }
}

#[test]
fn a_map_file_is_not_appended_to_when_its_replacement_may_be_durable() {
    // The record is in place, but the call that wrote it fails.
    struct Fails(Roots, AtomicBool);
    impl RootStore for Fails {
        fn commit(&self, root: MapRoot, modified_ns: i64) -> io::Result<()> {
            self.0.commit(root, modified_ns)?;
            if self.1.swap(false, Ordering::AcqRel) {
                return Err(io::Error::from_raw_os_error(libc::EIO));
            }
            Ok(())
        }
    }
    let rig = Rig::new();
    let roots = Arc::new(Fails(Roots::default(), AtomicBool::new(false)));
    let delta_io =
        DeltaIo { medium: Arc::new(rig.medium.clone()), live: rig.live.clone(), roots: roots.clone() };
    let spec = DeltaSpec {
        disk: 1,
        size: 65_536,
        overlap: 0,
        rises: false,
        modified_ns: 0,
        root: MapRoot::default(),
    };
    let _small = crate::mutant::simulate(None);
    let delta = Delta::open(spec, delta_io).unwrap();
    // Until the file is large enough for the next flush to replace it.
    let mut round = 0;
    while roots.0.0.lock().generation < 2 {
        roots.1.store(roots.0.0.lock().generation == 1, Ordering::Release);
        round += 1;
        put(&delta, round % 16, round as u8);
        let _ = delta.flush();
    }
    delta.resize(8192, Durability::Now).unwrap();
    *rig.roots.0.lock() = *roots.0.0.lock();
    let (_after, cut) = rig.cut(NOTHING);
    assert_eq!(cut.size(), 8192);
}

#[test]
fn a_resize_that_is_sent_again_is_durable_when_it_returns() {
    // The worker dies between the size in memory and the record, and between the record and its sync.
    for (call, stage) in [(Call::Write, Stage::Before), (Call::SyncData, Stage::Before)] {
        let rig = Rig::new();
        let delta = rig.open();
        put(&delta, 0, 1);
        delta.flush().unwrap();
        rig.once(call, ".map", stage, || panic!("the worker dies"));
        // Copies what the dead worker left, before its guards run.
        let left: Arc<Mutex<Option<(SimMedium, SimLive)>>> = Arc::default();
        {
            let (left, medium, live) = (left.clone(), rig.medium.clone(), rig.live.clone());
            rig.once(call, ".map", stage, move || {
                *left.lock() = Some((medium.fork(), live.fork().unwrap()));
            });
        }
        delta.resize(100_000, Durability::Now).unwrap();
        let (medium, live) = left.lock().take().unwrap();
        let next = Rig { medium, live: Arc::new(live), roots: rig.roots.clone(), overlap: 0, rises: false };
        let delta = next.open();
        delta.resize(100_000, Durability::Now).unwrap();
        delta.flush().unwrap();
        let (_after, cut) = next.cut(NOTHING);
        assert_eq!(cut.size(), 100_000, "{call:?}");
    }
}

#[test]
fn a_power_cut_before_a_flush_leaves_flushed_blocks_old_or_new_and_others_unmapped() {
    for keep in [ALL, NOTHING] {
        let rig = Rig::new();
        let delta = rig.open();
        (0..4).for_each(|block| put(&delta, block, 1));
        delta.flush().unwrap();
        (0..8).for_each(|block| put(&delta, block, 2));
        let (_after, cut) = rig.cut(keep);
        for block in 0..8 {
            let allowed: &[u8] = if block < 4 { &[1, 2] } else { &[0] };
            assert!(allowed.contains(&byte(&cut, block)), "block {block}");
        }
    }
}

#[test]
fn zeroing_up_to_the_end_does_nothing_after_the_disk_has_grown() {
    let rig = Rig::new();
    let delta = rig.open();
    delta.resize(6000, Durability::Now).unwrap();
    delta.write(5000, &[1; 100], &Edges::default()).unwrap();
    // The caller assumes that the disk ends at 6000. Since then it has grown within its last block.
    delta.write(6000, &[9; 1000], &Edges::default()).unwrap();
    assert!(!delta.zero_to_end(1, 6000).unwrap());
    let mut buf = [0; 1000];
    delta.read(&mut buf, 6000).unwrap();
    assert_eq!(buf, [9; 1000]);
    assert!(delta.zero_to_end(1, 7000).unwrap());
    assert!(delta.is_zero(1));
}

#[test]
fn a_block_in_which_the_disk_ended_is_not_torn_when_it_is_overwritten_after_growth() {
    for written_to in [9000, 65_536] {
        let rig = Rig::new();
        let delta = rig.open();
        if written_to == 9000 {
            delta.resize(9000, Durability::Now).unwrap();
        }
        delta.write(8192, &vec![1; written_to - 8192], &Edges::default()).unwrap();
        delta.resize(9000, Durability::Now).unwrap();
        delta.flush().unwrap();
        delta.resize(65_536, Durability::Now).unwrap();
        put(&delta, 2, 2);
        let (_after, cut) = rig.cut(Keep { lengths: 0, ..ALL });
        let mut buf = [9; BLOCK as usize];
        cut.read(&mut buf, 8192).unwrap();
        let old = |n: usize| u8::from(n < 9000 - 8192);
        assert!(
            buf.iter().all(|b| *b == 2) || buf.iter().enumerate().all(|(n, b)| *b == old(n)),
            "torn: {} and {}",
            buf[0],
            buf[4095]
        );
    }
}

#[test]
fn a_failed_resize_does_not_take_effect_although_its_record_lacks_only_zeros() {
    let rig = Rig::new();
    let delta = rig.open();
    put(&delta, 0, 1);
    delta.flush().unwrap();
    // An earlier record leaves zeros behind it, and the last eight bytes of a record without runs are zeros too.
    delta.resize(70_000, Durability::Now).unwrap();
    rig.fail(Call::Write, "1.1.map", libc::EIO);
    delta.resize(80_000, Durability::Now).unwrap_err();
    assert_eq!(delta.size(), 70_000);
    delta.flush().unwrap();
    assert_eq!(rig.roots.0.lock().generation, 2, "a new file, without the partial record");
    let (_after, cut) = rig.cut(ALL);
    assert_eq!(cut.size(), 70_000);
}

#[test]
fn a_shrink_after_growth_that_was_not_flushed_shows_no_old_bytes() {
    let rig = Rig::new();
    let delta = rig.open();
    put(&delta, 1, 7);
    delta.flush().unwrap();
    // The cut of the data file is in flight.
    delta.resize(4496, Durability::Now).unwrap();
    put(&delta, 8, 1);
    delta.resize(9000, Durability::Now).unwrap();
    let (_after, cut) = rig.cut(NOTHING);
    assert_eq!(cut.size(), 9000);
    let mut buf = [9; BLOCK as usize];
    cut.read(&mut buf, 4096).unwrap();
    assert!(buf[..400].iter().all(|b| *b == 7) && buf[400..].iter().all(|b| *b == 0));
}

// A write that failed halfway changed blocks that readers saw from then on. The next flush did not sync them: after a
// power cut the old blocks were back.
#[test]
fn a_flush_makes_the_visible_part_of_a_failed_write_durable() {
    for sync_fails in [false, true] {
        let rig = Rig::new();
        let delta = rig.open();
        (0..8).for_each(|block| put(&delta, block, 1));
        delta.flush().unwrap();
        let mut changed = 0;
        for n in 2..20 {
            rig.fail(Call::Write, ".data", libc::EIO);
            delta.write(0, &[n; 8 * BLOCK as usize], &Edges::default()).unwrap_err();
            if sync_fails {
                rig.fail(Call::SyncData, ".data", libc::EIO);
                let _ = delta.flush();
                // A flush that carried the blocks synced no data file.
                rig.medium.forget_faults();
            }
            delta.flush().unwrap();
            let read: Vec<u8> = (0..8).map(|block| byte(&delta, block)).collect();
            changed += read.iter().filter(|byte| **byte == n).count();
            let (_after, cut) = rig.cut(NOTHING);
            let found: Vec<u8> = (0..8).map(|block| byte(&cut, block)).collect();
            assert_eq!(found, read, "write {n}, {sync_fails}");
        }
        assert!(changed > 5, "the medium writes nothing of a write that fails");
    }
}

/// Guards D8.
#[test]
fn a_block_is_data_only_after_its_bytes_are_written() {
    for stage in [Stage::Before, Stage::After] {
        let rig = Rig { overlap: 65_536, ..Rig::new() };
        let delta = rig.open();
        let seen = Arc::new(AtomicU64::new(0));
        let (other, count) = (delta.clone(), seen.clone());
        rig.once(Call::Write, ".data", stage, move || {
            count.store(u64::from(byte(&other, 3)), Ordering::Release);
        });
        put(&delta, 3, 7);
        assert_eq!((seen.load(Ordering::Acquire), byte(&delta, 3)), (0xba, 7), "{stage:?}");
    }
}

/// Guards D5.
#[test]
fn a_lookup_before_a_change_reads_the_old_or_the_new_content() {
    type Change = fn(&Delta);
    let changes: [(u8, Change); 3] = [
        (2, |delta| put(delta, 3, 2)),
        (0, |delta| delta.zero_blocks(3, 4).unwrap()),
        (0, |delta| {
            delta.resize(0, Durability::Now).unwrap();
            delta.resize(65_536, Durability::Now).unwrap();
        }),
    ];
    for (after, change) in changes {
        let rig = Rig { overlap: 65_536, ..Rig::new() };
        let delta = rig.open();
        put(&delta, 3, 1);
        let other = delta.clone();
        rig.once(Call::Read, ".data", Stage::Before, move || change(&other));
        let found = byte(&delta, 3);
        assert!([1, after].contains(&found), "{found}");
        rig.medium.set_hook(None);
        assert_eq!(byte(&delta, 3), after);
    }
}

/// Guards D11.
#[test]
fn a_write_that_needs_the_base_fails_with_need_base_and_holds_no_lock() {
    let rig = Rig { overlap: 65_536, ..Rig::new() };
    let delta = rig.open();
    let refused = delta.write(100, &[1; 10], &Edges::default());
    assert!(matches!(refused, Err(DeltaError::NeedBase)), "{refused:?}");
    assert_eq!(byte(&delta, 0), 0xba);
    // Other writes of this block, and of all blocks, need not wait.
    put(&delta, 0, 2);
    delta.resize(8192, Durability::Now).unwrap();
    assert_eq!(byte(&delta, 0), 2);
}

/// Guards D13.
#[test]
fn a_word_that_has_changed_is_dirty() {
    const WORDS: u64 = 50_000;
    let delta = Rig::new().open();
    let map = &delta.map;
    map.prepare(0, WORDS * 32, MapUse::Write).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| (0..WORDS).for_each(|word| map.set(word * 32, word * 32 + 1, State::Data)));
        for word in 0..WORDS {
            while map.state(word * 32) != State::Data {
                std::hint::spin_loop();
            }
            let (page, word) = (map.live().page(word / 496).unwrap(), (word % 496) as usize);
            assert!(page[word / 64].load(Ordering::Acquire) >> (word % 64) & 1 == 1, "word {word}");
        }
    });
}
