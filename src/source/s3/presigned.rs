//! Presigned URLs: an https URL of an object with a signature in its query, which ends at a time that the URL says.
//!
//! Such a URL needs no keys. This only says why the server refuses it when its time is over.

use std::time::{Duration, SystemTime};

use reqsign_core::time::Timestamp;
use reqwest::Url;
use reqwest::header::HeaderMap;

use super::errors::ServiceError;
use crate::source::http::{Authoriser, Failure, Fixed, Grant, Http, Job, Refusal, Remedy};

/// An authoriser for a presigned URL; none for any other URL.
pub(in crate::source) fn of(url: &Url) -> Option<Presigned> {
    let value = |name: &str| url.query_pairs().find(|(found, _)| found == name).map(|(_, value)| value);
    value("X-Amz-Signature")?;
    let since: Timestamp = value("X-Amz-Date")?.parse().ok()?;
    let lasts: u64 = value("X-Amz-Expires")?.parse().ok()?;
    let since = since.as_system_time();
    // Earlier times cannot be shown.
    since.duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let until = since.checked_add(Duration::from_secs(lasts))?;
    Some(Presigned { url: url.clone(), until })
}

/// See the module.
pub(in crate::source) struct Presigned {
    url: Url,
    until: SystemTime,
}

impl Authoriser for Presigned {
    fn covers(&self, url: &Url) -> bool {
        *url == self.url
    }

    fn lend<'a>(&'a self, _http: &'a Http, _url: &'a Url) -> Job<'a, Result<Box<dyn Grant>, Failure>> {
        // The signature is in the URL.
        Box::pin(async { Ok(Box::new(Fixed(HeaderMap::new())) as Box<dyn Grant>) })
    }

    fn refused<'a>(
        &'a self,
        _http: &'a Http,
        _grant: &'a dyn Grant,
        refusal: Refusal<'a>,
    ) -> Job<'a, Remedy> {
        let server = ServiceError::of(refusal.headers, refusal.text).server_time;
        let now = server.unwrap_or_else(SystemTime::now);
        Box::pin(async move {
            Remedy::Fails(match refusal.failure {
                Failure::Denied { status, .. } if now > self.until => Failure::Denied {
                    status: *status,
                    why: format!(
                        "its presigned URL ran out at {} ({status})",
                        humantime::format_rfc3339_seconds(self.until)
                    ),
                    advice: Some("give it a new one: plyfs base set NAME --source URL"),
                },
                other => other.clone(),
            })
        })
    }
}
