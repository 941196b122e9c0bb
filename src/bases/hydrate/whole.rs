//! Fetches an image whose server sends it only as a whole.

use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use super::fetch::CachedBlocks;
use crate::bases::whole::WholeImage;
use crate::fetch::kept::{CACHE_BLOCK, Contents};
use crate::jobs::{Job, Paced, State, Stopped};

/// Bytes that go to the cache in one insert.
const WRITE: usize = 1 << 20;
/// How often the job looks whether it was cancelled while nothing comes.
const LOOK: Duration = Duration::from_millis(200);
/// Pauses after a transfer that ended early, from the first to the longest. Each one begins at the image's start.
const PAUSE: Duration = Duration::from_secs(1);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// The parts of one fetch.
pub struct Whole<'a> {
    pub image: &'a WholeImage,
    pub contents: &'a Contents,
    pub here: &'a dyn CachedBlocks,
    pub runtime: &'a tokio::runtime::Handle,
    /// Bytes of the job that belong to other files.
    pub before: u64,
}

/// Fetches all missing blocks.
///
/// # Errors
/// When the job was cancelled, and those of `go_on`.
pub fn all(
    job: &Arc<Job>,
    whole: &Whole<'_>,
    go_on: &dyn Fn() -> Result<(), Stopped>,
) -> Result<(), Stopped> {
    let result = retry(job, whole, go_on);
    if let Err(stopped) = &result {
        let why = match stopped {
            Stopped::Cancelled(by) => {
                format!("the fetch ended ({by}); begin it again with: plyfs base hydrate NAME")
            }
            Stopped::Failed(why) => why.clone(),
        };
        whole.image.troubled(&why);
    }
    result
}

fn retry(job: &Arc<Job>, whole: &Whole<'_>, go_on: &dyn Fn() -> Result<(), Stopped>) -> Result<(), Stopped> {
    let mut pause = PAUSE;
    while let Some(first) = whole.here.next_missing(0) {
        let had = whole.here.bytes();
        // A transfer that the cache does not take is not begun.
        let why = match whole.here.full() {
            Some(why) => why,
            None => match once(job, whole, first, go_on)? {
                Some(why) => why,
                None => "the cache did not keep all of what was fetched; it is fetched again".into(),
            },
        };
        if whole.here.next_missing(0).is_none() {
            break;
        }
        if whole.here.bytes() > had {
            pause = PAUSE;
        }
        whole.image.troubled(&why);
        job.note_waiting(whole.before + whole.here.bytes(), why);
        job.pause(pause)?;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
    whole.image.progressed();
    Ok(())
}

/// One transfer, from block `first` to the end. Returns why it ended early.
fn once(
    job: &Arc<Job>,
    whole: &Whole<'_>,
    first: u64,
    go_on: &dyn Fn() -> Result<(), Stopped>,
) -> Result<Option<String>, Stopped> {
    let size = whole.contents.size();
    let transfer = whole.image.transfer(whole.runtime, first * CACHE_BLOCK);
    let (mut at, mut block) = (first * CACHE_BLOCK, first);
    let mut held = Vec::new();
    let (mut since, mut asked) = (Instant::now(), 0);
    while at < size {
        job.check()?;
        let piece = match transfer.bytes.recv_timeout(LOOK) {
            Ok(Ok(piece)) => piece,
            Ok(Err(error)) => return Ok(Some(error.to_string())),
            Err(RecvTimeoutError::Timeout) => {
                go_on()?;
                continue;
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(Some("the transfer ended early".into())),
        };
        at += piece.len() as u64;
        asked += piece.len() as u64;
        held.extend_from_slice(&piece);
        if held.len() >= WRITE || at == size {
            let blocks = match at == size {
                true => held.len(),
                false => held.len() / CACHE_BLOCK as usize * CACHE_BLOCK as usize,
            };
            whole.contents.insert(block, &held[..blocks]);
            block += (blocks as u64).div_ceil(CACHE_BLOCK);
            held.drain(..blocks);
            go_on()?;
            whole.image.progressed();
            job.note(State::Fetching, whole.before + whole.here.bytes());
        }
        transfer.taken(piece.len());
        if job.pace(asked, since)? == Paced::Changed {
            (since, asked) = (Instant::now(), 0);
        }
    }
    Ok(None)
}
