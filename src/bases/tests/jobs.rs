//! Jobs on bases: what there is of them, what cancelling one changes, and what the next worker continues.

use super::*;
use crate::bases::hydrate::{Progress, What};

/// A rate at which no hydration ends while a test runs.
const SLOW: Option<u64> = Some(1);

/// The progress of a job, once `is_so` holds for it.
#[track_caller]
fn progress(house: &House, id: &str, is_so: impl Fn(&Progress) -> bool) -> Progress {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let found = house.bases.job(id);
        if let Ok(job) = &found
            && is_so(&job.progress)
        {
            return job.progress.clone();
        }
        assert!(Instant::now() < end, "job {id}: {found:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[track_caller]
fn until(is_so: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !is_so() {
        assert!(Instant::now() < end);
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn ids(house: &House) -> Vec<String> {
    house.bases.jobs().iter().map(|job| super::super::jobs::id(job.progress.what, &job.base)).collect()
}

/// The next worker, after the end of this one. The job ends here without a word in the record, as by a kill.
fn next_worker(house: House) -> House {
    for base in house.store.bases() {
        house.bases.hydrations.cancel(base.id(), "the worker was killed");
    }
    let House { dir, store, bases } = house;
    drop((store, bases));
    let next = House::reopened(dir);
    next.bases.hydrations.resume();
    next
}

/// Guards D73.
#[test]
fn the_next_worker_continues_a_hydration_under_the_same_identifier() {
    let house = House::new();
    house.add(raw("b", &house.image("b.raw", 1))).unwrap();
    house.bases.hydrate("b", SLOW).unwrap();
    assert_eq!(ids(&house), ["hydrate-b"]);
    let job = house.bases.job("hydrate-b").unwrap().progress;
    assert!(!job.has_ended() && !job.resumed && job.ended.is_none(), "{job:?}");
    let next = next_worker(house);
    let job = progress(&next, "hydrate-b", Progress::has_ended);
    assert_eq!((job.state, job.resumed, job.bytes), (State::Done, true, SIZE as u64), "{job:?}");
    assert!(job.ended.is_some());
}

/// Guards D73.
#[test]
fn a_cancelled_hydration_is_not_continued_by_the_next_worker() {
    let house = House::new();
    let base = house.add(raw("b", &house.image("b.raw", 1))).unwrap();
    house.bases.hydrate("b", SLOW).unwrap();
    let job = house.bases.cancel_job("hydrate-b").unwrap().progress;
    assert_eq!((job.state, job.error.as_deref()), (State::Cancelled, Some("an operator cancelled it")));
    assert!(!base.options().hydrate);
    assert_eq!(house.kept(&base), 0, "nothing reads the copy of a file of this host");
    assert!(house.store.base("b").unwrap().attach().is_ok());
    // Cancelling it again changes nothing.
    assert_eq!(house.bases.cancel_job("hydrate-b").unwrap().progress.state, State::Cancelled);
    drop(base);
    let next = next_worker(house);
    assert_eq!(ids(&next), [""; 0]);
    assert!(matches!(next.bases.job("hydrate-b"), Err(StoreError::NotFound { .. })));
}

#[test]
fn a_cancel_that_would_lose_the_last_copy_is_refused() {
    let house = House::new();
    let path = house.image("b.raw", 1);
    let base = house.add(raw("b", &path)).unwrap();
    house.bases.hydrate("b", SLOW).unwrap();
    // A job that finds no file fails.
    until(|| house.kept(&base) > 0);
    fs::remove_file(&path).unwrap();
    let refused = house.bases.cancel_job("hydrate-b").unwrap_err();
    assert_eq!(refused.kind(), Kind::Invalid);
    assert!(refused.to_string().contains("plyfs base evict b --force"), "{refused}");
    assert!(base.options().hydrate && !house.bases.job("hydrate-b").unwrap().progress.has_ended());
    house.bases.evict("b", LastCopy::Drop).unwrap();
}

#[test]
fn cancelling_a_repeated_hydration_leaves_the_base_hydrated() {
    let house = House::new();
    house.add(raw("b", &house.image("b.raw", 1))).unwrap();
    let base = house.hydrated("b");
    house.bases.hydrate("b", SLOW).unwrap();
    house.bases.cancel_job("hydrate-b").unwrap();
    assert!(base.options().hydrate);
    assert_eq!(house.kept(&base), SIZE as u64);
}

/// The first piece of a hydration may be due in a day at the rate that it began with.
#[test]
fn a_hydration_takes_the_rate_that_was_given_last() {
    let house = House::new();
    house.add(raw("b", &house.image("b.raw", 1))).unwrap();
    house.bases.hydrate("b", SLOW).unwrap();
    house.bases.hydrate("b", None).unwrap();
    assert!(!house.bases.job("hydrate-b").unwrap().progress.has_ended(), "no rate leaves the rate");
    house.bases.hydrate("b", Some(1 << 30)).unwrap();
    assert_eq!(progress(&house, "hydrate-b", Progress::has_ended).state, State::Done);
}

/// Guards D74.
#[test]
fn a_verification_is_refused_while_the_base_is_hydrated_with_the_remedy() {
    let house = House::new();
    house.add(raw("b", &house.image("b.raw", 1))).unwrap();
    house.bases.hydrate("b", SLOW).unwrap();
    let refused = house.bases.verify("b").map(drop).unwrap_err().to_string();
    for part in ["is being hydrated", "plyfs base hydrate b", "plyfs job cancel hydrate-b"] {
        assert!(refused.contains(part), "{refused}");
    }
    house.bases.cancel_job("hydrate-b").unwrap();
    house.bases.verify("b").unwrap();
    assert_eq!(progress(&house, "verify-b", Progress::has_ended).state, State::Done);
    assert_eq!(ids(&house), ["hydrate-b", "verify-b"]);
}

/// Regression: the record said that the base was to be hydrated, and no job did it before the next start.
/// Guards D74.
#[test]
fn a_hydration_that_begins_during_a_verification_takes_its_place() {
    let house = House::new();
    let path = house.dir.path().join("b.raw");
    // Large enough that the comparison takes a while.
    fs::write(&path, vec![1; 48 << 20]).unwrap();
    house.add(raw("b", &path)).unwrap();
    house.bases.verify("b").unwrap();
    house.bases.hydrate("b", None).unwrap();
    let verified = house.bases.job("verify-b").unwrap().progress;
    assert!(verified.has_ended(), "{verified:?}");
    assert_eq!(progress(&house, "hydrate-b", Progress::has_ended).state, State::Done);
    let what: Vec<What> = house.bases.jobs().iter().map(|job| job.progress.what).collect();
    assert_eq!(what, [What::Verify, What::Hydrate]);
}

#[test]
fn the_jobs_of_a_removed_base_are_gone() {
    let house = House::new();
    house.add(raw("b", &house.image("b.raw", 1))).unwrap();
    house.bases.hydrate("b", SLOW).unwrap();
    house.bases.remove("b").unwrap();
    assert_eq!(ids(&house), [""; 0]);
    for id in ["hydrate-b", "verify-b", "hydrate", "", "-", "flatten-b", "hydrate-../b"] {
        let missing = house.bases.job(id).map(drop).unwrap_err();
        assert_eq!(missing.kind(), Kind::NotFound, "{id}");
        assert!(missing.to_string().contains("plyfs job ls"), "{missing}");
    }
}
