//! Metrics for Prometheus: on the control socket, and on a TCP address where one is configured.
//!
//! What must hold:
//! - Whatever a scraper does, no guest notices (D69): plyfs makes the text at most once in `FRESH`, one at a time, on a
//!   thread for it, from counters that no request waits for. A text that takes long keeps scrapers waiting, and nothing
//!   else.
//! - The number of series is bounded, however many disks, bases and servers there are.
//! - No label has a secret: names of disks and bases, and hosts without user, path and query.

mod collect;
mod exposition;
pub mod listen;
pub mod table;
#[cfg(test)]
mod tests;

use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use super::{ApiError, Cause, Control};
use exposition::{OPENMETRICS, PLAIN, plain};

/// How long a text is used again.
const FRESH: Duration = Duration::from_millis(250);
/// How long a scraper waits for a text.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The text in both formats.
struct Texts {
    made: Instant,
    openmetrics: String,
    plain: String,
}

impl Texts {
    /// Media type and text of the format that a scraper accepts.
    fn choose(&self, accept: Option<&str>) -> (&'static str, &str) {
        if accept.is_some_and(|accept| accept.contains("application/openmetrics-text")) {
            (OPENMETRICS, &self.openmetrics)
        } else {
            (PLAIN, &self.plain)
        }
    }
}

/// Makes the text for all scrapers.
struct Maker {
    /// Held by the thread that makes it.
    making: Arc<Semaphore>,
    last: Arc<Mutex<Option<Arc<Texts>>>>,
}

static MAKER: LazyLock<Maker> =
    LazyLock::new(|| Maker { making: Arc::new(Semaphore::new(1)), last: Arc::default() });

impl Maker {
    fn fresh(&self) -> Option<Arc<Texts>> {
        self.last.lock().clone().filter(|texts| texts.made.elapsed() < FRESH)
    }

    /// The text of now; `None` when it cannot be made in time.
    async fn texts(&self, control: &Control) -> Option<Arc<Texts>> {
        let make = async {
            // The permit goes to the thread, so that a scraper that leaves does not let a second thread begin.
            let permit = self.making.clone().acquire_owned().await.ok()?;
            if let Some(texts) = self.fresh() {
                return Some(texts);
            }
            let (control, last) = (control.clone(), self.last.clone());
            let job = move || {
                let openmetrics = control.metrics().openmetrics();
                let plain = plain(&openmetrics);
                let texts = Arc::new(Texts { made: Instant::now(), openmetrics, plain });
                *last.lock() = Some(texts.clone());
                drop(permit);
                texts
            };
            tokio::task::spawn_blocking(job).await.ok()
        };
        match self.fresh() {
            Some(texts) => Some(texts),
            None => tokio::time::timeout(TIMEOUT, make).await.ok().flatten(),
        }
    }
}

/// Show metrics
///
/// The metrics of docs/metrics.md, for Prometheus: OpenMetrics for a client that accepts it, else the older text format.
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "daemon",
    operation_id = "metrics",
    responses((
        status = 200,
        description = "The metrics.",
        content(
            (String = "text/plain; version=0.0.4; charset=utf-8"),
            (String = "application/openmetrics-text; version=1.0.0; charset=utf-8")
        )
    ))
)]
pub(super) async fn metrics(State(c): State<Control>, headers: HeaderMap) -> Result<Response, ApiError> {
    let why = "the metrics are not ready in time; see whether the filesystem of the store answers";
    let texts = MAKER.texts(&c).await.ok_or_else(|| ApiError::new(Cause::Overloaded, why))?;
    let accept = headers.get(header::ACCEPT).and_then(|value| value.to_str().ok());
    let (media, text) = texts.choose(accept);
    Ok(([(header::CONTENT_TYPE, media)], text.to_owned()).into_response())
}
