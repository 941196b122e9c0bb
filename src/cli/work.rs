//! Background work of the daemon on a whole base: a command begins it and shows its progress on a terminal.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use super::Global;
use super::client::read;
use super::error::CliError;
use super::retry;
use crate::config::size::format_size as size;
use crate::control::wire::{Base, Work, WorkState};

/// The pause between two requests for the progress.
const INTERVAL: Duration = Duration::from_millis(200);
/// Width of the progress bar, in characters.
const BAR: usize = 30;

/// Begins `operation` on a base. Waits for its end unless `background` is set.
pub(super) fn run(
    global: &Global,
    name: &str,
    operation: &str,
    body: &impl Serialize,
    background: bool,
) -> Result<(), CliError> {
    let action = format!("cannot {operation} base {name}");
    let path = format!("/v1/bases/{name}");
    let begin = || -> Result<(Value, Base), CliError> {
        let answer = retry::repeat(|| global.client()?.post(&format!("{path}/{operation}"), body, &action))?;
        let base = read(&answer, &action)?;
        Ok((answer, base))
    };
    let (mut answer, mut base) = begin()?;
    let is_terminal = std::io::stderr().is_terminal();
    while !background && !has_ended(&base) {
        if is_terminal {
            draw(name, base.work.as_ref());
        }
        std::thread::sleep(INTERVAL);
        answer = retry::repeat(|| global.client()?.get(&path, &action))?;
        base = read(&answer, &action)?;
        if base.work.is_none() {
            // Another worker serves now. It continues the work, or finds it complete.
            (answer, base) = begin()?;
        }
    }
    if is_terminal && !background {
        draw(name, base.work.as_ref());
        let _ = writeln!(std::io::stderr());
    }
    if let Some(Work { state: state @ (WorkState::Failed | WorkState::Cancelled), error, .. }) = &base.work {
        let why = error.as_deref().unwrap_or("the daemon gives no reason; see its log");
        let message = match state {
            WorkState::Cancelled => format!("{action}: cancelled: {why}"),
            _ => format!("{action}: {why}"),
        };
        return Err(CliError::Refused { kind: None, message });
    }
    global.output().value(&answer, |_| summary(name, operation, &base))
}

fn has_ended(base: &Base) -> bool {
    base.work.as_ref().is_some_and(|work| work.state.has_ended())
}

fn summary(name: &str, operation: &str, base: &Base) -> String {
    let Some(work) = base.work.as_ref().filter(|work| work.state.has_ended()) else {
        return format!("{name}: work continues in the background; see: plyfs base show {name}\n");
    };
    let is_kept = base.cached_percent.is_some();
    let digest = match work.digest_matches {
        Some(true) => "the digest matches",
        _ if operation == "verify" && !base.complete && is_kept => {
            "their checksums match; verify the digest once the base is hydrated"
        }
        _ => "the base has no digest to compare with",
    };
    let bytes = match operation {
        "verify" if is_kept => base.cached_bytes,
        _ => work.total,
    };
    format!("{name}: {bytes} bytes are in the store; {digest}\n")
}

/// Draws one line: progress, rate, estimated time left.
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
