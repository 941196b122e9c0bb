//! `[[http.clouds]]`: the clouds whose Glance and Swift have images of bases.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{ConfigError, invalid};

/// Where OpenStack's clients have their clouds.
const FILE: &str = "/etc/openstack/clouds.yaml";

/// One cloud. Its password or secret is never in the configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloudConfig {
    /// `name`: its name in the file. Bounds: letters, digits, dots, dashes and underscores, 1 to 128.
    pub name: String,
    /// `file`: clouds.yaml. A file secure.yaml beside it is read too. Default: `/etc/openstack/clouds.yaml`.
    #[serde(default = "file")]
    pub file: PathBuf,
    /// `locations`: where the data of an image may be read when Glance itself gives no ranges: `http` and `swift`.
    /// Default: none.
    #[serde(default)]
    pub locations: Vec<LocationKind>,
}

/// A kind of location of an image's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LocationKind {
    /// A web server.
    Http,
    /// The Swift of the same cloud.
    Swift,
}

fn file() -> PathBuf {
    FILE.into()
}

impl CloudConfig {
    /// The file with secrets that is merged into `file`, where it exists.
    pub fn secure_file(&self) -> PathBuf {
        self.file.parent().unwrap_or(Path::new("/")).join("secure.yaml")
    }
}

pub(super) fn validate(clouds: &[CloudConfig]) -> Result<(), ConfigError> {
    const KEY: &str = "http.clouds";
    if clouds.len() > 16 {
        return Err(invalid(KEY, "there are more than 16; remove some".into()));
    }
    for (number, CloudConfig { name, file, .. }) in clouds.iter().enumerate() {
        let is_name = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > 128 || !name.chars().all(is_name) {
            let message =
                format!("name {name:?} is not valid; give letters, digits, dots, dashes and underscores");
            return Err(invalid(KEY, message));
        }
        if clouds[..number].iter().any(|other| other.name == *name) {
            return Err(invalid(KEY, format!("{name} is there twice; remove one")));
        }
        super::http::absolute(KEY, file)?;
    }
    Ok(())
}
