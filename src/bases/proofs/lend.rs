//! Pages of a proof for other hosts. Nothing here sends a request.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::timeout;

use super::ProofPages;
use crate::fetch::kept::SourceKey;
use crate::format::proof::{PAGE, PageId};
use crate::source::pages::{Page, hash_in};

/// How long a page that is under way is waited for.
const WAIT: Duration = Duration::from_secs(2);

/// The proofs of open bases, by the key of the contents.
#[derive(Default)]
pub(in crate::bases) struct OpenProofs(Mutex<HashMap<SourceKey, Weak<ProofPages>>>);

impl OpenProofs {
    pub fn add(&self, key: SourceKey, pages: &Arc<ProofPages>) {
        let mut open = self.0.lock();
        open.retain(|_, pages| pages.strong_count() > 0);
        open.insert(key, Arc::downgrade(pages));
    }

    pub fn get(&self, key: &SourceKey) -> Option<Arc<ProofPages>> {
        self.0.lock().get(key)?.upgrade()
    }
}

impl ProofPages {
    /// Bytes of the proof from the start of a range on, up to the first page that is not here. A page that is under way
    /// is waited for.
    pub async fn lend(&self, range: Range<u64>) -> Vec<u8> {
        let header = self.header.encode();
        let mut bytes = header.get(range.start as usize..).unwrap_or_default().to_vec();
        let levels = (0..self.layout.levels()).rev();
        let pages = levels.flat_map(|level| {
            let (offset, _) = self.layout.place(PageId { level, index: 0 });
            let first = range.start.saturating_sub(offset) / PAGE;
            (first..self.layout.pages(level)).map(move |index| PageId { level, index })
        });
        let end = |page: &PageId| {
            let (offset, length) = self.layout.place(*page);
            offset + length
        };
        for page in pages.skip_while(|page| end(page) <= range.start) {
            let at = range.start + bytes.len() as u64;
            if at >= range.end {
                break;
            }
            let Some(found) = self.here(page).await else { break };
            let (offset, _) = self.layout.place(page);
            let skipped = at.saturating_sub(offset) as usize;
            bytes.extend_from_slice(found.get(skipped..).unwrap_or_default());
        }
        bytes.truncate((range.end - range.start) as usize);
        bytes
    }

    /// A page that is here and proven.
    async fn here(&self, page: PageId) -> Option<Page> {
        if let Some(found) = self.memory.get(&self.header, page) {
            return Some(found);
        }
        for is_reader in [true, false] {
            let turn = self.asking.lock().get(&(page, is_reader)).and_then(Weak::upgrade);
            if let Some(turn) = turn {
                let _ = timeout(WAIT, turn.lock()).await;
            }
        }
        // From the highest level down, so that each page is proven by the one above.
        let mut expected = self.header.root;
        let mut found = None;
        for level in (page.level..self.layout.levels()).rev() {
            let id = PageId { level, index: page.index >> (6 * u32::from(level - page.level)) };
            let bytes = match self.memory.get(&self.header, id) {
                Some(bytes) => bytes,
                None => {
                    let read = self.kept.as_ref()?.read(vec![id]).await;
                    let bytes: Page = read.into_iter().next()?.1.into();
                    if !self.layout.page_has(id, &bytes, &expected) {
                        return None;
                    }
                    self.memory.add(&self.header, id, bytes.clone());
                    bytes
                }
            };
            if level > page.level {
                let below = page.index >> (6 * u32::from(level - 1 - page.level));
                expected = hash_in(&bytes, (below % 64) as usize);
            }
            found = Some(bytes);
        }
        found
    }
}
