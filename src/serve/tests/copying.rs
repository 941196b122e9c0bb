//! Copies of several requests.

use super::*;
use crate::serve::copy::CopyRequest;

const MIB: u64 = 1 << 20;

impl Fixture {
    /// A copy at the same offset, which the frontend has cut, by thread 1.
    fn copy(&self, from: u64, to: u64, at: u64, len: u64) -> Result<u64, i32> {
        let (sender, answered) = channel();
        let handle = Handle::new(0);
        let request = CopyRequest { source: Target::Disk(from), from: at, to, at, len, is_cut: true, handle };
        let call = Call { thread: 1, ..self.any_call() };
        self.service.copy(call, request, move |done: Result<u64, Errno>| {
            let _ = sender.send(done.map_err(i32::from));
        });
        done(&answered)
    }

    /// Writes by another thread, as a guest does.
    fn put(&self, disk: u64, offset: u64, data: &[u8]) {
        let (sender, answered) = channel();
        let written = WriteRequest { offset, handle: Handle::new(0), durable: false };
        let answer = move |done: Result<(), Errno>| _ = sender.send(done.map_err(i32::from));
        let call = Call { thread: 2, ..self.any_call() };
        self.service.write(call, disk, written, data, answer);
        assert_eq!(done(&answered), Ok(()));
    }

    fn bytes_of(&self, disk: u64, offset: u64, len: usize) -> Vec<u8> {
        done(&self.read(self.any_call(), Target::Disk(disk), offset, len)).unwrap()
    }

    fn blank_disk(&self, unique: u64, name: &str) -> u64 {
        done(&self.create(requester(unique, false), name)).unwrap()
    }
}

#[test]
fn a_copy_from_the_end_of_a_source_that_grew_copies_what_was_appended() {
    let fixture = Fixture::new();
    let source = fixture.blank_disk(1, "source");
    fixture.put(source, 0, &vec![1; MIB as usize]);
    let to = fixture.blank_disk(2, "to");
    assert_eq!(fixture.copy(source, to, 0, 4 * MIB), Ok(MIB));
    fixture.put(source, MIB, &vec![2; 8192]);
    assert_eq!(fixture.copy(source, to, MIB, 4 * MIB), Ok(8192));
    assert_eq!(fixture.bytes_of(to, MIB - 1, 3), [1, 2, 2]);
    assert_eq!(fixture.copy(source, to, MIB + 8192, 4 * MIB), Ok(0));
}

#[test]
fn a_copy_that_was_told_the_end_finds_what_was_appended_since() {
    let fixture = Fixture::new();
    let source = fixture.blank_disk(1, "source");
    fixture.put(source, 0, &vec![1; MIB as usize]);
    let to = fixture.blank_disk(2, "to");
    assert_eq!(fixture.copy(source, to, 0, MIB / 2), Ok(MIB / 2));
    fixture.put(source, 4 * MIB, &vec![2; 8192]);
    // The thread looks for data, and finds it behind the end that the source had at first.
    let call = || Call { thread: 1, ..fixture.any_call() };
    for (what, from, found) in [(Seek::Data, MIB, 4 * MIB), (Seek::Hole, 4 * MIB, 4 * MIB + 8192)] {
        let (sender, answered) = channel();
        fixture.service.seek(call(), Target::Disk(source), from, what, move |at: Result<_, Errno>| {
            let _ = sender.send(at.map_err(i32::from));
        });
        assert_eq!(done(&answered), Ok(Some(found)));
    }
    assert_eq!(fixture.copy(source, to, 4 * MIB, 8192), Ok(0), "as of the first call");
    assert_eq!(fixture.copy(source, to, 4 * MIB, 8192), Ok(8192), "another copy");
    assert_eq!(fixture.bytes_of(to, 4 * MIB, 2), [2, 2]);
}

#[test]
fn the_rest_of_a_copy_has_the_bytes_of_its_first_call() {
    let fixture = Fixture::new();
    let source = fixture.blank_disk(1, "source");
    fixture.put(source, 0, &vec![1; 4 * MIB as usize]);
    let to = fixture.blank_disk(2, "to");
    assert_eq!(fixture.copy(source, to, 0, MIB), Ok(MIB));
    fixture.put(source, 2 * MIB, &vec![2; MIB as usize]);
    assert_eq!(fixture.copy(source, to, MIB, 8 * MIB), Ok(3 * MIB));
    assert_eq!(fixture.bytes_of(to, 2 * MIB, 2), [1, 1]);
    assert_eq!(fixture.copy(source, to, 0, 8 * MIB), Ok(4 * MIB));
    assert_eq!(fixture.bytes_of(to, 2 * MIB, 2), [2, 2], "another copy");
}

#[test]
fn copies_count_with_what_was_shared_zeroed_and_moved() {
    let fixture = Fixture::new();
    let source = fixture.blank_disk(1, "source");
    fixture.put(source, 0, &vec![1; MIB as usize]);
    fixture.put(source, 3 * MIB, &[1; 4096]);
    let to = fixture.blank_disk(2, "to");
    let size = 3 * MIB + 4096;
    assert_eq!(fixture.copy(source, to, 0, size), Ok(size));
    let shared = fixture.service.copied_bytes();
    assert_eq!((shared.shared, shared.zeroed, shared.moved), (size, 0, 0));
    // A disk that shows a base already gets the bytes.
    let other = fixture.disks[0];
    let mut at = 0;
    while at < size {
        at += fixture.copy(source, other, at, size - at).unwrap();
    }
    let all = fixture.service.copied_bytes();
    assert_eq!((all.shared, all.zeroed, all.moved), (size, 2 * MIB, MIB + 4096));
    let sums = fixture.service.store().disk_by_id(to).unwrap().counters().sums();
    let copies = sums.operation(crate::stats::Operation::Copy);
    assert_eq!((copies.count(), copies.bytes, copies.errors), (1, size, 0));
}

// What the first copy left of the block with its end was zeroed by the next one, after it had come.
/// Guards D81.
#[test]
fn copies_in_parts_that_end_within_a_block_have_all_bytes() {
    let fixture = Fixture::new();
    let source = fixture.blank_disk(1, "source");
    fixture.put(source, 0, &[1; 24_576]);
    let to = fixture.blank_disk(2, "to");
    for (at, len) in [(0, 5000), (5000, 5000), (10_000, 14_576)] {
        assert_eq!(fixture.copy(source, to, at, len), Ok(len));
    }
    assert_eq!(fixture.bytes_of(to, 0, 24_576), [1; 24_576]);
}
