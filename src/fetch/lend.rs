//! Blocks in transit, for another host that waits for them, too. Nothing here sends a request.

use std::sync::Arc;

use super::LazySource;
use super::transit::{Found, WaiterKind, completion_of};
use crate::source::Completion;

/// Blocks in transit.
pub enum Arriving {
    /// They are here: all blocks whole, except the last of the object.
    Here(Vec<Arc<[u8]>>),
    /// They will have come, or failed, when this is complete.
    Coming(Completion),
    /// None is in transit.
    Absent,
}

impl LazySource {
    /// The blocks in transit from block `first` on, `most` of them at most, all here or all still to come.
    pub fn arriving(&self, first: u64, most: u64) -> Arriving {
        let units: Vec<_> = {
            let table = self.shared.table.lock();
            (first..first.saturating_add(most)).map_while(|block| table.transit.get(block)).collect()
        };
        let here = units.iter().map_while(|unit| match unit.find() {
            Found::Present { bytes, .. } => Some(bytes),
            Found::Pending | Found::Failed(_) => None,
        });
        let here: Vec<_> = here.collect();
        if !here.is_empty() {
            return Arriving::Here(here);
        }
        let coming: Vec<_> = units.into_iter().take_while(|unit| unit.is_pending()).collect();
        if coming.is_empty() {
            return Arriving::Absent;
        }
        Arriving::Coming(completion_of(&self.shared, coming, WaiterKind::Other))
    }
}
