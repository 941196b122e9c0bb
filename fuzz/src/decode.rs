//! Decoders of everything durable: no panic, nothing that runs over, no memory that the input does not justify.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use plyfs::config::size::{MAX_SIZE, format_size, parse_size};
use plyfs::delta::{Delta, DeltaIo, DeltaSpec};
use plyfs::format::extents::{
    IndexHeader, PAGE, decode_leaf, decode_table, encode_leaf, encode_table, leaf_at,
};
use plyfs::format::increment::{FRAME, FrameKind, Frames, HEADER_HEAD, IncrementHeader, MOST_DATA};
use plyfs::format::journal::{Expected, HEADER, Journal, RECORD_HEADER};
use plyfs::format::layout::index_path;
use plyfs::format::lineage::{LayerEntry, Lineage};
use plyfs::format::names;
use plyfs::format::pools::{self, PoolIdentity};
use plyfs::format::proof::{HASH, HEADER_AREA, Layout, PAGE as PROOF_PAGE, PageId, ProofHeader};
use plyfs::format::record::{BaseRecord, DiskRecord, MapRoot, Superblock};
use plyfs::format::trace::Trace;
use plyfs::format::{BLOCK, MAX_DISK_SIZE, valid_name};
use plyfs::io::{LiveFile, Medium, Open, sys};
use plyfs::layers::Layers;
use plyfs::trace::Player;

use crate::medium::{Lives, Memory, Roots};

/// First byte: 0 to decode as it is, else with the checksum put right, so that the fuzzer gets past it.
fn mended(data: &[u8], mend: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let Some((how, rest)) = data.split_first() else { return Vec::new() };
    let mut bytes = rest.to_vec();
    if *how != 0 {
        mend(&mut bytes);
    }
    bytes
}

/// Puts the checksum and the length of an envelope right.
fn mend_envelope(bytes: &mut Vec<u8>) {
    if bytes.len() < 44 {
        return;
    }
    let end = bytes.len() - 4;
    bytes[12..16].copy_from_slice(&(end as u32 - 40).to_le_bytes());
    let sum = crc32c::crc32c(&bytes[..end]);
    bytes[end..].copy_from_slice(&sum.to_le_bytes());
}

/// Puts the checksums of a map file right, as far as its records follow each other.
pub fn mend_map_file(bytes: &mut [u8]) {
    if bytes.len() < HEADER {
        return;
    }
    let sum = crc32c::crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&sum.to_le_bytes());
    let nonce: [u8; 8] = bytes[36..44].try_into().expect("8 bytes");
    let mut at = HEADER;
    while let Some(head) = bytes.get(at..at + RECORD_HEADER) {
        let len = u64::from_le_bytes(head[16..24].try_into().expect("8 bytes"));
        let start = at + RECORD_HEADER;
        let Some(end) = usize::try_from(len).ok().and_then(|len| start.checked_add(len)) else { return };
        let Some(payload) = bytes.get(start..end) else { return };
        let sum = crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&nonce), &head[..24]), payload);
        bytes[at + 24..at + 28].copy_from_slice(&sum.to_le_bytes());
        at = end;
    }
}

/// Puts the checksums of the index of a layer right: of its header, its leaves and its table, as far as it goes.
pub fn mend_index(bytes: &mut [u8]) {
    if bytes.len() < PAGE {
        return;
    }
    let sum = crc32c::crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&sum.to_le_bytes());
    let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let (nonce, leaves) = (bytes[20..28].to_vec(), word(bytes, 36));
    let sum_of = |number: u64, part: &[u8]| {
        crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&nonce), &number.to_le_bytes()), part)
    };
    let there = (bytes.len() / PAGE - 1) as u64;
    for leaf in 0..leaves.min(there) {
        let at = leaf_at(leaf) as usize;
        let sum = sum_of(leaf, &bytes[at..at + PAGE - 4]);
        bytes[at + PAGE - 4..at + PAGE].copy_from_slice(&sum.to_le_bytes());
    }
    if leaves <= there {
        let (table, end) = (leaf_at(leaves) as usize, bytes.len());
        if table + 4 <= end {
            let sum = sum_of(u64::MAX, &bytes[table..end - 4]);
            bytes[end - 4..].copy_from_slice(&sum.to_le_bytes());
        }
    }
}

/// What a store does with the layers of a record: every chain ends, and what is left after a removal is whole.
fn lineage(lineage: &Lineage) {
    for top in lineage.snapshots.iter().map(|snapshot| snapshot.layer).chain([lineage.below, None]) {
        assert!(lineage.chain(top).count() <= lineage.layers.len());
        let fork = lineage.fork(lineage.delta, top);
        assert!(fork.chain(fork.below).eq_by_number(lineage.chain(top)));
        assert_eq!(fork.layers.len(), fork.chain(fork.below).count());
    }
    let mut left = lineage.clone();
    let removed = left.remove_unneeded();
    assert_eq!(left.layers.len() + removed.len(), lineage.layers.len());
    assert!(left.remove_unneeded().is_empty());
    for (now, before) in left.snapshots.iter().zip(&lineage.snapshots) {
        assert!(left.chain(now.layer).eq_by_number(lineage.chain(before.layer)));
    }
    assert!(left.chain(left.below).eq_by_number(lineage.chain(lineage.below)));
}

trait Numbers {
    fn eq_by_number<'a>(self, other: impl Iterator<Item = &'a LayerEntry>) -> bool;
}

impl<'b, I: Iterator<Item = &'b LayerEntry>> Numbers for I {
    fn eq_by_number<'a>(self, other: impl Iterator<Item = &'a LayerEntry>) -> bool {
        self.map(|layer| layer.number).eq(other.map(|layer| layer.number))
    }
}

/// Superblock, base record, disk record.
pub fn records(data: &[u8]) {
    let bytes = mended(data, mend_envelope);
    if let Ok(superblock) = Superblock::decode(&bytes) {
        assert!(superblock.next_id.checked_add(1 << 32).is_some());
        assert_eq!(Superblock::decode(&superblock.encode()), Ok(superblock));
    }
    if let Ok(base) = BaseRecord::decode(&bytes) {
        assert!(valid_name(&base.name) && base.size() <= MAX_DISK_SIZE);
        assert_eq!(BaseRecord::decode(&base.encode()), Ok(base));
    }
    if let Ok(disk) = DiskRecord::decode(&bytes) {
        assert!(valid_name(&disk.name) && disk.overlap <= disk.size && disk.size <= MAX_DISK_SIZE);
        assert!(disk.lineage.base_bytes(disk.overlap) <= MAX_DISK_SIZE);
        lineage(&disk.lineage);
        assert_eq!(DiskRecord::decode(&disk.encode()), Ok(disk));
    }
}

/// The list of names, the list of pools, and the identity of a pool.
pub fn names(data: &[u8]) {
    let bytes = mended(data, mend_envelope);
    if let Ok(list) = pools::decode(&bytes) {
        assert!(list.len() * 38 <= bytes.len());
        assert_eq!(pools::decode(&pools::encode(&list)).as_ref(), Ok(&list));
    }
    if let Ok(identity) = PoolIdentity::decode(&bytes) {
        assert_eq!(PoolIdentity::decode(&identity.encode()).as_ref(), Ok(&identity));
    }
    let Ok(entries) = names::decode(&bytes) else { return };
    // An entry takes at least the bytes of its fields.
    assert!(entries.len() * 43 <= bytes.len());
    assert_eq!(names::decode(&names::encode(&entries)).as_ref(), Ok(&entries));
}

/// The header of an increment, and what follows it.
fn split_increment(bytes: &[u8]) -> Option<(usize, IncrementHeader)> {
    let head = bytes.get(..HEADER_HEAD)?.try_into().expect("a head");
    let len = IncrementHeader::len(head).ok()?;
    Some((len, IncrementHeader::decode(bytes.get(..len)?).ok()?))
}

/// Puts the checksum of the header right, and then that of each frame.
fn mend_increment(bytes: &mut [u8]) {
    let Some(head) = bytes.get(..HEADER_HEAD) else { return };
    let Ok(len) = IncrementHeader::len(head.try_into().expect("a head")) else { return };
    if len > bytes.len() {
        return;
    }
    let sum = crc32c::crc32c(&bytes[..len - 4]);
    bytes[len - 4..len].copy_from_slice(&sum.to_le_bytes());
    let Some((_, header)) = split_increment(bytes) else { return };
    let (mut at, mut number) = (len, 0u64);
    while let Some(head) = bytes.get(at..at + FRAME) {
        let is_data = head[..4] == [1, 0, 0, 0];
        let data = if is_data { u64::from_le_bytes(head[16..24].try_into().expect("a length")) } else { 0 };
        let end = (at + FRAME).saturating_add(data as usize);
        if data > MOST_DATA || end > bytes.len() {
            return;
        }
        let sum = crc32c::crc32c(&header.nonce.to_le_bytes());
        let sum = crc32c::crc32c_append(sum, &number.to_le_bytes());
        let sum = crc32c::crc32c_append(sum, &bytes[at..at + 24]);
        let sum = crc32c::crc32c_append(sum, &bytes[at + FRAME..end]);
        bytes[at + 24..at + 28].copy_from_slice(&sum.to_le_bytes());
        (at, number) = (end, number + 1);
    }
}

/// An increment, read as the import does. What it says never leaves its disk, and never goes back.
pub fn increment(data: &[u8]) {
    let bytes = mended(data, |bytes| mend_increment(bytes));
    let Some((len, header)) = split_increment(&bytes) else { return };
    assert_eq!(IncrementHeader::decode(&header.encode()), Ok(header.clone()));
    assert!(header.size <= MAX_DISK_SIZE && valid_name(&header.disk));
    let mut frames = Frames::new(&header);
    let (mut at, mut from) = (len, 0);
    while let Some(head) = bytes.get(at..at + FRAME) {
        let head: &[u8; FRAME] = head.try_into().expect("a head");
        let Ok(frame) = frames.decode(head) else { return };
        assert!(frame.offset >= from && frame.offset + frame.len <= header.size);
        let data = if frame.kind == FrameKind::Data { frame.len as usize } else { 0 };
        let Some(data) = bytes.get(at + FRAME..at + FRAME + data) else { return };
        if frames.check(head, &frame, data).is_err() || frame.kind == FrameKind::End {
            return;
        }
        from = frame.offset + frame.len;
        at += FRAME + data.len();
    }
}

/// The index of layer 7 on layer 3: decoded part by part, then used by a disk.
pub fn layer_index(data: &[u8]) {
    let bytes = mended(data, |bytes| mend_index(bytes));
    let len = bytes.len() as u64;
    if let Ok(header) = IndexHeader::decode(&bytes[..bytes.len().min(PAGE)], len) {
        assert_eq!(IndexHeader::decode(&header.encode(), len), Ok(header));
        let table = &bytes[header.table_at() as usize..];
        assert_eq!(table.len(), header.table_len());
        if let Ok((layers, firsts)) = decode_table(&header, table) {
            assert_eq!(encode_table(header.nonce, &layers, &firsts), table);
        }
        for leaf in 0..header.leaves {
            let page = &bytes[leaf_at(leaf) as usize..][..PAGE];
            if let Ok(extents) = decode_leaf(&header, leaf, page.try_into().expect("a page")) {
                let again = encode_leaf(header.nonce, leaf, &extents);
                assert_eq!(decode_leaf(&header, leaf, &again), Ok(extents));
            }
        }
    }
    let medium = Arc::new(Memory::default());
    let file = medium.open(&index_path(7), Open::Create).expect("a file");
    file.write_at(&bytes, 0).expect("memory");
    // The layers have no map files: an index that is refused is made again, and shows what is below.
    let layer = |disk| DeltaSpec {
        disk,
        size: 1 << 30,
        overlap: 1 << 29,
        rises: false,
        modified_ns: 0,
        root: MapRoot::default(),
    };
    let chain = Layers::default().chain(vec![layer(3), layer(7)], medium);
    let chain = chain.expect("an index can always be made").expect("a chain");
    let (mut at, size) = (0, 1 << 30);
    for _ in 0..2000 {
        if at >= size {
            break;
        }
        let now = chain.extent_now(at, size).map(|(_, end)| end);
        let (_, end) = chain.extent(at, size).expect("an index can always be made");
        assert!(end > at && end <= size && now.is_none_or(|now| now > at));
        at = end;
    }
}

/// A trace that somebody imports, and what would be fetched for it.
pub fn trace(data: &[u8]) {
    let bytes = mended(data, mend_envelope);
    let Ok(trace) = Trace::decode(&bytes) else { return };
    assert!(valid_name(&trace.base) && trace.size <= MAX_DISK_SIZE);
    assert!(trace.entries.len() * 3 <= bytes.len() && trace.blocks() <= trace.size.div_ceil(BLOCK));
    let again = trace.encode().expect("what was read can be written");
    assert_eq!(Trace::decode(&again).as_ref(), Ok(&trace));
    // A base may be as large as it says; the first of what is fetched is enough.
    let mut bytes = 0;
    for range in Player::new(&trace, trace.size).take(100_000) {
        assert!(range.start < range.end && range.end <= trace.size && range.end - range.start <= 1 << 20);
        bytes += range.end - range.start;
    }
    assert!(bytes <= trace.blocks() * BLOCK + trace.entries.len() as u64 * (64 << 10));
}

/// What a server sends as a proof: a header, and pages of any bytes.
pub fn proof(data: &[u8]) {
    let bytes = mended(data, |bytes| {
        let mut rest = bytes.split_off(bytes.len().min(92));
        mend_envelope(bytes);
        bytes.append(&mut rest);
    });
    let Ok(header) = ProofHeader::decode(&bytes) else { return };
    assert_eq!(ProofHeader::decode(&header.encode()), Ok(header));
    let layout = Layout::of(header.size);
    assert!(layout.levels() <= 6 && layout.proof_size() <= header.size / 500 + 4096);
    let mut start = HEADER_AREA;
    for level in (0..layout.levels()).rev() {
        let last = layout.pages(level) - 1;
        for index in [0, last] {
            let page = PageId { level, index };
            let (offset, length) = layout.place(page);
            assert!(offset == start + index * PROOF_PAGE);
            assert!(length.is_multiple_of(HASH) && (HASH..=PROOF_PAGE).contains(&length));
            let found = bytes.get(offset as usize..(offset + length) as usize).unwrap_or(&bytes);
            // Of a lower page the hash is in the page above, not in the header.
            assert!(!layout.page_has(page, found, &header.root) || layout.is_top(page));
        }
        let (offset, length) = layout.place(PageId { level, index: last });
        start = offset + length;
    }
    assert_eq!(start, layout.proof_size());
    assert!(layout.group_len(layout.groups() - 1) > 0 && layout.group_len(layout.groups()) == 0);
    let whole = layout.group_has(layout.groups() - 1, &bytes, &header.root);
    assert!(!whole || layout.levels() == 0);
}

/// A map file, replayed as a whole and in pieces of odd lengths.
pub fn map_file(data: &[u8]) {
    let bytes = mended(data, |bytes| mend_map_file(bytes));
    let expected =
        Expected { disk: 3, generation: 4, floor: 0, size: 1 << 30, overlap: 8192, modified_ns: 0 };
    let whole = Journal::decode(&bytes, &expected);
    let read = |buf: &mut [u8], at: u64| {
        let rest = &bytes[bytes.len().min(at as usize)..];
        let n = rest.len().min(buf.len());
        buf[..n].copy_from_slice(&rest[..n]);
        Ok::<_, ()>(n)
    };
    let pieces = Journal::read(read, bytes.len() as u64, &expected);
    assert_eq!(whole.is_ok(), pieces.is_ok());
    if let Ok(mut journal) = whole {
        assert!(journal.end <= bytes.len() as u64 && journal.overlap <= journal.size);
        assert!(journal.map.memory() <= 64 * bytes.len() as u64, "{} bytes", journal.map.memory());
        let end = journal.map.data_end();
        assert!(end <= journal.size.div_ceil(4096), "block {end} of a disk of {} bytes", journal.size);
        journal.map.forget_zeros_above(journal.overlap);
        assert_eq!(journal.map.data_end(), end);
    }
}

const LIVE_MAGIC: u64 = 0x0001_4556_494c_594c;

/// A live map as a file has it: header words, then pages. What it can be flushed to can be opened again.
pub fn live_map(data: &[u8]) {
    let mut words = data.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().expect("8 bytes")));
    let mut next = || words.next().unwrap_or(0);
    let file: File = sys::memory_file().expect("memory");
    let len = next();
    let live = LiveFile::new(file.try_clone().expect("a descriptor")).expect("an empty one");
    for _ in 0..len % 4 {
        let page = next() % 1_100_000;
        if let Ok(page) = live.prepare(page) {
            for _ in 0..8 {
                let at = next();
                let word = next();
                // Whoever writes states writes only those that exist.
                let word = if at % 512 >= 16 { word & !(word >> 1 & 0x5555_5555_5555_5555) } else { word };
                page[(at % 512) as usize].store(word, std::sync::atomic::Ordering::Relaxed);
            }
        }
    }
    drop(live);
    let header = [LIVE_MAGIC, 9, 0, 0, next(), next(), next(), next(), next(), sys::boot_number()];
    for (at, word) in (0u64..).zip(header) {
        file.write_all_at(&word.to_le_bytes(), at * 8).expect("memory");
    }
    if len & 4 != 0 {
        file.write_all_at(&next().to_le_bytes(), 511 * 8).expect("memory");
    }
    if len & 8 != 0 {
        file.write_all_at(&next().to_le_bytes(), 4096 + (next() % 32_000) * 8).expect("memory");
    }
    if len & 16 != 0 {
        file.set_len(next() % (1 << 22)).expect("memory");
    }
    let lives = Arc::new(Lives::default());
    let Ok(live) = LiveFile::new(file) else { return };
    lives.insert(9, live);
    let medium = Arc::new(Memory::default());
    let roots = Arc::new(Roots::new(medium.clone()));
    let open = || {
        let root: MapRoot = roots.root();
        let spec = DeltaSpec { disk: 9, size: 1 << 20, overlap: 1 << 19, rises: false, modified_ns: 0, root };
        let delta_io = DeltaIo { medium: medium.clone(), live: lives.clone(), roots: roots.clone() };
        Delta::open(spec, delta_io)
    };
    let Ok(delta) = open() else { return };
    let size = delta.size();
    assert!(size <= MAX_DISK_SIZE && delta.overlap() <= size);
    let mut at = 0;
    for _ in 0..64 {
        if at >= size {
            break;
        }
        let (_, end) = delta.extent(at, size);
        assert!(end > at);
        at = end;
    }
    delta.flush().expect("nothing fails here");
    drop(delta);
    lives.forget();
    // Without a data file a `Data` block is missing, which is a reason. Damage of what we wrote is none.
    match open() {
        Ok(delta) => assert_eq!(delta.size(), size),
        Err(plyfs::delta::DeltaError::DataMissing { .. }) => {}
        Err(error) => panic!("what was flushed cannot be opened: {error}"),
    }
}

/// Sizes and names as people write them.
pub fn text(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Ok(bytes) = parse_size(&text) {
        assert!(bytes <= MAX_SIZE);
        let shown = format_size(bytes);
        // A fraction is rounded, and is no size for the parser; everything else comes back.
        if let Ok(again) = parse_size(&shown) {
            assert_eq!(again, bytes, "{shown}");
        } else {
            assert!(shown.contains('.'), "{shown}");
        }
    }
    if valid_name(&text) {
        assert!(!text.contains(['/', '\0', ' ']) && text != "." && text != ".." && text.len() <= 128);
    }
}
