#![no_main]

use plyfs::image::Format;

libfuzzer_sys::fuzz_target!(|data: &[u8]| plyfs_fuzz::image::run(Format::Qcow2, data));
