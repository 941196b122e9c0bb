#![no_main]

libfuzzer_sys::fuzz_target!(|history: plyfs_fuzz::disk::History| plyfs_fuzz::disk::run(&history));
