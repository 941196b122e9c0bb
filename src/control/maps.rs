//! Routes for maps: where the bytes of a disk or a base are.
//!
//! What must hold: a map takes bounded time and memory, whatever the size (D70). A few are made at a time (`pool`), so
//! that clients that look at maps take no processor from guests; those of bases whose files hang delay no others.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use serde::Deserialize;
use utoipa::IntoParams;

use super::pool::JobKind;
use super::wire::{BaseMap, DiskMap, PlaceBytes};
use super::{Answer, ApiError, Cause, Control, Name, in_pool};
use crate::disk::map::{self, MOST_CELLS, Map, Place};
use crate::format::BLOCK;
use crate::store::BaseNode;
use crate::trace::Player;

/// Cells of a map, when the request names no number.
const CELLS: u32 = 256;

/// Selects the resolution of a map.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Resolution {
    /// The most cells, 1 to 4096. By default 256. A cell has at least 128 KiB.
    #[param(minimum = 1, maximum = 4096)]
    cells: Option<u32>,
}

impl Resolution {
    fn cells(&self) -> Result<usize, ApiError> {
        let cells = self.cells.unwrap_or(CELLS) as usize;
        if (1..=MOST_CELLS).contains(&cells) {
            return Ok(cells);
        }
        Err(ApiError::invalid(format!("cells is {cells}; give 1 to {MOST_CELLS}")))
    }
}

/// Runs a job that makes a map, when it is its turn.
async fn make<T: Send + 'static>(job: impl FnOnce() -> Result<T, ApiError> + Send + 'static) -> Answer<T> {
    in_pool(JobKind::Map, job).await.map(Json)
}

/// Show where the bytes of a disk are
///
/// Answered for a disk that is not in use as well, from its durable map. Starts no fetch.
#[utoipa::path(
    get,
    path = "/v1/disks/{name}/map",
    tag = "disks",
    operation_id = "map_disk",
    params(Resolution),
    responses((status = 200, description = "The map.", body = DiskMap))
)]
pub(super) async fn disk(
    State(c): State<Control>,
    Name(name): Name,
    query: Result<Query<Resolution>, QueryRejection>,
) -> Answer<DiskMap> {
    let cells = query?.0.cells()?;
    make(move || {
        let node = c.store.disk(&name)?;
        // A disk without a base, or whose base is gone, has a map too.
        if let Some(base) = node.base_name().and_then(|base| c.store.base(&base).ok()) {
            c.refuse_hanging(&base)?;
        }
        let (map, attached) = node.map(cells)?;
        let at = |place| column(&map, place);
        Ok(DiskMap {
            name: node.name(),
            base: node.base_name(),
            size: map.size,
            cell_bytes: map.cell_bytes,
            exact: map.exact,
            attached,
            delta: at(Place::Delta),
            zero: at(Place::Zero),
            cached: at(Place::Cached),
            fetching: at(Place::Fetching),
            local: at(Place::Local),
            absent: at(Place::Absent),
            unknown: at(Place::Unknown),
            total: total(&map),
        })
    })
    .await
}

/// Show where the bytes of a base are
///
/// Starts no fetch. Of an image that is not raw, each part is where the bytes of the image file are that encode it.
#[utoipa::path(
    get,
    path = "/v1/bases/{name}/map",
    tag = "bases",
    operation_id = "map_base",
    params(Resolution),
    responses((status = 200, description = "The map.", body = BaseMap))
)]
pub(super) async fn base(
    State(c): State<Control>,
    Name(name): Name,
    query: Result<Query<Resolution>, QueryRejection>,
) -> Answer<BaseMap> {
    let cells = query?.0.cells()?;
    make(move || {
        let node = c.store.base(&name)?;
        c.refuse_hanging(&node)?;
        let base = node.attach()?;
        let map = map::of_base(&base, cells);
        let (read, prefetched) = c.traced(&node, &map);
        let memory = map::in_memory(&map, &base);
        let at = |place| column(&map, place);
        Ok(BaseMap {
            name,
            size: map.size,
            cell_bytes: map.cell_bytes,
            exact: map.exact,
            memory_bytes: memory.iter().sum(),
            zero: at(Place::Zero),
            cached: at(Place::Cached),
            fetching: at(Place::Fetching),
            local: at(Place::Local),
            absent: at(Place::Absent),
            unknown: at(Place::Unknown),
            total: PlaceBytes {
                memory: memory.iter().sum(),
                read: read.iter().sum(),
                prefetched: prefetched.iter().sum(),
                ..total(&map)
            },
            memory,
            read,
            prefetched,
        })
    })
    .await
}

fn column(map: &Map, place: Place) -> Vec<u64> {
    map.cells.iter().map(|cell| cell.at(place)).collect()
}

fn total(map: &Map) -> PlaceBytes {
    let sum = |place| map.cells.iter().map(|cell| cell.at(place)).sum();
    PlaceBytes {
        delta: sum(Place::Delta),
        zero: sum(Place::Zero),
        cached: sum(Place::Cached),
        fetching: sum(Place::Fetching),
        local: sum(Place::Local),
        absent: sum(Place::Absent),
        unknown: sum(Place::Unknown),
        memory: 0,
        read: 0,
        prefetched: 0,
    }
}

impl Control {
    /// Refuses work that needs a file that hangs: it would take a place until the file answers.
    pub(super) fn refuse_hanging(&self, base: &Arc<BaseNode>) -> Result<(), ApiError> {
        // An open file that is raw is not asked where its bytes are.
        if base.attached().is_some_and(|base| base.is_plain()) {
            return Ok(());
        }
        let hangs =
            self.bases.examine(std::slice::from_ref(base)).iter().any(|base| base.hangs_since.is_some());
        if !hangs {
            return Ok(());
        }
        let name = &base.record().name;
        let why = format!(
            "base {name}: there is no map while the filesystem of its file does not answer; see whether its server or \
             device works"
        );
        Err(ApiError::new(Cause::Overloaded, why))
    }

    /// By the base's trace, the bytes of each cell that the recorded boot reads, and those that are prefetched.
    fn traced(&self, node: &BaseNode, map: &Map) -> (Vec<u64>, Vec<u64>) {
        let none = vec![0; map.cells.len()];
        // A trace that cannot be read counts as none; `base trace show` says why.
        let loaded = self.store.tracer().and_then(|tracer| tracer.store().load(node.id()).ok().flatten());
        let Some(trace) = loaded else { return (none.clone(), none) };
        let entries = trace.entries.iter().map(|entry| {
            let first = entry.first.saturating_mul(BLOCK);
            first..first.saturating_add(entry.blocks.saturating_mul(BLOCK))
        });
        let read = map::bytes_in_cells(map, entries);
        (read, map::bytes_in_cells(map, Player::new(&trace, map.size)))
    }
}
