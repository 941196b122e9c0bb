//! The state of a base, as an operator needs to know it.

use std::sync::Arc;
use std::time::SystemTime;

use super::sources::BaseHealth;
use super::{Bases, Finding};
use crate::source::{SourceErrorKind, Stall, StallKind};
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
    /// Reads wait for its server, or for its file.
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
    /// The health of its servers, and of a file that hangs.
    pub health: BaseHealth,
    /// When its files on this host were examined last, if they have not answered since.
    pub examined: Option<SystemTime>,
}

impl Bases {
    /// Examines the files of bases on this host. Sends no request, and waits for no file that hangs.
    pub fn examine(&self, bases: &[Arc<BaseNode>]) -> Vec<Finding> {
        self.examiner.examine(bases)
    }

    /// The wait for a server, or for a file that hangs, of a base. Examines nothing.
    pub fn stall(&self, base: u64) -> Option<Stall> {
        self.sources.health(base).stall.or_else(|| hanging(self.examiner.hangs_since(base)))
    }

    /// The condition of a base, with what was found of its files.
    pub fn condition(&self, base: &BaseNode, finding: Finding) -> Condition {
        let options = base.options();
        let mut health = self.sources.health(base.id());
        let Finding { problem, earlier: examined, hangs_since } = finding;
        health.stall = health.stall.or_else(|| hanging(hangs_since));
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
        Condition { state, since, error, health, examined }
    }

    /// Number of disks that use a base.
    pub fn users(&self, base: &BaseNode) -> usize {
        self.store.user_counts().get(&base.id()).map_or(0, |count| *count as usize)
    }
}

/// The wait for a file that hangs.
fn hanging(since: Option<SystemTime>) -> Option<Stall> {
    let since = since?;
    let why =
        "the filesystem of its file on this host does not answer; see whether its server or device works";
    Some(Stall { since, why: why.to_owned(), kind: StallKind::Waiting })
}
