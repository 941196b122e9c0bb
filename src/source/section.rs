//! A part of a remote object, as an object of its own.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::{Deliver, Fetch, Purpose, RemoteSource, SourceError, Stall, UrlState};

/// See the module.
pub struct Section {
    whole: Arc<dyn RemoteSource>,
    range: Range<u64>,
}

impl Section {
    /// The bytes of `range`, which lies inside the object.
    pub fn new(whole: Arc<dyn RemoteSource>, range: Range<u64>) -> Self {
        Self { whole, range }
    }
}

impl RemoteSource for Section {
    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn shown(&self) -> String {
        self.whole.shown()
    }

    fn fetch(
        self: Arc<Self>,
        range: Range<u64>,
        purpose: Purpose,
        since: Instant,
        deliver: Deliver,
    ) -> Fetch {
        let start = self.range.start;
        self.whole.clone().fetch(start + range.start..start + range.end, purpose, since, deliver)
    }

    fn stall(&self) -> Option<Stall> {
        self.whole.stall()
    }

    fn set_urls(&self, urls: &[String]) -> Result<(), SourceError> {
        self.whole.set_urls(urls)
    }

    fn give_up(&self, given_up: bool) {
        self.whole.give_up(given_up);
    }

    fn urls(&self) -> Vec<UrlState> {
        self.whole.urls()
    }
}
