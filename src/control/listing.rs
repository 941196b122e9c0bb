//! The list of the disks as the body of an answer, made part by part while the client reads it.
//!
//! A store may have 100,000 disks, whose list has 60 MB. What must hold: the daemon holds one part of it at a time, and no
//! thread waits for a client.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::body::{Body, Bytes, HttpBody};
use axum::http::header;
use axum::response::{IntoResponse, Response};
use hyper::body::Frame;

use super::pool::JobKind;
use super::{ApiError, Cause, Control, in_pool};

/// A list of fewer bytes is sent as a whole.
const WHOLE: usize = 1 << 20;

/// A part of the list: JSON, and the number after which the next one begins.
type Part = (Vec<u8>, Option<u64>);
type NextPart = Pin<Box<dyn Future<Output = Result<Part, ApiError>> + Send>>;

/// What the client has not got yet.
struct Disks {
    control: Control,
    first: Option<Vec<u8>>,
    /// Where the next part begins; `None` behind the last one.
    after: Option<u64>,
    next: Option<NextPart>,
}

/// The disks behind `after`, as many as are listed at a time.
fn part(control: &Control, after: u64) -> Result<Part, ApiError> {
    let disks = control.store.next_disks(after);
    let mut text = Vec::new();
    for disk in &disks {
        text.push(if after == 0 && text.is_empty() { b'[' } else { b',' });
        let listed = control.listed(disk);
        serde_json::to_writer(&mut text, &listed).map_err(|e| ApiError::new(Cause::Io, e.to_string()))?;
    }
    let Some(last) = disks.last() else {
        return Ok((if after == 0 { b"[]".to_vec() } else { b"]".to_vec() }, None));
    };
    Ok((text, Some(last.id())))
}

fn next(control: &Control, after: u64) -> NextPart {
    let control = control.clone();
    Box::pin(in_pool(JobKind::Work, move || part(&control, after)))
}

impl HttpBody for Disks {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::io::Error>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(Bytes::from(first)))));
        }
        let Some(after) = self.after else { return Poll::Ready(None) };
        let control = self.control.clone();
        let job = self.next.get_or_insert_with(|| next(&control, after));
        let done = ready!(job.as_mut().poll(context));
        self.next = None;
        // Without its end the list is not valid, so the client sees that it broke off.
        self.after = done.as_ref().ok().and_then(|(_, after)| *after);
        let text = done.map(|(text, _)| Frame::data(Bytes::from(text)));
        Poll::Ready(Some(
            text.map_err(|_| {
                std::io::Error::other("the list of the disks broke off: too many commands hang")
            }),
        ))
    }
}

/// The answer with all disks.
///
/// # Errors
/// When too many commands hang.
pub(super) async fn disks(control: Control) -> Result<Response, ApiError> {
    let (mut first, mut after) = next(&control, 0).await?;
    while let Some(number) = after
        && first.len() < WHOLE
    {
        let (text, behind) = next(&control, number).await?;
        first.extend(text);
        after = behind;
    }
    let body = match after {
        // With its length, so that a client need not know of parts.
        None => Body::from(first),
        Some(_) => Body::new(Disks { control, first: Some(first), after, next: None }),
    };
    Ok(([(header::CONTENT_TYPE, "application/json")], body).into_response())
}
