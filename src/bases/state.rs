//! The state of a base, as an operator needs to know it.

use std::time::SystemTime;

use super::Bases;
use super::sources::BaseHealth;
use crate::source::{SourceErrorKind, StallKind};
use crate::store::BaseNode;

/// The state of a base: of the variants that apply, the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseState {
    /// Its contents do not match their digest.
    Refused,
    /// It cannot be attached, or its file changed.
    Failed,
    /// Its operator gave it up.
    GivenUp,
    /// Its server has another object.
    Changed,
    /// Its readers get errors.
    Failing,
    /// Reads wait for its server.
    Waiting,
    /// It is served.
    Ok,
}

/// A state with its details.
pub struct Condition {
    /// The state.
    pub state: BaseState,
    /// Since when, for a state that may end by itself.
    pub since: Option<SystemTime>,
    /// Why it cannot be attached, or the last error that its readers got.
    pub error: Option<String>,
    /// The health of its servers.
    pub health: BaseHealth,
}

impl Bases {
    /// The condition of a base. Examines its files on this host, and sends no request.
    pub fn condition(&self, base: &BaseNode) -> Condition {
        let options = base.options();
        let health = self.sources.health(base.id());
        let problem = base.problem();
        let (stall, failing) = (health.stall.as_ref(), health.failing.as_ref());
        let (state, since) = match (stall, failing) {
            _ if options.refused => (BaseState::Refused, None),
            _ if problem.is_some() => (BaseState::Failed, None),
            _ if options.given_up => (BaseState::GivenUp, None),
            (Some(stall), _) if stall.kind == StallKind::Changed => (BaseState::Changed, Some(stall.since)),
            // Readers got errors already, and more of them wait.
            (_, Some(failing)) if failing.error.kind() == SourceErrorKind::Changed => {
                (BaseState::Changed, Some(failing.since))
            }
            (_, Some(failing)) => (BaseState::Failing, Some(failing.since)),
            (Some(stall), None) => (BaseState::Waiting, Some(stall.since)),
            (None, None) => (BaseState::Ok, None),
        };
        let error = problem.or_else(|| failing.map(|failing| failing.error.to_string()));
        Condition { state, since, error, health }
    }

    /// Number of disks that use a base.
    pub fn users(&self, base: &BaseNode) -> usize {
        self.store.users().get(&base.id()).map_or(0, Vec::len)
    }
}
