//! The limits of a disk in its record (docs/format.md, "Limits").

use super::BLOCK;
use super::codec::{FormatError, Reader, Writer};

/// The smallest quota in bytes.
pub const LEAST_QUOTA: u64 = BLOCK;
/// The largest quota in bytes.
pub const MOST_QUOTA: u64 = 1 << 60;
/// The lowest bandwidth in bytes a second.
pub const LEAST_BANDWIDTH: u64 = 64 << 10;
/// The highest bandwidth in bytes a second.
pub const MOST_BANDWIDTH: u64 = 1 << 50;
/// Most requests a second.
pub const MOST_IOPS: u64 = 1_000_000_000;
/// Bounds of the burst in milliseconds.
pub const BURST_MS: (u32, u32) = (1, 3_600_000);

/// Limits of one kind. Each that is set holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    /// Of all requests together.
    pub all: Option<u64>,
    /// Of reads.
    pub read: Option<u64>,
    /// Of requests that change the disk.
    pub write: Option<u64>,
}

impl Rates {
    /// The limits, in the order of the record.
    pub fn each(&self) -> [Option<u64>; 3] {
        [self.all, self.read, self.write]
    }

    /// Whether there is none.
    pub fn is_none(&self) -> bool {
        *self == Self::default()
    }
}

/// The limits of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Limits {
    /// Bytes that the disk may take in the store.
    pub quota: Option<u64>,
    /// Requests a second.
    pub iops: Rates,
    /// Bytes a second.
    pub bandwidth: Rates,
    /// For how many milliseconds a disk may save up what it does not use; `None`: the default.
    pub burst_ms: Option<u32>,
}

impl Limits {
    /// As a record holds them: `None` when there are none.
    pub fn boxed(self) -> Option<Box<Self>> {
        (self != Self::default()).then(|| Box::new(self))
    }

    /// What is wrong with the limits, and the remedy; `None` when they can be kept.
    pub fn problem(&self) -> Option<String> {
        let out_of = |what: &str, value: Option<u64>, least: u64, most: u64| {
            let value = value.filter(|value| !(least..=most).contains(value))?;
            Some(match value {
                0 => format!("{what} is 0; leave it out for no limit, or give at least {least}"),
                _ => format!("{what} is {value}; give {least} to {most}"),
            })
        };
        let of = |kind: &str, rates: Rates, least, most| {
            ["", "read ", "write "]
                .iter()
                .zip(rates.each())
                .find_map(|(which, rate)| out_of(&format!("the {which}{kind}"), rate, least, most))
        };
        let (shortest, longest) = BURST_MS;
        out_of("the quota", self.quota, LEAST_QUOTA, MOST_QUOTA)
            .or_else(|| of("IOPS limit", self.iops, 1, MOST_IOPS))
            .or_else(|| of("bandwidth", self.bandwidth, LEAST_BANDWIDTH, MOST_BANDWIDTH))
            .or_else(|| {
                let burst = self.burst_ms.filter(|burst| !(shortest..=longest).contains(burst))?;
                Some(format!("the burst is {burst} ms; give 1 ms to 1 h"))
            })
    }

    pub(super) fn put(&self, w: &mut Writer) {
        w.u64(self.quota.unwrap_or(0));
        for rate in self.iops.each().into_iter().chain(self.bandwidth.each()) {
            w.u64(rate.unwrap_or(0));
        }
        w.u32(self.burst_ms.unwrap_or(0));
    }

    pub(super) fn get(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        let mut next = || Ok::<_, FormatError>(Some(r.u64()?).filter(|value| *value != 0));
        let quota = next()?;
        let mut rates = || Ok::<_, FormatError>(Rates { all: next()?, read: next()?, write: next()? });
        let (iops, bandwidth) = (rates()?, rates()?);
        let burst_ms = Some(r.u32()?).filter(|burst| *burst != 0);
        let limits = Self { quota, iops, bandwidth, burst_ms };
        match limits.problem() {
            None if limits == Self::default() => Err(r.bad("limits without a limit")),
            None => Ok(limits),
            Some(problem) => Err(r.bad(problem)),
        }
    }
}
