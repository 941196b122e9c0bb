//! The store's records, read by a standby worker before it takes over.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::store::PreloadedRecords;

/// When a standby worker first reads the store's records.
const FIRST_PRELOAD: Duration = Duration::from_secs(1);
/// How often it reads those that changed. The interval grows when that takes more than a hundredth of the time.
const PRELOAD_INTERVAL: Duration = Duration::from_secs(15);

/// Reads the store's records, and periodically those that changed, until the worker is activated and takes them. So a
/// takeover reads few records, however many disks there are.
pub(super) fn spawn_preload(store: PathBuf) -> io::Result<Arc<Mutex<PreloadedRecords>>> {
    let records = Arc::new(Mutex::new(PreloadedRecords::default()));
    let taken = Arc::downgrade(&records);
    let read = move || {
        let mut pause = FIRST_PRELOAD;
        loop {
            std::thread::sleep(pause);
            let begun = Instant::now();
            let Some(records) = taken.upgrade() else { return };
            let mut records = records.lock();
            // The worker that serves reports records that cannot be read.
            let Ok(read) = PreloadedRecords::read(&store, std::mem::take(&mut *records)) else { return };
            *records = read;
            pause = PRELOAD_INTERVAL.max(begun.elapsed() * 100);
        }
    };
    std::thread::Builder::new().name("preload".into()).spawn(read)?;
    Ok(records)
}
