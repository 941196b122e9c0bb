//! What is remembered of copies, and for how long.

use std::sync::Arc;
use std::sync::mpsc::channel;

use super::*;

const SOURCE: u64 = 5;
const SIZE: u64 = 8 << 20;
const PART: u64 = 1 << 20;

fn request(from: u64) -> CopyRequest {
    let handle = Handle::new(0);
    CopyRequest { source: Target::Disk(SOURCE), from, to: 6, at: from, len: PART, is_cut: true, handle }
}

fn sharing() -> Sharing {
    Sharing { ground: crate::disk::Ground::default(), size: SIZE, overlap: SIZE }
}

/// Copies of which thread 1 has begun one.
fn begun() -> Copies {
    let copies = Copies::default();
    copies.note(1, &request(0), PART, Some(sharing()));
    assert!(copies.has_any() && copies.earlier(1, &request(PART)).is_some());
    copies
}

#[test]
fn a_write_after_all_copies_were_forgotten_takes_no_lock_of_the_copies() {
    let copies = Arc::new(begun());
    copies.changes(77, 2);
    assert!(copies.has_any(), "a change of another disk ends no copy");
    copies.runs.lock()[0].last -= PATIENCE;
    copies.changes(77, 2);
    assert!(!copies.has_any());
    let held = copies.runs.lock();
    let (sender, changed) = channel();
    let others = copies.clone();
    let thread = std::thread::spawn(move || {
        others.changes(SOURCE, 0);
        let _ = sender.send(());
    });
    let changed = changed.recv_timeout(Duration::from_secs(30));
    drop(held);
    thread.join().unwrap();
    assert_eq!(changed, Ok(()));
}

#[test]
fn a_copy_that_reached_the_end_of_its_source_is_forgotten() {
    let copies = begun();
    copies.note(1, &request(SIZE - PART), SIZE, Some(sharing()));
    assert!(!copies.has_any());
}

#[test]
fn a_call_behind_the_end_of_the_source_ends_the_copy() {
    let copies = begun();
    // It found nothing to copy.
    copies.note(1, &request(PART), PART, None);
    assert!(!copies.has_any() && copies.earlier(1, &request(PART)).is_none());
}

#[test]
fn a_change_of_the_source_by_the_thread_itself_ends_the_copy_and_by_others_does_not() {
    let copies = begun();
    copies.changes(SOURCE, 2);
    assert!(copies.earlier(1, &request(PART)).is_some());
    copies.changes(SOURCE, 1);
    assert!(copies.earlier(1, &request(PART)).is_none());
}
