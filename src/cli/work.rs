//! Work on a whole base that the daemon does in the background: begin it, and watch it on a terminal.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use serde_json::Value;

use super::Global;
use super::again;
use super::error::CliError;
use crate::config::size::format_size as size;

const EVERY: Duration = Duration::from_millis(200);
/// Characters of the bar.
const BAR: usize = 30;

/// Begins `what` on a base, and waits for its end unless it is to go on in the background.
pub(super) fn run(
    global: &Global,
    name: &str,
    what: &str,
    body: &Value,
    background: bool,
) -> Result<(), CliError> {
    let action = format!("cannot {what} base {name}");
    let path = format!("/v1/bases/{name}");
    let mut base = again::repeat(|| global.client()?.post(&format!("{path}/{what}"), Some(body), &action))?;
    let drawn = std::io::stderr().is_terminal();
    while !background && !ended(&base["work"]) {
        if drawn {
            draw(name, &base["work"]);
        }
        std::thread::sleep(EVERY);
        base = again::repeat(|| global.client()?.get(&path, &action))?;
        if base["work"].is_null() {
            // Another worker serves by now; it goes on, or has nothing left to do.
            base = again::repeat(|| global.client()?.post(&format!("{path}/{what}"), Some(body), &action))?;
        }
    }
    if drawn && !background {
        draw(name, &base["work"]);
        let _ = writeln!(std::io::stderr());
    }
    let state = base["work"]["state"].as_str().unwrap_or_default().to_owned();
    if state == "failed" || state == "cancelled" {
        let why = base["work"]["error"].as_str().unwrap_or("it did not end well");
        let message = match &*state {
            "cancelled" => format!("{action}: cancelled: {why}"),
            _ => format!("{action}: {why}"),
        };
        return Err(CliError::Refused { kind: "failed".into(), message });
    }
    global.output().value(&base, |base| summary(name, what, base))
}

fn ended(work: &Value) -> bool {
    matches!(work["state"].as_str(), Some("done" | "failed" | "cancelled"))
}

fn summary(name: &str, what: &str, base: &Value) -> String {
    let work = &base["work"];
    if !ended(work) {
        return format!("{name}: goes on in the background; see: plyfs base show {name}\n");
    }
    let digest = match work["digest_matches"].as_bool() {
        Some(true) => "the digest matches",
        _ if what == "verify" && base["complete"] != true && !base["cached_percent"].is_null() => {
            "all of it is sound; the digest can be compared once the base is hydrated"
        }
        _ => "no digest was given to compare with",
    };
    let bytes = match what {
        "verify" if !base["cached_percent"].is_null() => &base["cached_bytes"],
        _ => &work["total"],
    };
    format!("{name}: {} bytes are here; {digest}\n", bytes.as_u64().unwrap_or(0))
}

/// One line: how much, how fast, how long it may take.
fn draw(name: &str, work: &Value) {
    let number = |key: &str| work[key].as_u64().unwrap_or(0);
    let (bytes, total, rate) = (number("bytes"), number("total").max(1), number("rate"));
    let full = (bytes.min(total) as u128 * BAR as u128 / u128::from(total)) as usize;
    let left = match rate {
        0 => "--:--".to_owned(),
        rate => {
            let seconds = (total.saturating_sub(bytes)) / rate;
            format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
        }
    };
    let state = work["state"].as_str().unwrap_or("");
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
