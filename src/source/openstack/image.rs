//! Glance's record of an image: what it is, and whether its data can be read.
//!
//! Source: the Image API v2, "Show image", and the states of its "Image data" chapter.

use serde::Deserialize;

use super::place::{ImagePlace, Whereabouts};
use crate::format::record::{Digest, ImageFormat};
use crate::source::http_identity::printable;

/// What Glance says of one image.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct ImageRecord {
    /// The UUID.
    pub id: String,
    /// Any text, or none.
    #[serde(default)]
    pub name: Option<String>,
    /// In Glance's own word.
    pub status: String,
    /// Bytes; none before the data is complete.
    pub size: Option<u64>,
    /// The algorithm of `os_hash_value`.
    pub os_hash_algo: Option<String>,
    /// The digest of the data, in hexadecimal digits.
    pub os_hash_value: Option<String>,
    /// MD5 of the data, which answers with data repeat.
    pub checksum: Option<String>,
    /// `raw`, `qcow2` and others.
    pub disk_format: Option<String>,
    /// `bare`, unless the data is wrapped.
    pub container_format: Option<String>,
    /// Where the store has the data, where Glance shows that.
    #[serde(default)]
    pub direct_url: Option<String>,
    /// All places.
    #[serde(default)]
    pub locations: Vec<Location>,
}

/// One place of an image's data.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Location {
    /// The URL. It may have a password.
    pub url: String,
}

/// A page of a list of images.
#[derive(Debug, Deserialize)]
pub struct ImagePage {
    /// The images.
    pub images: Vec<ImageRecord>,
    /// Where the next page is; none after the last one.
    #[serde(default)]
    pub next: Option<String>,
}

impl ImagePage {
    /// Of the body of an answer.
    ///
    /// # Errors
    /// That it is no list, without its text.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|_| "Glance's answer is no list of images".into())
    }
}

/// The answer to a search by name.
#[derive(Debug, Deserialize)]
pub struct Matches {
    images: Vec<ImageRecord>,
}

impl ImageRecord {
    /// Of the body of an answer.
    ///
    /// # Errors
    /// That it is no record, without its text.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|_| "Glance's answer is no image record".into())
    }

    /// Why no data can be read now, in Glance's own word; none of an active image.
    pub fn unreadable(&self) -> Option<String> {
        let remedy = match &*self.status {
            "active" => return None,
            "queued" | "saving" | "uploading" | "importing" => "its data is not complete yet",
            "deactivated" => "an administrator of the cloud reactivates it",
            "deleted" | "pending_delete" => "it does not come back",
            "killed" => "its upload failed",
            _ => "plyfs reads images that are active",
        };
        Some(format!("Glance says that the image is {}: {remedy}", printable(&self.status)))
    }

    /// The format that the record states.
    ///
    /// # Errors
    /// For a format that plyfs cannot read.
    pub fn format(&self) -> Result<ImageFormat, String> {
        match self.container_format.as_deref() {
            Some("bare") => {}
            Some(other) => {
                let other = printable(other);
                return Err(format!("its container_format is {other}; plyfs reads bare images"));
            }
            None => return Err("its record has no container_format".into()),
        }
        match self.disk_format.as_deref() {
            // The bytes of an ISO image are those of the disk.
            Some("raw" | "iso") => Ok(ImageFormat::Raw),
            Some("qcow2") => Ok(ImageFormat::Qcow2),
            Some("vmdk") => Ok(ImageFormat::Vmdk),
            Some(other) => {
                let other = printable(other);
                Err(format!("its disk_format is {other}; plyfs reads raw, iso, qcow2 and vmdk"))
            }
            None => Err("its record has no disk_format".into()),
        }
    }

    /// Why an active image cannot be a base; none of one that can, as far as its record says.
    pub fn unusable(&self) -> Option<String> {
        let is_id = ImagePlace::is_by_id(&ImagePlace {
            glance: Whereabouts::At(String::new()),
            image: self.id.clone(),
        });
        if !is_id {
            return Some("its ID is no UUID".into());
        }
        if self.os_hash_value.is_none() || self.os_hash_algo.is_none() {
            return Some("its record has no os_hash_value".into());
        }
        if self.size.unwrap_or(0) == 0 {
            return Some("its record has no size".into());
        }
        self.format().err()
    }

    /// `os_hash_value` as a digest that plyfs can compute; none of other algorithms.
    pub fn digest(&self) -> Option<Digest> {
        let value = self.os_hash_value.as_deref()?;
        match self.os_hash_algo.as_deref()? {
            "sha256" => unhex(value).map(Digest::Sha256),
            "sha512" => unhex(value).map(Digest::Sha512),
            _ => None,
        }
    }

    /// The places of the data, `direct_url` first, each once.
    pub fn places(&self) -> Vec<&str> {
        let mut all: Vec<&str> = Vec::new();
        for url in self.direct_url.iter().chain(self.locations.iter().map(|location| &location.url)) {
            if !all.contains(&url.as_str()) {
                all.push(url);
            }
        }
        all
    }
}

impl Matches {
    /// Of the body of an answer.
    ///
    /// # Errors
    /// That it is no list.
    pub fn parse(body: &[u8]) -> Result<Self, String> {
        serde_json::from_slice(body).map_err(|_| "Glance's answer is no list of images".into())
    }

    /// The one image of the name.
    ///
    /// # Errors
    /// When there is none, or more than one.
    pub fn only(self, name: &str) -> Result<ImageRecord, String> {
        let name = printable(name);
        let mut images = self.images;
        match images.len() {
            0 => {
                Err(format!("Glance has no image {name} that this project may see; give its name or its ID"))
            }
            1 => Ok(images.remove(0)),
            count => {
                let ids: Vec<String> = images.iter().take(4).map(|image| printable(&image.id)).collect();
                let more = if count > 4 { ", ..." } else { "" };
                Err(format!("Glance has {count} images {name}; give the ID of one: {}{more}", ids.join(", ")))
            }
        }
    }
}

fn unhex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut out = [0; N];
    hex::decode_to_slice(text, &mut out).ok().map(|()| out)
}
