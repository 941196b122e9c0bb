use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Sender, channel};

use super::*;
use crate::serve::FrontendId;
use crate::serve::callers::{Findings, Process, Question, ROUND};

const SOON: Duration = Duration::from_secs(30);

struct Request(Mutex<Option<Sender<i32>>>);

impl Cancel for Request {
    fn cancel(&self, errno: Errno) -> bool {
        self.0.lock().take().is_some_and(|says| says.send(errno.into()).is_ok())
    }
}

fn limits() -> Limits {
    Limits { requests: 1200, of_disk: 500, bytes: 10 << 20, bytes_of_disk: 6 << 20, floor: 3 }
}

fn request() -> (Arc<dyn Cancel>, std::sync::mpsc::Receiver<i32>) {
    let (says, ended) = channel();
    (Arc::new(Request(Mutex::new(Some(says)))), ended)
}

fn id(number: u64) -> RequestId {
    FrontendId(0).request(number)
}

fn call(number: u64) -> Call {
    Call { request: id(number), thread: 0 }
}

fn fill(table: &Arc<Waiting>, disk: u64, bytes: usize, tickets: &mut Vec<Ticket>) -> usize {
    let (request, _) = request();
    let before = tickets.len();
    while let Some(ticket) =
        table.admit(Target::Disk(disk), bytes, call(tickets.len() as u64), Arc::downgrade(&request))
    {
        tickets.push(ticket);
    }
    tickets.len() - before
}

/// Guards D29.
#[test]
fn a_disk_that_takes_all_it_can_get_leaves_room_for_others() {
    let table = Waiting::new(limits()).expect("a thread");
    let mut tickets = Vec::new();
    assert_eq!(fill(&table, 1, 0, &mut tickets), 500, "its own bound");
    // Each further disk takes half of the rest.
    let others: Vec<usize> = (2..8).map(|disk| fill(&table, disk, 0, &mut tickets)).collect();
    assert!(others.windows(2).all(|w| w[0] >= w[1]) && others.iter().all(|n| *n >= 5), "{others:?}");
    // When nothing is left, each disk may still have a few.
    let late: Vec<usize> = (8..40).map(|disk| fill(&table, disk, 0, &mut tickets)).collect();
    assert!(late.iter().all(|n| *n >= 3) && late.ends_with(&[3, 3]), "{late:?}");
    assert_eq!(table.counts().requests, tickets.len());
    assert!(table.counts().refused >= 39);
    drop(tickets);
    assert_eq!(table.counts().requests, 0);
    assert!(table.state.lock().held.is_empty() && table.state.lock().requests.is_empty());
}

/// Guards D29.
#[test]
fn the_bytes_of_waiting_writes_are_bounded_too() {
    let table = Waiting::new(limits()).expect("a thread");
    let mut tickets = Vec::new();
    assert_eq!(fill(&table, 1, 1 << 20, &mut tickets), 5, "half of all");
    assert_eq!(fill(&table, 2, 1 << 20, &mut tickets), 3, "half of what is left");
    assert_eq!(table.counts().bytes, 8 << 20);
    drop(tickets);
    assert_eq!(table.counts().bytes, 0);
}

/// Guards D60.
#[test]
fn an_interrupted_request_ends_with_eintr() {
    let table = Waiting::new(limits()).expect("a thread");
    let (request, ended) = request();
    let _ticket = table.admit(Target::Disk(1), 0, call(42), Arc::downgrade(&request)).expect("room");
    table.interrupt(id(42));
    assert_eq!(ended.recv_timeout(SOON), Ok(libc::EINTR));
    assert_eq!(table.counts().interrupted, 1);
}

/// Guards D61.
#[test]
fn an_interrupt_before_the_request_waits_is_remembered() {
    let table = Waiting::new(limits()).expect("a thread");
    let (request, ended) = request();
    table.interrupt(id(42));
    let _ticket = table.admit(Target::Disk(1), 0, call(42), Arc::downgrade(&request)).expect("room");
    assert_eq!(ended.recv_timeout(SOON), Ok(libc::EINTR));
    assert!(table.state.lock().early.is_empty());
}

/// Guards D61.
#[test]
fn the_number_of_remembered_interrupts_is_bounded() {
    let table = Waiting::new(limits()).expect("a thread");
    for unique in 0..3 * REMEMBERED as u64 {
        table.interrupt(id(unique));
    }
    let state = table.state.lock();
    assert!(state.early.len() <= REMEMBERED && state.early_order.len() <= REMEMBERED);
}

#[test]
fn requests_of_an_ending_process_end_and_those_of_others_keep_waiting() {
    const MORTAL: Process = Process { id: 10, start: 5 };
    let table = Waiting::new(limits()).expect("a thread");
    let dies = Arc::new(AtomicBool::new(false));
    let seen = dies.clone();
    let lookup = move |question: &Question| {
        let process = |thread: u32| if thread < 20 { MORTAL } else { Process { id: 20, start: 5 } };
        let threads = question.threads.iter().map(|thread| (*thread, process(*thread))).collect();
        let is_ending = |process: &&Process| **process == MORTAL && seen.load(Ordering::Relaxed);
        let ending = question.processes.iter().filter(is_ending).copied().collect();
        Some(Findings { threads, ending })
    };
    table.watch(Box::new(lookup)).expect("a thread");
    let requests: Vec<_> = [11, 12, 21, 0].into_iter().map(|thread| (thread, request())).collect();
    let mut tickets = Vec::new();
    for (thread, (request, _)) in &requests {
        let call = Call { request: id(u64::from(*thread)), thread: *thread };
        tickets.push(table.admit(Target::Disk(1), 0, call, Arc::downgrade(request)).expect("room"));
    }
    assert!(requests[0].1.1.recv_timeout(3 * ROUND).is_err(), "it lives");
    dies.store(true, Ordering::Relaxed);
    for (_, (_, ended)) in &requests[..2] {
        assert_eq!(ended.recv_timeout(SOON), Ok(libc::EINTR));
    }
    tickets.drain(..2);
    for (thread, (_, ended)) in &requests[2..] {
        assert!(ended.recv_timeout(2 * ROUND).is_err(), "{thread}");
    }
    assert_eq!(table.counts().interrupted, 2);
}

#[test]
fn an_interrupt_ends_the_request_of_its_own_frontend() {
    let table = Waiting::new(limits()).expect("a thread");
    let other_call = Call { request: FrontendId(1).request(42), thread: 0 };
    let (first, ended) = request();
    let (second, other) = request();
    let _first = table.admit(Target::Disk(1), 0, call(42), Arc::downgrade(&first)).expect("room");
    let _second = table.admit(Target::Disk(2), 0, other_call, Arc::downgrade(&second)).expect("room");
    table.interrupt(id(42));
    assert_eq!(ended.recv_timeout(SOON), Ok(libc::EINTR));
    assert!(other.try_recv().is_err(), "the request of the other frontend keeps waiting");
    table.interrupt(other_call.request);
    assert_eq!(other.recv_timeout(SOON), Ok(libc::EINTR));
}
