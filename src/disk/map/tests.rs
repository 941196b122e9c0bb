use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;

use super::*;
use crate::delta::{Delta, DeltaIo, DeltaSpec, Edges, Mapping, RootStore};
use crate::format::record::MapRoot;
use crate::io::Medium;
use crate::io::sim::{SimLive, SimMedium};

const MIB: u64 = 1 << 20;

/// A base of which some units are cached and some requested; the others are absent.
#[derive(Default, Clone)]
struct Units {
    cached: BTreeSet<u64>,
    fetching: BTreeSet<u64>,
}

impl Holdings for Units {
    fn rows(&self, first: u64, rows: &mut [HeldRow]) {
        let range = first * 64..(first + rows.len() as u64) * 64;
        for unit in self.cached.range(range.clone()) {
            rows[(unit / 64 - first) as usize].cached |= 1 << (unit % 64);
        }
        for unit in self.fetching.range(range) {
            rows[(unit / 64 - first) as usize].fetching |= 1 << (unit % 64);
        }
    }

    fn next(&self, row: u64) -> u64 {
        let next = |units: &BTreeSet<u64>| units.range(row * 64..).next().map(|unit| unit / 64);
        next(&self.cached).into_iter().chain(next(&self.fetching)).min().unwrap_or(u64::MAX)
    }
}

#[derive(Default)]
struct Roots(Mutex<(MapRoot, u64)>);

impl RootStore for Roots {
    fn commit(&self, root: MapRoot, _modified_ns: i64) -> std::io::Result<()> {
        self.0.lock().0 = root;
        Ok(())
    }
}

struct Rig {
    size: u64,
    overlap: u64,
    roots: Arc<Roots>,
    delta_io: DeltaIo,
}

impl Rig {
    fn new(size: u64, overlap: u64) -> Self {
        let medium = SimMedium::new(1);
        medium.make_dir("deltas").unwrap();
        medium.sync_dir(".").unwrap();
        let roots = Arc::new(Roots::default());
        let live = Arc::new(SimLive::default());
        let delta_io = DeltaIo { medium: Arc::new(medium), live, roots: roots.clone() };
        Self { size, overlap, roots, delta_io }
    }

    fn spec(&self) -> DeltaSpec {
        let root = self.roots.0.lock().0;
        DeltaSpec { disk: 1, size: self.size, overlap: self.overlap, rises: false, modified_ns: 0, root }
    }

    fn open(&self) -> Delta {
        Delta::open(self.spec(), self.delta_io.clone()).unwrap()
    }
}

/// A delta with runs of each kind, in several pages of its map.
fn written(rig: &Rig) -> Delta {
    let delta = rig.open();
    let write = |block: u64| delta.write(block * BLOCK, &[7; BLOCK as usize], &Edges::default()).unwrap();
    for block in (0..3000).step_by(3) {
        write(block);
    }
    delta.zero_blocks(5000, 9000).unwrap();
    for block in [33, 15_871, 15_872, 15_873, 40_000] {
        write(block);
    }
    // The short block at the end.
    let last = rig.size / BLOCK * BLOCK;
    let head = vec![0; BLOCK as usize].into_boxed_slice();
    let edges = Edges { head: Some(head), ..Edges::default() };
    delta.write(last, &vec![9; (rig.size - last) as usize], &edges).unwrap();
    delta
}

/// The same map, block by block.
fn expected(delta: &Delta, units: &Units, map: &Map) -> Vec<Bytes> {
    let mut cells = vec![Bytes::default(); map.cells.len()];
    let mut at = 0;
    while at < map.size {
        let stop = (at + BLOCK).min(map.size);
        // A block on the overlap counts as one of the base.
        let place = match delta.extent(at, stop).0 {
            Mapping::Data => Place::Delta,
            Mapping::Zero => Place::Zero,
            Mapping::Base if units.cached.contains(&(at / UNIT)) => Place::Cached,
            Mapping::Base if units.fetching.contains(&(at / UNIT)) => Place::Fetching,
            Mapping::Base => Place::Absent,
        };
        cells[(at / map.cell_bytes) as usize].0[place as usize] += stop - at;
        at = stop;
    }
    cells
}

fn units() -> Units {
    let cached = (0..64).chain(100..140).chain((3000..9000).step_by(7)).collect();
    Units { cached, fetching: [140, 141, 2999, 3500].into() }
}

#[test]
fn a_map_has_each_byte_where_the_disk_reads_it_from() {
    let rig = Rig::new(300 * MIB + 1234, 190 * MIB + 5 * BLOCK);
    let delta = written(&rig);
    let units = units();
    for cells in [1, 2, 7, 100, 1000, MOST_CELLS] {
        let base = BaseView::Open(Box::new(units.clone()));
        let map = of_survey(&delta.survey(), &base, &Below::default(), cells);
        assert!(map.exact && map.cells.len() <= cells);
        assert_eq!(map.cells, expected(&delta, &units, &map), "{cells} cells");
        assert_eq!(map.cells.iter().map(Bytes::sum).sum::<u64>(), rig.size);
    }
}

#[test]
fn the_durable_map_of_a_closed_disk_gives_the_same_map_as_the_live_one() {
    let rig = Rig::new(300 * MIB + 1234, 190 * MIB);
    let delta = written(&rig);
    let view = || BaseView::Open(Box::new(units()));
    let live = of_survey(&delta.survey(), &view(), &Below::default(), 500);
    delta.close().unwrap();
    drop(delta);
    let survey = Delta::survey_durable(&rig.spec(), &*rig.delta_io.medium).unwrap();
    assert_eq!(of_survey(&survey, &view(), &Below::default(), 500), live);
}

#[test]
fn a_disk_that_was_never_written_is_all_base_and_zeros() {
    let rig = Rig::new(10 * MIB, 6 * MIB);
    let survey = Delta::survey_durable(&rig.spec(), &*rig.delta_io.medium).unwrap();
    for (view, place) in [
        (BaseView::Unknown, Place::Unknown),
        (BaseView::Open(Box::new(crate::source::holdings::AllLocal)), Place::Local),
        (BaseView::Open(Box::new(Units::default())), Place::Absent),
        (BaseView::Blank, Place::Zero),
    ] {
        let map = of_survey(&survey, &view, &Below::default(), 1);
        let of_zeros = if place == Place::Zero { 10 * MIB } else { 4 * MIB };
        assert_eq!(map.cells[0].at(Place::Zero), of_zeros);
        assert_eq!(map.cells[0].sum(), 10 * MIB);
        assert_eq!(map.cells[0].at(place), if place == Place::Zero { 10 * MIB } else { 6 * MIB });
    }
}

/// A base of which every window has something; counts the windows that are looked at.
#[derive(Default)]
struct Dense(Cell<usize>);

impl Holdings for &Dense {
    fn rows(&self, first: u64, rows: &mut [HeldRow]) {
        self.0.set(self.0.get() + 1);
        // A quarter of the first half.
        for (row, held) in (first..).zip(rows) {
            held.cached = if row * ROW < 1 << 45 { 0xffff } else { 0 };
        }
    }
}

/// Guards D70.
#[test]
fn a_map_of_64_tib_looks_at_a_bounded_number_of_windows_and_says_so() {
    const SIZE: u64 = 1 << 46;
    let dense = Dense::default();
    let map = draw(None, SIZE, SIZE, &BaseView::Open(Box::new(&dense)), &Below::default(), MOST_CELLS);
    assert!(!map.exact);
    assert!(dense.0.get() <= MOST_WINDOWS, "{}", dense.0.get());
    assert_eq!(map.cells.iter().map(Bytes::sum).sum::<u64>(), SIZE);
    let cached: u64 = map.cells.iter().map(|cell| cell.at(Place::Cached)).sum();
    let wanted = SIZE / 8;
    assert!(cached.abs_diff(wanted) < wanted / 100, "{cached}");
    for (number, cell) in map.cells.iter().enumerate() {
        assert_eq!(cell.sum(), map.cell_bytes, "cell {number}");
    }
}

/// Guards D70.
#[test]
fn a_sparse_disk_of_64_tib_is_mapped_exactly() {
    const SIZE: u64 = 1 << 46;
    let rig = Rig::new(SIZE, SIZE / 2);
    let delta = rig.open();
    for at in [0, SIZE / 4, SIZE - BLOCK] {
        delta.write(at, &[1; BLOCK as usize], &Edges::default()).unwrap();
    }
    let units = Units { cached: [SIZE / 8 / UNIT].into(), ..Units::default() };
    let map = of_survey(&delta.survey(), &BaseView::Open(Box::new(units)), &Below::default(), MOST_CELLS);
    assert!(map.exact);
    let sum = |place| map.cells.iter().map(|cell| cell.at(place)).sum::<u64>();
    assert_eq!((sum(Place::Delta), sum(Place::Cached)), (3 * BLOCK, UNIT));
    assert_eq!(sum(Place::Absent), SIZE / 2 - 2 * BLOCK - UNIT);
    assert_eq!(sum(Place::Zero), SIZE / 2 - BLOCK);
}

#[test]
fn ranges_are_spread_over_cells_and_never_fill_one_twice() {
    let map = draw(None, 5 * MIB, 5 * MIB, &BaseView::Blank, &Below::default(), 5);
    let ranges = [MIB / 2..2 * MIB, MIB..2 * MIB, 4 * MIB..9 * MIB, 7 * MIB..8 * MIB];
    assert_eq!(bytes_in_cells(&map, ranges.into_iter()), [MIB / 2, MIB, 0, 0, MIB]);
}
