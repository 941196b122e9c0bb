//! Routes on traces of bases: list, show, record, remove, and export and import for another host.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::header;
use axum::response::{IntoResponse, Response};

use super::pool::JobKind;
use super::wire::{self, Recording, Removed, TraceFile, rfc3339};
use super::{Answer, ApiError, Cause, Control, Name, blocking, in_pool};
use crate::format::record::Digest;
use crate::format::trace::{Origin, Trace};
use crate::format::{BLOCK, Kind};
use crate::store::{BaseNode, StoreError};
use crate::trace::{Player, SavedTrace, Tracer};

/// How often the daemon checks whether a recording has ended.
const TICK: Duration = Duration::from_secs(1);

fn tracer(c: &Control) -> Result<&Tracer, ApiError> {
    let tracer = c.store.tracer().map(|tracer| &**tracer);
    tracer.ok_or_else(|| ApiError::invalid("this daemon has no tracer, so it records no boots"))
}

/// Saves recordings that have ended, for ever.
pub async fn tick(control: Control) {
    let mut interval = tokio::time::interval(TICK);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let Some(tracer) = control.store.tracer().filter(|tracer| tracer.is_recording()).cloned() else {
            continue;
        };
        let _ = tokio::task::spawn_blocking(move || tracer.tick(Instant::now())).await;
    }
}

fn object(base: &BaseNode, saved: &SavedTrace) -> wire::Trace {
    let unreadable = wire::Trace {
        base: base.record().name.clone(),
        base_id: saved.base,
        file_bytes: saved.file_bytes,
        ..wire::Trace::default()
    };
    let trace = match &saved.trace {
        Ok(trace) => trace,
        Err(error) => return wire::Trace { error: Some(error.clone()), ..unreadable },
    };
    let origin = match &trace.origin {
        Origin::Unknown => None,
        Origin::Digest(Digest::Sha256(digest)) => Some(wire::Origin::Sha256(hex::encode(digest))),
        Origin::Digest(Digest::Sha512(digest)) => Some(wire::Origin::Sha512(hex::encode(digest))),
        Origin::Validator(hash) => Some(wire::Origin::Validator(hex::encode(hash))),
    };
    let (mut ranges, mut fetch) = (0u64, 0u64);
    for range in Player::new(trace, trace.size) {
        ranges += 1;
        fetch += range.end - range.start;
    }
    wire::Trace {
        recorded_on: Some(trace.base.clone()),
        recorded: Some(rfc3339(trace.recorded_ns)),
        size: Some(trace.size),
        origin: Some(origin),
        entries: Some(trace.entries.len() as u64),
        bytes: Some(trace.blocks() * BLOCK),
        duration_ms: Some(trace.duration_ms()),
        prefetch_ranges: Some(ranges),
        prefetch_bytes: Some(fetch),
        fits: Some(mismatch(base, trace).is_none()),
        ..unreadable
    }
}

/// Why a trace does not fit a base; `None` when it fits.
fn mismatch(base: &BaseNode, trace: &Trace) -> Option<String> {
    let subject = base.subject();
    if trace.size != subject.size {
        return Some(format!(
            "it was recorded on an image of {} bytes, and the base has {}",
            trace.size, subject.size
        ));
    }
    trace
        .origin
        .contradicts(&subject.origin)
        .then(|| "it was recorded on an image with another digest".to_owned())
}

fn no_trace(name: &str) -> ApiError {
    StoreError::NotFound { object: format!("trace of base {name}"), noun: "base trace" }.into()
}

fn storage(name: &str, operation: &'static str) -> impl FnOnce(std::io::Error) -> ApiError {
    let object = format!("trace of base {name}");
    move |error| StoreError::io(object, operation)(error).into()
}

/// A base and the bytes of its trace file.
fn trace_file(c: &Control, name: &str) -> Result<(Arc<BaseNode>, Vec<u8>), ApiError> {
    let base = c.store.base(name)?;
    let bytes = tracer(c)?.store().bytes(base.id()).map_err(storage(name, "reading it"))?;
    Ok((base, bytes.ok_or_else(|| no_trace(name))?))
}

fn load(c: &Control, name: &str) -> Result<wire::Trace, ApiError> {
    let (base, bytes) = trace_file(c, name)?;
    let trace = Trace::decode(&bytes).map_err(|error| error.to_string());
    Ok(object(&base, &SavedTrace { base: base.id(), file_bytes: bytes.len() as u64, trace }))
}

/// List the traces
#[utoipa::path(
    get,
    path = "/v1/traces",
    tag = "traces",
    operation_id = "list_traces",
    responses((status = 200, description = "Traces.", body = Vec<wire::Trace>))
)]
pub async fn list(State(c): State<Control>) -> Answer<Vec<wire::Trace>> {
    blocking(move || {
        let all = tracer(&c)?.store().list().map_err(|error| {
            ApiError::new(Cause::Io, format!("cannot list the traces in the store: {error}"))
        })?;
        let object = |saved: &SavedTrace| c.store.base_by_id(saved.base).map(|base| object(&base, saved));
        Ok(all.iter().filter_map(object).collect())
    })
    .await
}

/// Show the trace of a base
#[utoipa::path(
    get,
    path = "/v1/bases/{name}/trace",
    tag = "traces",
    operation_id = "show_trace",
    responses((status = 200, description = "The trace.", body = wire::Trace))
)]
pub async fn show(State(c): State<Control>, Name(name): Name) -> Answer<wire::Trace> {
    blocking(move || load(&c, &name)).await
}

/// Get the trace of a base as a file
#[utoipa::path(
    get,
    path = "/v1/bases/{name}/trace/file",
    tag = "traces",
    operation_id = "export_trace",
    responses((status = 200, description = "The file.", body = TraceFile, content_type = "application/octet-stream"))
)]
pub async fn export(State(c): State<Control>, Name(name): Name) -> Result<Response, ApiError> {
    let bytes = in_pool(JobKind::Work, move || {
        let (_, bytes) = trace_file(&c, &name)?;
        // No other host can use a damaged trace.
        Trace::decode(&bytes).map_err(|error| ApiError::invalid(format!("trace of base {name}: {error}")))?;
        Ok(bytes)
    })
    .await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response())
}

/// Give a base a trace from a file
///
/// It replaces the trace that the base has.
#[utoipa::path(
    put,
    path = "/v1/bases/{name}/trace/file",
    tag = "traces",
    operation_id = "import_trace",
    request_body(content = TraceFile, content_type = "application/octet-stream"),
    responses((status = 200, description = "The trace.", body = wire::Trace))
)]
pub async fn import(
    State(c): State<Control>,
    Name(name): Name,
    body: Result<Bytes, BytesRejection>,
) -> Answer<wire::Trace> {
    let body = body?;
    blocking(move || {
        let base = c.store.base(&name)?;
        let trace = Trace::decode(&body).map_err(|error| {
            // A file that is shorter than the magic number has none.
            let why = if error.kind == Kind::Magic || body.len() < 8 {
                "the file is no trace; give one that `plyfs base trace export` wrote".to_owned()
            } else {
                format!("{error}; export it again")
            };
            ApiError::invalid(format!("trace for base {name}: {why}"))
        })?;
        if let Some(why) = mismatch(&base, &trace) {
            let advice = "import the trace of this image";
            return Err(ApiError::invalid(format!("trace for base {name}: {why}; {advice}")));
        }
        tracer(&c)?.save(base.id(), &trace).map_err(storage(&name, "saving it"))?;
        load(&c, &name)
    })
    .await
}

/// Remove the trace of a base
#[utoipa::path(
    delete,
    path = "/v1/bases/{name}/trace",
    tag = "traces",
    operation_id = "remove_trace",
    responses((status = 200, description = "The trace is removed.", body = Removed))
)]
pub async fn remove(State(c): State<Control>, Name(name): Name) -> Answer<Removed> {
    blocking(move || {
        let base = c.store.base(&name)?;
        match tracer(&c)?.remove(base.id()).map_err(storage(&name, "removing it"))? {
            true => Ok(Removed { removed: vec![name] }),
            false => Err(no_trace(&name)),
        }
    })
    .await
}

/// Record the reads of a disk from its base
///
/// The recording ends by itself when the disk has read nothing new for a while. It replaces the trace of the base.
#[utoipa::path(
    post,
    path = "/v1/disks/{name}/trace",
    tag = "traces",
    operation_id = "record_trace",
    responses((status = 200, description = "The recording has begun.", body = Recording))
)]
pub async fn record(State(c): State<Control>, Name(disk): Name) -> Answer<Recording> {
    blocking(move || {
        let base = c.store.record_trace(&disk)?;
        Ok(Recording { disk, base: base.record().name.clone(), recording: true })
    })
    .await
}

/// End a recording and keep it
#[utoipa::path(
    delete,
    path = "/v1/disks/{name}/trace",
    tag = "traces",
    operation_id = "end_trace",
    responses((status = 200, description = "The trace.", body = wire::Trace))
)]
pub async fn stop(State(c): State<Control>, Name(disk): Name) -> Answer<wire::Trace> {
    blocking(move || {
        let recorded = c.store.end_trace(&disk)?;
        Ok(wire::Trace { disk: Some(disk), recording: Some(false), ..load(&c, &recorded.name)? })
    })
    .await
}
