//! What the fuzz targets do. It is a library so that `cargo test` here runs the corpus without a fuzzer.

pub mod decode;
pub mod disk;
pub mod image;
pub mod medium;
