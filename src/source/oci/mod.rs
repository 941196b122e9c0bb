//! Artifacts of OCI registries: their URLs, their manifests, and disks in the tar layers of container disks. What is asked,
//! and with which tokens: `source::http`'s `registry`.

mod manifest;
mod place;
mod tar;
#[cfg(test)]
mod tests;

pub(crate) use manifest::{ACCEPTED, Disk, Manifest};
pub(crate) use place::{Place, Reference};
pub(crate) use tar::disk;
