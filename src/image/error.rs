//! Errors of images.

use std::fmt;

use super::Format;
use crate::source::{Completion, SourceError};

/// The kind of a failure, for callers that act on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageErrorKind {
    /// The source failed, or its bytes are not here yet; see [`ImageError::source_error`].
    Source,
    /// The bytes contradict the format, each other, or the file they are in.
    Invalid,
    /// The image is valid but refused: it needs another file, or is too big.
    Refused,
    /// A variant of the format that this version does not read.
    Unsupported,
}

/// A failure of an image. The message says what is wrong, where, and what to do; only the name of the image is missing.
#[derive(Clone, Debug)]
pub struct ImageError(Box<Inner>);

#[derive(Clone, Debug)]
enum Inner {
    Source(SourceError),
    Image { kind: ImageErrorKind, format: Format, what: String, at: Option<u64>, advice: String },
}

impl ImageError {
    fn image(kind: ImageErrorKind, format: Format, what: String, advice: &str) -> Self {
        Self(Box::new(Inner::Image { kind, format, what, at: None, advice: advice.to_owned() }))
    }

    /// `what` completes "not a usable image: ".
    pub(super) fn invalid(format: Format, what: impl Into<String>) -> Self {
        let advice = "it is damaged or incomplete: use another copy";
        Self::image(ImageErrorKind::Invalid, format, what.into(), advice)
    }

    pub(super) fn refused(format: Format, what: impl Into<String>, advice: &str) -> Self {
        Self::image(ImageErrorKind::Refused, format, what.into(), advice)
    }

    pub(super) fn unsupported(format: Format, what: impl Into<String>, advice: &str) -> Self {
        Self::image(ImageErrorKind::Unsupported, format, what.into(), advice)
    }

    /// Adds the offset in the file.
    pub(super) fn at(mut self, offset: u64) -> Self {
        if let Inner::Image { at, .. } = &mut *self.0 {
            *at = Some(offset);
        }
        self
    }

    /// Replaces the advice.
    pub(super) fn advise(mut self, text: &str) -> Self {
        if let Inner::Image { advice, .. } = &mut *self.0 {
            text.clone_into(advice);
        }
        self
    }

    pub fn kind(&self) -> ImageErrorKind {
        match &*self.0 {
            Inner::Source(_) => ImageErrorKind::Source,
            Inner::Image { kind, .. } => *kind,
        }
    }

    /// The error of the source, unchanged.
    pub fn source_error(&self) -> Option<&SourceError> {
        match &*self.0 {
            Inner::Source(error) => Some(error),
            Inner::Image { .. } => None,
        }
    }

    /// As [`source_error`](Self::source_error), by value.
    ///
    /// # Errors
    /// This error, when it is not an error of the source.
    pub fn into_source_error(self) -> Result<SourceError, Self> {
        match *self.0 {
            Inner::Source(error) => Ok(error),
            Inner::Image { .. } => Err(self),
        }
    }

    /// The completion after which the caller can try again, when the error only means that bytes must be fetched.
    pub fn completion(&self) -> Option<&Completion> {
        self.source_error().and_then(SourceError::completion)
    }
}

impl From<SourceError> for ImageError {
    fn from(error: SourceError) -> Self {
        Self(Box::new(Inner::Source(error)))
    }
}

impl fmt::Display for ImageError {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0 {
            Inner::Source(error) => error.fmt(out),
            Inner::Image { format, what, at, advice, .. } => {
                write!(out, "not a usable {format} image: {what}")?;
                if let Some(at) = at {
                    write!(out, " (at byte {at} of the file)")?;
                }
                write!(out, "; {advice}")
            }
        }
    }
}

impl std::error::Error for ImageError {}
