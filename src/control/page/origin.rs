//! Which requests of browsers are answered.
//!
//! A browser sends the name in the address bar as Host. A name that an attacker's server lets resolve to this host
//! reaches the listener (DNS rebinding), and for the browser the answer would belong to the attacker's page. An IP
//! address and `localhost` cannot be rebound, so only they are accepted.

use std::net::{IpAddr, Ipv6Addr};

use axum::extract::Request;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// Refuses requests under a foreign name, and requests that a page of another site makes.
pub(super) async fn check(request: Request, next: Next) -> Response {
    let hosts: Vec<_> = request.headers().get_all(header::HOST).iter().collect();
    let of_header = match hosts[..] {
        [host] => host.to_str().ok(),
        _ => None,
    };
    let in_target = request.uri().authority().map(|authority| authority.as_str());
    if !of_header.is_some_and(is_own) || !in_target.is_none_or(is_own) {
        let why = "the status page answers to IP addresses and localhost only; open it under one of these\n";
        return (StatusCode::MISDIRECTED_REQUEST, why).into_response();
    }
    if is_foreign(request.headers()) {
        let why = "a page of another site made this request, and the status page does not answer it\n";
        return (StatusCode::FORBIDDEN, why).into_response();
    }
    next.run(request).await
}

/// Whether a host, with or without a port, cannot be rebound.
pub(super) fn is_own(host: &str) -> bool {
    if let Some(rest) = host.strip_prefix('[') {
        let Some((address, port)) = rest.split_once(']') else { return false };
        return address.parse::<Ipv6Addr>().is_ok() && is_port(port);
    }
    let (name, port) = host.find(':').map_or((host, ""), |at| host.split_at(at));
    (name.eq_ignore_ascii_case("localhost") || matches!(name.parse(), Ok(IpAddr::V4(_)))) && is_port(port)
}

/// Whether it is empty, or a colon and a number.
fn is_port(text: &str) -> bool {
    text.is_empty() || text.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok())
}

/// Whether another site's page made the request. To follow a link to this page is no such request.
fn is_foreign(headers: &HeaderMap) -> bool {
    let is =
        |name: &str, word: &str| headers.get(name).is_some_and(|value| value.as_bytes() == word.as_bytes());
    let elsewhere = is("sec-fetch-site", "cross-site") || is("sec-fetch-site", "same-site");
    elsewhere && !(is("sec-fetch-mode", "navigate") && is("sec-fetch-dest", "document"))
}
