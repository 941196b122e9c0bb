//! What Nova and QEMU would take the bytes of a disk for.
//!
//! Nova inspects an image when it downloads it, and lets QEMU probe the file in its cache when it makes an overlay. A
//! linked image was not downloaded, so the same is looked at before the link is made: a raw disk whose bytes are those of
//! a qcow2 file would otherwise be opened as one, with the backing file that a stranger has named in it.

/// Bytes of a disk that are looked at.
pub const HEAD: usize = 64 << 10;

/// Name, offset and first bytes of a format.
const FORMATS: &[(&str, usize, &[u8])] = &[
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vhd", 0, b"conectix"),
    ("vhdx", 0, b"vhdxfile"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk Descriptor"),
    ("vdi", 64, &[0x7f, 0x10, 0xda, 0xbe]),
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop"),
    (ISO, 0x8001, b"CD001"),
    (ISO, 0x8001, b"NSR02"),
    (ISO, 0x8001, b"NSR03"),
];
const ISO: &str = "iso";

/// Why Nova would refuse an image, or QEMU would not take it as raw; none when the link may be made. `disk_format`: what
/// its record says. `head`: the first [`HEAD`] bytes of the virtual disk, or all of a smaller one.
pub fn refusal(disk_format: &str, head: &[u8]) -> Option<String> {
    let has = |at: usize, magic: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(magic));
    let found = FORMATS.iter().find(|(_, at, magic)| has(*at, magic)).map(|(name, ..)| *name);
    let found = found.or_else(|| is_descriptor(head).then_some("vmdk"));
    match (disk_format, found) {
        ("raw", None) | ("iso", Some(ISO)) | ("qcow2" | "vmdk", None | Some(ISO)) => None,
        ("iso", None) => Some("its record says iso, and its bytes are not those of an ISO image".into()),
        (of, Some(found)) => {
            Some(format!("its record says {of}, and its disk begins as a {found} image does"))
        }
        (of, None) => Some(format!("its disk_format is {of}")),
    }
}

/// Whether QEMU takes a text for the descriptor of a VMDK image: comments and blank lines, then its version.
fn is_descriptor(head: &[u8]) -> bool {
    let is_skipped = |line: &&[u8]| line.first().is_none_or(|first| matches!(first, b'#' | b' ' | b'\r'));
    let line = head.split(|byte| *byte == b'\n').find(|line| !is_skipped(line));
    line.is_some_and(|line| line.starts_with(b"version="))
}
