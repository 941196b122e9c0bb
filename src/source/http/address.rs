//! Decides which addresses a redirect may lead to, and any other place that a server names.
//!
//! It comes from a server that the operator may not control. It may lead to the public network, to a private network from
//! an address that is not public, to this host from this host, to a link-local address from one, and where `[http] allow`
//! names the target. So no server but a link-local one leads to the metadata service of this machine, whose answers are
//! credentials. What must hold: the address that is checked is the one that is connected to. So a name is checked when it
//! is resolved for the connection, after each lookup, and an address in a URL before a request is sent (H9).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use reqwest::Url;

use crate::config::AllowEntry;

/// A part of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zone {
    Public,
    Private,
    /// This host.
    Loopback,
    /// Link-local addresses, and others at which clouds have their metadata service.
    LinkLocal,
}

impl Zone {
    /// Of the range of an address, as [`not_public`] names it.
    pub fn of(range: Option<&'static str>) -> Self {
        match range {
            None => Self::Public,
            Some(LOOPBACK | THIS_HOST) => Self::Loopback,
            Some(LINK_LOCAL | METADATA) => Self::LinkLocal,
            Some(_) => Self::Private,
        }
    }
}

/// Where a request may go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reach {
    /// Anywhere: the operator named the URL, or its host.
    Anywhere,
    /// Where a server in this zone may lead.
    From(Zone),
}

impl Reach {
    /// The range of an address, as [`not_public`] names it, when a request may not go there.
    pub fn refused(self, range: Option<&'static str>) -> Option<&'static str> {
        let Self::From(own) = self else { return None };
        range.filter(|_| own == Zone::Public || ![Zone::Private, own].contains(&Zone::of(range)))
    }
}

const LOOPBACK: &str = "loopback";
const THIS_HOST: &str = "this host";
const LINK_LOCAL: &str = "link-local";
const METADATA: &str = "metadata service";

/// The name of the range of an address that is not public; none for a public address.
pub(super) fn not_public(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => not_public_v4(address),
        IpAddr::V6(address) => not_public_v6(address),
    }
}

fn not_public_v4(address: Ipv4Addr) -> Option<&'static str> {
    let [a, b, c, _] = address.octets();
    match (a, b, c) {
        (0, ..) => Some(THIS_HOST),
        (127, ..) => Some(LOOPBACK),
        (169, 254, _) => Some(LINK_LOCAL),
        // Of Alibaba Cloud and Oracle Cloud.
        _ if matches!(address.octets(), [100, 100, 100, 200] | [192, 0, 0, 192]) => Some(METADATA),
        (10, ..) | (172, 16..=31, _) | (192, 168, _) => Some("private"),
        (100, 64..=127, _) => Some("shared (carrier-grade NAT)"),
        (192, 0, 0) | (198, 18..=19, _) => Some("special"),
        (224..=239, ..) => Some("multicast"),
        (240.., ..) => Some("reserved"),
        _ => None,
    }
}

fn not_public_v6(address: Ipv6Addr) -> Option<&'static str> {
    let words = address.segments();
    let inner = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        not_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    match words {
        [0, 0, 0, 0, 0, 0, 0, 0] => Some(THIS_HOST),
        [0, 0, 0, 0, 0, 0, 0, 1] => Some(LOOPBACK),
        // IPv4 in IPv6: mapped, compatible, translated (RFC 6052, also the local-use prefix of RFC 8215), 6to4.
        [0, 0, 0, 0, 0, 0xffff, high, low] | [0, 0, 0, 0, 0, 0, high, low] => inner(high, low),
        [0, 0, 0, 0, 0xffff, 0, high, low] => inner(high, low),
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => inner(high, low),
        [0x64, 0xff9b, 1, ..] => Some("private (translated)"),
        [0x2002, high, low, ..] => inner(high, low),
        // Teredo, whose client's address is inverted.
        [0x2001, 0, _, _, _, _, high, low] => inner(!high, !low),
        [0xfe80..=0xfebf, ..] => Some(LINK_LOCAL),
        // Of AWS.
        [0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254] => Some(METADATA),
        [0xfec0..=0xfeff, ..] => Some("site-local"),
        [0xfc00..=0xfdff, ..] => Some("private"),
        [0xff00..=0xffff, ..] => Some("multicast"),
        [0x100, 0, 0, 0, ..] => Some("discard"),
        _ => None,
    }
}

/// The address of a URL whose host is an address. The URL parser has normalised all its forms (`0x7f.1`, `2130706433`).
fn literal(url: &Url) -> Option<IpAddr> {
    let host = url.host_str()?;
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host).parse().ok()
}

/// The range of a host of a URL that is known not to be public before it is resolved. Other names are checked when they
/// are resolved.
pub(super) fn host_not_public(url: &Url) -> Option<&'static str> {
    if let Some(address) = literal(url) {
        return not_public(address);
    }
    let host = url.host_str().unwrap_or_default().trim_end_matches('.');
    let local = host == "localhost" || host.ends_with(".localhost");
    local.then_some(LOOPBACK)
}

/// `[http] allow`.
#[derive(Clone, Debug, Default)]
pub(super) struct AllowList(Vec<AllowEntry>);

impl AllowList {
    /// Of entries that the configuration has checked; an invalid entry allows nothing.
    pub fn new(entries: &[String]) -> Self {
        Self(entries.iter().filter_map(|entry| AllowEntry::parse(entry)).collect())
    }

    /// Whether an entry names the host of a URL, as a name or as an address.
    pub fn has_host(&self, url: &Url) -> bool {
        match literal(url) {
            Some(address) => self.has_address(address),
            None => {
                let host = url.host_str().unwrap_or_default();
                self.0.iter().any(|entry| entry.has_host(host))
            }
        }
    }

    /// Whether an entry is a network with the address.
    pub fn has_address(&self, address: IpAddr) -> bool {
        self.0.iter().any(|entry| entry.has_address(address))
    }
}

/// A name without any address that the request may go to.
#[derive(Debug, thiserror::Error)]
#[error("{name} has the address {address} ({range}), where a redirect may not lead")]
pub(super) struct NotPublic {
    name: String,
    address: IpAddr,
    range: &'static str,
}

/// The addresses of a name that a redirect may lead to.
pub(super) fn reachable(
    name: &str,
    found: Vec<IpAddr>,
    allow: &AllowList,
    reach: Reach,
) -> Result<Vec<IpAddr>, NotPublic> {
    let mut refused = None;
    let mut left = found;
    left.retain(|address| match reach.refused(not_public(*address)) {
        Some(range) if !allow.has_address(*address) => {
            refused.get_or_insert(NotPublic { name: name.to_owned(), address: *address, range });
            false
        }
        _ => true,
    });
    match refused {
        Some(refused) if left.is_empty() => Err(refused),
        _ => Ok(left),
    }
}
