//! A layer that is being made in the background, to take the place of what it copies (docs/format.md, "A layer that is
//! being made").
//!
//! What must hold: nothing stands on it before it is complete, so that it can be dropped at any time.

use std::sync::Arc;

use super::MAX_NUMBER;
use super::codec::{FormatError, Reader, Writer};
use super::identity::BaseIdentity;
use super::lineage::{LayerEntry, Seal, get_bounds, get_number};
use super::record::{Backing, MapRoot};

/// What a new layer takes the place of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Purpose {
    /// Of layers one above the other, by their numbers: the lowest and the highest.
    Merge {
        /// The lowest.
        first: u64,
        /// The highest.
        last: u64,
    },
    /// Of the base, or of all layers with the base: the disk shows the same bytes over another base.
    Rebase {
        /// The other base; `None`: none.
        to: Option<Backing>,
        /// The highest layer that it takes the place of; `None`: of the base only.
        top: Option<u64>,
    },
}

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rework {
    /// What it takes the place of.
    pub purpose: Purpose,
    /// The layer as far as it was made. Its place in the lineage is not decided.
    pub layer: LayerEntry,
    /// Bytes from the start that are compared and copied, durably.
    pub done: u64,
    /// Most bytes per second; 0 without a limit.
    pub rate: u64,
}

impl Rework {
    /// The bytes of the field.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        match &self.purpose {
            Purpose::Merge { first, last } => {
                w.u8(0).u64(*first).u64(*last);
            }
            Purpose::Rebase { to, top } => {
                w.u8(1).u64(top.unwrap_or(0)).u8(to.is_some().into());
                if let Some(backing) = to {
                    w.u64(backing.base);
                    backing.identity.put(&mut w, 2);
                }
            }
        }
        let layer = &self.layer;
        w.u64(layer.number).u64(layer.size).u64(layer.overlap).i64(layer.modified_ns);
        w.u64(layer.map.generation).u64(layer.map.floor);
        w.u64(self.done).u64(self.rate);
        w.finish()
    }

    /// Reads the bytes of the field.
    pub(super) fn get(r: &mut Reader<'_>) -> Result<Self, FormatError> {
        let purpose = match r.u8()? {
            0 => Purpose::Merge { first: get_number(r)?, last: get_number(r)? },
            1 => {
                let top = Some(get_number(r)?).filter(|top| *top != 0);
                let to = match r.u8()? {
                    0 => None,
                    1 => {
                        let base = get_number(r)?;
                        Some(Backing { base, identity: Arc::new(BaseIdentity::get(r, 2)?) })
                    }
                    other => return Err(r.bad(format!("base flag of a new layer is {other}"))),
                };
                Purpose::Rebase { to, top }
            }
            other => return Err(r.newer(format!("purpose {other} of a new layer is not known"))),
        };
        let number = get_number(r)?;
        let (size, overlap) = get_bounds(r)?;
        let modified_ns = r.i64()?;
        let map = MapRoot { generation: get_number(r)?, floor: r.u64()? };
        let (done, rate) = (r.u64()?, r.u64()?);
        if done > size || number == 0 || number > MAX_NUMBER {
            return Err(
                r.bad(format!("layer {number}, of which {done} of {size} bytes are made, is not possible"))
            );
        }
        let layer = LayerEntry { number, below: None, seal: Seal::Pending, size, overlap, modified_ns, map };
        Ok(Self { purpose, layer, done, rate })
    }
}
