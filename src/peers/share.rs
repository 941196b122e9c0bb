//! Places that all hosts share, so that one host that takes many leaves some for the others.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

/// A number of places. One address gets half of them at most.
pub(super) struct Share {
    held: Mutex<HashMap<IpAddr, usize>>,
    most: usize,
}

/// One place, until it is dropped.
pub(super) struct Place {
    share: Arc<Share>,
    address: IpAddr,
}

impl Share {
    pub fn new(most: usize) -> Arc<Self> {
        Arc::new(Self { held: Mutex::default(), most })
    }

    /// A place for a host, when there is one. Never waits.
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let mut held = self.held.lock();
        let all: usize = held.values().sum();
        let own = held.entry(address).or_default();
        if all >= self.most || *own >= self.most.div_ceil(2) {
            if *own == 0 {
                held.remove(&address);
            }
            return None;
        }
        *own += 1;
        Some(Place { share: self.clone(), address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.share.held.lock();
        if let Some(own) = held.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                held.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_host_leaves_half_of_the_places_and_gives_them_back() {
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let share = Share::new(4);
        let held: Vec<_> = (0..9).filter_map(|_| share.take(one)).collect();
        assert_eq!(held.len(), 2);
        let more: Vec<_> = (0..9).filter_map(|_| share.take(other)).collect();
        assert_eq!(more.len(), 2);
        assert!(share.take(IpAddr::from([10, 0, 0, 3])).is_none());
        drop(held);
        assert!(share.take(one).is_some());
        drop(more);
        assert!(share.held.lock().is_empty());
    }
}
