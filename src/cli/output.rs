//! The output of commands: tables and fields for people, the daemon's own JSON for programs, one line per error.

use std::error::Error;
use std::io::{self, ErrorKind as IoErrorKind, Write};
use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use serde_json::Value;

use super::error::CliError;
use crate::config::size::format_size;

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

/// Prints on standard error why the command failed.
pub(super) fn failure(error: &CliError) -> ExitCode {
    print_error(&error.to_string());
    ExitCode::FAILURE
}

/// Writes one line to standard error, whatever the text contains.
pub(super) fn print_error(text: &str) {
    let line: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    // When standard error is closed, there is no other place for the message.
    let _ = writeln!(io::stderr(), "plyfs: {}", printable(&line.join(" ")));
}

/// Help and version go to standard output. A mistake in the arguments becomes one line and exit status 2.
pub(super) fn usage(error: &clap::Error) -> ExitCode {
    let code = u8::try_from(error.exit_code()).unwrap_or(2);
    match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // As with any output, it is no error when the reader is gone.
            let _ = error.print();
        }
        _ => print_error(&usage_line(error)),
    }
    ExitCode::from(code)
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
    let text = error.render().to_string();
    let mut parts: Vec<String> = Vec::new();
    for paragraph in text.split("\n\n") {
        let line = paragraph.lines().map(str::trim).collect::<Vec<_>>().join(" ");
        let line = line.trim().trim_end_matches('.');
        let line = line.strip_prefix("error: ").unwrap_or(line);
        let line = line.strip_prefix("For more information, ").unwrap_or(line);
        let line =
            line.strip_prefix("Usage: ").map_or_else(|| line.to_owned(), |usage| format!("usage: {usage}"));
        if !line.is_empty() {
            parts.push(line);
        }
    }
    parts.join("; ")
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
}

pub(super) type Column = (&'static str, &'static str, Kind);

fn cell(object: &Value, key: &str, kind: Kind) -> String {
    match &object[key] {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => printable(text),
        Value::Number(number) if kind == Kind::Size => {
            number.as_u64().map_or_else(|| number.to_string(), format_size)
        }
        other => printable(&other.to_string()),
    }
}

/// A table of an array of objects, with a title and a key per column. Numbers and sizes are aligned to the right.
pub(super) fn table(rows: &Value, columns: &[Column]) -> String {
    let titles = columns.iter().map(|(title, ..)| (*title).to_owned()).collect();
    let mut lines: Vec<Vec<String>> = vec![titles];
    for row in rows.as_array().into_iter().flatten() {
        lines.push(columns.iter().map(|&(_, key, kind)| cell(row, key, kind)).collect());
    }
    let width = |index: usize| lines.iter().map(|line| line[index].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns.len()).map(width).collect();
    let mut out = String::new();
    for line in &lines {
        let mut text = String::new();
        for ((value, &width), &(_, _, kind)) in line.iter().zip(&widths).zip(columns) {
            let padded = match kind {
                Kind::Text => format!("{value:<width$}  "),
                Kind::Number | Kind::Size => format!("{value:>width$}  "),
            };
            text.push_str(&padded);
        }
        out.push_str(text.trim_end());
        out.push('\n');
    }
    out
}

/// One object as lines of a title and a value. A key that the object does not have is omitted.
pub(super) fn fields(object: &Value, columns: &[Column]) -> String {
    let present = columns.iter().filter(|(_, key, _)| object.get(key).is_some());
    lines(present.map(|&(title, key, kind)| match (kind, object[key].as_u64()) {
        (Kind::Size, Some(bytes)) if bytes >= 1024 => {
            (title, format!("{} ({bytes} bytes)", format_size(bytes)))
        }
        _ => (title, cell(object, key, kind)),
    }))
}

/// Lines of a title and a value, with aligned values.
pub(super) fn lines(pairs: impl Iterator<Item = (&'static str, String)>) -> String {
    let pairs: Vec<_> = pairs.collect();
    let width = pairs.iter().map(|(title, _)| title.len()).max().unwrap_or(0);
    pairs.iter().map(|(title, value)| format!("{title:<width$}  {value}\n")).collect()
}
