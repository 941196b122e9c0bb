//! Tables and fields for people.
//!
//! What must hold: no line of a table is wider than the terminal, because a wrapped line is read as two rows.

use std::time::{Duration, SystemTime};

use serde_json::Value;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use super::output::{Column, Kind, printable};
use crate::config::size::format_size;

/// The space between two columns.
const GAP: usize = 2;
/// The least width that a text column is cut to.
const NARROW: usize = 8;

/// The text of one value.
pub(super) fn cell(object: &Value, key: &str, kind: Kind, now: SystemTime) -> String {
    match &object[key] {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) if kind == Kind::Time => ago(text, now).unwrap_or_else(|| printable(text)),
        Value::String(text) => printable(text),
        Value::Number(number) if kind == Kind::Size => match (number.as_u64(), number.as_i64()) {
            (Some(bytes), _) => format_size(bytes),
            (None, Some(bytes)) => format!("-{}", format_size(bytes.unsigned_abs())),
            (None, None) => number.to_string(),
        },
        Value::Number(number) if kind == Kind::Micros => {
            number.as_u64().map_or_else(|| number.to_string(), latency)
        }
        other => printable(&other.to_string()),
    }
}

/// How long ago a time of the API was. `None` for another text.
pub(super) fn ago(text: &str, now: SystemTime) -> Option<String> {
    const UNITS: [(u64, u64, &str); 5] = [
        (60, 1, "s"),
        (3600, 60, "min"),
        (172_800, 3600, "h"),
        (63_072_000, 86_400, "d"),
        (u64::MAX, 31_536_000, "y"),
    ];
    let at = humantime::parse_rfc3339(text).ok()?;
    // The clocks of the daemon and of this command are the same; a time to come is a clock that was set back.
    let seconds = now.duration_since(at).unwrap_or(Duration::ZERO).as_secs();
    let (_, unit, word) = UNITS.into_iter().find(|(below, ..)| seconds < *below)?;
    Some(format!("{} {word} ago", seconds / unit))
}

/// Microseconds as `870 us`, `1.2 ms` or `3.0 s`.
fn latency(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{}.{} ms", us / 1_000, us / 100 % 10),
        _ => format!("{}.{} s", us / 1_000_000, us / 100_000 % 10),
    }
}

/// A table of an array of objects, with a title and a key per column. Numbers and sizes are aligned to the right. With a
/// width, text columns are cut until a line has at most that width.
pub(super) fn table(rows: &Value, columns: &[Column], now: SystemTime, width: Option<usize>) -> String {
    let titles = columns.iter().map(|(title, ..)| (*title).to_owned()).collect();
    let mut lines: Vec<Vec<String>> = vec![titles];
    for row in rows.as_array().into_iter().flatten() {
        lines.push(columns.iter().map(|&(_, key, kind)| cell(row, key, kind, now)).collect());
    }
    let widths = widths(&lines, columns, width);
    let mut out = String::new();
    for line in &lines {
        let mut text = String::new();
        for ((value, &width), &(_, _, kind)) in line.iter().zip(&widths).zip(columns) {
            let value = cut(value, width);
            let padding = " ".repeat(width - value.width());
            match kind.is_numeric() {
                false => text.extend([value.as_str(), &padding]),
                true => text.extend([&padding, value.as_str()]),
            }
            text.push_str(&" ".repeat(GAP));
        }
        let text = text.trim_end();
        out.push_str(&width.map_or_else(|| text.to_owned(), |width| cut(text, width)));
        out.push('\n');
    }
    out
}

/// The width of each column: of its widest value, or less where the lines would be wider than `width`.
pub(super) fn widths(lines: &[Vec<String>], columns: &[Column], width: Option<usize>) -> Vec<usize> {
    let natural = |index: usize| lines.iter().map(|line| line[index].width()).max().unwrap_or(0);
    let mut widths: Vec<usize> = (0..columns.len()).map(natural).collect();
    if let Some(width) = width {
        narrow(&mut widths, columns, width);
    }
    widths
}

/// Takes from the widest text column, again and again, until the line fits or no column can give more.
fn narrow(widths: &mut [usize], columns: &[Column], most: usize) {
    let gaps = GAP * widths.len().saturating_sub(1);
    while widths.iter().sum::<usize>() + gaps > most {
        let can_give = |(at, width): &(usize, usize)| {
            matches!(columns[*at].2, Kind::Text) && *width > NARROW.max(columns[*at].0.len())
        };
        let widest = widths.iter().copied().enumerate().filter(can_give).max_by_key(|(_, width)| *width);
        let Some((at, _)) = widest else { return };
        widths[at] -= 1;
    }
}

/// The text, cut to a width in columns of the terminal, with an ellipsis in place of the rest.
pub(super) fn cut(text: &str, width: usize) -> String {
    if text.width() <= width {
        return text.to_owned();
    }
    let mut out = String::new();
    let mut used = 1;
    for c in text.chars() {
        used += c.width().unwrap_or(0);
        if used > width {
            break;
        }
        out.push(c);
    }
    if width > 0 {
        out.push(ellipsis());
    }
    out
}

/// A terminal that is not told to use UTF-8 shows other characters for the ellipsis.
fn ellipsis() -> char {
    static IS_UTF8: std::sync::LazyLock<bool> = std::sync::LazyLock::new(|| {
        let of = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let locale = of("LC_ALL").or_else(|| of("LC_CTYPE")).or_else(|| of("LANG")).unwrap_or_default();
        let locale = locale.to_lowercase();
        locale.contains("utf-8") || locale.contains("utf8")
    });
    if *IS_UTF8 { '…' } else { '+' }
}

/// One object as lines of a title and a value. A key that the object does not have is omitted.
pub(super) fn fields(object: &Value, columns: &[Column]) -> String {
    fields_at(object, columns, SystemTime::now())
}

fn fields_at(object: &Value, columns: &[Column], now: SystemTime) -> String {
    let present = columns.iter().filter(|(_, key, _)| object.get(key).is_some());
    lines(present.map(|&(title, key, kind)| match (kind, &object[key]) {
        (Kind::Size, Value::Number(bytes)) if bytes.as_u64().is_some_and(|bytes| bytes >= 1024) => {
            (title, format!("{} ({bytes} bytes)", cell(object, key, kind, now)))
        }
        (Kind::Time, Value::String(text)) => match ago(text, now) {
            Some(ago) => (title, format!("{} ({ago})", printable(text))),
            None => (title, cell(object, key, Kind::Text, now)),
        },
        _ => (title, cell(object, key, kind, now)),
    }))
}

/// Lines of a title and a value, with aligned values.
pub(super) fn lines(pairs: impl Iterator<Item = (&'static str, String)>) -> String {
    let pairs: Vec<_> = pairs.collect();
    let width = pairs.iter().map(|(title, _)| title.len()).max().unwrap_or(0);
    pairs.iter().map(|(title, value)| format!("{title:<width$}  {value}\n")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const COLUMNS: [Column; 4] = [
        ("NAME", "name", Kind::Text),
        ("SIZE", "size", Kind::Size),
        ("CREATED", "created", Kind::Time),
        ("PATH", "path", Kind::Text),
    ];

    fn at(text: &str) -> SystemTime {
        humantime::parse_rfc3339(text).expect("a time")
    }

    #[test]
    fn times_are_shown_as_their_distance_from_now() {
        let now = at("2026-11-21T12:00:00Z");
        for (text, shown) in [
            ("2026-11-21T12:00:00Z", "0 s ago"),
            ("2026-11-21T11:59:01.5Z", "58 s ago"),
            ("2026-11-21T11:00:01Z", "59 min ago"),
            ("2026-11-21T09:00:00Z", "3 h ago"),
            ("2026-11-19T12:00:01Z", "47 h ago"),
            ("2026-11-19T12:00:00Z", "2 d ago"),
            ("2023-11-19T12:00:00Z", "3 y ago"),
            // The clock was set back.
            ("2026-11-21T13:00:00Z", "0 s ago"),
        ] {
            assert_eq!(ago(text, now).as_deref(), Some(shown), "{text}");
        }
        assert_eq!(ago("yesterday", now), None);
    }

    #[test]
    fn a_table_is_cut_to_the_width_of_the_terminal() {
        let now = at("2026-11-21T12:00:00Z");
        let long = "/a/very/long/path/to/a/mount/disks/a-name-of-some-length.raw";
        let rows = json!([
            {"name": "vm1", "size": 1 << 30, "created": "2026-11-21T11:00:00Z", "path": long},
            {"name": "a-name-of-some-length", "size": 512, "created": null, "path": "/x"},
            {"name": "wide-字字字字字字字字字字", "size": 1, "created": null, "path": long},
        ]);
        let full = table(&rows, &COLUMNS, now, None);
        assert!(full.contains(long) && full.contains("1 h ago"), "{full}");
        for width in 1..160 {
            let text = table(&rows, &COLUMNS, now, Some(width));
            assert_eq!(text.lines().count(), 4, "{text}");
            for line in text.lines() {
                assert!(line.width() <= width, "{} > {width}: {line}", line.width());
            }
        }
        assert_eq!(table(&rows, &COLUMNS, now, Some(1000)), full);
        let narrow = table(&rows, &COLUMNS, now, Some(60));
        assert!(narrow.contains("512"), "numbers are not cut while texts can be: {narrow}");
    }

    #[test]
    fn a_field_shows_a_time_in_both_forms() {
        let object = json!({"created": "2026-11-21T11:00:00Z", "size": 2048});
        let text = fields_at(&object, &COLUMNS, at("2026-11-21T12:00:00Z"));
        assert_eq!(text, "SIZE     2K (2048 bytes)\nCREATED  2026-11-21T11:00:00Z (1 h ago)\n");
    }
}
