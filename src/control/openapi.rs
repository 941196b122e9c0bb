//! The description of `/v1`, generated from the routes and the types of their bodies.
//!
//! What must hold: the description has every route and no other (`tests/api.rs` compares it with the router); the
//! daemon's answers follow it (`tests/fuse/api.rs`). docs/api.md is generated from it.

use std::sync::LazyLock;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use utoipa::OpenApi;

use super::error::Cause;
use super::wire::ErrorKind;
use super::{
    bases, changes, clients, clouds, disks, encryption, events, extents, jobs, kept, limits, maps, metrics,
    pools, servers, snapshots, stats, status, traces, trash, wire,
};

/// The pattern of a name in a path. The daemon refuses other names.
const NAME: &str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$";
/// The pattern of the number of a disk.
const NUMBER: &str = "^[0-9]{1,20}$";
/// The pattern of the identifier of a job.
const JOB: &str =
    "^(hydrate|verify|flatten|rebase|compact|move|export|import)-[A-Za-z0-9][A-Za-z0-9._-]{0,160}$";

/// The bodies of requests. Their types say which keys are required. In an answer all keys are required.
const REQUESTS: [&str; 23] = [
    "AddBase",
    "AddPool",
    "Below",
    "Change",
    "ClientJob",
    "CreateDisks",
    "Evict",
    "Fail",
    "Hydrate",
    "Move",
    "Pin",
    "PruneBases",
    "Rebase",
    "Resize",
    "RestoreDisk",
    "Rollback",
    "SetLimits",
    "KeyReference",
    "Shred",
    "SetUrls",
    "Stop",
    "TakeSnapshot",
    "UpgradeTo",
];

/// The optional keys of answers.
const OPTIONAL_KEYS: [(&str, &[&str]); 3] = [
    ("Event", &["at", "base", "disk", "bytes", "count", "reason", "since", "number"]),
    ("Status", &["worker_not_answering_since", "worker_not_answering_why"]),
    (
        "Trace",
        &[
            "recorded_on",
            "recorded",
            "size",
            "origin",
            "entries",
            "bytes",
            "duration_ms",
            "prefetch_ranges",
            "prefetch_bytes",
            "fits",
            "disk",
            "recording",
        ],
    ),
];

const ABOUT: &str = "\
The control socket of plyfs, a Unix socket in the directory of the store: HTTP/1.1 with JSON. Root and the daemon's own user may connect.

- Sizes are bytes, times are RFC 3339 in UTC, unless the name of a key says otherwise.
- Keys are only ever added. A client ignores keys that it does not know. A request with a key that the daemon does not \
know is refused.
- An error is an object with `error.kind` for programs and `error.message` for people. The kind decides the HTTP status.
- When a worker dies, the connection breaks, and the request may or may not have been carried out. A client can repeat \
queries, and changes that have the same result when they are carried out twice.
- A creation with the header `Idempotency-Key` is carried out once: a client that did not get the answer sends the \
request again with the same key, and the answer has the object that the first request created. Of clients that race for \
a name one succeeds.
- 503 with kind `unavailable` means that no worker serves at the moment and nothing was done: send the request again.
- URLs are shown without query and user info.";

/// All routes, by tag.
#[derive(OpenApi)]
#[openapi(
    info(title = "plyfs control API"),
    paths(
        status::status,
        stats::stats,
        metrics::metrics,
        status::stop,
        status::upgrade,
        openapi,
        disks::list,
        disks::create,
        disks::show,
        disks::remove,
        disks::resize,
        limits::set,
        snapshots::list,
        snapshots::take,
        snapshots::remove,
        snapshots::roll_back,
        changes::flatten,
        changes::rebase,
        changes::compact,
        changes::relocate,
        trash::of_disk,
        trash::list,
        trash::restore,
        trash::purge,
        encryption::unlock,
        encryption::rekey,
        encryption::shred,
        maps::disk,
        extents::changed,
        pools::list,
        pools::add,
        pools::show,
        pools::attach,
        pools::remove,
        bases::list,
        bases::add,
        bases::show,
        bases::remove,
        trash::of_base,
        trash::prune,
        maps::base,
        servers::set,
        servers::fail,
        kept::pin,
        kept::evict,
        kept::hydrate,
        kept::verify,
        clouds::list,
        clouds::images,
        jobs::list,
        jobs::show,
        jobs::cancel,
        clients::announce,
        clients::hold,
        clients::end,
        traces::list,
        traces::show,
        traces::remove,
        traces::export,
        traces::import,
        traces::record,
        traces::stop,
        events::events,
    ),
    components(schemas(wire::ErrorBody)),
    tags(
        (name = "daemon", description = "The daemon: status, stop, upgrade."),
        (name = "disks", description = "Disks: each is one raw file under the mount."),
        (name = "pools", description = "Pools: directories on other drives for the data of disks."),
        (name = "bases", description = "Bases: the shared, read-only images that disks start from."),
        (name = "clouds", description = "Clouds: the images that clouds of OpenStack offer."),
        (name = "jobs", description = "Jobs: work on whole bases in the background, and copies of disks that clients make."),
        (name = "traces", description = "Traces: which blocks the boot of a base reads, so that plyfs fetches them ahead of the next boot."),
        (name = "events", description = "Events of bases and caches."),
    )
)]
struct Api;

/// The description, OpenAPI 3.1.
pub fn document() -> Value {
    // The document has text keys only, so it always encodes.
    let mut document = serde_json::to_value(Api::openapi()).unwrap_or_default();
    let info = &mut document["info"];
    info["description"] = ABOUT.into();
    info["version"] = env!("CARGO_PKG_VERSION").into();
    if let Some(info) = info.as_object_mut() {
        info.remove("license");
        info.remove("contact");
    }
    document["components"]["responses"] = json!({"Refused": {
        "description": "The daemon refused the request, or failed to carry it out.",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}},
    }});
    for (path, item) in document["paths"].as_object_mut().into_iter().flatten() {
        for operation in item.as_object_mut().into_iter().flat_map(|item| item.values_mut()) {
            operation["responses"]["default"] = json!({"$ref": "#/components/responses/Refused"});
        }
        let in_path = [
            ("/v1/disks/{name}", "name", "Name of the disk.", NAME),
            ("/v1/bases/{name}", "name", "Name of the base.", NAME),
            ("/v1/clouds/{name}", "name", "Name of the cloud.", NAME),
            ("/v1/pools/{name}", "name", "Name of the pool.", NAME),
            ("/v1/jobs/{id}", "id", "Identifier of the job.", JOB),
            ("/v1/trash/{id}", "id", "Number of the disk.", NUMBER),
        ];
        for (_, name, text, pattern) in in_path.into_iter().filter(|(prefix, ..)| path.starts_with(prefix)) {
            let parameter = |name: &str, text: &str, pattern: &str| {
                json!({
                    "name": name,
                    "in": "path",
                    "required": true,
                    "description": text,
                    "schema": {"type": "string", "pattern": pattern},
                })
            };
            let mut parameters = vec![parameter(name, text, pattern)];
            if path.ends_with("/{snapshot}") {
                parameters.push(parameter("snapshot", "Name of the snapshot.", NAME));
            }
            item["parameters"] = parameters.into();
        }
    }
    document["components"]["schemas"]["ErrorKind"]["description"] = kinds().into();
    for (name, schema) in document["components"]["schemas"].as_object_mut().into_iter().flatten() {
        if !REQUESTS.contains(&&**name) {
            require_all(name, schema);
        }
    }
    document
}

/// The meaning of each kind of error.
fn kinds() -> String {
    let word = |kind: ErrorKind| serde_json::to_string(&kind).unwrap_or_default().replace('"', "`");
    let line = |cause: Cause| {
        let (kind, status) = (word(cause.kind()), cause.status().as_u16());
        format!("- {kind}, status {status}: {}.\n", cause.meaning())
    };
    let mut text = "The kind of an error, for programs.\n\n".to_owned();
    text.extend(Cause::ALL.map(line));
    text + &format!(
        "- {}, status 503: no worker serves at the moment; nothing was done.",
        word(ErrorKind::Unavailable)
    )
}

/// Marks all keys of an answer as required, except [`OPTIONAL_KEYS`].
fn require_all(name: &str, schema: &mut Value) {
    let optional = OPTIONAL_KEYS.iter().find(|(of, _)| *of == name).map_or(&[][..], |(_, keys)| *keys);
    let Some(properties) = schema["properties"].as_object() else { return };
    let required: Vec<&String> = properties.keys().filter(|key| !optional.contains(&&***key)).collect();
    schema["required"] = json!(required);
}

/// This description
///
/// OpenAPI 3.1, generated from the types of the daemon's answers.
#[utoipa::path(
    get,
    path = "/v1/openapi.json",
    tag = "daemon",
    operation_id = "describe",
    responses((status = 200, description = "The description.", body = Object))
)]
pub(super) async fn openapi() -> Response {
    static TEXT: LazyLock<String> = LazyLock::new(|| document().to_string());
    ([(header::CONTENT_TYPE, "application/json")], TEXT.as_str()).into_response()
}
