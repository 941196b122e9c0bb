//! What requests leave in the counters of their disk and base.

use super::*;
use crate::stats::{Operation, OperationSums, Origin, Sums};

impl Fixture {
    fn sums(&self, n: usize) -> Sums {
        self.service.store().disk_by_id(self.disks[n]).unwrap().counters().sums()
    }

    fn base_sums(&self) -> Sums {
        self.service.store().base_by_id(self.base).unwrap().counters().sums()
    }

    fn allocate(&self, n: usize, what: SpaceChange, range: (u64, u64)) -> Result<(), i32> {
        let (sender, answered) = channel();
        let answer = move |done: Result<(), Errno>| _ = sender.send(done.map_err(i32::from));
        self.service.allocate(self.any_call(), self.disks[n], what, range, Handle::new(0), answer);
        done(&answered)
    }
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = std::time::Instant::now() + SOON;
    while !holds() {
        assert!(std::time::Instant::now() < end, "{what}");
        std::thread::yield_now();
    }
}

/// Count, bytes, errors, interrupted.
fn short(sums: &OperationSums) -> (u64, u64, u64, u64) {
    (sums.count(), sums.bytes, sums.errors, sums.interrupted)
}

/// The bytes of reads by origin: delta, zero, memory, disk, fetched.
fn origins(sums: &Sums) -> [u64; 5] {
    Origin::ALL.map(|origin| sums.origin(origin).bytes)
}

#[test]
fn each_kind_of_request_counts_with_its_bytes() {
    let fixture = Fixture::new();
    fixture.server.sends();
    let of = |operation| short(fixture.sums(BLANK).operation(operation));
    assert_eq!(done(&fixture.write(BLANK, 0, &[1; 8192])), Ok(()));
    assert_eq!(done(&fixture.write(BLANK, 100, &[1; 10])), Ok(()));
    assert_eq!(of(Operation::Write), (2, 8202, 0, 0));
    assert_eq!(done(&fixture.flush(BLANK)), Ok(()));
    assert_eq!(of(Operation::Flush), (1, 0, 0, 0));
    assert_eq!(fixture.allocate(BLANK, SpaceChange::Discard, (0, 4096)), Ok(()));
    // Only the bytes that the disk has: a length may be any number.
    assert_eq!(fixture.allocate(BLANK, SpaceChange::Discard, (SIZE as u64 - 10, u64::MAX / 2)), Ok(()));
    assert_eq!(of(Operation::Discard), (2, 4106, 0, 0));
    assert_eq!(fixture.allocate(BLANK, SpaceChange::Zero(Grow::No), (4096, 4096)), Ok(()));
    assert_eq!(of(Operation::Zero), (1, 4096, 0, 0));
    assert_eq!(fixture.allocate(BLANK, SpaceChange::Reserve(Grow::No), (0, 8192)), Ok(()));
    assert_eq!(of(Operation::Reserve), (1, 8192, 0, 0));
    assert_eq!(done(&fixture.write_with(Handle::new(5), BLANK, 0, b"refused")), Err(libc::EIO));
    assert_eq!(of(Operation::Write), (3, 8202, 1, 0));
    let (sender, answered) = channel();
    let answer = move |found: Result<Option<u64>, Errno>| _ = sender.send(found.map_err(i32::from));
    fixture.service.seek(fixture.any_call(), fixture.disk(BLANK), 0, Seek::Data, answer);
    assert!(done(&answered).is_ok());
    assert_eq!(of(Operation::Seek), (1, 0, 0, 0));
    assert_eq!(of(Operation::Read), (0, 0, 0, 0));
    // The other disks have none of it.
    assert_eq!(fixture.sums(1), Sums::default());
    let all = fixture.service.store().disk_stats().totals().0;
    assert_eq!(all.operation(Operation::Write).bytes, 8202);
}

/// Guards D67.
#[test]
fn the_bytes_of_reads_are_the_sum_of_their_origins_and_a_read_that_runs_again_counts_once() {
    let fixture = Fixture::new();
    // A whole block: the write needs nothing of the base.
    assert_eq!(done(&fixture.write(0, 4096, &[7; 4096])), Ok(()));
    let waiting = fixture.read(fixture.any_call(), fixture.disk(0), 0, 3 * 4096);
    fixture.until_asked();
    waits(&waiting);
    assert_eq!(origins(&fixture.sums(0)), [0; 5], "it is not answered yet");
    fixture.server.sends();
    assert!(done(&waiting).is_ok());
    // When the first of the two blocks comes alone, the read runs again, and finds it in memory after that.
    let [delta, zero, memory, disk, fetched] = origins(&fixture.sums(0));
    assert_eq!((delta, zero, disk, memory + fetched), (4096, 0, 0, 2 * 4096));
    assert!(fetched >= 4096, "{fetched}");
    // From memory now, with a part that was zeroed, up to the end of the disk.
    assert_eq!(fixture.allocate(0, SpaceChange::Discard, (0, 4096)), Ok(()));
    assert!(done(&fixture.read(fixture.any_call(), fixture.disk(0), 0, 3 * 4096)).is_ok());
    assert_eq!(origins(&fixture.sums(0)), [8192, 4096, memory + 4096, 0, fetched]);
    let end = done(&fixture.read(fixture.any_call(), fixture.disk(0), SIZE as u64 - 100, 4096));
    assert_eq!(end.map(|bytes| bytes.len()), Ok(100));
    let sums = fixture.sums(0);
    let read = sums.operation(Operation::Read);
    assert_eq!((read.count(), read.bytes, read.errors), (3, 6 * 4096 + 100, 0));
    assert_eq!(origins(&sums).iter().sum::<u64>(), read.bytes);
    assert!(sums.waits >= 1 && sums.waited_ns > 0);
    // Its base knows that its disks waited, and has no reads of its own.
    let base = fixture.base_sums();
    assert!(base.waits >= sums.waits);
    assert_eq!(base.operation(Operation::Read).count(), 0);
    let direct = fixture.read(fixture.any_call(), Target::Base(fixture.base), SIZE as u64 - 10, 100);
    assert_eq!(done(&direct).map(|bytes| bytes.len()), Ok(10));
    let base = fixture.base_sums();
    assert_eq!(short(base.operation(Operation::Read)), (1, 10, 0, 0));
    assert_eq!(origins(&base).iter().sum::<u64>(), 10);
}

#[test]
fn the_latency_of_a_request_includes_its_waiting() {
    const WAIT: Duration = Duration::from_millis(20);
    let fixture = Fixture::new();
    let waiting = fixture.read(fixture.any_call(), fixture.disk(0), 0, 4096);
    fixture.until_asked();
    fixture.until_waiting(1);
    std::thread::sleep(WAIT);
    fixture.server.sends();
    assert!(done(&waiting).is_ok());
    let sums = fixture.sums(0);
    let read = sums.operation(Operation::Read);
    assert!(read.latency_ns >= WAIT.as_nanos() as u64, "{read:?}");
    assert_eq!(read.latency[..14].iter().sum::<u64>(), 0, "not faster than 16 ms: {read:?}");
    assert!(sums.waited_ns >= WAIT.as_nanos() as u64);
}

#[test]
fn interrupted_and_refused_requests_count_apart_from_errors() {
    let limits = Limits { requests: 10, of_disk: 1, bytes: 1 << 20, bytes_of_disk: 1 << 20, floor: 1 };
    let fixture = Fixture::with_limits(limits);
    let interrupted = fixture.read(call(200), fixture.disk(0), 0, 4096);
    fixture.until_asked();
    fixture.until_waiting(1);
    assert_eq!(done(&fixture.read(call(201), fixture.disk(0), 0, 4096)), Err(libc::EIO));
    fixture.service.interrupt(call(200).request);
    assert_eq!(done(&interrupted), Err(libc::EINTR));
    let sums = fixture.sums(0);
    assert_eq!(short(sums.operation(Operation::Read)), (2, 0, 1, 1));
    assert_eq!(sums.refused, 1);
    assert_eq!(origins(&sums), [0; 5]);
}

/// Guards D68.
#[test]
fn a_disk_that_is_detached_keeps_its_counters_and_a_removed_one_leaves_its_sums() {
    let fixture = Fixture::new();
    fixture.service.add_frontend(Openers::new(false));
    let store = fixture.service.store();
    assert_eq!(done(&fixture.write(BLANK, 0, &[1; 4096])), Ok(()));
    eventually("the disk is detached", || {
        store.detach_idle(Duration::ZERO, Duration::ZERO);
        store.disk_by_id(fixture.disks[BLANK]).unwrap().peek().is_none()
    });
    assert_eq!(fixture.sums(BLANK).operation(Operation::Write).bytes, 4096);
    let of_all = || store.disk_stats().totals().0.operation(Operation::Write).bytes;
    let known = || store.disk_stats().all().iter().any(|counted| counted.id == fixture.disks[BLANK]);
    assert!(known());
    fixture.unlink_blank();
    assert!(!fixture.is_kept(fixture.disks[BLANK]));
    eventually("the last request lets go of the disk", || !known());
    assert_eq!(of_all(), 4096);
}
