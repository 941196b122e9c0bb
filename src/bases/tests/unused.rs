//! Which bases go that nothing needs.

use super::*;
use crate::bases::UnusedLimits;
use crate::io::sys;

const CLOSED: &dyn Fn(&BaseNode) -> bool = &|_| false;
const NOTHING: UnusedLimits = UnusedLimits { age: None, bytes: None };

fn names(house: &House) -> Vec<String> {
    house.store.bases().iter().map(|base| base.record().name.clone()).collect()
}

fn unused(house: &House) -> Vec<String> {
    house.bases.unused(CLOSED).into_iter().map(|unused| unused.base.record().name.clone()).collect()
}

fn disk(house: &House, name: &str, base: &str) {
    let new = NewDisk {
        name: name.into(),
        base: Some(base.into()),
        size: None,
        mode: 0o600,
        uid: 0,
        gid: 0,
        limits: Default::default(),
    };
    house.store.create_disks(&[new]).unwrap();
}

/// Bases `a` to `e`, each used last a moment after the one before.
fn house() -> House {
    let house = House::new();
    for (name, byte) in [("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5)] {
        let image = house.image(name, byte);
        house.add(raw(name, &image)).unwrap();
        std::thread::sleep(Duration::from_millis(2));
    }
    house
}

/// Removes what goes by these limits, this long from now.
fn removed(house: &House, limits: UnusedLimits, later: Duration) -> Vec<String> {
    let (events, now) = (Events::new(), sys::now_ns() + later.as_nanos() as i64);
    let mut out = Vec::new();
    while let Some(base) = house.bases.remove_surplus(limits, now, CLOSED, &events).unwrap() {
        out.push(base.record().name.clone());
    }
    let told: Vec<String> = events
        .recent(0)
        .iter()
        .filter_map(|record| record.event.base.as_deref().map(str::to_owned))
        .collect();
    assert_eq!(told, out, "one event each");
    assert!(events.recent(0).iter().all(|record| record.event.kind.name() == "base.removed"));
    out
}

/// Guards D83.
#[test]
fn a_base_that_something_needs_is_not_unused() {
    let house = house();
    house.store.keep_removed_for(Duration::from_secs(3600));
    disk(&house, "one", "a");
    disk(&house, "two", "b");
    house.store.unlink("two").unwrap();
    house.bases.pin("c", true, None).unwrap();
    assert_eq!(unused(&house), ["d", "e"]);
    let open = |base: &BaseNode| base.record().name == "d";
    assert_eq!(house.bases.unused(&open).len(), 1);
    let limits = UnusedLimits { age: Some(Duration::from_secs(1)), ..NOTHING };
    assert_eq!(removed(&house, limits, Duration::from_secs(3600)), ["d", "e"]);
    assert_eq!(names(&house), ["a", "b", "c"]);
    // A base that got a disk after it was found unused.
    house.bases.pin("c", false, None).unwrap();
    let found = house.bases.unused(CLOSED).remove(0);
    disk(&house, "three", "c");
    let error = house.bases.remove_unused(&found, "a test", &Events::new()).unwrap_err();
    assert_eq!(error.kind(), Kind::InUse);
    assert!(error.to_string().contains("disk three"), "{error}");
}

#[test]
fn without_limits_and_before_its_time_no_base_goes() {
    let house = house();
    assert_eq!(removed(&house, NOTHING, Duration::from_secs(1 << 30)), [""; 0]);
    let hour = Duration::from_secs(3600);
    let limits = UnusedLimits { age: Some(hour), ..NOTHING };
    assert_eq!(removed(&house, limits, hour / 2), [""; 0]);
    assert_eq!(removed(&house, limits, hour), ["a", "b", "c", "d", "e"]);
    assert!(house.dir.path().join("a").exists(), "the image itself stays");
}

#[test]
fn above_the_limit_the_least_recently_used_bases_go_and_those_without_a_copy_stay() {
    let house = house();
    for name in ["b", "c", "d"] {
        house.hydrated(name);
    }
    // `c` is used once more, and so the last one to go.
    house.store.note_uses(&|base| base.record().name == "c");
    let each = house.kept(&house.store.base("b").unwrap());
    assert!(each > 0);
    assert_eq!(unused(&house), ["a", "b", "d", "e", "c"]);
    let limit = |bytes| UnusedLimits { bytes: Some(bytes), ..NOTHING };
    assert_eq!(removed(&house, limit(3 * each), Duration::ZERO), [""; 0]);
    assert_eq!(removed(&house, limit(3 * each - 1), Duration::ZERO), ["b"]);
    assert_eq!(removed(&house, limit(0), Duration::ZERO), ["d", "c"]);
    assert_eq!(names(&house), ["a", "e"], "they take nothing in the store");
}

/// Contents that another base has stay: their bytes do not count.
#[test]
fn a_copy_that_another_base_shares_frees_nothing() {
    let house = House::new();
    let image = house.image("image", 1);
    let digest = Some(Digest::Sha256(Sha256::digest(vec![1; SIZE]).into()));
    for name in ["a", "b"] {
        house.add(Description { digest: digest.clone(), ..raw(name, &image) }).unwrap();
    }
    house.hydrated("a");
    let bytes: Vec<u64> = house.bases.unused(CLOSED).iter().map(|unused| unused.bytes).collect();
    assert_eq!(bytes, [0, 0]);
}
