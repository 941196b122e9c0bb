//! How a base is: what an operator has to know of it comes first.

use std::time::SystemTime;

use super::Bases;
use super::sources::BaseHealth;
use crate::source::{SourceErrorKind, StallKind};
use crate::store::BaseNode;

/// The first that applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseState {
    /// Its contents do not have their digest.
    Refused,
    /// It cannot be attached, or its file changed.
    Failed,
    /// Its operator has given it up.
    GivenUp,
    /// Its server has another object.
    Changed,
    /// Its readers get errors.
    Failing,
    /// Reads wait for its server.
    Waiting,
    /// It works.
    Ok,
}

/// A state with what belongs to it.
pub struct Condition {
    /// The state.
    pub state: BaseState,
    /// Since when, for a state that comes and goes.
    pub since: Option<SystemTime>,
    /// Why it cannot be attached, or the last error that its readers got.
    pub error: Option<String>,
    /// How its servers are.
    pub health: BaseHealth,
}

impl Bases {
    /// How a base is. Looks at its files on this host, and asks no server.
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
            // Readers were told errors already, and more of them wait.
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

    /// How many disks use a base.
    pub fn users(&self, base: &BaseNode) -> usize {
        self.store.users().get(&base.id()).map_or(0, Vec::len)
    }
}
