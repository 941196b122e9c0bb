//! Chains of layers against a flat model of where each byte is.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use parking_lot::Mutex;
use proptest::prelude::*;

use super::*;
use crate::delta::{Delta, DeltaIo, Durability, Edges, RootStore};
use crate::format::layout::index_path;
use crate::format::record::MapRoot;
use crate::io::{HostMedium, LiveDir, LiveStore, MediumFile, Open};
use crate::mutant::simulate;

#[derive(Default)]
struct Roots(Mutex<MapRoot>);

impl RootStore for Roots {
    fn commit(&self, root: MapRoot, _modified_ns: i64) -> io::Result<()> {
        *self.0.lock() = root;
        Ok(())
    }
}

/// A change of the delta that becomes the next layer.
#[derive(Debug, Clone)]
enum Step {
    Write(u64, u64),
    Zero(u64, u64),
    Resize(u64),
    Seal,
}

/// What a byte shows: the number of a layer, or one of these.
const ZERO: u64 = 0;
const BELOW: u64 = u64::MAX;

struct Rig {
    dir: tempfile::TempDir,
    medium: Arc<dyn Medium>,
    live: Arc<LiveDir>,
    specs: Vec<DeltaSpec>,
    top: Arc<Delta>,
    /// The overlap that the top delta was made with.
    overlap: u64,
    /// Of each byte, at a granularity of 512 bytes.
    model: Vec<u64>,
}

const UNIT: u64 = 512;

impl Rig {
    fn new(size: u64, overlap: u64) -> Self {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let medium: Arc<dyn Medium> = Arc::new(HostMedium::new(dir.path()).unwrap());
        medium.make_dir("deltas").unwrap();
        let live = Arc::new(LiveDir::new(&dir.path().join("live")).unwrap());
        let top = Self::delta(&medium, &live, 1, size, overlap);
        let model = (0..size / UNIT).map(|unit| if unit * UNIT < overlap { BELOW } else { ZERO }).collect();
        Self { dir, medium, live, specs: Vec::new(), top, overlap, model }
    }

    fn delta(
        medium: &Arc<dyn Medium>,
        live: &Arc<LiveDir>,
        number: u64,
        size: u64,
        overlap: u64,
    ) -> Arc<Delta> {
        let spec =
            DeltaSpec { disk: number, size, overlap, rises: false, modified_ns: 0, root: MapRoot::default() };
        let roots = Arc::new(Roots::default());
        Arc::new(Delta::open(spec, DeltaIo { medium: medium.clone(), live: live.clone(), roots }).unwrap())
    }

    fn set(&mut self, from: u64, to: u64, value: u64) {
        let to = (to / UNIT).min(self.model.len() as u64);
        self.model[(from / UNIT).min(to) as usize..to as usize].fill(value);
    }

    fn run(&mut self, step: &Step) {
        let number = self.top.number();
        match *step {
            Step::Write(block, count) => {
                let (from, to) = (block * BLOCK, (block + count) * BLOCK);
                let to = to.min(self.top.size());
                if from < to {
                    self.top
                        .write(from, &vec![number as u8; (to - from) as usize], &Edges::default())
                        .unwrap();
                    self.set(from, to, number);
                }
            }
            Step::Zero(block, count) => {
                let end = (block + count).min(self.top.size() / BLOCK);
                self.top.zero_blocks(block, end).unwrap();
                self.set(block * BLOCK, end * BLOCK, ZERO);
            }
            Step::Resize(units) => {
                self.top.resize(units * UNIT, Durability::Now).unwrap();
                self.model.resize(units as usize, ZERO);
            }
            Step::Seal => self.seal(),
        }
    }

    fn seal(&mut self) {
        let spec = self.top.seal().unwrap();
        self.live.remove(spec.disk).unwrap();
        let size = self.top.size();
        // As a record keeps them: bounds that the map file does not exceed.
        self.specs.push(DeltaSpec { overlap: self.overlap, size: size.max(self.overlap), ..spec });
        self.overlap = size;
        self.top = Self::delta(&self.medium, &self.live, spec.disk + 1, size, size);
    }

    fn chain(&self) -> Arc<Chain> {
        Layers::default().chain(self.specs.clone(), self.medium.clone()).unwrap().unwrap()
    }

    #[track_caller]
    fn compare(&self, chain: &Chain) {
        let size = self.model.len() as u64 * UNIT;
        let mut at = 0;
        while at < size {
            let (part, stop) = chain.extent(at, size).unwrap();
            let shown = match part {
                Part::Zero => ZERO,
                Part::Below => BELOW,
                Part::Layer(file) => file.number(),
            };
            let is = &self.model[(at / UNIT) as usize..stop.div_ceil(UNIT) as usize];
            // The last block of a layer may have zeros of its own behind the end of the disk that it was.
            let same = |value: &u64| *value == shown || (*value == ZERO && shown != BELOW);
            assert!(is.iter().all(same), "{at}..{stop} shows {shown}, should be {is:?}");
            if let Part::Layer(file) = part {
                let mut bytes = vec![0xee; (stop - at) as usize];
                file.read(&mut bytes, at).unwrap();
                for (byte, unit) in bytes.iter().zip((at..stop).map(|at| self.model[(at / UNIT) as usize])) {
                    assert_eq!(u64::from(*byte), unit & 0xff);
                }
            }
            at = stop;
        }
        assert!(matches!(chain.extent(size, u64::MAX).unwrap(), (Part::Zero, u64::MAX)));
    }

    fn index(&self) -> std::path::PathBuf {
        self.dir.path().join(index_path(self.specs.last().unwrap().disk))
    }
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        6 => (0..40u64, 1..12u64).prop_map(|(at, count)| Step::Write(at, count)),
        3 => (0..40u64, 1..12u64).prop_map(|(at, count)| Step::Zero(at, count)),
        1 => (1..400u64).prop_map(Step::Resize),
        3 => Just(Step::Seal),
    ];
    proptest::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn an_index_shows_each_byte_where_its_last_writer_left_it(steps in steps(), small in any::<bool>()) {
        // With small leaves, an index of some extents is read leaf by leaf.
        let _small = small.then(|| simulate(None));
        let mut rig = Rig::new(40 * BLOCK, 25 * BLOCK - 1024);
        for step in &steps {
            rig.run(step);
            if matches!(step, Step::Seal) {
                rig.compare(&rig.chain());
            }
        }
    }
}

fn layered() -> Rig {
    let mut rig = Rig::new(40 * BLOCK, 20 * BLOCK);
    for step in [Step::Write(2, 3), Step::Seal, Step::Zero(3, 1), Step::Write(8, 30), Step::Seal] {
        rig.run(&step);
    }
    rig
}

/// Guards D76.
#[test]
fn an_index_that_is_damaged_or_gone_is_made_again() {
    let _small = simulate(None);
    let rig = layered();
    let chain = rig.chain();
    rig.compare(&chain);
    let sound = fs::read(rig.index()).unwrap();
    // Under a reader, and before an open: each page.
    for page in 0..sound.len() / 4096 {
        let mut bytes = sound.clone();
        bytes[page * 4096 + 3] ^= 0x40;
        fs::write(rig.index(), &bytes).unwrap();
        rig.compare(&chain);
        rig.compare(&rig.chain());
    }
    fs::remove_file(rig.index()).unwrap();
    rig.compare(&rig.chain());
    assert!(rig.index().exists());
    fs::write(rig.index(), &sound[..5000]).unwrap();
    rig.compare(&rig.chain());
}

/// Guards D76.
#[test]
fn an_index_is_made_although_a_leaf_of_the_one_below_is_damaged() {
    let _small = simulate(None);
    let mut rig = Rig::new(40 * BLOCK, 20 * BLOCK);
    for step in [Step::Write(2, 3), Step::Zero(9, 2), Step::Write(15, 8), Step::Seal] {
        rig.run(&step);
    }
    rig.compare(&rig.chain());
    let mut bytes = fs::read(rig.index()).unwrap();
    assert!(bytes.len() > 4 * 4096, "several leaves");
    bytes[2 * 4096 + 9] ^= 1;
    fs::write(rig.index(), bytes).unwrap();
    rig.run(&Step::Write(1, 1));
    rig.run(&Step::Seal);
    rig.compare(&rig.chain());
}

#[test]
fn an_index_of_other_layers_is_not_used() {
    let rig = layered();
    let (first, second) = (rig.dir.path().join(index_path(1)), rig.index());
    drop(rig.chain());
    let bytes = fs::read(&second).unwrap();
    assert!(!first.exists(), "no disk stands on the lower layer");
    drop(Layers::default().chain(rig.specs[..1].to_vec(), rig.medium.clone()).unwrap());
    fs::copy(&first, &second).unwrap();
    rig.compare(&rig.chain());
    assert_ne!(fs::read(&second).unwrap(), fs::read(&first).unwrap());
    assert_eq!(fs::read(&second).unwrap().len(), bytes.len());
}

#[test]
fn disks_on_one_layer_share_its_index_and_its_file() {
    let rig = layered();
    let layers = Layers::default();
    let open = || layers.chain(rig.specs.clone(), rig.medium.clone()).unwrap().unwrap();
    let (one, two) = (open(), open());
    assert!(Arc::ptr_eq(&one, &two));
    let lower = layers.chain(rig.specs[..1].to_vec(), rig.medium.clone()).unwrap().unwrap();
    assert!(Arc::ptr_eq(&one.files[0], &lower.files[0]));
    drop((one, two, lower));
    assert!(layers.opened(&[1, 2]).is_none());
}

// Only ENOSPC did that; after EIO the disk could not be attached.
/// Guards D76.
#[test]
fn an_index_that_cannot_be_written_is_in_memory_whatever_the_error() {
    let rig = layered();
    for errno in [libc::ENOSPC, libc::EDQUOT, libc::EIO, libc::EROFS, libc::EFBIG] {
        let failing: Arc<dyn Medium> = Arc::new(Failing::of(rig.dir.path(), errno));
        let layers = Layers::default();
        let chain = layers.chain(rig.specs.clone(), failing).unwrap().unwrap();
        rig.compare(&chain);
        assert!(!rig.index().exists() && !staged_exists(rig.dir.path()));
        assert!(layers.memory().unwritten > 0 && layers.memory().unwritten == layers.memory().bytes);
        drop(chain);
        assert_eq!((layers.memory().unwritten, layers.memory().bytes), (0, 0));
    }
}

/// Guards D93.
#[test]
fn indexes_in_memory_are_bounded_and_written_when_that_is_possible_again() {
    let rig = layered();
    let failing = Arc::new(Failing::of(rig.dir.path(), libc::ENOSPC));
    let layers = Layers::default();
    let chain = layers.chain(rig.specs.clone(), failing.clone()).unwrap().unwrap();
    assert!(layers.has_room());
    layers.bound_unwritten(layers.memory().unwritten - 1);
    assert!(!layers.has_room());
    rig.compare(&chain);
    failing.1.store(0, Ordering::Relaxed);
    assert!(layers.has_room() && rig.index().exists());
    assert!(layers.memory().unwritten == 0 && layers.memory().bytes > 0);
    rig.compare(&chain);
}

/// Guards D93.
#[test]
fn files_of_layers_above_the_bound_are_closed_and_opened_again() {
    for small in [false, true] {
        // With small leaves, indexes have files too.
        let _small = small.then(|| simulate(None));
        let mut rig = Rig::new(40 * BLOCK, 0);
        for at in 0..20 {
            rig.run(&Step::Write(2 * at, 1));
            rig.run(&Step::Seal);
        }
        let layers = Layers::default();
        layers.open_at_most(3);
        let chain = layers.chain(rig.specs.clone(), rig.medium.clone()).unwrap().unwrap();
        for _ in 0..2 {
            rig.compare(&chain);
            assert_eq!(layers.open_files.count(), 3);
        }
        // A file that is read again and again stays open.
        let hot = &chain.files[7];
        let mut bytes = [0; 512];
        for file in &chain.files[..7] {
            hot.read(&mut bytes, 14 * BLOCK).unwrap();
            file.read(&mut bytes, u64::from(file.number() as u32 - 1) * 2 * BLOCK).unwrap();
            assert!(hot.data.get_now().is_some());
        }
        // A layer that is gone takes no place.
        drop(chain);
        assert_eq!(layers.open_files.count(), 0);
    }
}

fn staged_exists(root: &Path) -> bool {
    fs::read_dir(root.join("deltas"))
        .unwrap()
        .any(|e| e.unwrap().file_name().to_string_lossy().ends_with(".tmp"))
}

/// A medium on which every write fails, unless the number of its error is 0.
struct Failing(HostMedium, Arc<AtomicI32>);

struct FailingFile(Arc<dyn MediumFile>, Arc<AtomicI32>);

impl Failing {
    fn of(root: &Path, errno: i32) -> Self {
        Self(HostMedium::new(root).unwrap(), Arc::new(AtomicI32::new(errno)))
    }
}

impl Medium for Failing {
    fn open(&self, name: &str, how: Open) -> io::Result<Arc<dyn MediumFile>> {
        Ok(Arc::new(FailingFile(self.0.open(name, how)?, self.1.clone())))
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.remove(name)
    }
    fn sync_dir(&self, dir: &str) -> io::Result<()> {
        self.0.sync_dir(dir)
    }
    fn list(&self, dir: &str) -> io::Result<Vec<String>> {
        self.0.list(dir)
    }
    fn make_dir(&self, dir: &str) -> io::Result<()> {
        self.0.make_dir(dir)
    }
    fn never_waits(&self) -> bool {
        self.0.never_waits()
    }
    fn space(&self) -> io::Result<crate::io::Space> {
        self.0.space()
    }
    fn root(&self) -> std::path::PathBuf {
        self.0.root()
    }
}

impl MediumFile for FailingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buf, offset)
    }
    fn read_now(&self, buf: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        self.0.read_now(buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match self.1.load(Ordering::Relaxed) {
            0 => self.0.write_at(buf, offset),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
    fn sync_data(&self) -> io::Result<()> {
        self.0.sync_data()
    }
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }
    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.allocate(offset, len)
    }
    fn allocated(&self) -> io::Result<u64> {
        self.0.allocated()
    }
    fn identity(&self) -> io::Result<(u64, u64)> {
        self.0.identity()
    }
}
