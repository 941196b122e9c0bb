//! Refusals.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The answer to a request that is refused or fails.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// Why.
    pub error: Refusal,
}

/// Why a request was not done.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
pub struct Refusal {
    /// For programs.
    pub kind: ErrorKind,
    /// For people, one line: object, cause, remedy.
    pub message: String,
}

/// The kind of an error, for programs. The causes behind each, and their HTTP statuses, are in `control::error`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// No such disk, base, trace or resource.
    NotFound,
    /// The resource has no such method.
    NotAllowed,
    /// The name is taken.
    Exists,
    /// Something needs the object, or the same thing is under way.
    InUse,
    /// The request makes no sense, or the source refuses it.
    Invalid,
    /// Not for this kind of object.
    Unsupported,
    /// A file of the store cannot be understood.
    Damaged,
    /// The image of the base is not what was registered.
    Changed,
    /// The storage failed or is full.
    Io,
    /// Too many clients follow events, or too many requests hang.
    Busy,
    /// No worker serves at the moment. Nothing was done; ask again.
    Unavailable,
}

impl ErrorBody {
    /// A refusal of that kind.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { error: Refusal { kind, message: message.into() } }
    }
}
