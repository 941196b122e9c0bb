//! Many disks: descriptors and attachments.

use std::os::unix::fs::FileExt;
use std::process::Command;

use crate::harness::*;

const MIB: u64 = 1 << 20;

fn create(house: &House, count: usize) -> Vec<String> {
    let names: Vec<String> = (0..count).map(|n| format!("d{n}")).collect();
    let mut args = vec!["disk", "create", "--size", "1M"];
    args.extend(names.iter().map(String::as_str));
    house.ok(&args);
    names
}

fn attached(house: &House) -> u64 {
    house.json(&["status"])["attached_disks"].as_u64().unwrap()
}

// Regression: with 300 disks and 256 descriptors fsync was EIO, `stop` ended with 0 and the daemon with 1, and `check`
// found damage that no clean stop repaired.
#[test]
fn more_disks_can_be_in_use_than_there_are_descriptors() {
    let mut house = House::unstarted("/var/tmp");
    let mut few = Command::new("sh");
    few.args(["-c", "ulimit -n 256 && exec \"$@\"", "sh"]);
    house.start_under(few);
    let names = create(&house, 300);
    let files: Vec<_> = names.iter().map(|name| open(&house.disk(name))).collect();
    for round in 1..3u8 {
        for (n, file) in files.iter().enumerate() {
            file.write_all_at(&[round, n as u8], u64::from(round) * 4096).unwrap();
            file.sync_all().unwrap();
        }
    }
    assert!((1..150).contains(&attached(&house)));
    // Unflushed writes to disks that are attached and to disks that are not.
    for (n, file) in files.iter().enumerate() {
        file.write_all_at(&[3, n as u8], 3 * 4096).unwrap();
    }
    house.kill_worker();
    for (n, file) in files.iter().enumerate() {
        for round in 1..4u8 {
            assert_eq!(read_at(file, u64::from(round) * 4096, 2), [round, n as u8]);
        }
    }
    drop(files);
    house.stop();
    house.ok(&["check"]);
}

// Regression: each listed disk stayed attached until the worker ended.
#[test]
fn a_listing_and_a_stat_of_each_file_attach_no_disk() {
    let mut house = House::on_disk();
    let names = create(&house, 100);
    open(&house.disk("d7")).write_all_at(b"written", 4096).unwrap();
    house.restart();
    let list = house.json(&["disk", "ls"]);
    assert_eq!(list.as_array().unwrap().len(), 100);
    assert!(list.as_array().unwrap().iter().all(|disk| disk["size"] == MIB && disk["state"] == "ok"));
    for name in &names {
        let meta = std::fs::metadata(house.disk(name)).unwrap();
        assert_eq!(meta.len(), MIB);
    }
    assert!(list[7]["delta_bytes"].as_u64() > Some(0) && list[8]["delta_bytes"] == 0, "{list}");
    assert_eq!(attached(&house), 0);
    assert!(list.as_array().unwrap().iter().all(|disk| disk["map_bytes"] == 0), "{list}");
    house.stop();
}
