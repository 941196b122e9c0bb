//! Guesses the real format of a file that does not have the named format, so that the error can say what to do.
//!
//! Used only for refusals and their messages. It never chooses a format.

use super::{Format, ImageError};

/// Formats that compress a file as a whole: name, magic number, suffixes.
const WHOLE: &[(&str, &[u8], &[&str])] = &[
    ("gzip", &[0x1f, 0x8b, 0x08], &[".gz", ".tgz"]),
    ("xz", &[0xfd, b'7', b'z', b'X', b'Z', 0], &[".xz", ".txz"]),
    ("zstd", &[0x28, 0xb5, 0x2f, 0xfd], &[".zst", ".zstd"]),
    ("bzip2", b"BZh", &[".bz2"]),
    ("zip", b"PK\x03\x04", &[".zip"]),
];

fn method(head: &[u8]) -> Option<(&'static str, &'static [&'static str])> {
    WHOLE.iter().find(|(_, magic, _)| head.starts_with(magic)).map(|(name, _, suffixes)| (*name, *suffixes))
}

fn whole(format: Format, name: &str) -> ImageError {
    let what = format!("the file is compressed as a whole, with {name}, and allows no random access");
    let advice =
        "decompress it, or give the image as qcow2 with compressed clusters (qemu-img convert -c -O qcow2)";
    ImageError::unsupported(format, what, advice)
}

/// The refusal of a file that is compressed as a whole. Both its name and its first bytes must show it, because a raw
/// disk may begin with any bytes. `name` is a path or a URL.
pub fn compressed_as_a_whole(format: Format, name: &str, head: &[u8]) -> Option<ImageError> {
    let path = name.split(['?', '#']).next().unwrap_or(name).to_ascii_lowercase();
    let (name, suffixes) = method(head)?;
    suffixes.iter().any(|suffix| path.ends_with(suffix)).then(|| whole(format, name))
}

/// The refusal of a file without the magic number of `format`.
pub(super) fn not_this(format: Format, head: &[u8]) -> ImageError {
    if let Some((name, _)) = method(head) {
        return whole(format, name);
    }
    let is = match head {
        _ if head.starts_with(b"QFI\xfb") => Some("qcow2"),
        _ if head.starts_with(b"KDMV") || head.starts_with(b"# Disk DescriptorFile") => Some("vmdk"),
        _ if head.starts_with(b"vhdxfile") => Some("vhdx"),
        _ if head.starts_with(b"conectix") => Some("vpc"),
        _ if head.starts_with(b"QED\0") => Some("qed"),
        _ if head.get(..512).is_some_and(|sector| sector.ends_with(&[0x55, 0xaa])) => Some("raw"),
        _ => None,
    };
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
