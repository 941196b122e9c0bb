//! Proofs of files that are fetched: their pages, and a remote whose bytes are proven by them.
//!
//! What must hold:
//! - Bytes of such a file reach a reader or the cache only in groups that are proven (D103).
//! - A page is used only when it is proven by the page above it, up to the root, wherever it came from: memory, the disk
//!   of the cache, or a server (D104). So neither a server nor that disk is trusted, and none of them can spoil a page for
//!   good.
//! - The hashes of a range come while its bytes come: a fetch sends both requests at once.
//! - A server of the proof that is down, or sends wrong pages, is waited for like a server of the image.

mod find;
mod kept;
mod lend;
mod relatives;
#[cfg(test)]
mod tests;
mod timed;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Instant;

use parking_lot::Mutex;
use tokio::sync::{Mutex as Turn, OwnedMutexGuard};

pub use self::find::Wanted;
pub(super) use self::kept::{KeptPages, ProofDisk};
pub(super) use self::lend::OpenProofs;
pub(super) use self::relatives::{Guesses, Relatives};
use crate::format::proof::{FAN, GROUP, Hash, Layout, PageId, ProofHeader, SUFFIX};
use crate::source::http::peer::is_peer;
use crate::source::pages::{Page, ProvenPages, hash_in};
use crate::source::{
    Deliver, Fetch, Kind, Parts, ProofOfRange, Purpose, RemoteSource, SourceError, Stall, UrlState,
};

/// Pages of all proofs in memory: 8 MiB.
pub(super) const PAGES: usize = 4096;
/// Pages that a hydration fetches at once: the proof of 32 MiB.
const AHEAD: u64 = 32;

/// The pages of the proof of one file.
pub struct ProofPages {
    header: ProofHeader,
    layout: Arc<Layout>,
    memory: Arc<ProvenPages>,
    kept: Option<KeptPages>,
    remote: Arc<dyn RemoteSource>,
    /// The fetch of each page that is under way; later askers wait for it. Readers wait for readers only.
    asking: Mutex<Turns>,
}

/// By page, and by whether a reader asks.
type Turns = HashMap<(PageId, bool), Weak<Turn<()>>>;

impl ProofPages {
    /// Of a file with `size` bytes and this hash. `remote` has the proof, of the size that follows from that of the
    /// file.
    pub fn new(
        (root, size): (Hash, u64),
        memory: Arc<ProvenPages>,
        kept: Option<KeptPages>,
        remote: Arc<dyn RemoteSource>,
    ) -> Arc<Self> {
        let (layout, asking) = (Arc::new(Layout::of(size)), Mutex::default());
        Arc::new(Self { header: ProofHeader { size, root }, layout, memory, kept, remote, asking })
    }

    /// The hashes of the groups of a range, as a fetch takes them.
    pub fn of_range(self: &Arc<Self>, range: Range<u64>, purpose: Purpose, since: Instant) -> ProofOfRange {
        let this = self.clone();
        ProofOfRange { unit: GROUP, parts: Box::pin(async move { this.parts(range, purpose, since).await }) }
    }

    /// The hashes of the groups that a range touches.
    ///
    /// # Errors
    /// As [`RemoteSource::fetch`] of the proof.
    pub async fn parts(
        &self,
        range: Range<u64>,
        purpose: Purpose,
        since: Instant,
    ) -> Result<Parts, SourceError> {
        let groups = range.start / GROUP..range.end.min(self.layout.size()).div_ceil(GROUP);
        if self.layout.levels() == 0 {
            return Ok(Parts::groups(&self.layout, 0, vec![self.header.root]));
        }
        let pages = pages_of(&groups);
        let found = match self.in_memory(0, &pages) {
            Some(found) => found,
            None => self.lowest(pages, purpose, since).await?,
        };
        Ok(self.hashes(groups, &found))
    }

    /// As [`parts`](Self::parts), when the hashes are in memory.
    fn parts_now(&self, range: &Range<u64>) -> Option<Parts> {
        if self.layout.levels() == 0 {
            return Some(Parts::groups(&self.layout, 0, vec![self.header.root]));
        }
        let groups = range.start / GROUP..range.end.min(self.layout.size()).div_ceil(GROUP);
        let found = self.in_memory(0, &pages_of(&groups))?;
        Some(self.hashes(groups, &found))
    }

    /// The hashes of groups, which are in `pages`.
    fn hashes(&self, groups: Range<u64>, pages: &[Page]) -> Parts {
        let first = groups.start / FAN;
        let hash = |group: u64| hash_in(&pages[(group / FAN - first) as usize], (group % FAN) as usize);
        Parts::groups(&self.layout, groups.start, groups.map(hash).collect())
    }

    fn in_memory(&self, level: u8, pages: &Range<u64>) -> Option<Vec<Page>> {
        pages.clone().map(|index| self.memory.get(&self.header, PageId { level, index })).collect()
    }

    /// Pages of the lowest level: what is missing is fetched from the highest level down, so that each page can be
    /// proven when it comes.
    async fn lowest(
        &self,
        wanted: Range<u64>,
        purpose: Purpose,
        since: Instant,
    ) -> Result<Vec<Page>, SourceError> {
        let mut wanted = wanted;
        let whole = wanted.clone();
        if purpose == Purpose::Hydrate {
            let end = wanted.end.next_multiple_of(AHEAD).min(self.layout.pages(0));
            wanted = wanted.start..end.max(wanted.end);
        }
        let mut above: Option<(Range<u64>, Vec<Page>)> = None;
        for level in (0..self.layout.levels()).rev() {
            let scale = FAN.pow(level.into());
            let pages = wanted.start / scale..(wanted.end - 1) / scale + 1;
            let expected: Vec<Hash> = match &above {
                None => vec![self.header.root],
                Some((first, found)) => pages
                    .clone()
                    .map(|index| {
                        let (parent, at) = PageId { level, index }.parent();
                        hash_in(&found[(parent.index - first.start) as usize], at)
                    })
                    .collect(),
            };
            let found = self.level(level, pages.clone(), &expected, purpose, since).await?;
            above = Some((pages, found));
        }
        let mut found = above.map(|(_, found)| found).unwrap_or_default();
        found.truncate((whole.end - whole.start) as usize);
        Ok(found)
    }

    /// Pages of one level, with these hashes.
    async fn level(
        &self,
        level: u8,
        pages: Range<u64>,
        expected: &[Hash],
        purpose: Purpose,
        since: Instant,
    ) -> Result<Vec<Page>, SourceError> {
        if let Some(found) = self.in_memory(level, &pages) {
            return Ok(found);
        }
        let page = |index| PageId { level, index };
        let hash = |index: u64| &expected[(index - pages.start) as usize];
        let mut found: Vec<Option<Page>> = Vec::with_capacity(expected.len());
        let mut turns = Vec::new();
        for index in pages.clone() {
            let mut here = self.memory.get(&self.header, page(index));
            if here.is_none() {
                // In ascending order, so that no two fetches wait for each other.
                turns.push(self.turn(page(index), purpose == Purpose::Demand).await);
                here = self.memory.get(&self.header, page(index));
            }
            found.push(here);
        }
        let missing = |found: &[Option<Page>]| -> Vec<u64> {
            pages.clone().zip(found).filter(|(_, here)| here.is_none()).map(|(index, _)| index).collect()
        };
        if let Some(kept) = &self.kept {
            let wanted = missing(&found).into_iter().map(page).collect();
            for (page, bytes) in kept.read(wanted).await {
                if self.layout.page_has(page, &bytes, hash(page.index)) {
                    let bytes: Page = bytes.into();
                    self.memory.add(&self.header, page, bytes.clone());
                    found[(page.index - pages.start) as usize] = Some(bytes);
                }
            }
        }
        for run in missing(&found).chunk_by(|one, next| one + 1 == *next) {
            let (first, hashes) = (page(run[0]), run.iter().map(|index| *hash(*index)).collect());
            for (index, bytes) in run.iter().zip(self.fetch(first, hashes, purpose, since).await?) {
                found[(index - pages.start) as usize] = Some(bytes);
            }
        }
        Ok(found.into_iter().flatten().collect())
    }

    /// The right to fetch a page.
    async fn turn(&self, page: PageId, is_reader: bool) -> OwnedMutexGuard<()> {
        let turn = {
            let mut asking = self.asking.lock();
            asking.retain(|_, turn| turn.strong_count() > 0);
            let known = asking.get(&(page, is_reader)).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let turn = Arc::new(Turn::new(()));
                asking.insert((page, is_reader), Arc::downgrade(&turn));
                turn
            })
        };
        turn.lock_owned().await
    }

    /// Fetches adjacent pages with these hashes, from `first` on.
    async fn fetch(
        &self,
        first: PageId,
        hashes: Vec<Hash>,
        purpose: Purpose,
        since: Instant,
    ) -> Result<Vec<Page>, SourceError> {
        let parts = Parts::pages(&self.layout, first, hashes);
        let range = parts.range();
        let came = Arc::new(Mutex::new(Vec::new()));
        let into = came.clone();
        // A proven part is delivered as a whole.
        let deliver: Deliver = Box::new(move |page| into.lock().push(Page::from(page)));
        self.remote.clone().fetch_proven(range, purpose, since, deliver, parts.known()).await?;
        let came = std::mem::take(&mut *came.lock());
        for (index, page) in (first.index..).zip(&came) {
            self.memory.add(&self.header, PageId { index, ..first }, page.clone());
        }
        self.keep(first, &came);
        Ok(came)
    }

    /// Keeps adjacent pages on disk. Does not wait.
    fn keep(&self, first: PageId, pages: &[Page]) {
        if let Some(kept) = &self.kept {
            let place =
                |(index, page): (u64, &Page)| (self.layout.place(PageId { index, ..first }).0, page.clone());
            kept.keep((first.index..).zip(pages).map(place).collect());
        }
    }

    /// Takes the pages in the beginning of a proof that are proven by each other and the root. Returns whether the
    /// highest page is one of them.
    pub fn take_head(&self, head: &[u8]) -> bool {
        if self.layout.levels() == 0 {
            return true;
        }
        let mut any = false;
        for level in (0..self.layout.levels()).rev() {
            for index in 0..self.layout.pages(level) {
                let page = PageId { level, index };
                let (offset, length) = self.layout.place(page);
                let Some(bytes) = head.get(offset as usize..(offset + length) as usize) else { return any };
                let hash = match self.layout.is_top(page) {
                    true => Some(self.header.root),
                    false => {
                        let (parent, at) = page.parent();
                        self.memory.get(&self.header, parent).map(|parent| hash_in(&parent, at))
                    }
                };
                if !hash.is_some_and(|hash| self.layout.page_has(page, bytes, &hash)) {
                    return any;
                }
                let bytes: Page = bytes.into();
                self.memory.add(&self.header, page, bytes.clone());
                self.keep(page, &[bytes]);
                any = true;
            }
        }
        any
    }
}

/// The pages of the lowest level with the hashes of these groups.
fn pages_of(groups: &Range<u64>) -> Range<u64> {
    groups.start / FAN..groups.end.max(groups.start + 1).div_ceil(FAN)
}

/// The URL or path of a proof beside an image.
pub(super) fn beside(image: &str) -> String {
    // A URL of no kind is refused elsewhere.
    Kind::of(image).unwrap_or(Kind::Http).neighbour(image, SUFFIX)
}

/// The URLs of the proofs beside an image, of those of its URLs that another object can be beside.
fn neighbours(urls: &[String]) -> impl Iterator<Item = String> {
    urls.iter().filter(|url| Kind::of(url).is_ok_and(Kind::has_neighbours)).map(|url| beside(url))
}

/// Where the proof of a file is that is read at `urls` now and was registered with `places`: a base that was moved finds
/// it beside its new URLs, too. A place without the proof is passed over like any URL that does not work.
pub(super) fn places_of(urls: &[String], places: &[String]) -> Vec<String> {
    let mut all = places.to_vec();
    // The names of proofs that the operator gave do not follow from those of the image.
    if !urls.iter().any(|url| places.contains(&beside(url))) {
        all.extend(neighbours(urls));
    }
    // A peer has the proof of what it has.
    all.extend(urls.iter().filter(|url| is_peer(url)).cloned());
    all
}

/// A remote whose bytes are proven.
pub struct ProvenRemote {
    remote: Arc<dyn RemoteSource>,
    proof: Arc<ProofPages>,
    /// Where the proof was when the base was registered.
    places: Vec<String>,
    guesses: Option<Arc<Guesses>>,
}

impl ProvenRemote {
    /// `proof` is the proof of what `remote` has, and was at `places`.
    pub fn new(remote: Arc<dyn RemoteSource>, proof: Arc<ProofPages>, places: Vec<String>) -> Self {
        Self { remote, proof, places, guesses: None }
    }

    /// Groups may come from other bases of this host.
    pub fn with_relatives(self, relatives: Arc<Relatives>) -> Self {
        let guesses = (!self.is_local()).then(|| Arc::new(Guesses::new(relatives)));
        Self { guesses, ..self }
    }
}

impl RemoteSource for ProvenRemote {
    fn size(&self) -> u64 {
        self.remote.size()
    }

    fn shown(&self) -> String {
        self.remote.shown()
    }

    fn fetch(
        self: Arc<Self>,
        range: Range<u64>,
        purpose: Purpose,
        since: Instant,
        deliver: Deliver,
    ) -> Fetch {
        // Groups are proven as a whole. What was not asked for is dropped.
        let whole = range.start / GROUP * GROUP..range.end.next_multiple_of(GROUP).min(self.size());
        let deliver = only(range, whole.start, deliver);
        if let Some(guesses) = self.guesses.clone() {
            let known = self.proof.parts_now(&whole);
            let keys = guesses.choose(&whole, known.is_some());
            if !keys.is_empty() {
                return Box::pin(async move {
                    let parts = match known {
                        Some(parts) => parts,
                        None => self.proof.parts(whole, purpose, since).await?,
                    };
                    guesses.fetch((keys, parts), self.remote.clone(), (purpose, since), deliver).await
                });
            }
        }
        let proof = self.proof.of_range(whole.clone(), purpose, since);
        self.remote.clone().fetch_proven(whole, purpose, since, deliver, proof)
    }

    fn stall(&self) -> Option<Stall> {
        let both = [self.remote.stall(), self.proof.remote.stall()];
        both.into_iter().flatten().min_by_key(|stall| stall.since)
    }

    fn set_urls(&self, urls: &[String]) -> Result<(), SourceError> {
        self.remote.set_urls(urls)?;
        if self.proof.remote.is_local() {
            Ok(())
        } else {
            self.proof.remote.set_urls(&places_of(urls, &self.places))
        }
    }

    fn give_up(&self, given_up: bool) {
        self.remote.give_up(given_up);
        self.proof.remote.give_up(given_up);
    }

    fn urls(&self) -> Vec<UrlState> {
        self.remote.urls()
    }

    fn proof_urls(&self) -> Vec<UrlState> {
        self.proof.remote.urls()
    }

    fn is_local(&self) -> bool {
        self.remote.is_local()
    }
}

/// Delivers only the bytes of `range`, of those that come from `start` on.
fn only(range: Range<u64>, start: u64, mut deliver: Deliver) -> Deliver {
    let mut at = start;
    Box::new(move |bytes| {
        let end = at + bytes.len() as u64;
        let (from, to) = (range.start.clamp(at, end), range.end.clamp(at, end));
        if from < to {
            deliver(&bytes[(from - at) as usize..(to - at) as usize]);
        }
        at = end;
    })
}
