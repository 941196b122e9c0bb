//! `/v1/stats`: what requests through the mount leave there.

use std::os::unix::fs::FileExt;

use serde_json::Value;

use super::{Api, MIB, serving};
use crate::harness::{fallocate, open, read_at, until};

/// The counters of a disk; null when it has none.
fn of_disk<'a>(stats: &'a Value, name: &str) -> &'a Value {
    let disks = stats["disks"].as_array().unwrap();
    disks.iter().find(|disk| disk["name"] == name).map_or(&Value::Null, |disk| &disk["counters"])
}

fn sum(values: &Value, key: &str) -> u64 {
    let each = values
        .as_array()
        .into_iter()
        .flatten()
        .chain(values.as_object().into_iter().flat_map(|object| object.values()));
    each.map(|value| value[key].as_u64().unwrap()).sum()
}

#[test]
fn requests_count_for_their_disk_and_begin_at_0_with_each_worker() {
    let daemon = serving();
    let api = Api::of(&daemon);
    let stats = || api.ok("GET /v1/stats", "", None);
    let path = daemon.create("one", true, 8 << 20);
    daemon.create("idle", true, 8 << 20);
    let file = open(&path);
    file.write_all_at(&[7; 8192], 4096).unwrap();
    file.sync_all().unwrap();
    fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE, 4096, 4096).unwrap();
    read_at(&file, 0, 65536);
    read_at(&file, 0, 65536);
    let first = stats();
    let one = of_disk(&first, "one");
    let operations = &one["operations"];
    assert_eq!(
        (operations["write"]["bytes"].as_u64(), operations["flush"]["count"].as_u64()),
        (Some(8192), Some(1))
    );
    assert_eq!(operations["discard"]["bytes"], 4096);
    let read = &operations["read"];
    assert_eq!((read["bytes"].as_u64(), read["errors"].as_u64()), (Some(2 * 65536), Some(0)));
    assert_eq!(sum(&read["latency"], "count"), read["count"].as_u64().unwrap());
    assert!(read["latency_ns"].as_u64().unwrap() > 0);
    let from = &one["read_from"];
    assert_eq!(sum(from, "bytes"), 2 * 65536, "{from}");
    assert_eq!((from["delta"]["bytes"].as_u64(), from["zero"]["bytes"].as_u64()), (Some(8192), Some(8192)));
    assert_eq!(from["memory"]["bytes"], 65536 - 8192, "the second read finds the base in memory");
    assert_eq!(from["fetched"]["bytes"], 65536 - 8192);
    let reads_of = |name: &str| of_disk(&first, name)["operations"]["read"]["count"].as_u64().unwrap_or(0);
    assert_eq!(reads_of("idle"), 0);
    let base = &first["bases"][0];
    assert_eq!(base["name"], "b");
    assert!(base["traffic"]["hit"]["memory"]["bytes"].as_u64().unwrap() >= 65536 - 8192);
    assert_eq!(sum(&base["counters"]["operations"], "count"), 0, "its own file was not read");
    read_at(&open(&daemon.mount().join("bases/b.raw")), 0, MIB);
    assert_eq!(stats()["bases"][0]["counters"]["operations"]["read"]["bytes"], MIB as u64);

    daemon.kill_worker();
    until("the next worker", || (daemon.worker() != first["worker"].as_i64().unwrap() as i32).then_some(()));
    let second = stats();
    assert_ne!(second["worker"], first["worker"]);
    assert!(second["since"].as_str() > first["since"].as_str());
    assert!(of_disk(&second, "one")["operations"]["write"].is_null());

    // A removed disk leaves its part of the sum.
    file.write_all_at(&[7; 4096], 0).unwrap();
    drop(file);
    api.ok("DELETE /v1/disks/{name}?force=true", "one", None);
    let third = stats();
    assert!(of_disk(&third, "one").is_null(), "{third}");
    assert_eq!(third["all_disks"]["operations"]["write"]["bytes"], 4096);
}
