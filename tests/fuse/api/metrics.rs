//! `/metrics` on a TCP address.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use super::MIB;
use crate::harness::{TestDaemon, open, until};

/// A daemon that serves metrics at this address, with series for two disks.
fn serving() -> (TestDaemon, SocketAddr) {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let file = daemon.path("plyfs.toml");
    fs::write(&file, format!("[metrics]\nlisten = \"{address}\"\nseries = 2\n")).unwrap();
    daemon.try_start(&["--config", file.to_str().unwrap()]).unwrap();
    daemon.base(4 * MIB);
    (daemon, address)
}

/// The answer to a request for the metrics; `None` when there is none.
fn scrape(address: SocketAddr) -> Option<String> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(30))).ok()?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    answer.starts_with("HTTP/1.0 200").then_some(answer)
}

/// The value of a series.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

#[test]
fn disks_above_the_bound_are_summed_and_a_removed_one_stays_in_the_sum() {
    let (daemon, address) = serving();
    for number in 0..4u64 {
        let file = open(&daemon.create(&format!("vm{number}"), true, 8 << 20));
        file.write_all_at(&vec![1; 4096 * (1 + number as usize)], 0).unwrap();
    }
    let written = |text: &str, disk: &str| {
        value(text, &format!("plyfs_disk_operations_bytes_total{{disk=\"{disk}\",operation=\"write\"}}"))
    };
    let text = until("the metrics", || scrape(address));
    assert_eq!((written(&text, "vm0"), written(&text, "vm1")), (Some(4096.0), Some(8192.0)), "{text}");
    assert_eq!((written(&text, "vm2"), written(&text, "_other")), (None, Some(7.0 * 4096.0)));
    daemon.ok(&["disk", "rm", "--force", "vm3"]);
    daemon.ok(&["disk", "rm", "--force", "vm0"]);
    let text = until("the metrics without a removed disk", || {
        scrape(address).filter(|text| written(text, "vm0").is_none())
    });
    assert_eq!(written(&text, "_other"), Some(7.0 * 4096.0));
}

/// Guards D69.
#[test]
fn scrapers_that_hang_delay_no_guest_and_the_next_worker_is_scraped() {
    let (daemon, address) = serving();
    let file = open(&daemon.create("vm", true, 8 << 20));
    let silent: Vec<TcpStream> = (0..40).map(|_| TcpStream::connect(address).unwrap()).collect();
    for stream in silent.iter().step_by(2) {
        // It asks, and does not read the answer.
        let _ = (&*stream).write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n");
    }
    file.write_all_at(&[1; 4096], 0).unwrap();
    file.sync_all().unwrap();
    daemon.status();
    drop(silent);
    // How many workers have served, and when the present one began.
    let worker = || {
        let text = until("the metrics", || scrape(address));
        let of = |series| value(&text, series).unwrap();
        (of("plyfs_worker_starts_total"), of("plyfs_worker_start_time_seconds"))
    };
    let first = worker();
    assert!(first.0 >= 1.0 && first.1 > 1.7e9, "{first:?}");
    daemon.prepared();
    daemon.kill_worker();
    let second = worker();
    assert!(second.0 > first.0 && second.1 > first.1, "{first:?}, {second:?}");
    daemon.prepared();
    daemon.ok(&["upgrade"]);
    let third = worker();
    assert!(third.0 > second.0 && third.1 > second.1, "{second:?}, {third:?}");
}
