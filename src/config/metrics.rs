//! `[metrics]`: metrics for Prometheus.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::{ConfigError, invalid};

/// Most series of their own.
const MOST_SERIES: usize = 100_000;

/// The settings of metrics. The control socket has them in any case.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MetricsConfig {
    /// `[metrics] listen`: a TCP address on which the daemon serves metrics to any client: `ADDRESS:PORT`, or a port of
    /// the loopback interface. Default: none. Bounds: an IP address and a port from 1.
    pub listen: Option<String>,
    /// `[metrics] series`: how many disks, and how many bases, have series of their own. Default: 100. Bounds: 0 to
    /// 100,000.
    pub series: usize,
}

impl Default for MetricsConfig {
    fn default() -> Self {
        Self { listen: None, series: 100 }
    }
}

impl MetricsConfig {
    /// The address on which the daemon listens; `None` when there is none, or when it is not valid.
    pub fn address(&self) -> Option<SocketAddr> {
        let text = self.listen.as_deref()?;
        let port = |text: &str| {
            text.parse().ok().map(|port| SocketAddr::from((IpAddr::from(Ipv4Addr::LOCALHOST), port)))
        };
        text.parse().ok().or_else(|| port(text)).filter(|address| address.port() != 0)
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if let Some(text) = &self.listen
            && self.address().is_none()
        {
            let message =
                format!("{text:?} is not valid; give an IP address and a port, such as \"127.0.0.1:9464\"");
            return Err(invalid("metrics.listen", message));
        }
        if self.series > MOST_SERIES {
            let series = self.series;
            return Err(invalid(
                "metrics.series",
                format!("{series} is out of bounds; give 0 to {MOST_SERIES}"),
            ));
        }
        Ok(())
    }
}
