//! Bases that are mostly what another base of the host is.

use super::*;
use crate::fetch::kept::CACHE_BLOCK;

const PIECE: u64 = 8;

/// A server of an image, which notes the groups that it is asked for.
struct Image {
    bytes: Vec<u8>,
    asked: Mutex<Vec<Range<u64>>>,
}

impl RemoteSource for Image {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn shown(&self) -> String {
        "the image".into()
    }

    fn fetch(self: Arc<Self>, range: Range<u64>, _: Purpose, _: Instant, mut deliver: Deliver) -> Fetch {
        self.asked.lock().push(range.start / GROUP..range.end.div_ceil(GROUP));
        Box::pin(async move {
            tokio::task::yield_now().await;
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

/// Fetches all of `bytes` piece by piece on a host whose cache has `others`. Returns the groups that the server was asked
/// for, and the bytes that came from others.
fn fetched(bytes: &[u8], others: &[Vec<u8>]) -> (Vec<Range<u64>>, u64) {
    let dir = tempfile::tempdir().unwrap();
    let limits = Limits { bytes: None, bases: None, free_floor: 0 };
    let medium = Arc::new(HostMedium::new(dir.path()).unwrap());
    let cache = DiskCache::open(medium, limits, Arc::new(Silent));
    for (number, other) in (1..).zip(others) {
        let source = cache.attach(SourceKey([number; 32]), other.len() as u64);
        source.insert(0, other);
        assert_eq!(source.cached_bytes(), other.len() as u64);
    }
    let (proof, root) = proof_of(bytes);
    let server = Arc::new(Served { bytes: proof, requests: AtomicUsize::new(0), down: false.into() });
    let memory = Arc::new(ProvenPages::new(PAGES));
    let pages = ProofPages::new((root, bytes.len() as u64), memory, None, server);
    let image = Arc::new(Image { bytes: bytes.to_vec(), asked: Mutex::default() });
    let relatives = Relatives::new(cache);
    let remote = ProvenRemote::new(image.clone(), pages, Vec::new()).with_relatives(relatives.clone());
    let remote = Arc::new(remote);
    let runtime = Threads::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for start in (0..bytes.len() as u64).step_by((PIECE * GROUP) as usize) {
        let range = start..(start + PIECE * GROUP).min(bytes.len() as u64);
        let found = Arc::new(Mutex::new(Vec::new()));
        let into = found.clone();
        let deliver: Deliver = Box::new(move |part| into.lock().extend_from_slice(part));
        let fetch = remote.clone().fetch(range.clone(), Purpose::Demand, Instant::now(), deliver);
        runtime.block_on(fetch).unwrap();
        assert!(*found.lock() == bytes[range.start as usize..range.end as usize], "{range:?}");
    }
    let asked = image.asked.lock().clone();
    (asked, relatives.bytes())
}

fn changed(groups: &[usize]) -> Vec<u8> {
    let mut bytes = image();
    groups.iter().for_each(|group| bytes[group * GROUP as usize + 3] ^= 1);
    bytes
}

/// Guards D108.
#[test]
fn of_the_next_build_of_an_image_only_what_changed_is_fetched() {
    assert_eq!(GROUP, CACHE_BLOCK);
    let (asked, bytes) = fetched(&changed(&[10, 150, 200]), &[image()]);
    // Nothing is known of the other base at the first piece; the last group is short.
    assert_eq!(asked, [0..8, 10..11, 150..151, 200..201]);
    assert_eq!(bytes, (200 - 8 - 2) * GROUP);
    // Longer by less than a group, and shorter.
    let longer = [image(), vec![5; 100]].concat();
    assert_eq!(fetched(&longer, &[image()]).0, [0..8, 200..201]);
    let shorter = &image()[..150 * GROUP as usize];
    assert_eq!(fetched(shorter, &[image()]).0, std::slice::from_ref(&(0..8)));
}

#[test]
fn other_images_cost_no_request_and_few_reads() {
    let other = |seed: u8| image().iter().map(|byte| byte ^ seed).collect::<Vec<u8>>();
    let others: Vec<_> = (1..6).map(other).collect();
    let (asked, bytes) = fetched(&image(), &others);
    let pieces = (0..201_u64).step_by(8).map(|first| first..(first + 8).min(201));
    assert_eq!((asked, bytes), (pieces.collect(), 0));
    // Zeros, which all images have, make no relative.
    let mut mine = image();
    mine[..100 * GROUP as usize].fill(0);
    let mut theirs = other(9);
    theirs[..100 * GROUP as usize].fill(0);
    let (asked, bytes) = fetched(&mine, &[theirs]);
    assert!(bytes <= 100 * GROUP && asked.iter().map(|groups| groups.end - groups.start).sum::<u64>() >= 101);
}

/// The tables of a filesystem, which are read first, have new times and identifiers in each build.
#[test]
fn a_build_whose_beginning_is_all_new_is_found_to_be_related() {
    let groups: Vec<_> = (0..40).collect();
    let (asked, bytes) = fetched(&changed(&groups), &[image()]);
    let fetched: u64 = asked.iter().map(|groups| groups.end - groups.start).sum();
    assert!(fetched <= 40 + PIECE + 64, "{asked:?}");
    assert!(bytes >= 90 * GROUP, "{bytes}");
}

#[test]
fn a_relative_among_other_images_is_found() {
    let other = |seed: u8| image().iter().map(|byte| byte ^ seed).collect::<Vec<u8>>();
    let mut all: Vec<_> = (1..6).map(other).collect();
    all.insert(0, image());
    all.push(other(77));
    let (asked, _) = fetched(&changed(&[90]), &all);
    let groups: u64 = asked.iter().map(|groups| groups.end - groups.start).sum();
    assert!((9..=40).contains(&groups), "{asked:?}");
}
