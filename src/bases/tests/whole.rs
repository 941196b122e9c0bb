//! Images that come as a whole, from a server that has no ranges.

#[allow(clippy::duplicate_mod, reason = "the server of the tests of HTTP, which the library does not have")]
#[path = "../../../tests/http/server.rs"]
mod server;

use std::sync::atomic::{AtomicBool, Ordering};

use self::server::{Object, Reply, Server};
use super::*;
use crate::bases::Delivery;
use crate::source::{Purpose, RemoteSource};

const ID: &str = "0f3b1c1e-7b0a-4f3e-9d63-0c6d6a5a1f10";
const LARGE: usize = 5 << 20;

/// A Glance whose store has no ranges. While `breaks` is set, transfers end in the middle.
struct Glance {
    server: Server,
    object: Object,
    breaks: Arc<AtomicBool>,
}

impl Glance {
    fn new() -> Self {
        let object = Object::new(LARGE);
        let server = Server::start(object.clone());
        let breaks = Arc::new(AtomicBool::new(false));
        let (bytes, broken) = (object.bytes.clone(), breaks.clone());
        let sha512: String =
            sha2::Sha512::digest(&**bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        server.on(move |request| {
            if !request.target.ends_with("/file") {
                let record = serde_json::json!({
                    "id": ID, "status": "active", "size": LARGE, "os_hash_algo": "sha512",
                    "os_hash_value": sha512, "disk_format": "raw", "container_format": "bare",
                });
                return Reply::Status(200, Vec::new(), record.to_string().into());
            }
            if request.range().is_some() {
                let why = "Getting images randomly from this store is not supported";
                return Reply::Status(400, Vec::new(), why.into());
            }
            match broken.load(Ordering::SeqCst) {
                true => {
                    let mut text = format!("HTTP/1.1 200 OK\r\nContent-Length: {LARGE}\r\n\r\n").into_bytes();
                    text.extend_from_slice(&bytes[..LARGE / 2]);
                    Reply::Raw(text)
                }
                false => Reply::Status(200, Vec::new(), bytes.to_vec()),
            }
        });
        Self { server, object, breaks }
    }

    fn description(&self, delivery: Delivery) -> Description {
        let source = format!("glance+http://{}/{ID}", self.server.address());
        let image = File { source, mirrors: Vec::new(), format: None };
        Description { image, delivery, ..raw("debian", std::path::Path::new("/none")) }
    }

    /// Requests for the whole of the data.
    fn transfers(&self) -> usize {
        let whole =
            |request: &&server::Request| request.target.ends_with("/file") && request.range().is_none();
        self.server.requests().iter().filter(whole).count()
    }
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !condition() {
        assert!(Instant::now() < end, "did not happen in 60 s: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A read of the image, as the cache of fetched blocks makes it.
fn read(house: &House, base: &BaseNode, range: std::ops::Range<u64>) -> Vec<u8> {
    let sources = house.bases.sources();
    let image = sources.whole_image(base.record(), &base.record().image).expect("it comes as a whole");
    let (send, receive) = std::sync::mpsc::channel();
    let deliver = Box::new(move |piece: &[u8]| _ = send.send(piece.to_vec()));
    let fetch = image.fetch(range, Purpose::Demand, Instant::now(), deliver);
    sources
        .handle()
        .block_on(async { tokio::time::timeout(Duration::from_secs(60), fetch).await })
        .expect("no result in 60 s")
        .expect("the bytes");
    receive.iter().flatten().collect()
}

fn refused(added: Result<Arc<BaseNode>, StoreError>) -> String {
    added.err().expect("it is refused").to_string()
}

#[test]
fn an_image_without_ranges_is_transferred_once_and_read_from_the_store() {
    let (glance, house) = (Glance::new(), House::new());
    let refused = refused(house.add(glance.description(Delivery::Ranges)));
    assert!(refused.contains("no random access") && refused.contains("--download"), "{refused}");
    let base = house.add(glance.description(Delivery::Whole)).unwrap();
    assert!(base.options().hydrate, "its job continues under the next worker");
    let end = LARGE as u64;
    assert_eq!(read(&house, &base, end - 70_001..end), glance.object.bytes[LARGE - 70_001..]);
    assert_eq!(read(&house, &base, 5..100_000), glance.object.bytes[5..100_000]);
    house.hydrated("debian");
    let contents = house.bases.sources().contents(base.record(), &base.record().image);
    assert!(contents.is_complete(Reach::Proven) && contents.is_verified());
    assert_eq!(glance.transfers(), 2, "one for its first bytes, and one for all");
}

#[test]
fn a_transfer_that_breaks_goes_on_where_bytes_are_missing_and_reads_wait_meanwhile() {
    let (glance, house) = (Glance::new(), House::new());
    glance.breaks.store(true, Ordering::SeqCst);
    let base = house.add(glance.description(Delivery::Whole)).unwrap();
    // The first half is here while the second never comes.
    assert_eq!(read(&house, &base, 0..1 << 20), glance.object.bytes[..1 << 20]);
    let sources = house.bases.sources().clone();
    let image = sources.whole_image(base.record(), &base.record().image).unwrap();
    let (reader, bytes) = (image.clone(), glance.object.bytes.clone());
    let (send, receive) = std::sync::mpsc::channel();
    let deliver = Box::new(move |piece: &[u8]| _ = send.send(piece.to_vec()));
    let fetch = reader.fetch(LARGE as u64 - 10..LARGE as u64, Purpose::Demand, Instant::now(), deliver);
    let waits = sources.handle().spawn(fetch);
    wait_for("the read says what it waits for", || {
        image.stall().is_some_and(|stall| stall.why.contains("fetched as a whole"))
    });
    glance.breaks.store(false, Ordering::SeqCst);
    sources.handle().block_on(waits).unwrap().unwrap();
    assert_eq!(receive.iter().flatten().collect::<Vec<u8>>(), bytes[LARGE - 10..]);
    assert!(image.stall().is_none());
}

#[test]
fn a_read_of_an_image_whose_job_was_cancelled_says_how_to_begin_it_again() {
    let (glance, house) = (Glance::new(), House::new());
    glance.breaks.store(true, Ordering::SeqCst);
    let base = house.add(glance.description(Delivery::Whole)).unwrap();
    let sources = house.bases.sources().clone();
    let image = sources.whole_image(base.record(), &base.record().image).unwrap();
    let fetch = image.clone().fetch(
        LARGE as u64 - 10..LARGE as u64,
        Purpose::Demand,
        Instant::now(),
        Box::new(|_| {}),
    );
    let waits = sources.handle().spawn(fetch);
    wait_for("the read waits", || image.stall().is_some());
    house.bases.cancel_job("hydrate-debian").unwrap();
    wait_for("the read says so", || {
        image.stall().is_some_and(|stall| stall.why.contains("plyfs base hydrate"))
    });
    house.bases.give_up("debian", true).unwrap();
    let error = sources.handle().block_on(waits).unwrap().unwrap_err().to_string();
    assert!(error.contains("its operator gave it up"), "{error}");
}

#[test]
fn an_image_that_the_cache_has_no_room_for_is_not_registered() {
    let glance = Glance::new();
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let house = House::configured(dir, |config| config.cache_disk = Some(1 << 20));
    let why = refused(house.add(glance.description(Delivery::Whole)));
    assert!(why.contains("--cache-disk"), "{why}");
    assert!(house.bases.store.base("debian").is_err());
}
