//! Tests of the delta.
