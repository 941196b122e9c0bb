//! What a server may answer, and what becomes of it.

use plyfs::source::SourceErrorKind::{Protocol, Unreachable};
use plyfs::source::http::RemoteOptions;
use plyfs::source::{Purpose, RemoteSource};

use crate::harness::{Client, MIB, briefly, fails, until};
use crate::server::{Object, Reply, Server};

#[test]
fn bytes_come_as_they_are_there() {
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
    assert_eq!(server.connections(), 1, "a connection is kept");
    assert_eq!(source.stall(), None);
}

/// An error page or an empty body was stored as data, and its checksum travelled with it and matched.
/// Guards H1.
#[test]
fn error_pages_and_empty_bodies_are_no_data() {
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
        let told = reply.clone();
        server.on(move |_| told.clone());
        let reading = client.start(&source, 0..10_000, Purpose::Demand);
        let bytes = reading.bytes.clone();
        fails(client.wait(reading.done), Protocol, &[what, "127.0.0.1", "check the server"]);
        assert!(bytes.lock().unwrap().is_empty(), "{reply:?} became data");
        // Without a deadline the read goes on when the answer is right.
        let source = client.open(&server.url("/a"), &object);
        let reading = client.start(&source, 0..10_000, Purpose::Demand);
        until("the read waits", || source.stall().is_some_and(|stall| stall.why.contains(what)));
        assert!(reading.bytes.lock().unwrap().is_empty(), "{reply:?} became data");
        server.on(|_| Reply::Object);
        assert!(client.wait(reading.done).unwrap() == object.bytes[..10_000], "after {reply:?}");
        assert_eq!(source.stall(), None);
        assert!(client.read(&source, 0..size as u64).unwrap() == *object.bytes, "after {reply:?}");
    }
}

/// The page of a proxy or a login with status 200 is nothing for ever: reads wait.
#[test]
fn a_page_with_status_200_is_waited_for() {
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
    // Who adds a base is told at once.
    server.on(|_| {
        Reply::Status(200, vec![("Content-Type".into(), "text/html".into())], b"<html>Back soon".to_vec())
    });
    let why = fails(client.probe_all(&[&server.url("/a")], Default::default()), Protocol, &[]);
    assert!(why.contains("neither ETag nor Last-Modified") || why.contains("whole file"), "{why}");
}

/// The server answers 200 with the whole file to a request for a range.
#[test]
fn a_whole_file_is_cut_to_the_range_or_refused() {
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
    // Of another version, the length of which is the same.
    let other = Object::seeded(24 * MIB, 2);
    server.set_object(other);
    let options =
        RemoteOptions { deadline: Some(std::time::Duration::from_millis(500)), ..Default::default() };
    let source = client.open_with(&[&server.url("/a")], &object, options);
    fails(client.read(&source, 0..10), Unreachable, &["status 200 and something else"]);
}

/// HEAD is refused on signed URLs, or says other things than GET.
#[test]
fn size_and_validator_are_learnt_from_a_ranged_get() {
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
    // Of a small one too.
    let small = Object::new(1000);
    server.set_object(small.clone());
    let probed = client.probe(&server.url("/a")).unwrap();
    assert!(probed.head == *small.bytes && probed.identity.size == 1000);
    // Where the whole of it is no more than was asked for, that is as good.
    server.on(|_| Reply::Whole);
    assert!(client.probe(&server.url("/a")).unwrap().head == *small.bytes);
    server.on(|_| Reply::Object);
    server.set_object(Object::new(0));
    fails(client.probe(&server.url("/a")), Protocol, &["it is empty"]);
}

/// gzip applied to ranges.
#[test]
fn compressed_ranges_are_refused_and_not_asked_for() {
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

/// 416 from a proxy cache: asked once more, past the caches.
#[test]
fn out_of_range_is_asked_again_past_the_caches() {
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
    // What it has is shorter: another object.
    server.on(|_| Reply::Status(416, vec![("Content-Range".into(), "bytes */50".into())], Vec::new()));
    let source = client.open_briefly(&server.url("/a"), &object);
    fails(
        client.read(&source, 100..200),
        plyfs::source::SourceErrorKind::Changed,
        &["it has 50 bytes, not 1048576"],
    );
}

/// A body without a length counts when its end was seen.
#[test]
fn chunks_are_as_good_as_a_length() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    server.on(|_| Reply::Chunked(false));
    assert!(client.read(&source, 100..500_000).unwrap() == object.bytes[100..500_000]);
    assert!(client.probe(&server.url("/a")).unwrap().head == object.bytes[..64 << 10]);
    assert_eq!(server.connections(), 1);
}

/// Glance: no ETag, no Accept-Ranges, HEAD 405; stores without random access answer 400, a queued image sends
/// nothing, a vanished one 204, another tenant's 404, a deactivated one 403; Content-MD5 is the whole image's.
#[test]
fn glance() {
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
fn what_is_no_url_is_refused() {
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
