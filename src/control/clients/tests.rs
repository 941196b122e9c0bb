//! The list of the jobs of clients.

use super::*;

fn work(snapshot: Option<&str>) -> ClientJob {
    let snapshot = snapshot.map(str::to_owned);
    ClientJob { kind: WorkKind::Export, disk: "vm1".into(), snapshot, bytes: 5, total: 10 }
}

const HELD: &str = "plyfs-export-held-0123456789abcdef";

fn later(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

#[test]
fn a_job_is_forgotten_with_its_snapshot_when_no_client_holds_it_for_a_while() {
    let jobs = ClientJobs::default();
    let job = jobs.put("export-vm1-1", work(Some(HELD))).unwrap();
    assert_eq!((job.state, job.percent, job.disk.as_deref()), (WorkState::Copying, 50.0, Some("vm1")));
    let (one, two) = (jobs.hold("export-vm1-1").unwrap(), jobs.hold("export-vm1-1").unwrap());
    assert!(jobs.forget_unheld(later(1000)).is_empty());
    drop(one);
    assert!(jobs.forget_unheld(later(1000)).is_empty());
    drop(two);
    assert!(jobs.forget_unheld(later(5)).is_empty() && jobs.holds("vm1", HELD));
    assert_eq!(jobs.forget_unheld(later(11)), [("vm1".to_owned(), HELD.to_owned())]);
    assert!(jobs.list().is_empty() && jobs.hold("export-vm1-1").is_none() && !jobs.holds("vm1", HELD));
}

#[test]
fn a_cancelled_job_stays_cancelled_whatever_its_client_says() {
    let jobs = ClientJobs::default();
    jobs.put("export-vm1-1", work(None)).unwrap();
    let held = jobs.hold("export-vm1-1").unwrap();
    assert!(jobs.order("export-vm1-1", Order::Cancel) && !jobs.order("export-vm1-2", Order::Cancel));
    assert_eq!(*held.order.borrow(), Order::Cancel);
    jobs.close();
    let job = jobs.put("export-vm1-1", work(None)).unwrap();
    assert_eq!((job.state, job.error.as_deref()), (WorkState::Cancelled, Some(CANCELLED)));
}

#[test]
fn a_job_that_no_client_of_this_kind_announces_is_refused() {
    let jobs = ClientJobs::default();
    let refused = |id: &str, work| assert!(jobs.put(id, work).is_err(), "{id}");
    refused("vm1", work(None));
    refused("import-vm1-1", work(None));
    refused("export-vm2-1", work(None));
    refused("export-vm1-", work(None));
    refused("export-vm1-a b", work(None));
    // The daemon removes snapshots of no other name.
    refused("export-vm1-1", work(Some("monday")));
    refused("export-vm1-1", work(Some("plyfs-export-0123456789abcdef")));
    refused("export-vm1-1", work(Some("plyfs-export-held-0123456789abcde")));
    refused("hydrate-vm1-1", ClientJob { kind: WorkKind::Hydrate, ..work(None) });
    (0..MOST_JOBS).for_each(|n| _ = jobs.put(&format!("export-vm1-{n}"), work(None)).unwrap());
    refused("export-vm1-x", work(None));
    refused("export-vm1-1", work(Some(HELD)));
}

#[test]
fn a_worker_that_ends_waits_for_no_request_that_holds_a_job() {
    let jobs = ClientJobs::default();
    jobs.put("export-vm1-1", work(None)).unwrap();
    let held = jobs.hold("export-vm1-1").unwrap();
    assert_eq!(*held.order.borrow(), Order::GoOn);
    jobs.close();
    assert_eq!(*held.order.borrow(), Order::Moves);
    jobs.put("export-vm1-2", work(None)).unwrap();
    let later = jobs.hold("export-vm1-2").unwrap();
    assert_eq!(*later.order.borrow(), Order::Moves);
}
