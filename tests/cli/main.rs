//! The command line without a mount: usage errors, exit statuses, the messages without a daemon, and the requests over
//! the control socket, with a server that gives the answers that each test sets.

mod surroundings;

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread::JoinHandle;

use serde_json::{Value, json};

const COMMANDS: &[&[&str]] = &[
    &["serve"],
    &["base"],
    &["base", "add"],
    &["base", "ls"],
    &["base", "show"],
    &["base", "rm"],
    &["base", "trace"],
    &["base", "trace", "ls"],
    &["base", "trace", "show"],
    &["base", "trace", "export"],
    &["base", "trace", "import"],
    &["base", "trace", "rm"],
    &["trace"],
    &["trace", "record"],
    &["job"],
    &["job", "ls"],
    &["job", "show"],
    &["job", "cancel"],
    &["jobs"],
    &["events"],
    &["disk"],
    &["disk", "create"],
    &["disk", "ls"],
    &["disk", "show"],
    &["disk", "rm"],
    &["disk", "children"],
    &["base", "children"],
    &["base", "prune"],
    &["trash"],
    &["trash", "ls"],
    &["trash", "restore"],
    &["trash", "purge"],
    &["disk", "resize"],
    &["disk", "limit"],
    &["disk", "diff"],
    &["disk", "export"],
    &["disk", "import"],
    &["status"],
    &["top"],
    &["stop"],
    &["check"],
    &["check-config"],
    &["completions"],
    &["man"],
];

fn plyfs(store: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_plyfs"));
    command.env("PLYFS_STORE", store).env_remove("PLYFS_LOG_LEVEL").env_remove("PLYFS_LOG_FORMAT");
    command.stdin(Stdio::null());
    command
}

fn run(store: &Path, args: &[&str]) -> Output {
    plyfs(store).args(args).output().expect("run plyfs")
}

fn stdout(output: &Output) -> &str {
    std::str::from_utf8(&output.stdout).expect("UTF-8 on stdout")
}

/// The only line on stderr; stdout must be empty.
fn error_line(output: &Output, status: i32) -> String {
    let stderr = String::from_utf8(output.stderr.clone()).expect("UTF-8 on stderr");
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    assert_eq!(stdout(output), "");
    let line = stderr.strip_suffix('\n').expect("a line");
    assert!(!line.contains('\n'), "more than one line: {stderr}");
    assert!(!line.contains('\u{1b}'), "an escape: {stderr:?}");
    line.strip_prefix("plyfs: ").expect("starts with the command's name").to_owned()
}

/// Answers one connection per (status, body), and returns the requests: the request line and the body.
fn serve(store: &Path, answers: Vec<(u16, String)>) -> JoinHandle<Vec<(String, Value)>> {
    let listener = UnixListener::bind(store.join("control.sock")).expect("bind");
    std::thread::spawn(move || {
        let mut requests = Vec::new();
        for (status, body) in answers {
            let (mut stream, _) = listener.accept().expect("accept");
            let mut data = Vec::new();
            let mut buffer = [0; 4096];
            let request = loop {
                if let Some(request) = parse(&data) {
                    break request;
                }
                let count = stream.read(&mut buffer).expect("read");
                assert!(count > 0, "the request ends too early");
                data.extend_from_slice(&buffer[..count]);
            };
            requests.push(request);
            let length = body.len();
            write!(stream, "HTTP/1.1 {status} X\r\ncontent-length: {length}\r\n\r\n{body}").expect("answer");
        }
        requests
    })
}

fn parse(data: &[u8]) -> Option<(String, Value)> {
    let text = std::str::from_utf8(data).expect("UTF-8");
    let (head, body) = text.split_once("\r\n\r\n")?;
    let length = head
        .lines()
        .filter_map(|line| line.split_once(": "))
        .find(|(name, _)| name.eq_ignore_ascii_case("content-length"))
        .map_or(0, |(_, length)| length.parse().expect("a length"));
    if body.len() < length {
        return None;
    }
    let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body).expect("JSON") };
    Some((head.lines().next()?.to_owned(), body))
}

/// Runs one command with one answer. Returns its output, and the request line and body.
fn exchange(args: &[&str], status: u16, answer: &Value) -> (Output, String, Value) {
    let store = tempfile::tempdir().expect("store");
    let server = serve(store.path(), vec![(status, answer.to_string())]);
    let output = run(store.path(), args);
    let (line, body) = server.join().expect("server").pop().expect("a request");
    (output, line, body)
}

fn refusal(kind: &str, message: &str) -> Value {
    json!({"error": {"kind": kind, "message": message}})
}

fn disk(name: &str) -> Value {
    json!({"id": 1, "name": name, "path": format!("/m/disks/{name}.raw"), "base": "debian", "size": 21474836480_u64,
        "delta_bytes": 4096, "created": "2026-01-02T03:04:05Z", "state": "ready", "error": null, "more": [1]})
}

#[test]
fn every_command_has_help_with_examples() {
    let store = tempfile::tempdir().expect("store");
    let root: &[&str] = &[];
    for command in COMMANDS.iter().copied().chain([root]) {
        let output = run(store.path(), &[command, &["--help"]].concat());
        assert_eq!(output.status.code(), Some(0), "{command:?}");
        let help = stdout(&output);
        assert!(help.contains("Usage: plyfs") && help.contains("Examples:"), "{command:?}: {help}");
    }
    assert!(!stdout(&run(store.path(), &["--help"])).contains("  worker"));
    assert!(stdout(&run(store.path(), &["--version"])).starts_with("plyfs "));
}

#[test]
fn usage_errors_are_one_line_and_status_2() {
    let store = tempfile::tempdir().expect("store");
    let cases: &[(&[&str], &str)] = &[
        (&[], "subcommand"),
        (&["frobnicate"], "frobnicate"),
        (&["disk"], "subcommand"),
        (&["disk", "frobnicate"], "frobnicate"),
        (&["status", "--frobnicate"], "--frobnicate"),
        (&["status", "extra"], "extra"),
        (&["disk", "create"], "<NAME>"),
        (&["disk", "create", "vm1"], "--size"),
        (&["disk", "create", "vm1", "--size", "20X"], "unit is not known"),
        (&["disk", "create", "vm1", "--size", "0"], "at least 1 byte"),
        (&["disk", "create", "vm1", "--size", "-5"], "negative"),
        (&["disk", "create", "vm1", "--size=8E"], "too large"),
        (&["disk", "create", "vm1", "--size=1.5G"], "fraction"),
        (&["disk", "create", "vm1", "--size="], "value"),
        (&["disk", "create", "a/b", "--size", "1G"], "\"a/b\""),
        (&["disk", "create", "..", "--size", "1G"], "\"..\""),
        (&["disk", "create", "vm1", "--base", "../x"], "\"../x\""),
        (&["disk", "show", "a\n\u{1b}[1mb"], "\"a\\n\\u{1b}[1mb\""),
        (&["disk", "show", ""], "\"\""),
        (&["disk", "rm"], "<NAME>"),
        (&["disk", "diff", "vm1", "vm2"], "@vm2"),
        (&["disk", "diff", "vm1@a", "vm2@b"], "two disks"),
        (&["disk", "export", "vm1"], "<FILE>"),
        (&["disk", "export", "vm1", "out", "--compress", "zstd"], "--format qcow2"),
        (&["disk", "export", "vm1", "out", "--onto", "base.raw"], "--format qcow2"),
        (&["disk", "export", "vm1", "-", "--format", "qcow2", "--compress", "zlib"], "out of order"),
        (&["disk", "import", "vm1.raw", "image"], "did you mean vm1?"),
        (&["disk", "resize", "vm1"], "<SIZE>"),
        (&["disk", "limit"], "<NAME>"),
        (&["disk", "limit", "vm1", "--iops", "0"], "give `none`"),
        (&["disk", "create", "vm1", "--size", "1G", "--quota", "-1"], "negative"),
        (&["disk", "resize", "vm1", "-5"], "negative"),
        (&["disk", "resize", "vm1", "-5G"], "negative"),
        (&["disk", "resize", "vm1", "9223372036854775808"], "too large"),
        (&["base", "add", "b"], "<SOURCE>"),
        (&["base", "add", "b", "s", "--format", "vhd"], "vhd"),
        (&["base", "add", "b", "s", "--sha256", "12"], "64 hexadecimal digits"),
        (&["base", "add", "b", "s", "--sha512", "xy"], "128 hexadecimal digits"),
        (&["base", "show", "a?b"], "\"a?b\""),
        (&["stop", "--timeout", "soon"], "soon"),
        (&["serve", "--log-level", "loud"], "loud"),
        (&["serve", "--cache-memory", "much"], "not a number"),
        (&["completions", "tcl"], "tcl"),
        (&["disk", "ls", "--sort", "colour"], "there is no column \"colour\""),
        (&["base", "ls", "--filter", "name"], "has no value"),
        (&["jobs", "--sort", "began:down"], "asc or desc"),
    ];
    for (args, part) in cases {
        let line = error_line(&run(store.path(), args), 2);
        assert!(line.contains(part), "{args:?}: {line}");
    }
}

#[test]
fn without_a_daemon_no_command_advises_to_start_one() {
    let store = tempfile::tempdir().expect("store");
    let dir = store.path().to_str().expect("UTF-8");
    let check = |args: &[&str]| {
        let line = error_line(&run(store.path(), args), 1);
        assert!(
            line.starts_with(&format!("no daemon is running on store {dir} (cannot connect to ")),
            "{line}"
        );
        assert!(line.contains(&format!("{dir}/control.sock: ")), "{line}");
        // The daemon may run, on another store.
        assert!(!line.contains("plyfs serve"), "{line}");
        assert!(line.ends_with("with --store DIR or PLYFS_STORE"), "{line}");
    };
    let commands: &[&[&str]] = &[
        &["base", "add", "b", "image.raw"],
        &["base", "ls"],
        &["base", "show", "b"],
        &["disk", "create", "vm1", "--base", "b"],
        &["disk", "ls"],
        &["disk", "show", "vm1"],
        &["disk", "resize", "vm1", "1G"],
        &["disk", "limit", "vm1"],
        &["disk", "limit", "vm1", "--iops", "5"],
        &["base", "trace", "ls"],
        &["base", "trace", "show", "b"],
        &["base", "trace", "rm", "b"],
        &["trace", "record", "vm1"],
        &["jobs"],
        &["job", "show", "hydrate-b"],
        &["job", "cancel", "hydrate-b"],
        &["events"],
        &["events", "--follow"],
        &["status"],
        &["stop"],
    ];
    for command in commands {
        check(command);
    }
    // The same with a socket that a killed daemon left.
    drop(UnixListener::bind(store.path().join("control.sock")).expect("bind"));
    check(&["status"]);
    check(&["stop"]);
    let line = error_line(&run(store.path(), &["stop"]), 1);
    assert!(line.contains("nothing to stop"), "{line}");
}

#[test]
fn a_file_in_place_of_the_store_is_named() {
    let store = tempfile::NamedTempFile::new().expect("file");
    let path = store.path().to_str().expect("UTF-8");
    let line = error_line(&run(store.path(), &["status"]), 1);
    assert!(line.contains(&format!("{path} is a file; give the directory")), "{line}");
    for place in [store.path().to_path_buf(), store.path().join("store")] {
        let output = run(&place, &["serve"]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.contains(&format!("{path} is a file, not a directory; give a directory")), "{said}");
    }
}

#[test]
fn removal_without_a_daemon_reports_it_once() {
    let store = tempfile::tempdir().expect("store");
    for noun in ["base", "disk"] {
        let line = error_line(&run(store.path(), &[noun, "rm", "a", "b"]), 1);
        assert!(line.starts_with("no daemon is running"), "{line}");
    }
}

#[test]
fn a_long_store_path_still_has_a_socket() {
    let root = tempfile::tempdir().expect("root");
    let store = root.path().join("d".repeat(120));
    std::fs::create_dir(&store).expect("store");
    let line = error_line(&run(&store, &["status"]), 1);
    assert!(line.starts_with("no daemon is running"), "{line}");
    // The server binds the socket by a short name.
    let link = root.path().join("s");
    std::os::unix::fs::symlink(&store, &link).expect("link");
    let server = serve(&link, vec![(200, "[]".into())]);
    assert_eq!(run(&store, &["--json", "disk", "ls"]).stdout, b"[]\n");
    server.join().expect("server");
}

#[test]
fn create_sends_names_and_prints_paths() {
    let (output, line, body) = exchange(
        &["disk", "create", "vm1", "vm2", "--base", "debian"],
        201,
        &json!([disk("vm1"), disk("vm2")]),
    );
    assert_eq!(line, "POST /v1/disks HTTP/1.1");
    assert_eq!(body, json!({"names": ["vm1", "vm2"], "base": "debian", "size": null}));
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(stdout(&output), "/m/disks/vm1.raw\n/m/disks/vm2.raw\n");
}

#[test]
fn create_prints_an_object_for_one_name_and_an_array_for_more() {
    let (output, _, body) =
        exchange(&["disk", "create", "vm1", "--size", "20G", "--json"], 201, &json!([disk("vm1")]));
    assert_eq!(body, json!({"names": ["vm1"], "base": null, "size": 21474836480_u64}));
    assert_eq!(serde_json::from_str::<Value>(stdout(&output)).expect("JSON"), disk("vm1"));
    let both = json!([disk("vm1"), disk("vm2")]);
    let (output, ..) = exchange(&["--json", "disk", "create", "vm1", "vm2", "--size", "1M"], 201, &both);
    assert_eq!(serde_json::from_str::<Value>(stdout(&output)).expect("JSON"), both);
}

#[test]
fn disk_ls_and_disk_show_print_text_or_json() {
    let disks = json!([disk("vm1"), disk("vm2")]);
    let (output, line, _) = exchange(&["disk", "ls"], 200, &disks);
    assert_eq!(line, "GET /v1/disks HTTP/1.1");
    let text = stdout(&output);
    assert_eq!(text.lines().count(), 4, "{text}");
    assert!(text.ends_with("2 disks, 40G in all, 8K written, open handles: 0\n"), "{text}");
    assert!(text.starts_with("NAME  BASE") && text.contains(" 20G ") && text.contains(" 4K "), "{text}");
    let (output, ..) = exchange(&["disk", "ls", "--json"], 200, &disks);
    assert_eq!(serde_json::from_str::<Value>(stdout(&output)).expect("JSON"), disks);
    let (output, line, _) = exchange(&["disk", "show", "vm1"], 200, &disk("vm1"));
    assert_eq!(line, "GET /v1/disks/vm1 HTTP/1.1");
    assert!(stdout(&output).contains("20G (21474836480 bytes)"), "{}", stdout(&output));
}

#[test]
fn base_add_sends_an_absolute_path_or_the_url() {
    let answer = json!({"name": "b", "path": "/m/bases/b.raw"});
    let sha = "AB".repeat(32);
    let (output, line, body) =
        exchange(&["base", "add", "b", "x/../image.raw", "--sha256", &sha], 201, &answer);
    assert_eq!(line, "POST /v1/bases HTTP/1.1");
    let here = std::env::current_dir().expect("current directory");
    assert_eq!(body["source"], here.join("x/../image.raw").to_str().expect("UTF-8"));
    assert_eq!(body["sha256"], "ab".repeat(32));
    // Without --format the daemon chooses the format.
    assert_eq!((&body["format"], &body["sha512"]), (&Value::Null, &Value::Null));
    assert_eq!(stdout(&output), "/m/bases/b.raw\n");
    let (_, _, body) =
        exchange(&["base", "add", "b", "https://h/i.qcow2", "--format", "qcow2"], 201, &answer);
    assert_eq!((&body["source"], &body["format"]), (&json!("https://h/i.qcow2"), &json!("qcow2")));
}

/// The object on stderr.
fn error_object(output: &Output, status: i32) -> Value {
    let stderr = String::from_utf8(output.stderr.clone()).expect("UTF-8 on stderr");
    assert_eq!(output.status.code(), Some(status), "{stderr}");
    assert_eq!(stderr.matches('\n').count(), 1, "{stderr}");
    serde_json::from_str(&stderr).unwrap_or_else(|error| panic!("{error}: {stderr}"))
}

#[test]
fn an_error_is_an_object_with_json() {
    let store = tempfile::tempdir().expect("store");
    let dir = store.path().to_str().expect("UTF-8");
    let error = error_object(&run(store.path(), &["--json", "disk", "ls"]), 1);
    assert_eq!((&error["kind"], &error["object"]), (&json!("no_daemon"), &json!(format!("store {dir}"))));
    assert!(error["cause"].as_str().is_some_and(|cause| cause.contains("control.sock")), "{error}");
    assert!(error["remedy"].as_str().is_some_and(|remedy| remedy.contains("--store DIR")), "{error}");

    let message = "disk vm1: there is no disk of that name; see `plyfs disk ls`";
    let (output, ..) = exchange(&["disk", "show", "vm1", "--json"], 404, &refusal("not_found", message));
    let expected = json!({"kind": "not_found", "object": "disk vm1", "cause": "there is no disk of that name",
        "remedy": "see `plyfs disk ls`", "message": message});
    assert_eq!(error_object(&output, 1), expected);

    let (output, ..) = exchange(&["--json", "disk", "create", "vm1", "--size", "1G"], 500, &json!("boom"));
    let error = error_object(&output, 1);
    assert_eq!((&error["kind"], &error["object"]), (&json!("invalid_answer"), &json!("disk vm1")), "{error}");

    for (args, object, cause, remedy) in [
        ("disk create vm1", "--size <SIZE>", "not provided: --size <SIZE>", "usage: plyfs disk create"),
        ("base create b x", "create", "unrecognized subcommand 'create'", "plyfs base add?; usage"),
        ("status extra", "extra", "unexpected argument 'extra' found", "usage: plyfs status"),
        ("base add b x --format vdi", "--format <FORMAT>", "[possible values: raw,", "qemu-img convert"),
        ("disk create vm1 --size 20", "--size <SIZE>", "that is 20 bytes", "add a unit, as in 20G"),
        ("stop --timeout soon", "--timeout <DURATION>", "it is not a time", "write one such as 30s"),
    ] {
        let args: Vec<_> = ["--json"].into_iter().chain(args.split(' ')).collect();
        let error = error_object(&run(store.path(), &args), 2);
        assert_eq!((&error["kind"], &error["object"]), (&json!("usage"), &json!(object)), "{error}");
        let has = |key: &str, part: &str| error[key].as_str().is_some_and(|text| text.contains(part));
        assert!(has("cause", cause) && has("remedy", remedy) && has("message", cause), "{error}");
    }
}

#[test]
fn tips_are_sensible_or_absent() {
    let store = tempfile::tempdir().expect("store");
    for (args, has, has_not) in [
        (&["base", "create", "b", "x"] as &[&str], "did you mean plyfs base add?", "hydrate"),
        (&["disk", "add", "vm1"], "did you mean plyfs disk create?", "similar"),
        (&["disk", "delete", "vm1"], "did you mean plyfs disk rm?", "similar"),
        (&["start"], "did you mean plyfs serve?", "similar"),
        (&["base", "add", "b", "x", "--format", "vdi"], "qemu-img convert -O qcow2", "similar"),
        (&["base", "add", "b", "x", "--format", "qcow"], "qemu-img convert", "vmdk'"),
        (&["base", "add", "b", "x", "--format", "qcow22"], "'qcow2'", "convert"),
        (&["statsu"], "'status'", "did you mean"),
        (&["disk", "craete", "vm1"], "'create'", "did you mean"),
        (&["frobnicate"], "frobnicate", "tip"),
    ] {
        let line = error_line(&run(store.path(), args), 2);
        assert!(line.contains(has) && !line.contains(has_not), "{args:?}: {line}");
    }
}

#[test]
fn the_name_of_a_file_is_not_taken_for_the_name_of_a_disk() {
    let store = tempfile::tempdir().expect("store");
    for args in [
        &["disk", "create", "vm1.raw", "--size", "1G"] as &[&str],
        &["disk", "rm", "/srv/mnt/disks/vm1.raw"],
        &["disk", "show", "mnt/disks/vm1.raw"],
        &["disk", "resize", "./vm1.raw", "1G"],
    ] {
        let line = error_line(&run(store.path(), args), 2);
        assert!(line.contains("did you mean vm1?"), "{args:?}: {line}");
    }
    let line = error_line(&run(store.path(), &["base", "add", "debian.raw", "x"]), 2);
    assert!(line.contains("did you mean debian?"), "{line}");
}

#[test]
fn a_size_without_a_unit_is_more_than_a_forgotten_one() {
    let store = tempfile::tempdir().expect("store");
    for args in [&["disk", "create", "vm1", "--size", "20"] as &[&str], &["disk", "resize", "vm1", "20"]] {
        let line = error_line(&run(store.path(), args), 2);
        assert!(line.contains("20 bytes") && line.contains("20G"), "{line}");
    }
    for size in ["4096", "512", "1048577", "20G", "1B"] {
        let (output, _, body) =
            exchange(&["disk", "create", "vm1", "--size", size], 200, &json!([disk("vm1")]));
        assert!(output.status.success() && body["size"].is_u64(), "{size}: {output:?}");
    }
}

#[test]
fn a_second_word_reaches_the_daemon() {
    let store = tempfile::tempdir().expect("store");
    let shown = || (200, json!({"id": 1}).to_string());
    let server = serve(store.path(), vec![shown(), (200, String::new())]);
    assert!(run(store.path(), &["disk", "rm", "a", "--force"]).status.success());
    assert_eq!(server.join().expect("server")[1].0, "DELETE /v1/disks/a?force=true HTTP/1.1");
    let (_, _, body) = exchange(&["disk", "resize", "vm1", "1G", "--shrink"], 200, &disk("vm1"));
    assert_eq!(body, json!({"size": 1 << 30, "shrink": true}));
    let evicted = json!({"name": "b", "evicted_bytes": 1});
    assert_eq!(exchange(&["base", "evict", "b", "--force"], 200, &evicted).2, json!({"force": true}));
    assert_eq!(exchange(&["base", "evict", "b"], 200, &evicted).2, Value::Null);
}

#[test]
fn a_refusal_of_the_daemon_is_printed_as_one_line() {
    let message = "cannot create disk vm1: it exists;\nchoose another \u{1b}[31mname";
    let (output, ..) = exchange(&["disk", "create", "vm1", "--size", "1G"], 409, &refusal("exists", message));
    assert_eq!(error_line(&output, 1), "cannot create disk vm1: it exists; choose another \\u{1b}[31mname");
}

#[test]
fn answers_that_are_not_from_plyfs_are_errors() {
    for (status, answer) in [(500, json!("boom")), (404, Value::Null)] {
        let (output, ..) = exchange(&["disk", "show", "vm1"], status, &answer);
        let line = error_line(&output, 1);
        assert!(line.starts_with("cannot show disk vm1: ") && line.contains(&status.to_string()), "{line}");
    }
    let store = tempfile::tempdir().expect("store");
    let server = serve(store.path(), vec![(200, "<html>".into())]);
    let line = error_line(&run(store.path(), &["status"]), 1);
    assert!(line.contains("is not JSON"), "{line}");
    server.join().expect("server");
}

#[test]
fn a_daemon_that_closes_the_connection_is_an_error() {
    let store = tempfile::tempdir().expect("store");
    let listener = UnixListener::bind(store.path().join("control.sock")).expect("bind");
    let server = std::thread::spawn(move || drop(listener.accept().expect("accept")));
    let line = error_line(&run(store.path(), &["disk", "ls"]), 1);
    assert!(line.starts_with("cannot list disks: the daemon at "), "{line}");
    server.join().expect("server");
}

#[test]
fn removal_continues_after_a_refusal() {
    let store = tempfile::tempdir().expect("store");
    let in_use =
        refusal("in_use", "cannot remove base a: disk vm1 needs it; remove the disk first").to_string();
    let shown = || (200, json!({"id": 1}).to_string());
    let server = serve(store.path(), vec![shown(), (409, in_use), shown(), (204, String::new())]);
    let line = error_line(&run(store.path(), &["base", "rm", "a", "b"]), 1);
    assert_eq!(line, "cannot remove base a: disk vm1 needs it; remove the disk first");
    let requests = server.join().expect("server");
    let lines: Vec<&str> = requests.iter().map(|(line, _)| line.as_str()).collect();
    let expected = ["GET /v1/bases/a", "DELETE /v1/bases/a", "GET /v1/bases/b", "DELETE /v1/bases/b"];
    assert_eq!(lines, expected.map(|line| format!("{line} HTTP/1.1")));
}

#[test]
fn limits_that_are_not_named_are_not_sent() {
    let args = &["disk", "limit", "vm1", "--quota", "none", "--bandwidth", "100M/s", "--burst", "2s"];
    let (_, line, body) = exchange(args, 200, &disk("vm1"));
    assert_eq!(line, "POST /v1/disks/vm1/limits HTTP/1.1");
    assert_eq!(body, json!({"quota": null, "bandwidth": 100 << 20, "burst_ms": 2000}));
    let (_, _, body) = exchange(&["disk", "clone", "vm1", "vm2", "--iops", "7"], 200, &json!([disk("vm2")]));
    assert_eq!(body["limits"], json!({"iops": 7}));
    // A daemon of an earlier version knows no limits.
    let (_, _, body) = exchange(&["disk", "create", "vm1", "--size", "1G"], 200, &json!([disk("vm1")]));
    assert_eq!(body.get("limits"), None);
}

#[test]
fn resize_sends_bytes() {
    let (output, line, body) = exchange(&["disk", "resize", "vm1", "40G"], 200, &disk("vm1"));
    assert_eq!(line, "POST /v1/disks/vm1/resize HTTP/1.1");
    assert_eq!(body, json!({"size": 42949672960_u64}));
    assert_eq!((output.status.code(), stdout(&output)), (Some(0), ""));
}

#[test]
fn a_diff_asks_for_part_after_part() {
    let extent = |offset: u64, content: &str| json!({"offset": offset, "length": 4096, "content": content});
    let part = |extents: Value, next: Value| json!({"disk": "vm1", "base": null, "since": "a", "until": "b", "size": 1 << 20, "extents": extents, "next": next});
    let parts = [
        part(json!([extent(0, "zero"), extent(8192, "data")]), json!(12288)),
        part(json!([]), json!(16384)),
        part(json!([extent(16384, "base")]), Value::Null),
    ];
    let store = tempfile::tempdir().expect("store");
    let server = serve(store.path(), parts.iter().map(|part| (200, part.to_string())).collect());
    let output = run(store.path(), &["--json", "disk", "diff", "vm1@a", "@b"]);
    let all: Value = serde_json::from_slice(&output.stdout).expect("one object");
    assert_eq!(all["extents"], json!([extent(0, "zero"), extent(8192, "data"), extent(16384, "base")]));
    let requests = server.join().expect("server");
    for ((line, _), start) in requests.iter().zip([0, 12288, 16384]) {
        let wanted = format!("GET /v1/disks/vm1/extents?limit=10000&start={start}&since=a&until=b HTTP/1.1");
        assert_eq!(*line, wanted);
    }
    // A daemon that goes round in circles is no reason to do so too.
    let store = tempfile::tempdir().expect("store");
    let server = serve(store.path(), vec![(200, part(json!([]), json!(0)).to_string())]);
    let error = error_object(&run(store.path(), &["--json", "disk", "diff", "vm1"]), 1);
    assert!(error["message"].as_str().is_some_and(|why| why.contains("repeats itself")), "{error}");
    server.join().expect("server");
}

#[test]
fn stop_waits_for_the_lock() {
    let store = tempfile::tempdir().expect("store");
    let lock = std::fs::File::create(store.path().join("lock")).expect("lock file");
    lock.lock().expect("lock");
    let status = json!({"mount": store.path().join("mnt")}).to_string();
    let server = serve(store.path(), vec![(200, status.clone()), (202, "{}".into())]);
    let line = error_line(&run(store.path(), &["stop", "--timeout", "100ms"]), 1);
    assert!(line.contains("still holds the store's lock"), "{line}");
    let requests = server.join().expect("server");
    assert_eq!(requests[1].0, "POST /v1/stop HTTP/1.1");

    std::fs::remove_file(store.path().join("control.sock")).expect("remove the socket");
    let server = serve(store.path(), vec![(200, status), (202, "{}".into())]);
    let mut child =
        plyfs(store.path()).args(["stop", "--json"]).stdout(Stdio::piped()).spawn().expect("run plyfs");
    server.join().expect("server");
    assert!(child.try_wait().expect("wait").is_none(), "stop did not wait for the lock");
    lock.unlock().expect("unlock");
    let output = child.wait_with_output().expect("wait");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(serde_json::from_str::<Value>(stdout(&output)).expect("JSON"), json!({"stopped": true}));
}

#[test]
fn a_closed_pipe_on_stdout_is_no_error() {
    let store = tempfile::tempdir().expect("store");
    for args in [&["completions", "bash"] as &[&str], &["--help"]] {
        let mut child = plyfs(store.path())
            .args(args)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("run plyfs");
        drop(child.stdout.take());
        let output = child.wait_with_output().expect("wait");
        assert_eq!(output.status.code(), Some(0), "{args:?}");
        assert_eq!(output.stderr, b"", "{args:?}");
    }
}

#[test]
fn a_full_stdout_is_an_error() {
    let store = tempfile::tempdir().expect("store");
    let full = std::fs::File::options().write(true).open("/dev/full").expect("/dev/full");
    let output = plyfs(store.path()).args(["completions", "bash"]).stdout(full).output().expect("run plyfs");
    assert!(error_line(&output, 1).contains("cannot write to standard output"));
}
