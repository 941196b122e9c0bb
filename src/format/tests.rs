//! Golden bytes and damage of every durable structure.

mod bounds;
mod cache;
mod carried;
mod devices;
mod encryption;
mod images;
mod limits;
mod names;
mod pools;
mod proof;
mod trace;
mod trash;
mod used;

use super::features::Features;
use super::journal::{Carried, Expected, Journal, MapHeader, Record, Run};
use super::lineage::{LayerEntry, Lineage, Seal, SnapshotEntry};
use super::record::*;
use super::replay::Words;
use super::rework::{Purpose, Rework};
use super::{BLOCK, FormatError, Kind, valid_name};
use proptest::prelude::*;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn fnv(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(*b)).wrapping_mul(0x100_0000_01b3))
}

fn identity() -> BaseIdentity {
    BaseIdentity {
        size: 5000,
        validator: Validator::File { mtime_ns: 77, inode: 12 },
        digest: Some(Digest::Sha256([7; 32])),
    }
}

fn disk() -> DiskRecord {
    DiskRecord {
        id: 3,
        name: "vm-1".into(),
        name_seq: 9,
        unlinked: false,
        backing: Some(Backing { base: 2, identity: identity().into() }),
        size: 8192,
        size_is_current: false,
        overlap: 5000,
        mode: 0o600,
        uid: 1,
        gid: 2,
        created_ns: 10,
        changed_ns: 11,
        modified_ns: 12,
        map: MapRoot { generation: 4, floor: 128 },
        request: None,
        lineage: Lineage::of(3),
        features: Features::default(),
    }
}

/// A disk that needs version 4: two layers on one, of which a snapshot needs one.
fn layered_disk() -> DiskRecord {
    let layer = |number: u64, below: Option<usize>| LayerEntry {
        number,
        below,
        seal: Seal::Sealed,
        size: 8192,
        overlap: 5000,
        modified_ns: 13,
        map: MapRoot { generation: 2, floor: 512 },
    };
    let snapshot = |number: u64, name: &str, layer, token| SnapshotEntry {
        number,
        name: name.into(),
        layer,
        size: 8192,
        overlap: 8192,
        created_ns: 14,
        token,
    };
    let lineage = Lineage {
        delta: 9,
        below: Some(2),
        layers: vec![
            layer(3, None),
            layer(5, Some(0)),
            LayerEntry { seal: Seal::Pending, ..layer(6, Some(0)) },
        ],
        snapshots: vec![snapshot(7, "monday", Some(1), Some(token())), snapshot(8, "empty", None, None)],
        dropped: vec![4],
        rolled_back: Some(token()),
        rises: true,
        rework: None,
    };
    DiskRecord { lineage, request: Some(Request::Client(token())), ..disk() }
}

/// A disk for which a layer is being made.
fn reworked_disks() -> [DiskRecord; 3] {
    let purposes = [
        Purpose::Merge { first: 3, last: 5 },
        Purpose::Rebase { to: disk().backing, top: Some(5) },
        Purpose::Rebase { to: None, top: None },
    ];
    purposes.map(|purpose| {
        let mut disk = layered_disk();
        let layer = LayerEntry {
            number: 30,
            below: None,
            seal: Seal::Pending,
            size: 8192,
            overlap: 5000,
            modified_ns: 15,
            map: MapRoot { generation: 1, floor: 256 },
        };
        disk.lineage.rework = Some(Box::new(Rework { purpose, layer, done: 4096, rate: 1 << 20 }));
        disk
    })
}

fn base() -> BaseRecord {
    BaseRecord {
        id: 2,
        name: "debian".into(),
        image: ImageFile {
            source: "/srv/debian.raw".into(),
            mirrors: Vec::new(),
            format: ImageFormat::Raw,
            disk_size: 5000,
            identity: identity(),
            proof: None,
        },
        backing: Vec::new(),
        created_ns: 5,
        options: BaseOptions::default(),
        moved: Vec::new(),
        token: None,
    }
}

/// A base that needs version 2.
fn far_base() -> BaseRecord {
    let identity = |etag: Option<&str>| BaseIdentity {
        size: 700,
        validator: Validator::Http {
            etag: etag.map(Into::into),
            last_modified: Some("Sat, 21 Nov 2026 10:00:00 GMT".into()),
        },
        digest: Some(Digest::Sha512([9; 64])),
    };
    let image = ImageFile {
        source: "https://images.example.org/debian.qcow2".into(),
        mirrors: vec!["http://mirror.example.org/debian.qcow2".into()],
        format: ImageFormat::Qcow2,
        disk_size: 1 << 31,
        identity: identity(Some("\"abc\"")),
        proof: None,
    };
    let below = ImageFile {
        format: ImageFormat::Vmdk,
        mirrors: Vec::new(),
        identity: identity(None),
        ..image.clone()
    };
    let options = BaseOptions {
        strictness: Strictness::Weak,
        deadline_s: 30,
        max_requests: 4,
        max_rate: 1 << 20,
        pinned: true,
        hydrate: false,
        refused: false,
        given_up: false,
        copies: None,
    };
    BaseRecord { image, backing: vec![below], options, ..base() }
}

/// A base in a bucket.
fn bucket_base() -> BaseRecord {
    let validator = Validator::S3 {
        version: Some("3HL4kqtJlcpXroDTDmJ+rmSpXd3dIbrHY".into()),
        etag: Some("\"abc-12\"".into()),
        last_modified: None,
    };
    let identity = BaseIdentity { size: 700, validator, digest: None };
    let image = ImageFile { source: "s3://images/debian.qcow2".into(), identity, ..far_base().image };
    BaseRecord { image, ..base() }
}

/// A base that needs version 3.
fn moved_base() -> BaseRecord {
    let urls = |text: &str| vec![format!("https://new.example.org/{text}"), "http://m.example.org/x".into()];
    let moved = vec![Moved { file: 0, urls: urls("image") }, Moved { file: 1, urls: urls("below") }];
    let options = BaseOptions { given_up: true, ..far_base().options };
    BaseRecord { options, moved, ..far_base() }
}

fn token() -> Token {
    Token::of_hash(std::array::from_fn(|i| i as u8))
}

/// A base that needs version 4.
fn claimed_base() -> BaseRecord {
    BaseRecord { token: Some(token()), ..base() }
}

/// Bases that need version 5.
fn copied_bases() -> [BaseRecord; 2] {
    let copies = Some(KeptCopies { count: 3, number: 0x0102_0304 });
    let plain = BaseRecord { options: BaseOptions { copies, ..BaseOptions::default() }, ..base() };
    let options = BaseOptions { copies, ..moved_base().options };
    [plain, BaseRecord { options, token: Some(token()), ..moved_base() }]
}

/// A disk of version 3 that a client created.
fn claimed_disk() -> DiskRecord {
    DiskRecord { request: Some(Request::Client(token())), ..disk() }
}

fn far_disk() -> DiskRecord {
    DiskRecord { backing: Some(Backing { base: 2, identity: far_base().image.identity.into() }), ..disk() }
}

/// A disk that needs version 3.
fn named_disk() -> DiskRecord {
    let request = Some(Request::Mount(MountRequest { mount_ns: 1 << 60, unique: 8 }));
    DiskRecord { request, size_is_current: true, ..disk() }
}

fn map_file() -> Vec<u8> {
    let header = MapHeader { disk: 3, generation: 4, nonce: 0x1234, carries: false };
    let mut bytes = header.encode();
    for seq in 1..=3u64 {
        let runs = vec![
            Run { first: seq, words: vec![1, 2] },
            Run { first: 100, words: vec![0x5555_5555_5555_5555; 40] },
        ];
        let record = Record { size: 1 << 30, overlap: 4096, modified_ns: 9, runs, carried: None };
        bytes.extend(record.encode(0x1234, seq));
    }
    bytes
}

/// A map file that carries blocks, which need the incompatible feature.
fn carrying_map_file(records: &[Record]) -> Vec<u8> {
    let mut bytes = MapHeader { disk: 3, generation: 4, nonce: 0x1234, carries: true }.encode();
    for (seq, record) in (1..).zip(records) {
        bytes.extend(record.encode(0x1234, seq));
    }
    bytes
}

/// Blocks 32 and later are data from word 1 on; each carried block is filled with its number.
fn carrying(blocks: &[u64]) -> Record {
    let bytes = blocks.iter().flat_map(|block| [*block as u8; BLOCK as usize]).collect();
    Record {
        size: 1 << 30,
        overlap: 4096,
        modified_ns: 9,
        runs: vec![Run { first: 1, words: vec![0x5555_5555_5555_5555] }],
        carried: Some(Carried { blocks: blocks.to_vec(), bytes }),
    }
}

fn each(words: Words<'_>) -> Vec<u64> {
    match words {
        Words::Same(len, value) => vec![value; len as usize],
        Words::Each(words) => words.to_vec(),
    }
}

/// Decodes with what the record of disk 3 expects.
fn decode(bytes: &[u8], floor: u64) -> Result<Journal, FormatError> {
    let (size, overlap) = (1 << 30, 8192);
    Journal::decode(bytes, &Expected { disk: 3, generation: 4, floor, size, overlap, modified_ns: 0 })
}

/// If this fails, the on-disk format has changed: raise the version of the structure, and keep reading the old one.
#[test]
fn golden_bytes_bump_the_version_when_this_fails() {
    let superblock = Superblock { uuid: [0xab; 16], created_ns: 1, next_id: 1000 };
    assert_eq!(
        hex(&superblock.encode()),
        "504c5953544f52450100000020000000000000000000000000000000000000000000000000000000abababababababababababab\
         abababab0100000000000000e8030000000000003bfce4f4"
    );
    assert_eq!(fnv(&base().encode()), GOLDEN_BASE, "base record");
    assert_eq!(fnv(&disk().encode()), GOLDEN_DISK, "disk record");
    assert_eq!(fnv(&map_file()), GOLDEN_MAP, "map file");
    assert_eq!(
        fnv(&carrying_map_file(&[carrying(&[33, 40])])),
        GOLDEN_CARRYING,
        "map file that carries blocks"
    );
    assert_eq!(fnv(&far_base().encode()), GOLDEN_BASE_2, "base record, version 2");
    assert_eq!(fnv(&bucket_base().encode()), GOLDEN_BUCKET, "base record, of a bucket");
    assert_eq!(fnv(&moved_base().encode()), GOLDEN_BASE_3, "base record, version 3");
    assert_eq!(fnv(&far_disk().encode()), GOLDEN_DISK_2, "disk record, version 2");
    assert_eq!(fnv(&named_disk().encode()), GOLDEN_DISK_3, "disk record, version 3");
    let claimed = (fnv(&claimed_base().encode()), fnv(&claimed_disk().encode()));
    assert_eq!(
        claimed,
        (GOLDEN_BASE_4, GOLDEN_DISK_CLAIMED),
        "base record, version 4, and disk record of a client"
    );
    let copied = copied_bases().map(|base| fnv(&base.encode()));
    assert_eq!(copied, GOLDEN_BASE_5, "base records, version 5");
    assert_eq!(fnv(&layered_disk().encode()), GOLDEN_DISK_4, "disk record, version 4");
    let reworked = reworked_disks().map(|disk| fnv(&disk.encode()));
    assert_eq!(reworked, GOLDEN_REWORKED, "disk records with a layer that is being made");
}
const GOLDEN_REWORKED: [u64; 3] =
    [16_232_241_866_552_466_512, 13_185_884_540_549_658_682, 3_353_139_189_293_560_225];
const GOLDEN_DISK_4: u64 = 1_054_231_935_157_151_023;
const GOLDEN_BASE_5: [u64; 2] = [4_761_649_240_536_019_414, 6_015_791_738_953_647_633];
const GOLDEN_BASE_4: u64 = 14_437_128_652_051_433_499;
const GOLDEN_DISK_CLAIMED: u64 = 6_751_722_338_324_524_893;
const GOLDEN_BUCKET: u64 = 863_079_386_683_511_322;
const GOLDEN_BASE_3: u64 = 570_137_555_886_035_612;
const GOLDEN_BASE_2: u64 = 16_544_287_689_199_446_035;
const GOLDEN_DISK_2: u64 = 10_880_998_963_494_629_315;
const GOLDEN_DISK_3: u64 = 8_520_515_344_301_278_014;
const GOLDEN_BASE: u64 = 11_084_340_009_902_145_310;
const GOLDEN_DISK: u64 = 16_945_533_228_444_867_536;
const GOLDEN_CARRYING: u64 = 15_355_625_895_409_005_787;
const GOLDEN_MAP: u64 = 5_955_604_900_307_239_178;

#[test]
fn records_decode_as_written() {
    assert_eq!(DiskRecord::decode(&disk().encode()).unwrap(), disk());
    assert_eq!(BaseRecord::decode(&base().encode()).unwrap(), base());
    assert_eq!(DiskRecord::decode(&far_disk().encode()).unwrap(), far_disk());
    assert_eq!(BaseRecord::decode(&far_base().encode()).unwrap(), far_base());
    assert_eq!(BaseRecord::decode(&bucket_base().encode()).unwrap(), bucket_base());
    assert_eq!(BaseRecord::decode(&moved_base().encode()).unwrap(), moved_base());
    let given_up = BaseRecord { moved: Vec::new(), ..moved_base() };
    assert_eq!((given_up.encode()[8], BaseRecord::decode(&given_up.encode()).unwrap()), (3, given_up));
    let served = BaseRecord { options: far_base().options, ..moved_base() };
    assert_eq!((served.encode()[8], BaseRecord::decode(&served.encode()).unwrap()), (3, served.clone()));
    // Kept blocks go by the original URL; requests go to the current one.
    assert_eq!(served.urls_of(&served.image), served.moved[0].urls);
    assert_eq!(served.urls_of(&served.backing[0]), served.moved[1].urls);
    assert_eq!(far_base().urls_of(&far_base().image).len(), 2);
    for moved in [
        vec![Moved { file: 2, urls: vec!["http://h/a".into()] }],
        vec![Moved { file: 0, urls: Vec::new() }],
        vec![served.moved[1].clone(), served.moved[0].clone()],
        vec![served.moved[0].clone(), served.moved[0].clone()],
        vec![Moved { file: 0, urls: vec!["http://h/a".into(); 18] }],
    ] {
        let bad = BaseRecord { moved, ..far_base() };
        BaseRecord::decode(&bad.encode()).expect_err("no such record is written");
    }
    assert_eq!(DiskRecord::decode(&named_disk().encode()).unwrap(), named_disk());
    assert_eq!(DiskRecord::decode(&claimed_disk().encode()).unwrap(), claimed_disk());
    let both = BaseRecord { token: Some(token()), ..moved_base() };
    for claimed in [claimed_base(), both] {
        assert_eq!((claimed.encode()[8], BaseRecord::decode(&claimed.encode()).unwrap()), (4, claimed));
    }
    for copied in copied_bases() {
        assert_eq!((copied.encode()[8], BaseRecord::decode(&copied.encode()).unwrap()), (5, copied));
    }
    for count in [1, KeptCopies::MOST + 1] {
        let copies = Some(KeptCopies { count, number: 1 });
        let bad = BaseRecord { options: BaseOptions { copies, ..BaseOptions::default() }, ..base() };
        BaseRecord::decode(&bad.encode()).expect_err("no such record is written");
    }
    // An earlier plyfs ignores a feature that it does not know, and clears it when it writes.
    let closed = DiskRecord { size_is_current: true, ..disk() };
    assert_eq!((closed.encode()[8], DiskRecord::decode(&closed.encode()).unwrap()), (1, closed));
    // An earlier plyfs reads what it could have written.
    assert_eq!((base().encode()[8], disk().encode()[8]), (1, 1));
    assert_eq!((far_base().encode()[8], far_disk().encode()[8]), (2, 2));
    assert_eq!(named_disk().encode()[8], 3);
    let unnamed = DiskRecord { request: None, ..layered_disk() };
    for layered in [layered_disk(), unnamed] {
        assert_eq!((layered.encode()[8], DiskRecord::decode(&layered.encode()).unwrap()), (4, layered));
    }
    for reworked in reworked_disks() {
        assert_eq!((reworked.encode()[8], DiskRecord::decode(&reworked.encode()).unwrap()), (5, reworked));
    }
    let pinned = BaseRecord { options: BaseOptions { pinned: true, ..BaseOptions::default() }, ..base() };
    assert_eq!((pinned.encode()[8], BaseRecord::decode(&pinned.encode()).unwrap()), (2, pinned));
    let journal = decode(&map_file(), 0).unwrap();
    assert_eq!((journal.records, journal.raised), (3, None));
    assert_eq!((journal.size, journal.overlap, journal.modified_ns), (1 << 30, 4096, 9));
    // Words 1 to 4 by three records that overlap, then 40 full ones from word 100 on.
    assert_eq!(journal.map.data_end(), 140 * 32);
    let words: Vec<u64> = journal.map.words().flat_map(|(_, words)| each(words)).collect();
    assert_eq!(words[..6], [0, 1, 1, 1, 2, 0]);
    assert_eq!(journal.end, map_file().len() as u64);
    assert!(!journal.torn);
}

#[test]
fn a_field_of_a_newer_plyfs_is_refused_as_newer_and_fields_out_of_order_as_damaged() {
    let record = reworked_disks()[2].encode();
    let payload_end = record.len() - 4;
    let rework = 2 + 1 + 8 + 1 + 8 + 8 + 8 + 8 + 8 + 8 + 8 + 8;
    let tag = payload_end - rework - 2;
    let with = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = record.clone();
        change(&mut bytes);
        let end = bytes.len() - 4;
        let sum = crc32c::crc32c(&bytes[..end]);
        bytes[end..].copy_from_slice(&sum.to_le_bytes());
        DiskRecord::decode(&bytes).unwrap_err()
    };
    assert_eq!(record[tag], 5);
    let newer = with(&|bytes| bytes[tag] = 0xf0);
    assert_eq!(newer.kind, Kind::Newer, "{newer}");
    let newer = with(&|bytes| bytes[tag + 4] = 9);
    assert_eq!(newer.kind, Kind::Newer, "{newer}");
    let too_far = with(&|bytes| bytes[payload_end - 9] = 1);
    assert_eq!(too_far.kind, Kind::Value, "{too_far}");
}

#[test]
fn every_flipped_bit_and_every_cut_of_a_record_is_detected() {
    for bytes in [
        reworked_disks()[1].encode(),
        disk().encode(),
        base().encode(),
        far_disk().encode(),
        far_base().encode(),
        bucket_base().encode(),
        moved_base().encode(),
        proof::proven_base().encode(),
        named_disk().encode(),
        claimed_base().encode(),
        copied_bases()[1].encode(),
        claimed_disk().encode(),
        layered_disk().encode(),
    ] {
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(DiskRecord::decode(&bad).is_err(), "bit {bit}");
            assert!(BaseRecord::decode(&bad).is_err(), "bit {bit}");
        }
        for cut in 0..bytes.len() {
            assert!(DiskRecord::decode(&bytes[..cut]).is_err());
            assert!(BaseRecord::decode(&bytes[..cut]).is_err());
        }
    }
}

#[test]
fn a_newer_version_is_reported_as_newer() {
    let mut bytes = disk().encode();
    bytes[8] = 4;
    let end = bytes.len() - 4;
    let sum = crc32c::crc32c(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&sum);
    assert_eq!(DiskRecord::decode(&bytes).unwrap_err().kind, Kind::Newer);
}

#[test]
fn every_flipped_bit_and_every_cut_below_the_floor_is_detected() {
    let bytes = map_file();
    let floor = bytes.len() as u64;
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(decode(&bad, floor).is_err(), "bit {bit}");
    }
    for cut in 0..bytes.len() {
        assert!(decode(&bytes[..cut], floor).is_err(), "cut {cut}");
    }
}

#[test]
fn without_a_floor_a_damaged_record_before_a_valid_one_is_refused_and_a_torn_tail_is_dropped() {
    let bytes = map_file();
    let record = (bytes.len() - super::journal::HEADER) / 3;
    for at in super::journal::HEADER..super::journal::HEADER + 2 * record {
        let mut bad = bytes.clone();
        bad[at] ^= 0x10;
        assert!(decode(&bad, 0).is_err(), "byte {at}");
    }
    let mut torn = bytes.clone();
    let last = torn.len() - 5;
    torn[last] ^= 1;
    let journal = decode(&torn, 0).unwrap();
    assert_eq!((journal.records, journal.torn), (2, true));
    let mut padded = bytes;
    padded.resize(65536, 0);
    let journal = decode(&padded, 0).unwrap();
    assert_eq!((journal.records, journal.torn), (3, false));
}

#[test]
fn names() {
    for good in ["a", "A.b-c_d", "0", &"x".repeat(128)] {
        assert!(valid_name(good), "{good}");
    }
    for bad in ["", ".a", "..", "a/b", "a\nb", "-a", "_a", "ä", "a b", &"x".repeat(129)] {
        assert!(!valid_name(bad), "{bad}");
    }
}

proptest! {
    #[test]
    fn decoders_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let _ = DiskRecord::decode(&bytes);
        let _ = BaseRecord::decode(&bytes);
        let _ = Superblock::decode(&bytes);
        let _ = decode(&bytes, 0);
    }

    #[test]
    fn a_damaged_map_file_never_panics(at in 0usize..1000, value in any::<u8>()) {
        let mut bytes = map_file();
        let at = at % bytes.len();
        bytes[at] = value;
        let _ = decode(&bytes, 0);
    }
}

/// The record with another byte at `at`, and the checksum that belongs to it.
fn resealed(mut bytes: Vec<u8>, at: usize, value: u8) -> Vec<u8> {
    bytes[at] = value;
    let end = bytes.len() - 4;
    let sum = crc32c::crc32c(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&sum);
    bytes
}

/// A kind of source that a later plyfs knows is no damage: the message has to say "use a newer plyfs".
#[test]
fn an_unknown_kind_of_validator_is_said_to_be_newer() {
    // Behind the size of the file, which occurs once in each of these records.
    let kind_at = |bytes: &[u8]| {
        let size = 700u64.to_le_bytes();
        bytes.windows(8).position(|window| window == size).expect("the size of the file") + 8
    };
    let base = far_base().encode();
    let error = BaseRecord::decode(&resealed(base.clone(), kind_at(&base), 7)).unwrap_err();
    assert_eq!(error.kind, Kind::Newer, "{error}");
    assert!(error.to_string().contains("kind 7") && error.to_string().contains("newer plyfs"), "{error}");
    let disk = far_disk().encode();
    let error = DiskRecord::decode(&resealed(disk.clone(), kind_at(&disk), 7)).unwrap_err();
    assert_eq!(error.kind, Kind::Newer, "{error}");
}

#[test]
fn a_lineage_that_is_not_possible_is_damage() {
    let refused = |change: &dyn Fn(&mut Lineage)| {
        let mut disk = layered_disk();
        change(&mut disk.lineage);
        DiskRecord::decode(&disk.encode()).unwrap_err().kind
    };
    let value = Kind::Value;
    assert_eq!(refused(&|lineage| lineage.layers[0].below = Some(0)), value, "a layer on itself");
    assert_eq!(refused(&|lineage| lineage.layers[0].below = Some(1)), value, "a layer on a later one");
    assert_eq!(refused(&|lineage| lineage.below = Some(3)), value, "no such layer");
    assert_eq!(refused(&|lineage| lineage.snapshots[0].layer = Some(3)), value, "no such layer");
    assert_eq!(refused(&|lineage| lineage.snapshots[0].layer = Some(2)), value, "a layer that is not sealed");
    assert_eq!(refused(&|lineage| lineage.snapshots[1].name = "monday".into()), value, "one name twice");
    assert_eq!(refused(&|lineage| lineage.snapshots[1].name = "../x".into()), value, "no name");
    assert_eq!(refused(&|lineage| lineage.layers[1].number = 3), value, "one number twice");
    assert_eq!(refused(&|lineage| lineage.delta = 5), value, "the delta is a layer");
    assert_eq!(refused(&|lineage| lineage.dropped = vec![5]), value, "needed and dropped");
    assert_eq!(refused(&|lineage| lineage.layers[1].overlap = 9000), value, "an overlap above the size");
}

#[test]
fn layers_that_no_view_needs_leave_the_lineage() {
    let mut lineage = layered_disk().lineage;
    let chain = |lineage: &Lineage, top| lineage.chain(top).map(|layer| layer.number).collect::<Vec<_>>();
    assert_eq!(chain(&lineage, lineage.below), [6, 3]);
    assert!(lineage.remove_unneeded().is_empty());
    let fork = lineage.fork(20, lineage.snapshots[0].layer);
    assert_eq!((fork.delta, chain(&fork, fork.below)), (20, vec![5, 3]));
    assert_eq!(fork.deltas().collect::<Vec<_>>(), [20, 3, 5]);
    // A layer that is being made stays with its disk.
    let reworked = reworked_disks()[0].lineage.clone();
    assert_eq!(reworked.deltas().collect::<Vec<_>>(), [9, 3, 5, 6, 30]);
    assert_eq!(reworked.fork(20, Some(1)).rework, None);
    assert!(lineage.fork(20, None).is_default(20));
    lineage.snapshots.remove(0);
    assert_eq!(lineage.remove_unneeded(), [5]);
    assert_eq!(chain(&lineage, lineage.below), [6, 3]);
    lineage.below = None;
    assert_eq!(lineage.remove_unneeded(), [3, 6]);
    assert!(lineage.layers.is_empty());
}
