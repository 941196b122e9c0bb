//! A creation is done once, whatever dies meanwhile (D63): a client that repeats it with its key gets the objects of the
//! first try, and no other client gets them.

use std::process::Stdio;
use std::thread;

use serde_json::{Value, json};

use super::{Api, exchange};
use crate::harness::{Killer, Storm, TestDaemon, open, read_at, until};

fn keyed(key: &str) -> String {
    format!("content-type: application/json\r\nidempotency-key: {key}\r\n")
}

/// Sends a creation again until there is an answer.
fn create(api: &Api, key: &str, body: &Value) -> (u16, Value) {
    until("an answer", || {
        let body = body.to_string();
        let (status, _, answer) =
            exchange(&api.socket, "POST", "/v1/disks", &keyed(key), body.as_bytes()).ok()?;
        (status != 503).then(|| (status, serde_json::from_slice(&answer).unwrap()))
    })
}

#[test]
fn a_creation_with_the_same_key_is_done_once() {
    let mut daemon = TestDaemon::on_disk();
    daemon.base(1 << 20);
    let api = Api::of(&daemon);
    let body = json!({"names": ["one", "two"], "base": "b"});
    let (status, made) = create(&api, "first", &body);
    assert_eq!(status, 200);
    assert_eq!(create(&api, "first", &body), (200, made.clone()));
    assert_eq!(create(&api, "first", &json!({"name": "two", "base": "b"})).1[0], made[1]);
    // The request must be the same. Another key, or none, is another creation.
    for (key, body) in [
        ("first", json!({"name": "one", "base": "b", "size": 2 << 20})),
        ("first", json!({"name": "one", "size": 1 << 20})),
        ("other", body.clone()),
    ] {
        let (status, answer) = create(&api, key, &body);
        assert_eq!((status, answer["error"]["kind"].as_str()), (409, Some("exists")), "{key} {body}");
    }
    api.refused("POST /v1/disks", "", Some(&body), (409, "exists"));
    for bad in ["", "a b", "\u{e4}", &"x".repeat(256)] {
        assert_eq!(
            api.send("POST /v1/disks", "", &keyed(bad), body.to_string().as_bytes()).0,
            400,
            "{bad:?}"
        );
    }
    daemon.kill_worker();
    assert_eq!(create(&api, "first", &body), (200, made.clone()));
    daemon.restart();
    assert_eq!(create(&api, "first", &body), (200, made));
    // A disk that was removed is created anew.
    daemon.ok(&["disk", "rm", "one"]);
    assert_eq!(create(&api, "first", &json!({"name": "one", "base": "b"})).0, 200);

    let source = daemon.path("b.img");
    let base = json!({"name": "again", "source": source}).to_string();
    let add = |key: &str| api.send("POST /v1/bases", "", &keyed(key), base.as_bytes());
    let (status, _, made) = add("first");
    assert_eq!((status, &add("first").2), (200, &made));
    assert_eq!(add("other").0, 409);
    daemon.kill_worker();
    assert_eq!(until("an answer", || Some(add("first")).filter(|answer| answer.0 != 503)).2, made);
}

/// The worker is killed as soon as the first disk, or all disks, are in the store. Some of these deaths come before the
/// answer.
#[test]
fn a_creation_whose_answer_is_lost_is_completed_with_its_key() {
    let daemon = TestDaemon::on_disk();
    let api = Api::of(&daemon);
    let (mut lost, mut round) = ([0, 0], 0);
    while lost.iter().any(|lost| *lost < 2) {
        let wanted = [1, 200][round % 2];
        let names: Vec<String> = (0..200).map(|i| format!("r{round}-{i}")).collect();
        let body = json!({"names": names, "size": 4096});
        let key = format!("key-{round}");
        let records = || std::fs::read_dir(daemon.store().join("disks")).unwrap().count();
        let before = records();
        let killer = Killer::new(&daemon);
        let first = thread::scope(|scope| {
            let (socket, text, headers) = (&api.socket, body.to_string(), keyed(&key));
            let first = scope.spawn(move || exchange(socket, "POST", "/v1/disks", &headers, text.as_bytes()));
            while records() < before + wanted && !first.is_finished() {
                std::hint::spin_loop();
            }
            killer.kill();
            first.join().unwrap()
        });
        let answered = first.is_ok_and(|(status, ..)| status == 200);
        lost[round % 2] += i32::from(!answered);
        let (status, made) = create(&api, &key, &body);
        assert_eq!(status, 200, "{made}");
        let made: Vec<&str> =
            made.as_array().unwrap().iter().map(|disk| disk["name"].as_str().unwrap()).collect();
        assert_eq!(made, names);
        // For another client the names are taken.
        assert_eq!(create(&api, "other", &json!({"name": names[7], "size": 4096})).0, 409);
        round += 1;
        assert!(round < 60, "the worker always answered first: {lost:?}");
    }
    assert_eq!(daemon.json(&["disk", "ls"]).as_array().unwrap().len(), 200 * round);
}

/// Several commands create the same disk while workers die: exactly one succeeds.
#[test]
fn of_commands_that_race_for_a_name_one_succeeds() {
    let mut daemon = TestDaemon::on_disk();
    daemon.base(1 << 20);
    let storm = Storm::at_random(&daemon, 77);
    let mut round = 0;
    while storm.kills() < 25 || round < 25 {
        let name = format!("vm{round}");
        let run = || {
            let mut command = daemon.command();
            command
                .args(["disk", "create", &name, "--base", "b"])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            command.spawn().unwrap()
        };
        let commands = [run(), run(), run()];
        let outputs = commands.map(|command| command.wait_with_output().unwrap());
        let won = outputs.iter().filter(|output| output.status.success()).count();
        assert_eq!(won, 1, "{name}: {outputs:?}");
        for output in outputs.iter().filter(|output| !output.status.success()) {
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(text.contains("exists already"), "{text}");
        }
        round += 1;
    }
    assert!(storm.stop() >= 25);
    assert_eq!(daemon.json(&["disk", "ls"]).as_array().unwrap().len(), round);
    daemon.stop();
    daemon.ok(&["check"]);
}

// Regression: the kernel kept the name that the API had removed, and with it the disk, until something looked the name up.
#[test]
fn a_disk_that_was_removed_while_a_client_had_it_open_goes_at_its_last_close() {
    let daemon = TestDaemon::on_disk();
    let api = Api::of(&daemon);
    let file = open(&daemon.create("d", false, 1 << 20));
    let (status, answer) = api.ask("DELETE /v1/disks/{name}?force=true", "d", None);
    assert_eq!(status, 200, "{answer}");
    assert_eq!(read_at(&file, 0, 10), [0; 10], "its client still has it");
    let left = || daemon.status()["unlinked_disks"].as_u64();
    assert_eq!(left(), Some(1), "{}", daemon.status());
    drop(file);
    until("the removal", || (left() == Some(0)).then_some(()));
    let deltas = daemon.store().join("deltas");
    until("its files go", || std::fs::read_dir(&deltas).unwrap().next().is_none().then_some(()));
}
