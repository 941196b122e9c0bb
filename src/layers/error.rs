//! Why a sealed layer cannot be used.

use std::io;

use thiserror::Error;

use crate::delta::DeltaError;
use crate::format::FormatError;

/// A layer that cannot be used.
#[derive(Debug, Error)]
pub enum LayerError {
    /// The storage failed.
    #[error("layer {layer}: {operation}: {source}")]
    Io {
        /// Number of the layer.
        layer: u64,
        /// What failed.
        operation: &'static str,
        /// The error of the storage.
        source: io::Error,
    },
    /// Its map file is damaged or missing.
    #[error("layer {layer}: {source}")]
    Map {
        /// Number of the layer.
        layer: u64,
        /// What is wrong.
        source: DeltaError,
    },
    /// Its index is damaged.
    #[error("layer {layer}: {source}")]
    Index {
        /// Number of the layer.
        layer: u64,
        /// What is wrong.
        source: FormatError,
    },
}

impl LayerError {
    pub(super) fn io(layer: u64, operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { layer, operation, source }
    }

    pub(super) fn index(layer: u64) -> impl FnOnce(FormatError) -> Self {
        move |source| Self::Index { layer, source }
    }
}
