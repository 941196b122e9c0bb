//! How long work is shown: a bar on a terminal, lines of JSON with `--json`, and nothing elsewhere.
//!
//! What must hold: standard output gets nothing but the result, or with `--json` one object a line of which the last one
//! is the result. The bar is on standard error, so that the output can be piped while the bar is seen.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::Value;

use super::error::CliError;
use super::output::{Output, print, printable};

/// The least time between two lines of JSON that differ in numbers only.
const LINE_EVERY: Duration = Duration::from_secs(1);
const TEMPLATE: &str = "{prefix} [{bar:24}] {percent:>3}% {msg}";

/// Shows one piece of work.
pub(super) struct Progress {
    json: bool,
    bar: Option<ProgressBar>,
    /// Nothing is shown before.
    from: Instant,
    /// When the last line was printed, and what it said beside numbers.
    last: Option<(Instant, String)>,
}

/// What to show of a piece of work.
pub(super) struct Update<'a> {
    /// The object that is worked on.
    pub title: &'a str,
    /// How much is done.
    pub done: u64,
    /// How much there is.
    pub total: u64,
    /// The text behind the bar.
    pub text: String,
    /// The state. A line of JSON is printed at once when it changes.
    pub state: &'a str,
}

impl Progress {
    /// As the command was called.
    pub(super) fn new(output: &Output) -> Self {
        let json = output.is_json();
        let bar = (!json && std::io::stderr().is_terminal()).then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let style =
                ProgressStyle::with_template(TEMPLATE).unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.set_style(style.progress_chars("##-"));
            bar
        });
        Self { json, bar, from: Instant::now(), last: None }
    }

    /// As [`new`](Self::new), for work that is often short: it shows nothing in its first second.
    pub(super) fn of_short_work(output: &Output) -> Self {
        let mut progress = Self::new(output);
        progress.from = Instant::now() + LINE_EVERY;
        progress
    }

    /// Shows an update. `object` is what `--json` prints.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub(super) fn show(
        &mut self,
        update: &Update<'_>,
        object: impl FnOnce() -> Value,
    ) -> Result<(), CliError> {
        if Instant::now() < self.from {
            return Ok(());
        }
        if let Some(bar) = &self.bar {
            bar.set_prefix(printable(update.title));
            bar.set_length(update.total.max(1));
            bar.set_position(update.done.min(update.total));
            bar.set_message(printable(&update.text));
        }
        if !self.json {
            return Ok(());
        }
        let is_due = |(at, state): &(Instant, String)| at.elapsed() >= LINE_EVERY || *state != update.state;
        if self.last.as_ref().is_none_or(is_due) {
            self.last = Some((Instant::now(), update.state.to_owned()));
            return print(&format!("{}\n", object()));
        }
        Ok(())
    }

    /// Ends the bar and leaves it on the terminal, before the result or the error is printed.
    pub(super) fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.abandon();
        }
    }

    /// Ends the bar and removes it.
    pub(super) fn clear(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// A time in seconds as `5 s`, `3:07 min` or `2:03:04 h`.
pub(super) fn duration(seconds: u64) -> String {
    let (hours, minutes, rest) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
    match (hours, minutes) {
        (0, 0) => format!("{rest} s"),
        (0, minutes) => format!("{minutes}:{rest:02} min"),
        (hours, minutes) => format!("{hours}:{minutes:02}:{rest:02} h"),
    }
}
