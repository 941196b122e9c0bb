//! Bases: adding them, what is known of them, and what is kept of them.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{Answer, ApiError, Control, blocking, hex, rfc3339, unhex};
use crate::daemon::sources::options_of;
use crate::fetch::kept::{Contents, Reach};
use crate::format::record::{
    BaseIdentity, BaseOptions, Digest, ImageFile, ImageFormat, Strictness, Validator,
};
use crate::source::http::{check_url, shown};
use crate::store::{BaseNode, NewBase, NewFile, StoreError};

/// Longest of a deadline: a year.
const MAX_DEADLINE: u32 = 366 * 24 * 3600;

/// A new base. `source` and each of `backing` is a path or a URL, `mirrors` are URLs of the same content.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AddBase {
    name: String,
    source: String,
    #[serde(default)]
    mirrors: Vec<String>,
    format: Option<String>,
    #[serde(default)]
    backing: Vec<Backing>,
    sha256: Option<String>,
    sha512: Option<String>,
    /// `strong`, `weak` or `size`.
    identity: Option<String>,
    /// Seconds; 0 or nothing: never.
    deadline_seconds: Option<u32>,
    max_requests: Option<u32>,
    /// Bytes per second.
    max_rate: Option<u64>,
    #[serde(default)]
    pinned: bool,
}

/// A file below an image.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Backing {
    source: String,
    format: Option<String>,
}

pub(super) fn is_url(source: &str) -> bool {
    source.contains("://")
}

/// The format that was given, or else the one that the name says. The contents are never asked.
fn format_of(given: Option<&str>, source: &str) -> Result<ImageFormat, ApiError> {
    let path = if is_url(source) { source.split(['?', '#']).next().unwrap_or(source) } else { source };
    match given {
        Some("raw") => Ok(ImageFormat::Raw),
        Some("qcow2") => Ok(ImageFormat::Qcow2),
        Some("vmdk") => Ok(ImageFormat::Vmdk),
        Some(other) => Err(ApiError::invalid(format!(
            "format {other:?} is not served; it is raw, qcow2 or vmdk, others are converted with: qemu-img convert \
             -O qcow2"
        ))),
        None if path.ends_with(".qcow2") => Ok(ImageFormat::Qcow2),
        None if path.ends_with(".vmdk") => Ok(ImageFormat::Vmdk),
        None => Ok(ImageFormat::Raw),
    }
}

/// As it is shown: a path as it is, a URL without what may be secret.
fn shown_source(source: &str) -> String {
    if is_url(source) { shown(source) } else { source.to_owned() }
}

fn format_name(format: ImageFormat) -> &'static str {
    match format {
        ImageFormat::Raw => "raw",
        ImageFormat::Qcow2 => "qcow2",
        ImageFormat::Vmdk => "vmdk",
    }
}

fn strictness_name(strictness: Strictness) -> &'static str {
    match strictness {
        Strictness::Strong => "strong",
        Strictness::Weak => "weak",
        Strictness::SizeOnly => "size",
    }
}

impl AddBase {
    fn options(&self) -> Result<BaseOptions, ApiError> {
        let strictness = match self.identity.as_deref() {
            None | Some("strong") => Strictness::Strong,
            Some("weak") => Strictness::Weak,
            Some("size") => Strictness::SizeOnly,
            Some(other) => {
                return Err(ApiError::invalid(format!(
                    "identity {other:?} is not known; it is strong, weak or size"
                )));
            }
        };
        let deadline_s = self.deadline_seconds.unwrap_or(0);
        if deadline_s > MAX_DEADLINE {
            return Err(ApiError::invalid(
                "deadline: it is at most 366 days; leave it away to wait for ever",
            ));
        }
        if self.max_requests.is_some_and(|n| !(1..=256).contains(&n)) {
            return Err(ApiError::invalid("max_requests: it is 1 to 256"));
        }
        if self.max_rate.is_some_and(|n| n < 64 << 10) {
            return Err(ApiError::invalid("max_rate: it is at least 64K per second"));
        }
        Ok(BaseOptions {
            strictness,
            deadline_s,
            max_requests: self.max_requests.unwrap_or(0),
            max_rate: self.max_rate.unwrap_or(0),
            pinned: self.pinned,
            hydrate: false,
            refused: false,
            given_up: false,
        })
    }

    fn digest(&self) -> Result<Option<Digest>, ApiError> {
        match (&self.sha256, &self.sha512) {
            (Some(_), Some(_)) => Err(ApiError::invalid("give sha256 or sha512, not both")),
            (Some(text), None) => Ok(Some(Digest::Sha256(unhex("sha256", text)?))),
            (None, Some(text)) => Ok(Some(Digest::Sha512(unhex("sha512", text)?))),
            (None, None) => Ok(None),
        }
    }
}

/// A URL's identity and first bytes, from its server; nothing for a path.
pub(super) async fn probe(
    c: &Control,
    object: &str,
    urls: &[String],
    options: &BaseOptions,
) -> Result<Option<(BaseIdentity, Vec<u8>)>, ApiError> {
    let wrap = |source| ApiError::from(StoreError::Source { object: object.to_owned(), source });
    let [first, mirrors @ ..] = urls else { return Ok(None) };
    if !is_url(first) {
        return match mirrors {
            [] => Ok(None),
            _ => Err(ApiError::invalid(format!("{object}: mirrors are of URLs; the source is a path"))),
        };
    }
    urls.iter().try_for_each(|url| check_url(url)).map_err(wrap)?;
    let (http, urls, options) = (c.sources.http().clone(), urls.to_vec(), options_of(options));
    let asked = c.sources.handle().spawn(async move { http.probe(&urls, &options).await });
    let probed =
        asked.await.map_err(|_| ApiError::invalid(format!("{object}: asking its server was given up")))?;
    let probed = probed.map_err(wrap)?;
    let validator =
        Validator::Http { etag: probed.identity.etag, last_modified: probed.identity.last_modified };
    Ok(Some((BaseIdentity { size: probed.identity.size, validator, digest: None }, probed.head)))
}

/// Refuses a path on the daemon's own mount: a base there would wait for itself.
fn check_path(c: &Control, object: &str, source: &str) -> Result<(), ApiError> {
    if !is_url(source) && std::fs::canonicalize(source).is_ok_and(|path| path.starts_with(&c.config.mount)) {
        let why = format!("{source} lies on this daemon's own mount; give a file of another filesystem");
        return Err(StoreError::Invalid { object: object.to_owned(), why }.into());
    }
    Ok(())
}

pub(super) async fn add(State(c): State<Control>, body: Result<Json<AddBase>, JsonRejection>) -> Answer {
    let Json(new) = body?;
    let object = format!("base {}", new.name);
    let (options, digest) = (new.options()?, new.digest()?);
    let format = format_of(new.format.as_deref(), &new.source)?;
    // Before a server is asked for nothing.
    c.store.may_register(&new.name)?;
    let urls: Vec<String> = std::iter::once(&new.source).chain(&new.mirrors).cloned().collect();
    let probed = probe(&c, &object, &urls, &options).await?;
    let head = probed.as_ref().map(|(_, head)| head.clone());
    let image = NewFile { source: new.source, mirrors: new.mirrors, format, probed };
    let mut backing = Vec::new();
    for file in new.backing {
        let format = format_of(file.format.as_deref(), &file.source)?;
        let probed = probe(&c, &object, std::slice::from_ref(&file.source), &options).await?;
        backing.push(NewFile { source: file.source, mirrors: Vec::new(), format, probed });
    }
    let new = NewBase { name: new.name, image, backing, digest, options };
    blocking(move || {
        for file in std::iter::once(&new.image).chain(&new.backing) {
            check_path(&c, &object, &file.source)?;
        }
        let node = c.store.register(new)?;
        if let Some(head) = head {
            keep_head(&c.sources.contents(node.record(), &node.record().image), &head);
        }
        if c.config.hydrate.auto
            && let Err(error) = c.hydrations.hydrate(&node, None)
        {
            // It is a base all the same.
            tracing::warn!(%error, "a new base is not hydrated");
        }
        Ok(c.base(&node, 0))
    })
    .await
}

/// What was asked for to learn the identity need not be asked for again.
fn keep_head(kept: &Contents, head: &[u8]) {
    let block = crate::fetch::kept::CACHE_BLOCK as usize;
    let whole = if head.len() as u64 == kept.size() { head.len() } else { head.len() / block * block };
    if whole > 0 {
        kept.insert(0, &head[..whole]);
    }
}

pub(super) async fn list(State(c): State<Control>) -> Answer {
    blocking(move || {
        let users = c.store.users();
        let count = |b: &BaseNode| users.get(&b.id()).map_or(0, Vec::len);
        Ok(c.store.bases().iter().map(|b| c.base(b, count(b))).collect())
    })
    .await
}

pub(super) async fn show(State(c): State<Control>, Path(name): Path<String>) -> Answer {
    blocking(move || {
        let node = c.store.base(&name)?;
        Ok(c.base(&node, c.users_of(&node)))
    })
    .await
}

pub(super) async fn remove(State(c): State<Control>, Path(name): Path<String>) -> Answer {
    blocking(move || {
        let node = c.store.base(&name)?;
        c.store.remove_base(&name)?;
        c.hydrations.forget(node.id());
        c.sources.forget(node.record(), &c.others(&node));
        Ok(json!({"removed": [name]}))
    })
    .await
}

impl Control {
    pub(super) fn users_of(&self, node: &BaseNode) -> usize {
        self.store.users().get(&node.id()).map_or(0, Vec::len)
    }

    /// Those of its files that are kept block by block.
    pub(super) fn fetched_files<'a>(&self, node: &'a BaseNode) -> impl Iterator<Item = &'a ImageFile> {
        let hydrate = node.options().hydrate;
        let record = node.record();
        std::iter::once(&record.image)
            .chain(&record.backing)
            .filter(move |file| hydrate || matches!(file.identity.validator, Validator::Http { .. }))
    }

    pub(super) fn base(&self, node: &BaseNode, disks: usize) -> Value {
        let record = node.record();
        let options = node.options();
        let (sha256, sha512) = match &record.image.identity.digest {
            Some(Digest::Sha256(d)) => (Some(hex(d)), None),
            Some(Digest::Sha512(d)) => (None, Some(hex(d))),
            None => (None, None),
        };
        let (etag, last_modified) = match &record.image.identity.validator {
            Validator::Http { etag, last_modified } => (etag.as_deref(), last_modified.as_deref()),
            Validator::File { .. } => (None, None),
        };
        let kept: Vec<_> = self.fetched_files(node).map(|file| self.sources.contents(record, file)).collect();
        let (kept_bytes, all): (u64, u64) = kept
            .iter()
            .fold((0, 0), |(bytes, all), kept| (bytes + kept.cached_bytes(Reach::Proven), all + kept.size()));
        let percent =
            if all == 0 { None } else { Some((kept_bytes as f64 * 1000.0 / all as f64).floor() / 10.0) };
        let verified = !kept.is_empty() && kept.iter().all(|kept| kept.is_verified());
        let state = self.state(node);
        let urls = node.current().urls_of(&record.image);
        let backing: Vec<Value> = record
            .backing
            .iter()
            .map(|file| json!({"source": shown_source(&file.source), "format": format_name(file.format)}))
            .collect();
        json!({
            "id": record.id,
            "name": record.name,
            "path": self.config.mount.join(format!("bases/{}.raw", record.name)),
            "source": shown_source(&urls[0]),
            "mirrors": urls[1..].iter().map(|url| shown(url)).collect::<Vec<_>>(),
            "backing": backing,
            "format": format_name(record.image.format),
            "size": record.size(),
            "source_size": record.image.identity.size,
            "disks": disks,
            "cached_bytes": if kept.is_empty() { node.cached_bytes() } else { kept_bytes },
            "cached_percent": percent,
            "memory_bytes": node.cached_bytes(),
            "pinned": options.pinned || options.hydrate,
            "complete": !kept.is_empty() && kept.iter().all(|kept| kept.is_complete(Reach::Proven)),
            "digest_verified": verified,
            "sha256": sha256,
            "sha512": sha512,
            "etag": etag,
            "last_modified": last_modified,
            "identity": strictness_name(options.strictness),
            "deadline_seconds": (options.deadline_s > 0).then_some(options.deadline_s),
            "max_requests": (options.max_requests > 0).then_some(options.max_requests),
            "max_rate": (options.max_rate > 0).then_some(options.max_rate),
            "created": rfc3339(record.created_ns),
            "state": state.state,
            "state_since": state.since.map(super::time),
            "error": state.error,
            "cache_error": kept.iter().find_map(|kept| kept.trouble()),
            "work": self.hydrations.progress(record.id),
            "waiting_since": state.health.stall.as_ref().map(|stall| super::time(stall.since)),
            "waiting_for": state.health.stall.map(|stall| stall.why),
            "failing_since": state.health.failing.map(|failing| super::time(failing.since)),
            "servers": state.health.urls.iter().map(|url| json!({"url": url.url, "trouble": url.trouble})).collect::<Vec<_>>(),
        })
    }

    /// The memory cache, and the one of fetched blocks.
    pub(super) fn cache(&self) -> Value {
        let mut stats = json!(self.store.cache().stats());
        stats["disk"] = json!(self.sources.cache().stats());
        stats
    }
}
