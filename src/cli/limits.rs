//! `plyfs disk limit`, and the options for limits of new disks.

use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::Global;
use super::args;
use super::error::CliError;
use super::output::{Column, Kind};
use super::retry;
use super::table::fields;
use crate::config::parse_duration;
use crate::control::wire::SetLimits;

pub(super) const EXAMPLES: &str = "\
Examples:
  plyfs disk limit vm1                                  print the limits and what is used
  plyfs disk limit vm1 --quota 50G
  plyfs disk limit vm1 --iops 500 --bandwidth 100M/s
  plyfs disk limit vm1 --write-bandwidth 20M --burst 30s
  plyfs disk limit vm1 --iops none                      remove one limit
  plyfs disk ls --filter at_quota=true

Limits hold at once, also for requests that wait, and stay with the disk. A write beyond the quota fails with ENOSPC: QEMU \
pauses the guest with werror=enospc, and it goes on after a higher quota and `cont`. A request beyond a rate waits. Each \
limit that is set holds: --iops counts reads and writes together.";

/// A limit, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setting<T>(Option<T>);

fn setting<T>(text: &str, parse: impl Fn(&str) -> Result<T, String>) -> Result<Setting<T>, String> {
    if text == "none" { Ok(Setting(None)) } else { parse(text).map(|value| Setting(Some(value))) }
}

fn quota(text: &str) -> Result<Setting<u64>, String> {
    setting(text, |text| {
        let bytes = args::size_or_zero(text)?;
        if bytes < 4096 { Err("a quota is 4K at least; give `none` for no limit".into()) } else { Ok(bytes) }
    })
}

fn iops(text: &str) -> Result<Setting<u64>, String> {
    setting(text, |text| match text.parse() {
        Ok(0) => Err("that is 0; give `none` for no limit".into()),
        Ok(number) => Ok(number),
        Err(_) => Err("it is not a number of requests a second; give one such as 500, or `none`".into()),
    })
}

fn bandwidth(text: &str) -> Result<Setting<u64>, String> {
    setting(text, |text| {
        let bytes = args::size_or_zero(text.strip_suffix("/s").unwrap_or(text))?;
        if bytes < 64 << 10 {
            return Err("a bandwidth is 64K a second at least; give `none` for no limit".into());
        }
        Ok(bytes)
    })
}

fn burst(text: &str) -> Result<Setting<u32>, String> {
    setting(text, |text| {
        let time = parse_duration(text).ok_or("it is not a time; write one such as 500ms, 30s or 10m")?;
        let bounds = Duration::from_millis(1)..=Duration::from_secs(3600);
        if !bounds.contains(&time) {
            return Err("the time is out of range; give 1ms to 1h".into());
        }
        u32::try_from(time.as_millis()).map_err(|error| error.to_string())
    })
}

/// The heading of the options.
const LIMITS: &str = "Limits";

/// The limits that a command sets.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = LIMITS)]
pub(super) struct Options {
    /// Bytes that a disk may take in the store, or none
    #[arg(long, value_name = "SIZE", value_parser = quota, allow_hyphen_values = true)]
    quota: Option<Setting<u64>>,
    /// Requests a second, reads and writes together, or none
    #[arg(long, value_name = "N", value_parser = iops, allow_hyphen_values = true)]
    iops: Option<Setting<u64>>,
    /// Reads a second, or none
    #[arg(long, value_name = "N", value_parser = iops, allow_hyphen_values = true)]
    read_iops: Option<Setting<u64>>,
    /// Writes and discards a second, or none
    #[arg(long, value_name = "N", value_parser = iops, allow_hyphen_values = true)]
    write_iops: Option<Setting<u64>>,
    /// Bytes a second, reads and writes together, or none
    #[arg(long, value_name = "SIZE[/s]", value_parser = bandwidth, allow_hyphen_values = true)]
    bandwidth: Option<Setting<u64>>,
    /// Bytes a second of reads, or none
    #[arg(long, value_name = "SIZE[/s]", value_parser = bandwidth, allow_hyphen_values = true)]
    read_bandwidth: Option<Setting<u64>>,
    /// Bytes a second of writes, or none
    #[arg(long, value_name = "SIZE[/s]", value_parser = bandwidth, allow_hyphen_values = true)]
    write_bandwidth: Option<Setting<u64>>,
    /// For how long a disk may save up what it does not use of its rates, or none for the default of 100ms
    #[arg(long, value_name = "TIME", value_parser = burst, allow_hyphen_values = true)]
    burst: Option<Setting<u32>>,
}

impl Options {
    /// As the daemon takes them.
    pub(super) fn wanted(&self) -> SetLimits {
        let of = |setting: &Option<Setting<u64>>| setting.map(|Setting(value)| value);
        SetLimits {
            quota: of(&self.quota),
            iops: of(&self.iops),
            read_iops: of(&self.read_iops),
            write_iops: of(&self.write_iops),
            bandwidth: of(&self.bandwidth),
            read_bandwidth: of(&self.read_bandwidth),
            write_bandwidth: of(&self.write_bandwidth),
            burst_ms: self.burst.map(|Setting(value)| value),
        }
    }
}

/// Limits and use, for one disk.
pub(super) const FIELDS: [Column; 11] = [
    ("quota", "quota", Kind::Size),
    ("quota used", "quota_used", Kind::Size),
    ("at quota", "at_quota", Kind::Text),
    ("iops", "iops", Kind::Number),
    ("read iops", "read_iops", Kind::Number),
    ("write iops", "write_iops", Kind::Number),
    ("bandwidth", "bandwidth", Kind::Size),
    ("read bandwidth", "read_bandwidth", Kind::Size),
    ("write bandwidth", "write_bandwidth", Kind::Size),
    ("burst ms", "burst_ms", Kind::Number),
    ("throttled now", "throttled", Kind::Number),
];

/// Columns to sort and filter disks by.
pub(super) const COLUMNS: [Column; 5] = [
    ("QUOTA", "quota", Kind::Size),
    ("QUOTA USED", "quota_used", Kind::Size),
    ("AT QUOTA", "at_quota", Kind::Text),
    ("IOPS", "iops", Kind::Number),
    ("BANDWIDTH", "bandwidth", Kind::Size),
];

/// A disk with its limits as keys of its own, for tables.
pub(super) fn flat(mut disk: Value) -> Value {
    if let Some(limits) = disk.get("limits").and_then(Value::as_object).cloned() {
        for (key, value) in limits {
            disk[key] = value;
        }
    }
    disk
}

/// Takes the keys of [`flat`] away again.
pub(super) fn nested(mut disk: Value) -> Value {
    if let Some(limits) = disk.get("limits").and_then(Value::as_object).cloned()
        && let Some(keys) = disk.as_object_mut()
    {
        keys.retain(|key, _| !limits.contains_key(key));
    }
    disk
}

/// Prints the limits of a disk, or changes them.
pub(super) fn run(global: &Global, name: &str, options: &Options) -> Result<(), CliError> {
    let client = global.client()?;
    let wanted = options.wanted();
    if wanted.is_empty() {
        let disk = client.get(&format!("/v1/disks/{name}"), &format!("cannot show disk {name}"))?;
        return global.output().value(&disk, |disk| fields(&flat(disk.clone()), &FIELDS));
    }
    let (path, action) = (format!("/v1/disks/{name}/limits"), format!("cannot limit disk {name}"));
    // The same limits twice are the same.
    let disk = retry::repeat(|| client.post(&path, &wanted, &action))?;
    global.output().value(&disk, |_| String::new())
}
