//! Values of metrics, and their text: OpenMetrics 1.0, and the older format of Prometheus, which `promtool check metrics`
//! and textfile collectors read.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::exemplar::Exemplar;
use prometheus_client::registry::{Registry, Unit};

use super::table::{METRICS, Metric, MetricKind, MetricUnit, PREFIX};
use crate::stats::{OperationSums, bound_us};

/// The media types of both formats.
pub const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
pub const PLAIN: &str = "text/plain; version=0.0.4; charset=utf-8";

/// One value.
#[derive(Clone, Debug)]
pub enum Value {
    Count(u64),
    Number(f64),
    /// Seconds of all observations, and the buckets.
    Histogram(f64, Vec<(f64, u64)>),
}

impl From<u64> for Value {
    fn from(count: u64) -> Self {
        Self::Count(count)
    }
}

impl From<bool> for Value {
    fn from(is: bool) -> Self {
        Self::Count(is.into())
    }
}

impl From<&OperationSums> for Value {
    fn from(sums: &OperationSums) -> Self {
        let bound = |bucket| bound_us(bucket).map_or(f64::MAX, |us| us as f64 / 1e6);
        let buckets = sums.latency.iter().enumerate().map(|(bucket, count)| (bound(bucket), *count));
        Self::Histogram(seconds(sums.latency_ns), buckets.collect())
    }
}

/// Nanoseconds as seconds.
pub fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// The values of the labels, in the order of the metric's labels, and the value.
type Sample = (Vec<String>, Value);

/// The values of all metrics at one moment.
#[derive(Debug, Default)]
pub struct Values(BTreeMap<usize, Vec<Sample>>);

impl Values {
    /// Adds a value. `labels`: the values of the metric's labels.
    pub fn add<const N: usize>(&mut self, metric: &Metric, labels: [&str; N], value: impl Into<Value>) {
        debug_assert_eq!(metric.labels.len(), N, "labels of {}", metric.name);
        let labels = labels.iter().map(|&label| label.to_owned()).collect();
        self.0.entry(place(metric)).or_default().push((labels, value.into()));
    }

    /// Whether a metric has a value.
    #[cfg(test)]
    pub fn has(&self, metric: &Metric) -> bool {
        self.0.contains_key(&place(metric))
    }

    /// The text in OpenMetrics.
    pub fn openmetrics(self) -> String {
        let mut registry = Registry::with_prefix(PREFIX);
        registry.register_collector(Box::new(self));
        let mut out = String::new();
        // Writing to a string does not fail.
        let _ = text::encode(&mut out, &registry);
        out
    }
}

/// Its place in the table. Names alone do not tell metrics apart: some differ in the unit only.
fn place(metric: &Metric) -> usize {
    METRICS.iter().take_while(|one| !std::ptr::eq(**one, metric)).count()
}

/// The same in the older format: the name of a counter has its suffix everywhere, and there are no units.
pub fn plain(openmetrics: &str) -> String {
    let counters: Vec<String> =
        METRICS.iter().filter(|one| one.kind == MetricKind::Counter).map(|one| one.family()).collect();
    let mut out = String::with_capacity(openmetrics.len());
    for line in openmetrics.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some("EOF" | "UNIT"), ..) => continue,
            (Some("#"), Some(what), Some(name), Some(rest)) if counters.iter().any(|one| one == name) => {
                let _ = writeln!(out, "# {what} {name}_total {rest}");
            }
            _ => {
                out.push_str(line);
                out.push('\n');
            }
        }
    }
    out
}

impl Collector for Values {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (place, metric) in METRICS.iter().enumerate() {
            let unit = match metric.unit {
                MetricUnit::None => None,
                MetricUnit::Seconds => Some(Unit::Seconds),
                MetricUnit::Bytes => Some(Unit::Bytes),
            };
            let kind = match metric.kind {
                MetricKind::Counter => MetricType::Counter,
                MetricKind::Gauge => MetricType::Gauge,
                MetricKind::Histogram => MetricType::Histogram,
            };
            let help = format!("{}.", metric.help);
            let mut family = encoder.encode_descriptor(metric.name, &help, unit.as_ref(), kind)?;
            for (labels, value) in self.0.get(&place).into_iter().flatten() {
                let labels: Vec<(&str, &str)> =
                    metric.labels.iter().copied().zip(labels.iter().map(String::as_str)).collect();
                if labels.is_empty() {
                    encode(metric, value, &mut family)?;
                } else {
                    encode(metric, value, &mut family.encode_family(&labels)?)?;
                }
            }
        }
        Ok(())
    }
}

fn encode(metric: &Metric, value: &Value, encoder: &mut MetricEncoder<'_>) -> Result<(), fmt::Error> {
    const NO_EXEMPLAR: Option<&Exemplar<NoLabelSet, f64>> = None;
    match (value, metric.kind) {
        (Value::Count(count), MetricKind::Counter) => encoder.encode_counter(count, NO_EXEMPLAR),
        (Value::Number(number), MetricKind::Counter) => encoder.encode_counter(number, NO_EXEMPLAR),
        (Value::Count(count), _) => encoder.encode_gauge(&(*count as f64)),
        (Value::Number(number), _) => encoder.encode_gauge(number),
        (Value::Histogram(sum, buckets), _) => {
            let count = buckets.iter().map(|(_, count)| count).sum();
            encoder.encode_histogram::<NoLabelSet>(*sum, count, buckets, None)
        }
    }
}
