//! The bodies of clouds.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A cloud of OpenStack that the configuration names.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Cloud {
    /// Its name in clouds.yaml.
    pub name: String,
}

/// An active image of a cloud.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CloudImage {
    /// Its ID.
    pub id: String,
    /// Its name, any text.
    pub name: Option<String>,
    /// Bytes of its file.
    pub size: Option<u64>,
    /// Its format in Glance's word.
    pub disk_format: Option<String>,
    /// What its file is wrapped in, in Glance's word.
    pub container_format: Option<String>,
    /// The source with which it can be added as a base.
    pub source: String,
    /// Why it cannot be a base, as far as its record says; null when it can.
    pub unusable: Option<String>,
}
