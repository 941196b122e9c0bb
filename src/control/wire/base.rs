//! The bodies of bases.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// A new base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddBase {
    /// Its name.
    pub name: String,
    /// Absolute path or URL of the image. `glance://HOST/ID` and `glance+cloud://CLOUD/NAME-OR-ID` are images of a Glance,
    /// `swift://CLOUD/CONTAINER/OBJECT` is an object of a Swift.
    pub source: String,
    /// Other URLs of the same content, 16 at most.
    #[serde(default)]
    pub mirrors: Vec<String>,
    /// Format of the image. By default the suffix of the source decides: `.qcow2`, `.vmdk`, otherwise raw.
    #[serde(default)]
    pub format: Option<Format>,
    /// The images below it, the nearest first, 16 at most.
    #[serde(default)]
    pub backing: Vec<Below>,
    /// Name of a registered base whose images lie below those, with its options for servers.
    #[serde(default)]
    pub onto: Option<String>,
    /// SHA-256 of the image file, 64 hexadecimal digits. Not with `sha512`.
    #[serde(default)]
    pub sha256: Option<String>,
    /// SHA-512 of the image file, 128 hexadecimal digits. Not with `sha256`.
    #[serde(default)]
    pub sha512: Option<String>,
    /// BLAKE3 hash of the image file, 64 hexadecimal digits. With a proof each part of the image is proven by it;
    /// without one, the whole is compared with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blake3: Option<String>,
    /// Absolute path or URL of the proof of the image. By default a proof beside the image, with `.obao` behind its name,
    /// is used when there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proof: Option<String>,
    /// Whether no proof is used, although there is one. Not with `proof`.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub no_proof: bool,
    /// Which validators of a server's answer must still match. The default is strong.
    #[serde(default)]
    pub identity: Option<Identity>,
    /// Seconds after which a read that waits for the server fails, 366 days at most. By default, and with 0, it waits
    /// until the server answers.
    #[serde(default)]
    #[schema(maximum = 31622400)]
    pub deadline_seconds: Option<u32>,
    /// Most requests at a time. By default the daemon's limit.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 256)]
    pub max_requests: Option<u32>,
    /// Most bytes per second. By default there is no limit.
    #[serde(default)]
    #[schema(minimum = 65536)]
    pub max_rate: Option<u64>,
    /// Whether its fetched data is never evicted to make room.
    #[serde(default)]
    pub pinned: bool,
    /// Whether all of an image of a Glance is fetched once, in the background, because its store has no ranges. Reads wait
    /// until their bytes are here.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub download: bool,
}

/// An image below an image, in a request.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Below {
    /// Absolute path or URL.
    pub source: String,
    /// Its format, with the same default as that of the image.
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
                "format {other:?} is not supported; give raw, qcow2 or vmdk, or convert the image with: qemu-img \
                 convert -O qcow2"
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
            other => Err(format!("identity {other:?} is not known; give strong, weak or size")),
        }
    }
}

/// Other URLs of the same image.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SetUrls {
    /// The URL that the daemon asks first.
    pub source: String,
    /// The mirrors. By default they stay as they are.
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
    /// Whether reads fail when they would wait for its servers, present and future ones.
    pub given_up: bool,
}

/// Whether a base is pinned.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    /// Whether its fetched data is never evicted to make room.
    pub pinned: bool,
    /// Copies of its fetched data, with the one in the store: each other one lies in another pool. By default as many as
    /// before. A base that is not pinned has one.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 8)]
    pub copies: Option<u8>,
}

/// How fast a base is hydrated.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Hydrate {
    /// Most bytes per second, 1 at least. By default the configured rate.
    #[serde(default)]
    #[schema(minimum = 1)]
    pub rate: Option<u64>,
}

/// How a base is evicted.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Evict {
    /// Whether the data of a hydrated base is dropped although its original is gone, changed or out of reach. By default
    /// the daemon refuses that.
    #[serde(default)]
    pub force: bool,
}

/// The result of an eviction.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Evicted {
    /// Name of the base.
    pub name: String,
    /// Bytes that were dropped.
    pub evicted_bytes: u64,
    /// Bytes that stay, because another base has the same contents and is pinned or hydrated.
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
    /// Path or URL from which the image is read now.
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
    /// How many disks use it, those in the trash included.
    pub disks: u64,
    /// How many of these disks are in the trash.
    pub trashed_disks: u64,
    /// Bytes of the store that are free when these are purged.
    pub trashed_bytes: u64,
    /// When something needed it last, to about ten minutes; null while a disk uses it.
    #[schema(format = DateTime)]
    pub last_used: Option<String>,
    /// Bytes of it that are cached: in the store, or in memory when the store keeps none of its files.
    pub cached_bytes: u64,
    /// Percent of its files that is in the store; null when the store keeps none of its files.
    pub cached_percent: Option<f64>,
    /// Bytes of it in the memory cache.
    pub memory_bytes: u64,
    /// Whether its data in the store is never evicted to make room.
    pub pinned: bool,
    /// How many copies of its data there are to be, with the one in the store.
    pub copies: u8,
    /// The copies in pools.
    pub further_copies: Vec<FurtherCopy>,
    /// Whether all of it is in the store.
    pub complete: bool,
    /// Whether its data in the store was compared with the digest and matches.
    pub digest_verified: bool,
    /// SHA-256 that the image was registered with.
    pub sha256: Option<String>,
    /// SHA-512 that the image was registered with.
    pub sha512: Option<String>,
    /// BLAKE3 hash of the image: that of its proof, or the one that it was registered with.
    pub blake3: Option<String>,
    /// Path or URL of the proof of the image; null when it has none. With a proof no unproven byte is read.
    pub proof: Option<String>,
    /// ETag of the image at registration.
    pub etag: Option<String>,
    /// Last-Modified of the image at registration.
    pub last_modified: Option<String>,
    /// The version of the object that plyfs reads, of a bucket that keeps versions.
    pub version_id: Option<String>,
    /// Which validators must still match.
    pub identity: Identity,
    /// Seconds after which a read that waits for the server fails; null when it waits until the server answers.
    pub deadline_seconds: Option<u32>,
    /// Most requests at a time; null for the daemon's limit.
    pub max_requests: Option<u32>,
    /// Most bytes per second; null when there is no limit.
    pub max_rate: Option<u64>,
    /// When it was registered.
    #[schema(format = DateTime)]
    pub created: String,
    /// Its state.
    pub state: BaseState,
    /// Since when it is in this state; null for a state that has no beginning.
    #[schema(format = DateTime)]
    pub state_since: Option<String>,
    /// Why it cannot be used, or the last error that its readers got.
    pub error: Option<String>,
    /// While its files on this host do not answer: when they were examined last. `state` and `error` are as of then. Null
    /// while they answer, and when they have not answered yet.
    #[schema(format = DateTime)]
    pub examined: Option<String>,
    /// Why its data in the store is neither read nor written.
    pub cache_error: Option<String>,
    /// The last hydration or verification of this worker.
    pub work: Option<Work>,
    /// Since when reads wait for its server, or for its file on this host.
    #[schema(format = DateTime)]
    pub waiting_since: Option<String>,
    /// Why reads wait.
    pub waiting_for: Option<String>,
    /// Since when its readers get errors.
    #[schema(format = DateTime)]
    pub failing_since: Option<String>,
    /// Its URLs, those of its proof behind them, and their last failures, once it was read.
    pub servers: Vec<Server>,
}

/// The state of a base: the first of these that applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BaseState {
    /// Its contents do not have the digest that it was registered with.
    Refused,
    /// It cannot be used; `error` says why.
    Failed,
    /// Its operator has given it up.
    GivenUp,
    /// Its server has another object now; reads of missing bytes wait.
    Changed,
    /// Its readers get errors.
    Failing,
    /// Reads of missing bytes wait for its server, or for a file on this host that does not answer.
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

/// A copy of the fetched data of a base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct FurtherCopy {
    /// Name of the pool that it is in.
    pub pool: String,
    /// Bytes of the base that are there.
    pub bytes: u64,
    /// Whether it had all data that the store has when the two were compared last.
    pub current: bool,
    /// Why it takes no data, or cannot be read.
    pub error: Option<String>,
}

/// A URL of a base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Server {
    /// The URL, without query and user info.
    pub url: String,
    /// Its last failure; null while it works.
    pub trouble: Option<String>,
}

/// Work on a whole base.
#[derive(Clone, Debug, Default, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Work {
    /// The job that does it, see `/v1/jobs`.
    pub job: String,
    /// The kind of work.
    pub what: WorkKind,
    /// Its progress.
    pub state: WorkState,
    /// Bytes that were fetched, or compared.
    pub bytes: u64,
    /// Bytes in all.
    pub total: u64,
    /// Bytes per second since the work began.
    pub rate: u64,
    /// Whether the digest matches; null without a digest, and before the comparison.
    pub digest_matches: Option<bool>,
    /// Why it failed, waits or was cancelled.
    pub error: Option<String>,
}

/// A kind of work on a whole base or disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkKind {
    /// All of the base is fetched, then compared.
    #[default]
    Hydrate,
    /// The base is compared.
    Verify,
    /// A disk is made independent of its base.
    Flatten,
    /// A disk is put on another base.
    Rebase,
    /// Layers of a disk are merged.
    Compact,
    /// A disk is copied to another pool.
    Move,
    /// A client writes a disk to a file.
    Export,
    /// A client fills a disk from a file.
    Import,
}

impl WorkKind {
    /// Its name in answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hydrate => "hydrate",
            Self::Verify => "verify",
            Self::Flatten => "flatten",
            Self::Rebase => "rebase",
            Self::Compact => "compact",
            Self::Move => "move",
            Self::Export => "export",
            Self::Import => "import",
        }
    }
}

/// The progress of work on a whole base or disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum WorkState {
    /// Bytes arrive.
    #[default]
    Fetching,
    /// No bytes arrive; the work resumes by itself.
    Waiting,
    /// The data is compared with the digest.
    Verifying,
    /// Blocks of a disk are compared and copied, or a client copies them.
    Copying,
    /// The work succeeded.
    Done,
    /// The work failed.
    Failed,
    /// A request ended the work early.
    Cancelled,
}

impl WorkState {
    /// Its name in answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fetching => "fetching",
            Self::Waiting => "waiting",
            Self::Verifying => "verifying",
            Self::Copying => "copying",
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
