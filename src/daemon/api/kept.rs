//! What is kept of a base: pinning, evicting, hydrating and comparing it.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use serde::Deserialize;
use serde_json::json;

use super::bases::is_url;
use super::{Answer, ApiError, Control, blocking};
use crate::fetch::kept::{Reach, Shares};
use crate::format::record::BaseRecord;
use crate::source::{Source, SourceError};
use crate::store::{BaseNode, Sources, StoreError, why_changed};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Pin {
    pinned: bool,
}

pub(super) async fn pin(
    State(c): State<Control>,
    Path(name): Path<String>,
    body: Result<Json<Pin>, JsonRejection>,
) -> Answer {
    let Json(Pin { pinned }) = body?;
    blocking(move || {
        let node = c.store.base(&name)?;
        let options = node.set_options(|options| options.pinned = pinned)?;
        c.settle_pins(&node, options.pinned || options.hydrate);
        Ok(c.base(&node, c.users_of(&node)))
    })
    .await
}

pub(super) async fn evict(State(c): State<Control>, Path(name): Path<String>) -> Answer {
    blocking(move || {
        let node = c.store.base(&name)?;
        let hydrated = node.options().hydrate;
        if hydrated {
            // What is dropped has to be found where it came from: of a server that is asked for, of a file now.
            for file in c.fetched_files(&node).filter(|file| !is_url(&file.source)) {
                let wrap = |source| StoreError::Source { object: format!("base {name}"), source };
                let original = c.sources.file(std::path::Path::new(&file.source)).map_err(wrap)?;
                if let Some(why) = why_changed(file, original.identity()) {
                    return Err(wrap(SourceError::changed(&file.source, &why)).into());
                }
            }
        }
        let files: Vec<_> = c.fetched_files(&node).cloned().collect();
        // The wish goes first: whatever happens from here on, the next worker does not fetch it all again.
        let options = node.set_options(|options| options.hydrate = false)?;
        c.hydrations.cancel(node.id(), "the base was evicted");
        c.sources.forget_in_transit(node.id());
        let others = c.others(&node);
        let mut evicted = 0;
        for file in &files {
            evicted += c.sources.evict(node.record(), file, &others);
            if hydrated && c.sources.shares(node.record(), file, &others) == Shares::Free {
                c.sources.contents(node.record(), file).pin(options.pinned);
            }
        }
        if hydrated {
            node.detach();
        }
        let left: u64 = files
            .iter()
            .map(|file| c.sources.contents(node.record(), file).cached_bytes(Reach::Proven))
            .sum();
        Ok(json!({"name": name, "evicted_bytes": evicted, "shared_bytes": left}))
    })
    .await
}

/// How fast a base is hydrated.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Hydrate {
    /// Bytes per second.
    rate: Option<u64>,
}

pub(super) async fn hydrate(
    State(c): State<Control>,
    Path(name): Path<String>,
    body: Result<Json<Hydrate>, JsonRejection>,
) -> Answer {
    let Json(Hydrate { rate }) = body?;
    blocking(move || {
        let node = c.store.base(&name)?;
        if rate == Some(0) {
            return Err(ApiError::invalid("rate: 0 bytes per second would never end; leave it away"));
        }
        if c.sources.cache().stats().limit_bytes == 0 {
            return Err(ApiError::invalid("nothing is kept on this host; start it with --cache-disk SIZE"));
        }
        c.hydrations.hydrate(&node, rate)?;
        Ok(c.base(&node, c.users_of(&node)))
    })
    .await
}

pub(super) async fn verify(State(c): State<Control>, Path(name): Path<String>) -> Answer {
    blocking(move || {
        let node = c.store.base(&name)?;
        c.hydrations.verify(&node)?;
        Ok(c.base(&node, c.users_of(&node)))
    })
    .await
}

impl Control {
    /// All other bases, as they are now.
    pub(super) fn others(&self, node: &BaseNode) -> Vec<BaseRecord> {
        let bases = self.store.bases();
        let others = bases.iter().filter(|base| base.id() != node.id());
        others.map(|base| base.current()).collect()
    }

    /// What a base wants of what is kept, or another that has the same.
    fn settle_pins(&self, node: &BaseNode, pinned: bool) {
        let others = self.others(node);
        for file in self.fetched_files(node) {
            if pinned || self.sources.shares(node.record(), file, &others) == Shares::Free {
                self.sources.contents(node.record(), file).pin(pinned);
            }
        }
    }
}
