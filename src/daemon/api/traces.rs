//! Traces of bases: what there is, and to carry them from host to host.

use std::time::{Duration, Instant};

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::{Answer, ApiError, Control, blocking, hex, rfc3339};
use crate::format::BLOCK;
use crate::format::record::Digest;
use crate::format::trace::{Origin, Trace};
use crate::store::{BaseNode, StoreError};
use crate::trace::{Player, Saved, Tracer};

/// How often it is looked whether a recording has ended.
const TICK: Duration = Duration::from_secs(1);

fn tracer(c: &Control) -> Result<&Tracer, ApiError> {
    let tracer = c.store.tracer().map(|tracer| &**tracer);
    tracer.ok_or_else(|| ApiError::invalid("nothing is recorded here"))
}

/// Keeps recordings when they have ended, for ever.
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

fn object(base: &BaseNode, saved: &Saved) -> Value {
    let mut out = json!({
        "base": base.record().name,
        "base_id": saved.base,
        "file_bytes": saved.file_bytes,
        "error": saved.trace.as_ref().err(),
    });
    let Ok(trace) = &saved.trace else { return out };
    let origin = match &trace.origin {
        Origin::Unknown => Value::Null,
        Origin::Digest(Digest::Sha256(digest)) => json!({"sha256": hex(digest)}),
        Origin::Digest(Digest::Sha512(digest)) => json!({"sha512": hex(digest)}),
        Origin::Validator(hash) => json!({"validator": hex(hash)}),
    };
    let (mut ranges, mut fetch) = (0u64, 0u64);
    for range in Player::new(trace, trace.size) {
        ranges += 1;
        fetch += range.end - range.start;
    }
    let more = json!({
        "recorded_on": trace.base,
        "recorded": rfc3339(trace.recorded_ns),
        "size": trace.size,
        "origin": origin,
        "entries": trace.entries.len(),
        "bytes": trace.blocks() * BLOCK,
        "duration_ms": trace.duration_ms(),
        // What a prefetch asks for, with the gaps that are not worth a request of their own.
        "prefetch_ranges": ranges,
        "prefetch_bytes": fetch,
        "fits": unfit(base, trace).is_none(),
    });
    if let (Value::Object(out), Value::Object(more)) = (&mut out, more) {
        out.extend(more);
    }
    out
}

/// Why a trace is of no use to a base.
fn unfit(base: &BaseNode, trace: &Trace) -> Option<String> {
    let subject = base.subject();
    if trace.size != subject.size {
        return Some(format!(
            "it was recorded on a disk of {} bytes, and the base has {}",
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

fn storage(name: &str, what: &'static str) -> impl FnOnce(std::io::Error) -> ApiError {
    let object = format!("trace of base {name}");
    move |error| StoreError::io(object, what)(error).into()
}

fn load(c: &Control, name: &str) -> Result<Value, ApiError> {
    let base = c.store.base(name)?;
    let bytes = tracer(c)?.store().bytes(base.id()).map_err(storage(name, "reading it"))?;
    let bytes = bytes.ok_or_else(|| no_trace(name))?;
    let trace = Trace::decode(&bytes).map_err(|error| error.to_string());
    Ok(object(&base, &Saved { base: base.id(), file_bytes: bytes.len() as u64, trace }))
}

pub async fn list(State(c): State<Control>) -> Answer {
    blocking(move || {
        let all = tracer(&c)?.store().list().map_err(|error| ApiError {
            status: axum::http::StatusCode::INTERNAL_SERVER_ERROR,
            kind: "io",
            message: format!("the traces in the store cannot be listed: {error}"),
        })?;
        let object = |saved: &Saved| c.store.base_by_id(saved.base).map(|base| object(&base, saved));
        Ok(all.iter().filter_map(object).collect())
    })
    .await
}

pub async fn show(State(c): State<Control>, Path(name): Path<String>) -> Answer {
    blocking(move || load(&c, &name)).await
}

pub async fn export(State(c): State<Control>, Path(name): Path<String>) -> Result<Response, ApiError> {
    let read = move || {
        let base = c.store.base(&name)?;
        let bytes = tracer(&c)?.store().bytes(base.id()).map_err(storage(&name, "reading it"))?;
        let bytes = bytes.ok_or_else(|| no_trace(&name))?;
        // Nobody wants to carry a damaged one away.
        Trace::decode(&bytes).map_err(|error| ApiError::invalid(format!("trace of base {name}: {error}")))?;
        Ok::<_, ApiError>(bytes)
    };
    let bytes = tokio::task::spawn_blocking(read).await;
    let bytes = bytes.map_err(|_| ApiError::invalid("the request ended early"))??;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes).into_response())
}

pub async fn import(State(c): State<Control>, Path(name): Path<String>, body: Bytes) -> Answer {
    blocking(move || {
        let base = c.store.base(&name)?;
        let trace = Trace::decode(&body)
            .map_err(|error| ApiError::invalid(format!("trace for base {name}: {error}; export it again")))?;
        if let Some(why) = unfit(&base, &trace) {
            let advice = "import the trace of this image";
            return Err(ApiError::invalid(format!("trace for base {name}: {why}; {advice}")));
        }
        tracer(&c)?.save(base.id(), &trace).map_err(storage(&name, "saving it"))?;
        load(&c, &name)
    })
    .await
}

pub async fn remove(State(c): State<Control>, Path(name): Path<String>) -> Answer {
    blocking(move || {
        let base = c.store.base(&name)?;
        match tracer(&c)?.remove(base.id()).map_err(storage(&name, "removing it"))? {
            true => Ok(json!({"removed": [name]})),
            false => Err(no_trace(&name)),
        }
    })
    .await
}

pub async fn record(State(c): State<Control>, Path(disk): Path<String>) -> Answer {
    blocking(move || {
        let base = c.store.record_trace(&disk)?;
        Ok(json!({"disk": disk, "base": base.record().name, "recording": true}))
    })
    .await
}

pub async fn stop(State(c): State<Control>, Path(disk): Path<String>) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        let recorded = c.store.end_trace(&disk)?;
        let mut out = load(&c, &recorded.name)?;
        out["disk"] = disk.into();
        out["recording"] = false.into();
        Ok(out)
    })
    .await
}
