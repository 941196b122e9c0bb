//! The output of commands: text for people (`table`), the daemon's own JSON for programs, one line per error.

use std::error::Error;
use std::io::{self, ErrorKind as IoErrorKind, Write};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use serde_json::Value;

use super::error::{CliError, ErrorObject};
use super::journal;

pub(super) struct Output {
    json: bool,
}

impl Output {
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Prints `value` as JSON with `--json`, else the text that `human` makes of it.
    pub(super) fn value(&self, value: &Value, human: impl FnOnce(&Value) -> String) -> Result<(), CliError> {
        if self.json {
            return print(&format!("{value:#}\n"));
        }
        print(&human(value))
    }

    /// As [`value`](Self::value), with JSON on one line: the last of lines that a program reads one by one.
    pub(super) fn line(&self, value: &Value, human: impl FnOnce(&Value) -> String) -> Result<(), CliError> {
        if self.json {
            return print(&format!("{value}\n"));
        }
        print(&human(value))
    }

    pub(super) fn is_json(&self) -> bool {
        self.json
    }

    /// Prints an error on standard error: one line, or with `--json` an object on one line.
    pub(super) fn error(&self, error: &CliError) {
        if self.json { print_object(&error.object()) } else { print_error(&error.to_string()) }
    }
}

/// Writes to standard output. It is no error when the reader is gone (`plyfs disk ls | head`).
pub(super) fn print(text: &str) -> Result<(), CliError> {
    print_on(text).map(drop)
}

/// As [`print`], and returns whether the reader is still there.
pub(super) fn print_on(text: &str) -> Result<Reader, CliError> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == IoErrorKind::BrokenPipe => Ok(Reader::Gone),
        Err(error) => Err(CliError::Stdout(error)),
        Ok(()) => Ok(Reader::Present),
    }
}

/// The reader of standard output.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    Present,
    Gone,
}

/// Prints on standard error why the command failed, with `json` as an object.
pub(super) fn failure(error: &CliError, json: bool) -> ExitCode {
    Output::new(json).error(error);
    ExitCode::from(error.status())
}

fn print_object(object: &ErrorObject) {
    // The object has text keys only, so it always encodes. Its control characters are escaped.
    let text = serde_json::to_string(object).unwrap_or_default();
    // When standard error is closed, there is no other place for the message.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes one line to standard error, whatever the text contains.
pub(super) fn print_error(text: &str) {
    let line: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let priority = if journal::is_connected() { journal::prefix(tracing::Level::ERROR) } else { "" };
    // When standard error is closed, there is no other place for the message.
    let _ = writeln!(io::stderr(), "{priority}plyfs: {}", printable(&line.join(" ")));
}

/// Help and version go to standard output. A mistake in the arguments becomes one line, or with `--json` an object, and
/// exit status 2.
pub(super) fn usage(error: &clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // As with any output, it is no error when the reader is gone.
            let _ = error.print();
        }
        // The arguments could not be parsed, so the option is looked for by its text.
        _ if std::env::args_os().any(|arg| arg == "--json") => {
            print_object(&ErrorObject::of_usage(argument(error), &usage_line(error)));
        }
        _ => print_error(&usage_line(error)),
    }
    ExitCode::from(code)
}

/// The argument or the word that a mistake is about.
fn argument(error: &clap::Error) -> Option<String> {
    let of = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(" ")),
        _ => None,
    };
    of(ContextKind::InvalidArg).or_else(|| of(ContextKind::InvalidSubcommand))
}

pub(super) fn usage_line(error: &clap::Error) -> String {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.as_str()),
        _ => None,
    };
    if let (ErrorKind::ValueValidation, Some(argument), Some(value), Some(why)) =
        (error.kind(), context(ContextKind::InvalidArg), context(ContextKind::InvalidValue), error.source())
    {
        return format!("invalid value {value:?} for {argument}: {why}");
    }
    let given = context(ContextKind::InvalidSubcommand)
        .or_else(|| context(ContextKind::InvalidValue))
        .or_else(|| context(ContextKind::InvalidArg));
    let text = error.render().to_string();
    let mut parts: Vec<String> = Vec::new();
    for paragraph in text.split("\n\n") {
        let lines =
            paragraph.lines().map(str::trim).filter(|line| is_sensible(line, given.unwrap_or_default()));
        let line = lines.collect::<Vec<_>>().join(" ");
        let line = line.trim().trim_end_matches('.');
        let line = line.strip_prefix("error: ").unwrap_or(line);
        let line = line.strip_prefix("For more information, ").unwrap_or(line);
        let line =
            line.strip_prefix("Usage: ").map_or_else(|| line.to_owned(), |usage| format!("usage: {usage}"));
        if !line.is_empty() {
            parts.push(line);
        }
    }
    if let Some(tip) = given.and_then(|given| tip(given, &text)) {
        parts.insert(1.min(parts.len()), tip);
    }
    parts.join("; ")
}

/// Words of other tools, and of the other nouns here: the word, a part of the usage line, the command to use.
const OTHER_WORDS: [(&str, &str, &str); 12] = [
    ("create", "plyfs base", "plyfs base add"),
    ("import", "plyfs base", "plyfs base add"),
    ("add", "plyfs disk", "plyfs disk create"),
    ("clone", "plyfs disk", "plyfs disk create"),
    ("delete", "plyfs base", "plyfs base rm"),
    ("remove", "plyfs base", "plyfs base rm"),
    ("delete", "plyfs disk", "plyfs disk rm"),
    ("remove", "plyfs disk", "plyfs disk rm"),
    ("info", "plyfs base", "plyfs base show"),
    ("info", "plyfs disk", "plyfs disk show"),
    ("start", "plyfs [", "plyfs serve"),
    ("shutdown", "plyfs [", "plyfs stop"),
];

/// Image formats that qemu-img converts.
const CONVERTIBLE: [&str; 8] = ["vdi", "vhd", "vhdx", "vpc", "qed", "qcow", "parallels", "dmg"];

/// A tip for a word that this program has under another name.
fn tip(given: &str, usage: &str) -> Option<String> {
    if usage.contains("--format") && CONVERTIBLE.contains(&given) {
        return Some("convert the image with: qemu-img convert -O qcow2".to_owned());
    }
    let usage = usage.split("Usage: ").nth(1)?;
    let other = OTHER_WORDS.iter().find(|(word, of, _)| *word == given && usage.starts_with(of));
    other.map(|(.., instead)| format!("did you mean {instead}?"))
}

/// Whether a line of a usage error helps. The parser suggests every word that has some letters in common.
fn is_sensible(line: &str, given: &str) -> bool {
    if !(line.starts_with("tip: ") && line.contains("similar")) {
        return true;
    }
    let mut suggested = line.split('\'').skip(1).step_by(2);
    suggested.any(|word| {
        let most = if word.trim_start_matches('-').len() <= 5 { 1 } else { 2 };
        distance(given, word) <= most
    })
}

/// How many characters have to be inserted, removed, replaced or swapped with their neighbour.
fn distance(from: &str, to: &str) -> usize {
    let (from, to): (Vec<char>, Vec<char>) = (from.chars().collect(), to.chars().collect());
    let mut rows = vec![(0..=to.len()).collect::<Vec<usize>>()];
    for (i, a) in from.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, b) in to.iter().enumerate() {
            let replaced = rows[i][j] + usize::from(a != b);
            let mut least = replaced.min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *a == to[j - 1] && from[i - 1] == *b {
                least = least.min(rows[i - 1][j - 1] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[from.len()][to.len()]
}

/// An error and its causes, in one text.
pub(super) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        // Many errors already end with their cause.
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// The text with control characters escaped, so that it can neither break a line nor steer a terminal.
pub(super) fn printable(text: &str) -> String {
    if !text.chars().any(is_unprintable) {
        return text.to_owned();
    }
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_unprintable(c) {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

fn is_unprintable(c: char) -> bool {
    // The characters of the second group reorder the text around them on a terminal, or break lines in some readers.
    c.is_control() || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// How a column of a table, or a field of an object, is formatted.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Text,
    Number,
    /// Bytes, formatted as a size.
    Size,
    /// A time of the API, shown as its distance from now.
    Time,
    /// Microseconds, shown in the unit that fits.
    Micros,
}

impl Kind {
    /// Whether the column has numbers, which are aligned to the right.
    pub(super) fn is_numeric(self) -> bool {
        match self {
            Self::Text | Self::Time => false,
            Self::Number | Self::Size | Self::Micros => true,
        }
    }
}

pub(super) type Column = (&'static str, &'static str, Kind);
