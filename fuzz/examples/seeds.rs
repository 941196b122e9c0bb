//! Writes the seeds of the corpus with plyfs' own encoders, so that they follow the format: valid ones, and hostile
//! ones with a right checksum. Run by hand after a change of the format: `cargo run --example seeds`.

use std::fs;
use std::path::Path;

use plyfs::format::MAX_DISK_SIZE;
use plyfs::format::encryption::{Encryption, KeySource, SALT, WRAPPED, WrappedKey};
use plyfs::format::extents::{Extent, IndexHeader, PAGE, Where, encode_leaf, encode_table};
use plyfs::format::features::{Features, Trashed};
use plyfs::format::increment::{BaseNote, FrameKind, Frames, IncrementHeader, Moment};
use plyfs::format::journal::{Carried, MapHeader, Record, Run};
use plyfs::format::limits::{Limits, Rates};
use plyfs::format::lineage::{LayerEntry, Lineage, Seal, SnapshotEntry};
use plyfs::format::names::{self, NameEntry};
use plyfs::format::pools::{self, PoolEntry, PoolIdentity};
use plyfs::format::proof::{Builder, ProofHeader};
use plyfs::format::record::{
    Backing, BaseIdentity, BaseOptions, BaseRecord, Digest, DiskRecord, FileProof, ImageData, ImageFile,
    ImageFormat, MapRoot, Moved, Request, Superblock, Token, Validator,
};
use plyfs::format::rework::{Purpose, Rework};
use plyfs::format::trace::{Origin, Trace, TraceEntry};

const DATA: u64 = 0x5555_5555_5555_5555;
const ZERO: u64 = 0xaaaa_aaaa_aaaa_aaaa;

fn put(target: &str, name: &str, bytes: &[u8]) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::create_dir_all(&dir).expect("a directory");
    fs::write(dir.join(name), bytes).expect("a seed");
}

/// As it is, for a decoder that checks the checksum, and for one that has it put right.
fn both(target: &str, name: &str, bytes: &[u8]) {
    for how in [0, 1] {
        put(target, &format!("{name}-{how}"), &[&[how][..], bytes].concat());
    }
}

fn changed(bytes: &[u8], at: usize, with: &[u8]) -> Vec<u8> {
    let mut out = bytes.to_vec();
    out[at..at + with.len()].copy_from_slice(with);
    out
}

fn traces() {
    let entry = |first, blocks, at_ms| TraceEntry { first, blocks, at_ms };
    let trace = Trace {
        base: "debian".into(),
        size: 2 << 30,
        origin: Origin::Digest(Digest::Sha256([7; 32])),
        recorded_ns: 5,
        entries: vec![entry(0, 1, 0), entry(524_287, 1, 0), entry(256, 32, 7), entry(288, 4, 1000)],
    };
    let encoded = |trace: &Trace| trace.encode().expect("a trace");
    both("trace", "plain", &encoded(&trace));
    both("trace", "empty", &encoded(&Trace { entries: vec![], origin: Origin::Unknown, ..trace.clone() }));
    both("trace", "validator", &encoded(&Trace { origin: Origin::Validator([9; 32]), ..trace.clone() }));
    let many = (0..2000).map(|n| entry(n * 7919 % 524_000, 1 + n % 200, n as u32 * 3)).collect();
    both("trace", "many", &encoded(&Trace { entries: many, ..trace.clone() }));
    let bytes = encoded(&trace);
    // Behind the envelope: a name of 2 + 6 bytes, the size, the time, the origin of 33, the count.
    let (size, count) = (40 + 8, 40 + 8 + 16 + 33);
    both("trace", "2-63-bytes", &changed(&bytes, size, &(1u64 << 63).to_le_bytes()));
    both("trace", "small-base", &changed(&bytes, size, &4096u64.to_le_bytes()));
    both("trace", "count-lie", &changed(&bytes, count, &u32::MAX.to_le_bytes()));
    both("trace", "length-runs-over", &changed(&bytes, count + 5, &[0xff; 9]));
    both("trace", "before-the-start", &changed(&bytes, count + 4, &[1]));
    both("trace", "cut", &bytes[..bytes.len() - 7]);
}

fn proofs() {
    let sealed = |len: usize| {
        let bytes: Vec<u8> =
            (0..len as u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u8).collect();
        let mut builder = Builder::new(len as u64);
        let mut proof = vec![0; builder.layout().proof_size() as usize];
        let mut put = |offset: u64, page: &[u8]| -> Result<(), ()> {
            proof[offset as usize..offset as usize + page.len()].copy_from_slice(page);
            Ok(())
        };
        builder.update(&bytes, &mut put).expect("memory");
        let header = ProofHeader { size: len as u64, root: builder.root().expect("all of it") }.encode();
        proof[..header.len()].copy_from_slice(&header);
        proof
    };
    let plain = sealed(65 * 16384 + 5);
    both("proof", "plain", &plain);
    both("proof", "one-group", &sealed(5000));
    both("proof", "wrong-page", &changed(&plain, 200, &[0xff; 8]));
    both("proof", "cut", &plain[..1000]);
    for (name, size) in
        [("64-tib", 1u64 << 46), ("2-63-bytes", 1 << 63), ("empty", 0), ("all-ones", u64::MAX)]
    {
        both("proof", name, &changed(&plain, 40, &size.to_le_bytes()));
    }
    both("proof", "other-groups", &changed(&plain, 48, &0u32.to_le_bytes()));
    both("proof", "length-lie", &changed(&plain, 12, &u32::MAX.to_le_bytes()));
    both("proof", "page-of-a-server", "<!doctype html>".repeat(20).as_bytes());
}

fn records() {
    let identity =
        |digest| BaseIdentity { size: 5000, validator: Validator::File { mtime_ns: 77, inode: 12 }, digest };
    let superblock = Superblock { uuid: [0xab; 16], created_ns: 1, next_id: 1000 }.encode();
    let base = BaseRecord {
        id: 2,
        name: "debian".into(),
        image: ImageFile {
            source: "/srv/debian.raw".into(),
            mirrors: Vec::new(),
            format: ImageFormat::Raw,
            disk_size: 5000,
            identity: identity(Some(Digest::Sha512([7; 64]))),
            proof: None,
        },
        backing: Vec::new(),
        created_ns: 5,
        options: BaseOptions::default(),
        moved: vec![Moved { file: 0, urls: vec!["https://h/debian.raw".into()] }],
        token: None,
    };
    let disk = DiskRecord {
        id: 3,
        name: "vm-1".into(),
        name_seq: 9,
        unlinked: false,
        backing: Some(Backing { base: 2, identity: identity(Some(Digest::Sha256([7; 32]))).into() }),
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
    };
    both("records", "superblock", &superblock);
    both("records", "base-3", &base.encode());
    let token = Token::of_hash([7; 16]);
    both("records", "base-4", &BaseRecord { token: Some(token), ..base.clone() }.encode());
    let base = BaseRecord { moved: Vec::new(), ..base };
    both("records", "base", &base.encode());
    let validator =
        Validator::S3 { version: Some("v1".into()), etag: Some("\"a-2\"".into()), last_modified: None };
    let identity = BaseIdentity { validator, ..base.image.identity.clone() };
    let image = ImageFile { source: "s3://images/debian.qcow2".into(), identity, ..base.image.clone() };
    both("records", "base-of-bucket", &BaseRecord { image, ..base.clone() }.encode());
    let image = |data| {
        let (id, hash) = ("0f3b1c1e-7b0a-4f3e-9d63-0c6d6a5a1f10".into(), "sha512:07".into());
        let validator = Validator::Glance { id, hash, data, etag: Some("\"m\"".into()), last_modified: None };
        let identity = BaseIdentity { size: 5000, validator, digest: None };
        BaseRecord { image: ImageFile { identity, ..base.image.clone() }, ..base.clone() }.encode()
    };
    both("records", "base-image", &image(ImageData::Ranges));
    let whole = image(ImageData::Whole);
    both("records", "base-image-whole", &whole);
    // Behind it are the tag, that there is no date and no digest, and the rest of the record.
    let way = whole.windows(9).position(|text| text == b"sha512:07").expect("its digest") + 9;
    both("records", "base-image-unknown-way", &changed(&whole, way, &[3]));
    both("records", "disk", &disk.encode());
    both(
        "records",
        "disk-of-client",
        &DiskRecord { request: Some(Request::Client(token)), ..disk.clone() }.encode(),
    );
    let trash = Some(Trashed { removed_ns: 15, purge_ns: 16 });
    both(
        "records",
        "disk-trashed",
        &DiskRecord { unlinked: true, features: Features { trash, ..Features::default() }, ..disk.clone() }
            .encode(),
    );
    let layer = |number: u64, below: Option<usize>| LayerEntry {
        number,
        below,
        seal: Seal::Sealed,
        size: 8192,
        overlap: 5000,
        modified_ns: 13,
        map: MapRoot { generation: 2, floor: 512 },
    };
    let snapshot = SnapshotEntry {
        number: 7,
        name: "monday".into(),
        layer: Some(1),
        size: 8192,
        overlap: 8192,
        created_ns: 14,
        token: Some(token),
    };
    let pending = LayerEntry { seal: Seal::Pending, ..layer(6, Some(0)) };
    let lineage = Lineage {
        delta: 9,
        below: Some(2),
        layers: vec![layer(3, None), layer(5, Some(0)), pending],
        snapshots: vec![snapshot],
        dropped: vec![4],
        rolled_back: Some(token),
        rises: true,
        rework: None,
    };
    let layered = |change: &dyn Fn(&mut Lineage)| {
        let mut lineage = lineage.clone();
        change(&mut lineage);
        DiskRecord { lineage, ..disk.clone() }.encode()
    };
    let wrapped = |delta| WrappedKey { delta, wrapped: [delta as u8; WRAPPED] };
    let encrypted = |source: KeySource, keys: Vec<WrappedKey>| {
        let encryption = Some(Box::new(Encryption { source, salt: [8; SALT], keys }));
        let features = Features { encryption, ..Features::default() };
        DiskRecord { lineage: lineage.clone(), features, ..disk.clone() }.encode()
    };
    let (file, command) = (KeySource::File("/keys/vm-1".into()), KeySource::Command("vm-1".into()));
    both("records", "disk-encrypted", &encrypted(file.clone(), vec![wrapped(3), wrapped(9)]));
    both("records", "disk-encrypted-by-command", &encrypted(command, vec![wrapped(9)]));
    both("records", "disk-shredded", &encrypted(file.clone(), Vec::new()));
    both("records", "disk-keys-out-of-order", &encrypted(file, vec![wrapped(9), wrapped(3)]));
    both("records", "disk-layered", &layered(&|_| {}));
    both("records", "disk-rolled-back", &layered(&|lineage| lineage.below = None));
    both("records", "disk-layer-on-itself", &layered(&|lineage| lineage.layers[1].below = Some(1)));
    both("records", "disk-layer-on-a-later-one", &layered(&|lineage| lineage.layers[0].below = Some(2)));
    both("records", "disk-layer-twice", &layered(&|lineage| lineage.layers[1].number = 3));
    both("records", "disk-no-such-layer", &layered(&|lineage| lineage.below = Some(60_000)));
    both("records", "disk-pending-snapshot", &layered(&|lineage| lineage.snapshots[0].layer = Some(2)));
    both("records", "disk-needed-and-dropped", &layered(&|lineage| lineage.dropped = vec![5]));
    let made = LayerEntry { below: None, seal: Seal::Pending, ..layer(30, None) };
    let rework = |purpose| Rework { purpose, layer: made.clone(), done: 4096, rate: 1 << 20 };
    let merge = rework(Purpose::Merge { first: 3, last: 5 });
    let rebase = rework(Purpose::Rebase { to: disk.backing.clone(), top: Some(5) });
    let flatten = rework(Purpose::Rebase { to: None, top: None });
    for (name, rework) in [("merge", &merge), ("rebase", &rebase), ("flatten", &flatten)] {
        both(
            "records",
            &format!("disk-{name}"),
            &layered(&|lineage| lineage.rework = Some(Box::new(rework.clone()))),
        );
    }
    let too_far = Rework { done: 8193, ..merge };
    both(
        "records",
        "disk-merge-too-far",
        &layered(&|lineage| lineage.rework = Some(Box::new(too_far.clone()))),
    );
    both("records", "disk-layer-2-63-bytes", &layered(&|lineage| lineage.layers[0].size = 1 << 63));
    both(
        "records",
        "disk-deep",
        &layered(&|lineage| {
            lineage.layers = (0..60).map(|n| layer(100 + n, (n as usize).checked_sub(1))).collect();
            lineage.below = Some(59);
        }),
    );
    let in_pools = |pools: &[(u64, u64)]| {
        let features = plyfs::format::features::Features::in_pools(pools.to_vec());
        DiskRecord { features, ..disk.clone() }.encode()
    };
    both("records", "disk-in-pools", &in_pools(&[(3, 5), (9, 6)]));
    both("records", "disk-in-pool-0", &in_pools(&[(3, 0)]));
    both("records", "disk-in-pools-descending", &in_pools(&[(9, 6), (3, 5)]));
    let limits = Limits {
        quota: Some(1 << 30),
        iops: Rates { all: Some(500), read: Some(400), write: Some(300) },
        bandwidth: Rates { all: Some(100 << 20), read: Some(90 << 20), write: Some(80 << 20) },
        burst_ms: Some(30_000),
    };
    let mut limited = DiskRecord::decode(&layered(&|_| {})).expect("a sound record");
    limited.features.limits = limits.boxed();
    let limited = limited.encode();
    let at = limited.len() - 4 - 60;
    both("records", "disk-limited", &limited);
    both("records", "disk-limits-none", &changed(&limited, at, &[0; 60]));
    both("records", "disk-limits-huge", &changed(&limited, at, &[0xff; 60]));
    both("records", "disk-unknown-feature", &changed(&limited, at - 4, &999u16.to_le_bytes()));
    both("records", "disk-blank", &DiskRecord { backing: None, overlap: 0, ..disk.clone() }.encode());
    both("records", "disk-2-63-bytes", &DiskRecord { size: 1 << 63, ..disk.clone() }.encode());
    both(
        "records",
        "disk-last-number",
        &DiskRecord { id: u64::MAX, name_seq: u64::MAX, ..disk.clone() }.encode(),
    );
    both(
        "records",
        "disk-path-as-name",
        &DiskRecord { name: "../../etc/passwd".into(), ..disk.clone() }.encode(),
    );
    let proof = |places: &[&str]| {
        let places = places.iter().map(|place| (*place).to_owned()).collect();
        Some(FileProof { root: [9; 32], places })
    };
    let proven = |places| BaseRecord {
        image: ImageFile { proof: proof(places), ..base.image.clone() },
        ..base.clone()
    };
    both("records", "base-proven", &proven(&["https://h/debian.raw.obao"]).encode());
    both("records", "base-blake3", &proven(&[]).encode());
    both("records", "base-places", &proven(&["/p"; 40]).encode());
    both(
        "records",
        "base-long-source",
        &BaseRecord { image: ImageFile { source: "/x".repeat(9000), ..base.image.clone() }, ..base.clone() }
            .encode(),
    );
    let disk = disk.encode();
    both("records", "length-lie", &changed(&disk, 12, &u32::MAX.to_le_bytes()));
    both("records", "name-length-lie", &changed(&disk, 48, &u16::MAX.to_le_bytes()));
    both("records", "version-2", &changed(&disk, 8, &2u16.to_le_bytes()));
    for (name, at) in [("incompatible", 16), ("compatible", 24), ("autoclear", 32)] {
        both("records", &format!("features-{name}"), &changed(&disk, at, &(1u64 << 63).to_le_bytes()));
    }
    both("records", "cut", &disk[..60]);
    both("records", "superblock-last-number", &changed(&superblock, 64, &u64::MAX.to_le_bytes()));
}

fn map_file() {
    let header = MapHeader { disk: 3, generation: 4, nonce: 0x1234, carries: false };
    let file = |records: &[Record]| {
        let mut bytes = header.encode();
        for (seq, record) in (1u64..).zip(records) {
            bytes.extend(record.encode(header.nonce, seq));
        }
        bytes
    };
    let record = |size, overlap, runs: &[(u64, Vec<u64>)]| Record {
        size,
        overlap,
        modified_ns: 9,
        runs: runs.iter().map(|(first, words)| Run { first: *first, words: words.clone() }).collect(),
        carried: None,
    };
    let one = record(1 << 30, 4096, &[(1, vec![1, 2]), (100, vec![DATA; 40])]);
    let two = record(1 << 30, 4096, &[(3, vec![ZERO; 3]), (7, vec![1])]);
    let shrink = record(5000, 4096, &[]);
    both("map_file", "header", &header.encode());
    both("map_file", "one", &file(std::slice::from_ref(&one)));
    let three = file(&[one.clone(), two.clone(), shrink]);
    both("map_file", "three", &three);
    both("map_file", "torn", &changed(&three, three.len() - 5, &[0xff]));
    both("map_file", "padded", &[three.clone(), vec![0; 512]].concat());
    both("map_file", "overlap-grows", &file(&[record(8192, 0, &[]), record(8192, 4096, &[])]));
    both("map_file", "overlapping-runs", &file(&[record(1 << 30, 0, &[(0, vec![1, 1, 2]), (1, vec![2])])]));
    both("map_file", "2-63-bytes", &file(&[record(1 << 63, 0, &[])]));
    both("map_file", "state-3", &file(&[record(1 << 30, 0, &[(0, vec![3])])]));
    // Repeated runs that speak for all of the largest disk, made long by hand: the encoder would need the words.
    let all = MAX_DISK_SIZE / 4096 / 32;
    let huge = file(&[
        record(MAX_DISK_SIZE, 0, &[(0, vec![DATA; 3])]),
        record(MAX_DISK_SIZE, 0, &[(0, vec![ZERO; 3])]),
    ]);
    let long = changed(&huge, 64 + 64 + 8, &all.to_le_bytes());
    put(
        "map_file",
        "huge-repeated-runs",
        &[&[1][..], &changed(&long, 64 + 96 + 64 + 8, &all.to_le_bytes())].concat(),
    );
    put(
        "map_file",
        "run-length-lie",
        &[&[1][..], &changed(&huge, 64 + 64 + 8, &u64::MAX.to_le_bytes())].concat(),
    );
    put("map_file", "record-length-lie", &[&[1][..], &changed(&three, 80, &u64::MAX.to_le_bytes())].concat());
    put("map_file", "run-count-lie", &[&[1][..], &changed(&three, 120, &u32::MAX.to_le_bytes())].concat());
    both("map_file", "features", &changed(&three, 12, &2u64.to_le_bytes()));
    let carrying = MapHeader { carries: true, ..header };
    let carried = |blocks: &[u64]| Record {
        carried: Some(Carried { blocks: blocks.to_vec(), bytes: vec![7; 4096 * blocks.len()] }),
        ..record(1 << 30, 4096, &[(0, vec![DATA])])
    };
    let records = |records: &[Record]| {
        let mut bytes = carrying.encode();
        for (seq, record) in (1u64..).zip(records) {
            bytes.extend(record.encode(header.nonce, seq));
        }
        bytes
    };
    let carries = records(&[one.clone(), carried(&[3, 5]), carried(&[]), carried(&[5, 9])]);
    both("map_file", "carried", &carries);
    both("map_file", "carried-torn", &changed(&carries, carries.len() - 5, &[0xff]));
    both("map_file", "carried-settled", &records(&[carried(&[3]), one.clone()]));
    both("map_file", "carried-descending", &records(&[carried(&[5, 3])]));
    both("map_file", "carried-past-the-end", &records(&[carried(&[1 << 40])]));
    both("map_file", "carried-too-many", &records(&[carried(&(0..17).collect::<Vec<_>>())]));
    both("map_file", "carried-without-the-feature", &file(&[carried(&[3])]));
    let count = carries.len() - 2 * 4104 - 8;
    both("map_file", "carried-count-lie", &changed(&carries, count, &u64::MAX.to_le_bytes()));
}

fn layer_index() {
    let index = |leaves: &[Vec<Extent>], layers: &[u64]| {
        let header = IndexHeader {
            layer: 7,
            nonce: 0x1234,
            end: 1 << 30,
            leaves: leaves.len() as u64,
            layers: layers.len() as u16,
        };
        let mut bytes = header.encode().to_vec();
        for (number, leaf) in (0u64..).zip(leaves) {
            bytes.extend(encode_leaf(header.nonce, number, leaf));
        }
        let firsts: Vec<Extent> = leaves.iter().filter_map(|leaf| leaf.first().copied()).collect();
        bytes.extend(encode_table(header.nonce, layers, &firsts));
        bytes
    };
    let one = vec![
        Extent::new(0, Where::Below),
        Extent::new(4096, Where::Layer(1)),
        Extent::new(5000, Where::Layer(0)),
        Extent::new(1 << 30, Where::Zero),
    ];
    let many = |from: u64| (from..from + 300).map(|n| Extent::new(n * 4096, Where::Layer((n % 2) as u16)));
    let bytes = index(std::slice::from_ref(&one), &[3, 7]);
    both("layer_index", "one", &bytes);
    both("layer_index", "two", &index(&[many(0).collect(), many(300).collect()], &[3, 7]));
    both("layer_index", "of-other-layers", &index(std::slice::from_ref(&one), &[4, 7]));
    both("layer_index", "leaf-behind-the-next", &index(&[many(0).collect(), many(100).collect()], &[3, 7]));
    both("layer_index", "not-from-the-start", &index(&[many(5).collect()], &[3, 7]));
    both("layer_index", "no-such-layer", &index(&[vec![Extent::new(0, Where::Layer(2))]], &[3, 7]));
    both("layer_index", "empty-leaf", &changed(&bytes, 2 * PAGE - 8, &[0]));
    both("layer_index", "count-lie", &changed(&bytes, 2 * PAGE - 8, &u32::MAX.to_le_bytes()));
    both("layer_index", "leaves-lie", &changed(&bytes, 36, &u64::MAX.to_le_bytes()));
    both("layer_index", "layers-lie", &changed(&bytes, 10, &u16::MAX.to_le_bytes()));
    both("layer_index", "version-2", &changed(&bytes, 8, &2u16.to_le_bytes()));
    both("layer_index", "torn", &changed(&bytes, PAGE + 3, &[0xff]));
    both("layer_index", "cut", &bytes[..bytes.len() - 9]);
    both("layer_index", "empty", &[]);
}

fn name_list() {
    let entry = |number: u64, name: &str| NameEntry {
        is_base: number == 2,
        number,
        inode: 12,
        changed_ns: 77,
        len: 300,
        name: name.into(),
        base: if number == 2 { 0 } else { 2 },
    };
    let list = names::encode(&[entry(2, "debian"), entry(3, "vm-1"), entry(u64::MAX, "vm-2")]);
    both("names", "plain", &list);
    both("names", "none", &names::encode(&[]));
    both("names", "path-as-name", &names::encode(&[entry(3, "../../etc/passwd")]));
    // Behind the envelope: the count, then the kind of the first entry.
    both("names", "count-lie", &changed(&list, 40, &[0x7f]));
    both("names", "count-runs-over", &changed(&list, 40, &[0xff; 10]));
    both("names", "no-such-kind", &changed(&list, 41, &[2]));
    both("names", "name-length-lie", &changed(&list, 74, &u16::MAX.to_le_bytes()));
    both("names", "cut", &list[..list.len() - 7]);
    let pool = |number: u64, name: &str| PoolEntry {
        number,
        name: name.into(),
        dir: format!("/mnt/{name}"),
        uuid: [7; 16],
        added_ns: 77,
    };
    let list = pools::encode(&[pool(5, "fast"), pool(6, "slow")]);
    both("names", "pools", &list);
    both("names", "pools-twice", &pools::encode(&[pool(5, "fast"), pool(5, "slow")]));
    both("names", "pools-count-lie", &changed(&list, 40, &[0xff, 0xff]));
    both("names", "pools-cut", &list[..list.len() - 7]);
    both("names", "pool", &PoolIdentity { store: [1; 16], uuid: [7; 16], made_ns: 77 }.encode());
}

fn increment() {
    let header = IncrementHeader {
        nonce: 0x0102_0304_0506_0708,
        disk: "vm-1".into(),
        since: Some(Moment([0xaa; 16])),
        until: Moment([0xbb; 16]),
        size: 1 << 20,
        base: Some(BaseNote { name: "debian".into(), size: 4096, digest: String::new() }),
        created_ns: 9,
    };
    let stream = |header: &IncrementHeader| {
        let (mut bytes, mut frames) = (header.encode(), Frames::new(header));
        bytes.extend(frames.encode(FrameKind::Data, 4096, 8, &[7; 8]));
        bytes.extend([7; 8]);
        bytes.extend(frames.encode(FrameKind::Zero, 65_536, 4096, &[]));
        bytes.extend(frames.encode(FrameKind::End, header.size, 0, &[]));
        bytes
    };
    let plain = stream(&header);
    let len = header.encode().len();
    both("increment", "plain", &plain);
    both("increment", "whole-disk", &stream(&IncrementHeader { since: None, base: None, ..header.clone() }));
    both("increment", "cut", &plain[..plain.len() - 7]);
    both(
        "increment",
        "path-as-name",
        &stream(&IncrementHeader { disk: "../../etc/passwd".into(), ..header }),
    );
    both("increment", "header-length-lie", &changed(&plain, 12, &u32::MAX.to_le_bytes()));
    both("increment", "past-the-end", &changed(&plain, len + 8, &(1u64 << 20).to_le_bytes()));
    both("increment", "runs-over", &changed(&plain, len + 8, &u64::MAX.to_le_bytes()));
    both("increment", "length-lie", &changed(&plain, len + 16, &u64::MAX.to_le_bytes()));
    both("increment", "back", &changed(&plain, len + 32 + 8 + 8, &0u64.to_le_bytes()));
    both("increment", "no-such-kind", &changed(&plain, len, &[9]));
}

fn live_map() {
    let put = |name: &str, words: &[u64]| {
        put("live_map", name, &words.iter().flat_map(|w| w.to_le_bytes()).collect::<Vec<_>>());
    };
    // Length and flags; a page with eight words; size, overlap, epoch, shrink, time.
    let page = [0, 16, DATA, 17, ZERO, 0, u64::MAX, 20, 1, 21, 2, 22, 4, 23, 8, 8, 0xff];
    let with = |flags: u64, header: &[u64], last: &[u64]| [&[flags + 1][..], &page, header, last].concat();
    put("plain", &with(0, &[1 << 26, 8192, 0, 0, 5], &[]));
    put("shrinking", &with(0, &[1 << 26, 8192, 0, 4097, 5], &[]));
    put("poisoned", &with(0, &[1 << 26, 8192, 3, 0, 5], &[]));
    put("2-63-bytes", &with(0, &[1 << 63, 1 << 63, 0, 0, 5], &[]));
    put("overlap-above-size", &with(0, &[4096, 8192, 0, 0, 5], &[]));
    put("shrink-to-more", &with(0, &[4096, 4096, 0, u64::MAX, 5], &[]));
    put("pages-lie", &with(4, &[1 << 26, 8192, 0, 0, 5], &[u64::MAX]));
    put("page-bits", &with(8, &[1 << 26, 8192, 0, 0, 5], &[u64::MAX, 3]));
    put("cut", &with(16, &[1 << 26, 8192, 0, 0, 5], &[4096]));
}

fn text() {
    for (n, text) in [
        "4096",
        "64K",
        "20GiB",
        "1.5G",
        "8E",
        "7E",
        "9223372036854775807",
        "9223372036854775808",
        "-1",
        "1KB",
        "1k ",
        "99999999999999999999999999",
        "0",
        "",
        "vm-1",
        "../x",
        "a/b",
        ".hidden",
        "ä",
        "1TIB",
        "1X",
    ]
    .iter()
    .enumerate()
    {
        put("text", &format!("{n:02}"), text.as_bytes());
    }
}

fn main() {
    records();
    proofs();
    traces();
    map_file();
    layer_index();
    name_list();
    increment();
    live_map();
    text();
    // Of histories any bytes are one; the fuzzer finds better ones than a hand does.
    for seed in 0u8..16 {
        let bytes: Vec<u8> = (0..400u32)
            .map(|i| (i.wrapping_mul(2_654_435_761).rotate_left(u32::from(seed)) >> 13) as u8)
            .collect();
        put("disk", &format!("seed-{seed:02}"), &bytes);
    }
}
