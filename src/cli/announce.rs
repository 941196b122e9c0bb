//! Tells the daemon of a copy that this command makes, so that `plyfs jobs` lists it and `plyfs job cancel` ends it.
//!
//! What must hold:
//! - The copy does not depend on it. A daemon that has no such jobs, or too many, is not told.
//! - A request that is not answered until the job is cancelled holds it. The kernel closes its connection when this process
//!   dies, however it dies, and the daemon then removes what it took for the copy.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::client::{Client, read};
use super::error::CliError;
use super::retry;
use crate::control::wire::{ClientJob, ErrorKind, Job, WorkKind, WorkState};

/// How often the daemon is told of the progress.
const INTERVAL: Duration = Duration::from_secs(1);
/// How long the copy waits for such a request.
const PATIENCE: Duration = Duration::from_secs(1);
/// The pause before a request that failed.
const PAUSE: Duration = Duration::from_millis(500);
/// How long a cancelled command has to end by itself. It may be waiting for the reader of a pipe.
const ENDING: Duration = Duration::from_secs(5);
const ACTION: &str = "cannot tell the daemon of the copy";

#[derive(Default)]
struct Shared {
    bytes: AtomicU64,
    cancelled: AtomicBool,
    ended: AtomicBool,
}

/// A job that is announced. Its end is announced when it is dropped.
pub(super) struct Announcement<'a> {
    client: &'a Client,
    id: String,
    work: ClientJob,
    shared: Arc<Shared>,
    told: Instant,
    is_known: bool,
}

fn put(client: &Client, id: &str, work: &ClientJob, limit: Option<Duration>) -> Result<Job, CliError> {
    read(&client.put(&format!("/v1/jobs/{id}"), work, limit, ACTION)?, ACTION)
}

impl<'a> Announcement<'a> {
    /// Announces a copy of `total` bytes, and the snapshot that the command takes for it, if any.
    pub fn new(
        client: &'a Client,
        (kind, disk): (WorkKind, &str),
        snapshot: Option<&str>,
        total: u64,
    ) -> Self {
        let id = format!("{}-{disk}-{}", kind.name(), std::process::id());
        let (disk, snapshot) = (disk.to_owned(), snapshot.map(str::to_owned));
        let work = ClientJob { kind, disk, snapshot, bytes: 0, total };
        let shared = Arc::new(Shared::default());
        let mut this = Self { client, id, work, shared, told: Instant::now(), is_known: false };
        if retry::repeat(|| put(client, &this.id, &this.work, None)).is_ok() {
            let (store, shared) = (client.store().to_owned(), this.shared.clone());
            let holder = Holder { store, id: this.id.clone(), work: this.work.clone(), shared };
            // Without the thread the daemon forgets the job.
            let held = thread::Builder::new().name("job".into()).spawn(move || holder.run());
            this.is_known = held.is_ok();
        }
        this
    }

    /// Whether the daemon knows the job.
    pub fn is_known(&self) -> bool {
        self.is_known
    }

    /// Tells the daemon how many bytes are copied, now and then. Returns whether the copy goes on.
    pub fn goes_on(&mut self, bytes: u64) -> bool {
        self.shared.bytes.store(bytes, Ordering::Relaxed);
        if self.is_known && self.told.elapsed() >= INTERVAL {
            self.work.bytes = bytes;
            // The next request tells it, and the holder announces the job to a new worker.
            let _ = put(self.client, &self.id, &self.work, Some(PATIENCE));
            self.told = Instant::now();
        }
        !self.is_cancelled()
    }

    /// Whether an operator cancelled it.
    pub fn is_cancelled(&self) -> bool {
        self.shared.cancelled.load(Ordering::Acquire)
    }
}

impl Drop for Announcement<'_> {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Release);
        if self.is_known {
            // The daemon finds out by itself that the command has ended.
            let _ = self.client.delete_within(PATIENCE, &format!("/v1/jobs/{}", self.id), ACTION);
        }
    }
}

/// Holds a job.
struct Holder {
    store: PathBuf,
    id: String,
    work: ClientJob,
    shared: Arc<Shared>,
}

impl Holder {
    fn run(mut self) {
        let Ok(client) = Client::new(self.store.clone()) else { return };
        let path = format!("/v1/jobs/{}/hold", self.id);
        while !self.shared.ended.load(Ordering::Acquire) {
            let held = client.post_empty(&path, ACTION).and_then(|answer| read::<Job>(&answer, ACTION));
            match held {
                Ok(job) if job.state == WorkState::Cancelled => return self.cancelled(),
                // Another worker has to be told.
                Err(error) if error.is(ErrorKind::NotFound) && !self.shared.ended.load(Ordering::Acquire) => {
                    self.work.bytes = self.shared.bytes.load(Ordering::Relaxed);
                    if put(&client, &self.id, &self.work, None).is_ok() {
                        continue;
                    }
                }
                // The daemon is of a version without such jobs.
                Err(error) if error.is(ErrorKind::NotAllowed) => return,
                _ => {}
            }
            thread::sleep(PAUSE);
        }
    }

    fn cancelled(&self) {
        self.shared.cancelled.store(true, Ordering::Release);
        if self.work.kind != WorkKind::Export {
            // What an import has done is undone by the command itself.
            return;
        }
        let begun = Instant::now();
        while begun.elapsed() < ENDING {
            if self.shared.ended.load(Ordering::Acquire) {
                return;
            }
            thread::sleep(PAUSE / 10);
        }
        // The snapshot goes when the daemon sees this process end.
        eprintln!("plyfs: cannot export {}: an operator cancelled it", self.work.disk);
        std::process::exit(1);
    }
}
