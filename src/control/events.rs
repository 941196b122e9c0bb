//! Events over the control socket: one JSON object on each line, the recent ones or all that come.

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

use super::wire::{self, rfc3339};
use super::{ApiError, Cause};
use crate::bases::sources::HostSources;
use crate::events::{Events, Heard, Kind, Listener, Reason, Told, Traffic};
use crate::io::sys;

/// How often counters become events.
const TICK: Duration = Duration::from_secs(1);
/// The most that is put into one piece of an answer.
const PIECE: usize = 32 << 10;
/// How long a listener that was told of the end may take to read it, when nobody else has to be answered.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// Which events.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Which {
    /// Until the client goes away, or this worker ends.
    #[serde(default)]
    follow: bool,
    /// Begin with recent events, of which the number is higher than this.
    after: Option<u64>,
    /// The worker that `after` is about; of another one, all recent events are wanted.
    worker: Option<u32>,
}

/// Show what happens
///
/// One JSON object on each line: recent events, or with `follow` all that come until the client goes away or the worker
/// ends. Traffic is summed up: one line a second for each base and reason.
#[utoipa::path(
    get,
    path = "/v1/events",
    tag = "events",
    operation_id = "events",
    params(Which),
    responses(
        (status = 200, description = "Lines.", body = wire::Event, content_type = "application/x-ndjson")
    )
)]
pub async fn events(
    State(events): State<Events>,
    which: Result<Query<Which>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(which) = which?;
    let worker = sys::pid();
    let after = match which.worker {
        Some(other) if other != worker => Some(0),
        _ => which.after,
    };
    let body = if which.follow {
        let last = events.state().emitted;
        let too_many =
            || ApiError::new(Cause::TooManyFollowers, "too many clients follow events; end some of them");
        let listener = events.listen(after).ok_or_else(too_many)?;
        // Says that nothing that comes from here on is missed.
        let number = Some(after.unwrap_or(last));
        let first = wire::Event { event: "following".into(), number, worker, ..wire::Event::default() };
        Body::new(Lines { listener, worker, first: Some(first) })
    } else {
        let recent = events.recent(after.unwrap_or(0));
        Body::from(recent.iter().map(|told| line(&event_of(told, worker))).collect::<String>())
    };
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

fn event_of(told: &Told, worker: u32) -> wire::Event {
    let event = &told.event;
    wire::Event {
        at: Some(rfc3339(told.at_ns)),
        event: event.kind.name().to_owned(),
        base: event.base.as_ref().map(ToString::to_string),
        bytes: event.bytes,
        count: event.count,
        reason: event.reason.as_ref().map(ToString::to_string),
        since: event.since_ns.map(rfc3339),
        number: Some(told.number),
        worker,
    }
}

/// One line of the answer. An event always encodes: its keys are text.
fn line(event: &wire::Event) -> String {
    serde_json::to_string(event).map_or_else(|_| String::new(), |text| text + "\n")
}

/// An answer that goes on as long as there are events.
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
        while text.len() < PIECE {
            match this.listener.poll_next(context) {
                Poll::Ready(Some(Heard::Event(told))) => {
                    text += &line(&event_of(&told, this.worker));
                }
                Poll::Ready(Some(Heard::Lost(count))) => {
                    let (event, count, worker) = ("lost".to_owned(), Some(count), this.worker);
                    text += &line(&wire::Event { event, count, worker, ..wire::Event::default() });
                }
                Poll::Ready(None) if text.is_empty() => return Poll::Ready(None),
                Poll::Pending if text.is_empty() => return Poll::Pending,
                // Asked again when this piece is on its way.
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from(text)))))
    }
}

/// For `status`.
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
fn traffic_of(traffic: &Traffic) -> wire::BaseTraffic {
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

/// Makes events of what was counted, for ever.
pub async fn tick(events: Events, sources: Arc<HostSources>) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        events.tick();
        sources.tick();
    }
}

/// Requests that are being answered.
#[derive(Default)]
struct Busy(AtomicUsize);

struct BusyWith(Arc<Busy>);

impl Drop for BusyWith {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::AcqRel);
    }
}

async fn busy(State(busy): State<Arc<Busy>>, request: Request, next: Next) -> Response {
    busy.0.fetch_add(1, Ordering::AcqRel);
    let _with = BusyWith(busy);
    next.run(request).await
}

/// Serves until `drain` is notified and the requests that have begun are answered. Who follows events is told of the
/// end; one that does not read holds up nobody.
pub async fn serve_until(
    listener: tokio::net::UnixListener,
    router: Router,
    drain: Arc<Notify>,
    events: Events,
) {
    let in_work = Arc::new(Busy::default());
    let router = router.layer(from_fn_with_state(in_work.clone(), busy));
    let draining = Arc::new(Notify::new());
    let begun = draining.clone();
    let following = events.clone();
    let drained = async move {
        drain.notified().await;
        events.close();
        begun.notify_one();
    };
    let only_the_deaf = async move {
        draining.notified().await;
        let end = Instant::now() + LAST_WORDS;
        loop {
            tokio::time::sleep(LAST_WORDS / 10).await;
            let others = in_work.0.load(Ordering::Acquire) > 0;
            if Instant::now() >= end && !others && following.state().listeners > 0 {
                return;
            }
        }
    };
    tokio::select! {
        _ = axum::serve(listener, router).with_graceful_shutdown(drained) => {}
        () = only_the_deaf => {}
    }
}
