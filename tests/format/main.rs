//! Reads images made by other programs and compares every byte with what those programs read.
//!
//! Needs qemu-img and qemu-io. `PLYFS_EVERY_IMAGE=1` tests every combination of settings (1867 images of qcow2 alone,
//! some minutes) instead of a sample in which each pair of settings occurs.

mod qcow2;
mod vmdk;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use plyfs::image::{self, Chain, Extent, Format, HEAD, Image};
use plyfs::source::{FileSource, Source};
use tempfile::TempDir;

fn all_combinations() -> bool {
    std::env::var_os("PLYFS_EVERY_IMAGE").is_some()
}

/// A temporary directory; not in /tmp, which may be small.
fn directory() -> TempDir {
    tempfile::tempdir_in("/var/tmp").expect("a temporary directory")
}

/// Runs a program; panics with its output if it fails.
fn run(program: &str, args: &[&str]) {
    let out = Command::new(program).args(args).output().unwrap_or_else(|error| {
        panic!("{program}: {error}; apt-get install qemu-utils");
    });
    let output = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program} {args:?}: {output}");
    // qemu-io reports a failed command but exits with 0.
    assert!(!output.contains("failed") && !output.contains("Invalid"), "{program} {args:?}: {output}");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("UTF-8")
}

/// Pseudorandom numbers, the same in every run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// Data like that of a disk: compressible text, random bytes, holes.
fn disk_bytes(len: usize, numbers: &mut Numbers) -> Vec<u8> {
    let mut out = Vec::with_capacity(len + 128 * 1024);
    while out.len() < len {
        let piece = 1 + numbers.below(96 * 1024) as usize;
        match numbers.below(4) {
            0 => out.extend((0..piece).map(|_| (numbers.next() >> 32) as u8)),
            1 => out.resize(out.len() + piece, 0),
            _ => {
                let word = format!("line {} of a file\n", numbers.below(1000));
                out.extend(word.bytes().cycle().take(piece));
            }
        }
    }
    out.truncate(len);
    out
}

fn open(format: Format, path: &Path, chain: Chain) -> (Arc<dyn Image>, Arc<dyn Source>) {
    let source: Arc<dyn Source> = Arc::new(FileSource::open(path).expect("the file opens"));
    let mut head = vec![0; HEAD.min(source.size()) as usize];
    source.read_at(&mut head, 0).expect("its head");
    let found =
        image::inspect(format, &head, source.size(), chain).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    let image = image::open(format, source.clone(), found.size, chain);
    assert_eq!(image.size(), found.size);
    (image, source)
}

/// An image and its file.
type Part = (Arc<dyn Image>, Arc<dyn Source>);

/// Reads a range of a chain of images, the top one first.
fn read(chain: &[Part], offset: u64, out: &mut [u8]) {
    let Some(((image, source), under)) = chain.split_first() else { return out.fill(0) };
    let (mut at, mut inflated, mut which) = (0, Vec::new(), None);
    while at < out.len() {
        let here = offset + at as u64;
        let (extent, run) =
            image.extent(here, (out.len() - at) as u64).unwrap_or_else(|e| panic!("{here}: {e}"));
        assert!(run > 0 && run <= (out.len() - at) as u64, "a run of {run} at {here}");
        let part = &mut out[at..at + run as usize];
        match extent {
            Extent::Zero => part.fill(0),
            Extent::Below => read(under, here, part),
            Extent::Plain { at } => {
                assert_eq!(
                    source.read_at(part, at).expect("readable"),
                    part.len(),
                    "the file ends before the run"
                );
            }
            Extent::Compressed(what) => {
                if which != Some(what) {
                    image.inflate(&what, &mut inflated).unwrap_or_else(|e| panic!("{here}: {e}"));
                    assert_eq!(inflated.len() as u64, what.len);
                    which = Some(what);
                }
                let from = (here - what.guest) as usize;
                part.copy_from_slice(&inflated[from..from + run as usize]);
            }
        }
        at += run as usize;
    }
}

/// Reads the entire image, also in steps of an odd length, and compares it with the output of `qemu-img convert`.
fn same_as_qemu(what: &str, format: Format, paths: &[PathBuf]) {
    let raw = paths[0].with_extension("expected");
    run("qemu-img", &["convert", "-f", format.name(), "-O", "raw", text(&paths[0]), text(&raw)]);
    let expected = fs::read(&raw).expect("what qemu-img made");
    let chain: Vec<_> = paths
        .iter()
        .enumerate()
        .map(|(index, path)| {
            open(format, path, if index + 1 < paths.len() { Chain::OnBacking } else { Chain::Alone })
        })
        .collect();
    assert_eq!(chain[0].0.size(), expected.len() as u64, "{what}: size");
    for step in [expected.len().max(1), 100_003] {
        let mut at = 0;
        while at < expected.len() {
            let end = expected.len().min(at + step);
            let mut got = vec![0xee; end - at];
            read(&chain, at as u64, &mut got);
            if let Some(wrong) = got.iter().zip(&expected[at..end]).position(|(a, b)| a != b) {
                panic!("{what}: byte {} differs", at + wrong);
            }
            at = end;
        }
    }
    fs::remove_file(raw).expect("remove it");
}
