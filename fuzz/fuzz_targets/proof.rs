#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| plyfs_fuzz::decode::proof(data));
