//! Buckets: a server that verifies signatures by an implementation of its own, and refuses as Amazon S3 and radosgw do.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use hmac::{Hmac, Mac};
use plyfs::config::{HttpConfig, S3Config};
use plyfs::source::SourceErrorKind::{Changed, Denied, Protocol, Unreachable};
use plyfs::source::http::{
    Credentials, HttpIdentity, HttpSource, Proxies, RemoteOptions, Secret, SecretName, Section,
};
use plyfs::source::{Purpose, RemoteSource};
use sha2::{Digest, Sha256};

use crate::harness::{Client, MIB, briefly, fails, identity, quick, until};
use crate::server::{Object, Reply, Request, Server};

const BUCKET: &str = "images";
const REGION: &str = "eu-test-1";

fn entry(server: &Server) -> S3Config {
    S3Config {
        bucket: BUCKET.into(),
        endpoint: Some(server.url("")),
        region: Some(REGION.into()),
        style: None,
        keys_file: Some("/secrets/s3".into()),
        profile: None,
        keys_command: None,
        keys_environment: false,
        keys_instance: None,
        renew: None,
    }
}

/// The keys of a test; counts how often they are read.
#[derive(Default)]
struct TestKeys {
    text: Mutex<String>,
    reads: AtomicUsize,
}

impl TestKeys {
    fn with(id: &str, secret: &str) -> Arc<Self> {
        let keys = Self::default();
        keys.put(id, secret);
        Arc::new(keys)
    }

    fn put(&self, id: &str, secret: &str) {
        *self.text.lock().unwrap() = format!("aws_access_key_id={id}\naws_secret_access_key={secret}\n");
    }

    fn put_text(&self, text: &str) {
        *self.text.lock().unwrap() = text.into();
    }

    fn reads(&self) -> usize {
        self.reads.load(Ordering::SeqCst)
    }
}

impl Credentials for TestKeys {
    fn get(&self, name: SecretName) -> Result<Secret, String> {
        assert_eq!(name, SecretName { section: Section::S3, number: 0 });
        self.reads.fetch_add(1, Ordering::SeqCst);
        Ok(Secret::new(self.text.lock().unwrap().clone().into()))
    }
}

fn client(entry: S3Config, keys: Arc<TestKeys>) -> Client {
    Client::with_parts(&HttpConfig { s3: vec![entry], ..quick() }, Proxies::default(), keys)
}

fn mac(key: &[u8], text: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).unwrap();
    mac.update(text.as_bytes());
    mac.finalize().into_bytes().to_vec()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut out, byte| {
        let _ = write!(out, "{byte:02x}");
        out
    })
}

/// Verifies a request by <https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html>: by the bytes
/// that were sent, and not by what the client meant. `secrets` has the secret key of each id.
fn verify(request: &Request, secrets: &HashMap<&str, &str>, region: &str) -> Result<(), &'static str> {
    let Some(line) = request.header("authorization") else { return Err("AccessDenied") };
    let line = line.strip_prefix("AWS4-HMAC-SHA256 ").ok_or("InvalidArgument")?;
    let field = |name: &str| {
        line.split(',')
            .find_map(|part| part.trim().strip_prefix(name)?.strip_prefix('='))
            .ok_or("InvalidArgument")
    };
    let scope: Vec<&str> = field("Credential")?.split('/').collect();
    let [id, day, of_region, "s3", "aws4_request"] = scope[..] else {
        return Err("AuthorizationHeaderMalformed");
    };
    let secret = secrets.get(id).ok_or("InvalidAccessKeyId")?;
    if of_region != region {
        return Err("AuthorizationHeaderMalformed");
    }
    let date = request.header("x-amz-date").ok_or("AccessDenied")?;
    if !date.starts_with(day) {
        return Err("SignatureDoesNotMatch");
    }
    let signed = field("SignedHeaders")?;
    let names: Vec<&str> = signed.split(';').collect();
    let is_signed = |name: &str| names.contains(&name);
    // Host, and every header line of x-amz-, must be signed.
    let amz = request.headers.iter().map(|(name, _)| name.to_ascii_lowercase());
    if !is_signed("host") || amz.filter(|name| name.starts_with("x-amz-")).any(|name| !is_signed(&name)) {
        return Err("AccessDenied");
    }
    let (path, query) = request.target.split_once('?').unwrap_or((&request.target, ""));
    let mut pairs: Vec<&str> = query.split('&').filter(|pair| !pair.is_empty()).collect();
    pairs.sort_unstable();
    let lines: String =
        names.iter().map(|name| format!("{name}:{}\n", request.header(name).unwrap_or("").trim())).collect();
    let payload = request.header("x-amz-content-sha256").ok_or("MissingSecurityHeader")?;
    let canonical = format!("{}\n{path}\n{}\n{lines}\n{signed}\n{payload}", request.method, pairs.join("&"));
    let scope = format!("{day}/{region}/s3/aws4_request");
    let text = format!("AWS4-HMAC-SHA256\n{date}\n{scope}\n{}", hex(&Sha256::digest(canonical.as_bytes())));
    let key = [day, region, "s3", "aws4_request"]
        .iter()
        .fold(format!("AWS4{secret}").into_bytes(), |key, part| mac(&key, part));
    if hex(&mac(&key, &text)) == field("Signature")? { Ok(()) } else { Err("SignatureDoesNotMatch") }
}

/// As S3 refuses.
fn error(status: u16, code: &str, more: &str) -> Reply {
    let body =
        format!("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error><Code>{code}</Code>{more}</Error>");
    Reply::Status(status, vec![("Content-Type".into(), "application/xml".into())], body.into())
}

/// Answers requests with a right signature by these keys, and refuses all others as S3 does.
fn requires(secrets: &'static [(&'static str, &'static str)]) -> impl Fn(&Request) -> Reply {
    move |request| match verify(request, &secrets.iter().copied().collect(), REGION) {
        Ok(()) => Reply::Object,
        Err(code) => error(if code == "AuthorizationHeaderMalformed" { 400 } else { 403 }, code, ""),
    }
}

fn url(key: &str) -> String {
    format!("s3://{BUCKET}/{key}")
}

#[test]
fn a_request_has_a_signature_that_another_implementation_accepts() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let keys = TestKeys::with("AK", "SK/+secret");
    let client = client(entry(&server), keys.clone());
    server.on(requires(&[("AK", "SK/+secret")]));
    for key in ["debian.qcow2", "a//b c%20+=&@!$'()*,;:/\u{e4}\u{1f600}.img", "~x-._"] {
        let probed = client.probe(&url(key)).unwrap();
        assert_eq!(probed.identity.size, MIB as u64);
        let source = client.open(&url(key), &object);
        assert!(client.read(&source, 100..9000).unwrap() == object.bytes[100..9000], "{key}");
    }
    assert_eq!(keys.reads(), 1, "the keys are kept");
    // What a proxy may change is not signed.
    for request in server.requests() {
        assert!(request.target.starts_with("/images/"), "{}", request.target);
        assert!(
            request
                .header("authorization")
                .unwrap()
                .contains("SignedHeaders=host;x-amz-content-sha256;x-amz-date,")
        );
    }
    server.on(requires(&[("AK", "another")]));
    fails(
        client.probe(&url("a")),
        Denied,
        &["s3://images/a", "secret key does not fit", "SignatureDoesNotMatch"],
    );
}

#[test]
fn a_session_token_is_sent_and_signed() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let keys = Arc::new(TestKeys::default());
    keys.put_text(
        r#"{"Version": 1, "AccessKeyId": "AK", "SecretAccessKey": "SK", "SessionToken": "token/+="}"#,
    );
    let client = client(entry(&server), keys);
    server.on(|request| match request.header("x-amz-security-token") {
        Some("token/+=") => requires(&[("AK", "SK")])(request),
        _ => error(403, "InvalidToken", ""),
    });
    client.probe(&url("a")).unwrap();
    assert!(server.requests()[0].header("authorization").unwrap().contains("x-amz-security-token"));
}

#[test]
fn a_read_goes_on_when_refused_keys_are_renewed() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let keys = TestKeys::with("old", "SK");
    let client = client(entry(&server), keys.clone());
    let source = client.open(&url("a"), &object);
    server.on(|request| match verify(request, &HashMap::from([("old", "SK"), ("new", "SK2")]), REGION) {
        Ok(()) if request.header("authorization").unwrap().contains("Credential=old/") => {
            error(400, "ExpiredToken", "<Message>The provided token has expired.</Message>")
        }
        Ok(()) => Reply::Object,
        Err(code) => error(403, code, ""),
    });
    let reading = client.start(&source, 0..100, Purpose::Demand);
    until("the keys run out", || {
        source.stall().is_some_and(|stall| stall.why.contains("the keys ran out (ExpiredToken)"))
    });
    assert!(!reading.task.is_finished(), "it waits");
    keys.put("new", "SK2");
    assert!(client.wait(reading.done).unwrap() == object.bytes[..100]);
    assert!(source.stall().is_none());
}

/// Many readers, one reading of the keys.
#[test]
fn keys_that_run_out_are_renewed_before_and_once() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let keys = Arc::new(TestKeys::default());
    let printed = |id: &str, lasts: u64| {
        let end = SystemTime::now() + Duration::from_secs(lasts);
        let end = humantime::format_rfc3339_seconds(end);
        format!(r#"{{"AccessKeyId": "{id}", "SecretAccessKey": "SK", "Expiration": "{end}"}}"#)
    };
    // Less than a second is left.
    keys.put_text(&printed("first", 0));
    let client = client(entry(&server), keys.clone());
    let source = client.open(&url("a"), &object);
    server.on(requires(&[("first", "SK"), ("second", "SK")]));
    assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10], "the server decides what is valid");
    keys.put_text(&printed("second", 3600));
    until("the second keys are used", || {
        client.read(&source, 0..10).unwrap();
        server.requests().last().unwrap().header("authorization").unwrap().contains("Credential=second/")
    });
    assert_eq!(keys.reads(), 2);
    let readings: Vec<_> =
        (0..32).map(|n| client.start(&source, n * 1000..n * 1000 + 10, Purpose::Demand)).collect();
    for reading in readings {
        client.wait(reading.done).unwrap();
    }
    assert_eq!(keys.reads(), 2, "and no request was refused");
}

#[test]
fn each_refusal_says_what_is_wrong_and_shows_no_secret() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = client(entry(&server), TestKeys::with("AK", "SECRET"));
    for (status, code, kind, parts) in [
        (404, "NoSuchKey", Denied, ["bucket images has no object a", "check the key"]),
        (404, "NoSuchBucket", Denied, ["there is no bucket images", "endpoint"]),
        (403, "AccessDenied", Denied, ["the keys may not read a in bucket images", "s3:GetObject"]),
        (403, "InvalidAccessKeyId", Denied, ["the service does not know the keys", "[[http.s3]]"]),
        (403, "InvalidObjectState", Denied, ["is in an archive", "restore"]),
        (403, "RequestTimeTooSkewed", Unreachable, ["the clock of this host", "set the clock"]),
        (503, "SlowDown", Unreachable, ["503", "SlowDown"]),
    ] {
        server.on(move |_| {
            error(status, code, "<AWSAccessKeyId>AK</AWSAccessKeyId><StringToSign>SECRET</StringToSign>")
        });
        let text = fails(client.probe(&url("a")), kind, &["s3://images/a", code, parts[0], parts[1]]);
        assert!(!text.contains("SECRET") && !text.contains("AK"), "{text}");
    }
}

/// The clock of this host is wrong, and is set: nothing is lost.
#[test]
fn a_read_waits_while_the_clock_is_wrong_and_goes_on() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = client(entry(&server), TestKeys::with("AK", "SK"));
    let source = client.open(&url("a"), &object);
    server.on(|_| {
        let hour_ago = httpdate::fmt_http_date(SystemTime::now() - Duration::from_secs(3600));
        let Reply::Status(status, mut lines, body) = error(403, "RequestTimeTooSkewed", "") else {
            unreachable!()
        };
        lines.push(("Date".into(), hour_ago));
        Reply::Status(status, lines, body)
    });
    let reading = client.start(&source, 0..100, Purpose::Demand);
    until("the clock is wrong", || {
        source.stall().is_some_and(|stall| stall.why.contains("ahead of that of the server"))
    });
    server.on(requires(&[("AK", "SK")]));
    assert!(client.wait(reading.done).unwrap() == object.bytes[..100]);
}

#[test]
fn the_region_that_the_service_names_is_used_from_then_on() {
    for (status, more) in [
        (400, "<Message>The authorization header is malformed</Message><Region>eu-test-1</Region>"),
        (301, "<Endpoint>s3.eu-test-1.example.org</Endpoint><Region>eu-test-1</Region>"),
    ] {
        let object = Object::new(MIB);
        let server = Server::start(object.clone());
        let client = client(S3Config { region: None, ..entry(&server) }, TestKeys::with("AK", "SK"));
        server.on(move |request| match verify(request, &HashMap::from([("AK", "SK")]), REGION) {
            Ok(()) => Reply::Object,
            Err(_) => error(status, "AuthorizationHeaderMalformed", more),
        });
        client.probe(&url("a")).unwrap();
        assert_eq!(server.requests().len(), 2);
        let source = client.open(&url("b"), &object);
        client.read(&source, 0..10).unwrap();
        assert_eq!(
            server.requests().len(),
            3,
            "another object of the bucket is asked for in the right region"
        );
    }
}

#[test]
fn a_region_that_changes_each_time_is_no_endless_loop() {
    let server = Server::start(Object::new(MIB));
    let client = client(entry(&server), TestKeys::with("AK", "SK"));
    server.on(|request| {
        error(400, "AuthorizationHeaderMalformed", &format!("<Region>r-{}</Region>", request.number))
    });
    fails(client.probe(&url("a")), Protocol, &["AuthorizationHeaderMalformed"]);
    assert_eq!(server.requests().len(), 2);
}

/// Guards H6.
#[test]
fn a_redirect_to_another_host_gets_no_signature_and_one_in_the_service_gets_its_own() {
    let object = Object::new(MIB);
    let (server, other) = (Server::start(object.clone()), Server::start(object.clone()));
    let client = client(entry(&server), TestKeys::with("AK", "SK"));
    let (elsewhere, inside) = (other.url("/images/a"), server.url("/images/moved"));
    let refuse = requires(&[("AK", "SK")]);
    server.on(move |request| match request.target.as_str() {
        "/images/a" => Reply::Status(307, vec![("Location".into(), elsewhere.clone())], Vec::new()),
        "/images/b" => Reply::Status(307, vec![("Location".into(), inside.clone())], Vec::new()),
        _ => refuse(request),
    });
    client.probe(&url("a")).unwrap();
    assert_eq!(other.requests().len(), 1);
    let amz = |request: &Request| {
        request.headers.iter().any(|(name, _)| name.starts_with("x-amz-") || name == "authorization")
    };
    assert!(!other.requests().iter().any(amz), "{:?}", other.requests());
    // The signature is of the target.
    client.probe(&url("b")).unwrap();
    assert_eq!(server.requests().last().unwrap().target, "/images/moved");
}

/// Guards H11.
#[test]
fn a_base_reads_its_version_after_the_object_is_replaced() {
    let (old, new) = (Object::seeded(MIB, 1), Object::seeded(MIB, 2));
    let server = Server::start(old.clone());
    let client = client(entry(&server), TestKeys::with("AK", "SK"));
    let versions: &'static [(&str, Object)] =
        Box::leak(Box::new([("v/1+x", old.clone()), ("v2", new.clone())]));
    let serve = move |current: usize| {
        move |request: &Request| {
            if let Err(code) = verify(request, &HashMap::from([("AK", "SK")]), REGION) {
                return error(403, code, "");
            }
            let asked = request
                .target
                .split_once("?versionId=")
                .map(|(_, version)| version.replace("%2F", "/").replace("%2B", "+"));
            let at = asked
                .map_or(Some(current), |asked| versions.iter().position(|(version, _)| *version == asked));
            let Some(at) = at else { return error(404, "NoSuchVersion", "") };
            let (version, object) = &versions[at];
            match request.range() {
                Some((first, last)) => {
                    let last = last.min(object.bytes.len() as u64 - 1);
                    let range = format!("bytes {first}-{last}/{}", object.bytes.len());
                    let lines = [
                        ("Content-Range", range.as_str()),
                        ("ETag", object.etag.as_deref().unwrap()),
                        ("x-amz-version-id", version),
                    ];
                    let lines =
                        lines.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
                    Reply::Status(206, lines, object.bytes[first as usize..=last as usize].to_vec())
                }
                None => Reply::status(400),
            }
        }
    };
    server.on(serve(0));
    let probed = client.probe(&url("a")).unwrap();
    assert_eq!(probed.identity.version.as_deref(), Some("v/1+x"));
    let open = |identity: &HttpIdentity, options| client.http.open(&[url("a")], identity.clone(), options);
    let source: Arc<HttpSource> = open(&probed.identity, RemoteOptions::default());
    server.on(serve(1));
    assert!(client.read(&source, 5000..6000).unwrap() == old.bytes[5000..6000]);
    assert_eq!(client.probe(&url("a")).unwrap().identity.version.as_deref(), Some("v2"));
    let other = client.probe(&format!("{}?versionId=v2", url("a"))).unwrap();
    assert_eq!(other.identity.version.as_deref(), Some("v2"));
    // A version that was removed is not replaced by the object that is there now.
    let gone = HttpIdentity { version: Some("v0".into()), ..probed.identity.clone() };
    let source = open(&gone, briefly());
    fails(client.read(&source, 5000..6000), Denied, &["does not have this version", "NoSuchVersion"]);
}

/// Guards H2.
#[test]
fn a_replaced_object_of_a_bucket_without_versions_is_another_object() {
    let (old, new) = (Object::seeded(MIB, 1), Object::seeded(MIB, 2));
    let server = Server::start(old.clone());
    let client = client(entry(&server), TestKeys::with("AK", "SK"));
    server.on(|request| match requires(&[("AK", "SK")])(request) {
        Reply::Object => Reply::With(vec![("x-amz-version-id", Some("null".into()))]),
        other => other,
    });
    let probed = client.probe(&url("a")).unwrap();
    assert_eq!(probed.identity.version, None);
    let source = client.http.open(&[url("a")], probed.identity, briefly());
    server.set_object(new);
    fails(client.read(&source, 5000..6000), Changed, &["s3://images/a"]);
    server.set_object(old.clone());
    assert!(client.read(&source, 5000..6000).unwrap() == old.bytes[5000..6000], "the right object is back");
}

#[test]
fn the_etag_of_a_multipart_upload_is_a_validator_as_any_other() {
    let object = Object { etag: Some("\"9b2cf535f27731c974343645a3985328-12\"".into()), ..Object::new(MIB) };
    let server = Server::start(object.clone());
    let client = client(entry(&server), TestKeys::with("AK", "SK"));
    server.on(requires(&[("AK", "SK")]));
    let probed = client.probe(&url("a")).unwrap();
    assert_eq!(probed.identity, identity(&object));
    let source = client.open(&url("a"), &object);
    client.read(&source, 0..10).unwrap();
    let last = server.requests().pop().unwrap();
    assert_eq!(last.header("if-match"), object.etag.as_deref());
}

#[test]
fn a_public_bucket_needs_no_keys_and_a_private_one_says_so() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let keys = Arc::new(TestKeys::default());
    let client = client(S3Config { keys_file: None, ..entry(&server) }, keys.clone());
    client.probe(&url("a")).unwrap();
    assert!(server.requests()[0].header("authorization").is_none());
    server.on(requires(&[]));
    fails(
        client.probe(&url("a")),
        Denied,
        &["bucket images is not public", "give keys for the bucket in [[http.s3]]"],
    );
    assert_eq!(keys.reads(), 0);
}

#[test]
fn a_presigned_url_that_ran_out_is_called_so() {
    let server = Server::start(Object::new(MIB));
    server.on(|_| error(403, "AccessDenied", "<Message>Request has expired</Message>"));
    let client = Client::new();
    let query = "X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AK&X-Amz-Date=20260101T000000Z&X-Amz-Expires=600\
                 &X-Amz-SignedHeaders=host&X-Amz-Signature=5ecret";
    let text = fails(
        client.probe(&server.url(&format!("/images/a?{query}"))),
        Denied,
        &["its presigned URL ran out at 2026-01-01T00:10:00Z", "plyfs base set NAME --source URL"],
    );
    assert!(!text.contains("5ecret"), "{text}");
    assert!(server.requests()[0].target.contains("X-Amz-Signature=5ecret"), "the query is sent as it is");
}

/// A metadata service as EC2 has one (IMDSv2), for `keys_instance`.
#[test]
fn keys_of_the_machine_come_from_its_metadata_service_and_are_renewed() {
    let object = Object::new(MIB);
    let (server, metadata) = (Server::start(object.clone()), Server::start(Object::new(1)));
    let given = Arc::new(Mutex::new("first"));
    let current = given.clone();
    let session = Arc::new(AtomicUsize::new(0));
    let valid = session.clone();
    metadata.on(move |request| {
        let token = format!("metadata-token-{}", valid.load(Ordering::SeqCst));
        let has_token = request.header("x-aws-ec2-metadata-token") == Some(&*token);
        let body = match (request.method.as_str(), request.target.as_str()) {
            ("PUT", "/latest/api/token") => token,
            _ if !has_token => return Reply::status(401),
            ("GET", "/latest/meta-data/iam/security-credentials/") => "role".to_owned(),
            ("GET", "/latest/meta-data/iam/security-credentials/role") => {
                let end = humantime::format_rfc3339_seconds(SystemTime::now() + Duration::from_secs(3600));
                let id = *current.lock().unwrap();
                format!(
                    r#"{{"Code": "Success", "Type": "AWS-HMAC", "AccessKeyId": "{id}", "SecretAccessKey": "SK",
                        "Token": "session", "LastUpdated": "2026-01-01T00:00:00Z", "Expiration": "{end}"}}"#
                )
            }
            _ => return Reply::status(404),
        };
        Reply::Status(200, Vec::new(), body.into())
    });
    let config = S3Config { keys_file: None, keys_instance: Some(metadata.url("")), ..entry(&server) };
    let keys = Arc::new(TestKeys::default());
    let client = client(config, keys.clone());
    server.on(requires(&[("first", "SK")]));
    let source = client.open(&url("a"), &object);
    assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10]);
    assert_eq!(server.requests()[0].header("x-amz-security-token"), Some("session"));
    *given.lock().unwrap() = "second";
    server.on(requires(&[("second", "SK")]));
    assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10]);
    assert_eq!(keys.reads(), 0, "the helper process is not asked");
    // The machine was restored elsewhere: its metadata service does not know the token of before.
    session.store(1, Ordering::SeqCst);
    *given.lock().unwrap() = "third";
    server.on(requires(&[("third", "SK")]));
    let brief = client.open_briefly(&url("a"), &object);
    assert!(client.read(&brief, 0..10).unwrap() == object.bytes[..10]);
    drop(metadata);
    server.on(requires(&[("third", "SK")]));
    assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10], "keys that are valid are used on");
}

/// Keys that come slowly, all but the first time.
#[derive(Default)]
struct SlowKeys(AtomicUsize);

impl Credentials for SlowKeys {
    fn get(&self, _: SecretName) -> Result<Secret, String> {
        if self.0.fetch_add(1, Ordering::SeqCst) > 0 {
            std::thread::sleep(Duration::from_secs(4));
        }
        Ok(Secret::new(b"aws_access_key_id=AK\naws_secret_access_key=SK\n".to_vec()))
    }
}

#[test]
fn reads_go_on_with_keys_that_have_not_run_out_while_new_ones_are_read() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let (keys, entry) = (
        Arc::new(SlowKeys::default()),
        S3Config { renew: Some(Duration::from_millis(100)), ..entry(&server) },
    );
    let config = HttpConfig { s3: vec![entry], ..quick() };
    let client = Client::with_parts(&config, Proxies::default(), keys.clone());
    let source = client.open(&url("a"), &object);
    server.on(requires(&[("AK", "SK")]));
    until("the keys are read again", || {
        let begin = Instant::now();
        assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10]);
        assert!(begin.elapsed() < Duration::from_secs(2), "a read waits for new keys");
        keys.0.load(Ordering::SeqCst) > 1
    });
    client.read(&source, 0..10).unwrap();
}
