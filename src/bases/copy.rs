//! A file of this host as a source that is fetched, so that the store can keep a copy of it.

use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use parking_lot::Mutex;

use crate::source::{
    Completion, Deliver, Fetch, FileSource, Purpose, RemoteSource, Source, SourceError, SourceErrorKind,
    Spawn, Stall, UrlState,
};

/// Bytes of one read.
const PIECE: u64 = 1 << 20;

/// See the module.
pub struct CopiedFile {
    path: String,
    size: u64,
    /// None while the file is gone; then all bytes must be in the store.
    original: Mutex<Option<Arc<FileSource>>>,
    open: Reopen,
    spawn: Arc<dyn Spawn>,
}

/// Opens the original, if it is the file that was registered.
pub type Reopen = Box<dyn Fn() -> Option<Arc<FileSource>> + Send + Sync>;

impl CopiedFile {
    /// Of the file that was registered. When `original` is none, `open` is called at the next fetch.
    pub fn new(
        path: &str,
        size: u64,
        original: Option<Arc<FileSource>>,
        open: Reopen,
        spawn: Arc<dyn Spawn>,
    ) -> Self {
        Self { path: path.into(), size, original: Mutex::new(original), open, spawn }
    }

    fn original(&self) -> Option<Arc<FileSource>> {
        if let Some(original) = &*self.original.lock() {
            return Some(original.clone());
        }
        let found = (self.open)();
        self.original.lock().clone_from(&found);
        found
    }
}

impl RemoteSource for CopiedFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn shown(&self) -> String {
        self.path.clone()
    }

    fn fetch(
        self: Arc<Self>,
        range: Range<u64>,
        _purpose: Purpose,
        _since: Instant,
        mut deliver: Deliver,
    ) -> Fetch {
        let (done, completion) = Completion::new();
        let result = Arc::new(Mutex::new(None));
        let (this, slot) = (self.clone(), result.clone());
        self.spawn.spawn_blocking(Box::new(move || {
            *slot.lock() = Some(this.read(range, &mut *deliver));
            drop(done);
        }));
        Box::pin(Done { completion, result })
    }

    fn stall(&self) -> Option<Stall> {
        None
    }

    fn set_urls(&self, _urls: &[String]) -> Result<(), SourceError> {
        let why = "it is a file of this host, which has no URL";
        let advice = "add the URL as a new base";
        Err(SourceError::remote(SourceErrorKind::Protocol, "use", &self.path, why, advice))
    }

    fn give_up(&self, _given_up: bool) {}

    fn urls(&self) -> Vec<UrlState> {
        Vec::new()
    }

    fn is_local(&self) -> bool {
        true
    }
}

impl CopiedFile {
    fn read(&self, range: Range<u64>, deliver: &mut dyn FnMut(&[u8])) -> Result<(), SourceError> {
        let Some(original) = self.original() else {
            let why = "the file is gone or changed, and this part of it is not in the store";
            let advice = "put the original file back";
            return Err(SourceError::remote(SourceErrorKind::NotFound, "read", &self.path, why, advice));
        };
        let mut piece = vec![0; PIECE.min(range.end - range.start) as usize];
        let mut at = range.start;
        while at < range.end {
            let want = (range.end - at).min(PIECE) as usize;
            let read = original.read_at(&mut piece[..want], at)?;
            if read == 0 {
                break;
            }
            deliver(&piece[..read]);
            at += read as u64;
        }
        Ok(())
    }
}

/// Ready when the completion is complete.
struct Done {
    completion: Completion,
    result: Arc<Mutex<Option<Result<(), SourceError>>>>,
}

impl Future for Done {
    type Output = Result<(), SourceError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if !self.completion.is_complete() {
            let waker = context.waker().clone();
            self.completion.then(move || waker.wake());
            return Poll::Pending;
        }
        Poll::Ready(self.result.lock().take().unwrap_or(Ok(())))
    }
}
