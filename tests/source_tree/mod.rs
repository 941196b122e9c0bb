//! Reads the source files of this repository, and tells code, comments and literals apart. Used by the tests that check
//! the source itself: tests/invariants.rs and tests/layering.rs.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The path from the root, and the text, of every file below `dir` for which `wanted` is true. Skips files that are no
/// text.
pub fn texts(dir: &str, wanted: fn(&Path) -> bool) -> Vec<(String, String)> {
    let mut files = Vec::new();
    collect(&root().join(dir), wanted, &mut files);
    files.sort();
    let name = |path: &Path| path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
    files.into_iter().filter_map(|path| Some((name(&path), fs::read_to_string(&path).ok()?))).collect()
}

fn collect(dir: &Path, wanted: fn(&Path) -> bool, out: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, wanted, out);
        } else if wanted(&path) {
            out.push(path);
        }
    }
}

/// Whether a file is Rust code.
pub fn is_rust(path: &Path) -> bool {
    path.extension().is_some_and(|e| e == "rs")
}

/// What a part of Rust code is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Code,
    /// A comment up to the end of its line, or a block comment.
    Comment,
    /// A string, raw string or character.
    Literal,
}

/// The parts of Rust code, in order, as ranges of bytes.
pub fn parts(text: &str) -> Vec<(Part, Range<usize>)> {
    let bytes = text.as_bytes();
    let mut out: Vec<(Part, Range<usize>)> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let in_word = at > 0 && (bytes[at - 1].is_ascii_alphanumeric() || bytes[at - 1] == b'_');
        let (part, len) = if rest.starts_with(b"//") {
            (Part::Comment, rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len()))
        } else if rest.starts_with(b"/*") {
            (Part::Comment, block_comment(rest))
        } else if !in_word && let Some(len) = raw_string(rest) {
            (Part::Literal, len)
        } else if rest[0] == b'"' {
            (Part::Literal, string(rest))
        } else if rest.starts_with(b"'\\") {
            (Part::Literal, 3 + rest[3..].iter().position(|b| *b == b'\'').unwrap_or(0) + 1)
        } else if rest[0] == b'\'' && rest.get(2) == Some(&b'\'') {
            (Part::Literal, 3)
        } else {
            (Part::Code, 1)
        };
        let end = (at + len).min(bytes.len());
        match out.last_mut() {
            Some((Part::Code, range)) if part == Part::Code => range.end = end,
            _ => out.push((part, at..end)),
        }
        at = end;
    }
    out
}

/// The length of the block comment that `bytes` begins with.
fn block_comment(bytes: &[u8]) -> usize {
    let (mut depth, mut at) = (0, 0);
    loop {
        match bytes.get(at..at + 2) {
            Some(b"/*") => (depth, at) = (depth + 1, at + 2),
            Some(b"*/") => (depth, at) = (depth - 1, at + 2),
            Some(_) => at += 1,
            None => return bytes.len(),
        }
        if depth == 0 {
            return at;
        }
    }
}

/// The length of the string that `bytes` begins with.
fn string(bytes: &[u8]) -> usize {
    let mut at = 1;
    while at < bytes.len() && bytes[at] != b'"' {
        at += if bytes[at] == b'\\' { 2 } else { 1 };
    }
    at + 1
}

/// The length of the raw string that `bytes` begins with, if it does.
fn raw_string(bytes: &[u8]) -> Option<usize> {
    let head = if bytes.starts_with(b"br") { 2 } else { usize::from(bytes.starts_with(b"r")) };
    let hashes = bytes[head..].iter().take_while(|b| **b == b'#').count();
    if head == 0 || bytes.get(head + hashes) != Some(&b'"') {
        return None;
    }
    let close = [b"\"".as_slice(), &b"#".repeat(hashes)].concat();
    let body = head + hashes + 1;
    let end = bytes[body..].windows(close.len()).position(|w| w == close)?;
    Some(body + end + close.len())
}
