//! `[notify]`: delivery of events to a web server or a program.

use serde::{Deserialize, Serialize};

use super::{ConfigError, invalid};

/// Where events are delivered, each as a line of JSON as `plyfs events --json` has it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NotifyConfig {
    /// `[notify] url`: a URL that gets events by POST. Credentials come from `[[http.credentials]]`. Default: none.
    /// Bounds: http or https, without user info and query; needs `security.network`.
    pub url: Option<String>,
    /// `[notify] command`: a program (absolute path) and its arguments, which gets events on standard input. Default:
    /// none.
    pub command: Option<Vec<String>>,
    /// `[notify] events`: names of the events to deliver. Default: all.
    pub events: Vec<String>,
}

impl NotifyConfig {
    /// Whether an event of this name is delivered.
    pub fn wants(&self, event: &str) -> bool {
        self.events.is_empty() || self.events.iter().any(|wanted| wanted == event)
    }

    pub(super) fn validate(&self, network: bool) -> Result<(), ConfigError> {
        if let Some(url) = &self.url {
            let rest = ["http://", "https://"].into_iter().find_map(|scheme| url.strip_prefix(scheme));
            let is_plain = |rest: &str| {
                !rest.is_empty()
                    && !rest.starts_with('/')
                    && !rest.contains(['@', '?', '#', '\\'])
                    && !rest.chars().any(|c| c.is_control() || c.is_whitespace())
            };
            if !rest.is_some_and(is_plain) {
                // The message does not show the text, because it may contain a secret.
                let message = "it is not valid; give http:// or https://, a host and a path: no user, query or white \
                               space; secrets go to [[http.credentials]]";
                return Err(invalid("notify.url", message.into()));
            }
            if !network {
                let message = "it needs the network, which is off; set security.network = true";
                return Err(invalid("notify.url", message.into()));
            }
        }
        if let Some(command) = &self.command {
            if !command.first().is_some_and(|program| program.starts_with('/')) {
                let message = "it does not begin with the absolute path of a program; give one";
                return Err(invalid("notify.command", message.into()));
            }
            if command.iter().any(|word| word.contains('\0')) {
                return Err(invalid("notify.command", "it contains a NUL; remove it".into()));
            }
        }
        Ok(())
    }
}
