//! Tests of the reserve.
