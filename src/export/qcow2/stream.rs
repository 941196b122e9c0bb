//! An image without compression, written from its beginning to its end.

use std::io::Write;

use super::super::{ExportError, Input, Watch, tell};
use super::header::{Backing, Header};
use super::runs::{self, Kind, Run};
use super::{
    BLOCK_ENTRIES, CLUSTER, COPIED, L2_ENTRIES, Refcounts, ZERO, check_size, l1_entries, table_bytes,
};

/// Clusters that are read at a time.
const STEP: u64 = 16;

/// Where the parts of an image are, in clusters: header, refcount table, refcount blocks, L1, L2 tables, data.
struct Layout {
    refcounts: Refcounts,
    l1: u64,
    tables: Vec<u64>,
    data: u64,
}

impl Layout {
    fn of(size: u64, runs: &[Run]) -> Self {
        let l1 = (l1_entries(size) * 8).div_ceil(CLUSTER).max(1);
        let tables = runs::tables(runs);
        let data = runs.iter().filter(|run| run.kind == Kind::Data).map(|run| run.end - run.first).sum();
        let refcounts = Refcounts::of(1 + l1 + tables.len() as u64 + data);
        Self { refcounts, l1, tables, data }
    }

    fn blocks_at(&self) -> u64 {
        1 + self.refcounts.table
    }

    fn l1_at(&self) -> u64 {
        1 + self.refcounts.clusters()
    }

    fn tables_at(&self) -> u64 {
        self.l1_at() + self.l1
    }

    fn data_at(&self) -> u64 {
        self.tables_at() + self.tables.len() as u64
    }

    fn end(&self) -> u64 {
        self.data_at() + self.data
    }
}

/// Writes an image in order. With `backing` it has only what the input does not leave to that image.
///
/// # Errors
/// Errors of reading and of writing; a size or a name that does not fit the format; [`ExportError::Stopped`].
pub fn write(
    input: &dyn Input,
    backing: Option<&Backing>,
    out: &mut dyn Write,
    watch: Watch<'_>,
) -> Result<(), ExportError> {
    check_size(input.size())?;
    let runs = runs::of(input, backing.is_some())?;
    let layout = Layout::of(input.size(), &runs);
    let header = Header {
        size: input.size(),
        backing,
        l1_at: layout.l1_at() * CLUSTER,
        refcounts_at: CLUSTER,
        refcounts: layout.refcounts,
        compression: 0,
    };
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(ExportError::writing("writing it"));
    put(&header.encode()?)?;
    let blocks = (0..layout.refcounts.blocks).map(|block| (layout.blocks_at() + block) * CLUSTER);
    put(&table_bytes(blocks))?;
    for block in 0..layout.refcounts.blocks {
        // Every cluster of the file is referred to once.
        let used = layout.end().saturating_sub(block * BLOCK_ENTRIES).min(BLOCK_ENTRIES);
        let mut counts = [0, 1].repeat(used as usize);
        counts.resize(CLUSTER as usize, 0);
        put(&counts)?;
    }
    put(&l1(&layout, input.size()))?;
    let mut next = layout.data_at();
    let mut rest = runs.as_slice();
    for table in &layout.tables {
        put(&l2(*table, &mut rest, &mut next))?;
    }
    let mut buf = vec![0; (STEP * CLUSTER) as usize];
    for run in runs.iter().filter(|run| run.kind == Kind::Data) {
        let mut first = run.first;
        while first < run.end {
            tell(watch, first * CLUSTER)?;
            let end = run.end.min(first + STEP);
            let bytes = &mut buf[..((end - first) * CLUSTER) as usize];
            read_clusters(input, first, bytes)?;
            put(bytes)?;
            first = end;
        }
    }
    tell(watch, input.size())?;
    out.flush().map_err(ExportError::writing("writing it"))
}

/// Reads whole clusters, with zeros behind the end of the disk.
pub(super) fn read_clusters(input: &dyn Input, first: u64, buf: &mut [u8]) -> Result<(), ExportError> {
    let at = first * CLUSTER;
    let len = (input.size() - at).min(buf.len() as u64) as usize;
    input.read(&mut buf[..len], at)?;
    buf[len..].fill(0);
    Ok(())
}

fn l1(layout: &Layout, size: u64) -> Vec<u8> {
    let mut entries = vec![0; l1_entries(size) as usize];
    for (place, table) in (layout.tables_at()..).zip(&layout.tables) {
        entries[*table as usize] = (place * CLUSTER) | COPIED;
    }
    let mut bytes = table_bytes(entries.into_iter());
    bytes.resize((layout.l1 * CLUSTER) as usize, 0);
    bytes
}

/// The L2 table with this number. `rest`: the runs that are not passed yet; `next`: the place of the next cluster.
fn l2(table: u64, rest: &mut &[Run], next: &mut u64) -> Vec<u8> {
    let (from, to) = (table * L2_ENTRIES, (table + 1) * L2_ENTRIES);
    let mut entries = vec![0; L2_ENTRIES as usize];
    while let Some((run, behind)) = rest.split_first() {
        for cluster in run.first.max(from)..run.end.min(to) {
            entries[(cluster - from) as usize] = match run.kind {
                Kind::Zero => ZERO,
                Kind::Data => {
                    *next += 1;
                    ((*next - 1) * CLUSTER) | COPIED
                }
            };
        }
        if run.end > to {
            break;
        }
        *rest = behind;
    }
    table_bytes(entries.into_iter())
}
