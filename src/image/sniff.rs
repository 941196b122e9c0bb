//! Guesses the real format of a file that does not have the named format, so that the error can say what to do.
//!
//! Used only for refusals and their messages. It never chooses a format.

use super::{Format, ImageError};

/// Formats that compress a file as a whole: name and magic number.
const WHOLE: &[(&str, &[u8])] = &[
    ("gzip", &[0x1f, 0x8b, 0x08]),
    ("xz", &[0xfd, b'7', b'z', b'X', b'Z', 0]),
    ("zstd", &[0x28, 0xb5, 0x2f, 0xfd]),
    ("bzip2", b"BZh"),
    ("zip", b"PK\x03\x04"),
];

/// Formats of images: name, offset and magic number.
const IMAGES: &[(&str, usize, &[u8])] = &[
    ("qcow2", 0, b"QFI\xfb"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vdi", 64, &[0x7f, 0x10, 0xda, 0xbe]),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("qed", 0, b"QED\0"),
];

fn method(head: &[u8]) -> Option<&'static str> {
    WHOLE.iter().find(|(_, magic)| head.starts_with(magic)).map(|(name, _)| *name)
}

/// The format of images whose magic number the file has.
fn image(head: &[u8]) -> Option<&'static str> {
    let has =
        |(_, at, magic): &&(&str, usize, &[u8])| head.get(*at..).is_some_and(|rest| rest.starts_with(magic));
    IMAGES.iter().find(has).map(|(name, ..)| *name)
}

const DECOMPRESS: &str =
    "decompress it, or give the image as qcow2 with compressed clusters (qemu-img convert -c -O qcow2)";

fn whole(format: Format, name: &str) -> ImageError {
    let what = format!("the file is compressed as a whole, with {name}, and allows no random access");
    ImageError::unsupported(format, what, DECOMPRESS)
}

/// The refusal of a file that is raw by default only and begins as a file of another format does. Of a file that the
/// operator calls raw, plyfs does not look at the bytes: a raw disk may begin with any.
pub fn not_raw_by_default(head: &[u8]) -> Option<ImageError> {
    const MEANT: &str = "or pass --format raw if the disk itself begins so";
    if let Some(name) = method(head) {
        let what = format!("the file begins as one that is compressed as a whole, with {name}");
        return Some(ImageError::unsupported(Format::Raw, what, &format!("{DECOMPRESS}, {MEANT}")));
    }
    let name = image(head)?;
    let what = format!("the file begins as a {name} image");
    Some(match name {
        "qcow2" | "vmdk" => ImageError::refused(Format::Raw, what, &format!("pass --format {name}, {MEANT}")),
        _ => {
            let advice = format!("convert it (qemu-img convert -O qcow2), {MEANT}");
            ImageError::unsupported(Format::Raw, what, &advice)
        }
    })
}

/// The refusal of a file without the magic number of `format`.
pub(super) fn not_this(format: Format, head: &[u8]) -> ImageError {
    if let Some(name) = method(head) {
        return whole(format, name);
    }
    let is_boot_sector = || head.get(..512).is_some_and(|sector| sector.ends_with(&[0x55, 0xaa]));
    let is = image(head).or_else(|| is_boot_sector().then_some("raw"));
    let what = format!("it does not begin like a {format} image");
    match is {
        Some(is @ ("qcow2" | "vmdk" | "raw")) => {
            let advice = format!("if it is {is}, pass --format {is}");
            ImageError::invalid(format, what).advise(&advice)
        }
        Some(other) => ImageError::unsupported(
            format,
            format!("{what} but like a {other} image"),
            "convert it: qemu-img convert -O qcow2",
        ),
        None => ImageError::invalid(format, what).advise("check the file and the --format option"),
    }
}
