//! Events over the control socket, one JSON object per line: the recent events, or a stream of new ones.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::http::header;
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use serde::Deserialize;
use tokio::sync::Notify;
use utoipa::IntoParams;

use super::connections::{self, MAX_CONNECTIONS};
use super::wire::{self, rfc3339};
use super::{ApiError, Cause};
use crate::bases::sources::HostSources;
use crate::events::{Delivery, Events, Kind, Listener, Reason, Record, Traffic};
use crate::io::sys;

/// How often counters become events.
const TICK: Duration = Duration::from_secs(1);
/// Bytes after which a chunk of an answer is sent.
const CHUNK: usize = 32 << 10;
/// How long the socket waits, when it closes, for listeners to read their last events. Other requests are always
/// answered.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(500);

/// Selects events.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventsQuery {
    /// Stream new events until the client disconnects or this worker ends.
    #[serde(default)]
    follow: bool,
    /// Begin with the recent events whose number is higher than this.
    after: Option<u64>,
    /// The worker that `after` refers to. When another worker answers, it begins with all its recent events.
    worker: Option<u32>,
}

/// Show events
///
/// One JSON object on each line: recent events, or with `follow` new events until the client disconnects or the worker
/// ends. Traffic is summed up: one line a second for each base and reason.
#[utoipa::path(
    get,
    path = "/v1/events",
    tag = "events",
    operation_id = "events",
    params(EventsQuery),
    responses(
        (status = 200, description = "Lines.", body = wire::Event, content_type = "application/x-ndjson")
    )
)]
pub async fn events(
    State(events): State<Events>,
    query: Result<Query<EventsQuery>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(query) = query?;
    let worker = sys::pid();
    let after = match query.worker {
        Some(other) if other != worker => Some(0),
        _ => query.after,
    };
    let body = if query.follow {
        let last = events.state().emitted;
        let too_many =
            || ApiError::new(Cause::TooManyFollowers, "too many clients follow events; end some of them");
        let listener = events.listen(after).ok_or_else(too_many)?;
        // This line tells the client that it misses no event from here on.
        let number = Some(after.unwrap_or(last));
        let first = wire::Event { event: "following".into(), number, worker, ..wire::Event::default() };
        Body::new(Lines { listener, worker, first: Some(first) })
    } else {
        let recent = events.recent(after.unwrap_or(0));
        Body::from(recent.iter().map(|record| line(&event_of(record, worker))).collect::<String>())
    };
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

fn event_of(record: &Record, worker: u32) -> wire::Event {
    let event = &record.event;
    wire::Event {
        at: Some(rfc3339(record.at_ns)),
        event: event.kind.name().to_owned(),
        base: event.base.as_ref().map(ToString::to_string),
        disk: event.disk.as_ref().map(ToString::to_string),
        bytes: event.bytes,
        count: event.count,
        reason: event.reason.as_ref().map(ToString::to_string),
        since: event.since_ns.map(rfc3339),
        number: Some(record.number),
        worker,
    }
}

/// The line of a delivery.
pub fn line_of(delivery: &Delivery, worker: u32) -> String {
    match delivery {
        Delivery::Event(record) => line(&event_of(record, worker)),
        Delivery::Lost(count) => {
            let (event, count) = ("lost".to_owned(), Some(*count));
            line(&wire::Event { event, count, worker, ..wire::Event::default() })
        }
    }
}

/// One line of the answer. An event always encodes: its keys are text.
fn line(event: &wire::Event) -> String {
    serde_json::to_string(event).map_or_else(|_| String::new(), |text| text + "\n")
}

/// The body of an answer that lasts until the events end.
struct Lines {
    listener: Listener,
    worker: u32,
    first: Option<wire::Event>,
}

impl HttpBody for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        let mut text = String::new();
        if let Some(first) = this.first.take() {
            text = line(&first);
        }
        while text.len() < CHUNK {
            match this.listener.poll_next(context) {
                Poll::Ready(Some(delivery)) => text += &line_of(&delivery, this.worker),
                Poll::Ready(None) if text.is_empty() => return Poll::Ready(None),
                Poll::Pending if text.is_empty() => return Poll::Pending,
                // The listener is polled again once this chunk is sent.
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(text)))))
    }
}

/// The counters for `status`.
pub fn summary(events: &Events, since_ns: i64) -> wire::Events {
    let state = events.state();
    wire::Events {
        since: rfc3339(since_ns),
        emitted: state.emitted,
        lost: state.lost,
        listeners: state.listeners as u64,
        bases: events.bases().iter().map(|(_, traffic)| traffic_of(traffic)).collect(),
    }
}

/// The counters of one base.
pub fn traffic_of(traffic: &Traffic) -> wire::BaseTraffic {
    let of = |kind: Kind| {
        let reasons = Reason::ALL.into_iter().filter(|reason| reason.kind() == kind);
        let totals = reasons.map(|reason| {
            let total = traffic.total(reason);
            (reason.name().to_owned(), wire::Total { count: total.count, bytes: total.bytes })
        });
        totals.collect()
    };
    wire::BaseTraffic {
        base: traffic.base().to_string(),
        hit: of(Kind::BaseHit),
        miss: of(Kind::BaseMiss),
        evict: of(Kind::BaseEvict),
    }
}

/// Makes events of the counters, once per [`TICK`], for ever.
pub async fn tick(events: Events, sources: Arc<HostSources>) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        events.tick();
        sources.tick();
    }
}

/// Counts the requests that are being answered.
#[derive(Default)]
struct InFlight(AtomicUsize);

struct InFlightGuard(Arc<InFlight>);

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

async fn count_in_flight(State(in_flight): State<Arc<InFlight>>, request: Request, next: Next) -> Response {
    in_flight.0.fetch_add(1, Ordering::AcqRel);
    let _guard = InFlightGuard(in_flight);
    next.run(request).await
}

/// Serves until `drain` is notified and the requests that have begun are answered. Clients that follow events get the
/// rest of them and the end of the answer, and the destinations of `[notify]` the rest. A client that does not read
/// delays the return by [`CLOSE_TIMEOUT`] at most, a destination that is slow by `deliveries`.
pub async fn serve_until(
    listener: tokio::net::UnixListener,
    router: Router,
    drain: Arc<Notify>,
    events: Events,
    deliveries: Duration,
) {
    let in_flight = Arc::new(InFlight::default());
    let router = router.layer(from_fn_with_state(in_flight.clone(), count_in_flight));
    let draining = Arc::new(Notify::new());
    let drain_begun = draining.clone();
    let (listeners, left) = (events.clone(), events.clone());
    let drained = async move {
        drain.notified().await;
        events.close();
        drain_begun.notify_one();
    };
    // Only clients remain that follow events and do not read them.
    let only_stalled_listeners = async move {
        draining.notified().await;
        let end = Instant::now() + CLOSE_TIMEOUT;
        loop {
            tokio::time::sleep(CLOSE_TIMEOUT / 10).await;
            let others = in_flight.0.load(Ordering::Acquire) > 0;
            if Instant::now() >= end && !others && listeners.state().listeners > 0 {
                return;
            }
        }
    };
    tokio::select! {
        () = connections::serve(listener, MAX_CONNECTIONS, router, drained) => {}
        () = only_stalled_listeners => return,
    }
    // Without clients, the listeners that are left deliver notifications.
    let wait = move || left.wait_for_listeners(Instant::now() + deliveries);
    let _ = tokio::task::spawn_blocking(wait).await;
}
