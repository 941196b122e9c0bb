//! Objects with a proof: servers that send wrong bytes, of the image and of the proof.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use plyfs::bases::proofs::{ProofPages, ProvenRemote};
use plyfs::format::proof::{Builder, GROUP, Layout, ProofHeader};
use plyfs::source::SourceErrorKind::{Protocol, Unreachable};
use plyfs::source::http::peer::ContentName;
use plyfs::source::http::{HttpIdentity, RemoteOptions, Strictness};
use plyfs::source::pages::ProvenPages;
use plyfs::source::{Purpose, RemoteSource, SourceError};
use tokio::task::JoinHandle;

use crate::harness::{Client, briefly, fails, identity, until};
use crate::server::{Object, Reply, Request, Server};

/// 66 groups, of which the last is short: two levels of pages.
const SIZE: usize = 65 * GROUP as usize + 1000;
/// Flips of the suite; PLYFS_FLIPS=10000 is the long form.
const FLIPS: u64 = 300;

fn flips() -> u64 {
    std::env::var("PLYFS_FLIPS").map_or(FLIPS, |count| count.parse().expect("PLYFS_FLIPS is a number"))
}

/// The proof of some bytes, and their hash.
fn proof_of(bytes: &[u8]) -> (Vec<u8>, [u8; 32]) {
    let mut builder = Builder::new(bytes.len() as u64);
    let mut proof = vec![0; builder.layout().proof_size() as usize];
    builder
        .update::<()>(bytes, &mut |offset, page| {
            proof[offset as usize..offset as usize + page.len()].copy_from_slice(page);
            Ok(())
        })
        .unwrap();
    let header = ProofHeader { size: bytes.len() as u64, root: builder.root().unwrap() };
    let head = header.encode();
    proof[..head.len()].copy_from_slice(&head);
    assert_eq!(header.root, *blake3::hash(bytes).as_bytes());
    (proof, header.root)
}

/// An object, and a source of it at URLs whose proof is at other URLs.
fn proven(
    client: &Client,
    object: &Object,
    urls: &[String],
    proofs: &[String],
    options: RemoteOptions,
) -> Arc<ProvenRemote> {
    let (proof, root) = proof_of(&object.bytes);
    let size = HttpIdentity { size: proof.len() as u64, etag: None, last_modified: None, version: None };
    let of_proof = RemoteOptions { strictness: Strictness::SizeOnly, ..options.clone() };
    let remote = client.http.open(urls, identity(object), options);
    let of = (root, object.bytes.len() as u64);
    let pages =
        ProofPages::new(of, Arc::new(ProvenPages::new(64)), None, client.http.open(proofs, size, of_proof));
    Arc::new(ProvenRemote::new(remote, pages, proofs.to_vec()))
}

fn served(object: &Object) -> Server {
    let server = Server::start(object.clone());
    server.set_proof(proof_of(&object.bytes).0);
    server
}

/// Everything at one server.
fn at_one(client: &Client, server: &Server, object: &Object, options: RemoteOptions) -> Arc<ProvenRemote> {
    proven(client, object, &[server.url("/a")], &[server.url("/a.obao")], options)
}

/// The bytes of a read that were delivered so far, and the read.
type Reading = (Arc<Mutex<Vec<u8>>>, JoinHandle<Result<(), SourceError>>);

fn begin(client: &Client, source: &Arc<ProvenRemote>, range: Range<u64>) -> Reading {
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let into = bytes.clone();
    let deliver = Box::new(move |piece: &[u8]| into.lock().unwrap().extend_from_slice(piece));
    let fetch = source.clone().fetch(range, Purpose::Demand, Instant::now(), deliver);
    (bytes, client.runtime.spawn(fetch))
}

fn read(client: &Client, source: &Arc<ProvenRemote>, range: Range<u64>) -> Result<Vec<u8>, SourceError> {
    let (bytes, reading) = begin(client, source, range);
    client.wait(reading).unwrap()?;
    let bytes = std::mem::take(&mut *bytes.lock().unwrap());
    Ok(bytes)
}

fn flipped(object: &Object, at: u64, bit: u64) -> Object {
    let mut bytes = object.bytes.to_vec();
    bytes[at as usize] ^= 1 << (bit % 8);
    Object { bytes: Arc::new(bytes), ..object.clone() }
}

/// A sequence that looks random.
fn scattered(n: u64, below: u64) -> u64 {
    let mut x = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x ^= x >> 29;
    x.wrapping_mul(0xbf58_476d_1ce4_e5b9) % below
}

/// Guards D103.
#[test]
fn each_flipped_bit_of_an_image_is_caught_in_the_request_that_brings_it() {
    let object = Object::new(SIZE);
    let server = served(&object);
    let client = Client::new();
    let source = at_one(&client, &server, &object, RemoteOptions::default());
    read(&client, &source, 0..SIZE as u64).unwrap();
    for n in 0..flips() {
        let at = scattered(n, SIZE as u64);
        let range = at / GROUP * GROUP..(at / GROUP * GROUP + GROUP * (1 + n % 3)).min(SIZE as u64);
        server.forget_requests();
        let (wrong, lied) = (flipped(&object, at, n), AtomicBool::new(false));
        server.on(move |request| match request.is_for_a_proof() || lied.swap(true, Ordering::SeqCst) {
            true => Reply::Object,
            false => Reply::Of(wrong.clone()),
        });
        let bytes = read(&client, &source, range.clone()).unwrap();
        assert!(
            bytes == object.bytes[range.start as usize..range.end as usize],
            "flip {n} of byte {at} was delivered"
        );
        // The one that was caught, and the one that brought the right bytes.
        let requests: Vec<_> = server.requests().iter().map(|request| request.range().unwrap()).collect();
        assert_eq!(requests.len(), 2, "flip {n}: {requests:?}");
    }
}

/// Guards D104.
#[test]
fn each_flipped_bit_of_a_proof_is_caught_in_the_request_that_brings_it() {
    let object = Object::new(SIZE);
    let (proof, _) = proof_of(&object.bytes);
    let layout = Layout::of(SIZE as u64);
    let server = served(&object);
    let client = Client::new();
    let of_proof =
        Object { bytes: Arc::new(proof.clone()), etag: Some("\"proof\"".into()), last_modified: None };
    for n in 0..flips().min(1000) {
        // Each time without a page in memory: all three pages are fetched.
        let source = at_one(&client, &server, &object, RemoteOptions::default());
        let pages = proof.len() as u64 - plyfs::format::proof::HEADER_AREA;
        let at = plyfs::format::proof::HEADER_AREA + scattered(n, pages);
        let (wrong, lies) = (flipped(&of_proof, at, n), Arc::new(AtomicUsize::new(0)));
        let lied = lies.clone();
        server.on(move |request: &Request| {
            let (first, last) = request.range().unwrap();
            let brings = request.is_for_a_proof() && (first..=last).contains(&at);
            match brings && lied.fetch_add(1, Ordering::SeqCst) == 0 {
                true => Reply::Of(wrong.clone()),
                false => Reply::Object,
            }
        });
        let bytes = read(&client, &source, 0..SIZE as u64).unwrap();
        assert!(bytes == *object.bytes, "flip {n} of byte {at}");
        assert_eq!(lies.load(Ordering::SeqCst), 2, "flip {n}: the wrong page, and the right one");
        assert_eq!(layout.levels(), 2);
    }
}

#[test]
fn a_mirror_that_sends_wrong_bytes_is_named_and_passed_over_until_it_sends_the_right_ones() {
    let object = Object::new(SIZE);
    let (liar, right) = (served(&object), served(&object));
    let client = Client::new();
    let urls = [liar.url("/a"), right.url("/b")];
    let source = proven(&client, &object, &urls, &[right.url("/b.obao")], RemoteOptions::default());
    let wrong = flipped(&object, 20_000, 3);
    liar.on(move |_| Reply::Of(wrong.clone()));
    assert!(read(&client, &source, 0..SIZE as u64).unwrap() == *object.bytes);
    let trouble = source.urls()[0].trouble.clone().expect("it is named");
    assert!(trouble.contains("bytes 16384 to 32767 are not those that the proof names"), "{trouble}");
    assert_eq!(source.urls()[1].trouble, None);
    assert_eq!(source.stall(), None);
    // Right bytes of other groups are no sign that it works.
    for n in 3..20 {
        read(&client, &source, n * GROUP..(n + 1) * GROUP).unwrap();
        std::thread::yield_now();
    }
    assert!(source.urls()[0].trouble.is_some());
    liar.on(|_| Reply::Object);
    until("it to be used again", || {
        read(&client, &source, 0..GROUP).unwrap();
        source.urls()[0].trouble.is_none()
    });
}

/// Guards D103.
#[test]
fn a_read_waits_for_a_server_that_only_sends_wrong_bytes_and_goes_on_when_it_sends_the_right_ones() {
    let object = Object::new(SIZE);
    let server = served(&object);
    let client = Client::new();
    let source = at_one(&client, &server, &object, RemoteOptions::default());
    let wrong = flipped(&object, 40_000, 0);
    server.on(move |request| if request.is_for_a_proof() { Reply::Object } else { Reply::Of(wrong.clone()) });
    let (bytes, reading) = begin(&client, &source, 0..SIZE as u64);
    until("the read to wait", || source.stall().is_some_and(|stall| stall.why.contains("32768 to 49151")));
    assert!(
        *bytes.lock().unwrap() == object.bytes[..2 * GROUP as usize],
        "what is proven was delivered, and no more"
    );
    server.on(|_| Reply::Object);
    client.wait(reading).unwrap().unwrap();
    assert!(*bytes.lock().unwrap() == *object.bytes);
    assert_eq!(source.stall(), None);
}

/// Wrong bytes are no progress, so they do not move the deadline.
#[test]
fn wrong_bytes_do_not_move_the_deadline() {
    let object = Object::new(SIZE);
    let server = served(&object);
    let client = Client::new();
    let source = at_one(&client, &server, &object, briefly());
    let wrong = flipped(&object, 5, 0);
    server.on(move |request| if request.is_for_a_proof() { Reply::Object } else { Reply::Of(wrong.clone()) });
    fails(read(&client, &source, 0..SIZE as u64), Protocol, &["700ms", "bytes 0 to 16383", "another mirror"]);
}

#[test]
fn a_read_waits_for_a_proof_whose_server_is_down_and_fetches_the_image_once() {
    let object = Object::new(SIZE);
    let (server, mut of_proof) = (served(&object), served(&object));
    let client = Client::new();
    let proofs = [of_proof.url("/a.obao")];
    let source = proven(&client, &object, &[server.url("/a")], &proofs, RemoteOptions::default());
    of_proof.stop();
    let (bytes, reading) = begin(&client, &source, 0..SIZE as u64);
    let is_named = || source.proof_urls()[0].trouble.is_some();
    until("the read to wait", || {
        source.stall().is_some() && is_named() && server.body_bytes() == SIZE as u64
    });
    assert!(bytes.lock().unwrap().is_empty(), "nothing is delivered unproven");
    of_proof.start_again();
    client.wait(reading).unwrap().unwrap();
    assert!(*bytes.lock().unwrap() == *object.bytes);
    assert_eq!(server.requests().len(), 1);
    // Those that no reader waits for give up.
    let source = proven(&client, &object, &[server.url("/a")], &proofs, RemoteOptions::default());
    of_proof.stop();
    let fetch =
        source.clone().fetch(0..GROUP, Purpose::Prefetch, Instant::now(), Box::new(|_| panic!("unproven")));
    fails(client.wait(fetch), Unreachable, &["a.obao"]);
}

#[test]
fn ranges_that_are_no_groups_are_cut_out_of_groups_and_broken_transfers_go_on_at_a_group() {
    let object = Object::new(SIZE);
    let server = served(&object);
    let client = Client::new();
    let source = at_one(&client, &server, &object, RemoteOptions::default());
    for (start, end) in
        [(0, 1), (100, 50_000), (16_383, 16_385), (SIZE as u64 - 1, SIZE as u64), (5, SIZE as u64)]
    {
        let bytes = read(&client, &source, start..end).unwrap();
        assert!(bytes == object.bytes[start as usize..end as usize], "{start} to {end}");
    }
    server.forget_requests();
    server.on(|request| if request.number == 0 { Reply::Cut(40_000) } else { Reply::Object });
    assert!(read(&client, &source, 0..SIZE as u64).unwrap() == *object.bytes);
    let starts: Vec<u64> = server.requests().iter().map(|request| request.range().unwrap().0).collect();
    assert_eq!(starts, [0, 32_768]);
}

/// Upper pages are here after the first request, so the next reads fetch a page of 2 KiB at most.
#[test]
fn the_proof_costs_one_small_request_for_each_mib_of_the_image() {
    let object = Object::new(5 << 20);
    let server = served(&object);
    let client = Client::new();
    let source = at_one(&client, &server, &object, RemoteOptions::default());
    read(&client, &source, 0..GROUP).unwrap();
    server.forget_requests();
    read(&client, &source, (3 << 20)..(3 << 20) + 2 * GROUP).unwrap();
    read(&client, &source, (3 << 20) + 10 * GROUP..(3 << 20) + 12 * GROUP).unwrap();
    let requests = server.requests();
    let of_proof: Vec<_> = requests.iter().filter(|request| request.is_for_a_proof()).collect();
    assert_eq!(of_proof.len(), 1, "{requests:?}");
    let (first, last) = of_proof[0].range().unwrap();
    assert_eq!(last + 1 - first, 2048);
    assert_eq!(requests.len(), 3);
}

/// A request that waits for hashes must hold no place that the request for them needs.
#[test]
fn one_slot_for_all_requests_is_enough() {
    let object = Object::new(SIZE);
    let server = served(&object);
    let config = plyfs::config::HttpConfig { max_requests: 1, ..crate::harness::quick() };
    let client = Client::with(&config);
    let source = at_one(
        &client,
        &server,
        &object,
        RemoteOptions { max_requests: Some(1), ..RemoteOptions::default() },
    );
    server.on(|_| Reply::After(Duration::from_millis(10), Box::new(Reply::Object)));
    assert!(read(&client, &source, 0..SIZE as u64).unwrap() == *object.bytes);
}

/// Guards D103.
#[test]
fn a_peer_that_lies_is_found_out_and_the_server_is_asked() {
    let (client, object) = (Client::new(), Object::new(SIZE));
    let server = served(&object);
    let (proof, root) = proof_of(&object.bytes);
    let name = ContentName::of_root(&root);
    let tag = name.tag();
    let mut bytes = object.bytes.to_vec();
    bytes[3 * GROUP as usize + 5] ^= 1;
    let lies = Object { bytes: Arc::new(bytes), etag: Some(tag.clone()), last_modified: None };
    let liar = Server::start(lies);
    // It has a part of a group alone, too: that is no progress.
    let (short, size) = (object.clone(), SIZE);
    let sloth = Server::start(object.clone());
    sloth.on(move |request| {
        let (first, _) = request.range().unwrap();
        let lines = vec![
            ("Content-Range".to_owned(), format!("bytes {first}-{first}/{size}")),
            ("ETag".to_owned(), tag.clone()),
        ];
        Reply::Status(206, lines, vec![short.bytes[first as usize]])
    });
    let peers = [&liar, &sloth].map(|peer| format!("plyfs://{}", peer.address()));
    let urls: Vec<String> = std::iter::once(server.url("/a")).chain(peers).collect();
    let size = HttpIdentity { size: proof.len() as u64, etag: None, last_modified: None, version: None };
    let options = RemoteOptions { contents: Some(name), ..RemoteOptions::default() };
    let remote = client.http.open(&urls, identity(&object), options);
    let of_proof = RemoteOptions { strictness: Strictness::SizeOnly, ..RemoteOptions::default() };
    let proofs = client.http.open(&[server.url("/a.obao")], size, of_proof);
    let pages = ProofPages::new((root, SIZE as u64), Arc::new(ProvenPages::new(64)), None, proofs);
    let source = Arc::new(ProvenRemote::new(remote, pages, vec![server.url("/a.obao")]));
    assert!(read(&client, &source, 0..SIZE as u64).unwrap() == *object.bytes);
    assert!(source.stall().is_none());
    let trouble = source.urls().into_iter().find(|url| url.url.contains(&liar.address().to_string()));
    let trouble = trouble.and_then(|url| url.trouble).unwrap();
    assert!(trouble.contains("bytes 49152 to 65535 are not those"), "{trouble}");
    // Its groups before the wrong one were used.
    let requests = server.requests();
    let first =
        requests.iter().filter(|request| !request.is_for_a_proof()).find_map(Request::range).unwrap().0;
    assert_eq!(first, 3 * GROUP);
    assert!(client.http.servers().iter().any(|(_, count)| count.wrong > 0));
    assert!(sloth.requests().len() < 5, "{}", sloth.requests().len());
}
