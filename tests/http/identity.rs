//! Recognizing whether a server still serves the same object.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use plyfs::source::SourceErrorKind::{Changed, Protocol};
use plyfs::source::http::{RemoteOptions, Strictness};
use plyfs::source::{Purpose, RemoteSource, StallKind};

use crate::harness::{Client, MIB, briefly, fails, identity, until};
use crate::server::{Object, Reply, Server};

fn options(strictness: Strictness) -> RemoteOptions {
    RemoteOptions { strictness, ..RemoteOptions::default() }
}

/// The image was replaced under the same URL during a read: no byte of the new one is used, and the read continues when
/// the original is back.
/// Guards H3.
#[test]
fn reads_wait_while_an_image_is_replaced_and_never_mix_the_two() {
    for new in [Object::seeded(MIB, 2), Object::new(MIB + 1), Object::new(MIB - 1)] {
        let object = Object::new(MIB);
        let server = Server::start(object.clone());
        let client = Client::new();
        let source = client.open(&server.url("/a"), &object);
        // The first transfer breaks in the middle; the rest would come from the new image.
        let replaced = new.clone();
        server.on(move |request| match request.number {
            0 => Reply::Cut(300_000),
            _ => Reply::Of(replaced.clone()),
        });
        let reading = client.start(&source, 0..MIB as u64, Purpose::Demand);
        let bytes = reading.bytes.clone();
        until("the read waits", || source.stall().is_some_and(|stall| stall.kind == StallKind::Changed));
        let asked = server.requests();
        let past_caches =
            asked.iter().filter(|request| request.header("cache-control") == Some("no-cache")).count();
        assert!(past_caches > 0, "requests ask for an answer past the caches");
        {
            let bytes = bytes.lock().unwrap();
            assert!(bytes.len() == 300_000 && **bytes == object.bytes[..300_000], "no byte of the new image");
        }
        server.on(|_| Reply::Object);
        assert!(client.wait(reading.done).unwrap() == *object.bytes);
        assert_eq!(source.stall(), None);
        // The read fails at its deadline.
        server.set_object(new.clone());
        let source = client.open_briefly(&server.url("/a"), &object);
        fails(client.read(&source, 0..10), Changed, &["restore the original image", "as a new base"]);
    }
}

#[test]
fn requests_are_conditional_on_the_etag() {
    let object = Object::new(MIB);
    let server = Server::start(object.clone());
    let client = Client::new();
    let source = client.open(&server.url("/a"), &object);
    client.read(&source, 0..10).unwrap();
    assert_eq!(server.requests()[0].header("if-match"), Some("\"v1\""));
    assert_eq!(
        server.requests()[0].header("if-range"),
        None,
        "it would return the whole file of another version"
    );
    // A server that fails every condition is asked without one.
    let server = Server::start(object.clone());
    let source = client.open(&server.url("/a"), &object);
    server
        .on(|request| if request.header("if-match").is_some() { Reply::status(412) } else { Reply::Object });
    assert!(client.read(&source, 0..10).unwrap() == object.bytes[..10]);
    assert!(client.read(&source, 10..20).unwrap() == object.bytes[10..20]);
    assert_eq!(server.requests().len(), 3);
    server.on(|_| Reply::status(412));
    let source = client.open_briefly(&server.url("/a"), &object);
    fails(client.read(&source, 0..10), Changed, &["412"]);
}

/// For weak ETags, and ETags that differ between the nodes of a CDN.
/// Guards H2.
#[test]
fn validators_are_compared_with_the_strictness_of_the_base() {
    use Strictness::{SizeOnly, Strong, Weak};
    const DATE: &str = "Mon, 02 Feb 2026 10:00:00 GMT";
    const LATER: &str = "Mon, 02 Feb 2026 10:00:01 GMT";
    // Pinned ETag and date, sent ETag and date; then the expected error for each strictness, "" for success.
    type Header = Option<&'static str>;
    type Row = ((Header, Header), (Header, Header), [(Strictness, &'static str); 3]);
    let rows: Vec<Row> = vec![
        (
            (Some("\"a\""), Some(DATE)),
            (Some("\"a\""), Some(DATE)),
            [(Strong, ""), (Weak, ""), (SizeOnly, "")],
        ),
        (
            (Some("\"a\""), Some(DATE)),
            (Some("\"a\""), Some(LATER)),
            [(Strong, ""), (Weak, ""), (SizeOnly, "")],
        ),
        (
            (Some("\"a\""), Some(DATE)),
            (Some("\"b\""), Some(DATE)),
            [(Strong, "changed: its ETag is \"b\", not \"a\""), (Weak, ""), (SizeOnly, "")],
        ),
        (
            (Some("\"a\""), Some(DATE)),
            (Some("\"b\""), Some(LATER)),
            [(Strong, "changed: ETag"), (Weak, "changed: ETag"), (SizeOnly, "")],
        ),
        (
            (Some("\"a\""), Some(DATE)),
            (Some("W/\"a\""), Some(LATER)),
            [(Strong, "protocol: weak ETag"), (Weak, ""), (SizeOnly, "")],
        ),
        (
            (Some("\"a\""), Some(DATE)),
            (None, Some(DATE)),
            [(Strong, "protocol: without the ETag"), (Weak, ""), (SizeOnly, "")],
        ),
        (
            (Some("\"a\""), Some(DATE)),
            (None, None),
            [
                (Strong, "protocol: without the ETag"),
                (Weak, "protocol: without ETag and Last-Modified"),
                (SizeOnly, ""),
            ],
        ),
        ((None, Some(DATE)), (None, Some(DATE)), [(Strong, ""), (Weak, ""), (SizeOnly, "")]),
        (
            (None, Some(DATE)),
            (None, Some(LATER)),
            [(Strong, "changed: Last-Modified"), (Weak, "changed: Last-Modified"), (SizeOnly, "")],
        ),
        (
            (None, Some(DATE)),
            (Some("\"a\""), None),
            [(Strong, "protocol: without Last-Modified"), (Weak, "protocol: without"), (SizeOnly, "")],
        ),
        ((Some("W/\"a\""), None), (Some("W/\"a\""), None), [(Weak, ""), (SizeOnly, ""), (SizeOnly, "")]),
        (
            (Some("W/\"a\""), None),
            (Some("W/\"b\""), None),
            [(Weak, "changed: ETag"), (SizeOnly, ""), (SizeOnly, "")],
        ),
    ];
    let bytes = Object::new(100_000);
    let object = |(etag, date): (Header, Header)| Object {
        etag: etag.map(str::to_owned),
        last_modified: date.map(str::to_owned),
        ..bytes.clone()
    };
    let client = Client::new();
    for (pinned, sent, results) in rows {
        for (strictness, expected) in results {
            let server = Server::start(object(sent));
            let options = if expected.is_empty() {
                options(strictness)
            } else {
                RemoteOptions { strictness, ..briefly() }
            };
            let source = client.open_with(&[&server.url("/a")], &object(pinned), options);
            let sent_object = object(sent);
            server.on(move |request| {
                let (first, last) = request.range().unwrap();
                let mut lines = vec![("Content-Range".to_owned(), format!("bytes {first}-{last}/100000"))];
                lines.extend(sent_object.etag.iter().map(|etag| ("ETag".to_owned(), etag.clone())));
                lines.extend(
                    sent_object.last_modified.iter().map(|at| ("Last-Modified".to_owned(), at.clone())),
                );
                Reply::Status(206, lines, sent_object.bytes[first as usize..=last as usize].to_vec())
            });
            let read = client.read(&source, 5..50);
            let case = format!("{pinned:?} {sent:?} {strictness:?}");
            match expected.split_once(": ") {
                None => {
                    assert!(read.unwrap_or_else(|e| panic!("{case}: {e}")) == bytes.bytes[5..50], "{case}")
                }
                Some(("changed", part)) => drop(fails(read, Changed, &[part])),
                Some((_, part)) => drop(fails(read, Protocol, &[part])),
            }
        }
    }
}

/// Adding a base fails when the server sends too little to recognize the object by.
/// Guards H2.
#[test]
fn a_base_needs_validators_that_suit_its_strictness() {
    use Strictness::{SizeOnly, Strong, Weak};
    let client = Client::new();
    let server = Server::start(Object::new(1000));
    let probe = |etag: Option<&str>, date: Option<&str>, strictness| {
        server.set_object(Object {
            etag: etag.map(str::to_owned),
            last_modified: date.map(str::to_owned),
            ..Object::new(1000)
        });
        client.probe_all(&[&server.url("/a")], strictness)
    };
    fails(probe(Some("W/\"a\""), None, Strong), Protocol, &["weak ETag", "weaker check"]);
    fails(probe(None, None, Strong), Protocol, &["neither ETag nor Last-Modified"]);
    fails(probe(None, None, Weak), Protocol, &["neither ETag nor Last-Modified"]);
    // The server's clock shows 12:00:00.
    let now = Some("Sat, 21 Nov 2026 12:00:00 GMT");
    fails(probe(None, now, Strong), Protocol, &["less than a second older than Date"]);
    fails(probe(None, Some("yesterday"), Strong), Protocol, &["less than a second older than Date"]);
    probe(None, Some("Sat, 21 Nov 2026 11:59:59 GMT"), Strong).unwrap();
    probe(Some("W/\"a\""), None, Weak).unwrap();
    probe(None, now, Weak).unwrap();
    probe(None, None, SizeOnly).unwrap();
}

/// The error names it.
#[test]
fn a_mirror_that_serves_another_build_is_skipped() {
    let object = Object::new(MIB);
    let (good, other) = (Server::start(object.clone()), Server::start(Object::seeded(MIB, 2)));
    let client = Client::new();
    let urls = [&*other.url("/a"), &*good.url("/a")];
    let source = client.open_with(&urls, &object, RemoteOptions::default());
    for at in 0..5 {
        let range = at * 1000..at * 1000 + 1000;
        assert!(
            client.read(&source, range.clone()).unwrap()
                == object.bytes[range.start as usize..range.end as usize]
        );
    }
    let asked = other.requests().len();
    assert!(asked <= 9, "its requests become rarer: {asked}");
    // If every mirror serves another object, the error says so.
    good.set_object(Object::seeded(MIB, 3));
    let source = client.open_with(&urls, &object, briefly());
    fails(client.read(&source, 0..10), Changed, &["ETag"]);
    // When a base is added, all mirrors must serve the same object.
    good.set_object(object.clone());
    let why = fails(client.probe_all(&urls, Strictness::Strong), Protocol, &["another object than"]);
    assert!(why.contains(&good.url("/a")) && why.contains(&other.url("/a")), "{why}");
    let why = fails(client.probe_all(&urls, Strictness::SizeOnly), Protocol, &["begins with other bytes"]);
    assert!(why.contains("digest"), "{why}");
    other.set_object(Object { etag: Some("\"its-own\"".into()), ..object.clone() });
    fails(client.probe_all(&urls, Strictness::Strong), Protocol, &["its ETag is"]);
    client.probe_all(&urls, Strictness::Weak).unwrap();
    other.set_object(object.clone());
    assert_eq!(client.probe_all(&urls, Strictness::Strong).unwrap().identity, identity(&object));
}

/// The redirector may have chosen a mirror that is behind.
#[test]
fn a_redirector_is_asked_again_if_its_target_serves_another_build() {
    let object = Object::new(MIB);
    let (good, other) = (Server::start(object.clone()), Server::start(Object::seeded(MIB, 2)));
    let redirector = Server::start(Object::new(0));
    let (first, second) = (other.url("/a"), good.url("/a"));
    let bad_only = Arc::new(AtomicBool::new(false));
    let only = bad_only.clone();
    redirector.on(move |request| {
        Reply::redirect(if request.number == 0 || only.load(Ordering::SeqCst) { &first } else { &second })
    });
    let client = Client::new();
    let source = client.open(&redirector.url("/image"), &object);
    assert!(client.read(&source, 0..1000).unwrap() == object.bytes[..1000]);
    assert_eq!(redirector.requests().len(), 2);
    bad_only.store(true, Ordering::SeqCst);
    let source = client.open_briefly(&redirector.url("/image"), &object);
    fails(client.read(&source, 0..1000), Changed, &["ETag"]);
}
