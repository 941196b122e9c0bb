//! Work on a whole base that the daemon does in the background: begin it, and watch it on a terminal.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::Global;
use super::again;
use super::client::read;
use super::error::CliError;
use crate::config::size::format_size as size;
use crate::control::wire::{Base, Work, WorkState};

const EVERY: Duration = Duration::from_millis(200);
/// Characters of the bar.
const BAR: usize = 30;

/// Begins `what` on a base, and waits for its end unless it is to go on in the background.
pub(super) fn run(
    global: &Global,
    name: &str,
    what: &str,
    body: &impl Serialize,
    background: bool,
) -> Result<(), CliError> {
    let action = format!("cannot {what} base {name}");
    let path = format!("/v1/bases/{name}");
    let begin = || -> Result<(Value, Base), CliError> {
        let said = again::repeat(|| global.client()?.post(&format!("{path}/{what}"), body, &action))?;
        let base = read(&said, &action)?;
        Ok((said, base))
    };
    let (mut said, mut base) = begin()?;
    let drawn = std::io::stderr().is_terminal();
    while !background && !ended(&base) {
        if drawn {
            draw(name, base.work.as_ref());
        }
        std::thread::sleep(EVERY);
        said = again::repeat(|| global.client()?.get(&path, &action))?;
        base = read(&said, &action)?;
        if base.work.is_none() {
            // Another worker serves by now; it goes on, or has nothing left to do.
            (said, base) = begin()?;
        }
    }
    if drawn && !background {
        draw(name, base.work.as_ref());
        let _ = writeln!(std::io::stderr());
    }
    if let Some(Work { state: state @ (WorkState::Failed | WorkState::Cancelled), error, .. }) = &base.work {
        let why = error.as_deref().unwrap_or("it did not end well");
        let message = match state {
            WorkState::Cancelled => format!("{action}: cancelled: {why}"),
            _ => format!("{action}: {why}"),
        };
        return Err(CliError::Refused { kind: None, message });
    }
    global.output().value(&said, |_| summary(name, what, &base))
}

fn ended(base: &Base) -> bool {
    base.work.as_ref().is_some_and(|work| work.state.has_ended())
}

fn summary(name: &str, what: &str, base: &Base) -> String {
    let Some(work) = base.work.as_ref().filter(|work| work.state.has_ended()) else {
        return format!("{name}: goes on in the background; see: plyfs base show {name}\n");
    };
    let is_kept = base.cached_percent.is_some();
    let digest = match work.digest_matches {
        Some(true) => "the digest matches",
        _ if what == "verify" && !base.complete && is_kept => {
            "all of it is sound; the digest can be compared once the base is hydrated"
        }
        _ => "no digest was given to compare with",
    };
    let bytes = match what {
        "verify" if is_kept => base.cached_bytes,
        _ => work.total,
    };
    format!("{name}: {bytes} bytes are here; {digest}\n")
}

/// One line: how much, how fast, how long it may take.
fn draw(name: &str, work: Option<&Work>) {
    let (bytes, total, rate) = work.map_or((0, 0, 0), |work| (work.bytes, work.total, work.rate));
    let total = total.max(1);
    let full = (bytes.min(total) as u128 * BAR as u128 / u128::from(total)) as usize;
    let left = match rate {
        0 => "--:--".to_owned(),
        rate => {
            let seconds = (total.saturating_sub(bytes)) / rate;
            format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
        }
    };
    let state = work.map_or("", |work| work.state.name());
    let line = format!(
        "{name} [{}{}] {:3}% {} of {}, {}/s, {left} left, {state}",
        "#".repeat(full),
        "-".repeat(BAR - full),
        bytes.min(total) as u128 * 100 / u128::from(total),
        size(bytes),
        size(total),
        size(rate),
    );
    let _ = write!(std::io::stderr(), "\r\x1b[K{line}");
}
