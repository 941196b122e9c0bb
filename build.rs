//! Links read(2) through a wrapper, with which the daemon sees each request of the FUSE device before the FUSE crate
//! does (src/io/interrupts.rs).

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rustc-link-arg-bins=-Wl,--wrap=read");
}
