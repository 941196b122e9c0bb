//! Prints the history that an input of the target `disk` stands for: `cargo run --example show FILE...`.

use arbitrary::{Arbitrary, Unstructured};
use plyfs_fuzz::disk::History;

fn main() {
    for file in std::env::args().skip(1) {
        let bytes = std::fs::read(&file).expect("a readable file");
        match History::arbitrary_take_rest(Unstructured::new(&bytes)) {
            Ok(history) => println!("{file}: {history:?}"),
            Err(error) => println!("{file}: {error}"),
        }
    }
}
