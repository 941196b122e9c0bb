//! Tests of the simulated medium.
