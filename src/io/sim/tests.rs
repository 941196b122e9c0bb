//! Tests that the simulated medium loses what it may lose, and keeps what it must keep.

use std::collections::BTreeSet;

use super::*;
use crate::io::{read_whole, replace};

fn file(medium: &SimMedium, name: &str) -> Arc<dyn MediumFile> {
    medium.open(name, Open::Create).unwrap()
}

fn read(medium: &SimMedium, name: &str) -> Option<Vec<u8>> {
    let file = medium.open(name, Open::Existing).ok()?;
    Some(read_whole(&*file, 1 << 20).unwrap())
}

/// All states of a file that cuts of a medium leave.
fn outcomes(medium: &SimMedium, name: &str) -> BTreeSet<Option<Vec<u8>>> {
    let mut rng = Rng::new(3);
    (0..600)
        .map(|_| {
            let keep = Keep { sectors: 50, lengths: 50, entries: 50, stale: false };
            read(&medium.crash(&mut rng, keep), name)
        })
        .collect()
}

#[test]
fn what_was_synced_survives_and_nothing_else_is_certain() {
    let medium = SimMedium::new(1);
    let f = file(&medium, "f");
    f.write_at(&[1; 128], 0).unwrap();
    f.sync_data().unwrap();
    // The bytes are durable, the name is not.
    assert_eq!(outcomes(&medium, "f"), BTreeSet::from([None, Some(vec![1; 128])]));
    medium.sync_dir(".").unwrap();
    assert_eq!(outcomes(&medium, "f"), BTreeSet::from([Some(vec![1; 128])]));
    assert_eq!(medium.in_flight(), 0);
    f.write_at(&[2; 128], 0).unwrap();
    let (a, b) = (|n| vec![n; 64], |m: Vec<u8>, n: Vec<u8>| Some([m, n].concat()));
    let all = BTreeSet::from([b(a(1), a(1)), b(a(1), a(2)), b(a(2), a(1)), b(a(2), a(2))]);
    assert_eq!(outcomes(&medium, "f"), all);
}

#[test]
fn blocks_of_data_files_are_whole_and_overwritten_versions_may_be_the_ones_that_stay() {
    let medium = SimMedium::new(1);
    let f = file(&medium, "d.data");
    f.write_at(&[1; 4096], 0).unwrap();
    f.sync_data().unwrap();
    medium.sync_dir(".").unwrap();
    f.write_at(&[2; 4096], 0).unwrap();
    f.write_at(&[3; 4096], 0).unwrap();
    f.punch(0, 4096).unwrap();
    let seen = outcomes(&medium, "d.data");
    assert_eq!(seen, (0..4).map(|n| Some(vec![n; 4096])).collect());
}

#[test]
fn lengths_and_bytes_are_lost_independently() {
    let medium = SimMedium::new(1);
    let f = file(&medium, "f");
    f.write_at(&[1; 64], 0).unwrap();
    f.sync_data().unwrap();
    medium.sync_dir(".").unwrap();
    f.write_at(&[2; 64], 64).unwrap();
    f.set_len(32).unwrap();
    let seen = outcomes(&medium, "f");
    let short = |bytes: Vec<u8>| Some(bytes);
    assert!(seen.contains(&short(vec![1; 32])) && seen.contains(&short([vec![1; 64], vec![0; 64]].concat())));
    assert!(seen.contains(&short([vec![1; 64], vec![2; 64]].concat())));
    assert!(seen.contains(&short([vec![1; 32], vec![0; 32]].concat())), "the cut, but not the length");
}

#[test]
fn a_rename_happens_wholly_or_not_and_does_not_make_the_contents_durable() {
    let medium = SimMedium::new(1);
    replace(&medium, ".", "r", &[1; 64]).unwrap();
    let f = file(&medium, "r.tmp");
    f.write_at(&[2; 64], 0).unwrap();
    medium.rename("r.tmp", "r").unwrap();
    let seen = outcomes(&medium, "r");
    assert!(seen.contains(&Some(vec![1; 64])) && seen.contains(&Some(vec![2; 64])));
    assert!(seen.contains(&Some(vec![])), "the new name of a file that was not synced");
    assert!(!seen.contains(&None));
    medium.sync_dir(".").unwrap();
    assert!(!outcomes(&medium, "r").contains(&Some(vec![1; 64])));
}

#[test]
fn what_a_failed_sync_did_not_write_is_never_written() {
    let mut lost = 0;
    for seed in 0..20 {
        let medium = SimMedium::new(seed);
        let f = file(&medium, "f");
        medium.sync_dir(".").unwrap();
        f.write_at(&[1; 64], 0).unwrap();
        medium.plan(Fault { call: Call::SyncData, name: "f".into(), skip: 0, times: 1, errno: libc::EIO });
        assert_eq!(f.sync_data().unwrap_err().raw_os_error(), Some(libc::EIO));
        f.sync_data().unwrap();
        assert_eq!(read(&medium, "f"), Some(vec![1; 64]), "memory has it");
        let after = medium
            .crash(&mut Rng::new(seed), Keep { sectors: 100, lengths: 100, entries: 100, stale: false });
        lost += usize::from(read(&after, "f") == Some(vec![0; 64]));
    }
    assert!(lost > 0 && lost < 20);
}

#[test]
fn any_call_can_fail_and_a_hook_sees_every_call() {
    let medium = SimMedium::new(1);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let log = seen.clone();
    medium.set_hook(Some(Arc::new(move |event: &Event<'_>| {
        log.lock().push((event.call, event.name.to_owned(), event.stage));
        Ok(())
    })));
    medium.make_dir("d").unwrap();
    let plan = |call, errno| medium.plan(Fault { call, name: String::new(), skip: 0, times: 1, errno });
    plan(Call::Create, libc::ENOSPC);
    assert_eq!(medium.open("d/f", Open::Create).err().unwrap().raw_os_error(), Some(libc::ENOSPC));
    let f = file(&medium, "d/f");
    for (call, errno) in [(Call::Write, libc::ENOSPC), (Call::SetLen, libc::EIO), (Call::Punch, libc::EIO)] {
        plan(call, errno);
        let result = match call {
            Call::Write => f.write_at(b"x", 0),
            Call::SetLen => f.set_len(9),
            _ => f.punch(0, 9),
        };
        assert_eq!(result.unwrap_err().raw_os_error(), Some(errno), "{call:?}");
    }
    plan(Call::SyncDir, libc::EIO);
    assert!(medium.sync_dir("d").is_err());
    plan(Call::Rename, libc::EIO);
    assert!(medium.rename("d/f", "d/g").is_err() && read(&medium, "d/f").is_some());
    assert!(seen.lock().iter().any(|e| *e == (Call::Rename, "d/g".into(), Stage::Before)));
    assert!(seen.lock().contains(&(Call::MakeDir, "d".into(), Stage::After)));
}
