use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::runtime::{Builder as Threads, Runtime};

use super::*;
use crate::fetch::kept::{CacheObserver, DiskCache, EvictReason, Limits, OnDamage, SourceKey};
use crate::format::proof::{Builder, ProofHeader};
use crate::io::HostMedium;
use crate::source::proven_key;

mod relatives;

const SIZE: usize = 200 * GROUP as usize + 5;

fn image() -> Vec<u8> {
    (0..SIZE as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as u8).collect()
}

fn proof_of(bytes: &[u8]) -> (Vec<u8>, Hash) {
    let mut builder = Builder::new(bytes.len() as u64);
    let mut proof = vec![0; builder.layout().proof_size() as usize];
    let mut put = |offset: u64, page: &[u8]| -> Result<(), ()> {
        proof[offset as usize..offset as usize + page.len()].copy_from_slice(page);
        Ok(())
    };
    builder.update(bytes, &mut put).unwrap();
    let root = builder.root().unwrap();
    let head = ProofHeader { size: bytes.len() as u64, root }.encode();
    proof[..head.len()].copy_from_slice(&head);
    (proof, root)
}

/// A proof on a server that counts its requests, and may be down.
struct Served {
    bytes: Vec<u8>,
    requests: AtomicUsize,
    down: std::sync::atomic::AtomicBool,
}

impl RemoteSource for Served {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn shown(&self) -> String {
        "the proof".into()
    }

    fn fetch(self: Arc<Self>, range: Range<u64>, _: Purpose, _: Instant, mut deliver: Deliver) -> Fetch {
        self.requests.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            // Another request may come while this one is under way.
            tokio::task::yield_now().await;
            assert!(!self.down.load(Ordering::SeqCst), "no request is needed");
            deliver(&self.bytes[range.start as usize..range.end as usize]);
            Ok(())
        })
    }

    fn stall(&self) -> Option<Stall> {
        None
    }

    fn set_urls(&self, _: &[String]) -> Result<(), SourceError> {
        Ok(())
    }

    fn give_up(&self, _: bool) {}

    fn urls(&self) -> Vec<UrlState> {
        Vec::new()
    }
}

struct Silent;

impl CacheObserver for Silent {
    fn evicted(&self, _: &SourceKey, _: u64, _: EvictReason) {}
    fn degraded(&self, _: Option<&str>) {}
}

struct House {
    dir: tempfile::TempDir,
    runtime: Runtime,
    server: Arc<Served>,
    root: Hash,
}

impl House {
    fn new() -> Self {
        let (bytes, root) = proof_of(&image());
        let server = Served { bytes, requests: AtomicUsize::new(0), down: false.into() };
        Self {
            dir: tempfile::tempdir().unwrap(),
            runtime: Threads::new_multi_thread().worker_threads(2).enable_all().build().unwrap(),
            server: Arc::new(server),
            root,
        }
    }

    /// As a worker that starts: nothing is in memory.
    fn pages(&self) -> Arc<ProofPages> {
        let limits = Limits { bytes: Some(1 << 30), bases: None, free_floor: 0 };
        let medium = Arc::new(HostMedium::new(self.dir.path()).unwrap());
        let cache = DiskCache::prepare(medium, limits, Arc::new(Silent), OnDamage::Keep);
        let header = ProofHeader { size: SIZE as u64, root: self.root };
        let key = SourceKey(proven_key(&self.root, SIZE as u64));
        let kept = KeptPages::new(&ProofDisk::new(cache), key, header);
        let memory = Arc::new(ProvenPages::new(64));
        ProofPages::new((self.root, SIZE as u64), memory, Some(kept), self.server.clone())
    }

    fn parts(&self, pages: &Arc<ProofPages>, range: Range<u64>) -> Parts {
        self.runtime.block_on(pages.parts(range, Purpose::Demand, Instant::now())).unwrap()
    }

    fn proves_all(&self, parts: &Parts) {
        let image = image();
        for (at, group) in (0..).step_by(GROUP as usize).zip(image.chunks(GROUP as usize)) {
            assert!(parts.prove(at, group), "the group at {at}");
        }
    }

    fn requests(&self) -> usize {
        self.server.requests.load(Ordering::SeqCst)
    }

    fn file(&self) -> std::path::PathBuf {
        let key = SourceKey(proven_key(&self.root, SIZE as u64));
        self.dir.path().join(format!("cache/{key}.proof"))
    }

    /// Waits until all pages are in the file.
    fn wait_until_kept(&self) {
        let end = Instant::now() + std::time::Duration::from_secs(30);
        while fs::read(self.file()).ok().as_deref() != Some(&self.server.bytes[..]) {
            assert!(Instant::now() < end, "the pages are not kept");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}

#[test]
fn pages_are_fetched_once_for_all_readers_and_not_again_by_the_next_worker() {
    let house = House::new();
    let pages = house.pages();
    let readers: Vec<_> = (0..20)
        .map(|_| {
            let pages = pages.clone();
            house
                .runtime
                .spawn(async move { pages.parts(0..SIZE as u64, Purpose::Demand, Instant::now()).await })
        })
        .collect();
    for reader in readers {
        house.proves_all(&house.runtime.block_on(reader).unwrap().unwrap());
    }
    // The highest page, and the four below it.
    assert_eq!(house.requests(), 2);
    house.wait_until_kept();
    // What is kept is the proof itself.
    house.server.down.store(true, Ordering::SeqCst);
    house.proves_all(&house.parts(&house.pages(), 0..SIZE as u64));
    assert_eq!(house.requests(), 2);
}

/// Guards D104.
#[test]
fn a_kept_page_that_is_torn_or_anything_else_is_fetched_again() {
    let house = House::new();
    house.proves_all(&house.parts(&house.pages(), 0..SIZE as u64));
    house.wait_until_kept();
    let good = house.server.bytes.clone();
    let layout = Layout::of(SIZE as u64);
    let pages = (0..layout.levels())
        .flat_map(|level| (0..layout.pages(level)).map(move |index| PageId { level, index }));
    for page in pages {
        let (offset, length) = layout.place(page);
        let (from, to) = (offset as usize, (offset + length) as usize);
        // As a power cut leaves it: zeros, or the beginning of what was written; then other damage.
        let damaged = |change: &dyn Fn(&mut Vec<u8>)| {
            let mut bytes = good.clone();
            change(&mut bytes);
            fs::write(house.file(), bytes).unwrap();
            let before = house.requests();
            house.proves_all(&house.parts(&house.pages(), 0..SIZE as u64));
            assert_eq!(house.requests(), before + 1, "{page:?}");
            house.wait_until_kept();
        };
        damaged(&|bytes| bytes[from..to].fill(0));
        damaged(&|bytes| bytes[from + 5..to].fill(0));
        damaged(&|bytes| bytes[to - 1] ^= 1);
    }
    // A file that ends early, with no header; none at all; one that cannot be read.
    for bytes in [&good[..HEADER_BYTES], &good[..1], &[]] {
        fs::write(house.file(), bytes).unwrap();
        house.proves_all(&house.parts(&house.pages(), 0..SIZE as u64));
        house.wait_until_kept_pages();
    }
    fs::remove_file(house.file()).unwrap();
    fs::create_dir(house.file()).unwrap();
    house.proves_all(&house.parts(&house.pages(), 0..SIZE as u64));
}

const HEADER_BYTES: usize = crate::format::proof::HEADER_AREA as usize;

impl House {
    /// As [`wait_until_kept`](Self::wait_until_kept), without the header.
    fn wait_until_kept_pages(&self) {
        let end = Instant::now() + std::time::Duration::from_secs(30);
        while fs::read(self.file()).ok().as_deref().and_then(|bytes| bytes.get(HEADER_BYTES..))
            != Some(&self.server.bytes[HEADER_BYTES..])
        {
            assert!(Instant::now() < end, "the pages are not kept");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }
}

#[test]
fn the_beginning_of_a_proof_gives_the_pages_that_it_has_and_none_that_are_wrong() {
    let house = House::new();
    let head = &house.server.bytes;
    // The highest page, and two of the four below it.
    let two = HEADER_BYTES + 4 * 32 + 2 * 2048;
    let pages = house.pages();
    assert!(pages.take_head(&head[..two + 100]));
    house.parts(&pages, 0..128 * GROUP);
    assert_eq!(house.requests(), 0);
    house.proves_all(&house.parts(&pages, 0..SIZE as u64));
    assert_eq!(house.requests(), 1);
    let mut wrong = head.clone();
    wrong[HEADER_BYTES] ^= 1;
    assert!(!house.pages().take_head(&wrong));
    assert!(!house.pages().take_head(&head[..HEADER_BYTES + 100]));
    assert!(!house.pages().take_head(&[]));
}

#[test]
fn memory_has_as_many_pages_as_it_may_have() {
    let pages = ProvenPages::new(64);
    let page = |index| PageId { level: 0, index };
    let of = |size, root| ProofHeader { size, root: [root; 32] };
    for index in 0..1000 {
        pages.add(&of(5, 1), page(index), Page::from(vec![0; 32]));
        assert!(pages.get(&of(5, 1), page(0)).is_some(), "a page that is used stays");
        assert!(pages.count() <= 64);
    }
    assert!(pages.get(&of(5, 1), page(1)).is_none());
    assert!(pages.get(&of(5, 2), page(0)).is_none(), "a page of another proof");
    assert!(pages.get(&of(6, 1), page(0)).is_none(), "a page of a proof of another size");
}

#[test]
fn a_proof_lies_beside_the_image_under_its_name() {
    for (image, proof) in [
        ("/srv/a.qcow2", "/srv/a.qcow2.obao"),
        ("/srv/what?.raw", "/srv/what?.raw.obao"),
        ("https://h/a.raw", "https://h/a.raw.obao"),
        ("https://h/a.raw?token=x/y#z", "https://h/a.raw.obao?token=x/y"),
        ("https://h/a.raw#z", "https://h/a.raw.obao"),
        // A version is one of the image, and a # is a part of a key.
        ("s3://b/a.raw?versionId=v", "s3://b/a.raw.obao"),
        ("s3://b/a#1.raw", "s3://b/a#1.raw.obao"),
    ] {
        assert_eq!(beside(image), proof);
    }
    let urls = |all: &[&str]| all.iter().map(|url| (*url).to_owned()).collect::<Vec<_>>();
    let (old, new) = (urls(&["https://h/a.obao"]), urls(&["https://n/a", "https://m/a"]));
    // A base that was moved is looked for there, too.
    assert_eq!(places_of(&urls(&["https://h/a"]), &old), old);
    assert_eq!(places_of(&new, &old), urls(&["https://h/a.obao", "https://n/a.obao", "https://m/a.obao"]));
}

/// The hash of `bytes`, which lie at `offset` of a file that is longer.
fn subtree(bytes: &[u8], offset: usize) -> Hash {
    use blake3::hazmat::HasherExt as _;
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(offset as u64).update(bytes);
    hasher.finalize_non_root()
}

/// The highest page of a proof says nothing of the size: halves of groups, taken for groups of a file of twice the size,
/// have the same root.
///
/// Guards D104.
#[test]
fn a_proof_of_another_size_with_the_same_root_spoils_no_page_of_a_base() {
    let house = House::new();
    let (size, half) = (4 * GROUP as usize, GROUP as usize / 2);
    let image = &image()[..size];
    let (bytes, root) = proof_of(image);
    let memory = Arc::new(ProvenPages::new(64));
    let pages = |size: usize, bytes: Vec<u8>| {
        let server = Served { bytes, requests: AtomicUsize::new(0), down: false.into() };
        ProofPages::new((root, size as u64), memory.clone(), None, Arc::new(server))
    };
    let halves = image.chunks(half).enumerate().map(|(at, bytes)| subtree(bytes, at * half));
    let mut hostile = ProofHeader { size: 2 * size as u64, root }.encode();
    hostile.extend(halves.flatten());
    assert!(pages(2 * size, hostile.clone()).take_head(&hostile), "it belongs to the root");
    let parts = house.parts(&pages(size, bytes.clone()), 0..size as u64);
    for (at, group) in (0..).step_by(GROUP as usize).zip(image.chunks(GROUP as usize)) {
        assert!(parts.prove(at, group), "the group at {at}");
    }
    // The other way round: the right page is too short for the other file.
    assert!(pages(size, bytes.clone()).take_head(&bytes));
    let other = house.parts(&pages(2 * size, hostile), 0..2 * size as u64);
    assert!(!other.prove(0, &image[..GROUP as usize]));
}
