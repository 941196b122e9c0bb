//! The threads that keep the copies as they should be: one for each pool, because its drive may hang.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use parking_lot::Mutex;

use super::{CopyPool, FileCopies, ranked};
use crate::bases::sources::{HostSources, SETTLING, within};
use crate::fetch::kept::{CACHE_BLOCK, Contents, DiskCacheStats, Reach, SourceKey};
use crate::format::layout::CACHE;
use crate::format::record::{BaseRecord, ImageFile, KeptCopies};
use crate::store::Store;
use crate::store::pools::PoolDir;

/// Pause between two looks at all bases.
const TICK: Duration = Duration::from_secs(1);
/// Cache blocks that are copied at a time.
const PIECE: u64 = 64;
const STACK: usize = 512 << 10;

/// See the module. Clones share one state.
#[derive(Clone)]
pub struct Keeper {
    store: Arc<Store>,
    sources: Arc<HostSources>,
    /// Wakes the threads, by number of the pool.
    wake: Arc<Mutex<Vec<Waker>>>,
}

/// The number of a pool, and what wakes its thread.
type Waker = (u64, Sender<()>);

/// What the last comparison of a file in a pool saw: changes of the cache and of the copy, and where it was to be.
type Stamp = (u64, u64, Vec<u64>);

/// One file of a base in one pool.
struct Copy<'a> {
    base: u64,
    file: Arc<FileCopies>,
    key: SourceKey,
    cache: Arc<Contents>,
    copy: Arc<Contents>,
    pool: &'a CopyPool,
}

fn changes(stats: &DiskCacheStats) -> u64 {
    stats.insertions + stats.evictions + stats.corrupt_blocks + stats.read_errors
}

impl Keeper {
    /// Opens the copies in all pools when a base has copies, or else in those pools that have some. Begins to keep them.
    /// Called before the first read of a base.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start(store: Arc<Store>, sources: Arc<HostSources>) -> io::Result<Self> {
        let keeper = Self { store, sources, wake: Arc::default() };
        keeper.open()?;
        Ok(keeper)
    }

    /// Opens the copies in pools that are not open yet, and wakes all threads. A pool that does not answer is opened when
    /// it does.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn open(&self) -> io::Result<()> {
        let this = self.clone();
        let open = move |_: &AtomicBool| {
            if let Err(error) = this.open_all() {
                tracing::error!(%error, "copies of fetched blocks in a pool cannot be opened; start the daemon again");
            }
        };
        if !within(SETTLING, open)? {
            tracing::error!(
                "a pool does not answer; its copies of fetched blocks are not used until it does"
            );
        }
        Ok(())
    }

    fn open_all(&self) -> io::Result<()> {
        let all = self.store.bases().iter().any(|base| base.options().copies.is_some());
        let wanted = |dir: &PoolDir| all || dir.medium.list(CACHE).is_ok_and(|names| !names.is_empty());
        if self.sources.copies().is_on() {
            let mut wake = self.wake.lock();
            for dir in self.store.pool_dirs() {
                if wake.iter().any(|(number, _)| *number == dir.number) || !wanted(&dir) {
                    continue;
                }
                let number = dir.number;
                let pool = self.sources.copies().open(dir)?;
                let (sender, woken) = channel();
                let this = self.clone();
                let run = move || this.run(&pool, &woken);
                std::thread::Builder::new().name("copies".into()).stack_size(STACK).spawn(run)?;
                wake.push((number, sender));
            }
        }
        for base in self.store.bases() {
            self.refresh(&base.current());
        }
        self.wake.lock().iter().for_each(|(_, sender)| _ = sender.send(()));
        Ok(())
    }

    /// Lets readers of a base use its copies.
    pub fn refresh(&self, base: &BaseRecord) {
        for file in base.files().filter(|file| base.options.keeps(file)) {
            self.sources.refresh_copies(base, file);
        }
    }

    fn run(&self, pool: &Arc<CopyPool>, woken: &Receiver<()>) {
        let mut seen: HashMap<SourceKey, Stamp> = HashMap::new();
        loop {
            if woken.recv_timeout(TICK) == Err(RecvTimeoutError::Disconnected) || self.store.is_closing() {
                return;
            }
            // What one look finds is enough for all calls so far.
            while woken.try_recv().is_ok() {}
            if !self.store.pool_numbers().contains(&pool.number) {
                return;
            }
            let _looking = pool.looking.lock();
            self.look(pool, &mut seen);
        }
    }

    /// Leaves a pool that was taken off the list, if its drive answers soon.
    pub fn leave_soon(&self, number: u64) {
        let Some(pool) = self.sources.copies().pool(number) else { return };
        let this = self.clone();
        if !within(SETTLING, move |_: &AtomicBool| this.leave(&pool)).unwrap_or(false) {
            tracing::warn!(
                number,
                "a pool that was removed does not answer; files of its cache/ stay and do no harm"
            );
        }
    }

    /// Another store may use the directory from now on.
    fn leave(&self, pool: &CopyPool) {
        self.wake.lock().retain(|(number, _)| *number != pool.number);
        // A copy that is being made ends soon: the pool is no place of it any more.
        self.sources.copies().close(pool.number);
        let _looking = pool.looking.lock();
        pool.cache.sources().iter().for_each(|source| pool.cache.remove(source.key()));
    }

    /// Compares what a pool has with what it should have.
    fn look(&self, pool: &CopyPool, seen: &mut HashMap<SourceKey, Stamp>) {
        let cache = self.sources.cache();
        // Until its index is known, the cache may only seem to lack blocks.
        if !pool.cache.stats().indexed || !cache.stats().indexed {
            return;
        }
        let mut needed = HashSet::new();
        for base in self.store.bases() {
            let record = base.current();
            let Some(wanted) = record.options.copies.filter(|_| !record.options.refused) else { continue };
            for file in record.files().filter(|file| record.options.keeps(file)) {
                let Some(copy) = self.copy_in(pool, &record, file) else { continue };
                needed.insert(copy.key);
                let targets = self.targets(&record, file, wanted);
                let now = (changes(&cache.stats()), changes(&pool.cache.stats()), targets);
                if seen.get(&copy.key) == Some(&now) {
                    continue;
                }
                if self.keep(&copy, &now.2) {
                    seen.insert(copy.key, now);
                }
            }
        }
        seen.retain(|key, _| needed.contains(key));
        // A record that cannot be read may be that of a base with copies.
        if self.store.knows_all_bases() {
            let strays = pool.cache.sources().into_iter().filter(|source| !needed.contains(source.key()));
            strays.for_each(|source| pool.cache.remove(source.key()));
        }
    }

    fn copy_in<'a>(&self, pool: &'a CopyPool, record: &BaseRecord, file: &ImageFile) -> Option<Copy<'a>> {
        let copies = self.sources.refresh_copies(record, file);
        let cache = self.sources.contents(record, file);
        let (key, copy) = {
            let state = copies.state.lock();
            let (_, copy) = state.places.iter().find(|(number, _)| *number == pool.number)?;
            (state.key?, copy.clone())
        };
        Some(Copy { base: record.id, file: copies, key, cache, copy, pool })
    }

    /// Numbers of the pools in which a file is to be.
    fn targets(&self, record: &BaseRecord, file: &ImageFile, wanted: KeptCopies) -> Vec<u64> {
        let pools = self.sources.copies().pools.read().clone();
        let order = ranked(&self.sources.of(record, file).own, &pools);
        order.iter().take(usize::from(wanted.count) - 1).map(|pool| pool.number).collect()
    }

    /// Copies what is missing in either place. Returns whether nothing is missing any more.
    fn keep(&self, copy: &Copy<'_>, targets: &[u64]) -> bool {
        let healed = self.heal(copy);
        if targets.contains(&copy.pool.number) {
            if let Some(source) = copy.pool.cache.find(&copy.key)
                && !source.is_pinned()
            {
                source.pin(true);
            }
            let filled = self.fill(copy);
            copy.note_current(filled);
            return healed && filled;
        }
        copy.note_current(false);
        // A surplus copy, from a time when another pool was away, goes when the others are complete.
        let are_current = {
            let state = copy.file.state.lock();
            state.key == Some(copy.key) && targets.iter().all(|pool| state.current.contains(pool))
        };
        if are_current && !targets.is_empty() {
            copy.pool.cache.remove(&copy.key);
        }
        are_current
    }

    /// Copies blocks of the cache that the pool lacks.
    fn fill(&self, copy: &Copy<'_>) -> bool {
        copy_missing(&copy.cache, &copy.copy, &mut |first, bytes| {
            copy.copy.insert(first, bytes);
            self.pace(bytes.len());
            copy.copy.contains(first) && copy.is_wanted() && !self.store.is_closing()
        })
    }

    /// Copies blocks back that the cache lost.
    fn heal(&self, copy: &Copy<'_>) -> bool {
        copy_missing(&copy.copy, &copy.cache, &mut |first, bytes| {
            {
                let _healing = copy.file.healing.lock();
                if !copy.is_wanted() {
                    return false;
                }
                copy.cache.insert(first, bytes);
            }
            self.pace(bytes.len());
            copy.cache.contains(first) && !self.store.is_closing()
        })
    }

    fn pace(&self, bytes: usize) {
        if let Some(rate) = self.sources.copies().limits.rate {
            std::thread::sleep(Duration::from_secs_f64(bytes as f64 / rate as f64));
        }
    }
}

impl Copy<'_> {
    /// Whether the base's copies have this key still, and the pool is a place for them.
    fn is_wanted(&self) -> bool {
        let state = self.file.state.lock();
        state.key == Some(self.key) && state.places.iter().any(|(number, _)| *number == self.pool.number)
    }

    fn note_current(&self, is_current: bool) {
        let mut state = self.file.state.lock();
        if state.key != Some(self.key) {
            return;
        }
        match is_current {
            true => {
                if state.current.insert(self.pool.number) {
                    let (base, pool) = (self.base, &self.pool.name);
                    tracing::info!(base, pool, "a pool has a copy of all cached blocks of a base");
                }
            }
            false => _ = state.current.remove(&self.pool.number),
        }
    }
}

/// Gives `put` the blocks that `from` has and `to` lacks, until it returns false. Returns whether it got all of them.
pub(super) fn copy_missing(from: &Contents, to: &Contents, put: &mut dyn FnMut(u64, &[u8]) -> bool) -> bool {
    let end = from.blocks();
    let mut buffer = Vec::new();
    let (mut at, mut all) = (0, true);
    while at < end {
        let here = to.present_run(at, end - at, Reach::Proven);
        if here > 0 {
            at += here;
            continue;
        }
        let missing = to.missing_run(at, PIECE, Reach::Proven).max(1);
        let run = from.present_run(at, missing, Reach::Proven);
        if run == 0 {
            at += from.missing_run(at, end - at, Reach::Proven).max(1);
            continue;
        }
        let bytes = ((at + run) * CACHE_BLOCK).min(from.size()) - at * CACHE_BLOCK;
        buffer.resize(bytes as usize, 0);
        let read = (from.read(at, &mut buffer, Reach::Proven) as u64).min(run);
        if read == 0 {
            // It cannot be read now. The place that has it notes that.
            all = false;
            at += 1;
            continue;
        }
        if !put(at, &buffer[..(read * CACHE_BLOCK).min(bytes) as usize]) {
            return false;
        }
        at += read;
    }
    all
}
