//! Links read(2) and writev(2) through wrappers, with which the daemon sees each request of the FUSE device, and each answer,
//! before the FUSE crate does (src/io/interrupts.rs).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=-Wl,--wrap=read,--wrap=writev");
}
