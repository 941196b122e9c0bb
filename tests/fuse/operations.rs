//! The listeners for operators and the delivery of events, through a running daemon: deaths of workers, upgrades,
//! addresses that are taken, destinations that hang, and a daemon without a network.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde_json::Value;
use tempfile::TempPath;

use crate::harness::{TestDaemon, open, read_at, until};
use crate::server::{Object, Server};
use crate::web::{Hook, free_address, get};

const MIB: usize = 1 << 20;

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

/// Names of events, with the base where there is one.
fn names(events: &[Value]) -> Vec<String> {
    let of = |event: &Value| {
        let name = event["event"].as_str().unwrap();
        event["base"].as_str().map_or_else(|| name.to_owned(), |base| format!("{name} {base}"))
    };
    events.iter().map(of).collect()
}

/// A command of `[notify]` that appends its input to a file, and that file.
fn appending() -> (String, TempPath) {
    let file = tempfile::Builder::new().prefix("plyfs-events-").tempfile().unwrap().into_temp_path();
    (format!("command = [\"/bin/sh\", \"-c\", \"exec cat >> {}\"]\n", file.display()), file)
}

fn lines(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// Causes a miss, a hit and an eviction of base `far`. No two calls read at the same place: the memory cache outlives
/// workers and evictions.
fn cause_traffic(daemon: &TestDaemon, at: usize) {
    let file = open(&daemon.disk("far"));
    read_at(&file, at as u64, 65536);
    read_at(&file, at as u64, 65536);
    drop(file);
    until("the fetched bytes in the cache", || {
        (daemon.json(&["base", "show", "far"])["cached_bytes"].as_u64() >= Some(65536)).then_some(())
    });
    daemon.ok(&["base", "evict", "far"]);
}

const TRAFFIC: [&str; 3] = ["base.miss far", "base.hit far", "base.evict far"];

#[test]
fn a_web_server_and_a_command_get_the_events_of_each_worker() {
    let (hook, server) = (Hook::start(), Server::start(Object::new(4 * MIB)));
    let (command, file) = appending();
    let daemon = configured(&format!("[notify]\nurl = \"{}\"\n{command}", hook.url()));
    daemon.ok(&["base", "add", "far", &server.url("/far")]);
    daemon.ok(&["disk", "create", "far", "--base", "far"]);
    cause_traffic(&daemon, MIB);
    let all_of = |events: &[Value], worker: i32| {
        let of_worker: Vec<Value> =
            events.iter().filter(|event| event["worker"] == i64::from(worker)).cloned().collect();
        let found = names(&of_worker);
        TRAFFIC.iter().chain(&["worker.started"]).all(|name| found.iter().any(|it| it == name))
    };
    let first = daemon.worker();
    until("the events at both", || {
        (all_of(&hook.events(), first) && all_of(&lines(&file), first)).then_some(())
    });
    // The next worker tells of its start, and goes on.
    daemon.prepared();
    daemon.kill_worker();
    cause_traffic(&daemon, 2 * MIB);
    let second = daemon.worker();
    assert_ne!(first, second);
    until("the events of the next worker at both", || {
        (all_of(&hook.events(), second) && all_of(&lines(&file), second)).then_some(())
    });
}

/// Regression: an upgrade and a stop lost the traffic of the last second, and what was not delivered yet.
#[test]
fn a_worker_that_is_told_to_end_delivers_its_last_events() {
    let server = Server::start(Object::new(4 * MIB));
    let (command, file) = appending();
    let mut daemon = configured(&format!("[notify]\n{command}"));
    daemon.ok(&["base", "add", "far", &server.url("/far")]);
    daemon.ok(&["disk", "create", "far", "--base", "far"]);
    // Reads at a place of its own. Returns the worker, and the bytes that it fetched.
    let fetch = |daemon: &TestDaemon, at: usize| {
        daemon.prepared();
        read_at(&open(&daemon.disk("far")), at as u64, 65536);
        let bases = daemon.status()["events"]["bases"].clone();
        let misses = bases[0]["miss"].as_object().unwrap().values();
        let bytes: u64 = misses.map(|total| total["bytes"].as_u64().unwrap()).sum();
        assert!(bytes >= 65536, "{bases}");
        (i64::from(daemon.worker()), bytes)
    };
    let delivered = |worker: i64| -> u64 {
        let events = lines(&file).into_iter().filter(|event| event["worker"] == worker);
        let misses = events.filter(|event| event["event"] == "base.miss");
        misses.map(|event| event["bytes"].as_u64().unwrap()).sum()
    };
    let (first, fetched) = fetch(&daemon, MIB);
    daemon.ok(&["upgrade"]);
    assert!(delivered(first) >= fetched, "after an upgrade: {} of {fetched}", delivered(first));
    let (second, fetched) = fetch(&daemon, 2 * MIB);
    assert_ne!(first, second);
    daemon.stop();
    assert!(delivered(second) >= fetched, "after a stop: {} of {fetched}", delivered(second));
}

#[test]
fn a_web_server_that_hangs_delays_nothing_and_gets_all_events_when_it_answers() {
    let (hook, server) = (Hook::start(), Server::start(Object::new(4 * MIB)));
    let (command, file) = appending();
    hook.hang();
    let metrics = free_address();
    let mut daemon = configured(&format!(
        "[notify]\nurl = \"{}\"\n{command}[metrics]\nlisten = \"{metrics}\"\n",
        hook.url()
    ));
    until("a delivery to hang", || (hook.held() > 0).then_some(()));
    // Guests, commands and the other destination go on.
    daemon.ok(&["base", "add", "far", &server.url("/far")]);
    daemon.ok(&["disk", "create", "far", "--base", "far"]);
    let guest = open(&daemon.disk("far"));
    guest.write_all_at(&[7; 8192], 3 * MIB as u64).unwrap();
    guest.sync_all().unwrap();
    cause_traffic(&daemon, MIB);
    until("the events at the command", || {
        let found = names(&lines(&file));
        TRAFFIC.iter().all(|name| found.iter().any(|it| it == name)).then_some(())
    });
    assert_eq!(hook.events(), [Value::Null; 0]);
    // Each event is delivered once the server answers, in order and without a gap.
    hook.go_on();
    let wanted: Vec<u64> = lines(&file).iter().map(|event| event["number"].as_u64().unwrap()).collect();
    until("all events at the server", || {
        let events = hook.events();
        let numbers: Vec<u64> = events.iter().map(|event| event["number"].as_u64().unwrap()).collect();
        wanted.iter().all(|number| numbers.contains(number)).then_some(())
    });
    let numbers: Vec<u64> = hook.events().iter().map(|event| event["number"].as_u64().unwrap()).collect();
    assert_eq!(numbers, (1..=numbers.len() as u64).collect::<Vec<_>>());
    let (_, text) = get(metrics, "/metrics").unwrap();
    assert_eq!(value(&text, "plyfs_notifications_total{result=\"dropped\"}"), Some(0.0), "{text}");
    assert!(value(&text, "plyfs_notifications_total{result=\"delivered\"}") >= Some(wanted.len() as f64));
    // A delivery that hangs delays no end of the daemon.
    drop(guest);
    hook.hang();
    daemon.ok(&["base", "evict", "far"]);
    daemon.stop();
}

#[test]
fn without_a_network_the_page_the_metrics_and_the_command_work_and_a_url_is_refused() {
    let off = "[security]\nnetwork = false\n";
    let mut refused = TestDaemon::unstarted("/var/tmp");
    let config = refused.path("plyfs.toml");
    fs::write(&config, format!("{off}[notify]\nurl = \"http://127.0.0.1:9/hook\"\n")).unwrap();
    let why = refused.try_start(&["--config", config.to_str().unwrap()]).unwrap_err();
    assert!(why.contains("notify.url") && why.contains("set security.network = true"), "{why}");

    let (page, metrics) = (free_address(), free_address());
    let (command, file) = appending();
    let daemon = configured(&format!(
        "{off}[notify]\n{command}[page]\nlisten = \"{page}\"\n[metrics]\nlisten = \"{metrics}\"\n"
    ));
    daemon.base(MIB);
    for _ in 0..2 {
        let worker = i64::from(daemon.worker());
        until("the page", || (worker_of_page(page) == Some(worker)).then_some(()));
        until("the metrics", || starts_of_metrics(metrics));
        until("the start of the worker", || {
            lines(&file).iter().any(|event| event["worker"] == worker).then_some(())
        });
        daemon.prepared();
        daemon.kill_worker();
    }
    let why = daemon.fails(&["base", "add", "far", "http://127.0.0.1:9/far"]);
    assert!(why.contains("[security] network is false"), "{why}");
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

// Regression: the page was never served when its address was taken at the start of the daemon.
#[test]
fn the_page_is_served_once_its_address_is_free_and_the_status_says_why_not_before() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let daemon = configured(&format!("[page]\nlisten = \"{address}\"\n"));
    let why = || daemon.status()["page"]["trouble"].as_str().map(ToOwned::to_owned);
    let said = why().expect("a reason");
    assert!(said.contains("[page] listen") && said.contains("tries again"), "{said}");
    assert!(daemon.ok(&["status"]).contains(&format!("not served at http://{address}/: ")));
    drop(taken);
    until("the page", || (worker_of_page(address) == Some(i64::from(daemon.worker()))).then_some(()));
    until("no trouble", || why().is_none().then_some(()));
    // The next workers take it from those before.
    daemon.prepared();
    daemon.kill_worker();
    until("the page of the next worker", || {
        (worker_of_page(address) == Some(i64::from(daemon.worker()))).then_some(())
    });
    daemon.prepared();
    daemon.ok(&["upgrade"]);
    until("the page after the upgrade", || {
        (worker_of_page(address) == Some(i64::from(daemon.worker()))).then_some(())
    });
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
