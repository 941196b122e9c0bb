//! Checks the rules of docs/design.md for modules: which module may use which, where `unsafe` may be, and how long a file
//! may be.

mod source_tree;

use std::collections::BTreeSet;
use std::fs;

use source_tree::{Part, is_rust, parts, root, texts};

/// Each module, and the modules of the crate that it may use. A module may always use itself.
const MAY_USE: &[(&str, &[&str])] = &[
    ("mutant", &[]),
    ("format", &["mutant"]),
    ("io", &["mutant"]),
    ("source", &["config", "format"]),
    ("events", &[]),
    ("stats", &[]),
    ("trace", &["events", "format", "io"]),
    ("fetch", &["events", "source", "format", "io", "mutant"]),
    ("cache", &[]),
    ("image", &["source", "format"]),
    ("base", &["cache", "events", "source", "image", "stats"]),
    ("limits", &["format"]),
    ("crypt", &["format", "io"]),
    ("delta", &["crypt", "format", "io", "limits", "mutant"]),
    ("layers", &["crypt", "delta", "format", "io", "mutant"]),
    ("disk", &["delta", "base", "layers", "cache", "format", "mutant", "stats", "trace"]),
    (
        "store",
        &[
            "disk", "crypt", "delta", "base", "layers", "limits", "cache", "image", "source", "format", "io",
            "mutant", "events", "stats", "trace",
        ],
    ),
    ("serve", &["store", "disk", "base", "cache", "format", "io", "limits", "stats"]),
    ("fuse", &["serve", "store", "disk", "format", "io"]),
    ("check", &["fetch", "format", "io", "source", "store"]),
    (
        "simulation",
        &["store", "disk", "delta", "check", "cache", "fetch", "source", "format", "io", "mutant", "events"],
    ),
    ("config", &["format"]),
    ("sandbox", &["config", "format", "io", "source"]),
    ("jobs", &["source"]),
    ("disks", &["disk", "io", "jobs", "store"]),
    (
        "bases",
        &["base", "cache", "config", "events", "fetch", "format", "io", "jobs", "source", "store", "trace"],
    ),
    (
        "control",
        &[
            "bases", "cache", "config", "disk", "disks", "events", "fetch", "format", "io", "jobs", "serve",
            "source", "stats", "store", "trace",
        ],
    ),
    ("peers", &["bases", "fetch", "io", "source", "store"]),
    (
        "daemon",
        &[
            "base", "bases", "cache", "check", "config", "control", "delta", "disk", "disks", "events",
            "fetch", "format", "fuse", "io", "peers", "sandbox", "serve", "source", "store", "trace",
        ],
    ),
    ("export", &["format", "io"]),
    ("import", &["format", "image", "io", "source"]),
    ("nova", &["io"]),
    ("seal", &["format"]),
    (
        "cli",
        &["config", "control", "daemon", "check", "export", "format", "import", "nova", "seal", "source"],
    ),
];

/// Edges on which a module may use only these items.
const ONLY: &[(&str, &str, &[&str])] = &[
    ("disk", "trace", &["Tap"]),
    ("disk", "cache", &["Touch"]),
    ("serve", "cache", &["Touch"]),
    ("fuse", "store", &["Attributes", "Replace"]),
    ("fuse", "disk", &["Grow", "Seek"]),
    ("cli", "source", &["http", "Location"]),
    ("cli", "format", &["layout", "proof"]),
    ("cli", "control", &["wire"]),
    ("sandbox", "format", &["layout"]),
];

/// The files outside of src/io/ that may contain `unsafe`, and how often.
const UNSAFE: &[(&str, usize)] = &[("src/cache/arena.rs", usize::MAX), ("src/source/file.rs", 1)];

const LONGEST_FILE: usize = 700;
const LONGEST_MAIN: usize = 60;

/// The path from the root of the repository, and the text, of every source file.
fn sources() -> Vec<(String, String)> {
    texts("src", is_rust)
}

fn is_test(path: &str) -> bool {
    path.ends_with("/tests.rs") || path.contains("/tests/")
}

/// The text without comments, and with empty literals.
fn code(text: &str) -> String {
    let part = |(part, range): (Part, _)| match part {
        Part::Code => &text[range],
        Part::Comment => "",
        Part::Literal => "\"\"",
    };
    parts(text).into_iter().map(part).collect()
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// The offsets at which `word` stands by itself.
fn occurrences<'a>(code: &'a str, word: &'a str) -> impl Iterator<Item = usize> + 'a {
    code.match_indices(word)
        .map(|(at, _)| at)
        .filter(move |at| !code[..*at].ends_with(is_word) && !code[at + word.len()..].starts_with(is_word))
}

/// The items at the start of a path or of a list in braces. A nested list counts by its first word.
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

/// The modules of the crate that a file uses, each with the items that follow directly.
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
            wrong.push(format!(
                "src/{module}: declare in tests/layering.rs and docs/design.md what it may use"
            ));
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
    assert_eq!(placed.len(), MAY_USE.len(), "all modules but {placed:?} are part of a cycle, or use one");
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
fn unsafe_code_is_only_in_the_listed_files() {
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
    const OF_ONE_KIND: &[&str] = &[
        "HttpIdentity",
        "HttpSource",
        "FileIdentity",
        "GlanceIdentity",
        "NbdIdentity",
        "NbdSource",
        "OciIdentity",
    ];
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
fn file_names_of_the_store_are_spelled_only_in_layout_rs() {
    // Only unambiguous names. `io` knows no store; the simulated medium recognises data files by their names.
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
fn the_parser_finds_the_used_modules() {
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
