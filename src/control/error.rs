//! How an error becomes an answer: its cause decides the HTTP status and the kind that programs read.

use axum::Json;
use axum::extract::FromRequestParts;
use axum::extract::rejection::{BytesRejection, JsonRejection, PathRejection, QueryRejection};
use axum::http::StatusCode;
use axum::http::request::Parts;
use axum::response::{IntoResponse, Response};

use super::wire::{ErrorBody, ErrorKind};
use crate::store::{StoreError, StoreErrorKind};

/// The cause of an error. It is finer than [`ErrorKind`]: some causes share a kind and differ in the HTTP status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    NotFound,
    NotAllowed,
    Exists,
    InUse,
    MayBeInUse,
    Invalid,
    Unsupported,
    Damaged,
    Changed,
    Io,
    StorageFull,
    TooManyFollowers,
    Overloaded,
}

impl Cause {
    /// All causes, in the order of the description.
    pub(super) const ALL: [Self; 13] = [
        Self::NotFound,
        Self::NotAllowed,
        Self::Exists,
        Self::InUse,
        Self::MayBeInUse,
        Self::Invalid,
        Self::Unsupported,
        Self::Damaged,
        Self::Changed,
        Self::Io,
        Self::StorageFull,
        Self::TooManyFollowers,
        Self::Overloaded,
    ];

    /// The HTTP status.
    pub(super) fn status(self) -> StatusCode {
        match self {
            Self::NotFound => StatusCode::NOT_FOUND,
            Self::NotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            Self::Exists | Self::InUse | Self::MayBeInUse => StatusCode::CONFLICT,
            Self::Invalid | Self::Unsupported => StatusCode::BAD_REQUEST,
            Self::Damaged | Self::Changed | Self::Io => StatusCode::INTERNAL_SERVER_ERROR,
            Self::StorageFull => StatusCode::INSUFFICIENT_STORAGE,
            Self::TooManyFollowers => StatusCode::TOO_MANY_REQUESTS,
            Self::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// The kind for programs.
    pub(super) fn kind(self) -> ErrorKind {
        match self {
            Self::NotFound => ErrorKind::NotFound,
            Self::NotAllowed => ErrorKind::NotAllowed,
            Self::Exists => ErrorKind::Exists,
            Self::InUse => ErrorKind::InUse,
            Self::MayBeInUse => ErrorKind::MayBeInUse,
            Self::Invalid => ErrorKind::Invalid,
            Self::Unsupported => ErrorKind::Unsupported,
            Self::Damaged => ErrorKind::Damaged,
            Self::Changed => ErrorKind::Changed,
            Self::Io | Self::StorageFull => ErrorKind::Io,
            Self::TooManyFollowers | Self::Overloaded => ErrorKind::Busy,
        }
    }

    /// The text in the description of the API.
    pub(super) fn meaning(self) -> &'static str {
        match self {
            Self::NotFound => "there is no such disk, base, job, trace, cloud or resource",
            Self::NotAllowed => "the resource has no such method",
            Self::Exists => "the name is taken",
            Self::InUse => {
                "a client has the disk open, another object needs this one, or the same operation is under way"
            }
            Self::MayBeInUse => "a client may have the disk open since an earlier worker served it",
            Self::Invalid => "the request is not valid, or the source refuses it",
            Self::Unsupported => "the operation is not available for this kind of object",
            Self::Damaged => "a file of the store is damaged",
            Self::Changed => "the image of the base is not the registered one",
            Self::Io => "the storage failed",
            Self::StorageFull => "the storage is full",
            Self::TooManyFollowers => "too many clients follow events",
            Self::Overloaded => "too many requests hang",
        }
    }
}

/// An error that the control socket answers with.
#[derive(Debug)]
pub(super) struct ApiError {
    cause: Cause,
    message: String,
}

impl ApiError {
    pub(super) fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, message: message.into() }
    }

    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(Cause::Invalid, message)
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        let cause = match error.kind() {
            StoreErrorKind::NotFound => Cause::NotFound,
            StoreErrorKind::Exists => Cause::Exists,
            StoreErrorKind::InUse => Cause::InUse,
            StoreErrorKind::Invalid => Cause::Invalid,
            StoreErrorKind::Unsupported => Cause::Unsupported,
            StoreErrorKind::Damaged => Cause::Damaged,
            StoreErrorKind::Changed => Cause::Changed,
            StoreErrorKind::Io if error.errno() == libc::ENOSPC => Cause::StorageFull,
            StoreErrorKind::Io => Cause::Io,
        };
        Self::new(cause, error.to_string())
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        Self::invalid(rejection.body_text())
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        Self::invalid(rejection.body_text())
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::invalid(rejection.body_text())
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.cause.status(), Json(ErrorBody::new(self.cause.kind(), self.message))).into_response()
    }
}

/// The name in the path of a request. A name that is not UTF-8 is refused with an [`ApiError`], as other bad requests
/// are.
pub(super) struct Name(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let path = axum::extract::Path::<String>::from_request_parts(parts, state).await;
        let path = path.map_err(|rejection: PathRejection| ApiError::invalid(rejection.body_text()))?;
        Ok(Self(path.0))
    }
}
