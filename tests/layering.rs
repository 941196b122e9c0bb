//! Holds the edges between the modules (docs/design.md): who may use whom, where `unsafe` may be, how long a file is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// A module and what it may name of the crate. A module may always name itself.
const MAY_USE: &[(&str, &[&str])] = &[
    ("sabotage", &[]),
    ("format", &["sabotage"]),
    ("io", &["sabotage"]),
    ("source", &["config", "format"]),
    ("events", &[]),
    ("trace", &["events", "format", "io"]),
    ("fetch", &["events", "source", "format", "io", "sabotage"]),
    ("cache", &[]),
    ("image", &["source", "format"]),
    ("base", &["cache", "events", "source", "image"]),
    ("delta", &["format", "io", "sabotage"]),
    ("disk", &["delta", "base", "cache", "format", "trace"]),
    (
        "store",
        &["disk", "delta", "base", "cache", "image", "source", "format", "io", "sabotage", "events", "trace"],
    ),
    ("serve", &["store", "disk", "base", "cache", "format", "io"]),
    ("fuse", &["serve", "store", "disk", "format", "io"]),
    ("check", &["fetch", "format", "io", "source", "store"]),
    (
        "simulation",
        &[
            "store", "disk", "delta", "check", "cache", "fetch", "source", "format", "io", "sabotage",
            "events",
        ],
    ),
    ("config", &["format"]),
    ("sandbox", &["config", "format", "io", "source"]),
    ("bases", &["base", "cache", "config", "events", "fetch", "format", "io", "source", "store", "trace"]),
    (
        "control",
        &[
            "bases", "cache", "config", "disk", "events", "fetch", "format", "io", "serve", "source",
            "store", "trace",
        ],
    ),
    (
        "daemon",
        &[
            "base", "bases", "cache", "check", "config", "control", "delta", "disk", "events", "fetch",
            "format", "fuse", "io", "sandbox", "serve", "source", "store", "trace",
        ],
    ),
    ("cli", &["config", "control", "daemon", "check", "format", "source"]),
];

/// Of a module, only these items.
const ONLY: &[(&str, &str, &[&str])] = &[
    ("disk", "trace", &["Tap"]),
    ("disk", "cache", &["Touch"]),
    ("serve", "cache", &["Touch"]),
    ("fuse", "store", &["Attributes", "Replace"]),
    ("fuse", "disk", &["Grow", "Seek"]),
    ("cli", "source", &["http", "Location"]),
    ("cli", "format", &["layout"]),
    ("cli", "control", &["wire"]),
    ("sandbox", "format", &["layout"]),
];

/// `unsafe` may be here and in src/io/.
const UNSAFE: &[(&str, usize)] = &[("src/cache/arena.rs", usize::MAX), ("src/source/file.rs", 1)];

const LONGEST_FILE: usize = 800;
const LONGEST_MAIN: usize = 60;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn rust_files(dir: &Path, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, out);
        } else if path.extension().is_some_and(|e| e == "rs") {
            out.push(path);
        }
    }
}

/// Path from the root of the repository, and text, of every source file.
fn sources() -> Vec<(String, String)> {
    let mut files = Vec::new();
    rust_files(&root().join("src"), &mut files);
    files.sort();
    files
        .into_iter()
        .map(|p| {
            (p.strip_prefix(root()).unwrap().to_str().unwrap().to_owned(), fs::read_to_string(p).unwrap())
        })
        .collect()
}

fn is_test(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// The text without comments, and with the contents of string and character literals blanked.
fn code(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let word_before = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
        if rest.starts_with(b"//") {
            at += rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
        } else if rest.starts_with(b"/*") {
            let mut depth = 0;
            loop {
                match bytes.get(at..at + 2) {
                    Some(b"/*") => (depth, at) = (depth + 1, at + 2),
                    Some(b"*/") => (depth, at) = (depth - 1, at + 2),
                    Some(_) => at += 1,
                    None => at = bytes.len(),
                }
                if depth == 0 || at >= bytes.len() {
                    break;
                }
            }
        } else if !word_before && let Some(len) = raw_string(rest) {
            at += len;
            out.extend_from_slice(b"\"\"");
        } else if rest[0] == b'"' {
            at += 1;
            while at < bytes.len() && bytes[at] != b'"' {
                at += if bytes[at] == b'\\' { 2 } else { 1 };
            }
            at += 1;
            out.extend_from_slice(b"\"\"");
        } else if rest.starts_with(b"'\\") {
            at += 3 + rest[3..].iter().position(|b| *b == b'\'').unwrap_or(0) + 1;
        } else if rest[0] == b'\'' && rest.get(2) == Some(&b'\'') {
            at += 3;
        } else {
            out.push(rest[0]);
            at += 1;
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

/// Length of the raw string that `bytes` begins with.
fn raw_string(bytes: &[u8]) -> Option<usize> {
    let head = if bytes.starts_with(b"br") { 2 } else { usize::from(bytes.starts_with(b"r")) };
    let hashes = bytes[head..].iter().take_while(|b| **b == b'#').count();
    if head == 0 || bytes.get(head + hashes) != Some(&b'"') {
        return None;
    }
    let close = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    let body = head + hashes + 1;
    let end = bytes[body..].windows(close.len()).position(|w| w == close)?;
    Some(body + end + close.len())
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Where `word` stands by itself.
fn occurrences<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |at| !code[..*at].ends_with(is_word) && !code[at + word.len()..].starts_with(is_word))
}

/// Items at the start of a path or of a list in braces; nested lists count by what they begin with.
fn heads(path: &str) -> Vec<String> {
    let path = path.trim_start();
    let head = |s: &str| s.trim_start().chars().take_while(|c| is_word(*c) || *c == '*').collect::<String>();
    let Some(list) = path.strip_prefix('{') else { return vec![head(path)] };
    let (mut out, mut depth, mut item) = (Vec::new(), 0, String::new());
    for c in list.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                out.push(head(&item));
                item.clear();
                continue;
            }
            _ => {}
        }
        item.push(c);
    }
    out.push(head(&item));
    out.retain(|h| !h.is_empty());
    out
}

/// What a file names of the crate: modules, each with the items when they stand right behind.
fn edges(code: &str) -> Vec<(String, Vec<String>)> {
    let mut out = Vec::new();
    for at in occurrences(code, "crate") {
        let before = code[..at].trim_end();
        let Some(rest) = code[at + 5..].trim_start().strip_prefix("::") else { continue };
        if before.ends_with('$') {
            continue;
        }
        for module in heads(rest) {
            let items = rest.trim_start().strip_prefix(&module).map(str::trim_start);
            let items = items.and_then(|r| r.strip_prefix("::")).map(heads).unwrap_or_default();
            out.push((module, items));
        }
    }
    out
}

fn modules() -> BTreeSet<String> {
    let dirs = fs::read_dir(root().join("src")).unwrap().map(|e| e.unwrap().path());
    dirs.filter(|p| p.is_dir() && p.join("mod.rs").exists())
        .map(|p| p.file_name().unwrap().to_str().unwrap().to_owned())
        .collect()
}

#[test]
fn modules_use_only_what_they_may() {
    let modules = modules();
    let mut wrong = Vec::new();
    for module in &modules {
        if !MAY_USE.iter().any(|(name, _)| name == module) {
            wrong.push(format!("src/{module}: say in tests/layering.rs and docs/design.md what it may use"));
        }
    }
    for (path, text) in sources() {
        let module = path.split('/').nth(1).unwrap();
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == module) else { continue };
        if is_test(&path) {
            continue;
        }
        for (used, items) in edges(&code(&text)) {
            if used == module {
                continue;
            }
            if !allowed.contains(&used.as_str()) {
                wrong.push(format!("{path}: {module} may not use crate::{used}"));
            }
            if let Some((.., only)) = ONLY.iter().find(|(from, to, _)| *from == module && *to == used)
                && (items.is_empty() || items.iter().any(|i| !only.contains(&i.as_str())))
            {
                wrong
                    .push(format!("{path}: of crate::{used}, {module} may only use {only:?}, not {items:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn the_allowed_edges_have_no_cycle() {
    let mut placed: BTreeSet<&str> = BTreeSet::new();
    while let Some((name, _)) =
        MAY_USE.iter().find(|(n, uses)| !placed.contains(n) && uses.iter().all(|u| placed.contains(u)))
    {
        placed.insert(name);
    }
    assert_eq!(placed.len(), MAY_USE.len(), "these are part of a cycle, or use one: all but {placed:?}");
}

#[test]
fn only_fuse_uses_the_fuse_crate() {
    let users: Vec<_> = sources()
        .into_iter()
        .filter(|(path, text)| {
            !path.starts_with("src/fuse/") && occurrences(&code(text), "fuser").next().is_some()
        })
        .map(|(path, _)| path)
        .collect();
    assert!(users.is_empty(), "{users:?}");
}

#[test]
fn unsafe_is_where_it_is_expected() {
    for (path, text) in sources() {
        let count = occurrences(&code(&text), "unsafe").count();
        let limit = UNSAFE.iter().find(|(file, _)| *file == path).map_or(0, |(_, limit)| *limit);
        assert!(
            path.starts_with("src/io/") || count <= limit,
            "{path}: {count} times unsafe, {limit} allowed"
        );
    }
}

/// A new kind of source is a file in src/source/, a variant of the record, and one place that opens it.
#[test]
fn kinds_of_sources_are_told_apart_in_three_places() {
    const PLACES: &[&str] = &["src/source/", "src/format/identity.rs", "src/bases/origin.rs"];
    /// Enums with a variant for each kind: what follows is one of them.
    const OF_ALL_KINDS: &[&str] = &["Validator", "Location"];
    /// What is of one kind.
    const OF_ONE_KIND: &[&str] = &["HttpIdentity", "HttpSource", "FileIdentity"];
    // The offline check compares metadata of files without opening them.
    const EXCEPT: &[(&str, &str)] = &[("src/check/mod.rs", "FileIdentity")];
    // A path is asked for as such where no kind of source is meant: is it below the mount of this daemon?
    const VARIANTS: &[&str] = &["Location::of", "Location::without_query", "Location::File"];
    for (path, text) in sources() {
        if is_test(&path) || PLACES.iter().any(|place| path.starts_with(place)) {
            continue;
        }
        let text = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        let code = code(text);
        for name in OF_ALL_KINDS {
            for at in occurrences(&code, name) {
                let rest = &code[at..];
                let is_variant = rest[name.len()..].starts_with("::");
                let line = rest.lines().next().unwrap_or_default();
                let is_allowed = VARIANTS.iter().any(|variant| rest.starts_with(variant));
                assert!(!is_variant || is_allowed, "{path}: {line:?} tells kinds of sources apart");
            }
        }
        for name in OF_ONE_KIND {
            let is_exception = EXCEPT.contains(&(path.as_str(), name));
            let is_named = occurrences(&code, name).next().is_some();
            assert!(!is_named || is_exception, "{path} names {name}, which is of one kind of source");
        }
    }
}

#[test]
fn names_of_files_are_spelled_once() {
    // Those that mean nothing else. `io` knows no store; a medium that is simulated tells data files by their name.
    const NAMES: &[&str] = &["plyfs.store", "daemon.outcome", "control.sock", "\"deltas"];
    const ENDS: &[&str] = &["base", "disk", "data", "map", "trace", "blocks", "sums"];
    let ends = ENDS.iter().flat_map(|end| [format!("}}.{end}"), format!("\".{end}\"")]);
    let names: Vec<String> = NAMES.iter().map(|&name| name.to_owned()).chain(ends).collect();
    for (path, text) in sources() {
        let is_elsewhere = path.starts_with("src/io/") || path.starts_with("src/simulation/");
        if is_test(&path) || is_elsewhere || path == "src/format/layout.rs" {
            continue;
        }
        for line in text.lines().filter(|line| !line.trim_start().starts_with("//")) {
            let name = names.iter().find(|name| line.contains(*name));
            assert!(name.is_none(), "{path}: {line:?} spells a name of src/format/layout.rs");
        }
    }
}

#[test]
fn no_file_is_too_long() {
    for (path, text) in sources() {
        let limit = if path == "src/main.rs" { LONGEST_MAIN } else { LONGEST_FILE };
        let lines = text.lines().count();
        assert!(lines <= limit, "{path}: {lines} lines, at most {limit}");
    }
}

#[test]
fn the_parser_of_this_test_sees_what_it_should() {
    let text = r##"
        use crate::{a::B, c};  // crate::comment
        use crate::d::{E, f::G};
        pub(crate) fn x() { crate::h::i(); let s = "crate::string"; let c = '"'; /* crate::block */ }
        const R: &str = r#"unsafe " crate::raw"#; fn l<'a>(x: &'a str) { crate::last::y('\'') }
    "##;
    let seen: Vec<String> =
        edges(&code(text)).into_iter().map(|(m, i)| format!("{m}:{}", i.join(","))).collect();
    assert_eq!(seen, ["a:", "c:", "d:E,f", "h:i", "last:y"]);
    assert_eq!(occurrences(&code(text), "unsafe").count(), 0);
    assert_eq!(occurrences("unsafe fn not_unsafe() {}", "unsafe").count(), 1);
}
