//! What the errors of a service mean: <https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html>.
//!
//! Only the code of an error, its region and its times get into messages: other elements repeat parts of the request.

use std::time::{Duration, SystemTime};

use reqwest::header::{DATE, HeaderMap};

use super::place::Object;
use crate::config::is_region;
use crate::source::http::{Failure, Refusal};

/// Most bytes of a code.
const LONGEST_CODE: usize = 64;

/// An error of a service.
pub(super) struct ServiceError {
    pub code: Option<String>,
    /// The region of the bucket.
    pub region: Option<String>,
    /// The clock of the server, as it was when the answer came.
    pub server_time: Option<SystemTime>,
}

/// The text of the first element `name`. The elements of an error have no attributes and no children but text.
fn element<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    let (value, _) = rest.split_once(&format!("</{name}>"))?;
    Some(value.trim())
}

impl ServiceError {
    pub fn of(headers: &HeaderMap, text: &[u8]) -> Self {
        let text = String::from_utf8_lossy(text);
        let is_code = |code: &&str| {
            (1..=LONGEST_CODE).contains(&code.len()) && code.bytes().all(|byte| byte.is_ascii_alphanumeric())
        };
        let code = element(&text, "Code").filter(is_code).map(str::to_owned);
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let region = header("x-amz-bucket-region").or_else(|| element(&text, "Region"));
        let date = header(DATE.as_str()).and_then(|date| httpdate::parse_http_date(date).ok());
        Self { code, region: region.filter(|region| is_region(region)).map(str::to_owned), server_time: date }
    }

    /// Whether other keys may help.
    pub fn is_about_keys(&self, status: u16) -> bool {
        const CODES: [&str; 8] = [
            "AccessDenied",
            "AuthorizationHeaderMalformed",
            "ExpiredToken",
            "InvalidAccessKeyId",
            "InvalidToken",
            "SignatureDoesNotMatch",
            "TokenRefreshRequired",
            "UnrecognizedClientException",
        ];
        match &self.code {
            Some(code) => CODES.contains(&code.as_str()),
            None => matches!(status, 401 | 403),
        }
    }
}

/// The failure of a request in the words of the service, with the remedy. `is_signed` says whether it had a signature.
pub(super) fn failure(
    object: &Object,
    error: &ServiceError,
    refusal: &Refusal<'_>,
    is_signed: bool,
) -> Failure {
    // The HTTP source decides by these what it does next.
    if !matches!(refusal.failure, Failure::Again { .. } | Failure::Denied { .. } | Failure::Protocol(_)) {
        return refusal.failure.clone();
    }
    let Object { bucket, key, .. } = object;
    let status = refusal.status;
    let Some(code) = error.code.as_deref() else { return refusal.failure.clone() };
    let denied =
        |status, why: String, advice| Failure::Denied { status, why: format!("{why} ({code})"), advice };
    let keys = "correct the keys in [[http.s3]] of the configuration; plyfs reads them again before each try";
    match code {
        "RequestTimeTooSkewed" => {
            Failure::advised(format!("{} ({code})", skew(error)), "set the clock of this host")
        }
        "NoSuchKey" => denied(
            404,
            format!("bucket {bucket} has no object {key}"),
            Some("check the key, or restore the object"),
        ),
        "NoSuchVersion" => denied(
            404,
            format!("bucket {bucket} does not have this version of {key} any more"),
            Some("restore the version, or add the object as a new base"),
        ),
        "NoSuchBucket" => {
            let advice = "check the name of the bucket, and endpoint in [[http.s3]]";
            denied(404, format!("there is no bucket {bucket}"), Some(advice))
        }
        // The answer to a version that marks the deletion of the object.
        "MethodNotAllowed" => denied(
            404,
            format!("this version of {key} says that it was deleted"),
            Some("name another version"),
        ),
        "AccessDenied" if !is_signed => {
            let advice = "give keys for the bucket in [[http.s3]] of the configuration";
            denied(403, format!("bucket {bucket} is not public, and the request has no keys"), Some(advice))
        }
        "AccessDenied" | "AllAccessDisabled" => denied(
            403,
            format!("the keys may not read {key} in bucket {bucket}, or it is not there"),
            Some("let them read it (s3:GetObject, s3:GetObjectVersion; s3:ListBucket tells the two apart)"),
        ),
        "ExpiredToken" | "TokenRefreshRequired" => denied(403, "the keys ran out".into(), Some(keys)),
        "InvalidAccessKeyId" | "InvalidToken" | "UnrecognizedClientException" => {
            denied(403, "the service does not know the keys".into(), Some(keys))
        }
        "SignatureDoesNotMatch" => denied(403, "the secret key does not fit its id".into(), Some(keys)),
        "InvalidObjectState" => {
            let advice = "restore it to a class of storage from which objects can be read";
            denied(403, format!("{key} is in an archive"), Some(advice))
        }
        _ => match refusal.failure {
            Failure::Again { why, after, advice } => {
                Failure::Again { why: format!("{why} ({code})"), after: *after, advice: *advice }
            }
            Failure::Denied { status, why, advice } => {
                Failure::Denied { status: *status, why: format!("{why} ({code})"), advice: *advice }
            }
            _ => Failure::Protocol(format!("it answers {status} ({code})")),
        },
    }
}

/// How far the clock of this host is off.
fn skew(error: &ServiceError) -> String {
    let far = error.server_time.and_then(|server| {
        let now = SystemTime::now();
        let ahead = now.duration_since(server).map(|by| (by, "ahead of"));
        ahead.or_else(|_| server.duration_since(now).map(|by| (by, "behind"))).ok()
    });
    match far {
        Some((by, way)) if by >= Duration::from_secs(1) => {
            let by = Duration::from_secs(by.as_secs());
            format!("the clock of this host is {} {way} that of the server", humantime::format_duration(by))
        }
        _ => "the clock of this host differs from that of the server".into(),
    }
}
