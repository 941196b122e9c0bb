//! The servers of bases: where a base is from now on, that it is given up, and how it is.

use axum::Json;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use serde::Deserialize;
use serde_json::{Value, json};

use super::bases::probe;
use super::{Answer, ApiError, Control, blocking};
use crate::daemon::sources::BaseHealth;
use crate::format::record::{BaseIdentity, BaseOptions, Validator};
use crate::source::http::{HttpIdentity, shown};
use crate::source::{SourceError, SourceErrorKind, StallKind};
use crate::store::{BaseNode, StoreError};

/// URLs of the same content in place of those that a file of a base has.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct SetUrls {
    source: String,
    /// Without it the mirrors stay.
    mirrors: Option<Vec<String>>,
    /// 0 is the image, 1 the file below it.
    #[serde(default)]
    file: u8,
}

/// Replaces URLs. The new ones are asked first: they have to have the object that was registered.
pub(super) async fn set(
    State(c): State<Control>,
    Path(name): Path<String>,
    body: Result<Json<SetUrls>, JsonRejection>,
) -> Answer {
    let Json(SetUrls { source, mirrors, file: number }) = body?;
    let object = format!("base {name}");
    let node = c.store.base(&name)?;
    let record = node.current();
    let Some(file) = record.files().nth(number.into()).cloned() else {
        return Err(ApiError::invalid(format!("{object}: it has {} files", 1 + record.backing.len())));
    };
    let Validator::Http { etag, last_modified } = file.identity.validator.clone() else {
        return Err(ApiError::invalid(format!(
            "{object}: its source is a file of this host, which has no URL; add the URL as a new base"
        )));
    };
    let mirrors = mirrors.unwrap_or_else(|| record.urls_of(&file).split_off(1));
    let urls: Vec<String> = std::iter::once(source).chain(mirrors).collect();
    // The new URL alone: mirrors that are away are no hindrance, and are held to the identity when they are read.
    let Some((found, head)) = probe(&c, &object, &urls[..1], &record.options).await? else {
        return Err(ApiError::invalid(format!("{object}: {} is not a URL", shown(&urls[0]))));
    };
    let pinned = HttpIdentity { size: file.identity.size, etag, last_modified };
    same(&pinned, &found, &record.options, &urls[0])
        .map_err(|source| StoreError::Source { object: object.clone(), source })?;
    blocking(move || {
        let wrap = |source| StoreError::Source { object: object.clone(), source };
        urls.iter().try_for_each(|url| crate::source::http::check_url(url)).map_err(wrap)?;
        if c.sources.differs(&record, &file, &head).map_err(wrap)? {
            return Err(wrap(another(&urls[0], "it begins with other bytes")).into());
        }
        node.set_urls(number, urls.clone())?;
        c.sources.set_urls(&record, &file, &urls).map_err(wrap)?;
        c.sources.give_up(node.id(), false);
        Ok(c.base(&node, c.users_of(&node)))
    })
    .await
}

fn same(
    pinned: &HttpIdentity,
    found: &BaseIdentity,
    options: &BaseOptions,
    url: &str,
) -> Result<(), SourceError> {
    let Validator::Http { etag, last_modified } = &found.validator else { return Ok(()) };
    let found = HttpIdentity { size: found.size, etag: etag.clone(), last_modified: last_modified.clone() };
    let strictness = crate::daemon::sources::options_of(options).strictness;
    pinned.fits(strictness, &found).map_err(|why| another(url, &why))
}

fn another(url: &str, why: &str) -> SourceError {
    let why = format!("it is another object than the base's: {why}");
    let advice = "give a URL of the same content, or add it as a new base";
    SourceError::remote(SourceErrorKind::Changed, "use", shown(url), why, advice)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Fail {
    given_up: bool,
}

/// Gives a base up, or no longer: what waits for its servers ends with an error.
pub(super) async fn fail(
    State(c): State<Control>,
    Path(name): Path<String>,
    body: Result<Json<Fail>, JsonRejection>,
) -> Answer {
    let Json(Fail { given_up }) = body?;
    blocking(move || {
        let node = c.store.base(&name)?;
        if !node.record().files().any(|file| matches!(file.identity.validator, Validator::Http { .. })) {
            let why =
                format!("base {name}: its source is a file of this host; reads of it wait for no server");
            return Err(ApiError::invalid(why));
        }
        node.set_options(|options| options.given_up = given_up)?;
        c.sources.give_up(node.id(), given_up);
        Ok(c.base(&node, c.users_of(&node)))
    })
    .await
}

/// The state of a base, as it is shown.
pub(super) struct Shown {
    pub state: &'static str,
    pub since: Option<std::time::SystemTime>,
    pub error: Option<String>,
    pub health: BaseHealth,
}

impl Control {
    /// How a base is: what an operator has to know of it comes first.
    pub(super) fn state(&self, node: &BaseNode) -> Shown {
        let options = node.options();
        let health = self.sources.health(node.id());
        let problem = node.problem();
        let (stall, failing) = (health.stall.as_ref(), health.failing.as_ref());
        let (state, since) = match (stall, failing) {
            _ if options.refused => ("refused", None),
            _ if problem.is_some() => ("failed", None),
            _ if options.given_up => ("given_up", None),
            (Some(stall), _) if stall.kind == StallKind::Changed => ("changed", Some(stall.since)),
            // Readers were told errors already, and more of them wait.
            (_, Some(failing)) if failing.error.kind() == SourceErrorKind::Changed => {
                ("changed", Some(failing.since))
            }
            (_, Some(failing)) => ("failing", Some(failing.since)),
            (Some(stall), None) => ("waiting", Some(stall.since)),
            (None, None) => ("ok", None),
        };
        let error = problem.or_else(|| failing.map(|failing| failing.error.to_string()));
        Shown { state, since, error, health }
    }

    /// Bases whose reads wait for a server or fail.
    pub(super) fn waiting(&self) -> Value {
        let waits = |base: &std::sync::Arc<BaseNode>| {
            let stall = self.sources.health(base.id()).stall?;
            Some(json!({"base": base.record().name, "since": super::time(stall.since), "why": stall.why}))
        };
        self.store.bases().iter().filter_map(waits).collect()
    }

    /// Bases whose readers were told errors, and have got nothing since.
    pub(super) fn failing(&self) -> Value {
        let fails = |base: &std::sync::Arc<BaseNode>| {
            let failing = self.sources.health(base.id()).failing?;
            let (name, why) = (&base.record().name, failing.error.to_string());
            Some(json!({"base": name, "since": super::time(failing.since), "why": why}))
        };
        self.store.bases().iter().filter_map(fails).collect()
    }
}
