//! What a failed TLS handshake means for an operator. The library's own texts name types of its code.

use std::error::Error;
use std::io;

use rustls::{CertificateError, InvalidMessage};

/// A failure that repeating the request does not mend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TlsProblem {
    /// The certificate leads to no trusted issuer.
    UnknownIssuer,
    /// The server sends the certificate of an authority as its own, as `openssl req -x509` makes one.
    SelfSigned,
    /// The answer to the handshake is not TLS.
    NotTls,
}

impl TlsProblem {
    /// The cause; `server` is host and port.
    pub fn why(self, server: &str) -> String {
        match self {
            Self::UnknownIssuer => {
                format!("the issuer of the certificate of {server} is not trusted on this host")
            }
            Self::SelfSigned => {
                format!("the certificate of {server} is self-signed, as that of an authority")
            }
            Self::NotTls => format!("{server} does not speak TLS"),
        }
    }

    /// The remedy.
    pub fn advice(self) -> &'static str {
        match self {
            Self::UnknownIssuer => {
                "name a PEM file with the issuer's certificate in [http] ca_file, and restart"
            }
            Self::SelfSigned => {
                "give the server a certificate that an authority issued to it, and name the authority's certificate \
                 in [http] ca_file"
            }
            Self::NotTls => "check the port, or give the URL as http://",
        }
    }
}

/// The TLS problem that made a request fail, if that is the cause.
pub(super) fn problem(error: &(dyn Error + 'static)) -> Option<TlsProblem> {
    let mut next = Some(error);
    while let Some(error) = next {
        // `source` of an io::Error skips the error inside.
        let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        if let Some(inner) = inner {
            let inner: &(dyn Error + 'static) = inner;
            if let Some(found) = problem(inner) {
                return Some(found);
            }
        }
        if let Some(error) = error.downcast_ref::<rustls::Error>() {
            return of(error);
        }
        next = error.source();
    }
    None
}

fn of(error: &rustls::Error) -> Option<TlsProblem> {
    match error {
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => Some(TlsProblem::UnknownIssuer),
        // rustls has no kind of its own for this one.
        rustls::Error::InvalidCertificate(CertificateError::Other(other))
            if format!("{other:?}").contains("CaUsedAsEndEntity") =>
        {
            Some(TlsProblem::SelfSigned)
        }
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => Some(TlsProblem::NotTls),
        _ => None,
    }
}
