//! Compares the description of the control API with the router, and docs/api.md with the description. tests/fuse/api
//! tests that a running daemon answers as described.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;

use plyfs::control::document;
use serde_json::Value;

const METHODS: [&str; 4] = ["get", "put", "post", "delete"];
/// With this variable, the test writes docs/api.md instead of comparing it.
const WRITE: &str = "PLYFS_WRITE_DOCS";

fn file(path: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// All operations: path, method, description.
fn operations(document: &Value) -> Vec<(String, &'static str, &Value)> {
    let paths = document["paths"].as_object().unwrap();
    let of = |(path, item): (&String, _)| {
        let item: &Value = item;
        let path = path.clone();
        METHODS.into_iter().filter_map(move |method| Some((path.clone(), method, item.get(method)?)))
    };
    // The map is sorted by path.
    paths.iter().flat_map(of).collect()
}

#[test]
fn every_route_is_described_and_no_other() {
    let text = fs::read_to_string(file("src/control/mod.rs")).unwrap();
    let mut routes = BTreeSet::new();
    for line in text.lines().filter_map(|line| line.trim().strip_prefix(".route(\"")) {
        let (path, handlers) = line.split_once("\", ").unwrap();
        for method in METHODS {
            if handlers.starts_with(&format!("{method}(")) || handlers.contains(&format!(").{method}(")) {
                routes.insert((path.to_owned(), method));
            }
        }
    }
    assert!(routes.len() > 20, "the test must find the routes: {routes:?}");
    let document = document();
    let described: BTreeSet<_> =
        operations(&document).into_iter().map(|(path, method, _)| (path, method)).collect();
    assert_eq!(described, routes);
}

#[test]
fn each_operation_has_a_unique_name_and_a_description() {
    let document = document();
    let mut names = BTreeSet::new();
    for (path, method, operation) in operations(&document) {
        let name = operation["operationId"].as_str().unwrap();
        assert!(names.insert(name.to_owned()), "{name} is the name of two operations");
        assert!(operation["summary"].is_string(), "{method} {path} has no summary");
        assert!(operation["responses"]["200"].is_object() && operation["responses"]["default"].is_object());
    }
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        assert!(schema["description"].is_string(), "{name} has no description");
        for (key, property) in schema["properties"].as_object().into_iter().flatten() {
            assert!(description(property).is_some(), "{name}.{key} has no description");
        }
    }
}

/// The description of a key. For a nullable key of a named type, it stands beside the reference.
fn description(property: &Value) -> Option<&str> {
    let parts = property["oneOf"].as_array().into_iter().flatten();
    std::iter::once(property).chain(parts).find_map(|part| part["description"].as_str())
}

#[test]
fn every_reference_resolves() {
    fn walk(value: &Value, document: &Value) {
        match value {
            Value::Object(object) => {
                if let Some(Value::String(to)) = object.get("$ref") {
                    let pointer = to.strip_prefix('#').unwrap();
                    assert!(document.pointer(pointer).is_some(), "{to} does not resolve");
                }
                object.values().for_each(|value| walk(value, document));
            }
            Value::Array(array) => array.iter().for_each(|value| walk(value, document)),
            _ => {}
        }
    }
    let document = document();
    walk(&document, &document);
}

#[test]
fn docs_api_md_agrees_with_the_description() {
    let (path, text) = (file("docs/api.md"), markdown(&document()));
    if std::env::var_os(WRITE).is_some() {
        fs::write(&path, &text).unwrap();
    }
    let found = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == text,
        "docs/api.md differs from the description; write it anew with: {WRITE}=1 cargo test --test api"
    );
}

/// The description as Markdown.
fn markdown(document: &Value) -> String {
    let mut out = String::from("# Control API\n\n");
    out += "<!-- Written by tests/api.rs from the description; change the types in src/control/, then: ";
    out += "PLYFS_WRITE_DOCS=1 cargo test --test api -->\n\n";
    writeln!(out, "{}\n", document["info"]["description"].as_str().unwrap()).unwrap();
    out += "`GET /v1/openapi.json` answers with this description for programs (OpenAPI 3.1). An example:\n\n";
    out += "```\ncurl --unix-socket \"$SOCKET\" http://plyfs/v1/disks\n```\n\n";
    out += "Every operation may also answer with [ErrorBody](#errorbody).\n";
    let operations = operations(document);
    for tag in document["tags"].as_array().unwrap() {
        let name = tag["name"].as_str().unwrap();
        let title = name[..1].to_uppercase() + &name[1..];
        write!(out, "\n## {title}\n\n{}\n", tag["description"].as_str().unwrap()).unwrap();
        for (path, method, operation) in operations.iter().filter(|(.., of)| of["tags"][0] == name) {
            out += &one(path, method, operation);
        }
    }
    out += "\n## Bodies\n\nKeys marked with * are always there; those of requests have to be given.\n";
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        out += &body(name, schema);
    }
    out
}

fn one(path: &str, method: &str, operation: &Value) -> String {
    let mut out =
        format!("\n### {}\n\n`{} {path}`\n", operation["summary"].as_str().unwrap(), method.to_uppercase());
    if let Some(text) = operation["description"].as_str() {
        write!(out, "\n{text}\n").unwrap();
    }
    for parameter in operation["parameters"].as_array().into_iter().flatten() {
        let (name, place) = (parameter["name"].as_str().unwrap(), parameter["in"].as_str().unwrap());
        let text = parameter["description"].as_str().unwrap().replace('\n', " ");
        write!(out, "\n- {place} `{name}` ({}): {text}", kind(&parameter["schema"])).unwrap();
    }
    if operation["parameters"].is_array() {
        out.push('\n');
    }
    let contents = |place: &Value| -> String {
        let all = place["content"].as_object().into_iter().flatten();
        let all = all.map(|(media, content)| match &**media {
            "application/json" => kind(&content["schema"]),
            other => format!("{} as `{other}`", kind(&content["schema"])),
        });
        all.collect::<Vec<_>>().join(", ")
    };
    if operation["requestBody"].is_object() {
        let may = if operation["requestBody"]["required"] == true { "" } else { ", which may be omitted" };
        write!(out, "\nBody: {}{may}.\n", contents(&operation["requestBody"])).unwrap();
    }
    for (status, answer) in operation["responses"].as_object().unwrap() {
        if status != "default" {
            let text = answer["description"].as_str().unwrap();
            write!(out, "\n{status}: {}. {text}\n", contents(answer)).unwrap();
        }
    }
    out
}

fn body(name: &str, schema: &Value) -> String {
    let mut out = format!("\n### {name}\n\n{}\n", schema["description"].as_str().unwrap());
    if let Some(properties) = schema["properties"].as_object() {
        let required =
            |key: &str| schema["required"].as_array().is_some_and(|all| all.iter().any(|k| k == key));
        out += "\n| key | type | |\n| --- | --- | --- |\n";
        for (key, property) in properties {
            let star = if required(key) { "*" } else { "" };
            let text = description(property).unwrap().replace('\n', " ");
            writeln!(out, "| `{key}`{star} | {} | {text} |", kind(property)).unwrap();
        }
    } else {
        write!(out, "\n{}\n", kind(schema)).unwrap();
    }
    out
}

/// The type that a schema describes, in words.
fn kind(schema: &Value) -> String {
    if let Some(to) = schema["$ref"].as_str() {
        let name = to.rsplit('/').next().unwrap();
        return format!("[{name}](#{})", name.to_lowercase());
    }
    if let Some(all) = schema["oneOf"].as_array().or(schema["anyOf"].as_array()) {
        return all.iter().map(kind).collect::<Vec<_>>().join(" or ");
    }
    if let Some(words) = schema["enum"].as_array() {
        return words
            .iter()
            .map(|word| format!("`{}`", word.as_str().unwrap()))
            .collect::<Vec<_>>()
            .join(", ");
    }
    let types: Vec<&str> = match &schema["type"] {
        Value::String(only) => vec![only],
        Value::Array(all) => all.iter().filter_map(Value::as_str).collect(),
        _ => vec!["anything"],
    };
    let word = |of: &&str| match (*of, schema["format"].as_str()) {
        ("array", _) => format!("array of {}", kind(&schema["items"])),
        ("string", Some("date-time")) => "time".to_owned(),
        ("string", Some("binary")) => "bytes".to_owned(),
        ("object", _) if schema["additionalProperties"].is_object() => {
            format!("object of {} by name", kind(&schema["additionalProperties"]))
        }
        ("object", _) if schema["properties"].is_object() => {
            let keys = schema["properties"].as_object().unwrap();
            let keys = keys.iter().map(|(key, of)| format!("`{key}`: {}", kind(of)));
            format!("object with {}", keys.collect::<Vec<_>>().join(", "))
        }
        (other, _) => other.to_owned(),
    };
    types.iter().map(word).collect::<Vec<_>>().join(" or ")
}
