use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::*;

/// The flags of a thread that runs: PF_RANDOMIZE, which every process has.
const RUNS: u64 = 0x0040_0000;
const EXITS: u64 = RUNS | PF_EXITING;
const URING: u64 = RUNS | PF_IO_WORKER | PF_USER_WORKER;

fn line(name: &str, flags: u64, start: u64) -> String {
    // Fields 4 to 8, 10 to 21 and the rest: only their count matters.
    let fill = |count: usize| vec!["1"; count].join(" ");
    format!("7 ({name}) S {} {flags} {} {start} {}\n", fill(5), fill(12), fill(30))
}

/// Adds a process with these threads to a /proc. The first one is its leader.
fn add(root: &Path, process: u32, start: u64, threads: &[(u32, u64)]) {
    for (thread, flags) in threads {
        let dir = root.join(format!("{process}/task/{thread}"));
        fs::create_dir_all(&dir).unwrap();
        fs::write(dir.join("stat"), line("a) S (b", *flags, start)).unwrap();
        fs::create_dir_all(root.join(thread.to_string())).unwrap();
        let status = format!("Name:\tTgid: 5\nState:\tS (sleeping)\nTgid:\t{process}\nPid:\t{thread}\n");
        fs::write(root.join(format!("{thread}/status")), status).unwrap();
    }
}

fn proc(root: &TempDir, reads: usize) -> Proc {
    Proc { root: root.path().into(), exists: |id| id == 99, reads }
}

fn query(threads: &[u32], processes: &[(u32, u64)]) -> CallersQuery {
    CallersQuery { number: 3, threads: threads.to_vec(), processes: processes.to_vec() }
}

#[track_caller]
fn ending(root: &TempDir, process: (u32, u64)) -> bool {
    let reply = proc(root, MOST_READS).inspect(&query(&[], &[process]));
    assert!(reply.ending.is_empty() || reply.ending == [process]);
    reply.ending == [process]
}

#[test]
fn a_line_of_stat_is_parsed_with_any_thread_name() {
    let stat = Some(Stat { flags: 0x40_0044, start: 12_345 });
    for name in ["cat", "a b", "(sd-pam)", "x) S 1 2 3 4 5 6 7 8 9", ")))", "", "\n"] {
        assert_eq!(Stat::parse(line(name, 0x40_0044, 12_345).as_bytes()), stat, "{name}");
    }
    let mut bytes = b"7 (\xff\xfe) S 1 1 1 1 1 4 ".to_vec();
    bytes.extend(b"1 1 1 1 1 1 1 1 1 1 1 1 88 0\n");
    assert_eq!(Stat::parse(&bytes), Some(Stat { flags: 4, start: 88 }), "no UTF-8");
    for wrong in ["", "7 (cat", "7 (cat) S 1 2", "7 (cat) S 1 1 1 1 1 x 1 1 1 1 1 1 1 1 1 1 1 1 88"] {
        assert_eq!(Stat::parse(wrong.as_bytes()), None, "{wrong}");
    }
}

#[test]
fn this_process_is_found_by_its_threads_and_is_not_ending() {
    let thread = fs::read_link("/proc/thread-self").unwrap();
    let thread = thread.file_name().unwrap().to_str().unwrap().parse().unwrap();
    let reply = inspect(&query(&[thread, sys::pid(), 0, u32::MAX], &[])).unwrap();
    let [(first, id, start), (second, ..)] = reply.threads[..] else { panic!("{reply:?}") };
    assert_eq!((first, second, id), (thread, sys::pid(), sys::pid()));
    let reply = inspect(&query(&[], &[(id, start), (id, start - 1)])).unwrap();
    assert_eq!(reply.ending, [(id, start - 1)], "an earlier process of this pid has ended");
}

#[test]
fn the_reply_has_the_process_of_a_thread_and_its_start() {
    let root = tempfile::tempdir().unwrap();
    add(root.path(), 10, 500, &[(10, RUNS), (11, RUNS)]);
    add(root.path(), 20, 600, &[(20, RUNS | PF_KTHREAD)]);
    let reply = proc(&root, MOST_READS).inspect(&query(&[11, 10, 12, 20], &[]));
    assert_eq!(
        reply.threads,
        [(11, 10, 500), (10, 10, 500)],
        "neither a thread that has ended nor a kernel thread"
    );
    assert_eq!(reply.number, 3);
}

/// Guards D55.
#[test]
fn a_process_is_ending_when_none_of_its_threads_runs() {
    let cases: [(&[u64], bool); 8] = [
        (&[RUNS], false),
        (&[EXITS], true),
        (&[RUNS, EXITS], false),
        (&[EXITS, RUNS], false),
        (&[EXITS, EXITS, EXITS, RUNS], false),
        (&[EXITS, EXITS], true),
        (&[EXITS, URING], true),
        (&[RUNS, URING], false),
    ];
    for (flags, ends) in cases {
        let root = tempfile::tempdir().unwrap();
        let threads: Vec<_> = (10..).zip(flags.iter().copied()).collect();
        add(root.path(), 10, 500, &threads);
        assert_eq!(ending(&root, (10, 500)), ends, "{flags:x?}");
    }
}

#[test]
fn a_process_that_is_gone_has_ended_and_one_that_is_hidden_has_not() {
    let root = tempfile::tempdir().unwrap();
    assert!(ending(&root, (10, 500)));
    assert!(!ending(&root, (99, 500)), "it exists, and /proc hides it");
    add(root.path(), 10, 700, &[(10, RUNS)]);
    assert!(ending(&root, (10, 500)), "another process has this pid now");
    assert!(!ending(&root, (10, 700)));
}

/// Guards D57.
#[test]
fn a_query_costs_a_bounded_number_of_reads() {
    let root = tempfile::tempdir().unwrap();
    let threads: Vec<_> = (10..40).map(|thread| (thread, EXITS)).collect();
    add(root.path(), 10, 500, &threads);
    add(root.path(), 9000, 500, &[(9000, EXITS)]);
    assert!(ending(&root, (9000, 500)));
    // When no reads are left, a process is not reported as ending.
    let reply = proc(&root, 25).inspect(&query(&[], &[(10, 500), (9000, 500), (9500, 1)]));
    assert!(reply.ending.is_empty());
    let many: Vec<_> = (0..2 * MAX_PER_QUESTION as u32).map(|n| (20_000 + n, 1)).collect();
    assert_eq!(proc(&root, MOST_READS).inspect(&query(&[], &many)).ending.len(), MAX_PER_QUESTION);
}

fn client() -> (Arc<CallersClient>, Channel) {
    let (ours, theirs) = sys::message_pair().unwrap();
    (CallersClient::new(Arc::new(Channel(ours))), Channel(theirs))
}

fn question() -> Question {
    Question { threads: vec![11], processes: vec![Process { id: 10, start: 5 }] }
}

#[test]
fn a_supervisor_that_does_not_announce_that_it_answers_gets_no_query() {
    let (client, supervisor) = client();
    assert_eq!(client.query(&question()), None);
    // The report of an earlier version.
    let report: crate::control::report::Report = serde_json::from_str("{\"worker_starts\": 1}").unwrap();
    client.set_supported(report.answers_callers);
    assert_eq!(client.query(&question()), None);
    drop(client);
    assert!(supervisor.receive::<FromWorker>().unwrap().is_none(), "nothing was sent");
}

#[test]
fn a_reply_to_an_earlier_query_is_ignored() {
    let (client, supervisor) = client();
    client.set_supported(true);
    let reply = |number, ending| CallersReply { number, threads: vec![(11, 10, 5)], ending };
    let querying = std::thread::spawn({
        let client = client.clone();
        move || client.query(&question())
    });
    let Some(FromWorker::Callers(query)) = supervisor.receive().unwrap() else { panic!("a query") };
    assert_eq!((query.threads, query.processes), (vec![11], vec![(10, 5)]));
    client.receive(reply(query.number - 1, vec![(10, 5)]));
    client.receive(reply(query.number, vec![]));
    let threads = vec![(11, Process { id: 10, start: 5 })];
    assert_eq!(querying.join().unwrap(), Some(Findings { threads, ending: vec![] }));
}

#[test]
fn a_query_ends_when_the_supervisor_does_not_reply_or_is_gone() {
    let (client, supervisor) = client();
    client.set_supported(true);
    assert_eq!(client.query(&question()), None, "no reply");
    drop(supervisor);
    assert_eq!(client.query(&question()), None, "gone");
}
