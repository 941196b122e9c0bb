//! Resolves names of hosts to addresses.
//!
//! The system's resolver blocks a thread, up to half a minute for a name whose servers do not answer. What must hold:
//! - No other work needs a thread that may block so.
//! - Names that hang do not delay other names: there is one lookup per name and many at once. When a lookup takes long,
//!   the last known addresses of the name are used.

use std::collections::{HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use tokio::sync::oneshot;

use super::address::{AllowList, public_only};

/// Lookups at once.
const THREADS: usize = 32;
/// How long a lookup may take before the last addresses of the name are used.
const SLOW: Duration = Duration::from_secs(2);
/// Names whose last addresses are kept.
const KEPT: usize = 1024;

type Found = Result<Vec<IpAddr>, String>;

/// See the module.
#[derive(Default)]
pub(super) struct Names {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    waiting: HashMap<String, Vec<oneshot::Sender<Found>>>,
    queue: VecDeque<String>,
    threads: usize,
    last: HashMap<String, Vec<IpAddr>>,
}

impl Names {
    pub async fn lookup(self: &Arc<Self>, name: &str) -> Found {
        let waits = {
            let mut state = self.state.lock();
            let (send, waits) = oneshot::channel();
            match state.waiting.get_mut(name) {
                Some(waiting) => waiting.push(send),
                None => {
                    state.waiting.insert(name.to_owned(), vec![send]);
                    state.queue.push_back(name.to_owned());
                    self.start_thread(&mut state);
                }
            }
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

    fn start_thread(self: &Arc<Self>, state: &mut State) {
        if state.threads >= THREADS {
            return;
        }
        let this = self.clone();
        let builder = std::thread::Builder::new().name("dns".into()).stack_size(512 << 10);
        match builder.spawn(move || this.work()) {
            Ok(_) => state.threads += 1,
            Err(error) if state.threads == 0 => {
                let why = format!("no thread for the lookup: {error}");
                for name in state.queue.drain(..) {
                    for waiter in state.waiting.remove(&name).into_iter().flatten() {
                        let _ = waiter.send(Err(why.clone()));
                    }
                }
            }
            // A running thread takes it from the queue.
            Err(_) => {}
        }
    }

    fn work(&self) {
        loop {
            let name = {
                let mut state = self.state.lock();
                match state.queue.pop_front() {
                    Some(name) => name,
                    None => {
                        state.threads -= 1;
                        return;
                    }
                }
            };
            let found: Found = match (name.as_str(), 0).to_socket_addrs() {
                Ok(addresses) => Ok(addresses.map(|address| address.ip()).collect()),
                Err(error) => Err(error.to_string()),
            };
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
                state.waiting.remove(&name)
            };
            for waiter in waiting.into_iter().flatten() {
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
pub(super) struct ToPublic(pub Arc<Names>, pub Arc<AllowList>);

fn addresses(found: Vec<IpAddr>) -> Addrs {
    Box::new(found.into_iter().map(|address| SocketAddr::new(address, 0)))
}

impl Resolve for ToAnywhere {
    fn resolve(&self, name: Name) -> Resolving {
        let names = self.0.clone();
        Box::pin(async move { Ok(addresses(names.lookup(name.as_str()).await.map_err(LookupError)?)) })
    }
}

impl Resolve for ToPublic {
    fn resolve(&self, name: Name) -> Resolving {
        let (names, allow) = (self.0.clone(), self.1.clone());
        Box::pin(async move {
            let found = names.lookup(name.as_str()).await.map_err(LookupError)?;
            Ok(addresses(public_only(name.as_str(), found, &allow)?))
        })
    }
}
