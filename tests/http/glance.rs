//! Images of a Glance and objects of a Swift, with a server that answers as real ones were seen to do: no ETag and no
//! HEAD, Content-MD5 of the whole image with each range, 400 of a store without ranges, 204 of a store that lost the
//! data, 401 to a token that has ended.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use plyfs::config::{CloudConfig, HttpConfig, LocationKind};
use plyfs::format::record::{Digest, ImageFormat, Strictness, Validator};
use plyfs::source::SourceErrorKind::{Changed, Denied, Protocol, Unreachable};
use plyfs::source::http::{
    Backlog, Credentials, HttpSource, ProbedImage, Proxies, RemoteOptions, Secret, SecretName, Section,
    WholeSource,
};
use plyfs::source::openstack::{Endpoint, Session, find};
use plyfs::source::{GlanceIdentity, Purpose, RemoteSource, SourceError};

use crate::harness::{Client, MIB, briefly, fails, quick, until};
use crate::server::{Object, Reply, Request, Server};

const ID: &str = "0f3b1c1e-7b0a-4f3e-9d63-0c6d6a5a1f10";
const MD5: &str = "d41d8cd98f00b204e9800998ecf8427e";
const RANDOMLY: &str =
    "<html><h1>400 Bad Request</h1>Getting images randomly from this store is not supported.</html>";

/// The keystone of a test, as the credential helper asks it: sessions with numbered tokens.
struct Keystone {
    session: Mutex<Result<Session, String>>,
    asked: AtomicUsize,
}

impl Keystone {
    fn new(server: &Server, anywhere: bool) -> Arc<Self> {
        let at = |path: &str| Ok(Endpoint { url: server.url(path), anywhere });
        let (image, object_store) = (at("/image"), at("/swift/v1/AUTH_p"));
        let life = Duration::from_secs(3600);
        let session = Session { token: String::new(), life, image, object_store };
        Arc::new(Self { session: Mutex::new(Ok(session)), asked: AtomicUsize::new(0) })
    }

    fn change(&self, change: impl FnOnce(&mut Session)) {
        change(self.session.lock().unwrap().as_mut().unwrap());
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

impl Credentials for Keystone {
    fn get(&self, name: SecretName) -> Result<Secret, String> {
        assert_eq!(name, SecretName { section: Section::Cloud, number: 0 });
        let number = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut session = self.session.lock().unwrap().clone()?;
        session.token = format!("token-{number}");
        Ok(Secret::new(serde_json::to_vec(&session).unwrap()))
    }
}

/// The state of an image, as Glance has it.
#[derive(Clone)]
struct Image {
    record: serde_json::Value,
    object: Object,
    /// The answer to a request for data in place of the data.
    data: Option<Reply>,
    /// The tokens that are accepted; all, when there are none.
    tokens: Vec<String>,
    /// The pages of the list of images, without the hidden ones.
    pages: Vec<serde_json::Value>,
}

impl Image {
    fn new(object: Object) -> Self {
        let record = serde_json::json!({
            "id": ID, "name": "debian", "status": "active", "size": object.bytes.len(),
            "os_hash_algo": "sha512", "os_hash_value": "ab".repeat(64), "checksum": MD5,
            "disk_format": "raw", "container_format": "bare",
        });
        Self { record, object, data: None, tokens: Vec::new(), pages: Vec::new() }
    }

    fn answer(&self, request: &Request) -> Reply {
        let token = request.header("x-auth-token");
        if !self.tokens.is_empty() && !token.is_some_and(|token| self.tokens.iter().any(|t| t == token)) {
            return Reply::status(401);
        }
        let json = |value: &serde_json::Value| {
            Reply::Status(
                200,
                vec![("Content-Type".into(), "application/json".into())],
                value.to_string().into(),
            )
        };
        let path = request.target.trim_start_matches("/image");
        if path == format!("/v2/images/{ID}") {
            return if self.record["status"] == "deleted" { Reply::status(404) } else { json(&self.record) };
        }
        if let Some(name) = path.strip_prefix("/v2/images?name=") {
            let found: Vec<_> = match name {
                "debian" => vec![self.record.clone()],
                "two+of+them" => vec![self.record.clone(); 2],
                _ => Vec::new(),
            };
            return json(&serde_json::json!({ "images": found }));
        }
        if let Some(query) = path.strip_prefix("/v2/images?status=active&os_hidden=") {
            let Some(query) = query.strip_prefix("false&sort=id%3Aasc&limit=50") else {
                return json(&serde_json::json!({ "images": [] }));
            };
            // The marker is the last image of the page before.
            let last = |page: &serde_json::Value| Some(page["images"].as_array()?.last()?["id"].clone());
            let page = match query.strip_prefix("&marker=") {
                None => self.pages.first(),
                Some(marker) => {
                    let before = self.pages.iter().position(|page| last(page).is_some_and(|id| id == marker));
                    before.and_then(|before| self.pages.get(before + 1))
                }
            };
            return page.map_or(Reply::status(404), json);
        }
        assert_eq!(path, format!("/v2/images/{ID}/file"), "{}", request.target);
        match (self.record["status"].as_str(), &self.data) {
            (Some("deactivated"), _) => Reply::status(403),
            (Some("deleted"), _) => Reply::status(404),
            (_, Some(reply)) => reply.clone(),
            (_, None) if request.range().is_none() => self.whole(),
            (_, None) => Reply::With(as_glance(MD5)),
        }
    }

    /// The whole image with status 200.
    fn whole(&self) -> Reply {
        let lines = vec![
            ("Content-Type".into(), "application/octet-stream".into()),
            ("Content-MD5".into(), MD5.into()),
        ];
        Reply::Status(200, lines, self.object.bytes.to_vec())
    }
}

/// The header lines of Glance: no validators, and a Content-MD5.
fn as_glance(md5: &str) -> Vec<(&'static str, Option<String>)> {
    vec![
        ("ETag", None),
        ("Last-Modified", None),
        ("Accept-Ranges", None),
        ("Content-MD5", Some(md5.to_owned())),
    ]
}

/// A Glance with one image, a client of it, and its keystone.
struct House {
    server: Server,
    image: Arc<Mutex<Image>>,
    keystone: Arc<Keystone>,
    client: Client,
    object: Object,
}

impl House {
    fn new() -> Self {
        Self::with(Vec::new(), quick(), true)
    }

    fn with(locations: Vec<LocationKind>, config: HttpConfig, anywhere: bool) -> Self {
        let object = Object::new(MIB);
        let server = Server::start(object.clone());
        let keystone = Keystone::new(&server, anywhere);
        let image = Arc::new(Mutex::new(Image::new(object.clone())));
        let answering = image.clone();
        server.on(move |request| answering.lock().unwrap().answer(request));
        let cloud = CloudConfig { name: "prod".into(), file: "/clouds.yaml".into(), locations };
        let config = HttpConfig { clouds: vec![cloud], ..config };
        let client = Client::with_parts(&config, Proxies::default(), keystone.clone());
        Self { server, image, keystone, client, object }
    }

    fn change(&self, change: impl FnOnce(&mut Image)) {
        change(&mut self.image.lock().unwrap());
    }

    fn set(&self, key: &str, value: impl Into<serde_json::Value>) {
        let value = value.into();
        self.change(|image| image.record[key] = value);
    }

    fn probe_with(&self, url: &str, options: RemoteOptions, whole: bool) -> Result<ProbedImage, SourceError> {
        let (http, urls) = (self.client.http.clone(), vec![url.to_owned()]);
        self.client.wait(async move { http.probe_image(&urls, &options, whole).await })
    }

    fn probe(&self) -> Result<ProbedImage, SourceError> {
        self.probe_with(&format!("glance+cloud://prod/{ID}"), RemoteOptions::default(), false)
    }

    fn open(&self, probed: &ProbedImage, options: RemoteOptions) -> Arc<HttpSource> {
        let identity = GlanceIdentity::of(&probed.identity).expect("an image");
        self.client.http.open_image(std::slice::from_ref(&probed.url), identity, options)
    }

    /// A source whose reads fail soon.
    fn opened(&self) -> Arc<HttpSource> {
        self.open(&self.probe().unwrap(), briefly())
    }

    fn part(&self, range: std::ops::Range<u64>) -> Vec<u8> {
        self.object.bytes[range.start as usize..range.end as usize].to_vec()
    }

    fn requests_for(&self, end: &str) -> usize {
        self.server.requests().iter().filter(|request| request.target.ends_with(end)).count()
    }
}

#[test]
fn an_image_is_what_its_record_says_and_its_data_comes_by_ranges() {
    let house = House::new();
    house.set("disk_format", "qcow2");
    let probed = house.probe().unwrap();
    assert_eq!(probed.format, ImageFormat::Qcow2);
    assert_eq!(probed.url, format!("glance+cloud://prod/{ID}"));
    assert_eq!(probed.head, house.part(0..64 << 10));
    assert_eq!(probed.identity.digest, Some(Digest::Sha512([0xab; 64])));
    let Validator::Glance { id, hash, etag, .. } = &probed.identity.validator else { panic!("{probed:?}") };
    assert_eq!((&**id, &**hash), (ID, &*format!("sha512:{}", "ab".repeat(64))));
    assert_eq!(etag.as_deref(), Some(&*format!("\"{MD5}\"")));
    let source = house.open(&probed, RemoteOptions::default());
    assert_eq!(house.client.read(&source, 100_000..300_000).unwrap(), house.part(100_000..300_000));
    assert_eq!(house.client.read(&source, 0..5).unwrap(), house.part(0..5));
    // One record for each of the two that asked, one token for all.
    assert_eq!((house.requests_for(ID), house.requests_for("/file"), house.keystone.asked()), (3, 3, 1));
    for request in house.server.requests() {
        assert_eq!(request.header("x-auth-token"), Some("token-1"), "{request:?}");
        assert_eq!(request.header("if-match"), None);
        assert_eq!(request.method, "GET");
    }
}

#[test]
fn a_glance_by_its_host_needs_no_cloud() {
    let house = House::new();
    let url = format!("glance+http://{}/image/v2/images/{ID}", house.server.address());
    let probed = house.probe_with(&url, RemoteOptions::default(), false).unwrap();
    assert_eq!(probed.url, format!("glance+http://{}/image/{ID}", house.server.address()));
    let source = house.open(&probed, briefly());
    assert_eq!(house.client.read(&source, 7..70_000).unwrap(), house.part(7..70_000));
    assert_eq!(house.keystone.asked(), 0);
}

#[test]
fn an_image_is_found_by_a_name_that_is_of_one_image() {
    let house = House::new();
    let by = |name: &str| {
        house.probe_with(&format!("glance+cloud://prod/{name}"), RemoteOptions::default(), false)
    };
    assert_eq!(by("debian").unwrap().url, format!("glance+cloud://prod/{ID}"));
    fails(by("two%20of%20them"), Denied, &["2 images two of them", "give the ID of one", ID]);
    fails(by("other"), Denied, &["no image other that this project may see"]);
    fails(
        house.probe_with("glance+cloud://lab/debian", RemoteOptions::default(), false),
        Protocol,
        &["no cloud lab (it has: prod)", "[[http.clouds]]"],
    );
}

#[test]
fn the_images_of_a_cloud_are_listed_page_by_page() {
    let house = House::new();
    let of = house.image.lock().unwrap().record.clone();
    let record = |number: u64, status: &str| {
        let mut record = of.clone();
        record["id"] = format!("0f3b1c1e-7b0a-4f3e-9d63-{number:012x}").into();
        record["status"] = status.into();
        record
    };
    // Where the next page is, is not believed.
    let next = "http://attacker.example.org/v2/images?marker=x";
    let pages = |last: serde_json::Value| {
        vec![
            serde_json::json!({"images": [record(1, "active"), record(2, "active")], "next": next}),
            serde_json::json!({"images": [record(3, "deactivated"), record(4, "active")], "next": next}),
            last,
        ]
    };
    let list = || {
        let http = house.client.http.clone();
        house.client.wait(async move { http.list_images("prod").await })
    };
    house.change(|image| image.pages = pages(serde_json::json!({"images": [record(5, "active")]})));
    let found: Vec<String> = list().unwrap().into_iter().map(|record| record.id).collect();
    assert_eq!(found, [1, 2, 4, 5].map(|number| format!("0f3b1c1e-7b0a-4f3e-9d63-{number:012x}")));
    assert_eq!(house.server.requests().len(), 4, "three pages, and one of hidden images");
    // A list that does not end or is no list is an error, and so is a page that is missing.
    house.change(|image| image.pages = pages(serde_json::json!({"images": [], "next": next})));
    fails(list(), Protocol, &["the pages of the list of images do not go on"]);
    house.change(|image| {
        image.pages = pages(serde_json::json!({"images": [record(4, "active")], "next": next}))
    });
    fails(list(), Protocol, &["the pages of the list of images do not go on"]);
    house.change(|image| image.pages = pages(serde_json::json!(["x"])));
    fails(list(), Protocol, &["no list of images"]);
    house.change(|image| drop(image.pages.pop()));
    fails(list(), Denied, &["the list of images"]);
    let http = house.client.http.clone();
    let other = house.client.wait(async move { http.list_images("lab").await });
    fails(other, Protocol, &["no cloud lab (it has: prod)"]);
}

#[test]
fn a_glance_that_ends_connections_and_does_not_say_so_is_asked_again() {
    let house = House::new();
    let (image, used) = (house.image.clone(), Mutex::new(HashSet::new()));
    // As a socket of uwsgi does: an answer of HTTP/1.1, and then the end of the connection.
    house.server.on(move |request| match used.lock().unwrap().insert(request.connection) {
        true => image.lock().unwrap().answer(request),
        false => Reply::Close,
    });
    let list = || {
        let http = house.client.http.clone();
        house.client.wait(async move { http.list_images("prod").await })
    };
    house.change(|image| image.pages = vec![serde_json::json!({"images": [image.record.clone()]})]);
    assert_eq!(list().unwrap().len(), 1);
    let by_name = "glance+cloud://prod/debian";
    house.probe_with(by_name, RemoteOptions::default(), false).unwrap();
    let probed = house.probe().unwrap();
    let source = house.open(&probed, RemoteOptions::default());
    assert_eq!(house.client.read(&source, 7..70_000).unwrap(), house.part(7..70_000));
    // One that never answers is not asked for ever.
    house.server.on(|_| Reply::Close);
    house.server.forget_requests();
    fails(list(), Unreachable, &["connection"]);
    assert_eq!(house.server.requests().len(), 3);
}

#[test]
fn a_new_image_that_is_not_active_is_refused_in_glances_own_word() {
    let house = House::new();
    for status in ["queued", "saving", "importing", "deactivated", "pending_delete", "killed"] {
        house.set("status", status);
        fails(house.probe(), Denied, &[&format!("Glance says that the image is {status}")]);
    }
    house.set("status", "deleted");
    fails(house.probe(), Denied, &["no image", "this project may see (404)", "deleted"]);
    assert_eq!(house.requests_for("/file"), 0, "no data of such an image was asked for");
}

#[test]
fn a_record_that_does_not_say_enough_is_refused() {
    let house = House::new();
    for (key, value, part) in [
        ("disk_format", serde_json::json!("vhd"), "disk_format is vhd"),
        ("container_format", serde_json::json!("ovf"), "container_format is ovf"),
        ("os_hash_value", serde_json::Value::Null, "no os_hash_value"),
        ("size", serde_json::Value::Null, "no size"),
        ("size", serde_json::json!(5), "its data has 1048576"),
        ("checksum", serde_json::json!("00"), "another Content-MD5"),
        ("id", serde_json::json!("7f3b1c1e-7b0a-4f3e-9d63-0c6d6a5a1f10"), "record of another image"),
    ] {
        let before = house.image.lock().unwrap().record[key].clone();
        house.set(key, value);
        fails(house.probe(), Protocol, &[part]);
        house.set(key, before);
    }
    house.set("os_hash_value", serde_json::Value::Null);
    let by_size = RemoteOptions { strictness: Strictness::SizeOnly, ..RemoteOptions::default() };
    let url = format!("glance+cloud://prod/{ID}");
    assert_eq!(house.probe_with(&url, by_size, false).unwrap().identity.digest, None);
}

#[test]
fn reads_of_an_image_that_was_deactivated_wait_and_go_on_when_it_is_active_again() {
    let house = House::new();
    let source = house.open(&house.probe().unwrap(), RemoteOptions::default());
    assert_eq!(house.client.read(&source, 0..100).unwrap(), house.part(0..100));
    house.set("status", "deactivated");
    let reading = house.client.start(&source, 200_000..200_100, Purpose::Demand);
    until("the read waits and says why", || {
        source.stall().is_some_and(|stall| stall.why.contains("Glance says that the image is deactivated"))
    });
    house.set("status", "active");
    assert_eq!(house.client.wait(reading.done).unwrap(), house.part(200_000..200_100));
    until("no read waits", || source.stall().is_none());
}

#[test]
fn reads_of_an_image_that_was_deleted_wait_with_that_word() {
    let house = House::new();
    let registered = house.probe().unwrap();
    let source = house.open(&registered, briefly());
    house.set("status", "deleted");
    fails(house.client.read(&source, 0..100), Denied, &["no image", "deleted"]);
    let waiting = house.open(&registered, RemoteOptions::default());
    let reading = house.client.start(&waiting, 0..100, Purpose::Demand);
    until("the read waits", || waiting.stall().is_some_and(|stall| stall.why.contains("deleted")));
    house.set("status", "active");
    assert_eq!(house.client.wait(reading.done).unwrap(), house.part(0..100));
}

/// Guards H12.
#[test]
fn bytes_of_another_image_are_never_delivered() {
    let house = House::new();
    let source = house.opened();
    // A proxy in front of Glance confuses two images.
    let other = Object::seeded(MIB, 2);
    house.server.set_object(other);
    house.change(|image| image.data = Some(Reply::With(as_glance("00000000000000000000000000000000"))));
    fails(house.client.read(&source, 0..100), Changed, &["its Content-MD5 is"]);
    // Without the header nothing proves which image it is.
    let nothing = vec![("ETag", None), ("Last-Modified", None)];
    house.change(|image| image.data = Some(Reply::With(nothing)));
    fails(house.client.read(&source, 0..100), Protocol, &["it may be another version"]);
}

#[test]
fn an_image_whose_record_has_another_digest_is_another_image() {
    let house = House::new();
    let probed = house.probe().unwrap();
    house.set("os_hash_value", "cd".repeat(64));
    let source = house.open(&probed, briefly());
    fails(house.client.read(&source, 0..100), Changed, &["os_hash_value is another one"]);
    house.set("os_hash_value", "ab".repeat(64));
    house.set("size", 5);
    fails(house.client.read(&source, 0..100), Changed, &["its record says 5 bytes, not 1048576"]);
    assert_eq!(house.requests_for("/file"), 1, "only the probe asked for data");
}

#[test]
fn a_store_that_lost_the_data_is_named() {
    let house = House::new();
    let source = house.opened();
    house.change(|image| image.data = Some(Reply::status(204)));
    fails(house.client.read(&source, 0..100), Protocol, &["Glance has lost the data of the image (204)"]);
}

#[test]
fn a_store_without_ranges_is_refused_with_the_way_out() {
    let house = House::new();
    house.change(|image| image.data = Some(Reply::Status(400, Vec::new(), RANDOMLY.into())));
    fails(house.probe(), Protocol, &["no random access to images", "--download"]);
    // A place that the operator did not allow is not asked.
    house.set("direct_url", house.server.url("/elsewhere"));
    fails(house.probe(), Protocol, &["--download"]);
}

#[test]
fn data_of_a_store_without_ranges_comes_from_a_place_that_the_operator_allows() {
    let house = House::with(vec![LocationKind::Http], quick(), true);
    let other = Server::start(house.object.clone());
    house.change(|image| image.data = Some(Reply::Status(400, Vec::new(), RANDOMLY.into())));
    // A path of Glance's own host, and a store that plyfs does not read, are never places.
    let places = serde_json::json!([{ "url": "file:///etc/passwd" }, { "url": "rbd://a/b/c/d" }]);
    house.set("locations", places.clone());
    fails(house.probe(), Protocol, &["--download"]);
    house.set("locations", serde_json::json!([places[0], { "url": other.url("/data") }]));
    let probed = house.probe().unwrap();
    let source = house.open(&probed, briefly());
    assert_eq!(house.client.read(&source, 5..500_000).unwrap(), house.part(5..500_000));
    for request in other.requests() {
        assert_eq!((&*request.target, request.header("x-auth-token")), ("/data", None));
    }
    // One who may write a record does not get what the metadata service of this machine answers.
    house.set("locations", serde_json::json!([{ "url": "http://169.254.169.254/latest/meta-data" }]));
    fails(house.probe(), Protocol, &["its record leads to", "link-local", "[http] allow"]);
    house.set("locations", serde_json::json!([{ "url": other.url("/data") }]));
    // The place is pinned as any object of a web server is.
    other.set_object(Object::seeded(MIB, 3));
    fails(house.client.read(&source, 0..100), Changed, &["its ETag is"]);
}

/// Guards H13.
#[test]
fn a_token_that_ended_is_renewed_once_for_all_readers() {
    let house = House::new();
    house.change(|image| image.tokens = vec!["token-1".into()]);
    let source = house.open(&house.probe().unwrap(), RemoteOptions::default());
    assert_eq!(house.client.read(&source, 0..100).unwrap(), house.part(0..100));
    // A token is not renewed within a second: one that is refused when it is new is not better the next time.
    house.change(|image| image.tokens = vec!["token-2".into(), "token-3".into()]);
    let reads: Vec<_> = (0..8u64)
        .map(|number| house.client.start(&source, number * 100_000..number * 100_000 + 10, Purpose::Demand))
        .collect();
    for (number, read) in (0..8u64).zip(reads) {
        let from = number * 100_000;
        assert_eq!(house.client.wait(read.done).unwrap(), house.part(from..from + 10));
    }
    assert_eq!(house.keystone.asked(), 2);
}

#[test]
fn reads_wait_while_no_token_can_be_got_and_go_on_when_one_can() {
    let house = House::new();
    let source = house.open(&house.probe().unwrap(), RemoteOptions::default());
    let good =
        std::mem::replace(&mut *house.keystone.session.lock().unwrap(), Err("keystone is down".into()));
    house.change(|image| image.tokens = vec!["token-9".into()]);
    let reading = house.client.start(&source, 0..100, Purpose::Demand);
    until("the read waits", || source.stall().is_some_and(|stall| stall.why.contains("keystone is down")));
    *house.keystone.session.lock().unwrap() = good;
    until("keystone is asked again", || house.keystone.asked() > 2);
    let tokens = (1..100).map(|number| format!("token-{number}"));
    house.change(|image| image.tokens = tokens.collect());
    assert_eq!(house.client.wait(reading.done).unwrap(), house.part(0..100));
    // A session that never came is said so.
    let house = House::new();
    *house.keystone.session.lock().unwrap() = Err("keystone at k:5000: it refuses the user".into());
    fails(house.probe(), Unreachable, &["a token of cloud prod", "it refuses the user"]);
}

#[test]
fn a_token_is_not_used_after_its_time() {
    let house = House::new();
    house.keystone.change(|session| session.life = Duration::from_millis(1));
    let source = house.open(&house.probe().unwrap(), RemoteOptions::default());
    assert_eq!(house.client.read(&source, 0..100).unwrap(), house.part(0..100));
    let tokens: std::collections::HashSet<_> =
        house.server.requests().iter().filter_map(|r| r.header("x-auth-token").map(str::to_owned)).collect();
    assert!(tokens.len() >= 3, "{tokens:?}");
}

#[test]
fn a_glance_that_cannot_reach_keystone_is_waited_for() {
    let house = House::new();
    let source = house.open(&house.probe().unwrap(), RemoteOptions::default());
    house.change(|image| image.data = Some(Reply::status(503)));
    let reading = house.client.start(&source, 0..100, Purpose::Demand);
    until("the read waits", || source.stall().is_some_and(|stall| stall.why.contains("503")));
    house.change(|image| image.data = None);
    assert_eq!(house.client.wait(reading.done).unwrap(), house.part(0..100));
}

#[test]
fn a_catalog_of_a_public_keystone_leads_to_no_loopback_address() {
    let house = House::with(Vec::new(), quick(), false);
    fails(house.probe(), Unreachable, &["catalog leads to 127.0.0.1", "loopback", "[http] allow"]);
    assert!(house.server.requests().is_empty(), "a token was sent");
    let allowed = HttpConfig { allow: vec!["127.0.0.1".into()], ..quick() };
    let house = House::with(Vec::new(), allowed, false);
    house.probe().unwrap();
}

/// Guards H13.
#[test]
fn a_catalog_leads_to_no_link_local_address_wherever_keystone_is() {
    let house = House::new();
    let at = |url: &str| Ok(Endpoint { url: url.into(), anywhere: true });
    house.keystone.change(|session| session.image = at("http://169.254.169.254/image"));
    fails(house.probe(), Unreachable, &["catalog leads to 169.254.169.254", "link-local", "[http] allow"]);
}

#[test]
fn a_token_goes_to_no_other_server() {
    let house = House::new();
    let source = house.open(&house.probe().unwrap(), RemoteOptions::default());
    let other = Server::start(house.object.clone());
    other.on(|_| Reply::With(as_glance(MD5)));
    let to = other.url("/data");
    house.change(|image| image.data = Some(Reply::redirect(to)));
    assert_eq!(house.client.read(&source, 9..99).unwrap(), house.part(9..99));
    assert!(!other.requests().is_empty());
    assert!(other.requests().iter().all(|request| request.header("x-auth-token").is_none()));
}

#[test]
fn an_image_that_comes_as_a_whole_is_transferred_once_from_where_it_is_missing() {
    let house = House::new();
    let url = format!("glance+cloud://prod/{ID}");
    let probed = house.probe_with(&url, RemoteOptions::default(), true).unwrap();
    assert_eq!(probed.head, house.part(0..64 << 10));
    let source = house.open(&probed, briefly());
    let backlog = Arc::new(Backlog::new(64 << 10));
    source.set_backlog(&backlog);
    let taken = Arc::new(Mutex::new(Vec::new()));
    let (into, counts) = (taken.clone(), backlog.clone());
    let deliver = move |piece: &[u8]| {
        counts.came(piece.len() as u64);
        into.lock().unwrap().extend_from_slice(piece);
    };
    let size = house.object.bytes.len() as u64;
    let fetch = source.clone().fetch(400_000..size, Purpose::Hydrate, Instant::now(), Box::new(deliver));
    let task = house.client.runtime.spawn(fetch);
    let mut seen = 0;
    while seen < size as usize - 400_000 {
        let now = taken.lock().unwrap().len();
        backlog.taken((now - seen) as u64);
        seen = now;
        std::thread::yield_now();
    }
    house.client.wait(task).unwrap().unwrap();
    assert_eq!(*taken.lock().unwrap(), house.part(400_000..size));
    let data: Vec<_> = house.server.requests().into_iter().filter(|r| r.target.ends_with("/file")).collect();
    assert!(data.iter().all(|request| request.header("range").is_none()));
    assert_eq!(data.len(), 2, "one for the probe, and one for the transfer");
}

#[test]
fn an_object_of_a_swift_is_read_with_a_token_and_pinned_by_its_etag() {
    let house = House::new();
    house.server.on(|request| match request.header("x-auth-token") {
        Some("token-1") => Reply::Object,
        _ => Reply::status(401),
    });
    let urls = vec!["swift://prod/images/debian.raw".to_owned()];
    let (http, asked, options) = (house.client.http.clone(), urls.clone(), RemoteOptions::default());
    let probed = house.client.wait(async move { http.probe(&asked, &options).await }).unwrap();
    assert_eq!(probed.identity.etag, house.object.etag);
    let source = house.client.http.open(&urls, probed.identity, briefly());
    assert_eq!(house.client.read(&source, 3..300_000).unwrap(), house.part(3..300_000));
    for request in house.server.requests() {
        assert_eq!(request.target, "/swift/v1/AUTH_p/images/debian.raw");
    }
    // A large object's ETag is made of those of its segments, so another segment is another object.
    house.server.set_object(Object::seeded(MIB, 4));
    fails(house.client.read(&source, 0..100), Changed, &["ETag"]);
}

const CLOUDS: &str = "
clouds:
  prod:
    auth: {auth_url: 'http://ADDRESS/identity', username: reader, password: geheim, project_name: p}
";

#[test]
fn keystone_gives_a_token_for_a_password() {
    let server = Server::start(Object::new(1));
    let client = Client::new();
    let cloud = find(&CLOUDS.replace("ADDRESS", &server.address().to_string()), None, "prod").unwrap();
    let ask = || client.wait(client.http.token(&cloud));
    let endpoint = serde_json::json!({ "interface": "public", "region": "R", "url": server.url("/image/") });
    let catalog = serde_json::json!([{ "type": "image", "endpoints": [endpoint] }]);
    let good = serde_json::json!({ "token": {
        "issued_at": "2026-11-30T14:00:00.000000Z", "expires_at": "2026-11-30T14:10:00.000000Z", "catalog": catalog,
    }});
    let reply = move |status| {
        Reply::Status(status, vec![("X-Subject-Token".into(), "token-1".into())], good.to_string().into())
    };
    let created = reply(201);
    server.on(move |_| created.clone());
    let session = ask().unwrap();
    assert_eq!((&*session.token, session.life), ("token-1", Duration::from_secs(600)));
    // Keystone itself is on the loopback interface, so Glance may be too.
    assert_eq!(session.image, Ok(Endpoint { url: server.url("/image"), anywhere: true }));
    let request = &server.requests()[0];
    assert_eq!((&*request.method, &*request.target), ("POST", "/identity/v3/auth/tokens"));
    assert!(String::from_utf8_lossy(&request.body).contains("\"password\":\"geheim\""));
    let answers: HashMap<u16, &str> = [
        (401, "it refuses the user, password or secret"),
        (403, "it forbids a token"),
        (500, "it answers 500"),
    ]
    .into();
    for (status, part) in answers {
        server.on(move |_| Reply::Status(status, Vec::new(), "geheim".into()));
        let why = ask().unwrap_err();
        assert!(why.contains(part) && !why.contains("geheim"), "{why}");
    }
    server.on(|_| Reply::redirect("https://elsewhere.example.org/v3/auth/tokens"));
    assert!(ask().unwrap_err().contains("it redirects (302)"));
    server.on(|_| Reply::Status(201, Vec::new(), "<html>geheim".into()));
    let why = ask().unwrap_err();
    assert!(why.contains("no token") && !why.contains("geheim"), "{why}");
    let mut server = server;
    server.stop();
    assert!(ask().unwrap_err().contains(&format!("keystone at {}", server.address())));
}

/// Only the first URL of a base is probed to its ID.
#[test]
fn an_image_is_read_by_its_name_where_a_mirror_names_it() {
    let house = House::new();
    let probed = house.probe().unwrap();
    let identity = GlanceIdentity::of(&probed.identity).unwrap();
    let by_name = ["glance+cloud://prod/debian".to_owned()];
    let source = house.client.http.open_image(&by_name, identity, briefly());
    assert_eq!(house.client.read(&source, 5..100).unwrap(), house.part(5..100));
    // The image that has the name now is another one.
    house.set("os_hash_value", "cd".repeat(64));
    let identity = GlanceIdentity::of(&probed.identity).unwrap();
    let source = house.client.http.open_image(&by_name, identity, briefly());
    fails(house.client.read(&source, 0..100), Changed, &["os_hash_value is another one"]);
}

/// A part of unknown length would be held in memory as a whole.
#[test]
fn a_part_in_place_of_a_whole_image_is_refused() {
    let house = House::new();
    let probed =
        house.probe_with(&format!("glance+cloud://prod/{ID}"), RemoteOptions::default(), true).unwrap();
    let size = house.object.bytes.len();
    let mut answer = format!(
        "HTTP/1.1 206 Partial Content\r\nContent-MD5: {MD5}\r\nContent-Range: bytes 0-{}/{size}\r\nConnection: \
         close\r\n\r\n",
        size - 1
    )
    .into_bytes();
    answer.extend_from_slice(&house.object.bytes);
    house.change(|image| image.data = Some(Reply::Raw(answer)));
    let source = house.open(&probed, briefly());
    fails(house.client.read_for(&source, 0..size as u64, Purpose::Hydrate), Protocol, &["206"]);
}
