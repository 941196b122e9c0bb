//! Answers of a server, right and wrong, and how they are handled.

use plyfs::source::SourceErrorKind::{Protocol, Unreachable};
use plyfs::source::http::RemoteOptions;
use plyfs::source::{Purpose, RemoteSource};

use crate::harness::{Client, MIB, briefly, fails, until};
use crate::server::{Object, Reply, Server};

#[test]
fn ranges_are_read_over_one_connection() {
    let object = Object::new(3 * MIB + 17);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/image.raw"), &object);
    assert_eq!(source.size(), object.bytes.len() as u64);
    let end = object.bytes.len() as u64;
    for range in [0..1, 0..end, 5..70_000, end - 1..end, MIB as u64 - 1..2 * MIB as u64 + 1] {
        let bytes = client.read(&source, range.clone()).unwrap();
        assert!(bytes == object.bytes[range.start as usize..range.end as usize], "{range:?}");
    }
    assert_eq!(server.connections(), 1, "the connection is reused");
    assert_eq!(source.stall(), None);
}

/// An error page or an empty body was stored as data, with a checksum that matched.
/// Guards H1.
#[test]
fn error_pages_and_empty_bodies_are_not_taken_for_data() {
    let object = Object::new(MIB);
    let size = object.bytes.len();
    let range = "bytes 0-9999/1048576";
    let line = |name: &'static str, value: &str| (name, Some(value.to_owned()));
    let page = b"<html>Internal error</html>".to_vec();
    for (reply, what) in [
        (Reply::status(204), "answers 204"),
        (Reply::status(304), "answers 304"),
        (Reply::status(201), "201"),
        (Reply::status(400), "400"),
        (Reply::status(418), "418"),
        (Reply::status(302), "without saying where to"),
        (Reply::With(vec![("Content-Range", None)]), "without Content-Range"),
        (Reply::With(vec![line("Content-Range", "bytes 0-9999/*")]), "how large the whole is"),
        (Reply::With(vec![line("Content-Range", "bytes 1-10000/1048576")]), "bytes 1 to 10000"),
        (Reply::With(vec![line("Content-Range", "bytes 0-9998/1048576")]), "bytes 0 to 9998"),
        (Reply::With(vec![line("Content-Range", "bytes 0-10000/1048576")]), "bytes 0 to 10000"),
        (Reply::With(vec![line("Content-Range", "bytes 9999-0/1048576")]), "is none"),
        (Reply::With(vec![line("Content-Range", "bytes 0-9999/5")]), "is none"),
        (Reply::With(vec![line("Content-Range", "lines 0-9999/1048576")]), "is none"),
        (Reply::With(vec![line("Content-Range", "bytes -1-9999/1048576")]), "is none"),
        (Reply::With(vec![line("Content-Range", "bytes 0-9999/99999999999999999999")]), "is none"),
        (
            Reply::With(vec![line("Content-Type", "multipart/byteranges; boundary=THIS")]),
            "multipart/byteranges",
        ),
        (
            Reply::Status(
                206,
                vec![("Content-Range".into(), range.into()), ("ETag".into(), "\"v1\"".into())],
                page.clone(),
            ),
            "27 bytes for a range of 10000",
        ),
        (
            Reply::Status(
                206,
                vec![("Content-Range".into(), range.into()), ("ETag".into(), "\"v1\"".into())],
                Vec::new(),
            ),
            "0 bytes for a range of 10000",
        ),
        (Reply::Chunked(true), "more bytes than the range has"),
    ] {
        let server = Server::start(object.clone());
        let client = Client::new();
        let source = client.open_briefly(&server.url("/a"), &object);
        let wrong = reply.clone();
        server.on(move |_| wrong.clone());
        let reading = client.start(&source, 0..10_000, Purpose::Demand);
        let bytes = reading.bytes.clone();
        fails(client.wait(reading.done), Protocol, &[what, "127.0.0.1", "check the server"]);
        assert!(bytes.lock().unwrap().is_empty(), "{reply:?} was taken for data");
        // Without a deadline the read continues once the answer is right.
        let source = client.open(&server.url("/a"), &object);
        let reading = client.start(&source, 0..10_000, Purpose::Demand);
        until("the read waits", || source.stall().is_some_and(|stall| stall.why.contains(what)));
        assert!(reading.bytes.lock().unwrap().is_empty(), "{reply:?} was taken for data");
        server.on(|_| Reply::Object);
        assert!(client.wait(reading.done).unwrap() == object.bytes[..10_000], "after {reply:?}");
        assert_eq!(source.stall(), None);
        assert!(client.read(&source, 0..size as u64).unwrap() == *object.bytes, "after {reply:?}");
    }
}

/// A proxy's or a login page with status 200 is temporary: reads wait.
#[test]
fn reads_wait_while_a_page_with_status_200_is_served() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    server.on(|_| {
        Reply::Status(200, vec![("Content-Type".into(), "text/html".into())], b"<html>Back soon".to_vec())
    });
    let reading = client.start(&source, 0..10_000, Purpose::Demand);
    server.wait_for_requests(3);
    let stall = source.stall().expect("a read waits");
    assert!(stall.why.contains("text/html, 15 bytes"), "{}", stall.why);
    assert!(reading.bytes.lock().unwrap().is_empty());
    server.on(|_| Reply::Object);
    assert!(client.wait(reading.done).unwrap() == object.bytes[..10_000]);
    assert_eq!(source.stall(), None);
    // Adding a base fails at once.
    server.on(|_| {
        Reply::Status(200, vec![("Content-Type".into(), "text/html".into())], b"<html>Back soon".to_vec())
    });
    let why = fails(client.probe_all(&[&server.url("/a")], Default::default()), Protocol, &[]);
    assert!(why.contains("neither ETag nor Last-Modified") || why.contains("whole file"), "{why}");
}

/// The server answers 200 with the whole file to a request for a range.
#[test]
fn a_whole_file_is_skipped_to_the_range_or_refused() {
    let object = Object::new(24 * MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    server.on(|_| Reply::Whole);
    for range in [0..100_000, 5000..300_000, MIB as u64..MIB as u64 + 10] {
        let bytes = client.read(&source, range.clone()).unwrap();
        assert!(bytes == object.bytes[range.start as usize..range.end as usize], "{range:?}");
    }
    assert!(server.body_bytes() < 60 * MIB as u64, "the rest is not fetched: {}", server.body_bytes());
    let far = 5 * MIB as u64..5 * MIB as u64 + 10;
    let source = client.open_briefly(&server.url("/a"), &object);
    fails(client.read(&source, far), Protocol, &["whole file (status 200)"]);
    fails(client.probe(&server.url("/a")), Protocol, &["whole file (status 200)"]);
    // A whole file of another version with the same length.
    let other = Object::seeded(24 * MIB, 2);
    server.set_object(other);
    let options =
        RemoteOptions { deadline: Some(std::time::Duration::from_millis(500)), ..Default::default() };
    let source = client.open_with(&[&server.url("/a")], &object, options);
    fails(client.read(&source, 0..10), Unreachable, &["status 200 and something else"]);
}

/// HEAD is refused for signed URLs, or its answer differs from that of GET.
#[test]
fn size_and_validator_are_read_from_a_ranged_get() {
    let object = Object::new(3 * MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let probed = client.probe(&server.url("/a?X-Signature=abc")).unwrap();
    assert_eq!(probed.identity, crate::harness::identity(&object));
    assert!(probed.head == object.bytes[..64 << 10]);
    let requests = server.requests();
    assert_eq!(requests.len(), 1, "one small request");
    assert_eq!(requests[0].method, "GET");
    assert_eq!(requests[0].target, "/a?X-Signature=abc");
    assert_eq!(requests[0].header("range"), Some("bytes=0-65535"));
    assert_eq!(requests[0].header("user-agent"), Some(concat!("plyfs/", env!("CARGO_PKG_VERSION"))));
    assert_eq!(server.body_bytes(), 64 << 10);
    // A file smaller than the first range.
    let small = Object::new(1000);
    server.set_object(small.clone());
    let probed = client.probe(&server.url("/a")).unwrap();
    assert!(probed.head == *small.bytes && probed.identity.size == 1000);
    // The whole file is accepted if it is no larger than the range.
    server.on(|_| Reply::Whole);
    assert!(client.probe(&server.url("/a")).unwrap().head == *small.bytes);
    server.on(|_| Reply::Object);
    server.set_object(Object::new(0));
    fails(client.probe(&server.url("/a")), Protocol, &["it is empty"]);
}

/// gzip applied to ranges.
#[test]
fn compressed_ranges_are_neither_requested_nor_accepted() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    client.read(&source, 0..10).unwrap();
    assert_eq!(server.requests()[0].header("accept-encoding"), Some("identity"));
    server.on(|_| Reply::With(vec![("Content-Encoding", Some("gzip".into()))]));
    let source = client.open_briefly(&server.url("/a"), &object);
    fails(client.read(&source, 0..10), Protocol, &["gzip", "Content-Encoding"]);
    fails(client.probe(&server.url("/a")), Protocol, &["gzip", "Content-Encoding"]);
    server.on(|_| Reply::With(vec![("Content-Encoding", Some("identity".into()))]));
    let source = client.open(&server.url("/a"), &object);
    assert!(client.read(&source, 3..100).unwrap() == object.bytes[3..100]);
}

/// A 416 may come from a proxy's cache: the request is repeated once with `no-cache`.
#[test]
fn a_416_is_asked_again_past_the_caches() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    server.on(|request| match request.header("cache-control") {
        Some("no-cache") => Reply::Object,
        _ => Reply::Status(416, vec![("Content-Range".into(), "bytes */1048576".into())], Vec::new()),
    });
    assert!(client.read(&source, 100..200).unwrap() == object.bytes[100..200]);
    assert_eq!(server.requests().len(), 2);
    assert!(client.probe(&server.url("/a")).unwrap().head == object.bytes[..64 << 10]);
    server.on(|_| Reply::status(416));
    let source = client.open_briefly(&server.url("/a"), &object);
    fails(client.read(&source, 100..200), Protocol, &["bytes 100 to 199 are outside (416)"]);
    // The server has a shorter file: another object.
    server.on(|_| Reply::Status(416, vec![("Content-Range".into(), "bytes */50".into())], Vec::new()));
    let source = client.open_briefly(&server.url("/a"), &object);
    fails(
        client.read(&source, 100..200),
        plyfs::source::SourceErrorKind::Changed,
        &["it has 50 bytes, not 1048576"],
    );
}

/// A chunked body is complete when its last chunk has been received.
#[test]
fn chunked_bodies_are_read() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    server.on(|_| Reply::Chunked(false));
    assert!(client.read(&source, 100..500_000).unwrap() == object.bytes[100..500_000]);
    assert!(client.probe(&server.url("/a")).unwrap().head == object.bytes[..64 << 10]);
    assert_eq!(server.connections(), 1);
}

/// Glance sends no ETag and no Accept-Ranges, and answers HEAD with 405. A store without random access answers 400; a
/// queued image sends nothing, a vanished one 204, another tenant's 404, a deactivated one 403. Content-MD5 is that of
/// the whole image.
#[test]
fn answers_of_glance_are_understood() {
    use plyfs::source::SourceErrorKind::{Changed, Denied};
    use plyfs::source::http::Strictness;
    let object = Object { etag: None, last_modified: None, ..Object::new(MIB) };
    let server = Server::start(object.clone());
    let client = Client::new();
    let url = server.url("/v2/images/71c675ab/file");
    server.on(|_| {
        Reply::With(vec![("Accept-Ranges", None), ("Content-MD5", Some("1B2M2Y8AsgTpgAmY7PhCfg==".into()))])
    });
    fails(client.probe(&url), Protocol, &["neither ETag nor Last-Modified", "digest"]);
    fails(client.probe_all(&[&url], Strictness::Weak), Protocol, &["neither ETag nor Last-Modified"]);
    let identity = client.probe_all(&[&url], Strictness::SizeOnly).unwrap().identity;
    assert_eq!((identity.size, identity.etag, identity.last_modified), (MIB as u64, None, None));
    let options = RemoteOptions { strictness: Strictness::SizeOnly, ..briefly() };
    let open = || client.open_with(&[&url], &object, options.clone());
    let source = open();
    assert!(client.read(&source, 7..100_000).unwrap() == object.bytes[7..100_000]);
    let text = b"{\"message\": \"Getting images randomly from this store is not supported.\"}".to_vec();
    server.on(move |_| Reply::Status(400, Vec::new(), text.clone()));
    fails(client.read(&open(), 0..10), Protocol, &["Glance whose store has no random access"]);
    fails(client.probe(&url), Protocol, &["Glance whose store has no random access"]);
    server.on(|_| Reply::status(204));
    fails(client.read(&open(), 0..10), Protocol, &["204"]);
    server.on(|_| Reply::status(404));
    fails(client.read(&open(), 0..10), Denied, &["404"]);
    server.on(|_| Reply::status(403));
    fails(client.read(&open(), 0..10), Denied, &["403"]);
    server.on(|_| Reply::Close);
    fails(client.probe_all(&[&url], Strictness::SizeOnly), Unreachable, &["check the server"]);
    server.on(|_| Reply::Object);
    assert!(client.read(&open(), 0..10).unwrap() == object.bytes[..10]);
    server.set_object(Object { etag: None, last_modified: None, ..Object::new(MIB - 1) });
    fails(client.read(&open(), 0..10), Changed, &["it has 1048575 bytes, not 1048576"]);
}

#[test]
fn malformed_urls_are_refused() {
    for (url, why) in [
        ("", "not a URL"),
        ("debian.qcow2", "not a URL"),
        ("/images/a", "not a URL"),
        ("ftp://h/a", "neither http nor https"),
        ("file:///etc/passwd", "neither http nor https"),
        ("https://", "not a URL"),
        ("https://h/a b", "white space"),
        ("https://h/a\n", "white space"),
        ("https://h/\u{7f}", "control"),
        (&format!("https://h/{}", "a".repeat(5000)), "longer than 4096"),
    ] {
        fails(plyfs::source::http::check_url(url), Protocol, &[why]);
    }
    plyfs::source::http::check_url("https://user:password@[::1]:8443/a?b#c").unwrap();
}
