//! `ls` of every noun: which rows, in which order, and a table that fits the terminal.
//!
//! What must hold:
//! - A column is named by its title or by its key in JSON. An unknown one is a usage error that names those there are,
//!   also when the list is empty.
//! - Order and choice of rows are the same in the table, with `--quiet` and with `--json`.
//! - A line never exceeds the width of the terminal. Without a terminal nothing is cut.

use std::cmp::Ordering;
use std::time::SystemTime;

use serde_json::Value;
use terminal_size::{Width, terminal_size_of};

use super::error::CliError;
use super::output::{Column, Kind, Output, printable};
use super::table::{cell, cut, table};
use crate::config::size::{format_size, parse_size};

/// Which rows are shown, in which order.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Choice {
    /// Sort by a column, named by its title or its key in JSON; `:desc` begins with the largest
    #[arg(long, value_name = "COLUMN[:desc]")]
    sort: Option<String>,
    /// Show only rows whose column equals VALUE, or contains TEXT in any case; of several filters all must hold
    #[arg(long = "filter", short = 'f', value_name = "COLUMN=VALUE|COLUMN~TEXT")]
    filters: Vec<String>,
}

/// The options of `ls`.
#[derive(Clone, Debug, Default, clap::Args)]
pub(super) struct Listing {
    #[command(flatten)]
    choice: Choice,
    /// Print only the names, one a line, as arguments for other commands
    #[arg(long, short)]
    quiet: bool,
}

/// A noun that can be listed.
pub(super) struct Noun {
    /// Of one object and of several.
    pub names: [&'static str; 2],
    /// The key of the name that other commands take.
    pub name: &'static str,
    /// The columns of the table.
    pub columns: &'static [Column],
    /// Further columns to sort and filter by.
    pub more: &'static [Column],
    /// The columns that are summed up: key, and the text with `{}` for the sum.
    pub totals: &'static [(&'static str, Kind, &'static str)],
    /// Lines below the table about single rows.
    pub notes: fn(&[Value]) -> String,
}

/// For a noun without such lines.
pub(super) fn no_notes(_: &[Value]) -> String {
    String::new()
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Match {
    Equals,
    Contains,
}

impl Noun {
    /// The column of this title or key.
    fn column(&self, name: &str) -> Result<Column, CliError> {
        let name = name.trim().to_lowercase();
        let all = || self.columns.iter().chain(self.more);
        let found = all().find(|(title, key, _)| name == *key || name == title_word(title));
        found.copied().ok_or_else(|| {
            let mut titles: Vec<_> = all().map(|(title, ..)| title_word(title)).collect();
            titles.sort_unstable();
            titles.dedup();
            CliError::Usage(format!("there is no column {name:?}; the columns are {}", titles.join(", ")))
        })
    }
}

fn title_word(title: &str) -> String {
    title.to_lowercase().replace(' ', "_")
}

impl Choice {
    /// Sorts in this order where the user demands none.
    pub(super) fn sort_by_default(&mut self, order: &str) {
        self.sort.get_or_insert_with(|| order.to_owned());
    }

    /// The same with another order.
    pub(super) fn with_order(&self, order: &str) -> Self {
        Self { sort: Some(order.to_owned()), ..self.clone() }
    }

    /// The same with other filters.
    pub(super) fn with_filters(&self, filters: Vec<String>) -> Self {
        Self { filters, ..self.clone() }
    }

    /// The filters, as they were given.
    pub(super) fn filters(&self) -> &[String] {
        &self.filters
    }

    /// The column to sort by, and whether the largest comes first.
    ///
    /// # Errors
    /// `Usage`.
    pub(super) fn order(&self, noun: &Noun) -> Result<Option<(Column, bool)>, CliError> {
        self.sort.as_deref().map(|text| order(text, noun)).transpose()
    }

    /// Checks the options before the daemon is asked.
    ///
    /// # Errors
    /// `Usage`.
    pub(super) fn check(&self, noun: &Noun) -> Result<(), CliError> {
        self.order(noun)?;
        self.filters.iter().try_for_each(|text| filter(text, noun).map(drop))
    }

    /// Chooses and sorts the rows.
    ///
    /// # Errors
    /// `Usage`.
    pub(super) fn choose(&self, rows: Vec<Value>, noun: &Noun) -> Result<Vec<Value>, CliError> {
        let filters = self.filters.iter().map(|text| filter(text, noun)).collect::<Result<Vec<_>, _>>()?;
        let fits = |row: &Value| filters.iter().all(|filter| filter.fits(row));
        let mut rows: Vec<Value> = rows.into_iter().filter(fits).collect();
        if let Some(((_, key, _), is_descending)) = self.order(noun)? {
            rows.sort_by(|a, b| compare(&a[key], &b[key], is_descending));
        }
        Ok(rows)
    }

    fn uses(&self, key: &str) -> bool {
        let words = self.sort.iter().chain(&self.filters);
        words.into_iter().any(|word| {
            let name = word.split(['=', '~', ':']).next().unwrap_or_default();
            name.trim().to_lowercase() == key
        })
    }
}

impl Listing {
    /// Whether the table is printed, and not names or JSON.
    pub(super) fn is_table(&self, output: &Output) -> bool {
        !self.quiet && !output.is_json()
    }

    /// Whether a column decides about rows or their order.
    pub(super) fn uses(&self, key: &str) -> bool {
        self.choice.uses(key)
    }

    /// As [`Choice::check`].
    ///
    /// # Errors
    /// `Usage`.
    pub(super) fn check(&self, noun: &Noun) -> Result<(), CliError> {
        self.choice.check(noun)
    }

    /// As [`Choice::choose`].
    ///
    /// # Errors
    /// `Usage`.
    pub(super) fn choose(&self, rows: Vec<Value>, noun: &Noun) -> Result<Vec<Value>, CliError> {
        self.choice.choose(rows, noun)
    }

    /// Prints the chosen rows: the table with `columns` and the totals, the names, or JSON. `all` is the number of rows
    /// before the choice.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub(super) fn print(
        &self,
        output: &Output,
        rows: Vec<Value>,
        (noun, columns, all): (&Noun, &[Column], usize),
    ) -> Result<(), CliError> {
        if self.quiet {
            let name = |row: &Value| match &row[noun.name] {
                Value::String(name) => Some(name.clone()),
                Value::Number(number) => Some(number.to_string()),
                _ => None,
            };
            let names: Vec<String> = rows.iter().filter_map(name).collect();
            return output.value(&serde_json::json!(names), |_| {
                names.iter().map(|name| printable(name) + "\n").collect()
            });
        }
        let rows = Value::Array(rows);
        output.value(&rows, |rows| {
            let width = terminal_size_of(std::io::stdout()).map(|(Width(width), _)| usize::from(width));
            let text = table(rows, columns, SystemTime::now(), width);
            let rows = rows.as_array().map_or(&[][..], Vec::as_slice);
            let totals = totals(rows, noun, all);
            text + &width.map_or_else(|| totals.clone(), |width| cut(totals.trim_end(), width) + "\n")
                + &(noun.notes)(rows)
        })
    }

    /// Does all of a plain `ls`.
    ///
    /// # Errors
    /// `Usage`; when standard output cannot be written.
    pub(super) fn run(&self, output: &Output, rows: Value, noun: &Noun) -> Result<(), CliError> {
        let rows = into_rows(rows);
        let all = rows.len();
        self.print(output, self.choose(rows, noun)?, (noun, noun.columns, all))
    }
}

/// The rows of an answer.
pub(super) fn into_rows(answer: Value) -> Vec<Value> {
    match answer {
        Value::Array(rows) => rows,
        _ => Vec::new(),
    }
}

fn order(text: &str, noun: &Noun) -> Result<(Column, bool), CliError> {
    match text.rsplit_once(':') {
        None => Ok((noun.column(text)?, false)),
        Some((name, "desc")) => Ok((noun.column(name)?, true)),
        Some((name, "asc")) => Ok((noun.column(name)?, false)),
        Some((_, other)) => {
            Err(CliError::Usage(format!("the order {other:?} of --sort is not known; give asc or desc")))
        }
    }
}

struct Filter {
    key: &'static str,
    kind: Kind,
    how: Match,
    value: String,
}

fn filter(text: &str, noun: &Noun) -> Result<Filter, CliError> {
    let at = text.find(['=', '~']).ok_or_else(|| {
        CliError::Usage(format!("the filter {text:?} has no value; give COLUMN=VALUE or COLUMN~TEXT"))
    })?;
    let how = if text[at..].starts_with('=') { Match::Equals } else { Match::Contains };
    let (_, key, kind) = noun.column(&text[..at])?;
    Ok(Filter { key, kind, how, value: text[at + 1..].to_owned() })
}

impl Filter {
    fn fits(&self, row: &Value) -> bool {
        let value = &row[self.key];
        let plain = match value {
            Value::Null => String::new(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        // As the table shows it, too.
        let shown = cell(row, self.key, self.kind, SystemTime::now());
        match self.how {
            Match::Equals if self.kind == Kind::Size => {
                plain == self.value
                    || shown == self.value
                    || (value.is_u64() && parse_size(&self.value).ok() == value.as_u64())
            }
            Match::Equals => plain == self.value || shown == self.value,
            Match::Contains => {
                let wanted = self.value.to_lowercase();
                plain.to_lowercase().contains(&wanted) || shown.to_lowercase().contains(&wanted)
            }
        }
    }
}

/// Rows without a value are last in both orders.
fn compare(a: &Value, b: &Value, is_descending: bool) -> Ordering {
    let is_missing = |value: &Value| value.is_null() || value.as_str() == Some("");
    match (is_missing(a), is_missing(b)) {
        (true, true) => return Ordering::Equal,
        (true, false) => return Ordering::Greater,
        (false, true) => return Ordering::Less,
        (false, false) => {}
    }
    let order = match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a.total_cmp(&b),
        // The times of the API have one form, so their order is that of their texts.
        _ => match (a.as_str(), b.as_str()) {
            (Some(a), Some(b)) => a.cmp(b),
            _ => a.to_string().cmp(&b.to_string()),
        },
    };
    if is_descending { order.reverse() } else { order }
}

/// `2 of 3 disks, 40G in all, 1.2G written, open handles: 1`.
fn totals(rows: &[Value], noun: &Noun, all: usize) -> String {
    let [one, several] = noun.names;
    let word = if all == 1 { one } else { several };
    let mut text =
        if rows.len() == all { format!("{all} {word}") } else { format!("{} of {all} {word}", rows.len()) };
    for (key, kind, what) in noun.totals {
        let sum = rows.iter().filter_map(|row| row[key].as_u64()).fold(0, u64::saturating_add);
        let sum = if *kind == Kind::Size { format_size(sum) } else { sum.to_string() };
        text += &format!(", {}", what.replace("{}", &sum));
    }
    text + "\n"
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const NOUN: Noun = Noun {
        names: ["disk", "disks"],
        name: "name",
        columns: &[
            ("NAME", "name", Kind::Text),
            ("SIZE", "size", Kind::Size),
            ("OPEN BY", "open_by", Kind::Text),
        ],
        more: &[("created", "created", Kind::Time)],
        totals: &[("size", Kind::Size, "{} in all")],
        notes: no_notes,
    };

    fn rows() -> Vec<Value> {
        vec![
            json!({"name": "web1", "size": 20_u64 << 30, "open_by": "QEMU 7", "created": "2026-01-02T00:00:00Z"}),
            json!({"name": "db", "size": 9, "open_by": null, "created": "2026-01-03T00:00:00Z"}),
            json!({"name": "Web2", "size": 1024, "open_by": "", "created": "2026-01-01T00:00:00Z"}),
        ]
    }

    fn choice(sort: Option<&str>, filters: &[&str]) -> Choice {
        let filters = filters.iter().map(|&filter| filter.to_owned()).collect();
        Choice { sort: sort.map(str::to_owned), filters }
    }

    #[track_caller]
    fn names(sort: Option<&str>, filters: &[&str]) -> Vec<String> {
        let rows = choice(sort, filters).choose(rows(), &NOUN).expect("a valid choice");
        rows.iter().map(|row| row["name"].as_str().expect("a name").to_owned()).collect()
    }

    #[test]
    fn rows_are_sorted_by_a_column_of_any_kind() {
        assert_eq!(names(None, &[]), ["web1", "db", "Web2"]);
        assert_eq!(names(Some("size"), &[]), ["db", "Web2", "web1"]);
        assert_eq!(names(Some("SIZE:desc"), &[]), ["web1", "Web2", "db"]);
        assert_eq!(names(Some("created:asc"), &[]), ["Web2", "web1", "db"]);
        assert_eq!(names(Some("name"), &[]), ["Web2", "db", "web1"]);
        // Rows without a value are last in both orders, and keep theirs.
        assert_eq!(names(Some("open_by"), &[]), ["web1", "db", "Web2"]);
        assert_eq!(names(Some("open_by:desc"), &[]), ["web1", "db", "Web2"]);
    }

    #[test]
    fn filters_compare_with_the_value_and_with_what_is_shown() {
        assert_eq!(names(None, &["name=db"]), ["db"]);
        assert_eq!(names(None, &["name~WEB"]), ["web1", "Web2"]);
        assert_eq!(names(None, &["size=20G"]), ["web1"]);
        assert_eq!(names(None, &["size=1024"]), ["Web2"]);
        assert_eq!(names(None, &["size=1KiB"]), ["Web2"]);
        assert_eq!(names(None, &["open_by="]), ["db", "Web2"]);
        assert_eq!(names(None, &["open_by~qemu"]), ["web1"]);
        assert_eq!(names(None, &["created~2026-01-01"]), ["Web2"]);
        assert_eq!(names(None, &["name~web", "size=1K"]), ["Web2"]);
        assert_eq!(names(None, &["name=a=b"]), [""; 0]);
    }

    #[test]
    fn a_wrong_column_is_a_usage_error_that_names_the_columns() {
        for (sort, filters) in
            [(Some("colour"), &[][..]), (None, &["colour=red"]), (Some("colour:desc"), &[])]
        {
            let error = choice(sort, filters).check(&NOUN).expect_err("no such column");
            assert_eq!(error.status(), 2);
            assert!(error.to_string().contains("the columns are created, name, open_by, size"), "{error}");
        }
        for (sort, filters, part) in
            [(Some("size:down"), &[][..], "asc or desc"), (None, &["size"], "COLUMN=VALUE")]
        {
            let error = choice(sort, filters).check(&NOUN).expect_err("a wrong option");
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn totals_are_of_the_rows_that_are_shown() {
        let rows = rows();
        assert_eq!(totals(&rows, &NOUN, 3), "3 disks, 20.0G in all\n");
        assert_eq!(totals(&rows[2..], &NOUN, 3), "1 of 3 disks, 1K in all\n");
        assert_eq!(totals(&[], &NOUN, 0), "0 disks, 0 in all\n");
        assert_eq!(totals(&rows[1..2], &NOUN, 1), "1 disk, 9 in all\n");
    }
}
