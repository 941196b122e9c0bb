//! Requests that wait for their turn (D85). A limit of one request a second, with the smallest burst, lets the first one
//! pass and holds the others for longer than any test takes to look.

use std::sync::mpsc::TryRecvError;

use super::*;
use crate::format::limits::{Limits as DiskLimits, Rates};

fn slow() -> DiskLimits {
    let iops = Rates { all: Some(1), ..Rates::default() };
    DiskLimits { iops, burst_ms: Some(1), ..DiskLimits::default() }
}

impl Fixture {
    fn limit(&self, n: usize, limits: DiskLimits) {
        let node = self.service.store().disk_by_id(self.disks[n]).unwrap();
        node.change_limits(|now| *now = limits).unwrap();
        self.service.limits_changed(node.id());
    }

    /// Puts the disk in debt for an hour, so that no other request passes.
    fn exhaust(&self, n: usize) {
        self.limit(n, slow());
        let pace = &self.service.store().disk_by_id(self.disks[n]).unwrap();
        for _ in 0..3600 {
            let _ = pace.limiter().pace.enter(crate::limits::Cost::Read(0), crate::limits::now, || None);
        }
    }

    fn throttled(&self) -> usize {
        self.service.waiters().throttled
    }
}

/// Guards D85.
#[test]
fn requests_that_wait_hold_no_thread_and_other_disks_go_on() {
    let fixture = Fixture::new();
    fixture.server.sends();
    fixture.exhaust(BLANK);
    let writes: Vec<_> = (0..64).map(|n| fixture.write(BLANK, n * 4096, &[1; 4096])).collect();
    let reads: Vec<_> =
        (0..64).map(|_| fixture.read(fixture.any_call(), fixture.disk(BLANK), 0, 4096)).collect();
    assert_eq!(fixture.throttled(), 128);
    assert_eq!(fixture.service.waiters().throttled_bytes, 64 * 4096);
    assert_eq!(fixture.service.waiters().requests, 0, "they wait for no base");
    for n in 0..50 {
        assert_eq!(done(&fixture.write(0, n * 4096, &[2; 4096])), Ok(()));
        assert_eq!(
            done(&fixture.read(fixture.any_call(), fixture.disk(1), 0, 4096)).map(|b| b.len()),
            Ok(4096)
        );
    }
    assert_eq!(done(&fixture.flush(BLANK)), Ok(()), "a flush is not limited");
    assert_eq!(fixture.throttled(), 128);
    assert!(writes.iter().all(|write| write.try_recv() == Err(TryRecvError::Empty)));
    // Without the limit all of them go, and have their bytes.
    fixture.limit(BLANK, DiskLimits::default());
    writes.iter().for_each(|write| assert_eq!(done(write), Ok(())));
    reads.iter().for_each(|read| assert_eq!(done(read).map(|bytes| bytes.len()), Ok(4096)));
    assert_eq!(fixture.throttled(), 0);
    let read = done(&fixture.read(fixture.any_call(), fixture.disk(BLANK), 63 * 4096, 4096));
    assert_eq!(read, Ok(vec![1; 4096]));
}

/// Guards D85.
#[test]
fn a_signal_ends_a_request_that_waits_for_its_turn() {
    let fixture = Fixture::new();
    fixture.exhaust(BLANK);
    let (read, write) = (call(1), call(2));
    let reading = fixture.read(read, fixture.disk(BLANK), 0, 4096);
    let (sender, writing) = channel();
    let request = WriteRequest { offset: 0, handle: Handle::new(0), durable: false };
    let answer = move |done: Result<(), Errno>| _ = sender.send(done.map_err(i32::from));
    fixture.service.write(write, fixture.disks[BLANK], request, &[1; 4096], answer);
    assert_eq!(fixture.throttled(), 2);
    fixture.service.interrupt(read.request);
    fixture.service.interrupt(write.request);
    assert_eq!(done(&reading), Err(libc::EINTR));
    assert_eq!(done(&writing), Err(libc::EINTR));
    assert_eq!(fixture.throttled(), 0);
    let pace = &fixture.service.store().disk_by_id(fixture.disks[BLANK]).unwrap();
    assert_eq!(pace.limiter().pace.waiting(), 0);
}

#[test]
fn at_most_the_rate_and_the_burst_pass_in_a_time() {
    let fixture = Fixture::new();
    let iops = Rates { write: Some(200), ..Rates::default() };
    fixture.limit(BLANK, DiskLimits { iops, burst_ms: Some(100), ..DiskLimits::default() });
    let began = std::time::Instant::now();
    let writes: Vec<_> = (0..100).map(|_| fixture.write(BLANK, 0, &[1; 4096])).collect();
    writes.iter().for_each(|write| assert_eq!(done(write), Ok(())));
    // 21 pass at once; a loaded machine only takes longer.
    assert!(began.elapsed() > Duration::from_millis(79 * 5 - 20), "{:?}", began.elapsed());
    let reads: Vec<_> =
        (0..100).map(|_| fixture.read(fixture.any_call(), fixture.disk(BLANK), 0, 4096)).collect();
    reads.iter().for_each(|read| assert!(done(read).is_ok()));
    let node = fixture.service.store().disk_by_id(fixture.disks[BLANK]).unwrap();
    let sums = node.counters().sums();
    assert!((70..=100).contains(&sums.throttled), "{}", sums.throttled);
    assert!(sums.throttled_ns > 0);
}

#[test]
fn a_discard_counts_as_one_request_and_a_worker_that_pauses_lets_all_pass() {
    let fixture = Fixture::new();
    fixture.exhaust(BLANK);
    let (sender, discarded) = channel();
    let answer = move |done: Result<(), Errno>| _ = sender.send(done.map_err(i32::from));
    let disk = fixture.disks[BLANK];
    fixture.service.allocate(
        fixture.any_call(),
        disk,
        SpaceChange::Discard,
        (0, 1 << 20),
        Handle::new(0),
        answer,
    );
    assert_eq!(fixture.throttled(), 1);
    fixture.service.set_all_pass(true);
    assert_eq!(done(&discarded), Ok(()));
    assert_eq!(done(&fixture.write(BLANK, 0, &[1; 4096])), Ok(()), "later ones pass, too");
    fixture.service.set_all_pass(false);
    let waits = fixture.write(BLANK, 0, &[1; 4096]);
    assert_eq!(fixture.throttled(), 1);
    fixture.limit(BLANK, DiskLimits::default());
    assert_eq!(done(&waits), Ok(()));
}

/// Guards D85.
#[test]
fn a_request_that_finds_no_place_to_wait_is_not_refused() {
    let limits = Limits { requests: 8, of_disk: 2, bytes: 1 << 20, bytes_of_disk: 1 << 20, floor: 2 };
    let fixture = Fixture::with_limits(limits);
    fixture.exhaust(BLANK);
    let waiting: Vec<_> = (0..2).map(|_| fixture.write(BLANK, 0, &[1; 4096])).collect();
    assert_eq!(done(&fixture.write(BLANK, 0, &[2; 4096])), Ok(()));
    assert_eq!((fixture.throttled(), fixture.service.waiters().refused), (2, 0));
    // Those that wait for a base have room of their own.
    let read = fixture.read(fixture.any_call(), fixture.disk(0), 0, 4096);
    assert_eq!(read.try_recv(), Err(TryRecvError::Empty));
    fixture.server.sends();
    assert!(done(&read).is_ok());
    fixture.limit(BLANK, DiskLimits::default());
    waiting.iter().for_each(|write| assert_eq!(done(write), Ok(())));
}
