//! An increment: what changed on a disk between two snapshots, as one stream (docs/format.md, "Increment").
//!
//! It travels through pipes, other filesystems and other hands. What must hold: a reader never takes a damaged, cut or
//! foreign frame for a good one. So each frame has a checksum over the nonce of its stream, its number and its data, and
//! only the last frame says that the stream is complete.

use super::codec::{Envelope, FormatError, Kind, Reader, Writer};
use super::{MAX_DISK_SIZE, valid_name};

const STRUCTURE: &str = "increment";
const ENVELOPE: Envelope = Envelope { magic: *b"PLYINCRE", version: 1, structure: STRUCTURE };
/// Bytes in front of the payload of the header. They say how long it is.
pub const HEADER_HEAD: usize = super::codec::ENVELOPE_HEAD;
/// The longest header.
const LONGEST_HEADER: u32 = 65_536;
/// Bytes of the head of a frame.
pub const FRAME: usize = 32;
/// The most bytes of data of a frame.
pub const MOST_DATA: u64 = 1 << 20;

/// What a disk showed at one moment. Made of what no other snapshot has; it means nothing but equality.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Moment(pub [u8; 16]);

impl std::fmt::Display for Moment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// The base of the disk, as its host describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BaseNote {
    /// Its name there.
    pub name: String,
    /// Bytes of its virtual disk.
    pub size: u64,
    /// The digest of its image that it was registered with, as text; empty without one.
    pub digest: String,
}

/// The beginning of the stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IncrementHeader {
    /// Random, new with each stream.
    pub nonce: u64,
    /// Name of the disk, for messages.
    pub disk: String,
    /// What the stream changes; `None`: a new disk, on its base or blank.
    pub since: Option<Moment>,
    /// What it makes of that.
    pub until: Moment,
    /// Bytes of the disk at the end.
    pub size: u64,
    /// The base that shows where neither moment has anything.
    pub base: Option<BaseNote>,
    /// When the later moment was, nanoseconds since the epoch.
    pub created_ns: i64,
}

impl IncrementHeader {
    /// The bytes of the header.
    pub fn encode(&self) -> Vec<u8> {
        let mut w = Writer::new();
        w.u64(self.nonce).bytes(self.disk.as_bytes());
        w.u8(self.since.is_some().into());
        if let Some(since) = self.since {
            w.raw(&since.0);
        }
        w.raw(&self.until.0).u64(self.size).i64(self.created_ns);
        w.u8(self.base.is_some().into());
        if let Some(base) = &self.base {
            w.bytes(base.name.as_bytes()).u64(base.size).bytes(base.digest.as_bytes());
        }
        ENVELOPE.seal(w.as_slice())
    }

    /// The bytes of the whole header, from its first [`HEADER_HEAD`] bytes.
    ///
    /// # Errors
    /// When these are not the beginning of an increment.
    pub fn len(head: &[u8; HEADER_HEAD]) -> Result<usize, FormatError> {
        let mut r = Reader::new(head, STRUCTURE);
        if r.raw(8)? != ENVELOPE.magic {
            return Err(FormatError::new(Kind::Magic, STRUCTURE, "the file is no increment of plyfs"));
        }
        r.u32()?;
        match r.u32()? {
            payload @ 0..=LONGEST_HEADER => Ok(HEADER_HEAD + payload as usize + 4),
            payload => Err(r.bad(format!("a header of {payload} bytes is too long"))),
        }
    }

    /// Reads the header.
    ///
    /// # Errors
    /// When it is damaged, or of a newer plyfs.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut r = Reader::new(ENVELOPE.open(bytes)?, STRUCTURE);
        let nonce = r.u64()?;
        let disk = r.text()?;
        if !valid_name(&disk) {
            return Err(r.bad(format!("{disk:?} is not a name")));
        }
        let since = if flag(&mut r)? { Some(moment(&mut r)?) } else { None };
        let (until, size, created_ns) = (moment(&mut r)?, r.u64()?, r.i64()?);
        let base = if flag(&mut r)? {
            let note = BaseNote { name: r.text()?, size: r.u64()?, digest: r.text()? };
            if !valid_name(&note.name) || note.size > MAX_DISK_SIZE {
                return Err(r.bad(format!("base {:?} with {} bytes is not possible", note.name, note.size)));
            }
            Some(note)
        } else {
            None
        };
        if size > MAX_DISK_SIZE {
            return Err(r.bad(format!("size {size} is above 64 TiB")));
        }
        r.end()?;
        Ok(Self { nonce, disk, since, until, size, base, created_ns })
    }
}

fn flag(r: &mut Reader<'_>) -> Result<bool, FormatError> {
    match r.u8()? {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(r.bad(format!("a flag is {other}"))),
    }
}

fn moment(r: &mut Reader<'_>) -> Result<Moment, FormatError> {
    let mut bytes = [0; 16];
    bytes.copy_from_slice(r.raw(16)?);
    Ok(Moment(bytes))
}

/// What follows the head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameKind {
    /// As many bytes of data.
    Data,
    /// Nothing: the range is zeros.
    Zero,
    /// Nothing: the stream is complete.
    End,
}

/// The head of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// What it is.
    pub kind: FrameKind,
    /// First byte of the disk; at the end the size of the disk.
    pub offset: u64,
    /// Bytes of the disk; 0 at the end.
    pub len: u64,
    sum: u32,
}

/// Numbers frames and checks that they follow each other.
#[derive(Debug)]
pub struct Frames {
    nonce: u64,
    size: u64,
    number: u64,
    /// Where the last frame ended.
    at: u64,
}

impl Frames {
    /// Of the stream with this header.
    pub fn new(header: &IncrementHeader) -> Self {
        Self { nonce: header.nonce, size: header.size, number: 0, at: 0 }
    }

    fn sum(&self, head: &[u8], data: &[u8]) -> u32 {
        let sum = crc32c::crc32c(&self.nonce.to_le_bytes());
        let sum = crc32c::crc32c_append(sum, &self.number.to_le_bytes());
        crc32c::crc32c_append(crc32c::crc32c_append(sum, head), data)
    }

    /// The head of the next frame.
    pub fn encode(&mut self, kind: FrameKind, offset: u64, len: u64, data: &[u8]) -> [u8; FRAME] {
        let code: u32 = match kind {
            FrameKind::Data => 1,
            FrameKind::Zero => 2,
            FrameKind::End => 3,
        };
        let mut w = Writer::new();
        w.u32(code).u32(0).u64(offset).u64(len);
        let sum = self.sum(w.as_slice(), data);
        w.u32(sum).u32(0);
        self.number += 1;
        let mut head = [0; FRAME];
        head.copy_from_slice(w.as_slice());
        head
    }

    /// Reads the head of the next frame. Its bytes are not proven before [`check`](Self::check).
    ///
    /// # Errors
    /// When a frame that is not damaged cannot have such a head.
    pub fn decode(&self, head: &[u8; FRAME]) -> Result<Frame, FormatError> {
        let mut r = Reader::new(head, STRUCTURE);
        let kind = match r.u32()? {
            1 => FrameKind::Data,
            2 => FrameKind::Zero,
            3 => FrameKind::End,
            other => return Err(r.bad(format!("frame {} is of the unknown kind {other}", self.number))),
        };
        r.u32()?;
        let (offset, len, sum) = (r.u64()?, r.u64()?, r.u32()?);
        let ends = offset.checked_add(len).is_some_and(|end| end <= self.size);
        let fits = match kind {
            FrameKind::Data => len > 0 && len <= MOST_DATA,
            FrameKind::Zero => len > 0,
            FrameKind::End => len == 0 && offset == self.size,
        };
        if !ends || !fits || offset < self.at {
            return Err(r.bad(format!("frame {} with {len} bytes at {offset} is not possible", self.number)));
        }
        Ok(Frame { kind, offset, len, sum })
    }

    /// Checks the next frame with its data.
    ///
    /// # Errors
    /// When its checksum does not match.
    pub fn check(&mut self, head: &[u8; FRAME], frame: &Frame, data: &[u8]) -> Result<(), FormatError> {
        if self.sum(&head[..FRAME - 8], data) != frame.sum {
            let detail = format!("the checksum of frame {} does not match", self.number);
            return Err(FormatError::new(Kind::Checksum, STRUCTURE, detail));
        }
        self.number += 1;
        self.at = frame.offset + frame.len;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> IncrementHeader {
        IncrementHeader {
            nonce: 0x0102_0304_0506_0708,
            disk: "vm1".into(),
            since: Some(Moment([0xaa; 16])),
            until: Moment([0xbb; 16]),
            size: 1 << 20,
            base: Some(BaseNote { name: "b".into(), size: 4096, digest: String::new() }),
            created_ns: 9,
        }
    }

    #[test]
    fn the_bytes_of_an_increment_are_pinned() {
        let bytes = header().encode();
        assert_eq!(bytes.len(), 40 + 8 + 5 + 17 + 16 + 8 + 8 + 1 + 3 + 8 + 2 + 4);
        assert_eq!(&bytes[..10], b"PLYINCRE\x01\x00");
        assert_eq!(&bytes[40..53], b"\x08\x07\x06\x05\x04\x03\x02\x01\x03\x00vm1");
        let frame = Frames::new(&header()).encode(FrameKind::Data, 4096, 3, b"abc");
        let text = hex::encode(frame);
        assert_eq!(&text[..48], "010000000000000000100000000000000300000000000000");
        let sum =
            crc32c::crc32c(&[&header().nonce.to_le_bytes()[..], &[0; 8], &frame[..24], b"abc"].concat());
        assert_eq!(frame[24..], [&sum.to_le_bytes()[..], &[0; 4]].concat(), "bump the version");
    }

    #[test]
    fn headers_are_read_and_damage_is_found() {
        for header in [header(), IncrementHeader { since: None, base: None, ..header() }] {
            let bytes = header.encode();
            let head = bytes.first_chunk().unwrap();
            assert_eq!(IncrementHeader::len(head).unwrap(), bytes.len());
            assert_eq!(IncrementHeader::decode(&bytes).unwrap(), header);
            for at in 0..bytes.len() {
                let mut broken = bytes.clone();
                broken[at] ^= 1;
                assert!(IncrementHeader::decode(&broken).is_err(), "byte {at}");
            }
        }
        let long = IncrementHeader { size: MAX_DISK_SIZE + 1, ..header() };
        assert!(IncrementHeader::decode(&long.encode()).is_err());
    }

    #[test]
    fn frames_follow_each_other_and_belong_to_one_stream() {
        let header = header();
        let mut writing = Frames::new(&header);
        let heads = [
            writing.encode(FrameKind::Data, 0, 3, b"abc"),
            writing.encode(FrameKind::Zero, 4096, 8192, b""),
            writing.encode(FrameKind::End, header.size, 0, b""),
        ];
        let data: [&[u8]; 3] = [b"abc", b"", b""];
        let mut reading = Frames::new(&header);
        for (head, data) in heads.iter().zip(data) {
            let frame = reading.decode(head).unwrap();
            reading.check(head, &frame, data).unwrap();
        }
        // A frame is missing, comes twice, has other data, or is of another stream.
        let read = |frames: &mut Frames, at: usize, data: &[u8]| {
            let frame = frames.decode(&heads[at])?;
            frames.check(&heads[at], &frame, data)
        };
        assert!(read(&mut Frames::new(&header), 1, b"").is_err());
        let mut twice = Frames::new(&header);
        read(&mut twice, 0, b"abc").unwrap();
        assert!(read(&mut twice, 0, b"abc").is_err());
        assert!(read(&mut Frames::new(&header), 0, b"abd").is_err());
        assert!(read(&mut Frames::new(&IncrementHeader { nonce: 1, ..header.clone() }), 0, b"abc").is_err());
        for (kind, offset, len) in [
            (FrameKind::Data, 0, 0),
            (FrameKind::Data, 0, MOST_DATA + 1),
            (FrameKind::Zero, 4096, header.size),
            (FrameKind::Zero, u64::MAX, 2),
            (FrameKind::End, 0, 0),
        ] {
            let frames = Frames::new(&header);
            let head = Frames::new(&header).encode(kind, offset, len, b"");
            assert!(frames.decode(&head).is_err(), "{kind:?} {offset} {len}");
        }
    }
}
