//! Bases.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A new base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddBase {
    /// Its name.
    pub name: String,
    /// Absolute path or URL of the image.
    pub source: String,
    /// Other URLs of the same content, 16 at most.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// Format of the image. Without it the end of the source's name decides: `.qcow2`, `.vmdk`, all else is raw.
    #[serde(default)]
    pub format: Option<Format>,
    /// The images below it, the nearest first, 16 at most.
    #[serde(default)]
    pub backing: Vec<Below>,
    /// SHA-256 of the image file, 64 hexadecimal digits. Not with `sha512`.
    #[serde(default)]
    pub sha256: Option<String>,
    /// SHA-512 of the image file, 128 hexadecimal digits. Not with `sha256`.
    #[serde(default)]
    pub sha512: Option<String>,
    /// Which validators of a server's answer must still match. Without it: strong.
    #[serde(default)]
    pub identity: Option<Identity>,
    /// Seconds after which a read that waits for the server fails, 366 days at most; without it, or with 0: never.
    #[serde(default)]
    #[schema(maximum = 31622400)]
    pub deadline_seconds: Option<u32>,
    /// Requests at a time; without it as many as the daemon may.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 256)]
    pub max_requests: Option<u32>,
    /// Bytes per second; without it as fast as it goes.
    #[serde(default)]
    #[schema(minimum = 65536)]
    pub max_rate: Option<u64>,
    /// Whether what is fetched of it is never evicted to make room.
    #[serde(default)]
    pub pinned: bool,
}

/// An image below an image, in a request.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Below {
    /// Absolute path or URL.
    pub source: String,
    /// As that of the image.
    #[serde(default)]
    pub format: Option<Format>,
}

/// How an image file encodes its virtual disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", try_from = "String")]
pub enum Format {
    /// The file is the disk.
    #[default]
    Raw,
    /// QEMU's qcow2.
    Qcow2,
    /// VMware's VMDK.
    Vmdk,
}

impl TryFrom<String> for Format {
    type Error = String;

    fn try_from(word: String) -> Result<Self, String> {
        match &*word {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            "vmdk" => Ok(Self::Vmdk),
            other => Err(format!(
                "format {other:?} is not served; it is raw, qcow2 or vmdk, others are converted with: qemu-img convert \
                 -O qcow2"
            )),
        }
    }
}

/// Which validators of a server's answer must still match, besides the size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case", try_from = "String")]
pub enum Identity {
    /// A strong ETag, or Last-Modified where there is none.
    #[default]
    Strong,
    /// A weak ETag is enough.
    Weak,
    /// None: the size alone.
    Size,
}

impl TryFrom<String> for Identity {
    type Error = String;

    fn try_from(word: String) -> Result<Self, String> {
        match &*word {
            "strong" => Ok(Self::Strong),
            "weak" => Ok(Self::Weak),
            "size" => Ok(Self::Size),
            other => Err(format!("identity {other:?} is not known; it is strong, weak or size")),
        }
    }
}

/// Other URLs of the same image.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetUrls {
    /// The URL that is asked first.
    pub source: String,
    /// The others; without it the mirrors stay.
    #[serde(default)]
    pub mirrors: Option<Vec<String>>,
    /// Which file of the base: 0 is the image, 1 the file below it.
    #[serde(default)]
    pub file: u8,
}

/// Whether a base is given up.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Fail {
    /// Whether reads that wait for its servers end with an error, now and from now on.
    pub given_up: bool,
}

/// Whether a base is pinned.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// Whether what is fetched of it is never evicted to make room.
    pub pinned: bool,
}

/// How fast a base is hydrated.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Hydrate {
    /// Bytes per second, 1 at least; without it as configured.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub rate: Option<u64>,
}

/// What an eviction did.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Evicted {
    /// Name of the base.
    pub name: String,
    /// Bytes that were dropped.
    pub evicted_bytes: u64,
    /// Bytes that stay, because another base has the same contents and wants them kept.
    pub shared_bytes: u64,
}

/// A base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Base {
    /// Number in the store, never used again.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Its file in the mount.
    pub path: String,
    /// Path or URL of the image, as it is read now.
    pub source: String,
    /// Other URLs of the same content.
    pub mirrors: Vec<String>,
    /// The images below it, the nearest first.
    pub backing: Vec<Backing>,
    /// Format of the image.
    pub format: Format,
    /// Bytes of its virtual disk.
    pub size: u64,
    /// Bytes of the image file.
    pub source_size: u64,
    /// How many disks use it.
    pub disks: u64,
    /// Bytes of it that are cached: in the store, or in memory when none of it is kept in the store.
    pub cached_bytes: u64,
    /// Percent of its files that is in the store; null when none of it is kept there.
    pub cached_percent: Option<f64>,
    /// Bytes of it in the memory cache.
    pub memory_bytes: u64,
    /// Whether what is in the store of it is never evicted to make room.
    pub pinned: bool,
    /// Whether all of it is in the store.
    pub complete: bool,
    /// Whether what is in the store was compared with the digest, and has it.
    pub digest_verified: bool,
    /// SHA-256 that the image was registered with.
    pub sha256: Option<String>,
    /// SHA-512 that the image was registered with.
    pub sha512: Option<String>,
    /// ETag of the image at registration.
    pub etag: Option<String>,
    /// Last-Modified of the image at registration.
    pub last_modified: Option<String>,
    /// Which validators must still match.
    pub identity: Identity,
    /// Seconds after which a read that waits for the server fails; null: never.
    pub deadline_seconds: Option<u32>,
    /// Requests at a time; null: as many as the daemon may.
    pub max_requests: Option<u32>,
    /// Bytes per second; null: as fast as it goes.
    pub max_rate: Option<u64>,
    /// When it was registered.
    #[schema(format = DateTime)]
    pub created: String,
    /// How it is.
    pub state: BaseState,
    /// Since when, for a state that comes and goes.
    #[schema(format = DateTime)]
    pub state_since: Option<String>,
    /// Why it cannot be used, or the last error that its readers got.
    pub error: Option<String>,
    /// Why nothing of it is kept or read in the store.
    pub cache_error: Option<String>,
    /// The last hydration or verification of this worker.
    pub work: Option<Work>,
    /// Since when reads wait for its server.
    #[schema(format = DateTime)]
    pub waiting_since: Option<String>,
    /// Why reads wait.
    pub waiting_for: Option<String>,
    /// Since when its readers get errors.
    #[schema(format = DateTime)]
    pub failing_since: Option<String>,
    /// Its URLs and how they work, once it was read.
    pub servers: Vec<Server>,
}

/// How a base is. The first that applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BaseState {
    /// Its contents do not have the digest that it was registered with.
    Refused,
    /// It cannot be used; `error` says why.
    Failed,
    /// Its operator has given it up.
    GivenUp,
    /// Its server has another object now; reads of what is missing wait.
    Changed,
    /// Its readers get errors.
    Failing,
    /// Reads of what is missing wait for its server.
    Waiting,
    /// It works.
    #[default]
    Ok,
}

/// An image below an image.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Backing {
    /// Path or URL.
    pub source: String,
    /// Its format.
    pub format: Format,
}

/// A URL of a base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Server {
    /// Without query and user info.
    pub url: String,
    /// How it failed last, when it does not work.
    pub trouble: Option<String>,
}

/// Work on a whole base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Work {
    /// Which.
    pub what: WorkKind,
    /// How far it is.
    pub state: WorkState,
    /// Bytes that are here, or were compared.
    pub bytes: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes per second since it began.
    pub rate: u64,
    /// Result of the comparison; null without a digest.
    pub digest_matches: Option<bool>,
    /// Why it failed, waits or was cancelled.
    pub error: Option<String>,
}

/// What is done with a whole base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkKind {
    /// All of it is fetched, then compared.
    #[default]
    Hydrate,
    /// It is compared.
    Verify,
}

/// How far work on a whole base is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkState {
    /// Bytes come.
    #[default]
    Fetching,
    /// Nothing comes; it goes on by itself.
    Waiting,
    /// What is here is compared with the digest.
    Verifying,
    /// It has ended well.
    Done,
    /// It has ended, and not well.
    Failed,
    /// It was ended early, by a request.
    Cancelled,
}

impl WorkState {
    /// As answers show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fetching => "fetching",
            Self::Waiting => "waiting",
            Self::Verifying => "verifying",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// Whether the work has ended.
    pub fn has_ended(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }
}
