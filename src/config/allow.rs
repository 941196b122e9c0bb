//! `[http] allow`: hosts and networks to which redirects may lead although their addresses are not public.

use std::net::IpAddr;

/// One entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AllowEntry {
    /// A host.
    Host(String),
    /// A domain and all domains below it.
    Domain(String),
    /// A network: an address, and the length of the prefix.
    Network(IpAddr, u8),
}

/// The bits of an address, the first one at the top, and their number.
fn bits(address: IpAddr) -> (u128, u8) {
    match address {
        IpAddr::V4(address) => (u128::from(address.to_bits()) << 96, 32),
        IpAddr::V6(address) => (address.to_bits(), 128),
    }
}

impl AllowEntry {
    /// Parses a host, a domain with a leading dot, an address, or a network (`10.0.0.0/8`).
    pub fn parse(entry: &str) -> Option<Self> {
        let entry = entry.trim().to_ascii_lowercase();
        let address = |text: &str| text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
        if let Some((network, prefix)) = entry.split_once('/') {
            let (network, prefix) = (address(network)?, prefix.parse().ok()?);
            return (prefix <= bits(network).1).then_some(Self::Network(network, prefix));
        }
        if let Some(address) = address(&entry) {
            return Some(Self::Network(address, bits(address).1));
        }
        let fits = |name: &str| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            (1..=253).contains(&name.len()) && name.bytes().all(plain) && !name.starts_with('.')
        };
        match entry.strip_prefix('.') {
            Some(domain) => fits(domain).then(|| Self::Domain(domain.into())),
            None => fits(&entry).then(|| Self::Host(entry.clone())),
        }
    }

    /// Whether it matches a host name.
    pub fn has_host(&self, host: &str) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        match self {
            Self::Host(name) => *name == host,
            Self::Domain(domain) => {
                host.strip_suffix(domain.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
            Self::Network(..) => false,
        }
    }

    /// Whether its network contains an address.
    pub fn has_address(&self, address: IpAddr) -> bool {
        let Self::Network(network, prefix) = self else { return false };
        let ((network, network_width), (address, width)) = (bits(*network), bits(address.to_canonical()));
        let mask = u128::MAX.checked_shl(128 - u32::from(*prefix)).unwrap_or(0);
        network_width == width && (network ^ address) & mask == 0
    }
}
