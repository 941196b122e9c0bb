//! Delivers events to the operator's web server and command.
//!
//! What must hold: a destination that is slow or gone delays nothing but its own events. Each has a queue of the bus,
//! which is bounded and loses the oldest events (D23), and a thread of its own. A lost event is reported to the
//! destination as a line `lost`, and counted. No line has a secret.

#[cfg(test)]
mod tests;

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use tokio::time::sleep;

use super::events::line_of;
use crate::config::NotifyConfig;
use crate::events::{Delivery, Events, Listener};
use crate::io::{priority, sys};
use crate::source::http::Http;

/// How long the first event of a delivery waits for others.
const GATHER: Duration = Duration::from_millis(500);
/// Attempts of a delivery. After that its events are dropped.
const TRIES: u32 = 4;
/// The pause after the first attempt, doubled after each further one.
const PAUSE: Duration = Duration::from_secs(1);
const MEDIA: &str = "application/x-ndjson";

/// Runs the operator's command with some bytes as its input, and waits for its end.
pub type RunCommand = Box<dyn Fn(&[u8]) -> Result<(), String> + Send + Sync>;

/// A destination of events.
pub enum Destination {
    /// A URL.
    Web(Arc<Http>, String),
    /// A command.
    Command(RunCommand),
}

impl Destination {
    /// Most bytes of one delivery.
    fn longest(&self) -> usize {
        match self {
            Self::Web(..) => 64 << 10,
            // A message to the helper has no more.
            Self::Command(_) => 8 << 10,
        }
    }

    async fn deliver(self: &Arc<Self>, lines: &str) -> Result<(), String> {
        match &**self {
            Self::Web(http, url) => http.post(url, MEDIA, lines.as_bytes().to_vec()).await,
            Self::Command(_) => {
                let (this, lines) = (self.clone(), lines.to_owned());
                let run = move || match &*this {
                    Self::Command(run) => run(lines.as_bytes()),
                    Self::Web(..) => Ok(()),
                };
                let ran = tokio::task::spawn_blocking(run).await;
                ran.unwrap_or_else(|_| Err("the delivery panicked".into()))
            }
        }
    }
}

/// Counters of deliveries.
#[derive(Debug, Default)]
pub struct Notifications {
    delivered: AtomicU64,
    dropped: AtomicU64,
}

impl Notifications {
    /// Events that were delivered, and events that were dropped: by the queue, or because all attempts failed.
    pub fn counts(&self) -> (u64, u64) {
        (self.delivered.load(Ordering::Relaxed), self.dropped.load(Ordering::Relaxed))
    }
}

/// Starts the delivery of events to each destination.
///
/// # Errors
/// When a thread or its runtime cannot be created, or too many clients follow events.
pub fn spawn(
    config: &NotifyConfig,
    events: &Events,
    destinations: Vec<Destination>,
    counts: &Arc<Notifications>,
) -> io::Result<()> {
    for destination in destinations {
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build()?;
        let too_many = || io::Error::other("too many clients follow events");
        let delivery = Deliverer {
            config: config.clone(),
            // From the first event on, which is that a worker began to serve.
            listener: events.listen(Some(0)).ok_or_else(too_many)?,
            destination: Arc::new(destination),
            counts: counts.clone(),
            pause: PAUSE,
        };
        let run = move || {
            priority::background();
            runtime.block_on(delivery.run());
        };
        std::thread::Builder::new().name("notify".into()).spawn(run)?;
    }
    Ok(())
}

struct Deliverer {
    config: NotifyConfig,
    listener: Listener,
    destination: Arc<Destination>,
    counts: Arc<Notifications>,
    pause: Duration,
}

/// Lines for one delivery.
#[derive(Default)]
struct Batch {
    lines: String,
    events: u64,
}

impl Deliverer {
    /// Delivers until the bus ends.
    async fn run(mut self) {
        let mut kept = None;
        let mut is_failing = false;
        loop {
            let first = match kept.take() {
                Some(line) => Some(line),
                None => self.next().await,
            };
            let Some(first) = first else { return };
            let mut batch = Batch { lines: first, events: 1 };
            let gathering = sleep(GATHER);
            tokio::pin!(gathering);
            let ended = loop {
                let next = tokio::select! {
                    next = self.next() => next,
                    () = &mut gathering => break false,
                };
                match next {
                    Some(line) if batch.lines.len() + line.len() <= self.destination.longest() => {
                        batch.lines += &line;
                        batch.events += 1;
                    }
                    Some(line) => {
                        kept = Some(line);
                        break false;
                    }
                    None => break true,
                }
            };
            is_failing = self.deliver(batch, is_failing).await;
            if ended {
                return;
            }
        }
    }

    /// Returns whether the delivery failed. A series of failures is logged once, and so is its end.
    async fn deliver(&self, batch: Batch, was_failing: bool) -> bool {
        let mut pause = self.pause;
        for attempt in 1..=TRIES {
            match self.destination.deliver(&batch.lines).await {
                Ok(()) => {
                    self.counts.delivered.fetch_add(batch.events, Ordering::Relaxed);
                    if was_failing {
                        tracing::info!("events are delivered again");
                    }
                    return false;
                }
                Err(why) if attempt == TRIES => {
                    self.counts.dropped.fetch_add(batch.events, Ordering::Relaxed);
                    if !was_failing {
                        tracing::error!(
                            why,
                            "events cannot be delivered and are dropped; see [notify] in the configuration"
                        );
                    }
                }
                Err(_) => {
                    sleep(pause).await;
                    pause *= 2;
                }
            }
        }
        true
    }

    /// The line of the next event that the configuration wants; `None` at the end of the bus.
    async fn next(&mut self) -> Option<String> {
        loop {
            let listener = &mut self.listener;
            let delivery = poll_fn(|context| match listener.poll_next(context) {
                Poll::Ready(next) => Poll::Ready(next),
                Poll::Pending => Poll::Pending,
            })
            .await?;
            match &delivery {
                Delivery::Lost(count) => {
                    self.counts.dropped.fetch_add(*count, Ordering::Relaxed);
                    return Some(line_of(&delivery, sys::pid()));
                }
                Delivery::Event(record) if self.config.wants(record.event.kind.name()) => {
                    return Some(line_of(&delivery, sys::pid()));
                }
                Delivery::Event(_) => {}
            }
        }
    }
}
