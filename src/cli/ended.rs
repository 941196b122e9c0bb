//! Why the work on one object of many ends, for commands that go on with the others.
//!
//! What must hold: what goes wrong with one object ends the work on that object alone. A signal, and a daemon that is gone
//! or does not answer, end the command.

use super::error::CliError;

/// See the module.
pub(super) enum Ended<O> {
    /// This is the result of the object.
    With(O, String),
    /// The command cannot go on.
    Command(CliError),
}

/// The results of a command.
pub(super) trait Outcomes {
    /// The one of an object that failed.
    const FAILED: Self;
}

impl<O: Outcomes> From<std::io::Error> for Ended<O> {
    fn from(error: std::io::Error) -> Self {
        Self::With(O::FAILED, error.to_string())
    }
}

impl<O: Outcomes> From<CliError> for Ended<O> {
    fn from(error: CliError) -> Self {
        match error {
            CliError::Refused { message, .. } | CliError::Failed(message) | CliError::Usage(message) => {
                Self::With(O::FAILED, message)
            }
            error @ CliError::Transfer { .. } => Self::With(O::FAILED, error.to_string()),
            other => Self::Command(other),
        }
    }
}
