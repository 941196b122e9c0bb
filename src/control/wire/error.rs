//! The body of an error.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The answer to a request that the daemon refuses or fails to carry out.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The reason.
    pub error: Refusal,
}

/// Why a request was not carried out.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Refusal {
    /// The kind of the error, for programs.
    pub kind: ErrorKind,
    /// The message for people, one line: object, cause, remedy.
    pub message: String,
}

/// The kind of an error, for programs. `control::error::Cause` has the meaning and the HTTP status of each, and the
/// description of the API takes both from there. Only the supervisor answers `Unavailable`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
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
    Busy,
    Unavailable,
}

impl ErrorBody {
    /// A refusal of `kind`.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { error: Refusal { kind, message: message.into() } }
    }
}
