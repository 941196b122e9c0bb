//! Registries: tokens, manifests, and blobs behind redirects to another host.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use plyfs::format::record::{BaseIdentity, Digest, Validator};
use plyfs::source::SourceErrorKind::{Denied, Protocol};
use plyfs::source::http::{HttpSource, ProbedArtifact, RemoteOptions};
use plyfs::source::{OciIdentity, RemoteSource, SourceError, StallKind};
use sha2::{Digest as _, Sha256};

use crate::harness::{Client, MIB, fails, until};
use crate::server::{Object, Reply, Request, Server};

fn digest_of(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().fold("sha256:".to_owned(), |text, byte| text + &format!("{byte:02x}"))
}

/// What a registry has, and what it demands.
struct Contents {
    blob: Vec<u8>,
    media: String,
    /// What tags lead to, where that is not the manifest of the blob.
    manifest: Option<Vec<u8>>,
    /// The number of the only token that is taken.
    token: usize,
    /// Whether tokens are given.
    gives: bool,
}

/// A registry whose tokens are given by another server, and whose blobs are in a store.
struct Registry {
    server: Server,
    tokens: Server,
    store: Server,
    contents: Arc<Mutex<Contents>>,
    given: Arc<AtomicUsize>,
}

fn manifest_of(blob: &[u8], media: &str) -> Vec<u8> {
    let (digest, size) = (digest_of(blob), blob.len());
    format!(r#"{{"schemaVersion":2,"layers":[{{"mediaType":"{media}","digest":"{digest}","size":{size}}}]}}"#)
        .into_bytes()
}

impl Registry {
    fn start(blob: Vec<u8>, media: &str) -> Self {
        let store = Server::start(Object { bytes: Arc::new(blob.clone()), etag: None, last_modified: None });
        let (server, tokens) = (Server::start(Object::default()), Server::start(Object::default()));
        let contents = Arc::new(Mutex::new(Contents {
            blob,
            media: media.into(),
            manifest: None,
            token: 0,
            gives: true,
        }));
        let given = Arc::new(AtomicUsize::new(0));
        let (now, realm, to) = (contents.clone(), tokens.url("/token"), store.url("/signed"));
        server.on(move |request| answer(request, &now.lock().unwrap(), &realm, &to));
        let (now, count) = (contents.clone(), given.clone());
        tokens.on(move |request| {
            let now = now.lock().unwrap();
            assert!(request.target.contains("scope=repository%3Ateam%2Fgolden%3Apull"), "{}", request.target);
            assert!(request.target.contains("service=registry"), "{}", request.target);
            if !now.gives {
                return Reply::status(401);
            }
            count.fetch_add(1, Ordering::SeqCst);
            Reply::Status(
                200,
                Vec::new(),
                format!(r#"{{"token":"t{}","expires_in":300}}"#, now.token).into_bytes(),
            )
        });
        Self { server, tokens, store, contents, given }
    }

    fn url(&self, reference: &str) -> String {
        self.server.url(&format!("/team/golden{reference}")).replace("http://", "oci+http://")
    }

    fn now(&self, change: impl FnOnce(&mut Contents)) {
        change(&mut self.contents.lock().unwrap());
    }
}

fn answer(request: &Request, now: &Contents, realm: &str, store: &str) -> Reply {
    if request.header("authorization") != Some(&format!("Bearer t{}", now.token)) {
        let demand = format!("Bearer realm=\"{realm}\",service=\"registry\",scope=\"anything\"");
        return Reply::Status(401, vec![("WWW-Authenticate".into(), demand)], b"{}".to_vec());
    }
    let manifest = now.manifest.clone().unwrap_or_else(|| manifest_of(&now.blob, &now.media));
    let path = request.target.strip_prefix("/v2/team/golden/").unwrap_or_default();
    match path.split_once('/') {
        Some(("manifests", name)) => {
            assert!(request.header("accept").unwrap().contains("application/vnd.oci.image.manifest.v1+json"));
            match name {
                "12" => Reply::Status(200, Vec::new(), manifest),
                "lie" | "none" => Reply::status(404),
                _ if name == digest_of(&manifest) => Reply::Status(200, Vec::new(), manifest),
                _ => Reply::status(404),
            }
        }
        Some(("blobs", name)) if name == digest_of(&now.blob) => Reply::redirect(store),
        _ => Reply::status(404),
    }
}

fn probe(client: &Client, url: &str) -> Result<ProbedArtifact, SourceError> {
    let (http, urls) = (client.http.clone(), vec![url.to_owned()]);
    client.wait(async move { http.probe_artifact(&urls, &RemoteOptions::default()).await })
}

fn open(client: &Client, probed: &ProbedArtifact) -> Arc<HttpSource> {
    let artifact = OciIdentity::of(&probed.identity).unwrap();
    client.http.open_artifact(std::slice::from_ref(&probed.url), &artifact, RemoteOptions::default())
}

#[test]
fn a_blob_is_read_by_its_digest_with_tokens_that_the_store_does_not_get() {
    let object = Object::new(MIB);
    let registry = Registry::start(object.bytes.to_vec(), "application/x-disk");
    let client = Client::new();
    let probed = probe(&client, &registry.url(":12")).unwrap();
    let manifest = digest_of(&manifest_of(&object.bytes, "application/x-disk"));
    assert_eq!(probed.url, registry.url(&format!("@{manifest}")));
    assert!(probed.head == object.bytes[..64 << 10]);
    let sha256: [u8; 32] = Sha256::digest(&*object.bytes).into();
    let validator = Validator::Oci { digest: digest_of(&object.bytes), blob: MIB as u64, offset: 0 };
    let expected = BaseIdentity { size: MIB as u64, validator, digest: Some(Digest::Sha256(sha256)) };
    assert_eq!(probed.identity, expected);
    // The same artifact by digest, and by a tag that is not there.
    assert_eq!(probe(&client, &probed.url).unwrap(), probed);
    fails(probe(&client, &registry.url(":none")), Denied, &["no such tag", "404"]);
    let source = open(&client, &probed);
    for range in [0..10, 5000..700_000] {
        let found = client.read(&source, range.clone()).unwrap();
        assert!(found == object.bytes[range.start as usize..range.end as usize]);
    }
    assert!(registry.store.requests().iter().all(|request| request.header("authorization").is_none()));
    assert!(registry.tokens.requests().iter().all(|request| request.header("authorization").is_none()));
    // The tag leads somewhere else: the base does not.
    let other = Object::seeded(MIB, 2);
    registry.now(|now| now.manifest = Some(manifest_of(&other.bytes, "application/x-disk")));
    assert!(client.read(&source, 0..100).unwrap() == object.bytes[..100]);
    // The token ends, and the redirect's target too: both are got anew.
    let (before, refuses) = (registry.given.load(Ordering::SeqCst), AtomicUsize::new(0));
    registry.now(|now| now.token = 1);
    registry.store.on(move |_| match refuses.fetch_add(1, Ordering::SeqCst) {
        0 => Reply::status(403),
        _ => Reply::Object,
    });
    std::thread::sleep(std::time::Duration::from_millis(1100));
    assert!(client.read(&source, 7..100).unwrap() == object.bytes[7..100]);
    assert_eq!(registry.given.load(Ordering::SeqCst), before + 1);
}

#[test]
fn a_reader_waits_for_a_blob_and_for_tokens() {
    let object = Object::new(MIB);
    let registry = Registry::start(object.bytes.to_vec(), "application/x-disk");
    let client = Client::new();
    let probed = probe(&client, &registry.url(":12")).unwrap();
    let source = open(&client, &probed);
    registry.now(|now| now.gives = false);
    let waiting = client.start(&source, 0..100, plyfs::source::Purpose::Demand);
    until("a reader that waits", || source.stall().is_some());
    let stall = source.stall().unwrap();
    assert!(stall.kind == StallKind::Waiting && stall.why.contains("gives no token"), "{stall:?}");
    registry.now(|now| now.gives = true);
    assert!(client.wait(waiting.done).unwrap() == object.bytes[..100]);
    registry.now(|now| now.gives = false);
    fails(probe(&client, &registry.url(":12")), Denied, &["gives no token", "http.credentials"]);
}

#[test]
fn a_registry_that_lies_is_refused() {
    let object = Object::new(MIB);
    let registry = Registry::start(object.bytes.to_vec(), "application/x-disk");
    let client = Client::new();
    let wanted = digest_of(b"another manifest");
    let text = manifest_of(&object.bytes, "application/x-disk");
    let server = Server::start(Object::default());
    server.on(move |_| Reply::Status(200, Vec::new(), text.clone()));
    let url = server.url(&format!("/team/golden@{wanted}")).replace("http://", "oci+http://");
    fails(probe(&client, &url), Protocol, &["whose digest is sha256:", &wanted]);
    // A blob of another size than the manifest says.
    let size = format!("\"size\":{MIB}");
    let text = String::from_utf8(manifest_of(&object.bytes, "x")).unwrap().replace(&size, "\"size\":77");
    registry.now(|now| now.manifest = Some(text.into_bytes()));
    fails(probe(&client, &registry.url(":12")), Protocol, &["says 77 bytes, and the blob has 1048576"]);
    registry.now(|now| now.manifest = Some(b"<html>".to_vec()));
    fails(probe(&client, &registry.url(":12")), Protocol, &["not one of OCI or Docker"]);
    // Tokens that are never taken.
    let refusing = Registry::start(object.bytes.to_vec(), "x");
    let (realm, secret) = (refusing.tokens.url("/token"), "Bearer t9");
    refusing.server.on(move |request| {
        assert_ne!(request.header("authorization"), Some(secret));
        let demand = format!("Bearer realm=\"{realm}\",service=\"registry\"");
        Reply::Status(401, vec![("WWW-Authenticate".into(), demand)], Vec::new())
    });
    fails(probe(&client, &refusing.url(":12")), Denied, &["wants to know who asks", "http.credentials"]);
    refusing.server.on(|_| {
        Reply::Status(401, vec![("WWW-Authenticate".into(), "Basic realm=\"x\"".into())], Vec::new())
    });
    fails(probe(&client, &refusing.url(":12")), Denied, &["wants to know who asks"]);
    for (url, why) in
        [("oci://h", "no repository"), ("oci://user:secret@h/a", "user name"), ("oci://h/A", "characters")]
    {
        let text = fails(probe(&client, url), Protocol, &[why]);
        assert!(!text.contains("secret"), "{text}");
    }
}

#[test]
fn the_disk_of_a_container_disk_is_a_range_of_its_layer() {
    let object = Object::new(100_000);
    let mut layer = vec![0; 512];
    layer[..13].copy_from_slice(b"disk/disk.img");
    layer[124..135].copy_from_slice(format!("{:011o}", object.bytes.len()).as_bytes());
    layer[156] = b'0';
    layer[148..156].fill(b' ');
    let sum: u32 = layer.iter().map(|byte| u32::from(*byte)).sum();
    layer[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    layer.extend_from_slice(&object.bytes);
    layer.resize(layer.len().next_multiple_of(512) + 1024, 0);
    let registry = Registry::start(layer.clone(), "application/vnd.oci.image.layer.v1.tar");
    let client = Client::new();
    let probed = probe(&client, &registry.url(":12")).unwrap();
    let artifact = OciIdentity::of(&probed.identity).unwrap();
    assert_eq!((artifact.offset, artifact.size, artifact.blob), (512, 100_000, layer.len() as u64));
    assert_eq!(probed.identity.digest, None, "the digest is that of the layer");
    assert!(probed.head == object.bytes[..(64 << 10) - 512]);
    let whole: Arc<dyn RemoteSource> = open(&client, &probed);
    let section = Arc::new(plyfs::source::Section::new(whole, 512..100_512));
    let bytes = Arc::new(Mutex::new(Vec::new()));
    let into = bytes.clone();
    let deliver = Box::new(move |piece: &[u8]| into.lock().unwrap().extend_from_slice(piece));
    let fetch =
        section.fetch(99_000..100_000, plyfs::source::Purpose::Demand, std::time::Instant::now(), deliver);
    client.wait(client.runtime.spawn(fetch)).unwrap().unwrap();
    assert!(*bytes.lock().unwrap() == object.bytes[99_000..]);
    registry.now(|now| now.media = "application/vnd.oci.image.layer.v1.tar+gzip".into());
    fails(probe(&client, &registry.url(":12")), Protocol, &["compressed as a whole", "--dest-decompress"]);
}
