use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;

const SOON: Duration = Duration::from_secs(30);

/// A job that runs until the test ends it.
fn stuck(pool: &Pool, lane: Lane) -> Sender<()> {
    let (release, released) = channel::<()>();
    let (sender, began) = channel();
    pool.spawn(lane, move || {
        let _ = sender.send(());
        let _ = released.recv();
    });
    began.recv_timeout(SOON).expect("it begins");
    release
}

fn run_and_signal(pool: &Pool, lane: Lane) -> Receiver<()> {
    let (sender, done) = channel();
    pool.spawn(lane, move || _ = sender.send(()));
    done
}

/// Guards D28.
#[test]
fn a_base_that_hangs_holds_its_own_lane_only() {
    let pool = Pool::new(2, 0).expect("threads");
    let width = Lane::Base(1).width();
    // More than the pool has threads: others take the place of stuck ones.
    let held: Vec<_> = (0..width).map(|_| stuck(&pool, Lane::Base(1))).collect();
    let next = run_and_signal(&pool, Lane::Base(1));
    for lane in [Lane::Base(2), Lane::Disk(1), Lane::Sync(1), Lane::Names, Lane::Attach(1)] {
        run_and_signal(&pool, lane).recv_timeout(SOON).unwrap_or_else(|_| panic!("{lane:?} waits"));
    }
    assert!(next.try_recv().is_err(), "the lane is wider than it is allowed to be");
    drop(held);
    next.recv_timeout(SOON).expect("the lane goes on");
}

#[test]
fn threads_that_took_the_place_of_stuck_ones_end() {
    let pool = Pool::new(2, 0).expect("threads");
    let held: Vec<_> = (0..8).map(|_| stuck(&pool, Lane::Base(1))).collect();
    assert!(pool.shared.state.lock().threads >= 8);
    drop(held);
    let end = Instant::now() + SOON;
    while pool.shared.state.lock().threads > 2 {
        assert!(Instant::now() < end, "they stay");
        run_and_signal(&pool, Lane::Space).recv_timeout(SOON).expect("an answer");
    }
    assert!(pool.shared.state.lock().lanes.len() <= 1, "lanes without work are kept");
}

#[test]
fn lanes_with_work_take_turns() {
    let pool = Pool::new(1, 0).expect("threads");
    let release = stuck(&pool, Lane::Names);
    let (sender, order) = channel();
    // One guest has a long queue before another guest sends a few requests.
    for lane in std::iter::repeat_n(Lane::Disk(1), 100).chain([Lane::Disk(2), Lane::Disk(3)]) {
        let sender = sender.clone();
        pool.spawn(lane, move || _ = sender.send(lane));
    }
    drop((release, sender));
    let order: Vec<_> = order.iter().collect();
    assert_eq!(order.len(), 102);
    let place = |lane| order.iter().position(|l| *l == lane).expect("it ran");
    assert!(place(Lane::Disk(2)) < 4 && place(Lane::Disk(3)) < 4, "{:?}", &order[..8]);
}

#[test]
fn the_jobs_of_a_lane_begin_in_order() {
    let pool = Pool::new(1, 0).expect("threads");
    let (sender, order) = channel();
    for n in 0..50 {
        let sender = sender.clone();
        pool.spawn(Lane::Disk(7), move || _ = sender.send(n));
    }
    drop(sender);
    assert_eq!(order.iter().collect::<Vec<_>>(), (0..50).collect::<Vec<_>>());
}

#[test]
fn a_dropped_permit_is_available_again() {
    let pool = Pool::new(1, 1).expect("threads");
    let permit = pool.try_inline().expect("one");
    assert!(pool.try_inline().is_none());
    drop(permit);
    assert!(pool.try_inline().is_some());
}

/// Guards D59.
#[test]
fn large_jobs_of_a_lane_run_a_few_at_a_time() {
    let pool = Pool::new(32, 4).expect("threads");
    let bytes = lane_byte_limit() / 4;
    let (sender, began) = channel();
    let held: Vec<_> = (0..10)
        .map(|n| {
            let (sender, (release, released)) = (sender.clone(), channel::<()>());
            pool.spawn_sized(Lane::Disk(1), bytes, move || {
                let _ = sender.send(n);
                let _ = released.recv();
            });
            release
        })
        .collect();
    let mut first: Vec<_> = (0..4).map(|_| began.recv_timeout(SOON).expect("it begins")).collect();
    first.sort_unstable();
    assert_eq!(first, [0, 1, 2, 3]);
    // Small jobs of the lane wait behind them; those of another disk do not.
    let small = run_and_signal(&pool, Lane::Disk(1));
    run_and_signal(&pool, Lane::Disk(2)).recv_timeout(SOON).expect("another disk");
    assert!(began.try_recv().is_err() && small.try_recv().is_err());
    assert!(pool.try_inline_for(Lane::Disk(1), LARGE + 1).is_none(), "behind others of its lane");
    assert!(pool.try_inline_for(Lane::Disk(1), LARGE).is_some());
    assert!(pool.try_inline_for(Lane::Disk(3), LARGE + 1).is_some());
    drop(held);
    small.recv_timeout(SOON).expect("in their turn");
}

/// Guards D49.
#[test]
fn writes_that_wait_in_a_lane_hold_a_bounded_number_of_bytes() {
    let all = 256 << 20;
    let (pool, lane) = (Pool::bounded(1, 1, all).expect("threads"), Lane::Purge(0));
    let here = std::thread::current().id();
    let release = stuck(&pool, lane);
    let (sender, ran) = channel();
    let job = |n: usize| -> Job {
        let sender = sender.clone();
        Box::new(move || _ = sender.send((n, std::thread::current().id() == here)))
    };
    let quarter = QUEUED_BYTES / 4;
    (0..4).for_each(|n| assert!(pool.spawn_bounded(lane, quarter, job(n)).is_none()));
    assert!(ran.try_recv().is_err(), "they wait");
    // Writes above the bound run on the calling thread while others of its kind are free, and wait when none is.
    assert!(pool.spawn_bounded(lane, quarter, job(4)).is_none());
    assert_eq!(ran.try_recv(), Ok((4, true)));
    let permit = pool.try_inline().expect("one");
    assert!(pool.spawn_bounded(lane, quarter, job(5)).is_none());
    assert!(ran.try_recv().is_err());
    // A lane holds at most as much as it leaves for the others.
    assert!(pool.spawn_bounded(lane, all / 2 - 5 * quarter, job(6)).is_none());
    assert!(pool.spawn_bounded(lane, 1, job(7)).is_some());
    drop((release, permit));
    for n in [0, 1, 2, 3, 5, 6] {
        assert_eq!(ran.recv_timeout(SOON), Ok((n, false)));
    }
}

// One disk's large writes took all that may wait. From then on the writes of every disk ran on FUSE threads without a
// permit, until none was left to read requests.
/// Guards D49.
#[test]
fn a_disk_whose_writes_wait_never_keeps_those_of_others_from_waiting() {
    let pool = Pool::bounded(8, 1, 256 << 20).expect("threads");
    let lanes = [Lane::Disk(1), Lane::Disk(2), Lane::Disk(3), Lane::Disk(4), Lane::Disk(5)];
    // Nothing more of these lanes may run.
    let held = lanes.map(|lane| {
        let (release, released) = channel::<()>();
        let (sender, began) = channel();
        pool.spawn_sized(lane, lane_byte_limit(), move || {
            let _ = sender.send(());
            let _ = released.recv();
        });
        began.recv_timeout(SOON).expect("it begins");
        release
    });
    let permit = pool.try_inline().expect("one");
    let ran = Arc::new(AtomicUsize::new(0));
    let put = |lane, bytes| {
        let ran = ran.clone();
        pool.spawn_bounded(lane, bytes, Box::new(move || _ = ran.fetch_add(1, Ordering::Relaxed))).is_none()
    };
    let mut last = usize::MAX;
    let mut queued = 0;
    for lane in &lanes[..4] {
        let lane = *lane;
        // It takes all it can.
        let taken = (0..1000).take_while(|_| put(lane, 1 << 20)).count();
        assert!((16..last).contains(&taken), "{lane:?} has {taken} MiB, the one before {last}");
        (last, queued) = (taken, queued + taken);
    }
    for _ in 0..100 {
        assert!(put(lanes[4], 4096), "a small write of another disk");
        queued += 1;
    }
    assert_eq!(ran.load(Ordering::Relaxed), 0, "a write runs on the thread that read it");
    drop((held, permit));
    let end = Instant::now() + SOON;
    while ran.load(Ordering::Relaxed) < queued {
        assert!(Instant::now() < end, "{} of {queued} have run", ran.load(Ordering::Relaxed));
        std::thread::yield_now();
    }
}

// With the longest idle thread first, each request of a disk alone ran on the thread whose buffers had left the
// processor's cache.
#[test]
fn the_thread_that_became_idle_last_runs_the_next_job() {
    let pool = Pool::new(4, 0).expect("threads");
    let mut threads = Vec::new();
    for _ in 0..20 {
        let end = Instant::now() + SOON;
        while pool.shared.state.lock().idle.len() < 4 {
            assert!(Instant::now() < end, "a thread does not become idle");
            std::thread::yield_now();
        }
        let (sender, done) = channel();
        pool.spawn(Lane::Disk(1), move || _ = sender.send(std::thread::current().id()));
        threads.push(done.recv_timeout(SOON).expect("it runs"));
    }
    assert!(threads.iter().all(|thread| *thread == threads[0]), "{threads:?}");
}

// Each request of a lane that had reached its limit woke a thread for nothing, which interrupted the threads that ran.
/// Guards D59.
#[test]
fn no_thread_is_woken_for_work_that_may_not_run_yet() {
    let pool = Pool::new(4, 0).expect("threads");
    let end = Instant::now() + SOON;
    let idle = || pool.shared.state.lock().idle.len();
    while idle() < 4 {
        assert!(Instant::now() < end, "a thread does not become idle");
    }
    let (sender, began) = channel();
    let (release, released) = channel::<()>();
    pool.spawn_sized(Lane::Disk(1), lane_byte_limit(), move || {
        let _ = sender.send(());
        let _ = released.recv();
    });
    began.recv_timeout(SOON).expect("it begins");
    let later: Vec<_> = (0..3)
        .map(|_| {
            let (sender, done) = channel();
            let mut state = pool.shared.state.lock();
            state.add(
                Lane::Disk(1),
                Queued { job: Box::new(move || _ = sender.send(())), held: 0, moves: LARGE },
            );
            pool.shared.wake(&mut state);
            assert_eq!(state.idle.len(), 3, "no thread is woken");
            done
        })
        .collect();
    drop(release);
    later.iter().for_each(|done| done.recv_timeout(SOON).expect("they run in their turn"));
}
