//! Manifests of artifacts and images: which blob is the disk. The formats are those of the OCI image specification 1.1 and
//! of Docker's image manifest, version 2, schema 2.

use serde::Deserialize;

use super::place::is_digest;

/// The media types that plyfs asks for.
pub(crate) const ACCEPTED: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json, application/vnd.docker.distribution.manifest.list.v2+json";

/// A layer that is a tar archive without compression.
const TAR: &[&str] =
    &["application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"];
/// Ends of media types that are compressed as a whole.
const COMPRESSED: &[&str] = &["+gzip", ".tar.gzip", "+zstd", ".gz", "+xz"];

/// A blob that a manifest names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Disk {
    /// `sha256:` and 64 digits.
    pub digest: String,
    /// Bytes of the blob.
    pub size: u64,
    /// Whether it is a tar archive with the image inside.
    pub is_tar: bool,
}

/// What a manifest says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Manifest {
    /// The blob of the disk.
    Disk(Disk),
    /// The digest of another manifest, for this machine.
    Other(String),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Text {
    schema_version: Option<u32>,
    #[serde(default)]
    layers: Vec<Descriptor>,
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
}

#[derive(Deserialize)]
struct Platform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
}

/// The name of this machine's processor in a platform.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

impl Manifest {
    /// # Errors
    /// Why no blob of it can be a base, and the remedy.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let text: Text =
            serde_json::from_slice(text).map_err(|_| "its manifest is not one of OCI or Docker")?;
        if text.schema_version != Some(2) {
            return Err("its manifest is not of schema version 2".into());
        }
        match (text.layers.as_slice(), text.manifests.as_slice()) {
            ([], []) => Err("its manifest names no layer".into()),
            ([], manifests) => choose(manifests),
            ([layer], _) => disk(layer).map(Self::Disk),
            (layers, _) => Err(format!(
                "it has {} layers, and a base is one blob; build the image from scratch with one COPY, or push the disk as an \
                 artifact (oras push)",
                layers.len()
            )),
        }
    }
}

fn choose(manifests: &[Descriptor]) -> Result<Manifest, String> {
    let is_ours = |manifest: &&Descriptor| {
        manifest.platform.as_ref().is_some_and(|p| p.os == "linux" && p.architecture == architecture())
    };
    let chosen = match manifests {
        [only] => Some(only),
        several => several.iter().find(is_ours),
    };
    match chosen {
        Some(chosen) if is_digest(&chosen.digest) => Ok(Manifest::Other(chosen.digest.clone())),
        Some(_) => Err("its index has a digest that is not SHA-256".into()),
        None => Err(format!(
            "its index has no manifest for linux/{}; give one of its manifests by digest",
            architecture()
        )),
    }
}

fn disk(layer: &Descriptor) -> Result<Disk, String> {
    let media: String = layer.media_type.chars().filter(|c| !c.is_control()).take(100).collect();
    if COMPRESSED.iter().any(|end| media.ends_with(end)) {
        return Err(format!(
            "its layer is compressed as a whole ({media}) and allows no random access; copy it with skopeo copy \
             --dest-decompress, or push the disk as an artifact (oras push)"
        ));
    }
    if !is_digest(&layer.digest) {
        return Err("its layer has a digest that is not SHA-256".into());
    }
    if layer.size == 0 || i64::try_from(layer.size).is_err() {
        return Err(format!("its layer has {} bytes", layer.size));
    }
    Ok(Disk { digest: layer.digest.clone(), size: layer.size, is_tar: TAR.contains(&media.as_str()) })
}
