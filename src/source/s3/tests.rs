//! Tests without a server. `tests/http/s3.rs` has those with one.

use std::time::{Duration, SystemTime};

use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderValue};

use super::errors::{ServiceError, failure};
use super::keys::{parse, renew_after};
use super::place::{FIRST_REGION, Object, Service, check_url};
use super::presigned;
use crate::config::{S3Config, S3Style};
use crate::source::http::{Failure, Refusal, Secret};

fn entry(endpoint: Option<&str>, style: Option<S3Style>) -> S3Config {
    S3Config {
        bucket: "*".into(),
        endpoint: endpoint.map(Into::into),
        region: None,
        style,
        keys_file: None,
        profile: None,
        keys_command: None,
        keys_environment: false,
        keys_instance: None,
        renew: None,
    }
}

#[test]
fn an_object_is_requested_where_its_service_has_it() {
    let minio = Some("https://s3.example.org:9000");
    for (text, endpoint, style, url) in [
        ("s3://b/k", None, None, "https://b.s3.eu-west-1.amazonaws.com/k"),
        ("S3://b/a//b c%.img", None, None, "https://b.s3.eu-west-1.amazonaws.com/a//b%20c%25.img"),
        ("s3://b.c/k", None, None, "https://s3.eu-west-1.amazonaws.com/b.c/k"),
        ("s3://b/k", None, Some(S3Style::Path), "https://s3.eu-west-1.amazonaws.com/b/k"),
        ("s3://b/k/\u{e4}", minio, None, "https://s3.example.org:9000/b/k/%C3%A4"),
        ("s3://b/k", minio, Some(S3Style::Virtual), "https://b.s3.example.org:9000/k"),
        ("s3://b/k#1+2", Some("http://127.0.0.1:1"), None, "http://127.0.0.1:1/b/k%231%2B2"),
        ("s3://b/k?versionId=a/b", minio, None, "https://s3.example.org:9000/b/k?versionId=a%2Fb"),
    ] {
        let object = Object::parse(text).unwrap();
        let service = Service::new(Some(&entry(endpoint, style))).unwrap();
        let made = service.url(&object, object.version.as_deref(), "eu-west-1").unwrap();
        assert_eq!(made.as_str(), url, "{text}");
        assert_eq!(
            service.region_of(&object.bucket, &made, "eu-west-1").as_deref(),
            Some("eu-west-1"),
            "{url}"
        );
    }
    let object = Object::parse("s3://b/k").unwrap();
    let china = Service::new(None).unwrap().url(&object, None, "cn-north-1").unwrap();
    assert_eq!(china.as_str(), "https://b.s3.cn-north-1.amazonaws.com.cn/k");
}

#[test]
fn a_url_that_names_no_object_is_refused_without_its_secrets() {
    for (text, why) in [
        ("s3://b", "names no object"),
        ("s3://b/", "names no object"),
        ("s3://b/folder/", "names no object"),
        ("s3:///k", "names no bucket"),
        ("s3://b c/k", "names no bucket"),
        ("s3://id:secret@b/k", "[[http.s3]]"),
        ("s3://b/a/../k", ". or .."),
        ("s3://b/./k", ". or .."),
        ("s3://b/k\n", "control characters"),
        ("s3://b/k?versionId=", "?versionId=ID"),
        ("s3://b/k?versionId=null", "?versionId=ID"),
        ("s3://b/k?token=secret", "?versionId=ID"),
    ] {
        let error = check_url(text).expect_err(text).to_string();
        assert!(error.contains(why) && !error.contains("secret") && !error.contains('\n'), "{text}: {error}");
    }
}

/// Guards H6.
#[test]
fn keys_sign_at_no_other_host_whatever_a_redirect_says() {
    let url = |text: &str| Url::parse(text).unwrap();
    let amazon = Service::new(None).unwrap();
    for (text, region) in [
        ("https://b.s3.amazonaws.com/k", Some(FIRST_REGION)),
        ("https://b.s3-eu-west-1.amazonaws.com/k", Some("eu-west-1")),
        ("https://b.s3.dualstack.eu-west-1.amazonaws.com/k", Some("eu-west-1")),
        ("https://s3.eu-west-1.amazonaws.com/b/k", Some("eu-west-1")),
        ("https://s3.eu-west-1.amazonaws.com/c/k", None),
        ("https://s3.eu-west-1.amazonaws.com/bb/k", None),
        ("https://c.s3.eu-west-1.amazonaws.com/b/k", None),
        ("http://b.s3.eu-west-1.amazonaws.com/k", None),
        ("https://b.s3.eu-west-1.amazonaws.com:8443/k", None),
        ("https://b.s3.eu-west-1.amazonaws.com.evil.example/k", None),
        ("https://b.s3.evil.example/k", None),
        ("https://b.s3.a.b.amazonaws.com/k", None),
        ("https://amazonaws.com/b/k", None),
        ("https://127.0.0.1/b/k", None),
    ] {
        assert_eq!(amazon.region_of("b", &url(text), "other").as_deref(), region, "{text}");
    }
    let own = Service::new(Some(&entry(Some("https://s3.example.org"), None))).unwrap();
    for (text, is_own) in [
        ("https://s3.example.org/b/k", true),
        ("https://b.s3.example.org/k", true),
        ("https://s3.example.org/c/k", false),
        ("https://c.s3.example.org/b/k", false),
        ("http://s3.example.org/b/k", false),
        ("https://s3.example.org:444/b/k", false),
        ("https://evils3.example.org/b/k", false),
        // A server may decode the slash, and leave the bucket.
        ("https://s3.example.org/b/..%2fc/k", false),
        ("https://s3.example.org/b/%2e%2e%2fc/k", false),
        ("https://b.s3.eu-west-1.amazonaws.com/k", false),
    ] {
        assert_eq!(own.region_of("b", &url(text), "r").is_some(), is_own, "{text}");
    }
}

#[test]
fn keys_come_in_the_forms_of_the_aws_cli_and_no_error_shows_them() {
    let read = |text: &str| parse(&Secret::new(text.into()), "default");
    let keys = read("aws_access_key_id = AK\naws_secret_access_key=SK\n").unwrap();
    assert_eq!((keys.access_key_id.as_str(), keys.secret_access_key.as_str()), ("AK", "SK"));
    let sections = "# one\n[other]\naws_access_key_id=X\naws_secret_access_key=Y\n\n[default]\n\
                    AWS_ACCESS_KEY_ID=AK\naws_secret_access_key = S=K/+\naws_session_token=T\nregion=r\n";
    let keys = read(sections).unwrap();
    assert_eq!(keys.secret_access_key, "S=K/+");
    assert_eq!(keys.session_token.as_deref(), Some("T"));
    let keys = parse(&Secret::new(sections.into()), "other").unwrap();
    assert_eq!((keys.access_key_id.as_str(), keys.session_token), ("X", None));
    let json = r#"{"Version": 1, "AccessKeyId": "AK", "SecretAccessKey": "SK", "SessionToken": "T",
                   "Expiration": "2026-01-31T12:00:00Z"}"#;
    let keys = read(json).unwrap();
    let end = keys.expires_in.unwrap().as_system_time();
    assert_eq!(end.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs(), 1_769_860_800);
    for (text, why) in [
        ("", "no section [default]"),
        ("[other]\naws_access_key_id=hidden", "no section [default]"),
        ("hidden", "name = value"),
        ("aws_access_key_id=hidden", "empty"),
        ("aws_access_key_id=hid den\naws_secret_access_key=hidden", "white space"),
        ("{\"AccessKeyId\": \"hidden\"}", "SecretAccessKey"),
        ("{hidden", "SecretAccessKey"),
        (r#"{"AccessKeyId": "hidden", "SecretAccessKey": "hidden", "Expiration": "hidden"}"#, "Expiration"),
    ] {
        let error = read(text).expect_err(text);
        assert!(error.contains(why) && !error.contains("hidden"), "{text}: {error}");
    }
}

#[test]
fn keys_are_renewed_before_they_run_out() {
    let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
    for (lasts, after) in [(36_000, 35_700), (1000, 900), (10, 9), (1, 1), (0, 1)] {
        let end = now + Duration::from_secs(lasts);
        assert_eq!(renew_after(end, now).as_secs(), after, "{lasts}");
    }
    assert_eq!(renew_after(now - Duration::from_secs(5), now).as_secs(), 1);
}

fn body(code: &str) -> String {
    format!("<?xml version=\"1.0\"?>\n<Error><Code>{code}</Code><Message>of s3cret</Message></Error>")
}

fn words(code: &str, status: u16, signed: bool) -> Failure {
    let object = Object::parse("s3://images/debian.qcow2").unwrap();
    let (url, headers) = (Url::parse("https://h/").unwrap(), HeaderMap::new());
    let text = body(code);
    let denied = Failure::Denied { status, why: format!("it forbids it ({status})"), advice: None };
    let refusal = Refusal { url: &url, status, headers: &headers, text: text.as_bytes(), failure: &denied };
    failure(&object, &ServiceError::of(&headers, text.as_bytes()), &refusal, signed)
}

#[test]
fn the_errors_of_a_service_are_told_apart_in_words() {
    for (code, status, signed, part) in [
        ("NoSuchKey", 404, true, "bucket images has no object debian.qcow2 (NoSuchKey)"),
        ("NoSuchBucket", 404, true, "there is no bucket images (NoSuchBucket)"),
        ("NoSuchVersion", 404, true, "does not have this version"),
        (
            "AccessDenied",
            403,
            true,
            "the keys may not read debian.qcow2 in bucket images, or it is not there (AccessDenied)",
        ),
        ("AccessDenied", 403, false, "is not public, and the request has no keys"),
        ("ExpiredToken", 400, true, "the keys ran out (ExpiredToken)"),
        ("InvalidAccessKeyId", 403, true, "does not know the keys"),
        ("SignatureDoesNotMatch", 403, true, "the secret key does not fit"),
        ("InvalidObjectState", 403, true, "is in an archive"),
        ("RequestTimeTooSkewed", 403, true, "the clock of this host"),
        ("SomethingNew", 403, true, "it forbids it (403) (SomethingNew)"),
        ("<b>s3cret</b>", 403, true, "it forbids it (403)"),
    ] {
        let found = words(code, status, signed);
        assert!(found.why().contains(part) && !found.why().contains("s3cret"), "{code}: {found:?}");
    }
    assert!(matches!(words("RequestTimeTooSkewed", 403, true), Failure::Again { advice: Some(advice), .. }
        if advice.contains("set the clock")));
}

#[test]
fn the_difference_of_the_clocks_is_in_the_message() {
    let object = Object::parse("s3://b/k").unwrap();
    let url = Url::parse("https://h/").unwrap();
    let server = SystemTime::now() - Duration::from_secs(3600);
    let date = HeaderValue::from_str(&httpdate::fmt_http_date(server)).unwrap();
    let headers = HeaderMap::from_iter([(reqwest::header::DATE, date)]);
    let text = body("RequestTimeTooSkewed");
    let denied = Failure::Denied { status: 403, why: "it forbids it (403)".into(), advice: None };
    let refusal =
        Refusal { url: &url, status: 403, headers: &headers, text: text.as_bytes(), failure: &denied };
    let found = failure(&object, &ServiceError::of(&headers, text.as_bytes()), &refusal, true);
    assert!(found.why().contains("is 1h") && found.why().contains("ahead of"), "{}", found.why());
}

#[test]
fn a_region_that_no_host_can_have_is_not_believed() {
    for (text, region) in [
        ("<Error><Code>PermanentRedirect</Code><Region>eu-west-1</Region></Error>", Some("eu-west-1")),
        ("<Error><Region>eu-west-1.evil.example/</Region></Error>", None),
        ("<Error><Region></Region></Error>", None),
        ("nothing", None),
    ] {
        assert_eq!(ServiceError::of(&HeaderMap::new(), text.as_bytes()).region.as_deref(), region, "{text}");
    }
    let headers = HeaderMap::from_iter([(
        reqwest::header::HeaderName::from_static("x-amz-bucket-region"),
        HeaderValue::from_static("eu-north-1"),
    )]);
    assert_eq!(ServiceError::of(&headers, b"").region.as_deref(), Some("eu-north-1"));
}

#[test]
fn a_presigned_url_is_known_by_its_query() {
    let url = |query: &str| Url::parse(&format!("https://b.s3.amazonaws.com/k?{query}")).unwrap();
    let signed =
        "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Date=20261130T140000Z&X-Amz-Expires=600&X-Amz-Signature=0a";
    assert!(presigned(&url(signed)).is_some());
    assert!(presigned(&url("X-Amz-Date=20261130T140000Z&X-Amz-Expires=600")).is_none());
    assert!(presigned(&url("token=1")).is_none());
    // Times that no message could show.
    for date in ["19600101T000000Z", "-00100101T000000Z"] {
        assert!(presigned(&url(&signed.replace("20261130T140000Z", date))).is_none(), "{date}");
    }
}
