//! Every key of the configuration file: its name, flag, default, bounds and meaning, each said once.
//!
//! The table of docs/config.md, plyfs.toml(5) and `/etc/plyfs/plyfs.toml` are made from it. What must hold, and tests
//! hold it against the reader of the file: the keys are those that the file may have, a default is the one that a file
//! without the key has, and a value is accepted exactly when it is within the bounds.

use std::fmt::Write;
use std::time::Duration;

use super::size::{MAX_SIZE, format_size};
use super::{LOG_FORMATS, LOG_LEVELS};

mod table;

pub use table::KEYS;

/// The sections of tables that may be there more than once.
pub const CREDENTIALS: &str = "http.credentials";
pub const S3: &str = "http.s3";
pub const CLOUDS: &str = "http.clouds";
/// All of them.
pub const REPEATED: [&str; 3] = [CREDENTIALS, S3, CLOUDS];

/// Whether the table of a section may be there more than once.
pub fn is_list(section: &str) -> bool {
    REPEATED.contains(&section)
}

/// One key.
#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// Its section, without brackets.
    pub section: &'static str,
    /// Its name in the section.
    pub name: &'static str,
    /// Flags and environment variables that override it, in Markdown; empty when there is none.
    pub flag: &'static str,
    /// What holds when the file does not have it.
    pub default: DefaultValue,
    /// Which values are accepted.
    pub bounds: Bounds,
    /// What it does, in Markdown: sentences.
    pub meaning: &'static str,
}

/// What holds when a key is absent.
#[derive(Clone, Copy, Debug)]
pub enum DefaultValue {
    /// This value, as it is written in TOML.
    Is(&'static str),
    /// What the text says, in Markdown; `example` is a value as it is written in TOML.
    Says {
        /// The text.
        text: &'static str,
        /// A value that the file may have.
        example: &'static str,
    },
}

/// Which values of a key are accepted. Bounds are inclusive.
#[derive(Clone, Copy, Debug)]
pub enum Bounds {
    /// What the meaning says.
    Meaning,
    /// An integer.
    Count(u64, u64),
    /// Bytes.
    Size(u64, u64),
    /// 0, which the text explains, or bytes.
    ZeroOrSize(&'static str, u64, u64),
    /// A time.
    Time(Duration, Duration),
    /// A string, one of these.
    Words(&'static [&'static str]),
}

impl DefaultValue {
    /// The value that a commented file shows.
    pub fn value(self) -> &'static str {
        match self {
            Self::Is(value) => value,
            Self::Says { example, .. } => example,
        }
    }

    /// In Markdown.
    pub fn text(self) -> String {
        match self {
            Self::Is(value) if value.starts_with('"') => format!("`{value}`"),
            Self::Is(value) => value.to_owned(),
            Self::Says { text, .. } => text.to_owned(),
        }
    }
}

impl Bounds {
    /// In Markdown; empty when the meaning says them.
    pub fn text(self) -> String {
        let sizes = |least: u64, most| match most {
            MAX_SIZE if least <= 1 => "below 8E".to_owned(),
            MAX_SIZE => format!("at least {}, below 8E", format_size(least)),
            _ => format!("{} to {}", format_size(least), format_size(most)),
        };
        match self {
            Self::Meaning => String::new(),
            Self::Count(least, u64::MAX) => format!("at least {least}"),
            Self::Count(least, most) => format!("{least} to {most}"),
            Self::Size(least, most) => sizes(least, most),
            Self::ZeroOrSize(zero, least, most) => format!("0 ({zero}), or {}", sizes(least, most)),
            Self::Time(least, most) => format!("{} to {}", time(least), time(most)),
            Self::Words(words) => words.iter().map(|w| format!("`{w}`")).collect::<Vec<_>>().join(", "),
        }
    }
}

/// A time as the file has it.
pub fn time(duration: Duration) -> String {
    let millis = duration.as_millis();
    match millis {
        _ if millis != 0 && millis.is_multiple_of(86_400_000) => format!("{}d", millis / 86_400_000),
        _ if millis.is_multiple_of(1000) => format!("{}s", millis / 1000),
        _ => format!("{millis}ms"),
    }
}

impl Key {
    /// Section and name, as messages have them.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// Bounds and meaning, in Markdown.
    pub fn description(&self) -> String {
        match self.bounds.text() {
            bounds if bounds.is_empty() => self.meaning.to_owned(),
            bounds => {
                let (first, rest) = bounds.split_at(1);
                format!("{}{rest}. {}", first.to_ascii_uppercase(), self.meaning)
            }
        }
    }
}

/// The line of a file that begins a section.
pub fn header(section: &str) -> String {
    if is_list(section) { format!("[[{section}]]") } else { format!("[{section}]") }
}

/// The table of docs/config.md.
pub fn markdown() -> String {
    let mut out =
        "| section, key | flag | default | bounds and meaning |\n| --- | --- | --- | --- |\n".to_owned();
    for key in KEYS {
        let (name, default, description) = (key.name, key.default.text(), key.description());
        let section = header(key.section);
        let flag = if key.flag.is_empty() { "-" } else { key.flag };
        let _ = writeln!(out, "| `{section} {name}` | {flag} | {default} | {description} |");
    }
    out
}

/// Markdown as it reads without its marks; of a link the text stays.
pub fn plain(markdown: &str) -> String {
    let mut out = String::new();
    let mut rest = markdown;
    while let Some((before, link)) = rest.split_once('[') {
        match link.split_once("](").and_then(|(text, tail)| Some((text, tail.split_once(')')?.1))) {
            Some((text, tail)) if !text.contains(['[', ']']) => {
                out.push_str(before);
                out.push_str("docs/");
                out.push_str(text);
                rest = tail;
            }
            _ => {
                out.push_str(before);
                out.push('[');
                rest = link;
            }
        }
    }
    out.push_str(rest);
    out.replace(['`', '*'], "")
}

const HEAD: &str = "\
# The configuration of plyfs: plyfs.toml(5) describes the format, and every key.
#
# Each key below is commented out. It stands with its default, or, where the default depends on the host, with an
# example. The daemon reads this file when it starts; `plyfs check-config` says whether the file is valid and what
# would be used. Sizes are bytes, or strings with K, M, G, T, P or E, powers of 1024. Times are strings such as \"500ms\",
# \"30s\", \"10m\", \"2h\" or \"1d\". Secrets do not belong here: name files that hold them.
";

/// A file with every key, commented out.
pub fn commented_file() -> String {
    let mut out = HEAD.to_owned();
    let mut section = "";
    for key in KEYS {
        if key.section != section {
            section = key.section;
            let comment = if is_list(section) { "#" } else { "" };
            let _ = write!(out, "\n{comment}{}\n", header(section));
        }
        for line in wrap(&plain(&key.description()), 114) {
            let _ = writeln!(out, "# {line}");
        }
        if let DefaultValue::Says { text, .. } = key.default
            && text != "-"
        {
            for line in wrap(&format!("Default: {}.", plain(text)), 114) {
                let _ = writeln!(out, "# {line}");
            }
        }
        let _ = writeln!(out, "#{} = {}", key.name, key.default.value());
    }
    out
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests;
