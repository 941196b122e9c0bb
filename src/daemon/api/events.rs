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
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::sync::Notify;

use super::{ApiError, rfc3339};
use crate::daemon::sources::HostSources;
use crate::events::{Events, Heard, Kind, Listener, Reason, Told, Traffic};
use crate::io::sys;

/// How often counters become events.
const TICK: Duration = Duration::from_secs(1);
/// The most that is put into one piece of an answer.
const PIECE: usize = 32 << 10;
/// How long a listener that was told of the end may take to read it, when nobody else has to be answered.
const LAST_WORDS: Duration = Duration::from_millis(500);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Which {
    /// Until the client goes away, or this worker ends.
    #[serde(default)]
    follow: bool,
    /// Begin with recent events, of which the number is higher than this.
    after: Option<u64>,
    /// The worker that `after` is about; of another one, all recent events are wanted.
    worker: Option<u32>,
}

pub async fn events(
    State(events): State<Events>,
    which: Result<Query<Which>, QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(which) = which.map_err(|rejection| ApiError::invalid(rejection.body_text()))?;
    let worker = sys::pid();
    let after = match which.worker {
        Some(other) if other != worker => Some(0),
        _ => which.after,
    };
    let body = if which.follow {
        let last = events.state().emitted;
        let listener = events.listen(after).ok_or_else(|| ApiError {
            status: StatusCode::TOO_MANY_REQUESTS,
            kind: "busy",
            message: "too many clients follow events; end some of them".into(),
        })?;
        // Says that nothing that comes from here on is missed.
        let first = json!({"event": "following", "worker": worker, "number": after.unwrap_or(last)});
        Body::new(Lines { listener, worker, first: Some(first) })
    } else {
        let recent = events.recent(after.unwrap_or(0));
        Body::from(recent.iter().map(|told| format!("{}\n", object(told, worker))).collect::<String>())
    };
    Ok(([(header::CONTENT_TYPE, "application/x-ndjson")], body).into_response())
}

fn object(told: &Told, worker: u32) -> Value {
    let event = &told.event;
    let mut out = Map::new();
    out.insert("at".into(), rfc3339(told.at_ns).into());
    out.insert("event".into(), event.kind.name().into());
    if let Some(base) = &event.base {
        out.insert("base".into(), (**base).into());
    }
    if let Some(bytes) = event.bytes {
        out.insert("bytes".into(), bytes.into());
    }
    if let Some(count) = event.count {
        out.insert("count".into(), count.into());
    }
    if let Some(reason) = &event.reason {
        out.insert("reason".into(), (**reason).into());
    }
    if let Some(since) = event.since_ns {
        out.insert("since".into(), rfc3339(since).into());
    }
    out.insert("number".into(), told.number.into());
    out.insert("worker".into(), worker.into());
    out.into()
}

/// An answer that goes on as long as there are events.
struct Lines {
    listener: Listener,
    worker: u32,
    first: Option<Value>,
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
            text = format!("{first}\n");
        }
        while text.len() < PIECE {
            match this.listener.poll_next(context) {
                Poll::Ready(Some(Heard::Event(told))) => {
                    text += &format!("{}\n", object(&told, this.worker));
                }
                Poll::Ready(Some(Heard::Lost(count))) => {
                    let lost = json!({"event": "lost", "count": count, "worker": this.worker});
                    text += &format!("{lost}\n");
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
pub fn summary(events: &Events, since_ns: i64) -> Value {
    let state = events.state();
    json!({
        "since": rfc3339(since_ns),
        "emitted": state.emitted,
        "lost": state.lost,
        "listeners": state.listeners,
        "bases": events.bases().iter().map(|(_, traffic)| {
            let mut out = traffic_of(traffic);
            out.insert("base".into(), traffic.base().into());
            Value::from(out)
        }).collect::<Vec<_>>(),
    })
}

/// The counters of one base.
pub fn traffic_of(traffic: &Traffic) -> Map<String, Value> {
    let of = |kind: Kind| {
        let reasons = Reason::ALL.into_iter().filter(|reason| reason.kind() == kind);
        let totals = reasons.map(|reason| {
            let total = traffic.total(reason);
            (reason.name().to_owned(), json!({"count": total.count, "bytes": total.bytes}))
        });
        Value::from(totals.collect::<Map<_, _>>())
    };
    let kinds = [("hit", Kind::BaseHit), ("miss", Kind::BaseMiss), ("evict", Kind::BaseEvict)];
    kinds.into_iter().map(|(key, kind)| (key.to_owned(), of(kind))).collect()
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
