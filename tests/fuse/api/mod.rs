//! The control API: the daemon answers every operation, and invalid requests, as `/v1/openapi.json` describes.

mod creation;
mod metrics;
mod schema;
mod stats;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Value, json};

use self::schema::misfits;
use crate::glance::House;
use crate::harness::{TestDaemon, open, read_at, signal, until};
use crate::server::{Object, Server};

const MIB: usize = 1 << 20;

/// A client that compares every answer with the description.
struct Api {
    socket: PathBuf,
    document: Value,
    /// Operations that were answered with success.
    done: RefCell<BTreeSet<String>>,
}

impl Api {
    fn of(daemon: &TestDaemon) -> Self {
        let socket = daemon.store().join("control.sock");
        let (status, _, body) = exchange(&socket, "GET", "/v1/openapi.json", "", b"").unwrap();
        assert_eq!(status, 200);
        let document = serde_json::from_slice(&body).unwrap();
        Self { socket, document, done: RefCell::default() }
    }

    /// Sends a request, and compares the answer with the description of `operation`, such as `GET /v1/disks/{name}`.
    #[track_caller]
    fn ask(&self, operation: &str, name: &str, body: Option<&Value>) -> (u16, Value) {
        let text = body.map(Value::to_string).unwrap_or_default();
        let media = if body.is_some() { "content-type: application/json\r\n" } else { "" };
        let (status, _, answer) = self.send(operation, name, media, text.as_bytes());
        let json = serde_json::from_slice(&answer).unwrap_or(Value::Null);
        (status, json)
    }

    /// As [`ask`](Self::ask), with any bytes as body.
    #[track_caller]
    fn send(&self, operation: &str, name: &str, headers: &str, body: &[u8]) -> (u16, String, Vec<u8>) {
        let (method, template) = operation.split_once(' ').unwrap();
        // A snapshot is given with its disk: `DISK@SNAPSHOT`.
        let (name, snapshot) = name.split_once('@').unwrap_or((name, ""));
        let path = template.replace("{name}", name).replace("{id}", name).replace("{snapshot}", snapshot);
        let (status, media, answer) = exchange(&self.socket, method, &path, headers, body).unwrap();
        let template = template.split('?').next().unwrap();
        let described = &self.document["paths"][template][method.to_lowercase()];
        assert!(described.is_object(), "{operation} is not described");
        self.compare(described, status, &media, &answer, &format!("{method} {path}"));
        if status < 300 {
            self.done.borrow_mut().insert(described["operationId"].as_str().unwrap().to_owned());
        }
        (status, media, answer)
    }

    #[track_caller]
    fn compare(&self, operation: &Value, status: u16, media: &str, answer: &[u8], what: &str) {
        let responses = &operation["responses"];
        let exact = responses.get(status.to_string());
        assert!(exact.is_some() || status >= 400, "{what}: status {status} is not described");
        let response = exact.unwrap_or(&responses["default"]);
        let response = match response["$ref"].as_str() {
            Some(to) => self.document.pointer(to.strip_prefix('#').unwrap()).unwrap(),
            None => response,
        };
        let content = &response["content"][media];
        assert!(content.is_object(), "{what}: {status} with {media} is not described");
        let schema = &content["schema"];
        let values: Vec<Value> = match media {
            "application/json" => vec![serde_json::from_slice(answer).unwrap()],
            "application/x-ndjson" => {
                let lines = std::str::from_utf8(answer).unwrap().lines();
                lines.map(|line| serde_json::from_str(line).unwrap()).collect()
            }
            _ => Vec::new(),
        };
        for value in values {
            let wrong = misfits(&self.document, schema, &value, what);
            assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        }
    }

    /// Sends a request that must succeed.
    #[track_caller]
    fn ok(&self, operation: &str, name: &str, body: Option<&Value>) -> Value {
        if let Some(body) = body {
            let (method, template) = operation.split_once(' ').unwrap();
            let described = &self.document["paths"][template][method.to_lowercase()]["requestBody"];
            let schema = &described["content"]["application/json"]["schema"];
            assert_eq!(misfits(&self.document, schema, body, operation), [""; 0]);
        }
        let (status, answer) = self.ask(operation, name, body);
        assert!(status < 300, "{operation} {name}: {status} {answer}");
        answer
    }

    /// Sends a request that must be refused, with this status and kind.
    #[track_caller]
    fn refused(&self, operation: &str, name: &str, body: Option<&Value>, expected: (u16, &str)) {
        let (status, answer) = self.ask(operation, name, body);
        assert_eq!(
            (status, answer["error"]["kind"].as_str().unwrap()),
            expected,
            "{operation} {name}: {answer}"
        );
    }
}

/// Status, media type and body of the answer.
fn exchange(
    socket: &std::path::Path,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> std::io::Result<(u16, String, Vec<u8>)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nhost: plyfs\r\nconnection: close\r\n{headers}");
    // The supervisor accepts an upgrade only without a body, and decides by this header.
    let length = if length > 0 { format!("content-length: {length}\r\n") } else { String::new() };
    // In one write, because the supervisor reads once.
    stream.write_all(&[format!("{head}{length}\r\n").as_bytes(), body].concat())?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    let Some(end) = answer.windows(4).position(|w| w == b"\r\n\r\n") else {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    };
    let head = String::from_utf8_lossy(&answer[..end]).to_lowercase();
    let media = head.lines().find_map(|line| line.strip_prefix("content-type: ")).unwrap_or_default();
    Ok((head[9..12].parse().unwrap(), media.to_owned(), answer[end + 4..].to_vec()))
}

/// A daemon with a persistent cache, and a base `b` on this host.
fn serving() -> TestDaemon {
    let mut daemon = TestDaemon::unstarted("/var/tmp");
    let (keys, config) = (daemon.path("keys"), daemon.path("plyfs.toml"));
    fs::create_dir(&keys).unwrap();
    fs::write(keys.join("a"), "0123456789abcdef0123456789abcdef").unwrap();
    fs::write(&config, format!("[encryption]\nkey_dirs = [{keys:?}]\n")).unwrap();
    daemon
        .try_start(&["--cache-disk", "64M", "--trash-grace", "1h", "--config", config.to_str().unwrap()])
        .unwrap();
    daemon.base(4 * MIB);
    daemon
}

#[test]
fn every_operation_answers_as_described() {
    let mut daemon = serving();
    let api = Api::of(&daemon);
    let ok = |operation: &str, name: &str| api.ok(operation, name, None);
    let with = |operation: &str, name: &str, body: Value| api.ok(operation, name, Some(&body));
    ok("GET /v1/openapi.json", "");

    with("POST /v1/disks", "", json!({"names": ["one", "two"], "base": "b"}));
    with("POST /v1/disks", "", json!({"name": "blank", "size": 1 << 20}));
    read_at(&open(&daemon.disk("one")), 0, 65536);
    ok("GET /v1/disks", "");
    // The bytes in the memory cache are somewhere else, too.
    let all = |map: &Value| {
        let places = map["total"].as_object().unwrap().iter().filter(|(place, _)| *place != "memory");
        places.map(|(_, bytes)| bytes.as_u64().unwrap()).sum::<u64>()
    };
    let map = ok("GET /v1/disks/{name}/map?cells=10", "one");
    assert!(map["attached"] == true && map["exact"] == true && map["size"] == all(&map), "{map}");
    // A disk that was not used yet stays so.
    let attached = ok("GET /v1/status", "")["attached_disks"].clone();
    let map = ok("GET /v1/disks/{name}/map", "two");
    assert!(map["attached"] == false && map["size"] == all(&map), "{map}");
    assert_eq!(ok("GET /v1/status", "")["attached_disks"], attached);
    ok("GET /v1/disks/{name}", "one");
    assert_eq!(with("POST /v1/disks/{name}/resize", "two", json!({"size": 8 << 20}))["size"], 8 << 20);
    let limits = json!({"quota": 1 << 20, "iops": 1000, "bandwidth": null});
    let limited = with("POST /v1/disks/{name}/limits", "two", limits);
    assert_eq!((&limited["limits"]["iops"], &limited["quota_used"]), (&json!(1000), &json!(0)));
    with("POST /v1/disks/{name}/limits", "two", json!({"quota": null, "iops": null}));
    with(
        "POST /v1/disks",
        "",
        json!({"name": "small", "size": 1 << 20, "limits": {"quota": 4096, "burst_ms": 5}}),
    );
    ok("DELETE /v1/disks/{name}", "small");
    assert_eq!(ok("DELETE /v1/disks/{name}", "blank"), json!({"removed": ["blank"]}));

    with("POST /v1/disks/{name}/snapshots", "one", json!({"name": "s"}));
    open(&daemon.disk("one")).write_all_at(&[1; 4096], 8192).unwrap();
    let extents = ok("GET /v1/disks/{name}/extents?since=s", "one")["extents"].clone();
    assert_eq!((&extents[0]["offset"], extents.as_array().unwrap().len()), (&json!(8192), 1), "{extents}");
    assert_eq!(ok("GET /v1/disks/{name}/snapshots", "one")[0]["name"], "s");
    with("POST /v1/disks/{name}/rollback", "one", json!({"snapshot": "s", "force": true}));
    assert_eq!(ok("GET /v1/disks/{name}/extents?since=s", "one")["extents"], json!([]));
    ok("DELETE /v1/disks/{name}/snapshots/{snapshot}", "one@s");

    // `plyfs pool add` prepares the directory, and sends the request.
    let dir = daemon.path("pool");
    daemon.ok(&["pool", "add", "fast", dir.to_str().unwrap()]);
    let done = || until("the takeover", || (ok_or_wait(&api)?["upgrade"]["state"] == "done").then_some(()));
    with("POST /v1/pools", "", json!({"name": "fast", "dir": dir}));
    done();
    assert_eq!(ok("GET /v1/pools", "")[1]["name"], "fast");
    with("POST /v1/disks", "", json!({"name": "there", "size": 1 << 20, "pool": "fast"}));
    assert_eq!(ok("GET /v1/pools/{name}", "fast")["disks"], json!(["there"]));
    ok("POST /v1/pools/{name}/attach", "fast");
    done();
    with("POST /v1/disks/{name}/move", "there", json!({"pool": "default"}));
    until("the end of the move", || {
        let pools = ok("GET /v1/disks/{name}", "there")["needs_pools"].clone();
        (pools == json!(["default"])).then_some(())
    });
    ok("DELETE /v1/disks/{name}", "there");
    ok("DELETE /v1/pools/{name}", "fast");
    done();
    let trash = ok("GET /v1/trash", "");
    let in_trash = |trash: &Value| {
        let list = trash.as_array().unwrap().iter();
        list.into_iter().find(|disk| disk["name"] == "blank" || disk["name"] == "again").cloned()
    };
    let removed = in_trash(&trash).expect("the removed disk");
    let number = removed["id"].to_string();
    with("POST /v1/trash/{id}/restore", &number, json!({"name": "again"}));
    ok("DELETE /v1/disks/{name}?snapshots=true", "again");
    assert_eq!(ok("DELETE /v1/trash/{id}", &number), json!({"removed": ["again"]}));
    assert_eq!(in_trash(&ok("GET /v1/trash", "")), None);
    with("POST /v1/disks/{name}/snapshots", "one", json!({"name": "t"}));
    with("POST /v1/disks", "", json!({"name": "clone", "from": "one@t"}));
    assert_eq!(
        ok("GET /v1/disks/{name}/children", "one"),
        json!([]),
        "it has written nothing before the snapshot"
    );
    ok("DELETE /v1/disks/{name}?now=true", "clone");
    let children = ok("GET /v1/bases/{name}/children", "b");
    assert_eq!(children[1]["name"], "one@t", "{children}");
    ok("DELETE /v1/disks/{name}/snapshots/{snapshot}", "one@t");
    let none = with("POST /v1/prune", "", json!({"dry_run": true, "older_than_seconds": 3600}));
    assert_eq!(none["bases"], json!([]));
    let key = json!({"key_file": daemon.path("keys/a")});
    with("POST /v1/disks", "", json!({"name": "dark", "size": 1 << 20, "encryption": key}));
    assert_eq!(ok("POST /v1/disks/{name}/unlock", "dark")["state"], "ok");
    with("POST /v1/disks", "", json!({"name": "clone", "from": "dark", "encryption": key}));
    assert!(with("POST /v1/disks/{name}/rekey", "dark", key)["key"].as_str().unwrap().ends_with("keys/a"));
    assert_eq!(with("POST /v1/disks/{name}/shred", "dark", json!({})), json!({"removed": ["dark"]}));
    ok("DELETE /v1/disks/{name}", "clone");

    let object = Object::new(2 * MIB);
    let server = Server::start(object);
    let source = server.url("/far?signature=secret");
    let far = with("POST /v1/bases", "", json!({"name": "far", "source": source, "identity": "strong"}));
    assert!(!far.to_string().contains("secret"), "{far}");
    with("POST /v1/disks", "", json!({"name": "far", "base": "far"}));
    read_at(&open(&daemon.disk("far")), 1 << 20, 65536);
    ok("GET /v1/bases", "");
    let map = ok("GET /v1/bases/{name}/map?cells=4096", "far");
    // What was read may not be cached yet, or at all on a full host.
    assert!(map["total"]["absent"].as_u64().unwrap() > 0 && map["size"] == all(&map), "{map}");
    let memory: Vec<u64> = map["memory"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
    let cell = (1 << 20) / map["cell_bytes"].as_u64().unwrap() as usize;
    assert!(memory[cell] >= 65536 && memory[0] == 0, "{map}");
    assert_eq!(ok("GET /v1/bases/{name}/map", "b")["total"]["absent"], 0);
    ok("GET /v1/bases/{name}", "far");
    ok("GET /v1/bases/{name}", "b");
    with(
        "POST /v1/bases/{name}/set",
        "far",
        json!({"source": server.url("/far"), "mirrors": [server.url("/mirror")]}),
    );
    with("POST /v1/bases/{name}/fail", "far", json!({"given_up": true}));
    with("POST /v1/bases/{name}/fail", "far", json!({"given_up": false}));
    with("POST /v1/bases/{name}/pin", "far", json!({"pinned": true}));
    with("POST /v1/bases/{name}/hydrate", "far", json!({"rate": 1 << 30}));
    let is_done = |base: Value| (base["work"]["state"] == "done").then_some(());
    until("a hydrated base", || is_done(ok("GET /v1/bases/{name}", "far")));
    ok("POST /v1/bases/{name}/verify", "far");
    until("a verified base", || is_done(ok("GET /v1/bases/{name}", "far")));
    assert_eq!(ok("GET /v1/jobs/{id}", "hydrate-far")["kind"], "hydrate");
    assert_eq!(ok("POST /v1/jobs/{id}/cancel", "verify-far")["state"], "done");
    assert_eq!(ok("GET /v1/jobs", "").as_array().unwrap().len(), 2);
    let export = json!({"kind": "export", "disk": "one", "bytes": 1, "total": 4});
    assert_eq!(with("PUT /v1/jobs/{id}", "export-one-1", export.clone())["state"], "copying");
    let socket = &api.socket;
    let raw = |method: &str, path: &str| {
        assert_eq!(exchange(socket, method, path, "", b"").unwrap().0, 200, "{method} {path}");
    };
    std::thread::scope(|scope| {
        scope.spawn(|| {
            raw("POST", "/v1/jobs/export-one-1/hold");
            raw("DELETE", "/v1/jobs/export-one-1");
        });
        assert_eq!(ok("POST /v1/jobs/{id}/cancel", "export-one-1")["state"], "cancelled");
    });
    with("PUT /v1/jobs/{id}", "export-one-1", export.clone());
    std::thread::scope(|scope| {
        scope.spawn(|| raw("POST", "/v1/jobs/export-one-1/cancel"));
        assert_eq!(ok("POST /v1/jobs/{id}/hold", "export-one-1")["state"], "cancelled");
        assert_eq!(with("PUT /v1/jobs/{id}", "export-one-1", export)["state"], "cancelled");
        ok("DELETE /v1/jobs/{id}", "export-one-1");
    });
    ok("POST /v1/bases/{name}/evict", "far");
    ok("DELETE /v1/disks/{name}?now=true", "far");
    ok("DELETE /v1/bases/{name}", "far");

    let is_job_done = |id: &str| (ok("GET /v1/jobs/{id}", id)["state"] == "done").then_some(());
    with("POST /v1/disks/{name}/flatten", "one", json!({"rate": 1 << 30}));
    until("a flattened disk", || is_job_done("flatten-one"));
    assert_eq!(with("POST /v1/disks/{name}/compact", "one", json!({}))["job"], Value::Null);
    with("POST /v1/disks/{name}/rebase", "one", json!({"base": "b"}));
    until("a rebased disk", || is_job_done("rebase-one"));

    ok("POST /v1/disks/{name}/trace", "two");
    read_at(&open(&daemon.disk("two")), 1 << 20, 65536);
    assert_eq!(ok("DELETE /v1/disks/{name}/trace", "two")["recording"], false);
    ok("GET /v1/traces", "");
    ok("GET /v1/bases/{name}/trace", "b");
    let (status, _, file) = api.send("GET /v1/bases/{name}/trace/file", "b", "", b"");
    assert_eq!(status, 200);
    ok("DELETE /v1/bases/{name}/trace", "b");
    assert_eq!(api.send("PUT /v1/bases/{name}/trace/file", "b", "", &file).0, 200);
    // The answer for an unreadable trace has fewer keys.
    let path = daemon.store().join("traces/1.trace");
    fs::write(&path, &file[..file.len() - 1]).unwrap();
    assert!(ok("GET /v1/bases/{name}/trace", "b")["error"].is_string());
    ok("GET /v1/traces", "");

    for query in ["", "?after=0", "?after=0&worker=1"] {
        assert_eq!(api.send(&format!("GET /v1/events{query}"), "", "", b"").0, 200);
    }
    ok("POST /v1/upgrade", "");
    until("the end of the upgrade", || (ok_or_wait(&api)?["upgrade"]["state"] == "done").then_some(()));
    ok("GET /v1/status", "");
    ok("GET /v1/stats", "");
    assert_eq!(api.send("GET /metrics", "", "", b"").0, 200);
    let accept = "accept: application/openmetrics-text\r\n";
    assert_eq!(api.send("GET /metrics", "", accept, b"").0, 200);
    ok("POST /v1/stop", "");
    daemon.ended();

    // The clouds of another daemon.
    let house = House::new();
    house.add(1, &Object::new(MIB));
    let clouds = Api::of(&house.daemon);
    assert_eq!(clouds.ask("GET /v1/clouds", "", None), (200, json!([{"name": "test"}])));
    let (status, images) = clouds.ask("GET /v1/clouds/{name}/images", "test", None);
    assert_eq!(
        (status, images[0]["disk_format"].as_str(), &images[0]["unusable"]),
        (200, Some("raw"), &Value::Null)
    );
    api.done.borrow_mut().extend(clouds.done.take());

    let all = api.document["paths"].as_object().unwrap().values();
    let all = all.flat_map(|item| item.as_object().unwrap().values());
    let all: BTreeSet<_> = all.filter_map(|one| one["operationId"].as_str().map(str::to_owned)).collect();
    assert_eq!(*api.done.borrow(), all, "operations that were not tried");
}

/// The status, while workers change.
fn ok_or_wait(api: &Api) -> Option<Value> {
    let (status, _, body) = exchange(&api.socket, "GET", "/v1/status", "", b"").ok()?;
    (status == 200).then(|| serde_json::from_slice(&body).unwrap())
}

#[test]
fn refusals_are_answered_as_described() {
    let daemon = serving();
    let api = Api::of(&daemon);
    daemon.create("one", true, 4 << 20);
    let post = |operation: &str, name: &str, body: Value, expected| {
        api.refused(operation, name, Some(&body), expected)
    };
    for operation in [
        "GET /v1/disks/{name}",
        "GET /v1/disks/{name}/map",
        "GET /v1/bases/{name}/map",
        "DELETE /v1/disks/{name}",
        "POST /v1/disks/{name}/unlock",
        "POST /v1/disks/{name}/trace",
        "DELETE /v1/disks/{name}/trace",
        "GET /v1/bases/{name}",
        "DELETE /v1/bases/{name}",
        "POST /v1/bases/{name}/evict",
        "POST /v1/bases/{name}/verify",
        "GET /v1/bases/{name}/trace",
        "DELETE /v1/bases/{name}/trace",
        "GET /v1/bases/{name}/trace/file",
        "PUT /v1/bases/{name}/trace/file",
        "GET /v1/clouds/{name}/images",
        "GET /v1/pools/{name}",
        "POST /v1/pools/{name}/attach",
        "DELETE /v1/pools/{name}",
        "GET /v1/jobs/{id}",
        "POST /v1/jobs/{id}/cancel",
        "POST /v1/jobs/{id}/hold",
        "DELETE /v1/jobs/{id}",
    ] {
        for name in ["none", "no%2fname", "%00", "a%20b", "..%2f..%2fetc"] {
            api.refused(operation, name, None, (404, "not_found"));
        }
        api.refused(operation, "%ff", None, (400, "invalid"));
    }
    for query in ["cells=0", "cells=4097", "cells=-1", "cells=x", "cell=1"] {
        api.refused(&format!("GET /v1/disks/{{name}}/map?{query}"), "one", None, (400, "invalid"));
    }
    for (number, kind) in [("99", (404, "not_found")), ("one", (400, "invalid")), ("-1", (400, "invalid"))] {
        post("POST /v1/trash/{id}/restore", number, json!({}), kind);
        api.refused("DELETE /v1/trash/{id}", number, None, kind);
    }
    post("POST /v1/prune", "", json!({"older_than": 1}), (400, "invalid"));
    api.refused("GET /v1/disks/{name}/children", "none", None, (404, "not_found"));
    api.refused("GET /v1/disks/{name}/children?snapshot=none", "one", None, (404, "not_found"));
    api.refused("GET /v1/bases/{name}/children", "none", None, (404, "not_found"));
    post("POST /v1/disks/{name}/resize", "none", json!({"size": 1}), (404, "not_found"));
    post("POST /v1/disks/{name}/resize", "one", json!({"size": 0}), (400, "invalid"));
    post("POST /v1/disks/{name}/resize", "one", json!({"size": -1}), (400, "invalid"));
    post("POST /v1/disks/{name}/resize", "one", json!({"size": 1_u64 << 63}), (400, "invalid"));
    post("POST /v1/disks/{name}/limits", "none", json!({"iops": 1}), (404, "not_found"));
    for wrong in [
        json!({"quota": 0}),
        json!({"quota": 4095}),
        json!({"quota": -1}),
        json!({"iops": 0}),
        json!({"iops": "many"}),
        json!({"read_bandwidth": 65_535}),
        json!({"burst_ms": 3_600_001}),
        json!({"burst_ms": 0}),
        json!({"iopss": 5}),
    ] {
        post("POST /v1/disks/{name}/limits", "one", wrong.clone(), (400, "invalid"));
        let new = json!({"name": "x", "size": 1 << 20, "limits": wrong});
        post("POST /v1/disks", "", new, (400, "invalid"));
    }
    post("POST /v1/disks", "", json!({"name": "one", "base": "b"}), (409, "exists"));
    post("POST /v1/disks", "", json!({"names": ["x", "x"], "base": "b"}), (409, "exists"));
    post("POST /v1/disks", "", json!({"name": "x", "base": "none"}), (404, "not_found"));
    post("POST /v1/disks", "", json!({"name": "x"}), (400, "invalid"));
    post("POST /v1/disks", "", json!({}), (400, "invalid"));
    post("POST /v1/disks", "", json!({"name": "x", "size": 1, "sice": 1}), (400, "invalid"));
    post("POST /v1/disks", "", json!({"name": "x", "size": u64::MAX}), (400, "invalid"));
    post("POST /v1/disks", "", json!([]), (400, "invalid"));
    for encryption in [
        json!({}),
        json!({"key_file": "/x", "key_command": "x"}),
        json!({"key_file": "relative"}),
        json!({"key_command": "-x"}),
        json!({"key": "secret"}),
        json!({"key_file": "/etc/passwd"}),
    ] {
        let body = json!({"name": "x", "size": 1, "encryption": encryption});
        post("POST /v1/disks", "", body, (400, "invalid"));
    }
    post("POST /v1/disks/{name}/rekey", "one", json!({"key_command": "x"}), (400, "invalid"));
    post("POST /v1/disks/{name}/shred", "one", json!({}), (400, "invalid"));
    post("POST /v1/disks/{name}/shred", "none", json!({}), (404, "not_found"));
    post("POST /v1/bases", "", json!({"name": "b", "source": "/dev/null"}), (409, "exists"));
    post("POST /v1/bases", "", json!({"name": "x", "source": "/dev/null"}), (400, "invalid"));
    post("POST /v1/bases", "", json!({"name": "x", "source": "/none", "format": "vhd"}), (400, "invalid"));
    post("POST /v1/bases", "", json!({"name": "x", "source": "/none", "identity": "any"}), (400, "invalid"));
    post("POST /v1/bases", "", json!({"name": "x", "source": "/none", "sha256": "00"}), (400, "invalid"));
    post("POST /v1/bases", "", json!({"name": "x", "source": "/none", "max_requests": 0}), (400, "invalid"));
    post("POST /v1/bases/{name}/set", "b", json!({"source": "http://127.0.0.1:1/"}), (400, "invalid"));
    post(
        "POST /v1/bases/{name}/set",
        "b",
        json!({"source": "http://127.0.0.1:1/", "file": 9}),
        (400, "invalid"),
    );
    post("POST /v1/bases/{name}/fail", "b", json!({"given_up": true}), (400, "invalid"));
    post("POST /v1/bases/{name}/hydrate", "b", json!({"rate": 0}), (400, "invalid"));
    let put = |id: &str, body: Value, expected| api.refused("PUT /v1/jobs/{id}", id, Some(&body), expected);
    put("export-none-1", json!({"kind": "export", "disk": "none"}), (404, "not_found"));
    put("export-one-1", json!({"kind": "hydrate", "disk": "one"}), (400, "invalid"));
    put("export-one-1", json!({"kind": "export", "disk": "one", "snapshot": "monday"}), (400, "invalid"));
    put("export-one-1", json!({"kind": "export", "disk": "one", "byte": 1}), (400, "invalid"));
    post("POST /v1/upgrade", "", json!({"program": "relative"}), (400, "invalid"));
    post("POST /v1/upgrade", "", json!({"programme": "/x"}), (400, "invalid"));
    api.refused("DELETE /v1/bases/{name}", "b", None, (409, "in_use"));
    api.refused("DELETE /v1/disks/{name}/trace", "one", None, (400, "invalid"));
    for query in ["?after=x", "?follow=perhaps", "?other=1"] {
        api.refused(&format!("GET /v1/events{query}"), "", None, (400, "invalid"));
    }
    let media = "content-type: application/json\r\n";
    for body in [&b"{"[..], b"\xff", b"{\"name\": \"\xff\"}", b""] {
        assert_eq!(api.send("POST /v1/disks", "", media, body).0, 400);
    }
    assert_eq!(api.send("POST /v1/disks", "", "", b"{\"name\": \"x\", \"size\": 1}").0, 400);
    assert_eq!(api.send("PUT /v1/bases/{name}/trace/file", "b", "", &[7; 100]).0, 400);
    // A request that is not described is refused in the same form.
    for (method, path, status, kind) in [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v2/disks", 404, "not_found"),
        ("GET", "/v1/disks/", 404, "not_found"),
        ("PATCH", "/v1/disks", 405, "not_allowed"),
        ("POST", "/v1/status", 405, "not_allowed"),
    ] {
        let (found, _, body) = exchange(&api.socket, method, path, "", b"").unwrap();
        let body: Value = serde_json::from_slice(&body).unwrap();
        assert_eq!((found, body["error"]["kind"].as_str().unwrap()), (status, kind), "{method} {path}");
    }
    assert_eq!(daemon.json(&["disk", "ls"]).as_array().unwrap().len(), 1);
    assert_eq!(daemon.json(&["base", "ls"]).as_array().unwrap().len(), 1);
}

#[test]
fn the_supervisor_answers_as_described_while_the_worker_is_stopped() {
    let daemon = serving();
    let api = Api::of(&daemon);
    let worker = daemon.worker();
    signal(worker, libc::SIGSTOP);
    until("the status of a worker that is stopped", || {
        let status = daemon.status();
        status["worker_not_answering_since"].is_string().then_some(())
    });
    assert!(api.ok("GET /v1/status", "", None)["cache"].is_null());
    api.refused("GET /v1/disks", "", None, (503, "unavailable"));
    api.refused("DELETE /v1/disks/{name}", "one", None, (503, "unavailable"));
    signal(worker, libc::SIGCONT);
}
