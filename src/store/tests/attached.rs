//! Attaching and detaching disks.

use super::*;

const NOW: Duration = Duration::ZERO;

fn attached(store: &Store) -> Vec<String> {
    let mut names: Vec<_> = store.attached().iter().map(|disk| disk.name()).collect();
    names.sort();
    names
}

// Each listed disk took two descriptors and a mapping until the end of the worker.
#[test]
fn listing_and_stat_attach_nothing() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "one", None), on("b", "two", Some(1 << 20)), blank("three")]).unwrap();
    write(&store, "one");
    store.disk("one").unwrap().attach().unwrap().resize(1 << 30).unwrap();
    write(&store, "two");
    let look = |store: &Store| {
        let all = store.disks_after(0);
        all.iter().map(|d| d.attributes()).map(|a| (a.size, a.allocated, a.modified_ns)).collect::<Vec<_>>()
    };
    let before = look(&store);
    assert_eq!(before.iter().map(|a| a.0).collect::<Vec<_>>(), [1 << 30, 1 << 20, 8192]);
    store.close().unwrap();
    drop(store);
    let store = fixture.open();
    assert_eq!(look(&store), before);
    assert_eq!(attached(&store), [""; 0]);
    assert!(store.disks_after(0).iter().all(|disk| disk.known_problem().is_none()));
    assert!(fixture.files("../live").is_empty());
    store.close().unwrap();
}

#[test]
fn a_live_map_of_an_earlier_worker_is_authoritative() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[blank("one")]).unwrap();
    store.disk("one").unwrap().attach().unwrap().grow(1 << 20, crate::disk::Grow::Yes).unwrap();
    drop(store);
    let store = fixture.open();
    assert_eq!(store.disk("one").unwrap().attributes().size, 1 << 20);
    store.close().unwrap();
    drop(store);
    assert_eq!(fixture.open().disk("one").unwrap().attributes().size, 1 << 20);
}

// The record of an earlier plyfs has the size with which the disk was created.
#[test]
fn the_size_in_a_record_is_ignored_unless_it_is_current() {
    let fixture = TestStore::new();
    let store = fixture.open();
    let id = store.create_disks(&[blank("one")]).unwrap()[0].id();
    store.disk("one").unwrap().attach().unwrap().resize(1 << 20).unwrap();
    store.close().unwrap();
    drop(store);
    let file = fixture.path(&format!("disks/{id}.disk"));
    let record = DiskRecord::decode(&fs::read(&file).unwrap()).unwrap();
    assert!(record.size_is_current && record.size == 1 << 20);
    fs::write(&file, DiskRecord { size: 8192, size_is_current: false, ..record }.encode()).unwrap();
    assert_eq!(fixture.open().disk("one").unwrap().attributes().size, 1 << 20);
}

/// Guards D47, D48.
#[test]
fn an_idle_disk_is_detached_and_goes_on_where_it_was() {
    let (fixture, store) = TestStore::with_base();
    store.create_disks(&[on("b", "one", None), blank("two")]).unwrap();
    let one = store.disk("one").unwrap();
    let epoch = one.attach().unwrap().delta().error_epoch();
    one.attach().unwrap().write(100, b"here", epoch).unwrap();
    // In use, as by a running request.
    let two = store.disk("two").unwrap().attach().unwrap();
    store.detach_idle(Duration::from_secs(600), NOW);
    assert_eq!(attached(&store), ["one", "two"]);
    store.detach_idle(NOW, NOW);
    assert_eq!(attached(&store), ["two"]);
    assert_eq!(fixture.files("../live").len(), 1);
    let seen = one.attributes();
    assert!(seen.size == 8192 && seen.allocated > 0);
    assert_eq!(attached(&store), ["two"]);
    // The handle is still valid.
    one.attach().unwrap().write(200, b"there", epoch).unwrap();
    let mut bytes = [0; 300];
    one.attach().unwrap().read(0, &mut bytes).unwrap();
    assert_eq!((&bytes[100..104], &bytes[200..205], bytes[0]), (&b"here"[..], &b"there"[..], 7));
    drop(two);
    store.detach_idle(NOW, NOW);
    assert_eq!(attached(&store), [""; 0]);
    // As after a power cut: the detached disk is durable.
    assert!(fixture.files("../live").is_empty());
    drop(store);
    let store = fixture.open();
    store.disk("one").unwrap().attach().unwrap().read(0, &mut bytes).unwrap();
    assert_eq!(&bytes[200..205], b"there");
}

#[test]
fn a_disk_that_may_be_open_is_detached_later() {
    let fixture = TestStore::new();
    let store = fixture.open();
    store.create_disks(&[blank("one")]).unwrap();
    let one = store.disk("one").unwrap();
    one.attach().unwrap();
    one.opened();
    store.detach_idle(NOW, Duration::from_secs(600));
    assert_eq!(attached(&store), ["one"]);
    one.closed();
    store.detach_idle(NOW, Duration::from_secs(600));
    assert_eq!(attached(&store), [""; 0]);
}

// Each half second a failing drive got the sync again, and the log two lines.
#[test]
fn blocks_that_a_failing_drive_refuses_are_synced_again_after_ever_longer_pauses() {
    let medium = SimMedium::new(1);
    let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
    let live: Arc<SimLive> = Arc::default();
    let store =
        Store::open_on(Arc::new(medium.clone()), |_| Ok(live), cache, Some(0), Arc::new(OpenHere)).unwrap();
    store.create_disks(&[blank("one")]).unwrap();
    let disk = store.disk("one").unwrap().attach().unwrap();
    for n in 1..9 {
        disk.zero(4096, 4096, 0).unwrap();
        disk.write(4096, &[n; 4096], 0).unwrap();
        disk.flush(0).unwrap();
    }
    disk.delta().age_carried();
    medium.plan(Fault {
        call: Call::SyncData,
        name: ".data".into(),
        skip: 0,
        times: u64::MAX,
        errno: libc::EIO,
    });
    let begun = std::time::Instant::now();
    let at = |half: u32| {
        store.settle_carried_in(crate::store::pools::DEFAULT, begun + Duration::from_millis(500) * half)
    };
    (0..240).for_each(at);
    // After 0, 1, 3, 7, 15, 31 and 63 seconds.
    assert_eq!(disk.delta().error_epoch(), 7);
    medium.forget_faults();
    at(246);
    assert_eq!(disk.delta().error_epoch(), 7);
    let mut bytes = [0; 4096];
    disk.read(4096, &mut bytes).unwrap();
    assert_eq!(bytes, [8; 4096]);
}

/// Guards D48.
#[test]
fn a_disk_whose_flush_failed_stays_attached() {
    let medium = SimMedium::new(1);
    let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
    let live: Arc<SimLive> = Arc::default();
    let store =
        Store::open_on(Arc::new(medium.clone()), |_| Ok(live), cache, Some(0), Arc::new(OpenHere)).unwrap();
    store.create_disks(&[blank("one")]).unwrap();
    let one = store.disk("one").unwrap();
    one.attach().unwrap().write(0, &[1; 4096], 0).unwrap();
    medium.plan(Fault { call: Call::SyncData, name: ".data".into(), skip: 0, times: 1, errno: libc::EIO });
    store.detach_idle(NOW, NOW);
    store.detach_idle(NOW, NOW);
    assert_eq!(attached(&store), ["one"]);
    // The earlier handle stays refused.
    assert!(one.attach().unwrap().write(0, &[2; 4096], 0).is_err());
}

#[test]
fn above_the_limit_the_longest_unused_disks_are_detached_first() {
    let fixture = TestStore::new();
    let store = fixture.open();
    let all: Vec<_> = (0..20).map(|n| blank(&format!("d{n}"))).collect();
    let all = store.create_disks(&all).unwrap();
    store.attach_at_most(4);
    for (n, disk) in all.iter().enumerate() {
        disk.attach().unwrap().write(0, &[n as u8; 4096], 0).unwrap();
        assert!(store.attached().len() <= 4);
    }
    for (n, disk) in all.iter().enumerate() {
        let mut bytes = [0xee; 4096];
        disk.attach().unwrap().read(0, &mut bytes).unwrap();
        assert_eq!(bytes, [n as u8; 4096]);
    }
    // When all are in use the limit is exceeded.
    let held: Vec<_> = all.iter().map(|disk| disk.attach().unwrap()).collect();
    assert_eq!(store.attached().len(), 20);
    drop(held);
    store.close().unwrap();
}

// Map files of interrupted flushes stayed for `plyfs check` to find, across any number of clean stops.
#[test]
fn a_clean_close_removes_files_that_unclean_ends_left() {
    let fixture = TestStore::new();
    let store = fixture.open();
    let made = store.create_disks(&[blank("one"), blank("two"), blank("bad")]).unwrap();
    let [one, two, bad] = [made[0].id(), made[1].id(), made[2].id()];
    write(&store, "one");
    write(&store, "bad");
    store.close().unwrap();
    drop((store, made));
    for file in [format!("{one}.7.map"), format!("{two}.1.map"), format!("{bad}.9.map"), "4000.1.map".into()]
    {
        fs::write(fixture.path("deltas").join(file), "a flush that was cut off").unwrap();
    }
    // May be the last copies.
    fs::write(fixture.path(&format!("deltas/{bad}.1.map")), "damaged").unwrap();
    fs::write(fixture.path("deltas/4001.data"), [1; 4096]).unwrap();
    fixture.open().close().unwrap();
    let kept = [
        "4001.data".into(),
        format!("{bad}.1.map"),
        format!("{bad}.9.map"),
        format!("{bad}.data"),
        format!("{one}.1.map"),
        format!("{one}.data"),
    ];
    let mut kept: Vec<String> = kept.into();
    kept.sort();
    assert_eq!(fixture.files("deltas"), kept);
}

#[test]
fn stat_of_a_disk_does_not_wait_for_its_flush() {
    let medium = SimMedium::new(1);
    let cache = Arc::new(BlockCache::new(1 << 20).unwrap());
    let live: Arc<SimLive> = Arc::default();
    let store =
        Store::open_on(Arc::new(medium.clone()), |_| Ok(live), cache, Some(0), Arc::new(OpenHere)).unwrap();
    store.create_disks(&[blank("a")]).unwrap();
    let node = store.disk("a").unwrap();
    node.attach().unwrap().delta().write(0, &[1; 4096], &Edges::default()).unwrap();
    let (asked, answers) = (node.clone(), Arc::new(Mutex::new(Vec::new())));
    let seen = answers.clone();
    medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        if event.call == Call::SyncData && event.stage == Stage::Before {
            let (node, (sender, receiver)) = (asked.clone(), mpsc::channel());
            std::thread::spawn(move || sender.send((node.attributes().size, node.name())));
            // The timeout is for a failing test only, which would wait for this call.
            seen.lock().push((event.name.to_owned(), receiver.recv_timeout(Duration::from_secs(10)).ok()));
        }
        Ok(())
    })));
    node.attach().unwrap().delta().flush().unwrap();
    medium.set_hook(None);
    let answers = answers.lock();
    assert_eq!(answers.len(), 3, "data, map and record are synced: {answers:?}");
    assert!(answers.iter().all(|(_, answer)| *answer == Some((8192, "a".into()))), "{answers:?}");
}
