//! A token bucket that may be in debt, as one number: until when all that was taken is paid for.
//!
//! The bucket is full when that moment is a burst ago, and empty when it is now. A request passes while the bucket is
//! not in debt and takes all that it needs, so one that is larger than the burst passes, and later ones wait for it.

const SECOND_NS: u128 = 1_000_000_000;

/// See the module. Times are nanoseconds of [`now`](super::now).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket {
    /// Tokens a second.
    rate: u64,
    burst_ns: i64,
    paid_until: i64,
}

impl Bucket {
    /// A full bucket.
    pub fn full(rate: u64, burst_ns: i64, now: i64) -> Self {
        Self { rate: rate.max(1), burst_ns, paid_until: now.saturating_sub(burst_ns) }
    }

    /// Nanoseconds until the next request passes; 0: it passes now.
    pub fn wait(&self, now: i64) -> i64 {
        self.paid_until.saturating_sub(now).max(0)
    }

    /// Takes tokens, as many as there are or more.
    pub fn take(&mut self, tokens: u64, now: i64) {
        let price = (u128::from(tokens) * SECOND_NS).div_ceil(u128::from(self.rate));
        let price = i64::try_from(price).unwrap_or(i64::MAX);
        let from = self.paid_until.max(now.saturating_sub(self.burst_ns));
        self.paid_until = from.saturating_add(price);
    }

    /// The bucket with another rate and burst. A debt stays the same number of tokens.
    #[must_use]
    pub fn changed(self, rate: u64, burst_ns: i64, now: i64) -> Self {
        let rate = rate.max(1);
        let debt = u128::from(self.wait(now).unsigned_abs()) * u128::from(self.rate) / u128::from(rate);
        let debt = i64::try_from(debt).unwrap_or(i64::MAX);
        let paid_until = match debt {
            0 => self.paid_until.clamp(now.saturating_sub(burst_ns), now),
            _ => now.saturating_add(debt),
        };
        Self { rate, burst_ns, paid_until }
    }
}
