//! Parses the text descriptor inside a VMDK image, which lists the parts of the disk.
//!
//! It is used only to refuse images: plyfs never opens a file that it names. An image asks for files of the host by an
//! extent in another file (CVE-2022-47951).

use super::header::{CONVERT, invalid, refused, unsupported};
use crate::image::ImageError;

/// The types of VMDK that plyfs reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    MonolithicSparse,
    StreamOptimized,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::MonolithicSparse => "monolithicSparse",
            Self::StreamOptimized => "streamOptimized",
        }
    }
}

/// The facts from a descriptor that passed the checks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    pub kind: Kind,
}

const SEVERAL: &str =
    "on a host that trusts the image, convert the disk to one file: qemu-img convert -O qcow2";

impl Descriptor {
    /// Parses `bytes` up to the first NUL. `sectors` is the size of the disk in the header.
    ///
    /// # Errors
    /// `Invalid`, `Refused` or `Unsupported`.
    pub fn parse(bytes: &[u8], sectors: u64) -> Result<Self, ImageError> {
        let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
        let text = String::from_utf8_lossy(text);
        let (mut kind, mut parent, mut extents) = (None, None, 0);
        for (number, line) in text.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            if let Some(rest) = extent_line(line) {
                extent(rest, sectors)?;
                extents += 1;
                continue;
            }
            let Some((key, value)) = line.split_once('=') else {
                let shown = shown(line);
                return Err(invalid(format!(
                    "line {} of its descriptor is invalid: \"{shown}\"",
                    number + 1
                )));
            };
            let value = value.trim().trim_matches('"');
            let seen = match key.trim().to_ascii_lowercase().as_str() {
                "createtype" => kind.replace(value.to_owned()),
                "parentcid" => parent.replace(value.to_owned()),
                "parentfilenamehint" => return Err(on_parent(value)),
                _ => None,
            };
            if seen.is_some() {
                return Err(invalid(format!("its descriptor has {} twice", key.trim())));
            }
        }
        if let Some(parent) = parent.filter(|parent| !parent.eq_ignore_ascii_case("ffffffff")) {
            return Err(on_parent(&parent));
        }
        let kind = kind.ok_or_else(|| invalid("its descriptor has no createType".into()))?;
        let kind = match () {
            () if kind.eq_ignore_ascii_case("monolithicSparse") => Kind::MonolithicSparse,
            () if kind.eq_ignore_ascii_case("streamOptimized") => Kind::StreamOptimized,
            () => {
                let what = format!(
                    "it has type \"{}\", but plyfs reads only monolithicSparse and streamOptimized",
                    shown(&kind)
                );
                return Err(unsupported(what, CONVERT));
            }
        };
        match extents {
            1 => Ok(Self { kind }),
            0 => Err(invalid("its descriptor names no extent".into())),
            _ => Err(refused(
                format!("its disk has {extents} extents, but plyfs reads only this file"),
                SEVERAL,
            )),
        }
    }
}

fn on_parent(parent: &str) -> ImageError {
    let what = format!(
        "it is on top of another image (parent \"{}\"), and an image may not say which files are read",
        shown(parent)
    );
    refused(what, SEVERAL)
}

/// The rest of an extent line behind the access; `None` for other lines.
fn extent_line(line: &str) -> Option<&str> {
    let (first, rest) = line.split_once(char::is_whitespace)?;
    let access = ["RW", "RDONLY", "NOACCESS"].iter().any(|access| first.eq_ignore_ascii_case(access));
    (access && !rest.trim_start().starts_with('=')).then_some(rest)
}

/// Checks the rest of an extent line: `SECTORS SPARSE "NAME"`. The name is ignored: it must be that of this file.
fn extent(rest: &str, sectors: u64) -> Result<(), ImageError> {
    let mut words = rest.split_whitespace();
    let (has, kind) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    if !kind.eq_ignore_ascii_case("SPARSE") {
        let what = format!(
            "its descriptor has an extent of type \"{}\" in another file, and an image may not say which files are \
             read",
            shown(kind)
        );
        return Err(refused(what, SEVERAL));
    }
    let name = words.collect::<Vec<_>>().join(" ");
    let quoted = name.strip_prefix('"').and_then(|name| name.strip_suffix('"'));
    if quoted.is_none_or(|name| name.is_empty() || name.contains('"')) {
        return Err(invalid(format!("its descriptor's extent has no name in quotes: \"{}\"", shown(rest))));
    }
    if has.parse() != Ok(sectors) {
        let what = format!("its header has {sectors} sectors, but its descriptor has \"{}\"", shown(has));
        return Err(invalid(what));
    }
    Ok(())
}

/// Sanitises text from an image for a message.
fn shown(text: &str) -> String {
    let mut out: String = text.chars().take(100).flat_map(char::escape_default).collect();
    if text.chars().nth(100).is_some() {
        out.push_str("...");
    }
    out
}
