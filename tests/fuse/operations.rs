//! The listeners for operators, through deaths of workers, upgrades, and while an address is taken.

use std::fs;
use std::net::{SocketAddr, TcpListener};

use serde_json::Value;

use crate::harness::{TestDaemon, until};
use crate::web::{free_address, get};

/// A daemon with this configuration.
fn configured(config: &str) -> TestDaemon {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let file = daemon.path("plyfs.toml");
    fs::write(&file, config).unwrap();
    daemon.try_start(&["--config", file.to_str().unwrap()]).unwrap();
    daemon
}

/// The value of a series without labels.
fn value(text: &str, series: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(series)?.trim().parse().ok())
}

/// The process of the worker behind the status page.
fn worker_of_page(address: SocketAddr) -> Option<i64> {
    let (status, body) = get(address, "/v1/status")?;
    let body: Value = serde_json::from_str(&body).ok()?;
    (status == 200).then(|| body["worker_pid"].as_i64())?
}

/// How many workers have served, from the metrics.
fn starts_of_metrics(address: SocketAddr) -> Option<f64> {
    let (status, body) = get(address, "/metrics")?;
    (status == 200).then(|| value(&body, "plyfs_worker_starts_total"))?
}

#[test]
fn each_worker_serves_the_page_and_the_metrics_at_the_same_address() {
    let (page, metrics) = (free_address(), free_address());
    let daemon = configured(&format!("[page]\nlisten = \"{page}\"\n[metrics]\nlisten = \"{metrics}\"\n"));
    let mut starts = 0.0;
    let mut served = || {
        let worker = i64::from(daemon.worker());
        until("the page of this worker", || (worker_of_page(page) == Some(worker)).then_some(()));
        starts =
            until("the metrics of this worker", || starts_of_metrics(metrics).filter(|now| *now > starts));
    };
    served();
    for _ in 0..2 {
        daemon.prepared();
        daemon.kill_worker();
        served();
        daemon.prepared();
        daemon.ok(&["upgrade"]);
        served();
    }
    let log = daemon.log();
    let errors: Vec<_> =
        log.lines().filter(|line| line.contains("metrics") || line.contains("status page")).collect();
    assert!(errors.iter().all(|line| !line.contains("ERROR")), "{errors:?}");
}

// Regression: a worker whose address for metrics was taken never served them.
#[test]
fn metrics_are_served_once_their_address_is_free_and_the_status_says_why_not_before() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let (address, page) = (taken.local_addr().unwrap(), free_address());
    let daemon = configured(&format!("[page]\nlisten = \"{page}\"\n[metrics]\nlisten = \"{address}\"\n"));
    let metrics = || daemon.status()["metrics"].clone();
    let why = until("the reason", || metrics()["trouble"].as_str().map(ToOwned::to_owned));
    assert!(why.contains("in use") && why.contains("[metrics] listen"), "{why}");
    assert_eq!(metrics()["listen"], format!("http://{address}/metrics"));
    assert!(daemon.ok(&["status"]).contains(&format!("not served at http://{address}/metrics: ")));
    assert!(daemon.ok(&["status"]).contains(&format!("http://{page}/\n")));
    // The next worker finds it taken too, and each says so once.
    daemon.prepared();
    daemon.kill_worker();
    until("the reason of the next worker", || metrics()["trouble"].as_str().map(ToOwned::to_owned));
    assert_eq!(daemon.log().matches("metrics are not served yet").count(), 2, "{}", daemon.log());
    drop(taken);
    until("the metrics", || starts_of_metrics(address));
    until("no trouble", || metrics()["trouble"].is_null().then_some(()));
    assert_eq!(daemon.log().matches("metrics are not served yet").count(), 2, "{}", daemon.log());
    // A worker that was prepared while the address was taken serves them too.
    let starts = starts_of_metrics(address).unwrap();
    daemon.kill_worker();
    until("the metrics of the next worker", || starts_of_metrics(address).filter(|now| *now > starts));
    daemon.prepared();
    daemon.ok(&["upgrade"]);
    until("the metrics after the upgrade", || starts_of_metrics(address).filter(|now| *now > starts + 1.0));
}
