use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::Path;

use super::exposition::{Value, Values, plain};
use super::table::{
    BUILD, DISK_OPERATION_BYTES, DISK_OPERATIONS, METRICS, Metric, MetricKind, MetricUnit, OTHER,
    REQUEST_DURATION, WORKER_STARTS,
};
use crate::format::valid_name;
use crate::stats::{Operation, Registry};

/// With this variable, the test writes docs/metrics.md instead of comparing it.
const WRITE: &str = "PLYFS_WRITE_DOCS";

fn values() -> Values {
    let registry = Registry::default();
    let counters = registry.add(1);
    counters.succeeded(Operation::Read, 4096, std::time::Duration::from_micros(3));
    counters.failed(Operation::Read, std::time::Duration::from_secs(100));
    let mut values = Values::default();
    values.add(&WORKER_STARTS, [], 3);
    values.add(&BUILD, ["1.2.3"], true);
    values.add(&DISK_OPERATIONS, ["vm1", "read"], 5);
    values.add(&DISK_OPERATION_BYTES, ["vm1", "read"], Value::Number(4096.0));
    values.add(&REQUEST_DURATION, ["read"], counters.sums().operation(Operation::Read));
    values
}

#[test]
fn the_text_is_openmetrics() {
    let values = values();
    assert!(values.has(&BUILD));
    let text = values.openmetrics();
    for line in [
        "# HELP plyfs_worker_starts Workers that began to serve since the mount was made.",
        "# TYPE plyfs_worker_starts counter",
        "plyfs_worker_starts_total 3",
        "plyfs_build_info{version=\"1.2.3\"} 1.0",
        "plyfs_disk_operations_total{disk=\"vm1\",operation=\"read\"} 5",
        "# UNIT plyfs_disk_operations_bytes bytes",
        "plyfs_disk_operations_bytes_total{disk=\"vm1\",operation=\"read\"} 4096.0",
        "plyfs_request_duration_seconds_sum{operation=\"read\"} 100.000003",
        "plyfs_request_duration_seconds_count{operation=\"read\"} 2",
    ] {
        assert!(text.lines().any(|found| found == line), "{line:?} is missing in {text}");
    }
    let buckets: Vec<&str> = text.lines().filter(|line| line.contains("_bucket{")).collect();
    assert_eq!(buckets.len(), crate::stats::BUCKETS);
    assert!(buckets[1].ends_with(" 0") && buckets[2].ends_with(" 1"), "{buckets:?}");
    let last = buckets.last().expect("a bucket");
    assert!(last.contains("le=\"+Inf\"") && last.ends_with(" 2"), "{last}");
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn the_older_format_names_counters_as_their_samples() {
    let text = plain(&values().openmetrics());
    assert!(
        text.contains("# TYPE plyfs_worker_starts_total counter\nplyfs_worker_starts_total 3\n"),
        "{text}"
    );
    assert!(text.contains("# HELP plyfs_disk_operations_bytes_total "), "{text}");
    assert!(text.contains("# TYPE plyfs_build_info gauge\n"), "{text}");
    assert!(!text.contains("# UNIT") && !text.contains("# EOF"), "{text}");
}

#[test]
fn names_are_unique_and_conventional() {
    let mut names = BTreeSet::new();
    for metric in METRICS {
        let name = metric.exposed();
        assert!(names.insert(name.clone()), "{name} is there twice");
        let is_word = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        assert!(name.starts_with("plyfs_") && name.chars().all(is_word), "{name}");
        for end in ["_total", "_count", "_sum", "_bucket", "_bytes", "_seconds"] {
            assert!(!metric.name.ends_with(end), "{}: unit and suffix are added", metric.name);
        }
        assert!(!metric.help.ends_with('.') && !metric.help.is_empty(), "{name}");
        assert!(metric.kind != MetricKind::Histogram || metric.unit == MetricUnit::Seconds, "{name}");
    }
    // No disk or base is mistaken for all others.
    assert!(!valid_name(OTHER));
}

#[test]
fn every_metric_has_values() {
    let text = include_str!("collect.rs");
    for metric in METRICS {
        let uses = text.matches(&format!("&{}", metric.id)).count();
        assert!(uses > 0, "{} has no value", metric.id);
    }
}

/// The labels of a metric, in Markdown.
fn labels(metric: &Metric) -> String {
    let labels: Vec<String> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
    if labels.is_empty() { "-".to_owned() } else { labels.join(", ") }
}

fn markdown() -> String {
    let mut out = String::from(
        "# Metrics\n\n<!-- Written by src/control/metrics/tests.rs from src/control/metrics/table.rs: \
         PLYFS_WRITE_DOCS=1 cargo test --lib control::metrics -->\n\n",
    );
    out += include_str!("about.md");
    out += "\n| metric | type | labels | meaning |\n| --- | --- | --- | --- |\n";
    for metric in METRICS {
        let kind = match metric.kind {
            MetricKind::Counter => "counter",
            MetricKind::Gauge => "gauge",
            MetricKind::Histogram => "histogram",
        };
        let _ = writeln!(out, "| `{}` | {kind} | {} | {}. |", metric.exposed(), labels(metric), metric.help);
    }
    out
}

#[test]
fn docs_metrics_md_has_every_metric() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md");
    let text = markdown();
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, &text).expect("write the file");
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == text,
        "docs/metrics.md differs; write it anew with: {WRITE}=1 cargo test --lib control::metrics"
    );
}
