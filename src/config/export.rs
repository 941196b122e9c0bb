//! `[export]`: cached blocks for other hosts.

use std::net::{IpAddr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::http::some_size;
use super::size::{MAX_SIZE, format_size};
use super::{ConfigError, invalid};

const KEY: &str = "export.http";
/// Lowest limit of bytes per second.
const MIN_RATE: u64 = 64 << 10;

/// Where and how fast other hosts get cached blocks of bases.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ExportConfig {
    /// `[export] http`, `--export-http`: a TCP address of this host. Default: none, which serves no other host. Bounds:
    /// one address and a port from 1.
    pub http: Option<String>,
    /// `[export] rate`: most bytes per second for all other hosts together; 0 for no limit. Default: 128 MiB. Bounds: 0,
    /// or at least 64 KiB.
    #[serde(deserialize_with = "some_size")]
    pub rate: u64,
}

impl Default for ExportConfig {
    fn default() -> Self {
        Self { http: None, rate: 128 << 20 }
    }
}

impl ExportConfig {
    /// The address, when other hosts are served.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] when it is out of bounds.
    pub fn address(&self) -> Result<Option<SocketAddr>, ConfigError> {
        let Some(text) = &self.http else { return Ok(None) };
        let Ok(address) = text.parse::<SocketAddr>() else {
            let why = "is no address with a port; give one such as 10.0.0.2:7070";
            return Err(invalid(KEY, format!("{text:?} {why}")));
        };
        if address.port() == 0 {
            return Err(invalid(KEY, format!("{text:?} has port 0; give a port from 1 on")));
        }
        let ip = match address.ip() {
            IpAddr::V6(ip) => ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4),
            ip => ip,
        };
        if ip.is_unspecified() || ip.is_multicast() {
            let why = "is not one address of this host, and what is served there asks for no password; give the address \
                       on the network of the hosts";
            return Err(invalid(KEY, format!("{text} {why}")));
        }
        Ok(Some(address))
    }

    /// Most bytes per second, when there is a limit.
    pub fn limit(&self) -> Option<u64> {
        (self.rate > 0).then_some(self.rate)
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        if self.rate != 0 && !(MIN_RATE..=MAX_SIZE).contains(&self.rate) {
            let rate = format_size(self.rate);
            let message = format!("{rate} is out of bounds; give at least 64K, or 0 for no limit");
            return Err(invalid("export.rate", message));
        }
        self.address().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(http: &str) -> Result<Option<SocketAddr>, String> {
        let config = ExportConfig { http: Some(http.into()), ..ExportConfig::default() };
        config.address().map_err(|error| error.to_string())
    }

    #[test]
    fn other_hosts_are_served_at_one_address() {
        assert_eq!(ExportConfig::default().address().expect("valid"), None);
        for text in ["127.0.0.1:7070", "[::1]:7070", "10.1.2.3:80"] {
            assert_eq!(address(text), Ok(Some(text.parse().expect("an address"))));
        }
        let others = [
            "0.0.0.0:7070",
            "[::]:7070",
            "[::ffff:0.0.0.0]:7070",
            "224.0.0.1:7070",
            "host:7070",
            ":7070",
            "7070",
        ];
        for text in others.into_iter().chain(["127.0.0.1", "127.0.0.1:0", "", "http://127.0.0.1:7070"]) {
            let why = address(text).expect_err("it is refused");
            assert!(why.contains("export.http") && why.contains("give"), "{why}");
        }
    }
}
