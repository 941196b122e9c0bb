//! The store's periodic work, which may wait for its medium. Each pool has a thread: a drive that hangs stops no other one
//! (D89).

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::store::pools::DEFAULT;
use crate::store::{IDLE, OPEN_IDLE, Store};

/// Its interval.
const UPKEEP: Duration = Duration::from_millis(500);

/// Starts the threads.
///
/// # Errors
/// When a thread cannot be started.
pub(super) fn spawn_upkeep(store: Arc<Store>) -> io::Result<()> {
    for pool in store.pool_numbers() {
        let store = store.clone();
        let upkeep = move || {
            while !store.is_closing() {
                if pool == DEFAULT {
                    store.retry_unread();
                    store.note_names();
                    store.tend_maps();
                }
                store.settle_carried_in(pool, Instant::now());
                store.detach_idle_in(pool, IDLE, OPEN_IDLE);
                store.tend_layers_in(pool, Instant::now());
                std::thread::sleep(UPKEEP);
            }
        };
        std::thread::Builder::new().name("upkeep".into()).spawn(upkeep)?;
    }
    Ok(())
}
