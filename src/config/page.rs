//! `[page]`: the status page for browsers.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, invalid};

const KEY: &str = "page.listen";

/// Where the status page is served.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PageConfig {
    /// `[page] listen`: a TCP address, or the absolute path of a Unix socket. Default: none, which serves no page.
    /// Bounds: a loopback address, unless `remote` is set; a path has at most 107 bytes.
    pub listen: Option<String>,
    /// `[page] remote`: whether `listen` may be an address that other hosts reach. Default: false.
    pub remote: bool,
}

/// An address of the status page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PageAddress {
    /// TCP.
    Tcp(SocketAddr),
    /// A Unix socket.
    Unix(PathBuf),
}

impl PageConfig {
    /// The address, when there is a page.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] when it is out of bounds.
    pub fn address(&self) -> Result<Option<PageAddress>, ConfigError> {
        let Some(text) = &self.listen else { return Ok(None) };
        if text.starts_with('/') {
            // The size of `sun_path`, less its final zero.
            return match text.len() > 107 || text.contains('\0') {
                true => Err(invalid(
                    KEY,
                    format!("{text:?} is no path of a socket; give one of at most 107 bytes"),
                )),
                false => Ok(Some(PageAddress::Unix(text.into()))),
            };
        }
        let Ok(address) = text.parse::<SocketAddr>() else {
            let why =
                "is neither an address with a port nor an absolute path; give one such as 127.0.0.1:8080";
            return Err(invalid(KEY, format!("{text:?} {why}")));
        };
        if address.port() == 0 {
            return Err(invalid(KEY, format!("{text:?} has port 0; give a port from 1 on")));
        }
        if !address.ip().is_loopback() && !self.remote {
            let why = "is an address that other hosts may reach, and the page asks for no password; give 127.0.0.1 or \
                       [::1], or set page.remote = true";
            return Err(invalid(KEY, format!("{text} {why}")));
        }
        Ok(Some(PageAddress::Tcp(address)))
    }

    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        self.address().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(listen: &str, remote: bool) -> Result<Option<PageAddress>, String> {
        let config = PageConfig { listen: Some(listen.into()), remote };
        config.address().map_err(|error| error.to_string())
    }

    #[test]
    fn only_a_loopback_address_is_accepted_without_an_explicit_word() {
        let local = |text: &str| Ok(Some(PageAddress::Tcp(text.parse().expect("an address"))));
        assert_eq!(address("127.0.0.1:8080", false), local("127.0.0.1:8080"));
        assert_eq!(address("[::1]:8080", false), local("[::1]:8080"));
        for other in ["0.0.0.0:8080", "[::]:8080", "192.0.2.1:8080", "[::ffff:127.0.0.1]:8080"] {
            let why = address(other, false).expect_err("it is refused");
            assert!(why.contains("page.remote"), "{why}");
            assert_eq!(address(other, true), local(other));
        }
    }

    #[test]
    fn a_name_a_port_alone_and_a_relative_path_are_refused_with_the_remedy() {
        for text in ["localhost:8080", ":8080", "8080", "127.0.0.1", "page.sock", "", "127.0.0.1:0"] {
            let why = address(text, true).expect_err("it is refused");
            assert!(why.contains("give"), "{why}");
        }
        let long = format!("/{}", "x".repeat(107));
        assert!(address(&long, false).is_err());
        assert_eq!(address("/run/page.sock", false), Ok(Some(PageAddress::Unix("/run/page.sock".into()))));
    }
}
