use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use super::super::{Config, ConfigError, Overrides};
use super::{
    Bounds, CLOUDS, DefaultValue, KEYS, Key, REPEATED, S3, commented_file, header, is_list, markdown, plain,
    time,
};

/// Writes the files in place of comparing them.
const WRITE: &str = "PLYFS_WRITE_DOCS";

fn load(text: &str) -> Result<Config, ConfigError> {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("plyfs.toml");
    std::fs::write(&path, text).expect("write the file");
    Config::load(Some(&path), Overrides { store: Some("/srv/plyfs".into()), ..Overrides::default() })
}

/// A file with this key, and with what the key needs beside it.
fn file_with(key: &Key, value: &str) -> String {
    if key.section == S3 {
        let bucket = if key.name == "bucket" { "" } else { "bucket = \"images\"\n" };
        let file = if key.name == "profile" { "keys_file = \"/keys\"\n" } else { "" };
        return format!("[[{S3}]]\n{bucket}{file}{} = {value}\n", key.name);
    }
    if !is_list(key.section) {
        return format!("[{}]\n{} = {value}\n", key.section, key.name);
    }
    let header = header(key.section);
    if key.section == CLOUDS {
        let name = if key.name == "name" { "" } else { "name = \"one\"\n" };
        return format!("{header}\n{name}{} = {value}\n", key.name);
    }
    let url = if key.name == "url" { "" } else { "url = \"https://example.org/\"\n" };
    let is_source = ["bearer_file", "basic_file", "header_file", "command"].contains(&key.name);
    let source = if is_source { "" } else { "bearer_file = \"/token\"\n" };
    format!("{header}\n{url}{source}{} = {value}\n", key.name)
}

#[test]
fn the_keys_are_those_that_the_file_may_have() {
    let sections: BTreeSet<&str> = KEYS.iter().map(|key| key.section).collect();
    let words = |text: &str| -> BTreeSet<String> {
        let expected = text.split_once("expected").map_or("", |(_, rest)| rest);
        expected.split('`').skip(1).step_by(2).map(str::to_owned).collect()
    };
    for section in &sections {
        let said = load(&format!("{}\nno_such_key = 1\n", header(section))).expect_err("unknown").to_string();
        let mut expected = words(&said);
        REPEATED
            .iter()
            .filter_map(|table| table.strip_prefix("http."))
            .for_each(|table| _ = expected.remove(table));
        let keys = KEYS.iter().filter(|key| key.section == *section);
        assert_eq!(keys.map(|key| key.name.to_owned()).collect::<BTreeSet<_>>(), expected, "{said}");
    }
    let said = load("[no_such_section]\n").expect_err("unknown").to_string();
    let known = sections.into_iter().filter(|section| !is_list(section)).map(str::to_owned);
    assert_eq!(known.collect::<BTreeSet<_>>(), words(&said));
}

#[test]
fn a_default_is_what_a_file_without_the_key_has() {
    let without = load("").expect("an empty file is valid");
    assert_eq!(load(&commented_file()).expect("all is commented out"), without);
    for key in KEYS {
        let value = key.default.value();
        let with = load(&file_with(key, value)).unwrap_or_else(|error| panic!("{}: {error}", key.path()));
        if let DefaultValue::Is(_) = key.default {
            assert_eq!(with, without, "{} = {value}", key.path());
        }
    }
}

#[test]
fn a_value_is_accepted_exactly_within_the_bounds() {
    let shorter = Duration::from_millis(1);
    for key in KEYS {
        let (within, beyond): (Vec<String>, Vec<String>) = match key.bounds {
            Bounds::Meaning => continue,
            Bounds::Count(least, u64::MAX) => (vec![least.to_string()], vec![(least - 1).to_string()]),
            Bounds::Count(least, most) | Bounds::Size(least, most) => {
                let beyond = [least.checked_sub(1), Some(most + 1)].into_iter().flatten();
                (vec![least.to_string(), most.to_string()], beyond.map(|n| format!("\"{n}\"")).collect())
            }
            Bounds::ZeroOrSize(_, least, most) => (
                vec!["0".into(), least.to_string(), most.to_string()],
                vec![(least - 1).to_string(), format!("\"{}\"", most + 1)],
            ),
            Bounds::Time(least, most) => (
                vec![format!("\"{}\"", time(least)), format!("\"{}\"", time(most))],
                vec![format!("\"{}\"", time(least - shorter)), format!("\"{}\"", time(most + shorter))],
            ),
            Bounds::Words(words) => {
                (words.iter().map(|word| format!("\"{word}\"")).collect(), vec!["\"no such word\"".into()])
            }
        };
        for value in within {
            let loaded = load(&file_with(key, &value));
            assert!(loaded.is_ok(), "{} = {value}: {}", key.path(), loaded.expect_err("refused"));
        }
        for value in beyond {
            // A count is no string.
            let value = if let Bounds::Count(..) = key.bounds { value.replace('"', "") } else { value };
            assert!(load(&file_with(key, &value)).is_err(), "{} = {value} is accepted", key.path());
        }
    }
}

/// Compares a file of the repository with what is made from the table; with the variable set, writes it.
fn compare(path: &str, made: impl FnOnce(&str) -> String) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path);
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    let made = made(&text);
    if std::env::var_os(WRITE).is_some() {
        return std::fs::write(&path, made).expect("write the file");
    }
    let path = path.display();
    assert!(text == made, "{path} is not what src/config/keys makes; run: {WRITE}=1 cargo test --lib config");
}

#[test]
fn the_configuration_file_of_packages_has_every_key() {
    compare("packaging/plyfs.toml", |_| commented_file());
}

#[test]
fn the_documentation_has_every_key() {
    compare("docs/config.md", |text| {
        let start = text.find("| section, key |").expect("the table");
        let end = start + text[start..].find("\n\n").expect("the table's end") + 1;
        format!("{}{}{}", &text[..start], markdown(), &text[end..])
    });
}

#[test]
fn plain_text_has_no_marks() {
    assert_eq!(
        plain("see [semantics.md](semantics.md), `[io] threads`, **all** of it"),
        "see docs/semantics.md, [io] threads, all of it"
    );
}
