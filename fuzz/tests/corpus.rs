//! Every input that is kept, without a fuzzer: what was found once stays fixed.

use std::fs;
use std::path::Path;

use arbitrary::{Arbitrary, Unstructured};
use plyfs::image::Format;
use plyfs_fuzz::{decode, disk, image};

fn each(target: &str, mut run: impl FnMut(&[u8])) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    let mut files: Vec<_> =
        fs::read_dir(&dir).expect("a corpus").map(|e| e.expect("an entry").path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", dir.display());
    for file in files {
        eprintln!("{}", file.display());
        run(&fs::read(&file).expect("a seed"));
    }
}

#[test]
fn records() {
    each("records", decode::records);
}

#[test]
fn layer_index() {
    each("layer_index", decode::layer_index);
}

#[test]
fn increment() {
    each("increment", decode::increment);
}

#[test]
fn names() {
    each("names", decode::names);
}

#[test]
fn trace() {
    each("trace", decode::trace);
}

#[test]
fn proof() {
    each("proof", decode::proof);
}

#[test]
fn map_file() {
    each("map_file", decode::map_file);
}

#[test]
fn live_map() {
    each("live_map", decode::live_map);
}

#[test]
fn text() {
    each("text", decode::text);
}

#[test]
fn disk() {
    each("disk", |data| {
        if let Ok(history) = disk::History::arbitrary_take_rest(Unstructured::new(data)) {
            disk::run(&history);
        }
    });
}

#[test]
fn image_qcow2() {
    each("image_qcow2", |data| image::run(Format::Qcow2, data));
}

#[test]
fn image_vmdk() {
    each("image_vmdk", |data| image::run(Format::Vmdk, data));
}
