//! Routes on bases: add, list, show, remove.

use std::sync::Arc;

use axum::Json;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{Query, State};
use serde::Deserialize;
use utoipa::IntoParams;

use super::idempotency::Key;
use super::wire::{
    self, AddBase, Backing, Base, Below, Format, FurtherCopy, Identity, Removed, Server, Work, rfc3339,
    rfc3339_millis,
};
use super::{Answer, ApiError, Cause, Control, Name, blocking};
use crate::bases::copies::CopyView;
use crate::bases::proofs::Wanted;
use crate::bases::sources::BaseHealth;
use crate::bases::{BaseState, Condition, Delivery, Description, File, Finding};
use crate::fetch::kept::Reach;
use crate::format::record::{Digest, ImageFile, ImageFormat, Strictness, Token};
use crate::source::{Location, shown};
use crate::store::BaseNode;

fn unhex<const N: usize>(key: &str, text: &str) -> Result<[u8; N], ApiError> {
    let bad = |_| ApiError::invalid(format!("{key} is not a digest; give {} hexadecimal digits", 2 * N));
    let mut out = [0; N];
    hex::decode_to_slice(text, &mut out).map_err(bad)?;
    Ok(out)
}

impl From<ImageFormat> for Format {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
            ImageFormat::Vmdk => Self::Vmdk,
        }
    }
}

impl From<Strictness> for Identity {
    fn from(strictness: Strictness) -> Self {
        match strictness {
            Strictness::Strong => Self::Strong,
            Strictness::Weak => Self::Weak,
            Strictness::SizeOnly => Self::Size,
        }
    }
}

impl From<Format> for ImageFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => Self::Raw,
            Format::Qcow2 => Self::Qcow2,
            Format::Vmdk => Self::Vmdk,
        }
    }
}

impl From<Identity> for Strictness {
    fn from(identity: Identity) -> Self {
        match identity {
            Identity::Strong => Self::Strong,
            Identity::Weak => Self::Weak,
            Identity::Size => Self::SizeOnly,
        }
    }
}

impl From<BaseState> for wire::BaseState {
    fn from(state: BaseState) -> Self {
        match state {
            BaseState::Refused => Self::Refused,
            BaseState::Failed => Self::Failed,
            BaseState::GivenUp => Self::GivenUp,
            BaseState::Changed => Self::Changed,
            BaseState::Failing => Self::Failing,
            BaseState::Waiting => Self::Waiting,
            BaseState::Ok => Self::Ok,
        }
    }
}

fn digest(sha256: Option<&str>, sha512: Option<&str>) -> Result<Option<Digest>, ApiError> {
    match (sha256, sha512) {
        (Some(_), Some(_)) => Err(ApiError::invalid("give sha256 or sha512, not both")),
        (Some(text), None) => Ok(Some(Digest::Sha256(unhex("sha256", text)?))),
        (None, Some(text)) => Ok(Some(Digest::Sha512(unhex("sha512", text)?))),
        (None, None) => Ok(None),
    }
}

fn proof(new: &AddBase) -> Result<Wanted, ApiError> {
    if new.no_proof && new.proof.is_some() {
        return Err(ApiError::invalid("give proof or no_proof, not both"));
    }
    if let Some(place) = new.proof.as_ref().filter(|place| !is_place(place)) {
        return Err(ApiError::invalid(format!("proof: {place:?} is neither an absolute path nor a URL")));
    }
    let root = new.blake3.as_deref().map(|text| unhex("blake3", text)).transpose()?;
    Ok(Wanted { root, place: new.proof.clone(), none: new.no_proof })
}

fn is_place(place: &str) -> bool {
    let location = Location::of(place);
    let is_path = matches!(location, Location::File(path) if path.is_absolute() && !place.contains('\0'));
    is_path || location.is_url()
}

fn description(new: AddBase, token: Option<Token>) -> Result<Description, ApiError> {
    let proof = proof(&new)?;
    let digest = digest(new.sha256.as_deref(), new.sha512.as_deref())?;
    let file =
        |source, mirrors, format: Option<Format>| File { source, mirrors, format: format.map(Into::into) };
    let below = |below: Below| file(below.source, Vec::new(), below.format);
    Ok(Description {
        name: new.name,
        image: file(new.source, new.mirrors, new.format),
        backing: new.backing.into_iter().map(below).collect(),
        onto: new.onto,
        digest,
        proof,
        strictness: new.identity.unwrap_or_default().into(),
        deadline_s: new.deadline_seconds,
        max_requests: new.max_requests,
        max_rate: new.max_rate,
        pinned: new.pinned,
        delivery: if new.download { Delivery::Whole } else { Delivery::Ranges },
        token,
    })
}

/// Register a base
///
/// The daemon copies and converts nothing. It asks a server once, for the identity of its object.
#[utoipa::path(
    post,
    path = "/v1/bases",
    tag = "bases",
    operation_id = "add_base",
    params(Key),
    request_body = AddBase,
    responses((status = 200, description = "The base.", body = Base))
)]
pub(super) async fn add(
    State(c): State<Control>,
    key: Key,
    body: Result<Json<AddBase>, JsonRejection>,
) -> Answer<Base> {
    let Json(new) = body?;
    let token = key.token("base", &new);
    let prepared = c.bases.prepare(description(new, token)?).await?;
    blocking(move || Ok(c.base(&c.bases.add(prepared)?))).await
}

/// List the bases
///
/// The daemon checks the bases' files on this host. It waits for none that hangs: of such a base it answers with what
/// it found last.
#[utoipa::path(
    get,
    path = "/v1/bases",
    tag = "bases",
    operation_id = "list_bases",
    responses((status = 200, description = "Bases in the order of their numbers.", body = Vec<Base>))
)]
pub(super) async fn list(State(c): State<Control>) -> Answer<Vec<Base>> {
    blocking(move || {
        let users = c.store.user_counts();
        let count = |b: &BaseNode| users.get(&b.id()).map_or(0, |count| *count as usize);
        let bases = c.store.bases();
        let findings = c.bases.examine(&bases);
        let trash = c.trash_of_bases();
        let listed = bases.iter().zip(findings);
        let users = |base: &BaseNode| (count(base), trash.get(&base.id()).copied().unwrap_or_default());
        Ok(listed.map(|(base, finding)| c.base_with(base, users(base), finding)).collect())
    })
    .await
}

/// Show a base
///
/// The daemon checks the base's files on this host, and waits for none that hangs. It asks no server.
#[utoipa::path(
    get,
    path = "/v1/bases/{name}",
    tag = "bases",
    operation_id = "show_base",
    responses((status = 200, description = "The base.", body = Base))
)]
pub(super) async fn show(State(c): State<Control>, Name(name): Name) -> Answer<Base> {
    blocking(move || Ok(c.base(&c.store.base(&name)?))).await
}

/// Whether a removal may take a base from clients that have its own file open.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Removal {
    /// Remove the base although a client has its file open.
    #[serde(default)]
    force: bool,
}

/// Remove a base
///
/// Refused while a disk needs the base, in the trash too, and while a client has the base's own file open, unless `force`
/// is set: then its reads fail. The image itself does not change.
#[utoipa::path(
    delete,
    path = "/v1/bases/{name}",
    tag = "bases",
    operation_id = "remove_base",
    params(Removal),
    responses((status = 200, description = "The base is removed.", body = Removed))
)]
pub(super) async fn remove(
    State(c): State<Control>,
    Name(name): Name,
    query: Result<Query<Removal>, QueryRejection>,
) -> Answer<Removed> {
    let Query(Removal { force }) = query?;
    blocking(move || {
        let base = c.store.base(&name)?;
        if !force && c.bases.users(&base) == 0 && c.service.may_have_open(&base) {
            let (cause, state) = match base.open_handles() {
                Some(_) => (Cause::InUse, "a client has its file open"),
                None => (Cause::MayBeInUse, "a client may have its file open since an earlier worker"),
            };
            let why = format!("base {name}: {state}; close it first, or set force (--force)");
            return Err(ApiError::new(cause, why));
        }
        c.bases.remove(&name)?;
        Ok(Removed { removed: vec![name] })
    })
    .await
}

impl Control {
    pub(super) fn base(&self, node: &Arc<BaseNode>) -> Base {
        let finding = self.bases.examine(std::slice::from_ref(node)).pop().unwrap_or_default();
        let trash = self.trash_of_bases().remove(&node.id()).unwrap_or_default();
        self.base_with(node, (self.bases.users(node), trash), finding)
    }

    /// `trash`: how many of the disks are in the trash, and their bytes.
    fn base_with(&self, node: &BaseNode, (disks, trash): (usize, (u64, u64)), finding: Finding) -> Base {
        let record = node.record();
        let options = node.options();
        let (sha256, sha512) = match &record.image.identity.digest {
            Some(Digest::Sha256(d)) => (Some(hex::encode(d)), None),
            Some(Digest::Sha512(d)) => (None, Some(hex::encode(d))),
            None => (None, None),
        };
        let (etag, last_modified) = record.image.identity.validator.http();
        let kept: Vec<_> =
            self.bases.kept_files(node).map(|file| self.bases.sources().contents(record, file)).collect();
        let (kept_bytes, all): (u64, u64) = kept
            .iter()
            .fold((0, 0), |(bytes, all), kept| (bytes + kept.cached_bytes(Reach::Proven), all + kept.size()));
        let percent =
            if all == 0 { None } else { Some((kept_bytes as f64 * 1000.0 / all as f64).floor() / 10.0) };
        let verified = !kept.is_empty() && kept.iter().all(|kept| kept.is_verified_now() == Some(true));
        let Condition { state, since, error, health, examined } = self.bases.condition(node, finding);
        let urls = node.current().urls_of(&record.image);
        let shown_backing =
            |file: &ImageFile| Backing { source: shown(&file.source), format: file.format.into() };
        let BaseHealth { stall, failing, urls: servers } = health;
        let waiting_since = stall.as_ref().map(|stall| rfc3339_millis(stall.since));
        Base {
            id: record.id,
            name: record.name.clone(),
            path: self.config.mount.join(format!("bases/{}.raw", record.name)).display().to_string(),
            source: shown(&urls[0]),
            mirrors: urls[1..].iter().map(|url| shown(url)).collect(),
            backing: record.backing.iter().map(shown_backing).collect(),
            format: record.image.format.into(),
            size: record.size(),
            source_size: record.image.identity.size,
            disks: disks as u64,
            trashed_disks: trash.0,
            trashed_bytes: trash.1,
            last_used: (disks == 0).then(|| rfc3339(self.store.last_used(node))),
            cached_bytes: if kept.is_empty() { node.cached_bytes() } else { kept_bytes },
            cached_percent: percent,
            memory_bytes: node.cached_bytes(),
            pinned: options.retains(),
            copies: options.copies.map_or(1, |copies| copies.count),
            further_copies: self.bases.copies(node).into_iter().map(FurtherCopy::from).collect(),
            complete: !kept.is_empty()
                && kept.iter().all(|kept| kept.is_complete_now(Reach::Proven) == Some(true)),
            digest_verified: verified,
            sha256,
            sha512,
            blake3: record.image.proof.as_ref().map(|proof| hex::encode(proof.root)),
            proof: record.image.proof.as_ref().and_then(|proof| Some(shown(proof.places.first()?))),
            etag: etag.map(str::to_owned),
            last_modified: last_modified.map(str::to_owned),
            version_id: record.image.identity.validator.version().map(str::to_owned),
            identity: options.strictness.into(),
            deadline_seconds: (options.deadline_s > 0).then_some(options.deadline_s),
            max_requests: (options.max_requests > 0).then_some(options.max_requests),
            max_rate: (options.max_rate > 0).then_some(options.max_rate),
            created: rfc3339(record.created_ns),
            state: state.into(),
            state_since: since.map(rfc3339_millis),
            error,
            examined: examined.map(rfc3339_millis),
            cache_error: kept.iter().find_map(|kept| kept.trouble()),
            work: self.bases.progress(record.id).map(|progress| Work::on(&record.name, progress)),
            waiting_since,
            waiting_for: stall.map(|stall| stall.why),
            failing_since: failing.map(|failing| rfc3339_millis(failing.since)),
            servers: servers.into_iter().map(|url| Server { url: url.url, trouble: url.trouble }).collect(),
        }
    }
}

impl From<CopyView> for FurtherCopy {
    fn from(CopyView { pool, bytes, is_current, trouble }: CopyView) -> Self {
        Self { pool, bytes, current: is_current, error: trouble }
    }
}
