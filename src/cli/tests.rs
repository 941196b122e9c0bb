use std::path::{Path, PathBuf};
use std::time::SystemTime;

use clap::{CommandFactory, Parser};
use serde_json::{Value, json};

use super::output::{Kind, printable, usage_line};
use super::table::{fields, table};
use super::{Cli, args, base, disk, events, job, status, stop, trace};

mod retry;

#[test]
fn the_command_definitions_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn every_command_has_a_description_and_examples() {
    fn walk(command: &clap::Command) {
        assert!(command.get_about().is_some(), "{} has no about text", command.get_name());
        let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
        assert!(examples.contains("Examples:"), "{} has no examples", command.get_name());
        for command in command.get_subcommands().filter(|command| !command.is_hide_set()) {
            walk(command);
        }
    }
    walk(&Cli::command());
}

#[test]
fn every_command_lists_the_global_options_under_their_own_heading() {
    fn walk(command: &mut clap::Command) {
        let name = command.get_name().to_owned();
        let help = command.render_long_help().to_string();
        let (_, global) = help.split_once("Global options:\n").unwrap_or_else(|| panic!("{name}: {help}"));
        for option in ["--store", "--json"] {
            assert!(global.contains(option), "{name}: {option}: {help}");
            assert_eq!(help.matches(&format!("  {option}")).count(), 1, "{name}: {option}: {help}");
        }
        // clap's own `help` has no options.
        let is_ours = |command: &&mut clap::Command| !command.is_hide_set() && command.get_name() != "help";
        for command in command.get_subcommands_mut().filter(is_ours) {
            walk(command);
        }
    }
    let mut command = Cli::command();
    command.build();
    walk(&mut command);
}

#[test]
fn names() {
    let longest = "a".repeat(128);
    for name in ["a", "0", "vm1", "debian-12.raw", "A_b.c-d", "a..b", &longest] {
        assert_eq!(args::name(name).as_deref(), Ok(name));
    }
    let too_long = "a".repeat(129);
    for name in [
        "", ".", "..", "-a", "_a", ".a", "a/b", "/", "a b", "a\n", "a\0", "ä", "a%2f", "a?b", "a#b",
        &too_long,
    ] {
        assert!(args::name(name).is_err(), "{name:?}");
    }
}

#[test]
fn sizes_of_disks_are_above_zero() {
    assert_eq!(args::size("20G"), Ok(20 << 30));
    assert!(args::size("0").is_err_and(|why| why.contains("at least 1 byte")));
    assert!(args::size("0G").is_err());
    assert!(args::size("-1").is_err_and(|why| why.contains("negative")));
}

#[test]
fn digests() {
    assert_eq!(args::sha256(&"Ab".repeat(32)), Ok("ab".repeat(32)));
    assert_eq!(args::sha512(&"0f".repeat(64)), Ok("0f".repeat(64)));
    assert!(args::sha256(&"ab".repeat(64)).is_err());
    assert!(args::sha256(&"xy".repeat(32)).is_err());
    assert!(args::sha256("").is_err());
}

#[test]
fn sources() {
    for url in ["http://host/a.raw", "https://host", "s3+x://bucket/a"] {
        assert!(args::is_url(url), "{url}");
    }
    for path in ["a.raw", "/a", "./http://x", "a/b://c", "://x", "1http://x", "C:\\x"] {
        assert!(!args::is_url(path), "{path}");
    }
}

#[test]
fn paths_become_absolute_and_keep_their_links() {
    let here = std::env::current_dir().expect("current directory");
    assert_eq!(args::absolute(Path::new("a/../b")).expect("absolute"), here.join("a/../b"));
    assert_eq!(args::absolute(Path::new("/x/y")).expect("absolute"), PathBuf::from("/x/y"));
    assert!(args::absolute(Path::new("")).is_err());
}

#[test]
fn usage_errors_are_one_line() {
    let line = |args: &[&str]| usage_line(&Cli::try_parse_from(args).expect_err("a usage error"));
    let size = line(&["plyfs", "disk", "resize", "vm1", "20X"]);
    assert!(size.starts_with("invalid value \"20X\" for <SIZE>: "), "{size}");
    let negative = line(&["plyfs", "disk", "resize", "vm1", "-5"]);
    assert!(negative.contains("negative"), "{negative}");
    let name = line(&["plyfs", "disk", "show", "a\n/\u{1b}"]);
    assert!(name.contains(r#""a\n/\u{1b}""#), "{name}");
    let missing = line(&["plyfs", "disk", "create"]);
    assert!(missing.contains("required") && missing.contains("usage: plyfs disk create"), "{missing}");
    for text in [size, negative, name, missing] {
        assert!(!text.contains('\n'), "{text:?}");
    }
}

#[test]
fn control_characters_of_foreign_text_are_escaped() {
    assert_eq!(printable("plain – text"), "plain – text");
    assert_eq!(printable("a\u{1b}[31m\nb\u{202e}"), "a\\u{1b}[31m\\nb\\u{202e}");
}

#[test]
fn tables_are_aligned() {
    let columns = [("NAME", "name", Kind::Text), ("SIZE", "size", Kind::Size), ("BASE", "base", Kind::Text)];
    let rows = json!([
        {"name": "vm1", "size": 21474836480_u64, "base": "debian"},
        {"name": "a-long-name", "size": 512, "base": null},
        {"name": "odd\n"},
    ]);
    let expected = "\
NAME         SIZE  BASE
vm1           20G  debian
a-long-name   512  -
odd\\n           -  -
";
    assert_eq!(table(&rows, &columns, SystemTime::now(), None), expected);
    assert_eq!(table(&json!([]), &columns, SystemTime::now(), None), "NAME  SIZE  BASE\n");
}

/// Each field that a command prints is in the description of the API.
#[test]
fn columns_are_keys_of_the_api() {
    let document = crate::control::document();
    let answers = [
        ("Disk", [disk::COLUMNS.as_slice(), disk::FIELDS.as_slice()]),
        ("Base", [base::COLUMNS.as_slice(), base::FIELDS.as_slice()]),
        ("Job", [job::COLUMNS.as_slice(), job::FIELDS.as_slice()]),
        ("Trace", [trace::COLUMNS.as_slice(), trace::FIELDS.as_slice()]),
    ];
    for (name, columns) in answers {
        let keys = &document["components"]["schemas"][name]["properties"];
        for (_, key, _) in columns.into_iter().flatten() {
            // The command makes the text of a list of names.
            let key = if *key == "pool_names" { "needs_pools" } else { key };
            assert!(keys[key].is_object(), "{name} has no {key}");
        }
    }
}

#[test]
fn fields_omit_keys_that_the_answer_does_not_have() {
    let columns = [
        ("name", "name", Kind::Text),
        ("size", "size", Kind::Size),
        ("base", "base", Kind::Text),
        ("error", "error", Kind::Text),
    ];
    let text = fields(&json!({"name": "vm1", "size": 2048, "base": null, "new": 1}), &columns);
    assert_eq!(text, "name  vm1\nsize  2K (2048 bytes)\nbase  -\n");
}

#[test]
fn paths_of_one_object_or_of_several() {
    assert_eq!(disk::paths(&json!({"path": "/m/a.raw"})), "/m/a.raw\n");
    assert_eq!(disk::paths(&json!([{"path": "/m/a.raw"}, {"path": "/m/b.raw"}])), "/m/a.raw\n/m/b.raw\n");
    assert_eq!(disk::paths(&json!({})), "");
}

#[test]
fn status_for_people() {
    let human = |value: Value| status::human(&serde_json::from_value(value).expect("a status"));
    let text = human(json!({
        "version": "0.1.0", "mount": "/m", "store": "/s", "supervisor_pid": 10, "worker_pid": null,
        "worker_starts": 2, "uptime_seconds": 3661, "bases": 1, "disks": 3,
        "cache": {"memory_limit": 1 << 30, "memory_used": 1536, "hits": 999, "misses": 1, "insertions": 5,
                  "evictions": 0},
        "confinement": {"capabilities": ["ipc_lock"], "landlock": "off (old)", "seccomp": "on", "core_dumps": "off",
                        "memory_locked": false},
    }));
    for part in [
        "capabilities ipc_lock, landlock off (old), seccomp on, core dumps off, memory not locked",
        "1h 1m 1s",
        "pid 10",
        "pid -, starts 2",
        "1.5K of 1G",
        "999 hits, 1 misses (99.9 %)",
    ] {
        assert!(text.contains(part), "{part}: {text}");
    }
    // An older or newer daemon may omit any field.
    assert!(human(json!({})).contains("disks"));
}

#[test]
fn mounts_are_found_by_path_and_type() {
    let table = b"22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
        41 22 0:40 / /srv/a\\040b/mnt rw,nosuid shared:7 master:1 - fuse.plyfs plyfs rw\n\
        42 22 0:41 / /srv/plain rw - tmpfs tmpfs rw\n";
    assert!(stop::has_fuse_mount(table, Path::new("/srv/a b/mnt")));
    assert!(!stop::has_fuse_mount(table, Path::new("/srv/a")));
    assert!(!stop::has_fuse_mount(table, Path::new("/srv/plain")), "another filesystem on the same path");
    assert!(!stop::has_fuse_mount(b"", Path::new("/")));
}

#[test]
fn events_for_people() {
    let event = json!({"at": "2026-11-21T10:00:00.123456789Z", "event": "base.miss", "base": "debian", "bytes": 1 << 20,
        "count": 16, "reason": "demand", "number": 4, "worker": 77});
    let human = |value: &Value| events::human(&serde_json::from_value(value.clone()).expect("an event"));
    assert_eq!(human(&event), "2026-11-21T10:00:00.123Z  base.miss        debian  1M in 16  demand\n");
    let lost = human(&json!({"event": "lost", "count": 12}));
    assert!(lost.contains("lost 12 events"), "{lost}");
    let hostile = json!({"event": "base.error", "base": "b", "reason": "a\nb\u{1b}[2J"});
    assert_eq!(human(&hostile), "-  base.error       b  a\\nb\\u{1b}[2J\n");
}

#[test]
fn the_size_of_a_disk_is_sectors_or_has_a_unit() {
    for (text, bytes) in
        [("512", 512), ("4096", 4096), ("1048577", (1 << 20) + 1), ("3K", 3072), ("1G", 1 << 30)]
    {
        assert_eq!(args::disk_size(text), Ok(bytes));
    }
    for text in ["1", "20", "513", "100000"] {
        assert!(args::disk_size(text).is_err_and(|why| why.contains("add a unit")), "{text}");
    }
}
