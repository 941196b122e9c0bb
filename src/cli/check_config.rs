//! `plyfs check-config`: whether a configuration is valid, and what the daemon would use.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde_json::{Map, Value, json};

use super::Global;
use super::error::CliError;
use super::output::{Column, Kind, printable};
use super::serve::Flags;
use super::table::table;
use crate::config::keys::{self, Bounds, DefaultValue, KEYS, Key, is_list};
use crate::config::{Config, CredentialSource, S3Keys, place, size::format_size};

const EXAMPLES: &str = "\
Examples:
  plyfs check-config                                 what the service would use
  plyfs check-config --config /root/new.toml         a file, before it replaces the one in /etc
  plyfs --json check-config | jq -r '.values[\"mount.path\"].value'

Takes the flags of `plyfs serve` and starts nothing. Reads no secret: of a credential it shows the URL and where the
secret is. Exit status: 0 valid; 78 not valid, with one line that says why.";

const COLUMNS: [Column; 3] =
    [("KEY", "key", Kind::Text), ("FROM", "from", Kind::Text), ("VALUE", "value", Kind::Text)];

/// Check the configuration, and print what the daemon would use
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CheckConfig {
    #[command(flatten)]
    flags: Flags,
}

impl CheckConfig {
    pub(super) fn run(self, global: &Global) -> Result<(), CliError> {
        let file = place::file(global.config.as_deref(), global.store.as_deref())?;
        let written = file.as_deref().map(in_file).transpose()?.unwrap_or_default();
        let overrides = self.flags.overrides(global);
        let flags = [
            ("store.path", overrides.store.is_some()),
            ("mount.path", overrides.mount.is_some()),
            ("mount.allow_other", overrides.allow_other.is_some()),
            ("cache.memory", overrides.cache_memory.is_some()),
            ("cache.disk", overrides.cache_disk.is_some()),
            ("trash.grace", overrides.trash_grace.is_some()),
            ("bases.unused_age", overrides.base_unused_age.is_some()),
            ("bases.unused_limit", overrides.base_unused_limit.is_some()),
            ("log.level", overrides.log_level.is_some()),
            ("log.format", overrides.log_format.is_some()),
        ];
        let config = Config::load(file.as_deref(), overrides)?;
        config.check_files()?;
        let mut values = Map::new();
        let mut rows = Vec::new();
        for key in KEYS.iter().filter(|key| !is_list(key.section)) {
            let value = value_of(&config, key);
            let from = if flags.contains(&(key.path().as_str(), true)) {
                "flag"
            } else if written.get(key.section).is_some_and(|section| section.get(key.name).is_some()) {
                "file"
            } else {
                "default"
            };
            rows.push(json!({ "key": key.path(), "value": shown(key, &value), "from": from }));
            values.insert(key.path(), json!({ "value": value, "from": from }));
        }
        let credentials: Vec<Value> = config.http.credentials.iter().map(|credential| {
            let (kind, place) = match credential.source() {
                Some(CredentialSource::Bearer(path)) => ("bearer_file", path.display().to_string()),
                Some(CredentialSource::Basic(path)) => ("basic_file", path.display().to_string()),
                Some(CredentialSource::Headers(path)) => ("header_file", path.display().to_string()),
                // Its arguments may be secrets.
                Some(CredentialSource::Command(words)) => ("command", words.first().cloned().unwrap_or_default()),
                None => ("none", String::new()),
            };
            let text = format!("{kind} {place}");
            rows.push(json!({ "key": format!("credentials for {}", credential.url), "value": text, "from": "file" }));
            json!({ "url": credential.url, "kind": kind, "place": place })
        }).collect();
        let buckets: Vec<Value> = config
            .http
            .s3
            .iter()
            .map(|entry| {
                // Arguments of a command may be secrets.
                let keys = match entry.keys() {
                    Some(S3Keys::File(path)) => format!("keys_file {}", path.display()),
                    Some(S3Keys::Command(words)) => format!("keys_command {}", words.first().map_or("", String::as_str)),
                    Some(S3Keys::Environment) => "keys_environment".to_owned(),
                    Some(S3Keys::Instance(url)) => format!("keys_instance {url}"),
                    Some(S3Keys::Anonymous) | None => "no keys".to_owned(),
                };
                rows.push(json!({ "key": format!("bucket {}", entry.bucket), "value": keys, "from": "file" }));
                json!({ "bucket": entry.bucket, "endpoint": entry.endpoint, "region": entry.region, "keys": keys })
            })
            .collect();
        let clouds: Vec<Value> = config
            .http
            .clouds
            .iter()
            .map(|cloud| {
                let place = cloud.file.display().to_string();
                rows.push(json!({ "key": format!("cloud {}", cloud.name), "value": place, "from": "file" }));
                json!({ "name": cloud.name, "file": place, "locations": cloud.locations })
            })
            .collect();
        let value = json!({ "file": file, "values": values, "credentials": credentials, "buckets": buckets, "clouds": clouds });
        global.output().value(&value, |_| {
            let file = file.as_deref().map_or_else(
                || "no configuration file; defaults and flags apply".to_owned(),
                |file| format!("{} is valid", printable(&file.to_string_lossy())),
            );
            format!("{file}\n\n{}", table(&Value::Array(rows), &COLUMNS, SystemTime::now(), None))
        })
    }
}

/// The file as it is written: it was read as a configuration, or will be.
fn in_file(path: &Path) -> Result<Map<String, Value>, CliError> {
    let text = std::fs::read_to_string(path);
    // The configuration's own message is better than one from here.
    Ok(text.ok().and_then(|text| toml::from_str(&text).ok()).unwrap_or_default())
}

/// The value in use, as JSON; null when it depends on the host and is known when the daemon runs.
fn value_of(config: &Config, key: &Key) -> Value {
    let all = serde_json::to_value(config).unwrap_or_default();
    let name = key.name;
    let pointer = match key.section {
        "store" if name == "path" => "/store".to_owned(),
        "mount" if name == "path" => "/mount".to_owned(),
        "store" | "mount" => format!("/{name}"),
        "runtime" if name == "dir" => "/runtime_dir".to_owned(),
        "runtime" => format!("/{name}"),
        section @ ("cache" | "fuse" | "io") => format!("/{section}_{name}"),
        section => format!("/{section}/{name}"),
    };
    let value = all.pointer(&pointer).cloned().unwrap_or_default();
    match (key.bounds, &value) {
        // As the file has it.
        (Bounds::Time(..), Value::Object(time)) => {
            let part = |name: &str| time.get(name).and_then(Value::as_u64).unwrap_or_default();
            json!(keys::time(Duration::from_millis(part("secs") * 1000 + part("nanos") / 1_000_000)))
        }
        _ if key.path() == "mount.base_mode" => json!(format!("{:04o}", value.as_u64().unwrap_or_default())),
        _ => value,
    }
}

fn shown(key: &Key, value: &Value) -> String {
    match (value, key.bounds) {
        (Value::Null, _) => match key.default {
            DefaultValue::Is(text) | DefaultValue::Says { text, .. } => {
                format!("({})", keys::plain(text))
            }
        },
        (Value::Number(bytes), Bounds::Size(..) | Bounds::ZeroOrSize(..)) => {
            bytes.as_u64().map_or_else(|| bytes.to_string(), format_size)
        }
        (Value::String(text), _) => text.clone(),
        (Value::Array(entries), _) if entries.is_empty() => "(none)".to_owned(),
        (other, _) => other.to_string(),
    }
}
