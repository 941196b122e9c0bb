//! The bodies of encrypted disks.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Where the secret of an encrypted disk is. The request has one of the two. The secret itself is never sent.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KeyReference {
    /// Absolute path of a file of the daemon's host, in one of the directories of `[encryption] key_dirs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_file: Option<String>,
    /// Last argument of the command of `[encryption] key_command`, which prints the secret.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_command: Option<String>,
}

/// What the shredding of a disk may take.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Shred {
    /// Shred although a client has the disk open.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub force: bool,
    /// Shred its snapshots too. By default a disk with snapshots is not shredded.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub snapshots: bool,
}
