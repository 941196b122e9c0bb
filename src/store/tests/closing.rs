//! Closing after storage that failed for a while.

use super::*;

#[test]
fn a_stop_removes_the_unfinished_record_that_failing_storage_kept() {
    let medium = SimMedium::new(1);
    let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
    let live: Arc<SimLive> = Arc::default();
    let store =
        Store::open_on(Arc::new(medium.clone()), |_| Ok(live), cache, Some(0), Arc::new(OpenHere)).unwrap();
    let node = store.create_disks(&[blank("a")]).unwrap().remove(0);
    let record = format!("{}.disk", node.id());
    let staged = format!("{record}.tmp");
    for (call, name) in [(Call::Rename, &record), (Call::Remove, &staged)] {
        medium.plan(Fault { call, name: name.clone(), skip: 0, times: 1, errno: libc::EIO });
    }
    assert!(node.update(|record| record.mode = 0o600).is_err());
    assert!(medium.list("disks").unwrap().contains(&staged), "the removal failed too");
    store.close().unwrap();
    assert_eq!(medium.list("disks").unwrap(), [record]);
}
