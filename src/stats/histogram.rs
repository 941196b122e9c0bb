//! The buckets of latencies: powers of two microseconds, so that finding the bucket takes a few instructions.

/// Buckets of a histogram. The last one has no bound.
pub const BUCKETS: usize = 28;

/// The bucket of a latency.
pub(super) fn bucket_of(ns: u64) -> usize {
    let us = ns.div_ceil(1000);
    let power = u64::BITS - us.saturating_sub(1).leading_zeros();
    (power as usize).min(BUCKETS - 1)
}

/// The longest latency of a bucket, in microseconds; `None` for the last bucket, which has no bound.
pub fn bound_us(bucket: usize) -> Option<u64> {
    (bucket < BUCKETS - 1).then(|| 1 << bucket)
}
