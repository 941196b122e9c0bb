use super::*;
use crate::serve::FrontendId;

const A: Process = Process { id: 10, start: 1000 };
const B: Process = Process { id: 20, start: 2000 };
const NONE: [u64; 0] = [];
const ALL: fn(RequestId) -> bool = |_| true;

fn request(number: u64) -> RequestId {
    FrontendId(0).request(number)
}

fn numbers(requests: Vec<RequestId>) -> Vec<u64> {
    requests.into_iter().map(|request| request.number).collect()
}

fn callers() -> (Callers, Instant) {
    (Callers { watched: true, ..Callers::default() }, Instant::now())
}

fn threads(found: &[(u32, Process)]) -> Option<Findings> {
    Some(Findings { threads: found.to_vec(), ending: Vec::new() })
}

fn ending(processes: &[Process]) -> Option<Findings> {
    Some(Findings { threads: Vec::new(), ending: processes.to_vec() })
}

fn sorted<T: Ord>(mut all: Vec<T>) -> Vec<T> {
    all.sort_unstable();
    all
}

/// Asks a question, which must be about these threads and processes, and records the answer.
#[track_caller]
fn ask(
    callers: &mut Callers,
    at: Instant,
    about: (&[u32], &[Process]),
    findings: Option<Findings>,
) -> Vec<u64> {
    assert!(callers.due(at).is_some_and(|due| due <= at), "it is not due");
    let question = callers.question(at, ALL).expect("a question");
    assert_eq!((sorted(question.threads.clone()).as_slice(), question.processes.as_slice()), about);
    sorted(numbers(callers.take_answer(&question, at, findings, ALL)))
}

/// Guards D55.
#[test]
fn the_requests_of_a_process_end_when_it_does_and_those_of_others_do_not() {
    let (mut callers, now) = callers();
    assert_eq!(callers.due(now), None);
    assert!(callers.add(request(1), 11, now), "it is woken for the first");
    (2..=3).for_each(|unique| assert!(!callers.add(request(unique), 11, now)));
    callers.add(request(4), 21, now);
    assert_eq!(ask(&mut callers, now, (&[11, 21], &[]), threads(&[(11, A), (21, B)])), NONE);
    assert_eq!(callers.identified(), 4);
    // Each process is checked once in a round, and its threads are not asked about again.
    assert_eq!(callers.due(now), Some(now + ROUND));
    assert_eq!(callers.question(now + ROUND / 2, ALL), None);
    let now = now + ROUND;
    assert_eq!(ask(&mut callers, now, (&[], &[A, B]), ending(&[])), NONE);
    callers.remove(request(2));
    let now = now + ROUND;
    assert_eq!(ask(&mut callers, now, (&[], &[A, B]), ending(&[A])), [1, 3]);
    [1, 3].into_iter().for_each(|unique| callers.remove(request(unique)));
    let now = now + ROUND;
    assert_eq!(ask(&mut callers, now, (&[], &[B]), ending(&[])), NONE);
    callers.remove(request(4));
    assert_eq!(callers.due(now), None);
    assert_eq!(callers.question(now + ROUND, ALL), None);
    assert!(callers.queue.is_empty() && callers.requests_of.is_empty());
}

/// Guards D56, D57.
#[test]
fn a_thread_that_was_seen_is_not_asked_about_again_for_a_while() {
    let (mut callers, now) = callers();
    callers.add(request(1), 11, now);
    ask(&mut callers, now, (&[11], &[]), threads(&[(11, A)]));
    callers.remove(request(1));
    let soon = now + FRESH / 2;
    assert!(callers.add(request(2), 11, soon), "its process is to be looked at");
    assert_eq!((callers.identified(), callers.unidentified.len()), (1, 0));
    ask(&mut callers, soon, (&[], &[A]), ending(&[]));
    // After this time the number may be another thread's.
    let later = now + FRESH;
    callers.add(request(3), 11, later);
    let again = Process { start: 5000, ..A };
    ask(&mut callers, later, (&[11], &[A]), threads(&[(11, again)]));
    assert_eq!(ask(&mut callers, later + ROUND, (&[], &[A, again]), ending(&[A])), [2]);
}

#[test]
fn an_answer_identifies_requests_that_came_after_the_question() {
    let (mut callers, now) = callers();
    callers.add(request(1), 11, now);
    let question = callers.question(now, ALL).expect("a thread");
    callers.add(request(2), 11, now + PAUSE / 4);
    callers.add(request(3), 12, now + PAUSE / 4);
    assert_eq!(numbers(callers.take_answer(&question, now, threads(&[(11, A)]), ALL)), NONE);
    assert_eq!(callers.identified(), 2);
    // Many of the others are asked about at a time.
    assert_eq!(callers.due(now), Some(now + PAUSE));
    assert_eq!(callers.question(now + PAUSE, ALL).expect("a thread").threads, [12]);
}

#[test]
fn requests_of_an_invisible_thread_are_left_alone() {
    let (mut callers, now) = callers();
    callers.add(request(1), 0, now);
    assert_eq!(callers.due(now), None, "of another pid namespace");
    callers.add(request(2), 11, now);
    assert_eq!(ask(&mut callers, now, (&[11], &[]), threads(&[])), NONE);
    assert_eq!(callers.due(now), None, "it is not asked about again");
    assert!(!callers.add(request(3), 11, now + FRESH / 2));
    assert_eq!(callers.due(now + FRESH / 2), None);
    assert!(callers.add(request(4), 11, now + FRESH), "the number may be another's");
}

/// Guards D56.
#[test]
fn without_an_answer_the_question_is_repeated_until_the_thread_number_may_be_reused() {
    let (mut callers, now) = callers();
    callers.add(request(1), 11, now);
    callers.add(request(2), 12, now);
    for round in 0..3 {
        let at = now + ROUND * round;
        assert_eq!(ask(&mut callers, at, (&[11, 12], &[]), None), NONE);
        assert_eq!(callers.due(at), Some(at + ROUND));
    }
    assert_eq!(callers.question(now + FRESH, ALL), None);
    assert_eq!(callers.due(now + FRESH), None);
}

#[test]
fn a_request_that_was_answered_meanwhile_is_not_kept() {
    let (mut callers, now) = callers();
    callers.add(request(1), 11, now);
    assert_eq!(callers.question(now, |_| false), None);
    assert_eq!(callers.due(now), None);
    callers.add(request(2), 11, now);
    let question = callers.question(now, ALL).expect("a thread");
    assert_eq!(numbers(callers.take_answer(&question, now, threads(&[(11, A)]), |_| false)), NONE);
    assert_eq!(callers.identified(), 0);
}

/// Guards D57.
#[test]
fn a_question_is_bounded_and_all_processes_get_their_turn() {
    let (mut callers, mut now) = callers();
    let count = 3 * MAX_PER_QUESTION as u32 / 2;
    let process = |n: u32| Process { id: n, start: u64::from(n) };
    (1..=count).for_each(|n| _ = callers.add(request(u64::from(n)), n, now));
    while callers.identified() < count as usize {
        let question = callers.question(now, ALL).expect("threads");
        assert!(question.threads.len() <= MAX_PER_QUESTION && question.processes.len() <= MAX_PER_QUESTION);
        let found: Vec<_> = question.threads.iter().map(|n| (*n, process(*n))).collect();
        callers.take_answer(&question, now, threads(&found), ALL);
        now += PAUSE;
    }
    let mut seen = HashSet::new();
    for _ in 0..2 {
        now += ROUND;
        let question = callers.question(now, ALL).expect("processes");
        assert_eq!(question.processes.len(), MAX_PER_QUESTION);
        seen.extend(question.processes.clone());
        callers.take_answer(&question, now, ending(&[]), ALL);
    }
    assert_eq!(seen.len(), count as usize);
}

#[test]
fn nothing_is_tracked_without_a_lookup() {
    let mut callers = Callers::default();
    let now = Instant::now();
    assert!(!callers.add(request(1), 11, now));
    assert_eq!(callers.due(now), None);
}
