//! What stands around the commands: completions, man pages, the configuration.

use super::*;

#[test]
fn completions_exist_for_each_shell() {
    let store = tempfile::tempdir().expect("store");
    for (shell, word) in [("bash", "complete"), ("zsh", "#compdef plyfs"), ("fish", "complete")] {
        let output = run(store.path(), &["completions", shell]);
        assert_eq!(output.status.code(), Some(0), "{shell}");
        assert!(stdout(&output).contains(word), "{shell}: {}", stdout(&output));
    }
}

/// What a shell is offered for the last of these words.
fn completed(store: &Path, words: &[&str]) -> Vec<String> {
    let index = words.len().to_string();
    let mut command = plyfs(store);
    command.env("_PLYFS_COMPLETE", "bash").env("_CLAP_COMPLETE_INDEX", index).env("_CLAP_IFS", "\n");
    let output = command.args(["--", "plyfs"]).args(words).output().expect("run plyfs");
    assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    stdout(&output).lines().map(str::to_owned).collect()
}

#[test]
fn completions_know_the_names_of_disks_and_bases() {
    let disks = json!([{"name": "vm1"}, {"name": "vm2"}, {"name": "web"}]);
    let bases = json!([{"name": "debian"}]);
    let jobs = json!([{"id": "hydrate-b"}, {"id": "verify-b"}]);
    for (words, answer, request, expected) in [
        (["disk", "rm", "vm"].as_slice(), &disks, "GET /v1/disks HTTP/1.1", ["vm1", "vm2"].as_slice()),
        (&["disk", "resize", "w"], &disks, "GET /v1/disks HTTP/1.1", &["web"]),
        (&["base", "show", ""], &bases, "GET /v1/bases HTTP/1.1", &["debian"]),
        (&["base", "trace", "rm", "d"], &bases, "GET /v1/bases HTTP/1.1", &["debian"]),
        (&["disk", "create", "vm9", "--base", "d"], &bases, "GET /v1/bases HTTP/1.1", &["debian"]),
        (&["job", "cancel", "h"], &jobs, "GET /v1/jobs HTTP/1.1", &["hydrate-b"]),
    ] {
        let store = tempfile::tempdir().expect("store");
        let server = serve(store.path(), vec![(200, answer.to_string())]);
        let offered: Vec<_> =
            completed(store.path(), words).into_iter().filter(|word| !word.starts_with('-')).collect();
        assert_eq!(offered, expected, "{words:?}");
        assert_eq!(server.join().expect("served")[0].0, request);
    }
}

#[test]
fn a_daemon_of_an_earlier_version_that_has_no_jobs_is_named() {
    let base = json!({"name": "b", "work": {"what": "hydrate", "state": "fetching", "bytes": 1, "total": 2}});
    let (output, line, _) = exchange(&["base", "hydrate", "b"], 200, &base);
    assert_eq!(line, "POST /v1/bases/b/hydrate HTTP/1.1");
    let line = error_line(&output, 1);
    assert!(line.contains("earlier version") && line.ends_with("`plyfs upgrade`"), "{line}");
}

#[test]
fn names_alone_are_printed_for_other_commands() {
    let disks = json!([disk("vm1"), disk("vm2")]);
    let (output, ..) = exchange(&["disk", "ls", "-q", "--filter", "name=vm2"], 200, &disks);
    assert_eq!(stdout(&output), "vm2\n");
    let (output, ..) = exchange(&["--json", "disk", "ls", "-q", "--sort", "name:desc"], 200, &disks);
    assert_eq!(serde_json::from_str::<Value>(stdout(&output)).expect("JSON"), json!(["vm2", "vm1"]));
}

#[test]
fn top_without_a_terminal_says_what_to_give() {
    let store = tempfile::tempdir().expect("store");
    let line = error_line(&run(store.path(), &["top"]), 2);
    assert!(line.contains("give --once, --batch N or --json"), "{line}");
}

#[test]
fn completions_without_a_daemon_are_silent() {
    let store = tempfile::tempdir().expect("store");
    assert_eq!(completed(store.path(), &["disk", "rm", "vm"]), [""; 0]);
    assert!(completed(store.path(), &["dis"]).contains(&"disk".to_owned()));
    assert!(completed(store.path(), &["serve", "--cache-m"]).contains(&"--cache-memory".to_owned()));
}

#[test]
fn every_command_has_a_man_page() {
    let store = tempfile::tempdir().expect("store");
    let dir = store.path().join("share");
    let output = run(store.path(), &["man", dir.to_str().expect("UTF-8")]);
    assert_eq!(output.status.code(), Some(0));
    let page = |name: &str| {
        let path = dir.join(name);
        std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{name}: {error}"))
    };
    for command in COMMANDS {
        let name = format!("man1/plyfs-{}.1", command.join("-"));
        let text = page(&name);
        for section in ["NAME", "SYNOPSIS", "FILES", "ENVIRONMENT", "\"EXIT STATUS\"", "\"SEE ALSO\""] {
            assert!(text.contains(&format!(".SH {section}\n")), "{name} has no {section}");
        }
    }
    assert!(page("man1/plyfs.1").contains("plyfs\\-disk"));
    let config = page("man5/plyfs.toml.5");
    for word in ["map_memory_per_disk", "[[http.credentials]]", "stall_timeout", "/etc/plyfs/plyfs.toml"] {
        assert!(config.contains(word), "{word}");
    }
    assert!(!dir.join("man1/plyfs-worker.1").exists(), "a hidden command has a page");
    let line = error_line(&run(store.path(), &["man", "/dev/null/x"]), 1);
    assert!(line.contains("cannot write man pages to /dev/null/x"), "{line}");
}

#[test]
fn check_config_says_what_would_be_used_and_from_where() {
    let store = tempfile::tempdir().expect("store");
    let file = store.path().join("plyfs.toml");
    let secret = store.path().join("token");
    std::fs::write(&secret, "the-secret-itself").expect("write");
    let credentials = "[[http.credentials]]\nurl = \"https://example.org/\"\n";
    let text = format!("[cache]\nmemory = \"512M\"\n{credentials}bearer_file = {secret:?}\n");
    let text = text + "[[http.s3]]\nbucket = \"images-*\"\nkeys_environment = true\n";
    std::fs::write(&file, &text).expect("write");
    let config = file.to_str().expect("UTF-8");

    let output = run(store.path(), &["--json", "check-config", "--config", config, "--cache-disk", "2G"]);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    let said: Value = serde_json::from_str(stdout(&output)).expect("JSON");
    assert_eq!(said["file"], config);
    let value = |key: &str| (said["values"][key]["value"].clone(), said["values"][key]["from"].clone());
    assert_eq!(value("cache.memory"), (json!(512 << 20), json!("file")));
    assert_eq!(value("cache.disk"), (json!(2u64 << 30), json!("flag")));
    assert_eq!(value("store.path"), (json!(store.path()), json!("flag")));
    assert_eq!(value("fuse.threads"), (json!(4), json!("default")));
    assert_eq!(value("http.connect_timeout"), (json!("10s"), json!("default")));
    assert_eq!(value("mount.base_mode"), (json!("0400"), json!("default")));
    assert_eq!(
        said["credentials"][0],
        json!({"url": "https://example.org/", "kind": "bearer_file", "place": secret})
    );
    assert_eq!(
        (&said["buckets"][0]["bucket"], &said["buckets"][0]["keys"]),
        (&json!("images-*"), &json!("keys_environment"))
    );
    assert!(!stdout(&output).contains("the-secret-itself"));

    let output = run(store.path(), &["check-config", "--config", config]);
    let human = stdout(&output);
    assert!(
        human.contains("is valid") && human.contains("cache.memory") && human.contains("512M"),
        "{human}"
    );
    assert!(!human.contains("the-secret-itself"));

    std::fs::remove_file(&secret).expect("remove");
    let line = error_line(&run(store.path(), &["check-config", "--config", config]), 78);
    assert!(line.contains("http.credentials") && line.contains("token"), "{line}");
    std::fs::write(&file, "[cahce]\n").expect("write");
    let line = error_line(&run(store.path(), &["check-config", "--config", config]), 78);
    assert!(line.contains("line 1") && line.contains("cahce"), "{line}");
}

#[test]
fn a_wrong_configuration_does_not_end_a_service_whose_mount_is_kept() {
    let store = tempfile::tempdir().expect("store");
    let output = plyfs(store.path())
        .args(["serve", "--config", "/nonexistent.toml"])
        .env("LISTEN_FDS", "4")
        .output()
        .expect("run plyfs");
    error_line(&output, 1);
}

#[test]
fn commands_find_the_store_in_the_configuration() {
    let store = tempfile::tempdir().expect("store");
    let file = store.path().join("plyfs.toml");
    std::fs::write(&file, format!("[store]\npath = {:?}\n", store.path())).expect("write");
    let server = serve(store.path(), vec![(200, "[]".to_owned())]);
    let mut command = plyfs(store.path());
    command.env_remove("PLYFS_STORE").env("PLYFS_CONFIG", &file);
    let output = command.args(["disk", "ls"]).output().expect("run plyfs");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(server.join().expect("served").len(), 1);
}

#[test]
fn an_invalid_configuration_is_refused_before_anything_starts() {
    let store = tempfile::tempdir().expect("store");
    let file = store.path().join("plyfs.toml");
    for (text, part) in [
        ("[cahce]\n", "line 1: unknown field `cahce`"),
        ("[fuse]\nthreads = 0\n", "fuse.threads: 0 is out of bounds"),
        ("[http]\nca_file = \"/nonexistent\"\n", "http.ca_file: /nonexistent: No such file"),
        ("[security]\nbase_dirs = [\"/nonexistent\"]\n", "security.base_dirs: /nonexistent: No such file"),
        (
            "[[http.credentials]]\nurl = \"https://a/\"\nbearer_file = \"/nonexistent\"\n",
            "http.credentials: /nonexistent: No such file",
        ),
    ] {
        std::fs::write(&file, text).expect("write");
        let line = error_line(&run(store.path(), &["serve", "--config", file.to_str().expect("UTF-8")]), 78);
        assert!(line.contains(part), "{line}");
    }
    let line = error_line(&run(store.path(), &["serve", "--config", "/nonexistent.toml"]), 78);
    assert!(line.contains("/nonexistent.toml"), "{line}");
    let line = error_line(&run(store.path(), &["serve", "--cache-memory", "4K"]), 78);
    assert!(line.contains("cache.memory: 4K is out of bounds"), "{line}");
    let line = error_line(&run(store.path(), &["serve", "--mount", "/"]), 78);
    assert!(line.contains("would hide the store"), "{line}");
}
