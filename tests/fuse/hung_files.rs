//! What the daemon says of its bases while the file of one of them hangs.

use std::fs;

use serde_json::Value;

use crate::hanging::Hanging;
use crate::harness::{Random, TestDaemon, open, read_at, until};
use crate::web::{BOUND, free_address, get};

const MIB: usize = 1 << 20;

/// The output of a command. Fails when it does not end within the bound.
#[track_caller]
fn says(daemon: &TestDaemon, args: &[&str]) -> String {
    let mut command = std::process::Command::new("timeout");
    command.arg(BOUND.as_secs().to_string()).arg(env!("CARGO_BIN_EXE_plyfs")).args(args);
    let output = command.env("PLYFS_STORE", daemon.store()).output().unwrap();
    assert!(output.status.success(), "plyfs {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn named<'a>(bases: &'a Value, name: &str) -> &'a Value {
    bases.as_array().unwrap().iter().find(|base| base["name"] == name).unwrap()
}

// Regression: one base whose file hung kept the list of all bases waiting as long, and the status page answered 503.
/// Guards D75.
#[test]
fn a_base_whose_file_hangs_delays_no_answer_about_bases() {
    let hanging = Hanging::new(Random(9).bytes(MIB));
    let (page, metrics) = (free_address(), free_address());
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let config = daemon.path("plyfs.toml");
    fs::write(&config, format!("[page]\nlisten = \"{page}\"\n[metrics]\nlisten = \"{metrics}\"\n")).unwrap();
    let config = config.to_str().unwrap().to_owned();
    daemon.try_start(&["--config", &config]).unwrap();
    daemon.base(MIB);
    daemon.create("a", true, 1 << 20);
    // One base whose file is open, and one that is opened when it is looked at.
    for (name, path) in [("seen", hanging.image()), ("unseen", hanging.trap(0))] {
        daemon.ok(&["base", "add", name, path.to_str().unwrap()]);
        daemon.ok(&["disk", "create", name, "--base", name]);
    }
    daemon.stop();
    daemon.try_start(&["--config", &config]).unwrap();
    read_at(&open(&daemon.disk("seen")), 0, 4096);
    assert_eq!(named(&daemon.json(&["base", "ls", "--filter", "name=seen"]), "seen")["state"], "ok");
    hanging.hang_with_attributes();

    let list = || serde_json::from_str::<Value>(&says(&daemon, &["--json", "base", "ls"])).unwrap();
    // More often than requests are worked on at a time.
    for _ in 0..20 {
        list();
        assert_eq!(get(page, "/v1/bases").map(|answer| answer.0), Some(200));
        let _ = get(page, "/v1/bases/unseen/map");
    }
    let bases = list();
    assert_eq!(
        (named(&bases, "b")["state"].as_str(), named(&bases, "b")["error"].as_str()),
        (Some("ok"), None)
    );
    assert!(named(&bases, "b")["examined"].is_null(), "{bases}");
    for name in ["seen", "unseen"] {
        let base = named(&bases, name);
        assert_eq!(base["state"], "waiting", "{base}");
        assert!(base["waiting_since"].is_string() && base["state_since"].is_string(), "{base}");
        let why = base["waiting_for"].as_str().unwrap();
        assert!(why.contains("does not answer"), "{why}");
    }
    assert!(named(&bases, "seen")["examined"].is_string(), "{bases}");
    let table = says(&daemon, &["base", "ls"]);
    assert!(table.contains("seen: waiting since"), "{table}");
    assert!(says(&daemon, &["base", "show", "unseen"]).contains("waiting"));
    let status: Value = serde_json::from_str(&says(&daemon, &["--json", "status"])).unwrap();
    let waiting = status["waiting"].as_array().unwrap();
    assert!(waiting.iter().any(|trouble| trouble["base"] == "seen"), "{status}");
    assert!(says(&daemon, &["disk", "ls"]).contains("unseen"));
    says(&daemon, &["--json", "top", "--batch", "1"]);
    for path in ["/v1/status", "/v1/disks", "/v1/stats", "/v1/bases/b/map"] {
        assert_eq!(get(page, path).map(|answer| answer.0), Some(200), "{path}");
    }
    let (status, text) = get(metrics, "/metrics").unwrap();
    assert!(status == 200 && text.contains("plyfs_bases 3"), "{text}");

    hanging.go_on();
    until("the bases to work", || {
        let bases = list();
        ["seen", "unseen"].iter().all(|name| named(&bases, name)["state"] == "ok").then_some(())
    });
    daemon.stop();
}
