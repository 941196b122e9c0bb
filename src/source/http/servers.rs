//! Counters of each server, by host: no path, query or user of a URL gets here.
//!
//! What must hold: memory is bounded. The first [`MOST`] hosts have counters of their own for as long as the process
//! lives, and all others share some, so no counter ever decreases.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::Url;

/// Hosts with counters of their own.
const MOST: usize = 64;
/// The name of all other hosts. No host has it.
const OTHERS: &str = "_other";

/// Counters since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HttpCounters {
    /// Requests sent, with any result.
    pub requests: u64,
    /// Requests that repeat a failed one.
    pub retries: u64,
    /// Bytes of bodies received.
    pub bytes: u64,
    /// Nanoseconds until the first bytes of answers, or until requests failed.
    pub answers_ns: u64,
    /// Requests to a peer that did not have the bytes.
    pub misses: u64,
    /// Answers with other bytes than the proof names, or of another object.
    pub wrong: u64,
}

#[derive(Default)]
pub(super) struct Count {
    requests: AtomicU64,
    retries: AtomicU64,
    bytes: AtomicU64,
    answers_ns: AtomicU64,
    misses: AtomicU64,
    wrong: AtomicU64,
}

impl Count {
    pub fn request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }

    pub fn answer(&self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.answers_ns.fetch_add(ns, Ordering::Relaxed);
    }

    pub fn retry(&self) {
        self.retries.fetch_add(1, Ordering::Relaxed);
    }

    pub fn miss(&self) {
        self.misses.fetch_add(1, Ordering::Relaxed);
    }

    pub fn wrong(&self) {
        self.wrong.fetch_add(1, Ordering::Relaxed);
    }

    pub fn bytes(&self, count: usize) {
        self.bytes.fetch_add(count as u64, Ordering::Relaxed);
    }

    fn counters(&self) -> HttpCounters {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        HttpCounters {
            requests: get(&self.requests),
            retries: get(&self.retries),
            bytes: get(&self.bytes),
            answers_ns: get(&self.answers_ns),
            misses: get(&self.misses),
            wrong: get(&self.wrong),
        }
    }
}

/// See the module.
#[derive(Default)]
pub(super) struct Servers(Mutex<BTreeMap<String, Arc<Count>>>);

impl Servers {
    /// The counters of the server of a URL.
    pub fn of(&self, url: &Url) -> Arc<Count> {
        let host = url.host_str().unwrap_or(OTHERS);
        let mut all = self.0.lock();
        if let Some(count) = all.get(host) {
            return count.clone();
        }
        let has_room = all.keys().filter(|name| *name != OTHERS).count() < MOST;
        all.entry(if has_room { host } else { OTHERS }.to_owned()).or_default().clone()
    }

    /// The counters of all servers, by host.
    pub fn all(&self) -> Vec<(String, HttpCounters)> {
        self.0.lock().iter().map(|(host, count)| (host.clone(), count.counters())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_show_hosts_only_and_are_bounded() {
        let servers = Servers::default();
        let of = |text: &str| servers.of(&Url::parse(text).expect("a URL"));
        of("https://user:secret@images.example.org:8443/path?signature=secret").request();
        of("http://images.example.org/other").bytes(5);
        let all = servers.all();
        let both = HttpCounters { requests: 1, bytes: 5, ..HttpCounters::default() };
        assert_eq!(all, [("images.example.org".to_owned(), both)]);
        for number in 0..2 * MOST {
            of(&format!("http://host{number}.example.org/")).retry();
        }
        let all = servers.all();
        assert_eq!(all.len(), MOST + 1);
        assert_eq!(all.iter().map(|(_, count)| count.retries).sum::<u64>(), 2 * MOST as u64);
        let others = all.iter().find(|(host, _)| host == OTHERS).expect("the others");
        assert_eq!(others.1.retries, MOST as u64 + 1);
    }
}
