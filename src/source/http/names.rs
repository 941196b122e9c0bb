//! Resolves names of hosts to addresses.
//!
//! The system's resolver blocks a thread, up to half a minute for a name whose servers do not answer, and nothing ends
//! it sooner. What must hold:
//! - No other work needs a thread that may block so.
//! - Names that hang do not delay other names: there is one lookup per name and many at once. When a lookup takes long,
//!   the last known addresses of the name are used.
//! - However many names hang for one base, as when a server redirects to another one each time, a base without a lookup
//!   gets one at once (H10). A name is looked up only while a request waits for it.

#[cfg(test)]
mod tests;

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::sync::oneshot;

use super::address::{AllowList, Reach, reachable};
use super::limit::Party;

/// Lookups at once.
const THREADS: usize = 32;
/// Most of them for one base.
const EACH: usize = THREADS / 4;
/// Lookups at once with those of bases that have none.
const MOST: usize = 4 * THREADS;
/// How long a lookup may take before the last addresses of the name are used.
const SLOW: Duration = Duration::from_secs(2);
/// Names whose last addresses are kept.
const KEPT: usize = 1024;

tokio::task_local! {
    /// The base whose request runs: the HTTP client tells the resolver the name alone.
    static ASKER: Party;
}

/// Runs a request, whose lookups are those of the base.
pub(super) fn on_behalf_of<F: Future>(party: Party, request: F) -> impl Future<Output = F::Output> {
    ASKER.scope(party, request)
}

type Found = Result<Vec<IpAddr>, String>;

/// See the module.
pub(super) struct Names {
    state: Mutex<State>,
    /// The system's resolver.
    resolve: fn(&str) -> Found,
}

#[derive(Default)]
struct State {
    /// Who waits for each name. Its lookup counts for the base of them that has the fewest.
    asked: HashMap<String, Vec<(Party, oneshot::Sender<Found>)>>,
    /// Names that no thread looks up yet, in the order in which they came.
    queue: VecDeque<String>,
    /// Lookups under way of each base that has any.
    running: HashMap<Party, usize>,
    threads: usize,
    last: HashMap<String, Vec<IpAddr>>,
}

impl State {
    fn runs(&self, party: &Party) -> usize {
        self.running.get(party).copied().unwrap_or(0)
    }

    /// Takes the name that is to be looked up next, by one of `threads` threads: of the base with the fewest lookups, the
    /// one that came first.
    fn next(&mut self, threads: usize) -> Option<(Party, String)> {
        let Self { asked, queue, .. } = self;
        queue.retain(|name| {
            let Some(waiters) = asked.get_mut(name) else { return false };
            waiters.retain(|(_, waiter)| !waiter.is_closed());
            let is_wanted = !waiters.is_empty();
            if !is_wanted {
                asked.remove(name);
            }
            is_wanted
        });
        let fewest = |name: &String| {
            let parties = self.asked.get(name)?.iter().map(|(party, _)| *party);
            parties.map(|party| (self.runs(&party), party)).min_by_key(|(runs, _)| *runs)
        };
        let all = self.queue.iter().enumerate().filter_map(|(at, name)| Some((at, fewest(name)?)));
        let (at, (runs, party)) = all.min_by_key(|(_, (runs, _))| *runs)?;
        let is_free = if runs == 0 { threads <= MOST } else { threads <= THREADS && runs < EACH };
        let name = is_free.then(|| self.queue.remove(at)).flatten()?;
        *self.running.entry(party).or_default() += 1;
        Some((party, name))
    }

    fn ended(&mut self, party: Party) {
        if let Entry::Occupied(mut running) = self.running.entry(party) {
            *running.get_mut() -= 1;
            if *running.get() == 0 {
                running.remove();
            }
        }
    }
}

fn of_system(name: &str) -> Found {
    match (name, 0).to_socket_addrs() {
        Ok(addresses) => Ok(addresses.map(|address| address.ip()).collect()),
        Err(error) => Err(error.to_string()),
    }
}

impl Names {
    pub fn new() -> Self {
        Self::with(of_system)
    }

    fn with(resolve: fn(&str) -> Found) -> Self {
        Self { state: Mutex::default(), resolve }
    }

    /// All addresses of a name. A lookup that is of no base is as that of a base of its own.
    pub async fn lookup(self: &Arc<Self>, name: &str) -> Found {
        let party = ASKER.try_with(|party| *party).unwrap_or_else(|_| Party::new());
        let waits = {
            let mut state = self.state.lock();
            let (send, waits) = oneshot::channel();
            if !state.asked.contains_key(name) {
                state.queue.push_back(name.to_owned());
            }
            state.asked.entry(name.to_owned()).or_default().push((party, send));
            self.start_thread(&mut state);
            waits
        };
        tokio::pin!(waits);
        let gone = || Err("the lookup was cancelled".to_owned());
        if let Ok(found) = tokio::time::timeout(SLOW, &mut waits).await {
            return found.unwrap_or_else(|_| gone());
        }
        let last = self.state.lock().last.get(name).cloned();
        match last {
            Some(last) => {
                tracing::debug!(name, "the lookup of a name takes long; its last addresses are used");
                Ok(last)
            }
            None => waits.await.unwrap_or_else(|_| gone()),
        }
    }

    /// Starts a thread for a name that may be looked up now.
    fn start_thread(self: &Arc<Self>, state: &mut State) {
        let Some((party, name)) = state.next(state.threads + 1) else { return };
        let (this, first) = (self.clone(), (party, name.clone()));
        let builder = std::thread::Builder::new().name("dns".into()).stack_size(512 << 10);
        match builder.spawn(move || this.work(first)) {
            Ok(_) => state.threads += 1,
            Err(error) => {
                state.ended(party);
                let why = format!("no thread for the lookup: {error}");
                match state.threads {
                    0 => {
                        for (_, waiter) in state.asked.remove(&name).unwrap_or_default() {
                            let _ = waiter.send(Err(why.clone()));
                        }
                    }
                    // A running thread takes it from the queue.
                    _ => state.queue.push_front(name),
                }
            }
        }
    }

    fn work(&self, first: (Party, String)) {
        let mut now = Some(first);
        while let Some((party, name)) = now {
            let found = (self.resolve)(&name);
            let waiting = {
                let mut state = self.state.lock();
                if let Ok(addresses) = &found {
                    if state.last.len() >= KEPT && !state.last.contains_key(&name) {
                        // Any name: it is looked up again when it is used.
                        let any = state.last.keys().next().cloned();
                        any.and_then(|any| state.last.remove(&any));
                    }
                    state.last.insert(name.clone(), addresses.clone());
                }
                state.ended(party);
                let threads = state.threads;
                now = state.next(threads);
                state.threads -= usize::from(now.is_none());
                state.asked.remove(&name)
            };
            for (_, waiter) in waiting.unwrap_or_default() {
                let _ = waiter.send(found.clone());
            }
        }
    }
}

/// A lookup that failed.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct LookupError(String);

/// Resolves names for connections to any address.
pub(super) struct ToAnywhere(pub Arc<Names>);

/// Resolves names for connections to addresses where a redirect may lead.
pub(super) struct Within(pub Arc<Names>, pub Arc<AllowList>, pub Reach);

fn addresses(found: Vec<IpAddr>) -> Addrs {
    Box::new(found.into_iter().map(|address| SocketAddr::new(address, 0)))
}

impl Resolve for ToAnywhere {
    fn resolve(&self, name: Name) -> Resolving {
        let names = self.0.clone();
        Box::pin(async move { Ok(addresses(names.lookup(name.as_str()).await.map_err(LookupError)?)) })
    }
}

impl Resolve for Within {
    fn resolve(&self, name: Name) -> Resolving {
        let (names, allow, reach) = (self.0.clone(), self.1.clone(), self.2);
        Box::pin(async move {
            let found = names.lookup(name.as_str()).await.map_err(LookupError)?;
            Ok(addresses(reachable(name.as_str(), found, &allow, reach)?))
        })
    }
}
